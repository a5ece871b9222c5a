"The project as a newcomer and a maintainer meet it: commands, generated files, checks, public names, paths"

import ast
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser

import pytest
from conftest import ROOT
from packaging.specifiers import SpecifierSet

NBS = ROOT / 'nbs'
README = ROOT / 'README.md'
TOOLS = ROOT / 'tools'
HIDDEN = {'.ipynb_checkpoints', '_proc'}
PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not HIDDEN & set(p.parts))
RUNS = [p for p in PAGES if p.parent == NBS and p.name != 'index.ipynb']
NO_RUNS = [p for p in PAGES if p not in RUNS]
PATH = [os.path.dirname(sys.executable), os.environ['PATH'], str(TOOLS)]
ENV = os.environ | dict(PATH=os.pathsep.join(PATH))
KERNEL = dict(name='python3', display_name='python3', language='python')


def rel(path):
    return str(path.relative_to(ROOT))


def sh(*cmd, cwd=ROOT, **kw):
    "Run a command; its exit code and what it printed"
    streams = dict(text=True, capture_output=True, stdin=subprocess.DEVNULL)
    return subprocess.run([*map(str, cmd)], cwd=cwd, env=ENV, **streams, **kw)


def run_tool(name, *args, cwd=ROOT):
    return sh(sys.executable, TOOLS / f'{name}.py', *args, cwd=cwd)


def cells(p):
    return json.loads(p.read_text(encoding='utf-8'))['cells']


def src(cell):
    return ''.join(cell['source'])


def tagged(p):
    return [c for c in cells(p) if 'parameters' in c['metadata'].get('tags', [])]


def code(source, id='a', outputs=(), **metadata):
    "A code cell"
    cell = dict(cell_type='code', id=id, source=source, metadata=metadata)
    return cell | dict(outputs=list(outputs), execution_count=None)


def markdown(source, id='m'):
    return dict(cell_type='markdown', id=id, source=source, metadata={})


def write_page(path, *found, **metadata):
    "A notebook of these cells"
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = dict(cells=[*found], metadata=metadata, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(notebook))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tool(name):
    "A script of tools/ as a module"
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def tracked():
    "Files that are or would be committed; in an export without git, everything outside the ignored folders"
    r = sh('git', 'ls-files', '-co', '--exclude-standard')
    if r.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / f for f in r.stdout.splitlines() if (ROOT / f).is_file()]


# --- commands


def test_help_lists_every_target():
    out = sh('make', '--no-print-directory', 'help').stdout
    for t in 'demo test export docs lab bench clean'.split():
        assert re.search(rf'^make {t}\s+\w', out, re.M), t
    assert len(out.splitlines()) >= 9


def test_readme_setup_is_two_commands():
    "The set-up section shows `make demo` and `make test`, and both exist"
    section = re.search(r'^## Set-up\n(.*?)^## ', README.read_text(), re.M | re.S)[1]
    commands = re.findall(r'^(?:make|pip|python|conda|papermill)\b.*$', section, re.M)
    assert commands == ['make demo', 'make test']


def test_readme_is_index_page(tmp_path):
    render = [TOOLS / 'quarto', 'render', NBS / 'index.ipynb', '-o', 'README.md', '-t', 'gfm']
    r = sh(sys.executable, *render, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    made = tmp_path / '_site' / 'README.md'
    assert made.read_text() == README.read_text(), 'run make export'


def test_contributing_maps_every_module(tmp_path):
    "The module map is what tools/modules.py writes; without its markers the script refuses"
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    (tmp_path / 'C.md').write_text(
        re.sub(r'(?s)(tools/modules.py -->).*(<!-- end)', r'\1\n\2', text)
    )
    r = sh(sys.executable, 'tools/modules.py', tmp_path / 'C.md')
    assert r.returncode == 0, r.stderr
    assert (tmp_path / 'C.md').read_text() == text, 'run make export'
    (tmp_path / 'C.md').write_text('no markers')
    assert 'markers' in sh(sys.executable, 'tools/modules.py', tmp_path / 'C.md').stderr


def test_readme_links_lead_somewhere():
    "Relative links and pictures work on the repository's front page and, from nbs/, on the site's"
    links = re.findall(r'\]\((?!https?:|#)([^)#\s]+)', README.read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_readme_own_data_snippet(tmp_path):
    "The description README shows for own data is read as it stands"
    import numpy as np
    import yaml
    from PIL import Image

    from udanb.data.datasets import SegDataset
    from udanb.data.pairs import get_pair

    snippet = re.search(r'^```yaml\n(.*?)^```', README.read_text(), re.M | re.S)[1]
    p = yaml.safe_load(snippet)
    yard = tmp_path / 'yard'
    photo = Image.fromarray(np.full((8, 12, 3), 90, np.uint8))
    for split in ('train', 'val'):
        for folder in ('photos', 'masks'):
            (yard / folder / split / 'monday').mkdir(parents=True)
        photo.save(yard / 'photos' / split / 'monday' / 'a.jpg')
    ids = np.repeat(np.array([1, 2, 9, 9], np.uint8), 24).reshape(8, 12)
    Image.fromarray(ids).save(yard / 'masks' / 'val' / 'monday' / 'a_mask.png')
    spec = get_pair(p['source'], p['target'], p['datasets']).targets[0]
    assert len(SegDataset(spec, tmp_path, 'train', labels=False)) == 1  # no label needed
    val = SegDataset(spec, tmp_path, 'val')
    assert [val.label(0)[row, 0] for row in (0, 2, 4, 6)] == [0, 8, 255, 255]
    assert val.margins == (0, 40, 0, 0)


BAR = """import sys
from tqdm import tqdm
for i in tqdm(range(n), desc="steps", file=sys.stderr, mininterval=0):
    sys.stdout.write(f"at {i}\\n")
    sys.stdout.flush()
"""


def test_run_shows_bars_and_keeps_last_state(tmp_path):
    "tools/run.py passes a bar on as it moves; the executed notebook holds one line per bar, and -p arrives"
    page, out = tmp_path / 'in.ipynb', tmp_path / 'out.ipynb'
    write_page(page, code('n=2', tags=['parameters']), code(BAR, 'b'), kernelspec=KERNEL)
    r = sh(sys.executable, TOOLS / 'run.py', page, out, '-p', 'n', 7, timeout=300)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('steps:') > 3 and '7/7' in r.stdout and 'at 6' in r.stdout
    outputs = [o for c in cells(out) for o in c['outputs'] if o['name'] == 'stderr']
    text = ''.join(''.join(o['text']) for o in outputs)
    assert text.count('steps:') == 1 and '7/7' in text and '\r' not in text


def test_pages_become_texts_and_come_back(tmp_path, monkeypatch):
    "tools/nb.py: pages of the same name have texts of their own; `save` keeps the ids of cells that did not change"
    monkeypatch.setitem(ENV, 'TMPDIR', str(tmp_path))
    pages = [tmp_path / 'nbs' / folder / '00_a.ipynb' for folder in ('core', 'data')]
    for page in pages:
        write_page(page, markdown('# A'), code('x = 1', 'one'), code('y = 2', 'two'))
    assert run_tool('nb', 'py', *pages).returncode == 0
    texts = [tmp_path / 'pages' / folder / '00_a.py' for folder in ('core', 'data')]
    texts[1].write_text(texts[1].read_text().replace('y = 2', 'y = 3'))
    r = run_tool('nb', 'save', *pages)
    assert r.returncode == 0, r.stderr
    assert [src(c) for c in cells(pages[0])] == ['# A', 'x = 1', 'y = 2']
    assert [src(c) for c in cells(pages[1])] == ['# A', 'x = 1', 'y = 3']
    assert cells(pages[1])[1]['id'] == 'one'
    r = run_tool('nb', 'save', tmp_path / 'nbs' / 'core' / '01_b.ipynb')
    assert r.returncode and 'there is no text' in r.stderr


# --- notebooks


def test_clean_keeps_parameters_tag(tmp_path):
    "Without `allowed_cell_metadata_keys = tags`, nbdev_clean deletes papermill's tag: papermill runs the defaults"
    p = tmp_path / 'run.ipynb'
    cell = code(['n=1'], tags=['parameters'], trusted=True) | dict(execution_count=3)
    write_page(p, cell, kernelspec=KERNEL | dict(display_name='x'), junk=1)
    r = sh('nbdev_clean', '--fname', p)
    assert r.returncode == 0, r.stderr
    [cleaned] = cells(p)
    assert cleaned['metadata'] == dict(tags=['parameters'])
    assert cleaned['execution_count'] is None
    assert 'junk' not in json.loads(p.read_text())['metadata']


@pytest.mark.parametrize('p', RUNS, ids=rel)
def test_run_notebook_has_one_parameters_cell(p):
    "Exactly one; each parameter has a comment, and papermill can read it (a second '=' in the line defeats it)"
    [c] = tagged(p)
    names = [o.targets[0].id for o in ast.parse(src(c)).body]
    r = sh('papermill', '--help-notebook', p)
    assert 'Unable to parse' not in r.stdout + r.stderr, r.stderr
    for n in names:
        assert re.search(rf'^  {n}: .*\n {{10,}}\S', r.stdout, re.M), f'{n}: no comment'


@pytest.mark.parametrize('p', NO_RUNS, ids=rel)
def test_page_has_no_parameters_cell(p):
    assert not tagged(p)


@pytest.mark.parametrize('p', PAGES, ids=rel)
def test_page_is_clean(p):
    "Title and sentence in a cell of their own (nbdev makes front matter of it), no counts, errors or disabled cells"
    cs = cells(p)
    sentences = '*' if p in RUNS else '+'
    title = rf'# [^\n]+(\n+> [^\n]+){sentences}\s*'
    assert re.fullmatch(title, src(cs[0])), 'python tools/nb.py title'
    assert len({c['id'] for c in cs}) == len(cs)
    for c in cs:
        assert c.get('execution_count') is None
        assert not any(o['output_type'] == 'error' for o in c.get('outputs', []))
        assert not re.match(r'#\s*\|\s*eval:\s*false', src(c))


@pytest.mark.parametrize('p', NO_RUNS, ids=rel)
def test_imports_have_cells_of_their_own(p):
    "The site's builder runs exported cells and every cell with an import: further code in such a cell fails there"
    imports = (ast.Import, ast.ImportFrom)
    for c in cells(p):
        if c['cell_type'] != 'code' or re.search(r'^([%!]|#\s*\|\s*export)', src(c), re.M):
            continue
        tree = ast.parse(src(c))
        if any(isinstance(o, imports) for o in ast.walk(tree)):
            assert all(isinstance(o, imports) for o in tree.body), src(c)


def read_modules(folder):
    "`{module: text}` of the library in a folder"
    lib = folder / 'udanb'
    return {str(path.relative_to(lib)): path.read_text() for path in lib.rglob('*.py')}


def test_modules_equal_pages(tmp_path):
    "Exporting the pages into an empty folder gives the committed modules, byte for byte"
    for f in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / f, tmp_path)
    shutil.copytree(NBS, tmp_path / 'nbs', ignore=shutil.ignore_patterns(*HIDDEN))
    r = sh('nbdev_export', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    made, kept = read_modules(tmp_path), read_modules(ROOT)
    assert set(made) == set(kept), 'run make export; a module without a page must go'
    assert not [k for k in made if made[k] != kept[k]], 'run make export'


def test_no_two_notebooks_want_the_same_page_of_the_site():
    "nbdev strips the number: 01_ddb and 02_ddb of one folder would both be ddb.html"
    stems = [str(p.parent / re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem)) for p in PAGES]
    assert len(stems) > 40 and not {s for s in stems if stems.count(s) > 1}


def test_every_page_is_in_the_sidebar():
    globs = re.findall(r'auto: "([^"]+)"', (NBS / 'sidebar.yml').read_text())
    for p in PAGES:
        if p.name != 'index.ipynb':
            path = str(p.relative_to(NBS))
            assert any(fnmatch.fnmatch(path, glob) for glob in globs), path


# --- checks: each holds for the project, and fails on what it is there for


@pytest.mark.parametrize('name', ['packages', 'nblint', 'density', 'docstrings'])
def test_project_passes(name):
    r = run_tool(name)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize('how', [['check'], ['format', '--check']], ids=' '.join)
def test_project_is_formatted(how):
    r = sh('ruff', *how, '--output-format', 'concise', '.')
    assert r.returncode == 0, r.stdout + r.stderr


def test_make_check_runs_every_check():
    text = (TOOLS / 'check.sh').read_text()
    for name in ('packages', 'nblint', 'density', 'docstrings'):
        assert f'check python tools/{name}.py' in text
    assert 'check ruff check' in text and 'check ruff format --check' in text


LIBRARY = {  # a small one that keeps the order: {module: (page, its code)}
    'core.low': ('core/00_low', 'x = 1'),
    'core.next': ('core/01_next', 'from .low import x'),
    'data.high': ('data/00_high', 'from ..core.low import x'),
    'methods.helper': ('methods/00_helper', 'def f(): pass'),
    'methods.first': ('methods/01_first', 'from .helper import f\ndef first()->Method: pass'),
    'methods.second': ('methods/02_second', 'from .helper import f\ndef second()->Method: pass'),
}


def write_library(folder, lessons={}, **changed):
    "LIBRARY with other code for some modules (`core_low=...`), and a lesson for some pages"
    for module, (page, source) in LIBRARY.items():
        source = changed.get(module.replace('.', '_'), source)
        default = code(f'#| default_exp {module}')
        lesson = code(lessons.get(module, 'pass'))
        write_page(folder / f'nbs/{page}.ipynb', default, code(f'#| export\n{source}'), lesson)
        write(folder / 'udanb' / (module.replace('.', '/') + '.py'), source + '\n')


def test_packages_print_their_map(tmp_path):
    write_library(tmp_path, lessons={'core.next': 'from udanb.core.next import *'})
    r = run_tool('packages', cwd=tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr
    assert re.search(r'^core +2 modules +imports nothing of udanb$', r.stdout, re.M)
    assert re.search(r'^data +1 modules +imports core$', r.stdout, re.M)
    assert '6 modules and their lessons keep the order' in r.stdout


@pytest.mark.parametrize(
    'module, source, message',
    [
        ('core_low', 'from ..data.high import x', 'core.low imports data.high'),
        ('core_low', 'from ..data import high', 'core.low imports data.high'),
        ('core_low', 'from udanb.data.high import x', 'core.low imports data.high'),
        ('core_low', 'import udanb.data.high', 'core.low imports data.high'),
        ('core_low', 'def f():\n    from .next import x', 'core.low imports core.next'),
        (
            'methods_second',
            'from .first import first\ndef second()->Method: pass',
            'methods.second imports methods.first: both make a method',
        ),
    ],
)
def test_packages_notice_an_import(tmp_path, module, source, message):
    write_library(tmp_path, **{module: source})
    r = run_tool('packages', cwd=tmp_path)
    assert r.returncode == 1 and message in r.stdout


def test_packages_notice_a_lesson(tmp_path):
    write_library(tmp_path, lessons={'core.low': '%matplotlib inline\nimport udanb.data.high'})
    r = run_tool('packages', cwd=tmp_path)
    assert r.returncode == 1 and 'a lesson of core.low imports data.high' in r.stdout


def test_packages_notice_an_unknown_folder(tmp_path):
    write_page(tmp_path / 'nbs/attic/00_x.ipynb', code('#| default_exp attic.x'))
    r = run_tool('packages', cwd=tmp_path)
    assert r.returncode and 'attic is not in PACKAGES' in r.stderr


def test_packages_report_long_functions_of_run_notebooks(tmp_path):
    write_library(tmp_path)
    body = '    x = 1\n' * 6
    write_page(tmp_path / 'nbs/train.ipynb', code(f'def f():\n{body}def g(): pass'))
    r = run_tool('packages', cwd=tmp_path)
    assert r.returncode == 0 and 'to move to pages): train 1' in r.stdout


def export(lines):
    "An exported cell of so many code lines"
    text = '\n'.join(f'a{i} = {i}' for i in range(lines))
    return code(f'#| export\n# not a code line\n\n{text}')


PROSE = markdown('word ' * 400)
LESSON = code('\n'.join(['assert 1', 'with pytest.raises(ValueError): f()'] * 10))
FIGURE = code('fig', outputs=[dict(output_type='display_data', data={'image/png': 'x'})])


@pytest.mark.parametrize(
    'page, message',
    [
        ([export(45), PROSE, LESSON], None),
        ([export(46), PROSE, LESSON], 'cell of 46 lines (max 45)'),
        ([*[export(43)] * 7, PROSE, LESSON], 'lines 301 (max 300)'),
        ([export(9), PROSE, LESSON] + [markdown('x')] * 68, 'cells 71 (max 70)'),
        ([export(9), PROSE, LESSON, code('#' * 300_000)], 'kb 29'),
        ([export(9), PROSE, LESSON] + [FIGURE] * 7, 'figures 7 (max 6)'),
        ([export(40), markdown('word ' * 44), LESSON], '1.1 words per line (min 1.2)'),
        ([export(40), PROSE, code('assert 1')], '2 checks per 100 lines (min 5)'),
    ],
)
def test_nblint_notices(tmp_path, page, message):
    write_page(tmp_path / 'nbs/core/00_page.ipynb', *page)
    r = run_tool('nblint', cwd=tmp_path)
    assert r.returncode == bool(message), r.stdout
    assert (message or '0 over a limit') in r.stdout


DENSE = 'y = [f(g(i), h(i + 1), i * 2) for i in range(10) if i > 3 and i < 8]\n'
SPARSE = 'x = 1\n'


@pytest.mark.parametrize(
    'path, source, message',
    [
        ('udanb/a.py', SPARSE + 'a, b = 1, 2\na, b, c = x\na, b, c = b, c, a\n', None),
        ('udanb/a.py', DENSE, 'udanb/a.py: 29.00 nodes a line'),
        ('tests/a.py', DENSE * 9, 'tests: '),
        ('bench/a.py', 'f, a = lambda: 1, 2\n', 'bench/a.py:1: a lambda is given a name'),
        ('bench/a.py', 'x = 1\n(f := lambda: 1)\n', 'bench/a.py:2: a lambda is given a name'),
        ('tools/a.py', '[f(i) for i in x]\n', 'tools/a.py:1: a comprehension for its side effect'),
        ('tools/a.py', 'a, b, c = x, y, z\n', 'tools/a.py:1: three or more names'),
    ],
)
def test_density_notices(tmp_path, path, source, message):
    for folder in ('udanb', 'tests', 'tools', 'bench'):
        write(tmp_path / folder / 'sparse.py', SPARSE * 40)
    write(tmp_path / path, source)
    r = run_tool('density', '--all', cwd=tmp_path)
    assert r.returncode == bool(message), r.stdout
    assert (message or ' 0 places over a limit') in r.stdout


def test_density_counts_nodes_and_lines(tmp_path):
    "Operators and contexts are no nodes; comments and blank lines no lines"
    write(tmp_path / 'tools' / 'a.py', '# comment\n\nx = 1 + y  # here\n')
    r = run_tool('density', '--all', cwd=tmp_path)  # Module, Assign, Name, BinOp, Constant, Name
    assert re.search(r'^tools/a.py +1 +1 +6.00 ', r.stdout, re.M), r.stdout


DOCUMENTED = """
__all__ = ['Thing', 'scale', 'names']

class Thing:
    "A thing of `size`; a negative one raises `ValueError`"
    def __init__(self, size):
        if size < 0:
            raise ValueError('size < 0')

    def forward(self, x):  # (B,C)
        return x

    @property
    def area(self):
        "Size squared"
        return self.size**2

def scale(
    x,  # (H,W)
    by: float,
    *,
    how='linear',
) -> Tensor:  # (H,W) float32
    "Multiply; another `how` raises `KeyError`"
    if how != 'linear':
        raise KeyError(how)
    return x * by

def names(folder):
    "Names of the files of `folder`"
    return sorted(folder)

def _hidden(x):
    return x
"""


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('', '', None),
        ('"A thing of', '# "A thing of', 'Thing: no docstring'),
        ('; a negative one raises `ValueError`', '', 'Thing.__init__: does not name ValueError'),
        ('        "Size squared"\n', '', 'Thing.area: no docstring'),
        ('  # (H,W) float32', '', 'scale: does not say what it returns'),
        ('Names of the files of', 'Sort', 'names: does not say what it returns'),
        (' raises `KeyError`', '', 'scale: does not name KeyError'),
        ('  # (H,W)\n    by', '\n    by', 'scale: does not describe x'),
        ('`folder`', 'a place', 'names: does not describe folder'),
        ('A thing of `size`', 'A thing', 'Thing.__init__: does not describe size'),
        ('Size squared', 'Says the size squared', 'docstring: "Says"'),
        ('(H,W) float32', 'what nobody knows', 'comment: "nobody"'),
        ("'size < 0'", "'size is not trusted'", 'error: "trusted"'),
    ],
)
def test_docstrings_notice(tmp_path, old, new, message):
    assert old in DOCUMENTED
    write(tmp_path / 'udanb' / 'a.py', DOCUMENTED.replace(old, new, 1))
    r = run_tool('docstrings', cwd=tmp_path)
    assert r.returncode == bool(message)
    assert (message or 'nothing missing') in r.stdout, r.stdout


@pytest.mark.parametrize(
    'text, found',
    [
        ('The EMA teacher labels the target.', 0),
        ('A name such as `trust` may stand.', 0),
        ('The slow copy is believed, nobody mends it.', 4),
        ('Look the dataset over; what is asked of it?', 2),
    ],
)
def test_docstrings_notice_words_of_pages(tmp_path, text, found):
    write_page(tmp_path / 'nbs/core/00_page.ipynb', markdown(text))
    r = run_tool('docstrings', cwd=tmp_path)
    assert r.returncode == bool(found)
    assert r.stdout.count(' -> ') == found


@pytest.mark.parametrize(
    'source, rule',
    [
        ('x = 1', None),
        (f'x = 1  # {"a" * 111}', None),
        (f'x = 1  # {"a" * 112}', 'E501'),
        ('x = 1; y = 2', 'E702'),
        ('x = 1;', 'E703'),
        ('if 1: x = 1', 'E701'),
        ('f = lambda: 1', 'E731'),
        ('x = undefined', 'F821'),
    ],
)
def test_ruff_notices(tmp_path, source, rule):
    (tmp_path / 'a.py').write_text(source + '\n')
    config = ['--config', ROOT / 'ruff.toml', '--no-cache', '--output-format', 'concise']
    r = sh('ruff', 'check', *config, tmp_path / 'a.py')
    assert r.returncode == bool(rule) and (rule or 'passed') in r.stdout


def test_ruff_formats_with_quotes_kept(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('x = \'a\'\ny = "b"\n')
    config = ['--config', ROOT / 'ruff.toml', '--no-cache']
    assert sh('ruff', 'format', '--check', *config, path).returncode == 0
    path.write_text('f(a,b)\n')
    assert sh('ruff', 'format', '--check', *config, path).returncode == 1


# --- names, paths, packaging


def settings():
    ini = ConfigParser()
    ini.read(ROOT / 'settings.ini')
    return ini['DEFAULT']


def test_no_public_name_vanished():
    "tests/api.json lists what notebooks out there may use; removing a name is a decision: run tools/api.py"
    api = tool('api')
    gone, _ = api.compare(json.loads(api.LIST.read_text()), api.public())
    assert not gone


def test_api_list_notices(tmp_path):
    api = tool('api')
    (tmp_path / 'methods').mkdir()
    (tmp_path / 'a.py').write_text("__all__ = ['f', 'g']\n")
    (tmp_path / 'methods' / 'm.py').write_text("__all__ = ['h']\n")
    now = api.public(tmp_path)
    assert now == {'a': ['f', 'g'], 'methods.m': ['h']}
    assert api.compare({'a': ['f', 'old'], 'methods.m': ['h']}, now) == (['a.old'], ['a.g'])


def test_no_machine_paths():
    "A committed file names no folder of the machine it was written on"
    bad = re.compile(r'(?<![\w./~-])/(?:work|tmp|root|home|Users)/\w')
    found = []
    for f in tracked():
        try:
            text = f.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        if f.suffix == '.ipynb':
            text = re.sub(r'"image/png": "[^"]*"', '', text)
        found += [f'{rel(f)}: {m[0]}' for m in bad.finditer(text)]
    assert not found


def test_nothing_large_is_committed():
    assert not [rel(f) for f in tracked() if f.stat().st_size > 1_000_000]


def normalized(name):
    "A package's name as PyPI compares it"
    return re.sub(r'[-_.]+', '-', name).lower()


def test_constraints_pin_every_requirement():
    "Whatever settings.ini asks for has one exact version, and no path or URL slipped in"
    text = (ROOT / 'constraints.txt').read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith('#')]
    pins = {normalized(line.split('==')[0]) for line in lines}
    assert all(re.fullmatch(r'[\w.-]+==[\w.+!]+', line) for line in lines)
    cfg = settings()
    for key in ('requirements', 'dev_requirements', 'offline_requirements'):
        for requirement in cfg[key].split():
            name = re.split(r'[<>=!~\[]', requirement)[0]
            assert normalized(name) in pins, requirement


def test_pins_install_on_the_python_that_readme_names():
    "README says 3.11 or newer, and Debian has 3.11.2: no installed version may ask for a later one"
    assert 'Python 3.11 or newer' in README.read_text()
    needs = {d.name: d.metadata['Requires-Python'] for d in importlib.metadata.distributions()}
    later = {n for n, v in needs.items() if v and not SpecifierSet(v).contains('3.11.0')}
    assert len(needs) > 50 and not later


DISTRIBUTIONS = {
    'PIL': 'pillow',
    'yaml': 'pyyaml',
    'segmentation_models_pytorch': 'segmentation-models-pytorch',
    'cv2': 'albumentations',
    'kornia_rs': 'kornia-rs',
    'huggingface_hub': 'huggingface-hub',
}


def imported_packages(path):
    "Top-level packages that a file imports, without the standard library's"
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split('.')[0] for name in names} - sys.stdlib_module_names


def test_imports_are_declared():
    "Every package that a module imports is a requirement: the dev extra may be absent where the library is used"
    known = set(settings()['requirements'].split()) | {'udanb'}
    for path in (ROOT / 'udanb').rglob('*.py'):
        for package in imported_packages(path):
            assert DISTRIBUTIONS.get(package, package) in known, f'{rel(path)} imports {package}'
