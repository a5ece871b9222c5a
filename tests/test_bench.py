"bench/methods.py: its instruments against known amounts, and its tables in quick mode; tools/opinions.py"

import importlib.util
import re
import subprocess
import sys
import time

import pytest
import torch

from udanb.core.storage import read_json
from udanb.demo.render import write_demo
from udanb.runs.presets import make_recipe
from udanb.runs.run import train_run


@pytest.fixture(scope='module')
def bench(root):
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location('bench_methods', root / 'bench' / 'methods.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    yield m
    torch.set_num_threads(threads)


def test_allocated_is_the_most_at_one_time(bench):
    def f():
        a = torch.ones(2**18)
        b = a + 1  # 2 MiB
        del a
        c = b * 2
        d = c + b  # 3 MiB
        del b, c, d
        torch.ones(2**18)

    assert bench.allocated(f) == 3 * bench.MB


def test_saved_counts_a_storage_once_while_it_is_kept(bench):
    x, w = torch.rand(2**18, requires_grad=True), torch.rand(2**18, requires_grad=True)
    own = bench.storages([x, w])

    def f(n):
        for _ in range(n):  # one graph after the other, like passes
            y = x.exp()  # keeps its result
            (y * y * w).sum().backward()  # keeps y, the same storage, and y*y; w is a parameter
            del y

    assert bench.saved(lambda: f(1), own) == bench.saved(lambda: f(3), own) == 2 * bench.MB
    assert bench.saved(lambda: f(1), {}) == 3 * bench.MB  # nothing excepted: w, too
    kept = []
    with pytest.raises(RuntimeError, match='still held'):
        bench.saved(lambda: kept.append(x.exp().sum()), own)


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_climb_forgets_earlier_peaks(bench):
    torch.ones(2**26).sum()  # 256 MiB that are gone again
    assert bench.climb(lambda: torch.ones(2**24).sum()) == pytest.approx(64 * bench.MB, rel=0.05)


def test_a_child_answers_or_is_missed(bench, capfd):
    assert bench.child(lambda a: dict(a=a + 1), 1) == {'a': 2}
    with pytest.raises(RuntimeError, match='failed in its process'):
        bench.child(lambda: 1 / 0)
    assert 'ZeroDivisionError' in capfd.readouterr().err


def test_clock_tells_work_from_waiting(bench):
    cpu, wall = bench.clock(lambda: time.sleep(0.2))
    assert cpu < 0.1 and wall >= 0.2


def test_every_recipe_is_in_the_middle_of_its_run(bench):
    assert bench.BASE in bench.RUNS and set(bench.ASKED) <= set(bench.RUNS)
    assert {k for k, r in bench.RUNS.items() if r.model.hrda} == {'hrda', 'cluda_hrda'}
    t = bench.trainer('cluda', 'tf_efficientnet_lite0', 64)
    logs = t.step(*bench.pair('cluda', 64))
    assert t.it == bench.RUNS['cluda'].optim.steps // 2 + 1 and {
        'source/ce',
        'source/fd',
        'source/contrast',
        'mixed/ce',
        'mixed/contrast',
    } <= set(logs)
    assert logs['source/fd'] > 0  # the blocks are large enough for its cells


def rows(text, head):
    "The table below a line that begins with `head`, as lists of cells"
    lines = text[text.index(head) :].splitlines()
    end = next((i for i, l in enumerate(lines) if not l.startswith('|')), len(lines))
    return [[c.strip() for c in l.strip('|').split('|')] for l in lines[:end]]


def test_quick_tables(root):
    script = root / 'bench' / 'methods.py'
    stored = script.with_suffix('.md')
    before = stored.read_text() if stored.exists() else None
    run = subprocess.run(
        [sys.executable, str(script), '--quick'], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert before == (stored.read_text() if stored.exists() else None)  # quick runs are not stored
    head, _, *steps = rows(run.stdout, '| recipe |')
    assert head == [
        'recipe',
        'passes',
        'CPU s',
        'wall s',
        'CPU ×',
        'range',
        'wall ×',
        'asked',
        'peak MiB',
        'peak ×',
        'tensors MiB',
        'tensors ×',
        'saved MiB',
        'held MiB',
    ]
    by = {r[0]: dict(zip(head, r)) for r in steps}
    assert list(by) == ['daformer', 'mic'] and all(len(r) == len(head) for r in steps)
    assert (
        by['daformer']['passes'] == '2'
        and by['mic']['passes'] == '3'
        and by['mic']['asked'] == '≤ 1.5'
    )
    assert {by['daformer'][k] for k in ('CPU ×', 'wall ×', 'peak ×', 'tensors ×')} == {
        '**1.00**',
        '1.00',
    }
    assert float(by['mic']['CPU ×'].strip('*')) > 1 and re.fullmatch(
        r'[\d.]+–[\d.]+', by['mic']['range']
    )
    for r in by.values():
        peak, tensors, saved, held = (
            float(r[f'{k} MiB']) for k in ('peak', 'tensors', 'saved', 'held')
        )
        assert peak >= tensors > saved > 0 and held > 0
    assert (
        by['mic']['saved MiB'] == by['daformer']['saved MiB']
    )  # a pass more, but one pass at a time
    head, _, *chunks = rows(run.stdout, '| chunk |')
    assert [r[0] for r in chunks] == ['None', '32'] and float(chunks[1][-1]) < float(chunks[0][-1])


def test_opinions_of_a_run(root, tmp_path):
    "The classifier's row is the run's own score; a bank of the same network has another opinion"
    spec = importlib.util.spec_from_file_location('opinions', root / 'tools' / 'opinions.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    write_demo(tmp_path / 'demo', n_source=4, n_target=4, n_val=2, size=(64, 128), quiet=True)
    tiny = dict(
        backbone='mit_b0',
        pretrained=None,
        embed_dim=16,
        batch_size=2,
        crop_size=(64, 64),
        rcs_min_pixels=8,
        run_baseline=False,
    )
    out = train_run(
        make_recipe('daformer', 'demo', steps=2, overrides=tiny),
        tmp_path,
        tmp_path / 'run',
        quiet=True,
    )
    for which in ('student', 'teacher'):
        t = m.main(
            [
                str(out),
                '--data-root',
                str(tmp_path),
                '--every',
                '1',
                '--batches',
                '2',
                '--which',
                which,
            ]
        )
        assert t.loc['classifier', 'miou'] == pytest.approx(
            read_json(out / 'metrics.json')['miou'][which], abs=0.06
        )
        assert (
            list(t.index) == ['classifier', 'bank', 'mean']
            and t.loc['bank', 'miou'] != t.loc['classifier', 'miou']
        )
