"""Arguments of a module call as named leaves, the same however the caller passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    yield from _leaves({**bound, **kwargs}, ())
    for number, value in enumerate(args[len(names) :]):
        yield from _leaves(value, ("*", number))


def _leaves(value: Any, path: LeafPath) -> Iterator[tuple[LeafPath, Any]]:
    if type(value) is dict:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif type(value) in (tuple, list):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    else:
        yield path, value


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
