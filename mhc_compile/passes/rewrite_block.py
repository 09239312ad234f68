"""Steps 4 to 7: expand, rewrite, collapse, check. A block's graph becomes n-stream.

`PASSES` is the order. Each pass takes a `BlockGraph` and changes its graph; what flows between
them is the list of sites and the set of nodes that hold n-stream values.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from mhc_compile.config import MHCConfig
from mhc_compile.errors import UnsupportedResidualError
from mhc_compile.passes.block_flow import block_candidates
from mhc_compile.passes.find_residuals import BlockPlan, Segment, format_source
from mhc_compile.passes.flow import Candidate, Flow
from mhc_compile.passes.trace_block import TracedBlock
from mhc_compile.runtime.guards import check_value
from mhc_compile.runtime.reference import apply_post_res, expand_streams

_PER_ELEMENT = frozenset({
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach",
    "dropout", "clamp", "clip", "nan_to_num", "tanh", "neg",
})  # fmt: skip
_PER_CHANNEL = frozenset({"layer_norm", "rms_norm", "softmax", "normalize"})
_WITH_NUMBER = frozenset({"add", "sub", "mul", "div", "truediv", "pow"})


@dataclass
class Site:
    """One residual add in the graph.

    `skip` is what the sublayer reads, `operand` what enters the add (the skip behind casts),
    `link` the nodes from the previous add to the skip, such as a post-norm.
    """

    add: fx.Node
    skip: fx.Node
    operand: fx.Node
    branch: list[fx.Node]
    absorbed: list[fx.Node]
    product: bool
    link: list[fx.Node]
    casts: list[fx.Node]


@dataclass
class BlockGraph:
    """A traced block while one segment of a stream in it is rewritten.

    `numbers` are the names of the sites' connections, `replaced` what became of erased adds.
    """

    block: nn.Module
    plan: BlockPlan
    segment: Segment
    config: MHCConfig
    traced: TracedBlock
    label: str
    sites: list[Site]
    numbers: list[int]
    collapse_name: str
    replaced: dict[fx.Node, fx.Node]
    streams: set[fx.Node] = field(default_factory=set)
    last: fx.Node | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph under rewriting."""
        return self.traced.graph

    def refuse(self, node: fx.Node, why: str) -> UnsupportedResidualError:
        """An error that names the block, the line of a node and the way out."""
        return UnsupportedResidualError(
            f"block {self.plan.name!r} ({self.label}) at "
            f"{format_source(node.meta.get('source'))}: {why}; leave its sites out with filter_fn, "
            "or move that operation into a submodule"
        )


def find_sites(
    block: nn.Module, plan: BlockPlan, config: MHCConfig, traced: TracedBlock, label: str
) -> list[BlockGraph]:
    """Finds the plan's residual adds in the graph and what connects them, by segment."""
    flow, nodes, candidates = block_candidates(traced.graph, block, plan, label)
    replaced: dict[fx.Node, fx.Node] = {}
    works = []
    for number, segment in enumerate(plan.segments):
        name = collapse_name(plan, number)
        work = BlockGraph(block, plan, segment, config, traced, label, [], [], name, replaced)
        previous: int | None = None
        for position, (s, _) in enumerate(plan.order):
            if s != number:
                continue
            c = candidates[position]
            link: list[fx.Node] = []
            if previous is not None and c.skip != previous:
                if not flow.reads(c.skip, previous):
                    raise work.refuse(nodes[c.index], "this add does not continue its stream")
                link = [nodes[i] for i in flow.light_path(previous, c.skip) or []]
            work.sites.append(_site(flow, nodes, c, link))
            work.numbers.append(position)
            previous = c.index
        works.append(work)
    return works


def collapse_name(plan: BlockPlan, number: int) -> str:
    """The name of a segment's `StreamCollapse` in its block's `mhc`."""
    ending = [i for i, segment in enumerate(plan.segments) if segment.collapse]
    return "collapse" if len(ending) == 1 else f"collapse{number}"


def _site(flow: Flow, nodes: list[fx.Node], c: Candidate, link: list[fx.Node]) -> Site:
    """Casts may stand between the skip and the add; what the sublayer reads is the skip."""
    path = [nodes[c.operand]]
    at = c.operand
    while at != c.skip:
        at = flow.ops[at].inputs[0]
        path.insert(0, nodes[at])
    add = nodes[c.index]
    read = [i for i, node in enumerate(path) if set(node.users) - {*path, add}]
    first = read[0] if read else len(path) - 1
    return Site(
        add, path[first], path[-1], [nodes[i] for i in c.branch], [nodes[i] for i in c.absorbed],
        c.product, link + path[1 : first + 1], path[first + 1 :],
    )  # fmt: skip


def expand_stream(work: BlockGraph) -> None:
    """Makes the first skip n-stream: copies where the stream starts, else the block's input."""
    first = work.sites[0]
    if not work.segment.expand:
        carried = work.traced.inputs.get(work.segment.stream_input or ())
        if carried is None:
            raise work.refuse(first.add, "the stream does not enter through an argument of forward")
        if carried is not first.skip:
            raise work.refuse(first.add, "the stream is changed between the block's input and add")
        work.streams.add(carried)
        return
    skip = first.skip = work.replaced.get(first.skip, first.skip)
    first.operand = work.replaced.get(first.operand, first.operand)
    position = skip if skip.op != "placeholder" else _last_placeholder(work.graph)
    with work.graph.inserting_after(position):
        expanded = work.graph.call_function(expand_streams, (skip, work.config.streams))
    expanded.meta["source"] = first.add.meta["source"]
    for reader in [first.add, *first.casts]:
        if skip in reader.all_input_nodes:
            reader.replace_input_with(skip, expanded)
    inside = _descendants_to(skip, first.add)
    for reader in list(skip.users):
        if reader in inside and reader is not expanded and reader not in first.casts:
            reader.replace_input_with(skip, expanded)
    first.skip = expanded
    first.operand = expanded if first.operand is skip else first.operand
    work.streams.add(expanded)


def rewrite_residuals(work: BlockGraph) -> None:
    """Gives readers of each skip the mix h = pre(x), and makes each add x' = post_res(x, F)."""
    graph, replaced = work.graph, work.replaced
    for number, site in zip(work.numbers, work.sites, strict=True):
        skip = replaced.get(site.skip, site.skip)
        operand = replaced.get(site.operand, site.operand)
        for node in site.link:
            _check_link(work, node)
        for node in site.casts:
            if _target_name(node) not in _PER_ELEMENT:
                raise work.refuse(node, "the residual is reshaped on its way to the add")
        work.streams.update([skip, operand, *site.link, *site.casts])
        readers = [r for r in skip.users if r is not site.add and r not in site.casts]
        with graph.inserting_after(_after_inputs(skip)):
            read = graph.call_module(f"mhc.{number}", (skip,))
        with graph.inserting_after(read):
            h = graph.call_function(operator.getitem, (read, 0))
        with graph.inserting_after(h):
            post = graph.call_function(operator.getitem, (read, 1))
        with graph.inserting_after(post):
            res = graph.call_function(operator.getitem, (read, 2))
        for reader in readers:
            if reader.meta.get("in_place"):
                raise work.refuse(reader, "the residual stream is changed in place")
            plain = _first_stream(work, skip) if reader.meta.get("guard") else h
            reader.replace_input_with(skip, plain)
        with graph.inserting_before(site.add):
            f = _branch_value(work, site, operand)
            mixed = graph.call_function(apply_post_res, (operand, f, post, res))
        for node in (read, mixed):
            node.meta["source"] = site.add.meta["source"]
        site.add.replace_all_uses_with(mixed)
        graph.erase_node(site.add)
        replaced[site.add] = mixed
        work.streams.add(mixed)
        work.last = mixed


def _first_stream(work: BlockGraph, skip: fx.Node) -> fx.Node:
    """A view with the plain shape, for guards, which run before anything else."""
    with work.graph.inserting_after(_last_placeholder(work.graph)):
        view = work.graph.call_function(torch.select, (skip, -2, 0))
    work.streams.add(view)
    return view


def _branch_value(work: BlockGraph, site: Site, operand: fx.Node) -> fx.Node:
    """F: the terms of the add without the skip, with torch.add's alpha and addcmul's value."""
    graph, kwargs = work.graph, site.add.kwargs
    branch = [work.replaced.get(term, term) for term in site.branch]
    if site.product:
        factors = [a for a in (*site.add.args, site.add.kwargs.get("tensor1"),
                               site.add.kwargs.get("tensor2")) if a is not None]  # fmt: skip
        value = graph.call_function(torch.mul, tuple(factors[-2:]))
        scale = kwargs.get("value", 1)
    else:
        value = branch[0]
        scale = kwargs.get("alpha", 1)
        if scale != 1 and (site.absorbed or site.add.args[0] is not operand):
            raise work.refuse(site.add, f"the residual itself is scaled by alpha={scale}")
        if any(n.kwargs.get("alpha", 1) != 1 for n in site.absorbed):
            raise work.refuse(site.add, "a sum of several branches has an alpha of its own")
        for term in branch[1:]:
            value = graph.call_function(operator.add, (value, term))
    return value if scale == 1 else graph.call_function(torch.mul, (value, scale))


def collapse_stream(work: BlockGraph) -> None:
    """Joins the streams behind the last site, or hands them on to the next block."""
    assert work.last is not None
    tail = work.last
    for node in _trailing(work, tail):
        work.streams.add(node)
        tail = node
    if not work.segment.collapse:
        return
    users = list(tail.users)
    with work.graph.inserting_after(tail):
        joined = work.graph.call_module(f"mhc.{work.collapse_name}", (tail,))
    for user in users:
        user.replace_input_with(tail, joined)
    for erased, node in list(work.replaced.items()):
        if node is tail:
            work.replaced[erased] = joined


def _trailing(work: BlockGraph, tail: fx.Node) -> list[fx.Node]:
    """Operations behind the last add that the stream takes alone: casts, and a post-norm."""
    links = [len(s.link) for s in work.sites if s.link]
    limit = max(links, default=len(work.graph.nodes))
    path: list[fx.Node] = []
    while len(tail.users) == 1 and len(path) < limit:
        node = next(iter(tail.users))
        if node.op == "output" or node.all_input_nodes[:1] != [tail]:
            break
        if not (_is_cast(work, node) or work.segment.post_norm and _is_per_stream(work, node)):
            break
        path.append(node)
        tail = node
    return path


def check_streams(work: BlockGraph) -> None:
    """States what a legal result is: n-stream values go only where n streams are understood.

    Raises:
        UnsupportedResidualError: something else reads the stream.
    """
    nodes = set(work.graph.nodes)
    for value in work.streams & nodes:
        for user in value.users:
            reads = user.op == "call_module" and str(user.target).startswith("mhc.")
            legal = user in work.streams or user.op == "output" or reads or _reads_kind(user)
            if not legal and not user.meta.get("guard"):
                raise work.refuse(user, "it reads the residual stream outside a sublayer")
            if user.op == "output" and (work.segment.collapse or value is not _final(work)):
                raise work.refuse(user, "the block returns a stream from between its sublayers")


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
    if len(mixes) != len(plan.sites) or not expected <= reads:
        raise works[0].refuse(
            works[0].sites[0].skip,
            f"{len(mixes)} of {len(plan.sites)} residual adds were rewritten",
        )


PASSES = (expand_stream, rewrite_residuals, collapse_stream, check_streams)
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


def _final(work: BlockGraph) -> fx.Node | None:
    """The stream value that the block hands on."""
    tail = work.last
    while tail is not None:
        after = [u for u in tail.users if u in work.streams]
        if not after:
            return tail
        tail = after[0]
    return None


def _is_cast(work: BlockGraph, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = work.block.get_submodule(str(node.target))
        return isinstance(module, nn.Dropout | nn.Identity)
    return _target_name(node) in _PER_ELEMENT and len(node.all_input_nodes) == 1


def _check_link(work: BlockGraph, node: fx.Node) -> None:
    if not _is_per_stream(work, node):
        raise work.refuse(node, "an operation on the residual stream that is not known to work on "
                                "each stream by itself")  # fmt: skip


def _is_per_stream(work: BlockGraph, node: fx.Node) -> bool:
    """Whether applying a node to [..., n, C] is the same as applying it to each [..., C]."""
    others = [n for n in node.all_input_nodes[1:] if isinstance(n.meta.get("value"), Tensor)]
    if any(n.op != "get_attr" or n.meta["value"].dim() > 1 for n in others):
        return False
    if node.op == "call_module":
        module = work.block.get_submodule(str(node.target))
        return len(node.all_input_nodes) == 1 and _module_is_per_stream(module, node)
    name = _target_name(node)
    if name in _WITH_NUMBER:
        return True
    return name in _PER_ELEMENT or name in _PER_CHANNEL


@torch.no_grad()
def _module_is_per_stream(module: nn.Module, node: fx.Node) -> bool:
    """Tries a norm (or dropout) on random streams, together and one by one."""
    if isinstance(module, nn.Dropout | nn.Identity):
        return True
    value = node.all_input_nodes[0].meta.get("value")
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return isinstance(module, nn.LayerNorm | nn.RMSNorm)
    streams = torch.stack([torch.randn_like(value) for _ in range(3)], -2)
    training = module.training
    module.eval()
    try:
        together = module.forward(streams)
        single = [module.forward(streams[..., i, :].contiguous()) for i in range(3)]
    except Exception:
        return False
    finally:
        module.train(training)
    if not isinstance(together, Tensor) or together.shape != streams.shape:
        return False
    return torch.allclose(together, torch.stack(single, -2), rtol=1e-3, atol=1e-4)


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _descendants_to(source: fx.Node, stop: fx.Node) -> set[fx.Node]:
    """Nodes through which `stop` depends on `source`."""
    needed: set[fx.Node] = set()
    todo = [stop]
    while todo:
        node = todo.pop()
        if node not in needed and node is not source:
            needed.add(node)
            todo += node.all_input_nodes
    return needed


def _after_inputs(node: fx.Node) -> fx.Node:
    return node if node.op != "placeholder" else _last_placeholder(node.graph)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op in ("placeholder", "get_attr")][-1]


def _has_effect(node: fx.Node) -> bool:
    """Submodules, methods of opaque arguments and in-place writes are kept even if unread."""
    if node.op in ("placeholder", "output", "call_module") or node.meta.get("in_place"):
        return True
    if node.target is check_value:
        return True
    if node.op != "call_method":
        return False
    owner = node.args[0]
    return not (isinstance(owner, fx.Node) and isinstance(owner.meta.get("value"), Tensor))
