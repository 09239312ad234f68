"""The memory of a graph over time, from the sizes and lifetimes of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mhc_compile._torch_compat import OpOverload, is_view_call
from mhc_compile.backend.measure_sublayers import bytes_of

Memory = tuple[Node, int]
"""A node and the place among its results that a tensor is first computed at."""


class Lifetimes:
    """When the tensors of a graph are held.

    Counted are inputs that are no parameters, and what nodes compute; all of it is freed after its
    last use, outputs at the end. What operators need within themselves and what an allocator loses
    is not seen.

    Args:
        graph: a forward or backward graph after partitioning.
        fused: whether elementwise steps that only such steps and sums read are never stored, as
            Inductor's fusion mostly has it.

    Attributes:
        peak: the most bytes that are held at one time.
        where: the node that runs then.
    """

    def __init__(self, graph: Graph, fused: bool = False) -> None:
        self._nodes = list(graph.nodes)
        self._place = {node: number for number, node in enumerate(self._nodes)}
        self._held: dict[Node, dict[Memory, int]] = {}
        for node in self._nodes:
            self._held[node] = _memories(node, self._held, fused and _is_fused_away(node))
        self._made: dict[Memory, int] = {}
        for number, node in enumerate(self._nodes):
            for memory in self._held[node]:
                self._made.setdefault(memory, number)
        self._last = self._last_uses(self._nodes)
        self._before: list[int] = []
        self.peak, self.where = 0, self._nodes[0]
        for node, before, during in self._run(self._nodes, 0):
            self._before.append(before)
            if during > self.peak:
                self.peak, self.where = during, node

    def stretch(self, first: Node, last: Node) -> list[Node]:
        """The nodes from one to another."""
        return self._nodes[self._place[first] : self._place[last] + 1]

    def peak_of(self, order: Sequence[Node]) -> int:
        """The most bytes that are held while a stretch of nodes runs, if it ran in this order."""
        begin = min(self._place[node] for node in order)
        return max(during for _, _, during in self._run(order, begin))

    def _run(self, order: Sequence[Node], begin: int) -> Iterator[tuple[Node, int, int]]:
        """Nodes from a place on, in any order, with the bytes before and during each."""
        last, end = self._last_uses(order), begin + len(order)
        now, seen = self._before[begin] if begin else 0, set[Memory]()
        for number, node in enumerate(order):
            before = now
            for memory, size in self._held[node].items():
                if self._made[memory] >= begin and memory not in seen:
                    seen.add(memory)
                    now += size
            yield node, before, now
            for memory, size in dict(self._touched(node)).items():
                if last[memory] == number and self._last[memory] < end:
                    now -= size

    def _last_uses(self, order: Sequence[Node]) -> dict[Memory, int]:
        return {
            memory: number for number, node in enumerate(order)
            for memory, _ in self._touched(node)
        }  # fmt: skip

    def _touched(self, node: Node) -> Iterator[tuple[Memory, int]]:
        for used in (node, *node.all_input_nodes):
            yield from self._held[used].items()


def static_peak(graph: Graph, fused: bool = False) -> tuple[int, Node]:
    """The most bytes that are held at one time while a graph runs, and the node that runs then.

    `Lifetimes` says what counts.
    """
    lifetimes = Lifetimes(graph, fused)
    return lifetimes.peak, lifetimes.where


def _memories(
    node: Node, held: dict[Node, dict[Memory, int]], fused_away: bool
) -> dict[Memory, int]:
    """The memories that a node's results lie in or are computed from, and their sizes."""
    if node.op == "output" or (node.op == "placeholder" and "primals" in str(node.target)):
        return {}
    inputs = node.all_input_nodes
    if fused_away or (inputs and is_view_call(node)):
        return {memory: size for source in inputs for memory, size in held[source].items()}
    if node.target is operator.getitem:
        call, place = node.args
        mine = held[call]  # type: ignore[index]
        return {m: size for m, size in mine.items() if m == (call, place) or m[0] is not call}
    results = node.meta.get("val")
    values = results if isinstance(results, tuple | list) else (results,)
    return {
        (node, place): bytes_of(value)
        for place, value in enumerate(values)
        if isinstance(value, Tensor)
    }


def _is_fused_away(node: Node) -> bool:
    """Whether a step is computed where it is read."""
    if is_view_call(node):
        return all(_is_fused_away(user) or _fuses(user) for user in node.users)
    return _has_tag(node, torch.Tag.pointwise) and all(
        _fuses(user) or (is_view_call(user) and _is_fused_away(user)) for user in node.users
    )


def _fuses(node: Node) -> bool:
    return _has_tag(node, torch.Tag.pointwise) or _has_tag(node, torch.Tag.reduction)


def _has_tag(node: Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, OpOverload) and tag in node.target.tags
