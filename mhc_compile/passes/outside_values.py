"""Values outside a block's modules that its traced code reads: globals, closures, random numbers.

Numbers and flags among them become guards, so that a block whose global setting changes later is
traced again. Python's and numpy's random numbers cannot be in a graph and are refused.
"""

from __future__ import annotations

import builtins
import functools
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from mhc_compile._torch_compat import is_internal
from mhc_compile.errors import TraceError
from mhc_compile.passes.simple_values import copied, is_simple
from mhc_compile.passes.tracer import Tracer

_MISSING = object()
LRU_CACHE: Any = type(functools.lru_cache(len))


def guard_outside_values(
    tracer: Tracer, frame: types.FrameType, loaded: set[str], cell_of: Callable[[str], Any]
) -> None:
    """Guards what a function that is about to run may read from outside.

    Settings in the files of installed packages are taken to stay as they are.

    Args:
        tracer: the trace that the function belongs to.
        frame: the function's frame.
        loaded: names of globals that its code loads.
        cell_of: finds the cell of a free variable.
    """
    code, scope = frame.f_code, frame.f_globals
    source = (code.co_filename, code.co_firstlineno)

    def guard(read: Callable[[], Any], value: Any) -> None:
        node = tracer.graph.call_function(read)
        node.meta["value"] = value
        tracer.guards.add(node, copied(value), source)

    for name in sorted(loaded & scope.keys()):
        _refuse_numpy_random(tracer, scope[name], code, source)
    if _is_installed(code.co_filename):
        return
    for name in sorted(loaded & scope.keys()):
        value = scope[name]
        if is_simple(value):
            guard(_reader(scope, name), value)
        else:
            for key, part in _settings(value, code):
                guard(_reader(value, key), part)
    for name in () if code.co_name.startswith("<") else code.co_freevars:
        value = frame.f_locals.get(name)
        if type(value) in (bool, int, float, list, dict) and is_simple(value):
            cell = cell_of(name)
            if cell is not None:
                guard(_reader(cell, "cell_contents"), value)


def _settings(value: Any, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """The numbers and flags of a global object, class or module that the code may read."""
    if builtins.isinstance(value, nn.Module | Tensor | types.FunctionType | fx.Node):
        return
    if builtins.isinstance(value, types.ModuleType):
        file = getattr(value, "__file__", None)
        if file is None or is_internal(file) or _is_installed(file):
            return
    attributes = getattr(value, "__dict__", None)
    if attributes is None or getattr(value, "__module__", "").split(".")[0] == "torch":
        return
    for key in code.co_names:
        part = attributes.get(key, _MISSING)
        if part is not _MISSING and not key.startswith("__") and is_simple(part):
            yield key, part


_readers: weakref.WeakValueDictionary[tuple[int, str], Callable[[], Any]]
_readers = weakref.WeakValueDictionary()
"""One function for a place, so that two graphs of the same code are the same."""


def _reader(owner: Any, name: str) -> Callable[[], Any]:
    """A function that reads a key of a dict or an attribute of anything else."""

    def read_global() -> Any:
        return owner.get(name)

    def read_setting() -> Any:
        return getattr(owner, name, None)

    made = read_global if type(owner) is dict else read_setting
    return _readers.setdefault((id(owner), name), made)


def refuse_random(tracer: Tracer, frame: types.FrameType) -> None:
    """Raises `TraceError` if traced code draws one of Python's random numbers."""
    if tracer.paused:
        return
    while frame.f_code.co_filename == random.__file__ and frame.f_back is not None:
        frame = frame.f_back
    raise _random_error(tracer, "Python's", (frame.f_code.co_filename, frame.f_lineno))


def _refuse_numpy_random(
    tracer: Tracer, value: Any, code: types.CodeType, source: tuple[str, int]
) -> None:
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is None:
        return
    drawn = value is sys.modules.get("numpy") and "random" in code.co_names
    if drawn or value is numpy_random or is_numpy_random(value):
        raise _random_error(tracer, "numpy's", source)


def is_numpy_random(value: Any) -> bool:
    """Whether a value is one of numpy's generators of random numbers, or a method of one."""
    owner = getattr(value, "__self__", value) if callable(value) else value
    kind = type(owner)
    return kind.__module__.startswith("numpy.random") and not builtins.isinstance(owner, type)


def _random_error(tracer: Tracer, whose: str, source: tuple[str, int]) -> TraceError:
    return TraceError(
        f"{tracer.label} draws {whose} random numbers at {source[0]}:{source[1]}, which a graph "
        "would not draw again; use torch's, or move that code into a function of its own"
    )


def _is_installed(filename: str) -> bool:
    return "-packages" + os.sep in filename
