"""Saving and loading transformed models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.api import is_transformed, mhc_parameters, revert, sites_of, transform
from mhc_compile.config import MHCConfig
from mhc_compile.errors import AlreadyTransformedError, CheckpointError, NotTransformedError
from mhc_compile.passes.install_blocks import ATTRIBUTE, rewritten_blocks
from mhc_compile.passes.note_config import note_kept_on_error
from mhc_compile.runtime.checkpoint import (
    holds_manifest,
    read_checkpoint,
    read_hugging_face,
    read_tensors,
    write_checkpoint,
)


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

    The directory comes from `save_pretrained`, or from a transformed Hugging Face model's own
    `model.save_pretrained`. For the latter, pass `from_pretrained(directory)` as the base model:
    its own weights are then those of the directory, and this adds the connections.

    Args:
        base_model: the original architecture, not transformed. Its own weights are replaced, but
            for a checkpoint saved with `only_mhc=True` and a Hugging Face directory.
        directory: where the transformed model was saved.
        example_inputs: as for `transform`.

    Returns:
        The same object, transformed; it computes bitwise what the saved model did.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; the model is as before.
        AlreadyTransformedError: the model is transformed already.
    """
    hugging_face = None if holds_manifest(directory) else read_hugging_face(directory)
    if hugging_face is not None:
        files, facts = hugging_face
    else:
        tensors, facts = read_checkpoint(directory)
    if is_transformed(base_model):
        raise AlreadyTransformedError(
            "base_model is transformed already; pass the original architecture, or "
            "mhc_compile.revert(base_model) first"
        )
    try:
        config = MHCConfig.from_dict(facts["config"])
        wanted = list(facts["sites"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest in {directory} is damaged: {error}") from error
    with note_kept_on_error(base_model), _plain_on_error(base_model):
        transform(
            base_model, config, example_inputs=example_inputs, strict=False,
            filter_fn=lambda site: site.name in wanted,
        )  # fmt: skip
        found = [site.name for site in sites_of(base_model)]
        if found != wanted:
            missing = [name for name in wanted if name not in found]
            raise CheckpointError(
                f"the checkpoint in {directory} was saved from a model with other residual sites: "
                f"{missing or wanted} are missing in this {type(base_model).__name__}"
            )
        if hugging_face is not None:
            _load_connections(base_model, files, directory)
        else:
            _load(base_model, tensors, bool(facts.get("only_mhc")), directory)
    return base_model


@contextlib.contextmanager
def _plain_on_error(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if is_transformed(model):
            revert(model)
        raise


def _load_connections(
    model: nn.Module, files: dict[str, Path], directory: str | os.PathLike[str]
) -> None:
    """Loads mHC's parameters and checks that the others are those of the same directory.

    Those are the Hugging Face library's to load: it may rename, merge, cast or quantise them.
    """
    state, own = model.state_dict(), {name for name, _ in mhc_parameters(model)}
    names = _names_in_model(model, files, state)
    base = [saved for saved, name in names.items() if name in state and name not in own]
    for saved, tensor in read_tensors(files, base):
        value = state[names[saved]]
        comparable = value.shape == tensor.shape and value.is_floating_point()
        if not comparable or value.device.type == "meta":
            continue
        if not torch.equal(value.cpu(), tensor.to(value.dtype)):
            raise CheckpointError(
                f"the base model's {names[saved]!r} differs from that in {directory}; load the "
                f"base model with {type(model).__name__}.from_pretrained({str(directory)!r})"
            )
    ours = [n for n in files if names[n] in own or f".{ATTRIBUTE}." in f".{n}" and n not in base]
    tensors = {names[saved]: tensor for saved, tensor in read_tensors(files, ours)}
    _load(model, tensors, True, directory)


def _names_in_model(model: Any, files: dict[str, Path], state: dict[str, Tensor]) -> dict[str, str]:
    """What the Hugging Face library, which may save under other names, calls saved tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        names = {}
        for saved in sorted(files):
            name, _ = rename_source_key(saved, renamings, [], model.base_model_prefix, state)
            names[saved] = saved if saved in state and name not in state else name
        return names
    except (ImportError, AttributeError, TypeError):  # another version of that library
        return {name: name for name in files}


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
