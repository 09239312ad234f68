"""The memory of a graph over time, from the sizes and lifetimes of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mhc_compile._torch_compat import OpOverload, is_view_call
from mhc_compile.backend.measure_sublayers import bytes_of

Memory = tuple[Node, int]
"""A node and the place among its results that a tensor is first computed at."""


def static_peak(graph: Graph, fused: bool = False) -> tuple[int, Node]:
    """The most bytes that are held at one time while a graph runs, and the node that runs then.

    Counted are inputs that are no parameters, and what nodes compute; all of it is freed after its
    last use, outputs at the end. What operators need within themselves and what an allocator loses
    is not seen.

    Args:
        graph: a forward or backward graph after partitioning.
        fused: whether elementwise steps that only such steps and sums read are never stored, as
            Inductor's fusion mostly has it.
    """
    nodes = list(graph.nodes)
    held: dict[Node, dict[Memory, int]] = {}
    for node in nodes:
        held[node] = _memories(node, held, fused and _is_fused_away(node))
    last = {memory: k for k, node in enumerate(nodes) for memory in _touched(node, held)}
    freed: dict[int, list[Memory]] = {}
    for memory, number in last.items():
        freed.setdefault(number, []).append(memory)
    sizes: dict[Memory, int] = {}
    now = peak = 0
    where = nodes[0]
    for number, node in enumerate(nodes):
        for memory, size in held[node].items():
            if memory not in sizes:
                sizes[memory] = size
                now += size
        if now > peak:
            peak, where = now, node
        now -= sum(sizes[memory] for memory in freed.get(number, ()))
    return peak, where


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


def _touched(node: Node, held: dict[Node, dict[Memory, int]]) -> Iterator[Memory]:
    for used in (node, *node.all_input_nodes):
        yield from held[used]


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
