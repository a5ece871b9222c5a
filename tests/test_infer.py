"Prediction, whole and in windows, against naive loops; evaluation; folders that are interrupted, foreign or damaged"

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from udanb.core.labels import CAMVID11, LabelSpace, colorize
from udanb.core.state_dicts import weights_hash
from udanb.core.storage import read_json
from udanb.core.types import IGNORE, Sample, SegOutput, normalize
from udanb.core.utils import eval_mode, seed_all, sliding_windows, stable_repr
from udanb.inference.folder import list_images, predict_folder
from udanb.inference.metrics import ConfusionMatrix
from udanb.inference.predict import evaluate, predict, sliding_logits, whole_logits

SPACE = LabelSpace(
    'four',
    ('a', 'b', 'c', 'd'),
    ((10, 0, 0), (0, 20, 0), (0, 0, 30), (40, 40, 40)),
    train_ids=(0, 8, 10, 13),
)


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


@pytest.fixture
def net():
    return Net()


def pixels(seed=0, size=(40, 56)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def photo(path, seed=0, size=(40, 56)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path)
    return path


# ---- windows
@pytest.mark.parametrize(
    'size,crop,stride,n',
    [
        ((1024, 2048), 1024, 512, 3),
        ((1024, 1024), 512, 256, 9),
        ((512, 512), 512, 256, 1),
        ((513, 512), 512, 256, 2),
        ((300, 400), 512, 256, 1),
    ],
)
def test_window_counts(size, crop, stride, n):
    assert len(sliding_windows(size, crop, stride)) == n


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.data())
def test_windows_cover_and_stay_inside(h, w, ch, cw, data):
    s = data.draw(st.integers(1, ch)), data.draw(st.integers(1, cw))
    seen, at = np.zeros((max(h, ch), max(w, cw)), int), sliding_windows((h, w), (ch, cw), s)
    for y, x in at:
        assert 0 <= y <= seen.shape[0] - ch and 0 <= x <= seen.shape[1] - cw
        seen[y : y + ch, x : x + cw] += 1
    assert seen.min() > 0 and len(set(at)) == len(at)
    for n, c, t, k in ((h, ch, s[0], 0), (w, cw, s[1], 1)):
        assert len({a[k] for a in at}) == max(n - c + t - 1, 0) // t + 1


@pytest.mark.parametrize('stride', [0, -1, 33])
def test_a_stride_with_gaps_is_refused(stride):
    with pytest.raises(ValueError, match=f'stride {stride} '):
        sliding_windows((64, 64), 32, stride)


# ---- sliding
def naive_slide(net, img, crop, stride):
    "One window, one image, one pixel count at a time"
    b, _, h, w = img.shape
    H, W = max(h, crop[0]), max(w, crop[1])
    big = torch.zeros(b, 3, H, W)
    big[:, :, :h, :w] = img
    total, count = torch.zeros(b, 4, H, W), torch.zeros(H, W)
    for i in range(max(H - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(W - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            y2, x2 = min(i * stride[0] + crop[0], H), min(j * stride[1] + crop[1], W)
            y, x = y2 - crop[0], x2 - crop[1]
            for k in range(b):
                o = F.interpolate(
                    net(big[k : k + 1, :, y:y2, x:x2]).logits,
                    crop,
                    mode='bilinear',
                    align_corners=False,
                )
                total[k : k + 1, :, y:y2, x:x2] += o
            count[y:y2, x:x2] += 1
    return (total / count)[:, :, :h, :w]


@pytest.mark.parametrize('size', [(64, 64), (50, 97), (20, 70), (33, 20), (7, 9)])
@pytest.mark.parametrize(
    'crop,stride', [((32, 32), (16, 16)), ((32, 48), (32, 20)), ((24, 24), (7, 24))]
)
@pytest.mark.parametrize('batch', [1, 3, 100])
def test_slide_equals_a_naive_loop(net, size, crop, stride, batch):
    img = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with eval_mode(net):
        torch.testing.assert_close(
            sliding_logits(net, img, crop, stride, batch),
            naive_slide(net, img, crop, stride),
            atol=1e-5,
            rtol=1e-5,
        )


def test_windows_are_batched(net):
    with eval_mode(net):
        sliding_logits(net, torch.zeros(1, 3, 64, 128), 64)  # default stride: half a window
    assert net.shapes == [(3, 3, 64, 64)]
    net.shapes.clear()
    with eval_mode(net):
        sliding_logits(net, torch.zeros(2, 3, 64, 64), 32, 16, batch=4)
    assert net.shapes == [(8, 3, 32, 32), (8, 3, 32, 32), (2, 3, 32, 32)]


def test_one_window_is_the_whole_image(net):
    img = torch.randn(1, 3, 32, 48)
    with eval_mode(net):
        assert sliding_logits(net, img, (32, 48)).equal(whole_logits(net, img))


# ---- predict
def test_predict_scales_then_softmaxes(net):
    img = torch.randn(2, 3, 32, 40)
    got = predict(net, img, (50, 61))
    with eval_mode(net):
        low = net(img).logits
    want = F.interpolate(
        F.interpolate(low, (32, 40), mode='bilinear'), (50, 61), mode='bilinear'
    ).softmax(1)
    torch.testing.assert_close(got, want)
    assert predict(net, img).shape == (2, 4, 32, 40) and not got.requires_grad


def test_half_precision_answers_are_float32():
    class Half(nn.Module):
        def forward(self, img):
            return SegOutput(torch.zeros(len(img), 4, 8, 8, dtype=torch.bfloat16))

    assert predict(Half(), torch.zeros(1, 3, 32, 32)).dtype == torch.float32


def test_modes_come_back_even_after_an_error(net):
    net.train()
    net.bn.eval()
    with pytest.raises(RuntimeError, match='boom'):
        with eval_mode(net):
            raise RuntimeError('boom')
    assert net.training and net.drop.training and not net.bn.training and torch.is_grad_enabled()
    net.eval()
    predict(net, torch.zeros(1, 3, 16, 16))
    assert not net.training and not net.drop.training


# ---- evaluate
def make_loader(n=3, size=(24, 32), native=(48, 64), void=0.1):
    for i in range(n):
        rng = np.random.default_rng(i)
        lbl = rng.integers(0, 4, native).astype(np.uint8)
        lbl[rng.random(native) < void] = IGNORE
        yield Sample(normalize(pixels(i, size))[None], name=(f'{i}.png',)), lbl


@pytest.mark.parametrize('mode,kw', [('whole', {}), ('slide', dict(crop=16, stride=8))])
def test_evaluate_equals_a_loop(net, mode, kw):
    net.train()
    before = weights_hash(net)
    got = evaluate(net, make_loader(), ConfusionMatrix(4), mode=mode, quiet=True, **kw)
    assert (
        net.training and weights_hash(net) == before
    )  # batch norm has not learnt from the validation set
    want = ConfusionMatrix(4)
    with eval_mode(net):
        for x, lbl in make_loader():
            low = (
                whole_logits(net, x.img)
                if mode == 'whole'
                else naive_slide(net, x.img, (16, 16), (8, 8))
            )
            want.update(F.interpolate(low, lbl.shape, mode='bilinear').argmax(1)[0], lbl)
    assert got.mat.equal(want.mat) and got.mat.sum() > 0


def test_evaluate_takes_tensors_and_batches(net):
    net.eval()
    want = evaluate(net, make_loader(), ConfusionMatrix(4), quiet=True).mat
    assert evaluate(
        net,
        ((x, torch.from_numpy(l).long()[None]) for x, l in make_loader()),
        ConfusionMatrix(4),
        quiet=True,
    ).mat.equal(want)
    xs, ls = zip(*make_loader())
    both = [(Sample(torch.cat([x.img for x in xs]), name=('0', '1', '2')), np.stack(ls))]
    assert evaluate(net, both, ConfusionMatrix(4), quiet=True).mat.equal(want)


def test_evaluate_errors(net):
    ok = list(make_loader(1))
    with pytest.raises(ValueError, match='loader is empty'):
        evaluate(net, [], ConfusionMatrix(4), quiet=True)
    with pytest.raises(ValueError, match='predicts 4 classes, the label space has 11'):
        evaluate(net, ok, ConfusionMatrix(11), quiet=True)
    with pytest.raises(ValueError, match='needs crop'):
        evaluate(net, ok, ConfusionMatrix(4), mode='slide', quiet=True)
    with pytest.raises(ValueError, match="unknown mode 'hole'; did you mean 'whole'"):
        evaluate(net, ok, ConfusionMatrix(4), mode='hole', quiet=True)
    x, lbl = ok[0]
    with pytest.raises(ValueError, match=r'^0.png: label outside the 4 classes: 7 \(1 px\)'):
        lbl = lbl.copy()
        lbl[0, 0] = 7
        evaluate(net, [(x, lbl)], ConfusionMatrix(4), quiet=True)
    net.conv.bias.data[0] = torch.inf
    with pytest.raises(FloatingPointError, match='0.png'):
        evaluate(net, ok, ConfusionMatrix(4), quiet=True)
    assert net.training


def test_a_function_as_mode(net, tmp_path):
    "A function equal to a named mode gives the same; its record repeats in another process; it cuts its own windows"
    net.eval()

    def by(**kw):
        return evaluate(net, make_loader(), ConfusionMatrix(4), quiet=True, **kw).mat

    assert by(mode=whole_logits).equal(by()) and by(
        mode=partial(sliding_logits, crop=16, stride=8)
    ).equal(by(mode='slide', crop=16, stride=8))
    with pytest.raises(ValueError, match='is a function and cuts its own windows'):
        by(mode=whole_logits, crop=16)
    with pytest.raises(ValueError, match='is a function and cuts its own windows'):
        by(mode=whole_logits, stride=16)
    photo(tmp_path / 'in' / 'a.png')
    outs = [
        predict_folder(net, tmp_path / 'in', tmp_path / k, SPACE, quiet=True, **kw)
        for k, kw in dict(
            name=dict(mode='slide', crop=16, stride=8),
            fn=dict(mode=partial(sliding_logits, crop=16, stride=8)),
        ).items()
    ]
    assert len({(o / 'label' / 'a.png').read_bytes() for o in outs}) == 1
    assert [read_json(o / 'predict.json')['mode'] for o in outs] == [
        'slide',
        'functools.partial(<function sliding_logits>, crop=16, stride=8)',
    ]
    assert stable_repr(object()) == '<object object>' and stable_repr(None) == 'None'


def test_evaluate_keeps_no_predictions():
    "Each prediction is freed before the next image comes"
    import gc
    import weakref

    alive, most = [], 0

    class Spy(ConfusionMatrix):
        def update(self, pred, lbl):
            nonlocal most
            alive.append(weakref.ref(pred))
            gc.collect()
            most = max(most, sum(r() is not None for r in alive))
            return super().update(pred, lbl)

    evaluate(Net(), make_loader(6), Spy(4), quiet=True)
    assert most <= 2


# ---- folders
def test_folder_files(tmp_path, net):
    src, out = tmp_path / 'in', tmp_path / 'out'
    photo(src / 'a.png', 0)
    photo(src / 'day' / 'one' / 'b.PNG', 1, (30, 44))
    photo(src / 'c.jpg', 2)
    (src / 'notes.txt').write_text('no picture')
    (src / '._a.png').write_bytes(b'apple double')
    assert predict_folder(net, src, out, SPACE, quiet=True) == out
    assert {p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file()} == {
        'predict.json',
        *(f'{k}/{n}.png' for k in ('label', 'color') for n in ('a', 'day/one/b', 'c')),
    }
    im = Image.open(out / 'label' / 'day' / 'one' / 'b.png')
    assert im.mode == 'L' and im.size == (44, 30)
    want = predict(net, normalize(pixels(1, (30, 44)))[None]).argmax(1)[0].numpy()
    np.testing.assert_array_equal(np.asarray(im), want)
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / 'color' / 'day' / 'one' / 'b.png')), colorize(want, SPACE)
    )


def test_folder_train_ids_and_network_size(tmp_path, net):
    photo(tmp_path / 'in' / 'a.png')

    def half(px):
        return np.asarray(Image.fromarray(px).resize((28, 20), Image.BILINEAR))

    out = predict_folder(
        net, tmp_path / 'in', tmp_path / 'out', SPACE, tfm=half, train_ids=True, quiet=True
    )
    got = np.asarray(Image.open(out / 'label' / 'a.png'))
    want = predict(net, normalize(half(pixels()))[None], (40, 56)).argmax(1)[0].numpy()
    np.testing.assert_array_equal(got, np.array(SPACE.train_ids)[want])


def test_folder_from_files_and_datasets(tmp_path, net):
    a, b = photo(tmp_path / 'in' / 'x' / 'a.png', 0), photo(tmp_path / 'in' / 'y' / 'b.png', 1)
    assert list(list_images([b, a])) == ['x/a.png', 'y/b.png'] and list(list_images([str(a)])) == [
        'a.png'
    ]

    class Data:
        names = ['x/a.png', 'y/b.png']

        def image(self, i):
            return pixels(i)

    one, two = (
        predict_folder(net, [a, b], tmp_path / 'one', SPACE, quiet=True),
        predict_folder(net, Data(), tmp_path / 'two', SPACE, quiet=True),
    )
    for n in Data.names:
        assert (one / 'label' / n).read_bytes() == (two / 'label' / n).read_bytes()


def test_folder_goes_on_after_an_interruption(tmp_path, net):
    "A damaged third image stops the run; after the repair only the missing ones are predicted, and all is as in one go"
    for i in range(4):
        photo(tmp_path / 'in' / f'{i}.png', i)
    whole_file = (tmp_path / 'in' / '2.png').read_bytes()
    (tmp_path / 'in' / '2.png').write_bytes(whole_file[:200])
    out = tmp_path / 'out'
    net.train()
    with pytest.raises(ValueError, match='2.png: broken image file'):
        predict_folder(net, tmp_path / 'in', out, SPACE, quiet=True)
    assert net.training and sorted(p.name for p in (out / 'label').iterdir()) == ['0.png', '1.png']
    (tmp_path / 'in' / '2.png').write_bytes(whole_file)
    net.shapes.clear()
    predict_folder(net, tmp_path / 'in', out, SPACE, quiet=True)
    assert len(net.shapes) == 2
    predict_folder(net, tmp_path / 'in', tmp_path / 'at_once', SPACE, quiet=True)
    for p in (tmp_path / 'at_once').rglob('*.png'):
        assert p.read_bytes() == (out / p.relative_to(tmp_path / 'at_once')).read_bytes()


def test_folder_is_not_finished_by_its_colours(tmp_path, net):
    "The label is written last, so a stop between the two files loses nothing"
    photo(tmp_path / 'in' / 'a.png')
    out = predict_folder(net, tmp_path / 'in', tmp_path / 'out', SPACE, quiet=True)
    (out / 'label' / 'a.png').unlink()
    (out / 'color' / 'a.png').write_bytes(b'')
    predict_folder(net, tmp_path / 'in', out, SPACE, quiet=True)
    assert (
        Image.open(out / 'color' / 'a.png').size
        == Image.open(out / 'label' / 'a.png').size
        == (56, 40)
    )


@pytest.mark.parametrize('kind', ['label', 'color'])
def test_folder_with_a_missing_file(tmp_path, net, kind):
    "A label without colours is as unfinished as colours without a label; only that image is predicted again"
    for i in range(3):
        photo(tmp_path / 'in' / f'{i}.png', i)
    out = predict_folder(net, tmp_path / 'in', tmp_path / 'out', SPACE, quiet=True)
    files = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    (out / kind / '1.png').unlink()
    net.shapes.clear()
    predict_folder(net, tmp_path / 'in', out, SPACE, quiet=True)
    assert len(net.shapes) == 1 and files == {
        p: p.read_bytes() for p in out.rglob('*') if p.is_file()
    }


def test_folder_leaves_out_what_cannot_be_read(tmp_path, net):
    "One truncated, one a folder: named with reasons that do not depend on the place, predicted once they are repaired"
    for i in range(4):
        photo(tmp_path / 'in' / 'day' / f'{i}.png', i)
    bad, whole_file = (
        tmp_path / 'in' / 'day' / '1.png',
        (tmp_path / 'in' / 'day' / '1.png').read_bytes(),
    )
    bad.write_bytes(whole_file[:200])
    (tmp_path / 'in' / 'day' / 'x.png').mkdir()

    def go(k, **kw):
        return predict_folder(net, tmp_path / 'in', tmp_path / k, SPACE, quiet=True, **kw)

    with pytest.raises(ValueError, match='1.png: broken image file'):
        go('out')
    with pytest.warns(
        UserWarning, match='2 of 5 images .* left out .skip_broken.: day/1.png, day/x.png'
    ):
        out = go('out', skip_broken=True)
    told = read_json(out / 'predict.json')['skipped']
    assert (
        list(told) == ['day/1.png', 'day/x.png']
        and told['day/1.png'].startswith('day/1.png: broken image file')
        and str(tmp_path) not in str(told)
    )
    assert (
        sorted(p.name for p in (out / 'label' / 'day').iterdir())
        == ['0.png', '2.png', '3.png']
        == sorted(p.name for p in (out / 'color' / 'day').iterdir())
    )
    with pytest.raises(ValueError, match='1.png: broken'):
        go('out')  # what was left out once is not forgotten
    bad.write_bytes(whole_file)
    (tmp_path / 'in' / 'day' / 'x.png').rmdir()
    go('out')
    go('once')

    def held(d):
        return {p.relative_to(d): p.read_bytes() for p in d.rglob('*.*')}

    assert held(out) == held(tmp_path / 'once')
    for p in (tmp_path / 'in').rglob('*.png'):
        p.write_bytes(b'')
    with pytest.raises(ValueError, match='none of 4 images can be read; the first: .*0.png'):
        go('none', skip_broken=True)


def test_only_reading_is_forgiven(tmp_path, net):
    "An error in the network or the resize is not the image's"
    photo(tmp_path / 'in' / 'a.png')
    photo(tmp_path / 'in' / 'b.png')

    def bad(px):
        raise ValueError('resize')

    with pytest.raises(ValueError, match='resize'):
        predict_folder(
            net, tmp_path / 'in', tmp_path / 'out', SPACE, tfm=bad, quiet=True, skip_broken=True
        )
    net.conv.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError):
        predict_folder(net, tmp_path / 'in', tmp_path / 'out2', SPACE, quiet=True, skip_broken=True)


def test_folder_with_a_damaged_record(tmp_path, net):
    photo(tmp_path / 'in' / 'a.png')
    out = predict_folder(net, tmp_path / 'in', tmp_path / 'out', SPACE, quiet=True)
    for text in ('{"weights": ', '[1]', ''):
        (out / 'predict.json').write_text(text)
        with pytest.raises(
            ValueError, match='predict.json: damaged .* delete .*out and predict again'
        ):
            predict_folder(net, tmp_path / 'in', out, SPACE, quiet=True)


def test_folder_inside_its_images(tmp_path, net):
    photo(tmp_path / 'a.png')
    for _ in range(2):
        predict_folder(net, tmp_path, tmp_path, SPACE, quiet=True)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.png')) == [
        'a.png',
        'color/a.png',
        'label/a.png',
    ]


def test_folder_of_another_network_or_owner(tmp_path, net):
    photo(tmp_path / 'in' / 'a.png')
    out = predict_folder(net, tmp_path / 'in', tmp_path / 'out', SPACE, quiet=True)
    old = (out / 'label' / 'a.png').read_bytes()
    with pytest.raises(ValueError, match=f'weights: {weights_hash(net)} there'):
        predict_folder(Net(seed=1), tmp_path / 'in', out, SPACE, quiet=True)
    with pytest.raises(ValueError, match='train_ids: False there, True here'):
        predict_folder(net, tmp_path / 'in', out, SPACE, train_ids=True, quiet=True)
    mine = photo(tmp_path / 'gta' / 'label' / 'a.png', 5)
    kept = mine.read_bytes()
    with pytest.raises(FileExistsError, match='was not written by predict_folder'):
        predict_folder(net, tmp_path / 'in', tmp_path / 'gta', SPACE, quiet=True)
    assert mine.read_bytes() == kept and (out / 'label' / 'a.png').read_bytes() == old
    mine.unlink()
    photo(tmp_path / 'gta' / 'color' / 'a.png', 5)  # colours of others are as safe as labels
    with pytest.raises(FileExistsError, match='color/a.png is there'):
        predict_folder(net, tmp_path / 'in', tmp_path / 'gta', SPACE, quiet=True)


def test_folder_errors(tmp_path, net):
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'):
        predict_folder(net, tmp_path / 'nowhere', tmp_path / 'out', SPACE, quiet=True)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no images'):
        predict_folder(net, tmp_path / 'empty', tmp_path / 'out', SPACE, quiet=True)
    with pytest.raises(ValueError, match='no images'):
        predict_folder(net, [], tmp_path / 'out', SPACE, quiet=True)
    photo(tmp_path / 'in' / 'a.png')
    with pytest.raises(ValueError, match='predicts 4 classes, the label space has 11'):
        predict_folder(net, tmp_path / 'in', tmp_path / 'out', CAMVID11, quiet=True)
    photo(tmp_path / 'in' / 'a.jpg')
    with pytest.raises(ValueError, match='would both be written'):
        predict_folder(net, tmp_path / 'in', tmp_path / 'out2', SPACE, quiet=True)


# ---- whose weights
def test_hash_sees_every_tensor_and_nothing_else(net):
    h, state = weights_hash(net), net.state_dict()
    assert weights_hash({k: state[k] for k in reversed(state)}) == h and weights_hash(Net()) == h
    for k in state:
        changed = {**state, k: state[k] + 1}
        assert weights_hash(changed) != h
    assert weights_hash({**state, 'conv.bias': state['conv.bias'].double()}) != h
    assert weights_hash({**state, 'conv.bias': state['conv.bias'][None]}) != h
    assert weights_hash(
        dict(a=torch.zeros(2, dtype=torch.bfloat16), b=torch.tensor(True), c=torch.zeros(0)), 64
    ).isalnum()
