"""Which sublayers are MLPs, by what they compute; names and classes say nothing."""

import pytest
import torch
from fake_streams import fake_streams
from models import ARCHITECTURES, WIDTH, perturb
from torch import nn
from torch.nn import functional as F

import mhc_compile as mc
from mhc_compile.runtime.high_priority import high_priority

HEADS = 2


class A(nn.Module):
    """An MLP, gated."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        gate, up = self.a(x).chunk(2, -1)
        return self.b(F.silu(gate) * up)


class B(nn.Module):
    """An attention; `weigh` makes its scores to weights, None is torch's own."""

    def __init__(self, weigh=None):
        super().__init__()
        self.a, self.b, self.weigh = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), weigh

    def forward(self, x):
        q, k, v = self.a(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.weigh is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = self.weigh(q @ k.transpose(-1, -2)) @ v
        return self.b(y.transpose(1, 2).flatten(2))


class Linear(nn.Module):
    """A linear attention, which has no scores."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.a(x).chunk(3, -1)
        return F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v)


class Experts(nn.Module):
    """A mixture of experts whose router's softmax scales, and chooses among stacked weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH))

    def forward(self, x):
        weights, chosen = self.a(x).softmax(-1).topk(2, -1)
        parts = torch.matmul(x[..., None, None, :], self.b[chosen]).squeeze(-2)
        return (weights[..., None] * parts).sum(-2)


class LowRank(nn.Module):
    """A weight that is computed of parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 4)), nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x):
        return x @ (self.a @ self.b).softmax(-1)


class X(nn.Module):
    """A block of these sublayers, each around a residual, or all in one."""

    def __init__(self, *parts, parallel=False):
        super().__init__()
        self.c, self.parallel = nn.ModuleList(parts), parallel
        self.d = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in parts)

    def forward(self, x):
        if self.parallel:
            return x + self.c[0](self.d[0](x)) + self.c[1](self.d[1](x))
        for part, norm in zip(self.c, self.d, strict=True):
            x = x + part(norm(x))
        return x


def by_hand(scores):
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


BLOCKS = {
    "attention, MLP": (lambda: X(B(), A()), "own high"),
    "MLP, attention": (lambda: X(A(), B()), "high own"),
    "two MLPs": (lambda: X(B(), A(), A()), "own high high"),
    "parallel": (lambda: X(B(), A(), parallel=True), "own"),
    "parallel MLPs": (lambda: X(A(), A(), parallel=True), "high"),
    "softmax": (lambda: X(B(lambda scores: scores.softmax(-1)), A()), "own high"),
    "sigmoid": (lambda: X(B(torch.sigmoid), A()), "own high"),
    "softmax by hand": (lambda: X(B(by_hand), A()), "own high"),
    "linear attention": (lambda: X(Linear(), A()), "own high"),
    "experts": (lambda: X(B(), Experts()), "own high"),
    "low rank": (lambda: X(B(), LowRank()), "own high"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_merges_after_mlps_have_high_priority(name):
    make, wanted = BLOCKS[name]
    x = torch.randn(2, 6, WIDTH)
    model = perturb(mc.transform(nn.Sequential(make(), make()), streams=2, example_inputs=(x,)))
    plain = model(x)
    with fake_streams() as (stream, log), high_priority(stream):
        out = model(x)
    places = [line.removeprefix("post_res on ") for line in log if line.startswith("post_res")]
    assert places == 2 * wanted.split()
    assert torch.equal(out, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_libraries(name):
    architecture = ARCHITECTURES[name]
    for site in mc.find_residuals(architecture.build(), architecture.inputs()):
        assert site.mlp == ("att" not in site.name.rsplit(".", 1)[-1].lower()), site.name
