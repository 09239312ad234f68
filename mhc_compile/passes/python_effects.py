"""Changes that traced code makes outside its modules: globals, closures, containers in them."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import gc
import os
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mhc_compile._torch_compat import is_internal
from mhc_compile.errors import TraceError
from mhc_compile.passes.outside_values import (
    LRU_CACHE,
    guard_outside_values,
    refuse_random,
)
from mhc_compile.passes.trace_patches import TypeOfValue
from mhc_compile.passes.tracer import Tracer

_MUTATORS = frozenset({
    "append", "extend", "add", "update", "setdefault", "pop", "popleft", "appendleft", "insert",
    "clear", "remove", "discard", "popitem", "sort", "reverse",
})  # fmt: skip
_CONTAINERS = (list, dict, set, deque)
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_MOST = 10_000
_LOADED = "LOAD_GLOBAL"


@dataclass
class _Watched:
    """A name outside a function, what it held before, and how to read and restore it."""

    name: str
    kind: str
    code: types.CodeType
    holder: Any
    key: Any
    before: Any
    contents: Any = None

    def now(self) -> Any:
        """What the name holds now."""
        if self.kind in ("container", "default"):
            return self.before
        if self.kind == "closure":
            return self.holder.cell_contents
        if self.kind == "attribute":
            return vars(self.holder).get(self.key)
        return self.holder.get(self.key)

    def changed(self) -> bool:
        """Whether the trace changed it; a flag that became True only notes that it was done."""
        value = self.now()
        if value is not self.before:
            return not (self.before is False and value is True)
        return self.contents is not None and _identities(value) != _identities(self.contents)

    def restore(self) -> None:
        """Puts the old value or contents back."""
        if self.contents is not None:
            if builtins.isinstance(self.before, list | deque):
                self.before.clear()
                self.before.extend(self.contents)
            else:
                self.before.clear()
                self.before.update(self.contents)
        if self.now() is not self.before:
            if self.kind == "closure":
                self.holder.cell_contents = self.before
            elif self.kind == "attribute":
                setattr(self.holder, self.key, self.before)
            else:
                self.holder[self.key] = self.before


class PythonEffects:
    """Looks at every user function that the traced code enters, before it runs.

    Functions that run inside a submodule's call are left alone: that call is repeated.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.codes: dict[int, types.CodeType] = {}
        self.found: list[_Watched] = []
        self.names = contextlib.ExitStack()

    def __enter__(self) -> PythonEffects:
        self.previous = sys.getprofile()
        # A collection would run callbacks and finalisers, which are no part of the traced code.
        self.collects = gc.isenabled()
        gc.disable()
        self.tracer.watcher = self._on_event
        sys.setprofile(self.tracer.watcher)
        return self

    def __exit__(self, *_: object) -> None:
        self.tracer.watcher = None
        sys.setprofile(self.previous)
        if self.collects:
            gc.enable()
        self.names.close()
        for watched in self.found:
            if watched.changed():
                watched.restore()

    def _on_event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and builtins.isinstance(arg.__self__, random.Random):
            refuse_random(self.tracer, frame)
        if event != "call" or self.tracer.paused:
            return
        code = frame.f_code
        if id(code) in self.codes:
            return
        self.codes[id(code)] = code
        if is_user_code(code.co_filename):
            self.found += _watched(frame, code)
            loaded = _names_in(code)[_LOADED]
            guard_outside_values(self.tracer, frame, loaded, lambda name: _cell(frame, code, name))
            self._replace_names(frame.f_globals, loaded)

    def _replace_names(self, scope: dict[str, Any], loaded: set[str]) -> None:
        """Gives a file's `type` and its functions with a cache other meanings for a while.

        A cache would hand proxies of this trace to later calls.
        """
        if "type" in loaded and "type" not in scope:
            scope["type"] = TypeOfValue
            self.names.callback(scope.pop, "type", None)
        for name in loaded:
            if type(scope.get(name)) is LRU_CACHE:
                cached = scope[name]
                scope[name] = _uncached(self.tracer, cached)
                self.names.callback(scope.__setitem__, name, cached)

    def check(self) -> None:
        """Raises `TraceError` for the first change that a graph would not repeat."""
        for watched in self.found:
            if watched.changed():
                line = _changing_line(watched.code, watched.name, watched.key)
                what = {
                    "closure": "variable of an outer function",
                    "container": "variable of an outer function",
                    "attribute": "attribute",
                    "default": "default argument",
                }.get(watched.kind, "global")
                raise TraceError(
                    f"{self.tracer.label} changes the {what} {watched.name!r} at "
                    f"{watched.code.co_filename}:{line}, which a graph does not repeat; return the "
                    "value, or keep it in a buffer or an attribute of the module"
                )

    def line_of_attribute(self, name: str) -> str:
        """The line of traced code that changes the container in an attribute."""
        for code in self.codes.values():
            if is_user_code(code.co_filename) and name in code.co_names:
                return f"{code.co_filename}:{_changing_line(code, name, name)}"
        return "an unknown line"


def is_user_code(filename: str, modules: bool = True) -> bool:
    """Whether a file is neither torch's, Python's nor this library's own.

    torch's layers count as user code if `modules`.
    """
    if not modules and filename.startswith(os.path.dirname(nn.__file__)):
        return False
    if is_internal(filename) or filename.startswith("<"):
        return False
    return not filename.startswith(_STANDARD_LIBRARY) or "-packages" + os.sep in filename


def _watched(frame: types.FrameType, code: types.CodeType) -> Iterator[_Watched]:
    stored, scope = _names_in(code), frame.f_globals
    for name in stored["STORE_GLOBAL"]:
        yield _Watched(name, "global", code, scope, name, scope.get(name))
    for name in stored[_LOADED]:
        value = scope.get(name)
        if builtins.isinstance(value, _CONTAINERS) and len(value) < _MOST:
            yield _Watched(name, "global", code, scope, name, value, _copy(value))
        elif stored["STORE_ATTR"] and hasattr(value, "__dict__"):
            if not builtins.isinstance(value, nn.Module | Tensor | types.ModuleType):
                for key in stored["STORE_ATTR"] & set(vars(value)):
                    before = vars(value)[key]
                    yield _Watched(f"{name}.{key}", "attribute", code, value, key, before)
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = frame.f_locals.get(name)
        if type(value) in _CONTAINERS and _is_default(frame, value):
            yield _Watched(name, "default", code, None, name, value, _copy(value))
    # A comprehension's free variables are locals of the function around it, or watched there.
    for name in () if code.co_name.startswith("<") else code.co_freevars:
        value = frame.f_locals.get(name)
        if builtins.isinstance(value, _CONTAINERS) and len(value) < _MOST:
            yield _Watched(name, "container", code, None, name, value, _copy(value))
        elif name in stored["STORE_DEREF"]:
            cell = _cell(frame, code, name)
            if cell is not None:
                yield _Watched(name, "closure", code, cell, name, value)


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> dict[str, set[str]]:
    """Names that a function stores to, by instruction, and the globals that it loads."""
    found: dict[str, set[str]] = {
        "STORE_GLOBAL": set(), "STORE_DEREF": set(), "STORE_ATTR": set(), _LOADED: set()
    }  # fmt: skip
    for instruction in dis.get_instructions(code):
        name = _LOADED if instruction.opname == "LOAD_NAME" else instruction.opname
        if name in found:
            found[name].add(instruction.argval)
    return found


def _is_default(frame: types.FrameType, value: Any) -> bool:
    """Whether an argument is a function's default, which all its calls share."""
    for function in _functions_of(frame):
        defaults = (function.__defaults__ or (), (function.__kwdefaults__ or {}).values())
        if any(default is value for group in defaults for default in group):
            return True
    return False


def _functions_of(frame: types.FrameType) -> list[types.FunctionType]:
    """The function that runs in a frame, or all that share its code if none has its name."""
    code = frame.f_code
    scope, _, attribute = code.co_qualname.rpartition(".")
    holder = frame.f_globals.get(scope or attribute)
    named = vars(holder).get(attribute) if scope and hasattr(holder, "__dict__") else holder
    if builtins.isinstance(named, types.FunctionType) and named.__code__ is code:
        return [named]
    referrers = gc.get_referrers(code)  # looks at every object there is
    return [f for f in referrers if builtins.isinstance(f, types.FunctionType)]


def _uncached(tracer: Tracer, cached: Any) -> Any:
    """Makes calls of a function with a cache nodes, which call it as it is."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return cached(*args, **kwargs)
        return tracer.create("call_function", cached, args, kwargs)

    return call


def _cell(frame: types.FrameType, code: types.CodeType, name: str) -> Any:
    """The cell of a free variable, found on the function that is called."""
    for function in gc.get_referrers(code):
        if builtins.isinstance(function, types.FunctionType) and function.__closure__:
            cell = function.__closure__[code.co_freevars.index(name)]
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if frame.f_locals.get(name) is value:
                return cell
    return None


def _changing_line(code: types.CodeType, name: str, key: Any) -> int:
    """The line of a function that changes what a name holds, else the last that mentions it."""
    line = found = code.co_firstlineno
    lines: dict[int, list[dis.Instruction]] = {}
    for instruction in dis.get_instructions(code):
        line = instruction.starts_line or line
        lines.setdefault(line, []).append(instruction)
    names = {name, key, str(name).split(".")[-1]}
    for line, instructions in lines.items():
        if not any(i.argval in names for i in instructions if builtins.isinstance(i.argval, str)):
            continue
        found = line
        for i in instructions:
            stores = i.opname.startswith(("STORE_", "DELETE_")) and (
                i.argval in names or i.opname.endswith("SUBSCR")
            )
            if stores or i.argval in _MUTATORS:
                return line
    return found


def _identities(value: Any) -> list[Any]:
    if builtins.isinstance(value, dict):
        return [(id(k), id(v)) for k, v in value.items()]
    items = [id(v) for v in value]
    return sorted(items) if builtins.isinstance(value, set) else items


def _copy(value: Any) -> Any:
    if builtins.isinstance(value, dict):
        return dict(value)
    return set(value) if builtins.isinstance(value, set) else list(value)
