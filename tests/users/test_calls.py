"""Other ways to call a transformed model: collected states, embeddings, attention, modes."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, WIDTH, largest, logits
from zoo import HUGGING_FACE, KINDS, result, transformed

import mhc_compile as mc
from mhc_compile._torch_compat import tensor_leaves

TEXT = [name for name in HUGGING_FACE if name != "vit"]
CACHED = [name for name in TEXT if name != "bert"]
COLLECT = {"output_hidden_states": True, "output_attentions": True}


def pair(name):
    """The same model, plain and transformed at step 0."""
    kind = KINDS[name]
    model = mc.transform(kind.build(), streams=3, example_inputs=kind.inputs())
    return kind.build(), model, kind.inputs(seed=1)


@torch.no_grad()
def assert_same(plain, model, inputs, **kwargs):
    """Every tensor that a call returns, in order, but for caches."""
    wanted, got = plain(**inputs, **kwargs), model(**inputs, **kwargs)
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
    pairs = list(zip(tensor_leaves(got), tensor_leaves(wanted), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 1e-5 * largest(b)
    return wanted, got


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hidden_states_and_attentions(name, return_dict):
    plain, model, inputs = pair(name)
    for each in (plain, model):
        each.set_attn_implementation("eager")
    _, got = assert_same(plain, model, inputs, **COLLECT, return_dict=return_dict)
    if return_dict:
        key = "encoder_hidden_states" if name == "t5" else "hidden_states"
        assert len(got[key]) == 2 + 1
        assert {state.shape[-1] for state in got[key]} == {WIDTH}
        assert {state.dim() for state in got[key]} == {3}


def test_hidden_states_of_moved_connections_are_the_mean_of_the_streams():
    model, inputs = transformed("gpt2")
    streams = []
    model.transformer.h[0].register_forward_hook(lambda _, args, out: streams.append(out))
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert streams[0].shape[-2:] == (3, WIDTH)
    assert torch.equal(states[1], streams[0].mean(-2))


@pytest.mark.parametrize("name", CACHED)
def test_hidden_states_with_a_cache(name):
    plain, model, inputs = pair(name)
    wanted, got = assert_same(plain, model, inputs, use_cache=True, output_hidden_states=True)
    one = torch.full((2, 1), 5)
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    outs = []
    for each, out in ((plain, wanted), (model, got)):
        call = {**inputs, key: one, "past_key_values": out.past_key_values}
        with torch.no_grad():
            outs.append(each(**call, output_hidden_states=True))
    states = "decoder_hidden_states" if name == "t5" else "hidden_states"
    assert all(state.shape == (2, 1, WIDTH) for state in outs[1][states])
    assert (outs[0].logits - outs[1].logits).abs().max() <= 1e-5 * largest(outs[0].logits)


@pytest.mark.parametrize("name", TEXT)
def test_inputs_embeds(name):
    model, inputs = transformed(name)
    expected = result(model, inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    got = logits(model, {**inputs, "inputs_embeds": embeddings})
    assert (got - expected).abs().max() <= 1e-6 * largest(expected)
    got.square().sum().backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_attention_implementation_set_after_transform(name):
    plain, model, inputs = pair(name)
    if name != "vit":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :3] = 0
    for implementation in ("eager", "sdpa", "eager"):
        for each in (plain, model):
            each.set_attn_implementation(implementation)
            assert each.config._attn_implementation == implementation
        assert_same(plain, model, inputs)
        assert_same(plain.train(), model.train(), inputs)
        plain.eval(), model.eval()
    key = "encoder_attentions" if name == "t5" else "attentions"
    found = model(**inputs, output_attentions=True)[key]
    assert len(found) == 2
    assert all(weights.dim() == 4 for weights in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXT)
def test_resized_token_embeddings(name):
    model, inputs = transformed(name)
    expected = result(model, inputs)
    model.resize_token_embeddings(VOCABULARY + 7)
    got = result(model, inputs)
    assert got.shape[-1] == VOCABULARY + 7
    assert (got[..., :VOCABULARY] - expected).abs().max() <= 1e-6 * largest(expected)


@pytest.mark.parametrize("name", [*HUGGING_FACE, "nanogpt", "encoder_post"])
def test_changing_modes(name):
    model, inputs = transformed(name, dropout=0.6)
    expected = result(model, inputs)
    assert not torch.equal(result(model.train(), inputs), expected)
    assert torch.equal(result(model.eval(), inputs), expected)
    for module in list(model.modules())[1::2]:  # a mixture that was never traced
        module.train()
    result(model, inputs)
    assert torch.equal(result(model.eval(), inputs), expected)
