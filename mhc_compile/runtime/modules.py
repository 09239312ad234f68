"""The modules that a rewritten model holds: `HyperConnection` and `StreamCollapse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, MHCError
from mhc_compile.runtime import reference, streams

RES_DIAGONAL = 0.98
"""Weight with which each stream keeps itself at the start: near the identity, yet not saturated."""

MARK = "_mhc_streams"
"""Attribute of tensors that hold n streams between two blocks."""


class ConnectionState(NamedTuple):
    """What `pre` hands to `post`: `post: [..., n]` and `res: [..., n, n]`, float32."""

    post: Tensor
    res: Tensor


class _Connection(nn.Module):
    """What the modules with mHC parameters have in common."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Keeps the values when a state dict of the original model, without these, is loaded."""
        if any(prefix + name in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Keeps float32 where a model is cast to a narrower dtype, `model.to(torch.bfloat16)`.

        Coefficients are computed in float32, and steps of an optimizer on a bias of 5 are lost in
        bfloat16. A model that is cast after `transform` is so the same as one cast before it.
        """

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            narrower = out.is_floating_point() and out.element_size() < tensor.element_size()
            return tensor.to(out.device) if narrower else out

        return super()._apply(keep, recurse)


class HyperConnection(_Connection):
    """The connection around one sublayer F, Eq. (3) and (14)-(19) of arXiv 2512.24880.

    `h, state = pre(x)`, then `x' = post(x, F(h), state)` with `x'_i = sum_j res_ij x_j + post_i F`.
    Coefficients are float32 whatever the streams' dtype. With one stream it is the plain residual
    and has no parameters.

    Args:
        channels: C, the width of one stream.
        config: the design; None is the default.
        index: position of the sublayer in its stream. The largest initial pre gate is that of
            stream `index % n`, so that neighbouring sublayers prefer different streams.
        device: where the parameters live.

    Attributes:
        phi: `[n*C, n*n + 2n]` float32, columns pre, post, res ("hc": `[C, n + 2]`).
        alpha: `[3]` float32, the gates of pre, post and res.
        bias: `[n*n + 2n]` float32.

    Raises:
        ConfigError: channels or index is not a sensible integer.

    Example:
        >>> connection = HyperConnection(8, MHCConfig(streams=2))
        >>> x = streams.expand_streams(torch.randn(5, 8), 2)
        >>> h, state = connection.pre(x)
        >>> connection.post(x, torch.tanh(h), state).shape
        torch.Size([5, 2, 8])
    """

    def __init__(
        self,
        channels: int,
        config: MHCConfig | None = None,
        *,
        index: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("index", index, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.config = config = config or MHCConfig()
        self.channels, self.index, self.streams = channels, index, config.streams
        self._rule = config.rule
        self._key = self._rule.key()
        n = config.streams
        if n == 1:
            return
        rows, columns = (
            (n * channels, n * n + 2 * n) if config.connection == "mhc" else (channels, n + 2)
        )
        self.phi = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32, device=device))
        self.alpha = nn.Parameter(torch.empty(3, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the start that `config.init` names.

        "preserve": alpha = 0 with random phi and pre gates that are unequal and sum to 1. The
        function is that of the original model, but the streams get unequal gradients, so they
        part at the first step; equal gates would keep them equal for ever.
        """
        if self.streams == 1:
            return
        self.phi.normal_(0, self.phi.shape[0] ** -0.5)
        self.alpha.fill_(0.0 if self.config.init == "preserve" else self.config.alpha_init)
        self.bias.copy_(self._initial_bias())

    def _initial_bias(self) -> Tensor:
        n, rule = self.streams, self._rule
        gates = torch.roll(unequal_weights(n), self.index % n)
        if self.config.connection == "hc":
            return torch.cat([gates, torch.ones(n), torch.eye(n).flatten()])
        diagonal = torch.logit(torch.tensor(RES_DIAGONAL)) + torch.tensor(float(n - 1)).log()
        pre = _gate_bias(gates, rule.pre_eps)
        post = torch.logit(
            torch.tensor([1 / rule.post_multiplier], dtype=torch.float64).clamp(max=0.99)
        )
        return torch.cat([pre, post.float().expand(n), (diagonal * torch.eye(n)).flatten()])

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `pre: [..., n]`, `post: [..., n]` and `res: [..., n, n]` of the streams x."""
        if self.config.connection == "hc":
            return reference.hc_coefficients(
                x, self.phi, self.alpha, self.bias, n=self.streams, eps=self._rule.norm_eps
            )
        return streams.coefficients(x, self.phi, self.alpha, self.bias, self._key)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(h, post, res)`; `pre` is the same with the last two as a `ConnectionState`."""
        if x.dim() < 2 or x.shape[-2] != self.streams or x.shape[-1] != self.channels:
            raise MHCError(
                f"HyperConnection takes streams of shape [..., {self.streams}, {self.channels}], "
                f"got {list(x.shape)}; expand a plain tensor with expand_streams(x, {self.streams})"
            )
        if self.streams == 1:
            ones = x.new_ones(x.shape[:-1], dtype=torch.float32)
            return x.squeeze(-2), ones, ones.unsqueeze(-1)
        if self.config.connection == "hc":
            pre, post, res = self.coefficients(x)
            return streams.apply_pre(x, pre), post, res
        h, _, post, res = streams.read_streams(x, self.phi, self.alpha, self.bias, self._key)
        return h, post, res

    def pre(self, x: Tensor) -> tuple[Tensor, ConnectionState]:
        """Reads the sublayer's input from the streams: `h = sum_i pre_i x_i`.

        Args:
            x: `[..., n, C]`.

        Returns:
            `h: [..., C]` in x's dtype, and the state for `post`.
        """
        h, post, res = self(x)
        return h, ConnectionState(post, res)

    def post(self, x: Tensor, f: Tensor, state: ConnectionState) -> Tensor:
        """Mixes the streams and adds the sublayer's output.

        Args:
            x: `[..., n, C]`, the streams that `pre` read.
            f: `[..., C]`, the sublayer's output.
            state: from `pre`.

        Returns:
            `[..., n, C]` in x's dtype.
        """
        if self.streams == 1:
            return x + f.unsqueeze(-2)
        return streams.apply_post_res(x, f, state.post, state.res)

    def extra_repr(self) -> str:
        """Shows what the parameters' shapes do not."""
        c = self.config
        return f"channels={self.channels}, streams={c.streams}, {c.connection!r}, {c.convention!r}"


class StreamCollapse(_Connection):
    """Joins the n streams into one tensor after the last sublayer.

    "learned" and "head" start from unequal weights that sum to 1: with equal ones the last H_res,
    whose columns sum to 1, would have a gradient of exactly zero. Weights are float32 whatever the
    streams' dtype. With one stream it hands that on and has no parameters.

    Args:
        config: the design; its `collapse`, `streams` and, for "head", `init`, `norm_eps`,
            `pre_eps` and `alpha_init` are used.
        channels: C, the width of one stream; needed by "head" alone.
        device: where the parameters live.

    Attributes:
        weight: `[n]` float32, of "learned" alone.
        phi: `[n*C, n]` float32, of "head" alone, as are the next two.
        alpha: `[1]` float32, the gate.
        bias: `[n]` float32.

    Raises:
        ConfigError: "head" without channels.

    Example:
        >>> StreamCollapse(MHCConfig(streams=2))(torch.ones(3, 2, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        config: MHCConfig,
        channels: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.config, n = config.collapse, config, config.streams
        self._rule = config.rule
        self.scale = 1 / n if config.init == "preserve" and self.mode == "sum" else 1.0
        if n == 1:
            return
        if self.mode == "learned":
            self.weight = nn.Parameter(torch.empty(n, dtype=torch.float32, device=device))
        elif self.mode == "head":
            if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
                raise ConfigError(
                    f"collapse='head' needs channels, an integer of at least 1, got {channels!r}"
                )
            phi = torch.empty(n * channels, n, dtype=torch.float32, device=device)
            self.phi = nn.Parameter(phi)
            self.alpha = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
            self.bias = nn.Parameter(torch.empty(n, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the start: weights that do not depend on the streams, except "head" with "paper"."""
        if self.streams == 1:
            return
        weights = unequal_weights(self.streams)
        if self.mode == "learned":
            self.weight.copy_(weights)
        elif self.mode == "head":
            self.phi.normal_(0, self.phi.shape[0] ** -0.5)
            self.alpha.fill_(0.0 if self.config.init == "preserve" else self.config.alpha_init)
            self.bias.copy_(_gate_bias(weights, self._rule.pre_eps))

    @property
    def streams(self) -> int:
        """The number of streams, n."""
        return self.config.streams

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x: [..., n, C]` to `[..., C]` in x's dtype."""
        if self.streams == 1:
            return x.squeeze(-2)
        if self.mode == "learned":
            return streams.collapse_streams(x, self.weight)
        if self.mode == "head":
            rule = self._rule
            weights = reference.head_weights(
                x, self.phi, self.alpha, self.bias,
                eps=rule.norm_eps, pre_eps=rule.pre_eps, place=rule.norm_eps_place,
            )  # fmt: skip
            return streams.collapse_streams(x, weights)
        return streams.collapse_streams(x, mode=self.mode) * self.scale

    def extra_repr(self) -> str:
        """Shows what the parameters' shapes do not."""
        return f"streams={self.streams}, {self.mode!r}"


def unequal_weights(n: int) -> Tensor:
    """Weights of n streams, `[n]` float32, that sum to 1 and fall by a factor of exp(-1/2)."""
    return torch.softmax(-0.5 * torch.arange(n, dtype=torch.float64), 0).float()


def _gate_bias(gates: Tensor, pre_eps: float) -> Tensor:
    """The biases, float32, for which `reference.pre_gate` gives these gates."""
    return torch.logit((gates.double() - pre_eps).clamp(1e-9, 1 - 1e-9)).float()
