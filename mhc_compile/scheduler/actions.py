"""`Action`: one entry of a rank's order, written as torch's pipeline runtime writes it."""

from __future__ import annotations

import re
from typing import NamedTuple

from mhc_compile.errors import PlanError

KINDS = ("F", "B", "I", "W", "FB")
F, B, I, W, FB = range(len(KINDS))  # noqa: E741  # the field's names; codes in arrays

_SIMPLE = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})")
_PAIR = re.compile(r"\((\d{1,9})F(\d{1,9});(\d{1,9})B(\d{1,9})\)OVERLAP_F_B")


class Action(NamedTuple):
    """What a rank does next: one chunk, or a forward and a backward chunk that overlap.

    A tuple, because a large plan has millions.

    Attributes:
        kind: "F" forward, "I" gradient of the input, "W" gradient of the weights, "B" both
            gradients, "FB" a forward overlapped with a "B".
        stage: the stage that runs; of an "FB", the forward's.
        microbatch: the microbatch; of an "FB", the forward's.
        backward: an "FB"'s backward as (stage, microbatch), else None.

    Example:
        >>> str(Action("FB", 0, 3, (7, 1)))
        '(0F3;7B1)OVERLAP_F_B'
        >>> Action.parse("3I0")
        Action(kind='I', stage=3, microbatch=0, backward=None)
    """

    kind: str
    stage: int
    microbatch: int
    backward: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.backward is None:
            return f"{self.stage}{self.kind}{self.microbatch}"
        stage, microbatch = self.backward
        return f"({self.stage}F{self.microbatch};{stage}B{microbatch})OVERLAP_F_B"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The chunks: the action itself, or an "FB"'s forward and backward."""
        if self.backward is None:
            return (self,)
        return Action("F", self.stage, self.microbatch), Action("B", *self.backward)

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads what `str` wrote.

        Raises:
            PlanError: the text is no action.
        """
        if match := _SIMPLE.fullmatch(text):
            stage, kind, microbatch = match.groups()
            return cls(kind, int(stage), int(microbatch))
        if match := _PAIR.fullmatch(text):
            stage, microbatch, *backward = map(int, match.groups())
            return cls("FB", stage, microbatch, (backward[0], backward[1]))
        raise PlanError(f"{text!r} is not an action; expected e.g. '3F0' or '(0F3;3B1)OVERLAP_F_B'")
