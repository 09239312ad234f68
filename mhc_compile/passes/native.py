"""Models that come with hyper-connections of their own."""

from __future__ import annotations

from torch import nn

from mhc_compile.errors import AlreadyTransformedError

_MARKS = ("hyperconnection", "hyper_connection")


def refuse_native(model: nn.Module) -> None:
    """Raises if a module's class says that it is a hyper-connection.

    Their streams look like one more axis of a plain residual, so a second set of streams would be
    mixed over the first without an error.
    """
    for name, module in model.named_modules():
        label = type(module).__name__.lower()
        if any(mark in label for mark in _MARKS):
            raise AlreadyTransformedError(
                f"{type(model).__name__} has hyper-connections of its own: {name!r} is a "
                f"{type(module).__name__}; mhc_compile rewrites models with plain residuals"
            )
