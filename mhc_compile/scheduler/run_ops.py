"""Runs ops on their servers in time, with preemption at a quantum and contention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mhc_compile.scheduler.stage_ops import ALL_TO_ALL, COMPUTE, HIGH, SERVERS, Op

EPS = 1e-9  # of the longest duration: what rounding may leave of an op


@dataclass(frozen=True)
class OpProblem:
    """Ops and how their servers work, by index.

    Attributes:
        ops: in program order.
        quantum, contention: as in `OpCosts`.
    """

    ops: tuple[Op, ...]
    quantum: float = 0.0
    contention: float = 0.0

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each op."""
        return {op.id: i for i, op in enumerate(self.ops)}

    @cached_property
    def deps(self) -> list[list[int]]:
        """Ops before each op."""
        return [[self.index[dep] for dep in op.deps] for op in self.ops]

    @cached_property
    def readers(self) -> list[list[int]]:
        """Ops after each op."""
        readers: list[list[int]] = [[] for _ in self.ops]
        for i, deps in enumerate(self.deps):
            for dep in deps:
                readers[dep].append(i)
        return readers

    @cached_property
    def ancestors(self) -> list[set[int]]:
        """All ops that each op waits for, directly or not."""
        ancestors: list[set[int]] = [set() for _ in self.ops]
        for i in topological(self):
            ancestors[i] = set(self.deps[i]).union(*(ancestors[dep] for dep in self.deps[i]))
        return ancestors

    @cached_property
    def servers(self) -> list[int]:
        """Index in `SERVERS` of each op's server."""
        return [SERVERS.index(op.server) for op in self.ops]

    @cached_property
    def tails(self) -> list[float]:
        """The longest path from each op's start to the end."""
        tails = [0.0] * len(self.ops)
        for i in reversed(topological(self)):
            after = max((tails[reader] for reader in self.readers[i]), default=0.0)
            tails[i] = self.ops[i].duration + after
        return tails


@dataclass(frozen=True)
class OpRun:
    """When each op ran.

    Attributes:
        start, end: of each op, us.
        pieces: (op, start, end) in order of time; an interrupted op has several.
    """

    start: tuple[float, ...]
    end: tuple[float, ...]
    pieces: tuple[tuple[int, float, float], ...]

    @property
    def makespan(self) -> float:
        """The end of the last op, sends included."""
        return max(self.end, default=0.0)


def topological(problem: OpProblem) -> list[int]:
    """Indices, every op after its deps."""
    missing = [len(deps) for deps in problem.deps]
    order = [i for i, count in enumerate(missing) if not count]
    for i in order:
        for reader in problem.readers[i]:
            missing[reader] -= 1
            if not missing[reader]:
                order.append(reader)
    return order


def run_ops(problem: OpProblem, priority: Sequence[float], *, strict: bool) -> OpRun | None:
    """Runs the ops; on each server those of lower `priority` first.

    The SMs serve one op at a time. An hp op that is ready takes them at once from a preemptible
    op, at the next multiple of the quantum of that op's work, else when the op ends; the op goes
    on afterwards. While communication runs, compute is slower by 1 + contention.

    Args:
        problem: the ops.
        priority: one number per op.
        strict: True runs each server's ops in exactly this order, as a stream does; False lets a
            server take the first of those that are ready (list scheduling).

    Returns:
        The run, or None if the servers' orders block each other.
    """
    state = _State(problem, priority, strict)
    while state.unfinished:
        state.take_ready()
        if not state.advance():
            return None
    return OpRun(tuple(state.start), tuple(state.end), tuple(state.pieces))


class _State:
    """Servers at one moment of a run."""

    def __init__(self, problem: OpProblem, priority: Sequence[float], strict: bool) -> None:
        self.problem, self.strict = problem, strict
        self.time, self.unfinished = 0.0, len(problem.ops)
        self.missing = [len(deps) for deps in problem.deps]
        self.left = [op.duration for op in problem.ops]
        self.start, self.end = [math.nan] * len(self.left), [math.nan] * len(self.left)
        self.pieces: list[tuple[int, float, float]] = []
        self.last_piece: dict[int, int] = {}
        self.current: list[int | None] = [None] * len(SERVERS)
        self.waiting: list[list[int]] = [[] for _ in SERVERS]
        for i in sorted(range(len(self.left)), key=lambda i: priority[i]):
            self.waiting[problem.servers[i]].append(i)
        self.paused = False
        self.eps = EPS * max(self.left, default=0.0)

    def take_ready(self) -> None:
        """Gives each idle server its next op."""
        for server, queue in enumerate(self.waiting):
            if self.current[server] is not None:
                continue
            for i in queue[:1] if self.strict else queue:
                if not self.missing[i]:
                    self.current[server] = i
                    queue.remove(i)
                    break

    def advance(self) -> bool:
        """Moves to the next event; False if nothing runs."""
        running = [i for i in self.current[ALL_TO_ALL:] if i is not None]
        rate = 1 / (1 + self.problem.contention) if running else 1.0
        on_sm, until = self._on_sm()
        if on_sm is not None:
            running.append(on_sm)
        if not running:
            return False
        step = min(self.left[i] / (rate if i == on_sm else 1.0) for i in running)
        step = min(step, until / rate)
        now = self.time + step
        for i in running:
            if math.isnan(self.start[i]):
                self.start[i] = self.time
            self.left[i] -= step * (rate if i == on_sm else 1.0)
            self._note_piece(i, now)
            if self.left[i] <= self.eps:
                self._finish(i, now)
        self.time = now
        return True

    def _on_sm(self) -> tuple[int | None, float]:
        """The op that has the SMs, and how much of its work until it gives way."""
        normal, high = self.current[COMPUTE], self.current[HIGH]
        if high is None or normal is None:
            return (normal if high is None else high), math.inf
        if self.paused or math.isnan(self.start[normal]):
            return high, math.inf
        op = self.problem.ops[normal]
        if not op.preemptible:
            return normal, math.inf
        quantum = self.problem.quantum
        done = op.duration - self.left[normal]
        until = math.ceil(done / quantum - EPS) * quantum - done if quantum else 0.0
        if until > self.eps:
            return normal, until
        self.paused = True
        return high, math.inf

    def _note_piece(self, i: int, now: float) -> None:
        last = self.last_piece.get(i)
        if last is not None and self.pieces[last][2] == self.time:
            self.pieces[last] = (i, self.pieces[last][1], now)
        else:
            self.last_piece[i] = len(self.pieces)
            self.pieces.append((i, self.time, now))

    def _finish(self, i: int, now: float) -> None:
        server = self.problem.servers[i]
        self.end[i], self.current[server] = now, None
        self.unfinished -= 1
        if server == HIGH:
            self.paused = False
        for reader in self.problem.readers[i]:
            self.missing[reader] -= 1
