"""The planned residual adds in a block's graph, and what connects them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from mhc_compile.config import MHCConfig
from mhc_compile.errors import UnsupportedResidualError
from mhc_compile.passes.block_flow import block_candidates
from mhc_compile.passes.flow import Candidate, Flow, bits_of, branch_region
from mhc_compile.passes.per_stream import target_name
from mhc_compile.passes.plan import BlockPlan, Segment, format_source
from mhc_compile.passes.trace_block import TracedBlock


@dataclass
class Site:
    """One residual add in the graph.

    `skip` is what the sublayer reads, `operand` what enters the add, `casts` the casts and scales
    between them; `link` are the nodes from earlier states to the skip, such as a post-norm;
    `inside` those of the sublayer.
    """

    add: fx.Node
    skip: fx.Node
    operand: fx.Node
    branch: list[fx.Node]
    absorbed: list[fx.Node]
    product: bool
    link: list[fx.Node]
    casts: list[fx.Node]
    inside: set[fx.Node]


@dataclass
class BlockGraph:
    """A traced block while one segment of a stream in it is rewritten.

    `numbers` are the names of the sites' connections, `replaced` what became of erased nodes,
    `links` the links of all segments, `trailing` what the stream passes behind its last site,
    `finals` the results that hand it on, `streams` the nodes that hold n streams.
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
    links: set[fx.Node]
    trailing: list[fx.Node] = field(default_factory=list)
    finals: list[fx.Node] = field(default_factory=list)
    start: fx.Node | None = None
    streams: set[fx.Node] = field(default_factory=set)
    last: fx.Node | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph under rewriting."""
        return self.traced.graph

    def current(self, node: fx.Node) -> fx.Node:
        """What a node of the traced graph has become."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

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
    index_of = {node: index for index, node in enumerate(nodes)}
    replaced: dict[fx.Node, fx.Node] = {}
    links: set[fx.Node] = set()
    works = []
    for number, segment in enumerate(plan.segments):
        name = collapse_name(plan, number)
        work = BlockGraph(
            block, plan, segment, config, traced, label, [], [], name, replaced, links
        )
        inputs = [traced.inputs[p] for p, _ in segment.stream_inputs if p in traced.inputs]
        states = set() if segment.expand else {index_of[node] for node in inputs}
        for position, (s, _) in enumerate(plan.order):
            if s != number:
                continue
            c = candidates[position]
            link = _link(flow, states, c.operand)
            if states and c.operand not in states | set(link):
                raise work.refuse(nodes[c.index], "this add does not continue its stream")
            site = _site(flow, nodes, c, link if states else None)
            work.sites.append(site)
            work.numbers.append(position)
            links.update(site.link, site.casts)
            states.update(link, [c.index])
        work.start = work.sites[0].skip
        last = index_of[work.sites[-1].add]
        others = {c.index for c in candidates}
        work.trailing = [nodes[i] for i in _trailing(work, flow, nodes, states, last, others)]
        links.update(work.trailing)
        works.append(work)
    return works


def _trailing(
    work: BlockGraph, flow: Flow, nodes: list[fx.Node], states: set[int], last: int, adds: set[int]
) -> list[int]:
    """What stands between the last site and where the stream leaves the block or ends.

    A stream that ends takes the norm along that stands behind every sublayer (post-norm): the
    same operations as between two sites here, or one module of a class that stands there. Casts
    do not count, since not every add of a model needs them.
    """
    if not work.segment.collapse:
        leaves = _output_leaves(nodes[-1].args[0])
        handed = [leaves[k] for k in work.segment.outputs if k < len(leaves)] or leaves
        found = {i for k, n in enumerate(nodes) if n in handed for i in _link(flow, states, k)}
        work.finals = [n for n in handed if nodes.index(n) in found | states]
        return sorted(found)

    def label(node: fx.Node) -> tuple[str, str]:
        """What a node calls, whichever module of that class or line it is."""
        if node.op == "call_module":
            return node.op, type(work.block.get_submodule(str(node.target))).__qualname__
        constants = [a for a in node.args if not isinstance(a, fx.Node)]
        return node.op, f"{target_name(node)}{constants}"

    noops = {node for node, op in zip(nodes, flow.ops, strict=True) if op.noop}

    def steps(link: list[fx.Node]) -> list[fx.Node]:
        return [node for node in link if node not in noops]

    patterns = {tuple(map(label, steps(site.link))) for site in work.sites} - {()}
    for stop in reversed(flow.between(last, len(nodes) - 1)):
        link, node = _link(flow, {last}, stop), nodes[stop]
        on_way = steps([nodes[i] for i in link])
        if node not in on_way or not isinstance(node.meta.get("value"), Tensor):
            continue
        if not adds.isdisjoint(link):  # beyond the start of another stream
            continue
        if tuple(map(label, on_way)) in patterns:
            return link
        if on_way == [node] and node.op == "call_module":
            if type(work.block.get_submodule(str(node.target))) in work.segment.norms:
                return link
    return []


def _output_leaves(value: Any) -> list[fx.Node]:
    """The tensors that a block returns, in the order of `tensor_leaves`."""
    if isinstance(value, fx.Node):
        if isinstance(value.target, type) and value.kwargs:  # a model output
            return _output_leaves(dict(value.kwargs))
        return [value] if isinstance(value.meta.get("value"), Tensor) else []
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _output_leaves(v)]
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in _output_leaves(v)]
    return []


def _link(flow: Flow, states: set[int], stop: int) -> list[int]:
    """Light operations from the states of a stream so far to `stop` (included), in order."""
    lifted: set[int] = set()
    reach = 0
    for state in states:
        reach |= flow.descendants[state]
    for i in bits_of(reach & (flow.ancestors[stop] | 1 << stop) & ~flow.heavy):
        op = flow.ops[i]
        carries = bool(
            op.is_float and op.shape
        )  # not a mask, a size, or a number such as isinf().any()
        if carries and i not in states and any(j in states or j in lifted for j in op.inputs):
            lifted.add(i)
    needed: set[int] = set()
    todo = [stop]
    while todo:
        at = todo.pop()
        if at in lifted and at not in needed:
            needed.add(at)
            todo += flow.ops[at].inputs
    return sorted(needed)


def collapse_name(plan: BlockPlan, number: int) -> str:
    """The name of a segment's `StreamCollapse` in its block's `mhc`."""
    ending = [i for i, segment in enumerate(plan.segments) if segment.collapse]
    return "collapse" if len(ending) == 1 else f"collapse{number}"


def _site(flow: Flow, nodes: list[fx.Node], c: Candidate, link: list[int] | None) -> Site:
    """Casts may stand between the state and the add; what the sublayer reads is the skip."""
    path = [nodes[i] for i in (c.skip, *c.way)]
    add = nodes[c.index]
    inside = {nodes[i] for i in branch_region(flow, c)} - set(path)
    inside |= {nodes[i] for i in c.branch}
    read = [i for i, node in enumerate(path) if inside & set(node.users)]
    first = read[0] if read else len(path) - 1
    casts = path[first + 1 :]
    return Site(
        add, path[first], path[-1], [nodes[i] for i in c.branch], [nodes[i] for i in c.absorbed],
        c.product, [nodes[i] for i in link or () if nodes[i] not in casts], casts, inside,
    )  # fmt: skip
