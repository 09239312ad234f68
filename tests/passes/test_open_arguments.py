"""Arguments that a block only hands on: no new trace when None becomes something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import WIDTH, normal
from torch import nn

import mhc_compile as mc
from mhc_compile.passes import open_arguments
from mhc_compile.passes.install_blocks import rewrite_of
from mhc_compile.passes.open_arguments import find_open_arguments


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


class Looks(nn.Module):
    """Hands its mask on; `look` is a function of its own, of which no guard can tell."""

    def __init__(self, look: Callable[..., torch.Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.branch, self.look, self.scale = Branch(), look, scale

    def forward(self, x, mask=None, cache=None):
        return self.look(x + self.branch(x, mask, cache) * self.scale, mask)


def leave(x: torch.Tensor, mask: object) -> torch.Tensor:
    return x


def ask(x: torch.Tensor, mask: object) -> torch.Tensor:
    return x if mask is None else x * 2


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """The arguments that each trace had open."""
    seen: list[frozenset[str]] = []
    trace_block = open_arguments.trace_block

    def traced(*args, **kwargs):
        seen.append(args[6] if len(args) > 6 else frozenset())
        return trace_block(*args, **kwargs)

    monkeypatch.setattr(open_arguments, "trace_block", traced)
    monkeypatch.setattr(open_arguments, "_found", {})
    return seen


def found(block: Looks) -> frozenset[str]:
    given = (normal(2, 3, WIDTH), None, None)
    return find_open_arguments(block, Looks.forward, given, {}, frozenset())


def test_blocks_alike_are_confirmed_by_one_trace(traces) -> None:
    both = frozenset({"mask", "cache"})
    assert found(Looks(leave)) == found(Looks(leave)) == both
    assert traces == [frozenset(), both] * 2
    traces.clear()
    assert found(Looks(ask)) == found(Looks(ask)) == frozenset({"cache"})
    alone = [frozenset({"mask"}), frozenset({"cache"})]
    assert sorted(traces[:5], key=sorted) == sorted([frozenset(), both, both, *alone], key=sorted)


def test_what_the_last_block_hands_on_is_not_taken_for_granted(traces) -> None:
    wanted = {leave: {"mask", "cache"}, ask: {"cache"}}
    for number, look in enumerate((leave, ask, leave, ask)):
        assert found(Looks(look, scale=1.0 + number)) == wanted[look]
    assert found(Looks(leave)) == wanted[leave]
    traces.clear()
    assert found(Looks(ask)) == wanted[ask]  # nothing but the trace with both open tells
    assert len(traces) == 5
