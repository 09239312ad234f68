"""Grad mode and autocast, entered and left by calls in a block's graph."""

from __future__ import annotations

from typing import Any

import torch


def set_grad_mode(mode: bool) -> bool:
    """Sets whether gradients are recorded; returns what was set before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


def enter_autocast(device: str, dtype: torch.dtype, enabled: bool) -> Any:
    """Enters autocast and returns what `exit_autocast` takes."""
    context = torch.autocast(device, dtype=dtype, enabled=enabled)
    context.__enter__()
    return context


def exit_autocast(context: Any) -> None:
    """Leaves autocast."""
    context.__exit__(None, None, None)
