"Released checkpoints: state dicts in the published names, built from the recorded names and the repositories' modules"

import gzip
import json
import os
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay

from udanb.models.backbones import create_backbone
from udanb.models.hrda import HRDA
from udanb.models.released import (
    identify_architecture,
    load_published,
    normalize_names,
    published_keys,
    to_published,
)
from udanb.models.segmentor import create_segmentor, param_groups


def gold(golden, v):
    "Recorded names and shapes of MiT + DAFormer head, in DAFormer's own order"
    f = golden / f'params_{v}.json'
    text = f.read_text() if f.exists() else gzip.open(f'{f}.gz', 'rt').read()
    return {e[1]: tuple(e[2]) for e in json.loads(text)['entries']}


def fill(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (
            k,
            torch.tensor(seed)
            if k.endswith('num_batches_tracked')
            else torch.rand(s, generator=g) + 0.1,
        )
        for k, s in shapes.items()
    )


def mmcv(path, **networks):
    "A file as mmcv's runner writes it; a network called '' has no prefix"
    state = OrderedDict(
        (f'{p}.{k}' if p else k, v) for p, s in networks.items() for k, v in s.items()
    )
    torch.save(
        dict(
            meta=dict(
                epoch=1,
                iter=40000,
                mmcv_version='1.3.7',
                time='Thu',
                config='model = dict()',
                CLASSES=('a', 'b'),
                PALETTE=[[1, 2, 3], [4, 5, 6]],
                hook_msgs=dict(
                    best_score=np.float64(0.6885), best=np.int64(3), last_ckpt='iter_40000.pth'
                ),
            ),
            optimizer=dict(
                state={0: dict(step=1, exp_avg=torch.zeros(2))},
                param_groups=[dict(lr=6e-5, params=[0])],
            ),
            state_dict=state,
        ),
        path,
    )
    return path


def bn(p, n):
    return {f'{p}.{k}': (n,) for k in ('weight', 'bias', 'running_mean', 'running_var')} | {
        f'{p}.num_batches_tracked': ()
    }


def conv_bn(p, ni, no, ks=1):
    return {f'{p}.conv.weight': (no, ni, ks, ks)} | bn(f'{p}.bn', no)


def resnet_v1c(depths, p='backbone.'):
    "mmseg's ResNetV1c: a stem of three convolutions, numbered with their norms and ReLUs; bottlenecks"
    out = {}
    for i, (a, b) in zip((0, 3, 6), ((3, 32), (32, 32), (32, 64))):
        out |= {f'{p}stem.{i}.weight': (b, a, 3, 3)} | bn(f'{p}stem.{i + 1}', b)
    ni = 64
    for s, d in enumerate(depths):
        w = 64 * 2**s
        for i in range(d):
            q = f'{p}layer{s + 1}.{i}'
            for j, (a, b, k) in enumerate(((ni, w, 1), (w, w, 3), (w, 4 * w, 1)), 1):
                out |= {f'{q}.conv{j}.weight': (b, a, k, k)} | bn(f'{q}.bn{j}', b)
            if i == 0:
                out |= {f'{q}.downsample.0.weight': (4 * w, ni, 1, 1)} | bn(
                    f'{q}.downsample.1', 4 * w
                )
            ni = 4 * w
    return out


def conv1_head(p, dims, ch, n):
    "DAFormer's head with `conv` as fusion: HRDA's scale attention"
    return (
        {
            f'{p}embed_layers.{i}.proj.{k}': (ch, d)[: 2 - (k == 'bias')]
            for i, d in enumerate(dims)
            for k in ('weight', 'bias')
        }
        | conv_bn(f'{p}fuse_layer', 4 * ch, ch)
        | {f'{p}conv_seg.weight': (n, ch, 1, 1), f'{p}conv_seg.bias': (n,)}
    )


# ---- DAFormer, MIC on DAFormer, DIDA: MiT and the sepaspp head


@pytest.mark.parametrize('which', ['student', 'teacher', 'imagenet'])
def test_daformer_each_network_of_the_file(golden, tmp_path, which):
    shapes = gold(golden, 'b0')
    nets = dict(model=fill(shapes, 1), ema_model=fill(shapes, 2), imnet_model=fill(shapes, 3))
    f = mmcv(tmp_path / 'daformer.pth', **nets)
    net = create_segmentor('mit_b0', 19)
    r = load_published(net, f, which)
    want = nets[dict(student='model', teacher='ema_model', imagenet='imnet_model')[which]]
    own = net.state_dict()
    assert (
        r['tensors'] == len(want) == len(own) == len(shapes)
        and r['ignored'] == []
        and r['classes'] == ('a', 'b')
    )
    for k, v in want.items():
        ours = (
            'head.' + k.removeprefix('decode_head.')
            if k.startswith('decode_head.')
            else 'backbone.body.' + k.removeprefix('backbone.')
        )
        assert own[ours].equal(v), k


def test_b5_by_names_and_shapes_alone(golden):
    "The released DAFormer is MiT-B5; on the meta device its 81 million parameters cost nothing"
    shapes = gold(golden, 'b5')
    kind = identify_architecture({k: torch.empty(s, device='meta') for k, s in shapes.items()})
    assert kind == dict(backbone='mit_b5', head='daformer', n_classes=19, dim=256, ch=256)
    net = create_segmentor('mit_b5', 19)
    assert {n: tuple(net.state_dict()[k].shape) for k, n in published_keys(net).items()} == shapes


def test_stripped_and_safetensors(golden, tmp_path):
    want = fill(gold(golden, 'b0'), 4)
    save_file(dict(want), tmp_path / 'a.safetensors')
    torch.save(want, tmp_path / 'b.pth')
    mmcv(tmp_path / 'c.pth', **{'': want})
    for f in ('a.safetensors', 'b.pth', 'c.pth'):
        net = create_segmentor('mit_b0', 19)
        load_published(net, tmp_path / f)
        assert all(v.equal(want[k]) for k, v in to_published(net).items())
        with pytest.raises(ValueError, match='no teacher in it; it holds one network'):
            load_published(net, tmp_path / f, 'teacher')


# ---- whatever does not fit is an error, and nothing is loaded


@pytest.fixture
def b0(golden):
    return fill(gold(golden, 'b0'), 5)


def unchanged(net, f, match, which='student'):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=match) as e:
        load_published(net, f, which)
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    return str(e.value)


def test_left_over_missing_and_other_shapes(b0, tmp_path):
    net, f = create_segmentor('mit_b0', 19), tmp_path / 'x.pth'
    extra = b0 | {'auxiliary_head.conv_seg.bias': torch.zeros(19)}
    unchanged(
        net,
        mmcv(f, model=extra),
        r'(?s)x\.pth does not fit.*1 unexpected: auxiliary_head\.conv_seg\.bias',
    )
    unchanged(
        net,
        mmcv(f, model={k: v for k, v in b0.items() if k != 'backbone.norm3.bias'}),
        r'1 missing: backbone\.norm3\.bias',
    )
    say = unchanged(
        create_segmentor('mit_b0', 11), mmcv(f, model=b0), r'2 mismatching: decode_head\.conv_seg'
    )
    assert (
        "19x256x1x1 in the file, 11x256x1x1 in the network" in say
        and "create_segmentor('mit_b0', 19, 'daformer', dim=256, ch=256); build that network" in say
    )
    say = unchanged(create_segmentor('mit_b1', 19), f, 'does not fit')
    assert "looks like create_segmentor('mit_b0'" in say and '…' in say
    unchanged(
        net,
        mmcv(f, model=b0, **{'': {'bank.feat': torch.zeros(3)}}),
        r'1 names belong to none of its networks \(student\): bank.feat',
    )
    unchanged(net, mmcv(f, ema_model=b0), 'there is no student in it; it holds teacher')
    unchanged(
        net, mmcv(f, model={'layers.0.1.weight': torch.zeros(3)}), 'Nothing in it is recognised'
    )


def test_unknown_entry_beside_the_state_dict(b0, tmp_path):
    torch.save(dict(state_dict=b0, state_dict_ema=b0), tmp_path / 'x.pth')
    unchanged(
        create_segmentor('mit_b0', 19),
        tmp_path / 'x.pth',
        'unknown entries state_dict_ema beside meta',
    )


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_code_is_refused_and_not_run(b0, tmp_path, zipped):
    torch.save(
        dict(meta=dict(hook=Trap(str(tmp_path / 'sprung'))), state_dict=b0),
        tmp_path / 'x.pth',
        _use_new_zipfile_serialization=zipped,
    )
    unchanged(
        create_segmentor('mit_b0', 19),
        tmp_path / 'x.pth',
        r'x\.pth: holds more than tensors and could run code.*save only the tensors',
    )
    assert not (tmp_path / 'sprung').exists()


def test_damaged_and_missing_files(b0, tmp_path):
    f = mmcv(tmp_path / 'x.pth', model=b0)
    f.write_bytes(f.read_bytes()[:5000])
    unchanged(create_segmentor('mit_b0', 19), f, r'x\.pth: not a whole torch file')
    (tmp_path / 'x.safetensors').write_bytes(b'\0' * 9)
    unchanged(
        create_segmentor('mit_b0', 19), tmp_path / 'x.safetensors', 'not a whole safetensors file'
    )
    with pytest.raises(FileNotFoundError, match='nothere.pth'):
        load_published(create_segmentor('mit_b0', 19), tmp_path / 'nothere.pth')
    for bad in ([1, 2], {}, dict(state_dict=dict(a=1))):
        torch.save(bad, f)
        unchanged(create_segmentor('mit_b0', 19), f, 'not a dictionary of tensors')


# ---- encoder files: SegFormer's mit_b*.pth, open-mmlab's resnet*_v1c


def test_mit_encoder_file(b0, tmp_path):
    enc = {k.removeprefix('backbone.'): v for k, v in b0.items() if k.startswith('backbone.')}
    torch.save(
        enc | {'head.weight': torch.zeros(1000, 256), 'head.bias': torch.zeros(1000)},
        tmp_path / 'mit_b0.pth',
    )
    net = create_segmentor('mit_b0', 19)
    assert load_published(net.backbone, tmp_path / 'mit_b0.pth')['ignored'] == [
        'head.weight',
        'head.bias',
    ]
    assert all(v.equal(enc[k.removeprefix('body.')]) for k, v in net.backbone.state_dict().items())
    unchanged(
        net,
        tmp_path / 'mit_b0.pth',
        "(?s)only an encoder: create_segmentor.'mit_b0', weights=.*mit_b0.pth",
    )
    unchanged(net.backbone, mmcv(tmp_path / 'whole.pth', model=b0), 'holds a whole segmentor')


def test_resnet_v1c(tmp_path):
    want = fill(resnet_v1c((3, 4, 6, 3), ''), 6)
    torch.save(
        dict(want) | {'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)},
        tmp_path / 'resnet50_v1c.pth',
    )
    enc = create_backbone('resnet50_os8')
    assert (
        load_published(enc, tmp_path / 'resnet50_v1c.pth')['ignored'] == ['fc.weight', 'fc.bias']
        and identify_architecture(want)['backbone'] == 'resnet50_os8'
    )
    own = enc.state_dict()
    for k, v in want.items():
        ours = (
            k.replace('stem.7.', 'bn1.')
            if k.startswith('stem.7')
            else k.replace('stem.', 'conv1.')
            if k.startswith('stem')
            else k
        )
        assert own[f'body.net.{ours}'].equal(v), k


# ---- what other families' files are made of


def test_other_families_are_recognised():
    dims = 64, 128, 320, 512
    emb = {f'decode_head.linear_c{i + 1}.proj.weight': (768, d) for i, d in enumerate(dims)}
    seg = (
        emb
        | conv_bn('decode_head.linear_fuse', 3072, 768)
        | {
            'decode_head.linear_pred.weight': (19, 768, 1, 1),
            'decode_head.conv_seg.weight': (19, 128, 1, 1),
        }
    )
    aspp = {
        f'decode_head.aspp_modules.{i}.conv.{k}': (19, 2048, 3, 3)[: 4 - 3 * (k == 'bias')]
        for i in (0, 1)
        for k in ('weight', 'bias')
    }
    ddb = (
        conv_bn('decode_head.aspp_modules.0', 2048, 128, 3)
        | conv_bn('decode_head.bottleneck', 256, 256, 3)
        | {'decode_head.conv_seg.weight': (19, 256, 1, 1)}
    )

    def see(shapes):
        return identify_architecture({k: torch.empty(s, device='meta') for k, s in shapes.items()})

    assert see(seg) == dict(head='segformer', n_classes=19, ch=768, dim=768)
    assert see(resnet_v1c((3, 4, 23, 3)) | aspp) == dict(
        backbone='resnet101_os8', head='dlv2', n_classes=19
    )
    assert see(resnet_v1c((3, 4, 23, 3)) | ddb) == dict(
        backbone='resnet101_os8', head='dlv2_adapter', n_classes=19, ch=256
    )
    hrda = conv1_head('decode_head.head.', dims, 256, 19) | conv1_head(
        'decode_head.scale_attention.', dims, 256, 19
    )
    hrda |= {
        'decode_head.head.fuse_layer.aspp_modules.1.depthwise_conv.conv.weight': (1024, 1, 3, 3)
    }
    assert see(hrda) == dict(head='daformer', n_classes=19, ch=256, dim=256, hrda=256)


def test_segformers_order_of_maps():
    "The same sums: NVIDIA stacks the coarsest map first, we the finest"
    g = torch.Generator().manual_seed(0)
    w, maps = (
        torch.rand(5, 4 * 3, 1, 1, generator=g),
        [torch.rand(1, 3, 4, 4, generator=g) for _ in range(4)],
    )
    theirs = torch.nn.functional.conv2d(torch.cat(maps[::-1], 1), w)
    state, left = normalize_names(
        {f'decode_head.linear_c{i}.proj.weight': torch.full((3, i), float(i)) for i in (4, 3, 2, 1)}
        | {
            'decode_head.linear_fuse.conv.weight': w,
            'decode_head.linear_pred.weight': w,
            'decode_head.conv_seg.bias': w,
        }
    )
    torch.testing.assert_close(
        torch.nn.functional.conv2d(
            torch.cat(maps, 1), state['decode_head.linear_fuse.conv.weight']
        ),
        theirs,
    )
    assert left == ['decode_head.conv_seg.bias'] and all(
        state[f'decode_head.linear_c.{i}.proj.weight'].equal(torch.full((3, i + 1), i + 1.0))
        for i in range(4)
    )


# ---- whole networks of the other families, by the names their repositories give

MIT_B0 = (32, 64, 160, 256)


def encoder_b0(golden):
    return {k: v for k, v in gold(golden, 'b0').items() if k.startswith('backbone.')}


def placed(net, want):
    "Every tensor of the file is in the network, once; matched by value, as no name is trusted"
    own = sorted((tuple(v.shape), v.double().sum().item()) for v in net.state_dict().values())
    return own == sorted((tuple(v.shape), v.double().sum().item()) for v in want.values())


def segformer_literal(w, feats):
    "NVIDIA's head as it is written: embed, upsample, stack from the coarsest, 1×1, norm, ReLU, classify"
    h = 'decode_head.'
    emb = [
        torch.einsum('bchw,dc->bdhw', f, w[f'{h}linear_c{i}.proj.weight'])
        + w[f'{h}linear_c{i}.proj.bias'][:, None, None]
        for i, f in enumerate(feats, 1)
    ]
    up = [
        torch.nn.functional.interpolate(
            e, feats[0].shape[-2:], mode='bilinear', align_corners=False
        )
        for e in emb
    ]
    x = torch.nn.functional.conv2d(torch.cat(up[::-1], 1), w[h + 'linear_fuse.conv.weight'])
    b = h + 'linear_fuse.bn.'
    x = torch.nn.functional.batch_norm(
        x, *(w[b + k] for k in ('running_mean', 'running_var', 'weight', 'bias'))
    ).relu()
    return torch.nn.functional.conv2d(x, w[h + 'linear_pred.weight'], w[h + 'linear_pred.bias'])


@pytest.mark.parametrize('nvidia', [True, False])
def test_segformer(golden, tmp_path, nvidia):
    "Both spellings of the head, `conv_seg` unused beside `linear_pred`; NVIDIA's gives the sums of its own order"
    c = (lambda i: f'linear_c{i + 1}') if nvidia else (lambda i: f'linear_c.{i}')
    head = (
        {
            f'decode_head.{c(i)}.proj.{k}': (32, d)[: 2 - (k == 'bias')]
            for i, d in enumerate(MIT_B0)
            for k in ('weight', 'bias')
        }
        | conv_bn('decode_head.linear_fuse', 128, 32)
        | {'decode_head.linear_pred.weight': (7, 32, 1, 1), 'decode_head.linear_pred.bias': (7,)}
    )
    want = fill(encoder_b0(golden) | head, 7)
    unused = {
        'decode_head.conv_seg.weight': torch.zeros(7, 128, 1, 1),
        'decode_head.conv_seg.bias': torch.zeros(7),
    }
    net = create_segmentor('mit_b0', 7, 'segformer', dim=32).eval()
    assert load_published(net, mmcv(tmp_path / 'x.pth', **{'': want | unused}))[
        'ignored'
    ] == sorted(unused, reverse=True)
    if not nvidia:
        assert placed(net, want)
    else:
        feats = [torch.rand(1, d, 16 // 2**i, 24 // 2**i) for i, d in enumerate(MIT_B0)]
        torch.testing.assert_close(
            net.head(feats)[0], segformer_literal(want, feats), rtol=1e-4, atol=1e-3
        )


def dlv2(adapter):
    "DDB's two heads on 2048 channels"
    if not adapter:
        return {
            f'decode_head.aspp_modules.{i}.conv.{k}': (19, 2048, 3, 3)[: 4 - 3 * (k == 'bias')]
            for i in (0, 1)
            for k in ('weight', 'bias')
        }
    return (
        conv_bn('decode_head.aspp_modules.0', 2048, 128, 3)
        | conv_bn('decode_head.aspp_modules.1', 2048, 128, 3)
        | conv_bn('decode_head.bottleneck', 256, 256, 3)
        | {'decode_head.conv_seg.weight': (19, 256, 1, 1), 'decode_head.conv_seg.bias': (19,)}
    )


@pytest.mark.parametrize('head', ['dlv2', 'dlv2_adapter'])
def test_ddb(tmp_path, head):
    "ResNet-101 v1c with DeepLabV2: the distillation's file holds a student and two teachers"
    shapes = resnet_v1c((3, 4, 23, 3)) | dlv2(head == 'dlv2_adapter')
    want = fill(shapes, 8)
    net = create_segmentor('resnet101_os8', 19, head)
    f = mmcv(
        tmp_path / 'ddb.pth',
        stu_model=want,
        cu_model={'backbone.stem.0.weight': torch.zeros(32, 3, 3, 3)},
    )
    assert load_published(net, f)['tensors'] == len(want) and placed(net, want)
    own = net.state_dict()
    assert own['backbone.body.net.bn1.weight'].equal(want['backbone.stem.7.weight'])
    assert own['backbone.body.net.conv1.3.weight'].equal(want['backbone.stem.3.weight'])
    assert own['backbone.body.net.layer3.22.bn3.bias'].equal(want['backbone.layer3.22.bn3.bias'])
    assert {published_keys(net)[k] for k in own} == set(want)


@pytest.mark.parametrize('head,dilated', [('daformer_aspp', 'conv'), ('daformer_conv1', None)])
def test_daformers_ablations(golden, tmp_path, head, dilated):
    shapes = encoder_b0(golden) | {
        k: s
        for k, s in conv1_head('decode_head.', MIT_B0, 16, 5).items()
        if not (dilated and 'fuse_layer' in k)
    }
    if dilated:
        for i, k in enumerate((1, 3, 3, 3)):
            shapes |= conv_bn(f'decode_head.fuse_layer.aspp_modules.{i}', 64, 16, k)
        shapes |= conv_bn('decode_head.fuse_layer.bottleneck', 64, 16, 3)
    want = fill(shapes, 9)
    net = create_segmentor('mit_b0', 5, head, dim=16)
    load_published(net, mmcv(tmp_path / 'x.pth', model=want))
    assert placed(net, want) and identify_architecture(want) == dict(
        backbone='mit_b0', head=head, n_classes=5, dim=16, ch=16
    )


def test_hrda(golden, tmp_path):
    "HRDA and MIC on HRDA: one encoder, the head under `head.`, the attention beside it"
    b0 = gold(golden, 'b0')
    shapes = {
        k.replace('decode_head.', 'decode_head.head.'): s for k, s in b0.items()
    } | conv1_head('decode_head.scale_attention.', MIT_B0, 256, 19)
    want = fill(shapes, 11)
    f = mmcv(
        tmp_path / 'hrda.pth', model=want, ema_model=fill(shapes, 12), imnet_model=fill(shapes, 13)
    )
    kind = identify_architecture(want)
    assert kind == dict(backbone='mit_b0', head='daformer', n_classes=19, dim=256, ch=256, hrda=256)
    net = HRDA(create_segmentor('mit_b0', 19))
    assert load_published(net, f)['tensors'] == len(want) == len(net.state_dict()) and placed(
        net, want
    )
    own = net.state_dict()
    for k, v in want.items():
        part, name = re.fullmatch(
            r'(backbone|decode_head\.head|decode_head\.scale_attention)\.(.+)', k
        ).groups()
        assert own[
            dict(backbone='net.backbone.body').get(
                part, part.replace('decode_head.head', 'net.head').replace('decode_head.', '')
            )
            + '.'
            + name
        ].equal(v), k
    say = unchanged(create_segmentor('mit_b0', 19), f, 'does not fit')
    assert (
        "looks like HRDA(create_segmentor('mit_b0', 19, 'daformer', dim=256, ch=256), dim=256)"
        in say
    )
    unchanged(
        net,
        mmcv(tmp_path / 'plain.pth', model=fill(b0)),
        r"(?s)missing: decode_head\.head.*looks like create_segmentor\('mit_b0', 19",
    )


def test_upernet_with_its_auxiliary_head(golden, tmp_path):
    up = {}
    for i in range(4):
        up |= conv_bn(f'decode_head.psp_modules.{i}.1', 256, 16)
    for i, d in enumerate(MIT_B0[:3]):
        up |= conv_bn(f'decode_head.lateral_convs.{i}', d, 16) | conv_bn(
            f'decode_head.fpn_convs.{i}', 16, 16, 3
        )
    up |= conv_bn('decode_head.bottleneck', 256 + 64, 16, 3) | conv_bn(
        'decode_head.fpn_bottleneck', 64, 16, 3
    )
    up |= {
        'decode_head.conv_seg.weight': (5, 16, 1, 1),
        'decode_head.conv_seg.bias': (5,),
    } | conv_bn('auxiliary_head.convs.0', 160, 256, 3)
    up |= {'auxiliary_head.conv_seg.weight': (5, 256, 1, 1), 'auxiliary_head.conv_seg.bias': (5,)}
    want = fill(encoder_b0(golden) | up, 10)
    net = create_segmentor('mit_b0', 5, 'upernet', dim=16)
    load_published(net, mmcv(tmp_path / 'x.pth', **{'': want}))
    assert placed(net, want) and net.head.aux.conv_seg.bias.equal(
        want['auxiliary_head.conv_seg.bias']
    )
    assert identify_architecture(want) == dict(
        backbone='mit_b0', head='upernet', n_classes=5, ch=16
    )
    out = net(torch.rand(2, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in out.aux.items()} == dict(fcn=(2, 5, 4, 6)) and net.eval()(
        torch.rand(1, 3, 64, 96)
    ).aux == {}


# ---- layer-wise learning rates


def test_layer_decay_is_timms():
    "Ratios between layers are those of timm's own grouping; without a decay nothing changes"
    net = create_segmentor('dinov2_s', 5, dim=8)
    body = net.backbone.body.net
    timms = {
        id(p): g['lr_scale']
        for g in param_groups_layer_decay(body, 0.01, layer_decay=0.5)
        for p in g['params']
    }
    ours = {
        id(p): g['lr'] / 1e-3 for g in param_groups(net, 1e-3, layer_decay=0.5) for p in g['params']
    }
    ratio = {ours[i] / s for i, s in timms.items()}
    assert len(ratio) == 1 and len({round(v, 12) for v in timms.values()}) == 13
    assert sorted(ours) == sorted(id(p) for p in net.parameters()) and {
        ours[id(p)] for p in net.head.parameters()
    } == {10.0}
    flat = param_groups(net, 1e-3)
    assert [g['name'] for g in flat] == ['encoder', 'encoder_norm', 'head'] and [
        (g['lr'], g['weight_decay']) for g in flat
    ] == [(1e-3, 0.01), (1e-3, 0.0), (1e-2, 0.01)]
