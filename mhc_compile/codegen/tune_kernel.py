"""Finds a kernel's best tile by measuring: each is first compared with the default's results."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mhc_compile.codegen.cache import load
from mhc_compile.codegen.signature import (
    Argument,
    arguments,
    counts,
    grid,
    learn_residents,
    numbers,
)
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.codegen.tile_table import Entry
from mhc_compile.codegen.tiles import even_parts, flat_tile, tile_fault
from mhc_compile.codegen.traffic import traffic

Measure = Callable[[Callable[[], object]], float]
_DTYPES = {"*i32": torch.int32, "*bf16": torch.bfloat16, "*fp16": torch.float16}
_SUMMED = ("partial", "dots", "sums", "phi_shares", "weight_shares", "shift_shares")
"""Results whose first axis is one of shares: how many there are depends on the tile."""
_FIELDS = {
    "split_phi": ("width", "warps"),
    "pad_phi": ("width", "warps"),
    "mix": ("tokens", "width", "warps"),
    "project": ("tokens", "width", "parts", "warps", "stages"),
    "gates": ("tokens",),
    "pre": ("tokens", "width", "warps"),
    "read": ("warps",),
    "seam_once": ("width", "warps"),
    "pre_backward": ("tokens", "width", "warps", "stages"),
    "spread": ("tokens", "width", "warps"),
    "gates_backward": ("tokens",),
    "seam_backward": ("tokens", "width", "warps", "stages", "inner"),
    "read_backward": ("tokens", "width", "parts", "warps", "stages"),
    "mix_backward": ("tokens", "width", "parts", "warps"),
    "phi_backward": ("tokens", "width", "warps", "stages"),
    "add_shares": (),
}
"""What of a tile is varied; the rest follows from it or is another kernel's."""
_TOGETHER = (
    ("tokens", 2, "width", 0.5), ("tokens", 0.5, "width", 2),
    ("tokens", 2, "warps", 2), ("tokens", 0.5, "warps", 0.5),
    ("width", 2, "warps", 2), ("width", 0.5, "warps", 0.5),
)  # fmt: skip
_HELD = 128
"""Most elements of one array of a tile in each thread: with more, registers cannot suffice."""
BETTER = 0.98
"""A tile is preferred to the default if its time is less than this share of it."""


@dataclass(frozen=True)
class Trial:
    """A tile that was tried: its microseconds, or why it was not timed."""

    tile: Tile
    us: float | None
    why: str = ""


def neighbours(spec: KernelSpec) -> list[Tile]:
    """Tiles that differ from a kernel's in one field or two, by a factor of two, and its flat one.

    All can run.
    """
    tile, fields = spec.tile, _FIELDS[spec.op]

    def scaled(value: Tile, name: str, factor: float) -> Tile:
        if name == "stages":
            return replace(value, stages=value.stages + (1 if factor > 1 else -1))
        changed: dict[str, Any] = {name: int(getattr(value, name) * factor)}
        return replace(value, **changed)

    found = [scaled(tile, name, factor) for name in fields for factor in (2, 0.5)]
    for first, a, second, b in _TOGETHER:
        if first in fields and second in fields:
            found.append(scaled(scaled(tile, first, a), second, b))
    if spec.op == "seam_backward":
        found += [replace(tile, registers=most) for most in (0, 128, 168)]
    fitted = [_fitted(spec, t) for t in found if min(t.tokens, t.width, t.parts) >= 1]
    if not tile.flat and (other := flat_tile(spec)):
        fitted.append(other)
    return [
        candidate for candidate in dict.fromkeys(fitted)
        if candidate != tile and not tile_fault(replace(spec, tile=candidate))
        and candidate.tokens * candidate.width <= 32 * _HELD * candidate.warps
    ]  # fmt: skip


def _fitted(spec: KernelSpec, tile: Tile) -> Tile:
    """The tile with what follows from its other fields."""
    strips = math.ceil(spec.channels / tile.width)
    if spec.op == "seam_once":
        return replace(tile, parts=min(32, strips))
    if spec.op == "read":
        return replace(tile, gated=max(1, spec.tile.gated * tile.warps // spec.tile.warps))
    if "parts" in _FIELDS[spec.op] and (spec.op != "mix_backward" or tile.flat):
        same = tile.parts != spec.tile.parts  # then the number itself is what is varied
        return replace(tile, parts=min(tile.parts, strips) if same else
                       even_parts(tile.parts, spec.channels, tile.width))  # fmt: skip
    if spec.op in ("mix", "mix_backward", "seam_backward") or (
        spec.op == "pre" and spec.norm == "none"
    ):
        return replace(tile, parts=strips, joined=tile.joined if strips % tile.joined == 0 else 1)
    return tile


class Launches:
    """A kernel's inputs, the same for all tiles, and launches on them."""

    def __init__(self, spec: KernelSpec, tokens: int, device: torch.device) -> None:
        self.spec, self.tokens, self.device = spec, tokens, device
        draw = torch.Generator(device).manual_seed(0)
        moved, count = traffic(spec, tokens), counts(spec, tokens)
        self.inputs: dict[str, Tensor] = {}
        for argument in arguments(spec):
            if argument.name in moved.read:
                shape, dtype = argument.shape(count), _DTYPES.get(argument.type, torch.float32)
                values = torch.rand(shape, device=device, generator=draw, dtype=torch.float32)
                self.inputs[argument.name] = values.to(dtype)

    def outputs(self, spec: KernelSpec) -> dict[str, Tensor]:
        """Memory for what a kernel writes, full of NaN; counters begin at zero."""
        moved, count = traffic(spec, self.tokens), counts(spec, self.tokens)
        return {
            argument.name: self._empty(argument, count)
            for argument in arguments(spec)
            if argument.name in moved.written | moved.scratch
        }

    def _empty(self, argument: Argument, count: dict[str, int]) -> Tensor:
        dtype = _DTYPES.get(argument.type, torch.float32)
        fill = torch.nan if dtype.is_floating_point else 0
        return torch.full(argument.shape(count), fill, dtype=dtype, device=self.device)

    def values(self, spec: KernelSpec, outputs: dict[str, Any]) -> list[Any]:
        """Arguments of a launch, in order."""
        known = {"eps": 1e-6, **numbers(spec, self.tokens), **self.inputs, **outputs}
        return [known.get(argument.name) for argument in arguments(spec)]

    def call(self, spec: KernelSpec, outputs: dict[str, Tensor]) -> Callable[[], Any]:
        """A launch; it returns what Triton compiled."""
        kernel = load(spec)[grid(spec, self.tokens)]
        values = self.values(spec, outputs)
        return functools.partial(kernel, *values, **spec.options)


def tune_kernel(
    spec: KernelSpec,
    tokens: int,
    device: torch.device,
    *,
    measure: Measure | None = None,
    rounds: int = 3,
    until: float = math.inf,
    prepare: Callable[[Sequence[KernelSpec]], None] = lambda specs: None,
) -> list[Trial]:
    """Measures a kernel's tile and those around it, then those around the best, and so on.

    Args:
        spec: the kernel, with the tile to start from.
        tokens: how many tokens to run it with.
        device: where; its inputs are drawn there.
        measure: microseconds of a call; replays of a CUDA graph where left out.
        rounds: how often to go on from the best.
        until: moment of `time.perf_counter` after which no further tile is begun.
        prepare: is handed what is about to be tried, to compile it ahead.

    Returns:
        What was tried, that of `spec` first. What spills, fails, or differs from the results of
        the first has no time.
    """
    launches, measure = Launches(spec, tokens, device), measure or graph_replays
    first, right = _try(launches, spec, None, measure)
    tried = {spec.tile: first}
    best = spec.tile if first.us is not None else None
    for _ in range(rounds):
        if best is None:
            break
        new = [t for t in neighbours(replace(spec, tile=best)) if t not in tried]
        prepare([replace(spec, tile=tile) for tile in new])
        for tile in new:
            if time.perf_counter() < until:
                tried[tile] = _try(launches, replace(spec, tile=tile), right, measure)[0]
        before, best = best, best_of(list(tried.values())).tile
        if best == before:
            break
    return list(tried.values())


def best_of(tried: Sequence[Trial]) -> Trial:
    """The fastest that was timed; the first, if it is hardly slower."""
    timed = [trial for trial in tried if trial.us is not None]
    if not timed:
        return tried[0]
    fastest = min(timed, key=lambda trial: trial.us or math.inf)
    default = tried[0].us
    better = default is None or (fastest.us or 0.0) < BETTER * default
    return fastest if better else tried[0]


def entry_of(spec: KernelSpec, tokens: int, arch: str, tried: Sequence[Trial]) -> Entry | None:
    """The entry of a table for the best of what was tried; None if nothing ran."""
    best = best_of(tried)
    if best.us is None:
        return None
    import triton

    where = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    )
    default = tried[0].us if tried[0].us is not None else best.us
    return Entry(
        arch, spec.name, spec.dtype, spec.streams, spec.channels, tokens, best.tile,
        round(best.us, 2), round(default, 2), where,
    )  # fmt: skip


def graph_replays(call: Callable[[], object]) -> float:
    """Microseconds of a call, the median over replays of a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(call, rep=20, return_mode="median"))


def _try(
    launches: Launches, spec: KernelSpec, right: dict[str, Tensor] | None, measure: Measure
) -> tuple[Trial, dict[str, Tensor]]:
    """Runs, compares and times one tile; also its results."""
    try:
        outputs = launches.outputs(spec)
        call = launches.call(spec, outputs)
        compiled = call()
        if spec.op == "seam_backward":  # then it has other launches
            learn_residents(spec, compiled)
            outputs = launches.outputs(spec)
            call = launches.call(spec, outputs)
            call()
        spills = getattr(compiled, "n_spills", 0)
        if spills and right is not None:
            return Trial(spec.tile, None, f"spills {spills}"), {}
        results = {name: _comparable(name, outputs[name]) for name in _results(spec, outputs)}
        wrong = "" if right is None else _difference(results, right)
        if wrong:
            return Trial(spec.tile, None, wrong), results
        return Trial(spec.tile, measure(call)), results
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has many kinds; none may end the search
        first = str(error).strip().splitlines() or [""]
        return Trial(spec.tile, None, f"{type(error).__name__}: {first[0][:120]}"), {}


def _results(spec: KernelSpec, outputs: dict[str, Tensor]) -> Iterator[str]:
    scratch = traffic(spec, 1).scratch
    return (name for name in outputs if name not in scratch)


def _comparable(name: str, value: Tensor) -> Tensor:
    return value.sum(0, dtype=torch.float32) if name in _SUMMED else value.clone()


def _difference(results: dict[str, Tensor], right: dict[str, Tensor]) -> str:
    """What differs by more than rounding in another order does; "" if nothing."""
    for name, value in results.items():
        a, b = value.float(), right[name].float()
        bound = 2e-3 if value.element_size() == 4 else 2**-6
        if not bool((a - b).abs().max() <= bound * b.abs().max()):  # also where one is NaN
            return f"{name} differs from the default's"
    return ""
