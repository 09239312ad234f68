"""Models that are transformed on the meta device and made afterwards."""

from __future__ import annotations

import resource
import sys
import time

import pytest
import torch
import transformers as hf
from models import largest
from zoo import KINDS, result

import mhc_compile as mc

# GPT-2 and the mixtures of experts do not run on the meta device in float32, plain or not: GPT-2's
# loss type looks at values, torch's grouped matrix product there takes bfloat16 alone.
RUN_ON_META = ["llama", "bert", "t5", "vit", "nanogpt", "encoder_post"]


def on_meta(kind):
    with torch.device("meta"):
        model = kind.make().eval()
    inputs = {k: v.to("meta") for k, v in kind.inputs().items()}
    mc.transform(model, streams=3, example_inputs=inputs)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return model


def materialise(model, plain):
    """Memory full of NaN, then the weights of a plain model, then the start of the connections."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    model.load_state_dict(plain.state_dict())
    for own, buffer in zip(model.buffers(), plain.buffers(), strict=True):
        own.copy_(buffer)  # those that no state dict holds, such as rotary frequencies
    return mc.reset_mhc_parameters(model)


@pytest.mark.parametrize("name", RUN_ON_META)
def test_the_same_as_transforming_afterwards(name):
    kind = KINDS[name]
    plain, inputs = kind.build(), kind.inputs(seed=1)
    model = materialise(on_meta(kind), plain)
    expected = result(plain, inputs)
    assert (result(model, inputs) - expected).abs().max() <= 1e-6 * largest(expected)
    after = mc.transform(kind.build(), streams=3, example_inputs=kind.inputs())
    wanted = dict(mc.mhc_parameters(after))
    for key, parameter in mc.mhc_parameters(model):
        if key.endswith("phi"):  # random: of the right size
            assert 0.5 < parameter.std() / wanted[key].std() < 2
        else:
            assert torch.equal(parameter, wanted[key]), key
    after.load_state_dict(model.state_dict())
    assert torch.equal(result(after, inputs), result(model, inputs))
    assert all(p.grad_fn is None and p.requires_grad for _, p in mc.mhc_parameters(model))


def test_weights_assigned_and_only_the_connections_made():
    """load_state_dict(assign=True), as for large models, leaves the connections on meta."""
    kind = KINDS["nanogpt"]
    plain, model = kind.build(), on_meta(kind)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert {p.device.type for _, p in mc.mhc_parameters(model)} == {"meta"}
    assert {p.device.type for _, p in mc.mhc_parameters(mc.reset_mhc_parameters(model))} == {"meta"}
    mc.reset_mhc_parameters(model, device="cpu")
    inputs = kind.inputs()
    expected = result(plain, inputs)
    assert (result(model, inputs) - expected).abs().max() <= 1e-6 * largest(expected)


def test_reset_needs_a_transformed_model():
    with pytest.raises(mc.MHCError, match="call mhc_compile.transform"):
        mc.reset_mhc_parameters(KINDS["nanogpt"].build())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_hugging_face_initialisation_leaves_the_connections_alone(name):
    model = mc.transform(KINDS[name].build(), streams=3)
    before = {key: p.detach().clone() for key, p in mc.mhc_parameters(model)}
    model.init_weights()
    model.apply(model._init_weights)
    assert all(torch.equal(before[key], p) for key, p in mc.mhc_parameters(model))


def test_mixture_of_experts_in_bfloat16():
    with torch.device("meta"):
        model = KINDS["qwen3_moe"].make().eval().to(torch.bfloat16)
    mc.transform(model)
    assert {p.dtype for _, p in mc.mhc_parameters(model)} == {torch.float32}


def test_seven_billion_parameters():
    """32 layers of width 4096: the weights alone would be 27 GB."""
    config = hf.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > 6.7e9
    start = time.process_time()
    mc.transform(model)
    assert time.process_time() - start < 20
    assert len(list(mc.mhc_parameters(model))) == 3 * 64 + 1
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 2**29
