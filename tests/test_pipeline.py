"A chain in real processes: killed in each stage, damaged, moved, out of space, and two at once"

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch import nn

from udanb.checkpoints.weights import load_weights, save_weights
from udanb.core.labels import CITYSCAPES19
from udanb.core.storage import atomic_write, read_json
from udanb.core.types import SegOutput
from udanb.core.utils import seed_all
from udanb.data.catalog import DATASETS
from udanb.data.class_stats import class_stats
from udanb.data.datasets import SegDataset
from udanb.data.pseudo_labels import pseudo_spec
from udanb.demo.render import write_demo
from udanb.inference.export_pseudo_labels import export_pseudo
from udanb.inference.folder import predict_folder
from udanb.models.backbones import create_backbone
from udanb.runs.pipeline import Pipeline
from udanb.runs.presets import make_recipe
from udanb.runs.provenance import input_hashes
from udanb.runs.results import load_run
from udanb.runs.stamps import (
    MISSING_LIST,
    STAMP_FILE,
    content_hash,
    damaged_files,
    output_files,
    read_stamp,
)
from udanb.training.trainer import Trainer

CHILDREN = multiprocessing.get_context(
    'forkserver'
)  # processes of their own that need not import torch again
CHILDREN.set_forkserver_preload(['udanb.runs.pipeline'])
TINY = dict(
    backbone='mit_b0',
    embed_dim=16,
    batch_size=2,
    crop_size=(64, 64),
    rcs=False,
    steps=4,
    save_every=1,
    eval_every=0,
)

# ---- a chain of three: an encoder's weights, a training from them, and something made of the trained network


def note(out, what):
    with open(f'{out}.calls', 'a') as f:
        f.write(what + '\n')


def calls(out):
    "What was done since the last call"
    f = Path(f'{out}.calls')
    said = f.read_text().split('\n')[:-1] if f.exists() else []
    f.unlink(missing_ok=True)
    return said


def at(out, what, stop):
    "Note it; in the right place wait for the end"
    note(out, what)
    if what == stop:
        Path(f'{out}.held').touch()
        time.sleep(120)


def encoder(folder, out, stop):
    def about(p):
        p.write_text('random')

    def weights(p):
        seed_all(1)
        save_weights(p, create_backbone('mit_b0', None).body)

    for n, write in (('about.txt', about), ('mit.safetensors', weights)):

        def slowly(p):
            p.write_bytes(b'half')
            at(out, n, stop)
            write(p)

        if not (folder / n).exists():
            atomic_write(folder / n, slowly)


def brief(folder, out, weights, stop):
    at(out, 'brief', stop)
    atomic_write(
        folder / 'sum.json',
        json.dumps({k: v.double().sum().item() for k, v in load_weights(weights)[0].items()}),
    )
    return dict(tensors=len(load_weights(weights)[0]))


def chain(data, out, stop=None, quiet=True):
    real = Trainer.step

    def step(self, *args):
        at(out, f'step {self.it}', stop)
        return real(self, *args)

    Trainer.step = step
    try:
        pipe = Pipeline(out, quiet)
        a = pipe.stage('encoder', lambda f: encoder(f, out, stop), dict(seed=1))
        r = make_recipe(
            'source_only', 'demo', overrides=TINY | dict(pretrained=str(a / 'mit.safetensors'))
        )
        b = pipe.train('uda', r, data, dict(encoder=a))
        c = pipe.stage(
            'brief',
            lambda f: brief(f, out, b / 'model.safetensors', stop),
            inputs=dict(weights=b / 'model.safetensors'),
        )
    finally:
        Trainer.step = real
    return pipe, a, b, c


def start(data, out, stop=None):
    p = CHILDREN.Process(target=chain, args=(str(data), str(out), stop))
    p.start()
    return p


def wait_for(what, seconds=120):
    t0 = time.time()
    while not what():
        assert time.time() - t0 < seconds, f'not reached in {seconds} s'
        time.sleep(0.02)


def kill_at(data, out, stop):
    "Start the chain, kill it in that place, and say what it did"
    p, held = start(data, out, stop), Path(f'{out}.held')
    wait_for(lambda: held.exists() or p.exitcode is not None)
    assert p.exitcode is None, 'it ended before'
    p.kill()
    p.join()
    held.unlink()
    assert p.exitcode == -signal.SIGKILL
    return calls(out)


def finish(data, out):
    p = start(data, out)
    p.join(240)
    assert p.exitcode == 0
    return calls(out)


def stage_of(out, name):
    return next(Path(out).glob(f'{name}-*'))


def names(out):
    return sorted(f.name for f in Path(out).iterdir())


def sound(out):
    return all(
        (s := read_stamp(f)) and not damaged_files(f, s) and not [*f.rglob('*.part*')]
        for f in Path(out).iterdir()
    )


STEPS = [f'step {i}' for i in range(4)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_demo(root / 'demo', n_source=4, n_target=4, n_val=2, size=(64, 128))
    return root


@pytest.fixture(scope='module')
def ready_made(data, tmp_path_factory):
    "The chain as it comes out when nothing goes wrong"
    out = tmp_path_factory.mktemp('whole') / 'chain'
    assert finish(data, out) == ['about.txt', 'mit.safetensors', *STEPS, 'brief'] and sound(out)
    return out


@pytest.fixture
def made(ready_made, tmp_path):
    return Path(shutil.copytree(ready_made, tmp_path / 'chain'))  # in another folder, so also moved


# ---- killed


def test_killed_in_each_stage(data, ready_made, tmp_path):
    "Finished stages stay, the interrupted one resumes, and the result is the same to the bit"
    out = tmp_path / 'chain'
    assert kill_at(data, out, 'mit.safetensors') == ['about.txt', 'mit.safetensors']
    a = stage_of(out, 'encoder')
    assert (
        output_files(a) == ['about.txt'] and read_stamp(a) is None and [*a.glob('.mit*.part*')]
    )  # a part of the file is left
    assert kill_at(data, out, 'step 2') == ['mit.safetensors', 'step 0', 'step 1', 'step 2']
    b = stage_of(out, 'uda')
    assert (
        read_stamp(a)
        and not [*a.glob('.*.part*')]
        and read_stamp(b) is None
        and (b / 'checkpoint.pt').exists()
    )
    assert kill_at(data, out, 'brief') == ['step 2', 'step 3', 'brief']
    assert read_stamp(b) and read_stamp(stage_of(out, 'brief')) is None
    assert finish(data, out) == ['brief']
    assert finish(data, out) == [] and sound(out) and names(out) == names(ready_made)


def test_checkpoint_of_an_interrupted_training(data, ready_made, tmp_path):
    "Damaged, the error names it; removed, the training starts again"
    out = tmp_path / 'chain'
    kill_at(data, out, 'step 2')
    b = stage_of(out, 'uda')
    cut(b / 'checkpoint.pt')
    with pytest.raises(
        ValueError, match='checkpoint.pt: not a readable checkpoint.*Remove it'
    ) as e:
        chain(data, out)
    assert "in stage 'uda'" in e.value.__notes__[0] and read_stamp(b) is None and calls(out) == []
    (b / 'checkpoint.pt').unlink()
    assert finish(data, out) == [*STEPS, 'brief'] and sound(out) and names(out) == names(ready_made)


def test_interrupted_chain_is_moved(data, ready_made, tmp_path):
    "The recipe contains the path of the encoder's weights: after a move the run still resumes"
    kill_at(data, tmp_path / 'a', 'step 2')
    os.rename(tmp_path / 'a', tmp_path / 'b')
    assert finish(data, tmp_path / 'b') == ['step 2', 'step 3', 'brief'] and names(
        tmp_path / 'b'
    ) == names(ready_made)
    there = stage_of(tmp_path / 'b', 'encoder') / 'mit.safetensors'
    assert read_json(stage_of(tmp_path / 'b', 'uda') / 'recipe.json')['pretrained'] == str(there)


# ---- damaged


def cut(f):
    f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])


def flip(f):
    b = bytearray(f.read_bytes())
    b[-5] ^= 1
    f.write_bytes(b)


def drop_row(f):
    f.write_text(''.join(f.read_text().splitlines(True)[:-1]))


# stage, what is done to which of its files, what is done again
DAMAGE = dict(
    no_checkpoint=('uda', [(Path.unlink, 'checkpoint.pt')], []),  # not needed any more
    no_weights=(
        'uda',
        [(Path.unlink, 'model.safetensors')],
        [],
    ),  # from the checkpoint, without a step
    cut_weights=('uda', [(cut, 'model.safetensors')], []),
    flipped_bit=('uda', [(flip, 'model.safetensors')], []),
    cut_metrics=('uda', [(cut, 'metrics.json')], []),
    no_recipe=('uda', [(Path.unlink, 'recipe.json')], []),
    cut_stamp=('uda', [(cut, STAMP_FILE)], []),
    cut_stamp_and_weights=('uda', [(cut, STAMP_FILE), (cut, 'model.safetensors')], []),
    lost_row=('uda', [(drop_row, 'log.jsonl')], STEPS),  # nothing can bring the row back
    no_weights_no_checkpoint=(
        'uda',
        [(Path.unlink, 'model.safetensors'), (Path.unlink, 'checkpoint.pt')],
        STEPS,
    ),
    cut_file=('encoder', [(cut, 'about.txt')], ['about.txt']),  # only this one
    no_file=('encoder', [(Path.unlink, 'mit.safetensors')], ['mit.safetensors']),
    cut_last=('brief', [(cut, 'sum.json')], ['brief']),
    empty_stamp=('brief', [(lambda f: f.write_bytes(b''), STAMP_FILE)], ['brief']),
)


@pytest.mark.parametrize('case', DAMAGE)
def test_damage_is_repaired_and_nothing_else_done(case, data, made, ready_made):
    name, harms, again = DAMAGE[case]
    for harm, file in harms:
        harm(stage_of(made, name) / file)
    pipe, _, b, _ = chain(data, made)
    found = [case == 'no_checkpoint' or f != stage_of(made, name) for f in pipe.rows]
    assert calls(made) == again and [s == 'found' for s in pipe.table().state] == found
    assert sound(made) and names(made) == names(
        ready_made
    )  # the next stages were found: the bytes are the same
    assert (
        pipe.table().miou.notna().tolist() == [False, True, False]
        and pipe.results(b)['steps'] == 4
        and load_run(b)
    )
    assert (
        Pipeline(made, True).stage('encoder', None, dict(seed=1)).is_dir()
    )  # `None` cannot be called: nothing is


# ---- nothing is stamped with a hole


class Colours(nn.Module):
    "Counts its forwards"

    def __init__(self):
        super().__init__()
        seed_all(0)
        self.conv, self.calls = nn.Conv2d(3, 19, 4, stride=4), 0

    def forward(self, img):
        self.calls += 1
        return SegOutput(self.conv(img))


def answers(data, out):
    "A stage of two folders of predictions, and one of pseudo-labels; the last value is the number of images predicted"
    net, folder = Colours(), SegDataset(DATASETS['demo_target'], data, 'train', labels=False)

    def predict(f):
        for n in ('a', 'b'):
            predict_folder(net, folder, f / n, CITYSCAPES19, quiet=True)

    pipe = Pipeline(out, True)
    p = pipe.stage('predict', predict)
    q = pipe.stage(
        'pseudo',
        lambda f: (
            export_pseudo(net, folder, f, CITYSCAPES19, 0.05, confidence=True, quiet=True) and None
        ),
    )
    return pipe, p, q, net.calls


@pytest.fixture(scope='module')
def answered(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('answers') / 'chain'
    assert answers(data, out)[3] == 12
    return out


# stage, what is done to the first file of that name, how many images are predicted again (of four in each folder)
HOLES = dict(
    cut_colour=('predict', [('cut', 'a/color/**/*.png')], 1),
    no_colour=('predict', [('no', 'b/color/**/*.png')], 1),
    no_label=('predict', [('no', 'b/label/**/*.png')], 1),
    cut_record=('predict', [('cut', 'a/predict.json')], 4),
    no_record=('predict', [('no', 'b/predict.json')], 4),
    no_records=('predict', [('no', 'a/predict.json'), ('no', 'b/predict.json')], 8),
    record_and_colour=('predict', [('cut', 'a/predict.json'), ('cut', 'a/color/**/*.png')], 4),
    pseudo_cut_record=('pseudo', [('cut', 'pseudo.json')], 4),
    pseudo_no_record=('pseudo', [('no', 'pseudo.json')], 4),
    pseudo_no_record_no_journal=('pseudo', [('no', 'pseudo.json'), ('no', 'pseudo.jsonl')], 4),
    pseudo_record_and_stamp=('pseudo', [('no', 'pseudo.json'), ('cut', STAMP_FILE)], 4),
    pseudo_cut_label=('pseudo', [('cut', 'gtFine/**/*.png')], 1),
    pseudo_cut_confidence=('pseudo', [('cut', 'confidence/**/*.png')], 1),
)


@pytest.mark.parametrize('case', HOLES)
def test_holes_are_filled(case, data, answered, tmp_path):
    "All files are there again with the same bytes, and only the necessary ones were made again"
    out = Path(shutil.copytree(answered, tmp_path / 'chain'))
    name, harms, again = HOLES[case]
    for how, what in harms:
        dict(cut=cut, no=Path.unlink)[how](next(stage_of(out, name).glob(what)))
    pipe, p, q, n = answers(data, out)
    assert n == again and list(pipe.table().state).count('found') == 1 and sound(out)
    for f in (p, q):
        assert {x: (f / x).read_bytes() for x in output_files(f)} == {
            x: (answered / f.name / x).read_bytes() for x in output_files(answered / f.name)
        }
        assert not (f / MISSING_LIST).exists()
    assert answers(data, out)[3] == 0


def test_a_hole_that_is_not_filled(data, answered, tmp_path):
    "However often the chain is started, there is no stamp until the file exists again"
    out = Path(shutil.copytree(answered, tmp_path / 'chain'))
    f = stage_of(out, 'predict')
    x = next(f.glob('a/color/**/*.png'))
    whole_file = x.read_bytes()
    x.unlink()
    for _ in range(3):
        with pytest.raises(
            RuntimeError,
            match=f"stage 'predict': its function did not make these missing files again: a/color/.*{x.name}",
        ):
            Pipeline(out, True).stage('predict', lambda folder: None)
        assert read_stamp(f) is None
    pipe, p, _, n = answers(data, out)
    assert (
        (n, x.read_bytes(), p) == (1, whole_file, f)
        and pipe.table().state[0] == 'repaired'
        and sound(out)
    )


@pytest.mark.parametrize('what', ['a/predict.json', 'b/color/**/*.png'])
def test_killed_while_repairing(what, data, answered, tmp_path, monkeypatch):
    "Between the removal of what is damaged, the stamp's, and the repair: the list outlives it"
    out = Path(shutil.copytree(answered, tmp_path / 'chain'))
    f = stage_of(out, 'predict')
    cut(next(f.glob(what)))
    removed, unlink = [], Path.unlink

    def stop_at(n):
        def stops(p, *args, **kw):
            if len(removed) == n:
                raise KeyboardInterrupt
            removed.append(p)
            return unlink(p, *args, **kw)

        return stops

    for n in range(3):  # each time one file further
        with monkeypatch.context() as m:
            m.setattr(Path, 'unlink', stop_at(n))
            removed.clear()
            with pytest.raises(KeyboardInterrupt):
                answers(data, out)

    def die(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline(out, True).stage('predict', die)
    assert (
        answers(data, out)[3] == (4 if what.endswith('json') else 1)
        and sound(out)
        and not (f / MISSING_LIST).exists()
    )
    assert all(
        (f / x).read_bytes() == (answered / f.name / x).read_bytes()
        for x in output_files(answered / f.name)
    )


def test_a_damaged_list(tmp_path):
    pipe = Pipeline(tmp_path, True)
    f = pipe.stage('x', lambda folder: atomic_write(folder / 'x.txt', 'x') and None)
    (f / 'x.txt').unlink()
    for text in ('["x.t', '7'):
        (f / MISSING_LIST).write_text(text)
        with pytest.raises(ValueError, match='.lost: damaged .* Remove .*x-'):
            pipe.stage('x', lambda folder: None)


def test_statistics_of_labels_are_no_part_of_them(data, answered, tmp_path):
    "A training on the labels writes their statistics beside them; repaired later, the labels are still the same input"
    out = Path(shutil.copytree(answered, tmp_path / 'chain'))
    f = stage_of(out, 'pseudo')
    before = content_hash(f)
    class_stats(
        SegDataset(pseudo_spec(DATASETS['demo_target'], f, CITYSCAPES19), data, 'train'), quiet=True
    )
    assert any('class_stats' in p.name for p in f.iterdir())
    cut(next(f.glob('gtFine/**/*.png')))
    assert answers(data, out)[3] == 1 and content_hash(f) == before


# ---- a run that ends in an average


def averaged(data, chain, fail=None):
    "A run that starts from the chain's, in two cycles of two steps"
    real, out = Trainer.step, Path(chain)

    def step(self, *args):
        if self.it == fail:
            raise KeyboardInterrupt
        note(out, f'step {self.it}')
        return real(self, *args)

    Trainer.step = step
    w = stage_of(out, 'uda') / 'model.safetensors'
    r = make_recipe(
        'source_only',
        'demo',
        overrides=TINY | dict(pretrained=None, init_weights=str(w), swa_cycles=2),
    )
    pipe = Pipeline(out, True)
    try:
        return pipe, pipe.train('swa', r, data, dict(start=w)), r
    finally:
        Trainer.step = real


@pytest.fixture(scope='module')
def averages(data, ready_made, tmp_path_factory):
    out = Path(shutil.copytree(ready_made, tmp_path_factory.mktemp('swa') / 'chain'))
    f = averaged(data, out)[1]
    assert calls(out) == STEPS and set(output_files(f)) == {
        'recipe.json',
        'inputs.json',
        'log.jsonl',
        'metrics.json',
        'model.safetensors',
        'swa.safetensors',
        'snapshots/2.safetensors',
        'snapshots/4.safetensors',
    }
    return out


SWA = dict(  # what is done to which file; what is done again
    no_snapshot=([('no', 'snapshots/2.safetensors')], STEPS),  # only training brings it back
    cut_snapshot=([('cut', 'snapshots/4.safetensors')], STEPS),
    cut_snapshot_and_stamp=([('cut', 'snapshots/4.safetensors'), ('cut', STAMP_FILE)], STEPS),
    no_average=([('no', 'swa.safetensors')], []),
    cut_average_and_stamp=([('cut', 'swa.safetensors'), ('cut', STAMP_FILE)], []),
    no_average_no_checkpoint=([('no', 'swa.safetensors'), ('no', 'checkpoint.pt')], STEPS),
    no_inputs=([('no', 'inputs.json')], []),
    no_inputs_no_checkpoint=([('no', 'inputs.json'), ('no', 'checkpoint.pt')], []),
    cut_inputs_and_stamp=([('cut', 'inputs.json'), ('cut', STAMP_FILE)], []),
    cut_recipe_and_stamp=([('cut', 'recipe.json'), ('cut', STAMP_FILE)], []),
)


@pytest.mark.parametrize('case', SWA)
def test_damaged_average_is_repaired(case, data, averages, tmp_path):
    out = Path(shutil.copytree(averages, tmp_path / 'chain'))
    harms, again = SWA[case]
    for how, what in harms:
        dict(cut=cut, no=Path.unlink)[how](stage_of(out, 'swa') / what)
    _, f, r = averaged(data, out)
    was = averages / f.name
    assert (
        calls(out) == again
        and sound(out)
        and output_files(f) == output_files(was)
        and read_json(f / 'inputs.json') == input_hashes(r)
    )
    assert [content_hash(x) for x in sorted(f.rglob('*.safetensors'))] == [
        content_hash(x) for x in sorted(was.rglob('*.safetensors'))
    ]
    assert averaged(data, out)[0].table().state[0] == 'found' and calls(out) == []


@pytest.mark.parametrize('harm,again', [(None, STEPS[3:]), ('snapshots/2.safetensors', STEPS)])
def test_interrupted_average(harm, again, data, averages, ready_made, tmp_path):
    "Interrupted in the second cycle it resumes there, if the first one's snapshot still exists"
    out = Path(shutil.copytree(ready_made, tmp_path / 'chain'))
    with pytest.raises(KeyboardInterrupt):
        averaged(data, out, fail=3)
    assert calls(out) == STEPS[:3]
    if harm:
        (stage_of(out, 'swa') / harm).unlink()
    f = averaged(data, out)[1]
    assert calls(out) == again and content_hash(f / 'swa.safetensors') == content_hash(
        averages / f.name / 'swa.safetensors'
    )


def test_inputs_made_again_elsewhere(data, averages, tmp_path):
    "Weights made again have other paths in their metadata, but the same tensors: the stage is repaired, not refused"
    out = Path(shutil.copytree(averages, tmp_path / 'chain'))
    w = stage_of(out, 'uda') / 'model.safetensors'
    state, about = load_weights(w)
    save_weights(w, state, {k: v for k, v in about.items() if k != 'hash'} | dict(made='elsewhere'))
    (stage_of(out, 'swa') / 'model.safetensors').unlink()
    (stage_of(out, 'swa') / 'inputs.json').write_text('{"init": "0"}')
    _, f, r = averaged(data, out)
    assert (
        f.name == stage_of(averages, 'swa').name
        and calls(out) == []
        and read_json(f / 'inputs.json') == input_hashes(r)
    )


def test_stamp_of_another_stage(data, made):
    a, c = stage_of(made, 'encoder'), stage_of(made, 'brief')
    shutil.copy(a / STAMP_FILE, c / STAMP_FILE)
    with pytest.raises(
        ValueError,
        match='belongs to another stage .*stage: encoder there, brief here.*Move or remove',
    ) as e:
        chain(data, made)
    assert calls(made) == [] and "in stage 'brief'" in e.value.__notes__[0]


def test_other_settings_and_other_bytes_are_other_stages(data, made):
    pipe = Pipeline(made, True)
    inp = stage_of(made, 'brief') / 'sum.json'
    one = pipe.stage('x', lambda f: None, dict(lr=1), dict(i=inp))
    two = pipe.stage('x', lambda f: None, dict(lr=2), dict(i=inp))
    inp.write_text('{}')
    three = pipe.stage('x', lambda f: None, dict(lr=1), dict(i=inp))
    assert len({one, two, three}) == 3 and list(pipe.table().state) == ['made'] * 3
    r = make_recipe('source_only', 'demo', overrides=TINY | dict(pretrained=str(inp)))
    with pytest.raises(ValueError, match="stage 'uda': the recipe reads .*sum.json"):
        pipe.train('uda', r, data)


# ---- two at once


def forks(folder, out):
    "A stage with a child that outlives it, as a loader's worker does for some seconds"
    if not (pid := os.fork()):
        time.sleep(60)
        os._exit(0)
    Path(f'{out}.child').write_text(str(pid))
    at(out, 'forked', 'forked')


def fork_stage(out):
    Pipeline(out, True).stage('fork', lambda f: forks(f, out))


def test_two_processes_at_once(tmp_path):
    out = tmp_path / 'chain'
    p = CHILDREN.Process(target=fork_stage, args=(str(out),))
    p.start()
    wait_for(lambda: Path(f'{out}.held').exists())

    def mine():
        return Pipeline(out, True).stage('fork', lambda f: note(out, 'mine'))

    with pytest.raises(
        RuntimeError, match=rf"fork-\w+: another process \(pid {p.pid}\) is making stage 'fork'"
    ):
        mine()
    assert calls(out) == ['forked']
    child = int(Path(f'{out}.child').read_text())
    p.kill()
    p.join()
    try:
        os.kill(child, 0)  # the child lives, but does not hold the lock
        mine()
    finally:
        os.kill(child, signal.SIGKILL)
    assert calls(out) == ['mine']


# ---- the disk is full


@pytest.fixture
def small(tmp_path):
    "A disk of 3 MiB, and how to make it larger"
    d = tmp_path / 'disk'
    d.mkdir()

    def mount(*a):
        return subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', *a, 'tmpfs', d], capture_output=True
        ).returncode

    if shutil.which('mount') is None or mount('size=3m'):
        pytest.skip('needs the right to mount a tmpfs')
    yield d, lambda size: mount(f'remount,size={size}')
    subprocess.run(['umount', '-l', d], check=True)


def fill(f):
    with open(f, 'wb', buffering=0) as o:
        try:
            while o.write(bytes(4096)):
                pass
        except OSError as e:
            assert e.errno == errno.ENOSPC


def test_disk_full_between_files(small, tmp_path):
    d, out = small[0], small[0] / 'chain'
    (d / 'ballast').write_bytes(bytes(1 << 20))

    def four(folder):
        for i in range(4):
            if (f := folder / f'{i}.bin').exists():
                continue
            note(tmp_path / 'n', str(i))
            atomic_write(f, bytes([i]) * (600 << 10))

    for did in (['0', '1', '2', '3'], ['3']):  # 3 MiB hold three of them beside the ballast
        with pytest.raises(OSError) as e:
            Pipeline(out, True).stage('four', four)
        assert (
            e.value.errno == errno.ENOSPC
            and "in stage 'four'" in e.value.__notes__[0]
            and calls(tmp_path / 'n') == did
        )
        f = stage_of(out, 'four')
        assert (
            read_stamp(f) is None
            and output_files(f) == ['0.bin', '1.bin', '2.bin']
            and not [*f.glob('.*.part*')]
        )
    (d / 'ballast').unlink()
    pipe = Pipeline(out, True)
    pipe.stage('four', four)
    assert calls(tmp_path / 'n') == ['3'] and list(pipe.table().state) == ['made'] and sound(out)


def test_disk_full_when_the_stamp_is_written(small):
    d, out = small[0], small[0] / 'chain'

    def greedy(folder):
        atomic_write(folder / 'x.bin', b'x' * 9000)
        fill(d / 'ballast')

    with pytest.raises(OSError) as e:
        Pipeline(out, True).stage('greedy', greedy)
    f = stage_of(out, 'greedy')
    assert (
        e.value.errno == errno.ENOSPC
        and not (f / STAMP_FILE).exists()
        and output_files(f) == ['x.bin']
    )
    (d / 'ballast').unlink()
    with pytest.raises(OSError):
        Pipeline(out, True).stage('greedy', greedy)  # the disk is filled again
    (d / 'ballast').unlink()
    assert Pipeline(out, True).stage('greedy', lambda folder: None) == f and sound(out)


def test_disk_full_in_training(small, data, ready_made):
    d, larger = small
    out = d / 'chain'
    assert larger('30m') == 0  # the encoder, 13 MiB, and no checkpoint
    with pytest.raises((OSError, RuntimeError)) as e:
        chain(data, out)
    b = stage_of(out, 'uda')
    assert (
        "in stage 'uda'" in e.value.__notes__[0]
        and read_stamp(b) is None
        and not (b / 'checkpoint.pt').exists()
        and not [*b.glob('.*.part*')]
    )
    did = Path(f'{out}.calls').read_text().split()
    assert did[:2] == ['about.txt', 'mit.safetensors'] and larger('300m') == 0
    calls(out)
    assert finish(data, out) == [*STEPS, 'brief'] and sound(out) and names(out) == names(ready_made)
