#!/usr/bin/env python3
"""How fast is data? Each step as the published code does it (re-created from its description) against udanb's.

    python bench/data.py            # about two minutes; prints the table and stores it as bench/data.md
    python bench/data.py --quick    # seconds, small files; checks that both ways give the same, stores nothing

The files are drawn by `udanb.demo.render.render_scene` in the true sizes of GTA and Cityscapes, with noise
that makes their PNGs as large as real ones. Everything runs in one process on one thread; times are CPU time,
so they are times per core. The two ways take turns on the same work.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1')
import cv2
import numpy as np
import torch
from PIL import Image

cv2.setNumThreads(0)
torch.set_num_threads(1)
from udanb.core.image_io import read_image, read_label
from udanb.core.labels import (
    CITYSCAPES19,
    CITYSCAPES_IDS,
    CITYSCAPES_VOID,
    make_lookup_table,
    remap,
)
from udanb.data.cache import use_cache
from udanb.data.catalog import CITYSCAPES, GTA
from udanb.data.class_stats import class_stats
from udanb.data.datasets import SegDataset
from udanb.data.loaders import train_loader
from udanb.data.samplers import RareClassSampler
from udanb.data.transforms import TrainTransform
from udanb.data.validation import validate_split
from udanb.demo.render import render_scene
from udanb.inference.metrics import ConfusionMatrix

TO_ID = np.full(256, 0, np.uint8)  # train id -> Cityscapes id
for _i, _t in CITYSCAPES_IDS.items():
    TO_ID[_t] = _i
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])

# ---- files --------------------------------------------------------------------------------------


def photo(seed, domain, hw, noise):
    "A scene drawn at half size, enlarged, with the noise of a camera"
    img, _ = render_scene(seed, domain, (hw[0] // 2, hw[1] // 2))
    img = cv2.resize(img, hw[::-1], interpolation=cv2.INTER_CUBIC)
    if domain == 'target':
        img = cv2.GaussianBlur(img, (0, 0), 0.8)  # the misty world's camera is noisy already
    img = np.clip(
        img + noise * np.random.default_rng(seed).standard_normal(img.shape, np.float32) + 0.5,
        0,
        255,
    ).astype(np.uint8)
    return img, render_scene(seed, domain, hw)[1]  # the label with edges of full sharpness


def put(path, arr, palette=False):
    "PNG as libpng writes photographs (all filters), or a label as an 8-bit palette PNG"
    path.parent.mkdir(parents=True, exist_ok=True)
    if palette:
        im = Image.frombytes('P', arr.shape[::-1], arr.tobytes())
        im.putpalette([*CITYSCAPES19.palette.ravel().tolist()])
        return im.save(path)
    if arr.ndim == 2:
        return Image.fromarray(arr).save(path)
    assert cv2.imwrite(
        str(path),
        arr[..., ::-1],
        [cv2.IMWRITE_PNG_COMPRESSION, 4, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS],
    )


def write_files(root, n_src, n_tgt, shrink):
    "GTA with palette labels, the train-id labels that a converter would have written, and Cityscapes without labels"
    for i in range(n_src):
        img, lbl = photo(i, 'source', (1052 // shrink, 1914 // shrink), 0.3)
        put(root / f'gta/images/{i + 1:05d}.png', img)
        put(root / f'gta/labels/{i + 1:05d}.png', TO_ID[lbl], palette=True)
        put(root / f'converted/{i + 1:05d}.png', lbl)
    for i in range(n_tgt):
        put(
            root / f'cityscapes/leftImg8bit/train/a/{i:06d}_leftImg8bit.png',
            photo(i, 'target', (1024 // shrink, 2048 // shrink), 0)[0],
        )


# ---- the published ways, from their description -------------------------------------------------


def masks(lbl):
    "Label ids to train ids, one class after the other"
    out = np.full(lbl.shape, 255, np.uint8)
    for i, t in CITYSCAPES_IDS.items():
        out[lbl == i] = t
    return out


def stats_unique(path):
    "Convert a label, then count it"
    ids, px = np.unique(masks(np.asarray(Image.open(path))), return_counts=True)
    return {int(i): int(n) for i, n in zip(ids, px) if i != 255}


def three_hists(pred, lbl, n=19):
    "Areas of intersection, prediction and label of int64 maps"
    keep = lbl != 255
    pred, lbl = pred[keep], lbl[keep]
    areas = [
        torch.histc(x.float(), bins=n, min=0, max=n - 1) for x in (pred[pred == lbl], pred, lbl)
    ]
    return torch.stack(areas).long()


def pipeline(img_path, lbl_path, box, crop, rng, cat_max=None):
    "Load, fit, crop (again until varied), flip, normalise, to tensors"
    img = cv2.imread(str(img_path), cv2.IMREAD_COLOR)
    lbl = None if lbl_path is None else np.array(Image.open(lbl_path))
    f = min(max(box) / max(img.shape[:2]), min(box) / min(img.shape[:2]))
    size = tuple(int(s * f + 0.5) for s in img.shape[1::-1])
    img = cv2.resize(img, size, interpolation=cv2.INTER_LINEAR)
    if lbl is not None:
        lbl = cv2.resize(lbl, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(11):
        y, x = rng.integers(img.shape[0] - crop + 1), rng.integers(img.shape[1] - crop + 1)
        if cat_max is None:
            break
        ids, px = np.unique(lbl[y : y + crop, x : x + crop], return_counts=True)
        px = px[ids != 255]
        if len(px) > 1 and px.max() / px.sum() < cat_max:
            break
    img, lbl = (
        img[y : y + crop, x : x + crop],
        None if lbl is None else lbl[y : y + crop, x : x + crop],
    )
    if rng.random() < 0.5:
        img, lbl = img[:, ::-1], None if lbl is None else lbl[:, ::-1]
    img = cv2.cvtColor(np.ascontiguousarray(img).astype(np.float32), cv2.COLOR_BGR2RGB)
    img = cv2.multiply(cv2.subtract(img, (*MEAN, 0)), (*(1 / STD), 0))
    return torch.from_numpy(
        np.ascontiguousarray(img.transpose(2, 0, 1))
    ), None if lbl is None else torch.from_numpy(lbl.astype(np.int64))


# ---- measuring ----------------------------------------------------------------------------------


def race(old, new, repeats, work):
    "Take turns; ms of CPU time per piece of work, and the ratio of each turn"
    ts = ([], [])
    for r in range(-1, repeats):  # turn -1 warms up
        for f, t in zip((old, new), ts):
            s = time.process_time()
            f()
            if r >= 0:
                t.append((time.process_time() - s) * 1e3 / work)
    q = [a / b for a, b in zip(*ts)]
    return statistics.median(ts[0]), statistics.median(ts[1]), statistics.median(q), min(q), max(q)


class Draws:
    "A sampler with its draws made beforehand, so that both ways load the same files for the same classes"

    def __init__(self, rcs, todo):
        self.__dict__ |= vars(rcs)
        self.todo, self.k = todo, 0

    def draw(self, rng):
        self.k += 1
        return self.todo[(self.k - 1) % len(self.todo)]


class Bench:
    "The files, the rows of the table, and how much to do"

    def __init__(self, root, quick):
        self.root = root
        self.quick = quick
        self.rows = []
        self.ms = {}
        self.repeats, shrink, n = (2, 4, 3) if quick else (5, 1, 16)
        self.src_box, self.tgt_box = (
            (720 // shrink, 1280 // shrink),
            (512 // shrink, 1024 // shrink),
        )
        self.crop, self.px = 512 // shrink, 3000 // shrink**2
        write_files(root / 'native', n, n, shrink)
        self.src, self.tgt = (
            SegDataset(s, root=root / 'native', labels=s is GTA) for s in (GTA, CITYSCAPES)
        )
        self.boxes = self.src_box, self.tgt_box
        for f, size in zip((self.src, self.tgt), self.boxes):
            validate_split(f, size=size, workers=0, quiet=True)  # what prepare_data does
        self.lbls = [read_label(self.src.label_path(i)) for i in range(len(self.src))]
        self.stats = class_stats(self.src, cache=False, workers=0, quiet=True)

    def folders(self, copy):
        return [
            use_cache(f, size) if copy else f for f, size in zip((self.src, self.tgt), self.boxes)
        ]

    def converted(self, i):
        return self.root / 'native' / 'converted' / self.src.path(i).name

    def row(self, what, ask, old, new, work, why):
        "One line of the table; `why` may be a function, called after the race"
        old, new, q, lo, hi = race(old, new, self.repeats, work)
        self.ms[what] = old, new
        self.rows.append(
            (
                what,
                f'{old:.2f}',
                f'{new:.2f}',
                f'**{q:.1f}**',
                f'{lo:.1f}–{hi:.1f}',
                f'≥ {ask}' if ask else '',
                why() if callable(why) else why,
            )
        )

    def files(self):
        "Decoding alone"
        imgs, tgts, lbls = (
            [f(i) for i in range(len(self.src))]
            for f in (self.src.path, self.tgt.path, self.src.label_path)
        )

        def same(a, b):
            return [np.testing.assert_array_equal(a(p), b(p)) for p in imgs[:1]]

        def bgr(p):
            return cv2.imread(str(p), cv2.IMREAD_COLOR)

        same(lambda p: bgr(p)[..., ::-1], read_image)
        why = 'kornia-rs (Rust `png`) instead of OpenCV (libpng, zlib); OpenCV before the turn from BGR to RGB'
        for what, ps in (('read a GTA image', imgs), ('read a Cityscapes image', tgts)):
            self.row(
                what,
                None,
                lambda: [bgr(p) for p in ps],
                lambda: [read_image(p) for p in ps],
                len(ps),
                why,
            )
        self.row(
            'read a GTA label (palette PNG)',
            None,
            lambda: [np.asarray(Image.open(p)) for p in lbls],
            lambda: [read_label(p) for p in lbls],
            len(lbls),
            'kornia-rs instead of Pillow (zlib-ng)',
        )

    def labels(self):
        "Conversion and statistics"
        table = make_lookup_table(CITYSCAPES_IDS, CITYSCAPES_VOID)
        for l in self.lbls:
            np.testing.assert_array_equal(masks(l), remap(l, table))
        self.row(
            'convert a label (in memory)',
            5,
            lambda: [masks(l) for l in self.lbls],
            lambda: [remap(l, table) for l in self.lbls],
            len(self.lbls),
            'one table lookup (`cv2.LUT`) instead of a comparison and a masked write per class',
        )
        paths = [self.src.label_path(i) for i in range(len(self.src))]
        assert [n for _, n in self.stats] == [stats_unique(p) for p in paths]
        self.row(
            'class statistics of a label file',
            5,
            lambda: [stats_unique(p) for p in paths],
            lambda: class_stats(self.src, cache=False, workers=0, quiet=True),
            len(paths),
            'decoder, table lookup, and a histogram of bytes instead of a sort',
        )

    def iou(self):
        "One native map, as a network gives it: int64"
        lbl = torch.from_numpy(
            remap(self.lbls[0], make_lookup_table(CITYSCAPES_IDS, CITYSCAPES_VOID))
        )
        lbl = torch.nn.functional.interpolate(
            lbl[None, None], (256, 512) if self.quick else (1024, 2048)
        )[0, 0].contiguous()
        rng = np.random.default_rng(0)
        wh = lbl.shape[::-1]  # a prediction: shifted, and wrong in blobs
        wrong = cv2.resize(rng.random((16, 32), np.float32), wh) < 0.15
        other = cv2.resize(
            rng.integers(0, 19, (16, 32), np.uint8), wh, interpolation=cv2.INTER_NEAREST
        )
        pred = torch.from_numpy(np.where(wrong, other, lbl.roll((3, 5), (0, 1)).clamp(max=18)))
        keep, want = lbl != 255, three_hists(pred.long(), lbl.long())
        mat = ConfusionMatrix(19).update(pred, lbl).mat
        assert (
            want[0].equal(mat.diagonal())
            and want[1].equal(mat.sum(0))
            and want[2].equal(mat.sum(1))
            and keep.sum() == mat.sum()
        )
        conf, k = ConfusionMatrix(19), 4
        whys = (
            'one two-dimensional histogram of bytes (`cv2.calcHist`) instead of masking and three float histograms',
            'the same; 8-byte pixels need not be checked and narrowed first',
        )
        for what, dt, why in zip(('int64', 'uint8'), (torch.int64, torch.uint8), whys):
            p, t = pred.to(dt), lbl.to(dt)
            self.row(
                f'IoU update of a {lbl.shape[0]}×{lbl.shape[1]} map, {what}',
                5,
                lambda: [three_hists(p, t) for _ in range(k)],
                lambda: [conf.update(p, t) for _ in range(k)],
                k,
                why,
            )

    def pairs(self):
        "Source and target for training, with rare-class sampling"
        rcs, loads = RareClassSampler(self.stats, 19, min_px=self.px), []
        rng = np.random.default_rng(0)
        todo = [rcs.draw(rng) for _ in range(4 if self.quick else 12)]

        def old(rare=True):
            rng = np.random.default_rng(1)
            for i, c in todo:
                for k in range(11 if rare else 1):
                    img, lbl = pipeline(
                        self.src.path(i), self.converted(i), self.src_box, self.crop, rng, 0.75
                    )
                    if (lbl == c).sum() > self.px // 2:
                        break
                loads.append(k + 1)
                pipeline(
                    self.tgt.path(int(rng.integers(len(self.tgt)))),
                    None,
                    self.tgt_box,
                    self.crop,
                    rng,
                )

        def new(copy, rare=True):
            src, tgt = self.folders(copy)
            tfms = (
                TrainTransform(self.src_box, (self.crop,) * 2, cat_max_ratio=0.75),
                TrainTransform(self.tgt_box, (self.crop,) * 2, margins=tgt.margins),
            )

            def go():
                n = 0  # batches
                for b in train_loader(
                    src,
                    tgt,
                    *tfms,
                    batch=1,
                    seed=1,
                    steps=len(todo),
                    rcs=Draws(rcs, todo),
                    min_crop_px=self.px // 2 if rare else 0,
                ):
                    n += 1
                assert n == len(todo) and b.src.img.shape == b.tgt.img.shape == (
                    1,
                    3,
                    self.crop,
                    self.crop,
                )
                return b

            return go

        a, b = new(False)(), new(True)()
        assert (
            a.src.img.equal(b.src.img) and a.src.lbl.equal(b.src.lbl) and a.tgt.img.equal(b.tgt.img)
        )  # resized files change nothing
        plain, rare, small = (
            f'pair {s}'
            for s in (
                'from native files, no class asked for',
                'with rare-class sampling, native files',
                'with rare-class sampling, resized files',
            )
        )

        def saved(a, i, b, j):
            return f'{self.ms[a][i] - self.ms[b][j]:.0f}'

        def reads():
            images = ('read a GTA image', 'read a Cityscapes image')
            gain = sum(theirs - ours for theirs, ours in (self.ms[k] for k in images))
            return f'{gain:.0f} by the image decoder'

        def redraws():
            return (
                f'of {saved(rare, 0, rare, 1)} ms, {saved(rare, 0, plain, 0)} because a file is decoded once '
                'and only the crop drawn again '
                f'(published: {sum(loads) / len(loads):.1f} loads per source image here), {reads()}'
            )

        def resized():
            return (
                f'besides, {saved(rare, 1, small, 1)} ms because files hold the size that is trained at: fewer pixels, '
                'a PNG filter that decodes fast, no resizing'
            )

        self.row(
            plain,
            None,
            lambda: old(False),
            new(False, False),
            len(todo),
            lambda: f'of {saved(plain, 0, plain, 1)} ms, {reads()}',
        )
        loads.clear()
        self.row(rare, 2, old, new(False), len(todo), redraws)
        self.row(small, 4, old, new(True), len(todo), resized)

    def about(self, name, folder):
        "How many images, how large"
        ps = [folder.path(i) for i in range(len(folder))]
        size = '×'.join(map(str, read_image(ps[0]).shape[:2]))
        megabytes = sum(p.stat().st_size for p in ps) / len(ps) / 1e6
        return f'{len(ps)} of {name}, {size}, {megabytes:.1f} MB'

    def table(self):
        head = (
            'what',
            'published way, ms',
            'udanb, ms',
            'ratio',
            'range',
            'asked',
            'where it comes from',
        )
        return '\n'.join(
            '| ' + ' | '.join(r) + ' |'
            for r in (head, ('---', '--:', '--:', '--:', '--:', '--:', '---'), *self.rows)
        )


def cpu():
    "The processor's name"
    try:
        return next(
            l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


NOTE = """# Data: udanb against the published way, per core

`python bench/data.py`: one process, one thread, CPU time; the two ways take turns {n} times on the same work.
ms and ratio are medians over the turns, range is that of the ratio. Checked in the run: both ways give the
same labels, statistics and areas; native and resized copies (of `prepare_data`) give the same batches.
Files: {files}, drawn by `udanb.demo.render.render_scene`.
`published way`: re-created from the description of DAFormer's code (mmsegmentation 0.16); target labels,
which it loads and never uses, are left out on both sides.
Measured on {host}; whole run {s:.0f} s.

{table}
"""


def main(quick=False):
    start = time.time()
    warnings.filterwarnings('ignore', 'rare-class sampling')  # a dozen drawn streets have no train
    with tempfile.TemporaryDirectory() as d:
        b = Bench(Path(d), quick)
        for part in (b.files, b.labels, b.iou, b.pairs):
            part()
        files = ', '.join(b.about(n, f) for n, f in (('GTA', b.src), ('Cityscapes', b.tgt)))
    print(b.table())
    if not quick:
        libraries = f'OpenCV {cv2.__version__}, numpy {np.__version__}, torch {torch.__version__}'
        host = f'{cpu()}, Python {platform.python_version()}, {libraries}'
        text = NOTE.format(
            n=b.repeats, files=files, host=host, s=time.time() - start, table=b.table()
        )
        Path(__file__).with_suffix('.md').write_text(text, encoding='utf-8')
    print(f'{time.time() - start:.0f} s')


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--quick', action='store_true', help='small files, seconds, stores nothing')
    main(**vars(ap.parse_args()))
