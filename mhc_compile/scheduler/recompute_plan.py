"""`RecomputePlan`: which sublayers are recomputed together, and what that takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import sympy
from tabulate import tabulate

PLAN_VERSION = 1
Number = int | float
_COSTS = {
    "paper": "boundaries and the largest block, Eq. 20",
    "timeline": "true peak",
    "budget": "steps recomputed",
}


@dataclass(frozen=True)
class StagePlan:
    """The blocks of one pipeline stage and its memory when that is largest.

    Attributes:
        stage: its number, 0 for the first.
        in_flight: m, microbatches that hold their activations at the same time.
        block_sizes: sublayers of each block.
        block_size: of the largest block.
        ties: every size that the largest block of an equally good choice can have; empty where
            the blocks were given.
        continuous: Eq. 20's minimiser over the real numbers.
        cost: the objective of this stage.
        peak: the true peak; the five parts below are its sum.
        peak_at: "head", the end of the forward, or "block b" while block b is recomputed.
        boundaries: at the peak, the states x_l0 of the blocks.
        kept: at the peak, what F keeps.
        transient: at the peak, what is recomputed of the block in work.
        head: at the peak, the head's part.
        gradients: at the peak, those of weights and what else flows.
    """

    stage: int
    in_flight: int
    block_sizes: tuple[int, ...]
    block_size: int
    ties: tuple[int, ...]
    continuous: float
    cost: Number
    peak: Number
    peak_at: str
    boundaries: Number
    kept: Number
    transient: Number
    head: Number
    gradients: Number

    @property
    def layers(self) -> int:
        """Sublayers of the stage."""
        return sum(self.block_sizes)

    @property
    def recompute_pre(self) -> int:
        """How often the backward of a microbatch recomputes pre and the norm: in each sublayer."""
        return self.layers

    @property
    def recompute_post(self) -> int:
        """How often it recomputes post and res: not in a block's last sublayer."""
        return self.layers - len(self.block_sizes)


@dataclass(frozen=True)
class RecomputePlan:
    """Blocks of sublayers that keep one state x_l0 each; `str` gives tables.

    Sizes are in units of `hidden` x tokens x itemsize times `hidden`: with hidden=1 in C a token,
    with hidden = C x tokens x itemsize in bytes.

    Attributes:
        objective: "paper", "timeline" or "budget".
        streams: n.
        hidden: the size of one stream.
        block_sizes: of all stages, in the order of the sublayers.
        block_size: L_r, the largest block of the stage that decides `cost`.
        ties: every L_r that an equally good choice for that stage can have, `block_size` among
            them; empty where the blocks were given.
        cost: the objective: memory of the stage that needs most, or `recompute_ops` for "budget".
        continuous: Eq. 20's minimiser over the real numbers, for that stage.
        expression: the same in symbols.
        peak: the true peak of the stage where it is largest.
        recompute_ops: pre (with its norm) and post steps that the backward of one microbatch
            recomputes, all stages together; F is never run again.
        stages: see `StagePlan`.
    """

    objective: str
    streams: int
    hidden: Number
    block_sizes: tuple[int, ...]
    block_size: int
    ties: tuple[int, ...]
    cost: Number
    continuous: float
    expression: sympy.Expr
    peak: Number
    recompute_ops: int
    stages: tuple[StagePlan, ...]

    @property
    def recompute_pre(self) -> int:
        """`StagePlan.recompute_pre` of all stages."""
        return sum(stage.recompute_pre for stage in self.stages)

    @property
    def recompute_post(self) -> int:
        """`StagePlan.recompute_post` of all stages."""
        return sum(stage.recompute_post for stage in self.stages)

    def __str__(self) -> str:
        chosen = tabulate(
            [[s.stage, s.layers, s.in_flight, self.objective, self.expression,
              f"{s.continuous:.2f}", s.block_size, ", ".join(map(str, s.ties)) or "given",
              runs(s.block_sizes), s.cost] for s in self.stages],
            ["stage", "sublayers", "in flight", "objective", "Eq. 20's r*", "value", "L_r",
             "ties", "blocks", "cost"],
            disable_numparse=True,
        )  # fmt: skip
        memory = tabulate(
            [[s.stage, s.peak_at, s.boundaries, s.kept, s.transient, s.head, s.gradients, s.peak,
              "not measured"] for s in self.stages],
            ["stage", "peak at", "boundaries", "F kept", "transient", "head", "gradients", "peak",
             "measured"],
            disable_numparse=True,
        )  # fmt: skip
        return (
            f"{chosen}\n\n"
            f"Memory of a stage when it is largest, by the model (hidden = {self.hidden:g}):\n"
            f"{memory}\n\n"
            f"Cost {self.cost} ({_COSTS[self.objective]}), peak {self.peak}. The backward of a "
            f"microbatch recomputes {self.recompute_pre} pre and {self.recompute_post} post, no F."
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict with the format's version; what was not measured is None."""
        fields = asdict(self) | {"expression": str(self.expression)}
        for row, stage in zip(fields["stages"], self.stages, strict=True):
            row |= {"layers": stage.layers, "recompute_pre": stage.recompute_pre}
            row |= {"recompute_post": stage.recompute_post, "measured": None}
        return json.loads(json.dumps({"version": PLAN_VERSION, **fields}))

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=1)


def runs(sizes: tuple[int, ...]) -> str:
    """Sizes as text, equal neighbours together.

    Example:
        >>> runs((8, 3, 3, 1))
        '8, 2 x 3, 1'
    """
    counted = [(size, len(list(group))) for size, group in groupby(sizes)]
    return ", ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in counted)
