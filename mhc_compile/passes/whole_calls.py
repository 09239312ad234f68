"""Calls that a graph keeps whole: autograd functions and checkpointed functions."""

from __future__ import annotations

import builtins
import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from mhc_compile.passes.code_swap import code_of, holds_line, swapped_code
from mhc_compile.passes.trace_errors import Restart, here
from mhc_compile.passes.tracer import SELF, Tracer
from mhc_compile.passes.value_proxy import unwrapped


@contextlib.contextmanager
def kept_autograd_functions(tracer: Tracer) -> Iterator[None]:
    """Keeps a custom autograd.Function one node; tracing into it would drop its backward.

    One that holds a residual add is traced into all the same, and a note says so.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return original.__get__(None, cls)(*args, **kwargs)
        parts = [cls.forward, *args]
        if any(holds_line(code_of(part), tracer.sites) for part in parts):
            tracer.notes.append(
                f"{cls.__name__} at {here()} holds a residual add, so its operations are "
                "differentiated by themselves rather than by its own backward"
            )
            return _opened_forward(cls, args)
        return tracer.create("call_function", _applied(original.__get__(None, cls)), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class _Context:
    """Takes what an autograd.Function's forward notes for its backward."""

    needs_input_grad = (True,) * 64

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _opened_forward(cls: Any, args: tuple[Any, ...]) -> Any:
    overrides = cls.setup_context is not torch.autograd.Function.setup_context
    return cls.forward(*args) if overrides else cls.forward(_Context(), *args)


@functools.cache
def _applied(bound: Any) -> Callable[..., Any]:
    """An autograd.Function's apply as a plain function, which fx can write into code."""

    def apply(*args: Any) -> Any:
        return bound(*args)

    apply.__name__ = f"{bound.__self__.__name__}_apply"
    apply.__self__ = bound.__self__  # type: ignore[attr-defined]
    return apply


@contextlib.contextmanager
def kept_checkpoints(tracer: Tracer, inlined: frozenset[Any]) -> Iterator[None]:
    """Keeps `torch.utils.checkpoint.checkpoint` a call where a graph can hold its function.

    That is a submodule or a method of one which holds no residual add. Others are traced through
    without checkpointing, and a note says so.
    """
    target: Any = torch.utils.checkpoint.checkpoint

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return before(function, *args, **kwargs)
        options = {k: kwargs.pop(k) for k in _OPTIONS & kwargs.keys()}
        code = code_of(function)
        through = code in inlined or holds_line(code, tracer.sites)
        path = None if through else _path(tracer, function)
        if path is None:
            tracer.notes.append(
                f"the checkpointed code at {here()} is part of the graph and runs without "
                "checkpointing; checkpoint the block as a whole, or a submodule of it"
            )
            return function(*args, **kwargs)
        with tracer.pause(), _not_opened(tracer, code):
            run = function.forward if builtins.isinstance(function, nn.Module) else function
            value = run(*unwrapped(args), **unwrapped(kwargs))
        held = tracer.attribute(path, function)
        arguments = (held, *args)
        return tracer.create("call_function", target, arguments, {**options, **kwargs}, value)

    inner = getattr(target, "__wrapped__", target)
    with swapped_code(inner, call) as before:
        yield


_OPTIONS = frozenset({
    "use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop",
})  # fmt: skip


def _path(tracer: Tracer, function: Any) -> str | None:
    """Where a block finds a checkpointed submodule or method, None if it does not."""
    if builtins.isinstance(function, nn.Module):
        return None if id(function) in tracer.opened else tracer.modules.get(id(function))
    owner = getattr(function, "__self__", None)
    if not builtins.isinstance(function, types.MethodType) or id(owner) not in tracer.modules:
        return None
    name = function.__func__.__name__
    if name in ("forward", "__call__") and id(owner) in tracer.opened:
        return None
    prefix = tracer.modules[id(owner)]
    with tracer.pause():
        found = getattr(owner, name, None)
    if getattr(found, "__func__", None) is not function.__func__:
        return None
    return f"{prefix}.{name}" if prefix else name


@contextlib.contextmanager
def _not_opened(tracer: Tracer, code: Any) -> Iterator[None]:
    """Starts again with the function traced through if it calls a module that is."""
    tracer.on_opened = lambda: (_ for _ in ()).throw(Restart("inlined", code))
    try:
        yield
    finally:
        tracer.on_opened = None


__all__ = ["SELF", "kept_autograd_functions", "kept_checkpoints"]
