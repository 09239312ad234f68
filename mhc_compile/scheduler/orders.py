"""Every rank's order of actions, per variant: the tables of docs/pipeline.md as patterns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from mhc_compile.scheduler.actions import FB, KINDS, Action, B, F, I, W
from mhc_compile.scheduler.layout import Layout

Steps = list[tuple[int, str]]  # (repetitions, tokens): F0 is slot 0's forward, W the oldest due
_TOKENS = {"W": (W, -1, -1)} | {  # kind, slot of the forward, slot of the backward
    f"{KINDS[kind]}{slot}": (kind, slot if kind == F else -1, -1 if kind == F else slot)
    for kind in (F, B, I)
    for slot in (0, 1)
} | {"F0&B1": (FB, 0, 1), "F1&B0": (FB, 1, 0)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Orders:
    """All ranks' actions as arrays [P, longest], for plans of millions of actions.

    Attributes:
        kind: int8, the index in `KINDS`, -1 past a rank's last action.
        f_stage, f_microbatch: int32, what runs forward, -1 if nothing does.
        b_stage, b_microbatch: int32, what runs backward (B, I, W, FB), -1 if nothing does.
    """

    kind: np.ndarray
    f_stage: np.ndarray
    f_microbatch: np.ndarray
    b_stage: np.ndarray
    b_microbatch: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Actions of each rank, [P]."""
        return (self.kind >= 0).sum(1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Orders):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        )

    def __hash__(self) -> int:
        return hash(self.kind.tobytes())

    def actions(self) -> list[list[Action]]:
        """The same as objects, a list per rank."""
        rows = []
        for rank, length in enumerate(self.lengths):
            columns = (getattr(self, field.name)[rank, :length].tolist() for field in fields(self))
            rows.append([
                Action("FB", fs, fm, (bs, bm)) if kind == FB
                else Action("F", fs, fm) if kind == F
                else Action(KINDS[kind], bs, bm)
                for kind, fs, fm, bs, bm in zip(*columns, strict=True)
            ])  # fmt: skip
        return rows

    @classmethod
    def from_actions(cls, actions: list[list[Action]]) -> Orders:
        """Arrays of lists of actions."""
        rows = []
        for rank in actions:
            entries = [
                (KINDS.index(kind), stage, microbatch, *(backward or (-1, -1)))
                if kind in ("F", "FB")
                else (KINDS.index(kind), -1, -1, stage, microbatch)
                for kind, stage, microbatch, backward in rank
            ]
            rows.append(np.array(entries, dtype=np.int64).reshape(-1, 5).T)
        return _pad(rows)


def order_actions(layout: Layout) -> Orders:
    """Returns the order of every rank."""
    return _pad([_expand(layout, rank) for rank in range(layout.ranks)])


def steps_of_rank(layout: Layout, rank: int) -> Steps:
    """A rank's order as repeated patterns."""
    if layout.variant == "1f1b":
        return _steps_1f1b(layout.ranks, layout.microbatches, rank)
    if layout.variant == "zb1p":
        return _steps_zb1p(layout.ranks, layout.microbatches, rank)
    if layout.variant == "dualpipev":
        return _steps_dualpipe(layout.ranks, layout.microbatches, rank)
    near = min(rank, layout.ranks - 1 - rank)
    return _steps_dualpipe(layout.ranks // 2, layout.microbatches // 2, near)


def _steps_1f1b(ranks: int, microbatches: int, rank: int) -> Steps:
    warm = min(ranks - 1 - rank, microbatches)
    return [(warm, "F0"), (microbatches - warm, "F0 B0"), (warm, "B0")]


def _steps_zb1p(ranks: int, microbatches: int, rank: int) -> Steps:
    """ZB-H1: 1F1B with W put off by the rank's index, so that every rank holds at most P."""
    warm = min(ranks - 1 - rank, microbatches)
    late = min(rank, microbatches - warm)
    return [
        (warm, "F0"),
        (late, "F0 I0"),
        (microbatches - warm - late, "F0 I0 W"),
        (warm, "I0 W"),
        (late, "W"),
    ]


def _steps_dualpipe(half: int, microbatches: int, near: int) -> Steps:
    """DualPipe's eight steps for `half` ranks of one direction and its `microbatches`."""
    d = half - 1 - near  # ranks between this one and the turn-around
    main = microbatches - 2 * half + near + 1
    turn = 1 if d == 0 else 0  # there the first pair has nothing to hide: run unoverlapped
    last = [f"{'B' if i <= near else 'I'}{1 - i % 2}" for i in range(2 * near + 2)]
    return [
        (2 * d, "F0"),
        (near + 1, "F0 F1"),
        (d, "I1 W F1"),
        (turn, "F0 B1 F1&B0"),
        (main - turn, "F0&B1 F1&B0"),
        (d, "B1 F1&B0"),
        (1, " ".join(last)),
        (d, "W I0"),
        (near + 1, "W"),
    ]


def _expand(layout: Layout, rank: int) -> np.ndarray:
    """Repeats the patterns and numbers the microbatches; [5, actions] in `Orders`' order."""
    parts = [
        np.tile(np.array([_TOKENS[token] for token in tokens.split()], dtype=np.int64), (count, 1))
        for count, tokens in steps_of_rank(layout, rank)
        if count > 0
    ]
    kind, f_slot, b_slot = np.concatenate(parts).T
    result = np.full((5, len(kind)), -1, dtype=np.int64)
    result[0] = kind
    for slot, (stage, first) in enumerate(layout.slots(rank)):
        for row, of_slot in ((1, f_slot == slot), (3, b_slot == slot)):
            result[row, of_slot] = stage
            result[row + 1, of_slot] = first + np.arange(of_slot.sum())
    result[3:, kind == W] = result[3:, kind == I]  # first in, first out over both slots
    return result


def _pad(rows: list[np.ndarray]) -> Orders:
    longest = max((row.shape[1] for row in rows), default=0)
    table = np.full((5, len(rows), longest), -1, dtype=np.int32)
    for rank, row in enumerate(rows):
        table[:, rank, : row.shape[1]] = row
    return Orders(table[0].astype(np.int8), *table[1:])
