"""Settings that a trace may look at: numbers, flags, names and short containers of them."""

from __future__ import annotations

import builtins
import enum
from typing import Any

import torch

_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device, enum.Enum)
_MANY = 16


def is_simple(value: Any) -> bool:
    """Whether a value is a setting, which a guard can compare."""
    if builtins.isinstance(value, _SIMPLE):
        return bool(value == value)  # nan never equals itself
    if type(value) in (tuple, list):
        return len(value) <= _MANY and all(is_simple(v) for v in value)
    if type(value) is dict:
        return len(value) <= _MANY and all(
            builtins.isinstance(k, str | int) and is_simple(v) for k, v in value.items()
        )
    return False


def copied(value: Any) -> Any:
    """A copy that later changes of a list or dict leave alone."""
    if type(value) in (tuple, list):
        return type(value)(copied(v) for v in value)
    return {k: copied(v) for k, v in value.items()} if type(value) is dict else value
