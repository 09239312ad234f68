"""A hyper-connection by several libraries, each behind the same two calls.

An implementation reads (streams to maps and h) and mixes (streams, f and maps to streams), with
tensors and parameters in its own layout, so that nothing is converted while it is timed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile import reference
from mhc_compile.conventions import CONVENTIONS

Maps = tuple[Tensor, Any]
"""h, and whatever `mix` needs of the maps."""
EPS = 1e-6


class NotInstalledError(Exception):
    """The library is not there; the message says which import failed."""


@dataclass
class Peer:
    """One implementation.

    Attributes:
        convention: whose function it computes, a key of `CONVENTIONS`.
        read: `(x, parameters) -> (h, maps)`.
        mix: `(x, f, maps) -> x'`.
        own: phi `[nC, K]`, alpha `[3]` and bias `[K]` as its own leaves.
        back: those leaves, or their gradients, as phi, alpha and bias.
        to_own: streams `[T, n, C]` in its layout.
        to_ours: and back.
        seam: `mix`, then `read` of its result, where that is one step.
        single: f or h, `[T, C]`, in its layout.
    """

    convention: str
    read: Callable[[Tensor, list[Tensor]], Maps]
    mix: Callable[[Tensor, Tensor, Any], Tensor]
    own: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    back: Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor]]
    to_own: Callable[[Tensor], Tensor] = lambda x: x
    to_ours: Callable[[Tensor], Tensor] = lambda x: x
    seam: Callable[[Tensor, Tensor, Any, list[Tensor]], tuple[Tensor, Tensor, Any]] | None = None
    single: Callable[[Tensor], Tensor] = lambda h: h


def _same(*values: Tensor) -> list[Tensor]:
    return list(values)


def these_kernels(norm: str = "none") -> Peer:
    """The operators of this library; with norm="rms" a weight of ones is the fourth parameter."""
    from mhc_compile.runtime import ops  # noqa: F401  # registers torch.ops.mhc

    rule, op = CONVENTIONS["paper"].key(), torch.ops.mhc

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        h, _, post, res, _, _ = op.read(x, *p[:3], rule)
        return h, (post, res)

    def seam(x: Tensor, f: Tensor, maps: Any, p: list[Tensor]) -> tuple[Tensor, Tensor, Any]:
        weight = p[3] if norm != "none" else None
        y, h, _, post, res, _, _ = op.seam(x, f, *maps, *p[:3], weight, None, norm, EPS, rule)
        return y, h, (post, res)

    def own(phi: Tensor, alpha: Tensor, bias: Tensor) -> list[Tensor]:
        weight = torch.ones(phi.shape[0] // _streams(phi), device=phi.device)
        return [phi, alpha, bias] + [weight] * (norm != "none")

    return Peer("paper", read, lambda x, f, maps: op.post_res(x, f, *maps), own,
                lambda p: (p[0], p[1], p[2]), seam=seam)  # fmt: skip


def by_reference(compiled: bool = True) -> Peer:
    """The paper's formulae in torch, under torch.compile."""

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        pre, post, res = reference.coefficients(x, *p, n=x.shape[-2])
        return reference.apply_pre(x, pre), (post, res)

    def mix(x: Tensor, f: Tensor, maps: Any) -> Tensor:
        return reference.apply_post_res(x, f, *maps)

    wrap: Any = torch.compile if compiled else lambda function: function
    return Peer("paper", wrap(read), wrap(mix), _same, lambda p: (p[0], p[1], p[2]))


def by_torch() -> Peer:
    """The paper's formulae as one writes them for Inductor, with phi in the streams' dtype.

    Without matrix products but the projection's: the others would be products in float32 by cuBLAS.
    """

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        (phi, alpha, bias), n, flat = p, x.shape[-2], x.flatten(-2)
        inverse = (flat.float().square().mean(-1, keepdim=True) + 1e-20).rsqrt()
        projected = (flat @ phi.to(x.dtype)).float() * inverse
        pre, post, res = (
            a * part + b for a, part, b in
            zip(alpha, projected.split([n, n, n * n], -1), bias.split([n, n, n * n]), strict=True)
        )  # fmt: skip
        matrix = res.unflatten(-1, (n, n)).exp()
        for _ in range(20):
            matrix = matrix / matrix.sum(-2, keepdim=True)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        h = (pre.sigmoid().unsqueeze(-1) * x.float()).sum(-2)
        return h.to(x.dtype), (2 * post.sigmoid(), matrix)

    def mix(x: Tensor, f: Tensor, maps: Any) -> Tensor:
        post, res = maps
        mixed = (res.unsqueeze(-1) * x.float().unsqueeze(-3)).sum(-2)
        return (mixed + post.unsqueeze(-1) * f.float().unsqueeze(-2)).to(x.dtype)

    wrap: Any = torch.compile
    return Peer("paper", wrap(read), wrap(mix), _same, lambda p: (p[0], p[1], p[2]))


def transformers_v4(compiled: bool) -> Peer:
    """DeepSeek-V4's connections in transformers; maps are rounded to the streams' dtype to mix."""
    try:
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    modules: dict[tuple[int, int], Any] = {}

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        n, channels = x.shape[-2:]
        if (n, channels) not in modules:
            config = types.SimpleNamespace(
                hc_mult=n, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6,
                hidden_size=channels,
            )  # fmt: skip
            modules[n, channels] = DeepseekV4HyperConnection(config).to("meta")
        named = dict(zip(("fn", "scale", "base"), p, strict=True))
        post, comb, h = torch.func.functional_call(modules[n, channels], named, (x.unsqueeze(0),))
        return h.squeeze(0), (post.squeeze(0), comb.squeeze(0))

    def mix(x: Tensor, f: Tensor, maps: Any) -> Tensor:
        post, comb = (m.to(x.dtype) for m in maps)
        return post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)

    wrap: Any = torch.compile if compiled else lambda function: function
    return Peer(
        "deepseek_v4", wrap(read), wrap(mix), lambda phi, a, b: [phi.t().contiguous(), a, b],
        lambda p: (p[0].t(), p[1], p[2]),
    )  # fmt: skip


def liger() -> Peer:
    """Liger's Triton kernels, with phi in the streams' dtype."""
    try:
        from liger_kernel.transformers.functional import (
            liger_mhc_coeffs,
            liger_mhc_post_res,
            liger_mhc_pre,
        )
    except ImportError as error:
        raise NotInstalledError(str(error)) from error

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        phi, bias, *alpha = p
        pre, post, res = liger_mhc_coeffs(x, phi, bias, *alpha)
        return liger_mhc_pre(x, pre), (post, res)

    return Peer(
        "liger", read, lambda x, f, maps: liger_mhc_post_res(x, f, *maps),
        lambda phi, alpha, bias: [phi.bfloat16(), bias, *(a.clone() for a in alpha)],
        lambda p: (p[0], torch.stack(list(p[2:])), p[1]),
    )  # fmt: skip


def tile_kernels() -> Peer:
    """DeepSeek's TileLang kernels for n = 4, with streams as `[b, s, n, C]`."""
    try:
        from tile_kernels.modeling.mhc.functional import mhc_post, mhc_pre
    except (ImportError, OSError) as error:
        raise NotInstalledError(str(error)) from error

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        return mhc_pre(x, *p)

    def mix(x: Tensor, f: Tensor, maps: Any) -> Tensor:
        return mhc_post(f, x, *maps)

    return Peer(
        "tilekernels", read, mix, lambda phi, a, b: [phi.t().contiguous(), a, b],
        lambda p: (p[0].t(), p[1], p[2]), lambda x: x.unsqueeze(0), lambda x: x.squeeze(0),
        single=lambda f: f.unsqueeze(0),
    )  # fmt: skip


def transformer_engine(best: bool) -> Peer:
    """TransformerEngine's Triton kernels for n = 4, with streams as `[s, b, C, n]`.

    `best`: with a norm weight (of ones), whose backward needs no copy of x in float32, and one
    buffer for the streams' gradients.
    """
    te = _transformer_engine()
    arguments = inspect.signature(te.mhc_fused_expand_combine).parameters

    def read(x: Tensor, p: list[Tensor]) -> Maps:
        phi, alpha, bias, *weight = p
        h, post, res = te.mhc_generate_mix_and_aggregate(x, phi, alpha, bias, *weight)
        return h, (post, res)

    def mix(x: Tensor, f: Tensor, maps: Any) -> Tensor:
        more = {"n": 4} if "n" in arguments else {}
        if best and "fuse_grad_x_acc" in arguments:
            more["fuse_grad_x_acc"] = True
        post, res = maps
        return te.mhc_fused_expand_combine(f, None, post, x, res, **more)

    def own(phi: Tensor, alpha: Tensor, bias: Tensor) -> list[Tensor]:
        rows = phi.view(4, -1, 24).permute(2, 1, 0).reshape(24, -1).contiguous()
        weight = [torch.ones(rows.shape[1], device=phi.device)] * best
        return [rows, alpha, bias.view(1, -1), *weight]

    def back(p: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return p[0].view(24, -1, 4).permute(2, 1, 0).reshape(-1, 24), p[1], p[2].view(-1)

    return Peer(
        "transformer_engine", read, mix, own, back, lambda x: x.mT.contiguous().unsqueeze(1),
        lambda x: x.squeeze(1).mT, single=lambda f: f.unsqueeze(1),
    )  # fmt: skip


def _transformer_engine() -> Any:
    """Its module `mhc`: as installed, else from the wheel's Python files alone."""
    name = "transformer_engine.pytorch.triton.mhc"
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AssertionError):
        pass
    for loaded in [m for m in sys.modules if m.split(".")[0] == "transformer_engine"]:
        del sys.modules[loaded]
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError("No module named 'transformer_engine'")
    root = Path(next(iter(spec.submodule_search_locations)))
    # Empty packages in the place of those that load native libraries when they are imported.
    for package in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton",
                    ".pytorch.cpp_extensions"):  # fmt: skip
        module = types.ModuleType(f"transformer_engine{package}")
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        # Other libraries ask for it when they look for what is installed.
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        sys.modules[module.__name__] = module
    gemm: Any = types.ModuleType("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.general_gemm = _general_gemm
    sys.modules[gemm.__name__] = gemm
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise NotInstalledError(str(error)) from error


def _general_gemm(a: Tensor, b: Tensor, out_dtype: Any = None, layout: str = "NT", **_: Any) -> Any:
    """What `mhc` asks of TransformerEngine's matrix product: b^T a, by cuBLAS in torch."""
    assert layout == "NT"
    return ((b.t() @ a).to(out_dtype or a.dtype),)


def _streams(phi: Tensor) -> int:
    columns = phi.shape[1]
    return next(n for n in range(1, 65) if n * (n + 2) == columns)


PEERS: dict[str, Callable[[], Peer]] = {
    "these kernels": these_kernels,
    "these kernels, with RMSNorm": lambda: these_kernels("rms"),
    "TransformerEngine": lambda: transformer_engine(best=False),
    "TransformerEngine, norm weight and one buffer": lambda: transformer_engine(best=True),
    "transformers, DeepSeek-V4, eager": lambda: transformers_v4(compiled=False),
    "transformers, DeepSeek-V4, torch.compile": lambda: transformers_v4(compiled=True),
    "reference, torch.compile": by_reference,
    "formulae, bf16 phi, torch.compile": by_torch,
    "TileKernels": tile_kernels,
    "Liger, bf16 phi": liger,
}
