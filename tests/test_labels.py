"The label tables against the published converter, cityscapesscripts, and the data we have"

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.labels import (
    CAMVID11,
    CAMVID_MERGE,
    CITYSCAPES19,
    CITYSCAPES_IDS,
    CITYSCAPES_VOID,
    LABEL_SPACES,
    SYNTHIA13,
    SYNTHIA16,
    SYNTHIA_IDS,
    SYNTHIA_VOID,
    UNDECLARED_ID,
    LabelSpace,
    bincount_ids,
    chain_id_maps,
    make_lookup_table,
    remap,
    train_id_map,
)
from udanb.core.types import IGNORE
from udanb.core.utils import project_root

HERE = Path(__file__).parent
SHARED = project_root(HERE).parent / 'shared' / 'data'


def test_gta_ids_equal_the_published_converter():
    golden = json.loads((HERE / 'golden' / 'gta_id_map.json').read_text())['map']
    assert make_lookup_table(CITYSCAPES_IDS, range(256)).tolist() == golden
    assert sorted(CITYSCAPES_IDS.values()) == list(range(19))


def test_equal_to_cityscapesscripts():
    labels = pytest.importorskip('cityscapesscripts.helpers.labels').labels
    real = [l for l in labels if l.id >= 0]
    assert {l.id: l.trainId for l in real if l.trainId not in (255, -1)} == CITYSCAPES_IDS
    assert {l.id for l in real if l.trainId in (255, -1)} <= set(CITYSCAPES_VOID)
    for l in real:
        if l.trainId in (255, -1):
            continue
        assert CITYSCAPES19.classes[l.trainId] == l.name and CITYSCAPES19.colors[
            l.trainId
        ] == tuple(l.color)


def test_synthia_classes_by_name():
    "The names of SYNTHIA's own class list, written down independently of our table"
    names = {
        1: 'sky',
        2: 'building',
        3: 'road',
        4: 'sidewalk',
        5: 'fence',
        6: 'vegetation',
        7: 'pole',
        8: 'car',
        9: 'traffic sign',
        10: 'person',
        11: 'bicycle',
        12: 'motorcycle',
        15: 'traffic light',
        16: 'terrain',
        17: 'rider',
        18: 'truck',
        19: 'bus',
        20: 'train',
        21: 'wall',
    }
    assert {k: CITYSCAPES19.classes[v] for k, v in SYNTHIA_IDS.items()} == names
    assert set(SYNTHIA_VOID) | set(SYNTHIA_IDS) == set(range(23))
    assert set(range(19)) - set(SYNTHIA16.train_ids) == {9, 14, 16}
    assert set(SYNTHIA16.train_ids) - set(SYNTHIA13.train_ids) == {3, 4, 5}


@pytest.mark.parametrize('space', LABEL_SPACES.values(), ids=str)
def test_space_is_consistent(space):
    assert len(space) == len(space.colors) == len(set(space.classes))
    assert [space.index(c) for c in space.classes] == list(range(len(space)))
    assert (
        space.palette.shape == (256, 3)
        and space.palette.dtype == np.uint8
        and not space.palette[IGNORE].any()
    )
    hash(space)
    m = train_id_map(space)
    assert sorted(v for v in m.values() if v != IGNORE) == list(range(len(space)))
    lut = space.lookup_table()
    assert all(lut[t] == i for t, i in m.items()) and lut[IGNORE] == IGNORE
    if space.train_ids is None:
        return
    assert [CITYSCAPES19.classes[t] for t in space.train_ids] == list(space.classes)
    assert {space.train_ids[t] for t in space.things} == {6, 7, *range(11, 19)} & set(
        space.train_ids
    )


def test_camvid_merge_reaches_every_class_it_should():
    m = train_id_map(CAMVID11, CAMVID_MERGE)
    assert [t for t, i in m.items() if i == IGNORE] == [
        16
    ]  # the train alone has no place in CamVid
    assert {CAMVID11.train_ids[t] for t in CAMVID11.things} == {7, 11, 13, 18}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 255), st.sampled_from([*range(19), IGNORE]), max_size=30),
    st.sets(st.integers(0, 255), max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_remap_equals_a_loop(ids, void, seed):
    lbl = (
        np.random.default_rng(seed).choice(sorted(set(ids) | void | {255}), (5, 7)).astype(np.uint8)
    )
    want = [[ids.get(int(v), IGNORE) for v in row] for row in lbl]
    for dtype in (np.uint8, np.int32, np.uint16):
        assert remap(lbl.astype(dtype), make_lookup_table(ids, void)).tolist() == want


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 18), min_size=1, max_size=40))
def test_one_composed_table_equals_two(ts):
    back = {v: k for k, v in CITYSCAPES_IDS.items()}
    lbl = np.array([[back[t] for t in ts]], np.uint8)
    once = remap(
        lbl, make_lookup_table(chain_id_maps(CITYSCAPES_IDS, train_id_map(CAMVID11, CAMVID_MERGE)))
    )
    twice = remap(
        remap(lbl, make_lookup_table(CITYSCAPES_IDS)), CAMVID11.lookup_table(CAMVID_MERGE)
    )
    assert (once == twice).all()


@pytest.mark.parametrize(
    'v,dtype',
    [(77, np.uint8), (254, np.uint8), (300, np.int32), (-1, np.int32), (60000, np.uint16)],
)
def test_stray_id_names_file_value_and_remedy(v, dtype):
    lbl = np.full((4, 4), 7, dtype)
    lbl[1, :3] = v
    with pytest.raises(ValueError) as e:
        remap(lbl, make_lookup_table(CITYSCAPES_IDS, CITYSCAPES_VOID), 'gta/labels/7.png')
    for part in ('gta/labels/7.png', f'{v} (3 px)', '`void`'):
        assert part in str(e.value)


def test_id_outside_a_short_table():
    with pytest.raises(ValueError, match='5'):
        remap(np.full((2, 2), 5, np.uint8), make_lookup_table({0: 0, 1: 1}, n=5))


def test_remap_of_arrays_as_they_come():
    "Read-only (from PIL), flipped, strided and empty labels; the label itself is never changed"
    tab = make_lookup_table(CITYSCAPES_IDS, CITYSCAPES_VOID)
    lbl = np.random.default_rng(0).choice([7, 8, 26, 0, 255], (31, 47)).astype(np.uint8)
    want, keep = np.array([[tab[v] for v in row] for row in lbl], np.uint8), lbl.copy()
    frozen = lbl.copy()
    frozen.flags.writeable = False
    for x, w in (
        (frozen, want),
        (lbl[::-1], want[::-1]),
        (lbl[:, ::-2], want[:, ::-2]),
        (lbl.T, want.T),
        (lbl[3:9, 5:8], want[3:9, 5:8]),
        (lbl[:0], want[:0]),
    ):
        out = remap(x, tab)
        assert (
            out.shape == w.shape
            and out.dtype == np.uint8
            and (out == w).all()
            and out.flags.writeable
        )
    assert (lbl == keep).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.sampled_from([np.s_[:], np.s_[::-1], np.s_[1:5, 2:9], np.s_[:, ::3], np.s_[:0]]),
)
def test_counts_equal_numpy_unique(seed, piece, cut):
    x = np.random.default_rng(seed).integers(0, 256, (17, 23), np.uint8)[cut]
    n = bincount_ids(x, piece)
    ids, px = np.unique(x, return_counts=True)
    assert n.shape == (256,) and n.dtype == np.int64 and n.sum() == x.size
    assert np.flatnonzero(n).tolist() == ids.tolist() and n[ids].tolist() == px.tolist()


def test_counts_are_exact_beyond_float32():
    "4099·4101 is odd and above 2**24: float32 has no such number"
    assert bincount_ids(np.full((4099, 4101), 3, np.uint8))[3] == 4099 * 4101


def test_only_bytes_are_counted():
    with pytest.raises(ValueError, match='int64.*remap'):
        bincount_ids(np.zeros((2, 2), np.int64))


@pytest.mark.parametrize(
    'bad', [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), np.zeros(4, np.uint8)]
)
def test_not_a_label(bad):
    with pytest.raises(ValueError, match='x.png'):
        remap(bad, make_lookup_table(CITYSCAPES_IDS), 'x.png')


def test_bad_tables_and_spaces():
    with pytest.raises(ValueError):
        make_lookup_table({0: UNDECLARED_ID})
    with pytest.raises(ValueError):
        make_lookup_table({300: 0})
    with pytest.raises(ValueError, match='the train ids'):
        train_id_map(CAMVID11, {3: 9})
    with pytest.raises(ValueError):
        train_id_map(CAMVID11, {40: 2})
    with pytest.raises(ValueError, match='does not know'):
        chain_id_maps({7: 40}, train_id_map(CITYSCAPES19))
    with pytest.raises(ValueError):
        LabelSpace('x', ('a', 'b'), ((0, 0, 0),))
    with pytest.raises(ValueError):
        LabelSpace('x', ('a',), ((0, 0, 0),), things=(1,))


@pytest.mark.parametrize(
    'pattern,ids,void',
    [
        ('town/labels/*[0-9].png', CITYSCAPES_IDS, CITYSCAPES_VOID),
        ('town/labels/*_labelTrainIds.png', {i: i for i in range(19)}, ()),
        ('camvid/gtFine/val/*/*_labelTrainIds.png', {i: i for i in range(19)}, ()),
    ],
)
def test_shared_labels_are_all_known(pattern, ids, void):
    files = sorted(SHARED.glob(pattern))[::25]
    if not files:
        pytest.skip('the shared data are not here')
    for f in files:
        remap(
            np.array(Image.open(f)),
            make_lookup_table(chain_id_maps(ids, train_id_map(CAMVID11, CAMVID_MERGE)), void),
            f,
        )


def test_the_benchmark_of_data_in_quick_mode():
    "It checks by itself that the published way and ours agree; here, that ours is not the slower one"
    bench = HERE.parent / 'bench' / 'data.py'
    old = bench.with_suffix('.md').read_text()
    run = subprocess.run(
        [sys.executable, str(bench), '--quick'], capture_output=True, text=True, timeout=120
    )
    assert not run.returncode, run.stderr
    rows = [
        [c.strip() for c in l.strip('|').split('|')] for l in run.stdout.splitlines() if '≥' in l
    ]
    assert len(rows) == 6 and all(float(r[3].strip('*')) > 1 for r in rows), run.stdout
    assert bench.with_suffix('.md').read_text() == old  # quick runs are not stored
