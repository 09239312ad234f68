"""Searches the order of ops on their servers: list schedules by several rules, local search."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from mhc_compile.scheduler.run_ops import OpProblem, OpRun, run_ops, topological
from mhc_compile.scheduler.stage_ops import SERVERS

TRIES = 4800  # runs of the local search
STARTS = 3  # of which list schedules
HEAT = 0.03  # it takes steps that are this much worse, at first, with a chance of 1 / e
Order = tuple[int, ...]  # all ops; a server runs its own in this order


def search_order(problem: OpProblem, tries: int = TRIES) -> tuple[Order, OpRun]:
    """Returns the best order found and its run; never worse than the plain order, the first tried.

    Deterministic. Compared are the makespan, then the end of the last op that is no send, then
    the sum of the sends' ends.

    Args:
        problem: the ops.
        tries: runs of the local search.
    """
    plain = plain_order(problem)
    starts = [(plain, _run(problem, plain))]
    for priority in _priorities(problem):
        run = run_ops(problem, priority, strict=False)
        assert run is not None  # list scheduling cannot block
        order = _as_order(run)
        starts.append((order, _run(problem, order)))
    starts.sort(key=lambda start: _key(problem, start[1]))
    rng = random.Random(0)
    found = []
    bound = max(lower_bounds(problem).values()) * (1 + 1e-9)
    for order, run in starts[:STARTS]:
        found.append(_improve(problem, order, run, tries // STARTS, rng))
        if found[-1][1].makespan <= bound:
            break
    return min(found, key=lambda start: _key(problem, start[1]))


def _improve(
    problem: OpProblem, order: Order, run: OpRun, tries: int, rng: random.Random
) -> tuple[Order, OpRun]:
    """Local search from an order; takes worse steps too, ever fewer, and keeps the best."""
    best, best_run, key = order, run, _key(problem, run)
    for left in range(tries, 0, -1):
        moved = _move(problem, order, rng)
        if moved == order:
            continue
        moved_run = _run(problem, moved)
        moved_key = _key(problem, moved_run)
        worse = moved_key[0] / key[0] - 1 if key[0] else 0.0
        if moved_key <= key or rng.random() < math.exp(-worse * tries / (HEAT * left)):
            order, key = moved, moved_key
        if moved_key < _key(problem, best_run):
            best, best_run = moved, moved_run
    return best, best_run


def plain_order(problem: OpProblem) -> Order:
    """Program order: forward and backward alternately, each as it is written."""
    return tuple(range(len(problem.ops)))


def run_order(problem: OpProblem, order: Order) -> OpRun | None:
    """The run of an order, None if it blocks."""
    ranks = [0.0] * len(order)
    for position, i in enumerate(order):
        ranks[i] = position
    return run_ops(problem, ranks, strict=True)


def lower_bounds(problem: OpProblem) -> dict[str, float]:
    """What no order can beat, each in us.

    "critical path": the longest chain of deps. Per resource (the SMs, each other server): its work
    plus the least that must come before and after any of it.
    """
    heads = [0.0] * len(problem.ops)
    for i in topological(problem):
        for reader in problem.readers[i]:
            heads[reader] = max(heads[reader], heads[i] + problem.ops[i].duration)
    bounds = {"critical path": max(problem.tails, default=0.0)}
    for name, servers in (("SMs", SERVERS[:2]), *((name, (name,)) for name in SERVERS[2:])):
        used = [i for i, op in enumerate(problem.ops) if op.server in servers]
        if used:
            bounds[name] = (
                min(heads[i] for i in used)
                + sum(problem.ops[i].duration for i in used)
                + min(problem.tails[i] - problem.ops[i].duration for i in used)
            )
    return bounds


def _priorities(problem: OpProblem) -> Iterator[list[float]]:
    """Rules of list scheduling; lower goes first."""
    ops, tails = problem.ops, problem.tails
    weights = [op.id.endswith("_W") for op in ops]
    span = max(tails, default=0.0) + 1
    yield [-tail for tail in tails]
    yield [span * weight - tail for tail, weight in zip(tails, weights, strict=True)]
    for first in ("F", "B"):
        yield [i + span * len(ops) * (op.chunk != first) for i, op in enumerate(ops)]
        yield [i + len(ops) * ((op.chunk != first) + 2 * w)
               for i, (op, w) in enumerate(zip(ops, weights, strict=True))]  # fmt: skip
        yield [-tail + span * 0.1 * (op.chunk != first)
               for tail, op in zip(tails, ops, strict=True)]  # fmt: skip
    rng = random.Random(1)
    for _ in range(24):
        yield [-tail * rng.uniform(0.7, 1.3) for tail in tails]


def _key(problem: OpProblem, run: OpRun) -> tuple[float, float, float]:
    sends = [end for op, end in zip(problem.ops, run.end, strict=True) if op.server == "pp_out"]
    return run.makespan, end_of_work(problem, run), sum(sends)


def end_of_work(problem: OpProblem, run: OpRun) -> float:
    """The end of the last op that is no send."""
    ends = zip(problem.ops, run.end, strict=True)
    return max((end for op, end in ends if op.server != "pp_out"), default=0.0)


def _as_order(run: OpRun) -> Order:
    return tuple(sorted(range(len(run.start)), key=lambda i: (run.start[i], run.end[i], i)))


def _run(problem: OpProblem, order: Order) -> OpRun:
    run = run_order(problem, order)
    assert run is not None  # the order is topological, so that no server blocks
    return run


def _move(problem: OpProblem, order: Order, rng: random.Random) -> Order:
    """Moves an op and what it depends on earlier, or it and what depends on it later."""
    at = rng.randrange(len(order))
    far = rng.choice((2, 4, 8, len(order)))
    to = rng.randint(max(at - far, 0), min(at + far, len(order) - 1))
    low, high = min(at, to), max(at, to)
    i, between = order[at], [j for j in order[low : high + 1] if j != order[at]]
    if to < at:
        carried = [j for j in between if j in problem.ancestors[i]]
        moved = [*carried, i, *(j for j in between if j not in problem.ancestors[i])]
    else:
        carried = [j for j in between if i in problem.ancestors[j]]
        moved = [*(j for j in between if i not in problem.ancestors[j]), i, *carried]
    return (*order[:low], *moved, *order[high + 1 :])
