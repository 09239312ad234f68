"""Compiles kernels without a GPU and reads registers, spills and instructions off the result."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhc_compile.codegen.render import render
from mhc_compile.codegen.signature import signature
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.errors import MHCError

_WORKER = Path(__file__).with_name("_compile_worker.py")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; `shared_limit` is in bytes a program."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target.

    Attributes:
        spec: the kernel, with the target's own variant of the source.
        target: a name in `TARGETS`.
        registers: of one thread.
        stack: bytes a thread keeps in local memory, where spilled registers go.
        local: loads and stores of local memory in the code.
        shared: bytes of shared memory of one program.
        matrix: matrix instructions and how often each stands in the code.
        loads: loads of global memory in the code, also those that go to shared memory.
        wide_loads: those of 16 bytes a thread, and block copies.
        stores: stores and atomics to global memory in the code.
        wide_stores: those of 16 bytes a thread, and block copies.
        seconds: how long Triton took.
    """

    spec: KernelSpec
    target: str
    registers: int
    stack: int
    local: int
    shared: int
    matrix: tuple[tuple[str, int], ...]
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    seconds: float

    @property
    def faults(self) -> tuple[str, ...]:
        """What makes the kernel unfit for the target; empty if nothing does."""
        found = []
        limit = TARGETS[self.target].shared_limit
        if self.stack or self.local:
            found.append(f"spills: {self.stack} bytes a thread, {self.local} accesses")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {limit}")
        if "tl.dot(" in render(self.spec) and not self.matrix:
            found.append("its products use no matrix instruction")
        return tuple(found)


def check(compiled: Compiled) -> None:
    """Raises an `MHCError` that names all faults of a kernel."""
    if compiled.faults:
        raise MHCError(
            f"kernel {compiled.spec.op} ({compiled.spec.streams} streams of "
            f"{compiled.spec.channels}) on {compiled.target}: {'; '.join(compiled.faults)}; "
            "take a smaller tile"
        )


def compile_ahead(spec: KernelSpec, target: str, limit: float = 120.0) -> Compiled:
    """Compiles a kernel for a target, which need not be there.

    Args:
        spec: the kernel; its own target is replaced by what `target` needs.
        target: a name in `TARGETS`.
        limit: seconds after which the compile is stopped.

    Raises:
        MHCError: the target is unknown, Triton fails, or it takes too long.
    """
    if target not in TARGETS:
        raise MHCError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    chosen = TARGETS[target]
    spec = replace(spec, target=chosen.backend)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source.py"
        source.write_text(render(spec))
        job = {
            "source": str(source),
            "function": spec.function,
            "signature": signature(spec),
            "target": [chosen.backend, chosen.arch, chosen.warp_size],
            "options": spec.options,
        }
        result = json.loads(_run(job, directory, limit, f"kernel {spec.op} for {target}"))
        binary = Path(directory) / "binary"
        binary.write_bytes(base64.b64decode(result["binary"]))
        measured = _read_amd(binary) if chosen.backend == "hip" else _read_nvidia(binary)
    return Compiled(spec, target, shared=result["shared"], seconds=result["seconds"], **measured)


def _run(job: dict[str, Any], directory: str, limit: float, what: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": directory, "TRITON_ALWAYS_COMPILE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)], text=True, env=env, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(job), timeout=limit)
    except subprocess.TimeoutExpired:
        raise MHCError(f"{what}: not compiled within {limit:g} s; take a smaller tile") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the assembler it may have started
            process.wait()
    if process.returncode:
        reason = err.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise MHCError(f"{what}: Triton cannot compile it: {reason[0]}")
    return out


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _counts(
    operations: Iterable[str], local: str, matrix: str, load: str, store: str, wide: str
) -> dict[str, Any]:
    """Counts instructions; each kind is a regular expression that their names begin with."""
    found = Counter(operations)

    def total(pattern: str) -> int:
        return sum(count for name, count in found.items() if re.match(pattern, name))

    return {
        "local": total(local),
        "matrix": tuple(sorted((n, c) for n, c in found.items() if re.match(matrix, n))),
        "loads": total(load),
        "wide_loads": total(f"(?:{load}){wide}"),
        "stores": total(store),
        "wide_stores": total(f"(?:{store}){wide}"),
    }


def _read_nvidia(binary: Path) -> dict[str, Any]:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(binary)))
    assert usage is not None
    code = _tool("nvdisasm", "-c", str(binary))
    operations = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE
    )
    counted = _counts(
        operations, local=r"LDL|STL", matrix=r"\w*MMA(?!\w)",
        load=r"LDG|UBLKCP\.S\.G|UTMALDG", store=r"STG|RED|ATOMG|UBLKCP\.G\.S|UTMASTG",
        wide=r".*\.128|(?<=UBLKCP\.S\.G)|(?<=UTMALDG)|(?<=UBLKCP\.G\.S)|(?<=UTMASTG)",
    )  # fmt: skip
    return {"registers": int(usage[1]), "stack": int(usage[2]), **counted}


def _read_amd(binary: Path) -> dict[str, Any]:
    code = binary.read_text()

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    operations = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", code, re.MULTILINE)
    counted = _counts(
        operations, local=r"scratch_", matrix=r"v_s?mfmac?_",
        load=r"(?:global|buffer|flat)_load_", store=r"(?:global|buffer|flat)_(?:store|atomic)_",
        wide=r"\w*x4",
    )  # fmt: skip
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        **counted,
    }
