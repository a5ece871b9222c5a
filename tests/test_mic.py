"Masked image consistency: masks against a naive loop, invariants of the pass, other networks, resume"

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from udanb.core.types import IGNORE, Sample
from udanb.core.utils import seed_all
from udanb.data.augment import StrongAugmentation
from udanb.demo.render import toy_pair
from udanb.methods.daformer import dacs, daformer, source_only
from udanb.methods.mic import MASK_SOURCES, mic, source_target_view
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.trainer import Trainer
from udanb.training.views import MaskedView, patch_mask, source_view, target_view

src, tgt = toy_pair(2)


@pytest.fixture(scope='module')
def net():
    seed_all(0)
    return create_segmentor('mit_b0', 19, dim=16)


def run(method, net, src=src, tgt=tgt, seed=0):
    "All losses and the student's gradient"
    seed_all(seed)
    net.zero_grad()
    logs = {}
    for name, parts in method(method.new_step(src, tgt, net)):
        sum(parts.values()).backward()
        logs |= {f'{name}/{k}': v.item() for k, v in parts.items()}
    return logs, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    'size,block', [((64, 128), 16), ((60, 52), 16), ((33, 17), 7), ((512, 512), 32), ((8, 8), 64)]
)
def test_mask_is_a_naive_nearest_enlargement_of_the_coins(size, block):
    torch.manual_seed(3)
    m = patch_mask((2, *size), block)
    gh, gw = (max(round(n / block), 1) for n in size)
    torch.manual_seed(3)
    v = torch.rand(2, 1, gh, gw)
    want = torch.tensor(
        [
            [
                [v[b, 0, y * gh // size[0], x * gw // size[1]].item() > 0.7 for x in range(size[1])]
                for y in range(size[0])
            ]
            for b in range(2)
        ]
    )
    assert m.equal(want)


@pytest.mark.parametrize('side,block', [(1024, 64), (512, 32)])
def test_published_sizes_hide_seventy_per_cent_of_256_cells(side, block):
    torch.manual_seed(0)
    n = torch.cat(
        [
            patch_mask((4, side, side), block)[:, ::block, ::block].flatten(1).sum(1)
            for _ in range(20)
        ]
    ).float()
    assert abs(n.mean() / 256 - 0.3) < 4 * math.sqrt(0.21 / 256 / 80)
    img = torch.randn(1, 3, side, side) + 5
    a, b = (MaskedView(lambda step: Sample(img), k) for k in (block, None))
    torch.manual_seed(1)
    x = a(None).img
    torch.manual_seed(1)
    assert b(None).img.equal(x)  # a sixteenth is the published size
    assert (x[(x == 0).all(1, keepdim=True).expand_as(x)] == 0).all() and x[x != 0].equal(
        img[x != 0]
    )


@pytest.mark.parametrize('kw', [dict(block=0), dict(block=-3), dict(ratio=1.2), dict(ratio=-0.1)])
def test_impossible_masks_are_refused(kw):
    with pytest.raises(ValueError, match='block'):
        patch_mask((1, 8, 8), **kw)


def test_teacher_sees_the_whole_and_is_asked_once(net):
    m, seen = (
        mic(
            daformer(net, things=(11,), strong=StrongAugmentation()),
            net,
            strong=StrongAugmentation(),
        ),
        [],
    )
    m.teacher.net.register_forward_hook(lambda mod, args, out: seen.append(args[0]))
    before = tgt.img.clone()
    logs, _ = run(m, net)
    assert len(seen) == 1 and seen[0].equal(before) and tgt.img.equal(before)
    assert list(logs) == ['source/ce', 'source/fd', 'mixed/ce', 'masked/ce']


def test_earlier_passes_are_those_of_the_host(net):
    host, _ = run(dacs(net, tau=0.0), net)
    more, _ = run(mic(dacs(net, tau=0.0), net), net)
    assert {k: more[k] for k in host} == host


def test_nothing_hidden_is_self_training_on_the_target(net):
    net.eval()
    m = mic(dacs(net, tau=0.0), net, ratio=0.0)
    x = m.passes[2].view(step := m.new_step(src, tgt, net))
    assert x.img.equal(tgt.img) and x.lbl is step.pseudo.lbl
    out = net(x.img).logits
    want = F.cross_entropy(F.interpolate(out, x.img.shape[-2:], mode='bilinear'), step.pseudo.lbl)
    torch.testing.assert_close(m.passes[2].crits[0](net(x.img), x, step), want)
    net.train()


def test_weight_zero_adds_no_gradient_and_two_doubles_it(net):
    net.eval()  # else the passes would share BatchNorm's batch and dropout's coins
    g = {w: run(mic(dacs(net, tau=0.0), net, w=w), net)[1] for w in (0.0, 1.0, 2.0)}
    torch.testing.assert_close(g[0.0], run(dacs(net, tau=0.0), net)[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g[2.0] - g[0.0], 2 * (g[1.0] - g[0.0]), rtol=1e-3, atol=1e-4)
    assert (g[1.0] - g[0.0]).abs().max() > 1e-2
    net.train()


def test_places_without_trust_have_no_say(net):
    net.eval()
    m = mic(dacs(net, tau=0.0), net)
    p = m.passes[2]
    part = Sample(tgt.img, wgt=torch.ones(2, 64, 128))
    part.wgt[:, 32:] = 0
    step = m.new_step(src, part, net)
    out = net(torch.zeros_like(tgt.img))._replace(
        logits=torch.randn(2, 19, 64, 128, requires_grad=True)
    )
    p.crits[0](out, target_view(step), step).backward()
    assert (out.logits.grad[:, :, 32:] == 0).all() and (out.logits.grad[:, :, :32] != 0).any()
    net.train()


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_both_takes_half_of_each_domain(net, n):
    a, b = toy_pair(n, seed=1)
    a.wgt = torch.full(a.lbl.shape, 0.5)
    m = dacs(net, tau=0.0)
    x = source_target_view(m.new_step(a, b, net))
    assert x.name == a.name[: n // 2] + b.name[: n - n // 2] and x.img.equal(
        torch.cat([a.img[: n // 2], b.img[: n - n // 2]])
    )
    assert (
        x.lbl[: n // 2].equal(a.lbl[: n // 2])
        and (x.wgt[: n // 2] == 0.5).all()
        and (x.wgt[n // 2 :] == 1).all()
    )


@pytest.mark.parametrize('mode', MASK_SOURCES)
@pytest.mark.parametrize('kind', ['hrda', 'upernet'])
def test_other_networks(kind, mode):
    seed_all(0)
    net = (
        HRDA(create_segmentor('mit_b0', 19, dim=16), 32, dim=16)
        if kind == 'hrda'
        else create_segmentor('mit_b0', 19, 'upernet', dim=16)
    )
    logs, g = run(
        mic(
            dacs(net, tau=0.0, strong=StrongAugmentation()),
            net,
            mode=mode,
            strong=StrongAugmentation(),
        ),
        net,
    )
    extra = dict(hrda='masked/detail', upernet='masked/fcn')[kind]
    assert logs['masked/ce'] > 0 and logs[extra] > 0 and g.isfinite().all()


@pytest.mark.parametrize('parity', [False, True])
@pytest.mark.parametrize('kind', ['hrda', 'upernet'])
def test_weight_reaches_every_term_and_only_the_first_under_parity(kind, parity):
    net = (
        HRDA(create_segmentor('mit_b0', 19, dim=16), 32, dim=16)
        if kind == 'hrda'
        else create_segmentor('mit_b0', 19, 'upernet', dim=16)
    )

    def w(**kw):
        return [c.w for c in mic(dacs(net), net, **kw).passes[2].crits]

    assert w(w=3.0, parity=parity) == pytest.approx([3 * w()[0], w()[1] * (1 if parity else 3)])


def test_the_supervised_variant_needs_no_target(net):
    m = mic(source_only(net), net, mode='source')
    logs, g = run(m, net, tgt=None)
    assert set(logs) == {'source/ce', 'masked/ce'} and g.isfinite().all()
    with pytest.raises(ValueError, match='needs a teacher'):
        mic(source_only(net), net)


def test_bf16_has_finite_gradients(net):
    from functools import partial

    m = mic(dacs(net, tau=0.0), net)
    step = m.new_step(src, tgt, net, amp=partial(torch.autocast, 'cpu', torch.bfloat16))
    net.zero_grad()
    for _, parts in m(step):
        sum(parts.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_resume_is_exact(tmp_path):
    def make(out, stop=None):
        seed_all(0)
        net = create_segmentor('mit_b0', 19, dim=16)
        m = mic(
            dacs(net, alpha=0.9, tau=0.0, strong=StrongAugmentation()),
            net,
            strong=StrongAugmentation(),
        )

        def loader(start):
            return (toy_pair(1, (32, 64), seed=t) for t in range(start, 3))

        return Trainer(
            net,
            m,
            groups=param_groups(net, lr=1e-3),
            loader=loader,
            steps=3,
            out=out,
            save_every=1,
            quiet=True,
            callbacks=[lambda t, row: 1 / 0 if row['it'] == stop else None],
        )

    a = make(tmp_path / 'a')
    a.fit()
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / 'b', stop=2).fit()
    b = make(tmp_path / 'b')
    b.fit()
    for x, y in ((a.student, b.student), (a.method, b.method)):
        assert all(u.equal(v) for u, v in zip(x.state_dict().values(), y.state_dict().values()))


def test_a_mask_is_the_same_for_the_same_seed_and_other_for_another():
    step = SimpleNamespace(src=src)

    def draw(s):
        return (seed_all(0, s), MaskedView(source_view, 8)(step).img)[1]

    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))
    assert not (src.lbl == IGNORE).all() and MaskedView(source_view)(step).lbl is src.lbl
