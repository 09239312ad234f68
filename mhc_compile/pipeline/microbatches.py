"""A batch as the microbatches of a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mhc_compile.errors import ConfigError, SplitError
from mhc_compile.pipeline.stages import PipelineStages


def split_inputs(
    stages: PipelineStages, inputs: Any, count: int, device: torch.device
) -> list[dict[str, Any]]:
    """Returns the inputs of each microbatch by name, on a device.

    Tensors with `count` times the example's size in the first dimension are cut; those of the
    example's shape, such as positions, and what is no tensor are the same for all.

    Raises:
        SplitError: a tensor has another shape, the inputs another form, or a microbatch takes
            another way through the root's Python.
    """
    specs = {spec.name: spec.shape for spec in stages.inputs.values()}
    chunks: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in stages.leaves(inputs).items():
        shape = specs[name]
        if not isinstance(value, Tensor) or shape is None:
            parts: Any = [value] * count
        elif shape and tuple(value.shape) == (shape[0] * count, *shape[1:]):
            parts = value.to(device).split(shape[0])
        elif tuple(value.shape) == shape:
            parts = [value.to(device)] * count
        else:
            whole = [shape[0] * count, *shape[1:]] if shape else []
            raise SplitError(
                f"input {name!r} has the shape {list(value.shape)}; the stages were split for "
                f"microbatches of {list(shape)}, {count} of which make a batch of {whole}"
            )
        for chunk, part in zip(chunks, parts, strict=True):
            chunk[name] = part
    for chunk in chunks:
        stages.check(chunk)
    return chunks


def split_target(target: Any, count: int, device: torch.device) -> list[Any]:
    """Returns the targets of each microbatch: every tensor cut along its first dimension.

    Raises:
        ConfigError: a tensor cannot be cut into `count` equal parts.
    """

    def part(number: int) -> Any:
        return tree_map_only(Tensor, lambda t: _chunk(t, count, number).to(device), target)

    return [part(number) for number in range(count)]


def _chunk(value: Tensor, count: int, number: int) -> Tensor:
    if value.dim() == 0 or len(value) % count:
        raise ConfigError(
            f"a target of shape {list(value.shape)} cannot be cut into {count} microbatches along "
            "its first dimension"
        )
    size = len(value) // count
    return value[number * size : (number + 1) * size]
