"Validation: faults, conversion as upstream does it, journals that survive a kill, copies that change no pixel"

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.image_io import read_image, read_label
from udanb.core.labels import CITYSCAPES_IDS, SYNTHIA_IDS
from udanb.data.cache import cache_dir, pending_indices, shrink_to_fit, use_cache
from udanb.data.catalog import (
    CAMVID,
    CITYSCAPES,
    DATASETS,
    GTA,
    MAPILLARY,
    SYNSCAPES,
    SYNTHIA,
    TOWN,
    ZEROWASTE_V2,
)
from udanb.data.class_stats import class_stats, stats_paths
from udanb.data.custom import parse_dataset_spec
from udanb.data.datasets import SegDataset
from udanb.data.dummy import write_dummy_dataset
from udanb.data.inspection import (
    journal_paths,
    label_settings_hash,
    read_survey_journal,
    train_id_path,
)
from udanb.data.report import (
    class_summary,
    format_verdict,
    list_problems,
    show_frequencies,
    unknown_ids,
)
from udanb.data.transforms import TrainTransform, resize_keep_ratio
from udanb.data.validation import open_splits, orphan_labels, validate_split

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', IN_TEST='1')
HW = 24, 40
KW = dict(quiet=True)


def rng(i):
    return np.random.default_rng(i)


def ids(i, hw=HW, of=(*CITYSCAPES_IDS, 0, 4)):
    return rng(i).choice(np.array([*of], np.uint8), hw)


def save(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **kw)


def pic(i, hw=HW):
    return rng(i).integers(0, 256, (*hw, 3), dtype=np.uint8)


def gta(root, n=4, hw=HW):
    for i in range(1, n + 1):
        save(root / f'gta/images/{i:05d}.png', pic(i, hw))
        lbl = Image.fromarray(ids(i, hw))
        lbl.putpalette(rng(0).integers(0, 256, 768).tolist())
        (root / 'gta/labels').mkdir(parents=True, exist_ok=True)
        lbl.save(root / f'gta/labels/{i:05d}.png')
    return root / 'gta'


def cities(root, labels='_gtFine_labelIds.png'):
    for s, c in dict(train='aachen', val='munster').items():
        for i in range(2):
            name = f'{s}/{c}/{c}_{i}'
            save(root / f'cityscapes/leftImg8bit/{name}_leftImg8bit.png', pic(i))
            if labels:
                save(root / f'cityscapes/gtFine/{name}{labels}', ids(i))
    return root / 'cityscapes'


def train(spec, root, **kw):
    return open_splits(spec, root, **kw)[0]['train']


def validate_gta(root, **kw):
    return validate_split(train(GTA, root), quiet=True, **kw)


def state(folder):
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return {p: p.stat().st_mtime_ns for p in files}


# ---- faults


def test_every_kind_of_fault(tmp_path):
    d = gta(tmp_path, 12)

    def img(i):
        return d / f'images/{i:05d}.png'

    def lbl(i):
        return d / f'labels/{i:05d}.png'

    def cut(path):
        path.write_bytes(path.read_bytes()[:-40])

    cut(img(1))
    img(2).write_bytes(b'')
    cut(lbl(3))
    lbl(4).write_bytes(b'')
    b = bytearray(img(5).read_bytes())
    b[len(b) // 2] ^= 1
    img(5).write_bytes(b)  # one flipped bit
    for i in (6, 7):
        x = ids(i)
        x[0, :i] = 99
        x[1, :3] = 200
        save(lbl(i), x)
    save(lbl(8), ids(8)[:10])
    Image.fromarray(pic(9)).save(lbl(9))  # colours
    lbl(10).unlink()
    shutil.copy(lbl(11), d / 'labels/00077.png')
    (d / 'images/15188.png').write_bytes(img(11).read_bytes())
    save(d / 'labels/15188.png', ids(1)[:9])  # dropped in GTA for that
    splits, notes = open_splits(GTA, tmp_path)
    s = validate_split(splits['train'], **KW)
    found = list_problems([s], orphan_labels(splits.values()), GTA.exclude)
    assert not notes
    assert {(f, p) for f, p in zip(found.file, found.problem)} == {
        ('images/00001.png', 'broken'),
        ('images/00002.png', 'broken'),
        ('labels/00003.png', 'broken'),
        ('labels/00004.png', 'broken'),
        ('images/00005.png', 'broken'),
        ('labels/00006.png', 'ids'),
        ('labels/00007.png', 'ids'),
        ('labels/00008.png', 'size'),
        ('labels/00009.png', 'broken'),
        ('images/00010.png', 'no label'),
        ('labels/00077.png', 'no image'),
    }
    assert found.remedy.str.len().min() > 10
    assert '10 files need' in format_verdict(found)
    assert str(tmp_path) not in found.to_csv()
    assert 'label 40×10, image 40×24' in found.what[found.problem == 'size'].item()
    assert unknown_ids([s]).values.tolist() == [['train', 99, 2, 13], ['train', 200, 2, 6]]
    row = class_summary([s], notes).loc['train']
    assert (row.images, row.labels, row.no_label, row.broken, row['size'], row.ids) == (
        13,
        12,
        1,
        6,
        2,
        2,
    )
    assert '24×40' in row.sizes
    # headers and ends find the cut and the empty file, not the flipped bit
    for j in journal_paths(s.folder):
        j.unlink(missing_ok=True)
    quick = list_problems([validate_split(splits['train'], full=False, **KW)])
    assert {'images/00001.png', 'images/00002.png'} <= set(quick.file)
    assert 'images/00005.png' not in set(quick.file)
    # a later full survey decodes what was only glanced at
    assert validate_split(splits['train'], **KW).new == 12
    assert validate_split(splits['train'], full=False, **KW).new == 0


def test_repaired_and_changed_files_are_looked_at_again_and_only_they(tmp_path):
    d = gta(tmp_path)
    (d / 'images/00002.png').write_bytes(b'x')
    assert len(list_problems([validate_gta(tmp_path)])) == 1
    save(d / 'images/00002.png', pic(2))
    save(d / 'labels/00003.png', np.full(HW, 7, np.uint8))
    s = validate_gta(tmp_path)
    assert s.new == 2
    assert s.px[2] == {0: HW[0] * HW[1]}
    assert list_problems([s]).empty
    wider = replace(
        GTA, labels=(replace(GTA.labels[0], void=(*GTA.labels[0].void, 50)), *GTA.labels[1:])
    )
    assert (
        validate_split(train(wider, tmp_path), **KW).new == 4
    )  # the labels mean something else now


def test_file_that_cannot_be_opened_is_tried_again(tmp_path, monkeypatch):
    gta(tmp_path)

    def closed(path):
        if path.name == '00002.png':
            raise PermissionError(13, 'Permission denied', str(path))
        return read_image(path)

    with monkeypatch.context() as m:
        m.setattr('udanb.data.inspection.read_image', closed)
        assert list_problems([validate_gta(tmp_path)]).problem.tolist() == ['unreadable']
    s = validate_gta(tmp_path)
    assert s.new == 1
    assert list_problems([s]).empty


def test_splits_absent_unlabelled_or_shared(tmp_path):
    d = cities(tmp_path)
    shutil.rmtree(d / 'gtFine/train')
    splits, notes = open_splits(CITYSCAPES, tmp_path)
    assert set(splits) == {'train', 'val'}
    assert splits['train'].labels is None
    assert 'target' in notes['train']
    assert notes['test'] == "dataset 'cityscapes': there is no folder leftImg8bit/test"
    a, b = (validate_split(f, **KW) for f in splits.values())
    t = class_summary([a, b], notes)
    assert t.labels.tolist() == [0, 2, 0]
    assert t.images.tolist() == [2, 2, 0]
    assert a.px == [None, None]
    assert (
        format_verdict(list_problems([a, b]), [a, b])
        == 'ready to train; no labels, usable only as a target: train'
    )
    assert not (d / 'sample_class_stats.json').exists()
    with pytest.raises(FileNotFoundError, match='from_games'):
        open_splits(GTA, tmp_path)
    z = tmp_path / 'zerowaste-v2-splits'  # `train` is train + val + test, and only val has labels
    for i, s in enumerate(('train', 'val', 'test')):
        save(z / f'{s}/data/{i}.png', pic(i))
    save(z / 'val/sem_seg/1.png', ids(1, of=range(5)))
    for _ in range(2):
        splits, _ = open_splits(ZEROWASTE_V2, tmp_path)
        new = [validate_split(f, **KW).new for f in splits.values()]
    assert new == [0, 0, 0]


# ---- conversion


def naive(x, table):
    "The published loop: one comparison per class"
    out, n = np.full(x.shape, 255, np.uint8), {}
    for a, t in table.items():
        out[x == a] = t
        if (x == a).any():
            n[t] = int((x == a).sum())
    return out, dict(sorted(n.items()))


def upstream_files(rows):
    each = {f: {str(c): n for c, n in px.items()} for f, px in rows}
    per = {}
    for f, px in each.items():
        for c, n in px.items():
            per.setdefault(c, []).append([f, n])
    entries = [px | dict(file=f) for f, px in each.items()]
    return entries, each, per


def test_gta_is_converted_as_upstream_does_it(tmp_path):
    d = gta(tmp_path)
    validate_gta(tmp_path, convert=True)
    rows = []
    for i in range(1, 5):
        f = f'labels/{i:05d}_labelTrainIds.png'
        native = np.asarray(Image.open(d / f'labels/{i:05d}.png'))
        want, n = naive(native, CITYSCAPES_IDS)
        Image.fromarray(want).save(tmp_path / 'want.png')
        assert Image.open(d / f).mode == 'L'
        assert (d / f).read_bytes() == (tmp_path / 'want.png').read_bytes()
        rows.append((f, n))
    names = 'sample_class_stats.json', 'sample_class_stats_dict.json', 'samples_with_class.json'
    for name, want in zip(names, upstream_files(rows)):
        assert json.loads((d / name).read_text()) == want, name
    assert len(list((d / 'labels').iterdir())) == 8
    assert orphan_labels([train(GTA, tmp_path)]) == []


def test_synthia_and_synscapes_have_their_names(tmp_path):
    x, y = ids(0, of=SYNTHIA_IDS), ids(1)
    save(tmp_path / 'synthia/RGB/0000000.png', pic(0))
    (tmp_path / 'synthia/GT/LABELS').mkdir(parents=True)
    cv2.imwrite(
        str(tmp_path / 'synthia/GT/LABELS/0000000.png'),
        np.dstack([x * 0, x * 0 + 7, x]).astype(np.uint16),
    )  # 16 bits, class in the last channel
    save(tmp_path / 'synscapes/img/rgb/1.png', pic(1))
    save(tmp_path / 'synscapes/img/class/1.png', y)
    save(tmp_path / 'synscapes/img/class/1_gt_color.png', pic(2))
    for spec, f, want in (
        (SYNTHIA, 'GT/LABELS/0000000_labelTrainIds.png', naive(x, SYNTHIA_IDS)),
        (SYNSCAPES, 'img/class/1_gt_labelTrainIds.png', naive(y, CITYSCAPES_IDS)),
    ):
        for new in (1, 0):
            s = validate_split(train(spec, tmp_path), convert=True, **KW)
            assert s.new == new
            assert s.px == [want[1]]
            assert orphan_labels([s.folder]) == []
        assert np.array_equal(read_label(tmp_path / spec.folder / f), want[0])


def test_cityscapes_polygons_are_converted_as_cityscapesscripts_does_it(tmp_path):
    convert = pytest.importorskip('cityscapesscripts.preparation.json2labelImg').json2labelImg
    d, h, w = cities(tmp_path, labels=None), *HW

    def box(x0, y0, x1, y1):
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]

    scene = dict(
        imgHeight=h,
        imgWidth=w,
        objects=[
            dict(label=l, polygon=p)
            for l, p in (
                ('road', box(0, 10, 39, 23)),
                ('sky', box(0, 0, 39, 9)),
                ('cargroup', box(5, 8, 20, 18)),
                ('license plate', box(6, 9, 9, 11)),
                ('ego vehicle', box(0, 20, 39, 23)),
            )
        ],
    )
    for s, c in dict(train='aachen', val='munster').items():
        for i in range(2):
            p = d / f'gtFine/{s}/{c}/{c}_{i}_gtFine_polygons.json'
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_text(json.dumps(scene))
    first = {
        k: validate_split(f, convert=True, **KW)
        for k, f in open_splits(CITYSCAPES, tmp_path)[0].items()
    }
    convert(
        str(d / 'gtFine/val/munster/munster_0_gtFine_polygons.json'),
        str(tmp_path / 'want.png'),
        'trainIds',
    )
    f = d / 'gtFine/val/munster/munster_0_gtFine_labelTrainIds.png'
    assert np.array_equal(read_label(f), read_label(tmp_path / 'want.png'))
    assert first['train'].new == 2
    stats = json.loads((d / 'sample_class_stats.json').read_text())
    assert [r['file'] for r in stats] == [
        f'gtFine/train/aachen/aachen_{i}_gtFine_labelTrainIds.png' for i in range(2)
    ]  # train only
    assert (d / 'train.txt').read_text() == 'aachen/aachen_0\naachen/aachen_1\n'
    assert (d / 'val.txt').read_text().startswith('munster/munster_0\n')
    again = open_splits(CITYSCAPES, tmp_path)[0]  # the converted file is the label now
    assert again['train'].label_path(0).name.endswith('_labelTrainIds.png')
    before = state(d)
    assert [validate_split(x, convert=True, **KW).new for x in again.values()] == [0, 0]
    assert state(d) == before


def test_converted_file_that_disagrees_is_left_alone_and_named(tmp_path):
    d = gta(tmp_path)
    theirs = d / 'labels/00002_labelTrainIds.png'
    save(theirs, np.zeros(HW, np.uint8))
    save(d / 'labels/00003_labelTrainIds.png', naive(ids(3), CITYSCAPES_IDS)[0], compress_level=0)
    before = {p: p.read_bytes() for p in (theirs, d / 'labels/00003_labelTrainIds.png')}
    found = list_problems([validate_gta(tmp_path, convert=True)])
    assert found.file.tolist() == ['labels/00002_labelTrainIds.png']
    assert 'labels/00002.png' in found.what[0]
    assert found.problem.tolist() == ['differs']
    assert all(p.read_bytes() == b for p, b in before.items())
    theirs.unlink()
    assert list_problems([validate_gta(tmp_path, convert=True)]).empty
    assert np.array_equal(read_label(theirs), naive(ids(2), CITYSCAPES_IDS)[0])


def test_dataset_without_a_place_for_converted_labels(tmp_path):
    gta(tmp_path)
    with pytest.raises(ValueError, match='Leave `convert` out'):
        validate_split(train(replace(GTA, labels=GTA.labels[:1]), tmp_path), convert=True, **KW)


def test_limit_keeps_the_statistics_of_other_labels(tmp_path):
    d = gta(tmp_path)
    validate_gta(tmp_path, convert=True)
    whole = (d / 'sample_class_stats.json').read_text()
    save(d / 'labels/00001.png', np.full(HW, 7, np.uint8))
    (d / 'labels/00001_labelTrainIds.png').unlink()
    validate_split(train(GTA, tmp_path, limit=2), convert=True, **KW)
    new = json.loads((d / 'sample_class_stats.json').read_text())
    assert new[0] == {'0': HW[0] * HW[1], 'file': 'labels/00001_labelTrainIds.png'}
    assert new[1:] == json.loads(whole)[1:]


# ---- trees and statistics of others


def test_statistics_equal_upstreams(shared_data, tmp_path):
    (tmp_path / 'town').mkdir()
    for d in ('images', 'labels'):
        (tmp_path / 'town' / d).symlink_to(shared_data / 'town' / d)
    s = validate_split(train(TOWN, tmp_path), full=False, workers=0, **KW)
    theirs = json.loads((shared_data / 'town' / 'sample_class_stats.json').read_text())
    assert len(theirs) == 700
    counts = [{int(c): n for c, n in r.items() if c != 'file'} for r in theirs]
    assert counts == s.px


@pytest.mark.parametrize('native', [False, True])
def test_tree_prepared_by_upstream_is_accepted_as_it_is(shared_data, tmp_path, native):
    town, d = shared_data / 'town', tmp_path / 'town'
    for f in [f'images/{i:05d}.jpg' for i in range(1, 9)] + [
        f'labels/{i:05d}{e}.png' for i in range(1, 9) for e in ['_labelTrainIds'] + [''] * native
    ]:
        (d / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(town / f, d / f)
    for f in town.glob('sample*.json'):
        shutil.copyfile(f, d / f.name)
    before = state(d)
    s = validate_split(train(TOWN, tmp_path), convert=True, **KW)
    after = state(d)
    assert s.new == 8
    assert list_problems([s]).empty
    assert {p: t for p, t in after.items() if p in before} == before
    assert [p.name for p in after if p not in before] == ['survey.jsonl']
    assert validate_split(train(TOWN, tmp_path), **KW).new == 0
    assert class_stats(train(TOWN, tmp_path), quiet=True)[0][1] == s.px[0]
    assert state(d) == after


# ---- doing nothing, and going on


def test_second_run_does_nothing(tmp_path, monkeypatch):
    d = gta(tmp_path)
    kw = dict(convert=True, size=(12, 20))
    first = validate_gta(tmp_path, **kw)
    before = state(d)
    again = validate_gta(tmp_path, **kw)
    assert (first.new, again.new) == (4, 0)
    assert again.rows == first.rows
    assert state(d) == before

    def count(folder, idx, *args):
        assert not list(idx), 'counted again'
        return []

    monkeypatch.setattr('udanb.data.class_stats.count_labels', count)
    counted = class_stats(SegDataset(GTA, tmp_path), quiet=True)
    assert [px for _, px in counted] == first.px


SCRIPT = '''
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background jobs are born deaf to it
from udanb.data import validation
from udanb.data.catalog import GTA
from udanb.data.custom import parse_dataset_spec
from udanb.data.validation import open_splits, validate_split
real = validation.process_pair
def slow(*a, **kw):          # so that the signal comes in the middle on any machine
    time.sleep(.02)
    return real(*a, **kw)
validation.process_pair = slow
validate_split(open_splits(GTA, sys.argv[1])[0]['train'], convert=True, size=(32,48), workers=2)
'''


def lines(d):
    journal = d / 'survey.jsonl'
    return journal.read_bytes().count(b'\n') if journal.exists() else 0


@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_started_again(tmp_path, sig):
    n, d = 240, gta(tmp_path, 240, (96, 128))
    p, t0 = (
        subprocess.Popen(
            [sys.executable, '-c', SCRIPT, str(tmp_path)],
            env=ENV,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        ),
        time.time(),
    )
    while lines(d) < 40 and p.poll() is None and time.time() - t0 < 120:
        time.sleep(0.002)
    p.send_signal(sig)
    assert p.wait(60) != 0
    assert 40 <= (had := lines(d)) < n
    while time.time() - t0 < 180 and any(str(tmp_path).encode() in c for c in commands()):
        time.sleep(0.2)
    assert not any(str(tmp_path).encode() in c for c in commands())  # no worker outlives its parent
    with open(d / 'survey.jsonl', 'ab') as f:
        f.write(b'{"name": "images/00200.png", "sig": [1')  # cut while writing
    whole = {p: p.stat().st_mtime_ns for p in d.rglob('*_labelTrainIds.png')}
    s = validate_gta(tmp_path, convert=True, size=(32, 48), workers=0)
    assert s.new == n - had
    assert list_problems([s]).empty
    assert all(p.stat().st_mtime_ns == t for p, t in whole.items())
    assert all(
        px == naive(ids(i, (96, 128)), CITYSCAPES_IDS)[1]
        for i, px in list(enumerate(s.px, 1))[::17]
    )
    assert len(json.loads((d / 'sample_class_stats.json').read_text())) == n
    assert len(use_cache(train(GTA, tmp_path), (32, 48))) == n


def commands():
    "Command lines of all processes, where the system tells"
    for f in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            yield f.read_bytes()
        except OSError:
            pass


def test_full_disk_stops_and_goes_on(tmp_path, monkeypatch):
    d = gta(tmp_path)
    real = os.replace
    left = [3]

    def full(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, 'No space left on device', str(b))
        return real(a, b)

    with monkeypatch.context() as m:
        m.setattr('udanb.core.storage.os.replace', full)
        with pytest.raises(
            OSError, match='No space left.*finished images are kept.*run the same command again'
        ) as e:
            validate_gta(tmp_path, convert=True)
    assert e.value.errno == errno.ENOSPC
    assert lines(d) == 3
    assert not list(d.rglob('*.part*'))
    s = validate_gta(tmp_path, convert=True)
    assert s.new == 1
    assert list_problems([s]).empty


def test_disk_full_while_the_journal_is_written(tmp_path, monkeypatch):
    gta(tmp_path)

    class Tight:
        "A journal with room for two lines and a half"

        def __init__(self, f):
            self.f, self.n = f, 0

        def __enter__(self):
            return self

        def __exit__(self, *e):
            self.f.close()

        def flush(self):
            self.f.flush()

        def write(self, b):
            self.n += 1
            self.f.write(b if self.n < 3 else b[:20])
            if self.n == 3:
                raise OSError(errno.ENOSPC, 'No space left on device')

    from udanb.data.inspection import open_survey_journal

    with monkeypatch.context() as m:
        m.setattr(
            'udanb.data.validation.open_survey_journal', lambda f: Tight(open_survey_journal(f))
        )
        with pytest.raises(OSError, match='finished images are kept'):
            validate_gta(tmp_path)
    s = validate_gta(tmp_path)
    assert s.new == 2
    assert list(read_survey_journal(s.folder)) == s.folder.names
    assert validate_gta(tmp_path).new == 0


def test_read_only_tree(tmp_path, monkeypatch):
    "Everything goes to the project's cache; converting says that it cannot write"
    d = gta(tmp_path)
    real = open
    access = os.access
    write = Path.write_bytes

    def inside(p):
        return not isinstance(p, int) and d in Path(p).parents

    def no(p):
        raise OSError(errno.EROFS, 'Read-only file system', str(p))

    monkeypatch.setattr(
        'builtins.open',
        lambda p, mode='r', *a, **k: (
            no(p) if inside(p) and set(mode) & set('wax+') else real(p, mode, *a, **k)
        ),
    )
    monkeypatch.setattr(Path, 'write_bytes', lambda p, b: no(p) if inside(p) else write(p, b))
    monkeypatch.setattr(os, 'access', lambda p, m, **k: access(p, m, **k) and Path(p) != d)
    monkeypatch.chdir(tmp_path)
    before = state(d)
    s = validate_gta(tmp_path, size=(12, 20))
    assert (s.new, validate_gta(tmp_path, size=(12, 20)).new) == (
        4,
        0,
    )
    assert state(d) == before
    assert journal_paths(s.folder)[1].exists()
    assert stats_paths(s.folder)[1].exists()
    assert tmp_path / 'outputs' / '.cache' in cache_dir(s.folder, (12, 20)).parents
    assert use_cache(train(GTA, tmp_path), (12, 20)).image(0).shape == (12, 20, 3)
    with pytest.raises(OSError, match='Read-only.*make the folder writable'):
        validate_gta(tmp_path, convert=True)


def test_nowhere_to_write_a_journal(tmp_path, monkeypatch):
    gta(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'outputs').touch()
    (tmp_path / 'gta/survey.jsonl').mkdir()
    monkeypatch.setattr('udanb.data.cache.read_survey_journal', lambda f: {})
    monkeypatch.setattr('udanb.data.validation.read_survey_journal', lambda f: {})
    with pytest.warns(UserWarning, match='no journal'):
        assert validate_gta(tmp_path).new == 4


def test_workers_make_no_difference(tmp_path):
    d = gta(tmp_path, 9)
    (d / 'images/00004.png').write_bytes(b'')
    a = validate_gta(tmp_path, workers=0).rows
    (d / 'survey.jsonl').unlink()
    assert validate_gta(tmp_path, workers=2).rows == a


# ---- copies


def crops(f, box, **kw):
    return [
        TrainTransform(box, (16, 24), cat_max_ratio=0.75, **kw)(f.image(i), f.label(i), rng(i))
        for i in range(len(f))
    ]


def same(a, b):
    return all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize('box', [(36, 60), (50, 50), (400, 600)])
def test_crops_from_the_copy_are_those_of_the_original(tmp_path, box):
    gta(tmp_path, 4, (70, 127))
    f = train(GTA, tmp_path)
    validate_split(f, size=box, **KW)
    c = use_cache(f, box)
    assert type(c).__name__ == 'CachedSegDataset'
    assert c.image(0).shape[0] <= 70
    assert same(crops(c, box), crops(f, box))
    eleven = SegDataset(GTA, tmp_path, space=CAMVID.space, merge=CAMVID.merge)
    assert same(crops(use_cache(eleven, box), box), crops(eleven, box))
    part = c.exclude({f.names[0]: 'why not'})
    assert len(part) == 3
    assert np.array_equal(part.image(0), c.image(1))
    assert np.array_equal(part.native.image(0), f.image(1))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 120), st.integers(1, 120)),
    st.booleans(),
)
def test_scaling_a_scaled_copy_changes_nothing(hw, box, nearest):
    scale = min(max(box) / max(hw), min(box) / min(hw))
    if min(round(n * scale - 0.001) for n in hw) < 1:
        return  # nothing would be left of it
    x = pic(1, hw)
    y = shrink_to_fit(x, box, nearest)
    assert np.array_equal(resize_keep_ratio(y, box, nearest), resize_keep_ratio(x, box, nearest))
    assert y.shape[0] <= hw[0]
    assert y.shape[1] <= hw[1]


def test_copy_that_is_incomplete_old_or_damaged(tmp_path):
    d, box = gta(tmp_path), (12, 20)
    f = train(GTA, tmp_path)
    with pytest.warns(UserWarning, match='4 of 4 .*-p dataset gta -p cache 12x20'):
        assert use_cache(f, box) is f
    validate_split(f, size=box, **KW)
    assert use_cache(f, box) is not f
    with pytest.warns(UserWarning, match='4 of 4'):
        assert use_cache(f, (10, 20)) is f
    os.utime(d / 'labels/00002.png')
    with pytest.warns(UserWarning, match='1 of 4'):
        assert use_cache(f, box) is f
    assert validate_split(f, size=box, **KW).new == 1
    c = use_cache(f, box)
    p = next(cache_dir(f, box).rglob('00003.png.img.png'))
    p.write_bytes(p.read_bytes()[:50])
    with pytest.raises(ValueError, match='00003.png.img.png.*Remove .*prepare the dataset again'):
        c.image(2)
    p.unlink()
    with pytest.warns(UserWarning, match='1 of 4'):
        use_cache(f, box)


def test_faulty_images_are_read_from_the_original(tmp_path):
    d = gta(tmp_path)
    (d / 'images/00002.png').write_bytes(b'')
    f = train(GTA, tmp_path)
    validate_split(f, size=(12, 20), **KW)
    c = use_cache(f, (12, 20))
    with pytest.raises(ValueError, match='images/00002.png.*empty'):
        c.image(1)
    assert c.image(0).shape == (12, 20, 3)
    assert c.label(2).shape == (12, 20)


def test_jpeg_copies_are_small_and_near(tmp_path):
    gta(tmp_path, 2, (64, 64))
    for i in (1, 2):
        smooth = cv2.GaussianBlur(pic(i, (64, 64)), (0, 0), 6)
        save(tmp_path / f'gta/images/{i:05d}.png', smooth)
    f = train(GTA, tmp_path)
    validate_split(f, size=(32, 32), quality=95, **KW)
    c = use_cache(f, (32, 32), 95)
    want = resize_keep_ratio(f.image(0), (32, 32))
    assert np.abs(c.image(0).astype(int) - want).max() < 16
    assert np.array_equal(c.label(0), resize_keep_ratio(f.label(0), (32, 32), True))


def test_target_without_labels_and_margins(tmp_path):
    d = cities(tmp_path)
    spec = replace(CITYSCAPES, native_size=HW, margins=(3, 5, 4, 2))
    box = (12, 20)
    for f in open_splits(spec, tmp_path)[0].values():
        validate_split(f, size=box, **KW)
    f = SegDataset(spec, tmp_path, labels=False)
    a, b = (
        [TrainTransform(box, (8, 8), margins=x.margins)(x.image(i), None, rng(i)) for i in range(2)]
        for x in (f, use_cache(f, box))
    )
    image_and_weight = [[(x[0], x[2]) for x in crops] for crops in (a, b)]
    assert same(*image_and_weight)
    assert use_cache(f, box).margins != f.margins
    assert (d / '.cache').is_dir()


def test_mapillary_half_size_validation(tmp_path):
    "Statistics of the label as it is on disk; the copy of what a run reads, which is half of it"
    d = tmp_path / 'mapillary/validation'
    save(d / 'images/a.jpg', pic(0, (48, 80)), quality=95)
    save(d / 'v1.2/labels/a.png', ids(0, (48, 80), range(66)))
    f = open_splits(MAPILLARY, tmp_path)[0]['val']
    s = validate_split(f, convert=True, size=(12, 40), **KW)
    converted = read_label(train_id_path(f, 0))
    assert sum(s.px[0].values()) == int((converted != 255).sum())
    assert read_label(d / 'labels/a_labelTrainIds.png').shape == (48, 80)
    c = use_cache(f, (12, 40))
    assert f.image(0).shape[:2] == (24, 40)
    assert c.image(0).shape == (12, 20, 3)
    assert np.array_equal(c.image(0), resize_keep_ratio(f.image(0), (12, 40)))
    assert np.array_equal(c.label(0), resize_keep_ratio(f.label(0), (12, 40), True))
    assert not (
        tmp_path / 'mapillary/sample_class_stats.json'
    ).exists()  # nothing is drawn from val


def test_cached_folder_counts_native_labels(tmp_path):
    gta(tmp_path)
    f = train(GTA, tmp_path)
    px = validate_split(f, size=(12, 20), **KW).px
    (tmp_path / 'gta/sample_class_stats.json').unlink()
    counted = class_stats(use_cache(f, (12, 20)), cache=False, quiet=True)
    assert [n for _, n in counted] == px


# ---- the figure and the notebook


def test_figure_of_a_merged_space():
    px = [{0: 90, 3: 5, 2: 5}, None, {0: 10}]
    fig = show_frequencies(px, CAMVID.space, CAMVID.merge)
    a, b = fig.axes
    names = [t.get_text() for t in a.get_yticklabels()]
    assert names[:2] == ['road', 'building']
    assert b.get_xlabel() == 'images that contain it, of 2'
    texts = [t.get_text().strip() for t in a.texts[:3]]
    assert texts == ['91 %', '9.1 %', 'never']
    assert [p.get_width() for p in b.patches[:2]] == [2, 1]


def papermill(*args):
    cmd = [sys.executable, '-m', 'papermill', '--no-progress-bar', *map(str, args)]
    return subprocess.run(cmd, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


PAGE = ROOT / 'nbs' / 'prepare_data.ipynb'


def test_notebook_looks_at_the_demo(tmp_path):
    p = papermill(PAGE, tmp_path / 'copy.ipynb', '-p', 'out', tmp_path / 'out')
    assert p.returncode == 0, p.stderr[-3000:]
    r = json.loads((tmp_path / 'out/prepare.json').read_text())
    assert r['verdict'] == 'ready to train'
    assert r['read_now'] == 6
    assert (tmp_path / 'out/frequencies.png').exists()
    assert pd.read_csv(tmp_path / 'out/summary.csv', index_col=0).images.to_dict() == dict(
        train=4, val=2, test=0
    )


def test_notebook_converts_and_copies_and_finds_what_is_broken(tmp_path):
    d = gta(tmp_path, 3)
    (d / 'images/00002.png').write_bytes(b'')
    p = papermill(
        PAGE,
        tmp_path / 'copy.ipynb',
        '-p',
        'dataset',
        'gta',
        '-p',
        'data_root',
        tmp_path,
        '-p',
        'out',
        tmp_path / 'out',
        '-p',
        'convert',
        True,
        '-p',
        'cache',
        '12x20',
    )
    assert p.returncode == 0, p.stderr[-3000:]
    r = json.loads((tmp_path / 'out/prepare.json').read_text())
    assert r['verdict'].startswith('1 file needs attention')
    assert r['read_now'] == 3
    assert pd.read_csv(tmp_path / 'out/problems.csv').file.tolist() == ['images/00002.png']
    f = train(GTA, tmp_path)
    assert (d / 'labels/00001_labelTrainIds.png').exists()
    assert not pending_indices(f, read_survey_journal(f), True, True, (12, 20))


def test_notebook_refuses_a_misspelt_parameter(tmp_path):
    p = papermill(
        PAGE, tmp_path / 'copy.ipynb', '-p', 'covert', True, '-p', 'out', tmp_path / 'out'
    )
    assert p.returncode != 0
    assert "did you mean 'convert'" in p.stderr
    assert not (tmp_path / 'out').exists()


def test_copies_of_another_class_list_are_not_taken(tmp_path):
    "Two descriptions of the same files have copies of their own, also when one goes back to the first"
    first = dict(
        folder='g',
        images='im/*.png',
        labels='lb/*.png',
        classes=[dict(name='a', id=1), dict(name='b', id=2)],
        space=dict(name='s', classes=['a', 'b']),
    )
    specs = [
        parse_dataset_spec('x', d)
        for d in (first, first | dict(classes=[dict(name='b', id=1), dict(name='a', id=2)]))
    ]
    write_dummy_dataset(specs[0], tmp_path, n=3, size=(48, 96))
    for s in (*specs, specs[0]):
        f = SegDataset(s, tmp_path)
        validate_split(f, size=(24, 48), workers=0, quiet=True)
        assert np.array_equal(
            use_cache(f, (24, 48)).label(1), resize_keep_ratio(f.label(1), (24, 48), nearest=True)
        )
    assert not np.array_equal(*(SegDataset(s, tmp_path).label(1) for s in specs))


@pytest.mark.parametrize(
    'name,hashes',
    [
        ('gta', ['91f31f6d', '01dc23f9']),
        ('synthia', ['8dc552d1', '01dc23f9']),
        ('cityscapes', ['91f31f6d', '01dc23f9', '8ca0d8d4']),
        ('mapillary', ['acbbb58f', 'aa8274cc', 'acbbb58f']),
    ],
)
def test_earlier_journals_and_copies_stay_current(name, hashes):
    "The hash of a dataset's label settings is what the first version stored (values from commit 1b0aad7)"
    spec = DATASETS[name]
    opened = SimpleNamespace(spec=spec, labels=[(None, k) for k in range(len(spec.labels))])
    assert [label_settings_hash(opened, i) for i in range(len(hashes))] == hashes


def test_earlier_hash_of_own_colours():
    d = dict(images='i/*.png', labels='l/*.png', label_format='colors')
    spec = parse_dataset_spec('x', d | dict(classes=[dict(name='road', color=[1, 2, 3])]))
    opened = SimpleNamespace(spec=spec, labels=[(None, 0)])
    assert label_settings_hash(opened, 0) == 'f023db17'


def test_notebook_takes_the_params_files_of_train_uda():
    "Every key of params/my_pair.yaml is known to the notebook's check, which ignores training settings"
    cells = [''.join(c['source']) for c in json.loads(PAGE.read_text())['cells']]
    (source,) = [c for c in cells if 'check_papermill_parameters(\n' in c]
    (call,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'check_papermill_parameters'
    ]
    known = eval(ast.unparse(call.args[1]))
    params = yaml.safe_load((ROOT / 'params' / 'my_pair.yaml').read_text())
    assert set(params) <= set(known)
