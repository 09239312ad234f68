"""Chooses the blocks that a backward rebuilds, and looks whether it really does."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from mhc_compile._torch_compat import OpOverload, partitioned_forward
from mhc_compile.backend.chained_pass import ChainedPass, hash_of_sources
from mhc_compile.backend.graph_nodes import has_backward, joint_ends
from mhc_compile.backend.measure_sublayers import (
    Chain,
    find_chains,
    measure_sublayers,
    outline,
)
from mhc_compile.backend.options import Options
from mhc_compile.backend.recompute_inputs import make_inputs_late
from mhc_compile.backend.recompute_streams import count_rebuilt, recompute_streams
from mhc_compile.backend.records import GraphRecord
from mhc_compile.backend.static_memory import static_peak
from mhc_compile.scheduler.choose_plan import Choice, Sizes, choose_plan

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")


class Recompute(ChainedPass):
    """The pass over a joint graph.

    Attributes:
        options: its `recompute` and `memory_budget` choose the blocks.
        record: where the blocks, and what became of them, are noted.
    """

    def __init__(self, options: Options, record: GraphRecord, before: Any = None) -> None:
        super().__init__(before)
        self.options, self.record = options, record
        self.products: int | None = None
        self.weights: frozenset[str] = frozenset()
        self.chosen: list[Choice] = []

    def change(self, graph: Graph) -> None:
        """Plans and rewrites a joint graph, in place."""
        if self.options.plan == "off" or not self.options.fuse or not self.record.operators:
            return
        start = time.perf_counter()
        found = find_chains(graph) if has_backward(graph) else []
        chains = _with_tokens(found)
        if found and not chains:  # nothing is kept
            return
        self.products = _count_products(graph)
        if chains:
            self._plan(graph, chains)
        self.record.seconds["recompute_streams"] = time.perf_counter() - start

    def _plan(self, graph: Graph, chains: Sequence[Chain]) -> None:
        inputs, results, gradients = joint_ends(graph)
        pairs = zip(inputs, gradients, strict=True)
        self.weights = frozenset(node.name for node, g in pairs if isinstance(g, Node))
        sizes = [outline(seams) for seams in chains]
        if self.options.plan in ("timeline", "budget"):
            # What is kept is the partitioner's choice: it is asked on a copy of the graph first.
            sizes = self._measure(partitioned_forward(graph, len(results)))
        self.chosen = [
            choose_plan(self.options.plan, each, self.options.memory_budget) for each in sizes
        ]
        recompute_streams(graph, chains, [choice.block_sizes for choice in self.chosen])
        self.record.choices += self.chosen

    def _measure(self, forward: Graph) -> list[Sizes]:
        chains = _with_tokens(find_chains(forward))
        return [measure_sublayers(seams, self.weights) for seams in chains]

    @property
    def _fused(self) -> bool:
        return self.options.lower == "inductor"

    def finish(self, graph: Graph) -> None:
        """Changes a forward or backward graph after partitioning, in place, and verifies it."""
        if has_backward(graph):
            start = time.perf_counter()
            make_inputs_late(graph, self._fused)
            self.record.seconds["make_inputs_late"] = time.perf_counter() - start
        self.verify(graph)

    def verify(self, graph: Graph) -> None:
        """Notes what a forward or backward graph computes again; warns if the plan is not run."""
        rebuilt = count_rebuilt(graph)
        self.record.static_peak = max(
            static_peak(graph, self._fused)[0], self.record.static_peak or 0
        )
        if self.products is not None:
            self.products -= _count_products(graph)
        if not has_backward(graph):
            self._predict(graph)
            return
        self.record.rebuilt = (self.record.rebuilt or 0) + rebuilt
        planned = sum(sum(blocks) - len(blocks) for blocks in self.record.blocks)
        wrong: list[str] = []
        if self.products is not None and not self.record.choices:
            none = "0 sublayers' streams are rebuilt, for no seams were fused,"
            # By default that is for the report alone.
            (self.record.notes if self.options.recompute is None else wrong).append(none)
        if self.record.rebuilt != planned:
            wrong.append(f"{self.record.rebuilt} of {planned} sublayers' streams are rebuilt")
        if self.products is not None and self.products < 0:
            wrong.append(f"{-self.products} matrix products of sublayers run again")
        for text in wrong:
            self.record.notes.append(text)
            warnings.warn(
                f"backend='mhc': {text} in the backward of this graph, unlike its recompute plan",
                stacklevel=2,
            )

    def _predict(self, forward: Graph) -> None:
        """Gives the choices the sizes of what the forward really keeps."""
        if not self.chosen:
            return
        pairs = zip(self.chosen, self._measure(forward), strict=True)
        self.record.choices[-len(self.chosen) :] = [replace(c, sizes=size) for c, size in pairs]

    def identity(self) -> Any:
        """The options, the pass and the solver."""
        sources = hash_of_sources(
            "backend/measure_sublayers.py", "backend/recompute*.py", "scheduler/*.py"
        )
        return sources, self.options.plan, self.options.memory_budget


def _with_tokens(chains: Sequence[Chain]) -> list[Chain]:
    return [seams for seams in chains if outline(seams).unit]


def _count_products(graph: Graph) -> int:
    return sum(
        isinstance(node.target, OpOverload)
        and node.target._schema.name.removeprefix("aten::") in _PRODUCTS
        for node in graph.nodes
    )
