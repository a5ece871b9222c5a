"A grid as real processes: killed and started again, with a run that fails, and the notebook"

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from udanb.core.storage import read_json, write_json
from udanb.demo.render import write_demo
from udanb.runs.grid import (
    NOTEBOOK_PARAMETERS,
    make_grid,
    results_table,
    seed_summary,
    show_grid,
)
from udanb.runs.grid_runner import last_error_line, run_grid, start_run
from udanb.runs.recipe import recipe_dict

ENV = os.environ | dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', IN_TEST='1')
SMALL = dict(
    backbone='mit_b0',
    pretrained=None,
    embed_dim=16,
    batch_size=2,
    crop_size=(64, 64),
    rcs_min_pixels=8,
    steps=2,
)

# what a run looks like from outside: it notes its start, logs step by step, and ends with metrics.json; dacs fails
FAKE = '''import json, os, pathlib, time
f = pathlib.Path(out)
f.mkdir(exist_ok=True)
with open(f / 'starts', 'a') as s:
    s.write(f'{os.getpid()}\\n')
if recipe == 'dacs':
    raise RuntimeError('it broke\\nfor a reason')
for i in range(overrides['steps']):
    with open(f / 'log.jsonl', 'a') as l:
        l.write('{}\\n')
    time.sleep(0.1 if seed else 0)
metrics = dict(miou=dict(student=30.0 + seed), steps=overrides['steps'], seconds=6, peak_mib=1)
(f / 'metrics.json').write_text(json.dumps(metrics))'''


def notebook(path):
    def code(i, src, *tags):
        return dict(
            cell_type='code',
            id=f'c{i}',
            metadata=dict(tags=list(tags)),
            source=src,
            outputs=[],
            execution_count=None,
        )

    path.write_text(
        json.dumps(
            dict(
                cells=[code(0, 'seed=0', 'parameters'), code(1, FAKE)],
                nbformat=4,
                nbformat_minor=5,
                metadata=dict(
                    kernelspec=dict(name='python3', display_name='python3', language='python')
                ),
            )
        )
    )
    return path


SCRIPT = '''
import sys
from udanb.core.storage import write_json
from udanb.runs.grid import make_grid
from udanb.runs.grid_runner import run_grid
from udanb.runs.recipe import recipe_dict

small = dict(backbone='mit_b0', weights=None, steps=30)
specs = make_grid(sys.argv[1], ['source_only', 'dacs'], [0, 1], [['demo', None]], small)
for spec in specs:
    write_json(spec.out / 'recipe.json', recipe_dict(spec.recipe))
run_grid(specs, 1, sys.argv[2], every=0.1).to_csv(sys.argv[1] + '/table.csv')
'''


def wait_for(what, seconds=120):
    t0 = time.time()
    while not what():
        assert time.time() - t0 < seconds, f'not reached in {seconds} s'
        time.sleep(0.02)


def test_killed_grid_is_taken_up_again(tmp_path):
    "The grid is killed during its second run; the next grid waits for that run, and starts no run twice"
    nb, out = notebook(tmp_path / 'fake.ipynb'), tmp_path / 'grid'

    def go():
        return subprocess.Popen(
            [sys.executable, '-c', SCRIPT, str(out), str(nb)],
            env=ENV,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    jobs = make_grid(
        out,
        ['source_only', 'dacs'],
        [0, 1],
        [['demo', None]],
        dict(backbone='mit_b0', weights=None, steps=30),
    )
    second, p = jobs[1], go()
    wait_for(lambda: p.poll() is not None or second.steps() >= 3)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert list(results_table(jobs).state) == ['finished', 'waiting', 'waiting', 'waiting']
    assert start_run(second, nb) is None  # its process is alive and holds the lock
    p = go()
    err = p.communicate(timeout=240)[1]
    assert p.returncode == 0, err
    table = results_table(jobs)
    assert (
        list(table.state) == ['finished', 'finished', 'failed', 'failed']
        and list(table.error[2:]) == ['RuntimeError: it broke'] * 2
    )
    assert [(j.out / 'starts').read_text().count('\n') for j in jobs] == [
        1,
        1,
        1,
        1,
    ] and second.steps() == 30
    assert '2/4 runs, 2 failed' in err and '<' in err  # the bar, with its ETA
    s = seed_summary(table)
    assert (
        list(s.index) == [('demo→demo', 'source_only')]
        and s.miou.iloc[0] == '30.5 ± 0.7'
        and show_grid(table).axes[0].get_title() == 'demo→demo'
    )


def test_killed_child_is_reported_and_tried_again(tmp_path):
    nb = notebook(tmp_path / 'fake.ipynb')
    jobs = make_grid(
        tmp_path / 'g',
        ['source_only'],
        [1],
        [['demo', None]],
        dict(backbone='mit_b0', weights=None, steps=30),
    )
    write_json(jobs[0].out / 'recipe.json', recipe_dict(jobs[0].recipe))

    def kill():
        wait_for(lambda: jobs[0].steps() >= 2)
        kernel = int((jobs[0].out / 'starts').read_text().split()[0])
        os.kill(kernel, signal.SIGKILL)

    t = threading.Thread(target=kill)
    t.start()
    table = run_grid(jobs, 1, nb, every=0.1, quiet=True)
    t.join()
    assert (
        table.state[0] == 'failed'
        and 'Kernel died' in table.error[0]
        and pd.isna(table.miou[0])
        and 0 < table.steps[0] < 30
    )
    (jobs[0].out / 'log.jsonl').unlink()
    assert (
        run_grid(jobs, 1, nb, every=0.1, quiet=True).state[0] == 'finished'
        and not jobs[0].file('failed').exists()
    )


def test_grid_from_files_and_refusals(tmp_path):
    jobs = make_grid(
        tmp_path,
        params=['params/town_dacs.yaml', 'params/town_daformer_T01.yaml'],
        seeds=[0, 1],
        overrides=dict(steps=7),
    )
    assert (
        [j.label for j in jobs] == ['town_dacs'] * 2 + ['town_daformer_T01'] * 2
        and jobs[2].recipe.data.rcs_temperature == 0.1
        and {j.recipe.optim.steps for j in jobs} == {7}
    )
    assert len({j.name for j in jobs}) == 4 and not jobs[0].recipe.execution.run_baseline
    assert (
        make_grid(tmp_path, params=['params/town_dacs.yaml'], data_root='elsewhere')[0].params[
            'data_root'
        ]
        == 'elsewhere'
    )
    both = make_grid(
        tmp_path, ['dacs'], [0], [[['gta', 'synscapes'], 'cityscapes'], ['demo', None]]
    )
    assert [j.pair for j in both] == ['gta+synscapes→cityscapes', 'demo→demo']
    for bad, said in (
        (dict(recipes=['dasc'], pairs=[['demo', None]]), "did you mean 'dacs'"),
        (dict(recipes=['dacs'], pairs=[['dmeo', None]]), 'demo'),
        (dict(recipes=['dacs']), 'empty'),
        (
            dict(recipes=['dacs'], pairs=[['demo', None]], overrides=dict(stpes=3)),
            "did you mean 'steps'",
        ),
        (dict(recipes=['dacs', 'dacs'], pairs=[['demo', None]]), 'more than once'),
    ):
        with pytest.raises(ValueError, match=said):
            make_grid(tmp_path, **bad)


def test_another_recipe_in_the_folder_is_not_taken_for_this_one(tmp_path):
    (j,) = make_grid(tmp_path, ['dacs'], [0], [['demo', None]])
    write_json(j.out / 'metrics.json', {})
    write_json(j.out / 'recipe.json', recipe_dict(j.recipe) | dict(lr=1.0))
    assert not j.done()
    write_json(j.out / 'recipe.json', recipe_dict(j.recipe))
    assert j.done()


def test_last_error_of_several():
    between = 'During handling of the above exception, another exception occurred:'
    text = f'KeyError: 1\n\n{between}\n\nudanb.x.MyError: two\nmore words\n'
    assert (
        last_error_line(text, 1) == 'udanb.x.MyError: two'
        and last_error_line(text, -15) == 'killed by signal 15'
    )
    assert last_error_line('a: b\nKeyboardInterrupt\n', 1) == 'KeyboardInterrupt'


def test_notebook_with_a_run_that_fails(tmp_path):
    "Two runs through the real notebooks: one has no data, the other ends; a second grid trains nothing"
    write_demo(
        tmp_path / 'data' / 'demo', n_source=4, n_target=4, n_val=2, size=(64, 128), quiet=True
    )
    p = dict(
        name='t',
        recipes=['source_only'],
        seeds=[0],
        pairs=[['gta', None], ['demo', None]],
        overrides=SMALL | dict(crop_size=[64, 64]),
        data_root=str(tmp_path / 'data'),
        out=str(tmp_path / 'grid'),
    )
    (tmp_path / 'p.yaml').write_text(yaml.safe_dump(p))
    cmd = [
        sys.executable,
        '-m',
        'papermill',
        'nbs/experiments.ipynb',
        str(tmp_path / 'copy.ipynb'),
        '-f',
        str(tmp_path / 'p.yaml'),
        '--no-progress-bar',
    ]
    r = subprocess.run(cmd, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=500)
    assert r.returncode == 0, r.stderr[-3000:]
    t = pd.read_csv(tmp_path / 'grid' / 'table.csv')
    assert (
        list(t.state) == ['failed', 'finished']
        and 'FileNotFoundError' in t.error[0]
        and str(tmp_path / 'data' / 'gta') in t.error[0]
    )
    m = read_json(tmp_path / 'grid' / t.run[1] / 'metrics.json')
    assert t.miou[1] == pytest.approx(m['miou']['student']) and m['steps'] == 2
    assert (tmp_path / 'grid' / f'{t.run[1]}.ipynb').exists() and (
        tmp_path / 'grid' / 'grid.png'
    ).exists()
    done = make_grid(tmp_path / 'grid', ['source_only'], [0], [['demo', None]], SMALL)
    assert (
        done[0].done() and run_grid(done, quiet=True).state[0] == 'finished'
    )  # found by its metrics.json, in no time


def test_run_names_the_parameters_of_the_notebook():
    "A grid accepts the parameters of train_uda, all of them and no others"
    cell = next(
        c
        for c in json.loads((ROOT / 'nbs' / 'train_uda.ipynb').read_text())['cells']
        if 'parameters' in c['metadata'].get('tags', [])
    )
    assert {t.id for n in ast.parse(''.join(cell['source'])).body for t in n.targets} == set(
        NOTEBOOK_PARAMETERS
    )
