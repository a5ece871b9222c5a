#!/usr/bin/env python3
"""Work on the notebook pages from the shell.

    python tools/nb.py py nbs/30_losses.ipynb          # page -> pages/30_losses.py in the temporary folder (py:percent), to edit
    python tools/nb.py save $TMPDIR/pages/30_losses.py # edited text -> page; ids, tags and outputs of unchanged cells stay
    python tools/nb.py run nbs/30_losses.ipynb ...     # execute and store real outputs (skips `#| slow`, `gpu`, `notest` cells)
    python tools/nb.py title nbs/*.ipynb               # title and subtitle into a cell of their own (`save` does it, too)
    python tools/nb.py cells nbs/30_losses.ipynb       # one line per cell: id, kind, first line
"""
import base64,hashlib,io,os,re,subprocess,sys,tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TMP = Path(tempfile.gettempdir())/'pages'
SKIP = re.compile(r'^\s*#\s*\|\s*(slow|gpu|notest|eval:\s*false)\b', re.M)

def jupytext(*args): subprocess.run([sys.executable, '-m', 'jupytext', '-q', *map(str, args)], check=True)

def to_py(page):
    "Write the page as a py:percent text to edit"
    TMP.mkdir(exist_ok=True)
    out = TMP/(Path(page).stem+'.py')
    jupytext('--to', 'py:percent', page, '-o', out)
    print(out)

def title(page):
    "A cell of its own for title and subtitle: nbdev makes front matter of the whole cell, and the site would lose the text below"
    import nbformat
    nb = nbformat.read(page, 4)
    c = nb.cells[0]
    m = re.match(r'(# .+\n+(?:> .+(?:\n>.*)*)?)\s*', c.source+'\n')
    rest = c.source[m.end():].strip() if m else ''
    if not rest: return
    nb.cells[1:1] = [nbformat.v4.new_markdown_cell(rest, id=hashlib.sha1(c.id.encode()).hexdigest()[:8])]
    c.source = m[1].strip()
    nbformat.write(nb, page)
    print('title cell split', page)

def save(text, page=None):
    "Put an edited text back into its page (`--update`: ids, tags, outputs of unchanged cells stay)"
    text = Path(text)
    page = Path(page) if page else next(iter(ROOT.glob(f'nbs/**/{text.stem}.ipynb')), ROOT/'nbs'/f'{text.stem}.ipynb')
    page.parent.mkdir(parents=True, exist_ok=True)
    jupytext('--to', 'ipynb', *(['--update'] if page.exists() else ['--set-kernel', 'python3']), text, '-o', page)
    title(page)
    print(page)

def small(png, most=60_000):
    "A stored picture with 256 colours if it is large: a third of the bytes, and nobody sees the difference"
    from PIL import Image
    if len(png)<most*4/3: return png
    buf = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(buf, 'png', optimize=True)
    return base64.b64encode(buf.getvalue()).decode()

def run(page, timeout=1200):
    "Execute the page as nbdev_test would and store its outputs; warnings and progress bars (stderr) are dropped"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(page, 4)
    left = [c for c in nb.cells if c.cell_type=='code' and not SKIP.search(c.source)]
    whole, nb.cells = nb.cells, left
    os.environ |= dict(IN_TEST='1', NO_ALBUMENTATIONS_UPDATE='1')
    try: NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=dict(metadata=dict(path=str(Path(page).resolve().parent)))).execute()
    finally:
        for c in left:
            c.outputs = [o for o in c.outputs if not (o.output_type=='stream' and o.name=='stderr')]
            c.execution_count = None
            c.metadata.pop('execution', None)
            for o in c.outputs:
                if 'execution_count' in o: o['execution_count'] = None
                if 'image/png' in o.get('data', {}): o['data']['image/png'] = small(o['data']['image/png'])
        nb.cells = whole
    nb.metadata = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    nbformat.write(nb, page)
    print('ran', page)

def cells(page):
    "List the cells"
    import nbformat
    for c in nbformat.read(page, 4).cells: print(c.get('id', '-'), c.cell_type, (c.source.splitlines() or [''])[0][:100])

if __name__=='__main__':
    if len(sys.argv)<3: sys.exit(__doc__)
    verb,*args = sys.argv[1:]
    if verb=='save': save(*args)
    else:
        for a in args: dict(py=to_py, run=run, title=title, cells=cells)[verb](a)
