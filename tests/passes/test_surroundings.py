"""The hooks around streams that start in one module and end in another."""

import torch
from models import normal
from torch import nn

import mhc_compile as mc


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(self.norm(x)).tanh()


class Stage(nn.Module):
    """One stream ends in it, another starts and goes on in the next stage."""

    def __init__(self, width):
        super().__init__()
        self.before, self.merge = Residual(width), nn.Linear(width, width)
        self.behind = Residual(width)

    def forward(self, x):
        return self.behind(self.merge(self.before(x)))


def test_a_stream_may_leave_a_module_that_holds_another_one():
    model, x = nn.Sequential(Stage(16), Stage(16)), normal(2, 5, 16)
    with torch.no_grad():
        before = model(x)
    streams = [site.stream for site in mc.find_residuals(model, (x,))]
    assert streams == [0, 1, 1, 2]  # the second `before` continues the first `behind`
    mc.transform(model, streams=3, example_inputs=(x,))
    assert torch.allclose(model(x), before, atol=1e-5)
    model(x).square().mean().backward()
    assert all(p.grad is not None for _, p in mc.mhc_parameters(model))
