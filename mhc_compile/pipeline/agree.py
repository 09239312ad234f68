"""What the ranks of a pipeline make sure of before and after something goes wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from mhc_compile._torch_compat import default_store
from mhc_compile.errors import PipelineError
from mhc_compile.pipeline.stages import PipelineStages
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.overlap_plan import OverlapPlan


def check_agreement(plan: OverlapPlan, stages: PipelineStages, group: Any) -> None:
    """Exchanges hashes of the plan and the split between all ranks of a group.

    Raises:
        PipelineError: ranks have different plans or stages; the message names them.
    """
    mine = (
        hashlib.sha256(plan.to_json().encode()).hexdigest()[:12], stages.signature()[:12],
        f"{plan.variant}, P = {plan.ranks}, M = {plan.microbatches}",
    )  # fmt: skip
    all_: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_, mine, group=group)
    for number, what, remedy in (
        (0, "plans", "make the plan with the same arguments everywhere, or send one to_json()"),
        (1, "stages", "split with the same example shapes and the same costs= or split="),
    ):
        counts = Counter(entry[number] for entry in all_)
        if len(counts) > 1:
            kinds = "; ".join(
                f"ranks {[r for r, e in enumerate(all_) if e[number] == kind]} have {kind} "
                f"({next(e[2] for e in all_ if e[number] == kind)})" for kind in counts
            )  # fmt: skip
            raise PipelineError(f"the ranks have different {what}: {kinds}; {remedy}")


def neighbours(layout: Layout) -> set[tuple[int, int]]:
    """Pairs of ranks that have neighbouring stages, the lower rank first."""
    ranks = [int(layout.rank_of(stage, 0)) for stage in range(layout.stages)]
    return {(min(p), max(p)) for p in zip(ranks, ranks[1:], strict=False) if p[0] != p[1]}


def connect(pairs: set[tuple[int, int]], groups: tuple[Any, Any], device: torch.device) -> None:
    """Sends one number in each direction between two ranks, pair after pair.

    Communicators are made at their first message, which waits for the other side; made in the
    order of a plan's messages they could wait for each other in a circle.

    Args:
        pairs: ranks that send each other something, the lower one first.
        groups: the communicators for messages to higher and to lower ranks.
        device: where the numbers are.
    """
    me, number = dist.get_rank(groups[0]), torch.zeros(1, device=device)
    for low, high in sorted(pairs):
        for group, source, target in ((groups[0], low, high), (groups[1], high, low)):
            if me == source:
                dist.send(number, group=group, group_dst=target)
            elif me == target:
                dist.recv(number, group=group, group_src=source)


class FailureBoard:
    """Where a rank that fails leaves a note, so that those waiting for it can say why."""

    def __init__(self, name: str, ranks: int) -> None:
        self.name, self.ranks = name, ranks

    def note(self, rank: int, text: str) -> None:
        """Leaves a note; without a store there is nobody to read it."""
        store = default_store()
        if store is not None:
            try:
                store.set(self._key(rank), text)
            except RuntimeError:  # the process that holds the store is gone
                return

    def read(self) -> list[str]:
        """The notes of all ranks."""
        store = default_store()
        if store is None:
            return []
        try:
            found = [r for r in range(self.ranks) if store.check([self._key(r)])]
            return [f"rank {r}: {store.get(self._key(r)).decode()}" for r in found]
        except RuntimeError:
            return []

    def _key(self, rank: int) -> str:
        return f"mhc_compile/{self.name}/{rank}"
