"""Rewritten models against a hand-written loop over the original model's own submodules."""

import copy

import pytest
import torch
from models import ARCHITECTURES, NanoGPT, largest, logits, normal, perturb, tokens
from models import MLP as PlainMLP
from models import Attention as PlainAttention
from oracle import Loop
from torch import nn

import mhc_compile as mc

SAMPLES = [("mhc", 4), ("mhc", 3), ("hc", 2), ("hc", 4)]


# --- the sublayers of each architecture -----------------------------------------------------------


def causal_mask(length, dtype):
    upper = torch.ones(length, length).triu(1).bool()
    return torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(upper, torch.finfo(dtype).min)


def gpt2_by_hand(model, loop, input_ids):
    inner, sublayers = model.transformer, []
    x = inner.wte(input_ids) + inner.wpe(torch.arange(input_ids.shape[1]))
    mask = causal_mask(input_ids.shape[1], x.dtype)
    for k, block in enumerate(inner.h):
        name = f"transformer.h.{k}.mhc"
        sublayers += [
            (f"{name}.0", lambda h, b=block: b.attn(b.ln_1(h), attention_mask=mask)[0], None),
            (f"{name}.1", lambda h, b=block: b.mlp(b.ln_2(h)), None),
        ]
    return model.lm_head(inner.ln_f(loop(x, sublayers)))


def llama_by_hand(model, loop, input_ids):
    inner, sublayers = model.model, []
    x = inner.embed_tokens(input_ids)
    rotary = inner.rotary_emb(x, torch.arange(input_ids.shape[1]).unsqueeze(0))
    mask = causal_mask(input_ids.shape[1], x.dtype)

    def attention(h, layer):
        return layer.self_attn(layer.input_layernorm(h), rotary, mask)[0]

    for k, layer in enumerate(inner.layers):
        name = f"model.layers.{k}.mhc"
        sublayers += [
            (f"{name}.0", lambda h, b=layer: attention(h, b), None),
            (f"{name}.1", lambda h, b=layer: b.mlp(b.post_attention_layernorm(h)), None),
        ]
    return model.lm_head(inner.norm(loop(x, sublayers)))


def bert_by_hand(model, loop, input_ids):
    inner, sublayers = model.bert, []
    for k, layer in enumerate(inner.encoder.layer):
        name, out = f"bert.encoder.layer.{k}.mhc", layer.attention.output
        sublayers += [
            (f"{name}.0", lambda h, b=layer.attention: b.output.dense(b.self(h)[0]), out.LayerNorm),
            (
                f"{name}.1",
                lambda h, b=layer: b.output.dense(b.intermediate(h)),
                layer.output.LayerNorm,
            ),
        ]
    return model.cls(loop(inner.embeddings(input_ids), sublayers))


def t5_by_hand(model, loop, input_ids, decoder_input_ids):
    def stack(stack, ids, memory=None):
        kind = "encoder" if memory is None else "decoder"
        mask = None if memory is None else causal_mask(ids.shape[1], memory.dtype)
        length = ids.shape[1]
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length)

        def attend(h, part):
            return part.SelfAttention(part.layer_norm(h), mask=mask, position_bias=bias)[0]

        def cross(h, part):
            return part.EncDecAttention(part.layer_norm(h), key_value_states=memory)[0]

        def feed(h, part):
            return part.DenseReluDense(part.layer_norm(h))

        roles = (attend, feed) if memory is None else (attend, cross, feed)
        sublayers = [
            (f"{kind}.block.{k}.layer.{j}.mhc.0", lambda h, r=role, p=block.layer[j]: r(h, p), None)
            for k, block in enumerate(stack.block)
            for j, role in enumerate(roles)
        ]
        return stack.final_layer_norm(loop(stack.embed_tokens(ids), sublayers))

    memory = stack(model.encoder, input_ids)
    scale = model.config.d_model**-0.5  # of T5 with tied embeddings
    return model.lm_head(scale * stack(model.decoder, decoder_input_ids, memory))


def torch_encoder_by_hand(model, loop, src):
    sublayers = []
    for k, layer in enumerate(model.layers):

        def attend(h, b=layer):
            h = b.norm1(h) if b.norm_first else h
            return b.self_attn(h, h, h, need_weights=False)[0]

        def feed(h, b=layer):
            return b.linear2(torch.relu(b.linear1(b.norm2(h) if b.norm_first else h)))

        norms = (None, None) if layer.norm_first else (layer.norm1, layer.norm2)
        sublayers += [
            (f"layers.{k}.mhc.0", attend, norms[0]),
            (f"layers.{k}.mhc.1", feed, norms[1]),
        ]
    return loop(src, sublayers)


def pre_norm(block):
    return (
        lambda h: block.attn(block.ln_1(h)),
        lambda h: block.mlp(block.ln_2(h)),
    )


def nanogpt_by_hand(model, loop, idx, sublayers_of=pre_norm):
    x = model.wte(idx) + model.wpe(torch.arange(idx.shape[1]))
    sublayers = [
        (f"h.{k}.mhc.{j}", sublayer, None)
        for k, block in enumerate(model.h)
        for j, sublayer in enumerate(sublayers_of(block))
    ]
    return model.head(model.ln_f(loop(x, sublayers)))


BY_HAND = {
    "gpt2": gpt2_by_hand,
    "llama": llama_by_hand,
    "bert": bert_by_hand,
    "t5": t5_by_hand,
    "encoder_pre": torch_encoder_by_hand,
    "encoder_post": torch_encoder_by_hand,
    "nanogpt": nanogpt_by_hand,
}
# These compute their RMSNorm in float32 whatever the dtype, which leaves its rounding.
TOLERANCE = {"llama": 2e-6, "t5": 2e-6}


def as_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize(("connection", "n"), SAMPLES)
@pytest.mark.parametrize("name", BY_HAND)
@torch.no_grad()
def test_equals_the_loop(name, connection, n):
    architecture = ARCHITECTURES[name]
    original = architecture.build(seed=n)
    model = copy.deepcopy(original)
    mc.transform(model, example_inputs=architecture.inputs(), streams=n, connection=connection)
    # Unconstrained mixing amplifies float32's own rounding with the size of the perturbation.
    perturb(model, seed=n, scale=0.5 if connection == "hc" else 1.0)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, TOLERANCE.get(name, 1e-11))]:
        original.to(dtype), model.to(dtype)
        inputs = architecture.inputs(2, 7, seed=n + 50)
        inputs = as_double(inputs) if dtype is torch.float64 else inputs
        expected = BY_HAND[name](original, Loop(model, n, connection), **inputs)
        assert expected.dtype == dtype
        got = logits(model, inputs)
        assert (got - expected).abs().max() <= tolerance * largest(expected)
        # The perturbed function is not the original one, so equality means something.
        assert (logits(original, inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("convention", mc.CONVENTIONS)
@torch.no_grad()
def test_equals_the_loop_in_every_convention(convention):
    n = 3
    architecture = ARCHITECTURES["nanogpt"]
    original = architecture.build(seed=3)
    model = copy.deepcopy(original)
    # With a post gate below 1 no start keeps the function.
    init = "paper" if mc.CONVENTIONS[convention].post_multiplier <= 1 else "preserve"
    inputs = architecture.inputs(seed=4)
    mc.transform(model, example_inputs=inputs, streams=n, convention=convention, init=init)
    perturb(model, seed=5).double()
    original.double()
    got = logits(model, inputs)
    results = {
        name: nanogpt_by_hand(original, Loop(model, n, convention=name), **inputs)
        for name in mc.CONVENTIONS
    }
    for name, result in results.items():
        difference = (got - result).abs().max()
        if name == convention:
            assert difference <= 1e-11 * largest(got)
        else:
            assert difference > 1e-9, f"{convention} cannot be told from {name}"


def test_gradients_equal_the_loop():
    n = 4
    original = ARCHITECTURES["nanogpt"].build(seed=7)
    model = perturb(mc.transform(copy.deepcopy(original), streams=n), seed=7).double()
    original.double()
    idx = tokens(2, 6, seed=8)
    logits(model, {"idx": idx}).square().mean().backward()
    loop = Loop(model, n)
    loop.state = dict(model.named_parameters())
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    nanogpt_by_hand(original, loop, idx).square().mean().backward()
    for key, parameter in [*original.named_parameters(), *mc.mhc_parameters(model)]:
        scale = float(parameter.grad.abs().max())
        assert scale > 1e-9, key
        assert (gradients[key] - parameter.grad).abs().max() <= 1e-9 * max(scale, 1e-3), key


# --- forms of the add -----------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), PlainAttention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), PlainMLP(width)
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.rand(width)),
            nn.Parameter(torch.rand(width)),
        )


class Parallel(Parts):
    def forward(self, x):
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))

    def sublayers(self):
        return (lambda h: self.attn(self.ln_1(h)) + self.mlp(self.ln_2(h)),)


class BranchFirst(Parts):
    def forward(self, x):
        x = self.attn(self.ln_1(x)) + x
        return self.mlp(self.ln_2(x)) + x

    def sublayers(self):
        return pre_norm(self)


class Alpha(Parts):
    def forward(self, x):
        x = torch.add(x, self.attn(self.ln_1(x)), alpha=0.5)
        return x.add(self.mlp(self.ln_2(x)), alpha=-2)

    def sublayers(self):
        attn, mlp = pre_norm(self)
        return (lambda h: 0.5 * attn(h), lambda h: -2 * mlp(h))


class LayerScale(Parts):
    def forward(self, x):
        x = torch.addcmul(x, self.attn(self.ln_1(x)), self.gamma_1)
        return x + self.gamma_2 * self.mlp(self.ln_2(x))

    def sublayers(self):
        attn, mlp = pre_norm(self)
        return (lambda h: attn(h) * self.gamma_1, lambda h: mlp(h) * self.gamma_2)


class ScaleFirst(Parts):
    def forward(self, x):
        x = torch.addcmul(x, self.gamma_1, self.attn(self.ln_1(x)))
        return torch.addcmul(x, self.mlp(self.ln_2(x)), torch.sigmoid(x), value=0.5)

    def sublayers(self):
        attn, mlp = pre_norm(self)
        return (lambda h: attn(h) * self.gamma_1, lambda h: 0.5 * mlp(h) * torch.sigmoid(h))


class InPlace(Parts):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x += self.mlp(self.ln_2(x))
        return x

    def sublayers(self):
        return pre_norm(self)


class InPlaceOnTheInput(Parts):
    def forward(self, x):
        x += self.attn(self.ln_1(x))
        x.add_(self.mlp(self.ln_2(x)))
        return x

    def sublayers(self):
        return pre_norm(self)


class ReadTwice(Parts):
    """A gate reads the residual beside the norm, as in some mixture layers."""

    def forward(self, x):
        x = x + torch.sigmoid(x) * self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def sublayers(self):
        attn, mlp = pre_norm(self)
        return (lambda h: torch.sigmoid(h) * attn(h), mlp)


class Sandwich(Parts):
    """Norms on both sides of the sublayer, and a residual multiplier."""

    def forward(self, x):
        x = x + 0.7 * self.ln_2(self.attn(self.ln_1(x)))
        return x + self.ln_1(self.mlp(self.ln_2(x))) * 0.7

    def sublayers(self):
        return (
            lambda h: 0.7 * self.ln_2(self.attn(self.ln_1(h))),
            lambda h: 0.7 * self.ln_1(self.mlp(self.ln_2(h))),
        )


class Float32Residual(Parts):
    """The add in float32, with casts before and behind it."""

    def forward(self, x):
        x = (x.float() + self.attn(self.ln_1(x)).float()).to(self.gamma_1.dtype)
        return (x.float() + self.mlp(self.ln_2(x)).float()).to(self.gamma_1.dtype)

    def sublayers(self):
        return pre_norm(self)


FORMS = [
    Parallel, BranchFirst, Alpha, LayerScale, ScaleFirst, InPlace, InPlaceOnTheInput, ReadTwice,
    Sandwich, Float32Residual,
]  # fmt: skip


@pytest.mark.parametrize("block", FORMS)
@torch.no_grad()
def test_every_form_of_the_add_equals_the_loop(block):
    n = 3
    torch.manual_seed(n)
    original = NanoGPT(block=block).eval()
    model = copy.deepcopy(original)
    idx = tokens(2, 6, seed=1)
    before = model(idx)
    sites = mc.find_residuals(model)
    assert len(sites) == 2 * len(original.h[0].sublayers())
    assert all(site.accepted for site in sites), [site.reason for site in sites]
    mc.transform(model, streams=n)
    assert (model(idx) - before).abs().max() <= 1e-6 * largest(before)
    perturb(model, seed=9)
    idx = tokens(3, 9, seed=2)
    expected = nanogpt_by_hand(original, Loop(model, n), idx, lambda block: block.sublayers())
    assert (model(idx) - expected).abs().max() <= 1e-5 * largest(expected)
    assert (original(idx) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_filtered_sites_equal_two_loops():
    n = 4
    original = ARCHITECTURES["nanogpt"].build(seed=11)
    model = copy.deepcopy(original)
    mc.transform(model, streams=n, filter_fn=lambda site: site.name != "h.0.mlp")
    perturb(model, seed=12).double()
    original.double()
    loop, idx = Loop(model, n), tokens(2, 6, seed=13)
    first, last = original.h
    x = original.wte(idx) + original.wpe(torch.arange(6))
    x = loop(x, [("h.0.mhc.0", pre_norm(first)[0], None)])
    x = x + pre_norm(first)[1](x)
    x = loop(x, [(f"h.1.mhc.{j}", f, None) for j, f in enumerate(pre_norm(last))])
    expected = original.head(original.ln_f(x))
    assert (model(idx) - expected).abs().max() <= 1e-11 * largest(expected)


@torch.no_grad()
def test_padding_masks_reach_the_sublayers():
    """src_key_padding_mask is an argument beside the stream."""
    architecture = ARCHITECTURES["encoder_pre"]
    model = architecture.build(seed=1)
    src = normal(2, 6, 32, seed=3)
    perturb(mc.transform(model, example_inputs={"src": src}), seed=2)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    got = model(src, src_key_padding_mask=mask)[0, :4]
    assert (got - model(src[:1, :4])[0]).abs().max() <= 1e-5


class ReadsDtype(Parts):
    """Looks at the stream's dtype behind the last add, as BART's and Whisper's blocks do."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        if x.dtype == torch.float16:
            x = torch.clamp(x, -6e4, 6e4)
        return x

    def sublayers(self):
        return pre_norm(self)


@torch.no_grad()
def test_a_block_may_read_the_streams_dtype():
    original = NanoGPT(block=ReadsDtype).eval()
    model = mc.transform(copy.deepcopy(original), streams=3)
    assert [s.name for s in mc.api.sites_of(model)][-1] == "h.1.mlp"
    difference = (model(tokens(3, 6)) - original(tokens(3, 6))).abs().max()
    assert difference <= 1e-6 * largest(original(tokens(3, 6)))
