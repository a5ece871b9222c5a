#!/usr/bin/env python3
"""The public names of every module, in tests/api.json: a name that vanishes breaks somebody's notebook, so a test compares.

    python tools/api.py            # write the list anew (part of `make export`)
    python tools/api.py --check    # only say what vanished and what is new; exit 1 if anything vanished
"""
import ast, json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT/'tests'/'api.json'

def names(path):
    "What a module exports: its `__all__`, read without importing it"
    for o in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(o, ast.Assign) and any(getattr(t,'id',None)=='__all__' for t in o.targets): return sorted(ast.literal_eval(o.value))
    return []

def public(lib=ROOT/'udanb'):
    "`{module: [names]}` of the whole library"
    mods = {'.'.join(f.relative_to(lib).with_suffix('').parts): names(f) for f in sorted(lib.rglob('*.py')) if not f.name.startswith('_')}
    return {k:v for k,v in mods.items() if v}

def compare(old, new):
    "Names that vanished and names that are new, as `module.name`"
    flat = lambda d: {f'{m}.{n}' for m,ns in d.items() for n in ns}
    return sorted(flat(old)-flat(new)), sorted(flat(new)-flat(old))

if __name__=='__main__':
    old = json.loads(LIST.read_text()) if LIST.exists() else {}
    gone,fresh = compare(old, public())
    for n in gone: print('vanished:', n)
    for n in fresh: print('new:', n)
    if '--check' in sys.argv[1:]: sys.exit(bool(gone))
    LIST.write_text(json.dumps(public(), indent=1)+'\n')
