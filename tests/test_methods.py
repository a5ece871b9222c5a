"Losses, mixing, teacher and schedule against numbers taken from the original DAFormer code (tests/golden)"

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / 'golden'
sys.path.insert(0, str(GOLDEN))
import rules

from udanb.core.types import IGNORE, Sample, SegOutput
from udanb.core.utils import seed_all
from udanb.training.losses import FeatureDistance, WeightedCrossEntropy, downscale_labels
from udanb.training.mixing import class_mask
from udanb.training.schedules import poly_warmup
from udanb.training.teacher import EMATeacher, ema_decay, hard_pseudo_labels, zero_margins

units = json.loads((GOLDEN / 'units.json').read_text())


def test_cross_entropy_is_the_published_one():
    logits = torch.from_numpy(
        3 * np.random.RandomState(1).standard_normal((2, 19, 32, 32)).astype(np.float32)
    )
    lbl = rules.block_label(2, 128, 128, 16, 2, noise=0.2)[:, 0]
    wgt = torch.from_numpy(np.random.RandomState(3).random_sample((2, 128, 128)).astype(np.float32))
    ce = WeightedCrossEntropy(parity=True)
    assert (lbl == IGNORE).sum() == units['ce']['n_ignored']
    assert ce(SegOutput(logits), Sample(None, lbl)).item() == pytest.approx(
        units['ce']['no_weight']['loss_seg'], rel=1e-6
    )
    assert ce(SegOutput(logits), Sample(None, lbl, wgt)).item() == pytest.approx(
        units['ce']['weighted']['loss_seg'], rel=1e-6
    )
    assert WeightedCrossEntropy()(SegOutput(logits), Sample(None, lbl)) > ce(
        SegOutput(logits), Sample(None, lbl)
    )  # ours divides by labelled pixels only


def fd_inputs():
    f1, f2 = (
        torch.from_numpy(
            np.random.RandomState(s).standard_normal((2, 256, 8, 8)).astype(np.float32)
        )
        for s in (4, 5)
    )
    lbl = rules.block_label(2, 256, 256, 32, 6, noise=0.26)[:, 0]
    lbl[1, 64:128, 0:128] = 13
    lbl[1, 64:128, 0:128][
        torch.from_numpy(np.random.RandomState(7).random_sample((64, 128)) < 0.25)
    ] = IGNORE
    return f1, f2, lbl


class Const(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, img):
        return [self.f]


def test_feature_distance_is_the_published_one():
    f1, f2, lbl = fd_inputs()
    fd = FeatureDistance(Const(f2), (6, 7, 11, 12, 13, 14, 15, 16, 17, 18), 19)
    want = torch.tensor(units['fd']['gt_rescaled'])
    assert downscale_labels(lbl, (8, 8), 19).equal(want.view(2, 8, 8))
    assert fd.cells(lbl, (8, 8)).sum() == units['fd']['n_cells']
    x = Sample(torch.zeros(2, 3, 256, 256), lbl)
    assert (fd.w * fd(SegOutput(None, (f1,)), x)).item() == pytest.approx(
        units['fd']['loss'], rel=1e-5
    )
    assert fd(SegOutput(None, (f1,)), Sample(x.img, torch.zeros_like(lbl))) == 0  # published: NaN


@pytest.mark.parametrize('i', range(len(units['q'])))
def test_confidence_share(i):
    g = units['q'][i]
    k = float(g['logits'].split('*')[0])
    logits = torch.from_numpy(
        (k * np.random.RandomState(9).standard_normal((2, 19, 64, 64))).astype(np.float32)
    )
    _, q = hard_pseudo_labels(logits.softmax(1), 0.968)
    assert q.item() == g['q']  # one share for the whole batch
    top, bottom = g['rows_zero_top_bottom']
    w = zero_margins(q.expand(2, 64, 64), top, bottom)
    np.testing.assert_allclose(w.sum((1, 2)), g['weight_map_sum'], rtol=1e-6)


def test_class_mask_draws_half_of_the_batch_classes_under_parity():
    lbl = rules.block_label(2, 64, 64, 8, 8)[:, 0]
    both = lbl.unique().tolist()
    assert len(both) == units['classmix']['n_unique_batch'] and IGNORE in both
    for s in range(20):
        seed_all(s)
        m = class_mask(lbl, parity=True)
        for l, k in zip(lbl, m):
            inside, outside = set(l[k].tolist()), set(l[~k].tolist())
            assert not inside & outside and len(inside) <= 10  # ceil(20/2) of the batch's classes
    chosen = torch.tensor([0, 3, 7, 11, 255])  # the published mask for a given choice
    assert torch.isin(lbl, chosen).sum((1, 2)).tolist() == units['classmix']['mask_sum']


def test_class_mask_chooses_every_class_equally_often():
    lbl = torch.arange(6).view(1, 1, 6)
    n = torch.zeros(6)
    for s in range(600):
        seed_all(s)
        n += class_mask(lbl)[0, 0]
    assert n.sum() == 600 * 3 and (n / 600 - 0.5).abs().max() < 0.08


def test_ema_alpha():
    for it, a in units['ema_alpha'].items():
        assert ema_decay(int(it)) == pytest.approx(a, abs=1e-12)


@pytest.mark.parametrize('name,kw', [('poly10warm', {})])
def test_learning_rate_table(name, kw):
    for it, enc, head in units['lr'][name]:
        if it > 40_000:
            continue
        assert 6e-5 * poly_warmup(it) == pytest.approx(enc, rel=1e-6, abs=1e-15)
        assert 6e-4 * poly_warmup(it) == pytest.approx(head, rel=1e-6, abs=1e-14)


def test_teacher_keeps_dropout_off_and_never_gets_gradients():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.9), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, img):
            return SegOutput(self.net(img))

    for bn in ('batch', 'student'):
        t = EMATeacher(Net(), bn=bn)
        t.train()
        x = torch.randn(2, 3, 5, 5)
        a, b = t(x).logits, t(x).logits
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
        if bn == 'student':
            torch.testing.assert_close(t(x[:1]).logits, a[:1])  # no neighbours involved
        else:
            assert not torch.allclose(t(x[:1]).logits, a[:1])


def test_three_ema_updates_are_the_published_ones():
    from udanb.models.released import published_keys
    from udanb.models.segmentor import create_segmentor

    student, teacher = (create_segmentor('mit_b0', 19).double() for _ in range(2))
    for net, seed in ((student, 0), (teacher, 200_000)):
        names = published_keys(net)
        sd = net.state_dict()
        vals = rules.values(
            [
                (n, tuple(sd[k].shape), sd[k].is_floating_point())
                for n, k in sorted((n, k) for k, n in names.items())
            ],
            'B',
            seed,
        )
        net.load_state_dict(
            {
                k: torch.zeros_like(sd[k])
                if vals[n] is None
                else torch.from_numpy(vals[n]).to(sd[k].dtype)
                for k, n in names.items()
            }
        )
    t = EMATeacher(teacher)
    buffers = {k: v.clone() for k, v in t.net.named_buffers()}
    names = {n: k for k, n in published_keys(student).items()}
    for it in (1, 2, 3):
        t.update(student, it)
        now = dict(t.net.named_parameters())
        got = [
            [now[names[k]].sum().item(), now[names[k]].norm().item()] for k in units['ema']['keys']
        ]
        np.testing.assert_allclose(got, units['ema'][f'after_iter_{it}'], rtol=1e-7, atol=1e-9)
    assert all(
        v.equal(buffers[k]) for k, v in t.net.named_buffers()
    )  # BatchNorm statistics are never copied
