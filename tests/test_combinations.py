"Combinations of extensions, as recipes build them: two steps are finite, and each loss has its own gradient"

import math

import pytest
import torch
import yaml
from conftest import ROOT

from udanb.core.utils import seed_all
from udanb.demo.render import write_demo
from udanb.methods.cluda import UncertainDetail
from udanb.methods.dida import BankLabeller
from udanb.methods.extras import RareClassPasteView
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.runs.build import build_trainer
from udanb.runs.datasets import eval_image_size
from udanb.runs.grid import NOTEBOOK_PARAMETERS
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import flat_fields, pair_of

TINY = dict(
    backbone='mit_b0',
    pretrained=None,
    embed_dim=16,
    batch_size=2,
    crop_size=(64, 64),
    rcs_min_pixels=8,
    rcs_min_crop_ratio=0.5,
    steps=2,
    confidence_threshold=0.0,
    fd=0.0,
    blur_prob=0.0,
)
ARGS = dict(
    paste=dict(names=['pole', 'traffic light', 'traffic sign', 'person', 'car'], least=1e-4),
    cluda=dict(after=0),
    dida=dict(every=1),
)
NETS = dict(
    plain={},
    hrda=dict(hrda=True),
    upernet=dict(head='upernet'),
    fcn=dict(head='fcn'),
    hrda_upernet=dict(hrda=True, head='upernet'),
    hrda_fcn=dict(hrda=True, head='fcn', crop_size=(128, 128)),
)
PLUS = [
    ('dida', 'cluda'),
    ('dida', 'mic', 'cluda'),
    ('mic', 'soft', 'paste', 'mmd'),
    ('dida', 'mic', 'cluda', 'soft', 'paste', 'mmd'),
]
NOTES = {'source/bank_mass', 'source/bank_entropy'}  # logged, not optimised
ADDED = dict(
    dida={'mixed/instance'},
    cluda={'source/contrast', 'mixed/contrast'},
    mic={'masked/ce'},
    soft={'target/ce'},
    mmd={'source/mmd', 'mixed/mmd'},
    paste=set(),
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_demo(root / 'demo', n_source=6, n_target=6, n_val=2, size=(64, 128))
    return root


def trainer(data, out, plus, **over):
    r = make_recipe(
        'daformer',
        'demo',
        overrides=TINY
        | dict(extensions=list(plus), method_args={k: v for k, v in ARGS.items() if k in plus})
        | over,
    )
    return build_trainer(r, data, out, quiet=True)


def size_of(v, module):
    "Sum of the absolute gradients of `v` in a module's parameters"
    ps = [p for p in module.parameters() if p.requires_grad]
    if not v.requires_grad or not ps:
        return 0.0
    return sum(
        g.abs().sum().item()
        for g in torch.autograd.grad(v, ps, retain_graph=True, allow_unused=True)
        if g is not None
    )


def gradients(t, step):
    "For each loss of each pass: its value, and its gradient norms in the student and in its own parameters"
    found = {}
    for p in t.method.passes:
        step.pass_name = p.name
        x = p.make_batch(step)
        args = p.network_args(step) if p.network_args else {}
        losses = p.losses(t.student(x.img, **args), x, step)
        for crit in p.crits:
            if crit.name in losses:
                v = losses[crit.name]
                key = f'{p.name}/{crit.name}'
                found[key] = v.item(), size_of(v, t.student), size_of(v, crit)
    return found


@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('plus', PLUS, ids='+'.join)
def test_two_steps_and_a_gradient_from_each(plus, net, data, tmp_path):
    t = trainer(data, tmp_path, plus, **NETS[net])
    batches = [b[:2] for b in t.loader(0)]
    logs = [t.step(*b) for b in batches]
    assert t.it == 2 and all(math.isfinite(v) for l in logs for v in l.values())
    seed_all(1)  # details of several classes: one alone has nothing to contrast
    step = t.method.new_step(*batches[0], t.student, 2)
    got = gradients(t, step)
    beside = [
        n for n, k in (('detail', 'hrda'), ('fcn', 'upernet')) if k in net
    ]  # what the network is asked beside its logits
    want = {'source/ce', 'mixed/ce'}.union(*(ADDED[n] for n in plus))
    want |= {k.replace('/ce', f'/{n}') for k in want for n in beside if k.endswith('/ce')}
    notes = NOTES if 'dida' in plus else set()
    assert set(got) == want and set(step.notes) == notes
    assert {k for row in logs for k in row if '/' in k} == want | notes
    for row in logs:
        assert row['loss'] == pytest.approx(sum(row[k] for k in want))
    for k, (value, student, _) in got.items():
        assert math.isfinite(value) and student > 0, (k, value, student)
    if 'cluda' in plus and 'hrda' in net:  # its weighting head learns
        assert got['source/contrast'][2] > 0 and got['mixed/contrast'][2] > 0
    if 'paste' in plus:
        assert t.method.get_pass('mixed').view.bank.seen.sum() > 0
    used = {id(p) for g in t.opt.param_groups for p in g['params']}
    assert all(
        id(p) in used for m in (t.student, t.method) for p in m.parameters() if p.requires_grad
    )


def test_order_of_additions(data, tmp_path):
    "Each order of four extensions: the same losses with the same weights, one augmentation, two finite steps"
    four, seen = ('dida', 'cluda', 'paste', 'soft'), set()
    for i in range(4):
        t = trainer(
            data,
            tmp_path / str(i),
            four[i:] + four[:i],
            hrda=True,
            method_args=ARGS | dict(dida=dict(alpha=0.9)),
        )
        seen.add(
            tuple(sorted((p.name, c.name, round(c.w, 9)) for p in t.method.passes for c in p.crits))
        )
        mixed = t.method.get_pass('mixed')
        assert isinstance(mixed.view, RareClassPasteView)
        assert isinstance(mixed.network_args, UncertainDetail)
        assert isinstance(t.method.labeller, BankLabeller)
        assert type(mixed.augment).__name__ == 'StrongAugmentation'  # of the pasted image
        logs = [t.step(*b[:2]) for b in t.loader(0)]
        assert len(logs) == 2 and all(math.isfinite(v) for l in logs for v in l.values())
    assert len(seen) == 1


def test_all_of_them_resume_exactly(data, tmp_path):
    "Bank of instances, bank of crops, memories, weighting head and teacher travel with the checkpoint"

    def new(d):
        return trainer(data, tmp_path / d, PLUS[-1], hrda=True, steps=4, save_every=2, eval_every=4)

    whole = new('a')
    whole.evaluate = None
    whole.fit()
    cut = new('b')
    cut.out.mkdir()
    for b, _ in zip(cut.loader(0), range(2)):
        cut.step(*b[:2])
    cut.save()
    again = new('b')
    again.evaluate = None
    again.fit()
    for x, y in ((whole.student, again.student), (whole.method, again.method)):
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


def test_mic_of_both_domains_has_no_colours(data, tmp_path):
    "Settings of params/cityscapes_acdc_mic_hrda.yaml: first source and first target image, masked, colours unchanged"
    t = trainer(
        data,
        tmp_path,
        ('mic',),
        hrda=True,
        method_args=dict(mic=dict(mode='both', ratio=0.0)),
        jitter_prob=1.0,
        blur_prob=1.0,
    )
    src, tgt = next(iter(t.loader(0)))[:2]
    assert t.step(src, tgt)['masked/ce'] > 0
    step = t.method.new_step(src, tgt, t.student, 1)
    x = t.method.get_pass('masked').view(step)
    assert (
        x.img.equal(torch.stack([src.img[0], tgt.img[0]]))
        and x.lbl[0].equal(src.lbl[0])
        and x.lbl[1].equal(step.pseudo.lbl[0])
        and (x.wgt[0] == 1).all()
    )


# ---- params/ at paper settings, against the spec's matrix

HALF, FULL = (
    dict(hrda=False, image_scale=1.0, crop_size=(512, 512), rcs_min_crop_ratio=0.5),
    dict(hrda=True, image_scale=2.0, crop_size=(1024, 1024), rcs_min_crop_ratio=2.0),
)
RELEASED = dict(
    extensions=('dida',), method_args=dict(dida=dict(alpha=1))
)  # labels from the classifier alone
NIGHT = FULL | dict(
    extensions=('mic',), source='cityscapes', method_args=dict(mic=dict(mode='both'))
)
PAPER = dict(
    gta_mic=HALF | dict(extensions=('mic',)),
    gta_hrda=FULL | dict(extensions=()),
    gta_mic_hrda=FULL | dict(extensions=('mic',)),
    gta_cluda_hrda=FULL | dict(extensions=('cluda',)),
    gta_dida=HALF | RELEASED,
    synthia_daformer=HALF | dict(extensions=()),
    synthia_mic_hrda=FULL | dict(extensions=('mic',)),
    synthia_dida=HALF | RELEASED,
    **{f'cityscapes_{t}_mic_hrda': NIGHT | dict(target=t) for t in ('acdc', 'dark_zurich')},
)
SAME = dict(
    method='daformer',
    backbone='mit_b5',
    pretrained='imagenet',
    head='daformer',
    embed_dim=None,
    head_channels=None,
    steps=40_000,
    batch_size=2,
    lr=6e-5,
    head_lr_mult=10.0,
    weight_decay=0.01,
    warmup_steps=1500,
    poly_power=1.0,
    ema_decay=0.999,
    confidence_threshold=0.968,
    rcs=True,
    rcs_temperature=0.01,
    rcs_min_pixels=3000,
    cat_max_ratio=0.75,
    parity=False,
)


def asked(stem):
    text = (ROOT / 'params' / f'{stem}.yaml').read_text()
    p = yaml.safe_load(text)
    assert (
        f'-f params/{stem}.yaml' in text
        and f'outputs/{stem}.ipynb' in text
        and '# Expect:  not run here' in text
    )
    assert set(p) <= set(NOTEBOOK_PARAMETERS), p
    return make_recipe(
        p['recipe'],
        p['source'],
        p['target'],
        p.get('overrides', {}),
        **{k: p.get(k) for k in ('backbone', 'steps', 'seed')},
    )


@pytest.mark.parametrize('stem', PAPER)
def test_paper_settings(stem):
    r, want = (
        asked(stem),
        SAME | dict(target='cityscapes', source=stem.split('_')[0], method_args={}) | PAPER[stem],
    )
    assert {k: flat_fields(r)[k] for k in want} == want
    sizes = {s.name: eval_image_size(r, s) for p in [pair_of(r)] for s in (*p.sources, *p.targets)}
    k = 2 if r.model.hrda else 1
    native = dict(
        gta=(720, 1280),
        synthia=(760, 1280),
        cityscapes=(512, 1024),
        acdc=(540, 960),
        dark_zurich=(540, 960),
    )
    assert sizes == {n: tuple(k * v for v in native[n]) for n in sizes}


def test_zerowaste_is_the_winners_first_stage():
    r = asked('zerowaste')
    want = SAME | dict(
        backbone='convnext_l',
        head_channels=512,
        rcs=False,
        cat_max_ratio=None,
        target_margins='rows',
        crop_size=(512, 512),
        image_scale=1.0,
        hrda=False,
        extensions=(),
    )
    assert {k: flat_fields(r)[k] for k in want} == want and (r.data.source, r.data.target) == (
        'zerowaste_v1',
        'zerowaste_v2',
    )
    p = pair_of(r)
    assert p.space.things == (1, 2, 3, 4) and eval_image_size(r, p.sources[0]) == eval_image_size(
        r, p.targets[0]
    ) == (720, 1280)
    assert (
        sum(v.numel() for v in meta(r, len(p.space)).head.parameters()) == 12_314_117
    )  # as counted in the spec


def meta(r, n):
    with torch.device('meta'):
        return create_segmentor(
            r.model.backbone, n, r.model.head, None, r.model.embed_dim, r.model.head_channels
        )


@pytest.mark.parametrize('stem', ['gta_vfm', 'gta_vfm_dinov3'])
def test_vfm(stem):
    "VFM-UDA: lr 5e-5 times the root of the batch times 0.1; a masked patch is a token; each block has .9 of the next"
    r = asked(stem)
    assert (
        r.method_args['daformer']['fd'],
        r.extensions,
        r.method_args['mic'],
        r.data.batch_size,
        r.data.crop_size,
        r.data.image_scale,
        r.optim.head_lr_mult,
        r.optim.warmup_steps,
        r.optim.weight_decay,
    ) == (
        0.0,
        ('mic',),
        dict(block=16),
        8,
        (1024, 1024),
        2.0,
        10.0,
        1500,
        0.01,
    )
    assert r.optim.lr == pytest.approx(
        5e-5 * r.data.batch_size**0.5 * 0.1, rel=0.02
    ) and r.data.rcs_min_crop_ratio == 1024**2 / (512 * 1024)
    net = meta(r, 19)
    assert (
        net.eval()(torch.zeros(1, 3, 1024, 1024, device='meta')).logits.shape == (1, 19, 256, 256)
        and net.backbone.pad == r.method_args['mic']['block']
    )
    rates = {
        g['name']: g['lr'] / r.optim.lr
        for g in param_groups(
            net, r.optim.lr, r.optim.head_lr_mult, r.optim.weight_decay, r.optim.layer_decay
        )
    }
    assert (
        rates['head'] == pytest.approx(10)
        and rates['encoder_12'] / rates['encoder_1'] == pytest.approx(0.9**-11)
        and rates['encoder_0'] < rates['encoder_1']
    )
