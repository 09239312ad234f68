"""The models that these tests use: those of `models` and two more kinds."""

from __future__ import annotations

import socket

import torch
import transformers as hf
from models import (
    ARCHITECTURES,
    SPREAD,
    VOCABULARY,
    WIDTH,
    Architecture,
    largest,
    logits,
    normal,
    perturb,
    tokens,
)

import mhc_compile as mc


def vit(dropout=0.0):
    config = hf.ViTConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, initializer_range=SPREAD, num_labels=5,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def mixtral(dropout=0.0):
    config = hf.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY,
        max_position_embeddings=64, attention_dropout=dropout, initializer_range=SPREAD,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def _images(batch=2, length=8, seed=0):
    return {"pixel_values": normal(batch, 3, 16, 16, seed=seed)}


def _ids(batch=2, length=8, seed=0):
    return {"input_ids": tokens(batch, length, seed)}


def _sites(pattern, *roles):
    return tuple((pattern.format(layer, role), 0) for layer in range(2) for role in roles)


KINDS = {
    **ARCHITECTURES,
    # modeling_vit.ViTLayer: attention, then ViTMLP, each added in the layer's own forward.
    "vit": Architecture("vit", vit, _images, _sites("vit.layers.{}.{}", "attention", "mlp")),
    "mixtral": Architecture(
        "mixtral", mixtral, _ids, _sites("model.layers.{}.{}", "self_attn", "mlp")
    ),
}
HUGGING_FACE = ["llama", "qwen3_moe", "mixtral", "gpt2", "bert", "t5", "vit"]


def transformed(name, seed=0, dropout=0.0, streams=3, moved=True):
    """A transformed model whose connections depend on their input, and inputs for it."""
    kind = KINDS[name]
    model = kind.build(seed, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for phi
        mc.transform(model, streams=streams, example_inputs=kind.inputs())
    return (perturb(model) if moved else model), kind.inputs(seed=seed + 1)


def loss_of(model, inputs):
    """A scalar that every parameter but a pooler's reaches."""
    out = model(**inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean()


def gradients(model, inputs, seed=0):
    """The gradients of `loss_of` by name, from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss_of(model, inputs).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def result(model, inputs):
    """The main result of a call without gradients."""
    return logits(model, inputs)


def assert_lengths_equal(compiled, model, kind, training):
    """Several sizes give the eager values, or in training the eager gradients."""
    for shape in ((2, 8), (3, 11), (2, 13)):
        inputs = kind.inputs(*shape, seed=shape[1])
        if training:
            wanted, got = gradients(model, inputs), gradients(compiled, inputs)
            got = {key.removeprefix("_orig_mod."): g for key, g in got.items()}
            assert got.keys() == wanted.keys()
            pairs = [(got[key], wanted[key]) for key in wanted]
        else:
            pairs = [(result(compiled, inputs), result(model, inputs))]
        for a, b in pairs:
            assert (a - b).abs().max() <= 1e-5 * largest(b)


def on_two_processes(function, *args):
    """Runs `function(rank, *args)` on two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_join, (port, function, args), nprocs=2)


def _join(rank, port, function, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    function(rank, *args)
    torch.distributed.destroy_process_group()
