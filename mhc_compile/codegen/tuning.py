"""Which tile a kernel runs with: `choose_tile`'s, a measured one, or one that is measured now."""

from __future__ import annotations

import functools
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mhc_compile.codegen.cache import cache_directory, checked
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.codegen.tile_table import Entry, TileTable, read_table
from mhc_compile.codegen.tiles import GIVEN, choose_tile
from mhc_compile.errors import check_choice

MODES = ("off", "cached", "full")
ENV = "MHC_COMPILE_TUNE"
PACKAGED = Path(__file__).with_name("tiles.json")
"""Measured by benchmarks/tune.py; the user's own are in the cache directory, under this name."""
_log = logging.getLogger(__name__)
_lock = threading.RLock()


class Tuning(NamedTuple):
    """How tiles are chosen for a device; it changes with the mode and with the tables.

    Attributes:
        mode: a name in `MODES`.
        arch: as in `tile_table.Entry`; "" where nothing is measured.
        device: where to measure.
        generation: counts changes of the tables.
    """

    mode: str
    arch: str = ""
    device: torch.device | None = None
    generation: int = 0


class _State:
    """The process's mode and tables."""

    mode: str | None = None
    table: TileTable | None = None
    generation = 0


def set_tuning(mode: str) -> None:
    """Sets how tiles are chosen from now on, in this process; before, MHC_COMPILE_TUNE says it.

    Args:
        mode: "off": by the sizes alone; "cached": by tables of measured tiles, where they have an
            entry; "full": what has no entry is measured when it first runs, which takes some
            seconds a kernel, and kept for later processes. Other tiles add up in another order,
            so that results differ in their last bits.

    Raises:
        ConfigError: there is no such mode.
    """
    check_choice("tune", mode, MODES)
    _State.mode = mode


def tuning_of(device: torch.device) -> Tuning:
    """How tiles are chosen for kernels on a device.

    Raises:
        ConfigError: MHC_COMPILE_TUNE names no mode.
    """
    if device.type != "cuda":
        return Tuning("off")
    mode = _State.mode
    if mode is None:
        mode = os.environ.get(ENV, "cached")
        check_choice(f"the environment's {ENV}", mode, MODES)
    if mode == "full" and torch.cuda.is_current_stream_capturing():
        mode = "cached"  # nothing can be timed inside of a CUDA graph
    return Tuning(mode, architecture(device), device, _State.generation)


@functools.cache
def architecture(device: torch.device) -> str:
    """The GPU's architecture, as in tables."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def tile_for(spec: KernelSpec, tokens: int, tuning: Tuning) -> Tile:
    """The tile that a kernel runs with.

    Raises:
        MHCError: a table is damaged.
    """
    spec = spec.tiled_as
    spec = replace(spec, tile=choose_tile(spec, tokens))
    if tuning.mode == "off" or not tokens or spec.op in GIVEN:
        return spec.tile
    with _lock:
        found = tables().lookup(tuning.arch, spec, tokens)
        if found is None and tuning.mode == "full":
            found = _measure(spec, tokens, tuning)
    return found or spec.tile


def tables() -> TileTable:
    """The package's entries and the user's, which count more."""
    with _lock:
        if _State.table is None:
            _State.table = read_table(PACKAGED)
            own = read_table(cache_directory() / PACKAGED.name)
            _State.table.add(own.entries.values())
        return _State.table


def forget_tables() -> None:
    """Reads the tables anew at the next kernel: after a file was changed."""
    with _lock:
        _State.table = None
        _State.generation += 1


def _measure(spec: KernelSpec, tokens: int, tuning: Tuning) -> Tile | None:
    from mhc_compile.codegen.tune_kernel import entry_of, tune_kernel

    assert tuning.device is not None
    try:
        tried = tune_kernel(spec, tokens, tuning.device)
    except torch.OutOfMemoryError:
        _log.warning("no memory to measure tiles of %s; it runs with its default", spec.name)
        return None
    entry = entry_of(spec, tokens, tuning.arch, tried)
    if entry is None:
        return None  # it fails with its default too: the launch says how
    _log.info("%s: %.1f us with %s, %.1f us by default, %d tiles tried", spec.name, entry.us,
              entry.tile, entry.default_us, len(tried))  # fmt: skip
    tables().add([entry])
    _State.generation += 1
    _keep(entry)
    return tables().lookup(tuning.arch, spec, tokens)


def _keep(entry: Entry) -> None:
    """Adds an entry to the user's table, as another process may have left it."""
    try:
        path = checked(cache_directory()) / PACKAGED.name
        own = read_table(path)
        own.add([entry])
        own.write(path)
    except OSError as error:  # a read-only or full file system: this process has the entry
        _log.warning("measured tiles are not kept for later processes: %s", error)
