"soft, paste and mmd: naive loops and autograd, HRDA and UPerNet, checkpoints; params files of the scripts"

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from udanb.core.labels import CITYSCAPES19
from udanb.core.types import IGNORE, Sample, SegOutput, denormalize, normalize
from udanb.core.utils import seed_all
from udanb.demo.render import toy_pair
from udanb.methods.daformer import dacs, daformer, source_only
from udanb.methods.extras import (
    MMD,
    CropBank,
    FeatureQueue,
    RareClassPasteView,
    mmd,
    rare_class_paste,
    rare_classes,
    squared_mmd,
    target_pass,
)
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.trainer import Trainer

TOYS = (6, 7, 11, 12, 18)
KINDS = dict(
    plain=lambda: create_segmentor('mit_b0', 19, dim=16),
    hrda=lambda: HRDA(create_segmentor('mit_b0', 19, dim=16), 32, dim=16),
    upernet=lambda: create_segmentor('mit_b0', 19, 'upernet', dim=16),
)


@pytest.fixture(scope='module')
def pair():
    return toy_pair(2)


def everything(net, size=(64, 128)):
    return mmd(
        rare_class_paste(
            target_pass(daformer(net, CITYSCAPES19.things, tau=0.0), net), size, TOYS, least=0.001
        ),
        net,
    )


@pytest.mark.parametrize('kind', KINDS)
def test_all_options_on_every_kind_of_network(kind, pair):
    "Every loss is finite, the target pass reaches the student's head and encoder, and cross-entropies share the weight"
    seed_all(0)
    net = KINDS[kind]()
    m = everything(net)
    for it in range(2):  # at the second step bank and memories are filled
        grads = {}
        for name, parts in m(m.new_step(*pair, net, it)):
            net.zero_grad()
            sum(parts.values()).backward()
            assert all(torch.isfinite(v) for v in parts.values()), (name, parts)
            grads[name] = [p.grad for p in net.parameters() if p.grad is not None]
        assert list(grads) == ['source', 'mixed', 'target']
        assert all(torch.isfinite(g).all() for gs in grads.values() for g in gs)
        assert (
            sum(g.abs().sum() for g in grads['target']) > 0
            and parts.keys()
            == {'plain': {'ce'}, 'hrda': {'ce', 'detail'}, 'upernet': {'ce', 'fcn'}}[kind]
        )

    def ce(p, scale):
        return [
            (c.name, round(c.w / scale, 6))
            for c in m.get_pass(p).crits
            if c.name in ('ce', 'detail', 'fcn')
        ]

    assert ce('source', 1) == ce('mixed', 0.9) == ce('target', 0.1)


def test_order_of_additions_does_not_matter(pair):
    net = KINDS['plain']()
    a = target_pass(mmd(dacs(net), net), net)
    b = mmd(target_pass(dacs(net), net), net)

    def weights(m):
        return {(p.name, c.name): round(c.w, 9) for p in m.passes for c in p.crits}

    assert (
        weights(a) == weights(b)
        and weights(a)['mixed', 'mmd'] == 0.05
        and weights(a)['mixed', 'ce'] == 0.9
    )


def test_soft_is_the_weighted_sum_of_the_formula(pair):
    "Gradients of the three passes against one backward of (1-β)·L_M + β·L_T, computed by hand"
    seed_all(0)
    net = KINDS['plain']().eval()
    m = target_pass(dacs(net, tau=0.0), net, beta=0.3)

    def total(step):
        x = m.passes[1].view(step)
        q = step.pseudo

        def ce(out, l, w):
            up = torch.nn.functional.interpolate(out.logits, l.shape[-2:], mode='bilinear')
            return (
                torch.nn.functional.cross_entropy(up, l, reduction='none', ignore_index=IGNORE) * w
            ).sum() / (l != IGNORE).sum()

        return (
            ce(net(step.src.img), step.src.lbl, 1)
            + 0.7 * ce(net(x.img), x.lbl, x.wgt)
            + 0.3 * ce(net(q.img), q.lbl, q.wgt)
        )

    seed_all(1)
    net.zero_grad()
    total(m.new_step(*pair, net)).backward()
    want = [p.grad.clone() for p in net.parameters()]
    seed_all(1)
    net.zero_grad()
    for _, parts in m(m.new_step(*pair, net)):
        sum(parts.values()).backward()
    for p, w in zip(net.parameters(), want):
        torch.testing.assert_close(p.grad, w, rtol=1e-3, atol=1e-6)


def test_refusals(pair):
    net = KINDS['plain']()
    for add in (
        lambda m: target_pass(m, net),
        lambda m: rare_class_paste(m, (64, 128)),
        lambda m: mmd(m, net),
    ):
        with pytest.raises(ValueError, match="no pass 'mixed'.*daformer"):
            add(source_only(net))
    with pytest.raises(ValueError, match="as `size`"):
        CropBank(TOYS, (32, 32)).put(pair[0])


# ---- paste


def naive_paste(x, drawn):
    x = x.map(torch.clone)
    for i, each in enumerate(drawn):
        for c, img, m in each:
            for y, z in m.nonzero().tolist():
                x.img[i, :, y, z] = img[:, y, z]
                x.lbl[i, y, z] = c
                x.wgt[i, y, z] = 1.0
    return x


def test_paste_is_consistent_and_from_earlier_images(pair):
    seed_all(0)
    net = KINDS['plain']()
    m = rare_class_paste(dacs(net), (64, 128), TOYS, least=0.001)
    view = m.passes[1].view
    assert isinstance(view, RareClassPasteView) and view.bank.draw(2) == []
    seed_all(1)
    first = view(m.new_step(*pair, net))
    seed_all(1)
    plain = view.view(m.new_step(*pair, net))
    assert first.img.equal(plain.img) and first.lbl.equal(plain.lbl)  # nothing was in the bank yet
    assert view.bank.seen.sum() > 2
    step = m.new_step(toy_pair(2, seed=1)[0], pair[1], net)
    seed_all(2)
    want = view.view(step)
    want = naive_paste(want, [view.bank.draw(2) for _ in range(2)])
    before = pair[0].img.clone()
    seed_all(2)
    got = view(step)
    assert got.img.equal(want.img) and got.lbl.equal(want.lbl) and got.wgt.equal(want.wgt)
    changed = (got.img != plain.img).any(1)
    assert (
        changed.any() and pair[0].img.equal(before) and not step.pseudo.wgt.gt(1).any()
    )  # inputs are left alone


def test_bank_keeps_pixels_and_forgets_the_oldest():
    bank = CropBank((3, 5), (4, 4), slots=2, least=4 / 16)

    def sample(v, n):
        l = torch.zeros(1, 4, 4, dtype=torch.long)
        l.view(-1)[:n] = 5
        return Sample(normalize(np.full((4, 4, 3), v, np.uint8))[None], l)

    bank.put(sample(7, 3))
    assert bank.seen.tolist() == [0, 0]  # too few pixels
    for v in (10, 20, 30):
        bank.put(sample(v, 4))
    assert bank.seen.tolist() == [0, 3] and sorted(bank.img[1, :, 0, 0, 0].tolist()) == [20, 30]
    got = set()
    for s in range(30):
        seed_all(s)
        ((c, img, m),) = bank.draw(2)
        assert c == 5 and m.sum() == 4
        got.add(round(255 * denormalize(img)[0, 0, 0].item()))
    assert got == {20, 30}


def test_colours_change_after_pasting():
    "The augmentation of the mixed pass is applied once, to pasted pixels too"
    net = KINDS['plain']()
    src, tgt = toy_pair(2)

    class Minus(torch.nn.Module):
        def forward(self, x):
            return -x

    m = rare_class_paste(dacs(net, strong=Minus()), (64, 128), TOYS, least=0.001)
    mixed = m.get_pass('mixed')
    mixed.view.bank.put(src)
    step = m.new_step(src, tgt, net)
    seed_all(4)
    got = mixed.make_batch(step)
    seed_all(4)
    want = mixed.view(step)
    assert got.lbl.equal(want.lbl) and got.img.equal(-want.img)


def test_rare_classes():
    assert [CITYSCAPES19.classes[i] for i in rare_classes(CITYSCAPES19)] == [
        'rider',
        'bus',
        'train',
        'motorcycle',
        'bicycle',
    ]


# ---- mmd


@pytest.mark.parametrize('n,m', [(2, 2), (2, 8), (5, 3)])
def test_mmd_by_loops(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 7)), rng.standard_normal((m, 7)) + 0.5
    z = np.concatenate([x, y])
    N = n + m
    bw = sum(((a - b) ** 2).sum() for a in z for b in z) / (N * (N - 1))

    def k(A, B):
        return np.mean(
            [
                [
                    sum(np.exp(-((a - b) ** 2).sum() / (bw * 2.0**i)) for i in range(-2, 3))
                    for b in B
                ]
                for a in A
            ]
        )

    assert squared_mmd(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(
        k(x, x) + k(y, y) - 2 * k(x, y), rel=1e-4, abs=1e-6
    )


def test_mmd_moves_distributions_together():
    seed_all(0)
    x = torch.nn.Parameter(torch.randn(16, 4) + 3)
    y = torch.randn(16, 4)
    opt = torch.optim.SGD([x], 1.0)
    first = squared_mmd(x, y).item()
    for _ in range(200):
        opt.zero_grad()
        squared_mmd(x, y).backward()
        opt.step()
    assert squared_mmd(x, y).item() < 0.3 * first


def test_mmd_of_equal_vectors_is_finite():
    x = torch.ones(2, 4, requires_grad=True)
    v = squared_mmd(x, torch.ones(2, 4))
    v.backward()
    assert v == 0 and torch.isfinite(x.grad).all()


def test_two_sided_memory_gives_the_joint_gradient():
    f, g = (torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(2))

    def pool(t):
        return t.mean((2, 3))

    a, b = FeatureQueue(6, 2), FeatureQueue(6, 2)
    b.put(pool(g))
    (MMD(a, b)(SegOutput(None, (f,))) + MMD(b, a)(SegOutput(None, (g,)))).backward()
    want = torch.autograd.grad(squared_mmd(pool(f), pool(g)), [f, g])
    torch.testing.assert_close(f.grad, want[0])
    torch.testing.assert_close(g.grad, want[1])


def test_recent_keeps_the_newest():
    r = FeatureQueue(1, 3)
    for i in range(5):
        r.put(torch.tensor([[float(i)]]))
    assert r.now.flatten().tolist() == [4, 3, 2]


# ---- a checkpoint


def trainer(out, pair, steps=4, save=2):
    seed_all(0)
    net = KINDS['plain']()
    batches = [toy_pair(2, seed=s) for s in range(2)]
    return Trainer(
        net,
        everything(net),
        groups=param_groups(net, 1e-3),
        loader=lambda start: (batches[i % 2] for i in range(start, steps)),
        steps=steps,
        out=out,
        save_every=save,
        quiet=True,
    )


def test_resume_is_exact(tmp_path, pair):
    "Bank and memories travel with the checkpoint"
    whole = trainer(tmp_path / 'a', pair)
    whole.fit()
    cut = trainer(tmp_path / 'b', pair)
    for b, _ in zip(cut.loader(0), range(2)):
        cut.step(*b)
    (tmp_path / 'b').mkdir()
    cut.save()
    again = trainer(tmp_path / 'b', pair)
    again.fit()
    assert again.it == 4 and whole.method.passes[1].view.bank.seen.sum() > 0
    for x, y in ((whole.student, again.student), (whole.method, again.method)):
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


# ---- params/scripts_*.yaml

FILES = sorted((ROOT / 'params').glob('scripts_*.yaml'))


def test_scripts_cover_the_list():
    encoders = (
        'swin_s',
        'swin_b',
        'swin_l',
        'convnext_s',
        'convnext_b',
        'convnext_l',
        'mit_b5',
        'beit_b',
        'mae_b',
    )
    want = {f'scripts_{e}_{h}' for e in encoders for h in ('daformer', 'upernet', 'fcn')}
    assert {f.stem for f in FILES} == want


@pytest.mark.parametrize('f', FILES, ids=lambda f: f.stem)
def test_the_network_of_each_script(f):
    "Built from the file, on the meta device if the encoder allows it: shapes fit, the width is that of the scripts"
    p = yaml.safe_load(f.read_text())
    over = p['overrides']
    assert (
        over['extensions'] == ['soft', 'paste', 'mmd']
        and over['rcs']
        and over['ema_decay'] == 0.999
        and over['target_margins'] == 'none'
        and p['recipe'] == 'dacs'
    )
    assert over.get('lr') == (8e-5 if 'convnext' in f.stem else None)
    meta = not p['backbone'].startswith('mit')
    with torch.device('meta') if meta else nullcontext():
        net = create_segmentor(
            p['backbone'],
            19,
            over.get('head', 'daformer'),
            dim=over.get('embed_dim'),
            drop_path=over.get('drop_path_rate'),
        )
    if meta:
        assert net.eval()(torch.zeros(1, 3, 512, 512, device='meta')).logits.shape == (
            1,
            19,
            *((16, 16) if 'fcn' in f.stem else (128, 128)),
        )
    assert net.head.ch == over.get('embed_dim', 256 if 'daformer' in f.stem else 512)
    assert f'-f params/{f.name}' in f.read_text()
