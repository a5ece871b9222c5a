#!/usr/bin/env python3
"""Would DIDA's bank label the target better than the classifier? mIoU of both opinions of a finished run, on its target's val.

    python tools/opinions.py outputs/town-camvid-daformer-s0 --data-root ../shared/data           # every fourth image, the teacher's opinion
    python tools/opinions.py RUN --data-root ../shared/data --every 1 --which student --tau .03

The run need not know of a bank. One is filled here with the student's embeddings of source batches (training mode, as in training), the run's own
crops and sampling; then the network is asked about whole images of val: its classifier, the bank's class masses, and the mean of both. Minutes on a CPU.
"""
import argparse, os
os.environ |= dict(NO_ALBUMENTATIONS_UPDATE='1')
from collections import defaultdict
from itertools import islice
import pandas as pd, torch
from udanb.runs.build import batches, box, folders
from udanb.core.utils import progress, read_json, resolve
from udanb.data.loaders import eval_loader
from udanb.core.utils import upsample
from udanb.methods.instance_bank import InstanceBank, aggregate, candidates, check_bank, grid_labels
from udanb.inference.metrics import Confusion, iou_dict
from udanb.runs.recipe import from_json
from udanb.runs.results import load_run
from udanb.data.transforms import EvalTfm

@torch.no_grad()
def filled(net, loader, n, edge):
    "A bank of what the network says about labelled batches"
    bank,gen = None,torch.Generator().manual_seed(0)
    for b in loader:
        out = net.train()(b[0].img)
        bank = bank or InstanceBank(n, out.fused.shape[1])
        lbl = grid_labels(b[0].lbl, out.fused.shape[-2:])
        for c,here in zip(*candidates(out.fused, lbl, n, edge, gen)): bank.put(c, here)
    return bank

@torch.no_grad()
def opinions(net, bank, img, tau):
    "Probabilities (1,C,H,W) of the classifier, of the bank, and their mean"
    out,size = net(img),img.shape[-2:]
    p = upsample(out.logits, size).softmax(1)
    a = upsample(aggregate(bank.sims(out.fused, tau).softmax(1), bank.label, bank.n), size)
    return dict(classifier=p, bank=a, mean=(p+a)/2)

def main(args=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('run', help='folder of a finished run'); ap.add_argument('--data-root', default='data')
    ap.add_argument('--which', default='teacher', choices=['teacher','student']); ap.add_argument('--tau', type=float, default=.1)
    ap.add_argument('--batches', type=int, default=41, help='source batches that fill the bank'); ap.add_argument('--every', type=int, default=4)
    ap.add_argument('--means', action='store_true', help='plain class means, without a boundary pixel')
    a = ap.parse_args(args)
    r = from_json(read_json(resolve(a.run)/'recipe.json'))
    src,tgt,vals = folders(r, a.data_root)
    bank = filled(load_run(resolve(a.run)), islice(batches(r, src, tgt)(0), a.batches), len(src.space), not a.means)
    net,conf = load_run(resolve(a.run), a.which),defaultdict(lambda: Confusion(len(src.space)))
    for v in vals.values():
        for i,(x,lbl) in enumerate(progress(eval_loader(v, EvalTfm(box(r, v.spec))), 'val')):
            if i%a.every: continue
            for name,p in opinions(net, bank, x.img, a.tau).items(): conf[name].update(upsample(p, lbl.shape[-2:]).argmax(1), lbl[None])
    table = pd.DataFrame({k: dict(miou=100*c.miou()) | iou_dict(c, src.space) for k,c in conf.items()}).T.round(1)
    print('bank:', {k: round(v, 2) for k,v in check_bank(bank, a.tau).items()}); print(table.to_string())
    return table

if __name__=='__main__': main()
