#!/usr/bin/env python
"""How fast are the networks, and how much do they keep for the backward? Writes networks.md beside itself.

    OMP_NUM_THREADS=2 python bench/networks.py [--repeats 5] [--size 512] [--batch 1]

One forward and backward in training mode, fp32, random weights, no stochastic depth. All contestants take
turns within each repeat, so a busy machine slows all of them; times are medians over the repeats. `cpu` is
processor time of all threads, which other processes disturb least. `saved` is what autograd keeps between
forward and backward (each storage once, parameters and input not counted), `peak` the largest resident size
of a child process that does nothing else, above its size before the first step (on a GPU: allocated memory).
Needs `transformers`.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from udanb.models.heads import DAFormerHead
from udanb.models.layers import ConvBN
from udanb.models.segmentor import create_segmentor

DIMS = dict(mit_b0=(32, 64, 160, 256), mit_b2=(64, 128, 320, 512))
DEPTHS = dict(mit_b0=[2, 2, 2, 2], mit_b2=[3, 4, 6, 3])


class Literal(nn.Module):
    "DAFormer's head as it is defined: embed, upsample, stack, branches, bottleneck"

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, feats):
        h, size = self.head, feats[0].shape[-2:]
        x = torch.cat(
            [
                F.interpolate(e(f), size=size, mode='bilinear', align_corners=False)
                for e, f in zip(h.embed_layers, feats)
            ],
            1,
        )
        fused = h.fuse_layer.bottleneck(torch.cat([m(x) for m in h.fuse_layer.aspp_modules], 1))
        return h.conv_seg(h.dropout(fused)), fused


def plain_relu(head):
    "ReLUs that do not overwrite, as in mmcv's default the definition would not"
    for m in head.modules():
        if isinstance(m, ConvBN):
            m.relu = nn.ReLU()
    return head


def smp_net(name):
    import segmentation_models_pytorch as smp

    net = smp.Segformer(name, encoder_weights=None, classes=19)
    for m in net.modules():
        if hasattr(m, 'drop_prob'):
            m.drop_prob = 0.0
    return net


def hf_net(name):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=list(DIMS[name]),
            depths=DEPTHS[name],
            decoder_hidden_size=256,
            num_labels=19,
            drop_path_rate=0.0,
        )
    )


def contestants(name, batch, size, device):
    "(what, who) -> function () -> tensors to backpropagate from; made one by one"

    def img():
        return torch.randn(batch, 3, size, size, device=device)

    def feats():
        return [
            torch.randn(batch, c, size // s, size // s, device=device, requires_grad=True)
            for c, s in zip(DIMS[name], (4, 8, 16, 32))
        ]

    def enc(net, f):
        n, x = net.to(device).train(), img()
        return lambda: f(n, x)

    def head(wrap):
        torch.manual_seed(0)
        h, x = wrap(DAFormerHead(DIMS[name], 19, dropout=0.0)).to(device).train(), feats()
        return lambda: h(x)[:1]

    def ours(kind):
        return create_segmentor(name, 19, kind, dim=256, drop_path=0.0)

    def literal_net():
        n = ours('daformer')
        n.head = Literal(plain_relu(n.head))
        return n

    return {
        ('encoder', 'udanb'): lambda: enc(ours('daformer').backbone, lambda n, x: n(x)),
        ('encoder', 'smp'): lambda: enc(smp_net(name).encoder, lambda n, x: n(x)[-4:]),
        ('encoder', 'transformers'): lambda: enc(
            hf_net(name).segformer, lambda n, x: n(x, output_hidden_states=True).hidden_states
        ),
        ('DAFormer head', 'udanb'): lambda: head(lambda h: h),
        ('DAFormer head', 'literal'): lambda: head(lambda h: Literal(plain_relu(h))),
        ('encoder + DAFormer head', 'udanb'): lambda: enc(
            ours('daformer'), lambda n, x: [n(x).logits]
        ),
        ('encoder + DAFormer head', 'literal head'): lambda: enc(
            literal_net(), lambda n, x: [n(x).logits]
        ),
        ('encoder + SegFormer head (256)', 'udanb'): lambda: enc(
            ours('segformer'), lambda n, x: [n(x).logits]
        ),
        ('encoder + SegFormer head (256)', 'smp, upsamples ×4'): lambda: enc(
            smp_net(name), lambda n, x: [n(x)]
        ),
        ('encoder + SegFormer head (256)', 'transformers'): lambda: enc(
            hf_net(name), lambda n, x: [n(x).logits]
        ),
    }


def step(f, device):
    "Seconds of a forward and backward: wall, cpu"
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    sync()
    w, c = time.perf_counter(), time.process_time()
    sum(y.mean() for y in f()).backward()
    sync()
    return time.perf_counter() - w, time.process_time() - c


def saved(f, params):
    "MiB that autograd keeps"
    seen, own = {}, {p.untyped_storage().data_ptr() for p in params}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            seen[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    n = sum(seen.values()) / 2**20
    del y
    return n


def tensors_of(f):
    "Parameters and inputs that a contestant closes over"
    out = []
    for c in f.__closure__ or ():
        v = c.cell_contents
        if isinstance(v, nn.Module):
            out += v.parameters()
        elif isinstance(v, list):
            out += [t for t in v if torch.is_tensor(t)]
        elif torch.is_tensor(v):
            out.append(v)
    return out


def highest():
    "Largest resident size of this process so far (getrusage would count the parent's, too)"
    return 1024 * next(
        int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')
    )


def child(a):
    "Peak memory of one contestant, MiB"
    f = contestants(a.name, a.batch, a.size, a.device)[tuple(a.only.split('|'))]()
    base = (
        torch.cuda.memory_allocated
        if a.device == 'cuda'
        else lambda: int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    )
    before = base()
    for _ in range(2):
        step(f, a.device)
    peak = torch.cuda.max_memory_allocated() if a.device == 'cuda' else highest()
    print((peak - before) / 2**20)


def peak(a, name, key):
    cmd = [
        sys.executable,
        __file__,
        '--only',
        '|'.join(key),
        '--name',
        name,
        '--batch',
        str(a.batch),
        '--size',
        str(a.size),
        '--device',
        a.device,
    ]
    return float(subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(a):
    where = (
        torch.cuda.get_device_name()
        if a.device == 'cuda'
        else f'CPU, {torch.get_num_threads()} threads'
    )
    lines = [
        f'# Networks: forward + backward, {a.batch}×{a.size}², fp32, {where}, torch {torch.__version__}',
        '',
        f'`OMP_NUM_THREADS=2 python bench/networks.py --repeats {a.repeats}`; '
        f'medians of {a.repeats} interleaved repeats.',
        'The script says what the columns are; ratio = time (cpu time) of that contestant over udanb\'s.',
        '',
    ]
    for name in DIMS:
        made = {k: v() for k, v in contestants(name, a.batch, a.size, a.device).items()}
        with torch.no_grad():
            x, y = (made['DAFormer head', who]()[0] for who in ('udanb', 'literal'))
        gap = (x - y).abs().max().item()
        if gap > 1e-5:
            raise AssertionError(f'{name}: the head differs from its definition by {gap}')
        times = {k: [] for k in made}
        for what in dict.fromkeys(
            k[0] for k in made
        ):  # those that are compared take turns, the others rest
            group = {k: f for k, f in made.items() if k[0] == what}
            for f in group.values():
                step(f, a.device)
            for r in range(a.repeats):
                for k, f in group.items():
                    times[k].append(step(f, a.device))
        lines += [
            f'## {name} (head and its literal reading differ by at most {gap:.0e}, largest logit {x.abs().max():.2f})',
            '',
            '| what | who | s | cpu s | ratio | saved MiB | peak MiB |',
            '|---|---|---|---|---|---|---|',
        ]
        for k, f in made.items():
            wall, cpu = (statistics.median(t) for t in zip(*times[k]))
            w0, c0 = (statistics.median(t) for t in zip(*times[k[0], 'udanb']))
            kept, top = saved(f, tensors_of(f)), peak(a, name, k)
            ratio = f'{wall / w0:.2f} ({cpu / c0:.2f})'
            row = f'| {k[0]} | {k[1]} | {wall:.3f} | {cpu:.3f} | {ratio} | {kept:.0f} | {top:.0f} |'
            lines.append(row)
            print(row, flush=True)
        lines.append('')
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    for k, v in dict(repeats=5, size=512, batch=1).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--only')
    p.add_argument('--name')
    a = p.parse_args()
    torch.set_num_threads(2)
    child(a) if a.only else main(a)
