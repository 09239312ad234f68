"""Fuses the norm that a sublayer starts with into the seam before it."""

from __future__ import annotations

from torch.fx import Graph, Node

from mhc_compile.backend.graph_nodes import (
    arguments,
    can_stand_before,
    mhc_op,
    move_before,
    result,
    same_grad_mode,
    site_of,
    written_between,
)
from mhc_compile.backend.match_norm import match_norm
from mhc_compile.backend.records import Fused, GraphRecord, NotFused


def fuse_norms(graph: Graph, record: GraphRecord) -> None:
    """Rewrites `y, h, ... = seam(...); norm(h)` as a seam whose h is normed."""
    for seam in list(graph.nodes):
        if mhc_op(seam) == "seam":
            outcome = _fuse(graph, seam)
            site = site_of(seam)
            if outcome in ("rms", "layer"):
                record.fused.append(Fused(site, f"{outcome} norm"))
            else:
                record.not_fused.append(NotFused(site, "norm", outcome))


def _fuse(graph: Graph, seam: Node) -> str:
    """Returns the kind of norm that was fused, or why none was."""
    h = result(seam, 1)
    if h is None:
        return "the sublayer's input is not used"
    match = match_norm(h)
    if isinstance(match, str):
        return match
    if not same_grad_mode(seam, match.result):
        return "gradients are switched on or off before the norm"
    if written_between(h, match.result):
        return "the sublayer's input may be changed in place before its norm"
    affine = (match.weight, match.shift)
    if not all(can_stand_before(p, seam) for p in affine):
        return "the norm's weight is computed from activations"
    for parameter in affine:
        move_before(parameter, seam)
    args = arguments(seam)
    args[7:11] = match.weight, match.shift, match.kind, match.eps
    seam.args = tuple(args)
    inside = _between(h, match.result)
    match.result.replace_all_uses_with(h)
    for node in reversed(inside):
        graph.erase_node(node)
    return match.kind


def _between(h: Node, result: Node) -> list[Node]:
    """The nodes on the ways from h, without it, to the norm's result, in order."""
    inside: list[Node] = []
    node = h
    reached = {h}
    while node is not result:
        node = node.next
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            inside.append(node)
    return inside
