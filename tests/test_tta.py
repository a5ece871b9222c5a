"Test-time augmentation against a naive loop, its symmetries, and probabilities out of every way of looking"

import weakref
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from udanb.core.labels import LabelSpace
from udanb.core.types import Sample, SegOutput, normalize
from udanb.core.utils import eval_mode, seed_all
from udanb.inference.folder import predict_folder
from udanb.inference.metrics import ConfusionMatrix
from udanb.inference.predict import evaluate, predict, whole_logits
from udanb.inference.tta import TTA_SCALES, predict_probabilities, predict_view, scaled_size, tta
from udanb.models.hrda import HRDA
from udanb.models.segmentor import create_segmentor

SPACE = LabelSpace('four', ('a', 'b', 'c', 'd'), ((10, 0, 0), (0, 20, 0), (0, 0, 30), (40, 40, 40)))


class Net(nn.Module):
    "Stride 4, sees neighbours, has dropout and batch norm; remembers the shapes it was given"

    def __init__(self, n=4, seed=0):
        super().__init__()
        seed_all(seed)
        self.conv = nn.Conv2d(3, n, 7, stride=4, padding=3)
        self.bn = nn.BatchNorm2d(n)
        self.drop = nn.Dropout2d(0.5)
        self.shapes = []

    def forward(self, img):
        self.shapes.append(tuple(img.shape))
        return SegOutput(self.drop(self.bn(self.conv(img))))


class Even(nn.Module):
    "Mirrors with its input: 3×3 kernels made symmetric, full resolution"

    def __init__(self):
        super().__init__()
        seed_all(3)
        w = torch.randn(4, 3, 3, 3)
        self.w = nn.Parameter((w + w.flip(-1)) / 2)

    def forward(self, img):
        return SegOutput(F.conv2d(img, self.w, padding=1))


@pytest.fixture
def net():
    return Net()


def image(h=40, w=56, b=2, seed=1):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def naive(net, img, ratios, flip, crop=None, stride=None, base=None):
    "One image, one view at a time; windows pixel by pixel count"
    b, _, h, w = img.shape
    bh, bw = base or (h, w)
    answer = torch.zeros(b, 4, h, w, dtype=torch.float64)
    net.eval()
    for k in range(b):
        for r in ratios:
            s = (max(1, int(np.floor(bh * r + 0.5))), max(1, int(np.floor(bw * r + 0.5))))
            for f in [False, True] if flip else [False]:
                x = (
                    img[k : k + 1]
                    if s == (h, w)
                    else F.interpolate(img[k : k + 1], s, mode='bilinear', align_corners=False)
                )
                x = x[..., range(s[1] - 1, -1, -1)] if f else x
                with torch.no_grad():
                    if crop is None:
                        o = F.interpolate(net(x).logits, s, mode='bilinear', align_corners=False)
                    else:
                        H, W = max(s[0], crop), max(s[1], crop)
                        big = torch.zeros(1, 3, H, W)
                        total = torch.zeros(1, 4, H, W)
                        count = torch.zeros(H, W)
                        big[..., : s[0], : s[1]] = x
                        for i in range(max(H - crop + stride - 1, 0) // stride + 1):
                            for j in range(max(W - crop + stride - 1, 0) // stride + 1):
                                t, l = min(i * stride, H - crop), min(j * stride, W - crop)
                                total[..., t : t + crop, l : l + crop] += F.interpolate(
                                    net(big[..., t : t + crop, l : l + crop]).logits,
                                    (crop, crop),
                                    mode='bilinear',
                                )
                                count[t : t + crop, l : l + crop] += 1
                        o = (total / count)[..., : s[0], : s[1]]
                p = (
                    F.interpolate(o, (h, w), mode='bilinear', align_corners=False)
                    if s != (h, w)
                    else o
                ).softmax(1)
                answer[k] += (p[..., range(w - 1, -1, -1)] if f else p)[0]
    return (answer / (len(ratios) * (1 + flip))).float()


@pytest.mark.parametrize('ratios', [TTA_SCALES, (1.0,), (0.3, 1.7), [2]])
@pytest.mark.parametrize('flip', [True, False])
@pytest.mark.parametrize('size', [(40, 56), (33, 21)])
def test_equals_a_naive_loop(net, ratios, flip, size):
    img = image(*size)
    torch.testing.assert_close(
        tta(net, img, ratios, flip), naive(net, img, ratios, flip), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize('crop,stride', [(24, 12), (32, 20), (64, 64)])
def test_windows_equal_a_naive_loop(net, crop, stride):
    img = image(b=1)
    torch.testing.assert_close(
        tta(net, img, (0.5, 1.0, 1.5), True, crop, stride),
        naive(net, img, (0.5, 1.0, 1.5), True, crop, stride),
        atol=1e-5,
        rtol=1e-4,
    )


def test_views_are_as_many_and_as_large_as_said(net):
    tta(net, image(b=1), TTA_SCALES, True)
    assert net.shapes == [
        (1, 3, h, w)
        for h, w in ((20, 28), (30, 42), (40, 56), (50, 70), (60, 84), (70, 98))
        for _ in 'ab'
    ]
    net.shapes.clear()
    tta(net, image(b=1), (0.5, 2.0), False, 32)
    assert (
        net.shapes == [(1, 3, 32, 32)] + [(8, 3, 32, 32)] * 3
    )  # 20×28 fits into one window, 80×112 needs 4×6, eight at a time


def test_sizes_round_to_the_nearest():
    assert [scaled_size((375, 500), r) for r in (0.5, 1.0, 1.25)] == [
        (188, 250),
        (375, 500),
        (469, 625),
    ] and scaled_size((512, 1024), 0.75) == (384, 768)
    assert scaled_size((2, 3), 0.01) == (1, 1)
    for bad in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='give a number above 0'):
            scaled_size((4, 4), bad)


# ---- symmetries
@pytest.mark.parametrize('size', [(32, 48), (17, 29)])
def test_mirroring_a_mirrored_image_is_the_identity(size):
    "For a network that mirrors with its input, everything about mirrors cancels"
    net, img = Even(), image(*size)
    with eval_mode(net):
        once = predict_view(net, img, size, flip=True)
        torch.testing.assert_close(once, predict_view(net, img, size), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            predict_view(net, img.flip(-1), size, flip=True).flip(-1), once, atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(tta(net, img, (1.0,)), predict(net, img), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        tta(net, img.flip(-1), TTA_SCALES).flip(-1), tta(net, img, TTA_SCALES), atol=1e-5, rtol=1e-4
    )


def test_any_network_answers_a_mirrored_image_with_a_mirrored_map(net):
    "With flip=True the mean is symmetric even if the network is not; without it, it is not"
    img = image()
    torch.testing.assert_close(
        tta(net, img.flip(-1), (0.5, 1.0), True).flip(-1),
        tta(net, img, (0.5, 1.0), True),
        atol=1e-6,
        rtol=1e-5,
    )
    assert (
        tta(net, img.flip(-1), (1.0,), False).flip(-1) - tta(net, img, (1.0,), False)
    ).abs().max() > 0.01


def test_one_plain_view_is_predict(net):
    img = image()
    assert tta(net, img, (1.0,), flip=False).equal(predict(net, img))


def test_means_are_probabilities_and_order_does_not_matter(net):
    p, q = tta(net, image(), TTA_SCALES), tta(net, image(), TTA_SCALES[::-1])
    torch.testing.assert_close(p.sum(1), torch.ones(2, 40, 56))
    torch.testing.assert_close(p, q)
    assert p.min() >= 0 and p.dtype == torch.float32 and not p.requires_grad


# ---- native images
def test_ratio_one_is_the_given_size(net):
    "An image file of twice the size: the plain view agrees with OpenCV's resize, and ratio 2 sees the file itself"
    px = np.random.default_rng(0).integers(0, 256, (80, 112, 3), dtype=np.uint8)
    px = cv2.GaussianBlur(px, (5, 5), 2)
    small = normalize(cv2.resize(px, (56, 40), interpolation=cv2.INTER_LINEAR))[None]
    img = normalize(px)[None]
    torch.testing.assert_close(
        tta(net, img, (1.0,), False, size=(40, 56)),
        predict(net, small, (80, 112)),
        atol=0.02,
        rtol=0,
    )
    assert tta(net, img, (2.0,), False, size=(40, 56)).equal(predict(net, img))
    assert tta(net, img, (0.5, 1.0), size=lambda hw: (hw[0] // 2, hw[1] // 2)).equal(
        tta(net, img, (0.5, 1.0), size=(40, 56))
    )
    torch.testing.assert_close(
        tta(net, img, (0.5, 1.5), size=(40, 56)),
        naive(net, img, (0.5, 1.5), True, base=(40, 56)),
        atol=1e-5,
        rtol=1e-4,
    )


# ---- manners
def test_modes_are_left_alone(net):
    net.train()
    net.bn.eval()
    before = net.bn.running_mean.clone()
    tta(net, image())
    assert (
        net.training
        and net.drop.training
        and not net.bn.training
        and net.bn.running_mean.equal(before)
    )
    net.conv = None
    with pytest.raises(TypeError):
        tta(net, image())
    assert net.training


def test_one_view_at_a_time():
    "What the network said about earlier views is gone while the next is computed"
    alive, most = [], 0

    class Spy(Net):
        def forward(self, img):
            nonlocal most
            most = max(most, sum(r() is not None for r in alive))
            out = super().forward(img)
            alive.append(weakref.ref(out.logits))
            return out

    tta(Spy(), image(), TTA_SCALES)
    assert len(alive) == 12 and most == 0


def test_empty_and_impossible_ratios(net):
    with pytest.raises(ValueError, match='ratios is empty'):
        tta(net, image(), ())
    with pytest.raises(ValueError, match='ratio -1'):
        tta(net, image(), (1.0, -1.0))
    assert net.shapes == []


def test_hrda_at_all_ratios():
    seed_all(0)
    net = HRDA(create_segmentor('mit_b0', 4, dim=16), 32, dim=16).eval()
    p = tta(net, image(64, 96, 1), TTA_SCALES)
    assert p.shape == (1, 4, 64, 96) and p.isfinite().all()


# ---- as a mode
def test_evaluate_and_folders_take_it(net, tmp_path):
    from PIL import Image

    px = np.random.default_rng(2).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    lbl = np.random.default_rng(3).integers(0, 4, (80, 112)).astype(np.uint8)
    look, x = partial(tta, ratios=(0.5, 1.0)), normalize(px)[None]
    conf = evaluate(
        net,
        [(Sample(x, name=('a',)), torch.from_numpy(lbl))],
        ConfusionMatrix(4),
        mode=look,
        quiet=True,
    )
    want = ConfusionMatrix(4).update(
        F.interpolate(naive(net, x, (0.5, 1.0), True), (80, 112), mode='bilinear').argmax(1)[0], lbl
    )
    assert conf.mat.equal(want.mat)
    (tmp_path / 'in').mkdir()
    Image.fromarray(px).save(tmp_path / 'in' / 'a.png')
    out = predict_folder(net, tmp_path / 'in', tmp_path / 'out', SPACE, mode=look, quiet=True)
    assert (
        np.asarray(Image.open(out / 'label' / 'a.png')) == look(net, x).argmax(1)[0].numpy()
    ).all()
    with pytest.raises(ValueError, match='mode: .* there, .* here'):
        predict_folder(
            net, tmp_path / 'in', out, SPACE, mode=partial(tta, ratios=(1.0,)), quiet=True
        )
    with pytest.raises(ValueError, match='give crop and stride to it'):
        predict_folder(net, tmp_path / 'in', out, SPACE, mode=look, crop=32, quiet=True)


def test_probabilities_of_every_mode(net):
    img = image()
    assert predict_probabilities(net, img, (60, 60)).equal(predict(net, img, (60, 60)))
    torch.testing.assert_close(
        predict_probabilities(net, img, mode='slide', crop=24, stride=12),
        naive(net, img, (1.0,), False, 24, 12),
        atol=1e-5,
        rtol=1e-4,
    )
    p = predict_probabilities(net, img, (80, 112), mode=partial(tta, ratios=(1.0, 1.5)))
    torch.testing.assert_close(
        p, F.interpolate(tta(net, img, (1.0, 1.5)), (80, 112), mode='bilinear')
    )
    torch.testing.assert_close(p.sum(1), torch.ones(2, 80, 112))


def test_what_is_no_probability_is_refused(net):
    with pytest.raises(ValueError, match='are no probabilities'):
        predict_probabilities(net, image(), mode=whole_logits)
    with pytest.raises(ValueError, match='are no probabilities'):
        predict_probabilities(net, image(), mode=lambda n, x: predict(n, x) * 0.9)
    with pytest.raises(ValueError, match='needs crop'):
        predict_probabilities(net, image(), mode='slide')
    with pytest.raises(ValueError, match="unknown mode 'whle'; did you mean 'whole'"):
        predict_probabilities(net, image(), mode='whle')
    with pytest.raises(ValueError, match='give crop and stride to it'):
        predict_probabilities(net, image(), mode=tta, crop=8)
    net.conv.bias.data[0] = torch.nan
    assert (
        predict_probabilities(net, image(), mode=partial(tta, ratios=(1.0,))).isnan().any()
    )  # seen by whoever uses them: see test_pseudo
