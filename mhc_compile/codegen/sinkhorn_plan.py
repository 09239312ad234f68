"""The steps of a convention's Sinkhorn-Knopp, as the kernels run them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mhc_compile.codegen.spec import KernelSpec


@dataclass(frozen=True)
class SinkhornPlan:
    """Which steps come before the loop, and the loop of equal pairs.

    Attributes:
        softmax: the logits start as a row softmax.
        log_steps: axes ("row" or "col") normalised in the log domain, where nothing can vanish.
        shift: axis whose maxima are taken off before exp, None if there is none.
        first: axes normalised once, on the matrix, before the loop.
        pair: the two axes of one round of the loop.
        rounds: how often the loop runs.
        segments: lengths of the stretches between states that the backward keeps in registers.
    """

    softmax: bool
    log_steps: tuple[str, ...]
    shift: str | None
    first: tuple[str, ...]
    pair: tuple[str, str]
    rounds: int
    segments: tuple[int, ...]


def sinkhorn_plan(spec: KernelSpec) -> SinkhornPlan:
    """Cuts the normalisations of `spec.rule` into a start and equal rounds."""
    rule = spec.rule
    steps = rule.sinkhorn_order.split("_") * rule.sinkhorn_iters
    softmax = rule.sinkhorn_start == "softmax"
    if softmax and rule.sinkhorn_start_is_step:
        steps = steps[1:]
    plain = rule.sinkhorn_eps_mode == "none"
    lead = min(2, len(steps)) if plain else 0
    if (len(steps) - lead) % 2:  # the loop runs whole rounds
        lead += 1 if lead < 2 else -1
    start, rest = tuple(steps[:lead]), steps[lead:]
    rounds = len(rest) // 2
    pair = (rest[0], rest[1]) if rest else ("col", "row")
    # With many streams the matrices fill the registers: then few states are kept, others run again.
    stretches = min(rounds, 20 if spec.streams <= 4 else 4)
    length = math.ceil(rounds / stretches) if stretches else 0
    segments = tuple(min(length, rounds - k) for k in range(0, rounds, length)) if rounds else ()
    return SinkhornPlan(
        softmax, start if plain else (), None if plain or softmax else steps[0],
        () if plain else start, pair, rounds, segments,
    )  # fmt: skip
