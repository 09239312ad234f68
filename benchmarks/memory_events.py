"""The peak of memory that a call allocates on a CPU, from the profiler's memory events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes alive at one time of what torch allocates in main memory during a call.

    Blocks from before the call do not count, also when it frees them. Sizes are those that were
    asked for, exact. What Python or a library such as a BLAS allocates by itself is not seen. The
    first call of a compiled model compiles: call it once before.

    Example:
        >>> peak_bytes(lambda: torch.empty(1000, dtype=torch.uint8))
        1000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = step()
    del kept
    return peak_of(_changes(record.profiler.kineto_results.experimental_event_tree()))


def peak_of(changes: Iterable[tuple[int, int]]) -> int:
    """The peak of (address, bytes) in order of time; negative bytes free the block there."""
    live: dict[int, int] = {}
    now = peak = 0
    for address, size in changes:
        if size > 0:
            live[address] = size
            now += size
        else:
            now -= live.pop(address, 0)  # 0: a block from before, as one of an earlier profile
        peak = max(peak, now)
    return peak


def _changes(roots: Iterable[Any]) -> list[tuple[int, int]]:
    found = []
    for event in _walk(roots):
        kind, block = event.typed
        if kind == torch._C._profiler._EventType.Allocation and block.device.type == "cpu":
            found.append((event.start_time_ns, block.ptr, block.alloc_size))
    # The tree is a thread's order; sorting is stable, so that equal times keep it.
    return [(address, size) for _, address, size in sorted(found, key=lambda change: change[0])]


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    stack = list(events)[::-1]
    while stack:
        event = stack.pop()
        yield event
        stack += event.children[::-1]
