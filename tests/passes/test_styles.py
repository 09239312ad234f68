"""Styles in which blocks are written, transformed on one example and called with other sizes."""

import collections
import copy
import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import normal
from torch import nn

import mhc_compile as mc

WIDTH = 8
SCALE = 2.0
SETTINGS = {"scale": 1.0}
SCALES = {8: 2.0, 5: 3.0}


class Style(nn.Module):
    """A block whose branch is written in some style."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.register_buffer("table", torch.zeros(1, 1, 1))

    def forward(self, x):
        h = self.lin(x)
        x = x + type(self).style(self, h)
        return x + self.mlp(x)


def build(style):
    """A plain model of two blocks, and its blocks' class for messages."""
    kind = type("Styled", (Style,), {"style": staticmethod(style)})
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind(), nn.Linear(WIDTH, 5)).eval()


@functools.lru_cache
def positions(length):
    return torch.arange(length).view(1, length, 1) / length


def unbind(block, h):
    state, states = h[:, 0], []
    for token in h.unbind(1):
        state = 0.5 * state + token
        states.append(state)
    return torch.stack(states, 1)


def windows(block, h):
    length, pad = h.shape[1], -h.shape[1] % 4
    if pad:
        h = F.pad(h, (0, 0, 0, pad))
    return h.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)[:, :length]


def grown_table(block, h):
    length = h.shape[1]
    if length > block.table.shape[1]:
        block.table = torch.arange(length).view(1, length, 1) / length
    return h + block.table[:, :length]


def written_out(block, h):
    into = torch.empty_like(h)
    torch.mul(h, 2, out=into)
    return h + into


def key_error(block, h):
    try:
        return h * SCALES[h.shape[1]]
    except KeyError:
        return h


def python(block, h):
    pair = collections.namedtuple("Pair", "h n")(h, h.shape[1])
    recent = collections.deque([pair.h, 2 * h], maxlen=2)
    sizes = sorted([*h.shape, 9])
    whole, rest = divmod(pair.n, 3)
    return sum(recent) * sizes[0] + whole + rest + functools.reduce(max, h.shape)


WORKS = {
    "repeated list": lambda b, h: h + sum(len(c) for c in h.split([1] * h.shape[1], 1)),
    "len": lambda b, h: h / len(h) + len(h[0]),
    "range": lambda b, h: torch.cat([h[:, i : i + 4].cumsum(1) for i in range(0, len(h[0]), 4)], 1),
    "pad if needed": windows,
    "int of a size": lambda b, h: h + int(h.shape[1] * 0.5) + math.ceil(h.size(1) / 3),
    "max and min": lambda b, h: (
        h[:, : min(h.shape[1], 3)].mean(1, keepdim=True) * h * max(6, *h.shape)
    ),
    "get": lambda b, h: h * SCALES.get(h.shape[1], 1.0),
    "in a dict": lambda b, h: h * SCALES[h.shape[1]] if h.shape[1] in SCALES else h,
    "in a set": lambda b, h: h * 2 if h.shape[1] in {8, 12} else h,
    "f-string": lambda b, h: h * {"n8": 2.0}.get(f"n{h.shape[1]}", 1.0),
    "str": lambda b, h: h * {"8": 2.0}.get(str(h.shape[1]), 1.0),
    "text of a shape": lambda b, h: h * len(str(h.shape)),
    "isinstance of a shape": lambda b, h: h * 2 if isinstance(h.shape, torch.Size) else h,
    "type of a size": lambda b, h: h * 2 if type(h.shape[1]) is int else h,
    "type of a tensor": lambda b, h: h * 2 if type(h) is torch.Tensor else h,
    "numel of a shape": lambda b, h: h * h.shape[:-1].numel(),
    "shape equals": lambda b, h: h * 2 if h.shape == (2, 8, WIDTH) else h,
    "numpy": lambda b, h: h[:, np.arange(h.shape[1])[::-1].copy()] * float(np.sqrt(h.shape[1])),
    "lru_cache": lambda b, h: h + positions(h.shape[1]),
    "table that grows": grown_table,
    "out=": written_out,
    "KeyError": key_error,
    "python": python,
    "walrus": lambda b, h: h * n if (n := h.shape[1]) > 6 else h,
    "partial": lambda b, h: functools.partial(torch.mul, other=h.shape[1])(h),
    "nonzero": lambda b, h: h + (h > 0).nonzero().shape[0] / 10 + h[h < 0].numel() / 10,
    "unique": lambda b, h: h + torch.unique(h.round()).shape[0],
    "global": lambda b, h: h * SCALE * SETTINGS["scale"],
    "gradients": lambda b, h: h * 2 if torch.is_grad_enabled() else h,
}

COUNTED_INSIDE = {
    "split": lambda b, h: torch.cat([c - c.mean(1, keepdim=True) for c in h.split(4, 1)], 1),
    "sum of split": lambda b, h: h + sum(c.mean(1, keepdim=True) for c in h.split(4, 1)),
    "unbind": unbind,
    "chunks": lambda b, h: h + len(h.chunk(4, 1)),
}
"""How many parts there are is known only inside the block: another number is an error."""


def agrees(model, original, x):
    expected = original(x)
    torch.testing.assert_close(
        model(x), expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.detach().abs().max()))
    )


@pytest.mark.parametrize("name", WORKS)
def test_other_sizes_and_settings(name, monkeypatch):
    original = build(WORKS[name])
    model = mc.transform(copy.deepcopy(original), streams=2, example_inputs=normal(2, 8, WIDTH))
    with torch.set_grad_enabled(name == "gradients"):
        for shape in ((2, 8), (3, 12), (1, 5), (1, 1)):
            agrees(model, original, normal(*shape, WIDTH, seed=shape[1]))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    monkeypatch.setitem(SETTINGS, "scale", 0.5)
    with torch.no_grad():
        agrees(model, original, normal(2, 8, WIDTH))


@pytest.mark.parametrize("name", COUNTED_INSIDE)
@torch.no_grad()
def test_another_number_of_parts_is_an_error(name):
    original = build(COUNTED_INSIDE[name])
    model = mc.transform(copy.deepcopy(original), streams=2, example_inputs=normal(2, 8, WIDTH))
    agrees(model, original, normal(3, 8, WIDTH))
    with pytest.raises(mc.MHCError, match=r"test_styles.py:\d+ saw 'tuple\(Tensor, Tensor"):
        model(normal(2, 3, WIDTH))


class FallsBack(Style):
    def forward(self, x):
        h = self.lin(x)
        try:
            h = h.unflatten(1, (-1, 3)).flatten(1, 2)
        except RuntimeError:
            h = h * 2
        return x + h


class Remembers(Style):
    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(x.shape[1])
        return x + self.lin(x) * len(seen)


REFUSED = [
    (FallsBack, r"catches the RuntimeError .*test_styles.py:\d+"),
    (Remembers, r"default argument 'seen' at .*test_styles.py:\d+"),
]


@pytest.mark.parametrize(("kind", "text"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_refused_with_the_line(kind, text):
    with pytest.raises(mc.MHCError, match=text):
        mc.transform(nn.Sequential(kind()), streams=2, example_inputs=normal(2, 8, WIDTH))


class SkipsAtRandom(Style):
    def forward(self, x):
        x = x + self.lin(x) * (0.5 + random.random())
        return x + self.mlp(x)


def test_random_numbers_of_python_are_refused():
    before = random.getstate()
    with pytest.raises(mc.MHCError, match=r"Python's random numbers at .*test_styles.py:\d+"):
        mc.transform(nn.Sequential(SkipsAtRandom()), streams=2, example_inputs=normal(2, 8, WIDTH))
    assert random.getstate() == before


class Returns(nn.Module):
    def __init__(self, long, short):
        super().__init__()
        self.lin, self.long, self.short = nn.Linear(WIDTH, WIDTH), long, short

    def forward(self, x):
        return (self.lin(x), *(self.long if x.shape[1] > 6 else self.short))


class UsesAll(Style):
    def __init__(self, sub):
        super().__init__()
        self.sub = sub

    def forward(self, x):
        h, *more = self.sub(x)
        for part in more:
            h = h * 2 if part else h
        return x + h


@pytest.mark.parametrize("more", [(None,), (1.0, "text"), (), (False,)], ids=str)
def test_a_result_of_another_form_is_an_error(more):
    model = nn.Sequential(UsesAll(Returns(more, (True,))))
    mc.transform(model, streams=2, example_inputs=normal(2, 8, WIDTH))
    with pytest.raises(mc.MHCError, match=r"test_styles.py:\d+ saw .* when the block was traced"):
        model(normal(2, 5, WIDTH))


class AddsContext(Style):
    def forward(self, x, context):
        longer = (x + context).shape[1] > 1
        x = x + self.lin(x) * (2 if longer else 1)
        return x + self.mlp(x)


def test_a_sum_may_be_longer_than_its_first_term():
    model = AddsContext()
    one, three = normal(2, 1, WIDTH), normal(2, 3, WIDTH)
    mc.transform(model, streams=2, example_inputs=(one, one))
    with pytest.raises(mc.MHCError, match=r"test_styles.py:\d+ saw False"):
        model(one, three)
