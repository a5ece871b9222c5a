"Datasets: the layouts of the field, bad input, and the data we have against upstream's converted files"

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from udanb.core.image_io import read_image, read_image_size, read_label
from udanb.core.labels import CAMVID11, CAMVID_MERGE, CITYSCAPES19, ZEROWASTE5
from udanb.core.types import IGNORE
from udanb.core.utils import project_root
from udanb.data.catalog import CITYSCAPES, DATASETS, GTA, TOWN, ZEROWASTE_V1
from udanb.data.datasets import LabelFiles, SegDataset, SegSpec
from udanb.data.pairs import PAIRS

SHARED = project_root(Path(__file__).parent).parent / 'shared' / 'data'
needs_shared = pytest.mark.skipif(
    not (SHARED / 'town').is_dir() or not (SHARED / 'camvid').is_dir(), reason='no shared data'
)
PAPER = (
    7,
    8,
    11,
    12,
    13,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    31,
    32,
    33,
)  # train ids 0…18 in Cityscapes' label ids, as in the paper's table


def picture(h=40, w=56, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def encode(img, fmt, **kw):
    b = io.BytesIO()
    (img if isinstance(img, Image.Image) else Image.fromarray(img)).save(b, fmt, **kw)
    return b.getvalue()


def save_label(path, ids, palette=True):
    im = Image.fromarray(ids)
    if palette:
        im.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path)


def save_image(path, seed=0, size=(40, 56)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(*size, seed)).save(path)


@pytest.fixture
def gta(tmp_path):
    "Three frames in GTA's layout"
    rng = np.random.default_rng(0)
    for i in range(3):
        save_image(tmp_path / f'gta/images/{i:05d}.png', i)
        save_label(
            tmp_path / f'gta/labels/{i:05d}.png', rng.choice(PAPER, (40, 56)).astype(np.uint8)
        )
    return tmp_path


def city(root, split, *names, size=(40, 56), labels='_gtFine_labelIds.png'):
    "Frames in Cityscapes' layout: names like aachen/aachen_000000_000019"
    for k, n in enumerate(names):
        save_image(root / f'cityscapes/leftImg8bit/{split}/{n}_leftImg8bit.png', k, size)
        if labels:
            save_label(
                root / f'cityscapes/gtFine/{split}/{n}{labels}',
                np.full(size, 7 + k, np.uint8),
                palette=False,
            )


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P'])
def test_png_of_any_mode_reads_as_pil_does(tmp_path, mode):
    im = Image.fromarray(picture()).convert(mode)
    im.save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png'), np.asarray(im.convert('RGB')))


@pytest.mark.parametrize('kw', [{}, dict(progressive=True)])
def test_jpeg_reads_as_pil_does(tmp_path, kw):
    (tmp_path / 'ä b.jpg').write_bytes(data := encode(picture(), 'JPEG', quality=95, **kw))
    ours, pil = read_image(tmp_path / 'ä b.jpg'), np.asarray(Image.open(io.BytesIO(data)))
    assert (
        np.abs(ours.astype(int) - pil).mean() < 1
        and ours.flags.writeable
        and ours.flags.c_contiguous
    )


def test_orientation_tags_do_not_turn_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / 'a.jpg').write_bytes(encode(picture(), 'JPEG', exif=exif))
    assert (
        read_image(tmp_path / 'a.jpg').shape[:2] == read_image_size(tmp_path / 'a.jpg') == (40, 56)
    )


FORMATS = dict(
    png=('PNG', {}),
    jpg=('JPEG', dict(quality=90)),
    prog=('JPEG', dict(quality=90, progressive=True)),
    webp=('WEBP', {}),
)


@pytest.mark.parametrize('fmt', FORMATS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1, exclude_max=True))
def test_an_image_cut_anywhere_raises(tmp_path, fmt, share):
    kind, kw = FORMATS[fmt]
    whole = encode(picture(), kind, **kw)
    (tmp_path / 'cut').write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match='cut.*broken image file.*bytes'):
        read_image(tmp_path / 'cut')


@pytest.mark.parametrize('fmt', ['png', 'jpg', 'prog'])
def test_zero_byte_and_foreign_files_raise(tmp_path, fmt):
    p = tmp_path / f'a.{fmt}'
    p.write_bytes(b'')
    with pytest.raises(ValueError, match='it is empty; 0 bytes'):
        read_image(p)
    p.write_bytes(b'<html>404 not found</html>')
    with pytest.raises(ValueError, match='broken image file'):
        read_image(p)
    kind, kw = FORMATS[fmt]
    whole = encode(picture(), kind, **kw)
    p.write_bytes(
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    )  # an interrupted copy into a preallocated file
    with pytest.raises(ValueError, match='broken image file'):
        read_image(p)
    p.write_bytes(whole + bytes(100))  # junk after the end is legal
    assert read_image(p).shape == (40, 56, 3)


def test_a_cut_jpeg_with_a_whole_thumbnail_raises(tmp_path):
    "The thumbnail's end marker must not be taken for the picture's"
    thumb, whole = encode(picture(16, 16), 'JPEG'), encode(picture(), 'JPEG')
    app1 = b'Exif\0\0' + thumb
    data = whole[:2] + b'\xff\xe1' + (len(app1) + 2).to_bytes(2, 'big') + app1 + whole[2:]
    (tmp_path / 'a.jpg').write_bytes(data)
    assert read_image(tmp_path / 'a.jpg').shape == (40, 56, 3)
    (tmp_path / 'a.jpg').write_bytes(data[:-200])
    with pytest.raises(ValueError, match='stops before its end'):
        read_image(tmp_path / 'a.jpg')


def test_a_flipped_byte_in_a_png_raises(tmp_path):
    for read, img in (
        (read_image, picture()),
        (read_label, np.random.default_rng(0).integers(0, 34, (40, 56), dtype=np.uint8)),
    ):
        data = bytearray(encode(img, 'PNG'))
        data[len(data) // 2] ^= 0xFF
        (tmp_path / 'a.png').write_bytes(data)
        with pytest.raises(ValueError, match='broken image file'):
            read(tmp_path / 'a.png')


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 0.99))
def test_a_cut_label_raises(tmp_path, share):
    whole = encode(np.random.default_rng(0).integers(0, 34, (40, 56), dtype=np.uint8), 'PNG')
    (tmp_path / 'a.png').write_bytes(
        whole[: min(int(share * len(whole)), len(whole) - 13)]
    )  # 12 bytes of an end chunk carry nothing
    with pytest.raises(ValueError, match='broken image file'):
        read_label(tmp_path / 'a.png')


def test_palette_labels_are_indices(gta):
    p = gta / 'gta/labels/00000.png'
    assert Image.open(p).mode == 'P' and set(np.unique(read_label(p))) <= set(PAPER)


# ---------------------------------------------------------------- bad trees and files


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        SegDataset(GTA, tmp_path)
    for s in (
        str(tmp_path / 'gta' / 'images'),
        'download.visinf.tu-darmstadt.de',
        'papermill nbs/train_uda.ipynb outputs/demo.ipynb -p source demo',
    ):
        assert s in str(e.value)


def test_every_dataset_says_where_to_get_it(tmp_path):
    for s in DATASETS.values():
        with pytest.raises(FileNotFoundError) as e:
            SegDataset(s, tmp_path)
        assert len(s.download_hint) > 20 and s.download_hint in str(e.value)


def test_empty_folder(tmp_path):
    (tmp_path / 'gta/images').mkdir(parents=True)
    (tmp_path / 'gta/images/readme.txt').write_text('x')
    with pytest.raises(
        ValueError,
        match=r"images holds no image of split 'train' that ends in \.png; a published file is images/00001\.png",
    ):
        SegDataset(GTA, tmp_path)


def test_corrupt_image_in_a_folder(gta):
    p = gta / 'gta/images/00001.png'
    p.write_bytes(p.read_bytes()[:300])
    with pytest.raises(ValueError, match='00001.png: broken image file'):
        SegDataset(GTA, gta).image(1)


@pytest.mark.parametrize('which', ['images', 'labels'])
def test_zero_byte_file_in_a_folder(gta, which):
    p = gta / f'gta/{which}/00001.png'
    p.write_bytes(b'')
    with pytest.raises(ValueError, match=f'{which}.00001.png: broken image file'):
        SegDataset(GTA, gta).label(1)


def test_label_of_another_size(gta):
    save_label(gta / 'gta/labels/00001.png', np.full((40, 55), 7, np.uint8))
    with pytest.raises(ValueError) as e:
        SegDataset(GTA, gta).label(1)
    assert (
        '55×40' in str(e.value)
        and '56×40' in str(e.value)
        and str(gta / 'gta/labels/00001.png') in str(e.value)
    )


def test_unknown_ids_are_listed_with_counts(gta):
    ids = np.full((40, 56), 7, np.uint8)
    ids[0, :3], ids[5:7, :5] = 77, 200
    save_label(gta / 'gta/labels/00001.png', ids)
    with pytest.raises(ValueError, match=r'00001\.png.*77 \(3 px\), 200 \(10 px\)'):
        SegDataset(GTA, gta).label(1)


def test_colour_picture_instead_of_ids(gta):
    Image.fromarray(picture()).save(gta / 'gta/labels/00001.png')
    with pytest.raises(ValueError, match='colour image'):
        SegDataset(GTA, gta).label(1)


def test_images_without_labels_are_counted(gta):
    for i in (1, 2):
        (gta / f'gta/labels/{i:05d}.png').unlink()
    with pytest.raises(
        ValueError, match=r'2 of 3 images.*first is images/00001\.png.*labels=False'
    ):
        SegDataset(GTA, gta)
    assert len(SegDataset(GTA, gta, limit=1)) == 1
    shutil.rmtree(gta / 'gta/labels')
    with pytest.raises(FileNotFoundError, match='no folder .*labels'):
        SegDataset(GTA, gta)


def test_unknown_split(gta):
    with pytest.raises(ValueError, match="split of dataset 'gta' 'val'"):
        SegDataset(GTA, gta, 'val')
    with pytest.raises(ValueError, match="did you mean 'train'"):
        SegDataset(CITYSCAPES, gta, 'trian')


def test_target_without_label_files(gta):
    "A target opened for adaptation never looks for labels; asking for one says so"
    city(gta, 'train', 'aachen/a_000000', 'bochum/b_000000', labels=None)
    city(gta, 'val', 'ulm/u_000000')
    src, tgt, val = PAIRS['gta'].folders(gta)
    assert (len(src), len(tgt), len(val['cityscapes'])) == (3, 2, 1) and tgt.image(1).shape == (
        40,
        56,
        3,
    )
    with pytest.raises(ValueError, match='opened without labels'):
        tgt.label(0)
    with pytest.raises(FileNotFoundError, match='gtFine'):
        SegDataset(CITYSCAPES, gta)


def test_target_labels_are_never_opened(gta, monkeypatch):
    city(gta, 'train', 'aachen/a_000000')
    seen, real = [], os.walk
    monkeypatch.setattr(os, 'walk', lambda d, *a, **k: (seen.append(str(d)), real(d, *a, **k))[1])
    SegDataset(CITYSCAPES, gta, labels=False).image(0)
    assert len(seen) == 1 and 'gtFine' not in seen[0]


# ---------------------------------------------------------------- layouts


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99), merged=st.booleans())
def test_labels_equal_a_naive_loop(tmp_path, h, w, seed, merged):
    ids = np.random.default_rng(seed).integers(0, 35, (h, w), dtype=np.uint8)
    (tmp_path / 'gta/images').mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(tmp_path / 'gta/images/0.png')
    save_label(tmp_path / 'gta/labels/0.png', ids)
    got = SegDataset(
        GTA,
        tmp_path,
        space=CAMVID11 if merged else CITYSCAPES19,
        merge=CAMVID_MERGE if merged else None,
    ).label(0)
    for y in range(h):
        for x in range(w):
            t = PAPER.index(ids[y, x]) if ids[y, x] in PAPER else IGNORE
            if merged:
                t = (
                    CAMVID11.train_ids.index(t)
                    if (t := CAMVID_MERGE.get(t, t)) in CAMVID11.train_ids
                    else IGNORE
                )
            assert got[y, x] == t


def test_native_first_then_upstreams_converted_file(gta):
    f = SegDataset(GTA, gta)
    native = f.label(0)
    save_label(gta / 'gta/labels/00000_labelTrainIds.png', native, palette=False)
    assert SegDataset(GTA, gta).label_path(0).name == '00000.png' and len(SegDataset(GTA, gta)) == 3
    (gta / 'gta/labels/00000.png').unlink()
    back = SegDataset(GTA, gta)
    assert back.label_path(0).name == '00000_labelTrainIds.png' and np.array_equal(
        back.label(0), native
    )


def test_label_files_among_the_images_are_not_images(gta):
    one = replace(GTA, images='labels')
    save_label(gta / 'gta/labels/00000_labelTrainIds.png', np.zeros((40, 56), np.uint8))
    assert SegDataset(one, gta, labels=False).names == [f'labels/{i:05d}.png' for i in range(3)]


def test_equal_base_names_in_sub_folders(tmp_path):
    city(tmp_path, 'train', 'aachen/x_0', 'bochum/x_0')
    f = SegDataset(CITYSCAPES, tmp_path)
    assert [f.stem(i) for i in (0, 1)] == ['aachen/x_0', 'bochum/x_0']
    assert f.label(0).max() == 0 and f.label(1).min() == 1  # ids 7 and 8


def test_names_are_sorted_and_complete(tmp_path):
    names = ['ulm/u_1', 'aachen/a_2', 'aachen/a_1']
    city(tmp_path, 'val', *names)
    (tmp_path / 'cityscapes/leftImg8bit/val/ulm/._u_1_leftImg8bit.png').write_bytes(b'x')
    f = SegDataset(CITYSCAPES, tmp_path, 'val')
    assert f.names == sorted(f'leftImg8bit/val/{n}_leftImg8bit.png' for n in names) and all(
        f.path(i).is_file() for i in range(3)
    )


def test_links_are_followed_once(tmp_path):
    city(tmp_path / 'disk', 'train', 'aachen/a_1', labels=None)
    base = tmp_path / 'disk/cityscapes/leftImg8bit/train'
    (base / 'aachen/again').symlink_to(base, target_is_directory=True)
    (tmp_path / 'cityscapes').symlink_to(tmp_path / 'disk/cityscapes', target_is_directory=True)
    assert SegDataset(CITYSCAPES, tmp_path, labels=False).names == [
        'leftImg8bit/train/aachen/a_1_leftImg8bit.png'
    ]


def test_gtas_mismatched_frames_are_left_out(gta):
    for n in ('15188', '20801', '20860'):
        save_image(gta / f'gta/images/{n}.png')  # no labels needed: they are not used
    assert len(SegDataset(GTA, gta)) == 3


def test_a_new_dataset_is_only_data(tmp_path):
    "ZeroWaste (own classes, equal suffixes) and colour-coded labels, without code in the reader"
    save_image(tmp_path / 'zw/train/data/01.PNG')
    save_label(tmp_path / 'zw/train/sem_seg/01.PNG', np.full((40, 56), 4, np.uint8), palette=False)
    zw = SegSpec(
        'zerowaste',
        'zw',
        '{split}/data',
        ('.PNG',),
        (LabelFiles('{split}/sem_seg', '.PNG', {i: i for i in range(5)}),),
        space=ZEROWASTE5,
    )
    zw = replace(zw, splits=dict(train='train'))
    assert np.unique(SegDataset(zw, tmp_path).label(0)).tolist() == [
        ZEROWASTE5.index('soft plastic')
    ]

    def red(p):
        return np.asarray(Image.open(p))[..., 0].astype(int)

    mine = SegSpec(
        'mine',
        'zw/train',
        'data',
        ('.PNG',),
        (LabelFiles('data', '.PNG', {}, tuple(range(256)), read=red),),
    )
    assert (SegDataset(mine, tmp_path).label(0) == IGNORE).all()


def test_folders_travel_to_workers(gta):
    f = pickle.loads(pickle.dumps(SegDataset(GTA, gta)))
    assert np.array_equal(f.label(1), SegDataset(GTA, gta).label(1))


def test_margins_follow_the_size(tmp_path):
    for split, size, want in (
        ('train', (1024, 2048), (30, 240, 30, 30)),
        ('val', (128, 256), (4, 30, 4, 4)),
    ):
        city(tmp_path, split, 'a/a_0', size=size, labels=None)
        assert SegDataset(CITYSCAPES, tmp_path, split, labels=False).margins == want
    assert SegDataset(replace(CITYSCAPES, margins=None), tmp_path, labels=False).margins is None


def test_images_without_labels_are_left_out_where_asked(gta):
    (gta / 'gta/labels/00001.png').unlink()
    f = SegDataset(GTA, gta, skip_broken=True)
    assert (
        len(f) == 2
        and f.stem(1) == '00002'
        and list(f.skipped) == ['images/00001.png']
        and 'no label' in f.skipped['images/00001.png']
    )
    assert np.array_equal(
        f.label(1),
        SegDataset(GTA, gta, skip_broken=True).exclude({'images/00000.png': 'x'}).label(0),
    )
    for p in (gta / 'gta/labels').iterdir():
        p.unlink()
    with pytest.raises(ValueError, match='3 of 3 images'):
        SegDataset(GTA, gta, skip_broken=True)  # never an empty folder in silence


def test_a_folder_that_cannot_be_listed(gta, monkeypatch):
    def refuse(p, *a):
        raise PermissionError(13, 'Permission denied', str(p))

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(OSError, match='cannot be listed') as e:
        SegDataset(GTA, gta)
    assert 'gta/images' in str(e.value)


def test_splits_of_several_parts(tmp_path):
    for part in ('train', 'val', 'test'):
        save_image(tmp_path / f'zw/{part}/data/01.PNG')
        save_label(
            tmp_path / f'zw/{part}/sem_seg/01.PNG',
            np.full((40, 56), dict(train=1, val=2, test=3)[part], np.uint8),
        )
    zw = replace(ZEROWASTE_V1, folder='zw')
    f = SegDataset(zw, tmp_path)
    assert f.names == ['train/data/01.PNG', 'val/data/01.PNG', 'test/data/01.PNG'] and [
        f.label(i).max() for i in range(3)
    ] == [1, 2, 3]
    assert len(SegDataset(zw, tmp_path, 'val')) == 1


def test_shrink_halves_as_pil_does(tmp_path):
    spec = replace(GTA, split_scale=dict(train=0.5), exclude=())
    save_image(tmp_path / 'gta/images/1.png', size=(40, 57))
    ids = np.random.default_rng(0).choice(PAPER, (40, 57)).astype(np.uint8)
    save_label(tmp_path / 'gta/labels/1.png', ids)
    f, whole = SegDataset(spec, tmp_path), SegDataset(GTA, tmp_path)
    assert f.size(0) == (20, 28) and f.label(0).shape == (20, 28)
    assert np.array_equal(
        f.image(0), np.asarray(Image.fromarray(whole.image(0)).resize((28, 20), Image.BICUBIC))
    )
    assert np.array_equal(
        f.label(0, hw=f.size(0)),
        np.asarray(Image.fromarray(whole.label(0)).resize((28, 20), Image.NEAREST)),
    )


# ---------------------------------------------------------------- the data we have


@needs_shared
def test_town_equals_upstreams_conversion_and_statistics():
    f = SegDataset(TOWN, '../shared/data')
    stats = {
        Path(s['file']).name: s
        for s in json.loads((f.root / 'sample_class_stats.json').read_text())
    }
    assert len(f) == 700 and f.root == SHARED / 'town'
    for i in range(0, 700, 47):
        lbl, up = f.label(i), f.label_path(i).with_name(f.stem(i) + '_labelTrainIds.png')
        assert np.array_equal(lbl, np.asarray(Image.open(up))) and f.image(i).shape == (360, 480, 3)
        s = stats[up.name]
        assert {int(k): v for k, v in s.items() if k != 'file'} == {
            int(k): int(v) for k, v in zip(*np.unique(lbl, return_counts=True)) if k != IGNORE
        }


@needs_shared
def test_camvid_in_its_eleven_classes():
    src, tgt, vals = PAIRS['town'].folders('../shared/data')
    val = vals['camvid']
    assert (len(src), len(tgt), len(val)) == (700, 367, 101) and tgt.labels is None
    for i in range(0, 101, 25):
        raw, lbl = read_label(val.label_path(i)), val.label(i)
        assert (lbl[raw == 255] == 255).all()
        for k, t in enumerate(CAMVID11.train_ids):
            assert np.array_equal(lbl == k, raw == t)
    assert set(np.unique(src.label(1))) <= {*range(11), IGNORE}


@needs_shared
def test_a_real_photo_cut_anywhere_raises(tmp_path):
    whole = next((SHARED / 'camvid/leftImg8bit/val').rglob('*.jpg')).read_bytes()
    for n in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / 'a.jpg').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='broken image file'):
            read_image(tmp_path / 'a.jpg')
