"""Checks inside a rewritten block: is the graph still the one that these inputs need?"""

from __future__ import annotations

from typing import Any

from mhc_compile.errors import TraceError


class GuardMismatch(Exception):  # noqa: N818  # a signal between a graph and its block, not an error
    """The inputs take another way through the block's Python than the traced example did."""


def check_value(value: Any, expected: Any, where: str, early: bool) -> None:
    """Compares a value on which the block's control flow depended at tracing.

    Args:
        value: what it is now.
        expected: what it was.
        where: the source line that looked at it.
        early: nothing has run yet, so the block may try or trace another graph.

    Raises:
        GuardMismatch: they differ and `early`.
        TraceError: they differ and a part of the block has run.
    """
    if value == expected:
        return
    if early:
        raise GuardMismatch
    raise TraceError(
        f"the code at {where} saw {expected!r} when the block was traced and {value!r} now; it "
        "depends on a result computed inside the block, so move it into a submodule"
    )
