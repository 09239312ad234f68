"""Rebuilds streams in the backward, block by block, as a recompute plan says."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mhc_compile._torch_compat import CheckpointPolicy, is_view_call, size_hint
from mhc_compile.backend.graph_nodes import arguments, mhc_op, result

REBUILT = "mhc_rebuilt"
"""Mark in a node's `meta`: it computes again what the forward has dropped."""
Choose = Callable[["Chain"], tuple[int, ...]]


@dataclass(frozen=True)
class Chain:
    """The sublayers of one stream that follow each other by seams, in a joint graph.

    Attributes:
        seams: the seam before each sublayer but the first.
        streams: n.
        unit: bytes of one stream, C x tokens x itemsize.
        kept: what F of each sublayer keeps for the backward, in bytes.
    """

    seams: tuple[Node, ...]
    streams: int
    unit: int
    kept: tuple[int, ...]

    @property
    def layers(self) -> int:
        """The number of sublayers."""
        return len(self.seams) + 1


def recompute_streams(graph: Graph, choose: Choose) -> list[tuple[int, ...]]:
    """Makes the backward rebuild x_l and h_l of all sublayers that do not start a block.

    In a joint graph of forward and backward, the backward's readers of a seam's y and h get
    `post_res` and `pre_norm` of what is kept: the block's first x, the results of every F, and the
    maps, so that neither F nor projection nor Sinkhorn-Knopp runs again. Tags tell the partitioner.

    Args:
        graph: the joint graph, changed in place.
        choose: the sizes of the blocks of a chain, in sublayers.

    Returns:
        The blocks of each chain; empty for a graph without a backward.
    """
    backward = _backward_nodes(graph)
    if not backward:
        return []
    plans = []
    for chain in find_chains(graph, backward):
        blocks = choose(chain)
        starts = {sum(blocks[:k]) for k in range(len(blocks))}
        rebuilt: Node | None = None
        for number, seam in enumerate(chain.seams, start=1):
            rebuilt = _rebuild(graph, seam, rebuilt, number in starts, backward)
        plans.append(blocks)
    for node in graph.nodes:
        if mhc_op(node) == "expand":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return plans


def find_chains(graph: Graph, backward: set[Node]) -> list[Chain]:
    """The chains of seams of a joint graph."""
    seams = [node for node in graph.nodes if mhc_op(node) == "seam"]
    after = {result(seam, 0): seam for seam in seams}
    following = {after[x]: seam for seam in seams if (x := arguments(seam)[0]) in after}
    firsts = [seam for seam in seams if arguments(seam)[0] not in after]
    chains = []
    for first in firsts:
        run = [first]
        while run[-1] in following:
            run.append(following[run[-1]])
        x = arguments(first)[0].meta["val"]
        unit = _bytes(x) // x.shape[-2]
        kept = tuple(_kept(seam, backward) for seam in run)
        mean = sum(kept) // len(kept)  # the first sublayer reads otherwise, the last has no seam
        chains.append(Chain(tuple(run), x.shape[-2], unit, (mean, *kept)))
    return chains


def count_rebuilt(graph: Graph) -> int:
    """How many sublayers' streams a backward graph rebuilds."""
    return sum(bool(node.meta.get(REBUILT)) and mhc_op(node) == "post_res" for node in graph.nodes)


def _rebuild(
    graph: Graph, seam: Node, before: Node | None, keep: bool, backward: set[Node]
) -> Node | None:
    """Gives the backward its own y and h of a seam; returns that y, None if y is kept."""
    x, f, post, res, _, _, _, weight, shift, norm, eps, _ = arguments(seam)
    y, h, pre = (result(seam, k) for k in range(3))
    _save(f, post, res, pre, y if keep else None)
    anchor = max(node for node in (seam, y, h, pre) if node is not None)  # the last of them
    again: Node | None = None
    streams = y
    if not keep and y is not None:
        again = streams = _call(graph, anchor, torch.ops.mhc.post_res.default,
                                (before or x, f, post, res), y)  # fmt: skip
        _give(graph, y, again, backward)
        anchor = again
    if h is not None and streams is not None:
        if pre is None:
            with graph.inserting_after(seam):
                pre = graph.call_function(operator.getitem, (seam, 2))
            pre.meta["val"] = seam.meta["val"][2]
            _save(pre)
        read = _call(graph, anchor, torch.ops.mhc.pre_norm.default,
                     (streams, pre, weight, shift, norm, eps), h)  # fmt: skip
        _give(graph, h, read, backward)
    return again


def _call(graph: Graph, anchor: Node, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    with graph.inserting_after(anchor):
        node = graph.call_function(target, args)
    node.meta = {
        k: v for k, v in like.meta.items() if k in ("val", "stack_trace", "nn_module_stack")
    }
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
        elif is_view_call(user) and _read_in_backward(user, backward):
            with graph.inserting_after(max(user, again)):  # the later one
                copy = graph.node_copy(user, lambda n: again if n is node else n)
            copy.meta[REBUILT] = True
            _give(graph, user, copy, backward)


def _read_in_backward(node: Node, backward: set[Node]) -> bool:
    return any(
        user in backward or (is_view_call(user) and _read_in_backward(user, backward))
        for user in node.users
    )


def _backward_nodes(graph: Graph) -> set[Node]:
    """All that depends on a tangent."""
    found: set[Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or any(source in found for source in node.all_input_nodes):
            found.add(node)
    found -= {node for node in found if node.op == "output"}
    return found


def _kept(seam: Node, backward: set[Node]) -> int:
    """Bytes that the backward reads of what lies between a seam's h and its F's result."""
    h = result(seam, 1)
    inside: set[Node] = set()
    waiting = [] if h is None else list(h.users)
    total = 0
    while waiting:
        node = waiting.pop()
        if node in inside or node in backward or mhc_op(node) or node.op == "output":
            continue
        inside.add(node)
        waiting += node.users
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not is_view_call(node):
            total += _bytes(value) * (_read_in_backward(node, backward))
    return total


def _save(*nodes: Any) -> None:
    for node in nodes:
        if isinstance(node, Node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _bytes(value: Tensor) -> int:
    size = value.element_size()
    for extent in value.shape:
        size *= size_hint(extent)
    return size
