"""Arguments that a block hands on without looking at them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from mhc_compile.errors import MHCError
from mhc_compile.passes.call_paths import named_leaves
from mhc_compile.passes.trace_block import TracedBlock, trace_block

_found: weakref.WeakKeyDictionary[Callable[..., Any], tuple[str, frozenset[str]]]
_found = weakref.WeakKeyDictionary()
"""What a forward's last block was like, and which of its arguments were open."""


def find_open_arguments(
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    opened: frozenset[str],
) -> frozenset[str]:
    """Arguments, None in the example, that the block's code only hands on.

    Their graphs hold for any value, so that a mask or a cache given later needs no new trace,
    which could not happen inside torch.compile. An argument counts if the code takes the same way
    when `argument is None` is false.
    """
    empty = [str(path[0]) for path, leaf in named_leaves(forward, args, kwargs)
             if leaf is None and len(path) == 1]  # fmt: skip
    if not empty:
        return frozenset()
    closed = trace_block(block, forward, args, kwargs, opened)

    def holds(candidates: frozenset[str]) -> bool:
        try:
            opened_up = trace_block(block, forward, args, kwargs, opened, "", candidates)
        except MHCError:
            return False
        return not opened_up.inspected and _described(closed) == _described(opened_up)

    # A deep model's blocks are alike, so that one trace confirms what was found for the last.
    classes, values = [type(m) for m in block.modules()], [guard[1] for guard in closed.guards]
    kind = repr((empty, sorted(opened), classes, values, _described(closed)))
    last, names = _found.get(forward, ("", frozenset()))
    if kind != last or names and not holds(names):
        names = frozenset(empty)
        if not holds(names):
            names = frozenset(name for name in empty if len(empty) > 1 and holds(frozenset({name})))
        _found[forward] = kind, names
    return names


def _described(traced: TracedBlock) -> list[Any]:
    """A trace's operations; an input in the place of None is written as None."""
    inputs = {node: path for path, node in traced.inputs.items()}
    numbers: dict[fx.Node, Any] = {}
    rows: list[Any] = [len(traced.guards)]
    for node in traced.graph.nodes:
        if node in inputs:
            numbers[node] = "None" if node.meta["value"] is None else f"input {inputs[node]}"
            continue
        numbers[node] = f"node {len(rows)}"
        label: Any = lambda n: _Label(numbers[n])  # noqa: E731
        rows.append((node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), label))))
    return rows


class _Label:
    """Prints as a name, so that `repr` of an input in the place of None is that of None."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name
