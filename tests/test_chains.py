"Both pipelines: from the shell, again, killed in each stage, damaged, moved, out of space; and their stages"

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from udanb.checkpoints.weights import load_weights, save_weights
from udanb.core.image_io import read_label
from udanb.core.state_dicts import weights_hash
from udanb.core.storage import read_json
from udanb.core.types import IGNORE, normalize
from udanb.core.utils import seed_all
from udanb.data.catalog import CAMVID, TOWN
from udanb.data.concat import ConcatSegDataset
from udanb.data.dummy import write_dummy_dataset
from udanb.data.pseudo_labels import read_export_journal
from udanb.demo.render import write_demo
from udanb.inference import export_pseudo_labels as pseudo
from udanb.inference import folder
from udanb.inference.export_pseudo_labels import export_pseudo
from udanb.methods.prototypes import Prototypes
from udanb.models.backbones import create_backbone
from udanb.runs import distillation
from udanb.runs import stages as chains
from udanb.runs.build import build_trainer
from udanb.runs.datasets import open_datasets, open_targets
from udanb.runs.distillation import prototype_stage
from udanb.runs.pipeline import Pipeline
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import replace_flat
from udanb.runs.results import load_run
from udanb.runs.run import train_run
from udanb.runs.stages import label_paths, pseudo_label_stage, recipe_of, weights_of
from udanb.runs.stamps import STAMP_FILE, damaged_files, output_files, read_stamp
from udanb.training.callbacks import read_log
from udanb.training.method import Step
from udanb.training.trainer import Trainer

CHILDREN = multiprocessing.get_context(
    'forkserver'
)  # processes of their own that need not import torch again
CHILDREN.set_forkserver_preload(['udanb.runs.distillation'])
TINY = dict(
    backbone='mit_b0',
    pretrained=None,
    embed_dim=16,
    batch_size=2,
    crop_size=[64, 64],
    rcs_min_pixels=8,
    save_every=1,
    eval_every=0,
)
VISDA = dict(steps=3, self_steps=2, threshold=0.05, predict_split='val', overrides=TINY)
DDB = dict(steps=2, overrides=TINY)

# ---- notebooks, here, in a child, and from a shell


def notebook(page, **params):
    "Run a notebook's cells here, as papermill would with these parameters; what they leave behind"
    space = {'In': [''], 'display': lambda *a: None}
    for c in json.loads((ROOT / 'nbs' / f'{page}.ipynb').read_text(encoding='utf-8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or src.startswith('#| hide'):
            continue  # the smoke size of an empty call
        for s in [src] + [
            '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in params.items())
        ] * ('parameters' in c['metadata'].get('tags', [])):
            space['In'].append(s)
            exec(compile(s, page, 'exec'), space)
    return space


def shell(page, copy, **params):
    "The same by papermill, in a process of its own"
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(
        IN_TEST='1', OMP_NUM_THREADS='1'
    )
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'papermill',
            '--no-progress-bar',
            ROOT / 'nbs' / f'{page}.ipynb',
            copy,
            '-y',
            json.dumps(params),
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def hook(note, set=setattr):
    "Call `note` with each piece of work that a chain begins"
    seen = Counter()

    def count(what):
        seen[what] += 1
        note(f'{what} {seen[what] - 1}')

    def wrap(owner, name, say):
        real = getattr(owner, name)

        def noted(*a, **k):
            say(*a)
            return real(*a, **k)

        set(owner, name, noted)

    wrap(Trainer, 'step', lambda t, *_: note(f"{t.out.name.rsplit('-', 1)[0]} {t.it}"))
    for owner, name, what in (
        (pseudo, '_write_label', 'label'),
        (chains, 'soup', 'soup'),
        (chains, 'score_network', 'score'),
        (folder, 'colorize', 'predict'),
        (Prototypes, 'add', 'prototypes'),
        (distillation.EnsembleNetwork, 'forward', 'fusion'),
    ):
        wrap(owner, name, lambda *_, what=what: count(what))


def child(page, log, stop, params):
    "A chain that writes down what it does; in one place it waits for the end"

    def note(what):
        with open(log, 'a') as f:
            f.write(what + '\n')
        if what == stop:
            Path(f'{log}.held').touch()
            time.sleep(120)

    hook(note)
    notebook(page, **params)


def told(log):
    "What was done since the last call"
    said = log.read_text().split('\n')[:-1] if log.exists() else []
    log.unlink(missing_ok=True)
    return said


def kill_at(page, log, stop, **params):
    "Start the chain, kill it in that place, and say what it did"
    p = CHILDREN.Process(target=child, args=(page, str(log), stop, params))
    held = Path(f'{log}.held')
    t0 = time.time()
    p.start()
    while not held.exists() and p.exitcode is None and time.time() - t0 < 240:
        time.sleep(0.02)
    assert p.exitcode is None and held.exists(), f'it ended before, or never came to {stop}'
    p.kill()
    p.join()
    held.unlink()
    assert p.exitcode == -signal.SIGKILL
    return told(log)


def finish(page, log, **params):
    p = CHILDREN.Process(target=child, args=(page, str(log), None, params))
    p.start()
    p.join(240)
    assert p.exitcode == 0
    return told(log)


# ---- what a chain left


def stages(out):
    return sorted(f.parent.name for f in out.glob(f'*/{STAMP_FILE}'))


def begun(out):
    return sorted(f.name for f in out.iterdir() if (f / '.lock').exists())


def at(out, name):
    return next(f for f in out.iterdir() if f.name.rsplit('-', 1)[0] == name)


def state(run):
    return load_weights(weights_of(run))[0]


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def same(a, b):
    "The same stages, whole, and the same weights and labels to the bit"
    assert stages(a) == stages(b) == begun(a)
    for n in stages(a):
        assert not damaged_files(a / n, read_stamp(a / n)) and not [*(a / n).rglob('*.part*')]
        assert output_files(a / n) == output_files(b / n)
        if weights_of(a / n).exists():
            assert equal(state(a / n), state(b / n)), n
        for f in output_files(a / n):
            if f.endswith('.png') and 'figures' not in f:
                assert (a / n / f).read_bytes() == (b / n / f).read_bytes(), f
    return True


def times(out):
    return {
        f: f.stat().st_mtime_ns for n in stages(out) for f in (out / n).rglob('*') if f.is_file()
    }


def copy(src, dst):
    "The chain in another place; its large files, which are replaced and never written into, as links"

    def big(a, b):
        return (os.link if Path(a).suffix in ('.pt', '.safetensors') else shutil.copy2)(a, b)

    return Path(shutil.copytree(src, dst, copy_function=big))


def cut(f):
    b = f.read_bytes()
    f.unlink()
    f.write_bytes(b[: len(b) // 2])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "The demo; and CamVid and a town in stripes beside it"
    root = tmp_path_factory.mktemp('data')
    write_demo(root / 'demo', n_source=3, n_target=3, n_val=2, size=(64, 128), quiet=True)
    for s in (CAMVID, TOWN):
        write_dummy_dataset(s, root, size=(64, 128))
    return root


def whole(page, data, folder, **params):
    "A chain by papermill: its folder, and the executed notebook"
    p = shell(
        page, folder / f'{page}.ipynb', data_root=str(data), out=str(folder / 'chain'), **params
    )
    said = p.communicate(timeout=500)[1]
    assert p.returncode == 0, said[-3000:]
    return folder / 'chain', json.loads((folder / f'{page}.ipynb').read_text())['cells']


@pytest.fixture(scope='module')
def visda(data, tmp_path_factory):
    return whole('visda22', data, tmp_path_factory.mktemp('visda'), **VISDA)


@pytest.fixture(scope='module')
def ddb(data, tmp_path_factory):
    return whole('ddb', data, tmp_path_factory.mktemp('ddb'), **DDB)


def pictures(cells):
    return sum('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', []))


def told_of(chain):
    return {n.rsplit('-', 1)[0]: read_stamp(chain / n) for n in stages(chain)}


# ---- as a whole, from a shell


def test_visda_from_the_shell(visda, data):
    chain, cells = visda
    s = told_of(chain)
    assert (
        list(s)
        == ['adapt', 'labels', 'predictions', 'self-grid', 'self-noise', 'self-photometric', 'soup']
        and pictures(cells) == 3
    )
    assert all(
        (chain / 'figures' / f'{n}.png').stat().st_size > 3000
        for n in ('labels', 'stages', 'panel')
    )
    # each stage learned what it should, from where it should
    uda, members = (
        at(chain, 'adapt'),
        [at(chain, f'self-{k}') for k in ('photometric', 'noise', 'grid')],
    )
    assert (
        recipe_of(uda).method,
        recipe_of(uda).optim.steps,
        recipe_of(uda).data.augmentations,
        recipe_of(uda).model.init_weights,
    ) == ('daformer', 3, 'none', None)
    for m, a in zip(members, ('photometric', 'noise', 'grid')):
        r = recipe_of(m)
        assert (
            r.method,
            r.optim.steps,
            r.data.augmentations,
            r.model.init_weights,
            r.method_args['selftrain']['pseudo_labels'],
            r.optim.lr,
        ) == (
            'selftrain',
            2,
            a,
            str(weights_of(uda)),
            str(at(chain, 'labels')),
            recipe_of(uda).optim.lr / 10,
        )
        start = build_trainer(r, data, chain / 'x', quiet=True).student.state_dict()
        assert (
            equal(start, state(uda))
            and not equal(state(m), state(uda))
            and len(read_log(m / 'log.jsonl', 99)) == 2
        )
        assert (
            set(read_log(m / 'log.jsonl', 1)[0]) >= {'source/ce', 'lr'}
            and s[m.name.rsplit('-', 1)[0]]['results']['steps'] == 2
        )
    assert len({weights_hash(state(m)) for m in members}) == 3
    # the soup is the mean
    every, mean = [state(m) for m in (uda, *members)], state(at(chain, 'soup'))
    for k, v in mean.items():
        if v.is_floating_point():
            torch.testing.assert_close(
                v, torch.stack([x[k] for x in every]).double().mean(0).float(), rtol=1e-6, atol=1e-6
            )
    # tables
    told, iou = (pd.read_csv(chain / f'{n}.csv', index_col=0) for n in ('summary', 'iou'))
    assert list(told.index) == ['adapted', 'photometric', 'noise', 'grid', 'soup'] == list(
        iou.columns
    ) and list(told) == ['miou', 'entropy', 'balance', 'info']
    for n, f in zip(told.index, (uda, *members, at(chain, 'soup'))):
        m = read_json(f / 'metrics.json')
        assert told.miou[n] == pytest.approx(m['miou']['student']) and told['info'][
            n
        ] == pytest.approx(m['label_free']['student']['info'])
        assert iou[n]['mIoU'] == pytest.approx(told.miou[n], abs=0.01)
        np.testing.assert_allclose(
            iou[n].drop('mIoU'),
            [np.nan if (v := m['iou']['student'][c]) is None else v for c in iou.index[:-1]],
        )
    # labels: sure pixels of the adapted student; predictions: every pixel of the soup, in file size
    kept = s['labels']['results']['labels']['demo_target']['all']
    pngs = [*at(chain, 'labels').rglob('*.png')]
    assert len(pngs) == 3 == kept['images'] and np.mean(
        [read_label(p) != IGNORE for p in pngs]
    ) == pytest.approx(kept['coverage'] / 100)
    f = open_targets(recipe_of(uda), data, 'val')['demo_target']
    for i, n in enumerate(f.names):
        with torch.no_grad():
            z = load_run(at(chain, 'soup'))(normalize(f.image(i))[None]).logits
        want = F.interpolate(z, (64, 128), mode='bilinear').argmax(1)[0].numpy()
        assert (
            read_label((at(chain, 'predictions') / 'demo_target' / 'label' / n).with_suffix('.png'))
            == want
        ).mean() > 0.999


def test_ddb_from_the_shell(ddb, data):
    chain, cells = ddb
    s = told_of(chain)
    assert (
        set(s)
        == {
            f'{n}{k}'
            for n in ('cut', 'class', 'prototypes-cut', 'prototypes-class', 'fusion', 'distill')
            for k in (1, 2)
        }
        and pictures(cells) == 2
    )
    rs = {n: recipe_of(at(chain, n)) for n in s if (at(chain, n) / 'recipe.json').exists()}
    logs = {n: read_log(at(chain, n) / 'log.jsonl', 9) for n in rs}
    assert {n: (r.method, r.optim.steps) for n, r in rs.items()} == {
        f'{n}{k}': (m, 2)
        for n, m in (('cut', 'ddb_cut'), ('class', 'ddb_class'), ('distill', 'distill'))
        for k in (1, 2)
    }
    first = at(chain, 'distill1')
    for n in ('cut', 'class'):  # round 2: from round 1's student, with a tenth of the rate
        assert rs[f'{n}1'].model.init_weights is None and rs[f'{n}2'].model.init_weights == str(
            weights_of(first)
        )
        assert rs[f'{n}2'].optim.lr == pytest.approx(0.1 * rs[f'{n}1'].optim.lr) and [
            a['lr'] / b['lr'] for a, b in zip(logs[f'{n}2'], logs[f'{n}1'])
        ] == pytest.approx([0.1, 0.1])
        assert equal(
            build_trainer(rs[f'{n}2'], data, chain / 'x', quiet=True).student.state_dict(),
            state(first),
        )
    fresh = build_trainer(
        replace_flat(rs['cut1'], method='source_only'), data, chain / 'x', quiet=True
    ).student.state_dict()
    for k in (
        1,
        2,
    ):  # the student: each time from the encoder's weights, with both teachers of the round
        r = rs[f'distill{k}']
        assert (
            r.model.init_weights is None
            and r.optim.lr == rs['cut1'].optim.lr
            and equal(build_trainer(r, data, chain / 'x', quiet=True).student.state_dict(), fresh)
        )
        assert r.method_args['distill'] == dict(
            teachers=[str(weights_of(at(chain, f'{n}{k}'))) for n in ('cut', 'class')],
            soft=False,
            prototypes=[
                str(at(chain, f'prototypes-{n}{k}') / 'prototypes.safetensors')
                for n in ('cut', 'class')
            ],
        )
        assert list(logs[f'distill{k}'][0])[1:3] == ['source/ce', 'target/distill']
    iou = pd.read_csv(chain / 'iou.csv', index_col=0)
    assert list(iou) == [f'{n} {k}' for k in (1, 2) for n in ('cut', 'class', 'fusion', 'student')]
    for title, n, who in (
        ('cut 1', 'cut1', 'student'),
        ('class 2', 'class2', 'student'),
        ('fusion 2', 'fusion2', 'fusion'),
        ('student 2', 'distill2', 'student'),
    ):
        m = read_json(at(chain, n) / 'metrics.json')
        assert iou[title]['mIoU'] == pytest.approx(m['miou'][who], abs=0.01)
        assert list(iou[title].dropna().index[:-1]) == [
            c for c, v in m['iou'][who].items() if v is not None
        ]
    assert all((chain / 'figures' / f'{n}.png').exists() for n in ('stages', 'panel'))


def test_again_nothing_is_done_and_a_change_keeps_what_is_before_it(
    visda, ddb, data, tmp_path, monkeypatch
):
    did = []
    hook(did.append, monkeypatch.setattr)
    for page, (chain, _), params in (('visda22', visda, VISDA), ('ddb', ddb, DDB)):
        was = times(chain)
        pipe = notebook(page, data_root=str(data), out=str(chain), **params)['pipe']
        assert (
            set(pipe.table().state) == {'found'}
            and times(chain) == was
            and not did
            and len(pipe.table()) == len(stages(chain))
        )
    chain = copy(visda[0], tmp_path / 'visda')  # another threshold: the adaptation is shared
    other = VISDA | dict(
        threshold=dict(road=0.9), augment=['noise'], self_steps=1, predict_split=None
    )
    pipe = notebook('visda22', data_root=str(data), out=str(chain), **other)['pipe']
    assert pipe.table().set_index('stage').state.to_dict() == {
        'adapt': 'found',
        'labels': 'made',
        'self-noise': 'made',
        'soup': 'made',
    }
    assert did == ['label 0', 'label 1', 'label 2', 'self-noise 0', 'soup 0', 'score 0'] and set(
        stages(visda[0])
    ) < set(stages(chain))
    did.clear()  # probabilities for labels: both bridges are shared, as is their fusion
    pipe = notebook(
        'ddb',
        data_root=str(data),
        out=str(copy(ddb[0], tmp_path / 'ddb')),
        **DDB | dict(soft=True, rounds=1),
    )['pipe']
    assert list(pipe.table().state) == ['found'] * 5 + ['made'] and did == [
        'distill1 0',
        'distill1 1',
    ]


# ---- killed


@pytest.mark.slow
def test_visda_killed_in_each_stage(visda, data, tmp_path):
    "Each time in another place; each start resumes where the one before was killed"
    params, log = VISDA | dict(data_root=str(data), out=str(tmp_path / 'chain')), tmp_path / 'log'
    for stop, did in (
        ('adapt 2', ['adapt 0', 'adapt 1', 'adapt 2']),
        ('label 1', ['adapt 2', 'label 0', 'label 1']),
        (
            'self-noise 1',
            [
                'label 0',
                'label 1',
                'self-photometric 0',
                'self-photometric 1',
                'self-noise 0',
                'self-noise 1',
            ],
        ),
        ('soup 0', ['self-noise 1', 'self-grid 0', 'self-grid 1', 'soup 0']),
        ('score 0', ['soup 0', 'score 0']),  # there are weights and no stamp
        ('predict 1', ['soup 0', 'score 0', 'predict 0', 'predict 1']),
    ):
        done = stages(tmp_path / 'chain')
        assert kill_at('visda22', log, stop, **params) == did
        name = {'label': 'labels', 'score': 'soup', 'predict': 'predictions'}.get(
            stop.split()[0], stop.split()[0]
        )
        assert (
            set(done) <= set(stages(tmp_path / 'chain'))
            and read_stamp(at(tmp_path / 'chain', name)) is None
        )
    assert finish('visda22', log, **params) == ['predict 0'] and same(tmp_path / 'chain', visda[0])


@pytest.mark.slow
def test_ddb_killed_in_each_stage(ddb, data, tmp_path):
    params = DDB | dict(data_root=str(data), out=str(tmp_path / 'chain'))
    log = tmp_path / 'log'
    protos = [f'prototypes {i}' for i in range(6)]
    for stop, did in (
        ('cut1 1', ['cut1 0', 'cut1 1']),
        ('prototypes 4', ['cut1 1', 'class1 0', 'class1 1', *protos[:5]]),
        ('fusion 1', [*protos[:3], 'fusion 0', 'fusion 1']),
        ('distill1 1', ['fusion 0', 'fusion 1', 'distill1 0', 'distill1 1']),
        ('class2 1', ['distill1 1', 'cut2 0', 'cut2 1', 'class2 0', 'class2 1']),
    ):
        assert kill_at('ddb', log, stop, **params) == did
        assert (
            sum(read_stamp(f) is None for f in (tmp_path / 'chain').iterdir()) == 1
        )  # the one it was killed in
    (tmp_path / 'chain').rename(
        tmp_path / 'moved'
    )  # before the end it moves: recipes of round 2 name files of round 1
    assert finish('ddb', log, **params | dict(out=str(tmp_path / 'moved'))) == [
        'class2 1',
        *protos,
        'fusion 0',
        'fusion 1',
        'distill2 0',
        'distill2 1',
    ]
    assert same(tmp_path / 'moved', ddb[0]) and recipe_of(
        at(tmp_path / 'moved', 'class2')
    ).model.init_weights.startswith(str(tmp_path / 'moved'))


@pytest.mark.slow
def test_the_kernel_is_killed(visda, data, tmp_path):
    "SIGKILL to the process group that papermill started; the same command resumes"
    if shutil.which('pgrep') is None:
        pytest.skip('needs pgrep')
    out = tmp_path / 'chain'
    p, t0 = (
        shell('visda22', tmp_path / 'x.ipynb', data_root=str(data), out=str(out), **VISDA),
        time.time(),
    )
    while not [f for f in out.glob('adapt-*/log.jsonl') if f.read_bytes()]:
        assert p.poll() is None and time.time() - t0 < 240
        time.sleep(0.005)
    (kernel,) = map(
        int,
        subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split(),
    )
    os.killpg(os.getpgid(kernel), signal.SIGKILL)
    said = p.communicate(timeout=120)[1]
    assert (
        p.returncode != 0
        and 'Kernel died' in said
        and not (out / 'summary.csv').exists()
        and at(out, 'adapt')
    )
    notebook('visda22', data_root=str(data), out=str(out), **VISDA)
    assert same(out, visda[0])


# ---- damaged, moved

CASES = dict(  # notebook, stage, what is done to which file; what is done again
    no_checkpoint=('visda22', 'adapt', Path.unlink, 'checkpoint.pt', []),
    no_weights=('visda22', 'adapt', Path.unlink, 'model.safetensors', []),  # from the checkpoint
    no_weights_of_a_member=('visda22', 'self-grid', Path.unlink, 'model.safetensors', []),
    cut_label=(
        'visda22',
        'labels',
        cut,
        '**/*01_*.png',
        ['label 0'],
    ),  # this image, and nothing after it
    no_label=('visda22', 'labels', Path.unlink, '**/*02_*.png', ['label 0']),
    no_journal=(
        'visda22',
        'labels',
        Path.unlink,
        'pseudo.jsonl',
        ['label 0', 'label 1', 'label 2'],
    ),
    cut_soup=('visda22', 'soup', cut, 'model.safetensors', ['soup 0', 'score 0']),
    cut_prediction=('visda22', 'predictions', cut, '**/label/**/*01_*.png', ['predict 0']),
    cut_prototypes=(
        'ddb',
        'prototypes-class1',
        cut,
        'prototypes.safetensors',
        ['prototypes 0', 'prototypes 1', 'prototypes 2'],
    ),
    no_fusion=('ddb', 'fusion1', Path.unlink, 'metrics.json', ['fusion 0', 'fusion 1']),
    no_distilled=('ddb', 'distill1', Path.unlink, 'model.safetensors', []),
    no_teacher=('ddb', 'class2', Path.unlink, 'model.safetensors', []),
)


@pytest.mark.parametrize('case', CASES)
def test_damage_in_a_moved_chain(case, visda, ddb, data, tmp_path, monkeypatch):
    "Only what is missing is made again: its bytes are the old ones, so all later stages are found"
    page, name, harm, file, again = CASES[case]
    before, params = (visda[0], VISDA) if page == 'visda22' else (ddb[0], DDB)
    chain, did = copy(before, tmp_path / 'chain'), []
    (f,) = at(chain, name).glob(file)
    harm(f)
    hook(did.append, monkeypatch.setattr)
    pipe = notebook(page, data_root=str(data), out=str(chain), **params)['pipe']
    tab = pipe.table().set_index('stage').state
    assert (
        did == again
        and tab.pop(name) == ('found' if case == 'no_checkpoint' else 'repaired')
        and set(tab) == {'found'}
        and same(chain, before)
    )


def test_teacher_repaired_in_a_moved_chain_and_the_distillation_resumes(ddb, data, tmp_path):
    "Weights made again contain a recipe with the current paths; the run that learns from them is the same run"
    chain = copy(ddb[0], tmp_path / 'chain')
    weights_of(at(chain, 'cut2')).unlink()
    weights_of(at(chain, 'distill2')).unlink()
    pipe = notebook('ddb', data_root=str(data), out=str(chain), **DDB)['pipe']
    assert list(pipe.table().state).count('repaired') == 2 and same(chain, ddb[0])


# ---- the disk is full


def test_disk_full_while_labels_are_written(visda, data, tmp_path):
    d = tmp_path / 'disk'
    d.mkdir()
    if (
        not hasattr(os, 'geteuid')
        or os.geteuid()
        or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', d], capture_output=True
        ).returncode
    ):
        pytest.skip('needs the right to mount a tmpfs')
    try:
        uda, want = at(visda[0], 'adapt'), at(visda[0], 'labels')

        def label():
            return pseudo_label_stage(
                Pipeline(d / 'chain', True), 'labels', uda, data, 'train', 0.05
            )

        (d / 'ballast').write_bytes(
            bytes((1 << 20) - 5 * 4096)
        )  # five pages: lock, stamp, journal, and two labels of three
        with pytest.raises(OSError) as e:
            label()
        assert e.value.errno == errno.ENOSPC and "in stage 'labels'" in e.value.__notes__[0]
        f = at(d / 'chain', 'labels')
        rows = read_export_journal(f)
        assert (
            read_stamp(f) is None
            and 0 < len(rows) < 3
            and f.name == want.name
            and not [*f.rglob('*.part*')]
        )
        for r in rows.values():
            for n in r['bytes']:
                assert (f / n).read_bytes() == (want / n).read_bytes()
        (d / 'ballast').unlink()
        was = {n: (f / n).stat().st_mtime_ns for r in rows.values() for n in r['bytes']}
        assert (
            label() == f
            and {n: (f / n).stat().st_mtime_ns for n in was} == was
            and output_files(f) == output_files(want)
        )
        assert all(
            (f / n).read_bytes() == (want / n).read_bytes() for n in output_files(f)
        )  # so what follows has the same key
    finally:
        subprocess.run(['umount', '-l', d])


# ---- other starts


def test_encoder_from_a_file(data, tmp_path):
    "Its content counts, not its place: moved, everything is found"
    seed_all(1)
    enc = save_weights(tmp_path / 'a' / 'enc.safetensors', create_backbone('mit_b0', None).body)

    def small(page, **kw):
        return notebook(
            page,
            data_root=str(data),
            out=str(tmp_path / page),
            steps=1,
            overrides=TINY | dict(pretrained=str(enc)),
            **kw,
        )['pipe'].table()

    def both():
        return pd.concat(
            [small('visda22', augment=['noise'], threshold=None), small('ddb', rounds=1)]
        )

    assert set(both().state) == {'made'}
    enc = enc.rename(tmp_path / 'enc.safetensors')
    assert set(both().state) == {'found'}


def test_target_without_labels(data, tmp_path):
    "Label-free scores only; the encoder sees context and detail, two augmentations act at once"
    own = dict(
        mine=dict(
            folder='demo/cityscapes',
            images='leftImg8bit/{split}/*_leftImg8bit.png',
            splits=dict(train='train'),
            space='cityscapes19',
            fit=[64, 128],
        )
    )
    kw = dict(target='mine', datasets=own, data_root=str(data), steps=1, overrides=TINY)
    got = notebook(
        'visda22',
        recipe='mic_hrda',
        augment=[['photometric', 'noise']],
        threshold=None,
        out=str(tmp_path / 'c'),
        **kw,
    )
    tab = pd.read_csv(tmp_path / 'c' / 'summary.csv', index_col=0)
    assert (
        list(tab.index) == ['adapted', 'photometric+noise', 'soup']
        and tab.miou.isna().all()
        and tab['info'].between(0, 1).all()
    )
    assert (
        recipe_of(got['members']['photometric+noise']).data.augmentations
        == ('photometric', 'noise')
        and got['tables']['mine'].coverage['all'] == 100
    )
    table = notebook('ddb', rounds=1, out=str(tmp_path / 'd'), **kw)['table']
    assert table.drop('mIoU').empty and table.isna().all(None)


def test_broken_images_are_left_out(data, tmp_path):
    shutil.copytree(data / 'demo', tmp_path / 'demo')
    bad = sorted((tmp_path / 'demo' / 'cityscapes' / 'leftImg8bit' / 'train').rglob('*.png'))[1]
    cut(bad)

    def go(page, **kw):
        return notebook(page, data_root=str(tmp_path), out=str(tmp_path / page), steps=1, **kw)

    r = train_run(
        make_recipe('source_only', 'demo', overrides=TINY | dict(steps=1)),
        tmp_path,
        tmp_path / 'r',
        True,
    )
    with pytest.raises(ValueError, match=bad.name):
        pseudo_label_stage(Pipeline(tmp_path / 'x', True), 'labels', r, tmp_path)
    with pytest.warns(UserWarning, match='left out'):
        got = go(
            'visda22', augment=['noise'], threshold=None, overrides=TINY | dict(skip_broken=True)
        )
    assert len(read_export_journal(got['labels'])) == 2 and bad.name not in str(
        read_export_journal(got['labels'])
    )
    with pytest.warns(UserWarning, match='left out'):
        assert (
            go('ddb', rounds=1, overrides=TINY | dict(skip_broken=True))['table']
            .loc['mIoU']
            .notna()
            .all()
        )


@pytest.mark.parametrize(
    'source,target,kw',
    [
        (['demo', 'town'], 'demo', {}),
        ('demo', ['demo', 'camvid'], dict(soft=True, prototypes=False)),
    ],
)
def test_ddb_with_several_domains(source, target, kw, data, tmp_path):
    got = notebook(
        'ddb',
        source=source,
        target=target,
        data_root=str(data),
        out=str(tmp_path),
        steps=1,
        rounds=1,
        overrides=TINY,
        **kw,
    )
    r = recipe_of(got['stages']['student 1'])
    assert (r.data.source, r.data.target) == tuple(
        x if isinstance(x, str) else tuple(x) for x in (source, target)
    )
    assert (tmp_path / 'iou.csv').exists() and (len(got['each']) == 4) == (target != 'demo')
    if target != 'demo':
        each = pd.DataFrame(got['each']).T
        whole = [
            got['pipe'].results(f)['miou'][w]
            for f, w in zip(got['stages'].values(), ('student', 'student', 'fusion', 'student'))
        ]
        assert list(each) == ['demo_target', 'camvid'] and np.allclose(each.mean(axis=1), whole)
        assert 'prototypes' not in r.method_args['distill'] and r.method_args['distill']['soft']
    else:
        assert (
            len(open_datasets(r, data)[0]) == 5
            and max(read_stamp(at(tmp_path, 'prototypes-cut1'))['results']['count'].values()) <= 3
        )


# ---- stored labels


def test_only_stored_labels_are_learned(visda, data, tmp_path):
    "Predictions where no label is stored change nothing; neither do the labels that were drawn"
    shutil.copytree(data / 'demo', tmp_path / 'demo')
    for f in (tmp_path / 'demo' / 'cityscapes' / 'gtFine' / 'train').rglob('*.png'):
        f.write_bytes(b'poison')
    labels = Path(shutil.copytree(at(visda[0], 'labels'), tmp_path / 'labels'))
    for f in labels.rglob('*.png'):
        y = read_label(f).copy()
        y[:, 64:] = IGNORE  # the right half has no labels
        Image.fromarray(y).save(f)
    r = make_recipe(
        'selftrain',
        'demo',
        overrides=TINY
        | dict(
            method_args=dict(selftrain=dict(pseudo_labels=str(labels))),
            crop_size=(64, 128),
            cat_max_ratio=None,
            batch_size=3,
            steps=1,
        ),
    )
    t = build_trainer(r, tmp_path, tmp_path / 'r', quiet=True)
    src, tgt, _ = next(iter(t.loader(0)))
    assert tgt is None and t.teacher is None
    stored = {
        n: read_label(labels / f)
        for n, row in read_export_journal(labels).items()
        for f in row['bytes']
    }
    for n, y in zip(src.name, src.lbl.numpy()):
        assert (y == stored[n]).all() or (y == stored[n][:, ::-1]).all()
    free = src.lbl == IGNORE
    assert free.float().mean() >= 0.5 and (~free).any()

    def far(mask, by):
        return 1 - F.max_pool2d(
            1 - mask[:, None].float(), 2 * by + 1, 1, by
        )  # away from everything else

    def grid(mask):
        return far(mask, 8)[:, :, 2::4, 2::4]

    def loss(where):
        bad = t.student.register_forward_hook(
            lambda m, i, o: o._replace(
                logits=o.logits + 1e4 * torch.arange(19.0)[:, None, None] * where
            )
        )
        seed_all(0)
        ((_, parts),) = t.method(Step(src, None, t.model))
        bad.remove()
        return parts['ce'].item()

    clean = loss(torch.zeros(3, 1, 16, 32))
    assert (
        grid(free).sum() > 100
        and loss(grid(free)) == pytest.approx(clean)
        and loss(grid(~free) + grid(~free).eq(0) * 1.0) != pytest.approx(clean)
    )
    assert (
        t.method(
            Step(replace(src, lbl=torch.full_like(src.lbl, IGNORE)), None, t.model)
        ).__next__()[1]['ce']
        == 0
    )  # a crop without labels
    with torch.no_grad():
        seed_all(0)
        z = F.interpolate(t.model(src.img).logits, (64, 128), mode='bilinear')
    assert clean == pytest.approx(F.cross_entropy(z, src.lbl, ignore_index=IGNORE).item(), rel=1e-4)


def test_several_targets(data, tmp_path):
    got = notebook(
        'visda22',
        recipe='dacs',
        target=['demo', 'camvid'],
        data_root=str(data),
        out=str(tmp_path / 'chain'),
        steps=1,
        augment=['grid'],
        threshold=0.05,
        predict_split='val',
        overrides=TINY,
    )
    pipe = got['pipe']
    a = got['uda']
    labels = got['labels']
    r = got['adapt']
    where = label_paths(labels, recipe_of(a))
    assert where == (f'{labels}/demo_target', f'{labels}/camvid') and set(
        pipe.results(labels)['labels']
    ) == {'demo_target', 'camvid'}
    again = recipe_of(got['members']['grid'])
    assert (
        again.method_args['selftrain']['pseudo_labels'] == list(where)
        and list(got['tables']) == ['demo_target', 'camvid']
        and got['summary'].notna().all(None)
    )
    src, _, _ = open_datasets(again, data)
    assert (
        isinstance(src, ConcatSegDataset)
        and len(src) == len(src.labels) == sum(len(read_export_journal(d)) for d in where)
        and len(src.space) == 11
    )
    for i in range(len(src)):
        y = src.label(i)
        assert set(np.unique(y)) <= {*range(11), IGNORE} and str(src.label_path(i)).startswith(
            str(labels)
        )
    for f in got['stages'].values():
        assert set(pipe.results(f)['targets']['student']) == {'demo_target', 'camvid'}
    assert {p.name for p in at(pipe.out, 'predictions').iterdir() if p.is_dir()} == {
        'demo_target',
        'camvid',
    }
    assert max(pipe.results(prototype_stage(pipe, 'prototypes', a, data))['count'].values()) <= len(
        open_datasets(r, data)[1]
    )
    moved = Pipeline(
        copy(tmp_path / 'chain', tmp_path / 'moved'), True
    )  # paths of two folders in one field
    a, labels = at(moved.out, 'adapt'), at(moved.out, 'labels')
    moved.train(
        'self-grid',
        replace_flat(
            again,
            init_weights=str(weights_of(a)),
            method_args=dict(selftrain=dict(pseudo_labels=label_paths(labels, r))),
        ),
        data,
        dict(init=weights_of(a), labels=labels),
    )
    assert list(moved.table().state) == ['found']
    for wrong in (where[0], where[:1], (*where, where[0])):
        with pytest.raises(ValueError, match='for 2 targets; give one folder per target'):
            open_datasets(
                replace_flat(again, method_args=dict(selftrain=dict(pseudo_labels=wrong))), data
            )
    with pytest.raises(ValueError, match='have the dataset camvid, not demo_target'):
        open_datasets(
            replace_flat(again, method_args=dict(selftrain=dict(pseudo_labels=where[::-1]))), data
        )


def test_other_labels_under_the_same_name(visda, data, tmp_path):
    uda, out = at(visda[0], 'adapt'), tmp_path / 'labels'

    def label(threshold):
        shutil.rmtree(out, ignore_errors=True)
        f = open_targets(recipe_of(uda), data, 'train', labels=False)['demo_target']
        export_pseudo(load_run(uda), f, out, f.space, threshold, quiet=True)

    r = make_recipe(
        'selftrain',
        'demo',
        overrides=TINY | dict(method_args=dict(selftrain=dict(pseudo_labels=str(out))), steps=1),
    )
    label(0.05)
    train_run(r, data, tmp_path / 'r', True)
    when = (tmp_path / 'r' / 'model.safetensors').stat().st_mtime_ns
    label(0.3)
    with pytest.raises(
        ValueError,
        match=r'inputs.json belongs to another recipe \(method_args.selftrain.pseudo_labels: .* there, .* here\)',
    ):
        train_run(r, data, tmp_path / 'r', True)
    label(0.05)  # the same labels, written anew
    assert (
        train_run(r, data, tmp_path / 'r', True) / 'model.safetensors'
    ).stat().st_mtime_ns == when


# ---- other notebooks on a chain's folders


def test_greedy_soup_and_evaluation_of_the_chain(visda, data, tmp_path):
    chain = visda[0]
    members = [str(at(chain, n)) for n in ('adapt', 'self-noise')]
    got = notebook(
        'soup',
        members=members,
        how='greedy',
        score='info',
        data_root=str(data),
        out=str(tmp_path / 'soup'),
    )
    for m in members:
        assert got['table']['info'][m] == pytest.approx(
            read_json(Path(m) / 'metrics.json')['label_free']['student']['info'], abs=1e-6
        )
    mean = {
        k: sum(state(m)[k].double() for m in got['chosen']) / len(got['chosen'])
        for k, v in state(members[0]).items()
        if v.is_floating_point()
    }
    for k, v in mean.items():
        torch.testing.assert_close(state(tmp_path / 'soup')[k], v.float(), rtol=1e-6, atol=1e-6)
    got = notebook(
        'evaluate',
        run=str(at(chain, 'soup')),
        data_root=str(data),
        ratios=[0.5],
        flip=True,
        save=True,
        out=str(tmp_path / 'eval'),
    )
    r = got['results']['demo_target']
    m = read_json(at(chain, 'soup') / 'metrics.json')
    assert (
        r['plain']['miou'] == pytest.approx(m['miou']['student'])
        and r['plain']['iou'] == m['iou']['student']
        and set(r) == {'plain', 'tta'}
    )
    assert len([*(tmp_path / 'eval' / 'predictions' / 'label').rglob('*.png')]) == 2


# ---- bad input


@pytest.mark.parametrize(
    'page,kind,said,params',
    [
        ('visda22', ValueError, "did you mean 'threshold'", dict(treshold=0.9)),
        ('visda22', ValueError, "did you mean 'photometric'", dict(augment=['photometrc'])),
        ('visda22', ValueError, "did you mean 'backbone'", dict(overrides=dict(bakbone='x'))),
        ('visda22', ValueError, "did you mean 'daformer'", dict(recipe='dafromer')),
        ('ddb', ValueError, "did you mean 'rounds'", dict(round=1)),
        ('ddb', ValueError, 'rounds 0', dict(rounds=0)),
        ('ddb', ValueError, 'lr_factor 0', dict(lr_factor=0)),
        ('ddb', ValueError, "did you mean 'demo'", dict(source='dem')),
        ('ddb', FileNotFoundError, '-p source demo', dict(source='gta')),
    ],
)
def test_notebooks_stop_at_once(page, kind, said, params, tmp_path):
    with pytest.raises(kind, match=said):
        notebook(
            page,
            **dict(out=str(tmp_path / 'out'), data_root=str(tmp_path / 'nowhere'), overrides=TINY)
            | params,
        )
    assert not [*tmp_path.glob('out/*/*.pt')] and not stages(tmp_path / 'out')


def test_bad_thresholds_and_splits_are_named_before_the_adaptation(data, tmp_path):
    def go(**kw):
        return notebook(
            'visda22', **VISDA | dict(data_root=str(data), out=str(tmp_path / 'out')) | kw
        )

    with pytest.raises(ValueError, match='threshold of road is 9'):
        go(threshold=dict(road=9))
    with pytest.raises(ValueError, match="class of cityscapes19 in threshold.*did you mean 'road'"):
        go(threshold=dict(raod=0.9))
    with pytest.raises(ValueError, match="did you mean 'train'"):
        go(split='trian')
    with pytest.raises(ValueError, match="did you mean 'val'"):
        go(predict_split='vall')
    assert not (tmp_path / 'out').exists()


def test_no_pixel_is_sure(visda, data, tmp_path):
    "A training without a labelled pixel would only shrink weights"
    pipe, uda = Pipeline(tmp_path, True), at(visda[0], 'adapt')
    with pytest.raises(
        ValueError,
        match='threshold 1.0: not one pixel is that sure .mean confidence: demo_target .* Lower it',
    ) as e:
        pseudo_label_stage(pipe, 'labels', uda, data, threshold=1.0)
    assert "in stage 'labels'" in e.value.__notes__[0] and not stages(tmp_path)


def test_labels_belong_to_selftrain(visda):
    labels = str(at(visda[0], 'labels'))
    for m in ('daformer', 'source_only', 'ddb_cut'):
        with pytest.raises(
            ValueError,
            match=f"method_args.selftrain=.*labels-.*the run does not use selftrain .method='{m}'",
        ):
            make_recipe(
                m,
                'demo',
                overrides=TINY | dict(method_args=dict(selftrain=dict(pseudo_labels=labels))),
            )
    assert (
        make_recipe(
            'selftrain',
            'demo',
            overrides=TINY | dict(method_args=dict(selftrain=dict(pseudo_labels=labels))),
        ).method_args['selftrain']['pseudo_labels']
        == labels
    )
