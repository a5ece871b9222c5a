"DIDA: the invariants of the spec, other networks, files, resume"

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from udanb.core.labels import CITYSCAPES19
from udanb.core.types import IGNORE, Sample, SegOutput
from udanb.core.utils import seed_all
from udanb.data.augment import StrongAugmentation
from udanb.demo.render import toy_pair
from udanb.methods.daformer import daformer, source_only
from udanb.methods.dida import BankLabeller, BankUpdate, InstanceLoss, dida, unpasted_mask
from udanb.methods.instance_bank import (
    InstanceBank,
    boundary_mask,
    class_corrected_profile,
    evaluate_bank,
    load_bank,
    profile_stats,
    profile_to_class_probs,
    save_bank,
)
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.method import Step
from udanb.training.trainer import Trainer

PAIR = toy_pair(2)


def full(n=4, ch=6, rows=3, seed=0, missing=()):
    seed_all(seed)
    b = InstanceBank(n, ch, rows)
    for _ in range(rows):
        b.update(torch.rand(n, ch), torch.tensor([c not in missing for c in range(n)]))
    return b


def made(seed=0, n=4, ch=6, q=0.4):
    "Outputs of student and teacher, a mixture, and the step it belongs to"
    seed_all(seed)
    teach, out = (SegOutput(torch.randn(2, n, 6, 8), (), torch.rand(2, ch, 6, 8)) for _ in range(2))
    lbl, paste = torch.randint(0, n, (2, 24, 32)), torch.rand(2, 24, 32) < 0.4
    x = Sample(None, lbl, torch.where(paste, 1.0, q))
    return (
        teach,
        out,
        x,
        SimpleNamespace(
            teacher_output=teach,
            pseudo=Sample(None, lbl, torch.full(lbl.shape, q)),
            src=Sample(None, lbl),
        ),
        paste,
    )


def parts_of(net, m, pair=PAIR, it=0, seed=3):
    seed_all(seed)
    net.zero_grad()
    logs = {}
    for name, parts in m(m.new_step(*pair, net, it)):
        sum(parts.values()).backward()
        logs |= {f'{name}/{k}': v.detach() for k, v in parts.items()}
    return logs, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize('parity', [False, True])
def test_zero_weight_gives_daformers_gradients(parity):
    res = []
    for add in (
        lambda m, net: m,
        lambda m, net: dida(m, net, 19, lam=0.0, alpha=1.0, parity=parity),
    ):
        seed_all(0)
        net = create_segmentor('mit_b0', 19, dim=16)
        m = add(
            daformer(net, CITYSCAPES19.things, tau=0.1, strong=StrongAugmentation(), parity=parity),
            net,
        )
        for it in range(3):
            logs, g = parts_of(net, m, it=it, seed=it)
        res.append((g, logs['source/ce'], logs['mixed/ce']))
    assert all(a.equal(b) for a, b in zip(*res)) and m.passes[0].crits[-1].bank.valid.any()


def test_profile_sums_to_one_and_unfolding_is_the_formula():
    b = full(missing=(3,))
    e, logp = torch.rand(2, 6, 3, 5), torch.randn(2, 4, 3, 5).log_softmax(1)
    q, t = b.similarities(e).softmax(1), class_corrected_profile(b.similarities(e), logp, b.label)
    torch.testing.assert_close(t.sum(1), torch.ones(2, 3, 5))
    want = q * logp.exp()[:, b.label]
    torch.testing.assert_close(t, want / want.sum(1, keepdim=True))
    assert t[:, 9:].max() == 0  # rows never written take no part
    a = profile_to_class_probs(q, b.label, 4)
    for c in range(4):
        torch.testing.assert_close(a[:, c], q[:, b.label == c].sum(1))


@pytest.mark.parametrize('parity', [False, True])
def test_order_of_the_rows_means_nothing(parity):
    teach, out, x, step, _ = made()
    b = full(missing=(1,))
    p = copy.deepcopy(b)
    k = torch.randperm(len(b.label))
    for f in ('feat', 'label', 'valid'):
        getattr(p, f).copy_(getattr(b, f)[k])
    assert not p.label.equal(b.label)
    torch.testing.assert_close(
        InstanceLoss(p, parity=parity)(out, x, step), InstanceLoss(b, parity=parity)(out, x, step)
    )
    assert evaluate_bank(p) == pytest.approx(evaluate_bank(b), abs=1e-6)


def test_absent_classes_keep_their_rows():
    b = full()
    was = copy.deepcopy(b)
    lbl = torch.tensor([[[0, 0, 2, IGNORE]]]).repeat_interleave(8, 1)
    BankUpdate(b)(
        SegOutput(None, (), torch.rand(1, 6, 8, 4)), Sample(None, lbl), Step(None, None, None)
    )
    same = [b.feat[b.label == c].equal(was.feat[b.label == c]) for c in range(4)]
    assert same == [False, True, False, True] and b.ptr.tolist() == [1, 0, 1, 0]
    assert (b.feat != was.feat).any(1).sum() == 2  # one row of each class that was there


def test_pasted_pixels_get_no_gradient_and_trust_scales_the_rest():
    teach, out, x, step, paste = made(q=0.4)
    whole = F.adaptive_avg_pool2d((~paste).float(), (6, 8))
    paste = paste.clone()
    paste[:, :12] = True
    paste[:, 12:] = False  # a mask of whole cells
    x = replace(x, wgt=torch.where(paste, 1.0, 0.4))
    f = out.fused.clone().requires_grad_()
    loss = InstanceLoss(full())(out._replace(fused=f), x, step)
    loss.backward()
    assert (
        f.grad[:, :, :3].abs().max() == 0
        and f.grad[:, :, 3:].abs().min() > 0
        and whole.shape == (2, 6, 8)
    )
    half = InstanceLoss(full())(out, replace(x, wgt=torch.where(paste, 1.0, 0.2)), step)
    torch.testing.assert_close(half, loss.detach() / 2)


def test_target_pixels_even_if_the_teacher_is_sure_of_all():
    src, ps = torch.tensor([[[0, 1, 2, IGNORE]]]), torch.tensor([[[3, 3, 2, 1]]])
    paste = torch.tensor([[[True, False, False, False]]])
    x = Sample(None, torch.where(paste, src, ps), torch.ones(1, 1, 4))
    step = SimpleNamespace(src=Sample(None, src), pseudo=Sample(None, ps, torch.ones(1, 1, 4)))
    assert unpasted_mask(x, step).tolist() == [
        [[False, True, False, True]]
    ]  # the third could be either, and is left out
    x.wgt = torch.where(paste, 1.0, 0.5)
    step.pseudo.wgt = torch.full((1, 1, 4), 0.5)
    assert unpasted_mask(x, step).equal(~paste)


def test_boundaries_equal_a_loop():
    seed_all(0)
    lbl = torch.randint(0, 2, (2, 5, 6)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    lbl[torch.rand(lbl.shape) < 0.1] = IGNORE
    got = boundary_mask(lbl)
    for i, y, x in np.ndindex(*lbl.shape):
        near = set(lbl[i, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].unique().tolist()) - {
            IGNORE
        }
        assert got[i, y, x] == (lbl[i, y, x] != IGNORE and len(near) > 1)


def test_published_update_of_the_bank():
    b = full()
    b.m = 0.9
    was = b.feat.clone()
    e, lbl = torch.rand(2, 6, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    lbl[0, :2], lbl[1, 2:] = 1, 2
    r = BankUpdate(b, every=2, tau=None, parity=True)
    o, x = SegOutput(None, (), e), Sample(None, lbl)
    r(o, x, Step(None, None, None, it=1))
    assert b.feat.equal(was)  # not due
    r(o, x, Step(None, None, None, it=2))
    for c in range(4):
        cells = [
            e[0, :, y, z] for i in range(2) for y in range(4) for z in range(4) if lbl[i, y, z] == c
        ]  # of both images, out of the first
        mean = torch.stack(cells).mean(0) if cells else torch.zeros(6)
        torch.testing.assert_close(b.feat[b.label == c], 0.9 * was[b.label == c] + 0.1 * mean)


def test_blended_labels():
    net = create_segmentor('mit_b0', 19, dim=16)
    m = daformer(net, fd=0, tau=0.08, rows=(4, 8))
    step = m.new_step(*PAIR, net)
    plain = step.pseudo
    b = full(19, 16)
    assert BankLabeller(b, alpha=1.0)(step).lbl.equal(plain.lbl)
    got = BankLabeller(b, alpha=0.3)(step)
    assert got.wgt.equal(plain.wgt) and not got.lbl.equal(plain.lbl)
    m.labeller = BankLabeller(b, alpha=0.3)
    assert m.new_step(*PAIR, net).pseudo.lbl.equal(got.lbl)  # every pass sees the same labels
    a = profile_to_class_probs(b.similarities(step.teacher_output.fused).softmax(1), b.label, 19)
    want = (
        0.3 * F.interpolate(step.teacher_output.logits, (64, 128), mode='bilinear').softmax(1)
        + 0.7 * F.interpolate(a, (64, 128), mode='bilinear')
    ).argmax(1)
    assert (want == got.lbl).float().mean() > 0.999
    old = BankLabeller(b, alpha=0.3, tau=None, parity=True)(step)
    assert (
        old.wgt.max() >= plain.wgt.max() and old.wgt[:, :4].max() == 0 == old.wgt[:, -8:].max()
    )  # added, not blended: surer than before


def test_files_round_trip_and_what_they_say(tmp_path):
    b = full(5, 7, missing=(2,))
    f, l = save_bank(b, tmp_path)
    assert (
        np.load(f)['arr_0'].dtype == np.float32
        and np.load(l)['arr_0'].dtype == np.int64
        and np.load(f)['arr_0'].shape == (12, 7)
    )
    back = load_bank(full(5, 7, seed=1), tmp_path)
    assert all(v.equal(back.state_dict()[k]) for k, v in b.state_dict().items() if k != 'seen')
    k = np.random.RandomState(0).permutation(12)
    np.savez(f, np.load(f)['arr_0'][k])
    np.savez(l, np.load(l)['arr_0'][k])  # any order, as in the published files
    back = load_bank(InstanceBank(5, 7, 4), tmp_path)
    assert sorted(map(tuple, back.feat[back.valid].tolist())) == sorted(
        map(tuple, b.feat[b.valid].tolist())
    )
    assert back.ptr.tolist() == [3, 3, 0, 3, 3] and back.occupancy() == 0.75
    with pytest.raises(ValueError, match=r'this network needs \(12, 8\)'):
        load_bank(InstanceBank(5, 8, 4), tmp_path)
    with pytest.raises(ValueError, match='labels 0 to 4; there are 3 classes'):
        load_bank(InstanceBank(3, 7, 4), tmp_path)
    with pytest.raises(ValueError, match='set rows=3'):
        load_bank(InstanceBank(5, 7, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match='f_buffer_s.npz is not there'):
        load_bank(b, tmp_path / 'no')
    with pytest.raises(ValueError, match='three are needed'):
        evaluate_bank(InstanceBank(5, 7))


def test_stats_of_known_profiles():
    label = torch.tensor([0, 0, 1, 1])
    s = profile_stats(torch.tensor([[0.25] * 4, [0, 0, 1.0, 0]]), label, torch.tensor([0, 0]), 4)
    torch.testing.assert_close(s, torch.tensor([[1, 0.5, 1], [0, 0, 0.0]]))


def nets():
    yield 'hrda', lambda: HRDA(create_segmentor('mit_b0', 19, dim=16), crop=32, dim=16)
    yield 'upernet', lambda: create_segmentor('tf_efficientnet_lite0', 19, 'upernet', ch=16)
    yield 'dlv2', lambda: create_segmentor('mit_b0', 19, 'dlv2')
    yield 'segformer', lambda: create_segmentor('mit_b0', 19, 'segformer', dim=16)


@pytest.mark.parametrize('name,new', list(nets()), ids=lambda v: v if isinstance(v, str) else '')
@pytest.mark.parametrize('parity', [False, True])
def test_other_networks(name, new, parity):
    seed_all(0)
    net = new()
    m = dida(
        daformer(net, CITYSCAPES19.things, tau=0.05, strong=StrongAugmentation()),
        net,
        19,
        alpha=0.9,
        parity=parity,
    )
    for it in range(2):
        logs, g = parts_of(net, m, it=it)
    assert (
        all(v.isfinite() for v in logs.values())
        and g.isfinite().all()
        and logs['mixed/instance'] != 0
    )


def test_bfloat16_is_finite_and_near():
    seed_all(0)
    net = create_segmentor('mit_b0', 19, dim=16)
    m = dida(daformer(net, fd=0, tau=0.05), net, 19)
    both = []
    for on in (False, True):
        mm, logs = copy.deepcopy(m), {}
        seed_all(0)

        def amp():
            return torch.autocast('cpu', torch.bfloat16, enabled=on)

        for name, parts in mm(mm.new_step(*PAIR, net, 0, amp)):
            logs |= parts
        sum(logs.values()).backward()
        both.append(logs['instance'].item())
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None) and both[
        1
    ] == pytest.approx(both[0], rel=0.1)


def test_a_resumed_run_is_the_same_run(tmp_path):
    def run(out, steps, stop=None, **kw):
        seed_all(0)
        net = create_segmentor('mit_b0', 19, dim=16)
        m = dida(daformer(net, fd=0, tau=0.05, strong=StrongAugmentation()), net, 19, **kw)
        t = Trainer(
            net,
            m,
            groups=param_groups(net, lr=1e-3),
            loader=lambda start: (PAIR for _ in range(start, stop or steps)),
            steps=steps,
            out=out,
            quiet=True,
        )
        t.fit()
        t.save()
        return t

    a = run(tmp_path / 'a', 4)
    run(tmp_path / 'b', 4, stop=2)
    b = run(tmp_path / 'b', 4)
    was, now = (
        {k: v for k, v in (t.method.state_dict() | t.student.state_dict()).items()} for t in (a, b)
    )
    assert (
        b.it == 4 and was.keys() == now.keys() and a.method.passes[0].crits[-1].bank.valid.sum() > 8
    )
    assert not [k for k, v in was.items() if not now[k].equal(v)]
    assert (
        a.method.passes[0].crits[-1].bank is a.method.passes[1].crits[-1].bank
    )  # one bank in two criteria
    with pytest.raises(
        ValueError,
        match='another version of this method. Finish the run with that version',
    ):
        run(tmp_path / 'b', 4, rows=8)


def test_needs_its_passes():
    net = create_segmentor('mit_b0', 19, dim=16)
    with pytest.raises(ValueError, match="no pass 'mixed' .it has source"):
        dida(source_only(net), net, 19)


def test_usual_settings():
    seed_all(0)
    net = create_segmentor('mit_b0', 19, dim=16)

    def add(net, **kw):
        return dida(
            daformer(
                net, fd=0, tau=0.05, strong=StrongAugmentation(), parity=kw.get('parity', False)
            ),
            net,
            19,
            **kw,
        )

    m = add(net)
    labeller = m.labeller
    loss = m.passes[1].crits[-1]
    keep = m.passes[0].crits[-1]
    assert isinstance(labeller, BankLabeller) and (
        labeller.alpha,
        loss.w,
        loss.tau,
        keep.every,
        keep.bank.m,
    ) == (0, 0.2, 0.1, 1, 0)
    step = m.new_step(*PAIR, net)
    for _ in range(16):
        labeller.bank.update(torch.rand(19, 16), torch.ones(19, dtype=torch.bool))
    opinion = F.interpolate(
        profile_to_class_probs(
            labeller.bank.similarities(step.teacher_output.fused).softmax(1),
            labeller.bank.label,
            19,
        ),
        (64, 128),
        mode='bilinear',
    ).argmax(1)
    own = m.teacher.label(PAIR[1], step.teacher_output).wgt
    assert (step.pseudo.lbl == opinion).float().mean() > 0.999 and step.pseudo.wgt.equal(
        own
    )  # the bank names the class, the classifier says how sure
    old = add(create_segmentor('mit_b0', 19, dim=16), parity=True)
    loss, keep = old.passes[1].crits[-1], old.passes[0].crits[-1]
    assert old.labeller is None and (
        loss.w,
        loss.tau,
        keep.every,
        keep.bank.m,
    ) == (0.5, None, 50, 0.999)
    wide = HRDA(create_segmentor('mit_b0', 19, dim=16), 32, dim=16)
    assert add(wide).labeller is None  # its embeddings know nothing of the detail
    for alpha in (-0.1, 2):
        with pytest.raises(ValueError, match='between 0 and 1'):
            add(net, alpha=alpha)
