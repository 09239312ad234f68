"""What "add_shares" adds up: arrays that other kernels of a backward left, one share a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mhc_compile.codegen.spec import KernelSpec


@dataclass(frozen=True)
class Shares:
    """One array `[count, size]` whose first axis is summed.

    Attributes:
        name: the argument.
        count: a key of `signature.counts`, or the number itself.
        results: names of what the sum is cut into, with the sizes: numbers, for each token if
            `by_token`.
        rows: shares that a program loads at a time.
        columns: numbers of a share that a program sums.
    """

    name: str
    count: str | int
    results: tuple[tuple[str, int], ...]
    rows: int
    columns: int
    by_token: bool = False

    @property
    def size(self) -> int:
        """Numbers of a share, for each token if `by_token`."""
        return sum(size for _, size in self.results)

    @property
    def cuts(self) -> Iterator[tuple[str, int, int]]:
        """Each result with its first number and the one after its last."""
        end = 0
        for name, size in self.results:
            yield name, end, end + size
            end += size

    def programs(self, counts: dict[str, int]) -> int:
        """How many programs sum it."""
        count = counts[self.count] if isinstance(self.count, str) else self.count
        size = self.size * (counts["tokens"] if self.by_token else 1)
        return -(-size // self.columns) if count else 0


def shares_of(spec: KernelSpec) -> tuple[Shares, ...]:
    """The arrays of one launch, in the order of its programs: long loops come first."""
    n, c = spec.streams, spec.channels
    found = [Shares("sums", "tiles", (("g_bias", spec.maps), ("g_alpha", 3)), 256, 8)]
    found += [
        Shares(f"{name}_shares", "programs", ((f"g_{name}", c),), 64, 32)
        for name in ("weight", "shift") if getattr(spec, name)
    ]  # fmt: skip
    found.append(Shares("phi_shares", "groups", (("g_phi", n * c * spec.maps),), 8, 256))
    if spec.mix:
        results = ("g_res", n * n), ("g_post", n)
        found.append(Shares("dots", spec.tile.parts, results, 8, 256, by_token=True))
    return tuple(found)
