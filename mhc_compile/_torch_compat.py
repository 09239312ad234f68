"""The only file that imports torch's private names, and what the passes need to know of torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

__all__ = [
    "AUTOCAST_DEVICES",
    "Source",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "WeakIdRef",
    "autocast_state",
    "below_autograd",
    "compiled_module",
    "force_eager",
    "is_internal",
    "no_nested_tensor_fastpath",
    "tensor_leaves",
    "user_frame",
    "user_source",
]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_NN_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_OWN = (
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "passes") + os.sep,
    os.path.abspath(__file__),
)
Source = tuple[str, int]
# torch.amp.is_autocast_available itself stops torch.compile before torch 2.13.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(device)
)


def is_internal(filename: str) -> bool:
    """Layers such as nn.TransformerEncoderLayer are user code; torch's machinery is not."""
    if filename.startswith(_NN_MODULES):
        return filename.endswith(os.sep + "module.py")
    return filename.startswith((_TORCH, *_OWN)) or filename.startswith("<mhc_compile")


def user_frame(depth: int = 1) -> FrameType | None:
    """The innermost Python frame that belongs to neither torch's machinery nor the passes."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def user_source(depth: int = 2) -> Source | None:
    """File and line of `user_frame`."""
    frame = user_frame(depth)
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else None


def below_autograd() -> contextlib.AbstractContextManager[object]:
    """Inside it no views are recorded, so that an operator may return one of what it made.

    What autograd takes for a view made inside a custom operator must not be changed in place.
    """
    guard: contextlib.AbstractContextManager[object] = torch._C._AutoDispatchBelowADInplaceOrView()
    return guard


def autocast_state(device_type: str) -> tuple[bool, torch.dtype] | None:
    """Whether autocast is on for a device type and to what dtype; None where there is none."""
    if device_type not in AUTOCAST_DEVICES:
        return None
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


@contextlib.contextmanager
def no_nested_tensor_fastpath() -> Iterator[None]:
    """nn.TransformerEncoderLayer's fused inference path hides the residual adds of a recording."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def force_eager() -> Iterator[None]:
    """Runs functions decorated with torch.compile uncompiled, so that passes see inside."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """What `torch.compile(module)` wraps, None for other modules.

    The wrapper calls it by a method that was bound before anything could be patched.
    """
    if type(module).__name__ != "OptimizedModule":
        return None
    inner = module._modules.get("_orig_mod")
    return inner


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclass objects, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict) or hasattr(value, "items"):
        return [t for v in dict(value.items()).values() for t in tensor_leaves(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensor_leaves(v)]
    if hasattr(type(value), "__dataclass_fields__") and not isinstance(value, torch.nn.Module):
        names = type(value).__dataclass_fields__
        return [t for name in names for t in tensor_leaves(getattr(value, name, None))]
    return []
