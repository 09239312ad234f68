"""Example inputs for models from which they can be derived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import ExampleInputsError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_BATCH, _LENGTH = 2, 8
_HINT = "pass example_inputs=(args tuple), a kwargs dict, or (args tuple, kwargs dict)"


def resolve_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Normalises what the user gave, or derives inputs from the model.

    Args:
        model: the model.
        example_inputs: None, a tuple of positional arguments, a dict of keyword arguments, a pair
            `(tuple, dict)`, or a single tensor.

    Returns:
        Positional and keyword arguments of one forward.

    Raises:
        ExampleInputsError: the form is unknown, or none was given and none can be derived.
    """
    if example_inputs is None:
        return _derive(model)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        if len(example_inputs) == 2 and isinstance(example_inputs[1], Mapping):
            if isinstance(example_inputs[0], tuple | list):
                return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise ExampleInputsError(f"example_inputs is a {type(example_inputs).__name__}; {_HINT}")


def _derive(model: nn.Module) -> Inputs:
    if getattr(model, "main_input_name", None) and getattr(model, "config", None) is not None:
        return (), _from_config(model)
    tensor = next(model.parameters(), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    dtype = tensor.dtype if tensor is not None else torch.float32
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return (_tokens(module.num_embeddings, device),), {}
        width = getattr(module, "in_features", None)
        if isinstance(module, nn.LayerNorm):
            width = module.normalized_shape[-1]
        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
        if width:
            return (torch.randn(_BATCH, _LENGTH, width, device=device, dtype=dtype),), {}
    raise ExampleInputsError(
        f"cannot derive inputs for {type(model).__name__}: it has no embedding, linear or norm "
        f"layer to tell their shape; {_HINT}"
    )


def _from_config(model: nn.Module) -> dict[str, Any]:
    """Inputs of a Hugging Face model, from the name of its main input and its config."""
    config: Any = model.config
    name: str = model.main_input_name  # type: ignore[assignment]
    tensor = next(model.parameters())
    device, dtype = tensor.device, tensor.dtype
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    inputs: dict[str, Any] = {}
    if name == "input_ids" and vocabulary:
        inputs[name] = _tokens(vocabulary, device)
    elif name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        inputs[name] = torch.randn(_BATCH, channels, height, width, device=device, dtype=dtype)
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        inputs[name] = torch.randn(_BATCH, config.num_mel_bins, frames, device=device, dtype=dtype)
    else:
        raise ExampleInputsError(
            f"cannot derive {name!r} for {type(model).__name__} from its config; {_HINT}"
        )
    if getattr(config, "is_encoder_decoder", False) and vocabulary:
        inputs["decoder_input_ids"] = _tokens(vocabulary, device)[:, : _LENGTH - 3]
    return inputs


def _tokens(vocabulary: int, device: torch.device) -> Tensor:
    """Ids from the middle of the vocabulary: its ends often hold padding and special tokens."""
    low = min(vocabulary // 4, vocabulary - 1)
    return torch.randint(low, max(low + 1, vocabulary * 3 // 4), (_BATCH, _LENGTH), device=device)
