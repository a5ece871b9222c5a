#!/usr/bin/env python3
"""Would DIDA's bank label the target better than the classifier? mIoU of both on the target's val, for a finished run.

    python tools/opinions.py outputs/town-camvid-daformer-s0 --data-root ../shared/data
    python tools/opinions.py RUN --data-root ../shared/data --every 1 --which student --tau .03

The run need not know of a bank. One is filled here with the student's embeddings of source batches (training mode,
as in training), the run's own crops and sampling; then the network predicts whole images of val: its classifier,
the bank's class masses, and the mean of both. By default every fourth image and the teacher; minutes on a CPU.
"""

import argparse
import os

os.environ |= dict(NO_ALBUMENTATIONS_UPDATE='1')
from collections import defaultdict
from itertools import islice

import pandas as pd
import torch

from udanb.core.storage import read_json
from udanb.core.utils import progress_bar, resize_map, resolve
from udanb.data.loaders import eval_loader
from udanb.data.transforms import EvalTransform
from udanb.inference.metrics import ConfusionMatrix, iou_dict
from udanb.methods.instance_bank import (
    InstanceBank,
    class_candidates,
    evaluate_bank,
    grid_labels,
    profile_to_class_probs,
)
from udanb.runs.build import eval_image_size, open_datasets, train_loader_factory
from udanb.runs.recipe import from_json
from udanb.runs.results import load_run


@torch.no_grad()
def filled(net, loader, n, edge):
    "A bank of the network's embeddings of labelled batches"
    bank, gen = None, torch.Generator().manual_seed(0)
    for source, *_ in loader:
        out = net.train()(source.img)
        bank = bank or InstanceBank(n, out.fused.shape[1])
        lbl = grid_labels(source.lbl, out.fused.shape[-2:])
        for found, here in zip(*class_candidates(out.fused, lbl, n, edge, gen)):
            bank.update(found, here)
    return bank


@torch.no_grad()
def opinions(net, bank, img, tau):
    "Probabilities (1,C,H,W) of the classifier, of the bank, and their mean"
    out, size = net(img), img.shape[-2:]
    classifier = resize_map(out.logits.float(), size).softmax(1)
    profiles = bank.similarities(out.fused, tau).softmax(1)
    masses = resize_map(profile_to_class_probs(profiles, bank.label, bank.n).float(), size)
    return dict(classifier=classifier, bank=masses, mean=(classifier + masses) / 2)


def confusions(net, bank, recipe, vals, space, args):
    "`{whose prediction: Confusion}` over every n-th image of the val splits"
    found = defaultdict(lambda: ConfusionMatrix(len(space)))
    for val in vals.values():
        loader = eval_loader(val, EvalTransform(eval_image_size(recipe, val.spec)))
        for i, (sample, lbl) in enumerate(progress_bar(loader, 'val')):
            if i % args.every:
                continue
            for name, probs in opinions(net, bank, sample.img, args.tau).items():
                predicted = resize_map(probs.float(), lbl.shape[-2:]).argmax(1)
                found[name].update(predicted, lbl[None])
    return found


def parse(args):
    "The command line"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add('run', help='folder of a finished run')
    add('--data-root', default='data')
    add('--which', default='teacher', choices=['teacher', 'student'])
    add('--tau', type=float, default=0.1)
    add('--batches', type=int, default=41, help='source batches that fill the bank')
    add('--every', type=int, default=4)
    add('--means', action='store_true', help='plain class means, without a boundary pixel')
    return parser.parse_args(args)


def main(args=None):
    a = parse(args)
    recipe = from_json(read_json(resolve(a.run) / 'recipe.json'))
    src, tgt, vals = open_datasets(recipe, a.data_root)
    loader = islice(train_loader_factory(recipe, src, tgt)(0), a.batches)
    bank = filled(load_run(resolve(a.run)), loader, len(src.space), not a.means)
    net = load_run(resolve(a.run), a.which)
    found = confusions(net, bank, recipe, vals, src.space, a)
    scores = {k: dict(miou=100 * c.miou()) | iou_dict(c, src.space) for k, c in found.items()}
    table = pd.DataFrame(scores).T.round(1)
    print('bank:', {k: round(v, 2) for k, v in evaluate_bank(bank, a.tau).items()})
    print(table.to_string())
    return table


if __name__ == '__main__':
    main()
