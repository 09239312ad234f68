"""Exchange of connections with DeepSeek-V4: its parameter names, shapes and order.

`DeepseekV4HyperConnection` and `DeepseekV4HyperHead` of transformers keep what this package calls
phi, alpha and bias as `fn = phi.T`, `scale = alpha` and `base = bias`, with the rows of `fn` in the
order of our columns: pre, post, res. Their res map `comb[in, out]` acts as `comb.T @ x`; convention
"deepseek_v4" keeps that orientation in its parameters, so its entries need no reordering.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhc_compile.errors import CheckpointError, check_choice
from mhc_compile.passes.check_deepseek_v4 import (
    check_layers,
    listed,
    v4_config,
    v4_connections,
    v4_head,
)

FORMATS: Mapping[str, tuple[str, str]] = {
    "deepseek_v4": ("model.layers.{layer}.{kind}_hc.{part}", "model.hc_head.hc_{part}"),
    "deepseek_v4_release": ("layers.{layer}.hc_{kind}_{part}", "hc_head_{part}"),
}
"""Names of a layer's connections and of the head: in transformers' DeepseekV4ForCausalLM, and in
the weight files as DeepSeek released them, which transformers renames when it loads them."""

KINDS = ("attn", "ffn")
PARTS = {"fn": "phi", "base": "bias", "scale": "alpha"}


@dataclass(frozen=True)
class _Entry:
    """One of our parameters, and whether the other side stores its transpose."""

    parameter: nn.Parameter
    transposed: bool

    @property
    def value(self) -> Tensor:
        value = self.parameter.detach()
        return value.T if self.transposed else value


def export_checkpoint(
    model: nn.Module,
    format: str = "deepseek_v4",
    *,
    layers: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Returns a transformed model's connections under the names of DeepSeek-V4.

    They are the hyper-connections alone; a DeepSeek-V4 model that takes them with
    `load_state_dict(tensors, strict=False)` needs the config values of `deepseek_v4_config`.

    Args:
        model: transformed with `convention="deepseek_v4", collapse="head"`, its residuals
            attention and MLP in turn on one stream.
        format: "deepseek_v4", the names of transformers' DeepseekV4ForCausalLM, or
            "deepseek_v4_release", those of the released weight files.
        layers: the names of each layer's attention and MLP site. None tells them by their names,
            and is refused where those do not say which is attention.

    Returns:
        New contiguous tensors in float32 on the parameters' device: for each layer and kind
        `fn: [n*n + 2n, n*C]`, `base: [n*n + 2n]`, `scale: [3]`; for the head `fn: [n, n*C]`,
        `base: [n]`, `scale: [1]`.

    Raises:
        NotTransformedError: the model was not transformed.
        CheckpointError: DeepSeek-V4 has no counterpart for this model, and why.
        ConfigError: the format is unknown.
    """
    entries = _entries(model, format, layers)
    return {
        name: entry.value.to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, entry in entries.items()
    }


def import_checkpoint(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    format: str = "deepseek_v4",
    *,
    layers: Sequence[tuple[str, str]] | None = None,
) -> nn.Module:
    """Sets a transformed model's connections from tensors under the names of DeepSeek-V4.

    Every name must be there and no other: pick the hyper-connections out of a whole checkpoint
    first. Values take the dtype and device of the parameters, as with `load_state_dict`.

    Args:
        model: as for `export_checkpoint`; its sublayers are not touched.
        tensors: by name, shapes as `export_checkpoint` returns them, any floating dtype.
        format: as for `export_checkpoint`.
        layers: as for `export_checkpoint`.

    Returns:
        The same object.

    Raises:
        NotTransformedError: the model was not transformed.
        CheckpointError: DeepSeek-V4 has no counterpart for this model, or a tensor is missing,
            unknown, misshaped or without values; the model is as before.
        ConfigError: the format is unknown.
    """
    entries = _entries(model, format, layers)
    _check_tensors(model, entries, tensors)
    with torch.no_grad():
        for name, entry in entries.items():
            entry.value.copy_(tensors[name])
    return model


def deepseek_v4_config(model: nn.Module) -> dict[str, int | float]:
    """Returns the fields of transformers' `DeepseekV4Config` that the connections depend on.

    Raises:
        NotTransformedError: the model was not transformed.
        CheckpointError: DeepSeek-V4 has no counterpart for this model's config, and why.
    """
    config = v4_config(model)
    return {
        "hc_mult": config.streams,
        "hc_sinkhorn_iters": config.sinkhorn_iters,
        "hc_eps": config.pre_eps,
        "rms_norm_eps": config.norm_eps,
    }


def _entries(
    model: nn.Module, format: str, layers: Sequence[tuple[str, str]] | None
) -> dict[str, _Entry]:
    """All parameters of the connections by their names in the format, in execution order."""
    check_choice("format", format, FORMATS)
    v4_config(model)
    connections = v4_connections(model)
    check_layers(model, [site for site, _ in connections], layers)
    of_layer, of_head = FORMATS[format]
    entries: dict[str, _Entry] = {}
    for k, (_, module) in enumerate(connections):
        for part, ours in PARTS.items():
            name = of_layer.format(layer=k // 2, kind=KINDS[k % 2], part=part)
            entries[name] = _Entry(getattr(module, ours), ours == "phi")
    head = v4_head(model)
    for part, ours in PARTS.items():
        entries[of_head.format(part=part)] = _Entry(getattr(head, ours), ours == "phi")
    empty = [name for name, e in entries.items() if e.parameter.device.type == "meta"]
    if empty:
        raise CheckpointError(
            f"the connections of {type(model).__name__} are on the meta device, so {empty[0]!r} "
            "has no values; materialise the model first"
        )
    return entries


def _check_tensors(
    model: nn.Module, entries: dict[str, _Entry], tensors: Mapping[str, Tensor]
) -> None:
    """States everything that does not fit, before anything is written."""
    faults = list(_faults(entries, tensors))
    if faults:
        n, rows = v4_config(model).streams, next(iter(entries.values())).parameter.shape[0]
        raise CheckpointError(
            f"the tensors do not fit the connections of this {type(model).__name__} with {n} "
            f"streams of {rows // n} channels: {'; '.join(faults)}"
        )


def _faults(entries: dict[str, _Entry], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [name for name in entries if name not in tensors]
    unknown = [name for name in tensors if name not in entries]
    if missing:
        yield f"missing: {listed(missing)}"
    if unknown:
        yield (
            f"unknown: {listed(unknown)} (the model has {(len(entries) - 3) // 6} layers; of a "
            "whole checkpoint pass these layers' hyper-connections alone)"
        )
    for name, entry in entries.items():
        value = tensors.get(name)
        if value is None and name not in tensors:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            yield f"{name} must be a floating tensor, got {kind}"
        elif value.shape != entry.value.shape:
            yield (
                f"{name} has the shape {list(value.shape)}, the model's is "
                f"{list(entry.value.shape)}"
            )
            return  # a wrong n or C shows in every tensor
        elif value.device.type == "meta":
            yield f"{name} is on the meta device and has no values"
