"What every head is held to, whatever feature maps it is given"

import copy
import io

import torch

from udanb.core.utils import seed_all

GRIDS = [
    ((16, 24), (8, 12), (4, 6), (2, 3)),
    ((19, 13), (10, 7), (5, 4), (3, 2)),
]  # of a 64×96 and a 73×51 image


def maps(channels, grids, batch=2, seed=0, dtype=torch.float32):
    "Random feature maps that want gradients"
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, *s, generator=g, dtype=dtype).requires_grad_()
        for c, s in zip(channels, grids)
    ]


def made(new, channels, n=5, dim=8, seed=0):
    seed_all(seed)
    return new(channels, n, dim=dim)


def check_shapes_and_gradients(new, channels, grids, level, used):
    "Forward and backward in training mode; `level`: which map's grid the logits have, `used`: maps with a gradient"
    head, fs = made(new, channels), maps(channels, grids)
    logits, fused, *aux = head(fs)
    assert (
        logits.shape == (2, 5, *grids[level])
        and fused.shape == (2, head.ch, *grids[level])
        and head.n_classes == 5
    )
    (logits.square().mean() + sum(v.square().mean() for a in aux for v in a.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert [f.grad is not None and bool(f.grad.any()) for f in fs] == [i in used for i in range(4)]


def check_single_image(new, channels, grids):
    "In evaluation mode an image's answer does not depend on its neighbours, and asking twice changes nothing"
    head, fs = made(new, channels).eval(), maps(channels, grids)
    with torch.no_grad():
        both, one = head(fs)[0], head([f[1:] for f in fs])[0]
        torch.testing.assert_close(both[1:], one, rtol=1e-5, atol=1e-6)
        assert head(fs)[0].equal(both)


def check_save_and_load(new, channels, grids):
    "A state dict through a file, and a deep copy, are the same network; the original may be changed"
    head, fs = made(new, channels), maps(channels, grids)
    head(fs)  # running statistics of its own
    f = io.BytesIO()
    torch.save(head.state_dict(), f)
    f.seek(0)
    twin = copy.deepcopy(head).eval()
    other = made(new, channels, seed=1).eval()
    before = head.eval()(fs)[0]
    assert not other(fs)[0].equal(before)
    other.load_state_dict(torch.load(f, weights_only=True))
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    assert (
        twin(fs)[0].equal(before) and other(fs)[0].equal(before) and not head(fs)[0].equal(before)
    )


def check_autocast(new, channels, grids):
    "bfloat16 autocast: finite, gradients in float32, near the float32 answer"
    head, fs = made(new, channels).eval(), maps(channels, grids)
    ref = head(fs)[0].detach()
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(fs)[0]
    logits.float().square().mean().backward()
    assert logits.isfinite().all() and all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in head.parameters()
        if p.grad is not None
    )
    assert (logits.float() - ref).norm() < 0.05 * ref.norm()
    head.train()
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(fs)[0]
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def fixed(head):
    "Weights that no random generator makes: a cosine of each tensor's index"
    with torch.no_grad():
        for i, (k, p) in enumerate(sorted(head.named_parameters())):
            v = torch.cos(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + i)
            p.copy_(
                (
                    1 + 0.1 * v if k.endswith('bn.weight') else v / max(p[0].numel(), 1) ** 0.5
                ).view_as(p)
            )
    return head.eval()


def pin(new, channels, grids):
    "Mean, spread and a corner of the logits for fixed weights and fixed maps, rounded"
    fs = [
        torch.sin(torch.arange(2 * c * h * w, dtype=torch.float64) * 0.3 + i)
        .view(2, c, h, w)
        .float()
        for i, (c, (h, w)) in enumerate(zip(channels, grids))
    ]
    with torch.no_grad():
        x = fixed(made(new, channels))(fs)[0]
    return [
        round(v, 4)
        for v in (x.mean().item(), x.std().item(), x[0, 0, 0, 0].item(), x[1, 4, -1, -1].item())
    ]
