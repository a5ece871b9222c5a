"Label-free scores and their rank correlation, against naive sums and pandas' own Spearman"

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from udanb.core.types import Sample, SegOutput, normalize
from udanb.inference.label_free import (
    SCORE_DIRECTION,
    PredictiveEntropy,
    label_free,
    rank_correlation,
    selection_table,
)
from udanb.inference.predict import sliding_logits


class Net(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.drop = nn.Conv2d(3, n, 4, stride=4), nn.Dropout(0.9)

    def forward(self, img):
        return SegOutput(self.drop(self.conv(img)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 99), st.floats(0.1, 20))
def test_scores_are_those_of_a_naive_sum(n, b, seed, sharp):
    g = torch.Generator().manual_seed(seed)
    p = (sharp * torch.randn(b, n, 3, 5, generator=g, dtype=torch.float64)).softmax(1)
    w = (torch.rand(b, 3, 5, generator=g) > 0.3).float()
    w[0, 0, 0] = 1
    q = p.movedim(1, -1)[w > 0].numpy()

    def H(x):
        return -sum(v * math.log(v) for v in x if v > 0) / math.log(n)

    want = np.mean([H(x) for x in q]), H(q.mean(0))
    s = PredictiveEntropy(n).update(p, w).scores()
    np.testing.assert_allclose(
        [s['entropy'], s['balance'], s['info']], [*want, want[1] - want[0]], rtol=1e-6, atol=1e-9
    )
    assert 0 <= s['entropy'] <= s['balance'] + 1e-9 and s['balance'] <= 1 + 1e-9


def test_pieces_and_order_do_not_matter_but_sizes_do():
    torch.manual_seed(0)
    a, b = torch.randn(1, 3, 4, 4).softmax(1), torch.randn(1, 3, 16, 16).softmax(1)
    s, t = (PredictiveEntropy(3).update(x).update(y).scores() for x, y in ((a, b), (b, a)))
    assert s == pytest.approx(t)
    each = [PredictiveEntropy(3).update(x).scores()['entropy'] for x in (a, b)]
    assert s['entropy'] == pytest.approx(
        (16 * each[0] + 256 * each[1]) / 272
    )  # by pixels, not by images


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match='at least|nothing'):
        PredictiveEntropy(1)
    with pytest.raises(ValueError, match='3 classes, 4'):
        PredictiveEntropy(4).update(torch.ones(1, 3, 2, 2) / 3)
    with pytest.raises(ValueError, match='no pixel'):
        PredictiveEntropy(4).update(torch.ones(1, 4, 2, 2) / 4, torch.zeros(1, 2, 2)).scores()
    with pytest.raises(ValueError, match='no pixel'):
        label_free(Net(), [], 4, quiet=True)


def test_loader_folder_list_and_dataset_agree(tmp_path):
    px = [
        np.random.default_rng(i).integers(0, 256, (16 + 4 * i, 24, 3), dtype=np.uint8)
        for i in range(3)
    ]
    for i, p in enumerate(px):
        Image.fromarray(p).save(tmp_path / f'{i}.png')

    class Data:
        names = ['0', '1', '2']

        def image(self, i):
            return px[i]

    net = Net()
    loader = [(Sample(normalize(p)[None], name=(str(i),)), None) for i, p in enumerate(px)]
    want = label_free(net, loader, 4, quiet=True)
    assert net.training and net.drop.training
    for src in (
        [x for x, _ in loader],
        tmp_path,
        str(tmp_path),
        sorted(tmp_path.iterdir()),
        Data(),
        iter(loader),
    ):
        assert label_free(net, src, 4, quiet=True) == pytest.approx(want)
    assert label_free(net, tmp_path, 4, tfm=lambda p: p[:8], quiet=True) != want


def test_windows_and_valid_pixels():
    net, x = Net().eval(), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        want = PredictiveEntropy(4).update(sliding_logits(net, x, 16, 8).softmax(1)).scores()
    assert label_free(net, [Sample(x)], 4, crop=16, stride=8, quiet=True) == pytest.approx(want)
    w = torch.zeros(1, 32, 48)
    w[:, :16] = 0.3
    with torch.no_grad():
        top = (
            PredictiveEntropy(4)
            .update(sliding_logits(net, x, 16, 8)[:, :, :16].softmax(1))
            .scores()
        )
    assert label_free(net, [Sample(x, wgt=w)], 4, crop=16, stride=8, quiet=True) == pytest.approx(
        top
    )


def test_nan_names_the_image():
    net = Net()
    net.conv.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match='street.png'):
        label_free(net, [Sample(torch.randn(1, 3, 8, 8), name=('street.png',))], 4, quiet=True)
    assert net.training


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=9))
def test_rank_correlation_is_spearmans(rows):
    scores = {f'r{i}': dict(entropy=a, info=a) for i, (a, _) in enumerate(rows)}
    mious = {f'r{i}': b for i, (_, b) in enumerate(rows)}
    t = rank_correlation(scores, mious)
    a, b = map(pd.Series, zip(*rows))
    if a.nunique() == 1 or b.nunique() == 1:
        assert t['rho'].isna().all()
    else:
        want = a.astype(float).corr(b.astype(float), method='spearman')  # pandas asks scipy
        np.testing.assert_allclose(t.loc[['info', 'entropy'], 'rho'], [want, -want], atol=1e-12)
    for k, best in (('info', max), ('entropy', min)):
        i = next(i for i, (x, _) in enumerate(rows) if x == best(r[0] for r in rows))
        assert (
            t.loc[k, 'chosen'] == f'r{i}'
            and t.loc[k, 'lost'] == max(b) - b[i]
            and t.loc[k, 'runs'] == len(rows)
        )


def test_tables_refuse_what_cannot_be_compared():
    def one(v):
        return dict(entropy=v, balance=v, info=v)

    scores = {r: one(i / 10) for i, r in enumerate('abc')}
    assert list(selection_table(scores, dict(b=3.0, a=1.0, c=2.0)).index) == ['b', 'c', 'a']
    assert set(rank_correlation(scores, dict(a=1.0, b=2.0, c=3.0)).index) == set(SCORE_DIRECTION)
    with pytest.raises(ValueError, match='only one of.*: c, d'):
        selection_table(scores, dict(a=1, b=2, d=3))
    with pytest.raises(ValueError, match='at least 3'):
        rank_correlation({k: scores[k] for k in 'ab'}, dict(a=1, b=2))
    with pytest.raises(ValueError, match='mIoU'):
        rank_correlation(scores, dict(a=1, b=None, c=2))
    with pytest.raises(ValueError, match="'snd'"):
        rank_correlation({r: dict(snd=1.0) for r in 'abc'}, dict(a=1, b=2, c=3))
