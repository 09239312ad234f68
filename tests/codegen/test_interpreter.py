"""Bfloat16 in Triton's interpreter, mended, against torch."""

import pytest
import torch
import triton
import triton.language as tl

from mhc_compile.codegen.interpreter import interpreting, mend, rounded, widened

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is off"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered"),
]
B = torch.bfloat16
SPECIAL = [
    0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1.9999999, -3.3333333, 3.4e38, -3.4e38, 1e-40, 1e-45,
    float("inf"), -float("inf"), float("nan"), 65504.0, 2**-126,
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def mended():
    mend()


def numbers(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator) * torch.exp2(
        torch.randint(-30, 30, (count,), generator=generator).float()
    )
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values.to(dtype)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast(a, b, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(b + i, tl.load(a + i).to(b.dtype.element_ty))


@triton.jit
def arithmetic(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, x - y)
    tl.store(out + 2 * N + i, x * y)
    tl.store(out + 3 * N + i, -x)
    tl.store(out + 4 * N + i, tl.maximum(x, y))
    tl.store(out + 5 * N + i, tl.abs(x))
    tl.store(out + 6 * N + i, x * 2.5)
    tl.store(out + 7 * N + i, tl.where(x < y, x, y))
    tl.store(out + 8 * N + i, x / y)


@triton.jit
def comparisons(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, (x < y).to(tl.int32))
    tl.store(out + N + i, (x <= y).to(tl.int32))
    tl.store(out + 2 * N + i, (x == y).to(tl.int32))
    tl.store(out + 3 * N + i, (x > 0.0).to(tl.int32))


@triton.jit
def dot(a, b, out, N: tl.constexpr, WITH_SUMS: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    if WITH_SUMS:
        sums = tl.full((N, N), 1.0, tl.float32)
        sums = tl.dot(tl.load(a + place), tl.load(b + place), sums)
    else:
        sums = tl.dot(tl.load(a + place), tl.load(b + place))
    tl.store(out + place, sums)


@triton.jit
def sums(a, rows, running, top, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(a + i[:, None] * N + i[None, :])
    tl.store(rows + i, tl.sum(value, axis=1))
    tl.store(running + i[:, None] * N + i[None, :], tl.cumsum(value, axis=1))
    tl.store(top + i, tl.max(value, axis=1))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, B, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, B])
def test_casts(source, target):
    values = numbers(256) if source != torch.int32 else torch.arange(-128, 128) * 77
    values, out = values.to(source), torch.empty(256, dtype=target)
    cast[(1,)](values, out, 256)
    equal(out, values.to(target))


def test_rounding_of_every_pattern():
    """All bfloat16 numbers come back; all numbers half way between two go to the even one."""
    bits = torch.arange(2**16, dtype=torch.int32)
    values = (bits << 16).view(torch.float32)
    keep = ~values.isnan()
    same = torch.from_numpy(widened(rounded(values.numpy())))
    equal(same[keep], values[keep])
    half = (bits << 16 | 1 << 15).view(torch.float32)
    equal(torch.from_numpy(widened(rounded(half.numpy()))), half.to(B).float())


def test_arithmetic():
    a, b = numbers(256, B), numbers(256, B).flip(0)
    out = torch.empty(9, 256, dtype=B)
    arithmetic[(1,)](a, b, out, 256)
    finite = ~(a.isnan() | b.isnan())
    expected = [
        a + b, a - b, a * b, -a, torch.fmax(a, b), a.abs(), a * 2.5, torch.where(a < b, a, b), a / b
    ]  # fmt: skip
    for actual, wanted in zip(out, expected, strict=True):
        equal(actual[finite], wanted[finite])


def test_comparisons():
    a = numbers(256, B)
    b = torch.where(torch.arange(256) % 3 == 0, a, a.flip(0))
    out = torch.empty(4, 256, dtype=torch.int32)
    comparisons[(1,)](a, b, out, 256)
    for actual, wanted in zip(out, (a < b, a <= b, a == b, a > 0), strict=True):
        equal(actual, wanted.int())


@pytest.mark.parametrize("with_sums", [False, True])
def test_dot(with_sums):
    a, b = torch.randn(32, 32).to(B), torch.randn(32, 32).to(B)
    out = torch.empty(32, 32)
    dot[(1,)](a, b, out, 32, with_sums)
    torch.testing.assert_close(out, a.float() @ b.float() + with_sums)


def test_sums():
    value = torch.randn(32, 32).to(B)
    rows, running, top = torch.empty(32).to(B), torch.empty(32, 32).to(B), torch.empty(32).to(B)
    sums[(1,)](value, rows, running, top, 32)
    single = value.float()
    torch.testing.assert_close(rows, single.sum(1).to(B), rtol=2**-7, atol=0)
    torch.testing.assert_close(running, single.cumsum(1).to(B), rtol=2**-7, atol=1e-6)
    equal(top, single.amax(1).to(B))


@triton.jit
def add_atomically(a, N: tl.constexpr):
    tl.atomic_add(a + tl.arange(0, N), tl.full((N,), 1.0, tl.bfloat16))


def test_atomics_are_refused():
    with pytest.raises(Exception, match="atomics on bfloat16"):
        add_atomically[(1,)](torch.zeros(16, dtype=B), 16)
