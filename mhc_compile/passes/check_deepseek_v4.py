"""Which transformed models DeepSeek-V4 has a counterpart for, and why the others have none."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from mhc_compile.config import MHCConfig
from mhc_compile.conventions import CONVENTIONS
from mhc_compile.errors import CheckpointError, ConfigError, NotTransformedError
from mhc_compile.passes.install_blocks import ATTRIBUTE, rewritten_blocks
from mhc_compile.passes.plan import ResidualSite
from mhc_compile.runtime.modules import HyperConnection, StreamCollapse

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
# Axes that V4's code fixes; the iterations and the two eps are numbers in its config.
_FIXED_AXES = (
    "res_transposed", "sinkhorn_order", "sinkhorn_start", "sinkhorn_start_is_step",
    "sinkhorn_eps_mode", "norm_eps_place", "post_multiplier",
)  # fmt: skip


def v4_config(model: nn.Module) -> MHCConfig:
    """The model's config, if it is one that DeepSeek-V4 can express.

    Raises:
        NotTransformedError: the model was not transformed.
        CheckpointError: it is not, and which fields differ.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = rewritten_blocks(model)
    if not blocks:
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC blocks; call mhc_compile.transform(model, "
            "convention='deepseek_v4', collapse='head') first"
        )
    config = next(iter(blocks.values()))[1].config
    wanted = CONVENTIONS["deepseek_v4"]
    wrong = [
        f"connection={config.connection!r}, not 'mhc'" if config.connection != "mhc" else "",
        "streams=1, which is the plain residual" if config.streams == 1 else "",
        f"collapse={config.collapse!r}, not 'head'" if config.collapse != "head" else "",
        *(
            f"{axis}={getattr(config, axis)!r}, not {getattr(wanted, axis)!r}"
            for axis in _FIXED_AXES
            if getattr(config, axis) != getattr(wanted, axis)
        ),
        f"pre_eps={config.pre_eps:g} beside sinkhorn_eps={config.sinkhorn_eps:g}, which are one "
        "number there" if config.pre_eps != config.sinkhorn_eps else "",
    ]  # fmt: skip
    if any(wrong):
        raise CheckpointError(
            f"DeepSeek-V4 has no counterpart for this {type(model).__name__} (convention "
            f"{config.convention!r}): {'; '.join(filter(None, wrong))}. Transform it with "
            "convention='deepseek_v4', collapse='head', streams of 2 or more"
        )
    return config


def v4_connections(model: nn.Module) -> list[tuple[ResidualSite, HyperConnection]]:
    """Each site with its connection, in the order of the stream.

    Raises:
        CheckpointError: the model is not one stream from the first layer to the last.
    """
    found: list[tuple[int, ResidualSite, HyperConnection]] = []
    starts = 0
    for block, rewrite in rewritten_blocks(model).values():
        plan = rewrite.plan
        for position, (number, k) in enumerate(plan.order):
            segment = plan.segments[number]
            if segment.norms:
                where = ", ".join(sorted(kind.__name__ for kind in segment.norms))
                raise CheckpointError(
                    f"the stream of {type(model).__name__} passes an operation between sublayers, "
                    f"such as a norm or a factor on the skip (in {where}); DeepSeek-V4 has "
                    "operations inside sublayers alone"
                )
            connection = block.get_submodule(f"{ATTRIBUTE}.{position}")
            assert isinstance(connection, HyperConnection)
            found.append((segment.first_index + k, segment.sites[k], connection))
        starts += sum(segment.expand for segment in plan.segments)
    found.sort(key=lambda item: item[0])
    streams = {site.stream for _, site, _ in found}
    wrong = "its stream split in two" if starts > 1 else ""
    wrong = wrong or _left_out(model, found[0][0])
    if len(streams) > 1:
        wrong = f"{len(streams)} residual streams"
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__} has {wrong}; DeepSeek-V4 has one stream that runs from the "
            "first layer to the last, so transform one such model, without filter_fn"
        )
    return [(site, connection) for _, site, connection in found]


def _left_out(model: nn.Module, first: int) -> str:
    """Names sites or blocks that stayed plain before or behind the rewritten ones."""
    if first > 0:
        return f"{first} plain residual adds before the first connection"
    blocks = rewritten_blocks(model)
    kinds = {rewrite.original for _, rewrite in blocks.values()} - {nn.Sequential}
    plain = [name for name, module in model.named_modules() if type(module) in kinds]
    return f"layers that stayed plain, such as {plain[0]!r}" if plain else ""


def v4_head(model: nn.Module) -> StreamCollapse:
    """The collapse behind the last sublayer."""
    heads = [
        module
        for block, _ in rewritten_blocks(model).values()
        for module in block.get_submodule(ATTRIBUTE).children()
        if isinstance(module, StreamCollapse)
    ]
    assert len(heads) == 1, "one stream ends once"
    return heads[0]


def check_layers(
    model: nn.Module, sites: list[ResidualSite], layers: Sequence[tuple[str, str]] | None
) -> None:
    """Refuses sites that are not attention and MLP in turn.

    Raises:
        CheckpointError: their names do not say so and `layers` does not either.
    """
    names = [site.name for site in sites]
    if layers is not None:
        given = [name for pair in layers for name in pair]
        if given != names or any(len(pair) != 2 for pair in layers):
            raise CheckpointError(
                "layers must be pairs of the attention's and the MLP's site in execution order; "
                f"the sites of {type(model).__name__} are {listed(names)}, got {listed(given)}"
            )
        return
    remedy = (
        "; if they are, name them: layers=[(attention site, MLP site), ...] with the names of "
        "find_residuals"
    )
    if len(sites) % 2:
        raise CheckpointError(
            f"the {len(sites)} residual sites of {type(model).__name__} are not attention and MLP "
            f"in turn, as DeepSeek-V4's are: {listed(names)}"
        )
    for attention, mlp in zip(names[::2], names[1::2], strict=True):
        first, second = _own_parts(attention, mlp)
        if not _ATTENTION.search(first) or _ATTENTION.search(second):
            raise CheckpointError(
                f"the residual sites {attention!r} and {mlp!r} of {type(model).__name__} do not "
                f"look like attention and MLP in turn, as DeepSeek-V4's are{remedy}"
            )


def _own_parts(a: str, b: str) -> tuple[str, str]:
    """What two dotted names have of their own behind their common beginning."""
    left, right = a.split("."), b.split(".")
    same = next((k for k, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
                min(len(left), len(right)))  # fmt: skip
    return ".".join(left[same:]), ".".join(right[same:])


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    return ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
