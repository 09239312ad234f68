"""generate() of rewritten models: caches, padding and beams pass through the blocks."""

import pytest
import torch
from models import ARCHITECTURES, VOCABULARY, largest, perturb, tokens

import mhc_compile as mc

DECODERS = ["gpt2", "llama", "qwen3_moe"]
NEW = 6
PAD = 2


def generator_of(name, seed=0, n=4):
    architecture = ARCHITECTURES[name]
    model = architecture.build(seed)
    mc.transform(model, example_inputs=architecture.inputs(), streams=n)
    return perturb(model, seed)


def generate(model, ids, **kwargs):
    kwargs = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, **kwargs}
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, return_dict_in_generate=True, output_logits=True, pad_token_id=PAD, **kwargs
    )


def steps(result):
    return torch.stack(result.logits, 1)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_greedy_with_cache_equals_without(name, n):
    model = generator_of(name, seed=n, n=n) if n > 1 else generator_of_one_stream(name)
    ids = tokens(3, 7, seed=n)
    with_cache, without = (generate(model, ids, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    difference = (steps(with_cache) - steps(without)).abs().max()
    assert difference <= 1e-5 * largest(steps(without))
    assert with_cache.sequences.shape[1] == NEW + (1 if name == "t5" else 7)


def generator_of_one_stream(name):
    architecture = ARCHITECTURES[name]
    return mc.transform(architecture.build(1), example_inputs=architecture.inputs(), streams=1)


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_changes_nothing(name):
    model = generator_of(name, seed=3)
    short, long = tokens(1, 4, seed=4), tokens(1, 9, seed=5)
    batch = torch.full((2, 9), PAD)
    batch[0, 5:], batch[1] = short, long
    mask = (batch != PAD).long()
    together = generate(model, batch, attention_mask=mask)
    for row, ids in enumerate((short, long)):
        alone = generate(model, ids)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, ids.shape[1] :])
        difference = (steps(together)[row] - steps(alone)[0]).abs().max()
        assert difference <= 1e-5 * largest(steps(alone))


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_beam_search_with_cache_equals_without(name):
    model = generator_of(name, seed=6)
    ids = tokens(2, 5, seed=7)
    first, second = (
        generate(model, ids, num_beams=3, use_cache=use).sequences for use in (True, False)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_cache_token_by_token_equals_one_forward(name):
    model = generator_of(name, seed=8)
    ids = tokens(2, 9, seed=9)
    full = model(ids).logits
    cache, parts = None, []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 9)]:  # prompt, tokens, then a chunk
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache, _ = out.past_key_values, parts.append(out.logits)
        assert cache.get_seq_length() == stop
    assert (torch.cat(parts, 1) - full).abs().max() <= 1e-5 * largest(full)


def test_sampling_stays_within_the_vocabulary():
    model = generator_of("llama", seed=10)
    out = generate(model, tokens(2, 5, seed=11), do_sample=True).sequences
    assert 0 <= int(out.min()) <= int(out.max()) < VOCABULARY


@torch.no_grad()
def test_step_0_generates_what_the_original_does():
    architecture = ARCHITECTURES["llama"]
    model, ids = architecture.build(12), tokens(2, 5, seed=13)
    before = generate(model, ids)
    mc.transform(model, example_inputs=architecture.inputs())
    after = generate(model, ids)
    assert torch.equal(before.sequences, after.sequences)
    assert (steps(before) - steps(after)).abs().max() <= 1e-5 * largest(steps(before))
