"""Random transformer-like modules whose residual adds are known by construction.

`build(spec)` makes the model of a `Spec`. Lines that add a sublayer's output to the
residual stream end in `# site`; nothing else in this file is a site, however much it looks like
one. What mHC makes of a spec is written down once more, on n streams, in `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from specs import STATES, all_sites
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, HEADS, HEAD, LONGEST = 13, 2, 4, 16


# --- norms and sublayers --------------------------------------------------------------------------


class OwnRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * x.to(dtype)


class ChannelsFirst(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def make_norm(kind, width, layout):
    norm = {
        "layer": nn.LayerNorm, "rms": lambda w: nn.RMSNorm(w, eps=1e-5), "own": OwnRMSNorm,
    }[kind](width)  # fmt: skip
    return ChannelsFirst(norm) if layout == "bct" else norm


def cubic_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3))))


class MLP(nn.Module):
    def __init__(self, width, act=F.gelu):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = act

    def forward(self, x, ctx=None):
        return self.fc_out(self.act(self.fc_in(x)))


class Gated(nn.Module):
    def __init__(self, width, act=F.silu):
        super().__init__()
        self.gate, self.up = nn.Linear(width, width + 3), nn.Linear(width, width + 3, bias=False)
        self.down, self.act = nn.Linear(width + 3, width), act

    def forward(self, x, ctx=None):
        return self.down(self.act(self.gate(x)) * self.up(x))


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Attention(nn.Module):
    def __init__(self, width, rotary=False, mask="none", cross=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, HEADS * HEAD) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, width)
        self.rotary, self.mask, self.cross = rotary, mask, cross
        if mask == "relative":
            self.table = nn.Embedding(2 * LONGEST, HEADS)

    def heads(self, y):
        return y.view(y.shape[0], y.shape[1], HEADS, HEAD).transpose(1, 2)

    def forward(self, x, ctx=None):
        source = ctx["memory"] if self.cross else x
        q, k, v = self.heads(self.q(x)), self.heads(self.k(source)), self.heads(self.v(source))
        if self.rotary and ctx is not None:
            cos, sin = ctx["cos"], ctx["sin"]
            q = q * cos + rotate_half(q) * sin
            k = k * cos + rotate_half(k) * sin
        scores = q @ k.transpose(-1, -2) / HEAD**0.5
        if self.mask == "additive" and ctx is not None:
            scores = scores + ctx["mask"]
        if self.mask == "relative":
            places = torch.arange(x.shape[1], device=x.device)
            bias = self.table(places[:, None] - places[None, :] + LONGEST)
            scores = scores + bias.permute(2, 0, 1).unsqueeze(0)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.o(y)


class TokenConv(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.out = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, x, ctx=None):
        return self.out(F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class StateSpace(nn.Module):
    """A convolution with a skip of its own, the D of state-space models."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x, ctx=None):
        u, gate = self.inner(x).chunk(2, -1)
        y = self.conv(u.transpose(1, 2)).transpose(1, 2) + u * self.D
        return self.outer(y * F.silu(gate))


class LoRALinear(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(a, b), nn.Linear(a, 2), nn.Linear(2, b)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class LoRA(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = LoRALinear(width, width), LoRALinear(width, width)

    def forward(self, x, ctx=None):
        return self.two(torch.relu(self.one(x)))


class Experts(nn.Module):
    """Routed and shared experts, summed; the shared one may read what the routed ones wrote."""

    def __init__(self, width, chained=False):
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(MLP(width) for _ in range(3))
        self.shared, self.chained = MLP(width), chained

    def forward(self, x, ctx=None):
        weights = self.router(x).softmax(-1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y = y + weights[..., k : k + 1] * expert(x)
        return y + self.shared(y if self.chained else x)


class InnerResidual(nn.Module):
    """Residual steps of another width within one sublayer."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, width + 2), nn.Linear(width + 2, width)
        self.norm, self.mlp = nn.LayerNorm(width + 2), MLP(width + 2)

    def forward(self, x, ctx=None):
        z = self.down(x)
        z = z + self.mlp(self.norm(z))
        return self.up(z)


class Parallel(nn.Module):
    """Two branches of one site."""

    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = Attention(width), MLP(width)

    def forward(self, x, ctx=None):
        return self.attn(x, ctx), self.mlp(x)


BODIES = {
    "mlp": MLP,
    "cubic": lambda w: MLP(w, cubic_gelu),
    "swiglu": Gated,
    "gated_cubic": lambda w: Gated(w, cubic_gelu),
    "attention": Attention,
    "rotary": lambda w: Attention(w, rotary=True, mask="additive"),
    "relative": lambda w: Attention(w, mask="relative"),
    "conv": TokenConv,
    "ssm": StateSpace,
    "lora": LoRA,
    "experts": Experts,
    "chained_experts": lambda w: Experts(w, chained=True),
    "inner": InnerResidual,
    "parallel": Parallel,
    "cross": lambda w: Attention(w, cross=True),
}
# These mix tokens, so they need [B, T, C]; the others take any leading dimensions.
MIXES_TOKENS = {"attention", "rotary", "relative", "conv", "ssm", "parallel", "cross"}


class DropPath(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(x.shape[:1] + (1,) * (x.dim() - 1), device=x.device) > self.p
        return x * keep / (1 - self.p)


def to_layout(x, layout):
    """From [B, T, C]."""
    if layout == "tbc":
        return x.transpose(0, 1)
    if layout == "bct":
        return x.transpose(1, 2)
    if layout == "flat":
        return x.reshape(-1, x.shape[-1])
    return x


def from_layout(x, layout, like):
    """To [B, T, C]; `like` has the shape [B, T]."""
    if layout == "flat":
        return x.view(like.shape[0], like.shape[1], -1)
    return to_layout(x, layout)


class Core(nn.Module):
    """F without its pre-norm: body, norm on the branch, scale, dropout, in the stack's layout."""

    def __init__(self, site, width, layout):
        super().__init__()
        self.site, self.layout = site, layout
        self.body = BODIES[site.body](width)
        if site.cast in ("branch64", "branch16"):
            self.body.to(torch.float64 if site.cast == "branch64" else torch.bfloat16)
        self.norm = (
            make_norm(site.norm_kind, width, layout)
            if site.norm in ("sandwich", "branch")
            else nn.Identity()
        )
        if site.scale == "layer":
            self.gamma = nn.Parameter(
                torch.ones(width, 1) if layout == "bct" else torch.ones(width)
            )
        self.drop = {"none": nn.Identity, "dropout": lambda: nn.Dropout(0.1), "path": DropPath}[
            site.drop
        ]()

    def forward(self, h, ctx=None):
        site = self.site
        convert = self.layout == "bct" or (self.layout != "btc" and site.body in MIXES_TOKENS)
        if convert:
            h = from_layout(h, self.layout, None if ctx is None else ctx["like"])
        dtype = h.dtype
        if site.cast == "branch64":
            h = h.double()
        elif site.cast == "branch16":
            h = h.to(torch.bfloat16)
        f = self.body(h, ctx)
        if site.body == "parallel":
            return tuple(self.finish(part, convert, ctx) for part in f)
        if site.cast in ("branch64", "branch16"):
            f = f.to(dtype)
        return self.finish(f, convert, ctx)

    def finish(self, f, convert, ctx):
        if convert:
            f = to_layout(f, self.layout)
        f = self.norm(f)
        if self.site.scale == "constant":
            f = 0.7 * f
        if self.site.scale == "layer":
            f = f * self.gamma
        if self.site.scale == "adaptive":
            f = ctx["gate"] * f
        return self.drop(f)


# --- the residual adds ----------------------------------------------------------------------------


def combine(x, f, step):
    """The residual add of a step, in one of many spellings."""
    site = step.site
    if isinstance(f, tuple):
        return combine_parallel(x, *f, site.write)
    if site.scale == "highway":
        gate = torch.sigmoid(step.highway(x))
        return gate * x + (1 - gate) * f  # site
    if site.cast == "add64":
        return (x.double() + f.double()).float()  # site
    if site.scale == "minus":
        return x - f  # site
    if site.scale == "alpha":
        return torch.add(x, f, alpha=0.5)  # site
    if site.scale == "alpha_skip":
        return torch.add(f, x, alpha=0.9)  # site
    if site.scale == "addcmul":
        return torch.addcmul(x, f, step.gamma, value=0.5)  # site
    if site.scale == "addcmul_skip":
        return torch.addcmul(f, x, step.keep)  # site
    if site.scale in ("skip", "skip_scalar", "skip_vector"):
        keep = 0.9 if site.scale == "skip" else step.keep
        if site.write == "f+x":
            return f + keep * x  # site
        if site.write == "torch":
            return torch.add(torch.mul(x, keep), f)  # site
        return x * keep + f  # site
    if site.write == "f+x":
        return f + x  # site
    if site.write == "iadd":
        x += f  # site
        return x
    if site.write == "add_":
        return x.add_(f)  # site
    if site.write == "f_add_":
        return f.add_(x)  # site
    if site.write == "torch":
        return torch.add(x, f)  # site
    if site.write == "method":
        return f.add(x)  # site
    return x + f  # site


def combine_parallel(x, a, m, write):
    if write == "f+x":
        return a + m + x  # site
    if write == "torch":
        return torch.add(x, a + m)  # site
    if write == "method":
        return (a + x) + m  # site
    if write == "iadd":
        x = x + a
        x += m  # site
        return x
    return x + a + m  # site


def add_norm(x, f, step, norm):
    """As the fused kernels do: the sum and the norm of the sum."""
    total = combine(x, f, step)
    return total, norm(total)


class Step(nn.Module):
    """A sublayer F, its norms, and the scales of its residual add."""

    def __init__(self, site, width, layout):
        super().__init__()
        self.site, self.layout = site, layout
        if site.norm == "before":
            self.norm_skip = make_norm(site.norm_kind, width, layout)
        pre = site.norm in ("pre", "sandwich")
        self.norm_in = make_norm(site.norm_kind, width, layout) if pre else nn.Identity()
        self.core = Core(site, width, layout)
        self.norm_out = (
            make_norm(site.norm_kind, width, layout) if site.norm == "post" else nn.Identity()
        )
        shape = (width, 1) if layout == "bct" else (width,)
        if site.scale == "skip_scalar":
            self.keep = nn.Parameter(torch.tensor(0.8))
        if site.scale in ("skip_vector", "addcmul_skip"):
            self.keep = nn.Parameter(torch.ones(shape))
        if site.scale == "highway":
            self.highway = nn.Linear(width, width)
        if site.scale == "gated":
            self.gate = nn.Linear(width, width)
        if site.scale == "addcmul":
            self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x, ctx=None):
        return self.core(self.norm_in(x), ctx)


class Inside(Step):
    """The residual is added within the sublayer's module, as in T5."""

    def forward(self, x, ctx=None):
        if self.site.norm == "before":
            x = self.norm_skip(x)
        return self.norm_out(combine(x, self.core(self.norm_in(x), ctx), self))


class Output(nn.Module):
    """The end of a sublayer, which gets the residual as an argument, as in BERT."""

    def __init__(self, site, width, step):
        super().__init__()
        self.site, self.dense, self.drop = site, nn.Linear(width, width), nn.Dropout(0.1)
        self.norm = step.norm_out
        for name in ("keep", "gamma", "highway"):
            if hasattr(step, name):
                setattr(self, name, getattr(step, name))

    def forward(self, hidden, residual):
        return self.norm(combine(residual, self.drop(self.dense(hidden)), self))


class WithOutput(Step):
    def __init__(self, site, width, layout):
        super().__init__(site, width, layout)
        self.output = Output(site, width, self)


STEPS = {"inside": Inside, "output": WithOutput}


def run_steps(steps, x, ctx):
    """Runs the sites of a block; returns the stream and the last branch."""
    normed = f = None
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        site = step.site
        if site.place == "inside":
            x, normed, f = step(x, ctx), None, None
            continue
        if site.norm == "before":  # BLOOM: the residual is taken behind the norm
            x = step.norm_skip(x)
        if normed is not None:
            f = step.core(normed, ctx)
        elif site.closed:
            f = step(x, ctx)
        else:
            f = step.core(step.norm_in(x), ctx)
        normed = None
        if site.scale == "gated":  # the branch reads the residual twice
            f = f * torch.sigmoid(step.gate(x))
        if site.place == "output":
            x = step.output(f, x)
        elif site.place == "add_norm" and site.norm == "post":
            _, x = add_norm(x, f, step, step.norm_out)
        elif site.place == "add_norm" and following is not None and takes_normed(following):
            x, normed = add_norm(x, f, step, following.norm_in)
        else:
            x = step.norm_out(combine(x, f, step))
    return x, f


def takes_normed(step):
    return step.site.place in ("block", "add_norm") and step.site.norm in ("pre", "sandwich")


# --- blocks: how the state travels ----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, sites, width, stack):
        super().__init__()
        self.stack = stack
        self.layout = stack.layout if stack.layout != "btc" else stack.inner
        self.steps = nn.ModuleList(
            STEPS.get(site.place, Step)(site, width, self.layout) for site in sites
        )

    def run(self, x, ctx):
        """The stream, and an auxiliary value [B, T] if the spec wants one."""
        if self.stack.layout == "btc":
            x = to_layout(x, self.layout)
        x, f = run_steps(list(self.steps), x, ctx)
        aux = None
        if self.stack.aux == "branch" and f is not None and not isinstance(f, tuple):
            aux = f.square().mean()
        elif self.stack.aux == "peek":
            aux = x.square().mean()
        if self.stack.layout == "btc":
            x = from_layout(x, self.layout, None if ctx is None else ctx["like"])
        return x, aux


class TensorBlock(Block):
    def forward(self, x, ctx=None, first=None):
        if first is not None:
            x = 0.8 * x + 0.3 * first
        return self.run(x, ctx)[0]


class KeywordBlock(Block):
    def forward(self, *, ctx=None, hidden_states):
        return self.run(hidden_states, ctx)[0]


class PairBlock(Block):
    def forward(self, x, ctx=None):
        return self.run(x, ctx)


class AheadBlock(Block):
    def forward(self, ctx, x):
        x, aux = self.run(x, ctx)
        return aux, x


KEYS = ("like", "mask", "cos", "sin", "pad", "gate", "memory")


class State(NamedTuple):
    like: Tensor
    mask: Tensor
    x: Tensor
    cos: Tensor
    sin: Tensor
    pad: Tensor
    gate: Tensor | None
    memory: Tensor | None


@dataclass
class DataState:
    x: Tensor
    ctx: dict


class TupleBlock(Block):
    """The state is a tuple with the stream before the other values."""

    def forward(self, state):
        x, *rest = state
        return (self.run(x, dict(zip(KEYS, rest, strict=True)))[0], *rest)


class BehindBlock(Block):
    def forward(self, state):
        *rest, x = state
        return (*rest, self.run(x, dict(zip(KEYS, rest, strict=True)))[0])


class ListBlock(Block):
    def forward(self, state):
        return [self.run(state[0], dict(zip(KEYS, state[1:], strict=True)))[0], *state[1:]]


class DictBlock(Block):
    def forward(self, state):
        return {**state, "x": self.run(state["x"], state)[0]}


class NamedBlock(Block):
    def forward(self, state):
        return state._replace(x=self.run(state.x, state._asdict())[0])


class DataBlock(Block):
    def forward(self, state):
        return DataState(self.run(state.x, state.ctx)[0], state.ctx)


class DeferredBlock(Block):
    """A branch is added at the start of the next sublayer, as in fused inference code."""

    def forward(self, hidden, residual, ctx=None):
        for step in self.steps:
            if residual is None:
                residual = hidden
            else:
                residual = hidden + residual  # site
            hidden = step.core(step.norm_in(residual), ctx)
        return hidden, residual


BLOCKS = {
    "tensor": TensorBlock, "keyword": KeywordBlock, "pair": PairBlock, "ahead": AheadBlock,
    "tuple": TupleBlock, "behind": BehindBlock, "list": ListBlock, "dict": DictBlock,
    "named": NamedBlock, "data": DataBlock,
}  # fmt: skip


def pack(carry, x, ctx):
    values = [ctx.get(key) for key in KEYS]
    return {
        "tuple": lambda: (x, *values),
        "behind": lambda: (*values, x),
        "list": lambda: [x, *values],
        "dict": lambda: {**dict(zip(KEYS, values, strict=True)), "x": x},
        "named": lambda: State(x=x, **dict(zip(KEYS, values, strict=True))),
        "data": lambda: DataState(x, ctx),
    }[carry]()


def unpack(carry, state):
    if carry in ("named", "data"):
        return state.x
    return state["x" if carry == "dict" else -1 if carry == "behind" else 0]


# --- stacks ---------------------------------------------------------------------------------------


def observe(module, args, output):
    """A forward hook that looks and changes nothing."""


def observe_before(module, args):
    """A forward pre-hook that looks and changes nothing."""


def halve(module, args, output):
    """A forward hook that changes the stream."""
    return 0.5 * output


class StackModule(nn.Module):
    def __init__(self, stack, width):
        super().__init__()
        self.stack = stack
        kind = DeferredBlock if stack.trunk == "deferred" else BLOCKS[stack.carry]
        self.blocks = nn.ModuleList(kind(sites, width, stack) for sites in stack.blocks)
        if stack.trunk == "sequential":
            self.blocks = nn.Sequential(*self.blocks)
        if stack.inject == "feature":
            self.feature = nn.Embedding(VOCABULARY, width)
        if stack.inject == "learned":
            self.mix = nn.Parameter(torch.tensor([0.8, 0.3]))
        self.tie()
        for block in self.blocks:
            if stack.hook == "after":
                block.register_forward_hook(observe)
            elif stack.hook == "halve":
                block.register_forward_hook(halve)
            elif stack.hook == "before":
                block.register_forward_pre_hook(observe_before)

    def tie(self):
        if self.stack.tied == "none":
            return
        first = self.blocks[0]
        for block in list(self.blocks)[1:]:
            for mine, theirs in zip(block.steps, first.steps, strict=False):
                if mine.site != theirs.site:
                    continue
                if self.stack.tied == "modules":
                    mine.core = theirs.core
                else:
                    own = dict(mine.core.named_parameters())
                    for name, parameter in theirs.core.named_parameters():
                        parent, _, leaf = name.rpartition(".")
                        if name in own:
                            setattr(mine.core.get_submodule(parent), leaf, parameter)

    @property
    def order(self):
        """Blocks in the order of their calls."""
        blocks = list(self.blocks)
        return blocks * 2 if self.stack.repeat else blocks

    def forward(self, x, ctx=None):
        return run_stack(self, x, ctx)


def run_stack(module, x, ctx):
    """The stream after all blocks, the sum of their auxiliary values, and all states."""
    stack, aux, states, saved = module.stack, None, [], []
    x = to_layout(x, stack.layout)
    if stack.trunk == "deferred":
        hidden, residual = x, None
        for block in module.order:
            hidden, residual = block(hidden, residual, ctx)
        return from_layout(residual + hidden, stack.layout, ctx["like"]), None, []  # site
    first = x
    if stack.trunk == "sequential":
        if stack.carry in STATES:
            x = unpack(stack.carry, module.blocks(pack(stack.carry, x, ctx)))
        else:
            x = module.blocks(x)
    elif stack.carry in STATES and (
        stack.inject == "none" and not stack.pad and stack.states == "none"
    ):
        state = pack(stack.carry, x, ctx)
        for block in module.order:
            state = call(stack, block, state)
        x = unpack(stack.carry, state)
    else:
        for k, block in enumerate(module.order):
            if k and stack.pad:
                x = x * ctx["pad"]
            if k and stack.inject == "constant":
                x = 0.8 * x + 0.3 * first
            elif k and stack.inject == "learned":
                x = module.mix[0] * x + module.mix[1] * first
            elif k and stack.inject == "plain":
                x = x + first
            elif stack.inject == "feature":  # of the tokens, not of the stream
                x = x + module.feature(ctx["like"])
            elif stack.inject == "unet" and saved and 2 * k >= len(module.order):
                x = x + 0.5 * saved.pop()
            saved.append(x)
            x, extra = run_block(stack, block, x, ctx, first)
            if stack.states != "none":
                states.append(x)
            if extra is not None:
                aux = extra if aux is None else aux + extra
        if stack.states == "sum":  # of all layers, weighted
            x, states = sum((0.5 + k) * state for k, state in enumerate(states)), []
        if stack.inject == "long":
            x = x + first
    return from_layout(x, stack.layout, ctx["like"]), aux, states


def run_block(stack, block, x, ctx, first):
    if stack.trunk == "root":
        return run_steps(list(block.steps), x, ctx)[0], None
    if stack.carry in STATES:
        return unpack(stack.carry, call(stack, block, pack(stack.carry, x, ctx))), None
    if stack.carry == "keyword":
        return call(stack, block, hidden_states=x, ctx=ctx), None
    if stack.carry == "pair":
        return call(stack, block, x, ctx)
    if stack.carry == "ahead":
        extra, x = call(stack, block, ctx, x)
        return x, extra
    if stack.inject == "inside":
        return call(stack, block, x, ctx, first), None
    return call(stack, block, x, ctx), None


def call(stack, block, *args, **kwargs):
    if stack.checkpoint == "none":
        return block(*args, **kwargs)
    return checkpoint(block, *args, use_reentrant=stack.checkpoint == "reentrant", **kwargs)


class JointBlock(nn.Module):
    """Two streams whose tokens attend to each other, as in multimodal diffusion transformers."""

    def __init__(self, width):
        super().__init__()
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)

    def branches(self, x, y):
        z = self.attn(torch.cat([self.norm_x(x), self.norm_y(y)], 1))
        return z[:, : x.shape[1]], z[:, x.shape[1] :]

    def forward(self, x, y):
        f, g = self.branches(x, y)
        x = x + f  # site
        y = y + g  # site
        return x, y


# --- models ---------------------------------------------------------------------------------------


class CubicHead(nn.Module):
    """The head of masked language models; its activation looks like a residual add."""

    def __init__(self, width):
        super().__init__()
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, x):
        return self.out(self.norm(cubic_gelu(self.transform(x))))


class Model(nn.Module):
    """Stem, stacks, head; `forward(x)` or `forward(x, y)` with one input for each source."""

    def __init__(self, spec):
        super().__init__()
        self.spec, width = spec, spec.width
        if spec.stem != "states":
            self.embed = nn.Embedding(VOCABULARY, width)
        if spec.stem in ("positions", "normed"):
            self.positions = nn.Embedding(LONGEST, width)
        if spec.stem == "normed":
            self.norm_0 = nn.LayerNorm(width)
        if spec.stem == "sum":
            self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        if "adaptive" in [site.scale for site in all_sites(spec)]:
            self.condition = nn.Embedding(VOCABULARY, width)
        if spec.topology == "joint":
            self.joint = nn.ModuleList(JointBlock(width) for _ in spec.stacks[0].blocks)
        self.stacks = nn.ModuleList(
            StackModule(stack, self.widths[k]) for k, stack in enumerate(spec.stacks)
        )
        if spec.topology == "stages":
            self.project = nn.ModuleList(
                nn.Linear(a, b) for a, b in zip(self.widths, self.widths[1:], strict=False)
            )
        ends = {"towers": len(spec.stacks), "fork": len(spec.stacks) - 1}.get(spec.topology, 1)
        last = self.widths[-1] * ends
        if spec.head in ("norm", "logits", "pool"):
            self.norm = nn.LayerNorm(last)
        if spec.head in ("linear", "logits", "pool"):
            self.out = nn.Linear(last, VOCABULARY)
        if spec.head == "cubic":
            self.out = CubicHead(last)

    @property
    def widths(self):
        step = 3 if self.spec.topology == "stages" else 0
        return [self.spec.width + step * k for k in range(len(self.spec.stacks))]

    def start(self, x):
        stem = self.spec.stem
        if stem == "states":
            return x
        x = self.embed(x)
        if stem in ("positions", "normed"):
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        if stem == "normed":
            x = self.norm_0(x)
        if stem == "sum":
            x = torch.tanh(self.left(x)) + self.right(x)
        return x

    def context(self, x, inputs):
        length = x.shape[1]
        mask = torch.full((length, length), -1e4, device=x.device, dtype=x.dtype).triu(1)
        places = torch.arange(length, device=x.device, dtype=x.dtype)
        rates = 10.0 ** -torch.arange(HEAD // 2, device=x.device, dtype=x.dtype)
        angles = places[:, None] * rates[None, :]
        angles = torch.cat([angles, angles], -1)
        pad = 1 - 0.5 * (places == 1).to(x.dtype)
        # A label decides, as in diffusion transformers: the first token stands for it.
        gate = self.condition(inputs[:, :1]) if hasattr(self, "condition") else None
        like = inputs if inputs.dim() == 2 else inputs[..., 0]
        return {
            "like": like,
            "mask": mask,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "pad": pad[:, None],
            "gate": gate,
        }

    def finish(self, x):
        head = self.spec.head
        if head == "pool":
            x = x[:, -1]
        if head in ("norm", "logits", "pool"):
            x = self.norm(x)
        if head in ("linear", "logits", "cubic", "pool"):
            x = self.out(x)
        if head == "logits":
            x = 5 * torch.tanh(x / 5)
        return x

    def run(self, k, x, ctx):
        stack = self.stacks[k]
        return run_stack(stack, x, ctx) if self.spec.in_root else stack(x, ctx)

    def forward(self, x, y=None):
        topology = self.spec.topology
        inputs, x = x, self.start(x)
        ctx = self.context(x, inputs)
        if topology == "encdec":
            memory, *first = self.run(0, x, ctx)
            start = self.start(y)
            x, *second = self.run(1, start, {**self.context(start, y), "memory": memory})
            extra = [first, second]
        elif topology in ("towers", "fork"):
            ends, extra = [], []
            for k in range(len(self.stacks)):
                end, *more = self.run(k, x, ctx)
                if topology == "fork" and k == 0:  # the others start where this one ends
                    x = end
                else:
                    ends.append(end)
                extra.append(more)
            x = torch.cat(ends, -1)
        elif topology in ("interleaved", "joint"):
            left, right, extra = x, x, []
            inside, beside = ctx, ctx
            if topology == "joint":
                right = self.start(y)
                beside = self.context(right, y)
            for k, (a, b) in enumerate(
                zip(self.stacks[0].order, self.stacks[1].order, strict=True)
            ):
                if topology == "joint":
                    left, right = self.joint[k](left, right)
                left, right = a(left, inside), b(right, beside)
            x = torch.cat([left, right], 1)
        else:
            extra = []
            for k in range(len(self.stacks)):
                if k:
                    x = self.project[k - 1](x)
                x, *more = self.run(k, x, ctx)
                extra.append(more)
        found = [aux for aux, _ in extra if aux is not None]
        states = [state for _, all_states in extra for state in all_states]
        if not found and not states:
            return self.finish(x)
        return (self.finish(x), *([sum(found)] if found else []), *states)


def build(spec):
    """The model of a spec in evaluation mode, no norm or bias at 1 or 0."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = Model(spec).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() <= 2 and (parameter.dim() < 2 or parameter.shape[-1] == 1):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double() if spec.double else model


def make_inputs(spec, batch=None, length=None, seed=1):
    """Positional arguments of the model."""
    generator = torch.Generator().manual_seed(spec.seed + seed)
    batch, length = batch or spec.batch, length or spec.length

    def one(length):
        if spec.stem == "states":
            x = torch.randn(batch, length, spec.width, generator=generator)
            return x.double() if spec.double else x
        return torch.randint(0, VOCABULARY, (batch, length), generator=generator)

    two = spec.topology in ("encdec", "joint")
    return (one(length), one(length + 1)) if two else (one(length),)
