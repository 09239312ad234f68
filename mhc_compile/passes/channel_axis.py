"""Which axis of a stream holds the channels: mHC must never mix over another one."""

from __future__ import annotations

from typing import Any, cast

from mhc_compile.passes.flow import Candidate, Flow, Op, branch_region

_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")


def check_channel_axis(flow: Flow, candidate: Candidate) -> str:
    """Follows the skip's last axis to the first norm, linear or convolution that consumes it.

    Returns:
        "" if that operation takes it for its channels (or none tells), else the reason to refuse.
    """
    axis = {candidate.skip: len(flow.ops[candidate.skip].shape) - 1}
    for index in branch_region(flow, candidate):
        op = flow.ops[index]
        source = next((i for i in op.inputs if i in axis), None)
        if source is None:
            continue
        consumed = _consumed_axis(flow, op, source)
        if consumed is None:
            moved = _moved_axis(flow, op, source, axis[source])
            if moved is not None:
                axis[index] = moved
            continue
        if consumed == axis[source]:
            return ""
        return (
            f"its last axis is not the channel axis: {op.name} takes axis {consumed} of "
            f"{list(flow.ops[source].shape)} for the channels; mHC needs [..., C], so permute the "
            "stream to channels-last in the model"
        )
    return ""


def _consumed_axis(flow: Flow, op: Op, source: int) -> int | None:
    """The axis that an operation treats as channels, None if it does not tell."""
    dims = len(flow.ops[source].shape)
    name = op.name.lstrip("_")
    if name.startswith(("convolution", "native_batch_norm", "native_group_norm", "batch_norm")):
        return 1
    if name.startswith(("native_layer_norm", "fused_rms_norm", "rms_norm")):
        sizes = cast("tuple[int, ...] | None", op.detail)
        return dims - 1 if sizes is None or len(sizes) == 1 else None
    if name in ("mean", "var_mean", "var"):
        axes: Any = op.detail
        return axes[0] % dims if isinstance(axes, list | tuple) and len(axes) == 1 else None
    if name in ("mm", "addmm", "linear"):
        left = op.operands[1] if name == "addmm" else op.operands[0]
        return dims - 1 if left == source else None
    return None


def _moved_axis(flow: Flow, op: Op, source: int, axis: int) -> int | None:
    """Where an axis stands after an operation, None if it is lost."""
    before = flow.ops[source].shape
    if op.name == "permute":
        axes = [a % len(before) for a in cast("tuple[int, ...]", op.detail)]
        return axes.index(axis)
    if op.name in ("transpose", "swapaxes"):
        a, b = (i % len(before) for i in cast("tuple[int, int]", op.detail))
        return {a: b, b: a}.get(axis, axis)
    if op.name in _RESHAPES or len(op.shape) != len(before):
        last = len(before) - 1
        keeps = axis == last and op.shape and op.shape[-1] == before[-1]
        return len(op.shape) - 1 if keeps else None
    return axis if op.shape == before else None
