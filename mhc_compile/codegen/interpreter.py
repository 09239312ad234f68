"""Runs generated kernels in Triton's interpreter on a CPU, with bfloat16 as on a GPU.

The interpreter holds bfloat16 numbers as uint16. Through triton 3.8 it truncates where it should
round to nearest even, and adds, multiplies and compares the bit patterns as integers.
`mend` replaces those operations; sums and running sums are taken in float32 and rounded once, which
is more exact than on a GPU. Atomics on bfloat16 stay wrong: they raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from mhc_compile.codegen.cache import load
from mhc_compile.codegen.signature import arguments
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.errors import MHCError

_COMPARISONS = frozenset({
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal,
})  # fmt: skip


def widened(bits: Any) -> Any:
    """Bfloat16 bit patterns (uint16) as float32."""
    wide = np.asarray(bits).astype(np.uint32)
    return np.left_shift(wide, np.uint32(16), out=wide).view(np.float32)


def rounded(values: Any) -> Any:
    """Numbers as bfloat16 bit patterns (uint16), rounded to nearest even."""
    values = np.asarray(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    result = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), result)


@functools.cache
def mend() -> None:
    """Patches Triton's interpreter for the rest of this process."""
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_bf16(value: Any) -> bool:
        return bool(value.dtype.scalar == tl.bfloat16)

    def wide(value: Any) -> Any:
        return handle(widened(value.data), tl.float32) if is_bf16(value) else value

    def narrow(values: Any) -> Any:
        return handle(rounded(values), tl.bfloat16)

    def replace(owner: type, name: str) -> Callable[[Callable], None]:
        before = getattr(owner, name)

        def put(function: Callable) -> None:
            setattr(owner, name, functools.partialmethod(function, before))

        return put

    @replace(builder, "cast_impl")
    def cast(self: Any, before: Any, source: Any, target: Any) -> Any:
        if is_bf16(source) == (target.scalar == tl.bfloat16):
            return before(self, source, target)
        if is_bf16(source):
            return before(self, wide(source), target)
        return narrow(source.data.astype(np.float32))

    @replace(builder, "create_fp_to_fp")
    def convert(self: Any, before: Any, source: Any, target: Any, mode: Any) -> Any:
        to_zero = interpreter._ir.ROUNDING_MODE.RTZ
        if target.scalar == tl.bfloat16 and not is_bf16(source) and mode != to_zero:
            return narrow(source.data.astype(np.float32))
        return before(self, source, target, mode)

    @replace(builder, "binary_op")
    def binary(self: Any, before: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bf16(left):
            return before(self, left, right, op)
        result = op(wide(left).data, wide(right).data)
        return handle(result, tl.int1) if op in _COMPARISONS else narrow(result)

    @replace(builder, "ternary_op")
    def ternary(self: Any, before: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if not is_bf16(third) or op is np.where:  # a choice between bit patterns is right
            return before(self, first, second, third, op)
        return narrow(op(wide(first).data, wide(second).data, wide(third).data))

    @replace(builder, "unary_op")
    def unary(self: Any, before: Any, value: Any, op: Any) -> Any:
        return narrow(op(wide(value).data)) if is_bf16(value) else before(self, value, op)

    @replace(builder, "create_fma")
    def fma(self: Any, before: Any, first: Any, second: Any, third: Any) -> Any:
        result = before(self, wide(first), wide(second), wide(third))
        return narrow(result.data) if is_bf16(third) else result

    @replace(builder, "create_dot")
    def dot(self: Any, before: Any, left: Any, right: Any, sums: Any, *rest: Any) -> Any:
        result = before(self, wide(left), wide(right), wide(sums), *rest)
        return narrow(result.data) if is_bf16(sums) else result

    @replace(builder, "create_atomic_rmw")
    def atomic(self: Any, before: Any, op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if is_bf16(value):
            raise NotImplementedError("atomics on bfloat16 in Triton's interpreter")
        return before(self, op, pointer, value, *rest)

    def reduction(operation: str) -> Callable:
        def reduce(self: Any, before: Any, value: Any) -> Any:
            if not is_bf16(value.handle):
                return before(self, value)
            single = tl.tensor(wide(value.handle), value.type.with_element_ty(tl.float32))
            result = before(self, single)
            result = result[0] if isinstance(result, list) else result
            back = tl.tensor(narrow(result.handle.data), _retyped(result.type))
            return [back] if operation == "cumsum" else back

        return reduce

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        # range() over a tensor: triton 3.6 needs a numpy that turns arrays of one into numbers.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    setattr(interpreter, "_patch_lang_tensor", patch)
    replace(interpreter.ReduceOps, "sum")(reduction("sum"))
    replace(interpreter.ScanOps, "cumsum")(reduction("cumsum"))
    setattr(builder, "get_bf16", lambda self, value: narrow(np.array([value], np.float32)))


def _retyped(kind: Any) -> Any:
    return kind.with_element_ty(tl.bfloat16) if kind.is_block() else tl.bfloat16


def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1; later changes have no effect."""
    return not isinstance(tl.sum, triton.JITFunction)


def run(spec: KernelSpec, grid: tuple[int, ...], **values: torch.Tensor | float | None) -> None:
    """Runs a kernel on CPU tensors in Triton's interpreter; outputs are written in place.

    Args:
        spec: with target "interpret", because the interpreter has no inline assembly.
        grid: programs a launch, see `signature.grid`.
        values: the kernel's arguments by name; those that the spec does not use may be left out.

    Raises:
        MHCError: an argument the kernel has not, a spec for another target, or a process that
            does not interpret.
    """
    if not interpreting():
        raise MHCError("set TRITON_INTERPRET=1 before the process imports triton")
    if spec.target != "interpret":
        raise MHCError(f"the spec's target must be 'interpret' here, got {spec.target!r}")
    names = [argument.name for argument in arguments(spec)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise MHCError(f"kernel {spec.op!r} has {', '.join(names)}; it has no {unknown[0]!r}")
    mend()
    load(spec)[grid](*(values.get(name) for name in names))
