"""Arguments that a block only hands on: no new trace when None becomes something else."""

from __future__ import annotations

import torch
from models import WIDTH, normal
from torch import nn

import mhc_compile as mc
from mhc_compile.passes.install_blocks import rewrite_of


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, scale=None, cache=None):
        if cache is not None:
            cache.append(x)
        y = self.linear(x)
        return y if scale is None else y * scale


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), Branch()

    def forward(self, x, scale=None, cache=None, flag=None):
        return x + self.branch(self.norm(x), scale, cache=cache)


class Decides(HandsOn):
    def forward(self, x, scale=None, cache=None, flag=None):
        f = self.branch(self.norm(x))
        if scale is not None:
            f = f * scale
        if isinstance(cache, list):
            f = f + 0.5
        return x + f


def reference(block: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
    """What the plain block of the same weights gives."""
    original = type(block).__mro__[1]
    plain = original()
    plain.load_state_dict(block.state_dict(), strict=False)
    return plain.eval()(x, **kwargs)


def count(block: nn.Module) -> int:
    rewrite = rewrite_of(block)
    assert rewrite is not None
    return sum(map(len, rewrite.variants.values()))


def test_handing_on_needs_no_new_trace() -> None:
    block = mc.transform(
        HandsOn().eval(), example_inputs=(normal(2, 4, WIDTH), None, None), streams=2
    )
    x, scale, cache = normal(3, 5, WIDTH), torch.randn(WIDTH), []
    torch.testing.assert_close(block(x, scale, cache), reference(block, x, scale=scale))
    assert len(cache) == 1 and cache[0].shape == x.shape
    torch.testing.assert_close(block(x, None, None), reference(block, x))
    assert count(block) == 2  # training and evaluation
    torch.testing.assert_close(block(x, flag=True), reference(block, x))


def test_a_branch_on_none_or_on_the_type_is_a_new_trace() -> None:
    x, scale = normal(3, 5, WIDTH), torch.randn(WIDTH)
    block = mc.transform(
        Decides().eval(), example_inputs=(normal(2, 4, WIDTH), None, None), streams=2
    )
    torch.testing.assert_close(block(x, scale, None), reference(block, x, scale=scale))
    torch.testing.assert_close(block(x, None, [1]), reference(block, x, cache=[1]))
    torch.testing.assert_close(block(x, scale, [1]), reference(block, x, scale=scale, cache=[1]))
    assert count(block) == 5
