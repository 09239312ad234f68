"""Steps 3 to 7 for all blocks: each is traced and rewritten on the arguments it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mhc_compile.config import MHCConfig
from mhc_compile.errors import MHCError, UnsupportedResidualError
from mhc_compile.passes.example_inputs import Inputs
from mhc_compile.passes.find_residuals import plan_rewrite
from mhc_compile.passes.install_blocks import BlockRewrite, prepare_block
from mhc_compile.passes.module_access import patched_modules
from mhc_compile.passes.plan import Plan, ResidualSite
from mhc_compile.passes.record import Recording, patched_module_call
from mhc_compile.runtime.guards import hook_message

Filter = Callable[[ResidualSite], bool]


def prepare_blocks(
    model: nn.Module,
    recording: Recording,
    config: MHCConfig,
    inputs: Inputs,
    filter_fn: Filter | None = None,
    *,
    strict: bool,
) -> tuple[Plan, dict[str, BlockRewrite]]:
    """Plans the rewrite and tries it on every block; nothing is installed.

    Args:
        model: the recorded model.
        recording: from `record_forward`.
        config: the design.
        inputs: those of the recording; the model runs on them again.
        filter_fn: which sites to take.
        strict: a block that cannot be rewritten raises; False refuses its sites, with the reason,
            and plans anew without them.

    Returns:
        The plan and the rewrite of each block by its name.

    Raises:
        MHCError: as `prepare_block`, with `strict`.
    """
    refused: dict[str, str] = {}
    while True:
        plan = plan_rewrite(recording, _without(refused, filter_fn))
        hooked = _changed_by_hooks(recording, plan)
        rewrites, failures = _try_blocks(model, plan, config, inputs)
        failures = {**failures, **hooked}
        if not failures:
            return _with_reasons(plan, refused), rewrites
        if strict:
            raise next(iter(failures.values()))
        for block in plan.blocks:
            if block.name in failures:
                reason = str(failures[block.name])
                refused.update({site.name: reason for site in block.sites})


def ask_once(filter_fn: Filter | None) -> Filter | None:
    """Remembers a user's decisions, so that planning anew does not ask again."""
    if filter_fn is None:
        return None
    known: dict[str, bool] = {}

    def decide(site: ResidualSite) -> bool:
        if site.name not in known:
            known[site.name] = bool(filter_fn(site))
        return known[site.name]

    return decide


def _without(refused: dict[str, str], filter_fn: Filter | None) -> Filter:
    return lambda site: site.name not in refused and (filter_fn is None or filter_fn(site))


def _with_reasons(plan: Plan, refused: dict[str, str]) -> Plan:
    sites = [replace(s, reason=refused.get(s.name, s.reason)) for s in plan.sites]
    return replace(plan, sites=tuple(sites))


def _changed_by_hooks(recording: Recording, plan: Plan) -> dict[str, MHCError]:
    """Blocks with a submodule to be traced into, of which a hook changes what it returns."""
    found: dict[str, MHCError] = {}
    for block in plan.blocks:
        prefix = f"{block.name}." if block.name else ""
        names = {f"{prefix}{name}" for name in block.opened}
        for (name, _), call in recording.calls.items():
            if name in names and call.changed_by:
                found[block.name] = UnsupportedResidualError(
                    f"block {block.name!r}: {hook_message(call.module, call.changed_by[0])}, or "
                    "leave its sites out with filter_fn"
                )
                break
    return found


def _try_blocks(
    model: nn.Module, plan: Plan, config: MHCConfig, inputs: Inputs
) -> tuple[dict[str, BlockRewrite], dict[str, MHCError]]:
    plans = {id(model.get_submodule(block.name)): block for block in plan.blocks}
    rewrites: dict[str, BlockRewrite] = {}
    failures: dict[str, MHCError] = {}

    def on_call(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        block = plans.pop(id(module), None)
        if block is not None:
            with _original_module_call(call):
                try:
                    rewrites[block.name] = prepare_block(module, block, config, args, kwargs)
                except MHCError as error:
                    failures[block.name] = error
        return call(module, *args, **kwargs)

    args, kwargs = inputs
    if plans:
        with torch.no_grad(), patched_modules(), patched_module_call(on_call):
            model(*args, **kwargs)
    if plans:
        missing = ", ".join(repr(p.name) for p in plans.values())
        raise UnsupportedResidualError(
            f"blocks {missing} ran when the model was recorded but not in a second run; transform "
            "needs a forward that takes the same way twice in evaluation mode"
        )
    return rewrites, failures


def _original_module_call(call: Callable[..., Any]) -> Any:
    """Tracing patches module calls itself, so it must find the unpatched ones."""
    return patched_module_call(lambda _, module, args, kwargs: call(module, *args, **kwargs))
