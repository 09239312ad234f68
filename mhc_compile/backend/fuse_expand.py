"""Fuses expand with whatever reads its n equal copies."""

from __future__ import annotations

from torch.fx import Graph

from mhc_compile.backend.graph_nodes import (
    arguments,
    mhc_op,
    readers_of_memory,
    site_of,
    value_of,
    writes,
    written_between,
)
from mhc_compile.backend.records import Fused, GraphRecord, NotFused


def fuse_expand(graph: Graph, record: GraphRecord) -> None:
    """Rewrites expand as a view of stride 0: formulas and kernels read one row, none is stored."""
    for node in list(graph.nodes):
        if mhc_op(node) != "expand":
            continue
        readers = set(readers_of_memory(node))
        reason = ""
        if record.kernels == "operators":
            reason = "the operators read stored streams"
        elif written_between(node, max((*node.users, node))) or any(map(writes, readers)):
            reason = "the streams may be changed in place"
        elif any(reader.op == "output" for reader in readers):
            reason = "the streams leave the graph, where they may be changed in place"
        if reason:
            record.not_fused.append(NotFused(site_of(node), "expand", reason))
            continue
        x, n = arguments(node)
        value = value_of(node)
        with graph.inserting_before(node):
            column = graph.call_method("unsqueeze", (x, -2))
            sizes = [-1] * (1 if value is None else value.dim())
            sizes[-2] = n
            view = graph.call_method("expand", (column, *sizes))
        view.meta.update(node.meta)
        node.replace_all_uses_with(view)
        graph.erase_node(node)
        record.fused.append(Fused(site_of(view), "expand"))
