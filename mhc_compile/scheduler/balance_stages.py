"""Cuts a chain of blocks into stages whose costs are as even as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mhc_compile.errors import ConfigError


def balance_stages(
    costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0
) -> tuple[int, ...]:
    """Returns how many neighbouring blocks each stage gets, so that the costliest costs least.

    Of equally good cuts that with the least sum of squared stage costs is taken, which evens out
    the other stages too. O(stages * blocks^2) time.

    Args:
        costs: of each block, in the model's order, in any one unit, e.g. us.
        stages: K; each gets at least one block.
        first: what the first stage has to do besides its blocks, e.g. the embedding.
        last: what the last one has to do besides, e.g. the head and the loss.

    Raises:
        ConfigError: there are fewer blocks than stages, or a cost is negative or not finite.

    Example:
        >>> balance_stages([1, 1, 1, 1, 1, 1], 3, last=1)
        (2, 2, 2)
        >>> balance_stages([1] * 8, 3, last=2)
        (3, 3, 2)
    """
    values = np.array([float(cost) for cost in costs])
    for value in (*values, first, last):
        if not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"costs of blocks must be finite and at least 0, got {value}")
    count = len(values)
    if stages < 1 or count < stages:
        raise ConfigError(
            f"{count} blocks cannot fill {stages} stages; use at most {count} stages: fewer "
            "ranks, or a variant other than dualpipev, which has two stages a rank"
        )
    upto = np.concatenate([[0.0], values.cumsum()])
    best: list[list[tuple[float, float, int]]] = []  # (largest, squares, begin) by [stage][end]
    for stage in range(stages):
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        row = [(np.inf, np.inf, 0)] * (count + 1)
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            for begin in range(stage, end) if stage else (0,):
                largest, squares = best[-1][begin][:2] if stage else (0.0, 0.0)
                cost = upto[end] - upto[begin] + extra
                row[end] = min(row[end], (max(largest, cost), squares + cost * cost, begin))
        best.append(row)
    sizes, end = [], count
    for row in reversed(best):
        sizes.append(end - row[end][2])
        end = row[end][2]
    return tuple(reversed(sizes))
