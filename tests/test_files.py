"Readers of label files against independent ones: every PNG kind, polygons against cityscapesscripts, colours"

import io
import json

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.image_io import (
    CITYSCAPES_NAMES,
    read_color_label,
    read_image,
    read_label,
    read_last_channel,
    read_polygon_label,
)

hyp = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


@hyp
@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    seed=st.integers(0, 9),
    mode=st.sampled_from(['RGB', 'L', 'P', '1', 'RGBA', 'LA', 'I;16']),
    level=st.integers(0, 9),
)
def test_png_reads_as_pil_does(tmp_path, h, w, seed, mode, level):
    "The quick decoder and the slow one agree with PIL on every colour type, size and compression"
    rgb = picture(h, w, seed)
    im = (
        Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
        if mode == 'I;16'
        else Image.fromarray(rgb).convert(mode)
    )
    im.save(p := tmp_path / 'a.png', compress_level=level)
    if mode != 'I;16':
        assert np.array_equal(read_image(p), np.asarray(im.convert('RGB')))
    if mode in ('L', 'P', 'I;16'):
        assert np.array_equal(read_label(p), np.asarray(im))


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_small_palettes_are_indices(tmp_path, bits):
    ids = np.random.default_rng(0).integers(0, 2**bits, (9, 13), dtype=np.uint8)
    im = Image.fromarray(ids)
    im.putpalette(list(range(3 * 2**bits)))
    im.save(tmp_path / 'a.png', bits=bits)
    assert np.array_equal(read_label(tmp_path / 'a.png'), ids)


def test_interlaced_and_transparent_pngs(tmp_path):
    x = picture(24, 40)
    Image.fromarray(x).save(
        tmp_path / 't.png', transparency=tuple(int(v) for v in x[0, 0])
    )  # an RGB file with a tRNS chunk
    assert np.array_equal(read_image(tmp_path / 't.png'), x)
    ids = np.random.default_rng(0).integers(0, 34, (24, 40), dtype=np.uint8)
    im = Image.fromarray(ids)
    im.putpalette(list(range(256)) * 3)
    im.save(tmp_path / 'p.png', transparency=0)
    assert np.array_equal(read_label(tmp_path / 'p.png'), ids)


@hyp
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_or_changes_nothing(tmp_path, at, bit):
    "Wherever one bit of a PNG is wrong, the file is refused or (in its ancillary bytes) reads the same"
    for read, x in ((read_image, picture(16, 24)), (read_label, picture(16, 24)[..., 0])):
        b = io.BytesIO()
        Image.fromarray(x).save(b, 'PNG')
        data = bytearray(b.getvalue())
        data[int(at * len(data))] ^= 1 << bit
        (tmp_path / 'a.png').write_bytes(data)
        try:
            got = read(tmp_path / 'a.png')
        except ValueError as e:
            assert 'broken image file' in str(e)
        else:
            assert np.array_equal(got, x)


def test_last_channel_equals_opencvs(tmp_path):
    ids = np.random.default_rng(0).integers(0, 23, (30, 50)).astype(np.uint16)
    cv2.imwrite(str(p := tmp_path / 's.png'), np.dstack([ids * 0, ids * 3 + 1, ids]))
    assert np.array_equal(read_last_channel(p), ids) and np.array_equal(
        read_last_channel(p), cv2.imread(str(p), cv2.IMREAD_UNCHANGED)[..., -1]
    )
    cv2.imwrite(str(p), ids)
    assert np.array_equal(read_last_channel(p), ids)
    p.write_bytes(p.read_bytes()[:60])
    with pytest.raises(ValueError, match='broken image file'):
        read_last_channel(p)


@hyp
@given(h=st.integers(1, 20), w=st.integers(1, 20), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_colours_against_a_naive_loop(tmp_path, h, w, n, seed):
    rng = np.random.default_rng(seed)
    cols = list(dict.fromkeys(map(tuple, rng.integers(0, 256, (n, 3)).tolist())))
    which = rng.integers(0, len(cols), (h, w))
    Image.fromarray(np.array(cols, np.uint8)[which]).save(p := tmp_path / 'c.png')
    table = tuple((c, 100 * i) for i, c in enumerate(cols))
    assert np.array_equal(read_color_label(p, table), which * 100)
    if (which == len(cols) - 1).any() and cols[-1] != (1, 2, 3):
        table = table[:-1] + (((1, 2, 3), 0),)
    else:
        table = (((1, 2, 3) if (1, 2, 3) not in cols else (4, 5, 6), 0),)
    with pytest.raises(ValueError, match=r'c\.png: \d+ colours? that the class list does not have'):
        read_color_label(p, table)


NAMES = [n for n, _ in CITYSCAPES_NAMES]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 30))
def test_polygons_equal_cityscapesscripts(seed, n, tmp_path_factory):
    "Random scenes, groups and licence plates and deleted objects included, against the official renderer, pixel by pixel"
    labels = pytest.importorskip('cityscapesscripts.helpers.labels')
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    rng, d = np.random.default_rng(seed), tmp_path_factory.mktemp('p')
    obs = [
        dict(
            label=str(rng.choice(NAMES + ['cargroup', 'persongroup'])),
            polygon=rng.integers(-5, 60, (int(rng.integers(3, 9)), 2)).tolist(),
            **({'deleted': 1} if rng.random() < 0.1 else {}),
        )
        for _ in range(n)
    ]
    (d / 'x_polygons.json').write_text(json.dumps(dict(imgHeight=40, imgWidth=56, objects=obs)))
    a = Annotation()
    a.fromJsonFile(str(d / 'x_polygons.json'))
    assert np.array_equal(
        read_polygon_label(d / 'x_polygons.json', CITYSCAPES_NAMES),
        np.asarray(createLabelImage(a, 'ids')),
    )
    assert dict(CITYSCAPES_NAMES) == {l.name: l.id for l in labels.labels}


def test_bad_polygons(tmp_path):
    p = tmp_path / 'x_polygons.json'
    for text, says in (
        ('', 'not a polygon file'),
        ('{"imgHeight": 4', 'not a polygon file'),
        ('{"imgHeight": 4, "imgWidth": 4}', 'not a polygon file'),
        (
            '{"imgHeight":4,"imgWidth":4,"objects":[{"label":"dragon","polygon":[[0,0],[1,1],[2,0]]}]}',
            "unknown object 'dragon'",
        ),
    ):
        p.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_polygon_label(p, CITYSCAPES_NAMES)
