"""Rebuilds streams in the backward, block by block, as a recompute plan says."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile._torch_compat import CheckpointPolicy, is_view_call
from mhc_compile.backend.graph_nodes import (
    arguments,
    fake_result,
    is_expanded,
    is_tangent,
    mhc_op,
    result,
)

REBUILT = "mhc_rebuilt"
"""Mark in a node's `meta`: it computes again what the forward has dropped."""


def recompute_streams(
    graph: Graph, chains: Sequence[Sequence[Node]], blocks: Sequence[tuple[int, ...]]
) -> None:
    """Makes the backward rebuild x_l and h_l of all sublayers that do not start a block.

    In a joint graph of forward and backward, the backward's readers of a seam's y and h get
    `post_res` and `pre_norm` of what is kept: the block's first x, the results of every F, and the
    maps, so that neither F nor projection nor Sinkhorn-Knopp runs again. Tags tell the partitioner.

    Args:
        graph: the joint graph, changed in place.
        chains: its chains of seams.
        blocks: sizes of the blocks of each chain, in sublayers.
    """
    backward = _backward_nodes(graph)
    for seams, sizes in zip(chains, blocks, strict=True):
        starts = set(accumulate(sizes[:-1]))
        rebuilt: Node | None = None
        for number, seam in enumerate(seams, start=1):
            rebuilt = _rebuild(graph, seam, rebuilt, number in starts, backward)
    for node in graph.nodes:
        if is_expanded(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def count_rebuilt(graph: Graph) -> int:
    """How many sublayers' streams a backward graph rebuilds."""
    return sum(bool(node.meta.get(REBUILT)) and mhc_op(node) == "post_res" for node in graph.nodes)


def _rebuild(
    graph: Graph, seam: Node, before: Node | None, keep: bool, backward: set[Node]
) -> Node | None:
    """Gives the backward its own y and h of a seam; returns that y, None if y is kept."""
    x, f, post, res, _, _, _, weight, shift, norm, eps, _ = arguments(seam)
    y, h, pre = (result(seam, k) for k in range(3))
    if h is not None and pre is None:
        with graph.inserting_after(seam):
            pre = graph.call_function(operator.getitem, (seam, 2))
        pre.meta["val"] = seam.meta["val"][2]
    _save(f, post, res, pre, y if keep else None)
    anchor = max(node for node in (seam, y, h, pre) if node is not None)  # the last of them
    if y is None:
        return None
    again = None
    if not keep:
        merged = (before or x, f, post, res)
        again = _call(graph, anchor, torch.ops.mhc.post_res.default, merged, y)
    if h is not None and any(_readers(h, backward)):
        read = _call(graph, again or anchor, torch.ops.mhc.pre_norm.default,
                     (again or y, pre, weight, shift, norm, eps), h)  # fmt: skip
        _give(graph, h, read, backward)
    if again is not None:
        _give(graph, y, again, backward)
    return again


def _readers(node: Node, backward: set[Node]) -> Iterator[Node]:
    """The backward's nodes that read a node, also through views of it."""
    for user in node.users:
        if user in backward:
            yield user
        elif is_view_call(user):
            yield from _readers(user, backward)


def _call(graph: Graph, anchor: Node, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    with graph.inserting_after(anchor):
        node = graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
    node.meta["val"] = fake_result(node)
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta[REBUILT] = True
    return node


def _give(graph: Graph, node: Node, again: Node, backward: set[Node]) -> None:
    """Points what the backward reads of a node, also through views of it, to its copy."""
    for user in list(node.users):
        if user is again or user.meta.get(REBUILT):
            continue
        if user in backward:
            user.replace_input_with(node, again)
        elif is_view_call(user) and any(_readers(user, backward)):
            with graph.inserting_after(max(user, again)):  # the later one
                copy = graph.node_copy(user, lambda n: again if n is node else n)
            copy.meta |= {REBUILT: True, "val": fake_result(copy)}
            _give(graph, user, copy, backward)


def _backward_nodes(graph: Graph) -> set[Node]:
    """All that depends on a tangent."""
    found: set[Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(source in found for source in node.all_input_nodes):
            found.add(node)
    found -= {node for node in found if node.op == "output"}
    return found


def _save(*nodes: Any) -> None:
    for node in nodes:
        if isinstance(node, Node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
