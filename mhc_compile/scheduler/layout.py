"""`Layout`: which rank runs which stage of which microbatch, and what P and M are legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_compile.errors import ConfigError, nearest

VARIANTS = ("dualpipev", "dualpipe", "1f1b", "zb1p")


@dataclass(frozen=True)
class Layout:
    """The placement of a variant's stages on P ranks.

    1f1b and zb1p: P stages, stage s on rank s. dualpipev: 2P stages in a V, rank r has stages r
    and 2P-1-r. dualpipe: P stages, each on two ranks: the first M/2 microbatches enter at rank 0
    and run stage s on rank s, the others enter at rank P-1 and run it on rank P-1-s.

    Slots name a rank's stages: slot 0 is near the microbatches' start, slot 1 near their end.

    Raises:
        ConfigError: the variant is unknown, or P and M break its rule.
    """

    variant: str
    ranks: int
    microbatches: int

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            hint = nearest(str(self.variant).lower(), VARIANTS)
            raise ConfigError(
                f"variant must be one of {', '.join(map(repr, VARIANTS))}, got "
                f"{self.variant!r}{hint}"
            )
        ranks, microbatches = self.ranks, self.microbatches
        for name, value in (("ranks", ranks), ("microbatches", microbatches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.variant == "dualpipe":
            for name, value in (("ranks", ranks), ("microbatches", microbatches)):
                if value % 2:
                    raise ConfigError(
                        f"dualpipe needs an even number of {name}, half for each direction, got "
                        f"{value}; use {value + 1}, or variant='dualpipev'"
                    )
        if self.variant in ("dualpipe", "dualpipev") and microbatches < 2 * ranks:
            raise ConfigError(
                f"{self.variant} needs at least 2 * ranks = {2 * ranks} microbatches, got "
                f"{microbatches}; use more microbatches or fewer ranks, or variant='zb1p'"
            )

    @property
    def stages(self) -> int:
        """Stages of the model: 2P in a V, else P."""
        return 2 * self.ranks if self.variant == "dualpipev" else self.ranks

    def rank_of(self, stage: Any, microbatch: Any) -> Any:
        """The rank that runs `stage` of `microbatch`; integers or arrays of them."""
        if self.variant == "dualpipev":
            return np.minimum(stage, 2 * self.ranks - 1 - stage)
        if self.variant == "dualpipe":
            reverse = np.asarray(microbatch) >= self.microbatches // 2
            return np.where(reverse, self.ranks - 1 - stage, stage)
        return stage

    def slots(self, rank: int) -> tuple[tuple[int, int], ...]:
        """For each slot of a rank: its stage, and the first microbatch that runs it there."""
        if self.variant == "dualpipev":
            return (rank, 0), (2 * self.ranks - 1 - rank, 0)
        if self.variant == "dualpipe":
            near = min(rank, self.ranks - 1 - rank)
            half = self.microbatches // 2
            first = 0 if rank < self.ranks // 2 else half
            return (near, first), (self.ranks - 1 - near, half - first)
        return ((rank, 0),)

    def most_in_flight(self, rank: int) -> int:
        """The most activations of chunks that a rank may hold: P-r, P, P+1 or 2P+1."""
        if self.variant == "1f1b":
            return min(self.ranks - rank, self.microbatches)
        if self.variant == "zb1p":
            return min(self.ranks, self.microbatches)
        return self.stages + 1
