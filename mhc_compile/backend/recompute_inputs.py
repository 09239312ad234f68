"""Lets sublayers' inputs that a backward rebuilds come from the backward of a seam."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile._torch_compat import fake_mode_of, is_view_call
from mhc_compile.backend.graph_nodes import arguments, mhc_op
from mhc_compile.backend.static_memory import Lifetimes

_STATE = 9
"""Where `seam_backward` has its y."""


def make_inputs_late(graph: Graph, fused: bool) -> None:
    """Replaces each `pre_norm` of a backward graph by a result of `seam_backward` that may be.

    That reads the state anyway, and h costs C numbers a token to write, for (n + 1) C by itself.
    What is computed from h runs after it then: that must be gradients of weights alone, and what
    these hold until then must not be the graph's peak.

    Args:
        graph: a backward graph after partitioning, changed in place.
        fused: as `Lifetimes` takes it.
    """
    reads = [node for node in graph.nodes if mhc_op(node) == "pre_norm"]
    if not reads:
        return
    seams = (node for node in graph.nodes if mhc_op(node) == "seam_backward")
    by_state = {_seen_through(arguments(node)[_STATE]): node for node in seams}
    lifetimes = Lifetimes(graph, fused)
    for read in reads:
        call, later = by_state.get(_seen_through(read.all_input_nodes[0])), _dependents(read.users)
        if call is None or call in later:
            continue
        early = {node for node in later if node < call}
        stretch = lifetimes.stretch(read, call)
        others = [node for node in stretch[1:-1] if node not in early]
        order = [*others, read, call, *(node for node in stretch if node in early)]
        if lifetimes.peak_of(order) > lifetimes.peak:
            continue
        again = _ask_for_h(graph, call)
        for node in sorted(early, reverse=True):
            again.append(node)
        read.replace_all_uses_with(again)
        graph.erase_node(read)


def _ask_for_h(graph: Graph, call: Node) -> Node:
    """The node of h, the last result of a `seam_backward`."""
    call.args, call.kwargs = (*arguments(call)[:-1], True), {}
    values = map_arg(call.args, lambda source: source.meta["val"])
    with fake_mode_of(values):
        *_, h = call.target(*values)  # type: ignore[operator]
    call.meta["val"] = (*call.meta["val"][:-1], h)
    if "eager_input_vals" in call.meta:  # by which Inductor keeps strides of arguments
        call.meta["eager_input_vals"] = values, {}
    with graph.inserting_after(call):
        node = graph.call_function(operator.getitem, (call, len(call.meta["val"]) - 1))
    node.meta = {"val": h}
    return node


def _seen_through(node: Node) -> Node:
    """What a view is of."""
    while is_view_call(node):
        node = node.all_input_nodes[0]
    return node


def _dependents(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all that is computed from them."""
    found, todo = set[Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo += node.users
    return found
