"""The objectives that blocks are chosen by, in the one form that the search understands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from mhc_compile.scheduler.stages import Stage

Array = np.ndarray[Any, Any]
OBJECTIVES = ("paper", "timeline", "budget")


@dataclass(frozen=True)
class BlockModel:
    """Memory of K blocks whose largest term is V: fixed + rate K + max(floor + step K, V).

    The term of block b, sublayers i to j - 1, is step (b + 1) + ends[j] - sums[i]. It grows with b
    and j and falls with i, which is all that the search relies on.

    Attributes:
        sums: transient of the sublayers before i, [layers + 1].
        ends: the same and, where they count, what those sublayers keep and what the gradients of
            the others have added, [layers + 1]; never falling.
        step: what one more block in front of it adds to a block's term.
        rate: what a block costs wherever it is.
        fixed: what does not depend on the blocks.
        floor: a moment at which no block is in work.
    """

    sums: tuple[int, ...]
    ends: tuple[int, ...]
    step: int
    rate: int
    fixed: int
    floor: int

    @property
    def layers(self) -> int:
        """Sublayers of the stage."""
        return len(self.sums) - 1

    @property
    def highest_term(self) -> int:
        """No block's term is larger."""
        return self.ends[-1] + self.step * self.layers

    def cost(self, blocks: int, term: int) -> int:
        """The objective of `blocks` blocks whose largest term is `term`."""
        moment = max(self.floor + self.step * blocks, term)
        return self.fixed + self.rate * blocks + moment

    def largest_term(self, blocks: int, cost: int) -> int | None:
        """What the blocks' terms may be for a cost of at most `cost`; None if it is too low."""
        term = cost - self.fixed - self.rate * blocks
        if term < self.floor + self.step * blocks:
            return None
        return min(term, self.highest_term)

    @cached_property
    def arrays(self) -> tuple[Array, Array, Array]:
        """`sums`, `ends` and, for b = 0 to layers, step (b + 1): what V is compared with."""
        # Python's integers where 64 bits might not do
        dtype = np.int64 if self.highest_term + self.step < 2**61 else np.object_
        steps = [self.step * (b + 1) for b in range(self.layers + 1)]
        return np.array(self.sums, dtype), np.array(self.ends, dtype), np.array(steps, dtype)


def paper_model(stage: Stage) -> BlockModel:
    """Eq. 20 with m microbatches and unequal sublayers: m X K + max over blocks of sum T."""
    sums = tuple(accumulate(stage.transient, initial=0))
    return BlockModel(sums, sums, 0, stage.in_flight * stage.boundary, 0, 0)


def timeline_model(stage: Stage) -> BlockModel:
    """The true peak: the largest of `timeline.moments`."""
    waiting = stage.in_flight - 1
    sums = tuple(accumulate(stage.transient, initial=0))
    kept = tuple(accumulate(stage.kept, initial=0))
    ends = tuple(a + t + g for a, t, g in zip(kept, sums, stage.added, strict=True))
    fixed = waiting * kept[-1] - stage.in_flight * stage.spared
    rate = waiting * stage.boundary
    return BlockModel(sums, ends, stage.boundary, rate, fixed, kept[-1] + stage.head)


def paper_cost(stage: Stage, sizes: Sequence[int]) -> int:
    """The objective "paper" of given blocks: m X K + max over blocks of sum T."""
    ends = list(accumulate(sizes))
    work = [sum(stage.transient[e - s : e]) for s, e in zip(sizes, ends, strict=True)]
    return stage.in_flight * stage.boundary * len(sizes) + max(work)
