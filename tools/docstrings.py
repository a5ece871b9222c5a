#!/usr/bin/env python3
"""Does the library say what a caller has to know? Prints what is missing by module; exit 1 if anything is.

    python tools/docstrings.py               # udanb and nbs
    python tools/docstrings.py --count       # a line per module

Public are the names in `__all__`, and of their classes the methods (those added with `@patch`, too) without a
leading underscore. Of each:

- **docstring**: functions, classes and methods have one.
- **returns**: a function that returns or yields a value says what it is, in a comment on the line of its return
  annotation (`) -> Tensor:  # (B,H,W) int64`), with the word "returns" or "yields" in its docstring, or by a
  docstring that is about the value. That is one that begins, or goes on after a semicolon, with an article, "Each",
  "All", "Whether", "Which", "Where", "Why", "How many", "Share of" (any one word before "of"), a value in
  backquotes or a shape; one with a shape after a comma; a question. A bare annotation does not do. Properties, and
  methods that return `self`, need no more than their docstring.
- **raises**: each exception that a function raises itself stands in its docstring or in a comment of its signature,
  by name, or there is the word "raises". `NotImplementedError` and a caught error raised anew are left out.
- **parameters**: one with neither default nor annotation has a comment on its line, or stands in the docstring.

The docstring of a class counts for its `__init__` and `forward` as well. Methods in HOOKS are called by a framework
that gives them their parameters and takes what they return: only the rule about errors holds for them.

- **words**: docstrings, comments and error messages of the library, and the Markdown of all notebooks, use none of
  the words in WORDS; the table says what to write instead.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from typing import NamedTuple

from sources import notebooks, prose, python_files

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
PROPERTIES = {'property', 'cached_property'}
OF_CLASS = {'__init__', 'forward'}  # described by the docstring of their class, too
HOOKS = {'train', 'apply', 'get_params', 'get_params_dependent_on_data'}  # torch, albumentations
UNNAMED = {'NotImplementedError'}
SAYS_RETURN = re.compile(r'\b(returns?|returned|yields?|yielded)\b', re.I)
FIRST_WORDS = (
    r"an?|the|one|each|every|all|both|true|whether|which|where|why|how (many|much|far|long)|\w+ of"
)
ABOUT_VALUE = re.compile(
    rf'(^|; )(({FIRST_WORDS})\b|`|\()'  # it begins with the value
    r'|, \((\d|[A-Z])\w*,'  # a shape: ", (H,W,3) uint8"
    r'|\?$',
    re.I,
)
SAYS_RAISE = re.compile(r'\brais(e|es|ed|ing)\b', re.I)

EVERYWHERE = 'docstring comment error page'
WORDS = [  # (pattern, where, what to write instead)
    (r'\bbeliev(e|es|ed|ing|able)\b', EVERYWHERE, 'use, weight, accept'),
    (r'\b(mis|dis)?trust(s|ed|ing)?\b', EVERYWHERE, 'weight, confidence, rely on'),
    (r'\b(nobody|somebody)\b', EVERYWHERE, 'name the user, process or function'),
    (r'\bwhoever\b', EVERYWHERE, 'name the user, or: to do …'),
    (r'\bslow copy\b', EVERYWHERE, 'EMA teacher'),
    (r'\basked of\b|\bwhat is asked\b', EVERYWHERE, 'losses'),
    (r'\bmend(s|ed|ing)?\b', EVERYWHERE, 'repair'),
    (r'\bbottomless\b', EVERYWHERE, 'os.devnull'),
    (r'\bvouch(es|ed|ing)?\b', EVERYWHERE, 'show, record'),
    (
        r'\blook(s|ed|ing)?( (it|them|(a|the|your|its) \w+))? over\b',
        EVERYWHERE,
        'inspect, validate',
    ),
    (r'\bthe other way r?a?round\b', EVERYWHERE, 'say which way'),
    (r'\b(says|said|tells|told)\b', 'docstring', 'contains, reports, records'),
]


class Public(NamedTuple):
    "A public function, class or method"

    name: str
    node: ast.AST
    owner: ast.ClassDef | None = None  # the class it stands in


class Comments:
    "Comments of a file by line"

    def __init__(self, text):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = [t for t in tokens if t.type == tokenize.COMMENT]
        self.lines = {t.start[0]: t.string.lstrip('# ') for t in found}
        self.alone = {t.start[0] for t in found if not t.line[: t.start[1]].strip()}

    def between(self, first, last):
        "Comments of these lines, the last one included, as one text"
        return ' '.join(self.lines[i] for i in range(first, last + 1) if i in self.lines)

    def beside(self, node):
        "The comment at the end of a node, or on lines of its own just above it"
        if node.end_lineno in self.lines:
            return self.lines[node.end_lineno]
        return self.lines[node.lineno - 1] if node.lineno - 1 in self.alone else ''


def exported_names(tree):
    "The names in `__all__`"
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return set(ast.literal_eval(node.value))
    return set()


def decorators(node):
    "Last names of a function's decorators: `patch` of `@patch(cls_method=True)`"
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(call).split('.')[-1] for call in calls}


def patched_class(node):
    "Name of the class a function is added to by `@patch`, or None"
    if 'patch' not in decorators(node) or not node.args.args:
        return None
    annotation = node.args.args[0].annotation
    return annotation and ast.unparse(annotation).split('|')[0].strip()


def is_public_method(node):
    "A method without a leading underscore, or `__init__`; a setter has the docstring of its property"
    if not isinstance(node, FUNCTIONS) or decorators(node) & {'setter', 'deleter'}:
        return False
    return node.name == '__init__' or not node.name.startswith('_')


def public_things(tree):
    "Every `Public` function, class and method of a module"
    names = exported_names(tree)
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            owner = patched_class(node)
            if owner and not owner.startswith('_') and is_public_method(node):
                yield Public(f'{owner}.{node.name}', node)
            elif not owner and node.name in names:
                yield Public(node.name, node)
        elif isinstance(node, ast.ClassDef) and node.name in names:
            yield Public(node.name, node)
            for method in node.body:
                if is_public_method(method):
                    yield Public(f'{node.name}.{method.name}', method, node)


def own_nodes(function):
    "The nodes of a function, without those of functions and classes inside it"
    todo = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, SCOPES):
            todo += ast.iter_child_nodes(node)


def gives_value(function):
    "Does it return or yield anything but None or `self`?"
    for node in own_nodes(function):
        if isinstance(node, ast.YieldFrom):
            return True
        if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
            if ast.unparse(node.value) not in ('None', 'self'):
                return True
    return False


def raised_names(function):
    "Exception classes that a function raises itself"
    found = set()
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error).split('.')[-1])
    return {name for name in found - UNNAMED if name[0].isupper()}


def bare_parameters(function):
    "Parameters without default and annotation, but for `self` and `cls`"
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    required = positional[: len(positional) - len(args.defaults)]
    required += [a for a, default in zip(args.kwonlyargs, args.kw_defaults) if default is None]
    required += [a for a in (args.vararg, args.kwarg) if a is not None]
    return [a for a in required if a.annotation is None and a.arg not in ('self', 'cls')]


def signature_comments(function, comments):
    "All comments of a function's signature"
    return comments.between(function.lineno, function.body[0].lineno - 1)


def return_comment(function, comments):
    "The comment on the line of the return annotation"
    return comments.beside(function.returns) if function.returns else ''


def names_value(function, docs, comments):
    "Is it said what a function returns?"
    if decorators(function) & PROPERTIES or return_comment(function, comments):
        return True
    return bool(SAYS_RETURN.search(docs) or ABOUT_VALUE.search(docs))


def missing_raises(function, text):
    "Names of exceptions that the text lacks"
    if SAYS_RAISE.search(text):
        return []
    return [n for n in sorted(raised_names(function)) if not re.search(rf'\b{n}\b', text)]


def missing_parameters(function, docs, comments):
    "Names of parameters that are described nowhere"
    return [
        a.arg
        for a in bare_parameters(function)
        if not comments.beside(a) and not re.search(rf'\b{a.arg}\b', docs)
    ]


def check_public(thing, comments):
    "What is missing of one public name, as (rule, message)"
    node = thing.node
    docs = ast.get_docstring(node) or ''
    if node.name in OF_CLASS and thing.owner:
        docs += '\n' + (ast.get_docstring(thing.owner) or '')
    if not docs.strip() and node.name not in HOOKS | OF_CLASS:
        yield 'docstring', 'no docstring'
    if not isinstance(node, ast.ClassDef):
        yield from check_signature(node, docs.strip(), comments)


def check_signature(function, docs, comments):
    "What is missing of a function, as (rule, message)"
    raised = missing_raises(function, f'{docs} {signature_comments(function, comments)}')
    if raised:
        yield 'raises', f'does not name {", ".join(raised)}'
    if function.name in HOOKS:
        return
    if gives_value(function) and not names_value(function, docs, comments):
        yield 'returns', 'does not say what it returns'
    unknown = missing_parameters(function, docs, comments)
    if unknown:
        yield 'parameters', f'does not describe {", ".join(unknown)}'


def is_warning(node):
    "A call of `warn` or `add_note`"
    if not isinstance(node, ast.Call):
        return False
    return ast.unparse(node.func).split('.')[-1] in ('warn', 'add_note')


def texts_of(tree, comments):
    "`(kind, line, text)` of every docstring, comment and error message of a module"
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield 'docstring', node.body[0].lineno, text
        if isinstance(node, ast.Raise) or is_warning(node):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield 'error', part.lineno, part.value
    for line, text in comments.lines.items():
        yield 'comment', line, text


def house_words(kind, text):
    "`(word found, what to write instead)` of a text; names in backquotes are left alone"
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    for pattern, where, instead in WORDS:
        if kind in where.split():
            for match in re.finditer(pattern, text, re.I):
                yield match[0], instead


def check_module(path):
    "`(rule, message)` of a module"
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    comments = Comments(text)
    for thing in public_things(tree):
        for rule, message in check_public(thing, comments):
            yield rule, f'{thing.node.lineno:4} {thing.name}: {message}'
    for kind, line, part in texts_of(tree, comments):
        for word, instead in house_words(kind, part):
            yield 'words', f'{line:4} {kind}: "{word}" -> {instead}'


def check_page(page):
    "`(rule, message)` of the Markdown of a notebook"
    for text in prose(page):
        title = text.strip().split('\n')[0][:50]
        for word, instead in house_words('page', text):
            yield 'words', f'"{word}" -> {instead}   (in "{title}…")'


def main(*options):
    checks = {path: check_module for path in python_files('udanb')}
    checks |= {page: check_page for page in notebooks('nbs')}
    total = Counter()
    for path, check in checks.items():
        found = list(check(path))
        total.update(rule for rule, _ in found)
        if found:
            print(f'{path}: {len(found)}')
        if '--count' not in options:
            for _, message in found:
                print(f'    {message}')
    rules = ', '.join(f'{rule} {count}' for rule, count in total.items())
    print(f'docstrings: {len(checks)} modules and notebooks, {rules or "nothing missing"}')
    return bool(total)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
