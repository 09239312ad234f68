"""A pass over Inductor's graphs that runs after those which its settings name already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.fx import Graph

from mhc_compile._torch_compat import CustomGraphPass, hash_of_files

_PACKAGE = Path(__file__).parents[1]


class ChainedPass(CustomGraphPass):
    """A pass and those before it, with one identity for Inductor's caches.

    Subclasses say what they change, and what their identity depends on.

    Args:
        before: what Inductor's setting held: None, a pass, or several.
    """

    def __init__(self, before: Any = None) -> None:
        several = isinstance(before, list | tuple)
        self.before = tuple(before) if several else () if before is None else (before,)

    def __call__(self, graph: Graph) -> None:
        """Changes a graph of ATen calls, in place."""
        for run in self.before:
            run(graph)
        self.change(graph)

    def change(self, graph: Graph) -> None:
        """What this pass does."""
        raise NotImplementedError

    def identity(self) -> Any:
        """What the result depends on besides the graph."""
        raise NotImplementedError

    def uuid(self) -> Any:
        """The identities together; None, which keeps graphs out of the caches, if one has none."""
        others = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self.before]
        return None if None in others else (self.identity(), *others)


def hash_of_sources(*patterns: str) -> bytes:
    """A hash of source files of this package, given by glob patterns from its root."""
    paths = [path for pattern in patterns for path in sorted(_PACKAGE.glob(pattern))]
    return hash_of_files(tuple(map(str, paths)))
