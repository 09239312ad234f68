"""Residual patterns beyond x + F(x) in a block, against hand-written n-stream loops.

Each pattern is a small model whose blocks call `self.f[k]`, and a loop over `Loop.step` that says
what mHC makes of it. Names of the connections stand in the loops, so sites are counted too.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from models import WIDTH, normal, perturb
from oracle import Loop
from torch import nn

import mhc_compile as mc

N = 3


def mlp(width=WIDTH):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(),
                         nn.Linear(width, width))  # fmt: skip


class Model(nn.Module):
    """Four sublayers, a learned scalar and vector, and a head that does not read streams alike."""

    depth = 4

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(mlp() for _ in range(self.depth))
        self.scalar = nn.Parameter(torch.tensor(0.8))
        self.vector = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.head = nn.Linear(WIDTH, 5)


class InRoot(Model):
    """No block class at all: the loop stands in the root's forward."""

    def forward(self, x):
        for f in self.f:
            x = x + f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, f)
        return self.head(loop.collapse("mhc", streams))


class ScaledByNumber(InRoot):
    scale = 0.9

    def forward(self, x):
        for f in self.f:
            x = 0.9 * x + f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, f, scale=0.9)
        return self.head(loop.collapse("mhc", streams))


class ScaledByParameter(Model):
    """ReZero's twin: the skip has a learned scale, for a channel or for all."""

    def forward(self, x):
        x = self.scalar * x + self.f[0](x)
        x = self.f[1](x) + x * self.vector
        x = x / self.vector.exp() + self.f[2](x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0], scale=self.scalar)
        streams = loop.step("mhc.1", streams, self.f[1], scale=self.vector)
        streams = loop.step("mhc.2", streams, self.f[2], scale=1 / self.vector.exp())
        return self.head(loop.collapse("mhc", streams))


class ScaledByCondition(Model):
    """A scale for each sample, computed from something else than the stream."""

    def forward(self, x):
        gate = x.mean((1, 2), keepdim=True).detach().sigmoid()
        y = self.f[3](x)
        y = gate * y + self.f[0](y)
        y = y * gate + self.f[1](y)
        return self.head(y)

    def by_hand(self, loop, x):
        gate = x.mean((1, 2), keepdim=True).detach().sigmoid()
        streams = [self.f[3](x)] * N
        streams = loop.step("mhc.0", streams, self.f[0], scale=gate)
        streams = loop.step("mhc.1", streams, self.f[1], scale=gate)
        return self.head(loop.collapse("mhc", streams))


class Differences(Model):
    def forward(self, x):
        x = x - self.f[0](x)
        x = torch.sub(x, self.f[1](x), alpha=0.5)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0], sign=-1)
        streams = loop.step("mhc.1", streams, self.f[1], sign=-0.5)
        return self.head(loop.collapse("mhc", streams))


class AlphaOnEitherTerm(Model):
    def forward(self, x):
        x = torch.add(x, self.f[0](x), alpha=0.5)
        x = torch.add(self.f[1](x), x, alpha=0.7)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0], sign=0.5)
        streams = loop.step("mhc.1", streams, self.f[1], scale=0.7)
        return self.head(loop.collapse("mhc", streams))


class Reinjected(Model):
    """The embedding is mixed into the stream again before every sublayer."""

    def forward(self, x):
        x0 = x
        for f in self.f:
            x = self.scalar * x + (1 - self.scalar) * x0
            x = x + f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = [self.scalar * s + (1 - self.scalar) * x for s in streams]
            streams = loop.step(f"mhc.{k}", streams, f)
        return self.head(loop.collapse("mhc", streams))


class LongSkips(Model):
    """The second half gets the states of the first half added, last first."""

    def forward(self, x):
        states = []
        for f in self.f[:2]:
            x = x + f(x)
            states.append(x)
        for f in self.f[2:]:
            x = x + states.pop()
            x = x + f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        one = loop.step("mhc.0", [x] * N, self.f[0])
        two = loop.step("mhc.1", one, self.f[1])
        streams = loop.step("mhc.2", [2 * s for s in two], self.f[2])
        streams = [a + b for a, b in zip(streams, one, strict=True)]
        streams = loop.step("mhc.3", streams, self.f[3])
        return self.head(loop.collapse("mhc", streams))


class Injected(Model):
    """Something that is no state of the stream is added between sublayers, with broadcasting."""

    def forward(self, x):
        offset = torch.linspace(-1, 1, x.shape[1])[:, None] * self.vector
        for f in self.f:
            x = x + f(x)
            x = x + offset
        return self.head(x)

    def by_hand(self, loop, x):
        offset = torch.linspace(-1, 1, x.shape[1])[:, None] * self.vector
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = [s + offset for s in loop.step(f"mhc.{k}", streams, f)]
        return self.head(loop.collapse("mhc", streams))


class Shifted(Model):
    """Tokens change places between two sublayers: on streams this must not shift the streams."""

    def forward(self, x):
        x = x + self.f[0](x)
        x = x.flip(-2).roll(1, 1)
        x = torch.cat([x, x[:, :1]], dim=1)
        return self.head(x + self.f[1](x))

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0])
        streams = [s.flip(-2).roll(1, 1) for s in streams]
        streams = [torch.cat([s, s[:, :1]], dim=1) for s in streams]
        return self.head(loop.collapse("mhc", loop.step("mhc.1", streams, self.f[1])))


class Transposed(Model):
    """[B, T, C], then [T, B, C] from the second sublayer on."""

    def forward(self, x):
        x = x + self.f[0](x)
        x = x.transpose(0, 1)
        x = x + self.f[1](x)
        return self.head(x).transpose(0, 1)

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0])
        streams = loop.step("mhc.1", [s.transpose(0, 1) for s in streams], self.f[1])
        return self.head(loop.collapse("mhc", streams)).transpose(0, 1)


class FlattenedAdd(Model):
    """The sublayer reads [B, T, C], its residual is added as [B * T, C]."""

    def forward(self, x):
        batch, length, width = x.shape
        for f in self.f:
            skip = x.view(-1, width)
            x = (skip + f(x).reshape(-1, width)).view(batch, length, width)
        return self.head(x)

    def by_hand(self, loop, x):
        return InRoot.by_hand(self, loop, x)


class InlineNorm(Model):
    """A post-norm written out, whose parts reduce over the last axis."""

    def norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.vector

    def forward(self, x):
        for f in self.f:
            x = self.norm(x + f(x))
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = [self.norm(s) for s in loop.step(f"mhc.{k}", streams, f)]
        return self.head(loop.collapse("mhc", streams))


class Probed(Model):
    """An auxiliary head reads the stream between two sublayers: it gets the mean."""

    def forward(self, x):
        x = x + self.f[0](x)
        x = x * 0.5
        probe = self.head(x)
        x = x.tanh()
        x = x + self.f[1](x)
        return self.head(x) + probe.mean()

    def by_hand(self, loop, x):
        streams = [0.5 * s for s in loop.step("mhc.0", [x] * N, self.f[0])]
        probe = self.head(sum(streams) / N)
        streams = loop.step("mhc.1", [s.tanh() for s in streams], self.f[1])
        return self.head(loop.collapse("mhc", streams)) + probe.mean()


def add_and_norm(x, f, norm):
    x = x + f
    return x, norm(x)


class AddNormHelper(Model):
    """A helper returns the sum and its norm; the sum goes on as the residual."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        h = self.norm(x)
        for f in self.f:
            x, h = add_and_norm(x, f[3](f[1](h).tanh()), self.norm)
        return self.head(h)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, lambda h, f=f: f[3](f[1](self.norm(h)).tanh()))
        return self.head(self.norm(loop.collapse("mhc", streams)))


class LateAddBlock(nn.Module):
    """Adds the branch of the block before it: (hidden, residual) travel between blocks."""

    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, residual=None):
        residual = hidden if residual is None else residual + hidden
        return self.mixer(self.norm(residual)).tanh(), residual


class LateAdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(LateAddBlock() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.head(x + residual)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, layer in enumerate(self.layers):
            streams = loop.step(f"mhc.{k}", streams, lambda h, b=layer: b.mixer(b.norm(h)).tanh())
        return self.head(loop.collapse("mhc", streams))


class NestedStates(nn.Module):
    """Residuals inside a sublayer of another width are not the stream, however many."""

    class Sublayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, x):
            y = self.into(x)
            for _ in range(6):  # without weights, and longer than the stream
                y = 0.5 * y + torch.tanh(y @ y.transpose(-1, -2) @ y / 64)
            return self.out(y)

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(self.Sublayer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    forward = InRoot.forward
    by_hand = InRoot.by_hand


class TwoWays(nn.Module):
    """MMDiT: two streams, each of whose sublayers reads both."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(mlp(2 * WIDTH) for _ in range(2))
        self.g = nn.ModuleList(mlp() for _ in range(4))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        y = self.head.weight.sum(0) * x.flip(1)
        y, x = self.g[0](y), self.g[1](x)
        for f, g in zip(self.f, self.g[2:], strict=True):
            a, b = f(torch.cat([x, y], -1)).chunk(2, -1)
            x, y = x + a, y + b
            x, y = x + g(x), y + g(y)
        return self.head(x) - self.head(y)


class Latents(Model):
    """The stream starts as a parameter, as in a Perceiver; it is read through a cat."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(2, 3, WIDTH))

    def attend(self, q, x):
        return self.f[0](torch.cat([q, x], 1))[:, : q.shape[1]].cumsum(1)

    def forward(self, x):
        q = self.q + self.attend(self.q, x)
        return self.head(q + self.f[1](q))

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [self.q] * N, lambda q: self.attend(q, x))
        return self.head(loop.collapse("mhc", loop.step("mhc.1", streams, self.f[1])))


class LateToken(Model):
    """A learned token is put in front between two sublayers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(2, 1, WIDTH))

    def forward(self, x):
        x = x + self.f[0](x)
        x = torch.cat([self.token[: x.shape[0]], x], 1)
        return self.head(x + self.f[1](x))

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0])
        streams = [torch.cat([self.token, s], 1) for s in streams]
        return self.head(loop.collapse("mhc", loop.step("mhc.1", streams, self.f[1])))


class ReshapedBlock(nn.Module):
    """timm's Swin: tokens are [B, H, W, C] for one sublayer and [B, H * W, C] for the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x):
        batch, height, width, channels = x.shape
        x = x + self.a(x)
        x = x.reshape(batch, -1, channels)
        x = x + self.b(x)
        return x.reshape(batch, height, width, channels)


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(ReshapedBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x.unflatten(1, (2, -1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x.unflatten(1, (2, -1))] * N
        for k, layer in enumerate(self.layers):
            streams = loop.step(f"layers.{k}.mhc.0", streams, layer.a)
            streams = loop.step(f"layers.{k}.mhc.1", streams, layer.b)
        return self.head(loop.collapse("layers.1.mhc", streams))


class NormedBlock(nn.Module):
    """Conformer: pre-norm sublayers, and one norm on the stream at the end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = mlp(), mlp(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + 0.5 * self.a(x)
        x = x + self.b(x)
        return self.norm(x)


class NormedOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(NormedBlock() for _ in range(2)))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.layers(x))

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, layer in enumerate(self.layers):
            streams = loop.step(f"layers.{k}.mhc.0", streams, layer.a, sign=0.5)
            streams = loop.step(f"layers.{k}.mhc.1", streams, layer.b)
            streams = [layer.norm(s) for s in streams]
        return self.head(loop.collapse("layers.1.mhc", streams))


class Squeezed(Model):
    """A gate pools over tokens before the channels show: no reason to refuse."""

    def forward(self, x):
        for f in self.f[:2]:
            gate = self.f[3](x.mean(1, keepdim=True)).sigmoid()
            x = x + gate * f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f[:2]):
            streams = loop.step(
                f"mhc.{k}", streams,
                lambda h, f=f: self.f[3](h.mean(1, keepdim=True)).sigmoid() * f(h),
            )  # fmt: skip
        return self.head(loop.collapse("mhc", streams))


class PackedBlock(nn.Module):
    """Tokens are packed before the sublayer and unpacked behind it; sizes are read before."""

    def __init__(self):
        super().__init__()
        self.a = mlp()

    def forward(self, x):
        batch, length, width = x.shape
        x = x.reshape(-1, width)
        x = x + self.a(x)
        return x.view(batch, length, width)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(PackedBlock() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, layer in enumerate(self.layers):
            streams = loop.step(f"layers.{k}.mhc.0", streams, layer.a)
        return self.head(loop.collapse("layers.2.mhc", streams))


class AverageOfStates(Model):
    """Every state is read again at the end: the mean of its streams."""

    def forward(self, x):
        states = []
        for f in self.f[:3]:
            x = x + f(x)
            states.append(x)
        return self.head(self.f[3](torch.stack(states)).sum(0))

    def by_hand(self, loop, x):
        streams, states = [x] * N, []
        for k, f in enumerate(self.f[:3]):
            streams = loop.step(f"mhc.{k}", streams, f)
            states.append(sum(streams) / N)
        states[-1] = loop.collapse("mhc", streams)
        return self.head(self.f[3](torch.stack(states)).sum(0))


class ReadTwice(Model):
    """The sublayer reads the state and a copy of it; the copy is added."""

    def forward(self, x):
        for f in self.f:
            skip = x.clone()
            x = skip + f(x) * skip.sigmoid()
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, lambda h, f=f: f(h) * h.sigmoid())
        return self.head(loop.collapse("mhc", streams))


class ScaleModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * self.scale.view(1, 1, -1)


class ScaledByModule(Model):
    """CaFormer: the scale of the skip is a module."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList(ScaleModule() for _ in range(self.depth))

    def forward(self, x):
        for f, scale in zip(self.f, self.scales, strict=True):
            x = scale(x) + f(x)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, (f, scale) in enumerate(zip(self.f, self.scales, strict=True)):
            streams = loop.step(f"mhc.{k}", streams, f, scale=scale.scale)
        return self.head(loop.collapse("mhc", streams))


class CubicHead(Model):
    """gelu's cubic behind the stream is arithmetic, no residual."""

    def forward(self, x):
        for f in self.f:
            x = x + f(x)
        y = self.f[0](x)
        return self.head(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.0447 * y.pow(3)))))


class Lerps(Model):
    def forward(self, x):
        x = torch.lerp(x, self.f[0](x), 0.3)
        x = torch.lerp(x, self.f[1](x), self.vector - 0.4)
        return self.head(x)

    def by_hand(self, loop, x):
        streams = loop.step("mhc.0", [x] * N, self.f[0], scale=0.7, sign=0.3)
        weight = self.vector - 0.4
        streams = loop.step("mhc.1", streams, self.f[1], scale=1 - weight, sign=weight)
        return self.head(loop.collapse("mhc", streams))


class Sums(Model):
    """Python's sum starts with 0 + x."""

    def forward(self, x):
        for f in self.f:
            x = sum([x, f(x)])
        return self.head(x)

    by_hand = InRoot.by_hand


class Branches(nn.Module):
    """A sublayer module that returns the branches of a parallel block, for the caller to add."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = mlp()[0], nn.Linear(WIDTH, 2 * WIDTH), mlp()

    def forward(self, x):
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return a, self.down(b.tanh()), a.sigmoid()


class ParallelBranches(Model):
    """Three branches of one state, added at once, one after another, or in place."""

    depth = 3

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(Branches() for _ in range(self.depth))

    def forward(self, x):
        a, b, c = self.f[0](x)
        x = x + a + b + c
        a, b, c = self.f[1](x)
        x = x + a
        x = b + x
        x = x + c
        a, b, c = self.f[2](x)
        x = x + a
        x += b
        x += c
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, lambda h, f=f: sum(f(h)))
        return self.head(loop.collapse("mhc", streams))


class PostNormBehindCast(Model):
    """Post-norm; one sum is made in another precision, so its norm stands behind a cast."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(self.depth))

    def forward(self, x):
        for k, f in enumerate(self.f):
            x = self.norms[k]((x + f(x)).to(x.dtype) if k == self.depth - 1 else x + f(x))
        return self.head(x)

    def by_hand(self, loop, x):
        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = [self.norms[k](s) for s in loop.step(f"mhc.{k}", streams, f)]
        return self.head(loop.collapse("mhc", streams))


class HandsViewBack(Model):
    """A module gets a view of the stream and returns it beside its branch; the root adds them."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(WithInput(f) for f in self.f)

    def forward(self, x):
        for pair in self.pairs:
            f, rest = pair(x.flatten(0, 1))
            x = (f + rest).view_as(x)
        return self.head(x)

    by_hand = InRoot.by_hand


class WithInput(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x), x


class ReadInTwoShapes(Model):
    """The residual is reshaped and scaled; the sublayer reads it before and behind that."""

    def forward(self, x):
        for f in self.f:
            gate = x.square().mean(-1).reshape(-1, 1).sigmoid()
            flat = x.reshape(-1, WIDTH)
            x = (self.scalar * flat + gate * f(flat)).view_as(x)
        return self.head(x)

    def by_hand(self, loop, x):
        def sublayer(h, f):
            return h.square().mean(-1, keepdim=True).sigmoid() * f(h)

        streams = [x] * N
        for k, f in enumerate(self.f):
            streams = loop.step(f"mhc.{k}", streams, lambda h, f=f: sublayer(h, f), self.scalar)
        return self.head(loop.collapse("mhc", streams))


class TwoTowers(Model):
    """Two streams that start from one value."""

    def forward(self, x):
        a, b = x + self.f[0](x), x + self.f[1](x)
        a, b = a + self.f[2](a), b + self.f[3](b)
        return self.head(a * b.sigmoid())

    def by_hand(self, loop, x):
        a, b = (loop.step(f"mhc.{k}", [x] * N, self.f[k]) for k in (0, 1))
        a, b = loop.step("mhc.2", a, self.f[2]), loop.step("mhc.3", b, self.f[3])
        weights = [loop.state[f"mhc.collapse{k}.weight"] for k in (0, 1)]
        a, b = (
            sum(w * s for w, s in zip(weight, streams, strict=True))
            for weight, streams in zip(weights, (a, b), strict=True)
        )
        return self.head(a * b.sigmoid())


class Forked(Model):
    """Two streams start where the first one ends, behind a module that changes nothing."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x):
        x = x + self.f[0](x)
        x = self.identity(x + self.f[1](x))
        a, b = x + self.f[2](x), x + self.f[3](x)
        return self.head(a * b.sigmoid())

    def by_hand(self, loop, x):
        x = loop.step("mhc.1", loop.step("mhc.0", [x] * N, self.f[0]), self.f[1])
        x = self.joined(loop, 0, x)
        a, b = (loop.step(f"mhc.{k}", [x] * N, self.f[k]) for k in (2, 3))
        return self.head(self.joined(loop, 1, a) * self.joined(loop, 2, b).sigmoid())

    @staticmethod
    def joined(loop, k, streams):
        weight = loop.state[f"mhc.collapse{k}.weight"]
        return sum(w * s for w, s in zip(weight, streams, strict=True))


class Decomposed(Model):
    """Autoformer: a moving average is split off between the sublayers; both parts go on."""

    def __init__(self):
        super().__init__()
        self.parts = Split()

    def forward(self, x):
        total = 0
        for f in self.f:
            x, trend = self.parts(x + f(x))
            total = total + trend
        return self.head(x) + total.mean()

    def by_hand(self, loop, x):
        streams, total = [x] * N, 0
        for k, f in enumerate(self.f):
            streams, trends = zip(*map(self.parts, loop.step(f"mhc.{k}", streams, f)), strict=True)
            total = total + sum(trends) / N
        return self.head(loop.collapse("mhc", streams)) + total.mean()


class Split(nn.Module):
    def forward(self, x):
        trend = torch.nn.functional.avg_pool1d(x.mT, 3, 1, 1).mT
        return x - trend, trend


class Joined(Model):
    """Two streams are concatenated and go on as a third one, as in Flux."""

    def forward(self, x):
        a, b = x, self.f[3](x)
        a, b = a + self.f[0](a), b + self.f[1](b)
        a, b = a + self.f[1](a), b + self.f[0](b)
        c = torch.cat([a, b], 1)
        c = c + self.f[2](c)
        length = x.shape[1]
        a, b = c[:, :length], c[:, length:]
        c = torch.cat([a, b], 1)
        return self.head(c + self.f[3](c))


class Reversible(Model):
    """Two streams that take turns; their sum at the end is a site of neither."""

    def forward(self, x):
        a = b = x
        a = a + self.f[0](b)
        b = b + self.f[1](a)
        a = a + self.f[2](b)
        b = b + self.f[3](a)
        return self.head(a + b)


@dataclass(frozen=True)
class Pattern:
    model: type
    sites: tuple[int, ...]


PATTERNS = (
    Pattern(InRoot, (4,)), Pattern(ScaledByNumber, (4,)), Pattern(ScaledByParameter, (3,)),
    Pattern(ScaledByCondition, (2,)), Pattern(Differences, (2,)), Pattern(AlphaOnEitherTerm, (2,)),
    Pattern(Reinjected, (4,)), Pattern(LongSkips, (4,)), Pattern(Injected, (4,)),
    Pattern(Shifted, (2,)), Pattern(Transposed, (2,)), Pattern(FlattenedAdd, (4,)),
    Pattern(InlineNorm, (4,)), Pattern(Probed, (2,)), Pattern(AddNormHelper, (4,)),
    Pattern(LateAdd, (3,)), Pattern(NestedStates, (3,)), Pattern(TwoWays, (4, 4)),
    Pattern(Latents, (2,)),
    Pattern(LateToken, (2,)), Pattern(Reshaped, (4,)), Pattern(NormedOnce, (4,)),
    Pattern(Squeezed, (2,)), Pattern(Reversible, (2, 2)), Pattern(Packed, (3,)),
    Pattern(AverageOfStates, (3,)), Pattern(ReadTwice, (4,)), Pattern(ScaledByModule, (4,)),
    Pattern(CubicHead, (4,)), Pattern(Joined, (2, 2, 2)), Pattern(Lerps, (2,)), Pattern(Sums, (4,)),
    Pattern(TwoTowers, (2, 2)), Pattern(Decomposed, (4,)), Pattern(ParallelBranches, (3,)),
    Pattern(Forked, (2, 1, 1)), Pattern(PostNormBehindCast, (4,)),
    Pattern(HandsViewBack, (4,)), Pattern(ReadInTwoShapes, (4,)),
)  # fmt: skip
by_name = pytest.mark.parametrize("pattern", PATTERNS, ids=[p.model.__name__ for p in PATTERNS])


@by_name
def test_every_site_is_found_and_no_other(pattern):
    sites = mc.find_residuals(pattern.model(), normal(2, 6, WIDTH))
    counts = [0] * len(pattern.sites)
    for site in sites:
        assert site.accepted, site
        counts[site.stream] += 1
    assert tuple(counts) == pattern.sites


@by_name
def test_the_function_is_kept_at_the_start(pattern):
    model = pattern.model().double()
    x = normal(2, 6, WIDTH).double()
    shorter = x[:, :4].contiguous()
    wanted, other = model(x), model(shorter)
    mc.transform(model, example_inputs=x, streams=N)
    assert torch.allclose(model(x), wanted, rtol=1e-10, atol=1e-6)
    assert torch.allclose(model(shorter), other, rtol=1e-10, atol=1e-6)


@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if hasattr(p.model, "by_hand")],
    ids=[p.model.__name__ for p in PATTERNS if hasattr(p.model, "by_hand")],
)  # fmt: skip
def test_perturbed_connections_equal_a_loop_by_hand(pattern):
    plain = pattern.model().double()
    x = normal(2, 6, WIDTH, seed=1).double()
    model = mc.transform(copy.deepcopy(plain), example_inputs=x, streams=N)
    perturb(model)
    used = [n.removesuffix(".phi") for n, _ in mc.mhc_parameters(model) if n.endswith("phi")]
    assert len(used) == sum(pattern.sites)
    wanted = plain.by_hand(Loop(model, N), x)
    assert torch.allclose(model(x), wanted, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(plain(x), wanted, rtol=1e-2, atol=1e-2)


# --- refused, with the reason ---------------------------------------------------------------------


class Highway(Model):
    """The skip is gated by what is computed from the stream."""

    def forward(self, x):
        for f in self.f[:3]:
            gate = torch.sigmoid(self.f[3](x))
            x = x * gate + f(x) * (1 - gate)
        return self.head(x)


class FusedProduct(Model):
    def forward(self, x):
        for f in self.f[:3]:
            flat = x.reshape(-1, WIDTH)
            x = torch.addmm(flat, f[1](flat), self.f[3][1].weight).view_as(x)
        return self.head(x)


class ChannelsFirst(nn.Module):
    """Tokens to an image and back, as DaViT does; the last axis of the add is its width."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def forward(self, x):
        for f in self.f:
            image = x.transpose(1, 2).unflatten(2, (2, 3))
            image = image + f(image)
            x = image.flatten(2).transpose(1, 2)
        return x


class ChannelsMoved(Model):
    """[B, C, T]: no convolution or norm tells, the linear behind the transposition does."""

    def forward(self, x):
        x = x.transpose(1, 2)
        for f in self.f[:3]:
            x = x + f[1](x.transpose(1, 2)).transpose(1, 2)
        return x


class ReinjectedBetweenTwoAxes(Model):
    """The embedding is mixed in as [B, T, C], residuals are added as [B, C, T]."""

    def forward(self, x):
        x0 = x
        for f in self.f[:3]:
            y = (0.8 * x + 0.3 * x0).transpose(1, 2)
            x = (y + f(y.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        return self.head(x)


class SkipInProduct(Model):
    def forward(self, x):
        for f in self.f[:3]:
            x = torch.addcmul(f(x), x, self.vector)
        return self.head(x)


class SomeTokens(Model):
    """Mixture of depths: only some tokens take part in a sublayer."""

    def forward(self, x):
        index = torch.tensor([0, 2])
        for f in self.f[:3]:
            x = x.index_add(1, index, f(x[:, index]))
        return self.head(x)


class PutTogether(Model):
    """The class token goes another way than the patches, then both are added at once."""

    def forward(self, x):
        for f in self.f[:3]:
            first, rest = x[:, :1], x[:, 1:]
            x = torch.cat([first, rest], 1) + torch.cat([self.f[3](first), f(rest)], 1)
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Highway, "a gate"), (FusedProduct, "fused matrix product"), (ChannelsFirst, "channel axis"),
     (ChannelsMoved, "channel axis"), (ReinjectedBetweenTwoAxes, "channel axis"),
     (SkipInProduct, "factor of addcmul"),
     (SomeTokens, "part of the tokens"), (PutTogether, "cut or joined")],
)  # fmt: skip
def test_residuals_without_a_counterpart_are_refused_with_the_reason(kind, text):
    model, x = kind(), normal(2, 6, WIDTH)
    sites = mc.find_residuals(model, x)
    assert len(sites) == 3
    assert not any(site.accepted for site in sites)
    assert all(text in site.reason or "same stream" in site.reason for site in sites)
    with pytest.raises(mc.MHCError, match=text) as error:
        mc.transform(model, example_inputs=x)
    assert "test_patterns.py:" in str(error.value)
