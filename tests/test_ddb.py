"DDB: masks, prototypes and weights against loops, what is frozen and what is kept, other networks, resume"

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from udanb.checkpoints.weights import save_weights
from udanb.core.types import IGNORE, SegOutput
from udanb.core.utils import seed_all
from udanb.data.augment import StrongAugmentation
from udanb.demo.render import toy_pair
from udanb.methods.daformer import dacs
from udanb.methods.ddb import DistillationLoss, EnsembleTargetView, bridge, cutmix_mask, distill
from udanb.methods.prototypes import (
    Ensemble,
    Prototypes,
    class_mean_embeddings,
    distances,
    find_prototypes,
    load_prototypes,
    prototype_weights,
    save_prototypes,
    teacher_agreement,
    weighted_probs,
)
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.method import Step
from udanb.training.trainer import Trainer

src, tgt = toy_pair(2)


def new(seed=0, head='daformer', **kw):
    seed_all(seed)
    return create_segmentor('mit_b0', 19, head, **dict(dim=16) | kw)


def protos(seed=0, dim=16):
    return torch.rand(19, dim, generator=torch.Generator().manual_seed(seed))


def run(m, net, tgt=tgt, seed=0, amp=None):
    "All losses and the student's gradient"
    seed_all(seed)
    net.zero_grad()
    logs = {}
    for name, parts in m(Step(src, tgt, net, m.teacher, 0, **(dict(amp=amp) if amp else {}))):
        sum(parts.values()).backward()
        for k, v in parts.items():
            logs[f'{name}/{k}'] = v.item()
    return logs, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize('size', [(64, 128), (33, 70), (160, 96), (24, 20)])
@pytest.mark.parametrize('area', [0.4, 0.1, 0.9])
def test_cut_is_one_rectangle_of_that_area(size, area):
    seed_all(1)
    m = cutmix_mask(torch.zeros(300, *size, dtype=torch.long), area)
    rows, cols = m.any(2), m.any(1)
    assert m.equal(rows[:, :, None] & cols[:, None])  # rows times columns …
    for x in (rows, cols):
        assert (x[:, 1:] != x[:, :-1]).sum(1).max() <= 2 and not (
            x[:, 0] & x[:, -1] & ~x.all(1)
        ).any()  # … each in one piece
    h, w = rows.sum(1), cols.sum(1)
    assert (
        h.min() >= 1
        and w.min() >= 1
        and ((m.sum((1, 2)) - area * size[0] * size[1]).abs() <= (h / 2).clamp(min=1) + 0.01).all()
    )
    assert (
        rows.any(0).all() and cols.any(0).all() and h.max() >= 0.97 * size[0]
    )  # every place, nearly the full height
    assert (
        abs((h / size[0]).log().mean() - torch.tensor(area).log() / 2) < 0.2
    )  # uniform in the exponent
    assert not m[0].equal(m[1])


def test_kinds_of_bridges():
    net = new()
    lbl = src.lbl.clone()
    lbl[0, :9] = IGNORE

    def step(m):
        return m.new_step(replace(src, lbl=lbl), tgt, net)

    for parity in (False, True):
        m = bridge(net, 'class', parity=parity)
        for seed in range(6):
            seed_all(seed)
            x = m.passes[1].view(step(m))
            pasted = (x.wgt == 1) & (step(m).pseudo.wgt < 1)
            for i in range(2):
                have = set(lbl[i].unique().tolist()) - (set() if parity else {IGNORE})
                got = {c for c in have if pasted[i][lbl[i] == c].all()}
                assert len(got) == (len(have) + 1) // 2 and pasted[i].equal(
                    torch.isin(lbl[i], torch.tensor(sorted(got)))
                )
    (a, g), (b, h) = (
        run(bridge(net, 'class', strong=StrongAugmentation()), net),
        run(dacs(net, strong=StrongAugmentation()), net),
    )
    assert a == b and g.equal(h)
    m = bridge(net, area=0.25)
    x = m.passes[1].view(step(m))
    assert (
        abs((x.wgt == 1).float().mean() - 0.25) < 0.01
        and m.teacher.alpha == 0.99
        and m.teacher.rows == (0, 0)
    )


@pytest.mark.parametrize(
    'big,small', [((21, 30), (5, 7)), ((32, 64), (8, 16)), ((9, 9), (9, 9)), ((4, 6), (1, 1))]
)
def test_pooling_equals_the_mean_of_the_enlarged_embedding(big, small):
    seed_all(0)
    f, lbl = torch.randn(2, 3, *small), torch.randint(0, 5, (2, *big))
    lbl[torch.rand(lbl.shape) < 0.2] = IGNORE
    v, px = class_mean_embeddings(f, lbl, 6)
    up = F.interpolate(f, big, mode='bilinear')
    for i in range(2):
        for c in range(6):
            here = lbl[i] == c
            assert px[i, c] == here.sum()
            torch.testing.assert_close(
                v[i, c],
                up[i][:, here].mean(1) if here.any() else torch.zeros(3),
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize('cap', [None, 3])
def test_running_mean(cap):
    seed_all(0)
    p = Prototypes(3, 4, cap=cap, min_pixels=10)
    votes = {c: [] for c in range(3)}
    for _ in range(6):
        z = torch.randn(2, 3, 4, 6)
        f = torch.rand(2, 4, 4, 6)
        wgt = (torch.rand(2, 8, 12) < 0.9).float()
        p.add(SegOutput(z, (), f), (8, 12), wgt)
        lbl, up = (
            F.interpolate(z, (8, 12), mode='bilinear').argmax(1),
            F.interpolate(f, (8, 12), mode='bilinear').double(),
        )
        for i in range(2):
            for c in range(3):
                if (here := (lbl[i] == c) & (wgt[i] > 0)).sum() >= 10:
                    votes[c].append(up[i][:, here].mean(1))
    for c, vs in votes.items():
        want, n = torch.zeros(4, dtype=torch.double), 0
        for v in vs:
            want = (n * want + v) / (n + 1)
            n = min(n + 1, cap or 99)  # the published update
        assert p.count[c] == n and len(vs) > 5
        torch.testing.assert_close(p.mean[c], want, rtol=1e-5, atol=1e-6)
        if cap is None:
            torch.testing.assert_close(p.mean[c], torch.stack(vs).mean(0), rtol=1e-5, atol=1e-6)


def test_finding_leaves_the_network_alone_and_ignores_margins():
    net = new()
    net.head.eval()
    was = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    half = replace(tgt, wgt=torch.ones(2, 64, 128))
    half.wgt[:, :, 64:] = 0
    p, q, r = (find_prototypes(net, x) for x in ([tgt], [half], [tgt[:1], tgt[1:]]))
    assert was == [m.training for m in net.modules()] and all(
        v.equal(before[k]) for k, v in net.state_dict().items()
    )
    torch.testing.assert_close(p.mean, r.mean, rtol=1e-3, atol=1e-5)
    assert p.count.equal(r.count)  # the size of the batches means nothing
    assert not p.mean.equal(q.mean)
    with pytest.raises(ValueError, match='no class fills 9999999 px'):
        find_prototypes(net, [tgt], min_pixels=9999999)
    half.wgt[:] = 0
    with pytest.raises(ValueError, match='no prototype was found'):
        find_prototypes(net, [half])


def test_files(tmp_path):
    p = Prototypes(5, 3, network='abc')
    p.mean = torch.rand(5, 3).double()
    p.count = torch.tensor([1, 2, 3, 0, 4])
    q = load_prototypes(save_prototypes(tmp_path / 'p.safetensors', p))
    assert q.mean.float().equal(p.mean.float()) and q.count.equal(p.count) and q.network == 'abc'
    torch.save(dict(mean=p.mean), tmp_path / 'x.pth')
    save_weights(tmp_path / 'n.safetensors', dict(mean=p.mean))
    for f in ('x.pth', 'n.safetensors'):
        with pytest.raises(ValueError, match=f'{f}: no prototypes in it'):
            load_prototypes(tmp_path / f)
    with pytest.raises(FileNotFoundError, match='no.safetensors'):
        load_prototypes(tmp_path / 'no.safetensors')


@pytest.mark.parametrize('size', [(5, 7), (20, 28), (11, 9), (2, 3)])
def test_distances_equal_cdist(size):
    seed_all(0)
    f, mean = torch.randn(2, 45, 5, 7) * 8, torch.randn(6, 45) * 8
    want = (
        torch.cdist(
            F.interpolate(f, size, mode='bilinear').flatten(2).transpose(1, 2).double(),
            mean.double()[None],
        )
        .transpose(1, 2)
        .view(2, 6, *size)
    )
    torch.testing.assert_close(distances(f, mean, size).double(), want, rtol=1e-4, atol=1e-3)


def test_trust():
    f, mean = torch.rand(1, 6, 4, 4), torch.rand(3, 6)
    mean[1] = 0
    a, b = prototype_weights(f, mean, (16, 16)), prototype_weights(f, mean, (16, 16), parity=True)
    for w in (a, b):
        torch.testing.assert_close(w.sum(1), torch.ones(1, 16, 16))
    assert a[:, 1].max() == 0 < b[:, 1].min()  # a class that was never found
    assert prototype_weights(f, mean, (16, 16), 4).equal(a) and not prototype_weights(
        f, mean, (16, 16), 8
    ).equal(a)
    assert prototype_weights(f[:, :, :1, :1], mean, (16, 16)).equal(
        prototype_weights(f[:, :, :1, :1], mean, (16, 16), 8)
    )  # an embedding at stride 16 is taken at 8
    z = torch.randn(1, 3, 4, 4)
    o = SegOutput(z, (), f)
    p = F.interpolate(z, (16, 16), mode='bilinear').softmax(1)
    assert weighted_probs(o, None, (16, 16)).equal(p) and weighted_probs(
        o, torch.ones(3, 6), (16, 16)
    ).argmax(1).equal(p.argmax(1))  # flat ω
    one = 100 * torch.eye(3, 6)
    assert (
        weighted_probs(SegOutput(z, (), one[2].view(1, 6, 1, 1).expand(1, 6, 4, 4)), one, (16, 16))
        .argmax(1)
        .eq(2)
        .all()
    )  # one-hot ω


class Largest(TorchDispatchMode):
    "Elements of the largest tensor that is made inside"

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n = max(
            [
                self.n,
                *(
                    t.numel()
                    for t in (out if isinstance(out, (tuple, list)) else [out])
                    if torch.is_tensor(t)
                ),
            ]
        )
        return out


@pytest.mark.parametrize('stride', [None, 1])
def test_no_large_tensor(stride):
    o = SegOutput(torch.randn(2, 19, 16, 16), (), torch.rand(2, 256, 16, 16))
    with torch.no_grad(), Largest() as big:
        weighted_probs(o, protos(dim=256), (128, 128), stride)
    assert big.n <= 2 * 32 * 128**2  # B·D·H·W would be 8 times, B·C·D·H·W 150 times as much
    with torch.no_grad(), Largest() as big:
        class_mean_embeddings(o.fused, torch.randint(0, 19, (2, 128, 128)), 19)
    assert big.n <= 2 * 20 * 128**2


def test_ensemble_against_a_loop_and_equal_teachers():
    a, b = new(0), new(1)
    ps = [protos(0), protos(1)]
    e = Ensemble([a, b], ps, stride=1)
    img = tgt.img
    with torch.no_grad():
        oa, ob = a.eval()(img), b.eval()(img)

    def up(x):
        return F.interpolate(x, (64, 128), mode='bilinear')

    g = 0
    for o, p in zip((oa, ob), ps):
        g = g + 0.5 * up(o.logits).softmax(1) * (
            -torch.cdist(up(o.fused).movedim(1, -1), p)
        ).softmax(-1).movedim(-1, 1)
    torch.testing.assert_close(e(img), g, rtol=1e-3, atol=1e-6)
    same = Ensemble([a, a], [torch.ones(19, 16)] * 2)  # equal teachers, constant ω
    assert same(img).argmax(1).equal(up(oa.logits).argmax(1))
    assert teacher_agreement(same, img) == dict(agree=1.0, changed=0.0)
    three = Ensemble([a, b, a])(img)
    torch.testing.assert_close(three, (2 * up(oa.logits).softmax(1) + up(ob.logits).softmax(1)) / 3)
    z = (
        sum(
            up(o.logits) * (-torch.cdist(up(o.fused).movedim(1, -1), p)).softmax(-1).movedim(-1, 1)
            for o, p in zip((oa, ob), ps)
        )
        / 2
    )
    torch.testing.assert_close(
        Ensemble([a, b], ps, parity=True).soft_targets(img, 2.0),
        (z / 2).softmax(1),
        rtol=1e-3,
        atol=1e-5,
    )  # as released


@pytest.mark.parametrize('parity', [False, True])
@pytest.mark.parametrize('T', [1.0, 3.0])
def test_soft_loss(parity, T):
    net = new().eval()
    e = Ensemble([net, net], parity=parity)
    x = EnsembleTargetView(e, soft=True, T=T)(Step(src, tgt, net))
    o = net(tgt.img)
    assert (
        abs(DistillationLoss(True, T=T, parity=parity)(o, x)) < 1e-6
    )  # the student is the ensemble
    z = torch.randn_like(o.logits)
    half = replace(x, lbl=x.lbl.clone())
    half.lbl[:, :20] = IGNORE
    logq = (F.interpolate(z, (64, 128), mode='bilinear') / T).log_softmax(1)
    kl = T**2 * (x.prob * (x.prob.log() - logq)).sum(1)
    torch.testing.assert_close(
        DistillationLoss(True, T=T, parity=parity)(o._replace(logits=z), x), kl.mean()
    )
    torch.testing.assert_close(
        DistillationLoss(True, T=T, parity=parity)(o._replace(logits=z), half),
        kl[:, 20:].sum() / (kl.numel() if parity else kl[:, 20:].numel()),
    )
    assert (
        DistillationLoss(True).w == 0.1
        and DistillationLoss().w == 1
        and DistillationLoss(True, 0.3).w == 0.3
    )


def test_who_sees_what():
    net = new()
    seen = {}

    class Bright(torch.nn.Module):
        def forward(self, img):
            return img + 1

    m = distill(net, [new(1), new(2)], [protos(0), protos(1)], strong=Bright())
    e = m.passes[1].view.ensemble
    for i, t in enumerate(e.frozen):
        t.register_forward_hook(lambda mod, args, out, i=i: seen.update({i: (args[0], out)}))
    half = replace(tgt, wgt=torch.ones(2, 64, 128))
    half.wgt[:, :10] = 0
    before = tgt.img.clone()
    x = m.passes[1].make_batch(Step(src, half, net))
    assert x.img.equal(before + 1) and tgt.img.equal(before)  # the student: augmented
    assert all(
        seen[i][0].equal(before) and not seen[i][1].logits.requires_grad for i in (0, 1)
    )  # the teachers: as it is
    assert x.lbl[:, :10].eq(IGNORE).all() and x.lbl[:, 10:].equal(e(tgt.img).argmax(1)[:, 10:])
    logs, g = run(m, net, half)
    assert (
        list(logs) == ['source/ce', 'target/distill']
        and g.isfinite().all()
        and not [p for t in e.frozen for p in t.parameters() if p.grad is not None]
    )
    z = run(distill(net, [new(1), new(2)], w=0.0), net)[0]
    assert z['target/distill'] == 0 and m.teacher is None


def test_state_and_device():
    net = new()
    m = distill(net, [new(1), new(2)], [protos(0), protos(1)]).train()
    assert not list(m.parameters()) and list(m.state_dict()) == [
        'passes.1.view.ensemble.sign'
    ]  # neither teachers nor prototypes
    e = m.passes[1].view.ensemble
    assert not any(x.training for t in e.frozen for x in t.modules())
    m.to('meta')
    assert (
        {p.device.type for t in e.frozen for p in t.parameters()}
        == {'meta'}
        == ({e.mean0.device.type})
    )
    one = distill(net, [net, new(2)])
    assert (
        all(p.requires_grad for p in net.parameters())
        and one.passes[1].view.ensemble.frozen[0] is not net
    )


def nets():
    yield 'hrda', lambda seed: HRDA(new(seed), crop=32, dim=16)
    yield (
        'upernet',
        lambda seed: (
            seed_all(seed),
            create_segmentor('tf_efficientnet_lite0', 19, 'upernet', ch=16),
        )[1],
    )
    yield 'dlv2_adapter', lambda seed: new(seed, 'dlv2_adapter')
    yield 'segformer', lambda seed: new(seed, 'segformer')


@pytest.mark.parametrize('name,make', list(nets()), ids=lambda v: v if isinstance(v, str) else '')
def test_other_networks(name, make):
    net = make(0)
    logs, g = run(bridge(net, tau=0.05, strong=StrongAugmentation()), net)
    assert logs['mixed/ce'] > 0 and g.isfinite().all()
    protos = [find_prototypes(t, [tgt]).mean for t in (make(1), make(2))]
    for soft in (False, True):
        m = distill(net, [make(1), make(2)], protos, soft)
        logs, g = run(m, net)
        extra = dict(hrda='detail', upernet='fcn').get(name)
        assert (
            all(torch.tensor(list(logs.values())).isfinite())
            and g.isfinite().all()
            and logs['target/distill'] > 0
        )
        assert extra is None or logs[f'target/{extra}'] > 0


def test_bfloat16_is_finite_and_near():
    net = new()
    m = distill(net, [new(1), new(2)], [protos(0), protos(1)], soft=True)
    a, _ = run(m, net)
    b, g = run(m, net, amp=lambda: torch.autocast('cpu', torch.bfloat16))
    assert g.isfinite().all() and all(b[k] == pytest.approx(a[k], rel=0.1) for k in a)


def test_files_of_teachers(tmp_path):
    net, ts = new(), [new(1), new(2)]
    files = [str(save_weights(tmp_path / f't{i}.safetensors', t)) for i, t in enumerate(ts)]
    ps = [
        str(save_prototypes(tmp_path / f'p{i}.safetensors', find_prototypes(t, [tgt])))
        for i, t in enumerate(ts)
    ]
    a, b = distill(net, files, ps), distill(net, ts, [load_prototypes(p).mean for p in ps])
    assert run(a, net)[0] == run(b, net)[0] and not any(
        p.equal(q) for p, q in zip(net.parameters(), ts[0].parameters()) if p.ndim > 1
    )
    with pytest.raises(ValueError, match='p1.safetensors: made with network .* same order'):
        distill(net, files, ps[::-1])
    with pytest.raises(ValueError, match='t0.safetensors: no prototypes'):
        distill(net, files, files)
    with pytest.raises(ValueError, match='does not fit the network'):
        distill(net, ps, ps)
    with pytest.raises(ValueError, match='19 classes and an embedding of 16'):
        distill(net, ts, [torch.ones(16, 19)] * 2)
    with pytest.raises(ValueError, match='all zero'):
        distill(net, ts, [torch.zeros(19, 16)] * 2)
    with pytest.raises(ValueError, match='list of at least two'):
        distill(net, files[0])
    with pytest.raises(ValueError, match='1 prototypes for 2'):
        distill(net, files, ps[0])
    with pytest.raises(FileNotFoundError, match='nowhere'):
        distill(net, [str(tmp_path / 'nowhere.safetensors')] * 2)


def test_a_resumed_run_is_the_same_run(tmp_path):
    def go(out, steps, stop=None, k=1):
        net = new()
        m = distill(net, [new(1), new(2)], [protos(0), k * protos(1)], strong=StrongAugmentation())
        t = Trainer(
            net,
            m,
            groups=param_groups(net, lr=1e-3),
            loader=lambda start: ((src, tgt) for _ in range(start, stop or steps)),
            steps=steps,
            out=out,
            quiet=True,
        )
        t.fit()
        t.save()
        return t

    a = go(tmp_path / 'a', 4)
    go(tmp_path / 'b', 4, stop=2)
    with pytest.raises(ValueError, match='other teachers or prototypes'):
        go(tmp_path / 'b', 4, k=2)
    b = go(tmp_path / 'b', 4)
    assert b.it == 4 and all(
        v.equal(b.student.state_dict()[k]) for k, v in a.student.state_dict().items()
    )
    assert not any(
        k.startswith(('frozen', 'mean')) or 'backbone' in k
        for k in torch.load(tmp_path / 'b/checkpoint.pt', weights_only=True)['method']
    )


@pytest.mark.parametrize('kind', ['cut', 'class'])
def test_a_resumed_bridge_is_the_same_run(tmp_path, kind):
    def go(out, stop=4):
        net = new()
        m = bridge(net, kind, tau=0.05, strong=StrongAugmentation())
        t = Trainer(
            net,
            m,
            groups=param_groups(net, lr=1e-3),
            loader=lambda start: ((src, tgt) for _ in range(start, stop)),
            steps=4,
            out=out,
            quiet=True,
        )
        t.fit()
        t.save()
        return t

    a = go(tmp_path / 'a')
    go(tmp_path / 'b', 2)
    b = go(tmp_path / 'b')
    both = [
        t.student.state_dict() | {f'teacher.{k}': v for k, v in t.teacher.state_dict().items()}
        for t in (a, b)
    ]
    assert both[0].keys() == both[1].keys() and all(v.equal(both[1][k]) for k, v in both[0].items())
    assert not a.teacher.net.head.conv_seg.weight.equal(a.student.head.conv_seg.weight)
