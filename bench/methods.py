#!/usr/bin/env python3
"""What does a training step of each method cost, in time and memory? Relative to DAFormer; CLUDA's contrast in chunks.

    python bench/methods.py             # minutes; prints the tables and stores them as bench/methods.md
    python bench/methods.py --quick     # seconds: two recipes at 64², stores nothing
    python bench/methods.py --turns 3 --recipes daformer mic --size 512       # a part, or another size; stores nothing

Timed is `Trainer.step` and nothing else: the teacher's update and labels, all views, forwards and backwards,
AdamW. Images are noise, labels blocks of random classes; loading, scores and checkpoints are not in it. One
thread, fp32, CPU. All recipes of a network take turns in one process, each turn beginning with another
recipe, so a busy machine slows all of them; ratios are taken within a turn. Every step is the one at half of
the run's length (CLUDA aims its detail, the teacher's decay is the final one).
Memory is that of a process per recipe, forked off before anything has been computed, its libraries warmed by
two steps at 64² whose memory is then given back (malloc_trim; Linux with glibc is needed). `peak` is the
highest resident size (VmHWM) during the first two steps above the size before them: AdamW's moments,
gradients, activations, scratch space, and what the allocator wastes. Of a third step: `tensors` is the most
that torch had allocated above what it had before it, `saved` the most that autograd kept at one time (each
storage once; parameters, buffers and the loader's tensors not counted). `held` is what lies there between
steps: student, teacher, frozen encoder, banks, without AdamW's moments.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
import traceback
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', KINETO_LOG_LEVEL='99')
import torch

torch.set_num_threads(1)
from accelerate import Accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from udanb.core.labels import CITYSCAPES19 as SPACE
from udanb.core.types import IGNORE, IMAGENET_MEAN, IMAGENET_STD, Sample
from udanb.core.utils import lookup, seed_all
from udanb.methods.cluda import chunked_contrast
from udanb.models.segmentor import param_groups
from udanb.runs.build import build_network, make_method
from udanb.runs.presets import RECIPES
from udanb.runs.recipe import replace_flat
from udanb.training.losses import FeatureDistance
from udanb.training.trainer import Trainer

MB = 2**20
NETS = dict(  # recipe fields; lite0 as in the settings of town, MiT-B0 with the usual head of 256 channels
    tf_efficientnet_lite0=dict(
        backbone='tf_efficientnet_lite0', embed_dim=64, pretrained='imagenet', freeze_bn=True
    ),
    mit_b0=dict(backbone='mit_b0', pretrained=None),
)
SAID = dict(
    tf_efficientnet_lite0='tf_efficientnet_lite0 with ImageNet weights and frozen BatchNorm statistics, '
    'DAFormer head of 64 channels',
    mit_b0='mit_b0 with random weights, DAFormer head of 256 channels',
)


def added(*names, to='daformer'):
    return replace_flat(RECIPES[to], extensions=names)


RUNS = {
    k: RECIPES[k] for k in ('source_only', 'dacs', 'daformer', 'mic', 'dida', 'dida_mic')
} | dict(
    cluda=added('cluda'),
    hrda=RECIPES['hrda'],
    cluda_hrda=added('cluda', to='hrda'),
    soft=added('soft'),
    mmd=added('mmd'),
    ddb_cut=replace_flat(RECIPES['dacs'], method='ddb_cut'),
)
BASE = 'daformer'  # that all others are divided by
ASKED = dict(mic=1.5, dida=1.3, cluda=1.5)  # times DAFormer's time

# ---- a step -------------------------------------------------------------------------------------


def noise(size, seed, labels, batch=2):
    "A batch: noise of unit variance, labels in blocks of 32 with some void; the whole target is valid"
    g = torch.Generator().manual_seed(seed)
    lbl = torch.randint(len(SPACE) + 1, (batch, size // 32, size // 32), generator=g)
    lbl = (
        torch.where(lbl == len(SPACE), IGNORE, lbl)
        .repeat_interleave(32, 1)
        .repeat_interleave(32, 2)
    )
    img = torch.randn(batch, 3, size, size, generator=g)
    img = img.clamp(
        *(
            torch.tensor([(v - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD)]).view(3, 1, 1)
            for v in (0, 1)
        )
    )  # colours that an image can have
    return Sample(
        img,
        lbl if labels else None,
        None if labels else torch.ones(batch, size, size),
        tuple(f'noise {i}' for i in range(batch)),
    )


def trainer(name, net, size):
    "What `udanb.runs.build` puts together, without data; in the middle of its run"
    r = replace_flat(RUNS[name], crop_size=(size, size), **NETS[net])
    seed_all(r.seed)
    model = build_network(r, len(SPACE), r.model.pretrained)
    method = make_method(r, model, SPACE)
    t = Trainer(
        model,
        method,
        groups=param_groups(model, r.optim.lr, r.optim.head_lr_mult, r.optim.weight_decay),
        loader=None,
        steps=r.optim.steps,
        out='nowhere',
        seed=r.seed,
        accelerator=Accelerator(cpu=True),
        quiet=True,
    )
    t.it = r.optim.steps // 2
    return t


def pair(name, size):
    return noise(size, 0, True), None if RUNS[name].method == 'source_only' else noise(
        size, 1, False
    )


def clock(f):
    "CPU seconds of this process (which has one thread), and wall seconds"
    w, c = time.perf_counter(), time.process_time()
    f()
    return time.process_time() - c, time.perf_counter() - w


def times(names, net, size, turns):
    "name -> [(cpu, wall), one per turn]; a first turn warms up"
    todo = {n: (trainer(n, net, size), pair(n, size)) for n in names}
    got = {n: [] for n in names}
    for r in range(-1, turns):
        k = r % len(names)
        for n in names[k:] + names[:k]:
            t, p = todo[n]
            s = clock(lambda: t.step(*p))
            if r >= 0:
                got[n].append(s)
    return got


# ---- memory, in processes of their own ----------------------------------------------------------


def status(key):
    "Bytes, out of /proc/self/status"
    return 1024 * next(
        int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key + ':')
    )


def climb(f):
    "How far the resident size rises while `f` runs"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what was freed goes back to the system, or it would be reused unseen
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM begins anew at the present size
    low, top = status('VmRSS'), status('VmHWM')
    if top > low + MB:
        raise RuntimeError(
            f'VmHWM is {(top - low) / MB:.0f} MiB above VmRSS after its reset: '
            'this kernel does not reset it, peaks cannot be measured'
        )
    f()
    return status('VmHWM') - low


def allocated(f):
    "The most bytes that torch has allocated while `f` runs, above what it had before"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    now = most = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == '[memory]':
            now += e.nbytes()
            most = max(most, now)
    return most


def storages(tensors):
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def held(t):
    "Storages of student and method; a frozen encoder is hidden from `modules`, so it is asked for"
    frozen = [m.frozen[0] for m in t.method.modules() if isinstance(m, FeatureDistance)]
    return storages(
        x for m in (t.student, t.method, *frozen) for x in (*m.parameters(), *m.buffers())
    )


class Kept:
    "A saved tensor; the ledger is told when autograd lets go of it"

    def __init__(self, ledger, t):
        self.ledger = ledger
        self.t = t
        self.key = ledger.add(t)

    def __del__(self):
        self.ledger.drop(self.key)


class Ledger:
    "Storages that autograd holds now, and the most it ever held"

    def __init__(self, own):
        self.own = own
        self.n = {}
        self.size = {}
        self.now = 0
        self.most = 0

    def add(self, t):
        s = t.untyped_storage()
        k = s.data_ptr()
        if k in self.own:
            return None
        self.n[k] = self.n.get(k, 0) + 1
        if self.n[k] == 1:
            self.size[k] = s.nbytes()
            self.now += self.size[k]
            self.most = max(self.most, self.now)
        return k

    def drop(self, k):
        if k is None:
            return
        self.n[k] -= 1
        if not self.n[k]:
            self.now -= self.size.pop(k)
            del self.n[k]


def saved(f, own):
    "The most bytes that autograd keeps at one time while `f` runs"
    l = Ledger(own)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: Kept(l, t), lambda k: k.t):
        f()
    gc.collect()
    if l.now:
        raise RuntimeError(f'{l.now} bytes are still held after the step')
    return l.most


def memory(name, net, size):
    "In a child: number of passes; MiB held, peak, tensors, saved"
    warm = trainer(name, net, 64)
    for _ in range(2):
        warm.step(
            *pair(name, 64)
        )  # code of the libraries is read into memory, threads and pools are made
    del warm
    t, p = trainer(name, net, size), pair(name, size)
    peak = climb(
        lambda: [t.step(*p) for _ in range(2)]
    )  # in the second AdamW's moments are there from the beginning
    own = held(t) | storages(x for s in p if s for x in (s.img, s.lbl, s.wgt) if x is not None)
    third = {}
    third['tensors'] = allocated(lambda: third.update(saved=saved(lambda: t.step(*p), own)))
    return dict(
        passes=len(t.method),
        held=sum(held(t).values()) / MB,
        peak=peak / MB,
        **{k: v / MB for k, v in third.items()},
    )


# ---- CLUDA's contrast ---------------------------------------------------------------------------


def cells(side, batch=2, dim=256):
    "Random cells of `batch` grids; a detail covers a quarter of each"
    g = torch.Generator().manual_seed(0)
    n = batch * side * side
    low, high = (F.normalize(torch.randn(n, dim, generator=g), dim=1) for _ in range(2))
    lbl = torch.randint(len(SPACE) + 1, (n,), generator=g)
    inside = torch.zeros(batch, side, side, dtype=torch.bool)
    inside[:, : side // 2 + 1, : side // 2 + 1] = True
    inside = inside.flatten()
    leaves = low, high * inside[:, None], torch.rand(n, generator=g)
    return (
        *(x.requires_grad_() for x in leaves),
        torch.where(lbl == len(SPACE), IGNORE, lbl),
        torch.rand(n, generator=g),
        inside,
    )


def there_and_back(xs, chunk):
    loss = chunked_contrast(*xs, chunk=chunk)
    loss.backward()
    return loss.item()


def contrast(side, chunk):
    "In a child: seconds of forward and backward, MiB above what was there, loss and gradient norms"
    there_and_back(cells(5), chunk)
    xs, got = cells(side), {}

    def timed():
        got['cpu'], got['wall'] = clock(lambda: got.update(loss=there_and_back(xs, chunk)))

    peak = climb(timed)
    return got | dict(peak=peak / MB, grad=[x.grad.norm().item() for x in xs[:3]])


def contrast_tensors(side, chunk):
    "In a child: MiB that torch allocates for it"
    xs = cells(side)
    return allocated(lambda: there_and_back(xs, chunk)) / MB


def child(f, *args):
    "`f(*args)` in a process forked off this one, which has computed nothing yet"
    r, w = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(w, json.dumps(f(*args)).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(w)
    with open(r) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(
            f'{f.__name__}{args} failed in its process, see above (killed without a word: too little memory?)'
        )
    return json.loads(text)


# ---- tables -------------------------------------------------------------------------------------

med = statistics.median


def table(head, rows, left=1):
    return '\n'.join(
        '| ' + ' | '.join(r) + ' |'
        for r in (head, ['---'] * left + ['--:'] * (len(head) - left), *rows)
    )


HEAD = (
    'recipe',
    'passes',
    'CPU s',
    'wall s',
    'CPU ×',
    'range',
    'wall ×',
    'asked',
    'peak MiB',
    'peak ×',
    'tensors MiB',
    'tensors ×',
    'saved MiB',
    'held MiB',
)


def steps_table(ms, ts):
    "The costs of a network's recipes, as a table and a sentence about HRDA; memory and times by recipe"

    def ratios(n, base, i):
        return [a[i] / b[i] for a, b in zip(ts[n], ts[base])]

    def row(n):
        q = ratios(n, BASE, 0)
        times_ = [f'{med(x):.3f}' for x in zip(*ts[n])]
        ask = f'≤ {ASKED[n]}' if n in ASKED else ''
        mem = [
            s
            for k in ('peak', 'tensors')
            for s in (f'{ms[n][k]:.0f}', f'{ms[n][k] / ms[BASE][k]:.2f}')
        ]
        return (
            n,
            str(ms[n]['passes']),
            *times_,
            f'**{med(q):.2f}**',
            f'{min(q):.2f}–{max(q):.2f}',
            f'{med(ratios(n, BASE, 1)):.2f}',
            ask,
            *mem,
            *(f'{ms[n][k]:.0f}' for k in ('saved', 'held')),
        )

    text = table(HEAD, [row(n) for n in ts])
    if {'hrda', 'cluda_hrda'} <= ts.keys():
        cpu_ratio, wall_ratio = (med(ratios('cluda_hrda', 'hrda', i)) for i in (0, 1))
        peak_ratio = ms['cluda_hrda']['peak'] / ms['hrda']['peak']
        text += (
            f'\n\n`cluda_hrda` over `hrda`: CPU × {cpu_ratio:.2f}, wall × {wall_ratio:.2f}, '
            f'peak × {peak_ratio:.2f}.'
        )
    return text


def contrast_table(side, chunks, turns):
    "The same loss and gradients by chunks of rows"
    got = {c: [] for c in chunks}
    for _ in range(turns):
        for c in chunks:
            got[c].append(child(contrast, side, c))
    exact = {c: child(contrast_tensors, side, c) for c in chunks}
    all_ = [x for xs in got.values() for x in xs]
    for x in all_:  # chunking must not change the result
        for a, b in zip([x['loss'], *x['grad']], [all_[0]['loss'], *all_[0]['grad']]):
            if abs(a - b) > 1e-4 * abs(b):
                raise AssertionError(f'a chunked contrast differs: {x}, not {all_[0]}')
    n = 2 * side * side

    def row(c):
        cpu, wall, peak = (med(x[k] for x in got[c]) for k in ('cpu', 'wall', 'peak'))
        first = med(x['cpu'] for x in got[chunks[0]])
        return (
            str(c),
            f'{cpu:.2f}',
            f'{wall:.2f}',
            f'{cpu / first:.2f}',
            f'{peak:.0f}',
            f'{exact[c]:.0f}',
            f'{exact[c] * MB / (4 * n * n):.2f}',
        )

    return table(
        ('chunk', 'CPU s', 'wall s', 'CPU ×', 'peak MiB', 'tensors MiB', 'tensors in N×N'),
        [row(c) for c in chunks],
    )


def cpu():
    "The processor's name"
    try:
        return next(
            l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


NOTE = """# Methods: cost of a training step relative to DAFormer

`python bench/methods.py`: one thread, fp32, CPU, 2 source and 2 target images of {size}². The script says
what is measured; s are medians over {turns} turns, × are medians over the turns of this recipe's time over
`{base}`'s in the same turn, range is that of the CPU ×. `peak`: highest resident size above that before two
steps, in a fresh process. `tensors`: the most that torch allocates during a later step. `saved`: the most
that autograd keeps at one time. `held`: student, teacher, frozen encoder and banks, which are in none of the
others. An HRDA recipe sees the same images: context of half the size, detail of half the side, nine windows
of that for the teacher.
Measured on {host}; whole run {s:.0f} s.

{tables}

## CLUDA's contrast in chunks, {n} cells of 256 numbers

Forward and backward of `chunked_contrast` with context, detail and weights, N = 2·{side}² (the published
grid: stride 16 on 1024²), each in a fresh process, {cturns} interleaved turns, medians; memory is above that
of the cells, their gradients included. One N×N matrix of floats has {nn:.0f} MiB; in chunks there are only
slices of chunk×N. The last column is `tensors` over that. Checked in the run: loss and norms of the gradients
agree to 1e-4.

{contrast}
"""


def main(argv=None):
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        '--quick', action='store_true', help='two recipes, small, seconds; stores nothing'
    )
    ap.add_argument('--turns', type=int, default=5)
    ap.add_argument('--recipes', nargs='+', help=f'out of {", ".join(RUNS)}; stores nothing')
    ap.add_argument('--nets', nargs='+', default=[*NETS])
    ap.add_argument('--size', type=int, default=256, help='side of the images, a multiple of 32')
    a = ap.parse_args(argv)
    if a.size % 32:
        ap.error(f'--size {a.size}: not a multiple of 32')
    start, whole = (
        time.time(),
        not (a.quick or a.recipes or a.size != 256 or a.nets != [*NETS]),
    )  # what is stored is always the same table
    names = a.recipes or [*RUNS]
    side = 65
    chunks = (None, 128, 512, 2048)
    cturns = 3
    if a.quick:
        a.nets = a.nets[:1]
        a.size = 64
        a.turns = 1
        side = 9
        chunks = (None, 32)
        cturns = 1
    if a.quick and not a.recipes:
        names = [BASE, 'mic']
    for n in names:
        lookup(n, RUNS, 'recipe')
    for n in a.nets:
        lookup(n, NETS, 'network')
    if BASE not in names:
        names = [BASE, *names]
    ms = {
        net: {n: child(memory, n, net, a.size) for n in names} for net in a.nets
    }  # children first: afterwards this process is not fresh
    con = contrast_table(side, chunks, cturns)
    tables = []
    for net in a.nets:
        tables.append(
            f'## {SAID[net]}\n\n{steps_table(ms[net], times(names, net, a.size, a.turns))}'
        )
        print(tables[-1] + '\n', flush=True)
    print(con)
    if whole:
        host = f'{cpu()}, Python {platform.python_version()}, torch {torch.__version__}'
        n = 2 * side * side
        text = NOTE.format(
            size=a.size,
            turns=a.turns,
            base=BASE,
            host=host,
            s=time.time() - start,
            tables='\n\n'.join(tables),
            n=n,
            side=side,
            cturns=cturns,
            nn=4 * n * n / MB,
            contrast=con,
        )
        Path(__file__).with_suffix('.md').write_text(text, encoding='utf-8')
    print(f'{time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
