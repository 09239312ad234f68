"""Text models of transformers: tiny, with random weights.

The sites of each were read off its modeling file before any tool ran on it.
"""

import dataclasses

import transformers as hf
from entry import GENERATE, Entry
from models import LENGTH, SPREAD, VOCABULARY, tokens

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "initializer_range": SPREAD,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def quiet(config):
    """No dropout of any kind: a model in training mode then computes one function."""
    for key, value in list(vars(config).items()):
        if isinstance(value, hf.PreTrainedConfig):
            quiet(value)
        elif ("drop" in key or key == "router_jitter_noise") and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def config_of(name, overrides):
    """A config with the common small sizes under the names that its class has for them."""
    cls = getattr(hf, f"{name}Config")
    known = {f.name for f in dataclasses.fields(cls)}
    names = {k: cls.attribute_map.get(k, k) for k in COMMON}
    common = {names[k]: v for k, v in COMMON.items() if names[k] in known}
    return quiet(cls(**{**common, **overrides}))


def maker(config_name, model_name, overrides):
    return lambda: getattr(hf, model_name)(config_of(config_name, overrides))


def ids(batch=2, length=8, seed=0):
    return {"input_ids": tokens(batch, length, seed)}


def logits(out):
    return out.logits


def last_hidden_state(out):
    return out.last_hidden_state


def entry(
    family, name, sites, why, config="", model="", result=logits, inputs=ids, generate=(),
    refused=None, loose=1.0, **overrides,
):  # fmt: skip
    config = config or name.replace("-", "").replace(" ", "")
    make = maker(config, model or f"{config}ForCausalLM", overrides)
    return Entry(name, family, make, inputs, sites, why, result, generate, refused, loose)


def decoder(name, sites=(4,), why="2 layers x (attention, MLP), pre-norm", **kwargs):
    return entry("decoder-only", name, sites, why, **{"generate": GENERATE, **kwargs})


DECODERS = (
    decoder("GPT-2", config="GPT2", model="GPT2LMHeadModel"),
    decoder("GPT-NeoX parallel", (2,), "2 layers, x + attention + MLP is one add each",
            config="GPTNeoX", use_parallel_residual=True),
    decoder("GPT-NeoX", config="GPTNeoX", use_parallel_residual=False),
    decoder("Phi", (2,), "2 layers, attention + MLP + x is one add each"),
    decoder("OPT", word_embed_proj_dim=32),
    decoder("Llama"),
    decoder("Mistral"),
    decoder("Qwen3", head_dim=8),
    decoder("Gemma2", why="2 layers x (attention, MLP), norms on both sides of each", head_dim=8),
    decoder("Granite", why="2 layers x (attention, MLP), each branch times residual_multiplier",
            residual_multiplier=0.5),
)  # fmt: skip

ENTRIES = DECODERS
