"""What is found in a model and planned for it: sites, segments of streams, blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tabulate import tabulate

from mhc_compile._torch_compat import Source
from mhc_compile.passes.call_paths import LeafPath

Path = tuple[tuple[str, int], ...]
"""Module calls, outermost first, each as (name, number of the call)."""


@dataclass(frozen=True)
class ResidualSite:
    """One residual add of a model.

    Attributes:
        name: stable and unique in the model: the owner block and the branch's part of it.
        module: fully qualified name of the owner block ("" is the model itself).
        source: "file.py:123" of the add.
        stream: which residual stream of the model it belongs to, from 0 in execution order.
        channels: C, the width of the stream.
        accepted: whether `transform` rewrites it.
        reason: why it does not, else "".
        evidence: what was seen: the form of the add, what F holds, what it continues.
        mlp: whether F is known to be an MLP, see `is_mlp`.
    """

    name: str
    module: str
    source: str
    stream: int
    channels: int
    accepted: bool
    reason: str
    evidence: str = field(default="", compare=False)
    mlp: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        verdict = "rewritten" if self.accepted else f"refused: {self.reason}"
        return (
            f"{self.name} ({self.source}): stream {self.stream}, C = {self.channels}; "
            f"{self.evidence}; {verdict}"
        )


class ResidualSites(list[ResidualSite]):
    """Sites as a list that prints as a table, one line a site, with what was seen."""

    def __str__(self) -> str:
        rows = [
            (s.name, s.source, s.stream, s.channels, "yes" if s.accepted else "no",
             s.evidence if s.accepted else f"{s.evidence}. Refused: {s.reason}")
            for s in self
        ]  # fmt: skip
        headers = ("site", "source", "stream", "C", "rewritten", "because")
        widths = [None, None, None, None, None, 72]
        return tabulate(rows, headers=headers, maxcolwidths=widths)


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring sites of one stream in one block.

    Attributes:
        sites: the residual adds in execution order.
        sources: their source lines.
        adds: when they ran in the recording, to order the sites of several segments.
        first_index: position of the first site in the stream.
        stream_inputs: paths of the block's arguments that carry states of the stream, each with the
            dimensions of its plain (one-stream) tensor, the latest first; none if it starts inside.
        expand: whether the stream starts here.
        collapse: whether it ends here.
        outputs: which tensors of the block's result hand the stream on, in the order of
            `tensor_leaves`; none if it ends here.
        norms: classes of the modules that stand on the stream itself between sublayers (post-norm).
    """

    sites: tuple[ResidualSite, ...]
    sources: tuple[Source | None, ...]
    adds: tuple[int, ...]
    first_index: int
    stream_inputs: tuple[tuple[LeafPath, int], ...]
    expand: bool
    collapse: bool
    outputs: tuple[int, ...]
    norms: frozenset[type]


@dataclass(frozen=True)
class BlockPlan:
    """What is to be rewritten in one block.

    Attributes:
        name: fully qualified name of the block.
        segments: its parts of streams, one in most models.
        opened: submodules, relative to the block, that hold a part of a stream and are traced
            into; all others stay calls.
        light: submodules that hold no matmul, convolution or attention.
        seen: source lines of all residual-like adds of the recording, taken or not.
    """

    name: str
    segments: tuple[Segment, ...]
    opened: frozenset[str]
    light: frozenset[str]
    seen: frozenset[Source | None] = frozenset()

    @property
    def order(self) -> list[tuple[int, int]]:
        """`(segment, site in it)` of all sites, in execution order."""
        pairs = [(s, k) for s, seg in enumerate(self.segments) for k in range(len(seg.sites))]
        return sorted(pairs, key=lambda pair: self.segments[pair[0]].adds[pair[1]])

    @property
    def sites(self) -> list[ResidualSite]:
        """All sites in execution order."""
        return [self.segments[s].sites[k] for s, k in self.order]

    @property
    def sources(self) -> list[Source | None]:
        """Their source lines."""
        return [self.segments[s].sources[k] for s, k in self.order]


@dataclass(frozen=True)
class Plan:
    """All sites that were found, and the blocks to rewrite."""

    sites: tuple[ResidualSite, ...]
    blocks: tuple[BlockPlan, ...]


def format_source(source: Source | None) -> str:
    """Formats a source line as "file.py:123"."""
    return f"{os.path.basename(source[0])}:{source[1]}" if source else "unknown source"
