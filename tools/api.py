#!/usr/bin/env python3
"""The public names of every module, in tests/api.json.

A vanished name breaks notebooks out there, so a test compares.

    python tools/api.py            # write the list anew (part of `make export`)
    python tools/api.py --check    # only say what vanished and what is new; exit 1 if anything vanished
"""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / 'tests' / 'api.json'


def names(path):
    "What a module exports: its `__all__`, read without importing it"
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign):
            targets = [getattr(target, 'id', None) for target in node.targets]
            if '__all__' in targets:
                return sorted(ast.literal_eval(node.value))
    return []


def public(lib=ROOT / 'udanb'):
    "`{module: [names]}` of the whole library"
    found = {}
    for path in sorted(lib.rglob('*.py')):
        exported = [] if path.name.startswith('_') else names(path)
        if exported:
            found['.'.join(path.relative_to(lib).with_suffix('').parts)] = exported
    return found


def full_names(modules):
    "`module.name` of every name"
    return {f'{module}.{name}' for module, exported in modules.items() for name in exported}


def compare(old, new):
    "Names that vanished and names that are new, as `module.name`"
    before, now = full_names(old), full_names(new)
    return sorted(before - now), sorted(now - before)


def main(*options):
    old = json.loads(LIST.read_text()) if LIST.exists() else {}
    gone, fresh = compare(old, public())
    for name in gone:
        print('vanished:', name)
    for name in fresh:
        print('new:', name)
    if '--check' in options:
        return bool(gone)
    LIST.write_text(json.dumps(public(), indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
