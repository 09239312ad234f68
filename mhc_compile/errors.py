"""One error class per kind of mistake, each a `ValueError` whose message states the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any


class MHCError(ValueError):
    """Base class: something the caller asked for cannot be done, and the message says why."""


class ConfigError(MHCError):
    """A configuration field or an argument has a value that makes no sense."""


class ExampleInputsError(MHCError):
    """The example inputs are missing or the model does not run on them."""


class NoResidualError(MHCError):
    """The model has no residual add that mHC could replace."""


class UnsupportedResidualError(MHCError):
    """A residual add was found that cannot be rewritten."""


class AlreadyTransformedError(MHCError):
    """The model has hyper-connections already."""


class NotTransformedError(MHCError):
    """The model was not rewritten by `mhc_compile.transform`."""


class TraceError(MHCError):
    """A block's forward could not be captured as a torch.fx graph."""


class CheckpointError(MHCError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class MemoryBudgetError(MHCError):
    """No plan fits into the memory budget; `minimum` is the least that one fits into."""

    def __init__(self, message: str, minimum: float) -> None:
        super().__init__(message)
        self.minimum = minimum


class PlanError(MHCError):
    """A pipeline plan breaks a rule, or its text is damaged."""


class SplitError(MHCError):
    """A model cannot be cut into the stages of a pipeline."""


class PipelineError(MHCError):
    """A rank of a running pipeline failed, hangs, or runs another plan than the others."""


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Checks that `value` is one of a few names.

    Raises:
        ConfigError: it is not, with the nearest name.
    """
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{name} must be one of {choices}, got {value!r}{nearest(value, allowed)}"
        )


def nearest(value: Any, allowed: Collection[str]) -> str:
    """The end of a message about a wrong name: what may have been meant, "" if nothing is near."""
    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
