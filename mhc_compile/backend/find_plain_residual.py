"""Finds a residual add in a captured graph without hyper-connections."""

from __future__ import annotations

from torch.fx import Graph, Node

from mhc_compile._torch_compat import statically_known_true
from mhc_compile.backend.graph_nodes import call_name, value_of

_PRODUCTS = ("linear", "matmul", "addmm", "mm", "bmm", "conv1d", "conv2d", "__matmul__", "einsum")


def find_plain_residual(graph: Graph) -> Node | None:
    """Returns an add of the kind `x + F(x)` where F has a product with a matrix, None without."""
    bit: dict[Node, int] = {}
    above: dict[Node, int] = {}  # the ancestors of a node, a bit each, and the node itself
    weighed: dict[Node, int] = {}  # those of them from which a way leads through a product
    for place, node in enumerate(graph.nodes):
        bit[node] = above[node] = 1 << place
        weighed[node] = 0
        for source in node.all_input_nodes:
            above[node] |= above[source]
            weighed[node] |= weighed[source]
        if call_name(node) in _PRODUCTS:
            weighed[node] |= above[node] & ~bit[node]
        if call_name(node) in ("add", "iadd") and len(node.args) > 1:
            first, second = node.args[:2]
            if isinstance(first, Node) and isinstance(second, Node) and _alike(first, second):
                if weighed[second] & bit[first] or weighed[first] & bit[second]:
                    return node
    return None


def _alike(first: Node, second: Node) -> bool:
    """Whether two nodes are known to be float tensors of one shape; no size is fixed by asking."""
    a, b = value_of(first), value_of(second)
    if a is None or b is None or not a.is_floating_point() or not a.dim() == b.dim() > 1:
        return False
    if statically_known_true(a.shape[-1] <= 1):
        return False
    return all(statically_known_true(p == q) for p, q in zip(a.shape, b.shape, strict=True))
