"""Blocks whose terms stay within a bound: the fewest, an exact number, with a given largest block.

All of it rests on one exchange: among blocks that cover the same sublayers from the front, those
that reach further with fewer blocks leave less to do, because a block's term grows with its end and
its number and falls with its begin. Filling blocks from the front is therefore best.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np

from mhc_compile.scheduler.objectives import Array, BlockModel


def fill_blocks(model: BlockModel, term: int, limit: int, cap: int | None = None) -> list[int]:
    """Ends of blocks filled from the front.

    Args:
        model: the objective of the stage.
        term: the largest term of a block.
        limit: stop after so many blocks.
        cap: the largest number of sublayers of a block, None for any.

    Returns:
        The ends. The last of them is not the last sublayer where `limit` blocks do not suffice,
        however they are cut, or where some sublayer does not fit.
    """
    found: list[int] = []
    begin, layers, room = 0, model.layers, term
    sums, ends, step = model.sums, model.ends, model.step
    while begin < layers and len(found) < limit:
        room -= step
        end = bisect_right(ends, room + sums[begin]) - 1
        if cap is not None and end > begin + cap:
            end = begin + cap
        if end <= begin:
            break
        found.append(end)
        begin = end
    return found


def fewest_blocks(model: BlockModel, term: int, limit: int, cap: int | None = None) -> int | None:
    """The fewest blocks with terms within `term`; None if there are more than `limit`."""
    ends = fill_blocks(model, term, limit, cap)
    return len(ends) if ends and ends[-1] == model.layers else None


def _reach_sets(model: BlockModel, term: int, blocks: int, cap: int | None = None) -> list[Array]:
    """For b = 0 to `blocks`: which positions exactly b blocks can end at, `[layers + 1]` bool."""
    sums, ends, steps = model.arrays
    positions = np.arange(model.layers + 1)
    sets = [positions == 0]
    earliest = np.maximum(positions - (cap or model.layers), 0)
    for b in range(blocks):
        begin = _last_before(sets[-1], positions)
        sets.append((begin >= earliest) & (ends - sums[begin] <= term - steps[b]))
    return sets


def _last_before(members: Array, positions: Array) -> Array:
    """For each position the largest member below it, or -1: the best begin of a block."""
    last = np.maximum.accumulate(np.where(members, positions, -1))
    return np.concatenate(([-1], last[:-1]))


def exactly(
    model: BlockModel, term: int, blocks: int, cap: int | None = None
) -> tuple[int, ...] | None:
    """Sizes of exactly `blocks` blocks with terms within `term`, borders as late as possible.

    Returns:
        The sizes, or None if there are no such blocks of at most `cap` sublayers.
    """
    ends = fill_blocks(model, term, blocks, cap)
    if not ends or ends[-1] != model.layers:
        return None
    if len(ends) < blocks:
        sets = _reach_sets(model, term, blocks, cap)
        if not sets[-1][-1]:
            return None
        ends = [model.layers]
        for members in reversed(sets[1:-1]):
            ends.insert(0, int(np.flatnonzero(members[: ends[0]])[-1]))
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


def most_blocks(model: BlockModel, term: int, limit: int) -> int:
    """The most blocks, at most `limit`, with terms within `term`; 0 if there are none."""
    sets = _reach_sets(model, term, limit)
    return max((b for b, members in enumerate(sets) if members[-1]), default=0)


def sizes_within(model: BlockModel, term: int, limit: int) -> set[int]:
    """Each size that the largest block can have, of at most `limit` blocks within `term`."""
    smallest = bisect_left(
        range(model.layers), True,
        key=lambda r: r > 0 and fewest_blocks(model, term, limit, r) is not None,
    )  # fmt: skip
    begin = np.arange(model.layers)
    number = np.searchsorted([0, *fill_blocks(model, term, limit)], begin)
    sums, ends, steps = model.arrays
    end = np.searchsorted(ends, term + sums[:-1] - steps[number], side="right") - 1
    largest = int((end - begin).max())
    return {r for r in range(smallest, largest + 1) if _has_size(model, term, limit, r)}


def _has_size(model: BlockModel, term: int, limit: int, size: int) -> bool:
    """Whether at most `limit` blocks of at most `size` sublayers can include one of `size`."""
    front = [0, *fill_blocks(model, term, limit, size)]
    if front[-1] != model.layers:
        return False
    back = _latest_begins(model, term, limit, size)
    begin = np.arange(model.layers - size + 1)
    number = np.searchsorted(front, begin)
    begin, number = begin[number < limit], number[number < limit]
    sums, ends, steps = model.arrays
    fits = ends[begin + size] - sums[begin] <= term - steps[number]
    return bool((fits & (begin + size >= back[number + 1])).any())


def _latest_begins(model: BlockModel, term: int, limit: int, size: int) -> Array:
    """For b = 0 to `limit`: the first position from which blocks b to `limit` - 1 suffice."""
    back = [model.layers]
    for b in reversed(range(limit)):
        least = model.ends[back[-1]] + model.step * (b + 1) - term
        back.append(min(back[-1], max(bisect_left(model.sums, least), back[-1] - size, 0)))
    return np.array(back[::-1])


def sizes_exactly(model: BlockModel, term: int, blocks: int) -> set[int]:
    """Each size that the largest block can have, of exactly `blocks` blocks within `term`."""
    most = model.layers - blocks + 1
    smallest = bisect_left(
        range(most), True, key=lambda r: r > 0 and exactly(model, term, blocks, r) is not None
    )
    largest = min(most, _longest_block(model, term, blocks))
    return {r for r in range(smallest, largest + 1) if _has_size_exactly(model, term, blocks, r)}


def _longest_block(model: BlockModel, term: int, blocks: int) -> int:
    """No block is longer, of those that go on from some blocks in front, whatever follows."""
    sums, ends, steps = model.arrays
    longest = 0
    sets = [np.flatnonzero(members) for members in _reach_sets(model, term, blocks)]
    for b, (begins, found) in enumerate(zip(sets, sets[1:], strict=False)):
        found = found[found <= model.layers - (blocks - 1 - b)]
        first = np.searchsorted(sums[begins], ends[found] - (term - steps[b]))
        longest = max(longest, int((found - begins[first]).max(initial=0)))
    return longest


def _has_size_exactly(model: BlockModel, term: int, blocks: int, size: int) -> bool:
    sums, ends, steps = model.arrays
    positions = np.arange(model.layers + 1)
    begin_of = np.maximum(positions - size, 0)
    without, with_it = positions == 0, np.zeros(model.layers + 1, bool)
    for b in range(blocks):
        fits = ends <= term - steps[b] + sums[begin_of]
        exact = (positions >= size) & without[begin_of] & fits
        without, with_it = (
            (begin >= 0) & (begin >= positions - size) & (ends - sums[begin] <= term - steps[b])
            for begin in (_last_before(without, positions), _last_before(with_it, positions))
        )
        with_it |= exact
    return bool(with_it[-1])
