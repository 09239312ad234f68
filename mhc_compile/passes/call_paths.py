"""Arguments of a module call as named leaves, the same however the caller passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mhc_compile.passes.containers import children

LeafPath = tuple[str | int, ...]
"""Parameter name of forward, then keys into nested tuples, lists and dicts."""


def named_leaves(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[LeafPath, Any]]:
    """Yields every non-container argument with its path, in the order of the signature.

    Args:
        forward: the unbound method; its first parameter is the module.
        args: positional arguments without the module.
        kwargs: keyword arguments.

    Yields:
        `(path, leaf)`; extra positional arguments have the path `("*", number)`.
    """
    names = positional_names(forward)
    bound: dict[str, Any] = dict(zip(names, args, strict=False))
    yield from leaves_of({**bound, **kwargs}, ())
    for number, value in enumerate(args[len(names) :]):
        yield from leaves_of(value, ("*", number))


def leaves_of(value: Any, path: LeafPath) -> Iterator[tuple[LeafPath, Any]]:
    """The parts of an argument with their paths; `path` is its own."""
    parts = children(value)
    if parts is None:
        yield path, value
        return
    for key, item in parts:
        yield from leaves_of(item, (*path, key))


def argument_at(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], path: LeafPath
) -> Any:
    """The argument, or part of one, at a path of `named_leaves`."""
    names = positional_names(forward)
    if path[0] == "*":
        value, rest = args[len(names) + int(path[1])], path[2:]
    else:
        bound = dict(zip(names, args, strict=False))
        value, rest = {**bound, **kwargs}[str(path[0])], path[1:]
    for key in rest:
        value = dict(children(value) or ())[key]
    return value


def is_open(name: object, value: Any, open_names: frozenset[str]) -> bool:
    """Whether an argument that is None counts as an input rather than a constant."""
    return value is None and name in open_names


def positional_names(forward: Callable[..., Any]) -> list[str]:
    """Parameters of an unbound method that can be given by position, without the first."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]
