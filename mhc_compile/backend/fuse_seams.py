"""Fuses post_res of one sublayer and read of the next into the seam operator."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from mhc_compile.backend.graph_nodes import (
    arguments,
    call_name,
    can_stand_before,
    mhc_op,
    move_before,
    results,
    same_grad_mode,
    site_of,
    written_between,
)
from mhc_compile.backend.records import Fused, GraphRecord, NotFused


def fuse_seams(graph: Graph, record: GraphRecord) -> None:
    """Rewrites `y = post_res(x, f, ...); h, ... = read(y, ...)` as `y, h, ... = seam(...)`.

    The seam stands where post_res stood, so that whoever else reads y finds it there.
    """
    for read in list(graph.nodes):
        if mhc_op(read) == "read":
            reason = _fuse(graph, read)
            site = site_of(read)
            if reason is None:
                record.fused.append(Fused(site, "seam"))
            elif mhc_op(read.args[0]) != "expand":  # of which fuse_expand speaks
                record.not_fused.append(NotFused(site, "seam", reason))


def _fuse(graph: Graph, read: Node) -> str | None:
    """Fuses one read with the post_res before it; returns why not."""
    y, phi, alpha, bias, rule = arguments(read)
    if not isinstance(y, Node) or mhc_op(y) != "post_res":
        return _what_precedes(y)
    taken = results(read)
    if taken is None:
        return "the results of its read are used as one tuple"
    if not same_grad_mode(y, read):
        return "gradients are switched on or off between the sublayers"
    if written_between(y, read):
        return "the streams may be changed in place between the sublayers"
    parameters = (phi, alpha, bias)
    if not all(can_stand_before(p, y) for p in parameters):
        return "its parameters are computed from activations"
    for parameter in parameters:
        move_before(parameter, y)
    with graph.inserting_before(y):
        args = (*arguments(y), *parameters, None, None, "none", 0.0, rule)
        seam = graph.call_function(torch.ops.mhc.seam.default, args)
        seam.meta.update({k: v for k, v in read.meta.items() if k != "example_value"})
        parts = [_part(graph, seam, k) for k in range(1 + 6)]
    parts[0].meta.update(y.meta)
    for index, nodes in taken.items():
        for node in nodes:
            parts[index + 1].meta.update(node.meta)
            node.replace_all_uses_with(parts[index + 1])
            graph.erase_node(node)
    graph.erase_node(read)
    y.replace_all_uses_with(parts[0])
    graph.erase_node(y)
    for part in parts:
        if not part.users:
            graph.erase_node(part)
    return None


def _part(graph: Graph, call: Node, index: int) -> Node:
    return graph.call_function(operator.getitem, (call, index))


def _what_precedes(y: object) -> str:
    if not isinstance(y, Node):
        return "it reads a constant"
    if y.op == "placeholder":
        return "the graph starts here: the sublayer before is in another graph"
    source = y.args[0] if y.args and isinstance(y.args[0], Node) else None
    if mhc_op(source) == "seam":
        return "another sublayer that reads the same streams has the seam"
    return f"between the sublayers the streams go through {call_name(y) or y.target}"
