"""Lets sublayers' inputs that a backward rebuilds come from the backward of a seam."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile._torch_compat import OpOverload, is_view_call
from mhc_compile.backend.graph_nodes import arguments, fake_result, mhc_op
from mhc_compile.backend.static_memory import Lifetimes

_PRE_NORM = (9, 15, 13, 14, 18, 19)
"""Where `seam_backward` has the arguments of `pre_norm`: y, pre, weight, shift, norm, norm_eps."""


def make_inputs_late(graph: Graph, fused: bool) -> None:
    """Replaces each `pre_norm` of a backward graph by a result of `seam_backward` that may be.

    That reads the state anyway, and h costs C numbers a token to write, for (n + 1) C by itself.
    What is computed from h runs after it then: that must be gradients of weights alone, and what
    these hold until then must not raise the graph's peak.

    Args:
        graph: a backward graph after partitioning, changed in place.
        fused: as `Lifetimes` takes it.
    """
    reads = [node for node in graph.nodes if mhc_op(node) == "pre_norm"]
    if not reads:
        return
    calls = {}
    for node in graph.nodes:
        if mhc_op(node) == "seam_backward":
            given = arguments(node)
            calls[_key([given[place] for place in _PRE_NORM])] = node
    lifetimes, moved = Lifetimes(graph, fused), reads[0]
    most = lifetimes.peak
    for read in reads:
        call = calls.get(_key(arguments(read)))
        waiting = None if call is None else _waiting(read, call)
        if call is None or waiting is None or not all(map(_may_wait, waiting)):
            continue
        if read < moved:  # stretches overlap, as those of two streams may
            lifetimes = Lifetimes(graph, fused)
        stretch = lifetimes.stretch(read, call)
        early = [node for node in stretch if node in waiting]
        others = [node for node in stretch[1:-1] if node not in waiting]
        if lifetimes.peak_of([*others, read, call, *early]) > most:
            continue
        again = _ask_for_h(graph, call)
        for node in reversed(early):
            again.append(node)
        read.replace_all_uses_with(again)
        graph.erase_node(read)
        moved = max([again, *early])


def _key(args: list[Any]) -> tuple[Any, ...]:
    """What makes two nodes read the same; a detached tensor is the same."""
    return tuple(_seen_through(arg) if isinstance(arg, Node) else arg for arg in args)


def _seen_through(node: Node) -> Node:
    """What a view of all of a tensor is of."""
    while is_view_call(node) and node.meta["val"].shape == _shape_of_input(node):
        node = node.all_input_nodes[0]
    return node


def _shape_of_input(view: Node) -> torch.Size:
    shape: torch.Size = view.all_input_nodes[0].meta["val"].shape
    return shape


def _waiting(read: Node, call: Node) -> set[Node] | None:
    """What is computed from a node before a call; None if the call needs it, or is before."""
    if call < read:
        return None
    found, todo = set[Node](), [read]
    while todo:
        node = todo.pop()
        if node is call:
            return None
        if node not in found and node < call:
            found.add(node)
            todo += node.users
    return found - {read}


def _may_wait(node: Node) -> bool:
    """Whether other nodes may run before it: it draws no random numbers and writes nothing."""
    if node.target is operator.getitem:
        return True
    target = node.target
    random = torch.Tag.nondeterministic_seeded
    return (
        isinstance(target, OpOverload)
        and not target._schema.is_mutable
        and random not in target.tags
    )


def _ask_for_h(graph: Graph, call: Node) -> Node:
    """The node of h, the last result of a `seam_backward`."""
    call.args, call.kwargs = (*arguments(call)[:-1], True), {}
    *_, h = fake_result(call)
    call.meta["val"] = (*call.meta["val"][:-1], h)
    if "eager_input_vals" in call.meta:  # by which Inductor keeps strides of arguments
        values = map_arg(call.args, lambda source: source.meta["val"])
        call.meta["eager_input_vals"] = values, {}
    with graph.inserting_after(call):
        node = graph.call_function(operator.getitem, (call, len(call.meta["val"]) - 1))
    node.meta = {"val": h}
    return node
