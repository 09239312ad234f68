"""Joins residual adds into streams, and tells streams from adds inside their sublayers."""

from __future__ import annotations

from mhc_compile.passes.flow import PARTIAL, Candidate, Flow, bits_of, branch_bits


def link_streams(
    flow: Flow, candidates: dict[int, Candidate]
) -> tuple[list[list[int]], dict[int, int]]:
    """Joins candidates whose skip comes from another one through light operations alone.

    A sum of two states of one stream, such as `a * x + b * x0`, is a link and no candidate, and so
    is one whose branch has neither a weight nor a matmul, such as `x - mean(x)` (where others
    have). Where a state starts two streams, both are streams of their own.

    Returns:
        The chains, each a list of candidate indices in execution order, and for each candidate
        that has one, its predecessor.
    """
    bits = {index: branch_bits(flow, candidate) for index, candidate in candidates.items()}
    previous: dict[int, int] = {}
    weighty = flow.heavy | sum(1 << op.index for op in flow.ops if op.weights)
    idle = {i: candidates[i] for i, region in bits.items() if not region & weighty}
    links: dict[int, Candidate] = idle if len(idle) < len(candidates) else {}
    for index, candidate in candidates.items():
        if index in links:
            continue
        if _rejoins(flow, candidates, bits, previous, links, candidate):
            links[index] = candidate
            continue
        found = _predecessor(flow, candidates, links, candidate.skip)
        if found is not None:
            previous[index] = found
    _cut_forks(previous, bits)
    group: dict[int, int] = {}
    chains: dict[int, list[int]] = {}
    for index in candidates:
        if index not in links:
            group[index] = group[previous[index]] if index in previous else index
            chains.setdefault(group[index], []).append(index)
    return list(chains.values()), previous


def _predecessor(
    flow: Flow,
    candidates: dict[int, Candidate],
    links: dict[int, Candidate],
    start: int,
    *,
    permuted: bool = False,
) -> int | None:
    """The latest candidate from which `start` comes through light operations alone.

    Its last axis is as long as that of `start`, or, with `permuted`, all its axes together are.
    """
    seen: set[int] = set()
    reached: list[int] = []
    todo = [start]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if at in candidates and at not in links:
            reached.append(at)
        elif not flow.ops[at].heavy:
            todo += flow.ops[at].inputs
    shape = flow.ops[start].shape
    for at in sorted(reached, reverse=True):
        if at == start:
            return at
        here = flow.ops[at].shape
        alike = here[-1:] == shape[-1:] or permuted and sorted(here) == sorted(shape)
        if alike and flow.is_light(at, start):
            if not _joins_another(flow, at, start):
                return at
    return None


def _joins_another(flow: Flow, state: int, stop: int) -> bool:
    """Whether a state is concatenated with activations of other origin on its way to `stop`."""
    for i in (*bits_of(flow.bits_between(state, stop)), stop):
        op = flow.ops[i]
        if op.name in ("cat", "concat", "concatenate") and any(
            j != state and not flow.reads(j, state) and not flow.ops[j].fixed
            and not flow.reads(state, _whole(flow, j)) for j in op.inputs
        ):  # fmt: skip
            return True
    return False


def _whole(flow: Flow, index: int) -> int:
    """The value of which a slice or view shows a part."""
    while flow.ops[index].inputs and (flow.ops[index].noop or flow.ops[index].name in PARTIAL):
        index = flow.ops[index].inputs[0]
    return index


def _rejoins(
    flow: Flow,
    candidates: dict[int, Candidate],
    bits: dict[int, int],
    previous: dict[int, int],
    links: dict[int, Candidate],
    candidate: Candidate,
) -> bool:
    """Whether a branch is a later state of the very stream that the skip is a state of."""
    for term in candidate.branch:
        at = _predecessor(flow, candidates, links, term, permuted=True)
        if at is None or not flow.reads(at, candidate.skip):
            continue
        heavy = 0
        while at is not None and at > candidate.skip:
            heavy |= bits[at] & flow.heavy
            first, at = at, previous.get(at)
        state = candidates[first].skip
        here = at == candidate.skip or state == candidate.skip
        if heavy and (here or flow.reads(state, candidate.skip)
                      and flow.is_light(candidate.skip, state)):  # fmt: skip
            return True
    return False


def _cut_forks(previous: dict[int, int], bits: dict[int, int]) -> None:
    """A state continues as one stream at most; one that starts inside a sublayer is not it."""
    after: dict[int, list[int]] = {}
    for index, before in previous.items():
        after.setdefault(before, []).append(index)
    for nexts in after.values():
        outer = [i for i in nexts if not any(bits[j] >> i & 1 for j in nexts)]
        for index in nexts:
            if len(outer) > 1 or index not in outer:
                del previous[index]


def split_nested(
    flow: Flow, candidates: dict[int, Candidate], chains: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Separates streams from chains inside (or around) another stream's sublayers.

    Of two chains, one of which lies in a single sublayer of the other, that with more sublayers
    of different weights is the stream: gates, LoRA, gelu's cubic, a scan or a shared expert's sum
    lie inside a longer stream's branch, and one global skip lies around it.

    A sum of two streams ends one of them and is a site of neither. Chains without a matmul,
    convolution or attention in any branch are arithmetic (gelu's cubic, rotary embeddings, the
    state of a scan) and dropped where there are others.

    Returns:
        Accepted chains, ordered by their first add, and dropped ones.
    """
    regions = {i: branch_bits(flow, candidates[i]) for chain in chains for i in chain}
    weighty = sum(1 << op.index for op in flow.ops if op.weights)
    adds = {chain[0]: sum(1 << i for i in chain) for chain in chains}

    def rank(chain: list[int]) -> tuple[int, int, int]:
        weights = {
            frozenset(w for i in bits_of(regions[c] & weighty) for w in flow.ops[i].weights)
            for c in chain
        }
        size = max(regions[c].bit_count() for c in chain)
        return len(weights - {frozenset()}), len(chain), size

    light = [chain for chain in chains if not any(regions[i] & flow.heavy for i in chain)]
    accepted: list[list[int]] = []
    dropped: list[list[int]] = light if len(light) < len(chains) else []
    for chain in sorted((c for c in chains if c not in dropped), key=rank, reverse=True):
        mine = adds[chain[0]]
        conflict = any(
            any(regions[i] & mine == mine for i in other)
            or any(regions[i] & adds[other[0]] == adds[other[0]] for i in chain)
            for other in accepted
        )
        (dropped if conflict else accepted).append(chain)
    return sorted(
        p for chain in accepted for p in _without_merges(flow, candidates, accepted, chain)
    ), dropped


def _without_merges(
    flow: Flow, candidates: dict[int, Candidate], accepted: list[list[int]], chain: list[int]
) -> list[list[int]]:
    """Cuts a chain where a state of another stream is added to it."""
    others = {i: candidates[i] for other in accepted if other is not chain for i in other}
    parts: list[list[int]] = [[]]
    for index in chain:
        terms = candidates[index].branch
        if any(_predecessor(flow, others, {}, term) is not None for term in terms):
            parts.append([])
        else:
            parts[-1].append(index)
    return [part for part in parts if part]
