"Every family of encoders with every head, and in HRDA: one tester for what a segmentor must do, whatever it is made of"

import copy

import pytest
import torch
from test_backbones import TINY, tiny

from udanb.checkpoints.weights import load_weights_into, save_weights
from udanb.core.types import Sample
from udanb.core.utils import seed_all
from udanb.models.heads import HEADS
from udanb.models.hrda import HRDA
from udanb.models.segmentor import Segmentor, param_groups
from udanb.training.losses import WeightedCrossEntropy, wrap_logit_loss

FAMILIES = [f for f in TINY if f != 'eva02_l']


def make(family, head, seed=0):
    seed_all(seed)
    enc = tiny(family)
    return Segmentor(enc, HEADS[head](enc.channels, 5, dim=8))


def sample(img):
    return Sample(img, torch.arange(img[:, 0].numel()).view(img[:, 0].shape) % 5)


def loss(net, x):
    return sum(
        c.w * c(out, x)
        for out in [net(x.img)]
        for c in wrap_logit_loss(net, WeightedCrossEntropy())
    )


def held_to(new, size, tmp_path):
    "Forward, backward and a step, a single odd-sized image, a copy, a file, half precision"
    net, x = new(0).train(), sample(torch.randn(2, 3, *size))
    opt = torch.optim.AdamW(param_groups(net, 1e-3))
    first = loss(net, x)
    first.backward()
    unused = [k for k, p in net.named_parameters() if p.grad is None]
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    opt.step()
    opt.zero_grad()
    net.eval()
    with torch.no_grad():
        one = x.img[:1, :, :, : size[1] - 7]  # odd width, batch of one
        whole = net(one)
        assert (
            whole.logits.shape[:2] == (1, 5)
            and whole.logits.isfinite().all()
            and net(one).logits.equal(whole.logits)
        )
        other = new(1)
        load_weights_into(other, save_weights(tmp_path / 'net.safetensors', net))
        for twin in (copy.deepcopy(net), other):
            assert twin.eval()(one).logits.equal(whole.logits)
    net.train()
    with torch.autocast('cpu', torch.bfloat16):
        half = loss(net, x)
    half.backward()
    assert (
        first.isfinite()
        and half.isfinite()
        and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    )
    assert loss(net, x).isfinite()
    return unused


UNUSED = (
    'fcn',
    'dlv2',
    'dlv2_adapter',
)  # they look at the last map only, so norms and pyramid of the others stay


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('family', FAMILIES)
def test_encoder_and_head(family, head, tmp_path):
    unused = held_to(lambda s: make(family, head, s), (64, 96), tmp_path)
    known = (
        'backbone.body.norms.',
        'backbone.body.pyramid.',
        'backbone.body.norm',
        'backbone.body.net.norm',
    )
    if head in UNUSED:
        assert all(k.startswith(known) for k in unused), unused
    else:
        assert not unused


@pytest.mark.parametrize('family', [f for f in FAMILIES if 'os8' not in f])
def test_encoder_in_hrda(family, tmp_path):
    assert not held_to(
        lambda s: HRDA(make(family, 'daformer', s), crop=64, dim=8), (128, 128), tmp_path
    )
