"""Small modules for the residual patterns that the libraries have no model for."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from models import MLP, SPREAD, VOCABULARY, WIDTH, Attention, Block
from torch import nn
from torch.utils.checkpoint import checkpoint

DEPTH = 2


class TokenModel(nn.Module):
    """Token embedding, `trunk`, norm and head: what most of the models here have around them."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.wte.weight, std=SPREAD)

    def forward(self, idx):
        return self.head(self.ln_f(self.trunk(self.wte(idx))))

    def trunk(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stack(TokenModel):
    """The usual loop over blocks of one kind."""

    def __init__(self, block, depth=DEPTH):
        super().__init__()
        self.blocks = nn.ModuleList(block(i) for i in range(depth))


def parts(i=0):
    """Norm, attention, norm, MLP."""
    return nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), MLP()


class RootResiduals(TokenModel):
    """No block class: the adds stand in the root module's own forward."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * DEPTH))
        self.layers = nn.ModuleList(f() for _ in range(DEPTH) for f in (Attention, MLP))

    def forward(self, idx):
        x = self.wte(idx)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.ln_f(x))


def sequential_trunk():
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY),
    )  # fmt: skip


class Residual(nn.Module):
    """The residual add inside a wrapper of the sublayer, as in x-transformers and lucidrains."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x, **kwargs):
        return self.inner(self.norm(x), **kwargs) + x


def residual_wrappers():
    model = TokenModel()
    model.blocks = nn.ModuleList(Residual(f()) for _ in range(DEPTH) for f in (Attention, MLP))
    return model


def add_norm(hidden, residual, norm):
    """The helper of mamba_ssm and vLLM, unfused: both the sum and its norm."""
    residual = hidden if residual is None else hidden + residual
    return norm(residual), residual


class DeferredBlock(nn.Module):
    """A mamba_ssm block: it adds the output of the block before it."""

    def __init__(self, i):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), Attention() if i % 2 == 0 else MLP()

    def forward(self, hidden, residual):
        hidden, residual = add_norm(hidden, residual, self.norm)
        return self.mixer(hidden), residual


class DeferredDecoder(nn.Module):
    """A vLLM decoder layer: two add-norms, the first adds the MLP of the layer before it."""

    def __init__(self, i):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = parts()

    def forward(self, hidden, residual):
        hidden, residual = add_norm(hidden, residual, self.ln_1)
        hidden, residual = add_norm(self.attn(hidden), residual, self.ln_2)
        return self.mlp(hidden), residual


class DeferredAdds(TokenModel):
    """Blocks pass (hidden, residual); the last add is the final norm's."""

    def __init__(self, block, depth):
        super().__init__()
        self.blocks = nn.ModuleList(block(i) for i in range(depth))

    def forward(self, idx):
        hidden, residual = self.wte(idx), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        hidden, _ = add_norm(hidden, residual, self.ln_f)
        return self.head(hidden)


class Parts(nn.Module):
    """A block whose subclasses differ in how they add."""

    def __init__(self, i=0):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = parts()


class ScaledSkipBlock(Parts):
    def __init__(self, i=0):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((WIDTH,), 0.9))
        self.gamma_2 = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        x = self.gamma_1 * x + self.attn(self.ln_1(x))
        return self.gamma_2 * x + self.mlp(self.ln_2(x))


class ConstantSkipBlock(Parts):
    def forward(self, x):
        x = 0.9 * x + self.attn(self.ln_1(x))
        return torch.add(x / 1.25, self.mlp(self.ln_2(x)), alpha=0.5)


class SubtractingBlock(Parts):
    def forward(self, x):
        x = x - self.attn(self.ln_1(x))
        return torch.sub(x, self.mlp(self.ln_2(x)), alpha=0.5)


class ReZeroBlock(Parts):
    def __init__(self, i=0):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.3, 0.4]))

    def forward(self, x):
        x = x + self.alpha[0] * self.attn(x)
        return x + self.alpha[1] * self.mlp(x)


class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class LayerScaleBlock(Parts):
    def __init__(self, i=0):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((WIDTH,), 0.3))
        self.gamma_2 = nn.Parameter(torch.full((WIDTH,), 0.3))
        self.drop_path = DropPath(0.1 * i)

    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.ln_1(x)))
        return torch.addcmul(x, self.gamma_2, self.drop_path(self.mlp(self.ln_2(x))))


class InPlaceBlock(Parts):
    """The residual is added into the branch; `x += F(norm(x))` itself cannot be trained."""

    def forward(self, x):
        y = self.attn(self.ln_1(x))
        y += x
        return self.mlp(self.ln_2(y)).add_(y)


class DictBlock(Parts):
    def forward(self, state):
        x = state["x"] + self.attn(self.ln_1(state["x"]))
        return {**state, "x": x + self.mlp(self.ln_2(x)), "depth": state["depth"] + 1}


class DictPlumbing(Stack):
    def trunk(self, x):
        state = {"x": x, "depth": 0}
        for block in self.blocks:
            state = block(state)
        return state["x"]


class NestedPlumbing(Stack):
    """Blocks take and return ((x, keep), extras), with values that they only hand on."""

    def trunk(self, x):
        state, extras = (x, x.detach().abs().mean()), []
        for block in self.blocks:
            state, extras = block(state, extras)
        return state[0]


class NestedBlock(Parts):
    def forward(self, state, extras):
        x, keep = state
        x = x + self.attn(self.ln_1(x))
        y = self.mlp(self.ln_2(x))
        return (x + y * keep, keep), [*extras, y.mean()]


class TwicePerBlock(Stack):
    """Every block runs twice in a row (MobileLLM's immediate block-wise sharing)."""

    def trunk(self, x):
        for block in self.blocks:
            x = block(block(x))
        return x


class UniversalTransformer(TokenModel):
    """One block for all steps, told apart by a learned time embedding on the stream."""

    def __init__(self, steps=3):
        super().__init__()
        self.block, self.time = Block(), nn.Parameter(SPREAD * torch.randn(steps, WIDTH))

    def trunk(self, x):
        for time in self.time:
            x = self.block(x + time)
        return x


class Checkpointed(Stack):
    def trunk(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def tied_blocks():
    """Weights of two blocks are one; their MLP is one module."""
    model = Stack(lambda i: Block())
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    model.blocks[1].mlp = model.blocks[0].mlp
    return model


class Reinjection(Stack):
    """modded-nanogpt: before each block the embedding is mixed in with learned numbers."""

    def __init__(self):
        super().__init__(lambda i: Block())
        self.lambdas = nn.Parameter(torch.tensor([[0.9, 0.2], [0.8, 0.3]]))

    def trunk(self, x):
        x0 = x
        for block, (kept, again) in zip(self.blocks, self.lambdas, strict=True):
            x = block(kept * x + again * x0)
        return x


class AdditiveSkips(Stack):
    """A U-net of blocks whose long skips are added with learned weights."""

    def __init__(self):
        super().__init__(lambda i: Block(), depth=4)
        self.weights = nn.Parameter(torch.tensor([0.5, 0.6]))

    def trunk(self, x):
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= 2:
                x = x + self.weights[i - 2] * skips.pop()
            x = block(x)
            if i < 2:
                skips.append(x)
        return x


class UViT(TokenModel):
    """Long skips through a linear of a concatenation."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(Block() for _ in range(2))
        self.middle = Block()
        self.up = nn.ModuleList(Block() for _ in range(2))
        self.joins = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def trunk(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for join, block in zip(self.joins, self.up, strict=True):
            x = block(join(torch.cat([x, skips.pop()], dim=-1)))
        return x


class DenseFormer(Stack):
    """After each block a learned average of all states so far."""

    def __init__(self):
        super().__init__(lambda i: Block())
        self.average = nn.ParameterList(
            torch.linspace(0.1, 0.8, i + 2) for i in range(len(self.blocks))
        )

    def trunk(self, x):
        states = [x]
        for block, weights in zip(self.blocks, self.average, strict=True):
            states.append(block(x))
            x = sum(w * s for w, s in zip(weights, states, strict=True))
        return x


class LengthFirst(Stack):
    """The stream is [L, B, C]; attention is nn.MultiheadAttention's default layout."""

    def __init__(self):
        super().__init__(LengthFirstBlock)

    def trunk(self, x):
        return super().trunk(x.transpose(0, 1)).transpose(0, 1)


class LengthFirstBlock(nn.Module):
    def __init__(self, i=0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ChannelsFirstBlock(nn.Module):
    """A block on [B, C, H, W]: depth-wise mixing and a 1 x 1 MLP, batch norms."""

    def __init__(self, i=0):
        super().__init__()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlp = nn.Sequential(
            nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.GELU(), nn.Conv2d(2 * WIDTH, WIDTH, 1)
        )

    def forward(self, x):
        x = x + self.mix(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class ChannelsFirst(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, size, size)
        self.blocks = nn.ModuleList(ChannelsFirstBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image):
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(-2, -1)))


class MixerBlock(nn.Module):
    """MLP-Mixer: one sublayer works along the tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.ln_1, self.tokens = nn.LayerNorm(WIDTH), nn.Linear(tokens, tokens)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x):
        x = x + self.tokens(self.ln_1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.ln_2(x))


class Mixer(nn.Module):
    def __init__(self, tokens=9):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(MixerBlock(tokens), MixerBlock(tokens))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, patches):
        return self.norm(self.blocks(self.stem(patches))).mean(1)


def unit(x):
    return F.normalize(x, dim=-1)


class NGPTBlock(nn.Module):
    """nGPT: h = unit(h + a (unit(F(h)) - h)), on the sphere, without norm layers."""

    def __init__(self, i=0):
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()
        self.a = nn.Parameter(torch.full((2, WIDTH), 0.3))

    def forward(self, h):
        h = unit(h + self.a[0] * (unit(self.attn(h)) - h))
        return unit(h + self.a[1] * (unit(self.mlp(h)) - h))


class MoE(nn.Module):
    """Routed experts summed by index_add, and a gated shared one: sums, but no residuals."""

    def __init__(self, experts=4, top=2):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(experts))
        self.shared, self.gate, self.top = MLP(), nn.Linear(WIDTH, 1), top

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.top, dim=-1)
        routed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            routed.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        shared = torch.sigmoid(self.gate(flat)) * self.shared(flat)
        return (routed + shared).view_as(x)


class MoEBlock(Parts):
    def __init__(self, i=0):
        super().__init__()
        self.mlp = MoE()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x, data):
        return self.attn(x, data, data, need_weights=False)[0]


class LatentBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.cross, self.block = nn.LayerNorm(WIDTH), CrossAttention(), Block()

    def forward(self, latents, data):
        return self.block(latents + self.cross(self.norm(latents), data))


class LatentStream(nn.Module):
    """Perceiver-like: the stream starts from learned latents and reads the data again."""

    def __init__(self, latents=4):
        super().__init__()
        self.latents = nn.Parameter(SPREAD * torch.randn(latents, WIDTH))
        self.blocks = nn.ModuleList(LatentBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, data):
        x = self.latents.expand(data.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, data)
        return self.norm(x)


class AdaptiveBlock(nn.Module):
    """A DiT block: shift, scale and gate of both sublayers come from the condition."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp, self.ada = Attention(), MLP(), nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x, c):
        a, b, gate, d, e, gate_mlp = self.ada(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate * self.attn(self.norm(x) * (1 + b) + a)
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + e) + d)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.time = nn.Linear(WIDTH, WIDTH), MLP()
        self.blocks = nn.ModuleList(AdaptiveBlock() for _ in range(DEPTH))
        self.ada, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, patches, condition):
        x, c = self.stem(patches), self.time(condition)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.ada(c)[:, None].chunk(2, dim=-1)
        return self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class HyperGateBlock(Parts):
    """A small network of the stream itself writes the gates of the branches."""

    def __init__(self, i=0):
        super().__init__()
        self.hyper = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        gate_1, gate_2 = self.hyper(x.mean(1, keepdim=True)).sigmoid().chunk(2, dim=-1)
        x = x + gate_1 * self.attn(self.ln_1(x))
        return x + gate_2 * self.mlp(self.ln_2(x))


class HighwayBlock(Parts):
    """g x + (1 - g) F(x): the skip itself is gated by a computed value."""

    def __init__(self, i=0):
        super().__init__()
        self.gate_1, self.gate_2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        g = torch.sigmoid(self.gate_1(x))
        x = g * x + (1 - g) * self.attn(self.ln_1(x))
        g = torch.sigmoid(self.gate_2(x))
        return g * x + (1 - g) * self.mlp(self.ln_2(x))


class JointBlock(nn.Module):
    """MM-DiT: two streams with weights of their own meet in one attention."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.attn, self.mlp_x, self.mlp_y = Attention(), MLP(), MLP()

    def forward(self, x, y):
        joint = self.attn(torch.cat([self.norms[0](x), self.norms[1](y)], dim=1))
        to_x, to_y = joint.split([x.shape[1], y.shape[1]], dim=1)
        x, y = x + to_x, y + to_y
        return x + self.mlp_x(self.norms[2](x)), y + self.mlp_y(self.norms[3](y))


class JointStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem_x, self.stem_y = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(JointBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, image, text):
        x, y = self.stem_x(image), self.stem_y(text)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(torch.cat([x, y], dim=1))


class ValueResidualBlock(nn.Module):
    """ResFormer: the values of the first layer are added to those of later ones."""

    def __init__(self, i=0):
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), MLP()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mix = nn.Parameter(torch.tensor(0.4))

    def forward(self, x, first):
        h = self.ln_1(x)
        value = self.v(h)
        first = value if first is None else first
        value = value + self.mix * first
        y = F.scaled_dot_product_attention(self.q(h), self.k(h), value, is_causal=True)
        x = x + self.out(y)
        return x + self.mlp(self.ln_2(x)), first


class ValueResidual(Stack):
    def __init__(self):
        super().__init__(ValueResidualBlock)

    def trunk(self, x):
        first = None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class ReversibleBlock(Parts):
    """RevNet: two halves, each a residual stream that the other's sublayer reads."""

    def forward(self, x, y):
        x = x + self.attn(self.ln_1(y))
        return x, y + self.mlp(self.ln_2(x))


class Reversible(Stack):
    def __init__(self):
        super().__init__(ReversibleBlock)

    def trunk(self, x):
        y = x
        for block in self.blocks:
            x, y = block(x, y)
        return (x + y) / 2


class PositionalConvolution(nn.Module):
    """A convolution over time, as wav2vec2 and CPVT take for positions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Two half-step MLPs around attention and a convolution, then a norm on the stream."""

    def __init__(self, i=0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.mlp_1, self.attn, self.conv, self.mlp_2 = (
            MLP(), Attention(), PositionalConvolution(), MLP()
        )  # fmt: skip

    def forward(self, x):
        x = x + 0.5 * self.mlp_1(self.norms[0](x))
        x = x + self.attn(self.norms[1](x))
        x = x + self.conv(self.norms[2](x))
        x = 0.5 * self.mlp_2(self.norms[3](x)) + x
        return self.norms[4](x)


class LayerAverage(Stack):
    """The head reads the mean of all layers' states, as probes and feature pyramids do."""

    def __init__(self):
        super().__init__(lambda i: Block())

    def trunk(self, x):
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack(states).mean(0)


class LerpBlock(Parts):
    """torch.lerp(x, F, w) = (1 - w) x + w F, as in some gated and normalised transformers."""

    def __init__(self, i=0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x):
        x = torch.lerp(x, self.attn(self.ln_1(x)), self.weight)
        return torch.lerp(x, self.mlp(self.ln_2(x)), 0.4)


class SummedListBlock(Parts):
    """Python's sum() starts with 0 + x."""

    def forward(self, x):
        x = sum([x, self.attn(self.ln_1(x))])
        return sum([x, self.mlp(self.ln_2(x))])


class FusedProductBlock(Parts):
    """The residual is the first argument of the sublayer's last matrix product."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        h = self.mlp[1](self.mlp[0](self.ln_2(x)))
        return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), self.mlp[2].weight.t()).view_as(x)


class SomeTokensBlock(Parts):
    """Mixture of Depths: the block works on the tokens that a router picks."""

    def __init__(self, i=0):
        super().__init__()
        self.router = nn.Linear(WIDTH, 1)

    def forward(self, x):
        weight, token = self.router(x).squeeze(-1).topk(3, dim=1)
        token = token[..., None].expand(-1, -1, x.shape[-1])
        chosen = x.gather(1, token)
        return x.scatter_add(1, token, weight.sigmoid()[..., None] * self.mlp(self.ln_2(chosen)))


class ClassTokenBlock(Parts):
    """One sublayer leaves the first token alone: its residual is on the others only."""

    def forward(self, x):
        first, others = x[:, :1], x[:, 1:]
        others = others + self.attn(self.ln_1(others))
        x = torch.cat([first, others], dim=1)
        return x + self.mlp(self.ln_2(x))


class State(NamedTuple):
    x: torch.Tensor
    depth: int


class NamedTupleBlock(Parts):
    def forward(self, state):
        x = state.x + self.attn(self.ln_1(state.x))
        return State(x + self.mlp(self.ln_2(x)), state.depth + 1)


class NamedTuplePlumbing(Stack):
    def trunk(self, x):
        state = State(x, 0)
        for block in self.blocks:
            state = block(state)
        return state.x


def torch_decoder(norm_first):
    layer = nn.TransformerDecoderLayer(
        WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerDecoder(layer, DEPTH)


def torch_transformer():
    return nn.Transformer(WIDTH, 4, DEPTH, DEPTH, 64, dropout=0.0, batch_first=True)
