"""The bytes that kernels move as they run, against the closed form."""

from dataclasses import replace

import pytest
import torch
from run_kernel import arguments_for, run_kernel

from mhc_compile.codegen.interpreter import interpreting
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.traffic import count_traffic, seam_table, seam_units, traffic
from mhc_compile.errors import MHCError

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is off")
SIZES = [(4, 64, "bf16", 20), (2, 50, "fp32", 33), (1, 24, "fp16", 3), (3, 80, "bf16", 17)]
SIZES += [(8, 40, "bf16", 5), (6, 64, "bf16", 9)]
SPECS = [
    (spec, tokens)
    for n, channels, dtype, tokens in SIZES
    for spec in kernel_set(n, channels, dtype, target="interpret")
]
JOINED = next(s for s in kernel_set(2, 500, target="interpret") if s.name == "seam_backward_rms")
SPECS.append((replace(JOINED, tile=replace(JOINED.tile, joined=2)), 21))


def name_of(value):
    if isinstance(value, int):
        return str(value)
    return f"{value.name}-n{value.streams}-C{value.channels}-{value.dtype}"


@pytest.mark.parametrize("spec, tokens", SPECS, ids=name_of)
def test_closed_form(spec, tokens):
    tensors = arguments_for(spec, tokens)
    with count_traffic(tensors) as counted:
        run_kernel(spec, tokens, **tensors)
    stated = traffic(spec, tokens)
    apart = {name: counted.written.pop(name) for name in stated.scratch}
    read = {k: size for k, size in counted.read.items() if k not in apart | stated.written}
    assert (read, counted.written) == (stated.read, stated.written)
    assert apart == stated.scratch
    assert all(counted.read_total[name] >= size for name, size in counted.read.items())
    for name in stated.written:  # every element, and no NaN from outside of the inputs
        assert torch.isfinite(tensors[name]).all(), name


def test_streams_are_read_once():
    """Rows past the last token are read again, whole tiles are not."""
    specs = kernel_set(4, 64, target="interpret", seam_only=True)
    (spec,) = (spec for spec in specs if spec.op == "project")
    tensors = arguments_for(spec, spec.tile.tokens)
    with count_traffic(tensors) as counted:
        run_kernel(spec, spec.tile.tokens, **tensors)
    for name in ("x", "f"):
        assert counted.read_total[name] == counted.read[name]
    assert counted.written_total == counted.written


def test_access_outside_is_noticed():
    spec = kernel_set(2, 32, target="interpret")[0]
    tensors = arguments_for(spec, 1)
    short = tensors | {"phi": tensors["phi"][:, :16]}
    with pytest.raises(Exception, match="outside of its tensors"):
        with count_traffic(short):
            run_kernel(spec, 1, **short)
    with count_traffic(tensors):  # the interpreter is as before
        run_kernel(spec, 1, **tensors)


def test_seam_in_units_of_channels():
    """Two passes over the streams: 3n + 2 elements a token, and the maps.

    Backward: 3n + 3 in one pass, n + 1 for the norm and the gradient of pre, n for that of phi;
    parts of the gradients of maps, written and read.
    """
    forward, backward = seam_units(kernel_set(4, 4096, seam_only=True))
    assert 14 < forward < 14.5
    assert 24 < backward < 24.9
    table = seam_table(kernel_set(4, 4096, seam_only=True))
    assert "(2n + 2)C = 10C" in table and f"{forward:.2f}C" in table


def test_unknown_argument():
    spec = kernel_set(2, 32, target="interpret")[0]
    with pytest.raises(MHCError, match="has no 'z'"):
        run_kernel(spec, 1, z=torch.zeros(1))
    with pytest.raises(MHCError, match="target must be 'interpret'"):
        run_kernel(replace(spec, target="cuda"), 1)
