"""Which axis of a stream holds the channels: mHC must never mix over another one."""

from __future__ import annotations

import math
from typing import Any, cast

from mhc_compile.passes.flow import Candidate, Flow, Op, branch_region

REDUCTIONS = ("mean", "var_mean", "var")
_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")


def check_channel_axis(flow: Flow, candidate: Candidate) -> str:
    """Follows the last axis of the residual add to the norms, linears and convolutions.

    A reduction decides only if nothing else does: it is a hand-written norm, or pooling.

    Returns:
        "" if the first operation to tell takes it for its channels (or none tells), else the
        reason to refuse.
    """
    last = len(flow.ops[candidate.index].shape) - 1
    axis = {candidate.operand: last}
    for index in reversed(candidate.way):
        for source in flow.ops[index].inputs[:1]:
            moved = _moved_back(flow, flow.ops[index], source, axis.get(index))
            if moved is not None:
                axis[source] = moved
    weak = ""
    for index in branch_region(flow, candidate):
        op = flow.ops[index]
        source_axis = next(((i, axis[i]) for i in op.inputs if i in axis), None)
        if source_axis is None:
            continue
        source, channels = source_axis
        consumed = _consumed_axis(flow, op, source)
        if consumed is None:
            moved = _moved_axis(flow, op, source, channels)
            if moved is not None and index not in axis:
                axis[index] = moved
            continue
        reason = "" if consumed == channels else (
            f"its last axis is not the channel axis: {op.name} takes axis {consumed} of "
            f"{list(flow.ops[source].shape)} for the channels; mHC needs [..., C], so permute the "
            "stream to channels-last in the model"
        )  # fmt: skip
        if op.name not in REDUCTIONS:
            return reason
        # The axis that a hand-written norm reduces is one; pooling over tokens comes beside it.
        weak = weak or reason
        if not reason:
            return ""
    return weak


def _consumed_axis(flow: Flow, op: Op, source: int) -> int | None:
    """The axis that an operation treats as channels, None if it does not tell."""
    dims = len(flow.ops[source].shape)
    name = op.name.lstrip("_")
    if name.startswith(("convolution", "native_batch_norm", "native_group_norm", "batch_norm")):
        return 1
    if name.startswith(("native_layer_norm", "fused_rms_norm", "rms_norm")):
        sizes = cast("tuple[int, ...] | None", op.detail)
        return dims - 1 if sizes is None or len(sizes) == 1 else None
    if op.name in REDUCTIONS:
        axes: Any = op.detail
        return axes[0] % dims if isinstance(axes, list | tuple) and len(axes) == 1 else None
    if name in ("mm", "addmm", "linear"):
        left = op.operands[1] if name == "addmm" else op.operands[0]
        return dims - 1 if left == source else None
    if op.shape == flow.ops[source].shape and any(
        (operand is None or flow.ops[operand].fixed)
        and shape[-1:] == op.shape[-1:] and math.prod(shape) == shape[-1] > 1
        for operand, shape in zip(op.operands, op.shapes, strict=False)
    ):  # fmt: skip
        return dims - 1  # a scale or an offset of each channel, as in an affine norm
    return None


def _moved_back(flow: Flow, op: Op, source: int, axis: int | None) -> int | None:
    """Where an axis of a result stood before a cast, scale or view, None if that is not clear."""
    before, after = flow.ops[source].shape, op.shape
    if axis is None:
        return None
    if before == after:
        return axis
    # The last axis of a view is that of its source if it has the same size and is no merged one.
    same = before[-1:] == after[-1:] and axis == len(after) - 1
    return len(before) - 1 if same else None


def _moved_axis(flow: Flow, op: Op, source: int, axis: int) -> int | None:
    """Where an axis stands after an operation; None if it is lost, -1 if it surely is not the last.

    An axis that is not the last and disappears in a view can't be the last one of the result.
    """
    before = flow.ops[source].shape
    if axis < 0:
        return -1
    if op.name == "permute":
        axes = [a % len(before) for a in cast("tuple[int, ...]", op.detail)]
        return axes.index(axis)
    if op.name in ("transpose", "swapaxes"):
        a, b = (i % len(before) for i in cast("tuple[int, int]", op.detail))
        return {a: b, b: a}.get(axis, axis)
    if op.name in _RESHAPES or len(op.shape) != len(before):
        last = len(before) - 1
        keeps = axis == last and op.shape and op.shape[-1] == before[-1]
        if axis != last and op.shape[-1:] == before[-1:]:
            return -1
        return len(op.shape) - 1 if keeps else None
    return axis if op.shape == before else None
