"""What a user writes as `recompute=`: an objective, a block size, or blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mhc_compile.errors import ConfigError, check_choice
from mhc_compile.scheduler.evaluate_blocks import evaluate_blocks
from mhc_compile.scheduler.objectives import OBJECTIVES
from mhc_compile.scheduler.recompute_plan import RecomputePlan
from mhc_compile.scheduler.solve_recompute import solve_recompute

Recompute = str | int | tuple[int, ...]
CHOICES = ("off", *OBJECTIVES)


@dataclass(frozen=True)
class Sizes:
    """What the sublayers of one stream need in a model, in bytes.

    Attributes:
        streams: n.
        unit: of one stream, C x tokens x itemsize.
        kept: of each sublayer, what F keeps, its result and the connection's maps included.
        head: what is held when the backward starts, the head and the loss.
        transient: what the backward rebuilds of a sublayer while its block is in work.
        embedding: what is kept in place of x_0.
        gradients: of each sublayer, what the gradients of its weights need.
        flowing: what is held besides while a block is in work.
    """

    streams: int
    unit: int
    kept: tuple[int, ...]
    head: int
    transient: int
    embedding: int
    gradients: tuple[int, ...]
    flowing: int

    @property
    def layers(self) -> int:
        """The number of sublayers."""
        return len(self.kept)


@dataclass(frozen=True)
class Choice:
    """The blocks of one stream.

    Attributes:
        plan: how they were chosen; for "paper" by Eq. 20, which knows of no other sizes than C.
        sizes: the model's own.
    """

    plan: RecomputePlan
    sizes: Sizes

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sublayers of each block."""
        return self.plan.block_sizes

    @cached_property
    def memory(self) -> RecomputePlan | None:
        """The same blocks with the model's own sizes, in bytes; its `peak` is the prediction.

        None as long as it is not known what F keeps.
        """
        sizes = self.sizes
        if not any(sizes.kept):
            return None
        return evaluate_blocks(
            self.block_sizes, sizes.layers, sizes.streams, hidden=sizes.unit,
            objective="timeline", **_multiples(sizes),
        )  # fmt: skip


def check_recompute(value: Any, memory_budget: Any) -> Recompute:
    """Checks the two and returns the first, a list as a tuple.

    Raises:
        ConfigError: one of them makes no sense, or they do not belong together.
    """
    value = tuple(value) if isinstance(value, list) else value
    sizes = value if isinstance(value, tuple) else (value,)
    if isinstance(value, str):
        check_choice("recompute", value, CHOICES)
    elif not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise ConfigError(
            f"recompute must be one of {', '.join(map(repr, CHOICES))}, a block size of at least "
            f"1 or a tuple of them, got {value!r}"
        )
    wrong = isinstance(memory_budget, bool) or not isinstance(memory_budget, int)
    if memory_budget is not None and (wrong or memory_budget < 1):
        raise ConfigError(
            f"memory_budget must be a number of bytes, at least 1, got {memory_budget!r}"
        )
    if (value == "budget") != (memory_budget is not None):
        raise ConfigError(
            "recompute='budget' and memory_budget=BYTES belong together: got "
            f"recompute={value!r} and memory_budget={memory_budget!r}"
        )
    chosen: Recompute = value
    return chosen


def choose_plan(recompute: Recompute, sizes: Sizes, memory_budget: int | None = None) -> Choice:
    """Chooses the blocks of a stream.

    Args:
        recompute: what `check_recompute` returned, not "off".
        sizes: of the stream's sublayers.
        memory_budget: for "budget".

    Raises:
        ConfigError: given blocks do not sum to the number of sublayers.
        MemoryBudgetError: the budget is too low.
    """
    layers, n, unit = sizes.layers, sizes.streams, sizes.unit
    if recompute == "paper":
        plan = solve_recompute(layers, n, hidden=unit)
    elif isinstance(recompute, str):
        plan = solve_recompute(
            layers, n, hidden=unit, objective=recompute, memory_budget=memory_budget,
            **_multiples(sizes),
        )  # fmt: skip
    else:
        plan = evaluate_blocks(recompute, layers, n, hidden=unit)
    return Choice(plan, sizes)


def _multiples(sizes: Sizes) -> dict[str, Any]:
    """Sizes as the solver takes them, in multiples of `hidden`."""
    unit = sizes.unit
    return {
        "transient": sizes.transient / unit, "kept": [kept / unit for kept in sizes.kept],
        "head": sizes.head / unit, "embedding": sizes.embedding / unit,
        "gradients": [size / unit for size in sizes.gradients], "flowing": sizes.flowing / unit,
    }  # fmt: skip
