"""Containers that arguments and results come in: tuples, lists, dicts and records of tensors."""

from __future__ import annotations

import copy
import enum
from typing import Any

import torch
from torch import Tensor, nn

CONSTANTS = (
    type(None), bool, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum, type, type(Ellipsis),
)  # fmt: skip
"""Arguments of these types are part of a graph's key; all others are its inputs."""


def children(value: Any) -> list[tuple[str | int, Any]] | None:
    """The parts of a container with their keys, None for anything else.

    Containers are tuples, lists, dicts, named tuples, and dataclasses that hold a tensor, such as
    a state that is handed from block to block.
    """
    kind = type(value)
    if kind is dict:
        return list(value.items())
    if kind is tuple or kind is list:
        return list(enumerate(value))
    if is_named_tuple(value):
        return list(enumerate(value))
    if is_record(value):
        return [(name, getattr(value, name)) for name in record_fields(value)]
    return None


def form_of(value: Any) -> str:
    """Classes, lengths and keys of nested containers, and the constants in them, as a text."""
    if isinstance(value, Tensor):
        return "Tensor"
    if isinstance(value, CONSTANTS):
        return repr(value)
    if isinstance(value, dict):
        parts = [f"{k!r}: {form_of(v)}" for k, v in value.items()]
    elif isinstance(value, tuple | list):
        parts = [form_of(v) for v in value]
    else:
        return type(value).__name__
    return f"{type(value).__name__}({', '.join(parts)})"


def rebuilt(value: Any, parts: list[Any]) -> Any:
    """A container of the kind of `value` with other parts, in the order of `children`."""
    kind = type(value)
    if kind is dict:
        return dict(zip(value, parts, strict=True))
    if kind is tuple or kind is list:
        return kind(parts)
    if is_named_tuple(value):
        return kind(*parts)
    changed = copy.copy(value)
    for name, part in zip(record_fields(value), parts, strict=True):
        put(changed, name, part)
    return changed


def put(record: Any, name: str, part: Any) -> None:
    """Sets a field of a dataclass, frozen or not."""
    if isinstance(record, dict):
        setattr(record, name, part)  # a model output keeps its fields as items too
    else:
        object.__setattr__(record, name, part)


def is_named_tuple(value: Any) -> bool:
    """Whether a value is a tuple with names."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_record(value: Any) -> bool:
    """Whether a value is a dataclass object that holds a tensor; a configuration is none."""
    if not hasattr(type(value), "__dataclass_fields__") or isinstance(value, nn.Module | Tensor):
        return False
    return any(isinstance(getattr(value, name, None), Tensor) for name in record_fields(value))


def record_fields(value: Any) -> list[str]:
    """Names of a dataclass object's fields; a model output has those that are not None."""
    names = list(type(value).__dataclass_fields__)
    if isinstance(value, dict):
        return [name for name in names if name in value]
    return [name for name in names if hasattr(value, name)]
