"""Grad mode and autocast, entered and left by calls in a block's graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_entered = threading.local()


@contextlib.contextmanager
def left_on_error() -> Iterator[None]:
    """Leaves what a graph has entered and not left because something in it failed."""
    grad, contexts = torch.is_grad_enabled(), _contexts()
    depth = len(contexts)
    try:
        yield
    except BaseException:
        while len(contexts) > depth:
            exit_autocast(contexts[-1])
        torch._C._set_grad_enabled(grad)
        raise


def _contexts() -> list[Any]:
    if not hasattr(_entered, "contexts"):
        _entered.contexts = []
    contexts: list[Any] = _entered.contexts
    return contexts


def set_grad_mode(mode: bool) -> bool:
    """Sets whether gradients are recorded; returns what was set before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


def enter_autocast(device: str, dtype: torch.dtype, enabled: bool) -> Any:
    """Enters autocast and returns what `exit_autocast` takes."""
    context = torch.autocast(device, dtype=dtype, enabled=enabled)
    context.__enter__()
    if not torch.compiler.is_compiling():
        _contexts().append(context)
    return context


def exit_autocast(context: Any) -> None:
    """Leaves autocast."""
    context.__exit__(None, None, None)
    if not torch.compiler.is_compiling():
        _contexts().remove(context)
