"""What a trace needs to know of a function that torch reports: its name, what it writes to."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhc_compile.passes.containers import children
from mhc_compile.passes.value_proxy import ValueProxy, proxies_in


def public_name(func: Any) -> Any:
    """The plain operator for a tensor's dunder, which reads better in generated code."""
    name = getattr(func, "__name__", "")
    if getattr(torch.Tensor, name, None) is func:
        return {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}.get(
            name, func
        )
    return func


def is_accessor(func: Any) -> bool:
    """Whether torch reports an attribute of a tensor as a function."""
    return getattr(func, "__name__", "") == "__get__"


def is_in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function or method changes its first argument."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return (
        name in ("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow",
                 "imatmul", "iand", "ior")
        or kwargs.get("inplace") is True
        or kwargs.get("out") is not None
    )  # fmt: skip


def written_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[ValueProxy]:
    """The proxies of what a function changes in place: `out`, else its first argument."""
    if kwargs.get("out") is not None:
        return proxies_in(kwargs["out"])
    return [a for a in args if type(a) is ValueProxy][:1]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if builtins.isinstance(value, Tensor):
        return [value]
    return [t for _, v in children(value) or () for t in tensors_in(v)]


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in nested containers."""
    return bool(tensors_in(value))
