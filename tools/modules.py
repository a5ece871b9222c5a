#!/usr/bin/env python3
"""The map of packages and modules in CONTRIBUTING.md, from the titles of the pages (part of `make export`).

python tools/modules.py CONTRIBUTING.md
"""

import re
import sys
from pathlib import Path

from packages import PACKAGES, find_pages, module_imports, place
from sources import prose

BEGIN = '<!-- modules: written by tools/modules.py -->'
END = '<!-- end of modules -->'


def subtitle(page):
    "The quoted sentence below a page's title, on one line"
    match = re.search(r'^>(.+(?:\n>.+)*)', prose(page)[0], re.M)
    if match is None:
        raise SystemExit(f'{page}: the first cell has no subtitle (a line that begins with >)')
    return ' '.join(re.sub(r'\n>', ' ', match[1]).split())


def package_lines(package, pages, imports):
    "Heading of a package, the packages it imports, and a line per module"
    own = {m: page for m, page in pages.items() if page.parent.name == package}
    used = {pages[other].parent.name for module in own for other in imports[module]}
    names = ', '.join(f'`{p}`' for p in PACKAGES if p in used and p != package)
    lines = [
        f'### {package}',
        '',
        f'Imports {names}.' if names else 'Imports no other package.',
        '',
    ]
    lines += [f'- [`{m}`]({page.as_posix()}): {subtitle(page)}' for m, page in own.items()]
    return [*lines, '']


def module_map(lib, nbs):
    "The generated part of CONTRIBUTING.md, between its two markers"
    pages = dict(sorted(find_pages(nbs).items(), key=lambda item: place(item[1])))
    imports = module_imports(lib, pages)
    lines = [line for package in PACKAGES for line in package_lines(package, pages, imports)]
    return '\n'.join([BEGIN, '', *lines, END])


def main(path='CONTRIBUTING.md', lib='udanb', nbs='nbs'):
    path = Path(path)
    text = path.read_text(encoding='utf-8')
    if BEGIN not in text or END not in text:
        raise SystemExit(f'{path}: the markers {BEGIN} and {END} are missing')
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(head + module_map(Path(lib), Path(nbs)) + tail, encoding='utf-8')


if __name__ == '__main__':
    main(*sys.argv[1:])
