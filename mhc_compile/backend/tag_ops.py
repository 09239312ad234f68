"""Tags every call of a captured graph with its op of the overlap plan and the op's server."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from mhc_compile.backend.graph_nodes import call_name, mhc_op

OP, SERVER = "mhc_op", "mhc_server"
"""Keys in `node.meta["custom"]`, which AOTAutograd copies to forward and backward calls."""
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_PASSING = ("to", "type", "type_as", "float", "dropout", "nan_to_num", "contiguous", "view")
_READS, _MERGES = ("read", "coefficients", "pre"), ("post_res", "collapse")


def tag_ops(graph: Graph) -> None:
    """Tags the calls of a graph, in the order in which they stand.

    Sublayers are counted in that order: "3.attention" or, without an attention, "3.mlp"; what
    leads to it is "3.read" and what follows "3.post_res", which, fused with the next read, is
    "3.seam"; all-to-alls in it are "3.dispatch" and "3.combine". Servers are those of
    `scheduler.stage_ops`: F_post,res after an MLP has high priority (mHC, Sec. 4.3.3), all-to-alls
    are apart, and the rest is compute.
    """
    calls = list(_calls(graph))
    within: dict[int, list[Node]] = {}
    layer, open_ = -1, False
    for node in calls:
        op = mhc_op(node)
        merges = op in _MERGES or (op == "pre" and layer in within)
        if op == "seam" or merges:
            _tag(node, f"{max(layer, 0)}.{'seam' if op == 'seam' else 'post_res'}")
            layer, open_ = layer + (op == "seam"), op == "seam"
        elif op in _READS:
            layer += not open_
            open_ = True
            _tag(node, f"{layer}.read")
        elif open_:
            within.setdefault(layer, []).append(node)
        else:
            _tag(node, f"{layer}.after" if layer >= 0 else "before")
    kinds = {k: "attention" if any(map(_attends, nodes)) else "mlp" for k, nodes in within.items()}
    for k, nodes in within.items():
        moved = [node for node in nodes if "all_to_all" in call_name(node)]
        for node in nodes:
            name = kinds[k]
            if node in moved:
                name = "dispatch" if node is moved[0] else "combine"
            _tag(node, f"{k}.{name}", "a2a" if node in moved else "compute")
    for node in calls:
        number, _, name = node.meta["custom"][OP].partition(".")
        if name in ("seam", "post_res") and kinds.get(int(number)) == "mlp":
            node.meta["custom"][SERVER] = "hp"


def _calls(graph: Graph) -> Iterator[Node]:
    """The calls of a graph in order, those of a checkpoint's body behind it."""
    for node in graph.nodes:
        if not node.op.startswith("call_"):
            continue
        yield node
        for source in node.all_input_nodes:
            name = str(source.target) if source.op == "get_attr" else ""
            body = getattr(graph.owning_module, name, None) if name else None
            if isinstance(body, GraphModule):
                yield from _calls(body.graph)


def _attends(node: Node) -> bool:
    """Whether a call is an attention, or a softmax, no router's, whose weights enter a product."""
    name = call_name(node)
    if "softmax" not in name:
        return "attention" in name
    weights, seen = [node], set()
    while weights:
        for user in weights.pop().users:
            name = call_name(user)
            if name in _PRODUCTS:
                return True
            if name in _PASSING and user not in seen:
                seen.add(user)
                weights.append(user)
    return False


def _tag(node: Node, op: str, server: str = "compute") -> None:
    # Not in place: calls that were copied share what they were given.
    node.meta["custom"] = {**(node.meta.get("custom") or {}), OP: op, SERVER: server}
