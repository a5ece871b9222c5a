"Every dataset end to end on a tree in its published layout; pairs; datasets of one's own"

from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from udanb.core.labels import CAMVID11, CAMVID_MERGE, CITYSCAPES19, SYNTHIA16
from udanb.core.types import IGNORE
from udanb.data.catalog import (
    ACDC,
    CITYSCAPES,
    DARK_ZURICH,
    DATASETS,
    GTA,
    MAPILLARY_NAMES,
    SYNSCAPES,
    SYNTHIA,
    mapillary_class,
)
from udanb.data.custom import (
    _partner,
    parse_dataset_spec,
    parse_label_space,
    striped_label,
    write_dummy_dataset,
)
from udanb.data.datasets import SegDataset
from udanb.data.pairs import PAIRS, get_pair

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
SYNTHIA_TABLE = dict(
    road=3,
    sidewalk=4,
    building=2,
    wall=21,
    fence=5,
    pole=7,
    vegetation=6,
    sky=1,
    person=10,
    rider=17,
    car=8,
    bus=19,
    motorcycle=12,
    bicycle=11,
    **{'traffic light': 15, 'traffic sign': 9},
)  # spec family §1.2


def expected(spec, kind, ids):
    "What numbers in a file mean, from sources other than our tables: cityscapesscripts, the specs"
    name, suffix = spec.name, spec.labels[kind].suffix
    if name.startswith('zerowaste'):
        return ids
    if 'rainIds' in suffix or name == 'bdd100k':
        t = ids
    elif name == 'synthia':
        t = {v: CITYSCAPES19.classes.index(k) for k, v in SYNTHIA_TABLE.items()}
    elif name == 'mapillary':
        t = mapillary_by_spec()
    else:
        labels = pytest.importorskip('cityscapesscripts.helpers.labels').labels
        t = {l.id: l.trainId for l in labels if 0 <= l.trainId < 19}
    if not isinstance(t, dict):
        out = np.where(ids < 19, ids, IGNORE)
    else:
        out = np.vectorize(lambda i: t.get(int(i), IGNORE))(ids)
    merge = (
        {3: 2, 6: 7, 9: 8, 12: 18, 14: 13, 15: 13, 17: 18} if name == 'camvid' else {}
    )  # shared/README
    keep = dict(
        camvid=(0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 18),
        synthia=tuple(i for i in range(19) if i not in (9, 14, 16)),
    ).get(name, tuple(range(19)))
    return np.vectorize(
        lambda i: (
            keep.index(merge.get(int(i), int(i))) if merge.get(int(i), int(i)) in keep else IGNORE
        )
    )(out)


def mapillary_by_spec():
    "The outcome the spec states for the 66 names (DDB §2.9), not the rule"
    said = {
        'road': [
            'Bike Lane',
            'Crosswalk - Plain',
            'Parking',
            'Road',
            'Service Lane',
            'Lane Marking - Crosswalk',
            'Lane Marking - General',
        ],
        'sidewalk': ['Curb', 'Curb Cut', 'Pedestrian Area', 'Sidewalk'],
        'pole': ['Pole', 'Utility Pole', 'Street Light'],
        'traffic sign': ['Traffic Sign Frame', 'Traffic Sign (Back)', 'Traffic Sign (Front)'],
        'rider': ['Bicyclist', 'Motorcyclist', 'Other Rider'],
        'train': ['On Rails'],
    }
    said |= {c: [c.title()] for c in CITYSCAPES19.classes if c not in said}
    return {
        MAPILLARY_NAMES.index(n): CITYSCAPES19.classes.index(c)
        for c, ns in said.items()
        for n in ns
    }


def test_mapillary_rule_gives_what_the_spec_states():
    assert {
        i: CITYSCAPES19.classes.index(c)
        for i, n in enumerate(MAPILLARY_NAMES)
        if (c := mapillary_class(n))
    } == mapillary_by_spec()
    assert len(MAPILLARY_NAMES) == 66 and len(set(MAPILLARY_NAMES)) == 66


@pytest.mark.parametrize('name', DATASETS)
def test_published_names_pair_up(name):
    "Each example's label path is what a pattern of the spec makes of its image path, and the folder of its split is on the way"
    spec = DATASETS[name]
    for split, pairs in spec.example.items():
        for img, lbl in pairs:
            assert img.endswith(spec.suffixes)
            if lbl:
                assert lbl in {
                    str(PurePosixPath(_partner(spec, split, img, k)))
                    for k in range(len(spec.labels))
                }


CASES = [(n, k) for n, s in DATASETS.items() for k in range(len(s.labels))]


@pytest.mark.parametrize('name,kind', CASES)
def test_dataset_end_to_end(tmp_path, name, kind):
    "A tree in the published layout, each kind of label file, every number that may occur, every split"
    spec = DATASETS[name]
    made = write_dummy_dataset(spec, tmp_path, kind=kind, size=(48, 132))
    assert set(made) == set(spec.example)
    for split, names in made.items():
        labelled = all(l for _, l in spec.example[split])
        f = SegDataset(spec, tmp_path, split, labels=labelled)
        assert set(names) <= set(f.names) and len(set(f.names)) == len(f.names)
        if split in ('val', 'test') and name not in ('zerowaste_v1', 'zerowaste_v2'):
            assert set(names) == set(f.names)
        for i in range(len(f)):
            img = f.image(i)
            assert img.shape == (
                24 if spec.split_scale.get(split) else 48,
                66 if spec.split_scale.get(split) else 132,
                3,
            )
            if not labelled:
                continue
            assert (
                f.labels[i][1] == kind
                or spec.labels[kind].suffix == spec.labels[f.labels[i][1]].suffix
            )
            raw = np.asarray(spec.labels[kind].read(f.label_path(i))).astype(int)
            want = expected(spec, kind, raw)
            if spec.split_scale.get(split):
                want = np.asarray(
                    Image.fromarray(want.astype(np.uint8)).resize((66, 24), Image.NEAREST)
                )
            assert np.array_equal(f.label(i), want)
    if spec.labels and any(l for ps in spec.example.values() for _, l in ps):
        assert set(np.unique(striped_label(spec, (4, 132), 0, kind))) == set(
            spec.labels[kind].ids
        ) | set(spec.labels[kind].void)


def test_tables_equal_cityscapesscripts():
    labels = pytest.importorskip('cityscapesscripts.helpers.labels').labels
    for s in (GTA, CITYSCAPES, ACDC, DARK_ZURICH, SYNSCAPES):
        assert s.labels[0].ids == {l.id: l.trainId for l in labels if 0 <= l.trainId < 19}
        assert set(s.labels[0].void) - {34} == {  # 34 is GTA's licence plate
            l.id for l in labels if l.id >= 0 and l.trainId in (255, -1)
        }
    assert SYNTHIA.labels[0].ids == {
        SYNTHIA_TABLE[c]: i for i, c in enumerate(CITYSCAPES19.classes) if c in SYNTHIA_TABLE
    } | {16: 9, 18: 14, 20: 16}


def test_acdc_flattened_for_upstreams_code(tmp_path):
    "rsync'ed to condition-less folders, the same spec reads it; reference images of other splits are left out"
    for p in (
        'rgb_anon/train/a_rgb_anon.png',
        'rgb_anon/val/b_rgb_anon.png',
        'rgb_anon/fog/train_ref/c_rgb_anon.png',
    ):
        (tmp_path / 'acdc' / p).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'acdc' / p)
    assert SegDataset(ACDC, tmp_path, labels=False).names == ['rgb_anon/train/a_rgb_anon.png']
    assert SegDataset(ACDC, tmp_path, 'val', labels=False).names == ['rgb_anon/val/b_rgb_anon.png']


def test_cityscapes_kinds_agree(tmp_path):
    "Polygons, label ids and train ids of one scene are one label; ids come first"
    write_dummy_dataset(CITYSCAPES, tmp_path, kind=2, size=(16, 70))
    f = SegDataset(CITYSCAPES, tmp_path, 'val')
    p, drawn = f.label_path(0), f.label(0)
    for kind, raw in ((1, drawn), (0, CITYSCAPES.labels[2].read(p))):
        Image.fromarray(raw).save(
            p.with_name(p.name.replace('_gtFine_polygons.json', CITYSCAPES.labels[kind].suffix))
        )
        now = SegDataset(CITYSCAPES, tmp_path, 'val')
        assert (
            now.labels[0][1] == kind and f.labels[0][1] == 2 and np.array_equal(now.label(0), drawn)
        )


# ---------------------------------------------------------------- pairs


def test_pairs():
    g = get_pair('gta')
    assert (g.name, g.space, g.merge) == ('gta-cityscapes', CITYSCAPES19, {}) and (
        g.sources[0].image_size,
        g.targets[0].image_size,
    ) == ((720, 1280), (512, 1024))
    t = get_pair('town')
    assert (t.targets[0].name, t.space, t.merge) == ('camvid', CAMVID11, CAMVID_MERGE)
    assert get_pair('gta', 'cityscapes') == g and get_pair('demo', 'demo') == get_pair('demo')
    assert get_pair('gta', 'camvid').space is CAMVID11
    assert (
        get_pair('synthia').space is SYNTHIA16 and get_pair('synthia', 'camvid').space is CAMVID11
    )
    with pytest.raises(ValueError, match="did you mean 'gta'"):
        get_pair('gtaa')
    with pytest.raises(ValueError, match="did you mean 'cityscapes'"):
        get_pair('gta', 'cityscape')


def test_ddbs_settings(tmp_path):
    "Two sources, two targets: concatenated, evaluated apart"
    p = get_pair(['gta', 'synscapes'], ['cityscapes', 'mapillary'], weights=[3, 1])
    for s in (*p.sources, *p.targets):
        write_dummy_dataset(s, tmp_path, n=3)
    src, tgt, vals = p.folders(tmp_path)
    assert (
        len(src) == 6
        and len(tgt) == 6
        and list(vals) == ['cityscapes', 'mapillary']
        and len(vals['mapillary']) == 3
    )
    assert np.allclose(src.share, [0.25] * 3 + [0.25 / 3] * 3)
    assert get_pair(['gta', 'synscapes']).targets == (CITYSCAPES,)
    assert np.array_equal(src.label(0), SegDataset(GTA, tmp_path).label(0))


def test_target_without_any_label(tmp_path):
    own = dict(mine=dict(images='*.png'))
    p = get_pair('gta', 'mine', own)
    write_dummy_dataset(GTA, tmp_path)
    write_dummy_dataset(p.targets[0], tmp_path)
    src, tgt, vals = p.folders(tmp_path)
    assert len(src) == 2 and len(tgt) == 2 and vals == {}


def test_the_demo_under_the_real_names(tmp_path):
    demo = pytest.importorskip('udanb.demo.render')
    demo.write_demo(tmp_path / 'demo', n_source=2, n_target=2, n_val=1, size=(64, 128))
    a, b = PAIRS['demo'].folders(tmp_path), PAIRS['gta'].folders(tmp_path / 'demo')
    for x, y in zip((*a[:2], a[2]['demo_target']), (*b[:2], b[2]['cityscapes'])):
        assert [x.path(i) for i in range(len(x))] == [y.path(i) for i in range(len(y))]
        assert np.array_equal(x.image(0), y.image(0))
        if x.labels is not None:
            assert np.array_equal(x.label(0), y.label(0)) and (x.label(0) < 19).any()


# ---------------------------------------------------------------- your own

D = dict(
    folder='y',
    images='im/{split}/*.jpg',
    labels='lb/{split}/*.png',
    splits=dict(train='train', val='val'),
    classes=[
        dict(name='lawn', id=1, **{'is': 'vegetation'}),
        dict(name='person', id=7, color=[9, 9, 9]),
        dict(name='tape', id=300, **{'is': 'void'}),
    ],
)


def test_own_description():
    s = parse_dataset_spec('y', D)
    assert (s.images, s.suffixes, s.labels[0].folder, s.labels[0].suffix) == (
        'im/{split}',
        ('.jpg',),
        'lb/{split}',
        '.png',
    )
    assert (
        s.labels[0].ids == {1: 8, 7: 11} and s.labels[0].void == (300,) and s.space is CITYSCAPES19
    )


@pytest.mark.parametrize('form', ['ids', 'colors', 'last', 'polygons'])
def test_own_label_forms(tmp_path, form):
    "The four forms of one label are read as one, equal base names in sub-folders included"
    rows = [
        dict(name='path', id=0, color=[1, 2, 3]),
        dict(name='plant', id=1000, color=[200, 0, 9]),
        dict(name='?', id=2, color=[0, 0, 0], **{'is': 'void'}),
    ]
    space = dict(name='g', classes=['path', 'plant'])
    s = parse_dataset_spec(
        'g',
        dict(
            images=['im/*.png', 'im/*.jpg'],
            labels='lb/*.' + ('json' if form == 'polygons' else 'png'),
            form=form,
            classes=rows,
            space=space,
        ),
    )
    write_dummy_dataset(s, tmp_path)
    f = SegDataset(s, tmp_path)
    for sub in ('x', 'z'):
        for d in ('im', 'lb'):
            (tmp_path / 'g' / d / sub).mkdir()
        p = f.path(0)
        (tmp_path / 'g/im' / sub / p.name).write_bytes(p.read_bytes())
        (tmp_path / 'g/lb' / sub / f.label_path(0).name).write_bytes(
            f.label_path(0 if sub == 'x' else 1).read_bytes()
        )
    f = SegDataset(s, tmp_path)
    assert (
        len(f) == 4
        and f.stem(2) == 'x/0001'
        and np.array_equal(f.label(2), f.label(0))
        and np.array_equal(f.label(3), f.label(1))
    )
    want = np.roll(np.array([0, 1, IGNORE])[np.arange(96) * 3 // 96], 3)
    assert np.array_equal(f.label(1), np.broadcast_to(want, (48, 96)))


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(image='x'), "unknown key of dataset 'y' 'image'; did you mean 'images'"),
        (dict(images=None), 'needs `images`'),
        (dict(images='im/*/*.jpg'), r'with one \*'),
        (dict(images=['a/*.jpg', 'b/*.jpg']), 'need the same folder'),
        (dict(form='id'), "did you mean 'ids'"),
        (dict(form='colors'), "class lawn: labels are colors, so each class needs its color"),
        (dict(classes=[dict(name='lawn', id=1)]), "unknown class of cityscapes19 .* 'lawn'"),
        (dict(classes=[dict(name='car', id=1), dict(name='bus', id=1)]), 'id 1 is listed twice'),
        (dict(classes=[dict(name='car', nr=1)]), "key of dataset 'y', class car 'nr'"),
        (dict(space='cityscape19'), "did you mean 'cityscapes19'"),
        (dict(space=dict(name='g', classes=['a'])), 'at least two classes'),
        (dict(space=dict(name='g', classes=['a', 'a'])), 'each class once'),
        (dict(space=dict(name='g', classes=['a', 'b'], things=['c'])), 'thing of space g'),
        (dict(space=dict(name='g', classes=['a', 'b'])), 'unknown class of g'),
    ],
)
def test_own_description_mistakes(change, says):
    with pytest.raises(ValueError, match=says):
        parse_dataset_spec('y', D | change)


def test_own_pair_needs_common_classes():
    own = dict(
        a=dict(images='*.png', labels='*.png', space=dict(name='g', classes=['x', 'y'])),
        b=dict(images='*.png', space='cityscapes19'),
    )
    with pytest.raises(ValueError, match='give both the same `space`'):
        get_pair('a', 'b', own)
    own['b']['space'] = own['a']['space']
    assert get_pair('a', 'b', own).space == parse_label_space(own['a']['space'])


def test_own_merge_and_known_spaces():
    s = parse_dataset_spec(
        'y',
        D
        | dict(
            space='camvid11',
            merge={'truck': 'car'},
            classes=[dict(name='truck', id=3), dict(name='car', id=4)],
        ),
    )
    assert s.merge == {14: 13} and s.labels[0].ids == {3: 14, 4: 13}


def test_statistics_of_another_class_list_are_not_taken(tmp_path):
    "The same files under two descriptions, and after an edit of the class list, are counted apart; upstream's file is not touched by own numberings"
    from udanb.data.class_stats import class_stats

    def rows(*classes):
        return [dict(name=c, id=i) for i, c in zip((1, 2), classes)] + [
            dict(name='more', id=3, **{'is': classes[0]})
        ]

    first = dict(
        folder='g',
        images='im/*.png',
        labels='lb/*.png',
        classes=rows('a', 'b'),
        space=dict(name='s', classes=['a', 'b']),
    )
    edited = first | dict(classes=rows('b', 'a'))
    write_dummy_dataset(parse_dataset_spec('x', first), tmp_path, n=3)
    for _ in range(2):  # the second time from the files
        one, two = (
            class_stats(SegDataset(parse_dataset_spec('x', d), tmp_path), quiet=True)
            for d in (first, edited)
        )
        assert [n for _, n in one] == [{0: 3072, 1: 1536}] * 3 and [n for _, n in two] == [
            {0: 1536, 1: 3072}
        ] * 3
    files = sorted(p.name for p in (tmp_path / 'g').glob('*.json'))
    assert len(files) == 2 and 'sample_class_stats.json' not in files
