"The run notebook demo_image: from the shell once, then its cells in this process, with good and with bad input"

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

from udanb.checkpoints.weights import save_weights
from udanb.core.labels import CAMVID11, CITYSCAPES19
from udanb.core.plots import overlay
from udanb.core.storage import write_json
from udanb.core.types import normalize
from udanb.core.utils import seed_all
from udanb.demo.render import render_scene, write_demo
from udanb.inference.predict import predict, sliding_logits
from udanb.models.hrda import HRDA
from udanb.models.released import to_published
from udanb.models.segmentor import create_segmentor
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import recipe_dict

PAGE = ROOT / 'nbs' / 'demo_image.ipynb'
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


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A run's folder with an untrained network, a released file of it, and photos of three sizes, one in a subfolder"
    root = tmp_path_factory.mktemp('world')
    seed_all(0)
    r, net = (
        make_recipe(
            'dacs',
            'demo',
            overrides=dict(backbone='mit_b0', pretrained=None, embed_dim=16, image_size=(64, 128)),
        ),
        create_segmentor('mit_b0', 19, dim=16),
    )
    write_json(root / 'demo-run' / 'recipe.json', recipe_dict(r))
    save_weights(
        root / 'demo-run' / 'model.safetensors',
        net,
        dict(recipe=recipe_dict(r), classes=CITYSCAPES19.classes),
    )
    both = {
        f'{p}.{k}': v * f
        for p, f in (('model', 1), ('ema_model', 0.5))
        for k, v in to_published(net).items()
    }
    torch.save(dict(meta={}, optimizer={}, state_dict=both), root / 'daformer.pth')
    (root / 'photos' / 'sub').mkdir(parents=True)
    for i, (f, size) in enumerate(
        (('a.png', (64, 128)), ('b.jpg', (90, 70)), ('sub/a.png', (48, 160)))
    ):
        Image.fromarray(render_scene(i, 'target', size)[0]).save(root / 'photos' / f)
    return root


def test_from_the_shell_with_nothing_given(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(
        IN_TEST='1', OMP_NUM_THREADS='1'
    )  # figures as a user gets them
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
    assert got == [
        'areas.csv',
        *(f'{k}/{i}.png' for k in ('confidence', 'label', 'overlay') for i in (0, 1)),
        'prediction.png',
    ]
    cells = json.loads((tmp_path / 'x.ipynb').read_text())['cells']
    assert sum('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', [])) == 1


def test_a_folder_of_photos(world, tmp_path):
    got = notebook(images=str(world / 'photos'), weights=str(world / 'demo-run'), out=str(tmp_path))
    areas = pd.read_csv(tmp_path / 'areas.csv', index_col='image')
    assert list(areas.index) == ['a.png', 'b.jpg', 'sub/a.png'] and list(areas)[:-1] == list(
        CITYSCAPES19.classes
    )
    np.testing.assert_allclose(areas[list(CITYSCAPES19.classes)].sum(axis=1), 100, atol=1e-2)
    for name, row in areas.iterrows():
        img = np.array(Image.open(world / 'photos' / name))
        lbl, conf, over = (
            np.array(Image.open((tmp_path / k / name).with_suffix('.png')))
            for k in ('label', 'confidence', 'overlay')
        )
        assert (
            lbl.shape == conf.shape == img.shape[:2]
            and over.shape == img.shape
            and lbl.dtype == np.uint8
        )
        assert (over == overlay(img, lbl, CITYSCAPES19, 0.6)).all()
        for i, c in enumerate(CITYSCAPES19.classes):
            assert abs(row[c] - 100 * (lbl == i).mean()) < 1e-3
        assert (
            abs(row['confidence'] - conf.mean() / 2.55) < 0.3
            and 100 / 19 <= row['confidence'] <= 100
        )
    img = np.array(
        Image.open(world / 'photos' / 'a.png')
    )  # already of the network's size: one plain forward
    assert (
        np.array(Image.open(tmp_path / 'label' / 'a.png'))
        == predict(got['net'], normalize(img)[None])[0].argmax(0).numpy()
    ).all()


def test_a_released_file_is_the_same_network(world, tmp_path):
    "One photo: the run, its weights copied elsewhere and the released file agree; the teacher does not"
    (tmp_path / 'copied.safetensors').write_bytes(
        (world / 'demo-run' / 'model.safetensors').read_bytes()
    )
    kw = dict(images=str(world / 'photos' / 'a.png'), size=[64, 128])
    files = dict(
        run=dict(weights=str(world / 'demo-run')),
        copy=dict(weights=str(tmp_path / 'copied.safetensors')),
        pth=dict(weights=str(world / 'daformer.pth')),
        teacher=dict(weights=str(world / 'daformer.pth'), which='teacher'),
    )
    got = {k: notebook(**kw, **v, out=str(tmp_path / k)) for k, v in files.items()}
    conf = {k: (tmp_path / k / 'confidence' / 'a.png').read_bytes() for k in got}
    assert conf['run'] == conf['copy'] == conf['pth'] != conf['teacher'] and {
        s['space'].name for s in got.values()
    } == {'cityscapes19'}
    assert got['pth']['size'] == (64, 128) and got['pth']['net'].backbone.name == 'mit_b0'


def test_hrda_slides(world, tmp_path):
    "A released HRDA is recognised, its attention too; windows are those of `infer.sliding_logits`"
    seed_all(1)
    net = HRDA(create_segmentor('mit_b0', 19, dim=16), dim=16).eval()
    torch.save(
        dict(state_dict={f'model.{k}': v for k, v in to_published(net).items()}),
        tmp_path / 'hrda.pth',
    )
    got = notebook(
        images=str(world / 'photos' / 'a.png'),
        weights=str(tmp_path / 'hrda.pth'),
        size=[64, 128],
        crop=64,
        out=str(tmp_path / 'out'),
    )
    with torch.no_grad():
        want = (
            sliding_logits(
                net, normalize(np.array(Image.open(world / 'photos' / 'a.png')))[None], 64
            )[0]
            .argmax(0)
            .numpy()
        )
    assert (
        isinstance(got['net'], HRDA)
        and (np.array(Image.open(tmp_path / 'out' / 'label' / 'a.png')) == want).all()
    )


def test_no_images_means_the_runs_own(world, tmp_path):
    write_demo(
        tmp_path / 'data' / 'demo', n_source=1, n_target=1, n_val=5, size=(64, 128), quiet=True
    )
    got = notebook(
        weights=str(world / 'demo-run'), data_root=str(tmp_path / 'data'), out=str(tmp_path / 'out')
    )
    assert len(list((tmp_path / 'out' / 'label').iterdir())) == 4 and len(got['areas']) == 4


def test_train_ids(world, tmp_path):
    "A network of CamVid's eleven classes: labels are written as Cityscapes train ids"
    r, net = (
        make_recipe(
            'dacs',
            'town',
            overrides=dict(backbone='mit_b0', pretrained=None, embed_dim=16, image_size=(64, 128)),
        ),
        create_segmentor('mit_b0', 11, dim=16),
    )
    write_json(tmp_path / 'town' / 'recipe.json', recipe_dict(r))
    save_weights(
        tmp_path / 'town' / 'model.safetensors',
        net,
        dict(recipe=recipe_dict(r), classes=CAMVID11.classes),
    )
    got = notebook(
        images=str(world / 'photos' / 'a.png'),
        weights=str(tmp_path / 'town'),
        out=str(tmp_path / 'out'),
    )
    lbl = (
        predict(got['net'], normalize(np.array(Image.open(world / 'photos' / 'a.png')))[None])[0]
        .argmax(0)
        .numpy()
    )
    assert (
        np.array(Image.open(tmp_path / 'out' / 'label' / 'a.png'))
        == np.array(CAMVID11.train_ids)[lbl]
    ).all() and got['space'] == CAMVID11


# ---- bad input


def test_bad_input_is_named(world, tmp_path, monkeypatch):
    run, photo = str(world / 'demo-run'), str(world / 'photos' / 'a.png')

    def fails(kind, match, **kw):
        with pytest.raises(kind, match=match):
            notebook(**dict(images=photo, weights=run, out=str(tmp_path / 'out')) | kw)

    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'notes.txt').write_text('x')
    fails(
        ValueError,
        'empty: no images in this folder; known suffixes: .png',
        images=str(tmp_path / 'empty'),
    )
    fails(
        FileNotFoundError,
        'nowhere: there is no such image or folder',
        images=str(tmp_path / 'nowhere'),
    )
    (tmp_path / 'cut.jpg').write_bytes((world / 'photos' / 'b.jpg').read_bytes()[:300])
    fails(ValueError, 'cut.jpg: broken image file', images=str(tmp_path / 'cut.jpg'))
    (tmp_path / 'twins').mkdir()
    for end in ('png', 'jpg'):
        Image.new('RGB', (8, 8)).save(tmp_path / 'twins' / f'a.{end}')
    fails(ValueError, 'several images are called a; rename', images=str(tmp_path / 'twins'))
    fails(
        FileNotFoundError,
        'no weights at .*nothing: give the folder of a run',
        weights=str(tmp_path / 'nothing'),
    )
    fails(FileNotFoundError, 'empty is not the folder of a run', weights=str(tmp_path / 'empty'))
    fails(ValueError, 'predicts 19 classes, camvid11 has 11', space='camvid11')
    fails(ValueError, "did you mean 'camvid11'", space='camvid')
    fails(ValueError, 'give `images`', weights=str(world / 'daformer.pth'), images=None)
    fails(
        ValueError,
        'there is no cu in it; it holds student, teacher',
        weights=str(world / 'daformer.pth'),
        which='cu',
    )
    fails(
        ValueError,
        "(?s)daformer.pth does not fit.*segmentor.'mit_b0'",
        weights=str(world / 'daformer.pth'),
        backbone='mit_b1',
    )
    fails(ValueError, "did you mean 'weights'", weigths=run)
    torch.save(
        dict(state_dict=to_published(create_segmentor('mit_b0', 7, dim=16))), tmp_path / 'seven.pth'
    )
    fails(
        ValueError,
        'predicts 7 classes, which is no known label space; give `space`',
        weights=str(tmp_path / 'seven.pth'),
    )
    assert not (tmp_path / 'out').exists()
    monkeypatch.setattr('udanb.core.utils.project_root', lambda start=None: tmp_path)
    fails(FileNotFoundError, 'run `make demo` first', weights=None)
