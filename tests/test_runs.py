"Real processes: killed and resumed, misspelt, started from other folders; and what a run refuses"
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch, yaml
from udanb.core import read_json
from udanb.demo import write_demo
from udanb.recipes import RECIPES, batches, build, folders, make_recipe
from udanb.runs import load_run, read_run, run, run_name
from udanb.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(backbone='mit_b0', weights=None, dim=16, batch=2, crop=(64,64), rcs_px=8, steps=2)
ENV = os.environ | dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', IN_TEST='1')

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_demo(root/'demo', n_source=6, n_target=6, n_val=2, size=(64,128))
    return root

# ---- resume

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from udanb.recipes import make_recipe
from udanb.runs import run
run(make_recipe("daformer", "demo", over=dict(backbone="mit_b0", weights=None, dim=16, batch=2, crop=(64,64), rcs_px=8, steps=14, save_every=3, eval_every=7)),
    sys.argv[1], sys.argv[2])
'''
def start(data, out): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(data), str(out)], env=ENV, cwd=ROOT, stderr=subprocess.DEVNULL)
def rows(out): return (out/'log.jsonl').read_text().count('\n') if (out/'log.jsonl').exists() else 0

def test_killed_and_started_again_ends_with_the_same_bits(data, tmp_path):
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    assert start(data, whole).wait(240)==0
    killed = 0
    for at in (5, 10):                                                # between checkpoints, which are at 3, 6, 9, 12
        p = start(data, cut); t0 = time.time()
        while rows(cut)<at and p.poll() is None and time.time()-t0<120: time.sleep(.01)
        if p.poll() is None: p.send_signal(signal.SIGKILL); killed += 1
        p.wait()
        assert (cut/'checkpoint.pt').exists() and not (cut/'metrics.json').exists()
    assert killed==2
    assert start(data, cut).wait(240)==0
    a,b = (torch.load(f/'checkpoint.pt', weights_only=True) for f in (whole,cut))
    assert a['it']==b['it']==14
    for part in ('model','method'):
        assert a[part].keys()==b[part].keys() and all(a[part][k].equal(b[part][k]) for k in a[part])
    moments = lambda c: [v for s in c['opt']['state'].values() for v in s.values()]
    assert moments(a) and all(torch.equal(x,y) for x,y in zip(moments(a), moments(b)))
    strip = lambda f: [r | dict(sec=0) for r in read_run(f)[0]]
    assert strip(whole)==strip(cut) and [r['it'] for r in strip(cut)]==list(range(1,15))
    assert load_weights(whole/'model.safetensors')[1]['hash']==load_weights(cut/'model.safetensors')[1]['hash']

def test_teacher_and_optimiser_survive(data, tmp_path):
    t = build(make_recipe('daformer', 'demo', over=TINY | dict(steps=4, save_every=2)), data, tmp_path/'r', quiet=True)
    t.fit()
    again = build(make_recipe('daformer', 'demo', over=TINY | dict(steps=4)), data, tmp_path/'r', quiet=True)
    assert again.resume() and again.it==4
    assert all(a.equal(b) for a,b in zip(t.teacher.state_dict().values(), again.teacher.state_dict().values()))
    differ = [not a.equal(b) for a,b in zip(t.student.parameters(), again.teacher.net.parameters())]
    assert any(differ)                                                # upstream's defect: the teacher restarts as a copy of the student

def test_half_written_checkpoint_is_named(data, tmp_path):
    t = build(make_recipe('dacs', 'demo', over=TINY), data, tmp_path, quiet=True)
    t.fit(); f = tmp_path/'checkpoint.pt'
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(ValueError, match='checkpoint.pt: not a readable checkpoint.*Remove it'):
        build(make_recipe('dacs', 'demo', over=TINY), data, tmp_path, quiet=True).fit()

# ---- refusals

def test_checkpoint_of_another_recipe(data, tmp_path):
    r = make_recipe('dacs', 'demo', over=TINY)
    run(r, data, tmp_path/'r', quiet=True)
    with pytest.raises(ValueError, match=f"lr: {r.lr} there, 0.001 here"): run(replace(r, lr=1e-3), data, tmp_path/'r', quiet=True)
    (tmp_path/'r'/'recipe.json').unlink(); (tmp_path/'r'/'metrics.json').unlink()
    with pytest.raises(ValueError, match="checkpoint.pt belongs to another recipe"): run(replace(r, lr=1e-3), data, tmp_path/'r', quiet=True)

def test_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='choose another folder'): run(make_recipe('dacs', 'demo', over=TINY), data, tmp_path/'file'/'r', quiet=True)
    if os.geteuid()!=0:
        (tmp_path/'ro').mkdir(mode=0o500)
        with pytest.raises(OSError, match='choose another folder'): run(make_recipe('dacs', 'demo', over=TINY), data, tmp_path/'ro'/'r', quiet=True)
    elif Path('/proc').exists():                                      # root may write everywhere but here
        with pytest.raises(OSError, match='choose another folder'): run(make_recipe('dacs', 'demo', over=TINY), data, '/proc/udanb', quiet=True)

def test_missing_data_names_folder_source_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as e: run(make_recipe('daformer', 'gta'), tmp_path, tmp_path/'r')
    assert str(tmp_path/'gta') in str(e.value) and 'http' in str(e.value) and '-p source demo' in str(e.value)
    assert not (tmp_path/'r').exists()

def test_corrupt_image_in_training_is_named(tmp_path):
    write_demo(tmp_path/'demo', n_source=2, n_target=2, n_val=2, size=(64,128))
    f = sorted((tmp_path/'demo'/'cityscapes').rglob('train/**/*_leftImg8bit.png'))
    for x in f: x.write_bytes(x.read_bytes()[:200])
    with pytest.raises(Exception) as e: run(make_recipe('dacs', 'demo', over=TINY), tmp_path, tmp_path/'r', quiet=True)
    assert any(x.name in str(e.value) for x in f)

def test_target_labels_are_not_needed_to_train(tmp_path):
    write_demo(tmp_path/'demo', n_source=4, n_target=4, n_val=2, size=(64,128))
    for x in (tmp_path/'demo'/'cityscapes'/'gtFine'/'train').rglob('*.png'): x.unlink()
    assert (run(make_recipe('daformer', 'demo', over=TINY), tmp_path, tmp_path/'r', quiet=True)/'metrics.json').exists()

def test_class_that_never_occurs_with_rcs(data, tmp_path):
    r = make_recipe('daformer', 'demo', over=TINY)
    src,tgt,_ = folders(r, data)
    with pytest.warns(UserWarning, match='never occur and will not be drawn.*train'): next(iter(batches(r, src, tgt)(0)))

def test_demo_read_as_gta_and_cityscapes(data, tmp_path):
    "The pair gta → cityscapes on the demo's files: the very specs and code that read the published datasets, margins included"
    r = make_recipe('daformer', 'gta', over=TINY)
    src,tgt,val = folders(r, data/'demo')
    assert (src.spec.name,tgt.spec.name)==('gta','cityscapes') and tgt.margins and tgt.labels is None
    assert read_json(run(r, data/'demo', tmp_path/'r', quiet=True)/'metrics.json')['target']=='cityscapes'

# ---- every recipe and every file in params/

@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_steps_twice(name, data, tmp_path):
    out = run(make_recipe(name, 'demo', over=TINY), data, tmp_path/'r', quiet=True)
    m = read_json(out/'metrics.json')
    assert m['steps']==2 and ('teacher' in m['miou'])==(name in ('dacs','daformer')) and len(m['iou']['student'])==19
    x = torch.zeros(1,3,64,64)
    assert load_run(out)(x).logits.shape==(1,19,16,16)

def test_mixed_precision_steps(data, tmp_path):
    "bf16 through Accelerate, in a process of its own (Accelerate fixes the precision once per process)"
    script = f'''
import torch
from udanb.recipes import build, make_recipe
t = build(make_recipe("daformer", "demo", over={TINY | dict(precision="bf16")!r}), {str(data)!r}, {str(tmp_path)!r}, quiet=True)
dtypes = set()
t.student.head.conv_seg.register_forward_hook(lambda m,i,o: dtypes.add(o.dtype))
t.fit()
assert t.it==2 and torch.bfloat16 in dtypes and next(t.student.parameters()).dtype==torch.float32
'''
    p = subprocess.run([sys.executable, '-c', script], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert p.returncode==0, p.stderr[-2000:]

def test_parity_recipe_steps(data, tmp_path):
    over = TINY | dict(parity=True, margins='rows')
    t = build(make_recipe('daformer', 'demo', over=over), data, tmp_path, quiet=True)
    log = t.fit()
    assert t.teacher.rows==(2,15) and 0<=log[-1]['q']<=1              # 15 and 120 of 512 rows

@pytest.mark.parametrize('f', sorted((ROOT/'params').glob('*.yaml')), ids=lambda f: f.stem)
def test_every_params_file_is_a_recipe_that_steps(f, data, tmp_path):
    p = yaml.safe_load(f.read_text())
    known = {'source','target','recipe','backbone','steps','seed','data_root','out','over'}
    assert set(p)<=known, f'{f.name}: {set(p)-known}'
    over = p.get('over', {})
    r = make_recipe(p.get('recipe','daformer'), p['source'], p.get('target'), over, **{k: p.get(k) for k in ('backbone','steps','seed')})
    assert '# Command:' in f.read_text() and run_name(r)
    small = replace(make_recipe(r.method, 'demo', over=over), **{k: v for k,v in TINY.items()}, limit=None, eval_every=0)
    assert build(small, data, tmp_path, quiet=True).fit()[-1]['it']==2

# ---- the run notebook

def papermill(*args, cwd=ROOT, env={}):
    return subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', *map(str,args)], cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=400)

@pytest.mark.parametrize('cwd', ['.', 'nbs'])
def test_notebook_writes_its_results(data, tmp_path, cwd):
    page = (ROOT/'nbs'/'train_uda.ipynb') if cwd=='.' else 'train_uda.ipynb'
    p = papermill(page, tmp_path/'copy.ipynb', '-p', 'data_root', data, '-p', 'out', tmp_path/'run', cwd=ROOT/cwd)
    assert p.returncode==0, p.stderr[-3000:]
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert m['steps']==2 and m['recipe']=='daformer' and set(m['miou'])=={'student','teacher'} and m['versions'] and m['seed']==0
    files = {f.relative_to(tmp_path/'run').as_posix() for f in (tmp_path/'run').rglob('*') if f.is_file()}
    assert {'recipe.json','log.jsonl','model.safetensors','figures/curves.png','figures/iou.png','figures/panel.png','before/metrics.json'}<=files
    assert (tmp_path/'copy.ipynb').exists()

@pytest.mark.parametrize('args,said', [(('-p','sorce','town'), "did you mean 'source'"), (('-p','recipe','dafromer'), "did you mean 'daformer'"),
                                       (('-p','source','gta','-p','data_root','nowhere'), '-p source demo')])
def test_notebook_stops_at_once(tmp_path, args, said):
    p = papermill(ROOT/'nbs'/'train_uda.ipynb', tmp_path/'copy.ipynb', *args, '-p', 'out', tmp_path/'run')
    assert p.returncode!=0 and said in p.stderr and not (tmp_path/'run').exists()
