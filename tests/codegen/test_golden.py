"""Generated sources, word for word, and that nothing but the spec decides them.

After a change of a template: MHC_WRITE_GOLDEN=1 pytest tests/codegen/test_golden.py, then read the
diff.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.render import render
from mhc_compile.codegen.spec import OPS
from mhc_compile.conventions import CONVENTIONS

GOLDEN = Path(__file__).parent / "golden"


def pick(op, *args, **kwargs):
    return next(spec for spec in kernel_set(*args, **kwargs) if spec.name == op)


CASES = {
    "mix": lambda: pick("mix", 2, 72),  # channels that are no multiple of a tile
    "pre": lambda: pick("pre", 2, 64),
    "gates": lambda: pick("gates", 2, 64, rule=CONVENTIONS["deepseek_v4"]),
    "phi_backward": lambda: pick("phi_backward", 2, 64, "fp32"),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    path, text = GOLDEN / f"{name}.py", render(CASES[name]())
    if os.getenv("MHC_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


ALL = """
from mhc_compile.codegen.cache import load
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.render import render
specs = kernel_set(3, 96)
print("".join(render(spec) + spec.key for spec in specs))
kernel = load(specs[0])
print(type(kernel).__name__, kernel.src[4:8])
"""


def test_processes_agree(tmp_path, monkeypatch):
    """The text does not depend on the hash seed, and without the interpreter it loads as well."""
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "kernels"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALL], text=True, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed, "TRITON_INTERPRET": "0"},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert texts[0] == texts[1] and texts[0].count("def mhc_") >= len(OPS) - 1
    assert texts[0].endswith("JITFunction mhc_\n")
