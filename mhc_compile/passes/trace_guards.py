"""What a trace depended on: values that its control flow looked at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from mhc_compile._torch_compat import Source, user_frame, user_source
from mhc_compile.passes.value_proxy import ValueProxy

Guard = tuple[fx.Node, Any, Source | None]


class GuardList:
    """Guards in the order in which the traced code met them, one a node."""

    def __init__(self) -> None:
        self.guards: list[Guard] = []
        self._known: set[fx.Node] = set()
        self._pending: list[tuple[ValueProxy, tuple[int, int] | None, Source | None]] = []

    def add(self, node: fx.Node, value: Any, source: Source | None = None) -> None:
        """Notes that the graph holds only while `node` has this value."""
        if node not in self._known:
            self._known.add(node)
            self.guards.append((node, value, source or user_source(3)))

    def add_index(self, proxy: ValueProxy) -> None:
        """Notes `__index__`, which may only be torch looking at an argument's type."""
        self._pending.append((proxy, _position(), user_source()))

    def drop_index(self, proxies: list[ValueProxy]) -> None:
        """Torch's argument parser asked for `__index__` in the very call that now is recorded."""
        here = _position()
        self._pending = [
            entry for entry in self._pending
            if not (entry[1] == here and any(entry[0] is p for p in proxies))
        ]  # fmt: skip

    def flush(self) -> None:
        """Makes guards of the `__index__` calls that were real."""
        for proxy, _, source in self._pending:
            self.add(proxy._mhc_node, proxy._mhc_value, source)
        self._pending.clear()


def is_overflow_check(node: fx.Node) -> bool:
    """Whether a value only tells if a tensor holds inf or nan, e.g. `isinf(x).any()`."""
    todo, steps = [node], 0
    while todo and steps < 8:
        at = todo.pop()
        steps += 1
        name = at.target if isinstance(at.target, str) else getattr(at.target, "__name__", "")
        if name in ("isinf", "isnan", "isfinite"):
            return True
        value = at.meta.get("value")
        small = not isinstance(value, Tensor) or value.numel() == 1 or value.dtype.itemsize == 1
        if at.op in ("call_function", "call_method") and small:
            todo += at.all_input_nodes
    return False


def _position() -> tuple[int, int] | None:
    frame = user_frame(2)
    return (id(frame), frame.f_lasti) if frame is not None else None
