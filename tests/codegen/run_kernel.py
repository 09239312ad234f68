"""Runs one generated kernel in Triton's interpreter, on tensors that fit its parameter list.

    tensors = arguments_for(spec, tokens=5)             # uniform inputs, NaN in outputs
    run_kernel(spec, tokens=5, **tensors, eps=1e-6)     # all programs; outputs are in `tensors`

The interpreter is on in every process of the tests, see tests/conftest.py; a spec needs
`target="interpret"`.
"""

import torch

from mhc_compile.codegen.interpreter import run
from mhc_compile.codegen.signature import arguments, counts, grid, numbers
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.codegen.traffic import traffic

DTYPES = {
    "*i32": torch.int32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
}


def arguments_for(spec: KernelSpec, tokens: int) -> dict[str, torch.Tensor]:
    """Tensors for the arguments that the kernel uses, by name."""
    moved, count = traffic(spec, tokens), counts(spec, tokens)
    tensors = {}
    for argument in arguments(spec):
        if argument.name in moved.read | moved.written | moved.scratch:
            dtype = DTYPES[argument.type]
            empty = torch.nan if dtype.is_floating_point else 0  # counters begin at 0
            tensor = torch.full(argument.shape(count), empty, dtype=dtype)
            if argument.name in moved.read:
                tensor = torch.rand(tensor.shape).to(tensor.dtype)
            tensors[argument.name] = tensor
    return tensors


def run_kernel(spec: KernelSpec, tokens: int, **values: torch.Tensor | float | None) -> None:
    """Launches all programs; `tokens` and the launch's own numbers are filled in."""
    given = {**numbers(spec, tokens), "eps": 1e-6}
    names = {argument.name for argument in arguments(spec)}
    given = {name: value for name, value in given.items() if name in names}
    run(spec, grid(spec, tokens), **(given | values))
