"""Finds a residual add in a captured graph without hyper-connections."""

from __future__ import annotations

import math

from torch.fx import Graph, Node

from mhc_compile.backend.graph_nodes import call_name, value_of

_PRODUCTS = ("linear", "matmul", "addmm", "mm", "bmm", "conv1d", "conv2d", "__matmul__", "einsum")


def find_plain_residual(graph: Graph) -> Node | None:
    """Returns an add of the kind `x + F(x)` where F has a product with a matrix, None without."""
    weighed: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        # What a product with a matrix lies between, for each node.
        behind: set[Node] = set()
        for source in node.all_input_nodes:
            behind |= weighed[source]
        if call_name(node) in _PRODUCTS:
            behind |= _ancestors(node)
        weighed[node] = behind
        if call_name(node) in ("add", "iadd") and len(node.args) > 1:
            first, second = node.args[:2]
            if isinstance(first, Node) and isinstance(second, Node) and _alike(first, second):
                if first in weighed[second] or second in weighed[first]:
                    return node
    return None


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += source.all_input_nodes
    return found


def _alike(first: Node, second: Node) -> bool:
    a, b = value_of(first), value_of(second)
    return (
        a is not None and b is not None and a.shape == b.shape and a.dim() > 1
        and a.is_floating_point() and math.prod(map(int, a.shape[-1:])) > 1
    )  # fmt: skip
