"The run notebook evaluate, from the shell and in this process: scores, predictions, submissions"

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from udanb.checkpoints.weights import save_weights
from udanb.core.image_io import read_label
from udanb.core.labels import CAMVID11, CITYSCAPES19, SYNTHIA13, ZEROWASTE5, colorize
from udanb.core.state_dicts import weights_hash
from udanb.core.storage import read_json, write_json
from udanb.core.types import normalize
from udanb.core.utils import seed_all
from udanb.data.catalog import ACDC, DATASETS, ZEROWASTE_V2
from udanb.data.datasets import SegDataset
from udanb.data.dummy import write_dummy_dataset
from udanb.data.transforms import resize_keep_ratio
from udanb.demo.render import write_demo
from udanb.inference.label_free import label_free
from udanb.inference.metrics import ConfusionMatrix, iou_dict
from udanb.inference.predict import predict, sliding_logits
from udanb.models.segmentor import create_segmentor
from udanb.runs.build import make_evaluator
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import pair_of, recipe_dict

PAGE = ROOT / 'nbs' / 'evaluate.ipynb'
CELLS = [
    c for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
]


def notebook(**params):
    "Run the notebook's cells here, as papermill would with these parameters; what they leave behind"
    space = {'In': ['']}
    for c in CELLS:
        src = ''.join(c['source'])
        if src.startswith('#| hide'):
            continue  # the smoke size of an empty call
        for s in [src] + [
            '# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in params.items())
        ] * ('parameters' in c['metadata'].get('tags', [])):
            space['In'].append(s)
            exec(compile(s, PAGE.name, 'exec'), space)
    return space


def untrained(path, source, target=None, n=19, classes=CITYSCAPES19.classes, **over):
    "A run's folder with a student and, in its checkpoint, another teacher"
    seed_all(0)
    r = make_recipe(
        'dacs',
        source,
        target,
        overrides=dict(backbone='mit_b0', pretrained=None, embed_dim=16) | over,
    )
    net, teacher = (create_segmentor('mit_b0', n, dim=16) for _ in 'ab')
    write_json(path / 'recipe.json', recipe_dict(r))
    save_weights(
        path / 'model.safetensors',
        net,
        dict(recipe=json.dumps(recipe_dict(r)), classes=json.dumps(classes)),
    )
    torch.save(
        dict(
            model=net.state_dict(),
            method={f'teacher.net.{k}': v for k, v in teacher.state_dict().items()},
        ),
        path / 'checkpoint.pt',
    )
    return r, net.eval(), teacher.eval()


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp('world')
    r, net, teacher = untrained(root / 'run', 'demo', fit=(64, 128))
    write_demo(root / 'data' / 'demo', n_source=1, n_target=1, n_val=3, size=(128, 256), quiet=True)
    return dict(
        root=root,
        r=r,
        net=net,
        teacher=teacher,
        val=SegDataset(DATASETS['demo_target'], root / 'data', 'val'),
        kw=dict(run=str(root / 'run'), data_root=str(root / 'data')),
    )


def test_from_the_shell_with_nothing_given(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(
        IN_TEST='1', OMP_NUM_THREADS='1'
    )
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            '--no-progress-bar',
            PAGE,
            tmp_path / 'x.ipynb',
            '-p',
            'out',
            tmp_path / 'out',
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    got = sorted(
        f.relative_to(tmp_path / 'out').as_posix() for f in (tmp_path / 'out').rglob('*.*')
    )
    assert {
        'scores.json',
        'submission.zip',
        'figures/iou.png',
        'figures/panel.png',
        'predictions/predict.json',
    } <= set(got)
    assert (
        sum(g.startswith('predictions/label') for g in got)
        == 2
        == sum(g.startswith('predictions/color') for g in got)
    )
    cells = json.loads((tmp_path / 'x.ipynb').read_text())['cells']
    assert sum('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', [])) == 2
    assert set(read_json(tmp_path / 'out' / 'scores.json')['targets']['demo_target']) == {
        'plain',
        'tta',
    }


def test_plain_scores_are_those_of_training(world, tmp_path):
    "The same numbers as the evaluator of a run and as `label_free`; the teacher has its own"
    got = notebook(**world['kw'], out=str(tmp_path / 'a'))
    s = read_json(tmp_path / 'a' / 'scores.json')
    want, plain = (
        make_evaluator(world['r'], dict(demo_target=world['val']))(world['net']),
        s['targets']['demo_target']['plain'],
    )
    assert (
        plain['iou'] == want['iou']
        and plain['miou'] == pytest.approx(want['miou'])
        and s['targets']['demo_target'].keys() == {'plain'}
    )
    free = label_free(
        world['net'], world['val'], 19, partial(resize_keep_ratio, size=(64, 128)), quiet=True
    )
    assert (
        {k: plain[k] for k in free} == pytest.approx(free)
        and s['weights'] == weights_hash(world['net'])
        and s['images'] == {'demo_target': 3}
    )
    np.testing.assert_allclose(
        got['table']['plain'].drop('mIoU').dropna(),
        [v for v in want['iou'].values() if v is not None],
    )
    t = notebook(**world['kw'], which='teacher', out=str(tmp_path / 'b'))
    other = make_evaluator(world['r'], dict(demo_target=world['val']))(world['teacher'])
    assert (
        t['results']['demo_target']['plain']['iou'] == other['iou'] != want['iou']
        and t['name'] == 'run-teacher'
    )


@pytest.mark.parametrize('windows', [{}, dict(mode='slide', crop=48, stride=24)])
def test_gain_of_tta_against_a_loop(world, tmp_path, windows):
    "Views are scaled from the file to ratios of the run's size; the table has both modes and their difference"
    got = notebook(
        **world['kw'], **windows, ratios=[0.5, 1.0], flip=True, limit=2, out=str(tmp_path)
    )
    val = world['val']
    conf = ConfusionMatrix(19)
    plain = ConfusionMatrix(19)
    for i in range(2):
        px, total = val.image(i), 0
        img = normalize(px)[None]

        def ask(x):
            return (
                F.interpolate(world['net'](x).logits, x.shape[-2:], mode='bilinear')
                if not windows
                else sliding_logits(world['net'], x, 48, 24)
            )

        with torch.no_grad():
            for hw in ((32, 64), (64, 128)):
                x = F.interpolate(img, hw, mode='bilinear')
                for f in (False, True):
                    p = F.interpolate(
                        ask(x.flip(-1) if f else x), (128, 256), mode='bilinear'
                    ).softmax(1)
                    total = total + (p.flip(-1) if f else p) / 4
            conf.update(total.argmax(1)[0], val.label(i))
            plain.update(
                F.interpolate(
                    ask(normalize(resize_keep_ratio(px, (64, 128)))[None]),
                    (128, 256),
                    mode='bilinear',
                ).argmax(1)[0],
                val.label(i),
            )
    r = got['results']['demo_target']
    assert r['tta']['miou'] == pytest.approx(100 * conf.miou(), abs=0.01) and r['plain'][
        'iou'
    ] == iou_dict(plain, CITYSCAPES19)
    last = got['table'].loc['mIoU']
    assert list(last.index) == ['plain', 'tta', 'Δ tta'] and last['Δ tta'] == pytest.approx(
        last['tta'] - last['plain']
    )
    assert r['tta']['entropy'] != r['plain']['entropy'] and set(
        read_json(tmp_path / 'scores.json')['targets']['demo_target']
    ) == {'plain', 'tta'}


def test_predictions_and_submission(world, tmp_path):
    "Label PNGs hold the answer at file size, colours match; the zip repeats bytes; a second call only looks again"
    kw = dict(**world['kw'], out=str(tmp_path), save=True, submission=True)
    notebook(**kw)
    val, pred = world['val'], tmp_path / 'predictions'
    for i, n in enumerate(val.names):
        want = (
            predict(
                world['net'],
                normalize(resize_keep_ratio(val.image(i), (64, 128)))[None],
                (128, 256),
            )[0]
            .argmax(0)
            .numpy()
        )
        assert (read_label(pred / 'label' / n) == want).all() and (
            np.asarray(Image.open(pred / 'color' / n)) == colorize(want, CITYSCAPES19)
        ).all()
    z = zipfile.ZipFile(tmp_path / 'submission.zip')
    assert z.namelist() == [n.split('/')[-1] for n in val.names] and z.testzip() is None
    for n in val.names:
        assert z.read(n.split('/')[-1]) == (pred / 'label' / n).read_bytes()
    first, when = (
        (tmp_path / 'submission.zip').read_bytes(),
        {p: p.stat().st_mtime_ns for p in pred.rglob('*.png')},
    )
    (pred / 'label' / val.names[1]).unlink()  # as if it had been interrupted
    notebook(**kw)
    assert (tmp_path / 'submission.zip').read_bytes() == first and sum(
        p.stat().st_mtime_ns != t for p, t in when.items()
    ) == 2
    with pytest.raises(ValueError, match='made differently .*mode'):
        notebook(**kw, ratios=[0.5, 1.0])


def test_a_folder_of_photos(world, tmp_path):
    "No labels: no IoU, but everything else; images of one name keep their folders"
    for n, size in (('a.jpg', (40, 60)), ('sub/a.png', (64, 64)), ('b.png', (90, 50))):
        (tmp_path / 'photos' / n).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(len(n)).integers(0, 256, (*size, 3), dtype=np.uint8)
        ).save(tmp_path / 'photos' / n)
    got = notebook(
        **world['kw'],
        images=str(tmp_path / 'photos'),
        submission=True,
        ratios=[0.5, 1.0],
        out=str(tmp_path / 'out'),
    )
    s = read_json(tmp_path / 'out' / 'scores.json')
    free = label_free(
        world['net'],
        tmp_path / 'photos',
        19,
        partial(resize_keep_ratio, size=(64, 128)),
        quiet=True,
    )
    assert (
        s['targets']['photos']['plain'] == pytest.approx(free)
        and 'miou' not in s['targets']['photos']['tta']
        and s['split'] is None
        and got['table'].empty
    )
    assert (
        zipfile.ZipFile(tmp_path / 'out' / 'submission.zip').namelist()
        == ['a.png', 'b.png', 'sub/a.png']
        and not (tmp_path / 'out' / 'figures' / 'iou.png').exists()
    )
    assert read_label(tmp_path / 'out' / 'predictions' / 'label' / 'b.png').shape == (90, 50)


@pytest.mark.parametrize(
    'source,target,spec,space',
    [
        ('zerowaste_v1', 'zerowaste_v2', ZEROWASTE_V2, ZEROWASTE5),
        ('cityscapes', 'acdc', ACDC, CITYSCAPES19),
    ],
)
def test_submissions_of_benchmarks(tmp_path, source, target, spec, space):
    "Test images without labels: PNGs of 0-4 (ZeroWaste) or train ids (ACDC), without folders, named as the images"
    write_dummy_dataset(spec, tmp_path / 'data', 2, (48, 96), labels=False)
    _, net, _ = untrained(tmp_path / 'run', source, target, len(space), space.classes, fit=(32, 64))
    notebook(
        run=str(tmp_path / 'run'),
        data_root=str(tmp_path / 'data'),
        split='test',
        labels=False,
        submission=True,
        out=str(tmp_path / 'out'),
    )
    f = SegDataset(spec, tmp_path / 'data', 'test', space=space, labels=False)
    z = zipfile.ZipFile(tmp_path / 'out' / 'submission.zip')
    pngs = [np.asarray(Image.open(io.BytesIO(z.read(n)))) for n in z.namelist()]
    paths = [n.split('/')[-1] for n in f.names]
    assert z.namelist() == (paths if len(set(paths)) == len(paths) else f.names)
    assert all(p.shape == (48, 96) and p.dtype == np.uint8 and p.max() < len(space) for p in pngs)
    want = (
        predict(net, normalize(resize_keep_ratio(f.image(0), (32, 64)))[None], (48, 96))[0]
        .argmax(0)
        .numpy()
    )
    assert (pngs[0] == want).all()
    with pytest.raises(FileNotFoundError) as e:
        notebook(
            run=str(tmp_path / 'run'),
            data_root=str(tmp_path / 'data'),
            split='test',
            out=str(tmp_path / 'no'),
        )
    assert 'give labels=False' in e.value.__notes__[0]


def test_train_ids_and_several_targets(tmp_path):
    "A network of CamVid's classes on two targets: one table column each, predictions as train ids, one zip each"
    for n in ('camvid', 'cityscapes'):
        write_dummy_dataset(DATASETS[n], tmp_path / 'data', 2, (48, 96))
    _, net, _ = untrained(
        tmp_path / 'run', 'town', ['camvid', 'cityscapes'], 11, CAMVID11.classes, fit=(32, 64)
    )
    got = notebook(
        run=str(tmp_path / 'run'),
        data_root=str(tmp_path / 'data'),
        submission=True,
        out=str(tmp_path / 'out'),
    )
    assert list(got['table']) == ['camvid, plain', 'cityscapes, plain']
    for n in ('camvid', 'cityscapes'):
        f = got['folders'][n]
        want = (
            predict(net, normalize(resize_keep_ratio(f.image(0), (32, 64)))[None], (48, 96))[0]
            .argmax(0)
            .numpy()
        )
        png = (tmp_path / 'out' / 'predictions' / n / 'label' / f.names[0]).with_suffix('.png')
        assert (read_label(png) == np.array(CAMVID11.train_ids)[want]).all() and (
            tmp_path / 'out' / f'submission-{n}.zip'
        ).exists()


def test_synthia_has_two_means(tmp_path):
    write_dummy_dataset(DATASETS['cityscapes'], tmp_path / 'data', 2, (48, 96))
    r, net, _ = untrained(
        tmp_path / 'run',
        'synthia',
        'cityscapes',
        16,
        pair_of(make_recipe('dacs', 'synthia')).space.classes,
        fit=(32, 64),
    )
    got = notebook(
        run=str(tmp_path / 'run'), data_root=str(tmp_path / 'data'), out=str(tmp_path / 'out')
    )['results']['cityscapes']['plain']
    want = make_evaluator(
        r, dict(cityscapes=pair_of(r).open(DATASETS['cityscapes'], tmp_path / 'data', split='val'))
    )(net)
    assert (
        got['miou'] == pytest.approx(want['miou'])
        and got['miou13'] == pytest.approx(want['miou13'])
        and set(SYNTHIA13.classes) <= set(got['iou'])
    )


def test_a_soup_is_as_good_as_a_run(world, tmp_path):
    (tmp_path / 'soup').mkdir()
    shutil.copy(
        world['root'] / 'run' / 'model.safetensors', tmp_path / 'soup' / 'uniform.safetensors'
    )
    a = notebook(**world['kw'] | dict(run=str(tmp_path / 'soup')), limit=1, out=str(tmp_path / 'a'))
    b = notebook(
        **world['kw'] | dict(run=str(tmp_path / 'soup' / 'uniform.safetensors')),
        limit=1,
        out=str(tmp_path / 'b'),
    )
    assert a['results'] == b['results'] and (a['name'], b['name']) == ('soup', 'uniform')


def test_bad_input_is_named(world, tmp_path):
    def fails(kind, match, **kw):
        with pytest.raises(kind, match=match):
            notebook(**dict(out=str(tmp_path / 'out')) | world['kw'] | kw)

    fails(ValueError, "did you mean 'ratios'", ratio=[1.0])
    fails(ValueError, "did you mean 'val'", split='vall')
    fails(ValueError, "mode 'slide', crop None", mode='slide')
    fails(ValueError, "mode 'windows'", mode='windows')
    fails(FileNotFoundError, 'nowhere: there is no such run', run=str(tmp_path / 'nowhere'))
    fails(ValueError, 'ratio 0', ratios=[0, 1])
    fails(ValueError, "unknown network of a run 'teecher'", which='teecher')
    (tmp_path / 'empty').mkdir()
    fails(FileNotFoundError, 'empty is not the folder of a run', run=str(tmp_path / 'empty'))
    fails(ValueError, 'empty: no images in this folder', images=str(tmp_path / 'empty'))
    fails(
        ValueError,
        'holds one network; for the teacher',
        run=str(world['root'] / 'run' / 'model.safetensors'),
        which='teacher',
    )
    shutil.copytree(world['root'] / 'run', tmp_path / 'nan')
    net = create_segmentor('mit_b0', 19, dim=16)
    for p in net.parameters():
        p.data.fill_(float('nan'))
    save_weights(tmp_path / 'nan' / 'model.safetensors', net)
    fails(
        FloatingPointError, '_leftImg8bit.png: the network returned NaN', run=str(tmp_path / 'nan')
    )
    fails(
        FloatingPointError,
        '_leftImg8bit.png: the network returned NaN',
        run=str(tmp_path / 'nan'),
        labels=False,
    )
    assert not (tmp_path / 'out').exists()
