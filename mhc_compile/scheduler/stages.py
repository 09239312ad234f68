"""The sublayers of each pipeline stage and what they keep, as whole numbers of one unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from mhc_compile.errors import ConfigError
from mhc_compile.scheduler.check_arguments import (
    as_integer,
    as_sequence,
    as_size,
    as_sizes,
    check_length,
)

MAX_LAYERS = 100_000


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: sizes in a unit in which all of them are integers.

    Attributes:
        boundary: n, the state x_l0 that each block keeps.
        transient: of each sublayer, what the backward of its block recomputes.
        kept: of each sublayer, what F keeps.
        in_flight: m, microbatches that hold their activations at the same time.
        head: held when the backward starts: the head and the loss, on the last stage.
        spared: what the first boundary needs less than `boundary`, of each microbatch: x_0 of the
            first stage may be recomputed from the embedding.
        gradients: of each sublayer, what its weights' gradients add as the backward passes it.
        flowing: what is held besides while a block is in work.
    """

    boundary: int
    transient: tuple[int, ...]
    kept: tuple[int, ...]
    in_flight: int
    head: int = 0
    spared: int = 0
    gradients: tuple[int, ...] = ()
    flowing: int = 0

    @property
    def added(self) -> tuple[int, ...]:
        """What gradients are there while a block that ends at 0 to L is in work, `[layers + 1]`."""
        each = self.gradients or (0,) * len(self.kept)
        return tuple(accumulate(each[::-1], initial=self.flowing))[::-1]


@dataclass(frozen=True)
class Problem:
    """All stages, and the way back from their integers to the caller's unit.

    Attributes:
        layers: L, all sublayers.
        streams: n.
        hidden: the caller's size of one stream.
        given_transient: whether `transient` was given and n + 2 does not hold.
        stages: see `Stage`.
        unit: the caller's unit over the integers' unit.
    """

    layers: int
    streams: int
    hidden: int | Fraction
    given_transient: bool
    stages: tuple[Stage, ...]
    unit: Fraction

    def size(self, value: int) -> int | float:
        """A sum of the stages' integers in the caller's unit; an int where it is one."""
        return plain(value * self.unit)


def plain(value: int | Fraction) -> int | float:
    """The value as an int where it is one, else as the nearest float."""
    return value.numerator if value.denominator == 1 else float(value)


def stage_lengths(layers: int, stages: int) -> list[int]:
    """Splits L sublayers as evenly as possible; earlier stages get the extra ones.

    Example:
        >>> stage_lengths(10, 4)
        [3, 3, 2, 2]
    """
    short, extra = divmod(layers, stages)
    return [short + (stage < extra) for stage in range(stages)]


def read_problem(
    layers: Any,
    streams: Any,
    *,
    hidden: Any = 1,
    stages: Any = 1,
    in_flight: Any = 1,
    transient: Any = None,
    kept: Any = None,
    head: Any = 0,
    embedding: Any = None,
    gradients: Any = 0,
    flowing: Any = 0,
) -> Problem:
    """Checks the arguments of `solve_recompute` and splits the sublayers into stages.

    Raises:
        ConfigError: an argument makes no sense.
    """
    layers, n = as_integer("layers", layers, most=MAX_LAYERS), as_integer("streams", streams)
    count = as_integer("stages", stages)
    if count > layers:
        raise ConfigError(
            f"stages must be at most layers={layers}, a sublayer for each stage, got {count}"
        )
    flights = _flights(in_flight, count)
    width = as_size("hidden", hidden)
    sizes = as_sizes("transient", n + 2 if transient is None else transient, layers)
    keeps = as_sizes("kept", 1 if kept is None else kept, layers, zero=True)
    weights = as_sizes("gradients", gradients, layers, zero=True) if gradients != 0 else []
    # What adds more than its backward frees makes the end of the backward the peak, in any blocks.
    grows = [min(g, t + a) for g, t, a in zip(weights, sizes, keeps, strict=bool(weights))]
    if any(weights) and max(flights) > 1:
        raise ConfigError(
            f"gradients must be 0 with in_flight={in_flight!r}: of several microbatches the first "
            "backward makes the gradients, and they are there in all others"
        )
    at_end = as_size("head", head, zero=True)
    besides = as_size("flowing", flowing, zero=True)
    first = n if embedding is None else as_size("embedding", embedding, zero=True)
    scale = math.lcm(
        *{size.denominator for size in (*sizes, *keeps, *grows, at_end, besides, first)}
    )

    def whole(size: int | Fraction) -> int:
        return size.numerator * (scale // size.denominator)

    split, begin = [], 0
    for number, length in enumerate(stage_lengths(layers, count)):
        end = begin + length
        T, A, G = (tuple(map(whole, values[begin:end])) for values in (sizes, keeps, grows))
        spared = 0 if begin else whole(n) - whole(first)
        held = whole(at_end) if end == layers else 0
        split.append(Stage(whole(n), T, A, flights[number], held, spared, G, whole(besides)))
        begin = end
    unit = Fraction(width) / scale
    return Problem(layers, n, width, transient is not None, tuple(split), unit)


def _flights(in_flight: Any, stages: int) -> list[int]:
    values = as_sequence(in_flight)
    if values is None:
        return [as_integer("in_flight", in_flight)] * stages
    check_length("in_flight", values, stages, "stage")
    return [as_integer(f"in_flight[{i}]", each) for i, each in enumerate(values)]
