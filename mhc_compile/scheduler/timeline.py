"""The memory of one stage over time: where its peak lies and what it consists of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mhc_compile.scheduler.stages import Stage


@dataclass(frozen=True)
class Moment:
    """What a stage holds at one moment, all microbatches together.

    Attributes:
        at: "head", the end of the forward, or "block b" while block b is recomputed.
        boundaries: states x_l0 of blocks whose backward is not done.
        kept: what F keeps in sublayers whose backward is not done.
        transient: what is recomputed of the block in work.
        head: the head's part.
        gradients: those of weights, and what else flows.
    """

    at: str
    boundaries: int
    kept: int
    transient: int
    head: int
    gradients: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.boundaries + self.kept + self.transient + self.head + self.gradients


def moments(stage: Stage, sizes: Sequence[int]) -> Iterator[Moment]:
    """Every moment that can be the peak, in time's order.

    One microbatch is in its backward while m - 1 hold everything. With X = n, A what F keeps and
    T what is recomputed, it holds X K + sum A + H at the end of the forward, and
    X (b + 1) + A[up to the end of b] + T(b) + G[behind b] + flowing while block b of K is in work:
    the backward has freed the blocks behind b by then, and added their weights' gradients G.

    Args:
        stage: the stage.
        sizes: its blocks, in sublayers.
    """
    X, waiting = stage.boundary, stage.in_flight - 1
    ends = list(accumulate(sizes))
    others = waiting * X * len(sizes) - stage.in_flight * stage.spared
    kept = [0, *accumulate(stage.kept)]
    held, added = waiting * kept[-1], stage.added
    yield Moment("head", others + X * len(sizes), held + kept[-1], 0, stage.head, 0)
    for b in reversed(range(len(sizes))):
        end = ends[b]
        work = sum(stage.transient[end - sizes[b] : end])
        yield Moment(f"block {b}", others + X * (b + 1), held + kept[end], work, 0, added[end])


def peak_moment(stage: Stage, sizes: Sequence[int]) -> Moment:
    """The moment of the largest total, the first of several."""
    return max(moments(stage, sizes), key=lambda moment: moment.total)
