"""`transform` and what surrounds it. The steps, in order, are those of `transform` below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.config import MHCConfig
from mhc_compile.errors import (
    ConfigError,
    MHCError,
    NoResidualError,
    NotTransformedError,
    UnsupportedResidualError,
)
from mhc_compile.passes.example_inputs import Inputs, resolve_inputs
from mhc_compile.passes.find_residuals import plan_rewrite
from mhc_compile.passes.install_blocks import (
    ATTRIBUTE,
    BlockRewrite,
    install_block,
    refuse_transformed,
    rewritten_blocks,
    uninstall_block,
)
from mhc_compile.passes.native import refuse_native
from mhc_compile.passes.note_config import forget_in_config, note_in_config
from mhc_compile.passes.plan import Plan, ResidualSite, ResidualSites
from mhc_compile.passes.prepare_blocks import ask_once, prepare_blocks
from mhc_compile.passes.record import Recording, record_forward
from mhc_compile.passes.surroundings import hook_surroundings, unhook_surroundings
from mhc_compile.passes.undo import rehearsed, remember_random_state, unchanged_on_error
from mhc_compile.runtime.eager_recompute import eager_recompute, set_recompute

STEP0_TOLERANCE = 1e-3
"""Largest step-0 difference, relative to the output's range, that `transform` lets pass.

A right rewrite in float32 stays below 1e-6; results with fewer bits are not compared."""
REDUCED_TOLERANCE = 0.05
"""The same where a float32 result was computed with fewer bits inside: bfloat16 rounds to 4e-3, and
sums of streams differ from the plain state in their last bit, which may round the other way."""


def transform(
    model: nn.Module,
    config: MHCConfig | None = None,
    *,
    example_inputs: Any = None,
    filter_fn: Callable[[ResidualSite], bool] | None = None,
    strict: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Rewrites a transformer's residual adds into n-stream mHC connections, in place.

    The model runs three times on the example inputs, in evaluation mode and without gradients:
    to record its data flow, to trace the blocks that hold residual adds, and, where
    init="preserve" promises it, to check that its function is unchanged. What it computes on
    other inputs, in training, with a KV cache or under gradient checkpointing follows from the
    same graphs; an unseen kind of call is traced when it first happens.

    Args:
        model: any module.
        config: the design; None is `MHCConfig()`.
        example_inputs: a tuple of arguments, a dict of keyword arguments, or a pair of both.
            Optional for Hugging Face models and modules whose inputs are evident.
        filter_fn: which residuals to rewrite; sites left out split their stream.
        strict: a residual add that cannot be rewritten raises; False leaves it plain, listed by
            `find_residuals`.
        **overrides: any `MHCConfig` field, e.g. `streams=8`.

    Returns:
        The same object.

    Raises:
        MHCError: a subclass says what went wrong and where; the model is exactly as before.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> is_transformed(transform(model, streams=2))
        True
    """
    config = _resolve_config(config, overrides)
    _require_module(model)
    refuse_transformed(model)
    refuse_native(model)
    filter_fn = ask_once(filter_fn)
    with unchanged_on_error(model):
        with _evaluation(model), rehearsed(model):
            inputs = resolve_inputs(model, example_inputs)
            same_random_state = remember_random_state(model)
            recording = record_forward(model, *inputs)  # record
            _check_plan(model, plan_rewrite(recording, filter_fn), strict)  # find
        with _evaluation(model), rehearsed(model):
            same_random_state()
            plan, rewrites = prepare_blocks(  # trace .. read
                model, recording, config, inputs, filter_fn, strict=strict
            )
            _check_plan(model, plan, strict)
        for name, rewrite in rewrites.items():
            install_block(model.get_submodule(name), rewrite)  # install
        hook_surroundings(model, plan.blocks)
        with _evaluation(model), rehearsed(model):
            same_random_state()
            _check_step0(model, config, inputs, recording)
        note_in_config(model, config, [site.name for site in sites_of(model)])
    return model


def find_residuals(model: nn.Module, example_inputs: Any = None) -> ResidualSites:
    """Lists the residual adds of a model: what `transform` would rewrite and would refuse.

    Each block is traced and rewritten on the side, so that a refusal shows here already. `print`
    shows the list as a table with the reasons.

    Args:
        model: any module; it is run twice and not changed.
        example_inputs: as for `transform`.

    Returns:
        One site a residual add, in execution order within each stream; a list.

    Raises:
        ExampleInputsError: the model does not run on the inputs, or none can be derived.
        AlreadyTransformedError: the model has hyper-connections.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> [site.name for site in find_residuals(layer)]
        ['self_attn', 'linear2']
    """
    _require_module(model)
    refuse_transformed(model)
    refuse_native(model)
    with unchanged_on_error(model), _evaluation(model):
        with rehearsed(model):
            inputs = resolve_inputs(model, example_inputs)
            recording = record_forward(model, *inputs)
        with rehearsed(model):
            plan, _ = prepare_blocks(model, recording, MHCConfig(), inputs, strict=False)
            return ResidualSites(plan.sites)


def revert(model: nn.Module) -> nn.Module:
    """Turns mHC connections back into plain residual adds and drops their parameters.

    Right after `transform` with init="preserve" this gives the original function back; after
    training, the sublayers keep what they learned and the connections are lost.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    blocks = _require_transformed(model)
    if eager_recompute(model) is not None:
        set_recompute(model, "off")
    for block, _ in blocks.values():
        uninstall_block(block)
    unhook_surroundings(model)
    forget_in_config(model)
    return model


def is_transformed(model: nn.Module) -> bool:
    """Whether `transform` has rewritten this model."""
    _require_module(model)
    return bool(rewritten_blocks(model))


def mhc_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the names and parameters of the connections, for an optimizer group of their own.

    They want no weight decay: it would pull the gates and H_res away from their start.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    blocks = {id(getattr(block, ATTRIBUTE)) for block, _ in _require_transformed(model).values()}
    names = [name for name, module in model.named_modules() if id(module) in blocks]
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{prefix}.") for prefix in names):
            yield name, parameter


def reset_mhc_parameters(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Puts the connections' parameters at the start that the config's `init` names.

    For models that were transformed on the meta device: after their weights were made and loaded,
    this makes the connections.

    Args:
        model: a transformed model.
        device: where parameters that are on the meta device are made; None leaves them there.

    Returns:
        The same object.

    Raises:
        NotTransformedError: the model was not transformed.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = transform(layer, streams=2).to_empty(device="cpu")
        >>> _ = reset_mhc_parameters(model)
    """
    for block, _ in _require_transformed(model).values():
        for module in getattr(block, ATTRIBUTE).children():
            tensors = list(module.parameters())
            if device is not None and any(t.device.type == "meta" for t in tensors):
                module.to_empty(device=device)
            module.reset_parameters()
    return model


def sites_of(model: nn.Module) -> list[ResidualSite]:
    """The rewritten sites of a transformed model, under the names that they have now.

    These differ from those at `transform` if the model was put into another, such as a PeftModel.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    sites = []
    for now, (_, rewrite) in _require_transformed(model).items():
        for site in rewrite.plan.sites:
            name = _renamed(site.name, rewrite.plan.name, now)
            sites.append(replace(site, name=name, module=now))
    return sites


def _renamed(name: str, before: str, now: str) -> str:
    """The name of something inside a module that has another name now."""
    inside = name[len(before) :].lstrip(".") if name.startswith(before) else name
    return f"{now}.{inside}".strip(".")


def _resolve_config(config: MHCConfig | None, overrides: dict[str, Any]) -> MHCConfig:
    if config is not None and not isinstance(config, MHCConfig):
        raise ConfigError(
            f"config must be an MHCConfig or None, got {type(config).__name__}; from a dict: "
            "MHCConfig.from_dict(d)"
        )
    return (config or MHCConfig()).replace(**overrides)


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _require_transformed(model: nn.Module) -> dict[str, tuple[nn.Module, BlockRewrite]]:
    _require_module(model)
    blocks = rewritten_blocks(model)
    if not blocks:
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC blocks; call mhc_compile.transform(model) first"
        )
    return blocks


def _check_plan(model: nn.Module, plan: Plan, strict: bool) -> None:
    refused = [s for s in plan.sites if not s.accepted and s.reason != "left out by filter_fn"]
    if refused and strict:
        site = refused[0]
        raise UnsupportedResidualError(
            f"the residual add at {site.source} ({site.name!r}) cannot be rewritten: "
            f"{site.reason}. strict=False or filter_fn leaves it as it is"
        )
    if plan.blocks:
        return
    if not plan.sites:
        raise NoResidualError(
            f"{type(model).__name__} has no residual add (x + F(x) with full shape) on the example "
            "inputs; check that they reach the transformer's blocks"
        )
    reasons = sorted({s.reason for s in plan.sites})
    raise NoResidualError(
        f"none of the {len(plan.sites)} residual adds of {type(model).__name__} is rewritten: "
        + "; ".join(reasons)
    )


def _check_step0(model: nn.Module, config: MHCConfig, inputs: Inputs, recording: Recording) -> None:
    """Runs the rewritten model and compares it with the recorded result."""
    tolerance = REDUCED_TOLERANCE if recording.reduced else STEP0_TOLERANCE
    args, kwargs = inputs
    with torch.no_grad():
        after = model(*args, **kwargs)
    wanted, got = tensor_leaves(recording.result), tensor_leaves(after)
    if len(wanted) != len(got):
        raise MHCError(
            f"the rewritten {type(model).__name__} returns {len(got)} tensors instead of "
            f"{len(wanted)}; please report this model"
        )
    for a, b in zip(wanted, got, strict=True):
        if a.shape != b.shape:
            raise MHCError(
                f"the rewritten {type(model).__name__} returns shape {list(b.shape)} instead of "
                f"{list(a.shape)}; please report this model"
            )
        exact = a.is_floating_point() and a.element_size() >= 4 and a.device.type != "meta"
        if exact and config.init == "preserve":
            _compare(model, a, b, tolerance)


def _compare(model: nn.Module, a: Tensor, b: Tensor, tolerance: float) -> None:
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).max() if a.numel() else 0.0
    scale = max(1.0, float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 1.0)
    if not float(difference) <= tolerance * scale:
        raise MHCError(
            f"the rewritten {type(model).__name__} differs from the original by "
            f"{float(difference):.3g} at step 0, where init='preserve' promises equality; is its "
            "forward random in evaluation mode? Otherwise please report this model"
        )


class _evaluation:  # noqa: N801  # a context manager, used like a function
    """Evaluation mode for a while; every module gets its own mode back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode
        known = {id(m) for m, _ in self.modes}
        for module in self.model.modules():
            if id(module) not in known:
                module.training = self.model.training
