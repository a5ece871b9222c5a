"Weight files are opened without running code, unwrapped and compared; errors name the file and a remedy"

import builtins
import io
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from udanb.core.state_dicts import (
    WEIGHT_SUFFIXES,
    check_weights_path,
    compare_state_dicts,
    extract_state_dict,
    format_key_diff,
    load_state_dict_file,
    load_torch_file,
    read_safetensors,
    select_network,
    split_by_network,
)
from udanb.core.utils import seed_all


def make(seed=0):
    seed_all(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def same(a, b):
    return list(a) == list(b) and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in b)


@pytest.fixture
def state():
    return make().state_dict()


# ---- opening


def test_every_ending_is_read_and_no_other(tmp_path, state):
    for suffix in WEIGHT_SUFFIXES:
        path = tmp_path / f'w{suffix}'
        save = save_file if suffix == '.safetensors' else torch.save
        save(dict(state), path)
        got, meta = load_state_dict_file(path)
        assert same({k: got[k] for k in state}, state), suffix
        assert len(got) == len(state) and meta == {}, suffix
    assert load_state_dict_file(str(tmp_path / 'w.pth'))[0].keys() == state.keys()
    (tmp_path / 'w.pth').rename(tmp_path / 'w.zip')
    with pytest.raises(
        ValueError, match='w.zip: weights are read from .safetensors, .pth.*unpack or rename'
    ):
        load_state_dict_file(tmp_path / 'w.zip')


def test_missing_files_and_folders(tmp_path):
    (tmp_path / 'run.pth').mkdir()
    for f in ('gone.pth', 'gone.safetensors', 'run.pth'):
        with pytest.raises(FileNotFoundError, match=f'{f}: no such weights file'):
            load_state_dict_file(tmp_path / f)


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_a_file_of_another_user(tmp_path, monkeypatch, name):
    "root may read everything, so `open` is replaced by a function that refuses"
    (tmp_path / name).write_bytes(b'PK')
    real = open

    def guarded(f, *args, **kw):
        if str(f).endswith(name):
            raise PermissionError(13, 'Permission denied', str(f))
        return real(f, *args, **kw)

    monkeypatch.setattr(builtins, 'open', guarded)
    with pytest.raises(PermissionError, match=f'{name}: you may not read this file.*chmod'):
        load_state_dict_file(tmp_path / name)


def test_a_folder_of_another_user(tmp_path):
    if os.geteuid() == 0:
        pytest.skip('root may read everything')
    (tmp_path / 'shut').mkdir()
    torch.save({}, tmp_path / 'shut' / 'w.pth')
    (tmp_path / 'shut').chmod(0)
    try:
        with pytest.raises(PermissionError, match='w.pth: you may not read this file'):
            check_weights_path(tmp_path / 'shut' / 'w.pth')
    finally:
        (tmp_path / 'shut').chmod(0o700)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'wrap',
    [
        lambda t, s: dict(w=t),
        lambda t, s: dict(meta=dict(hook=t), state_dict=s),
        lambda t, s: dict(model=s, args=t),
    ],
)
def test_code_is_refused_and_not_run(tmp_path, state, zipped, wrap):
    f, sprung = tmp_path / 'stranger.pth', tmp_path / 'sprung'
    torch.save(wrap(Trap(str(sprung)), state), f, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError,
        match='stranger.pth: holds more than tensors and could run code.*save only the tensors',
    ):
        load_state_dict_file(f)
    assert not sprung.exists()
    torch.load(f, weights_only=False)
    assert sprung.exists()  # the trap works


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    f, sprung = tmp_path / 'stranger.pth', tmp_path / 'sprung'
    for protocol in (2, 4):
        f.write_bytes(pickle.dumps(dict(weight=Trap(str(sprung))), protocol))
        with pytest.raises(ValueError, match='stranger.pth: holds more than tensors'):
            load_torch_file(f)
    f.write_bytes(pickle.dumps(Trap(str(sprung)), 0))  # text: does not even begin as a torch file
    with pytest.raises(ValueError, match='stranger.pth: not a torch file'):
        load_torch_file(f)
    assert not sprung.exists()


def test_a_whole_module_is_refused_and_named(tmp_path):
    torch.save(make(), tmp_path / 'm.pt')
    with pytest.raises(ValueError, match='m.pt: holds more than tensors.*torch.nn.modules') as e:
        load_torch_file(tmp_path / 'm.pt')
    assert (
        'add_safe_globals' not in str(e.value)
        and 'weights_only' not in str(e.value)
        and len(str(e.value)) < 500
    )  # torch's advice is not passed on


def test_a_numpy_number_is_let_in_and_is_no_way_in(tmp_path):
    "The numpy types that are let in build numbers; an object array inside one still is not read"
    nums = dict(a=np.float64(0.6885), b=np.int64(3), c=np.float32(0.5))
    torch.save(dict(meta=nums, state_dict=dict(w=torch.ones(1))), tmp_path / 'x.pth')
    assert load_state_dict_file(tmp_path / 'x.pth')[1] == nums

    class Number:
        def __reduce__(self):
            return np._core.multiarray.scalar, (np.dtype('O'), Trap(str(tmp_path / 'sprung')))

    torch.save(dict(meta=Number(), state_dict={}), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='could run code'):
        load_torch_file(tmp_path / 'x.pth')
    assert not (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_truncated_torch_files(tmp_path, zipped):
    buf = io.BytesIO()
    torch.save(dict(w=torch.zeros(100_000)), buf, _use_new_zipfile_serialization=zipped)
    data, f = buf.getvalue(), tmp_path / 'cut.pth'
    for n in (0, 3, 10, 60, 200, 300, 5000, len(data) // 2, len(data) - 100, len(data) - 5):
        f.write_bytes(data[:n])
        with pytest.raises(ValueError, match='cut.pth: (not a whole torch file|holds more)') as e:
            load_torch_file(f)
        if n >= 5000:
            assert (
                'not a whole torch file' in str(e.value)
                and f'{n:,} bytes' in str(e.value)
                and 'Fetch it again' in str(e.value)
            )


def test_what_was_never_a_torch_file(tmp_path):
    for text in (
        '<!DOCTYPE html><html>404</html>' * 50,
        'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n',
    ):
        (tmp_path / 'm.pth').write_text(text)
        with pytest.raises(
            ValueError,
            match=f"m.pth: not a torch file, it begins with b'{text[:12]}.*fetch it again",
        ):
            load_torch_file(tmp_path / 'm.pth')
    (tmp_path / 'm.safetensors').write_text('<!DOCTYPE html>' * 50)
    with pytest.raises(ValueError, match='m.safetensors: not a whole safetensors file'):
        load_state_dict_file(tmp_path / 'm.safetensors')


@pytest.mark.parametrize('cut', [0, 4, 20, -1, -500])
def test_truncated_safetensors(tmp_path, state, cut):
    f = tmp_path / 'w.safetensors'
    save_file(dict(state), f)
    f.write_bytes(f.read_bytes()[:cut])
    with pytest.raises(
        ValueError,
        match='w.safetensors: not a whole safetensors file .*bytes.; was the download cut off',
    ):
        read_safetensors(f)


def test_safetensors_metadata_is_in_order(tmp_path, state):
    save_file(dict(state), tmp_path / 'w.safetensors', dict(z='1', a='2', m='3'))
    got, meta = load_state_dict_file(tmp_path / 'w.safetensors')
    assert list(meta.items()) == [('a', '2'), ('m', '3'), ('z', '1')] and all(
        v.device.type == 'cpu' for v in got.values()
    )


# ---- unwrapping


@pytest.mark.parametrize(
    'wrapped',
    [
        lambda s: s,
        lambda s: dict(state_dict=s),
        lambda s: dict(model=s),
        lambda s: dict(module=s),
        lambda s: dict(teacher=s),
        lambda s: dict(
            model=s,
            optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))}, param_groups=[]),
            epoch=300,
            scaler={},
            max_accuracy=81.2,
        ),  # Swin
        lambda s: {
            'state_dict': s,
            'optimizer_states': [dict(state={0: torch.zeros(2)})],
            'epoch': 3,
            'hparams': {},
        },
    ],
)  # Lightning
def test_wrappings(tmp_path, state, wrapped):
    torch.save(wrapped(state), tmp_path / 'w.pth')
    got, meta = load_state_dict_file(tmp_path / 'w.pth')
    assert same(got, state) and meta == {}


def test_mmcv_keeps_its_meta(tmp_path, state):
    meta = dict(
        epoch=1,
        CLASSES=('a', 'b'),
        PALETTE=[[1, 2, 3], [4, 5, 6]],
        hook_msgs=dict(best_score=np.float64(0.6885)),
    )
    torch.save(
        dict(
            meta=meta,
            optimizer=dict(
                state={0: dict(step=1, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=6e-5)]
            ),
            state_dict=state,
        ),
        tmp_path / 'w.pth',
    )
    got, m = load_state_dict_file(tmp_path / 'w.pth')
    assert same(got, state) and m == meta
    assert extract_state_dict(dict(meta=None, state_dict=state))[1] == {}


@pytest.mark.parametrize(
    'obj,more',
    [
        (lambda s: dict(state_dict=s, state_dict_ema=s), 'state_dict_ema beside meta'),
        (lambda s: dict(student=s, teacher=s), 'student'),
        (lambda s: dict(model=s, model_ema=dict(module=s)), 'model_ema'),
        (lambda s: dict(model=s, bank=[torch.zeros(3)]), 'bank'),
        (lambda s: dict(state_dict=s, model=s), 'model'),
    ],
)
def test_two_networks_are_a_question(state, obj, more):
    with pytest.raises(ValueError, match=f'w.pth: unknown entries {more}.*which network is meant'):
        extract_state_dict(obj(state), 'w.pth')


@pytest.mark.parametrize(
    'obj,is_',
    [
        ([1, 2], 'list'),
        (torch.ones(3), 'Tensor'),
        ({}, 'an empty one'),
        (dict(lr=0.1), "float under 'lr'"),
        (dict(state_dict=dict(a=1)), "int under 'a'"),
        (dict(a=torch.ones(1), b=[torch.ones(1)]), "list under 'b'"),
        ({0: torch.ones(1)}, 'Tensor under 0'),
        (dict(state_dict={}), 'an empty one'),
        (dict(model='resnet'), 'str under'),
    ],
)
def test_anything_but_tensors_is_refused(tmp_path, obj, is_):
    torch.save(obj, tmp_path / 'm.pth')
    with pytest.raises(
        ValueError, match=f'm.pth: not a dictionary of tensors but {is_}.*save `net.state_dict'
    ):
        load_state_dict_file(tmp_path / 'm.pth')


# ---- one network of several


def test_every_known_prefix():
    parts = split_by_network(
        {
            f'{p}.w': torch.tensor(float(i))
            for i, p in enumerate(('model', 'ema_model', 'imnet_model', 'mic.teacher.ema_model'))
        }
    )
    assert {k: v['w'].item() for k, v in parts.items()} == dict(
        student=0, teacher=1, imagenet=2, mask_teacher=3
    )
    ddb = {
        f'{p}.w': torch.tensor(float(i))
        for i, p in enumerate(('stu_model', 'cu_model', 'ca_model'))
    }
    assert [select_network(ddb, k)['w'].item() for k in ('student', 'cu', 'ca')] == [0, 1, 2]


def test_one_network_errors(state):
    with pytest.raises(ValueError, match="unknown network 'studnet'; did you mean 'student'"):
        select_network(state, 'studnet')
    with pytest.raises(
        ValueError,
        match='w.pth: there is no teacher in it; it holds one network, which is taken as the student',
    ):
        select_network(state, 'teacher', 'w.pth')
    assert same(select_network(state), state)
    both = {f'ema_model.{k}': v for k, v in state.items()}
    with pytest.raises(ValueError, match='there is no student in it; it holds teacher'):
        select_network(both)
    with pytest.raises(
        ValueError, match=r'1 names belong to none of its networks \(teacher\): bank.feat'
    ):
        select_network(both | {'bank.feat': torch.zeros(3)}, 'teacher')


# ---- comparing


def test_key_diff_agrees_with_torch(state):
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Conv2d(4, 3, 1), nn.Linear(2, 2))
    diff = compare_state_dicts(other.state_dict(), state)
    shaped = {k: v for k, v in state.items() if not k.startswith('2.')}
    want = other.load_state_dict(shaped, strict=False)
    assert (
        diff['unexpected'] == want.unexpected_keys
        and [k for k in want.missing_keys if not k.startswith('2.')] == diff['missing']
    )
    assert [m.split()[0] for m in diff['mismatching']] == ['2.weight', '2.bias'] and list(diff) == [
        'missing',
        'unexpected',
        'mismatching',
    ]


def test_key_diff_finds_nothing_where_nothing_is(state):
    assert (
        compare_state_dicts(state, state)
        == {}
        == compare_state_dicts(dict(state), make(1).state_dict())
        and format_key_diff({}) == []
    )
    assert compare_state_dicts(dict(n=torch.tensor(1)), dict(n=torch.ones(1, 2))) == dict(
        mismatching=['n (1x2 in the file, scalar in the network)']
    )


def test_five_names_of_a_kind_are_enough():
    diff = compare_state_dicts({}, {f'k{i}': torch.ones(1) for i in range(9)})
    assert (
        format_key_diff(diff) == ['9 unexpected: k0, k1, k2, k3, k4, …']
        and len(diff['unexpected']) == 9
    )
    assert format_key_diff(compare_state_dicts({f'k{i}': torch.ones(1) for i in range(5)}, {})) == [
        '5 missing: k0, k1, k2, k3, k4'
    ]
