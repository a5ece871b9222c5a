"Pseudo-labels: files, round trips into training, killed, damaged and mixed-up exports, and the run notebook"

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from udanb.checkpoints.weights import save_weights
from udanb.core.image_io import read_label
from udanb.core.labels import CAMVID11, CITYSCAPES19, LABEL_SPACES, ZEROWASTE5
from udanb.core.storage import write_json
from udanb.core.types import IGNORE, SegOutput, normalize
from udanb.core.utils import seed_all
from udanb.data.catalog import CAMVID, CITYSCAPES, DATASETS, MAPILLARY, ZEROWASTE_V2
from udanb.data.class_stats import class_stats
from udanb.data.custom import parse_dataset_spec
from udanb.data.datasets import LabelFiles, SegDataset, SegSpec
from udanb.data.dummy import write_dummy_dataset
from udanb.data.loaders import train_loader
from udanb.data.pseudo_labels import (
    label_layout,
    labelled_names,
    pseudo_sample,
    pseudo_spec,
    pseudo_stats,
    read_export_journal,
    read_export_record,
    show_pseudo,
    stored_ids,
)
from udanb.data.transforms import TrainTransform, resize_keep_ratio
from udanb.demo.render import write_demo
from udanb.inference.export_pseudo_labels import class_thresholds, export_pseudo, threshold_labels
from udanb.inference.predict import predict
from udanb.inference.tta import tta
from udanb.models.segmentor import create_segmentor
from udanb.runs.datasets import pseudo_labelled_target
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import recipe_dict


class Net(nn.Module):
    "Stride 4; counts its forwards"

    def __init__(self, n, seed=0):
        super().__init__()
        seed_all(seed)
        self.conv, self.calls = nn.Conv2d(3, n, 4, stride=4), 0
        self.conv.weight.data *= 3

    def forward(self, img):
        self.calls += 1
        return SegOutput(self.conv(img))


def tree(spec, root, split, space, n=3, size=(48, 96), **kw):
    write_dummy_dataset(spec, root, n, size, labels=False)
    return SegDataset(spec, root, split, space=space, labels=False, **kw)


@pytest.fixture
def town(tmp_path):
    return tree(CAMVID, tmp_path, 'train', CAMVID11)


def files(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())


go = partial(export_pseudo, quiet=True)


def naive(net, img, space, threshold=None, size=None):
    "Pixel by pixel"
    p = predict(net, normalize(img)[None], size)[0].numpy()
    ids, conf = np.zeros(p.shape[1:], np.uint8), p.max(0)
    for y in range(p.shape[1]):
        for x in range(p.shape[2]):
            c = int(p[:, y, x].argmax())
            t = (
                threshold.get(space.classes[c], 0)
                if isinstance(threshold, dict)
                else threshold or 0
            )
            ids[y, x] = (
                IGNORE
                if p[c, y, x] < np.float32(t)
                else space.train_ids[c]
                if space.train_ids
                else c
            )
    return ids, conf


# ---- what is kept
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5))
def test_thresholds_are_of_the_predicted_class(seed, ts):
    p = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(0)
    names = dict(zip(ZEROWASTE5.classes, ts))
    lbl, kept, conf = threshold_labels(p, class_thresholds(ZEROWASTE5, names))
    for y in range(6):
        for x in range(7):
            c = max(range(5), key=lambda k: p[k, y, x].item())
            assert lbl[y, x] == c
            assert conf[y, x] == p[c, y, x]
            assert kept[y, x] == (c if p[c, y, x].item() >= ts[c] else IGNORE)


def test_a_pixel_at_the_threshold_is_kept():
    p = torch.tensor([0.75, 0.25, 0, 0, 0])[:, None, None]
    assert threshold_labels(p, class_thresholds(ZEROWASTE5, 0.75))[1].item() == 0
    assert threshold_labels(p, class_thresholds(ZEROWASTE5, 0.7501))[1].item() == IGNORE


@pytest.mark.parametrize(
    'bad,why',
    [
        (90, 'is 90'),
        (-0.1, 'is -0.1'),
        (True, 'is True'),
        (dict(car='much'), 'of car is much'),
        (dict(cars=0.5), "did you mean 'car'"),
        (float('nan'), 'is nan'),
    ],
)
def test_impossible_thresholds(bad, why):
    with pytest.raises(ValueError, match=why):
        class_thresholds(CAMVID11, bad)


# ---- files
@pytest.mark.parametrize('threshold', [None, 0.4, dict(road=0.5, car=0.35)])
def test_files_equal_a_naive_loop(town, tmp_path, threshold):
    net, out = Net(11), tmp_path / 'out'
    assert go(net, town, out, CAMVID11, threshold, confidence=True) == out
    assert net.training
    keys = [town.stem(i) for i in range(len(town))]
    names = [f'gtFine/train/{k}_gtFine_labelTrainIds.png' for k in keys]
    assert files(out) == sorted(
        ['pseudo.json', 'pseudo.jsonl', *names, *(f'confidence/{n}' for n in names)]
    )
    px, kept, conf = (np.zeros(11) for _ in range(3))
    for i, n in enumerate(names):
        im = Image.open(out / n)
        want, c = naive(net, town.image(i), CAMVID11, threshold)
        assert im.mode == 'L'
        assert (np.asarray(im) == want).all()
        assert (np.asarray(Image.open(out / 'confidence' / n)) == np.round(c * 255)).all()
        every, row = naive(net, town.image(i), CAMVID11)[0], read_export_journal(out)[town.names[i]]
        for k, t in enumerate(CAMVID11.train_ids):
            assert row['px'][k] == (every == t).sum()
            assert row['kept'][k] == (want == t).sum()
            assert abs(row['conf'][k] - (c[every == t].mean() if (every == t).any() else 0)) < 1e-5
            px[k] += (every == t).sum()
            kept[k] += (want == t).sum()
            conf[k] += c[every == t].sum()
        assert row['bytes'] == {f: (out / f).stat().st_size for f in (n, f'confidence/{n}')}
    tab = pseudo_stats(out)
    np.testing.assert_allclose(tab.share, 100 * np.append(px, px.sum()) / px.sum(), rtol=1e-6)
    seen = np.append(px, px.sum()) > 0
    np.testing.assert_allclose(
        tab.coverage[seen],
        100 * (np.append(kept, kept.sum()) / np.append(px, px.sum()).clip(1))[seen],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        tab.confidence[seen],
        100 * (np.append(conf, conf.sum()) / np.append(px, px.sum()).clip(1))[seen],
        rtol=1e-4,
    )
    assert tab.coverage[~seen].isna().all()
    assert list(tab.index) == [*CAMVID11.classes, 'all']
    assert show_pseudo(out).axes[0].get_xlabel()


def test_network_size_modes_and_views(town, tmp_path):
    "Whatever the network sees, labels have the size of the file"
    net = Net(11)
    small = partial(resize_keep_ratio, size=(24, 48))
    a = go(net, town, tmp_path / 'a', CAMVID11, tfm=small)
    b = go(net, town, tmp_path / 'b', CAMVID11, mode=partial(tta, ratios=(0.5, 1.0), flip=True))
    c = go(net, town, tmp_path / 'c', CAMVID11, mode='slide', crop=32, stride=16)
    f = [x for x in files(a) if x.endswith('.png')][0]
    assert (read_label(a / f) == naive(net, small(town.image(0)), CAMVID11, size=(48, 96))[0]).all()
    want = np.array(CAMVID11.train_ids)[
        tta(net, normalize(town.image(0))[None], (0.5, 1.0))[0].argmax(0).numpy()
    ]
    assert (read_label(b / f) == want).all()
    assert read_label(c / f).shape == (48, 96)
    assert (read_label(c / f) != want).any()
    assert 'ratios=(0.5, 1.0)' in read_export_record(b)['mode']
    assert 'size=(24, 48)' in read_export_record(a)['tfm']


def test_a_dataset_read_at_half_its_size(tmp_path):
    "Mapillary's val is read at half size: its pseudo-labels have the files' size, and come back at half"
    f = tree(MAPILLARY, tmp_path, 'val', CITYSCAPES19)
    out = go(Net(19), f, tmp_path / 'out', CITYSCAPES19)
    back = SegDataset(
        pseudo_spec(MAPILLARY, out, CITYSCAPES19), tmp_path, 'val', space=CITYSCAPES19
    )
    assert f.image(0).shape[:2] == (24, 48) == back.label(0).shape
    assert read_label(back.label_path(0)).shape == (48, 96)


# ---- round trips
def own(**kw):
    return parse_dataset_spec(
        'mine',
        dict(
            images='pics/{split}/*.jpg',
            splits=dict(train='a', test='b'),
            space=dict(name='fruit', classes=['leaf', 'apple', 'pear']),
        )
        | kw,
    )


CASES = dict(
    cityscapes=(CITYSCAPES, 'train', CITYSCAPES19),
    camvid=(CAMVID, 'val', CAMVID11),
    zerowaste=(ZEROWASTE_V2, 'test', ZEROWASTE5),
    zerowaste_all=(ZEROWASTE_V2, 'train', ZEROWASTE5),
    own=(own(), 'test', own().space),
    own_labelled=(own(labels='marks/{split}/*_m.png'), 'train', own().space),
)


@pytest.mark.parametrize('case', CASES)
def test_round_trip_into_training(tmp_path, case):
    "Written, opened as a labelled training set, drawn as batches: the labels are those of the network"
    spec, split, space = CASES[case]
    f, net = tree(spec, tmp_path / 'data', split, space), Net(len(space))
    probs = [predict(net, normalize(f.image(i))[None])[0] for i in range(len(f))]
    t = float(np.median(np.concatenate([p.max(0)[0].numpy().ravel() for p in probs])))
    out = go(net, f, tmp_path / '{odd} out', space, t)
    back = SegDataset(pseudo_spec(spec, out, space), tmp_path / 'data', split, space=space)
    assert back.names == f.names
    assert len(back) >= 3
    assert all(back.label_path(i).is_relative_to(out) for i in range(len(back)))
    for i, p in enumerate(probs):
        assert (back.image(i) == f.image(i)).all()
        assert (back.label(i) == torch.where(p.max(0)[0] < t, IGNORE, p.max(0)[1]).numpy()).all()
    assert 0.3 < np.mean([back.label(i) == IGNORE for i in range(len(back))]) < 0.6
    tfm = TrainTransform(crop=(32, 32))
    batch = next(iter(train_loader(back, None, tfm, tfm, 2, 0, steps=1)))
    assert batch.src.lbl.shape == (2, 32, 32)
    assert set(batch.src.lbl.unique().tolist()) <= {
        *range(len(space)),
        IGNORE,
    }
    x = pseudo_sample(f, out, [0, 2], space)
    assert x.wgt is None
    assert (x.lbl[1].numpy() == back.label(2)).all()


def test_rare_class_sampling_counts_what_was_kept(town, tmp_path):
    "Statistics of pseudo-labels lie with them, and nothing is put beside the dataset"
    out = go(Net(11), town, tmp_path / 'out', CAMVID11, 0.4)
    back = SegDataset(pseudo_spec(CAMVID, out, CAMVID11), tmp_path, space=CAMVID11)
    for _ in range(2):
        counted = class_stats(back, quiet=True)  # the second time from the file
        assert [sum(n.get(c, 0) for _, n in counted) for c in range(11)] == np.array(
            [r['kept'] for r in read_export_journal(out).values()]
        ).sum(0).tolist()
    assert (out / '.class_stats.json').exists()
    assert not list((tmp_path / 'camvid').rglob('*class_stats*'))


@pytest.mark.parametrize('name', DATASETS)
def test_every_dataset_has_a_place(name):
    spec = DATASETS[name]
    folder, suffix = label_layout(spec, spec.space)
    assert suffix.lower().endswith('.png')
    assert any((k.folder, k.suffix) == (folder, suffix) for k in spec.labels)
    if spec.space.name != 'zerowaste5' and name not in ('bdd100k',):
        assert 'labelTrainIds' in suffix  # never train ids under a name that says label ids


def test_places_without_fitting_kinds():
    ids = {7: 0, 8: 1, 11: 2}

    def kind(suffix, **kw):
        return LabelFiles('gt/{split}', suffix, ids, **kw)

    spec = SegSpec(
        'x', 'x', 'images', ('.png',), (kind('_polygons.json', read=print), kind('_ids.png'))
    )
    assert label_layout(spec, CITYSCAPES19) == ('gt/{split}', '_polygons.png')
    assert label_layout(replace(spec, labels=(kind('.PNG'),)), CITYSCAPES19) == (
        'gt/{split}',
        '.PNG',
    )
    rgb = LabelFiles(
        'colour', '.png', {i: i for i in range(19)}, read=print
    )  # holds colours: not the same numbers
    assert label_layout(
        replace(spec, labels=(rgb, LabelFiles('ids', '_t.png', {i: i for i in range(19)}))),
        CITYSCAPES19,
    ) == ('ids', '_t.png')
    assert label_layout(replace(spec, labels=()), CITYSCAPES19) == ('labels/{split}', '.png')
    assert [stored_ids(s)[:3] for s in LABEL_SPACES.values()] == [(0, 1, 2)] * 5
    assert stored_ids(CAMVID11)[-1] == 18


def test_a_folder_is_of_one_split(tmp_path):
    "A run asks the folder which split it is to open"
    net = Net(11)
    train, val = (tree(CAMVID, tmp_path, s, CAMVID11) for s in ('train', 'val'))
    out = go(net, train, tmp_path / 'out', CAMVID11)
    with pytest.raises(ValueError, match='split: train there, val here'):
        go(net, val, out, CAMVID11)


def test_a_run_can_learn_them_in_other_spaces(town, tmp_path):
    "Labels of eleven classes, opened with the nineteen they are part of"
    out = go(Net(11), town, tmp_path / 'out', CAMVID11)
    spec = pseudo_spec(CAMVID, out, CAMVID11)
    a, b = (
        SegDataset(spec, tmp_path, space=CAMVID11),
        SegDataset(spec, tmp_path, space=CITYSCAPES19),
    )
    assert (np.array(CAMVID11.train_ids)[a.label(0)] == b.label(0)).all()


# ---- what goes wrong
def test_truncated_removed_and_foreign_rows(town, tmp_path):
    net, out = Net(11), tmp_path / 'out'
    go(net, town, out, CAMVID11, 0.4, confidence=True)
    whole = {f: (out / f).read_bytes() for f in files(out)}
    labels = [f for f in whole if f.startswith('gtFine')]

    def again():
        return (
            setattr(net, 'calls', 0),
            go(net, town, out, CAMVID11, 0.4, confidence=True),
            net.calls,
        )[-1]

    def same():
        return {f: (out / f).read_bytes() for f in files(out)} == whole

    assert again() == 0
    assert same()
    (out / labels[0]).write_bytes(whole[labels[0]][:-7])
    assert again() == 1
    assert same()  # truncated
    (out / labels[1]).write_bytes(b'')
    (out / 'confidence' / labels[2]).unlink()
    assert again() == 2
    assert same()
    shutil.rmtree(out / 'confidence')
    assert again() == 3
    assert same()
    rows = whole['pseudo.jsonl'].split(b'\n')
    for bad in (
        rows[0][: len(rows[0]) // 2],
        b'\x00\xff garbage',
        b'7',
        b'[]',
        b'{"name": "x"}',
        rows[0].replace(b'"bytes"', b'"bites"'),
        rows[0].replace(b'"px": [', b'"px": [0, '),
    ):
        (out / 'pseudo.jsonl').write_bytes(b'\n'.join([bad, *rows[1:]]))
        assert again() == 1 and same(), bad
    (out / 'pseudo.jsonl').write_bytes(whole['pseudo.jsonl'][:-20])
    assert again() == 1
    assert same()  # the last line torn, without its end
    (out / 'pseudo.jsonl').unlink()
    assert again() == 3
    assert same()
    other = json.loads(rows[1]) | dict(
        name=json.loads(rows[0])['name']
    )  # a row that tells another image's files
    (out / 'pseudo.jsonl').write_bytes(b'\n'.join([json.dumps(other).encode(), *rows[1:]]))
    assert again() == 1
    assert same()


def test_only_finished_images_count(town, tmp_path):
    out = go(Net(11), town, tmp_path / 'out', CAMVID11)
    (out / [f for f in files(out) if f.startswith('gtFine')][0]).write_bytes(b'x')
    assert pseudo_stats(out).images['all'] == 2
    (out / 'pseudo.jsonl').write_text('')
    with pytest.raises(ValueError, match='no pseudo-label is finished'):
        pseudo_stats(out)


def test_other_settings_are_refused(town, tmp_path):
    net, out = Net(11), tmp_path / 'out'
    go(net, town, out, CAMVID11, 0.4)
    before = {f: (out / f).stat().st_mtime_ns for f in files(out)}
    for kw, why in (
        (dict(threshold=0.5), "threshold: {.*0.4.*there, {.*0.5.*here"),
        (dict(threshold=0.4, confidence=True), 'confidence: False there, True here'),
        (
            dict(threshold=0.4, mode='slide', crop=32),
            'mode: whole there, slide here; crop: None there, 32 here',
        ),
        (dict(threshold=0.4, tfm=partial(resize_keep_ratio, size=(24, 48))), 'tfm: None there'),
    ):
        with pytest.raises(ValueError, match=f'made differently .{why}'):
            go(net, town, out, CAMVID11, **kw)
    with pytest.raises(ValueError, match='weights: .{8} there'):
        go(Net(11, 1), town, out, CAMVID11, 0.4)
    go(
        net, town, out, CAMVID11, dict.fromkeys(CAMVID11.classes, 0.4)
    )  # the same thresholds, said otherwise
    assert {f: (out / f).stat().st_mtime_ns for f in files(out)} == before
    (out / 'pseudo.json').write_text('{"weights": ')
    with pytest.raises(ValueError, match='pseudo.json: damaged'):
        go(net, town, out, CAMVID11, 0.4)


def test_a_lost_record(town, tmp_path):
    "What only the journal knows is made anew, what it does not know is foreign, and nothing outside is touched"
    net, out = Net(11), tmp_path / 'out'
    go(net, town, out, CAMVID11, 0.4, confidence=True)
    whole = {f: (out / f).read_bytes() for f in files(out)}
    labels = [f for f in whole if f.startswith('gtFine')]
    (out / 'pseudo.json').unlink()
    (out / labels[0]).write_bytes(b'cut')
    go(Net(11, 1), town, out, CAMVID11, 0.5)  # by another network, with other settings
    want = go(Net(11, 1), town, tmp_path / 'want', CAMVID11, 0.5)
    assert {f: (out / f).read_bytes() for f in files(out)} == {
        f: (want / f).read_bytes() for f in files(want)
    }
    mine = tmp_path / 'mine.png'
    mine.write_bytes(b'mine')
    row = read_export_journal(out)[town.names[0]]
    with open(out / 'pseudo.jsonl', 'a') as f:
        f.write(json.dumps(row | dict(name='x', bytes={'../mine.png': 4, str(mine): 4})) + '\n')
    (out / 'pseudo.json').unlink()
    go(net, town, out, CAMVID11, 0.4, confidence=True)
    assert mine.read_bytes() == b'mine'
    assert {f: (out / f).read_bytes() for f in files(out)} == whole
    (out / 'pseudo.json').unlink()
    rows = (out / 'pseudo.jsonl').read_text().splitlines(True)
    (out / 'pseudo.jsonl').write_text(''.join(rows[1:]))
    with pytest.raises(FileExistsError, match=f'{labels[0]} was not written by export_pseudo'):
        go(net, town, out, CAMVID11, 0.4)
    assert (out / labels[0]).read_bytes() == whole[labels[0]]


# ---- learned by a run
def recipe(out, **kw):
    return make_recipe(
        'selftrain',
        'demo',
        overrides=dict(
            target='camvid', method_args=dict(selftrain=dict(pseudo_labels=str(out))), rcs=False
        )
        | kw,
    )


class Halt(Net):
    "Stops at the third image, as a killed process would"

    def forward(self, img):
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().forward(img)


def test_an_unfinished_export_is_not_learned(tmp_path):
    f = tree(CAMVID, tmp_path, 'train', CAMVID11, 5)

    def take(out, **kw):
        return pseudo_labelled_target(recipe(out, **kw), CAMVID, tmp_path, out)

    n, out = len(f), tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt):
        go(Halt(11), f, out, CAMVID11)
    for kw in ({}, dict(skip_broken=True), dict(limit=2)):
        with pytest.raises(
            ValueError,
            match=f'out: 2 of {n} pseudo-labels.*interrupted.*Run pseudo_label.ipynb again',
        ):
            take(out, **kw)
    go(Halt(11), replace_names(f, 2), tmp_path / 'two', CAMVID11)  # a deliberate limit
    two = take(tmp_path / 'two')
    assert two.names == f.names[:2]
    assert two.skipped == {}
    assert len(take(tmp_path / 'two', limit=1)) == 1
    go(Net(11), f, out, CAMVID11)
    assert take(out).names == f.names
    assert len(take(out, limit=3)) == 3
    assert read_export_record(out)['images'] == n
    go(Net(11), replace_names(f, 2), out, CAMVID11)  # fewer asked for later: nothing is lost
    assert take(out).names == f.names
    halt = Halt(11)
    halt.calls = 1
    with pytest.raises(KeyboardInterrupt):
        go(halt, f, tmp_path / 'two', CAMVID11)
    with pytest.raises(ValueError, match=f'two: 3 of {n} pseudo-labels'):
        take(tmp_path / 'two')  # a larger limit, begun
    labels = [x for x in files(out) if x.startswith('gtFine')]
    Image.fromarray(np.zeros((48, 96), np.uint8)).save(
        out / labels[0]
    )  # corrected by hand: another size on disk
    assert (take(out).label(0) == 0).all()
    assert labelled_names(out) == f.names
    (out / labels[1]).unlink()
    with pytest.raises(ValueError, match=f'out: {n - 1} of {n} pseudo-labels'):
        take(out)
    write_json(
        out / 'pseudo.json', {k: v for k, v in read_export_record(out).items() if k != 'images'}
    )  # as an earlier version wrote it
    with pytest.raises(ValueError, match='of an unknown number of pseudo-labels'):
        take(out)
    go(Net(11), f, out, CAMVID11)
    assert len(take(out)) == n


def replace_names(f, n):
    return SegDataset(f.spec, f.root.parent, f.split, f.space, labels=False, limit=n)


def test_broken_images_are_left_out(tmp_path):
    "The reason names no folder; the images are missing in training, and the count is right, also after a kill"
    f, net = tree(CAMVID, tmp_path, 'train', CAMVID11, 5), Net(11)
    bad, n = f.path(1), len(f)
    whole_file = bad.read_bytes()
    bad.write_bytes(whole_file[:99])
    with pytest.raises(ValueError, match=f'{bad.name}: broken image file'):
        go(net, f, tmp_path / 'out', CAMVID11)
    with pytest.raises(KeyboardInterrupt):
        go(Halt(11), f, tmp_path / 'killed', CAMVID11, skip_broken=True)
    with pytest.raises(ValueError, match=f'killed: 2 of {n} pseudo-labels'):
        pseudo_labelled_target(
            recipe(tmp_path / 'killed', skip_broken=True), CAMVID, tmp_path, tmp_path / 'killed'
        )
    for k in ('out', 'killed', 'once'):
        with pytest.warns(
            UserWarning, match=f'1 of {n} images .* left out .skip_broken.: {f.names[1]}'
        ):
            out = go(net, f, tmp_path / k, CAMVID11, skip_broken=True)
        stamp = read_export_record(out)
        assert stamp['images'] == n - 1 == len(read_export_journal(out))
        assert list(stamp['skipped']) == [f.names[1]]
        assert str(tmp_path) not in str(stamp)
        assert stamp['skipped'][f.names[1]].startswith(f'{f.names[1]}: broken image file')
        for skip in (False, True):
            back = pseudo_labelled_target(recipe(out, skip_broken=skip), CAMVID, tmp_path, out)
            assert back.names == [x for x in f.names if x != f.names[1]]
            assert back.skipped == stamp['skipped']
    before = {x: (out / x).stat().st_mtime_ns for x in files(out) if x.endswith('.png')}
    bad.write_bytes(whole_file)
    go(net, f, out, CAMVID11)
    assert len(labelled_names(out)) == n
    assert 'skipped' not in read_export_record(out)
    assert all((out / x).stat().st_mtime_ns == t for x, t in before.items())
    for i in range(n):
        f.path(i).write_bytes(b'')
    with pytest.raises(ValueError, match=f'none of {n} images can be read'):
        go(net, f, tmp_path / 'none', CAMVID11, skip_broken=True)


def test_nothing_foreign_is_overwritten(town, tmp_path):
    net, mine = (
        Net(11),
        tmp_path / 'out' / 'gtFine' / 'train' / f'{town.stem(1)}_gtFine_labelTrainIds.png',
    )
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'drawn by hand')
    with pytest.raises(FileExistsError, match='was not written by export_pseudo'):
        go(net, town, tmp_path / 'out', CAMVID11)
    for inside in ('camvid', 'camvid/leftImg8bit/auto'):
        with pytest.raises(ValueError, match='lies in the dataset camvid itself'):
            go(net, town, tmp_path / inside, CAMVID11)
    assert mine.read_bytes() == b'drawn by hand'
    assert len(files(tmp_path / 'out')) == 1
    assert net.calls == 0


def test_twins_are_refused(tmp_path):
    spec = parse_dataset_spec('mine', dict(images=['pics/*.jpg', 'pics/*.png'], space='zerowaste5'))
    (tmp_path / 'mine' / 'pics').mkdir(parents=True)
    for e in ('jpg', 'png'):
        Image.new('RGB', (16, 16)).save(tmp_path / 'mine' / 'pics' / f'a.{e}')
    with pytest.raises(ValueError, match='a.jpg and pics/a.png would both be labelled by'):
        go(Net(5), SegDataset(spec, tmp_path, labels=False), tmp_path / 'out', ZEROWASTE5)


def test_networks_that_do_not_fit(town, tmp_path):
    name = town.names[0]
    with pytest.raises(
        ValueError, match=f'{name}: the network predicts 5 classes, label space camvid11 has 11'
    ):
        go(Net(5), town, tmp_path / 'a', CAMVID11)
    net = Net(11)
    net.conv.bias.data[3] = torch.nan
    for k, mode in enumerate(('whole', partial(tta, ratios=(1.0,)))):
        with pytest.raises(FloatingPointError, match=name):
            go(net, town, tmp_path / f'nan{k}', CAMVID11, mode=mode)
        assert files(tmp_path / f'nan{k}') == [
            'pseudo.json',
            'pseudo.jsonl',
        ]
        assert not read_export_journal(tmp_path / f'nan{k}')


def test_descriptions_that_do_not_fit(town, tmp_path):
    out = go(Net(11), town, tmp_path / 'out', CAMVID11)
    with pytest.raises(ValueError, match='have the dataset camvid, not cityscapes'):
        pseudo_spec(CITYSCAPES, out, CAMVID11)
    with pytest.raises(ValueError, match='have the classes'):
        pseudo_spec(CAMVID, out, ZEROWASTE5)
    with pytest.raises(FileNotFoundError, match='no pseudo.json; write them with'):
        pseudo_spec(CAMVID, tmp_path, CAMVID11)
    (out / [f for f in files(out) if f.startswith('gtFine')][0]).unlink()
    with pytest.raises(ValueError, match='1 of 3 images .* have no label'):
        SegDataset(pseudo_spec(CAMVID, out, CAMVID11), tmp_path, space=CAMVID11)


# ---- killed
SCRIPT = '''
import sys, time, torch
from torch import nn
from udanb.data.catalog import CAMVID
from udanb.core.types import SegOutput
from udanb.core.utils import seed_all
from udanb.data.datasets import SegDataset
from udanb.core.labels import CAMVID11
from udanb.inference.export_pseudo_labels import export_pseudo
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        seed_all(0)
        self.conv = nn.Conv2d(3, 11, 4, stride=4)
        self.conv.weight.data *= 3
    def forward(self, img): time.sleep(.03); return SegOutput(self.conv(img))
f = SegDataset(CAMVID, sys.argv[1], 'train', space=CAMVID11, labels=False)
export_pseudo(Slow(), f, sys.argv[2], CAMVID11, .4, confidence=True, quiet=True)
'''


def test_a_killed_export_goes_on(tmp_path):
    "SIGKILL in the middle, twice; what is finished is not done again, and in the end all is as in one go"
    n = 60
    f = tree(CAMVID, tmp_path / 'data', 'train', CAMVID11, n)
    env = os.environ | dict(OMP_NUM_THREADS='1')

    def begin():
        return subprocess.Popen(
            [sys.executable, '-c', SCRIPT, tmp_path / 'data', tmp_path / 'out'],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )

    for stop in (8, 25):
        p, t0 = begin(), time.time()
        while len(read_export_journal(tmp_path / 'out')) < stop:
            assert p.poll() is None and time.time() - t0 < 120, (
                p.stderr.read() if p.poll() is not None else 'too slow'
            )
            time.sleep(0.005)
        p.send_signal(signal.SIGKILL)
        p.wait()
        done = len(read_export_journal(tmp_path / 'out'))
        assert stop <= done < n
        for r in read_export_journal(
            tmp_path / 'out'
        ).values():  # a row never comes before its files
            for name, size in r['bytes'].items():
                assert (tmp_path / 'out' / name).stat().st_size == size
                assert read_label(tmp_path / 'out' / name).shape == (48, 96)
    net = Net(11)
    go(net, f, tmp_path / 'out', CAMVID11, 0.4, confidence=True)
    assert net.calls == n - done
    once = export_pseudo(Net(11), f, tmp_path / 'once', CAMVID11, 0.4, confidence=True, quiet=True)
    seen = [
        x for x in files(tmp_path / 'out') if '/.' not in x
    ]  # a killed process may leave a hidden, half-written part
    assert seen == files(once)
    assert all((once / x).read_bytes() == (tmp_path / 'out' / x).read_bytes() for x in seen)


def test_a_full_disk(town, tmp_path):
    "A disk of 64 KiB fills up: the export stops with the system's error, and resumes when there is room"
    disk = tmp_path / 'disk'
    disk.mkdir()

    def mount(*a):
        return subprocess.run(
            ['mount', '-t', 'tmpfs', *a, 'tmpfs', disk], capture_output=True
        ).returncode

    if os.geteuid() or mount('-o', 'size=64k'):
        pytest.skip('mounting a tmpfs needs root')
    try:
        f = tree(CAMVID, tmp_path, 'train', CAMVID11, 24)
        with pytest.raises(OSError) as e:
            go(Net(11), f, disk / 'out', CAMVID11, confidence=True)
        assert e.value.errno == errno.ENOSPC
        rows = read_export_journal(disk / 'out')
        assert 0 < len(rows) < 24
        assert not list((disk / 'out').rglob('.*part*'))
        for r in rows.values():
            for x, size in r['bytes'].items():
                assert (disk / 'out' / x).stat().st_size == size
                assert read_label(disk / 'out' / x).shape == (48, 96)
        assert mount('-o', 'remount,size=4m') == 0
        net = Net(11)
        out = go(net, f, disk / 'out', CAMVID11, confidence=True)
        once = go(Net(11), f, tmp_path / 'once', CAMVID11, confidence=True)
        assert net.calls == 24 - len(rows)
        assert files(out) == files(once)
        assert all((out / x).read_bytes() == (once / x).read_bytes() for x in files(once))
    finally:
        subprocess.run(['umount', disk])


# ---- the run notebook
PAGE = ROOT / 'nbs' / 'pseudo_label.ipynb'
CELLS = [
    c for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
]


def notebook(**params):
    "Run the notebook's cells here, as papermill would with these parameters; what they leave behind"
    space = {'In': [''], 'display': lambda *a: None}
    for c in CELLS:
        src = ''.join(c['source'])
        if src.startswith('#| hide'):
            continue  # the smoke size of an empty call
        for s in [src] + [
            '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in params.items())
        ] * ('parameters' in c['metadata'].get('tags', [])):
            space['In'].append(s)
            exec(compile(s, PAGE.name, 'exec'), space)
    return space


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run's folder with an untrained network, and the demo it was trained on"
    root = tmp_path_factory.mktemp('run')
    seed_all(0)
    r, net = (
        make_recipe(
            'dacs',
            'demo',
            overrides=dict(backbone='mit_b0', pretrained=None, embed_dim=16, image_size=(32, 64)),
        ),
        create_segmentor('mit_b0', 19, dim=16),
    )
    write_json(root / 'run' / 'recipe.json', recipe_dict(r))
    save_weights(
        root / 'run' / 'model.safetensors',
        net,
        dict(recipe=recipe_dict(r), classes=CITYSCAPES19.classes),
    )
    write_demo(root / 'data' / 'demo', n_source=1, n_target=3, n_val=2, size=(64, 128), quiet=True)
    return root


def test_notebook_from_the_shell_with_nothing_given(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(
        IN_TEST='1', OMP_NUM_THREADS='1'
    )
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            '--no-progress-bar',
            PAGE,
            tmp_path / 'x.ipynb',
            '-p',
            'out',
            tmp_path / 'out',
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    got = files(tmp_path / 'out')
    assert {
        'pseudo.json',
        'pseudo.jsonl',
        'stats.csv',
        'figures/shares.png',
        'figures/labels.png',
    } <= set(got)
    assert (
        sum(g.startswith('gtFine/train') for g in got)
        == 2
        == sum(g.startswith('confidence') for g in got)
    )
    assert (
        sum(
            'image/png' in o.get('data', {})
            for c in json.loads((tmp_path / 'x.ipynb').read_text())['cells']
            for o in c.get('outputs', [])
        )
        == 2
    )


def test_notebook_writes_what_the_function_writes(run, tmp_path):
    "Plain and with two views, split val; a soup's file is as good as a run; statistics are those of the page"
    kw = dict(run=str(run / 'run'), data_root=str(run / 'data'), split='val')
    a = notebook(**kw, threshold=dict(sky=0.06), out=str(tmp_path / 'a'))
    f = SegDataset(DATASETS['demo_target'], run / 'data', 'val', labels=False)
    want = go(
        a['net'],
        f,
        tmp_path / 'want',
        CITYSCAPES19,
        dict(sky=0.06),
        tfm=partial(resize_keep_ratio, size=(32, 64)),
    )
    labels = [x for x in files(want) if x.endswith('.png')]
    assert len(labels) == 2
    assert all((want / x).read_bytes() == (tmp_path / 'a' / x).read_bytes() for x in labels)
    assert read_export_record(want) == read_export_record(tmp_path / 'a')
    stats = pd.read_csv(tmp_path / 'a' / 'stats.csv')
    np.testing.assert_allclose(stats.coverage, pseudo_stats(want).coverage, atol=1e-3)
    shutil.copy(run / 'run' / 'model.safetensors', tmp_path / 'uniform.safetensors')
    b = notebook(
        **kw | dict(run=str(tmp_path / 'uniform.safetensors')),
        threshold=None,
        ratios=[0.5, 1.0],
        flip=True,
        limit=1,
        out=str(tmp_path / 'b'),
    )
    px = f.image(0)
    got = tta(b['net'], normalize(px)[None], (0.5, 1.0), True, size=(32, 64))[0].argmax(0).numpy()
    assert (read_label(tmp_path / 'b' / labels[0]) == got).all()
    assert len(read_export_journal(tmp_path / 'b')) == 1


def test_notebook_names_bad_input(run, tmp_path):
    def fails(kind, match, **kw):
        with pytest.raises(kind, match=match):
            notebook(
                **dict(run=str(run / 'run'), data_root=str(run / 'data'), out=str(tmp_path / 'out'))
                | kw
            )

    fails(ValueError, "did you mean 'threshold'", treshold=0.9)
    fails(ValueError, 'threshold of road is 9', threshold=9)
    fails(ValueError, "did you mean 'train'", split='trian')
    fails(ValueError, 'crop None: give', mode='slide')
    fails(FileNotFoundError, 'nowhere: there is no such run', run=str(tmp_path / 'nowhere'))
    (tmp_path / 'empty').mkdir()
    fails(FileNotFoundError, 'empty is not the folder of a run', run=str(tmp_path / 'empty'))
    save_weights(tmp_path / 'bare.safetensors', Net(3))
    fails(
        ValueError,
        'bare.safetensors has no recipe in its metadata',
        run=str(tmp_path / 'bare.safetensors'),
    )
    assert not (tmp_path / 'out').exists()
