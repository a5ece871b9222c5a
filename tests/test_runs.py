"Real processes: killed and resumed, misspelt, started from other folders; and what a run refuses"

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from udanb.checkpoints.weights import load_weights
from udanb.core.storage import read_json
from udanb.data.catalog import CAMVID, TOWN
from udanb.data.dummy import write_dummy_dataset
from udanb.demo.render import write_demo
from udanb.models.heads import HEADS
from udanb.runs.build import build_trainer, train_loader_factory
from udanb.runs.datasets import open_datasets
from udanb.runs.presets import RECIPES, make_recipe
from udanb.runs.recipe import flat_fields, pair_of, replace_flat
from udanb.runs.results import compare_iou, load_run, read_run, run_name
from udanb.runs.run import train_run

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    backbone='mit_b0',
    pretrained=None,
    embed_dim=16,
    batch_size=2,
    crop_size=(64, 64),
    rcs_min_pixels=8,
    steps=2,
)
ENV = os.environ | dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', IN_TEST='1')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_demo(root / 'demo', n_source=6, n_target=6, n_val=2, size=(64, 128))
    return root


# ---- resume

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from udanb.runs.presets import make_recipe
from udanb.runs.run import train_run

data, out = sys.argv[1:]
train_run(make_recipe("daformer", "demo", overrides={overrides}), data, out)
'''
LONGER = TINY | dict(steps=14, save_every=3, eval_every=7)


def start(data, out):
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT.format(overrides=LONGER), str(data), str(out)],
        env=ENV,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )


def rows(out):
    return (out / 'log.jsonl').read_text().count('\n') if (out / 'log.jsonl').exists() else 0


def test_killed_and_started_again_ends_with_the_same_bits(data, tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert start(data, whole).wait(240) == 0
    killed = 0
    for at in (5, 10):  # between checkpoints, which are at 3, 6, 9, 12
        p = start(data, cut)
        t0 = time.time()
        while rows(cut) < at and p.poll() is None and time.time() - t0 < 120:
            time.sleep(0.01)
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            killed += 1
        p.wait()
        assert (cut / 'checkpoint.pt').exists() and not (cut / 'metrics.json').exists()
    assert killed == 2
    assert start(data, cut).wait(240) == 0
    a, b = (torch.load(f / 'checkpoint.pt', weights_only=True) for f in (whole, cut))
    assert a['it'] == b['it'] == 14
    for part in ('model', 'method'):
        assert a[part].keys() == b[part].keys() and all(
            a[part][k].equal(b[part][k]) for k in a[part]
        )

    def moments(c):
        return [v for s in c['opt']['state'].values() for v in s.values()]

    assert moments(a) and all(torch.equal(x, y) for x, y in zip(moments(a), moments(b)))

    def strip(f):
        return [r | dict(sec=0) for r in read_run(f)[0]]

    assert strip(whole) == strip(cut) and [r['it'] for r in strip(cut)] == list(range(1, 15))
    assert (
        load_weights(whole / 'model.safetensors')[1]['hash']
        == load_weights(cut / 'model.safetensors')[1]['hash']
    )


def test_teacher_and_optimiser_survive(data, tmp_path):
    t = build_trainer(
        make_recipe('daformer', 'demo', overrides=TINY | dict(steps=4, save_every=2)),
        data,
        tmp_path / 'r',
        quiet=True,
    )
    t.fit()
    again = build_trainer(
        make_recipe('daformer', 'demo', overrides=TINY | dict(steps=4)),
        data,
        tmp_path / 'r',
        quiet=True,
    )
    assert again.resume() and again.it == 4
    assert all(
        a.equal(b)
        for a, b in zip(t.teacher.state_dict().values(), again.teacher.state_dict().values())
    )
    differ = [
        not a.equal(b) for a, b in zip(t.student.parameters(), again.teacher.net.parameters())
    ]
    assert any(differ)  # upstream's defect: the teacher restarts as a copy of the student


def test_half_written_checkpoint_is_named(data, tmp_path):
    t = build_trainer(make_recipe('dacs', 'demo', overrides=TINY), data, tmp_path, quiet=True)
    t.fit()
    f = tmp_path / 'checkpoint.pt'
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(ValueError, match='checkpoint.pt: not a readable checkpoint.*Remove it'):
        build_trainer(make_recipe('dacs', 'demo', overrides=TINY), data, tmp_path, quiet=True).fit()


# ---- refusals


def test_checkpoint_of_another_recipe(data, tmp_path):
    r = make_recipe('dacs', 'demo', overrides=TINY)
    train_run(r, data, tmp_path / 'r', quiet=True)
    with pytest.raises(ValueError, match=f"lr: {r.optim.lr} there, 0.001 here"):
        train_run(replace_flat(r, lr=1e-3), data, tmp_path / 'r', quiet=True)
    (tmp_path / 'r' / 'recipe.json').unlink()
    (tmp_path / 'r' / 'metrics.json').unlink()
    with pytest.raises(ValueError, match="checkpoint.pt belongs to another recipe"):
        train_run(replace_flat(r, lr=1e-3), data, tmp_path / 'r', quiet=True)


def test_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='choose another folder'):
        train_run(
            make_recipe('dacs', 'demo', overrides=TINY), data, tmp_path / 'file' / 'r', quiet=True
        )
    if os.geteuid() != 0:
        (tmp_path / 'ro').mkdir(mode=0o500)
        with pytest.raises(OSError, match='choose another folder'):
            train_run(
                make_recipe('dacs', 'demo', overrides=TINY), data, tmp_path / 'ro' / 'r', quiet=True
            )
    elif Path('/proc').exists():  # root may write everywhere but here
        with pytest.raises(OSError, match='choose another folder'):
            train_run(make_recipe('dacs', 'demo', overrides=TINY), data, '/proc/udanb', quiet=True)


def test_missing_data_names_folder_source_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        train_run(make_recipe('daformer', 'gta'), tmp_path, tmp_path / 'r')
    assert (
        str(tmp_path / 'gta') in str(e.value)
        and 'http' in str(e.value)
        and '-p source demo' in str(e.value)
    )
    assert not (tmp_path / 'r').exists()


def test_corrupt_image_in_training_is_named(tmp_path):
    write_demo(tmp_path / 'demo', n_source=2, n_target=2, n_val=2, size=(64, 128))
    f = sorted((tmp_path / 'demo' / 'cityscapes').rglob('train/**/*_leftImg8bit.png'))
    for x in f:
        x.write_bytes(x.read_bytes()[:200])
    with pytest.raises(Exception) as e:
        train_run(make_recipe('dacs', 'demo', overrides=TINY), tmp_path, tmp_path / 'r', quiet=True)
    assert any(x.name in str(e.value) for x in f)


def test_target_labels_are_not_needed_to_train(tmp_path):
    write_demo(tmp_path / 'demo', n_source=4, n_target=4, n_val=2, size=(64, 128))
    for x in (tmp_path / 'demo' / 'cityscapes' / 'gtFine' / 'train').rglob('*.png'):
        x.unlink()
    assert (
        train_run(
            make_recipe('daformer', 'demo', overrides=TINY), tmp_path, tmp_path / 'r', quiet=True
        )
        / 'metrics.json'
    ).exists()


def test_class_that_never_occurs_with_rcs(data, tmp_path):
    r = make_recipe('daformer', 'demo', overrides=TINY)
    src, tgt, _ = open_datasets(r, data)
    with pytest.warns(UserWarning, match='never occur and will not be drawn.*train'):
        next(iter(train_loader_factory(r, src, tgt)(0)))


def test_demo_read_as_gta_and_cityscapes(data, tmp_path):
    "The pair gta → cityscapes on the demo's files: the specs and code of the published datasets, with margins"
    r = make_recipe('daformer', 'gta', overrides=TINY)
    src, tgt, vals = open_datasets(r, data / 'demo')
    assert list(vals) == ['cityscapes']
    assert (
        (src.spec.name, tgt.spec.name) == ('gta', 'cityscapes')
        and tgt.margins
        and tgt.labels is None
    )
    assert (
        read_json(train_run(r, data / 'demo', tmp_path / 'r', quiet=True) / 'metrics.json')[
            'target'
        ]
        == 'cityscapes'
    )


# ---- several domains, own data, broken files

OWN = dict(mine=dict(folder='demo/cityscapes', images='leftImg8bit/train/*_leftImg8bit.png'))


def test_target_without_any_label_trains_unscored(data, tmp_path):
    r = make_recipe('daformer', 'demo', 'mine', overrides=TINY, datasets=OWN)
    out = train_run(r, data, tmp_path / 'r', quiet=True)
    m = read_json(out / 'metrics.json')
    assert (
        m['steps'] == 2 and m['miou'] == {} and m['iou'] == {} and compare_iou(r, out, None) == {}
    )
    assert (
        load_run(out)(torch.zeros(1, 3, 64, 64)).logits.shape[1] == 19
    )  # the description travels with the run


def test_two_sources_and_two_targets(data, tmp_path):
    for s in (CAMVID, TOWN):
        write_dummy_dataset(s, tmp_path, size=(64, 128))
    os.symlink(data / 'demo', tmp_path / 'demo')
    r = make_recipe(
        'daformer',
        ['demo', 'town'],
        ['demo', 'camvid'],
        overrides=TINY | dict(source_weights=[1, 3]),
    )
    assert run_name(r).startswith('demo+town-demo+camvid-daformer-s0')
    m = read_json(train_run(r, tmp_path, tmp_path / 'r', quiet=True) / 'metrics.json')
    each = m['targets']['student']
    assert (
        set(each) == {'demo_target', 'camvid'}
        and abs(m['miou']['student'] - sum(e['miou'] for e in each.values()) / 2) < 1e-6
        and len(m['iou']['student']) == 11
    )
    src, tgt, _ = open_datasets(r, tmp_path)
    assert np.isclose(src.share[: len(src.datasets[0])].sum(), 0.25)
    seen = {n for b, _ in zip(train_loader_factory(r, src, tgt)(0), range(8)) for n in b.src.name}
    assert any('town' in n for n in seen) and len(tgt.datasets) == 2
    oracle = open_datasets(replace_flat(r, method='oracle'), tmp_path)[0]
    assert [f.spec.name for f in oracle.datasets] == [
        'demo_target',
        'camvid',
    ] and oracle.labels is not None


def test_broken_files_are_skipped_and_reported(tmp_path):
    "A cut image, a label of another size, one with foreign numbers: errors; with skip_broken the run names them"
    write_demo(tmp_path / 'demo', n_source=6, n_target=4, n_val=3, size=(64, 128))
    bad = [
        sorted((tmp_path / 'demo').glob(g))[k]
        for g, k in (
            ('gta/images/*.png', 0),
            ('gta/labels/*.png', 1),
            ('gta/labels/*.png', 2),
            ('cityscapes/leftImg8bit/train/*/*.png', 1),
            ('cityscapes/gtFine/val/*/*_labelIds.png', 0),
        )
    ]
    bad[0].write_bytes(bad[0].read_bytes()[:150])
    Image.fromarray(np.full((64, 100), 7, np.uint8)).save(bad[1])
    Image.fromarray(np.full((64, 128), 99, np.uint8)).save(bad[2])
    bad[3].write_bytes(b'')
    bad[4].unlink()
    r = make_recipe('dacs', 'demo', overrides=TINY | dict(steps=6, rcs=True))
    with pytest.raises(ValueError):
        train_run(r, tmp_path, tmp_path / 'r', quiet=True)
    with pytest.warns(UserWarning, match='left out'):
        out = train_run(replace_flat(r, skip_broken=True), tmp_path, tmp_path / 's', quiet=True)
    skipped = read_json(out / 'metrics.json')['skipped']

    def has(stem):
        return any(stem in n for n in skipped)

    assert has(bad[1].stem) and has(bad[2].stem) and has(bad[4].name[:20]) and has(bad[3].stem), (
        skipped
    )
    assert any('99 (' in w for w in skipped.values()) and any(
        '100×64' in w for w in skipped.values()
    )


# ---- every recipe and every file in params/


@pytest.mark.parametrize(
    'name', [n for n in RECIPES if n not in ('selftrain', 'distill')]
)  # those two need earlier runs: test_chains.py
def test_every_recipe_steps_twice(name, data, tmp_path):
    out = train_run(make_recipe(name, 'demo', overrides=TINY), data, tmp_path / 'r', quiet=True)
    m = read_json(out / 'metrics.json')
    who = {'student'} if name in ('source_only', 'oracle') else {'student', 'teacher'}
    assert (
        m['steps'] == 2
        and m['recipe'] == name
        and set(m['miou']) == set(m['label_free']) == who
        and len(m['iou']['student']) == 19
    )
    x = torch.zeros(1, 3, 64, 64)
    assert (
        load_run(out)(x).logits.shape == (1, 19, 16, 16)
        if 'ddb' not in name
        else load_run(out)(x).logits.shape[:2] == (1, 19)
    )


@pytest.mark.parametrize('head', HEADS)
def test_every_head_trains_and_comes_back(head, data, tmp_path):
    "Through recipe, checkpoint and weights file; UPerNet with its auxiliary loss, DeepLabV2 at stride 32"
    out = train_run(
        make_recipe(
            'dacs', 'demo', overrides=TINY | dict(head=head, layer_decay=0.8, drop_path_rate=0.2)
        ),
        data,
        tmp_path / 'r',
        quiet=True,
    )
    log, m = read_run(out)
    assert m['steps'] == 2 and ({'source/fcn', 'mixed/fcn'} <= set(log[0])) == (head == 'upernet')
    x = torch.randn(1, 3, 64, 64)
    a, b = load_run(out)(x).logits, load_run(out)(x).logits
    assert a.shape[1] == 19 and a.equal(b) and a.std() > 0


def test_mixed_precision_steps(data, tmp_path):
    "bf16 through Accelerate, in a process of its own (Accelerate fixes the precision once per process)"
    script = f'''
import torch
from udanb.runs.build import build_trainer
from udanb.runs.presets import make_recipe
recipe = make_recipe("daformer", "demo", overrides={TINY | dict(precision="bf16")!r})
t = build_trainer(recipe, {str(data)!r}, {str(tmp_path)!r}, quiet=True)
dtypes = set()
t.student.head.conv_seg.register_forward_hook(lambda m,i,o: dtypes.add(o.dtype))
t.fit()
assert t.it==2 and torch.bfloat16 in dtypes and next(t.student.parameters()).dtype==torch.float32
'''
    p = subprocess.run(
        [sys.executable, '-c', script],
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert p.returncode == 0, p.stderr[-2000:]


def test_parity_recipe_steps(data, tmp_path):
    over = TINY | dict(parity=True, target_margins='rows')
    t = build_trainer(make_recipe('daformer', 'demo', overrides=over), data, tmp_path, quiet=True)
    log = t.fit()
    assert t.teacher.rows == (2, 15) and 0 <= log[-1]['q'] <= 1  # 15 and 120 of 512 rows


COMMAND = re.compile(
    r'^# Command: papermill nbs/(\w+)\.ipynb outputs/\w+\.ipynb -f params/(\w+)\.yaml', re.M
)
PARAMS = {
    f.stem: COMMAND.search(f.read_text()) for f in sorted((ROOT / 'params').glob('*.yaml'))
}  # name -> its command: notebook, file


def of(*pages):
    return [n for n, m in PARAMS.items() if m and m[1] in pages]


def params(name):
    return yaml.safe_load((ROOT / 'params' / f'{name}.yaml').read_text())


@pytest.mark.parametrize('name', PARAMS)
def test_every_params_file_says_how_to_run_it(name):
    "Its first comment has a command with this file and a tested notebook, what it needs and what to expect"
    text = (ROOT / 'params' / f'{name}.yaml').read_text()
    assert PARAMS[name] and PARAMS[name][2] == name and name in of('train_uda', 'ddb', 'visda22')
    assert re.findall(r'^# (Command|Needs|Expect): ', text[: text.index('\nsource:')], re.M) == [
        'Command',
        'Needs',
        'Expect',
    ]


def trees(pair, data, root):
    "The very datasets of a pair, in their own layouts"
    for s in {s.name: s for s in (*pair.sources, *pair.targets)}.values():
        if not s.folder.startswith('demo/'):
            write_dummy_dataset(s, root, size=(64, 132))
    os.symlink(data / 'demo', root / 'demo')


@pytest.mark.parametrize('name', of('train_uda'))
def test_every_params_file_is_a_recipe_that_steps(name, data, tmp_path):
    p = params(name)
    known = {
        'source',
        'target',
        'recipe',
        'backbone',
        'steps',
        'seed',
        'data_root',
        'datasets',
        'skip_broken',
        'out',
        'overrides',
    }
    assert set(p) <= known, f'{name}: {set(p) - known}'
    named = {k: p.get(k) for k in ('backbone', 'steps', 'seed', 'datasets')}

    def asked(overrides):
        name = p.get('recipe', 'daformer')
        return make_recipe(name, p['source'], p.get('target'), overrides, **named)

    r = asked(p.get('overrides', {}))
    pair = pair_of(r)
    trees(pair, data, tmp_path)
    small = asked(
        p.get('overrides', {}) | TINY | dict(image_size=(64, 128), max_images=None, eval_every=0)
    )
    m = read_json(train_run(small, tmp_path, tmp_path / 'r', quiet=True) / 'metrics.json')
    assert (
        run_name(r)
        and m['steps'] == 2
        and set(m['targets'].get('student', {}))
        == ({t.name for t in pair.targets} if len(pair.targets) > 1 else set())
    )


def chain(name, to=None, **tiny):
    "Variables of a notebook run with a params file as papermill does, with `tiny` on top; up to the cell with `to`"
    given = params(name)
    given |= tiny | dict(overrides=given.get('overrides', {}) | tiny.get('overrides', {}))
    space, page = {'In': ['']}, ROOT / 'nbs' / f'{PARAMS[name][1]}.ipynb'
    for c in json.loads(page.read_text(encoding='utf-8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or src.startswith('#| hide'):
            continue  # hidden: the smoke size of an empty call
        for s in [src] + [
            '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in given.items())
        ] * ('parameters' in c['metadata'].get('tags', [])):
            space['In'].append(s)
            exec(compile(s, page.name, 'exec'), space)
        if to and to in src:
            return space
    assert not to, f'{page.name} has no cell with {to}'
    return space


def fields_of(r, want):
    return {k: flat_fields(r)[k] for k in want}


DDB = dict(
    backbone='resnet101_os8',
    pretrained='imagenet',
    head='dlv2_adapter',
    steps=40_000,
    batch_size=4,
    crop_size=(512, 512),
    image_scale=1.0,
    lr=6e-5,
    head_lr_mult=10.0,
    weight_decay=0.01,
    warmup_steps=1500,
    poly_power=1.0,
    ema_decay=0.99,
    confidence_threshold=0.968,
    rcs=False,
    target_margins='none',
    blur_prob=0.0,
    source_weights=None,
    parity=False,
    seed=0,
)  # spec 2.10
TOWN_SIZE = dict(
    backbone='tf_efficientnet_lite0',
    head='daformer',
    embed_dim=64,
    steps=600,
    batch_size=2,
    image_size=(240, 320),
    crop_size=(192, 256),
    lr=3e-4,
    warmup_steps=50,
)


@pytest.mark.parametrize('name', of('ddb'))
def test_ddb_params_ask_for_the_published_trainings(name):
    s = chain(name, 'check_papermill_parameters(')
    rs = s['cut'], s['cls'], s['pupil']
    src = ('gta', 'synscapes') if 'synscapes' in name else name.split('_')[0]
    tgt = (
        ('cityscapes', 'mapillary')
        if 'mapillary' in name
        else 'camvid'
        if 'town' in name
        else 'cityscapes'
    )
    want = (TOWN_SIZE | dict(steps=300) if 'town' in name else DDB) | dict(source=src, target=tgt)
    for r in rs:
        read = want if r.method != 'distill' else {k: want[k] for k in want if k != 'ema_decay'}
        assert fields_of(r, read) == read  # distillation has no EMA teacher
    assert [(r.method, r.data.augmentations, r.model.init_weights, r.extensions) for r in rs] == [
        ('ddb_cut', 'none', None, ()),
        ('ddb_class', 'none', None, ()),
        ('distill', 'photometric', None, ()),
    ]
    assert (s['rounds'], s['lr_factor'], s['soft'], s['prototypes'], s['given']) == (
        2,
        0.1,
        False,
        True,
        {},
    )


@pytest.mark.parametrize('name', of('visda22'))
def test_visda22_params_ask_for_the_winners_trainings(name):
    s = chain(name, 'check_papermill_parameters(')
    p = params('zerowaste' if 'zerowaste' in name else 'town_daformer')
    alone = make_recipe(
        p['recipe'],
        p['source'],
        p['target'],
        p.get('overrides', {}) | dict(run_baseline=False),
        backbone=p.get('backbone'),
        seed=s['seed'],
    )
    assert s['adapt'] == alone  # the first stage is the run of that file
    want = dict(
        method='selftrain',
        extensions=(),
        method_args={},
        rcs=False,
        target_margins='none',
        steps=alone.optim.steps // 4,
        lr=alone.optim.lr if 'zerowaste' in name else alone.optim.lr / 10,
    )
    assert s['again'] == replace_flat(alone, **want) and (
        s['again'].optim.warmup_steps,
        s['again'].optim.lr,
    ) == ((1500, 6e-5) if 'zerowaste' in name else (50, pytest.approx(3e-5)))
    assert list(s['kinds']) == ['photometric', 'noise', 'grid'] and s['threshold'] == 0.9
    assert (s['split'], s['predict_split'], s['seed']) == (
        ('test', 'test', 1) if 'zerowaste' in name else ('train', None, 0)
    )


def test_params_of_ddb_through_their_notebook(data, tmp_path):
    "Two targets, two rounds, one step each: only the bridges of round 2 start from the first student, at lr / 10"
    name, tiny = 'gta_cityscapes_mapillary_ddb', TINY | dict(image_size=(64, 128), eval_every=0)
    trees(pair_of(chain(name, 'check_papermill_parameters(')['cut']), data, tmp_path)
    s = chain(
        name,
        overrides={k: v for k, v in tiny.items() if k != 'steps'},
        steps=1,
        data_root=str(tmp_path),
        out=str(tmp_path / 'chain'),
    )
    told = {k: read_json(f / 'recipe.json') for k, f in s['stages'].items() if 'fusion' not in k}
    assert (
        list(s['stages'])
        == [f'{what} {k}' for k in (1, 2) for what in ('cut', 'class', 'fusion', 'student')]
        and len(s['pipe'].table()) == 12
    )
    assert {k: r['lr'] for k, r in told.items()} == pytest.approx(
        {k: 6e-6 if k in ('cut 2', 'class 2') else 6e-5 for k in told}
    )
    assert {k for k, r in told.items() if r['init_weights']} == {'cut 2', 'class 2'} and told[
        'cut 2'
    ]['init_weights'] == str(s['stages']['student 1'] / 'model.safetensors')
    for k, f in s['stages'].items():
        assert set(next(iter(s['pipe'].results(f)['targets'].values()))) == {
            'cityscapes',
            'mapillary',
        }, k
    assert (
        list(s['each']) == list(s['stages'])
        and s['table'].loc['mIoU'].notna().all()
        and (tmp_path / 'chain' / 'iou.csv').exists()
    )


def test_params_of_visda22_through_their_notebook(data, tmp_path):
    "v1 is learned, v2's test images are labelled, trained on and predicted, and its val scores every stage"
    name, tiny = 'zerowaste_visda22', TINY | dict(image_size=(64, 128), eval_every=0)
    trees(pair_of(chain(name, 'check_papermill_parameters(')['adapt']), data, tmp_path)
    s = chain(
        name,
        overrides={k: v for k, v in tiny.items() if k != 'steps'} | dict(head_channels=24),
        steps=2,
        self_steps=1,
        threshold=0.2,
        data_root=str(tmp_path),
        out=str(tmp_path / 'chain'),
    )
    assert list(s['stages']) == ['adapted', 'photometric', 'noise', 'grid', 'soup'] and s[
        'summary'
    ].notna().all(axis=None)

    def names(d):
        return sorted(f.name for f in Path(d).rglob('*.png'))

    test = ['000901.png', '000902.png']
    assert (
        names(s['labels'] / 'test') == test
        and names(tmp_path / 'zerowaste-v2-splits' / 'test' / 'data') == test
    )
    done = s['pipe'].table().stage.tolist()
    assert done == [
        'adapt',
        'labels',
        'self-photometric',
        'self-noise',
        'self-grid',
        'soup',
        'predictions',
    ]
    [folder] = (tmp_path / 'chain').glob('predictions-*')
    for kind in ('label', 'color'):
        assert names(folder / 'zerowaste_v2' / kind) == test
    for k in ('photometric', 'noise', 'grid'):
        r = read_json(s['stages'][k] / 'recipe.json')
        assert (r['method'], r['augmentations'], r['steps'], r['head_channels']) == (
            'selftrain',
            k,
            1,
            24,
        ) and r['init_weights'] == str(s['stages']['adapted'] / 'model.safetensors')


# ---- the run notebook


def papermill(*args, cwd=ROOT, env={}):
    return subprocess.run(
        [sys.executable, '-m', 'papermill', '--no-progress-bar', *map(str, args)],
        cwd=cwd,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize('cwd', ['.', 'nbs'])
def test_notebook_writes_its_results(data, tmp_path, cwd):
    page = (ROOT / 'nbs' / 'train_uda.ipynb') if cwd == '.' else 'train_uda.ipynb'
    p = papermill(
        page,
        tmp_path / 'copy.ipynb',
        '-p',
        'data_root',
        data,
        '-p',
        'out',
        tmp_path / 'run',
        cwd=ROOT / cwd,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    m = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert (
        m['steps'] == 2
        and m['recipe'] == 'daformer'
        and set(m['miou']) == {'student', 'teacher'}
        and m['versions']
        and m['seed'] == 0
    )
    files = {
        f.relative_to(tmp_path / 'run').as_posix()
        for f in (tmp_path / 'run').rglob('*')
        if f.is_file()
    }
    assert {
        'recipe.json',
        'log.jsonl',
        'model.safetensors',
        'figures/curves.png',
        'figures/iou.png',
        'figures/panel.png',
        'before/metrics.json',
    } <= files
    assert (tmp_path / 'copy.ipynb').exists()


@pytest.mark.parametrize(
    'args,said',
    [
        (('-p', 'sorce', 'town'), "did you mean 'source'"),
        (('-p', 'recipe', 'dafromer'), "did you mean 'daformer'"),
        (('-p', 'source', 'gta', '-p', 'data_root', 'nowhere'), '-p source demo'),
    ],
)
def test_notebook_stops_at_once(tmp_path, args, said):
    p = papermill(
        ROOT / 'nbs' / 'train_uda.ipynb',
        tmp_path / 'copy.ipynb',
        *args,
        '-p',
        'out',
        tmp_path / 'run',
    )
    assert p.returncode != 0 and said in p.stderr and not (tmp_path / 'run').exists()
