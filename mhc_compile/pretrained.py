"""Saving and loading transformed models."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.api import is_transformed, mhc_parameters, revert, sites_of, transform
from mhc_compile.config import MHCConfig
from mhc_compile.errors import AlreadyTransformedError, CheckpointError, NotTransformedError
from mhc_compile.passes.install_blocks import rewritten_blocks
from mhc_compile.runtime.checkpoint import read_checkpoint, write_checkpoint


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], *, only_mhc: bool = False
) -> None:
    """Saves a transformed model: weights as safetensors, the design and its sites as JSON.

    An existing checkpoint in the directory is replaced in one step.

    Args:
        model: a transformed model.
        directory: made if needed.
        only_mhc: leave the original model's weights out, as for an adapter.

    Raises:
        NotTransformedError: the model was not transformed.
        CheckpointError: the directory cannot be written, or the state is not all tensors.
    """
    if not is_transformed(model):
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC blocks; call mhc_compile.transform(model) first"
        )
    tensors = dict(mhc_parameters(model)) if only_mhc else model.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the state {name!r} is a {type(value).__name__}; only tensors are saved, so keep "
                "extra state elsewhere"
            )
    config = next(iter(rewritten_blocks(model).values()))[1].config
    write_checkpoint(
        directory, tensors, config=config.to_dict(), only_mhc=only_mhc,
        sites=[site.name for site in sites_of(model)],
    )  # fmt: skip


def load_pretrained(
    base_model: nn.Module, directory: str | os.PathLike[str], example_inputs: Any = None
) -> nn.Module:
    """Transforms a base model as the saved one was and loads the saved weights.

    Args:
        base_model: the original architecture, not transformed; its own weights matter only for a
            checkpoint that was saved with `only_mhc=True`.
        directory: from `save_pretrained`.
        example_inputs: as for `transform`.

    Returns:
        The same object, transformed; it computes bitwise what the saved model did.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; the model is as before.
        AlreadyTransformedError: the model is transformed already.
    """
    tensors, manifest = read_checkpoint(directory)
    if is_transformed(base_model):
        raise AlreadyTransformedError(
            "base_model is transformed already; pass the original architecture, or "
            "mhc_compile.revert(base_model) first"
        )
    try:
        config = MHCConfig.from_dict(manifest["config"])
        wanted = list(manifest["sites"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest in {directory} is damaged: {error}") from error
    transform(
        base_model, config, example_inputs=example_inputs, strict=False,
        filter_fn=lambda site: site.name in wanted,
    )  # fmt: skip
    try:
        found = [site.name for site in sites_of(base_model)]
        if found != wanted:
            missing = [name for name in wanted if name not in found]
            raise CheckpointError(
                f"the checkpoint in {directory} was saved from a model with other residual sites: "
                f"{missing or wanted} are missing in this {type(base_model).__name__}"
            )
        _load(base_model, tensors, bool(manifest.get("only_mhc")), directory)
    except BaseException:
        revert(base_model)
        raise
    return base_model


def _load(
    model: nn.Module, tensors: dict[str, Tensor], only_mhc: bool, directory: str | os.PathLike[str]
) -> None:
    """Checks every name and shape, then copies; nothing is changed if a check fails."""
    state = model.state_dict()
    expected = dict(mhc_parameters(model)) if only_mhc else state
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    shapes = [
        name for name in expected if name in tensors and expected[name].shape != tensors[name].shape
    ]
    if missing or unknown or shapes:
        parts = [f"{label}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                 for label, names in (("missing", missing), ("unknown", unknown),
                                      ("of another shape", shapes)) if names]  # fmt: skip
        raise CheckpointError(
            f"the weights in {directory} do not fit this {type(model).__name__}: {'; '.join(parts)}"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
