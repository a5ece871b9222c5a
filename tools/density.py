#!/usr/bin/env python3
"""Can the lines be read? Prints a table of syntax nodes per code line; exit 1 if a limit is broken.

    python tools/density.py               # a row per folder, then what is over a limit
    python tools/density.py --brief       # one line if everything is in order
    python tools/density.py --all         # a row per file, too

A node is a node of `ast`, without contexts and operators (`Load`, `Add`, `And`, `Lt`, …). A code line is
neither blank nor only a comment. Limit: MOST nodes a line, for the average of a folder and for each module of
the library.

What ruff does not see is counted as well, and must not occur:

- lambdas given a name by a tuple assignment or `:=` (E731 sees plain assignments only);
- comprehensions as a statement, built only for their side effect;
- `a, b, c = x, y, z`: three or more names bound to as many values written out. Unpacking one value is fine,
  and so is a permutation of the same names.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from sources import count_code_lines, python_files

LIBRARY = 'udanb'
FOLDERS = (LIBRARY, 'tests', 'tools', 'bench')
MOST = 7.0  # syntax nodes per code line
SHOWN = 12  # offenders, unless --all
UNCOUNTED = (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
RULES = dict(
    lambdas='a lambda is given a name: write a function',
    effects='a comprehension for its side effect: write a loop',
    tuples='three or more names are bound to unrelated values: write a line for each',
)


class Density(NamedTuple):
    "Counts of one file"

    path: Path
    nodes: int
    lines: int
    found: dict  # {rule: line numbers}


def per_line(nodes, lines):
    "Nodes per line; 0 for an empty file"
    return nodes / lines if lines else 0.0


def names_a_lambda(node):
    "`f, g = lambda …, 1` or `(f := lambda …)`"
    if isinstance(node, ast.NamedExpr):
        return isinstance(node.value, ast.Lambda)
    values = node.value.elts if is_tuple_assignment(node, 1) else []
    return any(isinstance(value, ast.Lambda) for value in values)


def is_effect(node):
    "A comprehension as a statement: its value is thrown away"
    return isinstance(node, ast.Expr) and isinstance(node.value, COMPREHENSIONS)


def is_tuple_assignment(node, least):
    "An assignment of `least` or more written-out values to as many targets"
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple | ast.List):
        return False
    values = node.value.elts
    if len(values) < least or any(isinstance(value, ast.Starred) for value in values):
        return False
    tuples = [target for target in node.targets if isinstance(target, ast.Tuple | ast.List)]
    return any(len(target.elts) == len(values) for target in tuples)


def binds_unrelated(node):
    "`a, b, c = x, y, z`, unless the same names are permuted"
    if not is_tuple_assignment(node, 3):
        return False
    values = {ast.unparse(value) for value in node.value.elts}
    targets = [t.elts for t in node.targets if isinstance(t, ast.Tuple | ast.List)]
    return all({ast.unparse(name) for name in names} != values for names in targets)


CHECKS = dict(lambdas=names_a_lambda, effects=is_effect, tuples=binds_unrelated)


def measure(path):
    "The `Density` of a file"
    text = path.read_text(encoding='utf-8')
    nodes = [n for n in ast.walk(ast.parse(text)) if not isinstance(n, UNCOUNTED)]
    found = {rule: sorted(n.lineno for n in nodes if check(n)) for rule, check in CHECKS.items()}
    return Density(path, len(nodes), count_code_lines(text), found)


def row(name, files):
    "A line of the table"
    nodes = sum(file.nodes for file in files)
    lines = sum(file.lines for file in files)
    worst = max((per_line(file.nodes, file.lines) for file in files), default=0)
    counts = ' '.join(f'{sum(len(f.found[rule]) for f in files):8}' for rule in RULES)
    return f'{name:32} {len(files):5} {lines:6} {per_line(nodes, lines):7.2f} {worst:8.2f} {counts}'


def too_dense(folder, files):
    "Averages over MOST, as messages: of the folder, and of each module of the library"
    mean = per_line(sum(f.nodes for f in files), sum(f.lines for f in files))
    wrong = [f'{folder}: {mean:.2f} nodes a line (max {MOST})'] if mean > MOST else []
    if folder == LIBRARY:
        dense = [file for file in files if per_line(file.nodes, file.lines) > MOST]
        dense.sort(key=lambda file: -per_line(file.nodes, file.lines))
        wrong += [f'{f.path}: {per_line(f.nodes, f.lines):.2f} nodes a line' for f in dense]
    return wrong


def offences(files):
    "What RULES forbid, as messages"
    return [
        f'{file.path}:{line}: {text}'
        for rule, text in RULES.items()
        for file in files
        for line in file.found[rule]
    ]


def print_table(folders, every):
    "A row per folder, and one per file if `every`"
    print(f'{"":32} files  lines  a line  densest ' + ' '.join(f'{rule:>8}' for rule in RULES))
    for folder, files in folders.items():
        if every:
            for file in files:
                print(row(str(file.path), [file]))
        print(row(folder, files))


def main(*options):
    folders = {name: [measure(path) for path in python_files(name)] for name in FOLDERS}
    wrong = []
    for folder, files in folders.items():
        wrong += too_dense(folder, files) + offences(files)
    if wrong or '--brief' not in options:
        print_table(folders, '--all' in options)
    shown = wrong if '--all' in options else wrong[:SHOWN]
    print(*shown, sep='\n', end='\n' if shown else '')
    if len(wrong) > len(shown):
        print(f'... and {len(wrong) - len(shown)} more (--all)')
    files = sum(map(len, folders.values()))
    print(f'density: {files} files, {len(wrong)} places over a limit (at most {MOST} nodes a line)')
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
