"Geometry against naive code, strong augmentation against the numbers of the published code"

import colorsys
import json
import pickle
import random
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from udanb.core.labels import bincount_ids
from udanb.core.types import IGNORE, IMAGENET_MEAN, denormalize, normalize
from udanb.data.augment import (
    StrongAugmentation,
    adjust_hue,
    adjust_saturation,
    blur_kernel_size,
    color_jitter,
    gaussian_blur,
)
from udanb.data.transforms import (
    AUGMENTATIONS,
    ClassAwareCrop,
    EvalTransform,
    GaussNoise2022,
    PhotoMetricDistortion,
    TrainTransform,
    affine_lut,
    apply_hsv_lut,
    grid_shuffle,
    has_class_variety,
    hue_lut,
    margin_mask,
    resize_keep_ratio,
    resized_shape,
    to_sample,
)

GOLDEN = Path(__file__).parent / 'golden'
UNITS = json.loads((GOLDEN / 'units.json').read_text())
AUG = np.load(GOLDEN / 'aug.npz')
PAD_COLOR = np.round(255 * np.array(IMAGENET_MEAN))


def pair(h=60, w=90, seed=0, cell=10, n=5):
    "An image whose red channel is its label, so that any disagreement between the two shows"
    rng = np.random.default_rng(seed)
    lbl = (
        rng.integers(0, n, (h // cell + 1, w // cell + 1))
        .repeat(cell, 0)
        .repeat(cell, 1)[:h, :w]
        .astype(np.uint8)
    )
    return np.stack(
        [lbl * 10, rng.integers(0, 255, (h, w)), np.arange(h * w).reshape(h, w) % 251], -1
    ).astype(np.uint8), lbl


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize('i', range(len(UNITS['jitter']['cases'])))
def test_jitter_equals_kornia(i):
    c = UNITS['jitter']['cases'][i]
    x = torch.from_numpy(np.random.RandomState(13).random_sample((1, 3, 8, 8)).astype(np.float32))
    y = color_jitter(
        x, *(c[k] for k in ('brightness', 'contrast', 'saturation', 'hue')), c['order']
    )[0]
    torch.testing.assert_close(y, torch.from_numpy(AUG[f'jit{i}']), atol=5e-6, rtol=0)
    got = [
        y.double().sum(),
        y.double().mean(),
        y.double().abs().mean(),
        y.double().std(unbiased=False),
        y.min(),
        y.max(),
    ]
    np.testing.assert_allclose([float(v) for v in got], c['stats'], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize('c', UNITS['blur'], ids=lambda c: f"{c['n']}-{c['sigma']}")
def test_blur_equals_published(c):
    n = c['n']
    x = torch.from_numpy(np.random.RandomState(14).standard_normal((1, 3, n, n)).astype(np.float32))
    assert blur_kernel_size(n) == c['kernel']
    y = gaussian_blur(x, c['sigma'])
    torch.testing.assert_close(
        y[0, :, :6, :6], torch.from_numpy(AUG[f"blur_{n}_{c['sigma']}_6x6"]), atol=2e-6, rtol=0
    )
    got = [
        y.double().sum(),
        y.double().mean(),
        y.double().abs().mean(),
        y.double().std(unbiased=False),
        y.min(),
        y.max(),
    ]
    np.testing.assert_allclose([float(v) for v in got], c['stats'], rtol=2e-5, atol=1e-4)


def test_kernel_rule():
    assert [blur_kernel_size(n) for n in (512, 1024, 64, 192, 256, 100, 20, 5)] == [
        51,
        103,
        7,
        19,
        25,
        9,
        1,
        1,
    ]


@pytest.mark.parametrize('sigma', [0.15, 0.6, 1.15])
def test_short_kernel_equals_the_square_one(sigma):
    x, k = torch.rand(1, 3, 100, 160) * 4 - 2, 51
    t = torch.arange(k, dtype=torch.float64) - k // 2
    taps = torch.exp(-(t**2) / (2 * sigma**2))
    square = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x.double(), [k // 2] * 4, mode='reflect')
    expected = F.conv2d(padded, square.expand(3, 1, k, k), groups=3)
    blurred = gaussian_blur(x, sigma, k).double()
    torch.testing.assert_close(blurred, expected, atol=1e-6, rtol=0)


def test_blur_per_image_and_per_axis():
    x = torch.rand(3, 3, 40, 64)
    y = gaussian_blur(x, torch.tensor([0.2, 0.7, 1.1], dtype=torch.float64))
    for i, s in enumerate((0.2, 0.7, 1.1)):
        assert y[i].equal(gaussian_blur(x[i : i + 1], s)[0])
    bar = torch.zeros(1, 3, 40, 64)
    bar[:, :, 20] = 1
    assert gaussian_blur(bar, 1.0, (1, 9)).equal(
        bar * gaussian_blur(torch.ones_like(bar), 1.0, (1, 9))
    )
    assert not gaussian_blur(bar, 1.0, (9, 1)).equal(bar)


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize('f', [-0.5, -0.2, -0.03, 0.0, 0.07, 0.2, 0.5])
def test_hue_equals_colorsys(f):
    x = torch.rand(3, 6, 7)
    x[:, 0] = x[:1, 0]
    x[:, 1] = 0
    x[:, 2] = 1
    x[1, 3] = x[0, 3]  # grey, black, white, ties
    ref = [
        [
            colorsys.hsv_to_rgb((h + f) % 1, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*p) for p in row)
        ]
        for row in x.movedim(0, -1).tolist()
    ]
    torch.testing.assert_close(
        adjust_hue(x, f), torch.tensor(ref).movedim(-1, 0), atol=3e-6, rtol=0
    )


@pytest.mark.parametrize('f', [0.0, 0.8, 1.0, 1.2, 9.0])
def test_saturation_equals_colorsys(f):
    x = torch.rand(3, 6, 7)
    x[:, 0] = x[:1, 0]
    x[:, 1] = 0
    ref = [
        [
            colorsys.hsv_to_rgb(h, min(1, s * f), v)
            for h, s, v in (colorsys.rgb_to_hsv(*p) for p in row)
        ]
        for row in x.movedim(0, -1).tolist()
    ]
    torch.testing.assert_close(
        adjust_saturation(x, f), torch.tensor(ref).movedim(-1, 0), atol=3e-6, rtol=0
    )


def test_jitter_is_per_image():
    x = torch.rand(3, 3, 8, 8)
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    factors = torch.tensor([[1.1, 0.9, 1.0], [0.9, 1.0, 1.1], [1.2, 0.8, 1.0], [0.1, 0.0, -0.2]])
    y = color_jitter(x, *factors, torch.tensor(orders))
    for i, order in enumerate(orders):
        own = factors[:, i].double().tolist()
        assert y[i].equal(color_jitter(x[i : i + 1], *own, order)[0])
    assert y.min() > -1e-6
    assert y.max() < 1 + 1e-6


def test_strong_coins_and_ranges():
    x = normalize(torch.rand(1, 3, 30, 30))
    jit = 0
    blr = 0
    for s in range(400):
        torch.manual_seed(s)
        jit += not StrongAugmentation(p_blur=0)(x).equal(x)
        torch.manual_seed(s)
        blr += not StrongAugmentation(p_jitter=0)(x).equal(x)
    assert abs(jit / 400 - 0.8) < 0.07
    assert abs(blr / 400 - 0.5) < 0.09


def test_strong_repeats_by_seed_leaves_input_alone_and_shares_coins():
    x = normalize(torch.rand(4, 3, 20, 30))
    keep = x.clone()
    for s in range(20):
        torch.manual_seed(s)
        a = StrongAugmentation()(x)
        after = torch.rand(1)
        torch.manual_seed(s)
        b = StrongAugmentation()(x)
        assert a.equal(b)
        assert x.equal(keep)
        assert torch.rand(1).equal(after)
        changed = [not a[i].equal(x[i]) for i in range(4)]
        assert all(changed) or not any(changed)
    inside = denormalize(StrongAugmentation(1, 0.2, 0)(x))
    assert inside.min() > -1e-5
    assert inside.max() < 1 + 1e-5


def test_strong_needs_no_grad_and_no_device_reads():
    x = normalize(torch.rand(2, 3, 16, 16)).requires_grad_()
    assert not StrongAugmentation(1, p_blur=1)(x).requires_grad
    meta = torch.empty(2, 3, 32, 32, device='meta')  # reading any value back would raise here
    assert StrongAugmentation(1, p_blur=1)(meta).shape == meta.shape


# ---------------------------------------------------------------- geometry


def test_fit_sizes_of_the_papers():
    table = {
        ((1052, 1914), (720, 1280)): (704, 1280),
        ((1052, 1914), (1440, 2560)): (1407, 2560),
        ((760, 1280), (760, 1280)): (760, 1280),
        ((1024, 2048), (512, 1024)): (512, 1024),
        ((1080, 1920), (540, 960)): (540, 960),
        ((1080, 1920), (720, 1280)): (720, 1280),
        ((1914, 1052), (720, 1280)): (1280, 704),
    }
    for (hw, size), want in table.items():
        assert resized_shape(hw, size) == want
    assert resized_shape((1, 5000), (10, 10)) == (1, 10)
    assert resize_keep_ratio(np.zeros((5000, 1), np.uint8), (10, 10)).shape == (10, 1)


def test_labels_are_never_interpolated():
    img, lbl = pair(60, 90, n=3)
    lbl = lbl * 100
    assert set(np.unique(resize_keep_ratio(lbl, (37, 55), nearest=True))) <= set(np.unique(lbl))
    assert resize_keep_ratio(img, None) is img
    assert EvalTransform((30, 45))(img).shape == (30, 45, 3)


@pytest.mark.parametrize('crop', [(20, 30), (60, 90), (1, 1)])
def test_image_and_label_move_together(crop):
    img, lbl = pair()
    tfm = TrainTransform(None, crop, flip=0.5)
    for s in range(30):
        a, l, v = tfm(img, lbl, np.random.default_rng(s))
        assert a.shape == (*crop, 3)
        assert l.shape == v.shape == crop
        assert v.all()
        assert (a[..., 0] == l * 10).all()


def test_every_crop_is_a_window_of_the_image_and_all_places_occur():
    img, lbl = pair(12, 13)
    img[..., 2] = np.arange(12 * 13).reshape(12, 13)
    tfm = TrainTransform(None, (10, 10))
    seen = set()
    flips = []
    for s in range(600):
        a = tfm(img, lbl, np.random.default_rng(s))[0][..., 2].astype(int)
        flip = a[0, 0] > a[0, -1]
        y, x = divmod(int(a[0, -1] if flip else a[0, 0]), 13)
        win = img[y : y + 10, x : x + 10, 2]
        assert (a == (win[:, ::-1] if flip else win)).all()
        seen.add((y, x))
        flips.append((flip, y, x))
    assert len(seen) == 12  # 3x4 places, the last ones included
    f = np.array(flips, float)
    # the flip knows nothing of the place
    assert abs(f[:, 0].mean() - 0.5) < 0.08
    assert abs(np.corrcoef(f.T)[0, 1:]).max() < 0.12


def test_padding_is_mean_colour_ignored_and_invalid():
    img, lbl = pair(20, 30)
    tfm = TrainTransform(None, (32, 48), cat_max_ratio=0.75)
    a, l, v = tfm(img, lbl, np.random.default_rng(1))
    pad = v == 0
    assert pad[20:].all()
    assert not pad[:20].all()
    assert (l[pad] == IGNORE).all()
    assert (a[pad] == PAD_COLOR).all()
    assert (~pad).sum() == 600
    assert (l[~pad] != IGNORE).all()
    normalized = to_sample(a).img[0]
    assert abs(normalized[:, torch.from_numpy(pad)]).max() < 0.01


def test_margins_follow_the_geometry():
    img, lbl = pair(64, 128)
    marked = img.copy()
    marked[...] = 200
    marked[:4] = marked[-8:] = 0
    marked[:, :6] = marked[:, -2:] = 0  # image shows the margins themselves
    tfm = TrainTransform((32, 64), (24, 24), margins=(4, 8, 6, 2))
    for s in range(20):
        a, none, v = tfm(marked, None, np.random.default_rng(s))
        assert none is None
        assert ((a[..., 0] == 200) == (v == 1)).mean() > 0.999
    with pytest.raises(ValueError, match='leave nothing'):
        TrainTransform(None, (8, 8), margins=(30, 40, 0, 0))(img, None, np.random.default_rng(0))
    with pytest.raises(ValueError):
        margin_mask((8, 8), (-1, 0, 0, 0))


@pytest.mark.parametrize('size', [None, (30, 45)])
@pytest.mark.parametrize(
    'step', [(slice(None, -3), slice(None)), (slice(None, None, 2), slice(None, None, 2))]
)  # the second fits to the very same size
def test_label_of_another_size_is_refused(size, step):
    img, lbl = pair()
    tfm = TrainTransform(size, (16, 16))
    with pytest.raises(ValueError, match=r'label is .* its image \(60, 90\)'):
        tfm(img, lbl[step], np.random.default_rng(0))


def test_void_mask_is_kept_and_cannot_be_changed():
    m = margin_mask((64, 128), (4, 8, 6, 2), (32, 64))
    assert m is margin_mask((64, 128), (4, 8, 6, 2), (32, 64))
    assert m.shape == (32, 64)
    assert not m.flags.writeable
    np.testing.assert_array_equal(
        m, resize_keep_ratio(margin_mask((64, 128), (4, 8, 6, 2)), (32, 64), nearest=True)
    )
    TrainTransform((32, 64), (32, 64), margins=(4, 8, 6, 2), augment='grid')(
        pair(64, 128)[0], None, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(m, margin_mask.__wrapped__((64, 128), (4, 8, 6, 2), (32, 64)))


def test_counts_equal_bincount_on_views():
    l = np.random.default_rng(0).integers(0, 256, (50, 70), np.uint8)
    views = [
        l,
        l[3:40, 5:66],
        l[:1],
        l[:, 7:8],
        l[9:10, 9:10],
        l[::2, ::3],
    ]
    for view in views:
        counts = bincount_ids(view)
        assert counts.dtype == np.int64
        assert (counts == np.bincount(view.ravel(), minlength=256)).all()


# ---------------------------------------------------------------- the whole transform


def written_out(
    img, lbl, rng, size, crop, cat_max=None, flip=0.5, margins=None, want=None, min_px=0
):
    "`TrainTransform` without albumentations: two seeds, two streams, NumPy's slices"
    place, coin = [random.Random(int(rng.integers(2**32))) for _ in range(2)]
    H, W = img.shape[:2]
    t, b, l, r = margins or (0, 0, 0, 0)
    valid = np.zeros((H, W), np.uint8)
    valid[t : H - b, l : W - r] = 1
    if size:
        f = min(max(size) / max(H, W), min(size) / min(H, W))
        wh = int(W * f + 0.5), int(H * f + 0.5)
        img, valid = (
            cv2.resize(img, wh, interpolation=cv2.INTER_LINEAR),
            cv2.resize(valid, wh, interpolation=cv2.INTER_NEAREST),
        )
        if lbl is not None:
            lbl = cv2.resize(lbl, wh, interpolation=cv2.INTER_NEAREST)
    grow = [(0, max(0, c - n)) for c, n in zip(crop, img.shape)]
    img = np.stack(
        [
            np.pad(img[..., c], grow, constant_values=round(255 * IMAGENET_MEAN[c]))
            for c in range(3)
        ],
        -1,
    )
    valid, lbl = (
        np.pad(valid, grow),
        None if lbl is None else np.pad(lbl, grow, constant_values=IGNORE),
    )
    for i in range(11):
        for j in range(11):
            y, x = [int((n - c + 1) * place.random()) for n, c in zip(img.shape, crop)]
            win = slice(y, y + crop[0]), slice(x, x + crop[1])
            if lbl is None:
                break
            ids, n = np.unique(lbl[win][lbl[win] != IGNORE], return_counts=True)
            if cat_max is None or (len(ids) > 1 and n.max() < cat_max * n.sum()):
                break
        if lbl is None or want is None or (lbl[win] == want).sum() > min_px:
            break
    turn = (lambda v: v[:, ::-1]) if coin.random() < flip else lambda v: v
    return turn(img[win]), None if lbl is None else turn(lbl[win]), turn(valid[win])


@settings(max_examples=120, deadline=None)
@given(
    h=st.integers(8, 70),
    w=st.integers(8, 70),
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.none() | st.tuples(st.integers(20, 60), st.integers(20, 60)),
    cat_max=st.sampled_from([None, 0.3, 0.75]),
    want=st.none() | st.integers(0, 4),
    margins=st.none() | st.tuples(*[st.integers(0, 3)] * 4),
    labelled=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_train_transform_equals_the_same_thing_written_out(
    h, w, crop, size, cat_max, want, margins, labelled, seed
):
    img, lbl = pair(h, w, seed % 97, cell=7)
    lbl[:3] = IGNORE
    lbl = lbl if labelled else None
    tfm = TrainTransform(size, crop, cat_max, margins=margins)
    a = np.random.default_rng(seed)
    b = np.random.default_rng(seed)
    for _ in range(2):  # the second view shows that both took as much from the generator
        got = tfm(img, lbl, a, want, 20)
        ref = written_out(img, lbl, b, size, crop, cat_max, 0.5, margins, want, 20)
        for x, y in zip(got, ref, strict=True):
            if y is None:
                assert x is None
            else:
                np.testing.assert_array_equal(x, y)


@settings(max_examples=150, deadline=None)
@given(
    h=st.integers(1, 80),
    w=st.integers(1, 80),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    size=st.none() | st.tuples(st.integers(1, 80), st.integers(1, 80)),
    cat_max=st.sampled_from([None, 0.75]),
    edges=st.tuples(*[st.floats(0, 0.49)] * 4),
    ids=st.lists(st.integers(0, 255), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    augment=st.lists(st.sampled_from(sorted(AUGMENTATIONS)), max_size=3),
)
def test_labels_and_padding_of_any_size(h, w, crop, size, cat_max, edges, ids, seed, augment):
    rng = np.random.default_rng(seed)
    img = rng.integers(0, 256, (h, w, 3), np.uint8)
    lbl = rng.choice(np.uint8(ids), (h, w))
    margins = tuple(int(share * n) for share, n in zip(edges, (h, h, w, w)))
    img_before, lbl_before = img.copy(), lbl.copy()
    tfm = TrainTransform(size, crop, cat_max, margins=margins, augment=augment)
    a, l, v = tfm(img, lbl, rng)
    assert a.shape == (*crop, 3)
    assert l.shape == v.shape == crop
    assert a.dtype == l.dtype == v.dtype == np.uint8
    assert set(np.unique(l)) <= {*ids, IGNORE}
    assert set(np.unique(v)) <= {0, 1}
    assert (img == img_before).all()
    assert (lbl == lbl_before).all()
    resized_h, resized_w = resized_shape((h, w), size) if size else (h, w)
    inside = min(resized_h, crop[0]) * min(resized_w, crop[1])
    tfm = TrainTransform(size, crop, cat_max, augment=augment)
    a, l, v = tfm(img, np.zeros_like(lbl), rng)
    assert (v == 0).sum() == crop[0] * crop[1] - inside
    assert (l[v == 0] == IGNORE).all()
    assert (l[v == 1] == 0).all()
    if not {'photometric', 'noise'} & {*augment}:
        assert (a[v == 0] == PAD_COLOR).all()


@settings(max_examples=120, deadline=None)
@given(
    h=st.integers(1, 120),
    w=st.integers(1, 120),
    crop=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    half=st.booleans(),
    axis=st.integers(0, 1),
    t=st.integers(0, 20),
    seed=st.integers(0, 10**6),
)
def test_coordinates_stay_together(h, w, crop, half, axis, t, seed):
    "Each pixel carries its place: in the image, in the label, and in validity through the margins"
    place = np.indices((h, w)).astype(np.uint8) * 2
    margins = tuple(min(t, (n - 1) // 2) for n in (h, h, w, w))
    size = (max(1, h // 2), max(1, w // 2)) if half else None
    tfm = TrainTransform(size, crop, margins=margins, augment='grid')
    img = np.stack([*place, place[0]], -1)
    a, l, v = tfm(img, place[axis], np.random.default_rng(seed))
    real = l != IGNORE
    rows, columns = a[..., 0].astype(int), a[..., 1].astype(int)
    apart = abs((rows, columns)[axis] - l)[real]
    # a bilinear and a nearest pixel lie within two native pixels of 2 each
    assert (apart <= (8 if half else 0)).all()
    top, bottom, left, right = margins
    inside = (rows >= 2 * top) & (rows < 2 * (h - bottom))
    inside &= (columns >= 2 * left) & (columns < 2 * (w - right))
    if not half:
        assert (v == (inside & real)).all()
    assert not v[~real].any()


# ---------------------------------------------------------------- augmentations


def published_photometric(img, brightness, contrast, saturation, hue, contrast_first):
    "mmsegmentation's steps pixel by pixel in Python: float32, clip, drop the fraction; BGR as there"

    def byte(v):
        return int(min(max(np.float32(v), np.float32(0)), np.float32(255)))

    def each(f, x):
        return np.uint8([[[f(c) for c in p] for p in row] for row in x])

    def stretch(x):
        return (
            x if contrast is None else each(lambda c: byte(np.float32(c) * np.float32(contrast)), x)
        )

    x = img[..., ::-1]
    if brightness is not None:
        x = each(lambda c: byte(np.float32(c) + np.float32(brightness)), x)
    if contrast_first:
        x = stretch(x)
    for k, on, f in (
        (1, saturation, lambda c: byte(np.float32(c) * np.float32(saturation))),
        (0, hue, lambda c: (int(c) + hue) % 180),
    ):
        if on is None:
            continue
        hsv = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_BGR2HSV)
        for p in hsv.reshape(-1, 3):
            p[k] = f(p[k])
        x = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return (x if contrast_first else stretch(x))[..., ::-1]


def test_photometric_equals_published_steps():
    img = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    tfm = PhotoMetricDistortion(p=1)
    seen = set()
    for s in range(60):
        tfm.set_random_seed(s)
        draw = tfm.get_params()
        seen.add(
            (
                *(draw[k] is not None for k in ('brightness', 'contrast', 'saturation', 'hue')),
                draw['contrast_first'],
            )
        )
        tfm.set_random_seed(s)
        np.testing.assert_array_equal(tfm(image=img)['image'], published_photometric(img, **draw))
    assert len(seen) > 20  # of 32 combinations of coins


def hue_and_saturation(rgb, turn):
    "One pixel in 0…255 with its hue turned by `turn` units of 2 degrees, and with 1.5 times its saturation"
    h, s, v = colorsys.rgb_to_hsv(*(rgb / 255))
    turned = colorsys.hsv_to_rgb((h + turn / 180) % 1, s, v)
    saturated = colorsys.hsv_to_rgb(h, min(1, s * 1.5), v)
    return 255 * np.array([turned, saturated])


@pytest.mark.parametrize('turn', [-18, -1, 5, 17])
def test_hue_and_saturation_tables_follow_colorsys(turn):
    "OpenCV's bytes against a float conversion: within what two degrees of hue and 1/255 of saturation can do"
    img = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
    reference = np.array([[hue_and_saturation(p, turn) for p in row] for row in img])
    turned, saturated = reference[:, :, 0], reference[:, :, 1]
    assert abs(apply_hsv_lut(img, 0, hue_lut(turn)) - turned).max() < 6
    assert abs(apply_hsv_lut(img, 1, affine_lut(1.5)) - saturated).max() < 8


def test_photometric_draws():
    tfm = PhotoMetricDistortion(p=1)
    tfm.set_random_seed(3)
    draws = [tfm.get_params() for _ in range(4000)]
    for k, lo, hi in (
        ('brightness', -32, 32),
        ('contrast', 0.5, 1.5),
        ('saturation', 0.5, 1.5),
        ('hue', -18, 17),
    ):
        v = np.array([d[k] for d in draws if d[k] is not None], float)
        assert abs(len(v) / 4000 - 0.5) < 0.04
        assert lo <= v.min() < lo + 0.01 * (hi - lo)
        assert hi - 0.01 * (hi - lo) < v.max() <= hi
        assert abs(v.mean() - (lo + hi) / 2) < 0.03 * (hi - lo)
        assert abs(v.std() / ((hi - lo) / 12**0.5) - 1) < 0.06
    on = np.array(
        [
            [d[k] is not None for k in ('brightness', 'contrast', 'saturation', 'hue')]
            + [d['contrast_first']]
            for d in draws
        ],
        float,
    )
    assert abs(on[:, -1].mean() - 0.5) < 0.04
    assert abs(np.corrcoef(on.T) - np.eye(5)).max() < 0.07


def test_noise_equals_numpy_and_its_statistics():
    flat, tfm = np.full((64, 64, 3), 100, np.uint8), GaussNoise2022(p=1)
    stds = []
    for s in range(300):
        tfm.set_random_seed(s)
        out = tfm(image=flat)['image'].astype(float)
        stds.append(out.std())
        if s < 5:
            sigma = random.Random(s).uniform(10, 50) ** 0.5
            ref = np.clip(
                100
                + np.float32(sigma)
                * np.random.default_rng(s).standard_normal((64, 64, 3), np.float32),
                0,
                255,
            )
            np.testing.assert_array_equal(out, np.floor(ref))
            assert abs(out.mean() - 99.5) < 0.3
            assert abs(np.corrcoef(out.reshape(-1, 3).T) - np.eye(3)).max() < 0.07
    var = np.square(stds)
    assert 9 < var.min() < 13
    assert 47 < var.max() < 53
    assert abs(var.mean() - 30) < 2.5
    for end in (0, 255):  # clipped, not wrapped around
        tfm.set_random_seed(1)
        out = tfm(image=np.full_like(flat, end))['image']
        assert abs(out.astype(int) - end).max() < 50
        assert out.min() < 255


def sorted_pixels(img, void):
    "All pixels of image and mask as sorted 32-bit numbers"
    pixels = np.concatenate([img, void[..., None]], -1)
    return np.sort(pixels.reshape(-1, 4).view('u4').ravel())


def count_seams(img, axis):
    "Rows or columns where the coordinate in a channel jumps"
    steps = np.diff(img[..., axis].astype(int), axis=axis) % 256
    return (steps != 1).any(1 - axis).sum()


@pytest.mark.parametrize('hw', [(48, 60), (50, 61), (512, 512), (3, 3), (2, 5), (1, 1), (1, 40)])
def test_grid_shuffle_moves_pieces_and_everything_together(hw):
    rows, columns = np.indices(hw)
    img = np.stack([rows % 256, columns % 256, (rows + columns) // 4 % 256], -1).astype(np.uint8)
    lbl = img[..., 0].copy()
    void = np.where(columns < hw[1] // 2, IGNORE, 0).astype(np.uint8)
    grid = A.Compose([grid_shuffle()], additional_targets=dict(void='mask'))
    before = sorted_pixels(img, void)
    moved = 0
    for s in range(20):
        grid.transforms[0].set_random_seed(s)
        x = grid(image=img, mask=lbl, void=void)
        assert (x['mask'] == x['image'][..., 0]).all()
        assert (sorted_pixels(x['image'], x['void']) == before).all()
        assert count_seams(x['image'], 0) <= 2  # three bands each way: two cuts
        assert count_seams(x['image'], 1) <= 2
        moved += (x['image'] != img).any()
    assert moved <= 18
    if min(hw) >= 3:
        assert moved >= 2


@pytest.mark.parametrize(
    'augment', ['photometric', 'noise', 'grid', ('grid', 'noise', 'photometric')]
)
def test_augmentations_leave_the_crops_alone_and_happen_half_the_time(augment):
    img, lbl = pair(96, 96)
    lbl[...] = np.arange(96) // 3
    plain, tfm = (
        TrainTransform(None, (48, 48), margins=(5, 0, 0, 0)),
        TrainTransform(None, (48, 48), margins=(5, 0, 0, 0), augment=augment),
    )
    ra, rb = np.random.default_rng(0), np.random.default_rng(0)
    moved = np.zeros(3)
    for _ in range(120):
        x, y = plain(img, lbl, ra), tfm(img, lbl, rb)
        moved += [(p != q).any() for p, q in zip(x, y)]
        # the same crop, whatever was done to it
        assert (np.sort(x[1], None) == np.sort(y[1], None)).all()
        assert x[2].sum() == y[2].sum()
        if 'grid' not in augment:
            assert (x[1] == y[1]).all()
            assert (x[2] == y[2]).all()
    assert ra.integers(2**40) == rb.integers(2**40)  # nor the crops of later images
    share = dict(photometric=1 - 1 / 16, noise=0.5, grid=0.5).get(augment, 1 - 1 / 64)
    assert abs(moved[0] / 120 - share) < 0.14
    if 'grid' in augment:
        assert abs(moved[1] / 120 - 0.5) < 0.14
        assert moved[2] > 0


def test_augmentations_are_independent_of_place_and_flip():
    img = np.full((40, 40, 3), 128, np.uint8)
    img[..., 0] = np.arange(40) * 5
    img[..., 1] = np.arange(40)[:, None] * 5
    plain = TrainTransform(None, (20, 20))
    shuffled = TrainTransform(None, (20, 20), augment='grid')
    facts = []
    for s in range(500):
        a = plain(img, None, np.random.default_rng(s))[0]
        b = shuffled(img, None, np.random.default_rng(s))[0]
        left, top = a[..., 0].min(), a[..., 1].min()
        flipped = a[0, 0, 0] > a[0, -1, 0]
        facts.append((left, top, flipped, (a != b).any()))
    facts = np.array(facts, float)
    assert (facts.std(0) > 0.4).all()
    assert abs(np.corrcoef(facts.T)[3, :3]).max() < 0.15


def test_augmentations_do_not_repeat_each_other():
    img, _ = pair(90, 90)
    both = TrainTransform(None, (90, 90), flip=0, augment=('noise', 'noise'))
    a, b = both.geometry.transforms[2:]
    seen = {
        (
            both(img, None, np.random.default_rng(s)),
            a.random_generator.integers(2**40) == b.random_generator.integers(2**40),
        )[1]
        for s in range(5)
    }
    assert a is not b
    assert seen == {False}


@pytest.mark.parametrize('augment', sorted(AUGMENTATIONS))
def test_same_generator_same_pixels_in_any_process(augment):
    img, lbl = pair()
    tfm = TrainTransform((50, 75), (32, 32), augment=augment)
    views = [tfm(img, lbl, np.random.default_rng((3, i))) for i in range(8)]
    random.seed(9)
    np.random.seed(9)
    sent = pickle.loads(pickle.dumps(TrainTransform((50, 75), (32, 32), augment=(augment,))))
    for i in reversed(range(8)):
        again = sent(img, lbl, np.random.default_rng((3, i)))
        for x, y in zip(views[i], again, strict=True):
            np.testing.assert_array_equal(x, y)


class Views(torch.utils.data.Dataset):
    "A step's two views as a function of (seed, step), as in the loaders"

    def __init__(self):
        self.tfm = TrainTransform(
            None,
            (40, 40),
            cat_max_ratio=0.75,
            margins=(3, 3, 3, 3),
            augment=('photometric', 'noise', 'grid'),
        )

    def __len__(self):
        return 8

    def __getitem__(self, step):
        rng = np.random.default_rng((4, step))
        return [self.tfm(*pair(seed=step), rng) for _ in range(2)]


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_same_step_same_views_for_any_number_of_workers():
    def load(n):
        return list(
            torch.utils.data.DataLoader(
                Views(), batch_size=None, num_workers=n, collate_fn=lambda x: x
            )
        )

    for a, b in zip(load(0), load(3), strict=True):
        for x, y in zip(a, b):
            for u, v in zip(x, y):
                np.testing.assert_array_equal(u, v)


def test_unknown_augmentations_name_the_nearest():
    with pytest.raises(ValueError, match="unknown augmentation 'nois'; did you mean 'noise'"):
        TrainTransform(augment='nois')
    with pytest.raises(ValueError, match="did you mean 'grid'"):
        TrainTransform(augment=('noise', 'gird'))
    for none in ('none', (), ('none', 'none')):
        assert len(TrainTransform(augment=none).geometry.transforms) == 2


def test_varied_equals_naive():
    rng = np.random.default_rng(0)
    for _ in range(300):
        l = rng.choice([0, 1, 2, 255], rng.integers(1, 40), p=rng.dirichlet([0.4] * 4))
        ids, cnt = np.unique(l[l != 255], return_counts=True)
        assert has_class_variety(np.bincount(l, minlength=256), 0.75) == (
            len(cnt) > 1 and cnt.max() / cnt.sum() < 0.75
        )


def naive(lbl, crop, seed, cat_max, want, min_px):
    "The two nested redraws, written out over the transform's own stream of boxes"
    cut = ClassAwareCrop(*crop)
    cut.set_random_seed(seed)

    def box():
        return ClassAwareCrop.__mro__[1].get_params_dependent_on_data(
            cut, dict(shape=lbl.shape), {}
        )['crop_coords']

    for i in range(11):
        for j in range(11):
            x0, y0, x1, y1 = b = box()
            ids, cnt = np.unique(lbl[y0:y1, x0:x1], return_counts=True)
            cnt = {i: c for i, c in zip(ids, cnt)}
            some = [c for i, c in cnt.items() if i != IGNORE]
            if cat_max is None or (len(some) > 1 and max(some) / sum(some) < cat_max):
                break
        if want is None or cnt.get(want, 0) > min_px:
            return b, i, j
    return b, i, j


@pytest.mark.parametrize(
    'cat_max,want,min_px',
    [(0.4, None, 0), (None, 3, 20), (0.6, 3, 20), (0.6, 3, 10_000), (0.2, None, 0)],
)
def test_redraws_equal_naive_nested_loops(cat_max, want, min_px):
    img, lbl = pair(seed=3)
    lbl[:20] = 0
    lbl[50:] = IGNORE
    redraws = 0
    for s in range(25):
        cut = ClassAwareCrop(24, 24)
        cut.cat_max_ratio = cat_max
        cut.set_random_seed(s)
        got = cut.get_params_dependent_on_data(
            dict(shape=lbl.shape), dict(mask=lbl, want=None if want is None else (want, min_px))
        )['crop_coords']
        box, i, j = naive(lbl, (24, 24), s, cat_max, want, min_px)
        assert tuple(got) == tuple(box)
        redraws += i + j
    assert redraws


def test_wanted_class_is_found_and_impossible_wishes_end():
    lbl = np.zeros((100, 200), np.uint8)
    lbl[40:48, 90:100] = 7
    img = np.zeros((100, 200, 3), np.uint8)

    def count(**kw):
        return np.mean(
            [
                (
                    TrainTransform(None, (50, 50))(img, lbl, np.random.default_rng(s), **kw)[1] == 7
                ).sum()
                > 40
                for s in range(80)
            ]
        )

    assert count(want=7, min_px=40) > 0.9 > 0.6 > count()
    assert TrainTransform(None, (50, 50), cat_max_ratio=0.75)(
        img, lbl, np.random.default_rng(0), want=12, min_px=1
    )[1].shape == (50, 50)


def test_same_generator_same_view_whatever_came_before():
    img, lbl = pair()
    tfm = TrainTransform((50, 75), (32, 32), cat_max_ratio=0.75)
    a = tfm(img, lbl, np.random.default_rng((1, 2)))
    for _ in range(3):
        tfm(img, lbl, np.random.default_rng())
    np.random.seed(5)
    b = TrainTransform((50, 75), (32, 32), cat_max_ratio=0.75)(
        img, lbl, np.random.default_rng((1, 2))
    )
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)


def test_to_sample():
    img, lbl = pair()
    lbl[0] = IGNORE
    s = to_sample(img[:, ::-1], lbl[:, ::-1], (lbl != IGNORE)[:, ::-1].astype(np.uint8), 'x.png')
    assert s.lbl.dtype == torch.int64
    assert s.wgt.dtype == torch.float32
    assert s.name == ('x.png',)
    assert s.img.dtype == torch.float32
    assert ((s.wgt == 0) == (s.lbl == IGNORE)).all()
    assert s.lbl[0, 5].tolist() == lbl[5, ::-1].tolist()
