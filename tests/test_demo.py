"The demo world is the same on every machine, complete on disk, and never overwrites files of other programs"

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.labels import CITYSCAPES19, CITYSCAPES_IDS, CITYSCAPES_VOID
from udanb.demo import render as demo
from udanb.demo.render import render_scene, toy_pair, write_demo

TINY = dict(n_source=3, n_target=2, n_val=2, size=(32, 64), quiet=True)


def digest(*arrays):
    return hashlib.sha256(b''.join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def tree(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()
    }


@pytest.mark.parametrize('hashseed', ['1', '2'])
def test_same_pixels_in_another_process(hashseed):
    code = """if True:
        import hashlib
        from udanb.demo.render import render_scene
        sha = hashlib.sha256()
        for domain in ('source', 'target'):
            for array in render_scene(0, domain, (64, 128)):
                sha.update(array.tobytes())
        print(sha.hexdigest())
    """
    env = os.environ | dict(PYTHONHASHSEED=hashseed, OMP_NUM_THREADS='1')
    out = subprocess.run(
        [sys.executable, '-c', code], env=env, text=True, capture_output=True, check=True
    )
    source = render_scene(0, 'source', (64, 128))
    target = render_scene(0, 'target', (64, 128))
    assert out.stdout.strip() == digest(*source, *target)


def test_drawings_are_those_of_before():
    "Labels are compared exactly, images by their mean, which does not depend on the processor"
    source = [render_scene(seed, 'source', (64, 128)) for seed in range(8)]
    target = [render_scene(seed, 'target', (64, 128)) for seed in range(8)]
    assert digest(*(lbl for _, lbl in source))[:16] == '75451ae1cd30acff'
    assert np.mean([img for img, _ in source]) == pytest.approx(123.619, abs=0.01)
    assert np.mean([img for img, _ in target]) == pytest.approx(126.579, abs=0.01)


def test_global_generators_do_not_matter():
    np.random.seed(0)
    a = render_scene(5, 'target', (32, 64))
    np.random.seed(1)
    render_scene(9)
    b = render_scene(5, 'target', (32, 64))
    assert digest(*a) == digest(*b)


@given(
    seed=st.integers(0, 10**9),
    h=st.sampled_from([32, 48, 65]),
    aspect=st.sampled_from([1.0, 1.5, 2.0, 2.3]),
    domain=st.sampled_from(['source', 'target']),
)
@settings(max_examples=12, deadline=None)
def test_any_seed_and_size(seed, h, aspect, domain):
    size = h, int(h * aspect)
    img, lbl = render_scene(seed, domain, size)
    assert img.shape == (*size, 3) and lbl.shape == size and img.dtype == lbl.dtype == np.uint8
    assert lbl.max() < 19 and img.std() > 5 and (lbl == 0).any()


def test_every_class_occurs_and_some_are_rare():
    n = np.stack(
        [np.bincount(render_scene(i, size=(64, 128))[1].ravel(), minlength=19) for i in range(64)]
    )
    there = [c for i, c in enumerate(CITYSCAPES19.classes) if n[:, i].any()]
    assert there == [
        'road',
        'sidewalk',
        'building',
        'fence',
        'pole',
        'traffic light',
        'traffic sign',
        'vegetation',
        'terrain',
        'sky',
        'person',
        'rider',
        'car',
        'bicycle',
    ]
    share = n.sum(0) / n.sum()
    for c in ('traffic light', 'traffic sign', 'rider'):
        assert 0 < share[CITYSCAPES19.index(c)] < 0.02
    assert (
        n[:, CITYSCAPES19.index('rider')] > 0
    ).mean() < 0.9  # so that drawing images by class changes something


def test_domains_share_geometry_and_differ_in_appearance():
    for i in range(4):
        source, lbl = render_scene(i, size=(64, 128))
        target, same = render_scene(i, 'target', (64, 128))
        assert (lbl == same).all()
        assert np.abs(source.astype(int) - target).mean() > 10

    def saturation(domain):
        imgs = [render_scene(i, domain, (64, 128))[0] for i in range(12)]
        return np.ptp(np.stack(imgs).astype(int), axis=-1).mean()

    assert saturation('source') > 1.3 * saturation('target')  # the misty world has less colour


def test_layouts(tmp_path):
    write_demo(tmp_path, **TINY)
    assert sorted(tree(tmp_path)) == sorted(
        [
            'demo.json',
            *(f'gta/{d}/{i:05d}.png' for d in ('images', 'labels') for i in (1, 2, 3)),
            *(
                f'cityscapes/{d}/{split}/{city}/{city}_{i:06d}_000019_{s}.png'
                for split, city in (('train', 'nebelheim'), ('val', 'regensberg'))
                for i in (0, 1)
                for d, s in (('leftImg8bit', 'leftImg8bit'), ('gtFine', 'gtFine_labelIds'))
            ),
        ]
    )
    for p in (*tmp_path.glob('gta/labels/*'), *tmp_path.glob('cityscapes/gtFine/*/*/*')):
        im = Image.open(p)
        ids = np.array(im)
        assert im.mode == ('P' if 'gta' in p.parts else 'L') and ids.shape == (32, 64)
        assert set(np.unique(ids)) <= {*CITYSCAPES_IDS, *CITYSCAPES_VOID}
    for p in (*tmp_path.glob('gta/images/*'), *tmp_path.glob('cityscapes/leftImg8bit/*/*/*')):
        assert Image.open(p).mode == 'RGB'
    pal = np.array(Image.open(tmp_path / 'gta/labels/00001.png').convert('RGB'))[-1, 32]
    assert tuple(pal) == CITYSCAPES19.colors[0]  # looks right in any viewer


def test_labels_on_disk_are_the_scene_s(tmp_path):
    write_demo(tmp_path, **TINY | dict(seed=3))
    img, lbl = render_scene(3_000_000, 'source', (32, 64))
    ids = np.array(Image.open(tmp_path / 'gta/labels/00001.png'))
    assert (np.array(Image.open(tmp_path / 'gta/images/00001.png')) == img).all()
    assert [CITYSCAPES_IDS[i] for i in ids.ravel()] == lbl.ravel().tolist()


def test_source_target_and_val_are_different_streets(tmp_path):
    write_demo(tmp_path, **TINY)
    lbls = [
        Image.open(p).tobytes()
        for p in tmp_path.rglob('*.png')
        if 'labels' in p.parts or 'gtFine' in p.parts
    ]
    assert len(lbls) == len(set(lbls)) == 7


def test_second_call_draws_nothing(tmp_path, monkeypatch):
    write_demo(tmp_path, **TINY)
    old = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.png')}
    drawn = []
    monkeypatch.setattr(
        demo, 'render_scene', lambda k, d, size: drawn.append(size) or render_scene(k, d, size)
    )
    write_demo(tmp_path, **TINY)  # two small scenes for the fingerprint, and that is all
    assert len(drawn) == 2 and old == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.png')}


@pytest.mark.parametrize('after', [0, 1, 4])
def test_interrupted_writing_completes(tmp_path, monkeypatch, after):
    "Killed after some files: the stamp says incomplete, no file is half, and the next call ends with the same bytes"
    a, b = tmp_path / 'a', tmp_path / 'b'
    write_demo(a, **TINY)
    count, real = [0], demo.atomic_write

    def dies(path, data):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return real(path, data)

    with monkeypatch.context() as m:
        m.setattr(demo, 'atomic_write', dies)
        with pytest.raises(KeyboardInterrupt):
            write_demo(b, **TINY)
    assert (
        not json.loads((b / 'demo.json').read_text())['complete']
        and len(list(b.rglob('*.png'))) == after
    )
    write_demo(b, **TINY)
    assert tree(a) == tree(b)


@pytest.mark.parametrize(
    'change', [dict(n_source=2), dict(size=(32, 48)), dict(seed=1), dict(oracle=False)], ids=str
)
def test_changed_parameters_rewrite(tmp_path, change):
    "Nothing of the old world stays, statistics cached beside it included"
    a, b = tmp_path / 'a', tmp_path / 'b'
    write_demo(a, **TINY)
    (a / 'gta/sample_class_stats.json').write_text('[]')
    write_demo(a, **TINY | change)
    write_demo(b, **TINY | change)
    assert tree(a) == tree(b)


def test_changed_drawing_rewrites(tmp_path, monkeypatch):
    "An update of the drawing code reaches people who have the demo already"
    write_demo(tmp_path, **TINY)
    old = tree(tmp_path)
    monkeypatch.setitem(demo.DOMAIN_RANGE, 'target', (0.9, 1.0))
    write_demo(tmp_path, **TINY)
    new = tree(tmp_path)
    assert new.keys() == old.keys() and all(new[k] != old[k] for k in new if 'leftImg8bit' in k)


def test_training_labels_of_the_target_need_not_exist(tmp_path):
    write_demo(tmp_path, **TINY | dict(oracle=False))
    assert (
        not (tmp_path / 'cityscapes/gtFine/train').exists()
        and len(list((tmp_path / 'cityscapes/gtFine/val').rglob('*.png'))) == 2
    )


@pytest.mark.parametrize('folder', ['gta', 'cityscapes'])
def test_data_of_other_programs_are_refused(tmp_path, folder):
    f = tmp_path / folder / 'images/00001.png'
    f.parent.mkdir(parents=True)
    f.write_bytes(b'real')
    with pytest.raises(FileExistsError, match=f'{folder}.*not written by the demo'):
        write_demo(tmp_path, **TINY)
    assert f.read_bytes() == b'real' and tree(tmp_path).keys() == {f'{folder}/images/00001.png'}


def test_unreadable_stamp_is_no_licence_to_delete(tmp_path):
    write_demo(tmp_path, **TINY)
    (tmp_path / 'demo.json').write_text('{"n_so')
    with pytest.raises(FileExistsError, match='demo.json'):
        write_demo(tmp_path, **TINY)
    assert (tmp_path / 'gta/images/00001.png').exists()


def test_two_writers_at_once(tmp_path):
    code = (
        f"from udanb.demo.render import write_demo; write_demo({str(tmp_path / 'd')!r}, **{TINY!r})"
    )
    ps = [
        subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(p.communicate()[1], p.returncode)[1] for p in ps] == [0, 0]
    write_demo(tmp_path / 'e', **TINY)
    assert tree(tmp_path / 'd') == tree(tmp_path / 'e')


def test_toy_pair():
    src, tgt = toy_pair(3, (32, 64), seed=7)
    again, _ = toy_pair(3, (32, 64), seed=7)
    other, _ = toy_pair(3, (32, 64), seed=8)
    assert src.img.shape == tgt.img.shape == (3, 3, 32, 64) and src.lbl.shape == (3, 32, 64)
    assert tgt.lbl is None and src.wgt is None and len(set(src.name + tgt.name)) == 6
    assert src.img.equal(again.img) and not src.img.equal(other.img)


def test_unknown_domain_names_the_nearest():
    with pytest.raises(ValueError, match="'targte'; did you mean 'target'"):
        render_scene(0, 'targte')
