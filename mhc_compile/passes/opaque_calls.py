"""Helper functions and objects that a trace passes by: they stay calls in the graph.

A function that cannot be traced, because it uses numpy or branches on data, and the class of an
object that the traced code makes and hands to a submodule, such as a cache, are found by failing;
the block is traced again with them opaque.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from mhc_compile._torch_compat import Source
from mhc_compile.passes.code_swap import STAND_IN, holds_line, swapped_code
from mhc_compile.passes.module_access import patched_attribute
from mhc_compile.passes.python_effects import is_user_code
from mhc_compile.passes.tracer import Tracer
from mhc_compile.passes.value_proxy import ValueProxy, unwrapped


@contextlib.contextmanager
def opaque_functions(tracer: Tracer, functions: frozenset[types.FunctionType]) -> Iterator[None]:
    """Makes calls of these functions single nodes."""
    with contextlib.ExitStack() as stack:
        for function in functions:
            stack.enter_context(_opaque_function(tracer, function))
        yield


@contextlib.contextmanager
def _opaque_function(tracer: Tracer, function: types.FunctionType) -> Iterator[None]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return before(*args, **kwargs)
        return tracer.create("call_function", function, args, kwargs, effect=True)

    with swapped_code(function, call) as before:
        yield


@contextlib.contextmanager
def opaque_classes(tracer: Tracer, classes: frozenset[type]) -> Iterator[None]:
    """Makes the construction of these classes' objects nodes, and what is done with them."""
    with contextlib.ExitStack() as stack:
        for kind in classes:
            init, get = kind.__init__, kind.__getattribute__  # type: ignore[misc]
            stack.enter_context(
                patched_attribute(kind, "__init__", _constructor(tracer, kind, init))
            )
            stack.enter_context(patched_attribute(kind, "__getattribute__", _reader(tracer, get)))
        yield


def _constructor(tracer: Tracer, kind: type, init: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if tracer.paused or type(self) is not kind:
            init(self, *args, **kwargs)
            return
        node = tracer.graph.call_function(
            kind, tracer.create_arg(tuple(args)), tracer.create_arg(dict(kwargs))
        )
        with tracer.pause():
            init(self, *unwrapped(args), **unwrapped(kwargs))
        tracer.proxy_for(node, self)
        tracer.built[id(self)] = node
        tracer.keep_alive.append(self)

    return __init__


def _reader(tracer: Tracer, get: Any) -> Any:
    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        node = None if tracer.paused or name.startswith("__") else tracer.built.get(id(self))
        if node is None:
            return get(self, name)
        return tracer.read_attribute(ValueProxy(node, tracer, self), name)

    return __getattribute__


def function_to_skip(
    error: BaseException,
    opened: set[types.CodeType],
    tried: frozenset[types.FunctionType],
    sites: frozenset[Source],
) -> types.FunctionType | None:
    """The innermost function in an error's traceback that could be one opaque call.

    Args:
        error: what stopped the trace.
        opened: code of the forwards that have to be traced into.
        tried: functions that are opaque already.
        sites: lines of residual adds, which have to be traced too.
    """
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        if trace.tb_frame.f_code is Tracer._evaluate.__code__:
            break
        trace = trace.tb_next
    for frame in reversed(frames):
        code = frame.f_code
        if code in opened or code.co_name.startswith("<") or not is_user_code(code.co_filename):
            continue
        if holds_line(code, sites):
            continue
        function = _function_of(code)
        if function is not None and function not in tried:
            return function
    return None


def _function_of(code: types.CodeType) -> types.FunctionType | None:
    """The only function with this code; one that is defined anew at every call does not count."""
    if code.co_flags & (0x20 | 0x80 | 0x200):  # generators and coroutines
        return None
    found = [
        f for f in gc.get_referrers(code)
        if builtins.isinstance(f, types.FunctionType) and STAND_IN not in f.__dict__
    ]  # fmt: skip
    if len(found) != 1 or "<locals>" in found[0].__qualname__ and not found[0].__closure__:
        return None
    return found[0]


def forward_codes(modules: list[nn.Module]) -> set[types.CodeType]:
    """The code of modules' forwards, which a trace has to go through."""
    codes = set()
    for module in modules:
        for kind in type(module).__mro__:
            for name in ("forward", "__call__"):
                function = kind.__dict__.get(name)
                while function is not None:
                    code = getattr(function, "__code__", None)
                    if code is not None:
                        codes.add(code)
                    function = getattr(function, "__wrapped__", None)
    return codes
