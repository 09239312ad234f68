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
    return next(spec for spec in kernel_set(*args, **kwargs) if spec.op == op)


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
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.render import render
print("".join(render(spec) + spec.key for spec in kernel_set(3, 96)))
"""


def test_text_does_not_depend_on_the_hash_seed():
    texts = [
        subprocess.run(
            [sys.executable, "-c", ALL], text=True, check=True, capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1] and texts[0].count("def kernel(") >= len(OPS) - 1
