"What every test shares: the environment of a smoke run, and where data and golden numbers lie"

import os

os.environ |= dict(NO_ALBUMENTATIONS_UPDATE='1', MPLBACKEND='Agg')
os.environ.setdefault(
    'HF_HUB_OFFLINE', '1'
)  # tests bring their weights along; without it a machine off the net tries the hub for 20 s
os.environ.setdefault(
    'OMP_NUM_THREADS', '1'
)  # before torch is imported: pytest runs two workers on two cores

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, so that a red run can be repeated; `UDANB_EXPLORE=1 make test` looks for new ones
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
    "Real images beside the project, where they are at hand"
    path = ROOT.parent / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip('needs ../shared/data')
    return path


@pytest.fixture(autouse=True)
def state_stays():
    "A test that leaves torch's global switches turned breaks others far away: here it is named"
    yield
    import torch

    left = [
        n
        for n, on in (
            ('autocast', torch.is_autocast_enabled('cpu')),
            ('no_grad', not torch.is_grad_enabled()),
            ('double', torch.get_default_dtype() != torch.float32),
        )
        if on
    ]
    torch.set_autocast_enabled('cpu', False)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert not left, left
