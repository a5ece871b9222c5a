"HRDA against a literal reading of the paper, with real segmentors"

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from udanb.core.types import Sample
from udanb.core.utils import seed_all, sliding_windows
from udanb.models.backbones import create_backbone
from udanb.models.heads import DAFormerHead, DLV2Head
from udanb.models.hrda import HRDA, detail_windows, random_boxes
from udanb.models.segmentor import Segmentor, create_segmentor, param_groups
from udanb.training.losses import ContextLoss, DetailLoss, FeatureDistance, WeightedCrossEntropy
from udanb.training.method import Method, Pass
from udanb.training.teacher import EMATeacher
from udanb.training.trainer import Trainer
from udanb.training.views import source_view


def net(head='daformer', n=5, seed=0):
    seed_all(seed)
    s = create_segmentor('mit_b0', n, head, dim=8, drop_path=0.0)
    for m in s.modules():
        if isinstance(m, nn.Dropout2d):
            m.p = 0.0
    return s


def hrda(seed=0, crop=64, **kw):
    h = HRDA(net(seed=seed), crop=crop, dim=8, **kw)
    h.scale_attention.dropout.p = 0.0
    nn.init.normal_(h.scale_attention.conv_seg.weight, std=1.0)  # or it would say 1/2 everywhere
    return h


def up2(x):
    return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)


@pytest.mark.parametrize('parity', [True, False])
def test_training_equals_a_literal_reading(parity):
    h = hrda(parity=parity).double()
    for m in h.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()  # so that images can be computed one by one
    img = torch.randn(3, 3, 128, 192, dtype=torch.double)
    seed_all(7)
    out = h(img)
    box = out.aux['box']
    seed_all(7)
    assert h(img).aux['box'].equal(box)  # torch's generator, nothing else
    assert len(box.unique(dim=0)) == (1 if parity else 3)
    for i, (t, b, l, r) in enumerate(box.tolist()):
        low = h.net(F.avg_pool2d(img[i : i + 1], 2))  # bilinear by half = mean of 2x2
        a = h.scale_attention(low.feats)[0].sigmoid()
        for y in range(16):
            for x in range(24):
                if not (t <= 8 * y < b and l <= 8 * x < r):
                    a[:, :, y, x] = 0
        det = h.net(img[i : i + 1, :, t:b, l:r]).logits
        big = torch.zeros(1, 5, 32, 48, dtype=torch.double)
        big[:, :, t // 4 : b // 4, l // 4 : r // 4] = det
        torch.testing.assert_close(
            out.logits[i : i + 1], up2(a) * big + up2((1 - a) * low.logits), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(out.aux['detail'][i : i + 1], det, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.aux['att'][i : i + 1], a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.fused[i : i + 1], low.fused, rtol=1e-9, atol=1e-9)
        outside = torch.ones(32, 48, dtype=torch.bool)
        outside[max(t // 4 - 1, 0) : b // 4 + 1, max(l // 4 - 1, 0) : r // 4 + 1] = False
        torch.testing.assert_close(
            out.logits[i][:, outside], up2(low.logits)[0][:, outside], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize('size', [(128, 128), (128, 160), (64, 64), (101, 131), (50, 90)])
def test_sliding_equals_a_literal_reading(size):
    h = hrda().eval()
    img = torch.randn(2, 3, *size)
    pad = F.pad(img, (0, -size[1] % 8, 0, -size[0] % 8))
    H, W = pad.shape[-2:]
    ch, cw = min(64, H), min(64, W)
    with torch.no_grad():
        out, low = h(img), h.net(F.interpolate(pad, (H // 2, W // 2), mode='bilinear'))
        a = F.interpolate(h.scale_attention(low.feats)[0], low.logits.shape[-2:]).sigmoid()
        total, count = torch.zeros(2, 5, H // 4, W // 4), torch.zeros(H // 4, W // 4)
        for y, x in sliding_windows((H, W), (ch, cw), tuple(c // 2 // 8 * 8 for c in (ch, cw))):
            total[:, :, y // 4 : (y + ch) // 4, x // 4 : (x + cw) // 4] += h.net(
                pad[:, :, y : y + ch, x : x + cw]
            ).logits
            count[y // 4 : (y + ch) // 4, x // 4 : (x + cw) // 4] += 1
    assert count.min() >= 1
    ref = (up2(a) * total / count + up2((1 - a) * low.logits))[
        ..., : -(-size[0] // 4), : -(-size[1] // 4)
    ]
    torch.testing.assert_close(out.logits, ref, rtol=1e-4, atol=1e-4)
    assert 'detail' not in out.aux and not h.training


def test_windows_are_those_of_infer():
    for size in ((1024, 1024), (1024, 2048), (512, 512), (520, 1000)):
        assert [
            (a, l) for a, _, l, _ in detail_windows(size, (512, 512)).tolist()
        ] == sliding_windows(size, 512, 256)
    assert (
        len(detail_windows((1024, 1024), (512, 512))) == 9
        and len(detail_windows((1024, 2048), (512, 512))) == 21
    )


def test_offsets():
    seed_all(0)
    for side, last in ((1024, 504), (520, 0), (528, 8), (512, 0)):
        seen = random_boxes(3000, (side, 1024), (512, 512))
        assert (
            seen[:, 0].unique().tolist() == list(range(0, last + 1, 8)) and seen[:, 2].max() == 504
        )


def test_teacher_slides_in_whatever_mode_its_norms_are():
    h = hrda()
    img = torch.randn(1, 3, 128, 128)
    for bn in ('batch', 'student'):
        t = EMATeacher(h, bn=bn)
        seen = []
        t.net.net.register_forward_hook(lambda m, a, o: seen.append(tuple(a[0].shape)))
        before = torch.get_rng_state()
        out = t(img)
        assert (
            seen == [(1, 3, 64, 64), (9, 3, 64, 64)]
            and 'box' not in out.aux
            and torch.get_rng_state().equal(before)
        )
        assert t(img).logits.shape == (1, 5, 32, 32) and not out.logits.requires_grad


def test_windows_in_smaller_portions_are_the_same():
    a, b = hrda().eval(), hrda(batch=2).eval()
    img = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        torch.testing.assert_close(a(img).logits, b(img).logits, rtol=1e-4, atol=1e-5)


def test_losses_and_gradients():
    h = hrda()
    img, lbl = torch.randn(2, 3, 128, 128), torch.randint(0, 5, (2, 128, 128))
    x = Sample(img, lbl, torch.rand(2, 128, 128))
    out = h(img)
    want = torch.stack(
        [
            (
                F.cross_entropy(
                    F.interpolate(out.aux['detail'][i : i + 1], scale_factor=4, mode='bilinear'),
                    lbl[i : i + 1, t:b, l:r],
                    reduction='none',
                )
                * x.wgt[i : i + 1, t:b, l:r]
            ).mean()
            for i, (t, b, l, r) in enumerate(out.aux['box'].tolist())
        ]
    ).mean()
    torch.testing.assert_close(DetailLoss(WeightedCrossEntropy())(out, x), want)
    (
        0.9 * WeightedCrossEntropy()(out, x) + 0.1 * DetailLoss(WeightedCrossEntropy())(out, x)
    ).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())
    assert any(p.grad.any() for p in h.scale_attention.embed_layers.parameters())


def test_feature_distance_on_the_context():
    h = hrda()
    lbl = torch.zeros(1, 128, 128, dtype=torch.long)
    x = Sample(torch.randn(1, 3, 128, 128), lbl)
    fd = ContextLoss(FeatureDistance(copy.deepcopy(h.backbone), (0,), 5))
    assert fd(h.eval()(x.img), x).item() < 1e-4 and (fd.name, fd.w) == (
        'fd',
        0.005,
    )  # the same encoder, in the same mode
    assert ContextLoss(FeatureDistance(create_backbone('mit_b0'), (0,), 5))(h(x.img), x) > 0.1


def test_groups_and_state_are_whole_and_there_is_no_state_beside_them():
    h = hrda()
    groups = {g['name']: {id(p) for p in g['params']} for g in param_groups(h)}
    assert set.union(*groups.values()) == {id(p) for p in h.parameters()}
    assert groups['head'] == {
        id(p) for m in (h.net.head, h.scale_attention) for p in m.parameters()
    }
    before = set(vars(h))
    a = h(torch.randn(1, 3, 128, 128))
    b = h(torch.randn(1, 3, 128, 192))  # two forwards, each with its own box
    (a.logits.sum() + b.logits.sum()).backward()
    assert set(vars(h)) == before and a.aux.keys() == b.aux.keys() == {
        'att',
        'box',
        'detail',
        'detail_fused',
    }
    twin = hrda(seed=1)
    twin.load_state_dict(h.state_dict())
    img = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert twin.eval()(img).logits.equal(h.eval()(img).logits)


def test_deeplab_at_stride_8():
    seed_all(0)
    h = HRDA(Segmentor(create_backbone('mit_b0'), DLV2Head((32, 64, 160, 256), 5)), crop=64, dim=8)
    with pytest.raises(ValueError, match='is cell=4 the stride'):
        h(torch.randn(1, 3, 128, 128))

    class AtStride8(nn.Module):
        n_classes, ch = 5, 256

        def __init__(self):
            super().__init__()
            self.head = DAFormerHead((64, 160, 256), 5, dim=8)

        def forward(self, feats):
            return self.head(feats[1:])

    h = HRDA(Segmentor(create_backbone('mit_b0'), AtStride8()), crop=64, cell=8, dim=8)
    out = h(torch.randn(2, 3, 128, 160))
    assert (
        out.logits.shape == (2, 5, 16, 20)
        and out.aux['detail'].shape == (2, 5, 8, 8)
        and not (out.aux['box'] % 16).any()
    )
    assert h.eval()(torch.randn(1, 3, 100, 140)).logits.shape == (1, 5, 13, 18)


def test_autocast():
    h = hrda()
    with torch.autocast('cpu', torch.bfloat16):
        out = h(torch.randn(2, 3, 128, 128))
        loss = WeightedCrossEntropy()(out, Sample(None, torch.zeros(2, 128, 128, dtype=torch.long)))
        with torch.no_grad():
            assert h(torch.randn(1, 3, 128, 128)).logits.isfinite().all()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in h.parameters())


def test_a_run_stopped_and_resumed_is_the_same_run(tmp_path):
    "The crops come from the generator that the trainer seeds at each step"
    seed_all(3)
    batches = [
        (
            Sample(
                torch.randn(2, 3, 128, 128), torch.randint(0, 5, (2, 128, 128)), name=('a', 'b')
            ),
            None,
        )
        for _ in range(3)
    ]

    def trainer(out, steps):
        h = hrda()
        t = Trainer(
            h,
            Method(
                Pass(
                    'src',
                    source_view,
                    WeightedCrossEntropy(0.9),
                    DetailLoss(WeightedCrossEntropy()),
                )
            ),
            groups=param_groups(h, lr=1e-3),
            loader=lambda it: batches[it:],
            steps=steps,
            out=out,
            schedule=lambda it, n: 1.0,
            quiet=True,
        )
        return t

    whole = trainer(tmp_path / 'a', 2)
    log = whole.fit()
    first = trainer(tmp_path / 'b', 1)
    first.fit()
    rest = trainer(tmp_path / 'b', 2)
    rest.fit()
    assert all(v.equal(rest.student.state_dict()[k]) for k, v in whole.student.state_dict().items())
    assert {'src/ce', 'src/detail'} <= set(log[0])
