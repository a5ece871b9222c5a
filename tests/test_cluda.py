"CLUDA against a literal matrix reading, its chunks, and its company"

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from udanb.core.boxes import scatter_crops
from udanb.core.types import IGNORE, Sample
from udanb.core.utils import seed_all
from udanb.methods.cluda import (
    PixelContrastLoss,
    ScaleWeightHead,
    chunked_contrast,
    cluda,
    contrast_loss_rows,
    grid_size,
    max_entropy_boxes,
    sample_detail,
    sample_labels,
)
from udanb.methods.daformer import dacs, daformer, source_only
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.trainer import Trainer

N = 5


def net(head='daformer', hrda=False, seed=0):
    seed_all(seed)
    s = create_segmentor('mit_b0', N, head, dim=8)
    return HRDA(s, crop=32, dim=8) if hrda else s


def batch(seed=0, size=(64, 128), n=2):
    seed_all(seed)
    lbl = (
        torch.randint(0, N, (n, size[0] // 16, size[1] // 16))
        .repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
    )
    lbl[:, :9, :20] = IGNORE
    return Sample(torch.randn(n, 3, *size), lbl, name=tuple('ab'[:n])), Sample(
        torch.randn(n, 3, *size), None, torch.ones(n, *size), tuple('cd'[:n])
    )


def cells(n, d, detail=True, dtype=torch.float32):
    seed_all(n)
    y, inside = torch.tensor((0, 1, 2, IGNORE))[torch.randint(0, 4, (n,))], torch.rand(n) < 0.5
    low, high = (F.normalize(torch.randn(n, d, dtype=dtype), dim=1) for _ in range(2))
    xs = [low, high * inside[:, None], torch.rand(n, dtype=dtype)] if detail else [low, None, None]
    return [x if x is None else x.requires_grad_() for x in xs] + [
        y,
        torch.rand(n, dtype=dtype),
        inside,
    ]


def grads(loss, xs):
    return torch.autograd.grad(loss, [x for x in xs if x is not None and x.requires_grad])


@pytest.mark.parametrize('parity', [False, True])
@pytest.mark.parametrize('detail', [True, False])
@pytest.mark.parametrize('chunk', [1, 7, 64, 99, 1000])
def test_chunks_are_the_full_computation(parity, detail, chunk):
    xs = cells(99, 6, detail)
    full, part = (chunked_contrast(*xs, chunk=c, parity=parity) for c in (None, chunk))
    torch.testing.assert_close(part, full, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads(3 * part, xs[:3]), grads(3 * full, xs[:3])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    xs = cells(9, 3, dtype=torch.double)

    def f(a, b, c):
        return chunked_contrast(a, b, c, *xs[3:], chunk=4)

    assert torch.autograd.gradcheck(f, tuple(x.detach().requires_grad_() for x in xs[:3]))


def test_chunks_without_gradients():
    xs = cells(30, 4)
    with torch.no_grad():
        a = chunked_contrast(*xs, chunk=8)
    assert not a.requires_grad
    torch.testing.assert_close(a, chunked_contrast(*xs, chunk=None).detach())


def literal(out, x, w, parity):
    "The equation with whole matrices, features pasted into whole maps"
    B, (H, W) = len(x.lbl), x.lbl.shape[-2:]
    g = H // 16 + 1, W // 16 + 1

    def read(m):
        return (
            F.interpolate(m, g, mode='bilinear', align_corners=True)
            .permute(0, 2, 3, 1)
            .reshape(-1, m.shape[1])
        )

    fl = F.normalize(read(out.fused), dim=1)
    if parity:
        y = F.interpolate(x.lbl[:, None].float(), g).long().flatten()
    else:
        y = torch.stack(
            [
                x.lbl[b, round(i * (H - 1) / (g[0] - 1)), round(j * (W - 1) / (g[1] - 1))]
                for b in range(B)
                for i in range(g[0])
                for j in range(g[1])
            ]
        )
    t = read(torch.ones(B, 1, H, W) if x.wgt is None else x.wgt[:, None])[:, 0]
    n = len(y)
    eye = torch.eye(n, dtype=torch.bool)
    eq = y[:, None] == y[None]
    ok = torch.ones(n, dtype=torch.bool) if parity else y != IGNORE
    P, K = eq & ~eye & ok[:, None] & ok, ~eq & ok
    u = torch.ones_like(t) if parity else t  # trust of a negative

    def ell(s, K):
        return s - (s.exp() + torch.where(K, u * s.exp(), 0.0).sum(1)[:, None]).log()

    L = ell(fl @ fl.T, K)
    if w is not None:
        box, cell = out.aux['box'], 4
        fh = F.normalize(
            read(scatter_crops(out.aux['detail_fused'], box // cell, (H // cell, W // cell))), dim=1
        )
        d = torch.tensor(
            [
                (
                    t / cell <= i * (H / cell - 1) / (g[0] - 1) <= e / cell - 1
                    and l / cell <= j * (W / cell - 1) / (g[1] - 1) <= r / cell - 1
                )
                for t, e, l, r in box.tolist()
                for i in range(g[0])
                for j in range(g[1])
            ]
        )
        v = read(w)[:, 0]
        M = v[:, None] * v
        M = (
            M * (d & (y != 0))[:, None]
            if parity
            else torch.where(d[:, None] & d, M, torch.ones_like(M))
        )
        L = M * L + (1 - M) * ell(fl @ fh.T, K if parity else K & d)
    per = -(L * P * t * t[:, None]).sum(1) / P.sum(1).clamp(min=1)
    return 0.5 * per[ok].mean()


@pytest.mark.parametrize('parity', [False, True])
@pytest.mark.parametrize('hrda', [False, True])
@pytest.mark.parametrize('trusted', [False, True])
def test_criterion_is_a_literal_reading(parity, hrda, trusted):
    h = net(hrda=hrda)
    x, _ = batch(3)
    if trusted:
        x.wgt = torch.rand(2, 64, 128)
    crit = PixelContrastLoss(
        ScaleWeightHead(h.backbone.channels, 8) if hrda else None, parity=parity, chunk=17
    ).eval()
    out = h(x.img)
    w = crit.weigher(out.feats) if hrda else None
    torch.testing.assert_close(crit(out, x), literal(out, x, w, parity), rtol=1e-5, atol=1e-6)


def test_parity_changes_what_it_says():
    "Void, road and the outside of the detail"
    xs = cells(60, 5)
    y, d = xs[3], xs[5]

    def row(xs, i, parity):
        return contrast_loss_rows(slice(i, i + 1), *xs, parity)

    void = int((y == IGNORE).nonzero()[0])
    outside = int(((y == 1) & ~d).nonzero()[0])
    road = int(((y == 0) & d).nonzero()[0])
    assert row(xs, void, False) == 0 and row(xs, void, True) != 0
    new = [*xs[:2], torch.rand(60), *xs[3:]]  # other weights
    assert row(xs, outside, False) == row(new, outside, False) and row(xs, outside, True) == row(
        new, outside, True
    )
    assert row(xs, road, False) != row(new, road, False) and row(xs, road, True) == row(
        new, road, True
    )
    blind = [xs[0], torch.zeros_like(xs[1]), *xs[2:]]  # other details
    assert row(xs, outside, False) == row(blind, outside, False) and row(xs, outside, True) != row(
        blind, outside, True
    )


def test_order_of_cells_does_not_matter_and_neither_do_names_of_classes():
    xs = cells(50, 5)
    perm = torch.randperm(50)
    a, b = (chunked_contrast(*x, chunk=16) for x in (xs, [x[perm] for x in xs]))
    torch.testing.assert_close(a, b)
    renamed = [*xs[:3], torch.where(xs[3] == IGNORE, IGNORE, (xs[3] + 1) % 3), *xs[4:]]
    torch.testing.assert_close(chunked_contrast(*renamed, chunk=16), a)


def test_best_and_worst():
    "Aligned classes at opposite ends: log(1+m·e^-2) with m negatives; all alike: log(1+m)"
    y = torch.tensor([0] * 4 + [1] * 4)
    e = F.one_hot(torch.zeros(8, dtype=torch.long), 3).float()
    more = None, None, y, torch.ones(8), None
    for f, want in (
        (torch.where(y[:, None] == 0, e, -e), math.log(1 + 4 * math.exp(-2))),
        (e, math.log(5)),
    ):
        torch.testing.assert_close(chunked_contrast(f, *more) / 8, torch.tensor(want))


def test_detail_lies_where_it_was_cut():
    "A detail that holds its pixels' columns and rows reads back the points' places"
    yy, xx = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing='ij')
    place = torch.stack([yy, xx])[None].repeat(2, 1, 1, 1)
    box = torch.tensor([[32, 96, 64, 160], [0, 64, 160, 256]])
    x = torch.stack([place[i, :, t:b, l:r] for i, (t, b, l, r) in enumerate((box // 4).tolist())])
    got, inside = sample_detail(x, box, (128, 256), (9, 17))
    want = torch.stack(
        torch.meshgrid(torch.linspace(0, 31, 9), torch.linspace(0, 63, 17), indexing='ij')
    ).expand(2, 2, 9, 17)
    torch.testing.assert_close(
        got.movedim(1, -1)[inside], want.movedim(1, -1)[inside], atol=1e-4, rtol=0
    )
    assert inside.any((1, 2)).all() and not got.isnan().any()


def test_labels_are_read_where_features_are():
    lbl = torch.arange(256).repeat(64, 1)[None]
    f = F.interpolate(
        torch.arange(256.0).repeat(64, 1)[None, None],
        grid_size((64, 256)),
        mode='bilinear',
        align_corners=True,
    )
    assert (sample_labels(lbl, grid_size((64, 256))) - f[:, 0]).abs().max() <= 0.5
    assert (sample_labels(lbl, grid_size((64, 256)), True) - f[:, 0]).abs().max() > 10


@pytest.mark.parametrize(
    'size,crop',
    [
        ((128, 128), (64, 64)),
        ((64, 128), (32, 32)),
        ((64, 96), (64, 32)),
        ((40, 72), (32, 32)),
        ((32, 32), (32, 32)),
    ],
)
def test_uncertain_window_is_the_best_of_all(size, crop):
    seed_all(1)
    logits = 3 * torch.randn(3, N, size[0] // 8, size[1] // 8)
    got = max_entropy_boxes(logits, size, torch.tensor([[0, crop[0], 0, crop[1]]]).expand(3, 4))
    p = logits.softmax(1)
    ent = -(p * p.log()).sum(1)

    def starts(n, c):
        return sorted({min(i * (c // 2), n - c) for i in range(n)})

    for e, b in zip(ent, got.tolist()):
        best = max(
            (e[y // 8 : (y + crop[0]) // 8, x // 8 : (x + crop[1]) // 8].mean().item(), y, x)
            for y in starts(size[0], crop[0])
            for x in starts(size[1], crop[1])
        )
        assert b == [best[1], best[1] + crop[0], best[2], best[2] + crop[1]]


def steps(m, h, its, seed=0):
    src, tgt = batch(seed)
    for it in its:
        seed_all(7)
        for name, parts in m(m.new_step(src, tgt, h, it)):
            yield it, name, parts


def test_aims_only_the_mixed_pass_and_only_later():
    h = net(hrda=True)
    m = cluda(daformer(h, fd=0), h, dim=8, after=3)
    boxes = []
    h.register_forward_hook(
        lambda mod, a, o: boxes.append(o.aux['box']) if 'box' in o.aux else None
    )
    for _ in steps(m, h, (3, 4)):
        pass
    assert len(boxes) == 4
    assert boxes[0].equal(boxes[2]) and not boxes[1].equal(boxes[3]) and not (boxes[3] % 16).any()
    boxes.clear()
    h2 = net(hrda=True)
    assert cluda(dacs(h2), h2, after=None, dim=8).get_pass('mixed').network_args is None


@pytest.mark.parametrize('head', ['daformer', 'segformer', 'upernet', 'dlv2'])
def test_heads(head):
    h = net(head)
    m = cluda(daformer(h, (1, 2)), h)
    keys = {}
    for _, name, parts in steps(m, h, (0,)):
        sum(parts.values()).backward()
        keys[name] = set(parts)
    assert (
        'contrast' in keys['source']
        and 'contrast' in keys['mixed']
        and (head != 'upernet' or 'fcn' in keys['mixed'])
    )
    assert all(p.grad is None or p.grad.isfinite().all() for p in h.parameters())
    assert not [p for p in m.parameters() if p.requires_grad]  # one term: nothing to weigh


def test_hrda_passes_have_all_their_criteria_and_finite_gradients():
    h = net(hrda=True)
    m = cluda(daformer(h, (1, 2)), h, dim=8, after=0)
    for it, name, parts in steps(m, h, (0, 1)):
        assert {'ce', 'detail', 'contrast'} <= set(parts)
        sum(parts.values()).backward()
    own = [p for p in m.parameters() if p.requires_grad]
    assert (
        len(own) == len(list(m.passes[0].crits[-1].weigher.parameters())) > 0
    )  # one head, in both passes
    assert all(p.grad.isfinite().all() for p in own) and any(p.grad.any() for p in own)
    assert all(p.grad is None or p.grad.isfinite().all() for p in h.parameters())


def test_weight_zero_is_daformer_to_the_last_bit():
    g = {}
    for w in (None, 0.0):
        h = net(hrda=True)
        m = daformer(h, (1, 2))
        if w is not None:
            m = cluda(m, h, w=w, dim=8, after=None)
        for c in m.passes.modules():
            if isinstance(c, nn.Dropout2d):
                c.p = 0.0  # the head's own draws
        for _, _, parts in steps(m, h, (0,)):
            sum(parts.values()).backward()
        g[w] = [p.grad.clone() for p in h.parameters() if p.grad is not None]
    assert all(a.equal(b) for a, b in zip(g[None], g[0.0])) and len(g[None]) == len(g[0.0])


def test_autocast():
    h = net(hrda=True)
    x, _ = batch()
    crit = PixelContrastLoss(ScaleWeightHead(h.backbone.channels, 8))
    with torch.autocast('cpu', torch.bfloat16):
        loss = crit(h(x.img), x)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in h.parameters())


def test_one_image_without_labels_or_positives():
    h = net()
    x, _ = batch(n=1)
    for lbl in (torch.full((1, 64, 128), IGNORE), torch.ones(1, 64, 128, dtype=torch.long)):
        loss = PixelContrastLoss()(h(x.img), Sample(x.img, lbl))
        loss.backward()
        assert loss.abs() < 1e-6 and all(
            p.grad is None or p.grad.isfinite().all() for p in h.parameters()
        )


def test_messages():
    h = net(hrda=True)
    x, _ = batch()
    with pytest.raises(ValueError, match="no pass 'mixed'"):
        cluda(source_only(h), h)
    with pytest.raises(ValueError, match='no detail in this output'):
        PixelContrastLoss(ScaleWeightHead(h.backbone.channels, 8))(h.eval()(x.img), x)


def test_a_run_stopped_and_resumed_is_the_same_run(tmp_path):
    def trainer(out, n, stop=None):
        h = net(hrda=True)
        m = cluda(daformer(h, (1, 2)), h, dim=8, after=1)

        def loader(start):
            return (batch(t) for t in range(start, n))

        die = [lambda t, row: 1 / 0 if row['it'] == stop else None]
        return Trainer(
            h,
            m,
            groups=param_groups(h, 1e-3),
            loader=loader,
            steps=n,
            out=out,
            schedule=lambda it, k: 1.0,
            quiet=True,
            save_every=1,
            callbacks=die if stop else (),
        )

    a = trainer(tmp_path / 'a', 4)
    log = a.fit()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / 'b', 4, stop=3).fit()
    b = trainer(tmp_path / 'b', 4)
    again = b.fit()
    assert all(
        x.equal(y) for x, y in zip(a.student.state_dict().values(), b.student.state_dict().values())
    )
    assert all(
        x.equal(y) for x, y in zip(a.method.state_dict().values(), b.method.state_dict().values())
    )
    assert [r['mixed/contrast'] for r in log] == [r['mixed/contrast'] for r in again]
    assert any('weigher' in k for k in a.method.state_dict()) and not any(
        'net.0' in k for k in a.method.state_dict()
    )
