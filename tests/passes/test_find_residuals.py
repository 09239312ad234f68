"""What counts as a residual add, to which block and stream it belongs, and what is left alone."""

import gc
import time

import pytest
import torch
import transformers as hf
from models import (
    ARCHITECTURES,
    MLP,
    WIDTH,
    Attention,
    Block,
    NanoGPT,
    largest,
    normal,
    perturb,
    tokens,
)
from torch import nn

import mhc_compile as mc


class Parts(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)


class Parallel(Parts):
    def forward(self, x):
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class InPlace(Parts):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x += self.mlp(self.ln_2(x))
        return x


class Addcmul(Parts):
    def __init__(self, width, dropout=0.0):
        super().__init__(width, dropout)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = torch.addcmul(x, self.attn(self.ln_1(x)), self.gamma)
        return torch.add(x, self.mlp(self.ln_2(x)), alpha=0.5)


class LoRA(nn.Module):
    """A low-rank update: two linears of the same input are added, but neither is the input."""

    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class WithLoRA(Parts):
    def __init__(self, width, dropout=0.0):
        super().__init__(width, dropout)
        self.mlp = nn.Sequential(LoRA(width), nn.GELU(), LoRA(width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CubicGelu(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3))))


class WithCubicGelu(Block):
    def __init__(self, width, dropout=0.0):
        super().__init__(width, dropout)
        self.mlp[1] = CubicGelu()


class SharedExpert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.routed, self.shared = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        y = torch.relu(self.routed(x))
        return y + self.shared(y)  # a residual-like add inside a branch


class WithExperts(Block):
    def __init__(self, width, dropout=0.0):
        super().__init__(width, dropout)
        self.mlp = SharedExpert(width)


FORMS = [
    (Block, ["attn", "mlp"]),
    (InPlace, ["attn", "mlp"]),
    (Addcmul, ["attn", "mlp"]),
    # (x + attention) + mlp is one site with two terms in its branch.
    (Parallel, ["mlp"]),
    (WithLoRA, ["attn", "mlp"]),
    (WithCubicGelu, ["attn", "mlp"]),
    (WithExperts, ["attn", "mlp"]),
]


@pytest.mark.parametrize(("block", "roles"), FORMS, ids=[f[0].__name__ for f in FORMS])
@torch.no_grad()
def test_sites_of_a_block(block, roles):
    model = NanoGPT(block=block, depth=3).eval()
    sites = mc.find_residuals(model)
    assert [s.name for s in sites] == [f"h.{k}.{role}" for k in range(3) for role in roles]
    assert {s.stream for s in sites} == {0}
    assert all(s.accepted for s in sites)
    idx = tokens()
    before = model(idx)
    mc.transform(model)
    assert (model(idx) - before).abs().max() <= 1e-6 * largest(before)


class InTheRoot(nn.Module):
    """All residual adds stand in the root module's own forward."""

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, idx):
        x = self.embed(idx)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


@torch.no_grad()
def test_residuals_in_the_root_module():
    model, idx = InTheRoot().eval(), tokens()
    sites = mc.find_residuals(model)
    assert [(s.name, s.module) for s in sites] == [(f"layers.{k}", "") for k in range(3)]
    before = model(idx)
    mc.transform(model)
    assert {k.rsplit(".", 1)[0] for k, _ in mc.mhc_parameters(model)} == {
        "mhc.0", "mhc.1", "mhc.2", "mhc.collapse",
    }  # fmt: skip
    assert (model(idx) - before).abs().max() <= 1e-6 * largest(before)
    perturb(model)
    assert (model(idx) - before).abs().max() > 1e-3
    assert model(tokens(1, 3)).shape == (1, 3, WIDTH)


class Stack(nn.Module):
    """A block with more sites than two."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = x + torch.tanh(self.one(x))
        x = x + torch.tanh(self.two(x))
        return x + torch.tanh(self.three(x))


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("left_out", ["one", "two", "three"])
@torch.no_grad()
def test_filter_fn_leaves_one_site_of_a_block_plain(left_out, init):
    """The middle one splits the block: its first site and its last belong to two streams."""
    model, idx = NanoGPT(block=Stack).eval(), tokens()
    before = model(idx)
    filter_fn = lambda site: not site.name.endswith(left_out)  # noqa: E731
    mc.transform(model, streams=2, init=init, filter_fn=filter_fn)
    got = model(idx)
    assert got.shape == before.shape
    assert init == "paper" or (got - before).abs().max() <= 1e-6 * largest(before)
    count = sum(isinstance(m, mc.HyperConnection) for m in model.modules())
    assert count == 4, "a site that filter_fn took was dropped in silence"


@torch.no_grad()
def test_filter_fn_sees_every_site_once():
    seen = []
    mc.transform(NanoGPT(), filter_fn=lambda site: seen.append(site) or True)
    assert [s.name for s in seen] == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]
    assert all(isinstance(s, mc.ResidualSite) for s in seen)


class Shared(nn.Module):
    """One block for every layer, as in ALBERT: it runs three times with the same weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(97, WIDTH), Block()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, idx):
        x = self.embed(idx)
        for _ in range(3):
            x = self.block(x)
        return self.norm(x)


@torch.no_grad()
def test_a_block_that_runs_three_times_is_owned_by_its_caller():
    model, idx = Shared().eval(), tokens()
    sites = mc.find_residuals(model)
    assert len(sites) == 6
    assert len({s.name for s in sites}) == 6
    assert {(s.module, s.stream) for s in sites} == {("", 0)}
    before = model(idx)
    mc.transform(model, streams=2)
    # Each run gets a connection of its own; they could not differ on a shared block.
    assert sum(isinstance(m, mc.HyperConnection) for m in model.modules()) == 6
    assert (model(idx) - before).abs().max() <= 1e-6 * largest(before)
    perturb(model)
    assert (model(idx) - before).abs().max() > 1e-3


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.ModuleList(Block() for _ in range(2))
        self.right = nn.ModuleList(Block() for _ in range(2))
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        left = right = x
        for a, b in zip(self.left, self.right, strict=True):
            left, right = a(left), b(right)
        return self.join(torch.cat([left, right], -1))


@torch.no_grad()
def test_towers_are_streams_of_their_own():
    model, x = TwoTowers().eval(), normal(2, 8, WIDTH)
    sites = mc.find_residuals(model, x)
    by_stream = {s.stream: [t.module for t in sites if t.stream == s.stream] for s in sites}
    assert by_stream == {
        0: ["left.0", "left.0", "left.1", "left.1"], 1: ["right.0", "right.0", "right.1", "right.1"]
    }  # fmt: skip
    before = model(x)
    mc.transform(model, example_inputs=x)
    assert (model(x) - before).abs().max() <= 1e-6 * largest(before)


class ProjectedShortcut(nn.Module):
    """Between its stages the skip goes through a linear, which is no residual."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Block(), Block()
        self.short, self.long = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.one(x)
        x = self.short(x) + self.long(torch.relu(x))
        return self.two(x)


@torch.no_grad()
def test_a_projected_shortcut_is_no_site_and_splits_the_stream():
    model, x = ProjectedShortcut().eval(), normal(2, 8, WIDTH)
    sites = mc.find_residuals(model, x)
    assert [(s.name, s.stream) for s in sites] == [
        ("one.attn", 0), ("one.mlp", 0), ("two.attn", 1), ("two.mlp", 1),
    ]  # fmt: skip
    before = model(x)
    mc.transform(model, example_inputs=x)
    assert (model(x) - before).abs().max() <= 1e-6 * largest(before)


class LongSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        first = x
        for block in self.h:
            x = block(x)
        return x + first


def test_a_skip_around_the_whole_stream_stays_plain():
    model, x = LongSkip(), normal(2, 8, WIDTH)
    wanted = model(x)
    assert [site.name for site in mc.find_residuals(model, x)] == [
        "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp",
    ]  # fmt: skip
    mc.transform(model, example_inputs=x)
    torch.testing.assert_close(model(x), wanted)


# --- what it says, and how fast -------------------------------------------------------------------


def test_the_list_prints_as_an_explanation():
    sites = mc.find_residuals(ARCHITECTURES["t5"].build(), ARCHITECTURES["t5"].inputs())
    assert isinstance(sites, list)
    text = str(sites)
    first, second = str(sites[0]), str(sites[1])
    for site in sites:
        assert site.name in text
        assert site.source in text
    assert "starts the stream" in first
    assert "SelfAttention" in first
    assert "weights" in first
    assert "continues site 0" in second
    assert "rewritten" in first


class HalfRefused(nn.Module):
    """One block whose channels are last, one whose are not, with a projection between."""

    def __init__(self):
        super().__init__()
        self.block, self.conv = Block(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        image = self.conv(self.block(x).transpose(1, 2).unflatten(2, (2, -1)))
        return image + self.conv(image)


def test_refused_sites_print_the_reason_and_stay_plain():
    model, x = HalfRefused(), normal(2, 8, WIDTH)
    wanted = model(x)
    sites = mc.find_residuals(model, x)
    assert [site.accepted for site in sites] == [True, True, False]
    assert "channel axis" in sites[-1].reason
    # The table wraps its cells, so words stand on lines of their own.
    assert "Refused:" in str(sites)
    assert "refused: its last axis is not the channel axis" in str(sites[-1])
    mc.transform(model, example_inputs=x, strict=False)
    assert len(list(mc.mhc_parameters(model))) == 2 * 3 + 1
    torch.testing.assert_close(model(x), wanted)


class FailsToTrace(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if x.sum() > 1e9:
            x = -x
        return x + self.mlp(self.ln_2(x))


def test_what_only_the_rewrite_finds_out_is_listed_too():
    model, x = nn.Sequential(Block(), FailsToTrace(), Block()), normal(2, 8, WIDTH)
    wanted = model(x)
    sites = mc.find_residuals(model, x)
    assert [site.accepted for site in sites] == [True, True, False, False, True, True]
    assert "x.sum" not in sites[2].reason
    assert "bool() of a tensor" in sites[2].reason
    assert "test_find_residuals.py:" in sites[2].reason
    mc.transform(model, example_inputs=x, strict=False)
    assert not mc.is_transformed(model[1])
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_deep_model_takes_less_than_two_seconds(name):
    """24 layers; nor may the time grow much faster than the number of layers."""
    config = {"gpt2": ("n_layer", "h"), "bert": ("num_hidden_layers", "layer")}[name]
    kinds = {"gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel), "bert": (hf.BertConfig, hf.BertModel)}
    make_config, make = kinds[name]
    width = {"n_embd": 64, "n_head": 4} if name == "gpt2" else {
        "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
    inputs = {"input_ids": tokens()}
    mc.find_residuals(nn.Sequential(Block()), normal(1, 2, WIDTH))  # torch imports its compiler
    gc.collect()
    gc.freeze()  # what other tests left is not looked through again and again
    spent = {}
    for layers in (6, 24):
        model = make(make_config(vocab_size=97, **{config[0]: layers}, **width)).eval()
        times = []
        for _ in range(5):
            start = time.process_time()
            model(**inputs)
            forward = time.process_time() - start
            start = time.process_time()
            assert len(mc.find_residuals(model, inputs)) == 2 * layers
            times.append(time.process_time() - start - 2 * forward)
        spent[layers] = min(times)
    gc.unfreeze()
    assert spent[24] < 2 and spent[24] < 8 * spent[6], spent


class TokenMixer(nn.Module):
    """ResMLP: an affine norm, then a linear over the tokens; only the norm tells the channels."""

    def __init__(self):
        super().__init__()
        self.scale, self.offset = (
            nn.Parameter(torch.ones(WIDTH)),
            nn.Parameter(torch.ones(1, WIDTH)),
        )
        self.tokens, self.channels = nn.Linear(6, 6), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.tokens((x * self.scale + self.offset).mT).mT
        return x + self.channels(x)


def test_an_affine_norm_tells_the_channel_axis():
    sites = mc.find_residuals(TokenMixer(), normal(2, 6, WIDTH))
    assert [site.accepted for site in sites] == [True, True]
