"Weights files: exactly one network, whole or absent, and no code from strangers"

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import swa_utils

from udanb.checkpoints.averaging import (
    StateDictMean,
    average,
    average_snapshots,
    greedy_soup,
    soup,
    update_bn,
)
from udanb.checkpoints.weights import (
    detached_copy,
    export_weights,
    extract_network,
    load_weights,
    load_weights_into,
    save_weights,
)
from udanb.core.state_dicts import weights_hash
from udanb.core.types import Sample
from udanb.core.utils import seed_all
from udanb.demo.render import toy_pair
from udanb.methods.daformer import source_only
from udanb.models.segmentor import create_segmentor, param_groups
from udanb.training.callbacks import SnapshotCallback
from udanb.training.schedules import cosine_cycles, cycle_ends
from udanb.training.trainer import Trainer


def make(seed=0):
    seed_all(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def same(a, b):
    return list(a) == list(b) and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in b)


@pytest.fixture
def nets():
    return make(0), make(1), make(2)


@pytest.fixture
def ckpt(nets):
    "The trainer's layout, with a real optimiser"
    s, t, e = nets
    opt = torch.optim.AdamW(s.parameters())
    s(torch.randn(1, 3, 8, 8)).sum().backward()
    opt.step()
    return dict(
        it=7,
        model=s.state_dict(),
        opt=opt.state_dict(),
        sched=dict(last_epoch=7),
        recipe=json.dumps(dict(name='daformer')),
        method={f'teacher.net.{k}': v for k, v in t.state_dict().items()}
        | {f'imnet.{k}': v for k, v in e.state_dict().items()}
        | {'teacher.it': torch.tensor(7)},
    )


@pytest.fixture
def published(nets):
    "DAFormer's layout"
    return dict(
        meta={},
        optimizer={},
        state_dict={
            f'{p}.{k}': v
            for p, n in zip(('model', 'ema_model', 'imnet_model'), nets)
            for k, v in n.state_dict().items()
        },
    )


# ---- strip
def test_strip_keeps_exactly_one_network(nets, ckpt, published):
    for c in (ckpt, published, published['state_dict']):
        assert same(extract_network(c), nets[0].state_dict()) and same(
            extract_network(c, 'teacher'), nets[1].state_dict()
        )


def test_stripped_tensors_own_their_memory():
    base = torch.arange(24.0).view(2, 3, 4)
    views = dict(a=base[0], b=base.transpose(0, 2), c=base[0], d=nn.Parameter(base))
    s = extract_network(dict(model=views))
    for k, v in s.items():
        assert (
            v.device.type == 'cpu'
            and v.is_contiguous()
            and v.equal(views[k])
            and not v.requires_grad
            and type(v) is torch.Tensor
        )
    assert (
        len({v.untyped_storage().data_ptr() for v in s.values()}) == 4
        and s['a'].untyped_storage().nbytes() == 48
    )
    base.zero_()
    assert s['a'].sum() > 0


def test_strip_errors(ckpt, nets):
    with pytest.raises(ValueError, match="unknown network 'techer'; did you mean 'teacher'"):
        extract_network(ckpt, 'techer')
    with pytest.raises(ValueError, match='no teacher; it holds it, model'):
        extract_network({**ckpt, 'method': {}}, 'teacher')
    with pytest.raises(ValueError, match='no student; it holds 0.weight'):
        extract_network(nets[0].state_dict())


def test_strip_knows_ddbs_names(nets, tmp_path):
    "Distillation's student and its two teachers; mmcv leaves a numpy number in `meta`"
    state = {
        f'{p}.{k}': v
        for p, n in zip(('stu_model', 'cu_model', 'ca_model'), nets)
        for k, v in n.state_dict().items()
    }
    for which, n in zip(('student', 'cu', 'ca'), nets):
        assert same(extract_network(dict(state_dict=state), which), n.state_dict())
    torch.save(
        dict(meta=dict(hook_msgs=dict(best_score=np.float64(0.5))), state_dict=state),
        tmp_path / 'ddb.pth',
    )
    assert same(load_weights(tmp_path / 'ddb.pth', 'ca')[0], nets[2].state_dict())
    with pytest.raises(ValueError, match='no teacher'):
        load_weights(tmp_path / 'ddb.pth', 'teacher')


# ---- files
def test_there_and_back(tmp_path, nets):
    f = save_weights(
        tmp_path / 'runs' / 'model.safetensors',
        nets[0],
        dict(space='camvid11', recipe=dict(tau=0.968), miou=48.25),
    )
    state, meta = load_weights(f)
    assert same({k: state[k] for k in nets[0].state_dict()}, nets[0].state_dict()) and set(
        state
    ) == set(nets[0].state_dict())
    assert meta == dict(
        space='camvid11', recipe='{"tau": 0.968}', miou='48.25', hash=weights_hash(nets[0])
    )
    with safe_open(f, 'pt') as raw:
        assert raw.metadata() == meta  # readable by anybody
    assert [p.name for p in f.parent.iterdir()] == ['model.safetensors']


def test_types_shapes_and_shared_tensors(tmp_path):
    w = torch.randn(3, 4)
    state = dict(
        a=w,
        tied=w,
        t=w.T,
        h=w.half(),
        b=w.bfloat16(),
        i=torch.tensor(5),
        m=w > 0,
        none=torch.zeros(0, 3),
    )
    back, _ = load_weights(save_weights(tmp_path / 'm.safetensors', state))
    assert same({k: back[k] for k in state}, state)


def test_equal_weights_are_equal_files(tmp_path, nets):
    "Byte for byte, however the metadata was ordered; and still a file the library reads, aligned to 8 bytes"
    meta = dict(space='camvid11', name='straße "1"\n', recipe=dict(tau=0.968), seed=0, b=1, a=2)
    files = [
        save_weights(tmp_path / f'{i}.safetensors', nets[0], dict(m))
        for i, m in enumerate([meta.items(), [*reversed(meta.items())]] * 3)
    ]
    assert len({f.read_bytes() for f in files}) == 1
    assert int.from_bytes(files[0].read_bytes()[:8], 'little') % 8 == 0
    with safe_open(files[0], 'pt') as raw:
        assert raw.metadata()['name'] == meta['name'] and all(
            raw.get_tensor(k).equal(v) for k, v in nets[0].state_dict().items()
        )


def test_hash_in_the_name(tmp_path, nets):
    a, b = (save_weights(tmp_path / 'm.safetensors', n, hashed=True) for n in nets[:2])
    assert (
        a.name == f'm-{weights_hash(nets[0])}.safetensors' and a != b and a.exists() and b.exists()
    )


def test_a_failed_save_leaves_the_old_file(tmp_path, nets, monkeypatch):
    f = save_weights(tmp_path / 'm.safetensors', nets[0])
    old = f.read_bytes()

    def full(p, blob):
        p.write_bytes(blob[:100])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('udanb.checkpoints.weights._write_sorted', full)
    with pytest.raises(OSError, match='No space'):
        save_weights(f, nets[1])
    assert f.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['m.safetensors']


def test_loaded_tensors_outlive_their_file(tmp_path, nets):
    f = save_weights(tmp_path / 'm.safetensors', nets[0])
    state, _ = load_weights(f)
    f.write_bytes(b'')
    assert weights_hash(state) == weights_hash(nets[0])


def test_a_truncated_file_is_named(tmp_path, nets):
    f = save_weights(tmp_path / 'model.safetensors', nets[0])
    f.write_bytes(f.read_bytes()[:-1])
    with pytest.raises(ValueError, match='model.safetensors: not a whole safetensors file'):
        load_weights(f)


def test_a_flipped_bit_is_found(tmp_path, nets):
    f = save_weights(tmp_path / 'm.safetensors', nets[0])
    data = bytearray(f.read_bytes())
    data[-3] ^= 1
    f.write_bytes(data)
    old = weights_hash(nets[0])
    with pytest.raises(ValueError, match=f'not {old} as when they were written'):
        load_weights(f)


def test_safetensors_of_others_need_no_hash(tmp_path, nets):
    save_file(detached_copy(nets[0].state_dict()), tmp_path / 'theirs.safetensors')
    state, meta = load_weights(tmp_path / 'theirs.safetensors')
    assert meta == {} and weights_hash(state) == weights_hash(nets[0])


# ---- torch files
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.ckpt'])
def test_torch_files(tmp_path, nets, ckpt, published, suffix):
    f = tmp_path / f'x{suffix}'
    torch.save(nets[0].state_dict(), f)
    assert same(load_weights(f)[0], nets[0].state_dict())
    for c in (ckpt, published, published['state_dict']):
        torch.save(c, f)
        assert same(load_weights(f)[0], nets[0].state_dict()) and same(
            load_weights(f, 'teacher')[0], nets[1].state_dict()
        )


def test_other_wrappings_and_mmcvs_meta(tmp_path, nets):
    "How files are opened and unwrapped is tested in test_state.py; what comes out of there comes out of here"
    s = nets[0].state_dict()
    for obj, meta in (
        (dict(model=s, epoch=800), {}),
        (
            dict(state_dict=s, meta=dict(CLASSES=('a', 'b'), hash='theirs')),
            dict(CLASSES=('a', 'b'), hash='theirs'),
        ),
    ):
        torch.save(obj, tmp_path / 'm.pth')
        state, m = load_weights(tmp_path / 'm.pth')
        assert same(state, s) and m == meta
    with pytest.raises(ValueError, match='m.pth: there is no teacher in it; it holds one network'):
        load_weights(tmp_path / 'm.pth', 'teacher')


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_is_refused_and_not_run(tmp_path):
    f, sprung = tmp_path / 'stranger.pth', tmp_path / 'sprung'
    torch.save(dict(model=make().state_dict(), method=Trap(str(sprung))), f)
    with pytest.raises(
        ValueError, match='stranger.pth: holds more than tensors.*save only the tensors'
    ):
        load_weights(f)
    assert not sprung.exists()


def test_other_content_and_names(tmp_path, nets):
    for bad, kind in (([torch.ones(3)], 'list'), (dict(lr=0.1), 'float'), (3, 'int')):
        torch.save(bad, tmp_path / 'm.pth')
        with pytest.raises(ValueError, match=f'm.pth: not a dictionary of tensors but {kind}'):
            load_weights(tmp_path / 'm.pth')
    with pytest.raises(FileNotFoundError, match='gone.pth: no such weights file'):
        load_weights(tmp_path / 'gone.pth')
    (tmp_path / 'm.zip').write_bytes(b'x')
    with pytest.raises(ValueError, match='m.zip: weights are read from'):
        load_weights(tmp_path / 'm.zip')
    with pytest.raises(ValueError, match='written as .safetensors'):
        save_weights(tmp_path / 'm.pth', nets[0])


def test_a_file_of_ours_is_one_network(tmp_path, nets):
    "Names that look like a prefix are left as they are; a file of one network has no teacher"
    wrapped = nn.ModuleDict(dict(model=nets[0], ema_model=nets[1]))
    f = save_weights(tmp_path / 'm.safetensors', wrapped)
    assert weights_hash(load_weights(f)[0]) == weights_hash(wrapped) and load_weights_into(
        wrapped, f
    )['hash'] == weights_hash(wrapped)
    with pytest.raises(ValueError, match='there is no teacher in it; it holds one network'):
        load_weights(save_weights(tmp_path / 'n.safetensors', nets[0]), 'teacher')


def test_a_checkpoint_converted_to_safetensors(tmp_path, nets, published):
    "Without our hash its prefixes mean what they mean in a .pth"
    save_file(detached_copy(published['state_dict']), tmp_path / 'daformer.safetensors')
    for which, n in zip(('student', 'teacher', 'imagenet'), nets):
        assert weights_hash(
            load_weights(tmp_path / 'daformer.safetensors', which)[0]
        ) == weights_hash(n)


# ---- into a network
def test_load_into_is_exact(tmp_path, nets, ckpt):
    net = make(9)
    assert (
        load_weights_into(net, save_weights(tmp_path / 'm.safetensors', nets[1], dict(seed=1)))[
            'seed'
        ]
        == '1'
    )
    assert same(net.state_dict(), nets[1].state_dict())
    torch.save(ckpt, tmp_path / 'c.pt')
    assert load_weights_into(net, tmp_path / 'c.pt') == dict(
        step='7', recipe=ckpt['recipe']
    ) and same(net.state_dict(), nets[0].state_dict())


@pytest.mark.parametrize(
    'change,say',
    [
        (lambda s: s.pop('1.running_var'), '1 missing: 1.running_var'),
        (lambda s: s.update(extra=torch.ones(1)), '1 unexpected: extra'),
        (
            lambda s: s.update({'2.weight': torch.ones(5, 4, 1, 1)}),
            r'1 mismatching: 2.weight \(5x4x1x1 in the file, 2x4x1x1 in the network\)',
        ),
        (
            lambda s: s.update({f'k{i}': torch.ones(1) for i in range(9)}),
            '9 unexpected: k0, k1, k2, k3, k4, …',
        ),
    ],
)
def test_all_or_nothing(tmp_path, nets, change, say):
    state = copy.copy(nets[0].state_dict())
    change(state)
    net = make(9)
    before = weights_hash(net)
    message = f'm.safetensors does not fit the network; nothing was loaded.\n  {say}'
    with pytest.raises(ValueError, match=message):
        load_weights_into(net, save_weights(tmp_path / 'm.safetensors', state))
    assert weights_hash(net) == before


# ---- the mean of networks
def rich(seed=0):
    "Every kind of tensor: BatchNorm's counter, half precision, complex, bool, integers, float64"
    seed_all(seed)
    net = make(seed)
    for _ in range(seed + 1):
        net(torch.randn(2, 3, 8, 8))
    return net.state_dict() | dict(
        h=torch.randn(5).half(),
        b=torch.randn(5).bfloat16(),
        c=torch.randn(3, dtype=torch.complex64),
        m=torch.rand(4) > 0.5,
        i=torch.randint(0, 9, (4,)),
        d=torch.randn(3, dtype=torch.float64),
        none=torch.zeros(0, 2),
        scalar=torch.randn(()),
    )


def written(tmp_path, states, **kw):
    return [save_weights(tmp_path / f'{i}.safetensors', s, **kw) for i, s in enumerate(states)]


@pytest.mark.parametrize(
    'k,weights',
    [(1, None), (2, None), (3, None), (7, None), (3, [0.1, 0.2, 0.4]), (3, [1e-9, 1, 1e9])],
)
def test_soup_of_copies_is_the_copy(tmp_path, k, weights):
    "Bit for bit, in any type, with any weights"
    s = {
        n: v for n, v in rich(1).items() if n not in ('c', 'd')
    }  # safetensors has no complex; float64 has no wider type to add in
    s |= dict(
        tiny=torch.tensor([1e-42, -1e-45]),
        huge=torch.tensor([3e38, -3e38]),
        inf=torch.tensor([-torch.inf, 1]),
    )
    f = save_weights(tmp_path / 'm.safetensors', s)
    assert weights_hash(average([f] * k, weights)) == weights_hash(s)


def test_equal_to_torchs_averaged_model(nets):
    theirs = swa_utils.AveragedModel(nets[0], use_buffers=True)
    mean = StateDictMean()
    for i, n in enumerate(nets):
        for _ in range(i):
            n(torch.randn(2, 3, 8, 8))
        theirs.update_parameters(n)
        mean.add(n.state_dict())
    state = mean.value()
    assert list(state) == list(nets[0].state_dict()) and state['1.num_batches_tracked'] == 2
    for k, v in theirs.module.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(state[k], v, rtol=1e-6, atol=1e-7)


def test_weighted_mean_against_numpy(tmp_path):
    states, w = [rich(i) for i in range(3)], [3, 1, 0.5]
    mean = StateDictMean()
    for s, x in zip(states, w):
        mean.add(s, x)
    got = mean.value()
    for k, v in got.items():

        def num(t):
            return (t.float() if t.dtype == torch.bfloat16 else t).numpy()

        want = (
            np.average([num(s[k]) for s in states], 0, w)
            if v.is_floating_point() or v.is_complex()
            else num(states[-1][k])
        )
        np.testing.assert_allclose(
            num(v), want, rtol=1e-2 if v.dtype in (torch.half, torch.bfloat16) else 1e-6, atol=1e-7
        )
        assert v.dtype == states[0][k].dtype and v.shape == states[0][k].shape


def test_order_matters_only_to_the_counters(tmp_path, nets):
    files = written(tmp_path, [n.state_dict() for n in nets])
    a, b = average(files), average(files[::-1])
    assert all(a[k].equal(b[k]) for k in a if a[k].is_floating_point())


def test_adding_leaves_the_members_alone(nets):
    before = [weights_hash(n) for n in nets]
    mean = StateDictMean()
    for n in nets:
        mean.add(n.state_dict())
    v = mean.value()
    v['0.weight'].zero_()
    v['1.num_batches_tracked'].fill_(99)
    assert (
        [weights_hash(n) for n in nets] == before
        and mean.value()['0.weight'].abs().sum() > 0
        and mean.value()['1.num_batches_tracked'] == 0
    )


@pytest.mark.parametrize(
    'change,say',
    [
        (lambda s: s.pop('1.running_var'), '1 missing: 1.running_var'),
        (lambda s: s.update(extra=torch.ones(1)), '1 unexpected: extra'),
        (
            lambda s: s.update({'2.weight': torch.ones(5, 4, 1, 1)}),
            r'1 mismatching: 2.weight \(5x4x1x1 in the file',
        ),
        (
            lambda s: s.update({'2.weight': s['2.weight'].half()}),
            r'1 of another type: 2.weight \(torch.float16 in the file, torch.float32 in the first',
        ),
        (
            lambda s: s.update({'2.weight': s['2.weight'] * torch.nan}),
            'NaN in 2.weight; its run probably diverged',
        ),
    ],
)
def test_members_that_do_not_fit(tmp_path, nets, change, say):
    odd = dict(nets[1].state_dict())
    change(odd)
    files = written(tmp_path, [nets[0].state_dict(), odd])
    with pytest.raises(ValueError, match=f'1.safetensors.*{say}'):
        average(files)
    with pytest.raises(ValueError, match=say):
        soup(files, tmp_path / 'soup.safetensors')
    with pytest.raises(ValueError, match=say):
        greedy_soup(files, lambda s: 1.0)
    assert not (tmp_path / 'soup.safetensors').exists()
    mean = StateDictMean().add(nets[0].state_dict())
    with pytest.raises(ValueError):
        mean.add(odd)
    assert weights_hash(mean.value()) == weights_hash(nets[0])  # nothing of it was added


def test_bad_calls(tmp_path, nets):
    files = written(tmp_path, [n.state_dict() for n in nets])
    for w in ([1, 1], [1, 0, 1], [1, -1, 1], [1, float('nan'), 1], [1, float('inf'), 1]):
        with pytest.raises(ValueError, match='3 positive numbers are needed'):
            average(files, w)
    for f in (average, lambda p: greedy_soup(p, len)):
        with pytest.raises(ValueError, match='no files to average'):
            f([])
    with pytest.raises(FileNotFoundError, match='gone.safetensors: no such weights'):
        average([*files, tmp_path / 'gone.safetensors'])
    with pytest.raises(FileNotFoundError, match='checkpoint.pt: no such weights'):
        average([tmp_path], which='teacher')
    with pytest.raises(
        ValueError, match="unknown network of a run 'techer'; did you mean 'teacher'"
    ):
        average([tmp_path], which='techer')
    assert weights_hash(average(files[0])) == weights_hash(nets[0])  # one path is a list of one


def test_soups_header_and_folders_of_runs(tmp_path, nets, ckpt):
    "Members are folders, students or teachers; what all say alike is kept, and what went in is listed"
    for i, n in enumerate(nets[:2]):
        save_weights(
            tmp_path / f'run{i}' / 'model.safetensors',
            n,
            dict(recipe=dict(seed=i), classes=['a', 'b']),
        )
        torch.save(ckpt | dict(model=n.state_dict()), tmp_path / f'run{i}' / 'checkpoint.pt')
    runs = [tmp_path / 'run0', tmp_path / 'run1']
    state, meta = load_weights(
        soup(runs, tmp_path / 'soup.safetensors', [3, 1], dict(recipe='{"seed": 7}'))
    )
    assert (
        all(state[k].equal(v) for k, v in average(runs, [3, 1]).items())
        and meta['classes'] == '["a", "b"]'
        and meta['recipe'] == '{"seed": 7}'
    )
    rows = json.loads(meta['ingredients'])
    assert [(r['hash'], r['weight'], r['file']) for r in rows] == [
        (weights_hash(n), w, str(f / 'model.safetensors'))
        for n, w, f in zip(nets, (0.75, 0.25), runs)
    ]
    assert 'recipe' not in load_weights(soup(runs, tmp_path / 's.safetensors'))[1]
    assert weights_hash(average(runs, which='teacher')) == weights_hash(
        nets[1]
    )  # both checkpoints hold the same teacher
    assert weights_hash(
        load_weights(soup(runs[:1] * 3, tmp_path / 'copies.safetensors'))[0]
    ) == weights_hash(nets[0])


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    "Largest resident size of a real process after 2 and after 16 files of 16 MB"
    files = [
        save_weights(
            tmp_path / f'{i}.safetensors',
            dict(w=torch.full((4_000_000,), float(i)), b=torch.zeros(3)),
        )
        for i in range(2)
    ]
    code = '''import resource, sys
from udanb.checkpoints.averaging import average, greedy_soup
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10
ways = average, lambda fs: greedy_soup(fs, lambda s: 1.)[0]
print([(float(way(sys.argv[1:]*k)['w'].mean()), peak()) for way in ways for k in (1,8)])'''
    p = subprocess.run(
        [sys.executable, '-c', code, *map(str, files)], capture_output=True, text=True, cwd=ROOT
    )
    assert p.returncode == 0, p.stderr
    got = json.loads(p.stdout.replace('(', '[').replace(')', ']'))
    assert [x for x, _ in got] == [0.5] * 4
    for (_, few), (_, many) in (got[:2], got[2:]):
        assert many < few + 24, got  # fourteen more files would be 224 MB


# ---- greedy
def scalars(tmp_path, values):
    return [
        save_weights(tmp_path / f'{i}.safetensors', dict(w=torch.tensor([float(v)])))
        for i, v in enumerate(values)
    ]


def test_greedy_against_a_naive_reading(tmp_path):
    "The score is the distance to 1; naive: average lists of numbers afresh at every step"
    values = [0.0, 3.0, -1.5, 0.7, 1.6, 9.0]
    files = scalars(tmp_path, values)

    def score(state):
        return abs(float(state['w']) - 1)

    order = sorted(values, key=lambda v: abs(v - 1))
    kept = []
    for v in order:
        if not kept or abs(np.mean([*kept, v]) - 1) <= abs(np.mean(kept) - 1):
            kept.append(v)
    state, chosen, tab = greedy_soup(files, score, higher=False)
    assert [files.index(f) for f in chosen] == [values.index(v) for v in kept] and len(kept) > 1
    assert abs(float(state['w']) - np.mean(kept)) < 1e-6 and list(tab['taken']) == [
        v in kept for v in order
    ]
    assert tab['alone'].is_monotonic_increasing and [
        files.index(type(files[0])(f)) for f in tab['file']
    ] == [values.index(v) for v in order]
    np.testing.assert_allclose(tab[tab['taken']]['together'].iloc[-1], score(state))
    flipped = greedy_soup(files, lambda s: -score(s))  # more is better: the same soup
    assert flipped[1] == chosen and float(flipped[0]['w']) == float(state['w'])


def test_greedy_never_ends_below_its_best_member(tmp_path):
    files = scalars(tmp_path, np.random.default_rng(0).normal(size=8))

    def score(s):
        return float(torch.sin(9 * s['w']))

    state, chosen, tab = greedy_soup(files, score)
    assert (
        score(state) >= tab['alone'].max() - 1e-6
        and tab['taken'].iloc[0]
        and len(chosen) == tab['taken'].sum()
    )


def test_greedy_takes_copies_and_refuses_nan(tmp_path):
    files = scalars(tmp_path, [2.0] * 3)
    state, chosen, _ = greedy_soup(files, lambda s: 1.0)
    assert chosen == files and float(state['w']) == 2
    with pytest.raises(ValueError, match='0.safetensors: its score is NaN'):
        greedy_soup(files, lambda s: float('nan'))


# ---- BatchNorm
def bn_net():
    seed_all(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
    )


def test_update_bn_against_torch_and_a_naive_mean():
    net, x = bn_net(), [torch.randn(4, 3, 8, 8) + i for i in range(3)]
    theirs = copy.deepcopy(net)
    theirs[2].p = 0.0  # torch leaves dropout on
    net.eval()
    net[3].train()
    modes = [m.training for m in net.modules()]
    assert update_bn(net, [(Sample(x[0]), 'label'), x[1], Sample(x[2])]) == 2
    swa_utils.update_bn(x, theirs)
    assert (
        weights_hash(net) == weights_hash(theirs) and [m.training for m in net.modules()] == modes
    )
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [0.3, 0.1, 0.1]
    with torch.no_grad():
        y = [net[0](b) for b in x]
    torch.testing.assert_close(
        net[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in y]).mean(0)
    )
    torch.testing.assert_close(
        net[1].running_var, torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in y]).mean(0)
    )


def test_update_bn_leaves_frozen_ones_and_gradients():
    net = create_segmentor('tf_efficientnet_lite0', 5, dim=16, freeze_bn=True)
    enc = weights_hash(net.backbone)
    head = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.head.modules())
    assert (
        update_bn(net, [torch.randn(2, 3, 64, 64)]) == head > 0
        and weights_hash(net.backbone) == enc
        and net.training
    )
    assert all(p.grad is None for p in net.parameters()) and torch.is_grad_enabled()
    assert update_bn(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), iter(())) == 0


def test_update_bn_puts_back_what_it_found():
    net = bn_net().eval()
    before = weights_hash(net)

    def broken():
        yield torch.randn(2, 3, 8, 8)
        raise OSError('the disk went away')

    with pytest.raises(OSError, match='went away'):
        update_bn(net, broken())
    with pytest.raises(ValueError, match='no batches'):
        update_bn(net, [])
    assert (
        weights_hash(net) == before
        and not any(m.training for m in net.modules())
        and net[1].momentum == 0.3
    )


# ---- SWA
@pytest.mark.parametrize('steps,cycles', [(12, 3), (100, 7), (10, 10), (5, 1), (1, 1), (601, 12)])
def test_cycles(steps, cycles):
    f, ends = [cosine_cycles(t, steps, cycles) for t in range(steps)], cycle_ends(steps, cycles)
    assert (
        len(ends) == cycles
        and ends[-1] == steps
        and max(np.diff([0, *ends])) - min(np.diff([0, *ends])) <= 1
    )
    for a, b in zip([0, *ends], ends):  # each cycle against mmcv's cosine, drawn to its last step
        want = (
            [
                0.01 + 0.5 * 0.99 * (math.cos(math.pi * t / max(b - a - 1, 1)) + 1)
                for t in range(b - a)
            ]
            if b - a > 1
            else [0.01]
        )
        np.testing.assert_allclose(f[a:b], want, atol=1e-12)
        assert abs(f[b - 1] - 0.01) < 1e-12 and (b - a == 1 or f[a] == 1)
    assert all(0.01 - 1e-12 <= x <= 1 for x in f)
    assert abs(min(cosine_cycles(t, steps, cycles, low=0.5) for t in range(steps)) - 0.5) < 1e-12


def test_cycles_that_cannot_be():
    for bad in (0, 6, -1):
        with pytest.raises(ValueError, match=f'{bad} cycles in 5 steps'):
            cosine_cycles(0, 5, bad)
    for it in (-1, 5):
        with pytest.raises(ValueError, match=f'step {it} is not in a run of 5'):
            cosine_cycles(it, 5, 2)


def trainer(out, steps=6, cycles=3, **kw):
    seed_all(0)
    net = create_segmentor('mit_b0', 19, dim=16)

    def loader(start):
        for i in range(start, steps):
            yield toy_pair(2, seed=i, size=(32, 64))

    rate = partial(cosine_cycles, cycles=cycles)
    return Trainer(
        net,
        source_only(net),
        groups=param_groups(net, lr=1e-3),
        loader=loader,
        steps=steps,
        out=out,
        schedule=rate,
        recipe=dict(name='toy'),
        callbacks=[SnapshotCallback(cycles, dict(classes=['x']))],
        quiet=True,
        **kw,
    )


def test_snapshots_of_a_real_run_and_of_an_interrupted_one(tmp_path):
    t = trainer(tmp_path / 'a')
    seen = {}
    t.callbacks.append(lambda t, logs: seen.update({t.it: detached_copy(t.student.state_dict())}))
    log = t.fit()
    at = tmp_path / 'a' / 'snapshots'
    assert sorted(f.name for f in at.iterdir()) == [
        '2.safetensors',
        '4.safetensors',
        '6.safetensors',
    ]
    for i, n in enumerate((2, 4, 6)):
        state, meta = load_weights(at / f'{n}.safetensors')
        assert weights_hash(state) == weights_hash(seen[n]) and {
            k: meta[k] for k in ('step', 'cycle', 'cycles', 'recipe', 'classes')
        } == dict(
            step=str(n), cycle=str(i + 1), cycles='3', recipe='{"name": "toy"}', classes='["x"]'
        )
    np.testing.assert_allclose([r['lr'] / 1e-3 for r in log], [1, 0.01] * 3, atol=1e-9)
    mean = StateDictMean()
    for n in (2, 4, 6):
        mean.add(seen[n])
    assert (
        weights_hash(average_snapshots(tmp_path / 'a'))
        == weights_hash(average_snapshots(at))
        == weights_hash(mean.value())
    )
    # interrupted after step 5, with a checkpoint of step 3: step 4's snapshot is written again, the same
    u = trainer(tmp_path / 'b', save_every=3)

    def stop(t, logs):
        if t.it == 5:
            raise KeyboardInterrupt

    u.callbacks.append(stop)
    with pytest.raises(KeyboardInterrupt):
        u.fit()
    with pytest.raises(ValueError, match='cycles 1/3, 2/3; let it finish'):
        average_snapshots(tmp_path / 'b')
    (tmp_path / 'b' / 'snapshots' / '.6.77.part.safetensors').write_bytes(
        b'half'
    )  # what a killed process leaves
    trainer(tmp_path / 'b', save_every=3).fit()
    assert weights_hash(average_snapshots(tmp_path / 'b')) == weights_hash(mean.value())


def test_swa_refuses_what_is_not_one_run(tmp_path, nets):
    with pytest.raises(FileNotFoundError, match='no snapshots there'):
        average_snapshots(tmp_path)

    def put(step, cycle, cycles):
        return save_weights(
            tmp_path / 'snapshots' / f'{step}.safetensors',
            nets[0],
            dict(cycle=cycle, cycles=cycles),
        )

    put(5, 1, 2)
    put(10, 2, 2)
    assert weights_hash(average_snapshots(tmp_path)) == weights_hash(nets[0])
    put(3, 1, 3)  # of a run with other cycles
    with pytest.raises(ValueError, match='cycles 1/3, 1/2, 2/2'):
        average_snapshots(tmp_path)
    (tmp_path / 'snapshots' / '3.safetensors').unlink()
    f = put(10, 2, 2)
    f.write_bytes(f.read_bytes()[:-3])
    with pytest.raises(ValueError, match='10.safetensors: not a whole safetensors file'):
        average_snapshots(tmp_path)
    save_weights(f, nets[1])
    with pytest.raises(
        ValueError, match='not the snapshots of one whole run but cycles 1/2, None/None'
    ):
        average_snapshots(tmp_path)


# ---- export
def test_export(tmp_path, nets, ckpt):
    run = tmp_path / 'run'
    save_weights(run / 'model.safetensors', nets[0], dict(recipe=ckpt['recipe'], classes=['a']))
    torch.save(ckpt, run / 'checkpoint.pt')
    for path, which, net in (
        (run, 'student', nets[0]),
        (run, 'teacher', nets[1]),
        (run / 'checkpoint.pt', 'teacher', nets[1]),
        (run / 'checkpoint.pt', 'student', nets[0]),
    ):
        fresh = make(9)
        meta = load_weights_into(
            fresh, export_weights(path, tmp_path / 'x.safetensors', which, dict(why='test'))
        )
        assert same(fresh.state_dict(), net.state_dict())
        assert (meta['recipe'], meta['classes'], meta['network'], meta['why']) == (
            ckpt['recipe'],
            '["a"]',
            which,
            'test',
        )
    save_weights(
        run / 'model.safetensors', nets[0], dict(recipe='{"name": "other"}', classes=['b'])
    )
    meta = load_weights(export_weights(run, tmp_path / 'x.safetensors', 'teacher'))[1]
    assert (
        'classes' not in meta and meta['recipe'] == ckpt['recipe'] and meta['step'] == '7'
    )  # the file beside it is of another recipe
    with pytest.raises(ValueError, match='no teacher'):
        export_weights(run / 'model.safetensors', tmp_path / 'y.safetensors', 'teacher')
    assert not (tmp_path / 'y.safetensors').exists()
