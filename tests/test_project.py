"The project as a newcomer and a maintainer meet it: commands, generated files, page sizes, public names, paths"
import ast, fnmatch, importlib.metadata, importlib.util, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
import pytest
from packaging.specifiers import SpecifierSet

from conftest import ROOT

PAGES = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and '_proc' not in p.parts)
RUNS = [p for p in PAGES if p.parent==ROOT/'nbs' and not p.name[0].isdigit() and p.name!='index.ipynb']
ENV = os.environ | dict(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH'], str(ROOT/'tools')]))
rel = lambda p: str(p.relative_to(ROOT))

def sh(*cmd, cwd=ROOT, **kw): return subprocess.run([*map(str,cmd)], cwd=cwd, env=ENV, text=True, capture_output=True, stdin=subprocess.DEVNULL, **kw)
def cells(p): return json.loads(p.read_text(encoding='utf-8'))['cells']
def src(c): return ''.join(c['source'])
def tagged(p): return [c for c in cells(p) if 'parameters' in c['metadata'].get('tags', [])]

def tool(name):
    "A script of tools/ as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

def tracked():
    "Files that are or would be committed; in an export without git, everything outside the ignored folders"
    r = sh('git', 'ls-files', '-co', '--exclude-standard')
    if r.returncode: pytest.skip('not a git checkout')
    return [ROOT/f for f in r.stdout.splitlines() if (ROOT/f).is_file()]

# --- commands

def test_help_lists_every_target():
    out = sh('make', '--no-print-directory', 'help').stdout
    for t in 'demo test export docs lab bench clean'.split(): assert re.search(rf'^make {t}\s+\w', out, re.M), t
    assert len(out.splitlines())>=9

def test_readme_setup_is_two_commands():
    "The set-up section shows `make demo` and `make test`, and both exist"
    sec = re.search(r'^## Set-up\n(.*?)^## ', (ROOT/'README.md').read_text(), re.M|re.S)[1]
    assert re.findall(r'^(?:make|pip|python|conda|papermill)\b.*$', sec, re.M)==['make demo', 'make test']

def test_readme_is_index_page(tmp_path):
    r = sh(sys.executable, ROOT/'tools'/'quarto', 'render', ROOT/'nbs'/'index.ipynb', '-o', 'README.md', '-t', 'gfm', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert (tmp_path/'_site'/'README.md').read_text()==(ROOT/'README.md').read_text(), 'run make export'

def test_readme_links_lead_somewhere():
    "Relative links and pictures work on the repository's front page and, from nbs/, on the site's"
    links = re.findall(r'\]\((?!https?:|#)([^)#\s]+)', (ROOT/'README.md').read_text())
    assert links and not [l for l in links if not (ROOT/l).exists()]

def test_readme_own_data_snippet(tmp_path):
    "The description README shows for own data is read as it stands"
    import numpy as np, yaml
    from PIL import Image
    from udanb.data.pairs import find_pair
    from udanb.data.datasets import SegFolder
    p = yaml.safe_load(re.search(r'^```yaml\n(.*?)^```', (ROOT/'README.md').read_text(), re.M|re.S)[1])
    for split in ('train','val'):
        for d in ('photos','masks'): (tmp_path/'yard'/d/split/'monday').mkdir(parents=True)
        Image.fromarray(np.full((8,12,3), 90, np.uint8)).save(tmp_path/f'yard/photos/{split}/monday/a.jpg')
    Image.fromarray(np.repeat(np.array([1,2,9,9], np.uint8), 24).reshape(8,12)).save(tmp_path/'yard/masks/val/monday/a_mask.png')
    spec = find_pair(p['source'], p['target'], p['datasets']).targets[0]
    assert len(SegFolder(spec, tmp_path, 'train', labels=False))==1          # no label needed
    lbl = SegFolder(spec, tmp_path, 'val').label(0)
    assert [lbl[i,0] for i in (0,2,4,6)]==[0,8,255,255] and SegFolder(spec, tmp_path, 'val').margins==(0,40,0,0)

def test_run_shows_bars_and_keeps_last_state(tmp_path):
    "tools/run.py passes a bar on as it moves; the executed notebook holds one line per bar, and -p arrives"
    nb = dict(cells=[dict(cell_type='code', id='a', metadata=dict(tags=['parameters']), source='n=2', outputs=[], execution_count=None),
                     dict(cell_type='code', id='b', metadata={}, outputs=[], execution_count=None, source='import sys\nfrom tqdm import tqdm\n'
                          'for i in tqdm(range(n), desc="steps", file=sys.stderr, mininterval=0): sys.stdout.write(f"at {i}\\n"); sys.stdout.flush()')],
              metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5)
    (tmp_path/'in.ipynb').write_text(json.dumps(nb))
    r = sh(sys.executable, ROOT/'tools'/'run.py', tmp_path/'in.ipynb', tmp_path/'out.ipynb', '-p', 'n', 7, timeout=300)
    assert r.returncode==0, r.stderr
    assert r.stdout.count('steps:')>3 and '7/7' in r.stdout and 'at 6' in r.stdout
    text = ''.join(''.join(o['text']) for c in cells(tmp_path/'out.ipynb') for o in c['outputs'] if o['name']=='stderr')
    assert text.count('steps:')==1 and '7/7' in text and '\r' not in text

# --- notebooks

def test_clean_keeps_parameters_tag(tmp_path):
    "Without `allowed_cell_metadata_keys = tags`, nbdev_clean deletes papermill's tag and papermill then runs the defaults in silence"
    nb = dict(cells=[dict(cell_type='code', id='a', metadata=dict(tags=['parameters'], trusted=True), source=['n=1'], outputs=[], execution_count=3)],
              metadata=dict(kernelspec=dict(name='python3', display_name='x', language='python'), junk=1), nbformat=4, nbformat_minor=5)
    p = tmp_path/'run.ipynb'
    p.write_text(json.dumps(nb))
    r = sh('nbdev_clean', '--fname', p)
    assert r.returncode==0, r.stderr
    assert cells(p)[0]['metadata']==dict(tags=['parameters'])
    assert cells(p)[0]['execution_count'] is None and 'junk' not in json.loads(p.read_text())['metadata']

@pytest.mark.parametrize('p', RUNS, ids=rel)
def test_run_notebook_has_one_parameters_cell(p):
    "Exactly one; each parameter is an assignment with a comment, and papermill can read it (a second '=' in the line defeats it)"
    [c] = tagged(p)
    names = [o.targets[0].id for o in ast.parse(src(c)).body]
    r = sh('papermill', '--help-notebook', p)
    assert 'Unable to parse' not in r.stdout+r.stderr, r.stderr
    for n in names: assert re.search(rf'^  {n}: .*\n {{10,}}\S', r.stdout, re.M), f'{n}: no comment'

@pytest.mark.parametrize('p', [p for p in PAGES if p not in RUNS], ids=rel)
def test_page_has_no_parameters_cell(p): assert not tagged(p)

@pytest.mark.parametrize('p', PAGES, ids=rel)
def test_page_is_clean(p):
    "Title and its sentence in a cell of their own (nbdev makes front matter of it), no execution counts, no errors, nothing switched off"
    cs = cells(p)
    assert re.fullmatch(r'# [^\n]+(\n+> [^\n]+)+\s*' if p not in RUNS else r'# [^\n]+(\n+> [^\n]+)*\s*', src(cs[0])), 'python tools/nb.py title'
    assert len({c['id'] for c in cs})==len(cs)
    for c in cs:
        assert c.get('execution_count') is None
        assert not any(o['output_type']=='error' for o in c.get('outputs', []))
        assert not re.match(r'#\s*\|\s*eval:\s*false', src(c))

@pytest.mark.parametrize('p', [p for p in PAGES if p not in RUNS], ids=rel)
def test_imports_have_cells_of_their_own(p):
    "The site's builder runs exported cells and every cell with an import, no others: further code in such a cell fails there"
    imports = (ast.Import, ast.ImportFrom)
    for c in cells(p):
        if c['cell_type']!='code' or re.search(r'^([%!]|#\s*\|\s*export)', src(c), re.M): continue
        tree = ast.parse(src(c))
        if any(isinstance(o, imports) for o in ast.walk(tree)): assert all(isinstance(o, imports) for o in tree.body), src(c)

def test_modules_equal_pages(tmp_path):
    "Exporting the pages into an empty folder gives the committed modules, byte for byte"
    for f in ('settings.ini', 'setup.py'): shutil.copy(ROOT/f, tmp_path)
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_proc'))
    r = sh('nbdev_export', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    made = lambda d: {str(f.relative_to(d)): f.read_text() for f in (d/'udanb').rglob('*.py')}
    a,b = made(tmp_path),made(ROOT)
    assert not (set(a)^set(b)), 'run make export; a module without a page must go'
    assert not [k for k in a if a[k]!=b[k]], 'run make export'

def test_floors_hold():
    r = sh(sys.executable, 'tools/floors.py', 'udanb', 'nbs')
    assert r.returncode==0 and 'floors hold' in r.stdout, r.stdout+r.stderr

def test_pages_keep_their_size():
    r = sh(sys.executable, 'tools/nblint.py', 'nbs')
    assert r.returncode==0, r.stdout+r.stderr

def test_nblint_and_floors_notice(tmp_path):
    "Both checks fail on what they are there for"
    code = lambda s: dict(cell_type='code', id='x', metadata={}, source=s, outputs=[], execution_count=None)
    for d in ('lib/core','lib/data','nbs/core','nbs/data'): (tmp_path/d).mkdir(parents=True)
    page = lambda name,*cs: (tmp_path/'nbs'/name).write_text(json.dumps(dict(cells=[*cs], metadata={}, nbformat=4, nbformat_minor=5)))
    page('core/10_low.ipynb', code('#| default_exp core.low'), code('#| export\n'+'\n'.join(f'a{i} = {i}' for i in range(60))))
    page('data/00_high.ipynb', code('#| default_exp data.high'))
    (tmp_path/'lib'/'core'/'low.py').write_text('from ..data.high import x\n')
    (tmp_path/'lib'/'data'/'high.py').write_text('x = 1\n')
    r = sh(sys.executable, 'tools/nblint.py', tmp_path/'nbs')
    assert r.returncode and 'cell of 60 lines' in r.stdout
    r = sh(sys.executable, 'tools/floors.py', tmp_path/'lib', tmp_path/'nbs')
    assert r.returncode and 'core.low imports data.high' in r.stdout

def test_no_two_notebooks_want_the_same_page_of_the_site():
    "nbdev strips the number: 01_ddb and 02_ddb of one folder would both be ddb.html"
    stems = [str(p.parent/re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem)) for p in PAGES]
    assert len(stems)>40 and not {s for s in stems if stems.count(s)>1}

def test_every_page_is_in_the_sidebar():
    globs = re.findall(r'auto: "([^"]+)"', (ROOT/'nbs'/'sidebar.yml').read_text())
    for p in PAGES:
        if p.name!='index.ipynb': assert any(fnmatch.fnmatch(str(p.relative_to(ROOT/'nbs')), g) for g in globs), p.name

# --- names, paths, packaging

def settings():
    ini = ConfigParser()
    ini.read(ROOT/'settings.ini')
    return ini['DEFAULT']

def test_no_public_name_vanished():
    "tests/api.json lists what notebooks out there may use; removing a name is a decision: change the list with tools/api.py"
    api = tool('api')
    gone,_ = api.compare(json.loads(api.LIST.read_text()), api.public())
    assert not gone

def test_api_list_notices(tmp_path):
    api = tool('api')
    (tmp_path/'methods').mkdir()
    (tmp_path/'a.py').write_text("__all__ = ['f', 'g']\n")
    (tmp_path/'methods'/'m.py').write_text("__all__ = ['h']\n")
    now = api.public(tmp_path)
    assert now=={'a':['f','g'], 'methods.m':['h']}
    assert api.compare({'a':['f','old'], 'methods.m':['h']}, now)==(['a.old'], ['a.g'])

def test_no_machine_paths():
    "A committed file names no folder of the machine it was written on"
    bad = re.compile(r'(?<![\w./~-])/(?:work|tmp|root|home|Users)/\w')
    found = []
    for f in tracked():
        try: text = f.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        if f.suffix=='.ipynb': text = re.sub(r'"image/png": "[^"]*"', '', text)
        found += [f'{rel(f)}: {m[0]}' for m in bad.finditer(text)]
    assert not found

def test_nothing_large_is_committed(): assert not [rel(f) for f in tracked() if f.stat().st_size>1_000_000]

def test_constraints_pin_every_requirement():
    "Whatever settings.ini asks for has one exact version, and no path or URL slipped in"
    norm = lambda s: re.sub(r'[-_.]+', '-', s).lower()
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pins = {norm(l.split('==')[0]) for l in lines if l and not l.startswith('#')}
    assert all(re.fullmatch(r'[\w.-]+==[\w.+!]+', l) for l in lines if l and not l.startswith('#'))
    cfg = settings()
    for key in ('requirements', 'dev_requirements', 'offline_requirements'):
        for r in cfg[key].split(): assert norm(re.split(r'[<>=!~\[]', r)[0]) in pins, r

def test_pins_install_on_the_python_that_readme_names():
    "README says 3.11 or newer, and Debian has 3.11.2: no installed version may ask for a later one"
    assert 'Python 3.11 or newer' in (ROOT/'README.md').read_text()
    needs = {d.name: d.metadata['Requires-Python'] for d in importlib.metadata.distributions()}
    assert len(needs)>50 and not {n: v for n,v in needs.items() if v and not SpecifierSet(v).contains('3.11.0')}

def test_imports_are_declared():
    "Every package that a module imports is a requirement: the dev extra may be absent where the library is used"
    dist = dict(PIL='pillow', yaml='pyyaml', segmentation_models_pytorch='segmentation-models-pytorch', cv2='albumentations',
                kornia_rs='kornia-rs', huggingface_hub='huggingface-hub')
    known = set(settings()['requirements'].split()) | {'udanb'}
    for f in (ROOT/'udanb').rglob('*.py'):
        for o in ast.walk(ast.parse(f.read_text())):
            names = [a.name for a in o.names] if isinstance(o, ast.Import) else [o.module] if isinstance(o, ast.ImportFrom) and not o.level else []
            for top in {n.split('.')[0] for n in names} - sys.stdlib_module_names: assert dist.get(top, top) in known, f'{rel(f)} imports {top}'
