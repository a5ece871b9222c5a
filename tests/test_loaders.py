"Several datasets as one, and batches that are a function of (seed, step)"

import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import test_stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udanb.core.labels import CAMVID11, CITYSCAPES19
from udanb.data import datasets
from udanb.data.catalog import GTA
from udanb.data.class_stats import class_stats
from udanb.data.concat import ConcatSegDataset, sample_index
from udanb.data.datasets import SegDataset
from udanb.data.loaders import eval_loader, train_loader
from udanb.data.samplers import RareClassSampler
from udanb.data.transforms import AUGMENTATIONS, EvalTransform, TrainTransform

data = test_stats.data
gta = test_stats.gta
city = test_stats.city
write = test_stats.write  # the same small trees


def kit(root, **kw):
    return (
        dict(
            src=gta(root),
            tgt=city(root, labels=False),
            src_tfm=TrainTransform(None, (24, 24), cat_max_ratio=0.75),
            tgt_tfm=TrainTransform(None, (24, 24), margins=(2, 6, 1, 1)),
            batch=2,
            seed=3,
        )
        | kw
    )


def load(root, start=0, steps=None, workers=0, **kw):
    "Batches of a loader with these changes of the kit"
    skip_broken = kw.pop('skip_broken', False)
    loader = train_loader(
        **kit(root, **kw), start=start, steps=steps, workers=workers, skip_broken=skip_broken
    )
    return list(loader)


def first(root, **kw):
    "The first batch"
    return load(root, steps=1, **kw)[0]


def drawn_names(batches):
    "Names of the source images"
    return [n for b in batches for n in b.src.name]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is None:
            continue
        if isinstance(x, tuple):
            assert x == y
            continue
        assert x.name == y.name
        assert x.img.equal(y.img)
        for k in ('lbl', 'wgt'):
            p, q = getattr(x, k), getattr(y, k)
            assert p is q is None or p.equal(q)


# ---------------------------------------------------------------- several datasets


class Fake:
    "As much of a `SegDataset` as bookkeeping needs"

    def __init__(self, name, n):
        self.spec = SimpleNamespace(name=name)
        self.space = CITYSCAPES19
        self.skipped = {}
        self.names = [f'{i}.png' for i in range(n)]
        self.labels = list(range(n))

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return self.spec.name, i


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_find_is_a_bijection(sizes):
    folders = [Fake(chr(97 + k), n) for k, n in enumerate(sizes)]
    c = ConcatSegDataset(folders)
    found = [c.locate(i) for i in range(len(c))]
    want = [(k, j) for k, n in enumerate(sizes) for j in range(n)]
    assert found == want
    assert len(c) == sum(sizes) == len(c.names) == len(c.labels) == len(c.share)
    read = [c.image(i) for i in range(len(c))]
    assert [f'{name}/{j}.png' for name, j in read] == c.names
    for i in (-1, len(c)):
        with pytest.raises(IndexError):
            c.locate(i)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    weighted=st.booleans(),
)
def test_draws_follow_shares(sizes, seed, weighted):
    rng = np.random.default_rng(seed)
    w = (
        (rng.integers(0, 4, len(sizes)) + (np.arange(len(sizes)) == 0)).tolist()
        if weighted
        else None
    )
    folders = [Fake(str(k), n) for k, n in enumerate(sizes)]
    c = ConcatSegDataset(folders, w)
    N = 2000
    want = np.array(
        [
            w[k] / sum(w) / n if weighted else 1 / sum(sizes)
            for k, n in enumerate(sizes)
            for _ in range(n)
        ]
    )
    np.testing.assert_allclose(c.share, want, rtol=1e-12)
    drawn = [sample_index(c, rng) for _ in range(N)]
    got = np.bincount(drawn, minlength=len(c)) / N
    assert (
        abs(got - want) <= 6 * np.sqrt(want * (1 - want) / N) + 1e-12
    ).all()  # so a folder of weight 0 is never drawn


def test_without_weights_it_is_one_large_folder():
    a, b = np.random.default_rng(4), np.random.default_rng(4)
    assert [sample_index(ConcatSegDataset([Fake('a', 3), Fake('b', 8)]), a) for _ in range(99)] == [
        sample_index(Fake('c', 11), b) for _ in range(99)
    ]


def two(root, weights=(1, 2), **kw):
    "GTA, and a second source with other images: its labels are one class throughout"
    if not (root / 'more').is_dir():
        for i in range(4):
            grey = np.full((30, 50, 3), 40 * i, np.uint8)
            write(root / f'more/images/{i:05d}.png', grey)
            write(
                root / f'more/labels/{i:05d}.png',
                np.repeat([7, 24], 750).reshape(30, 50).astype(np.uint8),
            )
    return ConcatSegDataset(
        [gta(root, **kw), SegDataset(replace(GTA, name='more', folder='more'), root, **kw)], weights
    )


def test_several_datasets_read_as_their_folders(data):
    c = two(data)
    for i in (0, 9, 10, 13):
        f, j = c.datasets[c.locate(i)[0]], c.locate(i)[1]
        assert (
            (c.image(i) == f.image(j)).all()
            and (c.label(i) == f.label(j)).all()
            and (c.label(i, c.image(i).shape[:2]) == f.label(j)).all()
        )
        assert (
            c.path(i) == f.path(j)
            and c.label_path(i) == f.label_path(j)
            and c.size(i) == f.size(j)
            and c.names[i] == f'{f.spec.name}/{f.names[j]}'
        )
    assert (
        c.labels == c.datasets[0].labels + c.datasets[1].labels
        and two(data, labels=False).labels is None
    )
    assert ConcatSegDataset([c.datasets[0], gta(data, labels=False)]).labels is None


def test_datasets_that_do_not_fit_are_errors(data):
    with pytest.raises(ValueError, match='number their classes differently.*same `space`'):
        ConcatSegDataset([gta(data), gta(data, space=CAMVID11)])
    with pytest.raises(ValueError, match='the list is empty'):
        ConcatSegDataset([])
    for n in (1, 3):
        with pytest.raises(ValueError, match=f'{n} transforms for 2 datasets'):
            train_loader(**kit(data, src=two(data), src_tfm=[TrainTransform(None, (8, 8))] * n))
    with pytest.raises(ValueError, match='2 transforms for 1 datasets'):
        eval_loader(gta(data), [EvalTransform(None)] * 2)
    few = SimpleNamespace(px=np.zeros((3, 19)))
    with pytest.raises(ValueError, match='statistics of 3 images, .* has 14'):
        train_loader(**kit(data, src=two(data), rcs=few))


def test_each_dataset_has_its_transform(data):
    "Only the second target has margins, so only its images get pixels without trust"
    tgt = ConcatSegDataset([city(data, labels=False), two(data, labels=False).datasets[1]])
    kw = kit(
        data,
        tgt=tgt,
        tgt_tfm=[
            TrainTransform(None, (24, 24)),
            TrainTransform(None, (24, 24), margins=(12, 12, 0, 0)),
        ],
    )
    seen = [
        (n.split('/')[0], bool(w.all()))
        for b in train_loader(**kw, steps=20)
        for n, w in zip(b.tgt.name, b.tgt.wgt)
    ]
    assert set(seen) == {('cityscapes', True), ('more', False)}
    tfms = [EvalTransform((20, 30)), EvalTransform((15, 25))]
    items = list(eval_loader(two(data), tfms))
    sizes = [tuple(x.img.shape[2:]) for x, _ in items]
    assert sizes == [(20, 30)] * 10 + [(15, 25)] * 4
    assert [x.name[0] for x, _ in items] == two(data).names


@pytest.mark.parametrize('weights,want', [(None, 4 / 14), ((1, 2), 2 / 3), ((1, 0), 0)])
def test_batches_follow_the_weights(data, weights, want):
    names = [
        n
        for b in train_loader(
            **kit(
                data,
                src=two(data, weights),
                tgt=None,
                src_tfm=TrainTransform(None, (8, 8)),
                batch=4,
            ),
            steps=100,
        )
        for n in b.src.name
    ]
    got = np.mean([n.startswith('more/') for n in names])
    assert abs(got - want) <= 6 * np.sqrt(want * (1 - want) / 400)


# ---------------------------------------------------------------- batches


@pytest.fixture
def rcs(data):
    return RareClassSampler(
        class_stats(gta(data), quiet=True), 19, min_px=50, names=CITYSCAPES19.classes
    )


@pytest.mark.filterwarnings('ignore:rare-class')
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers', [1, 3])
def test_workers_and_resume_do_not_change_batches(data, rcs, workers):
    kw = kit(data, rcs=rcs, min_crop_px=30)
    here = list(train_loader(**kw, steps=9))
    there = list(train_loader(**kw, steps=9, workers=workers))
    late = list(train_loader(**kw, start=5, steps=9, workers=workers))
    assert len(here) == len(there) == 9
    assert len(late) == 4
    for a, b in zip(here, there, strict=True):
        same(a, b)
    for a, b in zip(here[5:], late, strict=True):
        same(a, b)


@pytest.mark.filterwarnings('ignore:rare-class')
def test_batches_depend_on_nothing_but_seed_and_step(data, rcs):
    kw = kit(data, rcs=rcs)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    of_torch = torch.get_rng_state()
    of_numpy = np.random.get_state()[1].copy()
    of_python = random.getstate()
    a = list(train_loader(**kw, steps=3))
    assert torch.get_rng_state().equal(of_torch)
    assert (np.random.get_state()[1] == of_numpy).all()
    assert random.getstate() == of_python
    torch.manual_seed(1)
    np.random.seed(7)
    random.seed(7)
    for x, y in zip(a, train_loader(**kw, steps=3), strict=True):
        same(x, y)
    b = next(iter(train_loader(**kw | dict(seed=4))))
    assert not b.src.img.equal(a[0].src.img)
    assert not a[1].src.img.equal(a[0].src.img)
    assert next(iter(train_loader(**kw | dict(seed=-1)))).src.img.shape == (2, 3, 24, 24)


@pytest.mark.filterwarnings('ignore:rare-class')
def test_target_does_not_depend_on_the_source(data, rcs):
    a = [load(data, rcs=r, steps=3) for r in (None, rcs)]
    for x, y in zip(*a):
        same([x.tgt], [y.tgt])
    alone = load(data, tgt=None, steps=3)
    for x, y in zip(a[0], alone):
        same([x.src, None, ()], y)


def test_target_labels_are_never_touched(data):
    f = city(data, labels=False)
    f.label = f.label_path = lambda i: pytest.fail('a target label was read')
    src, tgt, _ = first(data, tgt=f)
    assert tgt.lbl is None
    assert tgt.wgt.shape == (2, 24, 24)
    assert src.wgt is None
    assert src.lbl.dtype == torch.int64


def test_margins_reach_the_weight(data):
    seen = [b.tgt.wgt for b in load(data, steps=40)]
    assert {float(v) for w in seen for v in w.unique()} == {0.0, 1.0}
    bottom = torch.cat(seen)[:, -6:]
    assert 0.05 < (bottom == 0).float().mean() < 1


def test_both_domains_are_drawn_uniformly(data):
    names = drawn_names(load(data, steps=150))
    n = np.unique(names, return_counts=True)[1]
    assert len(n) == 10
    assert n.min() > 12
    assert n.max() < 50  # 300 draws of 10


@pytest.mark.filterwarnings('ignore:rare-class')
def test_crops_hold_the_class_they_were_drawn_for(data, rcs):
    class Told:  # remembers what was asked
        def __init__(self):
            self.asked = []

        def draw(self, rng):
            self.asked.append(rcs.draw(rng))
            return self.asked[-1]

    told = Told()

    def held(min_px):
        told.asked.clear()
        bs = load(data, rcs=told, min_crop_px=min_px, steps=40)
        drawn = [gta(data).names[i] for i, _ in told.asked]
        assert drawn == drawn_names(bs)
        return np.mean(
            [
                (b.src.lbl[j] == told.asked[2 * i + j][1]).sum() > 40
                for i, b in enumerate(bs)
                for j in range(2)
            ]
        )

    assert held(40) > held(-1) + 0.2


# ---------------------------------------------------------------- broken files


def spoil(root):
    "Two sources and a target with files that cannot be read: no image, no label, another size, unknown ids"
    c = two(root)
    (root / 'gta/images/00001.png').write_bytes((root / 'gta/images/00001.png').read_bytes()[:70])
    write(root / 'gta/labels/00004.png', np.full((40, 60), 77, np.uint8))
    write(root / 'more/labels/00002.png', np.zeros((30, 51), np.uint8))
    (root / 'more/labels/00003.png').unlink()
    (root / 'cityscapes/leftImg8bit/train/bonn/x_leftImg8bit.png').write_bytes(b'')
    return c, {
        'gta/images/00001.png': 'broken image file',
        'gta/images/00004.png': '77 (2400 px)',
        'more/images/00002.png': '51×30',
        'more/images/00003.png': 'No such file',
        'leftImg8bit/train/bonn/x_leftImg8bit.png': 'broken image file',
    }


@pytest.mark.filterwarnings('ignore:rare-class')
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_everything_at_once_is_the_same_for_any_number_of_workers(data):
    "Rare classes, two sources with weights, every augmentation, and broken files"
    src, _ = spoil(data)
    rcs = RareClassSampler(
        class_stats(src, quiet=True, skip_broken=True), 19, T=1, min_px=50, share=src.share
    )
    tfms = [
        TrainTransform(
            (36, 54), (24, 24), cat_max_ratio=0.9, augment=[a for a in AUGMENTATIONS if a != 'none']
        ),
        TrainTransform(None, (24, 24)),
    ]
    kw = kit(data, src=src, src_tfm=tfms, rcs=rcs, min_crop_px=20, skip_broken=True)
    runs = {w: list(train_loader(**kw, steps=12, workers=w)) for w in (0, 1, 3)}
    late = list(train_loader(**kw, start=7, steps=12, workers=3))
    datasets_drawn = {n.split('/')[0] for n in drawn_names(runs[0])}
    assert datasets_drawn == {'gta', 'more'}
    assert any(b.skipped for b in runs[0])
    for w in (1, 3):
        for a, b in zip(runs[0], runs[w], strict=True):
            same(a, b)
    for a, b in zip(runs[0][7:], late, strict=True):
        same(a, b)


def test_broken_files_are_skipped_and_told(data):
    src, why = spoil(data)
    kw = kit(data, src=src, src_tfm=TrainTransform(None, (24, 24)))
    with pytest.raises(ValueError, match=r'step \d+, (gta|more|leftImg8bit)/'):
        list(train_loader(**kw, steps=40))
    bs = list(train_loader(**kw, steps=40, skip_broken=True))
    told = dict(s for b in bs for s in b.skipped)
    assert set(told) == set(why)
    assert all(why[n] in r for n, r in told.items())
    assert {n for b in bs for n in (*b.src.name, *b.tgt.name)} == (
        {*src.names} | {*kw['tgt'].names}
    ) - set(why)
    assert all(len(b.src) == len(b.tgt) == 2 for b in bs)
    assert any(not b.skipped for b in bs)
    alone = list(train_loader(**kw | dict(tgt=None), steps=40, skip_broken=True))
    for a, b in zip(bs, alone):
        same([a.src], [b.src])  # a broken target does not shift the source


def test_whole_files_are_drawn_as_without_the_leave_to_skip(data):
    plain = load(data, steps=5)
    lenient = load(data, steps=5, skip_broken=True)
    for a, b in zip(plain, lenient, strict=True):
        same(a, b)


def test_when_most_files_are_broken_it_says_so(data):
    for p in (data / 'gta/images').iterdir():
        p.write_bytes(b'no')
    with pytest.raises(
        ValueError,
        match=r'step 3: 20 images in a row .*most files of .*gta/train.* are broken.*images/000',
    ):
        load(data, start=3, steps=4, skip_broken=True)


def test_only_reading_is_forgiven(data):
    tfm = TrainTransform(None, (24, 24), margins=(30, 30, 0, 0))
    kw = kit(data, tgt_tfm=tfm, skip_broken=True)
    with pytest.raises(ValueError, match='step 0, leftImg8bit.*margins.*leave nothing'):
        next(iter(train_loader(**kw)))


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_leaves_broken_files_out(data, workers):
    src, why = spoil(data)
    with pytest.raises(ValueError, match='00001.png'):
        list(eval_loader(src, EvalTransform(None), 0))
    loader = eval_loader(src, EvalTransform(None), workers, skip_broken=True)
    for _ in range(2):
        read = [x.name[0] for x, _ in loader]
        skipped = loader.dataset.skipped
        assert read == [n for n in src.names if n not in why]
        assert list(skipped) == [n for n in src.names if n in why]
        assert all(why[n] in reason for n, reason in skipped.items())
    shutil.copy(data / 'gta/images/00000.png', data / 'gta/images/00001.png')
    assert len(list(loader)) == 11
    assert len(loader.dataset.skipped) == 3


def test_a_file_is_read_once(data, monkeypatch):
    "Crops are drawn again, files are not read again, and the size of a decoded image is known"
    count, real = [], datasets.read_image
    monkeypatch.setattr(datasets, 'read_image', lambda p: count.append(p) or real(p))
    monkeypatch.setattr(
        datasets, 'read_image_size', lambda p: pytest.fail('the header was read again')
    )
    load(data, src_tfm=TrainTransform(None, (8, 8), cat_max_ratio=0.01), steps=3)
    list(eval_loader(gta(data), EvalTransform(None)))
    assert len(count) == 3 * 4 + 10


# ---------------------------------------------------------------- ends and errors


def test_endless_and_empty(data):
    it = iter(train_loader(**kit(data)))
    for _ in range(3):
        next(it)
    assert len(load(data, start=4, steps=4)) == 0


IMG = 'gta/images/00000.png'
LBL = 'gta/labels/00000.png'
TGT = 'cityscapes/leftImg8bit/train/aachen/x_leftImg8bit.png'


@pytest.mark.parametrize(
    'which,workers', [(IMG, 0), (LBL, 0), (TGT, 0), (LBL, 1)]
)  # torch takes 5 s to clear a failed worker away: only one
def test_errors_name_step_and_file(data, workers, which):
    kw = kit(data)
    (data / which).write_bytes((data / which).read_bytes()[:80])
    kw['src'].names = kw['src'].names[:1]
    kw['tgt'].names = kw['tgt'].names[:1]
    with pytest.raises(ValueError, match=rf'step 7, .*\n?.*{Path(which).name}'):
        list(train_loader(**kw, start=7, steps=8, workers=workers))


def test_other_failures_keep_their_kind_in_the_message(data):
    class Odd(TrainTransform):
        def __call__(self, *a):
            raise KeyError('odd')

    with pytest.raises(RuntimeError, match='step 0, images/.*KeyError'):
        first(data, src_tfm=Odd(None, (8, 8)))


def test_workers_use_one_thread(data):
    class Threads(TrainTransform):
        def __call__(self, *a):
            if (t := (torch.get_num_threads(), cv2.getNumThreads())) != (1, 1):
                raise ValueError(f'threads {t}')
            return super().__call__(*a)

    before = cv2.getNumThreads()
    load(data, src_tfm=Threads(None, (8, 8)), steps=2, workers=2)
    assert cv2.getNumThreads() == before


def test_everything_pickles(data):
    "Spawned workers (macOS, Windows) get their dataset by pickle"
    ds = train_loader(**kit(data)).dataset
    same(pickle.loads(pickle.dumps(ds))[2], ds[2])


def test_eval_loader(data):
    f = city(data, 'val')
    for workers in (0, 2):
        items = list(eval_loader(f, EvalTransform((20, 30)), workers))
        assert [x.name for x, _ in items] == [(n,) for n in f.names]
        assert all(
            x.img.shape == (1, 3, 20, 30)
            and l.shape == (40, 60)
            and (l.numpy() == f.label(i)).all()
            for i, (x, l) in enumerate(items)
        )
