"Figures: right content, nothing cut off or left open, any input form"

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
    "Draw; texts and legends must lie inside the figure"
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    r = canvas.get_renderer()
    for o in [*fig.legends, *(t for a in fig.axes for t in (a.title, *a.texts) if t.get_text())]:
        b = o.get_window_extent(r)
        assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 + 1, (
            o,
            b,
            fig.bbox,
        )
    top = sorted(
        (t.get_window_extent(r) for a in fig.axes if (t := a.title).get_text()), key=lambda b: b.x0
    )
    assert all(a.x1 < b.x0 for a, b in zip(top, top[1:]))
    return fig


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
    img, lbl = (
        g.integers(0, 256, (*hw, 3), dtype=np.uint8),
        g.choice([*range(len(space)), IGNORE], hw).astype(np.uint8),
    )
    got = overlay(img, lbl, space, 0.3)
    for y in range(0, hw[0], 5):
        for x in range(0, hw[1], 3):
            want = (
                img[y, x]
                if lbl[y, x] == IGNORE
                else np.round(img[y, x] * 0.7 + np.array(space.colors[lbl[y, x]]) * 0.3)
            )
            assert (got[y, x] == want).all()


def test_overlay_takes_tensors_and_other_label_sizes():
    x = make()
    small = torch.arange(6).reshape(2, 3)
    big = overlay(x.img[0], small, CITYSCAPES19, 1.0)
    assert (
        (big[0, 0] == CITYSCAPES19.colors[0]).all()
        and (big[-1, -1] == CITYSCAPES19.colors[5]).all()
        and big.dtype == np.uint8
    )


def test_figures_are_closed_and_leave_settings_alone():
    before = dict(matplotlib.rcParams)
    for _ in range(5):
        show_sample(make(1), CITYSCAPES19)
    assert not plt.get_fignums() and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize('n,hw', [(1, (24, 40)), (2, (64, 16)), (5, (32, 32)), (4, (16, 32))])
def test_all_classes_fit_the_legend(n, hw):
    x = make(n, hw)
    fig = drawn(show_sample(x, CITYSCAPES19, n=n))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [*CITYSCAPES19.classes, 'ignored']
    assert len(fig.axes) == 3 * n and fig.axes[0].images[0].get_array().shape[:2] == hw
    drawn(
        show_panel(
            x.img, x.lbl, x.lbl, x.lbl, CITYSCAPES19, ['aachen_000000_000019_leftImg8bit.png'] * n
        )
    )


def test_sample_without_labels():
    x = make()
    assert len(drawn(show_sample(Sample(x.img), CITYSCAPES19)).axes) == 2
    assert not drawn(
        show_sample(Sample(x.img, torch.full((2, 24, 40), 254)), CAMVID11)
    ).legends  # a number that is no class has no name


def test_step_shows_weights_and_q():
    x = make()
    pseudo = Sample(x.img, x.lbl, torch.full((2, 24, 40), 0.37))
    fig = drawn(show_step(x, Sample(x.img), x, pseudo, CITYSCAPES19, n=2))
    assert [a.get_xlabel() for a in fig.axes if a.get_xlabel()] == ['pseudo-label, q = 0.37'] * 2
    shown = [a.images[0].get_array() for a in fig.axes[12:18]]
    assert np.allclose(shown[1], 0.37) and np.allclose(shown[2], x.wgt[0])
    bare = Sample(x.img, x.lbl)  # no weights at all = trusted everywhere
    assert (
        drawn(show_step(bare, bare, bare, bare, CITYSCAPES19)).axes[6].images[0].get_array() == 1
    ).all()


def test_panel_percentages_ignore_unlabelled_pixels():
    t = np.full((10, 10), IGNORE)
    t[0] = 3
    p = np.zeros((10, 10), int)
    p[0, :7] = 3
    fig = drawn(show_panel([np.zeros((10, 10, 3), np.uint8)], [t], None, [p], CITYSCAPES19))
    assert [x.get_text() for a in fig.axes for x in a.texts] == ['70%'] and [
        a.get_ylabel() for a in fig.axes
    ] == ['image', 'truth', 'after']
    assert not [
        x
        for a in show_panel(
            [np.zeros((10, 10, 3), np.uint8)], [t * 0 + IGNORE], None, [p], CITYSCAPES19
        ).axes
        for x in a.texts
    ]


@pytest.mark.parametrize('runs', [1, 2, 5])
def test_iou_bars_and_means(runs):
    g = np.random.default_rng(0)
    tables = {
        f'run {i}': {c: float(v) for c, v in zip(CITYSCAPES19.classes, g.random(19) * 100)}
        for i in range(runs)
    }
    tables['run 0'] |= {'train': None, 'bus': float('nan')}
    fig = drawn(show_iou(tables, 'title'))
    got = [t.get_text() for t in fig.legends[0].get_texts()]
    mean = [np.mean([v for v in t.values() if v is not None and v == v]) for t in tables.values()]
    assert got == [
        f'run {i}: {m:.1f} mIoU' + (f' ({m - mean[0]:+.1f})' if i else '')
        for i, m in enumerate(mean)
    ]
    widths = [b.get_width() for b in fig.axes[0].containers[0]]
    assert np.allclose(widths, [v or 0 if v == v else 0 for v in tables['run 0'].values()])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == list(CITYSCAPES19.classes)


def test_iou_of_different_class_sets():
    assert (
        len(
            show_iou({'a': {'x': 1.0, 'y': 2.0}, 'b': {'y': 3.0, 'z': 4.0}})
            .axes[0]
            .get_yticklabels()
        )
        == 3
    )


def test_curves_panels_resume_and_gaps():
    log = [{'it': i, 'lr': 1e-5, 'source/ce': 1 / i} for i in (1, 2, 3, 3, 4)] + [
        {'it': 5, 'source/ce': float('nan'), 'q': 0.5, 'iou/student': {'road': 1}}
    ]
    fig = drawn(show_curves(log))
    assert [a.get_title() for a in fig.axes] == ['loss', 'trust q', 'learning rate']
    assert fig.axes[0].lines[0].get_xdata().tolist() == [
        1,
        2,
        3,
        4,
    ]  # the doubled row of a resume counts once
    assert np.allclose(fig.axes[0].lines[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])


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
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['b', 'a', 'c'] and fig.axes[
        0
    ].texts[-1].get_text() == 'never'
    assert np.allclose([b.get_width() for b in fig.axes[1].containers[0]], [10, 90, 0])
    drawn(show_class_freq({'a': 0, 'b': 0}))
    drawn(show_class_freq({'a': 5}))


@pytest.mark.parametrize('suffix', ['png', 'pdf', 'svg'])
def test_save_figure(tmp_path, suffix):
    f = save_figure(show_iou({'a': {'x': 1.0}}), tmp_path / 'deep' / f'f.{suffix}')
    assert f.stat().st_size > 1000 and [p.name for p in f.parent.iterdir()] == [f.name]
