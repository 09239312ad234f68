"""What the backend did with each graph that it compiled, for `mhc_compile.report` and the log."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mhc_compile.backend.options import Options
from mhc_compile.scheduler.choose_plan import Choice


@dataclass(frozen=True)
class Fused:
    """One fusion.

    Attributes:
        site: the connection whose read took part, as its module's name in the model.
        kind: "seam", "rms norm", "layer norm", "expand" or "merge and collapse".
    """

    site: str
    kind: str


@dataclass(frozen=True)
class NotFused:
    """What could have been fused and was not: `site` and `kind` as in `Fused`, and why."""

    site: str
    kind: str
    reason: str


@dataclass
class Piece:
    """Neighbouring calls of a graph on one server of the overlap plan.

    Attributes:
        server: "compute", which is the stream of the caller, "hp" or "a2a".
        ops: the tags of its calls, each once, in order.
        after: numbers of the pieces whose results it reads.
    """

    server: str
    ops: tuple[str, ...]
    after: tuple[int, ...] = ()


@dataclass
class GraphRecord:
    """One captured graph.

    Attributes:
        options: how it was compiled.
        device: "cpu" or "cuda".
        kernels: what runs the operators: "triton", "formulas" (written out for Inductor), or
            "operators" (as they are, in torch).
        operators: how often each operator of mhc occurred in it, as captured.
        fused: what was fused.
        not_fused: what was not, each with its reason.
        choices: the recompute plan of each chain of seams.
        rebuilt: how many sublayers' streams the backward really rebuilds; None as long as no
            backward was compiled, and where it came from Inductor's cache.
        static_peak: the most bytes of activations and gradients that the forward and the backward
            graph hold at one time, by the sizes and lifetimes of their tensors; None as `rebuilt`.
        pieces: of the forward and the backward graph, with overlap=True.
        seconds: what each pass took.
        notes: anything else that a user should know.
    """

    options: Options
    device: str = "cpu"
    kernels: str = "operators"
    operators: dict[str, int] = field(default_factory=dict)
    fused: list[Fused] = field(default_factory=list)
    not_fused: list[NotFused] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    rebuilt: int | None = None
    static_peak: int | None = None
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: list[weakref.ref[torch.Tensor]] = field(default_factory=list, repr=False)

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """Sizes of blocks in sublayers, of each chain."""
        return [choice.block_sizes for choice in self.choices]

    def count(self, kind: str) -> int:
        """How many fusions have a kind that starts so."""
        return sum(fused.kind.startswith(kind) for fused in self.fused)

    def reads(self, parameters: set[int]) -> bool:
        """Whether the graph has one of these parameters, given by `id`, among its inputs."""
        alive = (reference() for reference in self.parameters)
        return any(id(tensor) in parameters for tensor in alive if tensor is not None)


_records: list[GraphRecord] = []
_KEPT = 256


def keep(record: GraphRecord) -> None:
    """Remembers a record; the oldest are dropped."""
    _records.append(record)
    del _records[:-_KEPT]


def records_of(model: torch.nn.Module) -> Iterator[GraphRecord]:
    """The records of graphs that read parameters of a model, oldest first."""
    parameters = {id(p) for p in model.parameters()}
    yield from (record for record in _records if record.reads(parameters))


def last_record() -> GraphRecord | None:
    """The record of the graph that was compiled last."""
    return _records[-1] if _records else None
