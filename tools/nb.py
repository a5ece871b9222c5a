#!/usr/bin/env python3
"""Work on the notebook pages from the shell.

    python tools/nb.py py nbs/training/00_losses.ipynb      # page -> $TMPDIR/pages/training/00_losses.py, to edit
    python tools/nb.py save nbs/training/00_losses.ipynb    # that text -> page
    python tools/nb.py run nbs/training/00_losses.ipynb     # execute and store real outputs
    python tools/nb.py title nbs/*/*.ipynb                  # title and subtitle into a cell of their own
    python tools/nb.py cells nbs/training/00_losses.ipynb   # one line per cell: id, kind, first line

Each takes one page or several. The text is in jupytext's py:percent form; the folder of texts mirrors nbs/.
`save` keeps ids, tags and outputs of cells that did not change, makes the page if it is new, and splits its
title as `title` does.
`run` leaves out cells with `#| slow`, `gpu`, `notest`.
"""

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / 'nbs'
TEXTS = Path(tempfile.gettempdir()) / 'pages'
SKIP = re.compile(r'^\s*#\s*\|\s*(slow|gpu|notest|eval:\s*false)\b', re.M)
TITLE = re.compile(r'(# .+\n+(?:> .+(?:\n>.*)*)?)\s*')
KERNEL = dict(display_name='python3', language='python', name='python3')
LARGE = 60_000  # bytes of a picture that is stored with 256 colours


def jupytext(*args):
    "Run jupytext, quietly"
    subprocess.run([sys.executable, '-m', 'jupytext', '-q', *map(str, args)], check=True)


def text_of(page):
    "Where the text of a page is edited: below TEXTS as the page is below nbs/, of this checkout or another"
    parts = Path(page).resolve().with_suffix('.py').parts
    if NBS.name not in parts[:-1]:
        raise SystemExit(f'{page}: give a page below {NBS.name}/')
    top = len(parts) - parts[::-1].index(NBS.name)
    return TEXTS.joinpath(*parts[top:])


def to_py(page):
    "Write the page as a text to edit"
    out = text_of(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    jupytext('--to', 'py:percent', page, '-o', out)
    print(out)


def title(page):
    "Split title and subtitle from the text below: nbdev makes front matter of the whole cell, the site loses the rest"
    import nbformat

    nb = nbformat.read(page, 4)
    first = nb.cells[0]
    found = TITLE.match(first.source + '\n')
    rest = first.source[found.end() :].strip() if found else ''
    if not rest:
        return
    new_id = hashlib.sha1(first.id.encode()).hexdigest()[:8]
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(rest, id=new_id))
    first.source = found[1].strip()
    nbformat.write(nb, page)
    print('title cell split', page)


def save(page):
    "Put the edited text back into its page"
    page = Path(page)
    text = text_of(page)
    if page.suffix != '.ipynb' or not text.exists():
        raise SystemExit(
            f'{page}: there is no text {text}; save takes a page that `py` has written'
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    how = ['--update'] if page.exists() else ['--set-kernel', 'python3']
    jupytext('--to', 'ipynb', *how, text, '-o', page)
    title(page)
    print(page)


def small(png):
    "A stored picture, base64; with 256 colours if it is large: a third of the bytes, and it looks the same"
    from PIL import Image

    if len(png) < LARGE * 4 / 3:
        return png
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    out = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def tidy(cell):
    "Drop warnings and progress bars (stderr) and counts from a cell's outputs; make its pictures small"
    cell.outputs = [
        o for o in cell.outputs if not (o.output_type == 'stream' and o.name == 'stderr')
    ]
    cell.execution_count = None
    cell.metadata.pop('execution', None)
    for output in cell.outputs:
        if 'execution_count' in output:
            output['execution_count'] = None
        data = output.get('data', {})
        if 'image/png' in data:
            data['image/png'] = small(data['image/png'])


def run(page, timeout=1200):
    "Execute the page as nbdev_test would and store its outputs; a cell that fails raises, and the page stays as it was"
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(page, 4)
    every = nb.cells
    nb.cells = [c for c in every if c.cell_type == 'code' and not SKIP.search(c.source)]
    os.environ |= dict(IN_TEST='1', NO_ALBUMENTATIONS_UPDATE='1')
    where = dict(metadata=dict(path=str(Path(page).resolve().parent)))
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=where)
    try:
        client.execute()
    finally:
        for cell in nb.cells:
            tidy(cell)
        nb.cells = every
    nb.metadata = dict(kernelspec=KERNEL)
    nbformat.write(nb, page)
    print('ran', page)


def cells(page):
    "List the cells"
    import nbformat

    for cell in nbformat.read(page, 4).cells:
        first = (cell.source.splitlines() or [''])[0]
        print(cell.get('id', '-'), cell.cell_type, first[:100])


VERBS = dict(py=to_py, save=save, run=run, title=title, cells=cells)

if __name__ == '__main__':
    verb, *pages = sys.argv[1:] or ['']
    if verb not in VERBS or not pages:
        sys.exit(__doc__)
    for page in pages:
        VERBS[verb](page)
