"""The scheduler runs where there is no torch.

`import mhc_compile` imports torch. So the modules' imports are read from their source, and a
process in which torch cannot be imported loads them below an empty parent package. `lint-imports`
checks the same of all modules that they import in turn.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mhc_compile.scheduler

FOLDER = Path(mhc_compile.scheduler.__file__).parent
ALLOWED = {"mhc_compile.errors", "mhc_compile.scheduler"}


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.stem)
def test_imports(file):
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names.append(node.module)
    assert not [name for name in names if name.split(".")[0] in ("torch", "triton")]
    ours = {".".join(name.split(".")[:2]) for name in names if name.startswith("mhc_compile")}
    assert ours <= ALLOWED


def test_without_torch():
    code = f"""
    import sys, types
    sys.modules["torch"] = sys.modules["triton"] = None  # importing them fails
    parent = types.ModuleType("mhc_compile")
    parent.__path__ = [{str(FOLDER.parent)!r}]
    sys.modules["mhc_compile"] = parent
    from mhc_compile.scheduler import solve_recompute
    print(solve_recompute(12, 4, objective="timeline", kept=8).block_sizes)
    assert not [name for name in sys.modules if name.startswith(("torch.", "triton."))]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(8, 3, 1)\n"
