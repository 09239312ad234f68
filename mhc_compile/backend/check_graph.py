"""States what a legal graph is after each pass."""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Graph

from mhc_compile.backend.graph_nodes import mhc_op


def count_operators(graph: Graph) -> Counter[str]:
    """How often each operator of mhc occurs."""
    return Counter(name for name in map(mhc_op, graph.nodes) if name is not None)


def check_graph(graph: Graph, captured: Counter[str], merged: int, after: str) -> None:
    """Checks a graph after a pass.

    It is well-formed; every sublayer is read once and merged once, as in the captured graph,
    except for the `merged` merges that a collapse took in; operators have all their arguments,
    and a seam has a norm's weight only with a norm.

    Raises:
        RuntimeError: it is not, which is a fault of the pass.
    """
    graph.lint()
    counts = count_operators(graph)
    reads = counts["read"] + counts["seam"]
    merges = counts["post_res"] + counts["seam"] + merged
    if reads != captured["read"] + captured["seam"]:
        raise _fault(after, f"{captured['read']} reads became {reads}")
    if merges != captured["post_res"] + captured["seam"]:
        raise _fault(after, f"{captured['post_res']} merges became {merges}")
    for node in graph.nodes:
        name = mhc_op(node)
        if name is None:
            continue
        declared = getattr(torch.ops.mhc, name).default._schema.arguments
        if len(node.args) > len(declared):
            raise _fault(after, f"{node} has {len(node.args)} arguments of {len(declared)}")
        if name == "seam" and node.args[9] == "none" and node.args[7:9] != (None, None):
            raise _fault(after, f"{node} has a weight and no norm")


def _fault(after: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"mhc_compile's pass {after} left an illegal graph: {what}. Please report this; "
        'options={"fuse": False} compiles the model without the passes'
    )
