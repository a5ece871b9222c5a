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
    "Both decoders agree with PIL on every colour type, size and compression"
    path = tmp_path / 'a.png'
    rgb = picture(h, w, seed)
    if mode == 'I;16':
        image = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(rgb).convert(mode)
    image.save(path, compress_level=level)
    if mode != 'I;16':
        assert np.array_equal(read_image(path), np.asarray(image.convert('RGB')))
    if mode in ('L', 'P', 'I;16'):
        assert np.array_equal(read_label(path), np.asarray(image))


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
    path = tmp_path / 'a.png'
    rgb = picture(16, 24)
    for read, x in ((read_image, rgb), (read_label, rgb[..., 0])):
        buffer = io.BytesIO()
        Image.fromarray(x).save(buffer, 'PNG')
        data = bytearray(buffer.getvalue())
        data[int(at * len(data))] ^= 1 << bit
        path.write_bytes(data)
        try:
            got = read(path)
        except ValueError as e:
            assert 'broken image file' in str(e)
        else:
            assert np.array_equal(got, x)


def test_last_channel_equals_opencvs(tmp_path):
    ids = np.random.default_rng(0).integers(0, 23, (30, 50)).astype(np.uint16)
    p = tmp_path / 's.png'
    cv2.imwrite(str(p), np.dstack([ids * 0, ids * 3 + 1, ids]))
    by_opencv = cv2.imread(str(p), cv2.IMREAD_UNCHANGED)[..., -1]
    assert np.array_equal(read_last_channel(p), ids)
    assert np.array_equal(read_last_channel(p), by_opencv)
    cv2.imwrite(str(p), ids)
    assert np.array_equal(read_last_channel(p), ids)
    p.write_bytes(p.read_bytes()[:60])
    with pytest.raises(ValueError, match='broken image file'):
        read_last_channel(p)


@hyp
@given(h=st.integers(1, 20), w=st.integers(1, 20), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_colours_against_a_naive_loop(tmp_path, h, w, n, seed):
    path = tmp_path / 'c.png'
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 256, (n, 3)).tolist()
    colors = list(dict.fromkeys(map(tuple, drawn)))
    which = rng.integers(0, len(colors), (h, w))
    Image.fromarray(np.array(colors, np.uint8)[which]).save(path)
    table = tuple((color, 100 * i) for i, color in enumerate(colors))
    assert np.array_equal(read_color_label(path, table), which * 100)
    seen = int(which[0, 0])
    table = table[:seen] + table[seen + 1 :]
    with pytest.raises(ValueError, match=r'c\.png: \d+ colours? that the class list does not have'):
        read_color_label(path, table)


NAMES = [n for n, _ in CITYSCAPES_NAMES]


def random_object(rng):
    "A polygon of a random class; one in ten is deleted"
    label = str(rng.choice(NAMES + ['cargroup', 'persongroup']))
    corners = int(rng.integers(3, 9))
    found = dict(label=label, polygon=rng.integers(-5, 60, (corners, 2)).tolist())
    return found | dict(deleted=1) if rng.random() < 0.1 else found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 30))
def test_polygons_equal_cityscapesscripts(seed, n, tmp_path_factory):
    "Random scenes with groups, licence plates and deleted objects, compared with the official renderer"
    labels = pytest.importorskip('cityscapesscripts.helpers.labels')
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp('p') / 'x_polygons.json'
    objects = [random_object(rng) for _ in range(n)]
    path.write_text(json.dumps(dict(imgHeight=40, imgWidth=56, objects=objects)))
    annotation = Annotation()
    annotation.fromJsonFile(str(path))
    official = np.asarray(createLabelImage(annotation, 'ids'))
    assert np.array_equal(read_polygon_label(path, CITYSCAPES_NAMES), official)
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
