"""What stops a trace: the wish for another preparation, and the line that messages name."""

from __future__ import annotations

from typing import Any

from mhc_compile._torch_compat import user_source


class Restart(Exception):  # noqa: N818  # a signal: the trace needs another preparation
    """The block has to be traced again with something kept opaque or symbolic.

    `kind` names a set of `trace_block.Preparation`, `item` what to add to it.
    """

    def __init__(self, kind: str, item: Any) -> None:
        super().__init__(kind)
        self.kind, self.item = kind, item


def here() -> str:
    """The line of user code that runs, as messages give it."""
    source = user_source(3)
    return f"{source[0]}:{source[1]}" if source else "an unknown line"
