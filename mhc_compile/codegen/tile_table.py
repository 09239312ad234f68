"""Tiles that were measured, by GPU, kernel and sizes: what `tuning` asks before `choose_tile`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mhc_compile.codegen.cache import write_whole
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.codegen.tiles import tile_fault
from mhc_compile.errors import MHCError

VERSION = 1
NEAR = 4
"""An entry is for token counts within this factor of its own; the nearest one is taken."""
# What another kernel decides: in how many parts products come.
_GIVEN = {"gates": "parts", "gates_backward": "parts", "read": "shares"}


@dataclass(frozen=True)
class Entry:
    """One measured tile.

    Attributes:
        arch: "sm_90", or as AMD names it.
        kernel: `KernelSpec.name`.
        dtype: of the streams.
        streams: n.
        channels: C.
        tokens: how many it was measured with.
        tile: the best found.
        us: its microseconds.
        default_us: those of `choose_tile`'s in the same run.
        measured_on: the GPU and the versions of torch and triton.
    """

    arch: str
    kernel: str
    dtype: str
    streams: int
    channels: int
    tokens: int
    tile: Tile
    us: float
    default_us: float
    measured_on: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What has one entry in a table."""
        return self.arch, self.kernel, self.dtype, self.streams, self.channels, self.tokens


class TileTable:
    """Entries by their keys."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = {entry.key: entry for entry in entries}

    def add(self, entries: Iterable[Entry]) -> None:
        """Adds entries; they replace those with the same key."""
        self.entries |= {entry.key: entry for entry in entries}

    def lookup(self, arch: str, spec: KernelSpec, tokens: int) -> Tile | None:
        """The tile for a kernel, or None; parts that another kernel decides are the spec's."""
        key = arch, spec.name, spec.dtype, spec.streams, spec.channels
        near = [
            (abs(math.log(entry.tokens / tokens)), entry.tokens, entry)
            for entry in self.entries.values()
            if entry.key[:-1] == key and entry.tokens <= NEAR * tokens <= NEAR**2 * entry.tokens
        ]
        if not near:
            return None
        tile = min(near, key=lambda found: found[:2])[2].tile
        given = _GIVEN.get(spec.op)
        return tile if given is None else replace(tile, **{given: getattr(spec.tile, given)})

    def write(self, path: Path) -> None:
        """Writes all entries, in an order of their own; another process reads all or nothing."""
        rows = [asdict(self.entries[key]) for key in sorted(self.entries)]
        text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        body = f'{{"version": {VERSION}, "entries": [\n{text}\n]}}\n'
        write_whole(path, body.encode())


def read_table(path: Path) -> TileTable:
    """Reads what `TileTable.write` wrote; no entries where there is no file that may be read.

    Raises:
        MHCError: the file is damaged, has another version, or a tile that its kernel cannot have.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return TileTable()
    except ValueError as error:
        raise MHCError(f"{path} is no table of tiles ({error}); {_remedy(path)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
        raise MHCError(f'{path} is no table of tiles: it has no list "entries"; {_remedy(path)}')
    if found.get("version") != VERSION:
        raise MHCError(
            f"{path} has version {found.get('version')!r} of tables of tiles, this package reads "
            f"{VERSION}; {_remedy(path)}"
        )
    rows = enumerate(found["entries"])
    return TileTable(_entry(row, f"{path}, entry {k}", path) for k, row in rows)


def _entry(row: Any, where: str, path: Path) -> Entry:
    try:
        entry = Entry(**{**row, "tile": Tile(**row["tile"])})
        fields = KernelSpec.fields_of(entry.kernel)
        products = "split" if entry.dtype == "bf16" else "tf32x3"
        spec = KernelSpec(
            streams=entry.streams, channels=entry.channels, dtype=entry.dtype, tile=entry.tile,
            products=products, **fields,
        )  # fmt: skip
        fault = tile_fault(spec)
        if not fault and (entry.tokens < 1 or entry.us <= 0):
            fault = "its tokens and its time must be positive"
    except (TypeError, KeyError, ValueError) as error:
        fault = str(error)
    if fault:
        raise MHCError(f"{where} cannot be used: {fault}; {_remedy(path)}")
    return entry


def _remedy(path: Path) -> str:
    return f"delete {path.name} or the entry, or write it anew with benchmarks/tune.py"
