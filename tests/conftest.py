"Fixtures of all tests: the environment of a smoke run, folders of data and golden numbers"

import os

os.environ |= dict(NO_ALBUMENTATIONS_UPDATE='1', MPLBACKEND='Agg')
# Tests bring their weights along; without this a machine without network tries the hub for 20 s
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Before torch is imported: pytest runs two workers on two cores
os.environ.setdefault('OMP_NUM_THREADS', '1')

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, so that a failure can be repeated; `UDANB_EXPLORE=1 make test` looks for new ones
settings.register_profile('same', derandomize=True, deadline=None)
if not os.environ.get('UDANB_EXPLORE'):
    settings.load_profile('same')

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def golden():
    return ROOT / 'tests' / 'golden'


@pytest.fixture(scope='session')
def shared_data():
    "Folder of real images beside the project; without it the test is skipped"
    path = ROOT.parent / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('needs ../shared/data')
    return path


@pytest.fixture(autouse=True)
def state_stays():
    "Fail a test that leaves a global switch of torch changed, which would break other tests"
    yield
    import torch

    switches = dict(
        autocast=torch.is_autocast_enabled('cpu'),
        no_grad=not torch.is_grad_enabled(),
        double=torch.get_default_dtype() != torch.float32,
    )
    left = [name for name, changed in switches.items() if changed]
    torch.set_autocast_enabled('cpu', False)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert not left, left
