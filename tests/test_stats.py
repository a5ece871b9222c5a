"Class statistics, how they are kept, and rare-class sampling"

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.labels import CAMVID11, CAMVID_MERGE, CITYSCAPES_IDS
from udanb.data import class_stats as stats
from udanb.data.catalog import CITYSCAPES, GTA, TOWN
from udanb.data.class_stats import (
    class_stats,
    count_label,
    label_keys,
    read_stats,
    stats_paths,
    with_native_labels,
    write_stats,
)
from udanb.data.concat import ConcatSegDataset, normalize_weights
from udanb.data.datasets import SegDataset
from udanb.data.samplers import RareClassSampler, scaled_rcs_limits

GOLDEN = Path(__file__).parent / 'golden'
IDS = np.array(sorted(CITYSCAPES_IDS, key=CITYSCAPES_IDS.get), np.uint8)  # train id -> label id


def write(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)


@pytest.fixture
def data(tmp_path, monkeypatch):
    "GTA with 10 images; Cityscapes with two cities whose files have equal names, labels for val only"
    monkeypatch.chdir(tmp_path)  # caches go below the working directory, not into the project
    rng = np.random.default_rng(0)

    def img():
        return rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)

    for i in range(10):
        lbl = rng.integers(0, 19, (4, 6)).repeat(10, 0).repeat(10, 1)
        write(tmp_path / f'gta/images/{i:05d}.png', img())
        write(
            tmp_path / f'gta/labels/{i:05d}.png', np.where(lbl == 8, 4, IDS[lbl]).astype(np.uint8)
        )  # vegetation becomes a void id
    for s in ('train', 'val'):
        for k, city in enumerate(('aachen', 'bonn')):
            write(tmp_path / f'cityscapes/leftImg8bit/{s}/{city}/x_leftImg8bit.png', img())
            if s == 'val':
                write(
                    tmp_path / f'cityscapes/gtFine/{s}/{city}/x_gtFine_labelIds.png',
                    np.full((40, 60), IDS[k], np.uint8),
                )
    return tmp_path


def gta(root, **kw):
    return SegDataset(GTA, root, **kw)


def city(root, split='train', **kw):
    return SegDataset(CITYSCAPES, root, split, **kw)


# ---------------------------------------------------------------- statistics


def counted(folder):
    "Class statistics by comparing each label with each class"
    found = []
    for i, name in enumerate(folder.names):
        lbl = folder.label(i)
        pixels = {c: int((lbl == c).sum()) for c in range(len(folder.space))}
        found.append((name, {c: n for c, n in pixels.items() if n}))
    return found


@pytest.mark.parametrize('kw', [{}, dict(space=CAMVID11), dict(space=CAMVID11, merge=CAMVID_MERGE)])
def test_stats_equal_counting(data, kw):
    f = gta(data, **kw)
    assert (
        class_stats(f, quiet=True)
        == class_stats(f, quiet=True)
        == class_stats(f, cache=False, quiet=True)
        == counted(f)
    )


def stored_counts(row):
    "{train id: pixels} of an entry of the file"
    return {int(c): n for c, n in row.items() if c != 'file'}


def test_the_file_has_upstreams_form_in_train_ids(data):
    class_stats(gta(data, space=CAMVID11, merge=CAMVID_MERGE), quiet=True)
    rows = json.loads((data / 'gta/sample_class_stats.json').read_text())
    assert [row['file'] for row in rows] == [f'labels/{i:05d}.png' for i in range(10)]
    want = [counts for _, counts in counted(gta(data))]
    assert [stored_counts(row) for row in rows] == want


@pytest.mark.parametrize('prefix', ['data/gta/labels/', 'labels/', 'D:\\x\\gta\\labels\\'])
def test_upstreams_file_is_read(data, prefix, monkeypatch):
    rows = []
    for i in range(10):
        file = f'{prefix}{i:05d}_labelTrainIds.png'
        rows.append({'0': 100 + i, '18': 7, 'file': file})
    (data / 'gta/sample_class_stats.json').write_text(json.dumps(rows))
    monkeypatch.setattr(stats, 'count_label', lambda *a: pytest.fail('must not count'))
    want = [(f'images/{i:05d}.png', {0: 100 + i, 18: 7}) for i in range(10)]
    assert class_stats(gta(data)) == want
    merged = class_stats(gta(data, space=CAMVID11, merge=CAMVID_MERGE))
    assert merged[3][1] == {0: 103, 10: 7}


def test_equal_names_in_two_folders_do_not_meet(data):
    f = city(data, 'val')
    assert (
        [n for _, n in class_stats(f, quiet=True)]
        == [{0: 2400}, {1: 2400}]
        == [n for _, n in class_stats(f, quiet=True)]
    )
    assert len(set(label_keys(f))) == 2


@pytest.fixture
def asked(monkeypatch):
    "Which labels are counted"
    names, real = [], stats.count_label
    monkeypatch.setattr(stats, 'count_label', lambda f, i: names.append(i) or real(f, i))
    return names


def later(p, sec=100):
    t = time.time() + sec
    os.utime(p, (t, t))


def test_only_what_is_new_is_counted(data, asked):
    class_stats(gta(data, limit=4))
    class_stats(gta(data, limit=3))
    class_stats(gta(data))
    assert asked == list(range(10))
    write(data / 'gta/labels/00002.png', np.full((40, 60), 7, np.uint8))
    later(data / 'gta/labels/00002.png')
    assert class_stats(gta(data))[2][1] == {0: 2400}
    assert asked[10:] == [2]
    (data / 'gta/labels/00009.png').unlink()
    (data / 'gta/images/00009.png').unlink()
    assert len(class_stats(gta(data))) == 9


def test_a_changed_label_is_not_hidden_by_counting_others(data, asked):
    "Writing the file anew makes it younger than every label: entries that were stale must not survive that"
    class_stats(gta(data))
    old = time.time() - 1000
    os.utime(data / 'gta/sample_class_stats.json', (old, old))
    for i in range(10):
        os.utime(data / f'gta/labels/{i:05d}.png', (old - 1, old - 1))
    for i in (1, 7):
        write(data / f'gta/labels/{i:05d}.png', np.full((40, 60), 7, np.uint8))
        os.utime(data / f'gta/labels/{i:05d}.png', (old + 1, old + 1))
    assert class_stats(gta(data, limit=3))[1][1] == {
        0: 2400
    }  # writes the file, without having looked at label 7
    assert class_stats(gta(data))[7][1] == {0: 2400}
    assert asked[10:] == [1, 7]


def test_entries_of_other_files_survive(data):
    f = data / 'gta/sample_class_stats.json'
    f.write_text(json.dumps([{'3': 5, 'file': 'elsewhere/labels/99999_labelTrainIds.png'}]))
    class_stats(gta(data), quiet=True)
    assert json.loads(f.read_text())[0] == {
        '3': 5,
        'file': 'elsewhere/labels/99999_labelTrainIds.png',
    }
    assert len(json.loads(f.read_text())) == 11


def test_read_only_dataset_goes_to_the_cache(data, monkeypatch):
    real = stats.atomic_write

    def write_(p, x):
        if p.parent == data / 'gta':
            raise PermissionError(13, 'read-only')
        return real(p, x)

    monkeypatch.setattr(stats, 'atomic_write', write_)
    a = class_stats(gta(data), quiet=True)
    assert not (data / 'gta/sample_class_stats.json').exists()
    assert stats_paths(gta(data))[1].is_file()
    monkeypatch.setattr(stats, 'count_label', lambda *a: pytest.fail('must not count'))
    assert class_stats(gta(data)) == a


def test_nowhere_to_write_only_warns(data, monkeypatch):
    def never(*a):
        raise OSError(30, 'read-only')

    monkeypatch.setattr(stats, 'atomic_write', never)
    with pytest.warns(UserWarning, match='could not be kept'):
        a = class_stats(gta(data), quiet=True)
    assert a == counted(gta(data))


@pytest.mark.parametrize(
    'text', ['[{"0": 1, "fi', '{"a": 1}', '[3]', '[{"road": 3, "file": "x"}]', '[{"0": 3}]']
)
def test_broken_statistics_say_so(data, text):
    (data / 'gta/sample_class_stats.json').write_text(text)
    with pytest.raises(ValueError, match='sample_class_stats.json.*delete it'):
        class_stats(gta(data))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_broken_label_is_named_and_the_rest_is_kept(data, workers, asked):
    p = data / 'gta/labels/00006.png'
    whole = p.read_bytes()
    p.write_bytes(whole[:60])
    with pytest.raises(ValueError, match='00006.png'):
        class_stats(gta(data), workers=workers, quiet=True)
    kept = {
        Path(r['file']).stem for r in json.loads((data / 'gta/sample_class_stats.json').read_text())
    }
    # two workers hand over five labels at a time
    assert {f'{i:05d}' for i in range(5)} <= kept
    assert '00006' not in kept
    p.write_bytes(whole)
    asked.clear()
    assert class_stats(gta(data), quiet=True) == counted(gta(data))
    assert len(asked) == 10 - len(kept)
    assert 6 in asked


def spoil(data):
    "Four labels that cannot be used, each for another reason"

    def at(i):
        return data / f'gta/labels/{i:05d}.png'

    f = gta(data)
    at(1).write_bytes(at(1).read_bytes()[:60])
    write(at(3), np.full((40, 61), 7, np.uint8))
    write(at(4), np.full((40, 60), 77, np.uint8))
    at(8).unlink()
    return f


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_labels_are_skipped_where_asked(data, workers):
    f = spoil(data)
    good = [i for i in range(10) if i not in (1, 3, 4, 8)]
    with pytest.raises(ValueError):
        class_stats(f, quiet=True, workers=workers)
    for _ in range(2):  # counted, and from the file
        got = class_stats(f, quiet=True, workers=workers, skip_broken=True)
        assert [n for n, _ in got] == f.names
        assert [i for i, (_, n) in enumerate(got) if n] == good
        assert list(f.skipped) == [f'images/{i:05d}.png' for i in (1, 3, 4, 8)]
        for i, why in zip(
            (1, 3, 4, 8), ('broken image file', '61×40 pixels', '77 (2400 px)', 'No such file')
        ):
            assert why in f.skipped[f.names[i]]
            assert f'{i:05d}.png' in f.skipped[f.names[i]]
    rest = f.exclude(f.skipped)
    assert class_stats(rest, quiet=True) == [got[i] for i in good] == counted(rest)


def test_broken_labels_are_tried_again(data, asked):
    f = spoil(data)
    class_stats(f, quiet=True, skip_broken=True)
    asked.clear()
    write(data / 'gta/labels/00004.png', np.full((40, 60), 7, np.uint8))
    assert class_stats(f, quiet=True, skip_broken=True)[4][1] == {0: 2400}
    assert asked == [1, 3, 4, 8]


def test_ctrl_c_keeps_what_was_counted(data, monkeypatch, asked):
    real = stats.count_label

    def stop(f, i):
        if i == 4:
            raise KeyboardInterrupt
        return real(f, i)

    monkeypatch.setattr(stats, 'count_label', stop)
    with pytest.raises(KeyboardInterrupt):
        class_stats(gta(data), quiet=True)
    monkeypatch.setattr(stats, 'count_label', real)
    asked.clear()
    assert class_stats(gta(data), quiet=True) == counted(gta(data))
    assert asked == [4, 5, 6, 7, 8, 9]


KILLED = """
import sys, time
from udanb.data import class_stats as stats
from test_stats import gta
stats.SAVE_INTERVAL_S,real = 0,stats.count_label
def slow(f, i):
    if i>=6: time.sleep(300)
    return real(f, i)
stats.count_label = slow
stats.class_stats(gta(sys.argv[1]), workers=int(sys.argv[2]), quiet=True)
"""


@pytest.mark.parametrize(
    'workers,done', [(0, 6), (2, 5)]
)  # two workers take five labels each, and hang in the second five
def test_a_killed_count_goes_on_where_it_stopped(data, workers, done, asked):
    here = Path(__file__).resolve().parent
    env = os.environ | dict(PYTHONPATH=f'{here.parent}{os.pathsep}{here}')
    p = subprocess.Popen([sys.executable, '-c', KILLED, str(data), str(workers)], cwd=data, env=env)
    file, until = data / 'gta/sample_class_stats.json', time.time() + 120
    try:
        while not (file.exists() and len(json.loads(file.read_text())) >= done):
            assert p.poll() is None
            assert time.time() < until
            time.sleep(0.05)
        children = psutil.Process(p.pid).children(recursive=True)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    # nobody is left behind
    assert len(children) >= workers
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert class_stats(gta(data), quiet=True) == counted(gta(data))
    assert asked == list(range(done, 10))
    class_stats(gta(data), quiet=True)
    assert len(asked) == 10 - done  # run again, nothing is counted


def test_counts_can_be_given(data, asked):
    f = gta(data)
    write_stats(f, {2: {0: 5}, 7: {18: 9}})
    assert write_stats(f, {2: {1: 6}}).parent == f.root
    got = class_stats(f, quiet=True)
    assert got[2][1] == {1: 6}
    assert got[7][1] == {18: 9}
    assert 2 not in asked
    assert 7 not in asked
    assert len(asked) == 8
    write_stats(f, [{0: i + 1} for i in range(10)])
    assert [n for _, n in class_stats(f)] == [{0: i + 1} for i in range(10)]


def test_statistics_are_at_native_size(data):
    "A split that is read at half its size is counted in full"
    half = SegDataset(replace(GTA, split_scale=dict(train=0.5)), data)
    assert half.label(0).shape == (20, 30)
    assert class_stats(half, quiet=True) == class_stats(gta(data), cache=False, quiet=True)


def test_sixteen_bit_ids(data):
    spec = replace(GTA, labels=(replace(GTA.labels[0], ids={300: 0, 301: 1}, void=(65535,)),))
    for i in range(10):
        write(
            data / f'gta/labels/{i:05d}.png',
            np.where(np.arange(2400).reshape(40, 60) < i, 301, 300).astype(np.uint16),
        )
    assert [n.get(1, 0) for _, n in class_stats(SegDataset(spec, data), quiet=True)] == list(
        range(10)
    )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), h=st.integers(1, 30), w=st.integers(1, 30), n=st.integers(1, 4)
)
def test_sums_equal_labelled_pixels(seed, h, w, n):
    rng = np.random.default_rng(seed)
    values = np.array([*IDS, 0, 4, 255], np.uint8)
    with tempfile.TemporaryDirectory() as d:
        d, want = Path(d), []
        for i in range(n):
            lbl = rng.choice(values, (h, w))
            write(d / f'gta/images/{i:05d}.png', np.zeros((h, w, 3), np.uint8))
            write(d / f'gta/labels/{i:05d}.png', lbl)
            want.append(int(np.isin(lbl, IDS).sum()))
        found = class_stats(SegDataset(GTA, d), quiet=True)
        assert [sum(counts.values()) for _, counts in found] == want
        merged = class_stats(SegDataset(GTA, d, space=CAMVID11, merge=CAMVID_MERGE), quiet=True)
        for (_, counts), most in zip(merged, want):
            assert sum(counts.values()) <= most
            assert set(counts) <= set(range(11))


def test_town_statistics_equal_counting(shared_data, monkeypatch):
    monkeypatch.setattr(stats, 'write_stats', lambda *a: None)  # shared/ is read-only
    if not (shared_data / 'town').is_dir():
        pytest.skip('needs ../shared/data/town')
    kw = dict(root=shared_data, limit=8)
    shipped = json.loads((shared_data / 'town/sample_class_stats.json').read_text())
    merged = SegDataset(TOWN, space=CAMVID11, merge=CAMVID_MERGE, **kw)
    keys = label_keys(merged)
    have, _ = read_stats(
        shared_data / 'town/sample_class_stats.json', keys, ('.png', '_labelTrainIds.png')
    )
    raw = with_native_labels(merged)
    assert len(shipped) == 700
    assert [have[k] for k in keys] == [count_label(raw, i) for i in range(8)]
    assert class_stats(merged, quiet=True) == counted(merged)


# ---------------------------------------------------------------- rare-class sampling


@pytest.mark.parametrize('T', ['0.01', '0.1', '1.0', 'inf'])
def test_probabilities_equal_published(T):
    rows = json.loads((GOLDEN / 'rcs_stats/sample_class_stats.json').read_text())
    stats = [(row['file'], stored_counts(row)) for row in rows]
    want = json.loads((GOLDEN / 'units.json').read_text())['rcs'][T]
    rcs = quiet_rcs(stats, 19, float(T))
    found = rcs.prob[want['classes']]
    np.testing.assert_allclose(found, want['probs'], rtol=2e-5, atol=1e-9)
    if T != 'inf':
        order = np.argsort(rcs.freq, kind='stable')
        assert order.tolist() == want['classes']


def test_temperature():
    two = RareClassSampler([('a', {0: 505_000, 1: 495_000})], 2)
    ratio = two.prob[1] / two.prob[0]
    assert np.isclose(ratio, np.e)
    equal = {c: 4000 for c in range(7)}
    even = RareClassSampler([('a', equal)], 7)
    np.testing.assert_allclose(even.prob, 1 / 7)


def test_draws_follow_probabilities_and_show_the_class():
    rng = np.random.default_rng(1)
    most = [40_000, 9000, 5000, 3500]
    px = np.stack([rng.integers(0, most) for _ in range(30)])
    stats = [(str(i), dict(enumerate(row.tolist()))) for i, row in enumerate(px)]
    rcs = RareClassSampler(stats, 4, T=0.3)
    drawn = np.array([rcs.draw(rng) for _ in range(5000)])
    images, classes = drawn.T
    assert (px[images, classes] > 3000).all()
    found = np.bincount(classes, minlength=4) / 5000
    np.testing.assert_allclose(found, rcs.prob, atol=0.03)
    shows = px[:, 1] > 3000
    share = np.bincount(images[classes == 1], minlength=30)[shows]
    share = share / share.sum()
    assert abs(share - 1 / shows.sum()).max() < 0.05


def test_absent_and_small_classes_warn_once():
    stats = [('a', {0: 90_000, 2: 50}), ('b', {0: 90_000, 2: 20})]
    with pytest.warns(UserWarning) as w:
        rcs = RareClassSampler(stats, 4, names=('road', 'wall', 'bike', 'train'))
    assert len(w) == 1
    assert 'wall, train' in str(w[0].message)
    assert 'bike' in str(w[0].message)
    assert rcs.prob[1] == rcs.prob[3] == 0
    assert rcs.prob[2] > 0.6
    assert np.isclose(rcs.prob.sum(), 1)
    assert {rcs.draw(np.random.default_rng(i)) for i in range(50)} == {
        (0, 2)
    }  # the rare class, in the image that has most of it


def test_no_class_at_all_is_an_error():
    with pytest.raises(ValueError, match='no labelled pixel'):
        RareClassSampler([('a', {})], 5)
    with pytest.raises(ValueError, match='no labelled pixel'):
        RareClassSampler([], 5)


def test_pixel_limits_scale_by_area():
    assert scaled_rcs_limits((1052, 1914), (704, 1280)) == (3000, 1500)
    m, c = scaled_rcs_limits((526, 957), (352, 640))
    assert (m, c) == (750, 375)
    assert scaled_rcs_limits((1052, 1914), (704, 1280), ratio=2) == (
        3000,
        6000,
    )


# ---------------------------------------------------------------- several sources


def test_statistics_of_several_datasets(data):
    a, b = gta(data), city(data, 'val')
    both = ConcatSegDataset([a, b], weights=(1, 3))
    assert class_stats(both, quiet=True) == [(f'gta/{n}', c) for n, c in class_stats(a)] + [
        (f'cityscapes/{n}', c) for n, c in class_stats(b)
    ]
    (data / 'gta/labels/00002.png').write_bytes(b'')
    later(data / 'gta/labels/00002.png')
    assert class_stats(both, quiet=True, skip_broken=True)[2] == (
        'gta/images/00002.png',
        {},
    )
    assert list(both.skipped) == ['gta/images/00002.png']


def rows(seed, n=12, classes=5, top=30_000):
    "Random class statistics of n images; about a third of the classes are missing in each"
    rng = np.random.default_rng(seed)
    stats = []
    for i in range(n):
        pixels = rng.integers(0, top, classes) * (rng.random(classes) < 0.7)
        stats.append((str(i), {c: int(n) for c, n in enumerate(pixels) if n}))
    return stats


def quiet_rcs(*a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return RareClassSampler(*a, **kw)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 30),
    T=st.sampled_from([0.01, 0.05, 0.3, 2]),
    weighted=st.booleans(),
)
def test_probabilities_equal_a_naive_softmax(seed, n, T, weighted):
    stats = rows(seed, n)
    if not any(counts for _, counts in stats):
        return
    share = np.random.default_rng(seed + 1).integers(1, 6, n).tolist() if weighted else None
    seen = [0] * 5
    for i, (_, counts) in enumerate(stats):
        for k, pixels in counts.items():
            seen[k] += pixels * (share[i] if weighted else 1)
    up = []
    for pixels in seen:
        rarity = np.longdouble(1 - pixels / sum(seen))
        up.append(np.exp(rarity / T) if pixels else 0)
    want = np.array([u / sum(up) for u in up], float)
    found = quiet_rcs(stats, 5, T, share=share).prob
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-12)


def images_above(stats, share, c, min_px=3000):
    "Images that are drawn and show class c, with the limit halved until there are some"
    while True:
        drawn = [i for i, s in enumerate(share) if s]
        found = [i for i in drawn if stats[i][1].get(c, 0) > min_px]
        if found or not min_px:
            return found
        min_px //= 2


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 12))
def test_images_are_drawn_as_often_as_they_should(seed, n):
    stats, rng = rows(seed, n), np.random.default_rng(seed)
    share = rng.integers(0, 4, n) + (np.arange(n) == 0)
    if not any(counts for (_, counts), s in zip(stats, share) if s):
        return
    rcs = quiet_rcs(stats, 5, 0.5, share=share)
    want = np.zeros(n)
    for c, p in enumerate(rcs.prob):
        images = images_above(stats, share, c)
        total = sum(share[i] for i in images)
        for i in images:
            want[i] += p * share[i] / total
    assert np.isclose(want.sum(), 1)
    N = 2000
    drawn = [rcs.draw(rng)[0] for _ in range(N)]
    got = np.bincount(drawn, minlength=n) / N
    deviation = np.sqrt((want * (1 - want)).clip(0) / N)
    assert (abs(got - want) <= 6 * deviation + 1e-9).all()


@pytest.mark.parametrize('share', [np.full(12, 1 / 12), np.full(12, 3.0), np.ones(12) / 7])
def test_equal_shares_change_nothing(share):
    stats = rows(5)
    plain = quiet_rcs(stats, 5)
    shared = quiet_rcs(stats, 5, share=share)
    assert (plain.prob == shared.prob).all()
    assert (plain.freq == shared.freq).all()
    r, s = np.random.default_rng(2), np.random.default_rng(2)
    for _ in range(300):
        assert plain.draw(r) == shared.draw(s)


def test_a_source_without_weight_is_not_there():
    one, two = rows(1), rows(2, 5)
    alone = quiet_rcs(one, 5)
    both = quiet_rcs(one + two, 5, share=[1] * 12 + [0] * 5)
    np.testing.assert_allclose(both.prob, alone.prob, rtol=1e-12)
    for found, want in zip(both.files, alone.files, strict=True):
        assert found.tolist() == want.tolist()
    assert (both.min_px == alone.min_px).all()
    rng = np.random.default_rng(0)
    drawn = [both.draw(rng)[0] for _ in range(2000)]
    assert max(drawn) < 12
    with pytest.raises(ValueError, match='no labelled pixel'):
        RareClassSampler([('a', {}), ('b', {0: 9000})], 2, share=[1, 0])


def draw_probability(rcs, images, c):
    "Probability that one of these images is drawn for class c"
    total = rcs.w[rcs.files[c]].sum()
    return rcs.w[images].sum() / total


def test_a_dataset_listed_twice_at_half_the_weight_counts_once():
    a, b = rows(1), rows(2, 5)
    once = quiet_rcs(a + b, 5, share=[0.6 / 12] * 12 + [0.4 / 5] * 5)
    twice = quiet_rcs(a + a + b, 5, share=[0.3 / 12] * 24 + [0.4 / 5] * 5)
    np.testing.assert_allclose(twice.prob, once.prob, rtol=1e-9)
    for c in range(5):
        for i in once.files[c].tolist():
            copies = [i, i + 12] if i < 12 else [i + 12]
            want = draw_probability(once, [i], c)
            assert np.isclose(draw_probability(twice, copies, c), want)


@pytest.mark.parametrize(
    'w', [(1,), (1, 2, 3), (-1, 2), (0, 0), (np.nan, 1), (np.inf, 1), ((1, 2),)]
)
def test_bad_weights_are_errors(w, data):
    with pytest.raises(ValueError, match='2 numbers are needed'):
        normalize_weights(w, 2)
    datasets = [gta(data), city(data, 'val')]
    with pytest.raises(ValueError, match='weights of gta . cityscapes: 2 numbers'):
        ConcatSegDataset(datasets, w)
    stats = [('a', {0: 1}), ('b', {0: 1})]
    with pytest.raises(ValueError, match='share: 2 numbers'):
        RareClassSampler(stats, 1, share=w)


def test_names_in_upstreams_file_stay(data):
    "A recounted entry keeps the name of the converted file: upstream's reader looks it up by base name"
    folder = gta(data)
    counts = [n for _, n in class_stats(folder, cache=False, quiet=True)]
    rows = [
        {str(c): n for c, n in x.items()}
        | dict(file=f'data/gta/labels/{Path(name).stem}_labelTrainIds.png')
        for name, x in zip(folder.names, counts)
    ]
    path = folder.root / 'sample_class_stats.json'
    path.write_text(json.dumps(rows[:2]))
    write_stats(folder, {0: counts[0], 2: counts[2]})
    files = [r['file'] for r in json.loads(path.read_text())]
    assert files[:2] == [r['file'] for r in rows[:2]]
    assert files[2].endswith(f'{Path(folder.names[2]).stem}.png')
