"""Arguments of a traced forward: placeholders, and containers that the forward changes."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_compile.passes.call_paths import LeafPath, is_open, named_leaves, positional_names
from mhc_compile.passes.containers import CONSTANTS, children, put, rebuilt, record_fields
from mhc_compile.passes.trace_patches import protected_copy
from mhc_compile.passes.tracer import Tracer
from mhc_compile.passes.value_proxy import proxies_in


@dataclass(frozen=True)
class Write:
    """A list, dict or record among the arguments that the forward changes.

    `path` is where it is in the arguments, `returned` its index in the result, () if it is the
    result itself and None if it is not in it.
    """

    path: LeafPath
    returned: tuple[int, ...] | None


class ArgumentContainers:
    """The containers that a trace hands to a forward, and what they held."""

    def __init__(self) -> None:
        self.found: list[tuple[LeafPath, Any, list[tuple[str | int, Any]]]] = []

    def note(self, path: LeafPath, container: Any) -> None:
        """Remembers a container's contents."""
        if type(container) is not tuple:
            self.found.append((path, container, _contents(container)))

    def changed(self, result: Any) -> list[tuple[Write, Any]]:
        """The containers that the forward has changed."""
        writes = []
        for path, container, before in self.found:
            now = _contents(container)
            same = len(now) == len(before) and all(
                a[0] == b[0] and a[1] is b[1] for a, b in zip(now, before, strict=True)
            )
            if not same:
                writes.append((Write(path, _position_in(result, container)), container))
        return writes


def _contents(container: Any) -> list[tuple[str | int, Any]]:
    """What a container holds; a dataclass object with proxies in it is none to `children`."""
    found = children(container)
    return list(vars(container).items()) if found is None else found


def _position_in(result: Any, container: Any) -> tuple[int, ...] | None:
    if result is container:
        return ()
    if type(result) in (tuple, list):
        for number, part in enumerate(result):
            if part is container:
                return (number,)
    return None


def add_inputs(
    tracer: Tracer,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    open_names: frozenset[str],
) -> tuple[tuple[Any, ...], dict[str, Any], ArgumentContainers]:
    """Makes a placeholder for every argument that is not a constant, on protected copies."""
    placeholders: dict[LeafPath, fx.Node] = {}
    for path, leaf in named_leaves(forward, args, kwargs):
        if not builtins.isinstance(leaf, CONSTANTS) or is_open(path[0], leaf, open_names):
            name = "_".join(str(part) for part in path if part != "*") or "arg"
            name = name if name.isidentifier() else f"arg_{len(placeholders)}"
            placeholders[path] = tracer.graph.placeholder(name)
    nodes = iter(placeholders.values())
    memo: dict[int, Any] = {}
    containers = ArgumentContainers()

    def wrap(value: Any, path: LeafPath) -> Any:
        parts = children(value)
        if parts is not None:
            made = rebuilt(value, [wrap(part, (*path, key)) for key, part in parts])
            containers.note(path, made)
            return made
        if builtins.isinstance(value, CONSTANTS):
            return value
        return tracer.proxy_for(next(nodes), protected_copy(value, memo, tracer.label))

    def wrap_argument(name: str, value: Any) -> Any:
        if is_open(name, value, open_names):
            return tracer.proxy_for(next(nodes), value)
        return wrap(value, (name,))

    # Same order as named_leaves: parameters by position, keywords, then extra positionals.
    names = positional_names(forward)
    first = tuple(wrap_argument(n, a) for n, a in zip(names, args, strict=False))
    named = {k: wrap_argument(k, v) for k, v in kwargs.items()}
    rest = tuple(wrap(a, ("*", k)) for k, a in enumerate(args[len(names) :]))
    tracer.inputs = placeholders
    return first + rest, named, containers


def plain(value: Any) -> Any:
    """A dict of the fields of a dataclass object that holds proxies; other values as they are."""
    if hasattr(type(value), "__dataclass_fields__") and proxies_in(value):
        return {name: getattr(value, name) for name in record_fields(value)}
    return value


def write_back(container: Any, contents: Any) -> None:
    """Gives a container the contents that the forward left in it."""
    if isinstance(container, list):
        container[:] = contents
    elif type(container) is dict:
        container.clear()
        container.update(contents)
    else:
        for name, part in contents.items():
            put(container, name, part)


def finish_result(
    writes: tuple[Write, ...], kind: type | None, find: Callable[[LeafPath], Any], result: Any
) -> Any:
    """Makes what a forward returns of what its graph returns, and changes its arguments.

    Args:
        writes: the containers among the arguments that the forward changes.
        kind: the class of the result if that is a dataclass; the graph returns its fields.
        find: gives the argument at a path.
        result: the graph's result; with writes, the forward's own and the contents.

    Returns:
        The forward's result, with the arguments themselves where it returns them.
    """
    contents: tuple[Any, ...] = ()
    if writes:
        result, contents = result
    if kind is not None and not any(write.returned == () for write in writes):
        result = kind(**result)
    for write, content in zip(writes, contents, strict=True):
        container = find(write.path)
        write_back(container, content)
        if write.returned == ():
            result = container
        elif write.returned is not None:
            parts = list(result)
            parts[write.returned[0]] = container
            result = type(result)(parts)
    return result
