"""Steps 4 to 7: expand, rewrite, collapse, read. A block's graph becomes n-stream.

`PASSES` is the order. Each pass takes a `BlockGraph` and changes its graph; what flows between
them is the list of sites and the set of nodes that hold n-stream values.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.config import MHCConfig
from mhc_compile.passes.flow import LERPS, NOOPS, SUBS
from mhc_compile.passes.graph_sites import BlockGraph, Site, find_sites
from mhc_compile.passes.per_stream import lift_node, target_name
from mhc_compile.passes.plan import BlockPlan
from mhc_compile.passes.trace_block import TracedBlock
from mhc_compile.runtime.guards import check_value
from mhc_compile.runtime.reference import maps_like
from mhc_compile.runtime.streams import apply_post_res, collapse_streams, expand_streams


def expand_stream(work: BlockGraph) -> None:
    """Makes the first skip n-stream: copies where the stream starts, else the block's input."""
    first = work.sites[0]
    if not work.segment.expand:
        paths = [path for path, _ in work.segment.stream_inputs]
        work.streams.update(n for p, n in work.traced.inputs.items() if p in paths)
        if not work.streams:
            raise work.refuse(first.add, "the stream does not enter through an argument of forward")
        return
    skip = first.skip = work.current(first.skip)
    first.operand = work.current(first.operand)
    position = skip if skip.op != "placeholder" else _last_placeholder(work.graph)
    with work.graph.inserting_after(position):
        expanded = work.graph.call_function(expand_streams, (skip, work.config.streams))
    expanded.meta.update(source=first.add.meta["source"], value=skip.meta["value"])
    for reader in [first.add, *first.casts]:
        if skip in reader.all_input_nodes:
            reader.replace_input_with(skip, expanded)
    for reader in list(skip.users):
        if reader in first.inside and reader not in first.casts:
            reader.replace_input_with(skip, expanded)
    first.skip = expanded
    first.operand = expanded if first.operand is skip else first.operand
    work.streams.add(expanded)


def rewrite_residuals(work: BlockGraph) -> None:
    """Gives readers of each skip the mix h = pre(x), and makes each add x' = post_res(x, F)."""
    graph = work.graph
    for number, site in zip(work.numbers, work.sites, strict=True):
        _copy_casts(site)
        for node in [*site.link, *site.casts]:
            _lift(work, node)
        skip, operand = work.current(site.skip), work.current(site.operand)
        before, after = (n.meta["value"].shape for n in (site.skip, site.operand))
        split = before[-1] != after[-1]  # the add's channels are a part of the state's
        if split and any(target_name(n) not in NOOPS for n in site.casts):
            raise work.refuse(site.add, "the channels are split and scaled on their way to the add")
        readers = [r for r in skip.users if r in site.inside and r not in work.links]
        source = operand if split else skip
        with graph.inserting_after(_after_inputs(source)):
            read = graph.call_module(f"mhc.{number}", (source,))
        with graph.inserting_after(read):
            h = graph.call_function(operator.getitem, (read, 0))
        with graph.inserting_after(h):
            post = graph.call_function(operator.getitem, (read, 1))
        with graph.inserting_after(post):
            res = graph.call_function(operator.getitem, (read, 2))
        if split:
            h = _shaped_like(graph, h, skip, res)
            if any(r < h for r in readers):
                raise work.refuse(site.add, "the channels are split behind the sublayer's start")
        h.meta["value"] = site.skip.meta["value"]
        _give(work, readers, skip, h)
        with graph.inserting_before(site.add):
            if before != after and not split:
                post = _reshaped_maps(graph, post, operand, 1)
                res = _reshaped_maps(graph, res, operand, 2)
            operand, f = _terms(work, site, operand)
            kind: dict[str, Any] = {"after_mlp": True} if work.plan.sites[number].mlp else {}
            mixed = graph.call_function(apply_post_res, (operand, f, post, res), kind)
        for node in (read, mixed):
            node.meta["source"] = site.add.meta["source"]
        mixed.meta["value"] = site.add.meta.get("value")
        site.add.replace_all_uses_with(mixed)
        graph.erase_node(site.add)
        work.replaced[site.add] = mixed
        work.streams.add(mixed)
        work.last = mixed


def _reshaped_maps(graph: fx.Graph, maps: fx.Node, operand: fx.Node, axes: int) -> fx.Node:
    """Post or res for an add at which the tokens lie in other axes than where they were read."""
    reshaped = graph.call_function(maps_like, (maps, operand, axes))
    reshaped.meta["per_stream"] = True
    return reshaped


def _give(work: BlockGraph, readers: list[fx.Node], state: fx.Node, h: fx.Node) -> None:
    """Makes the sublayer read h in the place of the state."""
    for reader in readers:
        if reader.meta.get("in_place"):
            raise work.refuse(reader, "the residual stream is changed in place")
        reader.replace_input_with(state, h)


def _copy_casts(site: Site) -> None:
    """Where the sublayer reads the state behind casts too, it gets casts of its own."""
    at = site.skip
    for k, cast in enumerate(site.casts):
        if not any(site.inside & set(c.users) for c in site.casts[k:]):
            return
        before = site.casts[k - 1] if k else site.skip
        with cast.graph.inserting_after(cast):
            at = cast.graph.node_copy(cast, partial(_other, before, at))
        for reader in site.inside & set(cast.users):
            reader.replace_input_with(cast, at)
        site.inside.add(at)


def _other(before: fx.Node, after: fx.Node, node: fx.Node) -> fx.Node:
    return after if node is before else node


def _lift(work: BlockGraph, node: fx.Node) -> fx.Node:
    """Makes a node of a link work on n streams, see `lift_node`."""
    node = work.current(node)
    lifted = lift_node(work.block, node, work.streams, work.config.streams)
    if lifted is None:
        raise work.refuse(
            node, "an operation on the residual stream that cannot be done on each stream by itself"
        )
    if lifted is not node:
        work.replaced[node] = lifted
    work.streams.add(lifted)
    if isinstance(lifted.meta.get("value"), tuple | list):
        work.streams.update(u for u in lifted.users if u.target is operator.getitem)
    return lifted


def _shaped_like(graph: fx.Graph, h: fx.Node, skip: fx.Node, behind: fx.Node) -> fx.Node:
    """Gives h, read where the residual has another shape or dtype, those of the skip."""
    with graph.inserting_after(behind):
        like = graph.call_function(torch.select, (skip, -2, 0))
    like.meta["per_stream"] = True
    with graph.inserting_after(like):
        cast = graph.call_method("type_as", (h, like))
    with graph.inserting_after(cast):
        return graph.call_method("view_as", (cast, like))


def _first_stream(work: BlockGraph, skip: fx.Node) -> fx.Node:
    """A view with the plain shape, for what asks for sizes only, perhaps before all else."""
    with work.graph.inserting_after(_after_inputs(skip)):
        view = work.graph.call_function(torch.select, (skip, -2, 0))
    view.meta["per_stream"] = True
    return view


def _reads_size(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "shape" or node.target in ("size", "dim")


def _terms(work: BlockGraph, site: Site, operand: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The skip and F as `apply_post_res` takes them.

    F is the sum of the add's other terms, with the sign of a difference, torch.add's alpha and
    addcmul's value.
    """
    graph, add = work.graph, site.add
    branch = [work.current(term) for term in site.branch]
    alpha: Any = add.kwargs.get("alpha", 1)
    if target_name(add) in LERPS:
        weight: Any = add.args[2] if len(add.args) > 2 else add.kwargs["weight"]
        if isinstance(weight, fx.Node) and weight.meta["value"].dim() > 1:
            raise work.refuse(add, "a lerp whose weight differs between tokens; write it as a sum")
        rest = graph.call_function(operator.sub, (1, weight))
        kept = graph.call_function(torch.mul, (operand, rest))
        work.streams.add(kept)
        return kept, graph.call_function(torch.mul, (branch[0], weight))
    if site.product:
        factors = [a for a in (*add.args, add.kwargs.get("tensor1"), add.kwargs.get("tensor2"))
                   if a is not None]  # fmt: skip
        value = graph.call_function(torch.mul, tuple(factors[-2:]))
        return operand, _times(graph, value, add.kwargs.get("value", 1))
    if any(n.kwargs.get("alpha", 1) != 1 for n in site.absorbed) or site.absorbed and alpha != 1:
        raise work.refuse(add, "a sum of several branches has an alpha of its own")
    value = branch[0]
    for term in branch[1:]:
        value = graph.call_function(operator.add, (value, term))
    if target_name(add) in SUBS:
        return operand, _times(graph, value, -alpha)
    if add.args[0] is operand or not isinstance(add.args[0], fx.Node):
        return operand, _times(graph, value, alpha)
    scaled = _times(graph, operand, alpha)
    work.streams.add(scaled)
    return scaled, value


def _times(graph: fx.Graph, value: fx.Node, factor: Any) -> fx.Node:
    """`factor * value`, a number or a node."""
    plain = isinstance(factor, int | float) and factor == 1
    return value if plain else graph.call_function(torch.mul, (value, factor))


def collapse_stream(work: BlockGraph) -> None:
    """Joins the streams behind the last site, or hands them on to the next block."""
    assert work.last is not None
    tail = work.last
    for node in work.trailing:
        tail = _lift(work, node)
    if not work.segment.collapse:
        return
    users = list(tail.users)
    with work.graph.inserting_after(tail):
        joined = work.graph.call_module(f"mhc.{work.collapse_name}", (tail,))
    joined.meta["value"] = tail.meta.get("value")
    for user in users:
        user.replace_input_with(tail, joined)
    work.replaced[tail] = joined


def read_streams(work: BlockGraph) -> None:
    """Gives the mean of the streams to what reads them outside a sublayer.

    Such readers are probes of intermediate states: auxiliary heads, long skips through a matmul,
    lists of hidden states.
    """
    finals = {work.current(node) for node in work.finals}
    for value in [n for n in work.graph.nodes if n in work.streams]:
        for user in [u for u in value.users if _reads_size(u) or u.meta.get("guard")]:
            user.replace_input_with(value, _first_stream(work, value))
        outside = [u for u in value.users if not _takes_streams(work, u, value in finals)]
        if not outside:
            continue
        with work.graph.inserting_after(_after_inputs(value)):
            mean = work.graph.call_function(collapse_streams, (value,), {"mode": "mean"})
        mean.meta.update({k: v for k, v in value.meta.items() if k in ("source", "value")})
        for user in outside:
            if user.meta.get("in_place"):
                raise work.refuse(user, "the residual stream is changed in place")
            user.replace_input_with(value, mean)


def _takes_streams(work: BlockGraph, user: fx.Node, is_final: bool) -> bool:
    """Whether a node is one of those that n-stream values may go to."""
    if user.op == "output":
        return is_final
    reads = user.op == "call_module" and str(user.target).startswith("mhc.")
    marked = (
        user.meta.get("per_stream") or user.meta.get("guard") or user.target is collapse_streams
    )
    return user in work.streams or reads or bool(marked) or _reads_kind(user)


def _reads_kind(node: fx.Node) -> bool:
    """Whether a node asks for what n streams and one have in common."""
    return node.target is getattr and node.args[1] in ("dtype", "device", "layout", "is_cuda")


def check_graph(works: list[BlockGraph]) -> None:
    """Drops what nothing needs and counts what was rewritten.

    Raises:
        UnsupportedResidualError: a site is missing.
    """
    graph, plan = works[0].graph, works[0].plan
    graph.eliminate_dead_code(_has_effect)
    graph.lint()
    mixes = [n for n in graph.nodes if n.target is apply_post_res]
    reads = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    expected = {f"mhc.{number}" for number in range(len(plan.sites))}
    starts = [work.start for work in works if work.segment.expand]
    for work in works:
        # Of two streams that start at one state (reversible halves) the first one reads it.
        shared = starts.count(work.start) > 1
        for number, site in zip(work.numbers[shared:], work.sites[shared:], strict=True):
            read = [n for n in graph.nodes if n.op == "call_module" and n.target == f"mhc.{number}"]
            if not any(user.args[1] == 0 for n in read for user in n.users):
                raise work.refuse(
                    work.current(site.add), "the sublayer does not read the state it is added to"
                )
    if len(mixes) != len(plan.sites) or not expected <= reads:
        raise works[0].refuse(
            works[0].sites[0].skip,
            f"{len(mixes)} of {len(plan.sites)} residual adds were rewritten",
        )


PASSES = (expand_stream, rewrite_residuals, collapse_stream, read_streams)
"""What happens to each segment, in this order; `find_sites` comes before, `check_graph` after."""


def rewrite_block(
    block: nn.Module, plan: BlockPlan, config: MHCConfig, traced: TracedBlock, label: str = ""
) -> fx.Graph:
    """Rewrites a traced block; with one stream the graph stays as it is.

    Returns:
        The rewritten graph. It calls `mhc.<k>`, one `HyperConnection` a site, and
        `mhc.collapse`.

    Raises:
        UnsupportedResidualError: a residual add or something near it cannot be rewritten.
    """
    works = find_sites(block, plan, config, traced, label or type(block).__name__)
    if config.streams == 1:
        return traced.graph
    for work in works:
        for rewrite in PASSES:
            rewrite(work)
    check_graph(works)
    return traced.graph


def _after_inputs(node: fx.Node) -> fx.Node:
    return node if node.op != "placeholder" else _last_placeholder(node.graph)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op in ("placeholder", "get_attr")][-1]


def _has_effect(node: fx.Node) -> bool:
    """Submodules, methods of opaque arguments and in-place writes are kept even if unread."""
    if node.op in ("placeholder", "output", "call_module") or node.meta.get("in_place"):
        return True
    if node.target is check_value or node.meta.get("effect"):
        return True
    if node.op != "call_method":
        return False
    owner = node.args[0]
    return not (isinstance(owner, fx.Node) and isinstance(owner.meta.get("value"), Tensor))
