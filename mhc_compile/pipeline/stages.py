"""`PipelineStages`: a model cut into the stages of a pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from mhc_compile.errors import SplitError
from mhc_compile.passes.call_paths import LeafPath, named_leaves
from mhc_compile.passes.example_inputs import resolve_inputs


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that crosses a border: one microbatch's shape, its dtype, and whether it learns."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device | str) -> Tensor:
        """A tensor of this kind, with any values."""
        return torch.empty(
            self.shape, dtype=self.dtype, device=device, requires_grad=self.requires_grad
        )

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class InputSpec:
    """An input of the model in the example: its name in the stages, and its shape if a tensor."""

    name: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class ResultNumber:
    """Stands in the template of a model's result for one of the last stage's tensors."""

    number: int


@dataclass(frozen=True)
class PipelineStages:
    """A model in stages; `stages[k]` is a module with the submodules and names of the model.

    Stage k is called with what stage k - 1 returned (stage 0 with nothing) and with the model's
    inputs in `reads[k]` by name, and returns what stage k + 1 takes: the n streams [B, S, n, C],
    and what else later stages need. The last one returns the tensors of the model's result, see
    `result`. Shapes are fixed to those of the example.

    Attributes:
        modules: the stages; they share the model's parameters.
        blocks: the names of each stage's blocks.
        borders: what each stage returns.
        reads: which inputs each stage reads.
        inputs: all inputs by their paths in the model's arguments.
        checks: looks at the inputs in `checked`, see `check`.
        shared: parameters in several stages, e.g. a tied embedding: their names by stage. Their
            gradients are to be summed; `PlanRunner` does.
        template: the model's result with tensors as numbers of the last stage's results.
        kind: the class of the result if that is a dataclass.
        forward: of the model's class, for the names of its arguments.
    """

    modules: tuple[fx.GraphModule, ...]
    blocks: tuple[tuple[str, ...], ...]
    borders: tuple[tuple[TensorSpec, ...], ...]
    reads: tuple[tuple[str, ...], ...]
    inputs: dict[LeafPath, InputSpec]
    checks: fx.GraphModule = field(repr=False)
    checked: tuple[str, ...]
    shared: tuple[dict[int, str], ...]
    template: Any = field(repr=False)
    kind: type | None = field(repr=False)
    forward: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> fx.GraphModule:
        return self.modules[number]

    def __iter__(self) -> Iterator[fx.GraphModule]:
        return iter(self.modules)

    def result(self, values: Any) -> Any:
        """What the model returns, made of what the last stage does."""

        def fill(part: Any) -> Any:
            if isinstance(part, ResultNumber):
                return values[part.number]
            if isinstance(part, dict):
                return {key: fill(value) for key, value in part.items()}
            if isinstance(part, tuple | list):
                return (tuple if isinstance(part, tuple) else list)(map(fill, part))
            return part

        filled = fill(self.template)
        return filled if self.kind is None else self.kind(**filled)

    def leaves(self, inputs: Any) -> dict[str, Any]:
        """The inputs that the stages may read, by name.

        Raises:
            SplitError: they are of another form than the example's.
        """
        args, kwargs = resolve_inputs(self.checks, inputs)
        given = dict(named_leaves(self.forward, args, kwargs))
        missing = [path for path in self.inputs if path not in given]
        surplus = [path for path, leaf in given.items()
                   if path not in self.inputs and isinstance(leaf, Tensor)]  # fmt: skip
        for paths, what in ((missing, "missing"), (surplus, "not among those of the split")):
            if paths:
                raise SplitError(
                    f"input {'.'.join(map(str, paths[0]))!r} is {what}; the stages take "
                    f"{', '.join(spec.name for spec in self.inputs.values())}; split again with "
                    "example inputs of this form"
                )
        return {spec.name: given[path] for path, spec in self.inputs.items()}

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Checks that a microbatch's inputs take the example's way through the root's Python.

        Raises:
            SplitError: they do not, e.g. have padding where the example had none.
        """
        self.checks(**{name: leaves[name] for name in self.checked})

    def signature(self) -> str:
        """A hash of the split, equal on ranks that cut alike."""
        text = json.dumps([self.blocks, [list(map(str, b)) for b in self.borders], self.reads])
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        rows = [
            (k, self.blocks[k][0] if len(self.blocks[k]) == 1
             else f"{self.blocks[k][0]} .. {self.blocks[k][-1]}", len(self.blocks[k]),
             sum(p.numel() for p in module.parameters()), ", ".join(self.reads[k]),
             ", ".join(map(str, self.borders[k])))
            for k, module in enumerate(self.modules)
        ]  # fmt: skip
        headers = ("stage", "blocks", "number", "parameters", "reads", "hands on")
        text = tabulate(rows, headers=headers)
        for names in self.shared:
            text += "\nshared: " + ", ".join(f"{name} (stage {k})" for k, name in names.items())
        return text
