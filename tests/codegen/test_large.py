"""Addresses beyond 2**31: kernels find the last tile of tensors with that many elements.

Only the last program of a launch runs, in the interpreter, on memory that nobody else touches and
that therefore takes no room. What it computes must be what a launch of its own tokens computes.
"""

import contextlib
import mmap
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from run_kernel import DTYPES

from mhc_compile.codegen import interpreter
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.signature import arguments, counts, grid, group_tokens
from mhc_compile.codegen.traffic import count_traffic, traffic

pytestmark = pytest.mark.skipif(not interpreter.interpreting(), reason="TRITON_INTERPRET is off")
LIMIT = 2**31
MANY, WIDE = (4, 16, 110_000_003), (4, 16_417, 33_003)
NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python knows since 3.13
"""Streams, channels, tokens: 20 maps of MANY tokens, and WIDE streams, have more elements."""


def untouched(shape, dtype):
    """Zeros that take memory when they are written."""
    size = max(1, torch.Size(shape).numel()) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError:
        pytest.skip("no address space for large tensors")
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def tensors_of(spec, tokens):
    moved, count = traffic(spec, tokens), counts(spec, tokens)
    used = moved.read.keys() | moved.written.keys()
    kinds = DTYPES | {"*i32": torch.int32}
    return {
        a.name: untouched(a.shape(count), kinds[a.type]) for a in arguments(spec) if a.name in used
    }


def by_token(spec, name):
    """The axis of tokens, None for what all tokens share."""
    dims = next(a.dims for a in arguments(spec) if a.name == name)
    return dims.index("tokens") if "tokens" in dims else None


def triton_interpreter():
    from triton.runtime import interpreter as module

    return module


@contextlib.contextmanager
def only_program(program, programs):
    """One program that takes itself for this one of a launch."""
    module = triton_interpreter()
    builder = module.InterpreterBuilder

    def answer(values):
        return lambda self, axis: module.TensorHandle(np.array([values[axis]], np.int32), tl.int32)

    with (
        mock.patch.object(builder, "create_get_program_id", answer((*program, 0, 0))),
        mock.patch.object(builder, "create_get_num_programs", answer((*programs, 1, 1))),
        # It would copy all memory onto itself.
        mock.patch.object(module.GridExecutor, "_restore_args_dev", lambda *a: None),
    ):
        yield


def run_last(spec, tokens, tensors, last, programs=None):
    """Runs one program; accesses outside of the tensors raise before they happen."""
    given = {"tokens": tokens, "group_tokens": group_tokens(spec, tokens), "eps": 1e-6}
    names = {a.name for a in arguments(spec)}
    given = {name: value for name, value in given.items() if name in names}
    with only_program(last, programs or tuple(k + 1 for k in last)), count_traffic(tensors):
        interpreter.run(spec, (1,), **tensors, **given)


def last_program(spec, tokens):
    return tuple(size - 1 for size in grid(spec, tokens))


def pick(op, size, norm="none"):
    n, channels, tokens = size
    specs = kernel_set(n, channels, "bf16", tokens=tokens, target="interpret")
    return next(s for s in specs if s.name == op or (s.op == op and s.norm == norm))


@pytest.mark.parametrize(
    ("op", "size"),
    [
        ("mix", WIDE), ("project", WIDE), ("pre", WIDE), ("read_backward", WIDE),
        ("mix_backward", WIDE), ("mix", MANY), ("project", MANY), ("gates", MANY),
        ("gates_backward", MANY), ("gates_backward_mix_layer", MANY), ("pre", MANY),
        ("pre_backward", MANY), ("seam_backward", MANY), ("seam_backward", WIDE),
        ("seam_backward_layer", WIDE), ("read_backward", MANY), ("mix_backward", MANY),
    ],
    ids=lambda value: value if isinstance(value, str) else "many" if value == MANY else "wide",
)  # fmt: skip
def test_last_tile(op, size):
    spec, tokens = pick(op, size), size[2]
    few = (tokens - 1) % spec.tile.tokens + 1  # those of the last tile
    large, small = tensors_of(spec, tokens), tensors_of(spec, few)
    assert max(t.numel() for t in large.values()) > LIMIT
    moved = traffic(spec, few)
    for name, tensor in small.items():
        if name in moved.read:
            axis = by_token(spec, name)
            tensor.copy_(torch.rand(tensor.shape))
            whole = large[name]
            if axis is None:
                whole.view(-1)[: tensor.numel()] = tensor.view(-1)
            else:
                whole.narrow(axis, tokens - few, few).copy_(tensor)
    last, first = last_program(spec, tokens), last_program(spec, few)
    programs = None
    if spec.op == "seam_backward":  # one tile a program, the last one by the last program
        last = (counts(spec, tokens)["tiles"] * spec.dots - 1,)
        first = (spec.dots - 1,)
        for tensors, program in ((large, last), (small, first)):
            shape = (program[0] + 1, spec.streams, spec.tile.tokens, spec.tile.width)
            tensors["products"] = untouched(shape, torch.bfloat16)
    run_last(spec, tokens, large, last, programs)
    run_last(spec, few, small, first)
    compared = 0
    for name in moved.written:
        axis = by_token(spec, name)
        if axis is None:
            whole, part = large[name].view(-1), small[name].view(-1)
            size_of_slice = part.numel() // max(small[name].shape[0], 1)
            whole, part = whole[-size_of_slice:], part[-size_of_slice:]
        else:
            whole, part = large[name].narrow(axis, tokens - few, few), small[name]
        assert torch.equal(whole, part), name
        compared += int(part.count_nonzero())
    assert compared


def test_last_group_of_phi_backward():
    spec, tokens = pick("phi_backward", WIDE), WIDE[2]
    tensors = tensors_of(spec, tokens)
    assert tensors["y"].numel() > LIMIT
    last = last_program(spec, tokens)
    channels = tensors["y"].view(tokens, -1)[:, -4:]
    begin = last[1] * group_tokens(spec, tokens)
    columns = spec.maps
    values = torch.rand(tokens - begin, 4).bfloat16(), torch.rand(tokens - begin, columns)
    channels[begin:] = values[0]
    tensors["dh_high"][begin:, :columns] = values[1].bfloat16()
    run_last(spec, tokens, tensors, last)
    right = values[0].double().T @ values[1].bfloat16().double()
    got = tensors["phi_shares"][last[1]].reshape(-1, columns)[-4:]
    torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=0)


@pytest.mark.parametrize("op", ["project", "mix"])
def test_offsets_of_32_bits_are_noticed(op):
    """The check itself: products cut to 32 bits point outside of the tensors."""
    spec, tokens = pick(op, MANY), MANY[2]
    tensors, builder = tensors_of(spec, tokens), triton_interpreter().InterpreterBuilder
    multiply = builder.create_mul

    def short(self, a, b):
        result = multiply(self, a, b)
        if result.data.dtype == np.int64:
            result.data = result.data.astype(np.int32).astype(np.int64)
        return result

    with mock.patch.object(builder, "create_mul", short):
        with pytest.raises(Exception, match="outside of its tensors"):
            run_last(spec, tokens, tensors, last_program(spec, tokens))
