"The run notebook soup: from the shell once, then its cells in this process, with good and with bad members"

import json
import os
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import ROOT

from udanb.checkpoints.averaging import average, update_bn
from udanb.checkpoints.weights import load_weights, save_weights
from udanb.core.labels import CITYSCAPES19
from udanb.core.state_dicts import weights_hash
from udanb.core.storage import read_json, write_json
from udanb.core.utils import seed_all
from udanb.data.transforms import resize_keep_ratio
from udanb.demo.render import write_demo
from udanb.inference.label_free import label_free
from udanb.models.segmentor import create_segmentor
from udanb.runs.build import make_evaluator
from udanb.runs.datasets import open_targets
from udanb.runs.presets import make_recipe
from udanb.runs.recipe import recipe_dict
from udanb.runs.results import compare_iou, load_run, read_run, read_samples

PAGE = ROOT / 'nbs' / 'soup.ipynb'
CELLS = [
    c for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
]
TINY = dict(backbone='mit_b0', pretrained=None, embed_dim=16, image_size=(64, 128), batch_size=2)


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


def write_run(folder, state, seed=0, over={}, teacher=None):
    r = make_recipe('dacs', 'demo', overrides=TINY | dict(seed=seed) | over)
    write_json(folder / 'recipe.json', recipe_dict(r))
    save_weights(
        folder / 'model.safetensors',
        state,
        dict(recipe=recipe_dict(r), classes=CITYSCAPES19.classes),
    )
    slow = {f'teacher.net.{k}': v for k, v in (teacher or {}).items()}
    if slow:
        torch.save(
            dict(it=1, model=state, method=slow, opt={}, recipe=json.dumps(recipe_dict(r))),
            folder / 'checkpoint.pt',
        )


def near(state, seed, by=0.03):
    g = torch.Generator().manual_seed(seed)
    return {
        k: v * (1 + by * torch.randn(v.shape, generator=g)) if v.is_floating_point() else v
        for k, v in state.items()
    }


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Three runs from one start, one with its teacher, on six drawn streets"
    root = tmp_path_factory.mktemp('world')
    write_demo(root / 'data' / 'demo', n_source=1, n_target=3, n_val=2, size=(64, 128), quiet=True)
    seed_all(0)
    base = create_segmentor('mit_b0', 19, dim=16).state_dict()
    for i in range(3):
        write_run(root / f's{i}', near(base, i), i, teacher=near(base, 10 + i))
    return root


def test_from_the_shell(world, tmp_path):
    "Greedy, by a label-free score, BatchNorm estimated anew"
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            '--no-progress-bar',
            PAGE,
            tmp_path / 'x.ipynb',
            '-y',
            json.dumps(
                dict(
                    members=[str(world / f's{i}') for i in range(3)],
                    how='greedy',
                    score='info',
                    bn=3,
                    data_root=str(world / 'data'),
                    out=str(tmp_path / 'out'),
                )
            ),
        ],
        cwd=ROOT,
        env=os.environ | dict(IN_TEST='1', OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == [
        'metrics.json',
        'model.safetensors',
        'recipe.json',
        'scores.csv',
        'soup.json',
        'soup.png',
    ]
    told = read_json(tmp_path / 'out' / 'soup.json')
    tried = pd.DataFrame(told['tried'])
    assert tried['alone'].is_monotonic_decreasing and tried['taken'][0] and len(tried) == 3
    assert (
        abs(told['soup']['info'] - tried[tried['taken']]['together'].iloc[-1]) < 1e-6
        and told['soup']['info'] >= tried['alone'].max() - 1e-6
    )
    # the same by hand: mean of the chosen, then its BatchNorms on the three training images
    r, net = make_recipe('dacs', 'demo', overrides=TINY), create_segmentor('mit_b0', 19, dim=16)
    net.load_state_dict(average([f'{m}/model.safetensors' for m in told['chosen']]))
    train, val = (
        open_targets(r, world / 'data', s, labels=False)['demo_target'] for s in ('train', 'val')
    )
    assert update_bn(net, [read_samples(train, range(3), r)]) == told['bn']['layers'] > 0
    assert (
        weights_hash(net)
        == told['hash']
        == load_weights(tmp_path / 'out' / 'model.safetensors')[1]['hash']
    )
    want = label_free(net, val, 19, partial(resize_keep_ratio, size=(64, 128)), quiet=True)
    for k, v in want.items():
        assert abs(told['soup'][k] - v) < 1e-6


def test_uniform_with_weights(world, tmp_path):
    members = [str(world / 's0'), str(world / 's1' / 'model.safetensors')]  # a folder and a file
    notebook(
        members=members, weights=[3, 1], data_root=str(world / 'data'), out=str(tmp_path / 'out')
    )
    state = average(members, [3, 1])
    net, told = load_run(tmp_path / 'out'), read_json(tmp_path / 'out' / 'soup.json')
    assert (
        weights_hash(net) == weights_hash(state) == told['hash']
        and [m['share'] for m in told['members']] == [0.75, 0.25]
        and told['bn'] is None
    )
    assert [m['hash'] for m in told['members']] == [
        weights_hash(load_weights(world / f's{i}' / 'model.safetensors')[0]) for i in range(2)
    ]
    r = make_recipe('dacs', 'demo', overrides=TINY)
    score = make_evaluator(r, open_targets(r, world / 'data'))
    tab = pd.read_csv(tmp_path / 'out' / 'scores.csv', index_col='member')
    assert list(tab.index) == [*members, 'mean', 'soup'] and list(tab) == [
        'miou',
        'entropy',
        'balance',
        'info',
        'share',
    ]
    for name, n in zip((*members, 'soup'), (load_run(world / 's0'), load_run(world / 's1'), net)):
        assert abs(tab['miou'][name] - score(n)['miou']) < 1e-6
    assert (
        abs(tab['miou']['mean'] - tab['miou'][members].mean()) < 1e-9
        and abs(tab['info']['mean'] - tab['info'][members].mean()) < 1e-9
    )
    log, m = read_run(tmp_path / 'out')
    assert log == [] and abs(m['miou']['student'] - tab['miou']['soup']) < 1e-9
    assert (
        set(m['iou']['student']) == set(CITYSCAPES19.classes)
        and m['label_free']['student']['info'] == told['soup']['info']
    )
    assert list(compare_iou(r, tmp_path / 'out', None)) == ['dacs'] and read_json(
        tmp_path / 'out' / 'recipe.json'
    ) == recipe_dict(r)
    meta = load_weights(tmp_path / 'out' / 'model.safetensors')[1]
    assert (
        json.loads(meta['recipe']) == recipe_dict(r)
        and json.loads(meta['classes']) == list(CITYSCAPES19.classes)
        and len(json.loads(meta['ingredients'])) == 2
    )
    # again into the same folder, with other members: a new soup, nothing of the old one
    notebook(
        members=[*members, str(world / 's2')],
        data_root=str(world / 'data'),
        out=str(tmp_path / 'out'),
    )
    assert len(read_json(tmp_path / 'out' / 'soup.json')['members']) == 3 and weights_hash(
        load_run(tmp_path / 'out')
    ) == weights_hash(average([*members, world / 's2']))


def test_greedy_by_labels_leaves_a_collapsed_one_out(world, tmp_path):
    "Two copies of one network, and one that says bicycle everywhere: the copies are kept, and the soup is the copy"
    state = load_weights(world / 's0' / 'model.safetensors')[0]
    write_run(tmp_path / 'a', state)
    write_run(tmp_path / 'b', state, 1)
    write_run(
        tmp_path / 'same',
        {
            k: v.index_fill(0, torch.tensor([18]), 1e5) if v.shape == (19,) else v
            for k, v in state.items()
        },
        2,
    )
    members = [str(tmp_path / n) for n in ('same', 'a', 'b')]
    notebook(
        members=members, how='greedy', data_root=str(world / 'data'), out=str(tmp_path / 'out')
    )
    told = read_json(tmp_path / 'out' / 'soup.json')
    alone = {m['member']: m['scores']['miou'] for m in told['members']}
    assert alone[members[1]] == alone[members[2]] == told['soup']['miou'] > alone[members[0]]
    assert (
        told['chosen'] == members[1:]
        and [m['share'] for m in told['members']] == [0, 0.5, 0.5]
        and [t['taken'] for t in told['tried']] == [True, True, False]
    )
    assert weights_hash(load_run(tmp_path / 'out')) == weights_hash(state)


def test_teachers_and_a_file_that_says_nothing(world, tmp_path):
    folders = [str(world / f's{i}') for i in range(2)]
    notebook(
        members=folders, which='teacher', data_root=str(world / 'data'), out=str(tmp_path / 't')
    )
    assert (
        weights_hash(load_run(tmp_path / 't'))
        == weights_hash(average(folders, which='teacher'))
        != weights_hash(average(folders))
    )
    torch.save(load_weights(world / 's2' / 'model.safetensors')[0], tmp_path / 'bare.pth')
    notebook(
        members=[str(tmp_path / 'bare.pth'), folders[0]],
        data_root=str(world / 'data'),
        out=str(tmp_path / 'b'),
    )
    assert weights_hash(load_run(tmp_path / 'b')) == weights_hash(
        average([tmp_path / 'bare.pth', folders[0]])
    )


def test_without_labels(world, tmp_path):
    "The target is a folder of images: label-free scores only, and mIoU cannot choose"
    mine = dict(
        mine=dict(
            folder='demo/cityscapes',
            images='leftImg8bit/{split}/*_leftImg8bit.png',
            splits=dict(train='train'),
            space='cityscapes19',
            fit=[64, 128],
        )
    )
    for i in range(2):
        r = make_recipe('dacs', 'demo', 'mine', overrides=TINY | dict(seed=i, datasets=mine))
        write_json(tmp_path / f's{i}' / 'recipe.json', recipe_dict(r))
        (tmp_path / f's{i}' / 'model.safetensors').write_bytes(
            (world / f's{i}' / 'model.safetensors').read_bytes()
        )
    kw = dict(
        members=[str(tmp_path / 's0'), str(tmp_path / 's1')],
        data_root=str(world / 'data'),
        out=str(tmp_path / 'out'),
    )
    with pytest.raises(
        ValueError, match="no labelled val, so there is no mIoU to choose by; take score='info'"
    ):
        notebook(**kw, how='greedy')
    assert not (tmp_path / 'out').exists()
    notebook(**kw, how='greedy', score='entropy')
    tab = pd.read_csv(tmp_path / 'out' / 'scores.csv', index_col='member')
    assert (
        list(tab) == ['entropy', 'balance', 'info', 'share']
        and tab['entropy']['soup'] <= tab['entropy'].iloc[:2].min() + 1e-9
    )
    assert read_json(tmp_path / 'out' / 'metrics.json')['miou'] == {}


# ---- bad input


def test_bad_input_is_named(world, tmp_path):
    a, b = str(world / 's0'), str(world / 's1')

    def fails(kind, match, **kw):
        with pytest.raises(kind, match=match):
            notebook(
                **dict(members=[a, b], data_root=str(world / 'data'), out=str(tmp_path / 'out'))
                | kw
            )

    fails(ValueError, 'needs at least two', members=[a])
    fails(ValueError, 'named twice; to let it count more, use `weights`', members=[a, a + '/'])
    fails(ValueError, "did you mean 'greedy'", how='gredy')
    fails(ValueError, "did you mean 'entropy'", score='entrop')
    fails(ValueError, "did you mean 'members'", membres=[a])
    fails(ValueError, 'weigh', how='greedy', weights=[1, 2])
    fails(ValueError, '2 positive numbers are needed', weights=[1, 0])
    fails(
        FileNotFoundError,
        'nothing: give folders of finished runs',
        members=[a, str(tmp_path / 'nothing')],
    )
    fails(ValueError, 'is the folder of a run; choose another', out=a)
    fails(ValueError, 'is one of the members|is the folder of a run', out=b)
    write_run(
        tmp_path / 'b1', create_segmentor('mit_b0', 19, dim=8).state_dict(), over=dict(embed_dim=8)
    )
    fails(
        ValueError,
        r'b1.model.safetensors is another network than .*s0.model.safetensors \(dim: 8 there, 16 here\)',
        members=[a, str(tmp_path / 'b1')],
    )
    torch.save(
        create_segmentor('mit_b0', 11, dim=16).state_dict(), tmp_path / 'eleven.pth'
    )  # says nothing: its tensors tell
    fails(
        ValueError,
        r'eleven.pth does not fit the network; nothing was loaded\.\n  2 mismatching: head.*11x16',
        members=[a, str(tmp_path / 'eleven.pth')],
    )
    (tmp_path / 'more.pth').write_bytes((tmp_path / 'eleven.pth').read_bytes())
    fails(
        ValueError,
        'so their network is unknown',
        members=[str(tmp_path / 'eleven.pth'), str(tmp_path / 'more.pth')],
    )
    broken = load_weights(world / 's1' / 'model.safetensors')[0]
    broken[next(iter(broken))] *= torch.nan
    write_run(tmp_path / 'nan', broken)
    fails((ValueError, FloatingPointError), 'NaN', members=[a, str(tmp_path / 'nan')])
    cut = tmp_path / 'cut.safetensors'
    cut.write_bytes((world / 's1' / 'model.safetensors').read_bytes()[:-9])
    fails(ValueError, 'cut.safetensors: not a whole safetensors file', members=[a, str(cut)])
    assert not (tmp_path / 'out').exists()
