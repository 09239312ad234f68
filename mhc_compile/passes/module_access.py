"""What traced code reads from and writes to modules and the objects that they hold.

Parameters and buffers become inputs of the graph. Numbers, flags and short lists become guards, so
that a block whose `drop_prob` is changed later is traced again. Assignments become nodes.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mhc_compile._torch_compat import is_internal, user_source
from mhc_compile.errors import TraceError
from mhc_compile.passes.containers import put
from mhc_compile.passes.python_effects import is_user_code
from mhc_compile.passes.simple_values import copied, is_simple
from mhc_compile.passes.trace_errors import Restart, here
from mhc_compile.passes.tracer import SELF, Tracer
from mhc_compile.passes.value_proxy import ValueProxy, unwrapped

_MISSING = object()
_INTERNALS = frozenset(nn.Module().__dict__) | {"training", "__dict__", "__class__"}
# Hugging Face's layers ask for it in a wrapper that leaves checkpointing to the rewritten class.
_UNGUARDED = frozenset({"gradient_checkpointing"})

_watching: list[ModuleAccess | None] = [None]
"""Who sees what is read from and written to modules now, last."""


@contextlib.contextmanager
def patched_modules() -> Iterator[None]:
    """Patches attribute access of nn.Module for the traces within.

    One patch serves all of them: Python has to go through every class of modules for each.
    """
    if getattr(nn.Module.__getattribute__, "__module__", "") == __name__:
        yield
        return
    get, set_ = nn.Module.__getattr__, nn.Module.__setattr__
    register = nn.Module.register_parameter

    def __getattribute__(module: nn.Module, name: str) -> Any:  # noqa: N807
        value, access = object.__getattribute__(module, name), _watching[-1]
        if access is None or name in _INTERNALS:
            return value
        return access.read(module, name, value)

    def __getattr__(module: nn.Module, name: str) -> Any:  # noqa: N807
        value, access = get(module, name), _watching[-1]
        return value if access is None else access.read(module, name, value)

    def __setattr__(module: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        access = _watching[-1]
        if access is None or not access.write(module, name, value):
            set_(module, name, value)

    def register_parameter(module: nn.Module, name: str, param: Any) -> None:
        access = _watching[-1]
        if param is not None and access is not None and not access.tracer.paused:
            raise TraceError(
                f"{access.tracer.label} makes a {type(module).__name__} with parameters at "
                f"{_outside_torch()}; build modules in __init__"
            )
        register(module, name, param)

    patches = (__getattribute__, __getattr__, __setattr__, register_parameter)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patched_attribute(nn.Module, patch.__name__, patch))
        yield


class ModuleAccess:
    """Watches the attributes of a block's modules while the block is traced.

    `symbolic` are paths of numbers that the forward itself changes, such as counters; they are
    inputs of the graph rather than guards.
    """

    def __init__(self, tracer: Tracer, symbolic: frozenset[str]) -> None:
        self.tracer, self.symbolic = tracer, symbolic
        self.initial: dict[int, dict[str, Any]] = {}
        for module in tracer.block.modules():
            self.initial[id(module)] = {
                **module.__dict__, **module._parameters, **module._buffers, **module._modules
            }  # fmt: skip
        self.paths = dict(tracer.modules)
        self.containers = [
            (name, key, value, _contents(value))
            for name, module in tracer.block.named_modules() if id(module) in tracer.opened
            for key, value in module.__dict__.items()
            if key not in _INTERNALS and builtins.isinstance(value, list | dict | set)
        ]  # fmt: skip
        self.written: set[tuple[int, str]] = set()
        self.watched_classes: dict[type, contextlib.ExitStack] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Sees what is read from and written to modules, and objects met on the way."""
        with patched_modules():
            _watching.append(self)
            try:
                yield
            finally:
                _watching.pop()
                for stack in self.watched_classes.values():
                    stack.close()

    # --- reads ----------------------------------------------------------------------------

    def read(self, owner: Any, name: str, value: Any) -> Any:
        """Notes a read and returns what the traced code gets."""
        kind = type(value)
        if self.tracer.paused or kind is ValueProxy or kind is types.MethodType:
            return value
        path = self.paths.get(id(owner))
        if path is None or name.startswith("__") or not _from_user_code():
            return value
        if (id(owner), name) in self.written:
            return value
        full = f"{path}.{name}" if path else name
        known = self.initial[id(owner)].get(name, _MISSING)
        computed = known is _MISSING and builtins.isinstance(
            getattr(type(owner), name, None), property
        )
        if builtins.isinstance(value, Tensor):
            if computed:
                return value
            if known is not value and known is not _MISSING:
                return self.tracer.late_attribute(owner, name, value)
            return self.tracer.attribute(full, value)
        if is_simple(value):
            if full in self.symbolic:
                return self.tracer.attribute(full, value)
            if known is not value and known is not _MISSING and id(owner) in self.tracer.modules:
                return self.tracer.late_attribute(owner, name, value)
            if not computed and value == value and full not in _UNGUARDED:
                node = self.tracer.attribute(full, value)._mhc_node
                self.tracer.guards.add(node, copied(value), user_source())
        elif not computed and _is_plain_object(value):
            self.watch_object(value, full)
        return value

    def watch_object(self, value: Any, path: str) -> None:
        """Watches a configuration or the like that a module holds."""
        if id(value) in self.paths:
            return
        self.paths[id(value)] = self.tracer.objects[id(value)] = path
        self.initial[id(value)] = dict(vars(value))
        kind = type(value)
        if kind in self.watched_classes:
            return
        get: Any = kind.__getattribute__
        set_: Any = kind.__setattr__

        def __getattribute__(owner: Any, name: str) -> Any:  # noqa: N807
            return self.read(owner, name, get(owner, name))

        def __setattr__(owner: Any, name: str, item: Any) -> None:  # noqa: N807
            if not self.write(owner, name, item):
                set_(owner, name, item)

        stack = contextlib.ExitStack()
        with contextlib.suppress(TypeError):
            stack.enter_context(patched_attribute(kind, "__getattribute__", __getattribute__))
            stack.enter_context(patched_attribute(kind, "__setattr__", __setattr__))
        self.watched_classes[kind] = stack

    # --- writes ---------------------------------------------------------------------------

    def write(self, owner: Any, name: str, value: Any) -> bool:
        """Makes an assignment a node; False if the assignment is not the traced code's."""
        tracer = self.tracer
        path = self.paths.get(id(owner))
        if tracer.paused or path is None or not _from_user_code():
            return False
        full = f"{path}.{name}" if path else name
        known = self.initial[id(owner)].get(name, _MISSING)
        if is_simple(value):
            if type(value) is type(known) and value == known:
                return (id(owner), name) not in self.written and known is value
            if type(value) in (int, float) and type(known) in (int, float):
                if full in self.symbolic or (id(owner), name) in self.written:
                    raise TraceError(
                        f"{tracer.label} sets .{name} at {here()} to numbers that a graph cannot "
                        "follow; count in a buffer instead"
                    )
                raise Restart("symbolic", full)
        if builtins.isinstance(value, nn.Module):
            raise TraceError(
                f"{tracer.label} replaces its submodule .{name} at {here()}; build modules in "
                "__init__"
            )
        owner_proxy = tracer.attribute(path or SELF, owner)
        tracer.create("call_function", setattr, (owner_proxy, name, value), {}, None, effect=True)
        self.written.add((id(owner), name))
        inside = id(owner) in tracer.opened or not builtins.isinstance(owner, nn.Module)
        _put(owner, name, value if inside else unwrapped(value))
        return True

    def check_containers(self, find_line: Any) -> None:
        """Refuses lists, dicts and sets on modules that the forward changed.

        Args:
            find_line: maps an attribute's name to the source line that changes it.
        """
        for module, key, value, before in self.containers:
            if _contents(value) != before:
                where = find_line(key)
                raise TraceError(
                    f"{self.tracer.label} changes the {type(value).__name__} "
                    f"{'.'.join(filter(None, ('self', module, key)))} at {where}, which a graph "
                    "does not repeat; return the value, assign it to an attribute, or keep it in a "
                    "buffer"
                )


@contextlib.contextmanager
def patched_attribute(kind: type, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a class for a while."""
    own = kind.__dict__.get(name, _MISSING)
    setattr(kind, name, value)
    try:
        yield
    finally:
        if own is _MISSING:
            delattr(kind, name)
        else:
            setattr(kind, name, own)


def _put(owner: Any, name: str, value: Any) -> None:
    if builtins.isinstance(owner, nn.Module):
        for store in (owner._buffers, owner._parameters):
            if name in store:
                store[name] = value
                return
        owner.__dict__[name] = value
    else:
        put(owner, name, value)


def _from_user_code() -> bool:
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return not is_internal(frame.f_code.co_filename)


def _outside_torch() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and not is_user_code(frame.f_code.co_filename, modules=False):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown line"


def _is_plain_object(value: Any) -> bool:
    """An instance of a class written in Python, such as a configuration."""
    kind = type(value)
    if builtins.isinstance(value, nn.Module | type | dict | list | tuple | set | enum.Enum):
        return False
    if callable(value) or not hasattr(value, "__dict__"):
        return False
    heap = bool(kind.__flags__ & 1 << 9)
    module = kind.__module__.split(".")[0]
    return heap and module not in ("torch", "builtins", "types", "functools", "threading")


def _contents(value: Any) -> list[Any]:
    """The identities of what a container holds."""
    if builtins.isinstance(value, dict):
        return [(id(k), id(v)) for k, v in value.items()]
    items = [id(v) for v in value]
    return items if builtins.isinstance(value, list) else sorted(items)
