"The confusion matrix against sklearn, against DAFormer's own numbers, and against bad input"

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from udanb.core.labels import CAMVID11, CITYSCAPES19, SYNTHIA16
from udanb.core.types import IGNORE
from udanb.inference.metrics import ConfusionMatrix, _pairs, _slots, comparison_table, iou_dict

GOLDEN = Path(__file__).parent / 'golden'
spec = importlib.util.spec_from_file_location('golden_rules', GOLDEN / 'rules.py')
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)


def random_maps(seed, n, shape=(37, 53), ignored=0.1):
    rng = np.random.default_rng(seed)
    lbl = rng.integers(0, n, shape).astype(np.uint8)
    pred = np.where(rng.random(shape) < 0.5, lbl, rng.integers(0, n, shape)).astype(np.uint8)
    lbl[rng.random(shape) < ignored] = IGNORE
    return pred, lbl


def test_golden():
    gold = json.loads((GOLDEN / 'units.json').read_text())['metrics']
    rs = np.random.RandomState(12)
    c = ConfusionMatrix(19)
    for i in range(3):
        gt = rules.block_label(1, 96, 96, 8, 20 + i, ncls=17)[0, 0].numpy()
        swap = rs.random_sample(gt.shape) < 0.3
        c.update(np.where(swap, rs.randint(0, 18, gt.shape), np.where(gt == 255, 4, gt)), gt)

    def num(xs):
        return [np.nan if x is None else x for x in xs]

    np.testing.assert_allclose(c.iou(), num(gold['IoU']), rtol=1e-12)
    np.testing.assert_allclose(c.class_accuracy(), num(gold['Acc']), rtol=1e-12)
    np.testing.assert_allclose(
        [c.pixel_accuracy(), c.miou(), c.mean_accuracy()],
        [gold['aAcc'], gold['mIoU'], gold['mAcc']],
        rtol=1e-12,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 30),
    st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.uint16]),
)
def test_equals_sklearn(seed, n, dtype):
    pred, lbl = random_maps(seed, n, (13, 17))
    c, keep = ConfusionMatrix(n).update(pred.astype(dtype), lbl.astype(dtype)), lbl != IGNORE
    np.testing.assert_array_equal(c.mat, confusion_matrix(lbl[keep], pred[keep], labels=range(n)))
    if not keep.any():
        return
    there = np.union1d(lbl[keep], pred[keep])
    np.testing.assert_allclose(
        c.iou()[there],
        jaccard_score(lbl[keep], pred[keep], labels=there, average=None, zero_division=0),
    )
    assert np.isnan(np.delete(c.iou(), there)).all()
    np.testing.assert_allclose(
        c.miou(),
        jaccard_score(lbl[keep], pred[keep], labels=there, average='macro', zero_division=0),
    )
    np.testing.assert_allclose(c.pixel_accuracy(), (lbl == pred)[keep].mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300))
def test_both_ways_to_count_pairs_equal_sklearn(seed, piece):
    "On the CPU in pieces, and as it is done on a device"
    rng = np.random.default_rng(seed)
    t, p = rng.integers(0, 256, (2, 221), np.uint8)
    want = confusion_matrix(t, p, labels=range(256))
    for n in (
        _pairs(torch.from_numpy(t), torch.from_numpy(p), piece),
        _slots(torch.from_numpy(t), torch.from_numpy(p)),
    ):
        assert n.dtype == torch.int64
        np.testing.assert_array_equal(n, want)


def test_counts_are_exact_beyond_float32():
    "4099·4101 is odd and above 2**24: float32 has no such number"
    x = np.ones((4099, 4101), np.uint8)
    assert ConfusionMatrix(2).update(x, x).mat.tolist() == [[0, 0], [0, 4099 * 4101]]


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    pred, lbl = random_maps(0, 19)
    c = ConfusionMatrix(19, 'cuda').update(torch.from_numpy(pred).cuda().long(), lbl)
    assert c.mat.is_cuda and c.mat.cpu().equal(ConfusionMatrix(19).update(pred, lbl).mat)
    with pytest.raises(ValueError, match='outside the 19'):
        c.update(torch.full((2, 2), 30, device='cuda'), torch.zeros(2, 2, device='cuda').long())


def test_class_accuracy_equals_sklearn():
    pred, lbl = random_maps(3, 8)
    keep = lbl != IGNORE
    assert np.isclose(
        ConfusionMatrix(8).update(pred, lbl).mean_accuracy(),
        balanced_accuracy_score(lbl[keep], pred[keep]),
    )


def test_streaming_equals_at_once():
    maps = [random_maps(i, 11, (9 + i, 20)) for i in range(4)]
    one, parts = ConfusionMatrix(11), []
    for p, l in maps:
        one.update(p, l)
        parts.append(ConfusionMatrix(11).update(torch.from_numpy(p).long(), torch.from_numpy(l)))
    flat = ConfusionMatrix(11).update(
        *(np.concatenate([m[k].ravel() for m in maps]) for k in (0, 1))
    )
    total = parts[0] + parts[1] + parts[2] + parts[3]
    for c in (flat, total):
        assert c.mat.equal(one.mat)


def test_a_sum_is_new():
    a = ConfusionMatrix(3).update(np.array([0, 1]), np.array([0, 2]))
    b = a + a
    b.update(np.array([1]), np.array([1]))
    assert a.mat.sum() == 2 and b.mat.sum() == 5
    with pytest.raises(ValueError, match='3 classes cannot be added to counts of 4'):
        ConfusionMatrix(4) + a


def test_arrays_as_they_come():
    "Read-only (from PIL), flipped and strided arrays are counted without a warning"
    pred, lbl = random_maps(0, 5)
    want = ConfusionMatrix(5).update(pred, lbl).mat
    frozen = lbl.copy()
    frozen.flags.writeable = False
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert ConfusionMatrix(5).update(pred, frozen).mat.equal(want)
        assert ConfusionMatrix(5).update(pred[::-1, ::-1], lbl[::-1, ::-1]).mat.equal(want)
        assert (
            ConfusionMatrix(5)
            .update(torch.from_numpy(pred).T, torch.from_numpy(lbl).T)
            .mat.equal(want)
        )


@pytest.mark.parametrize(
    'pred,lbl,say',
    [
        ([[0, 1]], [[0, 19]], r'label outside the 19 classes: 19 \(1 px\)'),
        ([[0, 1]], [[0, 254]], 'label outside .*254'),
        ([[0, 1]], [[0, 300]], 'label with values from 0 to 300'),
        ([[0, 1]], [[-1, 0]], 'label with values from -1'),
        ([[19, 1]], [[0, 1]], r'prediction outside the 19 classes: 19 \(1 px\)'),
        ([[255, 1]], [[0, 1]], 'prediction outside the 19 classes: 255'),
        ([[30, 1]], [[255, 1]], 'prediction outside .*30'),
        ([[70000, 1]], [[0, 1]], 'prediction with values from 1 to 70000'),
        ([[0, 1, 2]], [[0, 1]], r'\(1, 3\) and label \(1, 2\)'),
        ([[0.2, 0.7]], [[0, 1]], 'argmax'),
    ],
)
@pytest.mark.parametrize('torched', [False, True])
def test_bad_input_is_named_and_not_counted(pred, lbl, say, torched):
    c, kind = ConfusionMatrix(19), torch.tensor if torched else np.array
    with pytest.raises(ValueError, match=say):
        c.update(kind(pred), kind(lbl))
    assert c.mat.sum() == 0


@pytest.mark.parametrize('n', [0, 255, -3])
def test_impossible_class_count(n):
    with pytest.raises(ValueError, match=f'^{n} classes'):
        ConfusionMatrix(n)


def test_nothing_counted_is_nan_not_zero():
    c = ConfusionMatrix(4).update(np.zeros((2, 2), int), np.full((2, 2), IGNORE))
    assert c.mat.sum() == 0 and all(
        np.isnan(v) for v in (c.miou(), c.pixel_accuracy(), c.mean_accuracy(), *c.iou())
    )
    assert (
        ConfusionMatrix(4).update(np.zeros((0, 5), np.int64), np.zeros((0, 5), np.int64)).mat.sum()
        == 0
    )


@pytest.mark.parametrize('seed', range(5))
def test_synthia_16(seed):
    pred, lbl = random_maps(seed, 19, (80, 80))
    pred[np.isin(pred, (9, 14, 16))] = 0
    c = ConfusionMatrix(19).update(pred, lbl)
    assert np.isclose(c.miou(SYNTHIA16.train_ids), c.miou() * 19 / 16)


def test_tables():
    runs = {
        k: ConfusionMatrix(11).update(*random_maps(i, 11))
        for i, k in enumerate(('source', 'dacs', 'daformer'))
    }
    tab = comparison_table({k: iou_dict(c, CAMVID11) for k, c in runs.items()})
    assert list(tab) == ['source', 'dacs', 'daformer', 'Δ dacs', 'Δ daformer'] and list(
        tab.index
    ) == [*CAMVID11.classes, 'mIoU']
    np.testing.assert_allclose(tab['Δ daformer'], tab['daformer'] - tab['source'])
    np.testing.assert_allclose(tab.loc['mIoU', 'dacs'], 100 * runs['dacs'].miou(), atol=1e-4)
    assert tab.loc['sky', 'dacs'] == pytest.approx(iou_dict(runs['dacs'], CAMVID11)['sky'])
    with pytest.raises(ValueError, match='11 classes were counted, cityscapes19 has 19'):
        iou_dict(runs['dacs'], CITYSCAPES19)


def test_a_cityscapes_map_is_counted_quickly():
    pred, lbl = random_maps(0, 19, (1024, 2048))
    c, took = ConfusionMatrix(19), []
    for _ in range(5):
        t = time.perf_counter()
        c.update(pred, lbl)
        took.append(time.perf_counter() - t)
    assert min(took) < 0.071
