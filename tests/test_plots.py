"Figures have the right content, fit their canvas, are closed, and take any form of input"

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from udanb.core.charts import show_class_freq, show_curves, show_iou
from udanb.core.labels import CAMVID11, CITYSCAPES19, LABEL_SPACES
from udanb.core.plots import overlay, save_figure, show_panel, show_sample, show_step
from udanb.core.types import IGNORE, Sample, normalize


def drawn(fig):
    "Draw; texts and legends must be inside the figure, and titles must not overlap"
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    artists = [*fig.legends]
    for ax in fig.axes:
        artists += [ax.title, *ax.texts]
    artists = [a for a in artists if a in fig.legends or a.get_text()]
    for artist in artists:
        box = artist.get_window_extent(renderer)
        assert box.x0 >= -1 and box.x1 <= fig.bbox.x1 + 1, (artist, box, fig.bbox)
        assert box.y0 >= -1 and box.y1 <= fig.bbox.y1 + 1, (artist, box, fig.bbox)
    titles = [ax.title for ax in fig.axes if ax.title.get_text()]
    boxes = [title.get_window_extent(renderer) for title in titles]
    boxes.sort(key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
    return fig


def texts_of(fig):
    "All texts inside the axes of a figure"
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def make(n=2, hw=(24, 40), space=CITYSCAPES19, seed=0):
    g = np.random.default_rng(seed)
    lbl = g.choice([*range(len(space)), IGNORE], (n, *hw))
    return Sample(
        normalize(g.integers(0, 256, (n, *hw, 3), dtype=np.uint8)),
        torch.from_numpy(lbl),
        torch.from_numpy(g.random((n, *hw)).astype('float32')),
        tuple('ab' * n)[:n],
    )


@pytest.mark.parametrize('space', LABEL_SPACES.values(), ids=str)
@pytest.mark.parametrize('hw', [(24, 40), (48, 16), (32, 32)])
def test_overlay_equals_a_loop(space, hw):
    g = np.random.default_rng(1)
    img = g.integers(0, 256, (*hw, 3), dtype=np.uint8)
    lbl = g.choice([*range(len(space)), IGNORE], hw).astype(np.uint8)
    got = overlay(img, lbl, space, 0.3)
    for y in range(0, hw[0], 5):
        for x in range(0, hw[1], 3):
            want = img[y, x]
            if lbl[y, x] != IGNORE:
                color = np.array(space.colors[lbl[y, x]])
                want = np.round(want * 0.7 + color * 0.3)
            assert (got[y, x] == want).all()


def test_overlay_takes_tensors_and_other_label_sizes():
    x = make()
    small = torch.arange(6).reshape(2, 3)
    big = overlay(x.img[0], small, CITYSCAPES19, 1.0)
    assert big.dtype == np.uint8
    assert (big[0, 0] == CITYSCAPES19.colors[0]).all()
    assert (big[-1, -1] == CITYSCAPES19.colors[5]).all()


def test_figures_are_closed_and_leave_settings_alone():
    before = dict(matplotlib.rcParams)
    for _ in range(5):
        show_sample(make(1), CITYSCAPES19)
    assert not plt.get_fignums() and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize('n,hw', [(1, (24, 40)), (2, (64, 16)), (5, (32, 32)), (4, (16, 32))])
def test_all_classes_fit_the_legend(n, hw):
    x = make(n, hw)
    fig = drawn(show_sample(x, CITYSCAPES19, n=n))
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == [*CITYSCAPES19.classes, 'ignored']
    assert len(fig.axes) == 3 * n
    assert fig.axes[0].images[0].get_array().shape[:2] == hw
    names = ['aachen_000000_000019_leftImg8bit.png'] * n
    drawn(show_panel(x.img, x.lbl, x.lbl, x.lbl, CITYSCAPES19, names))


def test_sample_without_labels():
    x = make()
    fig = drawn(show_sample(Sample(x.img), CITYSCAPES19))
    assert len(fig.axes) == 2
    unknown = Sample(x.img, torch.full((2, 24, 40), 254))  # a number that is no class has no name
    assert not drawn(show_sample(unknown, CAMVID11)).legends


def test_step_shows_weights_and_q():
    x = make()
    pseudo = Sample(x.img, x.lbl, torch.full((2, 24, 40), 0.37))
    fig = drawn(show_step(x, Sample(x.img), x, pseudo, CITYSCAPES19, n=2))
    assert [a.get_xlabel() for a in fig.axes if a.get_xlabel()] == ['pseudo-label, q = 0.37'] * 2
    shown = [a.images[0].get_array() for a in fig.axes[12:18]]
    assert np.allclose(shown[1], 0.37) and np.allclose(shown[2], x.wgt[0])
    bare = Sample(x.img, x.lbl)  # no weights = 1 everywhere
    fig = drawn(show_step(bare, bare, bare, bare, CITYSCAPES19))
    assert (fig.axes[6].images[0].get_array() == 1).all()


def test_panel_percentages_ignore_unlabelled_pixels():
    img = np.zeros((10, 10, 3), np.uint8)
    truth = np.full((10, 10), IGNORE)
    truth[0] = 3
    prediction = np.zeros((10, 10), int)
    prediction[0, :7] = 3
    fig = drawn(show_panel([img], [truth], None, [prediction], CITYSCAPES19))
    assert texts_of(fig) == ['70%']
    assert [ax.get_ylabel() for ax in fig.axes] == ['image', 'truth', 'after']
    unlabelled = np.full((10, 10), IGNORE)
    assert not texts_of(show_panel([img], [unlabelled], None, [prediction], CITYSCAPES19))


@pytest.mark.parametrize('runs', [1, 2, 5])
def test_iou_bars_and_means(runs):
    g = np.random.default_rng(0)
    tables = {}
    for i in range(runs):
        tables[f'run {i}'] = dict(zip(CITYSCAPES19.classes, (g.random(19) * 100).tolist()))
    tables['run 0'] |= {'train': None, 'bus': float('nan')}
    fig = drawn(show_iou(tables, 'title'))
    iou = np.array([[*table.values()] for table in tables.values()], float)  # None becomes NaN
    mean = np.nanmean(iou, axis=1)
    want = [f'run {i}: {m:.1f} mIoU ({m - mean[0]:+.1f})' for i, m in enumerate(mean)]
    want[0] = f'run 0: {mean[0]:.1f} mIoU'
    assert [text.get_text() for text in fig.legends[0].get_texts()] == want
    widths = [bar.get_width() for bar in fig.axes[0].containers[0]]
    assert np.allclose(widths, np.nan_to_num(iou[0]))
    rows = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert rows == list(CITYSCAPES19.classes)


def test_iou_of_different_class_sets():
    fig = show_iou({'a': {'x': 1.0, 'y': 2.0}, 'b': {'y': 3.0, 'z': 4.0}})
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ['x', 'y', 'z']


def test_curves_panels_resume_and_gaps():
    log = [{'it': i, 'lr': 1e-5, 'source/ce': 1 / i} for i in (1, 2, 3, 3, 4)]
    log.append({'it': 5, 'source/ce': float('nan'), 'q': 0.5, 'iou/student': {'road': 1}})
    fig = drawn(show_curves(log))
    assert [ax.get_title() for ax in fig.axes] == ['loss', 'confidence q', 'learning rate']
    line = fig.axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3, 4]  # the doubled row of a resume counts once
    assert np.allclose(line.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])


def test_long_run_draws_fast_and_smooth():
    g = np.random.default_rng(0)
    fig = drawn(show_curves([{'it': i, 's/ce': v} for i, v in enumerate(g.random(20000))]))
    assert fig.axes[0].lines[1].get_ydata()[5000:].std() < 0.05


@pytest.mark.parametrize(
    'log,keys,msg',
    [
        ([], None, 'nothing to draw'),
        ([{'it': 1}], None, 'nothing to draw'),
        ([{'it': 1, 'a/ce': 1.0}], ['a/c'], "did you mean 'a/ce'"),
    ],
)
def test_curves_without_data(log, keys, msg):
    with pytest.raises(ValueError, match=msg):
        show_curves(log, keys)


def test_class_freq_order_and_never():
    fig = drawn(show_class_freq({'a': 1, 'b': 1000, 'c': 0}, {'a': 0.9, 'b': 0.1}))
    shares, drawn_by_rcs = fig.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ['b', 'a', 'c']
    assert shares.texts[-1].get_text() == 'never'
    widths = [bar.get_width() for bar in drawn_by_rcs.containers[0]]
    assert np.allclose(widths, [10, 90, 0])
    drawn(show_class_freq({'a': 0, 'b': 0}))
    drawn(show_class_freq({'a': 5}))


@pytest.mark.parametrize('suffix', ['png', 'pdf', 'svg'])
def test_save_figure(tmp_path, suffix):
    f = save_figure(show_iou({'a': {'x': 1.0}}), tmp_path / 'deep' / f'f.{suffix}')
    assert f.stat().st_size > 1000 and [p.name for p in f.parent.iterdir()] == [f.name]
