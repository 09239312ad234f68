"""Two stacks of transformer blocks to time: a dense one, and a mixture of experts.

Blocks and a last norm alone, without embedding and head, whose cost would make that of the
connections look smaller in a stack of few blocks. "dense" is a Llama block. "moe" is a block as in
DeepSeek-V3 with the sizes that arXiv 2512.24880 states of its model of 27 billion parameters (C =
2560, 72 routed experts of which 6 are active, 2 shared ones, latent attention); what it does not
state is chosen so that 30 such blocks have 27 billion parameters: 32 heads, ranks 1536 and 512,
experts of 1536.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        kind: "dense" or "moe".
        channels: C.
        blocks: of two sublayers each.
        length: tokens of a sequence.
        batch: sequences.
        heads: of the attention.
        head: channels of a head.
        inner: hidden channels of the MLP, or of an expert.
        experts: routed experts.
        active: how many of them a token goes to.
        shared: experts of every token.
        query_rank: rank of the latent queries.
        latent: rank of the latent keys and values.
        rotary: channels of a head with positions, beside `head` without.
        routing: "balanced", by a table drawn once, so that each version does the same work, or
            "learned", by the router's scores.
    """

    kind: str
    channels: int
    blocks: int
    length: int
    batch: int
    heads: int
    head: int
    inner: int
    experts: int = 72
    active: int = 6
    shared: int = 2
    query_rank: int = 1536
    latent: int = 512
    rotary: int = 64
    routing: str = "balanced"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


def make_shape(kind: str, channels: int, blocks: int, length: int, batch: int) -> Shape:
    """The sizes of a kind of model that follow from its channels."""
    head = 128 if channels >= 256 else 16
    if kind == "dense":
        inner = -(-8 * channels // (3 * 256)) * 256  # 8/3 C, as Llama rounds it
        return Shape(kind, channels, blocks, length, batch, max(1, channels // head), head, inner)
    shape = Shape(kind, channels, blocks, length, batch, 32, head, 1536)
    return shape if channels >= 1024 else small(shape, channels)


def small(shape: Shape, channels: int = 256) -> Shape:
    """The same kind of model, small enough to be computed in float64."""
    return replace(
        shape, channels=channels, heads=2, inner=2 * channels, experts=min(8, shape.experts),
        active=min(2, shape.active), query_rank=channels // 2, latent=channels // 4, rotary=16,
    )  # fmt: skip


class Rotation(nn.Module):
    """Rotary positions of `[B, heads, S, channels]`, first half of the channels with the second."""

    def __init__(self, length: int, channels: int) -> None:
        super().__init__()
        rates = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turns pairs of channels by the position."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.heads * shape.head
        self.qkv = nn.Linear(shape.channels, 3 * width, bias=False)
        self.out = nn.Linear(width, shape.channels, bias=False)
        self.rotation = Rotation(shape.length, shape.head)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, S, C]` to the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotation(q), self.rotation(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class LatentAttention(nn.Module):
    """Causal multi-head latent attention, as in DeepSeek-V2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, c, heads = shape, shape.channels, shape.heads
        self.q_down = nn.Linear(c, shape.query_rank, bias=False)
        self.q_norm = nn.RMSNorm(shape.query_rank, eps=EPS)
        self.q_up = nn.Linear(shape.query_rank, heads * (shape.head + shape.rotary), bias=False)
        self.kv_down = nn.Linear(c, shape.latent + shape.rotary, bias=False)
        self.kv_norm = nn.RMSNorm(shape.latent, eps=EPS)
        self.kv_up = nn.Linear(shape.latent, heads * 2 * shape.head, bias=False)
        self.out = nn.Linear(heads * shape.head, c, bias=False)
        self.rotation = Rotation(shape.length, shape.rotary)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, S, C]` to the same."""
        s = self.shape
        batch, length, _ = x.shape
        q = self.q_up(self.q_norm(self.q_down(x))).view(batch, length, s.heads, -1).transpose(1, 2)
        q, q_turned = q.split([s.head, s.rotary], -1)
        latent, k_turned = self.kv_down(x).split([s.latent, s.rotary], -1)
        kv = self.kv_up(self.kv_norm(latent)).view(batch, length, s.heads, -1).transpose(1, 2)
        k, v = kv.chunk(2, -1)
        k_turned = self.rotation(k_turned.unsqueeze(1)).expand(-1, s.heads, -1, -1)
        q = torch.cat([q, self.rotation(q_turned)], -1)
        k = torch.cat([k, k_turned], -1)
        # Flash attention takes one size of head: the values get zeros, which are cut off again.
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, s.rotary)), is_causal=True)
        y = y[..., : s.head].transpose(1, 2).reshape(batch, length, -1)
        return self.out(y)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * inner, bias=False)
        self.down = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., C]` to the same."""
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Permute(torch.autograd.Function):
    """Rows in another order; autograd cannot know that no row comes twice, and would add."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # noqa: D102
        return x[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: D102
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows `x: [R, C]` by the weight `[E, F, C]` of their expert, whose rows end at `ends: [E]`."""
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # Every expert on every row: for the small models of checks.
    rows = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(ends, rows, right=True)
    return (x @ weight.transpose(1, 2))[expert, rows]


class Experts(nn.Module):
    """Routed experts, without dropped tokens, and shared ones; no size depends on the routing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.active, self.learned = shape.active, shape.routing == "learned"
        self.router = nn.Linear(shape.channels, shape.experts, bias=False)
        self.shared = MLP(shape.channels, shape.shared * shape.inner)
        c, inner = shape.channels, shape.inner
        self.up = nn.Parameter(torch.empty(shape.experts, 2 * inner, c).normal_(0, c**-0.5))
        self.down = nn.Parameter(torch.empty(shape.experts, c, inner).normal_(0, inner**-0.5))
        drawn = torch.rand(shape.tokens, shape.experts, dtype=torch.float32)
        self.register_buffer("table", drawn.topk(shape.active).indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, S, C]` to the same."""
        flat = x.flatten(0, 1)
        return self.shared(x) + self.routed(flat).view(x.shape)

    def routed(self, x: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, `[T, C]`."""
        scores = self.router(x).float().sigmoid()
        choice = scores.topk(self.active).indices if self.learned else self.table[: x.shape[0]]
        weights = scores.gather(1, choice)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        experts, order = choice.flatten().sort(stable=True)
        inverse = order.argsort()
        each = torch.arange(self.up.shape[0], device=x.device)
        ends = torch.searchsorted(experts, each, right=True).to(torch.int32)
        rows = Permute.apply(x.repeat_interleave(self.active, 0), order, inverse)
        gate, value = grouped_product(rows, self.up, ends).chunk(2, -1)
        rows = grouped_product(F.silu(gate) * value, self.down, ends)
        rows = Permute.apply(rows, inverse, order).view(x.shape[0], self.active, -1)
        return (rows * weights.unsqueeze(-1)).sum(1)


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c, dense = shape.channels, shape.kind == "dense"
        self.norm_1, self.norm_2 = nn.RMSNorm(c, eps=EPS), nn.RMSNorm(c, eps=EPS)
        self.attention = Attention(shape) if dense else LatentAttention(shape)
        self.mlp = MLP(c, shape.inner) if dense else Experts(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, S, C]` to the same."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class WithLoss(nn.Module):
    """A stack of blocks and its loss, so that both are compiled."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean square error against `target`, both `[B, S, C]`."""
        return F.mse_loss(self.blocks(x), target)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    """New parameters have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> nn.Sequential:
    """The plain model, made on the device: a CPU takes minutes for the large ones."""
    with torch.device(device), default_dtype(dtype):
        blocks = [Block(shape) for _ in range(shape.blocks)]
        return nn.Sequential(*blocks, nn.RMSNorm(shape.channels, eps=EPS))


def step_flops(shape: Shape, model: nn.Module) -> float:
    """Floating-point operations of products in a plain forward and backward, causal attention."""
    count = 0.0
    for parameter in model.parameters():
        if parameter.dim() == 3:  # of each expert
            count += parameter.numel() * shape.active / shape.experts
        elif parameter.dim() == 2:
            count += parameter.numel()
    width = 2 * shape.heads * (shape.head + shape.rotary * (shape.kind == "moe") / 2)
    attention = shape.blocks * width * shape.length / 2  # half of the scores are masked
    return 6.0 * shape.tokens * (count + attention)
