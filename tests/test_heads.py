"Heads: one contract for all of them (contract.py), literal readings, independent implementations"

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import contract as c

from udanb.core.types import Sample, SegOutput
from udanb.core.utils import seed_all
from udanb.models import cpu_kernels, heads
from udanb.models.cpu_kernels import dilated_depthwise_conv
from udanb.models.heads import (
    HEADS,
    DAFormerHead,
    DLV2AdapterHead,
    FCNHead,
    SegFormerHead,
    UPerHead,
)
from udanb.training.losses import AuxiliaryLoss, WeightedCrossEntropy

CHANNELS = {'MiT-like': (4, 6, 10, 16), 'CNN-like': (3, 5, 7, 9), 'ViT-like': (8, 8, 8, 8)}
LAST = {'fcn', 'dlv2', 'dlv2_adapter'}  # heads that look at the last map only
PINNED = {  # mean, spread, first and last logit
    'daformer': [0.5248, 0.783, 0.9357, -1.5691],
    'daformer_aspp': [-0.3537, 0.6213, 0.4996, -0.9422],
    'daformer_conv1': [-0.1319, 0.2655, 0.1915, -0.4579],
    'segformer': [0.3142, 0.5395, -0.6654, 0.6896],
    'upernet': [-0.7849, 0.9682, 2.6339, -0.1943],
    'fcn': [-0.6121, 0.8726, -1.2412, 1.0778],
    'dlv2': [-0.4617, 0.6173, 0.564, -0.8223],
    'dlv2_adapter': [-0.7134, 0.8895, -1.3842, 0.7843],
}
every = pytest.mark.parametrize('name', HEADS)


@every
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('grids', c.GRIDS)
def test_shapes_and_gradients(name, channels, grids):
    level, used = (3, [3]) if name in LAST else (0, [0, 1, 2, 3])
    c.check_shapes_and_gradients(HEADS[name], CHANNELS[channels], grids, level, used)
    assert HEADS[name]((4, 6, 10, 16), 5, dim=8).output_level == level


@every
def test_single_image(name):
    c.check_single_image(HEADS[name], (4, 6, 10, 16), c.GRIDS[1])


@every
def test_save_and_load(name):
    c.check_save_and_load(HEADS[name], (4, 6, 10, 16), c.GRIDS[0])


@every
def test_autocast(name):
    c.check_autocast(HEADS[name], (4, 6, 10, 16), c.GRIDS[1])


@every
def test_pinned_logits(name):
    assert c.pin(HEADS[name], (4, 6, 10, 16), c.GRIDS[1]) == pytest.approx(PINNED[name], abs=2e-4)


def test_compiled_head_gives_the_same():
    "One graph, forward and backward (by torch's own kernels: compiling those for real takes a minute)"
    head = c.made(HEADS['daformer'], (4, 6, 10, 16))
    fs = c.maps((4, 6, 10, 16), c.GRIDS[1])
    res = []
    head.dropout.eval()
    for h in (head, torch.compile(copy.deepcopy(head), backend='aot_eager', fullgraph=True)):
        y = h(fs)[0]
        res.append([y, *torch.autograd.grad(y.square().mean(), fs)])
    for a, b in zip(*res):
        assert (a - b).norm() < 1e-4 * b.norm()


# ---- the quick way and the literal one


def literal(head, feats):
    "Embed, upsample, stack, run the branches' own modules, as the paper says; dropout off"
    embeds = head.linear_c if isinstance(head, SegFormerHead) else head.embed_layers
    x = torch.cat(
        [
            F.interpolate(e(f), size=feats[0].shape[-2:], mode='bilinear', align_corners=False)
            for e, f in zip(embeds, feats)
        ],
        1,
    )
    if isinstance(head, SegFormerHead):
        return head.linear_pred(head.linear_fuse(x))
    f = head.fuse_layer
    return head.conv_seg(
        f(x)
        if isinstance(f, heads.ConvBN)
        else f.bottleneck(torch.cat([m(x) for m in f.aspp_modules], 1))
    )


@pytest.mark.parametrize('name', ['daformer', 'daformer_aspp', 'daformer_conv1', 'segformer'])
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('double', [True, False])
def test_equals_a_literal_reading(name, train, double, monkeypatch):
    "In float64 to rounding: outputs, gradients of maps and weights, running statistics. In float32 outputs to 1e-5"
    if double:
        # the CPU kernels are for float32 only: use them nevertheless
        monkeypatch.setattr(heads, 'use_cpu_kernels', lambda maps, bn: True)
    seed_all(0)
    dtype = torch.double if double else torch.float32
    head = HEADS[name]((4, 6, 10, 16), 5, dim=16).to(dtype).train(train)
    head.dropout.eval()
    twin, fs = (
        copy.deepcopy(head),
        c.maps((4, 6, 10, 16), [(37, 44), (19, 22), (10, 11), (5, 6)], dtype=dtype),
    )
    a, b = head(fs)[0], literal(twin, fs)
    torch.testing.assert_close(
        a, b, **(dict(rtol=1e-10, atol=1e-10) if double else dict(rtol=1e-5, atol=1e-5))
    )
    if not double:
        return
    g = torch.randn(a.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for x, y in zip(
        torch.autograd.grad(a, [*head.parameters(), *fs], g),
        torch.autograd.grad(b, [*twin.parameters(), *fs], g),
    ):
        assert (x - y).norm() <= 1e-9 * y.norm() + 1e-12
    for (k, x), y in zip(head.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=k)


def test_float32_gradients_with_a_smooth_activation(monkeypatch):
    "ReLU's kink turns rounding into whole gradients, in the reference too; with softplus in its place float32 agrees"
    monkeypatch.setattr(F, 'relu_', F.softplus)
    seed_all(0)
    head = DAFormerHead((4, 6, 10, 16), 5, dim=16, dropout=0.0)
    for m in head.modules():
        if isinstance(m, heads.ConvBN):
            m.relu = nn.Softplus()
    twin, fs = copy.deepcopy(head), c.maps((4, 6, 10, 16), [(37, 44), (19, 22), (10, 11), (5, 6)])
    a, b = head(fs)[0], literal(twin, fs)
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    for (k, p), x, y in zip(
        [*head.named_parameters(), *zip('0123', fs)],
        torch.autograd.grad(a, [*head.parameters(), *fs], g),
        torch.autograd.grad(b, [*twin.parameters(), *fs], g),
    ):
        assert (x - y).norm() < 1e-4 * y.norm(), k


def test_the_quick_way_is_taken_on_a_cpu_in_float32_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu_kernels,
        'dilated_depthwise_conv',
        lambda *a: calls.append(a) or dilated_depthwise_conv(*a),
    )
    head, fs = c.made(HEADS['daformer'], (4, 6, 10, 16)), c.maps((4, 6, 10, 16), c.GRIDS[0])
    head(fs)
    assert len(calls) == 3 * 4
    with torch.autocast('cpu', torch.bfloat16):
        head(fs)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        y = heads.ASPP(8, 4)([x])  # float32 maps, straight from somewhere else
    y.float().sum().backward()
    assert x.grad.isfinite().all()
    head.double()([f.double() for f in fs])
    nn.SyncBatchNorm.convert_sync_batchnorm(c.made(HEADS['daformer'], (4, 6, 10, 16))).eval()(fs)
    assert len(calls) == 3 * 4


@pytest.mark.parametrize('size,d', [((24, 36), 6), ((25, 37), 6), ((20, 31), 12), ((7, 9), 18)])
@pytest.mark.parametrize('channels_last', [True, False])
def test_dilated_convolution(size, d, channels_last):
    seed_all(0)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 6, *size).contiguous(memory_format=fmt).requires_grad_()
    w = torch.randn(6, 1, 3, 3, requires_grad=True)
    g = torch.randn(2, 6, *size)
    a, b = dilated_depthwise_conv(x, w, d), F.conv2d(x, w, padding=d, dilation=d, groups=6)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for x_, y_ in zip(torch.autograd.grad(a, (x, w), g), torch.autograd.grad(b, (x, w), g)):
        assert (x_ - y_).norm() < 1e-5 * y_.norm()


# ---- independent implementations


def test_segformer_head_equals_smps():
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

    seed_all(0)
    ref, ours = (
        SegformerDecoder((3, 0, 4, 6, 10, 16), segmentation_channels=12).eval(),
        SegFormerHead((4, 6, 10, 16), 5, dim=12).eval(),
    )
    state = ref.state_dict()
    own = {k: v for k, v in ours.state_dict().items() if 'pred' in k}
    for i in range(4):
        own |= {
            f'linear_c.{i}.proj.{k}': state[f'mlp_stage.{3 - i}.linear.{k}']
            for k in ('weight', 'bias')
        }
    fuse = {
        k.removeprefix('fuse_stage.'): v for k, v in state.items() if k.startswith('fuse_stage.')
    }
    bn = {k.split('.', 1)[1]: v for k, v in fuse.items() if k.startswith('1.')}
    own |= {f'linear_fuse.bn.{k}': v for k, v in bn.items()}
    own['linear_fuse.conv.weight'] = torch.cat(
        fuse['0.weight'].split(12, 1)[::-1], 1
    )  # smp stacks the coarsest map first
    ours.load_state_dict(own)
    fs = c.maps((4, 6, 10, 16), c.GRIDS[0])
    torch.testing.assert_close(
        ours(fs)[1],
        ref([torch.zeros(2, 3, 64, 96), torch.zeros(2, 0, 32, 48), *fs]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_uper_head_equals_hugging_faces():
    hf = pytest.importorskip(
        'transformers.models.upernet.modeling_upernet', reason='an independent UPerNet'
    )
    from transformers import ConvNextConfig, UperNetConfig

    seed_all(0)
    cfg = UperNetConfig(
        backbone_config=ConvNextConfig(),
        hidden_size=8,
        pool_scales=[1, 2, 3, 6],
        num_labels=5,
        auxiliary_channels=6,
        auxiliary_in_channels=10,
    )
    ref, aux = (
        hf.UperNetHead(cfg, (4, 6, 10, 16)).eval(),
        hf.UperNetFCNHead(cfg, (4, 6, 10, 16)).eval(),
    )
    ours = UPerHead((4, 6, 10, 16), 5, ch=8, aux_ch=6)

    def rename(k):
        return k.replace('batch_norm', 'bn').replace('classifier', 'conv_seg')

    own = {rename(k): v for k, v in ref.state_dict().items()} | {
        f'aux.{rename(k)}': v for k, v in aux.state_dict().items()
    }
    ours.load_state_dict(own)
    fs = c.maps((4, 6, 10, 16), c.GRIDS[1])
    torch.testing.assert_close(ours.eval()(fs)[0], ref(fs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.aux(fs[2]), aux(fs), rtol=1e-5, atol=1e-6)


def test_fcn_head_equals_hugging_faces():
    "Theirs is UPerNet's second head, which can also have two convolutions and the third of both stacked"
    hf = pytest.importorskip(
        'transformers.models.upernet.modeling_upernet', reason='an independent FCN'
    )
    from transformers import ConvNextConfig, UperNetConfig

    seed_all(0)
    cfg = UperNetConfig(
        backbone_config=ConvNextConfig(),
        num_labels=5,
        auxiliary_channels=8,
        auxiliary_num_convs=2,
        auxiliary_concat_input=True,
    )
    ref = hf.UperNetFCNHead(cfg, (4, 6, 10, 16), in_index=3).eval()
    ours = FCNHead((4, 6, 10, 16), 5, ch=8).eval()
    ours.load_state_dict(
        {
            k.replace('batch_norm', 'bn').replace('classifier', 'conv_seg'): v
            for k, v in ref.state_dict().items()
        }
    )
    fs = c.maps((4, 6, 10, 16), c.GRIDS[1])
    torch.testing.assert_close(ours(fs)[0], ref(fs), rtol=1e-5, atol=1e-6)


def test_fcn_head_equals_a_literal_reading():
    "Forward and gradients in training mode, with its three BatchNorms written out"
    seed_all(0)
    head, x = (
        FCNHead((1, 1, 1, 7), 5, ch=6, dropout=0.0).double(),
        torch.randn(2, 7, 4, 5, dtype=torch.double, requires_grad=True),
    )

    def layer(x, m):
        return F.batch_norm(
            F.conv2d(x, m.conv.weight, padding=1), None, None, m.bn.weight, m.bn.bias, True
        ).relu()

    y = layer(layer(x, head.convs[0]), head.convs[1])
    fused = layer(torch.cat([x, y], 1), head.conv_cat)
    want = F.conv2d(fused, head.conv_seg.weight, head.conv_seg.bias)
    logits, got = head([None] * 3 + [x])
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(got, fused)
    g, ps = torch.randn_like(want), [x, *head.parameters()]
    for a, b in zip(torch.autograd.grad(logits, ps, g), torch.autograd.grad(want, ps, g)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_dlv2_heads_equal_a_literal_reading():
    seed_all(0)
    x = torch.randn(2, 7, 9, 11)

    def conv(x, m, d):
        return F.conv2d(x, m.weight, m.bias, padding=d, dilation=d)

    red = HEADS['dlv2']((1, 1, 1, 7), 5)
    a, b = (m['conv'] for m in red.aspp_modules)
    logits, fused = red([None] * 3 + [x])
    torch.testing.assert_close(logits, conv(x, a, 6) + conv(x, b, 12))
    assert fused is x
    head = DLV2AdapterHead((1, 1, 1, 7), 5, ch=8).eval()

    def norm(x, bn):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()

    y = torch.cat([norm(conv(x, m.conv, d), m.bn) for m, d in zip(head.aspp_modules, (6, 12))], 1)
    y = norm(conv(y, head.bottleneck.conv, 1), head.bottleneck.bn)
    logits, fused = head([None] * 3 + [x])
    torch.testing.assert_close(fused, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits, F.conv2d(y, head.conv_seg.weight, head.conv_seg.bias), rtol=1e-5, atol=1e-6
    )


def test_published_sizes():
    def n(m):
        return sum(p.numel() for p in m.parameters())

    with torch.device('meta'):
        got = [
            n(DAFormerHead(d, k, ch=ch))
            for d, k, ch in (
                ((64, 128, 320, 512), 19, None),
                ((128, 256, 512, 1024), 19, None),
                ((192, 384, 768, 1536), 5, 512),
            )
        ]
    assert got == [3_712_275, 3_941_651, 12_314_117]


# ---- auxiliary scores, errors


def test_auxiliary_loss_reaches_its_head_only_through_the_third_map():
    head, fs = c.made(UPerHead, (4, 6, 10, 16)), c.maps((4, 6, 10, 16), c.GRIDS[0])
    out = SegOutput(*(lambda l, f, a: (l, fs, f, a))(*head(fs)))
    x = Sample(torch.zeros(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96)))
    loss = AuxiliaryLoss('fcn', WeightedCrossEntropy())(out, x)
    assert (
        loss.item() == pytest.approx(WeightedCrossEntropy()(SegOutput(out.aux['fcn']), x).item())
        and AuxiliaryLoss('fcn', WeightedCrossEntropy()).w == 0.4
    )
    loss.backward()
    assert [f.grad is not None for f in fs] == [False, False, True, False]
    assert all((p.grad is not None) == k.startswith('aux.') for k, p in head.named_parameters())


def test_unknown_fusion_names_the_nearest():
    with pytest.raises(ValueError, match="unknown fusion 'sepasp'; did you mean 'sepaspp'"):
        DAFormerHead((4, 4, 4, 4), 5, dim=8, fusion='sepasp')
