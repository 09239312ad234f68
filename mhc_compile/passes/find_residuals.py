"""Step 2, find: the residual streams of a recorded model, and the blocks that own them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from mhc_compile.passes.channel_axis import check_channel_axis
from mhc_compile.passes.flow import (
    SCALES,
    SUBS,
    Candidate,
    Flow,
    branch_region,
    find_candidates,
)
from mhc_compile.passes.plan import (
    BlockPlan,
    Path,
    Plan,
    ResidualSite,
    Segment,
    format_source,
)
from mhc_compile.passes.record import Recording
from mhc_compile.passes.streams import link_streams, split_nested
from mhc_compile.passes.sublayer_kind import is_mlp


@dataclass
class _Stream:
    """A chain of candidates while its plan is worked out."""

    chain: list[Candidate]
    owners: list[Path]
    reason: str = ""
    refused_at: int = 0


def plan_rewrite(
    recording: Recording, filter_fn: Callable[[ResidualSite], bool] | None = None
) -> Plan:
    """Finds residual adds by data flow alone and assigns them to blocks.

    Args:
        recording: from `record_forward`.
        filter_fn: which sites to take; a site left out stays a plain residual on the collapsed
            stream, which splits its stream in two.

    Returns:
        Every site, accepted or refused with the reason, and a plan for each block.
    """
    flow = recording.flow
    candidates = find_candidates(flow)
    chains, _ = link_streams(flow, candidates)
    accepted, _ = split_nested(flow, candidates, chains)
    sites: list[ResidualSite] = []
    blocks: list[BlockPlan] = []
    names: Counter[str] = Counter()
    streams = [_Stream([candidates[i] for i in chain], []) for chain in accepted]
    for stream in streams:
        _check_stream(flow, stream)
        stream.owners = [_owner(flow, c) for c in stream.chain]
    _lift_owners(recording, [stream for stream in streams if not stream.reason])
    for number, stream in enumerate(streams):
        found = [_site(flow, stream, k, number, names) for k in range(len(stream.chain))]
        if filter_fn is not None:
            found = [_filtered(site, filter_fn) for site in found]
        sites += found
        for part in _runs(found):
            blocks += _segments(recording, stream, found, part)
    seen = frozenset(flow.ops[i].source for i in candidates)
    return Plan(tuple(sites), tuple(replace(b, seen=seen) for b in _merged(blocks)))


def _check_stream(flow: Flow, stream: _Stream) -> None:
    """Refuses channel axes that are not the last."""
    for k, candidate in enumerate(stream.chain):
        reason = check_channel_axis(flow, candidate)
        if reason:
            stream.reason, stream.refused_at = reason, k
            return


def _owner(flow: Flow, candidate: Candidate) -> Path:
    """The innermost module call that holds the add and every operation of its sublayer."""
    path = flow.ops[candidate.index].path
    for index in branch_region(flow, candidate):
        # A view at the end of the module that made the state is no part of the sublayer.
        if not flow.ops[index].noop or flow.canonical(index) != candidate.skip:
            path = _common(path, flow.ops[index].path)
    return path


def _lift_owners(recording: Recording, streams: list[_Stream]) -> None:
    """Widens owners until blocks do not nest, run once, and hold all that reads a stream.

    What leaves the module around a whole stream is collapsed on its way, so readers outside it
    are no reason to widen.
    """
    flow = recording.flow
    calls = Counter(name for name, _ in recording.calls)
    around = {id(stream): _shared(stream.owners) for stream in streams}
    changed = True
    while changed:
        changed = False
        known = {owner for stream in streams for owner in stream.owners}
        for stream in streams:
            owners = stream.owners
            for k, owner in enumerate(owners):
                lifted = min((o for o in known if owner[: len(o)] == o), key=len)
                while len(lifted) > 1 and calls[lifted[-1][0]] > 1:
                    lifted = lifted[:-1]
                changed |= lifted != owner
                owners[k] = lifted
            for k in range(len(owners) - 1):
                shared = _outside_reader(flow, stream, k, around[id(stream)])
                if shared is not None and (owners[k] != shared or owners[k + 1] != shared):
                    owners[k] = owners[k + 1] = shared
                    changed = True


def _shared(paths: list[Path]) -> Path:
    """The innermost module call around all paths."""
    around = paths[0]
    for path in paths:
        around = _common(around, path)
    return around


def _outside_reader(flow: Flow, stream: _Stream, k: int, around: Path) -> Path | None:
    """The module call that must own sites k and k + 1, if something between them lies outside."""
    here, there = stream.owners[k], stream.owners[k + 1]
    start = stream.chain[k].index
    link = _link(flow, stream, k + 1)
    inside = {start, *link}
    involved = list(link)
    for value in inside:
        involved += [
            r for r in flow.readers[value]
            if r not in inside and flow.is_live(r) and flow.ops[r].path[: len(around)] == around
        ]  # fmt: skip
    outside = [
        flow.ops[i].path for i in involved
        if flow.ops[i].path[: len(here)] != here and flow.ops[i].path[: len(there)] != there
    ]  # fmt: skip
    if not outside:
        return None
    shared = _common(here, there)
    for path in outside:
        shared = _common(shared, path)
    return shared


def _site(flow: Flow, stream: _Stream, k: int, number: int, names: Counter[str]) -> ResidualSite:
    candidate, owner = stream.chain[k], stream.owners[k]
    name = _branch_name(flow, candidate, owner)
    names[name] += 1
    if names[name] > 1:
        name = f"{name}#{names[name]}"
    op = flow.ops[candidate.index]
    reason = stream.reason or candidate.reason
    if stream.reason and k != stream.refused_at:
        reason = f"same stream as the refused add at {_source_of(flow, stream)}: {stream.reason}"
    return ResidualSite(
        name, owner[-1][0], format_source(op.source), number, op.shape[-1], not reason, reason,
        _evidence(flow, stream, k), is_mlp(flow, candidate),
    )  # fmt: skip


def _evidence(flow: Flow, stream: _Stream, k: int) -> str:
    """What was seen of a site, as the user may check it."""
    candidate, owner = stream.chain[k], stream.owners[k]
    scaled = any(flow.ops[i].name in SCALES for i in candidate.way)
    form = "x - F(x)" if flow.ops[candidate.index].name in SUBS else "x + F(x)"
    form = form.replace("x", "s * x", 1) if scaled else form
    region = [flow.ops[i] for i in branch_region(flow, candidate)]
    paths = [op.path[len(owner)][0] for op in region if len(op.path) > len(owner)]
    prefix = len(owner[-1][0]) + 1 if owner[-1][0] else 0
    parts = list(dict.fromkeys(path[prefix:] for path in paths))
    inside = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
    weights = len({w for op in region for w in op.weights})
    what = f"F reads x through {inside or f'{len(region)} operations'} ({weights} weights)"
    if k == 0:
        return f"{form}; {what}; starts the stream"
    steps = [flow.ops[i].name for i in _link(flow, stream, k) if not flow.ops[i].noop]
    between = f" through {', '.join(steps[:3])}" if steps else ""
    return f"{form}; {what}; continues site {k - 1} of its stream{between}"


def _source_of(flow: Flow, stream: _Stream) -> str:
    return format_source(flow.ops[stream.chain[stream.refused_at].index].source)


def _branch_name(flow: Flow, candidate: Candidate, owner: Path) -> str:
    """The owner's child in which the last matmul of the sublayer runs, else the owner's name."""
    name = owner[-1][0]
    for index in reversed(branch_region(flow, candidate)):
        op = flow.ops[index]
        if op.heavy and len(op.path) > len(owner):
            return op.path[len(owner)][0]
    return f"{name}.residual" if name else "residual"


def _filtered(site: ResidualSite, filter_fn: Callable[[ResidualSite], bool]) -> ResidualSite:
    if site.accepted and not filter_fn(site):
        return replace(site, accepted=False, reason="left out by filter_fn")
    return site


def _runs(sites: list[ResidualSite]) -> list[list[int]]:
    """Maximal runs of accepted sites; each becomes a stream of its own."""
    runs: list[list[int]] = []
    for k, site in enumerate(sites):
        if not site.accepted:
            continue
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


def _segments(
    recording: Recording, stream: _Stream, sites: list[ResidualSite], run: list[int]
) -> list[BlockPlan]:
    """Cuts a run of accepted sites at the borders of their blocks; one plan a block."""
    flow = recording.flow
    groups: list[list[int]] = []
    for k in run:
        if groups and stream.owners[groups[-1][-1]] == stream.owners[k]:
            groups[-1].append(k)
        else:
            groups.append([k])
    links = {k: _link(flow, stream, k) for k in range(1, len(stream.chain))}
    between = [i for link in links.values() for i in link if not flow.ops[i].noop]
    norms = frozenset(type(recording.calls[flow.ops[i].path[-1]].module) for i in between)
    passed = _passed_values(recording)
    plans = []
    states: set[int] = set()  # what has n streams when a group starts
    for group in groups:
        owner = stream.owners[group[0]]
        light = _light_modules(recording, owner[-1][0])
        adds = tuple(stream.chain[k].index for k in group)
        linking = [i for k in (*group, group[-1] + 1) for i in links.get(k, [])]
        starts, ends = group[0] == run[0], group[-1] == run[-1]
        if not starts:
            states.update(links[group[0]])
        call = recording.calls[owner[-1]]
        carrying = sorted(((i, p) for p, i in call.inputs.items() if i in states), reverse=True)
        states.update(adds, *(links[k] for k in group if k != run[0]))
        known = {flow.canonical(i) for i in states} | {stream.chain[k].skip for k in group}
        through = [path for path, values in passed if not known.isdisjoint(values)]
        # A scale on the skip must show, be it a module of its own.
        ways = [i for k in group for i in stream.chain[k].way if not flow.ops[i].noop]
        opened = _inner_modules(owner, [flow.ops[i].path for i in (*adds, *ways)])
        opened |= _inner_modules(owner, [flow.ops[i].path for i in linking] + through) - light
        after = [adds[-1], *links.get(group[-1] + 1, [])]
        handed = () if ends else tuple(k for k, i in enumerate(call.outputs) if i in after)
        segment = Segment(
            tuple(sites[k] for k in group), tuple(flow.ops[i].source for i in adds), adds,
            group[0], tuple((p, len(flow.ops[i].shape)) for i, p in carrying), starts, ends,
            handed, norms,
        )  # fmt: skip
        plans.append(BlockPlan(owner[-1][0], (segment,), frozenset(opened), light))
    return plans


def _merged(plans: list[BlockPlan]) -> tuple[BlockPlan, ...]:
    """One plan a block, also where it holds parts of several streams."""
    merged: dict[str, BlockPlan] = {}
    for plan in plans:
        known = merged.get(plan.name)
        if known is not None:
            plan = replace(known, segments=known.segments + plan.segments,
                           opened=known.opened | plan.opened)  # fmt: skip
        merged[plan.name] = plan
    return tuple(merged.values())


def _link(flow: Flow, stream: _Stream, k: int) -> list[int]:
    """Operations between the previous add of the stream and the skip of site k."""
    start, stop = stream.chain[k - 1].index, stream.chain[k].operand
    return [] if start == stop else flow.light_path(start, stop) or []


def _passed_values(recording: Recording) -> list[tuple[Path, set[int]]]:
    """For each module call the values that go in and come out, as they are or as views."""
    canonical = recording.flow.canonical
    return [
        (c.path, {canonical(i) for i in c.outputs}.intersection(map(canonical, c.inputs.values())))
        for c in recording.calls.values()
    ]


def _inner_modules(owner: Path, paths: list[Path]) -> set[str]:
    """Modules inside an owner on the paths of some operations, by their names relative to it."""
    prefix = len(owner[-1][0]) + 1 if owner[-1][0] else 0
    return {name[prefix:] for path in paths if path[: len(owner)] == owner
            for name, _ in path[len(owner) :]}  # fmt: skip


def _light_modules(recording: Recording, owner: str) -> frozenset[str]:
    heavy = {name for op in recording.flow.ops if op.heavy for name, _ in op.path}
    prefix = f"{owner}." if owner else ""
    names = {name for name, _ in recording.calls if name.startswith(prefix) and name != owner}
    return frozenset(name[len(prefix) :] for name in names - heavy)


def _common(a: Path, b: Path) -> Path:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return a[:length]
