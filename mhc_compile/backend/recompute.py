"""Chooses the blocks that a backward rebuilds, and looks whether it really does."""

from __future__ import annotations

import time
import warnings
from typing import Any

from torch.fx import Graph

from mhc_compile._torch_compat import OpOverload
from mhc_compile.backend.chained_pass import ChainedPass, hash_of_sources
from mhc_compile.backend.options import Options
from mhc_compile.backend.recompute_streams import Chain, count_rebuilt, recompute_streams
from mhc_compile.backend.records import GraphRecord
from mhc_compile.scheduler import check_blocks, solve_recompute

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

    def change(self, graph: Graph) -> None:
        """Plans and rewrites a joint graph, in place."""
        if self.options.recompute == "off" or not self.options.fuse or not self.record.operators:
            return
        start = time.perf_counter()
        self.products = _count_products(graph)
        self.record.blocks += recompute_streams(graph, self._choose)
        self.record.seconds["recompute_streams"] = time.perf_counter() - start

    def _choose(self, chain: Chain) -> tuple[int, ...]:
        value, layers = self.options.recompute, chain.layers
        if not isinstance(value, str):
            return check_blocks(value, layers)[0]
        plan = solve_recompute(
            layers, chain.streams, hidden=chain.unit, objective=value,
            kept=[bytes_kept / chain.unit for bytes_kept in chain.kept],
            memory_budget=self.options.memory_budget,
        )  # fmt: skip
        return plan.block_sizes

    def verify(self, graph: Graph) -> None:
        """Notes what a forward or backward graph computes again; warns if the plan is not run."""
        rebuilt = count_rebuilt(graph)
        if self.products is not None:
            self.products -= _count_products(graph)
        if not any("tangents" in str(node.target) for node in graph.nodes):
            return
        self.record.rebuilt = (self.record.rebuilt or 0) + rebuilt
        planned = sum(sum(blocks) - len(blocks) for blocks in self.record.blocks)
        wrong = []
        if self.products is not None and not self.record.blocks:
            wrong.append("0 sublayers' streams are rebuilt, for no seams were fused,")
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

    def identity(self) -> Any:
        """The options, the pass and the solver."""
        sources = hash_of_sources(
            "backend/recompute.py", "backend/recompute_streams.py", "scheduler/*.py"
        )
        return sources, self.options.recompute, self.options.memory_budget


def _count_products(graph: Graph) -> int:
    return sum(
        isinstance(node.target, OpOverload)
        and node.target._schema.name.removeprefix("aten::") in _PRODUCTS
        for node in graph.nodes
    )
