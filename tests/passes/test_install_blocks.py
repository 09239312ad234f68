"""Installed blocks under checkpointing, deepcopy, torch.compile, autocast and other dtypes."""

import copy

import pytest
import torch
from models import ARCHITECTURES, NanoGPT, largest, logits, normal, perturb, tokens
from torch import nn

import mhc_compile as mc


def transformed(name, seed=0, dropout=0.0, n=3, **kwargs):
    architecture = ARCHITECTURES[name]
    model = architecture.build(seed, dropout)
    mc.transform(model, example_inputs=architecture.inputs(), streams=n, **kwargs)
    return architecture, perturb(model, seed)


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(5)  # the same dropout masks
    logits(model, inputs).square().mean().backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_keeps_the_gradients(name, dropout, reentrant):
    architecture, model = transformed(name, seed=1, dropout=dropout)
    model.train()
    inputs = {**architecture.inputs(seed=2), "use_cache": False}
    plain = gradients(model, inputs)
    calls = count_calls(model)
    gradients(model, inputs)
    once = sum(calls.values())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    checkpointed = gradients(model, inputs)
    assert sum(calls.values()) == 2 * once, "the blocks were not recomputed"
    assert checkpointed.keys() == plain.keys()
    for key, value in plain.items():
        assert (checkpointed[key] - value).abs().max() <= 1e-6 * largest(value), key


def count_calls(model):
    """Counts the runs of each connection."""
    calls = {}

    def count(module, *_):
        calls[id(module)] = calls.get(id(module), 0) + 1

    for module in model.modules():
        if isinstance(module, mc.HyperConnection):
            module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("name", ["gpt2", "t5", "nanogpt", "encoder_post"])
@torch.no_grad()
def test_a_deepcopy_is_independent(name):
    architecture, model = transformed(name, seed=3)
    inputs = architecture.inputs(seed=4)
    before = logits(model, inputs)
    other = copy.deepcopy(model)
    assert mc.is_transformed(other)
    assert torch.equal(logits(other, inputs), before)
    for _, parameter in mc.mhc_parameters(other):
        parameter.add_(0.3)
    assert torch.equal(logits(model, inputs), before)
    assert (logits(other, inputs) - before).abs().max() > 1e-3
    mc.revert(other)
    assert mc.is_transformed(model)
    assert torch.equal(logits(model, inputs), before)
    # New kinds of calls are traced for each by itself.
    copied, longer = copy.deepcopy(model), architecture.inputs(1, 11, seed=5)
    wanted = logits(model, longer)
    difference = logits(copied.double(), as_double(longer)) - wanted
    assert difference.abs().max() <= 1e-5 * largest(wanted)
    assert torch.equal(logits(model, longer), wanted)


def as_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("nanogpt", {}), ("llama", {}), ("llama", {"use_cache": False}), ("gpt2", {})],
    ids=["nanogpt", "llama", "llama-uncached", "gpt2"],
)
def test_torch_compile_equals_eager(name, kwargs):
    # Dynamo unrolls the iterations; few of them show the same.
    architecture, model = transformed(name, seed=6, n=2, sinkhorn_iters=4)
    inputs = {**architecture.inputs(seed=7), **kwargs}
    eager, wanted = gradients(model, inputs), logits(model, inputs).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = logits(compiled, inputs)
    assert (got.detach() - wanted).abs().max() <= 1e-5 * largest(wanted)
    model.zero_grad()
    got.square().mean().backward()
    for key, p in model.named_parameters():
        if key in eager:
            assert (p.grad - eager[key]).abs().max() <= 1e-5 * largest(eager[key]), key
    main = next(iter(inputs))
    longer = {**inputs, main: tokens(3, 12, seed=8)}
    difference = (logits(compiled, longer) - logits(model, longer)).detach()
    assert difference.abs().max() <= 1e-5 * largest(wanted)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("nanogpt", {}),
        ("encoder_pre", {}),
        ("llama", {"use_cache": False}),
        ("t5", {"use_cache": False}),
        # By default a cache is filled in training too, with tensors that have a gradient.
        ("llama", {}),
        ("t5", {}),
    ],
    ids=["nanogpt", "encoder_pre", "llama-uncached", "t5-uncached", "llama", "t5"],
)
def test_autocast_runs_close_to_float32(name, kwargs):
    architecture, model = transformed(name, seed=9)
    inputs = {**architecture.inputs(seed=10), **kwargs}
    with torch.no_grad():
        wanted = logits(model, inputs)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, inputs)
    # bfloat16 keeps 8 bits: 4e-3 an operation, and ten of them in a row.
    assert (got.detach().float() - wanted).abs().max() <= 0.1 * largest(wanted)
    assert not torch.equal(got.float(), wanted)
    got.float().square().mean().backward()
    for key, parameter in mc.mhc_parameters(model):
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    with torch.no_grad():
        again = logits(model.eval(), inputs)
    assert (again - wanted).abs().max() <= 1e-6 * largest(wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert", "encoder_post", "nanogpt"])
@torch.no_grad()
def test_other_dtypes(name):
    architecture, model = transformed(name, seed=11)
    inputs = architecture.inputs(seed=12)
    wanted = logits(model, inputs)
    double = logits(model.to(torch.float64), as_double(inputs))
    assert double.dtype == torch.float64
    assert (double - wanted).abs().max() <= 1e-5 * largest(wanted)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    low = logits(model.to(torch.bfloat16), half)
    assert low.dtype == torch.bfloat16
    assert (low.float() - wanted).abs().max() <= 0.2 * largest(wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_model_in_bfloat16_keeps_its_function(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(13).bfloat16(), architecture.inputs(seed=14)
    before = logits(model, inputs)
    mc.transform(model, example_inputs=inputs)
    assert {p.dtype for _, p in mc.mhc_parameters(model)} == {torch.float32}
    assert (logits(model, inputs) - before).abs().max() <= 0.05 * largest(before)


@torch.no_grad()
def test_inputs_embeds_equal_input_ids():
    _, model = transformed("llama", seed=15)
    ids = tokens(2, 9, seed=16)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_hidden_states_have_the_models_width():
    """Between blocks there are n streams, which no caller of the model expects."""
    architecture, model = transformed("llama", seed=17)
    ids = tokens(2, 9, seed=18)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in states] == [(2, 9, 32)] * 3


@torch.no_grad()
def test_padding_mask_of_torchs_encoder():
    """Without gradients the plain encoder packs the batch into a nested tensor."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    original = torch.nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(original)
    x, mask = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    mc.transform(model, example_inputs=(x,))
    got, wanted = (m(x, src_key_padding_mask=mask)[~mask] for m in (model, original))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
    assert mc.revert(model).use_nested_tensor
    assert vars(model).keys() == vars(original).keys()


@torch.no_grad()
def test_users_hooks_go_on_working():
    _, model = transformed("nanogpt", seed=19)
    seen = []
    model.h[0].mlp.register_forward_hook(lambda m, args, out: seen.append("mlp"))
    model.h[1].register_forward_hook(lambda m, args, out: seen.append("block"))
    model.h[0].attn.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    before = model(tokens())
    assert seen == ["mlp", "block"]
    model.h[0].attn._forward_hooks.clear()
    assert (model(tokens()) - before).abs().max() > 1e-4


@torch.no_grad()
def test_submodules_can_be_replaced():
    _, model = transformed("nanogpt", seed=20)
    before = model(tokens())

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model.h[0].mlp = Doubled(model.h[0].mlp)
    assert (model(tokens()) - before).abs().max() > 1e-4


@torch.no_grad()
def test_two_models_of_one_class_do_not_share_graphs():
    first, second = NanoGPT().eval(), NanoGPT().eval()
    mc.transform(first, streams=2)
    mc.transform(second, streams=4)
    assert {p.shape for k, p in mc.mhc_parameters(first) if k.endswith("weight")} == {(2,)}
    assert {p.shape for k, p in mc.mhc_parameters(second) if k.endswith("weight")} == {(4,)}
    assert first(tokens()).shape == second(tokens()).shape
    mc.revert(first)
    assert not mc.is_transformed(first)
    assert second(tokens()).isfinite().all()


@torch.no_grad()
def test_a_block_called_with_a_plain_tensor_says_so():
    _, model = transformed("nanogpt", n=4)
    with pytest.raises(mc.MHCError, match=r"4.*C.*call the whole model"):
        model.h[1](normal(2, 8, 32))
