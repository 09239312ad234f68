"""Repeats a call to get again what autograd kept of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mhc_compile._torch_compat import autocast_state

Autocast = Mapping[str, tuple[bool, torch.dtype]]


def autocast_of(devices: Iterable[str]) -> Autocast:
    """The present autocast of device types, of those that have one."""
    return {device: state for device in devices if (state := autocast_state(device))}


def replay(
    function: Callable[..., Any], *args: Any, autocast: Autocast, **kwargs: Any
) -> tuple[Any, list[Tensor]]:
    """Calls a function with gradients, under the autocast of its first call.

    Returns:
        What it returns, and the tensors that autograd keeps for its backward, in order.
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, contextlib.ExitStack() as stack:
        for device, (enabled, dtype) in autocast.items():
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        return function(*args, **kwargs), kept
