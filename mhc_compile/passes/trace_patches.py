"""What is changed in torch and Python while a block is traced, and put back afterwards."""

from __future__ import annotations

import builtins
import collections
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import TraceError
from mhc_compile.passes.value_proxy import ValueProxy, proxies_in


@contextlib.contextmanager
def side_effects_undone(block: nn.Module) -> Iterator[None]:
    """Restores random state, buffers and attributes that running submodules may change."""
    modules = list(block.modules())
    attributes = [dict(m.__dict__) for m in modules]
    inner = [
        (value, copy.copy(value)) for m in modules for value in m.__dict__.values()
        if isinstance(value, dict | list | set | collections.deque)
    ]  # fmt: skip
    buffers = [(b, b.detach().clone()) for b in block.buffers()]
    devices = {b.device for b in [*block.parameters(), *block.buffers()] if b.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if buffer.device.type != "meta":
                        buffer.copy_(before)
            for module, before_dict in zip(modules, attributes, strict=True):
                module.__dict__.clear()
                module.__dict__.update(before_dict)
            for value, contents in inner:
                value.clear()
                (value.update if isinstance(value, dict | set) else value.extend)(contents)


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
        return original(value, kinds)

    builtins.isinstance = isinstance_of_value  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = original


@contextlib.contextmanager
def patched_factories(tracer: Any) -> Iterator[None]:
    """Lets `torch.ones(t, t)` take proxies, which torch's parser does for a tuple of sizes only."""
    names = ("ones", "zeros", "empty", "rand", "randn")
    originals = {name: getattr(torch, name) for name in names}

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if tracer.paused or not proxies_in((args, kwargs)):
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
