#!/usr/bin/env python3
"""Does the library keep its order? Prints which package imports which; exit 1 if one of these is broken:

    python tools/packages.py udanb nbs

- a module imports only packages above its own in PACKAGES, and pages with a lower number in its own package;
- so do the lessons of its page, which may use the page's own module as well;
- a module of `methods` with a function that returns a `Method` imports no other such module.

Run notebooks should define no function of more than LONG lines: those are counted, and break nothing.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

from sources import lesson_cells, read_cells

PACKAGES = [
    'core',
    'demo',
    'data',
    'models',
    'checkpoints',
    'training',
    'inference',
    'methods',
    'runs',
]
LONG = 5  # lines of a function's body in a run notebook
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def find_pages(nbs):
    "`{module: page}` of every page that exports"
    found = {}
    for page in sorted(nbs.glob('*/[0-9][0-9]_*.ipynb')):
        source = '\n'.join(text for kind, text, _ in read_cells(page) if kind == 'code')
        module = re.search(r'^#\s*\|\s*default_exp:?\s+([\w.]+)', source, re.M)
        if module:
            found[module[1]] = page
    return found


def place(page):
    "Position of a page: that of its package, and its number"
    package = page.parent.name
    if package not in PACKAGES:
        raise SystemExit(f'{page}: the package {package} is not in PACKAGES of tools/packages.py')
    return PACKAGES.index(package), int(page.name[:2])


def base_of(node, library, package):
    "What follows `from`, as names below the library; None if it is not of the library"
    names = (node.module or '').split('.')
    if node.level:
        return [*package[: len(package) - node.level + 1], *filter(None, names)]
    return names[1:] if names[0] == library else None


def imported_names(tree, library, package=()):
    "Full names below the library that a tree imports: modules, and what is taken out of them"
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
            found |= {'.'.join(name[1:]) for name in names if name[0] == library}
        elif isinstance(node, ast.ImportFrom):
            base = base_of(node, library, package)
            if base is not None:
                found.add('.'.join(base))
                found |= {'.'.join([*base, alias.name]) for alias in node.names}
    return found


def read_module(lib, module):
    "The syntax tree of a module"
    path = lib / (module.replace('.', '/') + '.py')
    return ast.parse(path.read_text(encoding='utf-8'))


def module_imports(lib, pages):
    "`{module: modules of the library it imports}`"
    found = {}
    for module in pages:
        package = module.split('.')[:-1]
        names = imported_names(read_module(lib, module), lib.name, package)
        found[module] = names & set(pages) - {module}
    return found


def check_modules(imports, pages):
    "Upward imports of modules, as messages"
    return [
        f'{module} imports {other}, which comes after it'
        for module, others in imports.items()
        for other in sorted(others)
        if place(pages[other]) >= place(pages[module])
    ]


def check_lessons(library, pages):
    "Imports of later pages in the lessons of a page, as messages"
    wrong = []
    for module, page in pages.items():
        used = set()
        for cell in lesson_cells(page):
            used |= imported_names(ast.parse(cell), library)
        later = [m for m in sorted(used & set(pages)) if place(pages[m]) > place(page)]
        wrong += [f'a lesson of {module} imports {other}, which comes after it' for other in later]
    return wrong


def returns_method(node):
    "Is this a function that makes a `Method`?"
    if not isinstance(node, FUNCTIONS) or node.returns is None:
        return False
    return ast.unparse(node.returns).strip('\'"').split('.')[-1] == 'Method'


def check_methods(lib, imports):
    "Methods that import other methods, as messages"
    modules = [module for module in imports if module.startswith('methods.')]
    makers = {m for m in modules if any(map(returns_method, read_module(lib, m).body))}
    return [
        f'{module} imports {other}: both make a method; move what they share to a helper page'
        for module in sorted(makers)
        for other in sorted(imports[module] & makers)
    ]


def body_lines(function):
    "Lines of a function's body, its docstring left out"
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(nbs):
    "`{run notebook: names of its functions of more than LONG lines}`"
    found = {}
    for page in sorted(nbs.glob('*.ipynb')):
        nodes = [node for cell in lesson_cells(page) for node in ast.walk(ast.parse(cell))]
        functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
        long = [f.name for f in functions if body_lines(f) > LONG]
        if long:
            found[page.stem] = long
    return found


def print_map(imports, pages):
    "A line per package: how many modules, and which packages they import"
    above = defaultdict(set)
    for module, others in imports.items():
        above[pages[module].parent.name] |= {pages[other].parent.name for other in others}
    for package in PACKAGES:
        count = sum(page.parent.name == package for page in pages.values())
        names = ', '.join(p for p in PACKAGES if p in above[package] and p != package)
        print(f'{package:12} {count:2} modules  imports {names or "nothing of udanb"}')


def main(lib='udanb', nbs='nbs'):
    lib = Path(lib)
    pages = find_pages(Path(nbs))
    pages = dict(sorted(pages.items(), key=lambda item: place(item[1])))
    imports = module_imports(lib, pages)
    print_map(imports, pages)
    long = long_functions(Path(nbs))
    if long:
        counts = ', '.join(f'{page} {len(names)}' for page, names in long.items())
        print(
            f'run notebooks with functions of more than {LONG} lines (to move to pages): {counts}'
        )
    wrong = [
        *check_modules(imports, pages),
        *check_lessons(lib.name, pages),
        *check_methods(lib, imports),
    ]
    print('\n'.join(wrong) or f'packages: {len(pages)} modules and their lessons keep the order')
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
