"""Compiles one kernel for a GPU that need not be there; run as a script, see `compile_ahead.py`.

In a process of its own, because Triton's interpreter and its compiler exclude each other and a
compile that takes too long can then be stopped. Imports Triton alone: torch takes seconds.
"""

import base64
import json
import runpy
import sys
import time


def main() -> None:
    """Reads a job as JSON from stdin and writes the result as JSON to stdout."""
    job = json.load(sys.stdin)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = runpy.run_path(job["source"])[job["function"]]
    types = job["signature"]
    pointers = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel, signature=types, constexprs={},
        # Tensors of torch start at multiples of 16 bytes, as a launch would find out.
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )  # fmt: skip
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(*job["target"]), options=job["options"])
    seconds = time.perf_counter() - start
    binary = compiled.asm["amdgcn"].encode() if "amdgcn" in compiled.asm else compiled.asm["cubin"]
    json.dump(
        {
            "seconds": seconds,
            "shared": compiled.metadata.shared,
            "binary": base64.b64encode(binary).decode(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
