"""Fuses the last post_res of a stream with the collapse that follows it."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from mhc_compile.backend.graph_nodes import (
    arguments,
    mhc_op,
    same_grad_mode,
    site_of,
    value_of,
    written_between,
)
from mhc_compile.backend.records import Fused, GraphRecord, NotFused


def fuse_collapses(graph: Graph, record: GraphRecord) -> None:
    """Rewrites `collapse(post_res(x, f, post, res), w)` so that the last streams are not stored.

    sum_i w_i (sum_j res_ij x_j + post_i f) = sum_j (res^T w)_j x_j + (w . post) f.
    """
    for node in list(graph.nodes):
        if mhc_op(node) == "collapse":
            reason = _fuse(graph, node)
            if reason is None:
                record.fused.append(Fused(site_of(node), "merge and collapse"))
            else:
                record.not_fused.append(NotFused(site_of(node), "merge and collapse", reason))


def _fuse(graph: Graph, collapse: Node) -> str | None:
    y, weight = arguments(collapse)
    value = value_of(collapse)
    if mhc_op(y) != "post_res" or value is None:
        return "no merge comes right before it"
    if len(y.users) > 1:
        return "the streams are read elsewhere too"
    if not same_grad_mode(y, collapse):
        return "gradients are switched on or off before it"
    x, f, post, res = arguments(y)
    if any(written_between(t, collapse) for t in (x, f, post, res)):
        return "what was merged may be changed in place before it"
    with graph.inserting_before(collapse):

        def call(name: str, *args: object) -> Node:
            return graph.call_method(name, args)  # type: ignore[arg-type]

        def add_up(weighted: Node, dim: int) -> Node:
            return call("sum", weighted, dim)

        mixing = add_up(call("mul", res, call("unsqueeze", weight, -1)), -2)
        share = call("unsqueeze", add_up(call("mul", post, weight), -1), -1)
        kept = graph.call_function(torch.ops.mhc.pre.default, (x, mixing))
        total = call("add", call("mul", f, share), kept)
        result = call("to", total, value.dtype)
    result.meta.update(collapse.meta)
    kept.meta.update({k: v for k, v in collapse.meta.items() if k != "example_value"})
    collapse.replace_all_uses_with(result)
    graph.erase_node(collapse)
    graph.erase_node(y)
    return None
