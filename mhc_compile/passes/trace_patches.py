"""What is changed in torch and Python while a block is traced, and put back afterwards."""

from __future__ import annotations

import builtins
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import is_internal
from mhc_compile.errors import TraceError
from mhc_compile.passes.value_proxy import SizeProxy, ValueProxy, proxies_in


def protected_copy(value: Any, memo: dict[int, Any], label: str) -> Any:
    """A copy of an argument that tracing may change; modules and numbers stay themselves."""
    if isinstance(value, int | float | complex | nn.Module):
        return value
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone()
        return memo[id(value)]
    try:
        with torch.no_grad(), _tensors_copied_detached():
            return copy.deepcopy(value, memo)
    except Exception as error:
        raise TraceError(
            f"cannot copy the {type(value).__name__} that {label} gets as an argument "
            f"({type(error).__name__}: {error}); tracing must not touch the original, so give it "
            "a __deepcopy__"
        ) from error


@contextlib.contextmanager
def _tensors_copied_detached() -> Iterator[None]:
    """Lets deepcopy take results of autograd, such as the keys and values in a cache."""
    original = torch.Tensor.__deepcopy__

    def copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    torch.Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def patched_isinstance() -> Iterator[None]:
    """Lets `isinstance(proxy, torch.Tensor)` and the like see the proxied value's type."""
    original = builtins.isinstance

    def isinstance_of_value(value: Any, kinds: Any) -> bool:
        if type(value) is ValueProxy:
            if value._mhc_value is None:
                value._mhc_tracer.inspected = True
            return original(value, kinds) or original(value._mhc_value, kinds)
        if type(value) is SizeProxy:
            return original(value, kinds) or original(torch.Size(), kinds)
        return original(value, kinds)

    builtins.isinstance = isinstance_of_value  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = original


@contextlib.contextmanager
def patched_factories(tracer: Any) -> Iterator[None]:
    """Lets `torch.ones(t, t)` take proxies, which torch's parser does for a tuple of sizes only.

    And `torch.from_numpy`, which torch function modes do not see.
    """
    names = ("ones", "zeros", "empty", "rand", "randn", "from_numpy")
    originals = {name: getattr(torch, name) for name in names}

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            numpy = original.__name__ == "from_numpy"
            if tracer.paused or not (numpy or proxies_in((args, kwargs))):
                return original(*args, **kwargs)
            return tracer.create("call_function", original, args, kwargs)

        return make

    for name, original in originals.items():
        setattr(torch, name, factory(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def patched_grad_mode(tracer: Any) -> Iterator[None]:
    """Lets a block ask for the mode that it will run in; tracing has gradients off."""
    original = torch.is_grad_enabled

    def is_grad_enabled() -> Any:
        if tracer.paused or is_internal(sys._getframe(1).f_code.co_filename):
            return original()
        if any(tracer.modes.values()):
            return original()  # within a context of the block's own
        return tracer.create("call_function", original, (), {}, tracer.grad_enabled)

    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = original


class _TypeOfValue(type):
    """The builtin `type` for traced code: a proxy has the type of its value."""

    def __call__(cls, *args: Any) -> Any:  # noqa: N805
        value = args[0]
        if type(value) is ValueProxy:
            return type(value._mhc_value)
        if type(value) is SizeProxy:
            return torch.Size
        return type(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return builtins.isinstance(value, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


class TypeOfValue(metaclass=_TypeOfValue):
    """What the name `type` means in the files of traced code."""


@contextlib.contextmanager
def inlined_script_functions() -> Iterator[None]:
    """Runs functions of torch.jit.script as the Python that they were made of."""
    kind: Any = torch.jit.ScriptFunction
    original = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        python = getattr(self, "_torchdynamo_inline", None)
        return (python or original.__get__(self, kind))(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = original
