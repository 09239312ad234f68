"""Kernels compiled for GPUs that are not there.

`make test` compiles some of one seam for one GPU, `make aot` everything for all of them.
"""

import os
import time
from dataclasses import replace

import ahead
import pytest

from mhc_compile.codegen import compile_ahead as module
from mhc_compile.codegen.compile_ahead import TARGETS, Compiled, check, compile_ahead
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.errors import MHCError

SEAM = {spec.op: spec for spec in kernel_set(4, 2560, seam_only=True)}
QUICK = [SEAM[op] for op in ("project", "read", "gates_backward", "phi_backward")]
SMALL = KernelSpec("pre", 2, 512, "bf16", Tile(4, 512))


@pytest.mark.parametrize("spec", QUICK, ids=lambda spec: spec.op)
def test_seam_on_sm_90(spec):
    compiled = compile_ahead(spec, "sm_90")
    check(compiled)
    assert 16 <= compiled.registers <= 255
    if not spec.op.startswith("gates"):  # which load tokens of single maps
        assert compiled.wide_loads and compiled.wide_loads <= compiled.loads
        assert compiled.wide_stores and compiled.wide_stores <= compiled.stores
    if spec.op == "project":
        assert all("HMMA" in name or "HGMMA" in name for name, _ in compiled.matrix)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sm_90"])
def test_other_targets(target):
    compiled = compile_ahead(SEAM["phi_backward"], target)
    check(compiled)
    assert compiled.matrix and compiled.spec.target == TARGETS[target].backend


def test_spills_are_found():
    """A norm holds its rows: here 256 numbers a thread, more than it has registers."""
    spec = replace(SMALL, tile=Tile(16, 512, warps=1), norm="rms")
    compiled = compile_ahead(spec, "sm_90")
    assert compiled.stack and compiled.local
    with pytest.raises(MHCError, match="kernel pre .*sm_90: spills: .*smaller tile"):
        check(compiled)


def test_shared_memory_and_matrix_instructions():
    spec = SEAM["project"]
    good = Compiled(spec, "sm_80", 128, 0, 0, 163 * 1024, (("HMMA", 4),), 8, 8, 4, 4, 1.0)
    check(good)
    assert "the limit is 166912" in replace(good, shared=163 * 1024 + 1).faults[0]
    assert not replace(good, target="sm_90", shared=227 * 1024).faults
    assert replace(good, target="gfx942").faults
    assert replace(good, matrix=()).faults == ("its products use no matrix instruction",)


def test_time_limit():
    start = time.monotonic()
    with pytest.raises(MHCError, match="not compiled within 0.05 s"):
        compile_ahead(SMALL, "sm_90", limit=0.05)
    assert time.monotonic() - start < 10


def test_triton_errors_are_named(monkeypatch):
    with pytest.raises(MHCError, match="one of sm_80, .*'sm_1'"):
        compile_ahead(SMALL, "sm_1")
    monkeypatch.setattr(module, "render", lambda spec: "kernel = 1\n")
    with pytest.raises(MHCError, match="kernel pre for sm_90: Triton cannot compile it"):
        compile_ahead(SMALL, "sm_90")


@pytest.mark.aot
@pytest.mark.parametrize(
    "spec, target", [pytest.param(*case, id=ahead.case_id(*case)) for case in ahead.cases()]
)
def test_everything(spec, target):
    try:
        compiled = compile_ahead(spec, target, limit=float(os.getenv("MHC_AOT_LIMIT", "120")))
    except MHCError as error:
        ahead.write_row(spec, target, str(error))
        raise
    ahead.write_row(spec, target, compiled)
    check(compiled)
