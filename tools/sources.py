"""What the checks of `make check` read: pages and their cells, Python files and their code lines."""

import json
import re
from pathlib import Path

EXPORTED = re.compile(r'^\s*#\s*\|\s*(exports?|exporti|exec_doc)\b', re.M)
SKIPPED_FOLDERS = {'.ipynb_checkpoints', '_proc', '__pycache__'}


def notebooks(nbs):
    "Every notebook below a folder, sorted"
    return [p for p in sorted(Path(nbs).rglob('*.ipynb')) if not SKIPPED_FOLDERS & set(p.parts)]


def read_cells(page):
    "`(kind, source, outputs)` of each cell of a notebook"
    cells = json.loads(Path(page).read_text(encoding='utf-8'))['cells']
    return [(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in cells]


def exported_cells(page):
    "Sources of the cells that become part of the module"
    return [text for kind, text, _ in read_cells(page) if kind == 'code' and EXPORTED.search(text)]


def lesson_cells(page):
    "Sources of the code cells that stay in the notebook, without their magic lines"
    cells = [text for kind, text, _ in read_cells(page) if kind == 'code']
    return [re.sub(r'^[%!].*$', '', c, flags=re.M) for c in cells if not EXPORTED.search(c)]


def prose(page):
    "The Markdown of a notebook, a text per cell"
    return [text for kind, text, _ in read_cells(page) if kind == 'markdown']


def count_code_lines(text):
    "Lines that are neither blank nor only a comment"
    lines = (line.strip() for line in text.splitlines())
    return sum(bool(line) and not line.startswith('#') for line in lines)


def is_python(path):
    "A module, or a script whose first line names Python; generated indices are left out"
    if path.name == '_modidx.py' or SKIPPED_FOLDERS & set(path.parts) or not path.is_file():
        return False
    if path.suffix:
        return path.suffix == '.py'
    with path.open('rb') as file:
        first = file.readline()
    return first.startswith(b'#!') and b'python' in first


def python_files(folder):
    "Every Python file below a folder, sorted"
    return [path for path in sorted(Path(folder).rglob('*')) if is_python(path)]
