"""What each sublayer of a stream keeps for the backward, read from a partitioned forward graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from mhc_compile._torch_compat import is_view_call, size_hint
from mhc_compile.backend.graph_nodes import arguments, is_expanded, mhc_op, result
from mhc_compile.scheduler.choose_plan import Sizes

Chain = tuple[Node, ...]
"""The seams of one stream in order: one before each sublayer but the first."""


def find_chains(graph: Graph) -> list[Chain]:
    """The chains of a joint or forward graph."""
    seams = [node for node in graph.nodes if mhc_op(node) == "seam"]
    after = {result(seam, 0): seam for seam in seams}
    following = {after[x]: seam for seam in seams if (x := arguments(seam)[0]) in after}
    chains = []
    for first in seams:
        if arguments(first)[0] in after:
            continue
        run = [first]
        while run[-1] in following:
            run.append(following[run[-1]])
        chains.append(tuple(run))
    return chains


def outline(seams: Sequence[Node]) -> Sizes:
    """The sizes of a chain as far as they do not depend on what is kept."""
    x = arguments(seams[0])[0]
    streams, none = x.meta["val"], (0,) * (len(seams) + 1)
    whole = bytes_of(streams)
    unit = whole // streams.shape[-2]
    embedding = unit if is_expanded(x) else whole
    # The streams' gradients after and before a seam, which also reads the state that starts the
    # next block.
    return Sizes(streams.shape[-2], unit, none, 0, whole, embedding, none, 3 * whole)


def measure_sublayers(seams: Sequence[Node], weights: Collection[str]) -> Sizes:
    """Adds up what is handed to the backward of each sublayer's nodes, and of those after.

    A graph's nodes stand in the order of the forward, so a sublayer is what lies between two
    seams. States and sublayers' inputs do not count: the plan is about them.

    Args:
        seams: a chain of a forward graph, whose results are also what the backward needs.
        weights: names of the inputs that get gradients.
    """
    graph, sizes = seams[0].graph, outline(seams)
    x = arguments(seams[0])[0]
    begins = [min((u for u in x.users if mhc_op(u) == "read"), default=seams[0]), *seams]
    begins.append(_merge_after(seams[-1]))
    states = {part for seam in seams for k in (0, 1) if (part := result(seam, k)) is not None}
    kept, added = [0] * len(begins), [0] * len(begins)
    for node in _kept(graph):
        place = sum(not node < begin for begin in begins) - 1
        if node not in states and place >= 0:
            kept[place] += bytes_of(node.meta["val"])
    for weight in graph.find_nodes(op="placeholder"):
        if weight.name in weights and weight.users:
            place = sum(not min(weight.users) < begin for begin in begins) - 1
            added[place] += bytes_of(weight.meta["val"]) * (place >= 0)
    return replace(
        sizes, kept=tuple(kept[:-1]), head=kept[-1], gradients=tuple(added[:-1]),
        flowing=sizes.flowing + added[-1],
    )  # fmt: skip


def bytes_of(value: Tensor) -> int:
    """The size of a tensor at hand; symbolic sizes are not fixed."""
    size = value.element_size()
    for extent in value.shape:
        size *= size_hint(extent)
    return size


def _kept(forward: Graph) -> Iterator[Node]:
    """The nodes whose results a forward graph hands on, itself or as views, each once."""
    seen: set[Node] = set()
    for node in tree_leaves(forward.output_node().args):
        while isinstance(node, Node) and node.op == "call_function" and is_view_call(node):
            node = node.all_input_nodes[0]
        if isinstance(node, Node) and node.op == "call_function" and node not in seen:
            seen.add(node)
            if isinstance(node.meta.get("val"), Tensor):
                yield node


def _merge_after(seam: Node) -> Node:
    """The last sublayer's merge: the first that reads the streams after the last seam."""
    y = result(seam, 0)
    readers = list(y.users) if y is not None else []
    merges = [user for user in readers if mhc_op(user) in ("post_res", "pre", "collapse")]
    return min(merges or readers, default=seam)
