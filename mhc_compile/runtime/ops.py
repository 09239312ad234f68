"""The steps of a hyper-connection as torch operators `torch.ops.mhc.*`, opaque to torch.compile.

Each stays one node in forward and backward graphs, where a backend can find, fuse or recompute it.
Streams are `x: [..., n, C]` with any leading dimensions, T tokens in all; results `h`, `y` and
gradients have the dtype of their counterparts, gates are float32 (float64 for float64 streams).
`rule` is a `Convention.key()`. Operators check no arguments; `mhc_compile.runtime.streams` does.

Gradients are computed by the `*_backward` operators, which take None for a gradient that is zero,
and cannot be differentiated again: for second derivatives use `mhc_compile.reference`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mhc_compile._torch_compat import OpOverload, below_autograd, introduce_to_inductor
from mhc_compile.runtime import fused, op_shapes
from mhc_compile.runtime.high_priority import launch
from mhc_compile.runtime.precision import autocast_off_now

_STREAMS = "Tensor x, Tensor f, Tensor post, Tensor res"
_PROJECTION = "Tensor phi, Tensor alpha, Tensor bias"
_NORM = "Tensor? weight, Tensor? shift"
_GATES = "Tensor pre, Tensor post, Tensor res, Tensor proj, Tensor square"
_G_GATES = "Tensor? g_pre, Tensor? g_post, Tensor? g_res"
_G_PROJECTION = "Tensor g_phi, Tensor g_alpha, Tensor g_bias"

SCHEMAS = {
    "coefficients": f"(Tensor x, {_PROJECTION}, str rule) -> ({_GATES})",
    "coefficients_backward": f"({_G_GATES}, Tensor x, {_PROJECTION}, Tensor proj, Tensor square, "
    f"str rule, bool need_phi=True) -> (Tensor g_x, {_G_PROJECTION})",
    "maps": "(Tensor proj, Tensor square, Tensor alpha, Tensor bias, SymInt width, str rule) -> "
    "(Tensor pre, Tensor post, Tensor res)",
    "maps_backward": f"({_G_GATES}, Tensor proj, Tensor square, Tensor alpha, Tensor bias, "
    "SymInt width, str rule) -> (Tensor g_proj, Tensor g_square, Tensor g_alpha, Tensor g_bias)",
    "pre": "(Tensor x, Tensor pre) -> Tensor",
    "pre_backward": "(Tensor g_h, Tensor x, Tensor pre) -> (Tensor g_x, Tensor g_pre)",
    "pre_norm": f"(Tensor x, Tensor pre, {_NORM}, str norm, float norm_eps) -> Tensor",
    "post_res": f"({_STREAMS}) -> Tensor",
    "post_res_backward": f"(Tensor g_y, {_STREAMS}) -> "
    "(Tensor g_x, Tensor g_f, Tensor g_post, Tensor g_res)",
    "read": f"(Tensor x, {_PROJECTION}, str rule) -> (Tensor h, {_GATES})",
    "read_backward": f"(Tensor? g_h, {_G_GATES}, Tensor x, {_PROJECTION}, Tensor pre, "
    f"Tensor proj, Tensor square, str rule, bool need_phi=True) -> (Tensor g_x, {_G_PROJECTION})",
    "seam": f"({_STREAMS}, {_PROJECTION}, {_NORM}, str norm, float norm_eps, str rule) -> "
    "(Tensor y, Tensor h, Tensor pre_next, Tensor post_next, Tensor res_next, Tensor proj, "
    "Tensor square)",
    "seam_backward": f"(Tensor? g_y, Tensor? g_h, {_G_GATES}, {_STREAMS}, Tensor y, "
    f"{_PROJECTION}, {_NORM}, Tensor pre_next, Tensor proj, Tensor square, str norm, "
    "float norm_eps, str rule, bool need_phi=True, bool need_h=False) -> (Tensor g_x, Tensor g_f, "
    f"Tensor grad_post, Tensor grad_res, {_G_PROJECTION}, Tensor g_weight, Tensor g_shift, "
    "Tensor h)",
    "expand": "(Tensor x, SymInt n) -> Tensor",
    "expand_backward": "(Tensor g_y) -> Tensor",
    "collapse": "(Tensor x, Tensor weight) -> Tensor",
    "collapse_backward": "(Tensor g_h, Tensor? x, Tensor weight) -> (Tensor g_x, Tensor g_weight)",
}
"""The operators by name. Each is implemented in `fused`, and for CUDA in `codegen.launch`.

`maps` and `maps_backward` are the part of `coefficients` between the products and the maps, for
graphs in which the rest was written out (`mhc_compile.backend.formulas`). `pre_norm` is the h of a
seam again, for backward graphs; `seam_backward` makes it, too, where it is asked to.
"""
_TORCH_ONLY = ("maps", "maps_backward")
_STREAMS_AT = {
    name: [part.split()[-1] for part in schema[1:].split(")")[0].split(", ")].index("x")
    for name, schema in SCHEMAS.items()
    if name not in (*_TORCH_ONLY, "expand", "expand_backward")
}
"""Where the streams `[..., n, C]` stand among an operator's arguments."""


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """The module that launches generated kernels, None where it or what it needs is missing."""
    try:
        return importlib.import_module("mhc_compile.codegen.launch")
    except ImportError as error:
        warnings.warn(
            f"mhc_compile runs without its kernels, by torch operations: {error}; install what is "
            "missing (triton, jinja2, platformdirs) to use them",
            stacklevel=2,
        )
        return None


def _run(name: str, *args: Any) -> Any:
    """Runs an operator: by generated kernels on the devices they support, else by torch.

    This is the only place where the two are chosen between.
    """
    first: Tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with autocast_off_now(first), below_autograd():
        if first.is_cuda and name not in _TORCH_ONLY:
            kernels = _kernels()
            place = _STREAMS_AT.get(name)
            streams = None if place is None else args[place]
            if kernels is not None and kernels.supports(first, streams):
                with _device_of(first):
                    return launch(getattr(kernels, name), *args)
        return launch(getattr(fused, name), *args)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, but a model may lie on another, or on several."""
    here = tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)


@lru_cache(maxsize=1)
def _operators() -> list[OpOverload]:
    return [getattr(torch.ops.mhc, name).default for name in SCHEMAS]


def _shapes(name: str, *args: Any) -> Any:
    """The shapes of an operator's results, for tracing, which comes before Inductor."""
    introduce_to_inductor(_operators())
    return getattr(op_shapes, name)(*args)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _keep_coefficients(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.rule = inputs
    _, _, _, proj, square = output
    ctx.mark_non_differentiable(proj, square)
    _keep(ctx, *tensors, proj, square)


def _coefficients_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need_phi = ctx.needs_input_grad[1]
    back = torch.ops.mhc.coefficients_backward(*grads[:3], *ctx.saved_tensors, ctx.rule, need_phi)
    return _needed(ctx, *back, None)


def _keep_maps(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.width, ctx.rule = inputs
    _keep(ctx, *tensors)


def _maps_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    back = torch.ops.mhc.maps_backward(*grads, *ctx.saved_tensors, ctx.width, ctx.rule)
    return _needed(ctx, *back, None, None)


def _keep_pre(ctx: Any, inputs: Any, output: Any) -> None:
    _keep(ctx, *inputs)


def _pre_backward(ctx: Any, g_h: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_h is None:
        return None, None
    return _needed(ctx, *torch.ops.mhc.pre_backward(g_h, *ctx.saved_tensors))


def _post_res_backward(ctx: Any, g_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_y is None:
        return None, None, None, None
    return _needed(ctx, *torch.ops.mhc.post_res_backward(g_y, *ctx.saved_tensors))


def _keep_read(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.rule = inputs
    _, pre, _, _, proj, square = output
    ctx.mark_non_differentiable(proj, square)
    _keep(ctx, *tensors, pre, proj, square)


def _read_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need_phi = ctx.needs_input_grad[1]
    back = torch.ops.mhc.read_backward(*grads[:4], *ctx.saved_tensors, ctx.rule, need_phi)
    return _needed(ctx, *back, None)


def _keep_seam(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, norm, norm_eps, rule = inputs
    ctx.norm = (norm, norm_eps, rule)
    y, _, pre, _, _, proj, square = output
    ctx.mark_non_differentiable(proj, square)
    _keep(ctx, *tensors[:4], y, *tensors[4:], pre, proj, square)


def _seam_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need_phi = ctx.needs_input_grad[4]
    back = torch.ops.mhc.seam_backward(*grads[:5], *ctx.saved_tensors, *ctx.norm, need_phi)
    # Gradients of an affine part that h does not depend on come back empty.
    *most, g_weight, g_shift, _ = back
    used = grads[1] is not None and ctx.norm[0] != "none"
    affine = (g_weight, g_shift) if used else (None, None)
    return _needed(ctx, *most, *affine, None, None, None)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)


def _expand_backward(ctx: Any, g_y: Tensor | None) -> tuple[Tensor | None, None]:
    return (None if g_y is None else torch.ops.mhc.expand_backward(g_y)), None


def _keep_collapse(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight = inputs
    _keep(ctx, x if ctx.needs_input_grad[1] else None, weight)


def _collapse_backward(ctx: Any, g_h: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_h is None:
        return None, None
    return _needed(ctx, *torch.ops.mhc.collapse_backward(g_h, *ctx.saved_tensors))


def _needed(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Drops gradients that nobody needs."""
    pairs = zip(grads, ctx.needs_input_grad, strict=True)
    return tuple(grad if need else None for grad, need in pairs)


def _refuse(name: str, ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        f"mhc::{name} has no gradient of its own: hyper-connections are differentiable once; "
        "for second derivatives compose mhc_compile.reference, or the model before transform"
    )


_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "coefficients": (_coefficients_backward, _keep_coefficients),
    "maps": (_maps_backward, _keep_maps),
    "pre": (_pre_backward, _keep_pre),
    "post_res": (_post_res_backward, _keep_pre),
    "read": (_read_backward, _keep_read),
    "seam": (_seam_backward, _keep_seam),
    "expand": (_expand_backward, _keep_nothing),
    "collapse": (_collapse_backward, _keep_collapse),
}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        qualified = f"mhc::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", partial(_run, name))
        torch.library.register_fake(qualified, partial(_shapes, name))
        refuse = (partial(_refuse, name), _keep_nothing)
        backward, setup = _GRADIENTS.get(name, refuse)
        torch.library.register_autograd(qualified, backward, setup_context=setup)


_register()
