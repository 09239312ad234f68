"""Exchange with DeepSeek-V4: equality with transformers' own modules and models."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from models import bert, gpt2, llama, normal, t5
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

import mhc_compile as mc
from mhc_compile.errors import CheckpointError, ConfigError, NotTransformedError
from mhc_compile.runtime.modules import StreamCollapse

PAGE = Path(__file__).parent.parent / "docs/deepseek_v4.md"
C, VOCABULARY, LAYERS = 32, 61, 3
V4 = {"convention": "deepseek_v4", "collapse": "head"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def v4_config(n=4, **kwargs):
    """One layer of each attention, hash and top-k routing; all that V4 has, tiny."""
    return hf.DeepseekV4Config(**{
        "vocab_size": VOCABULARY, "hidden_size": C, "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 16,
        "num_experts_per_tok": 2, "n_routed_experts": 4, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "compressed_sparse_attention",
                        "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "sliding_window": 8, "o_groups": 2,
        "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 2,
        "num_nextn_predict_layers": 0, "hc_mult": n, "initializer_range": 0.2,
        "attn_implementation": "eager", **kwargs,
    })  # fmt: skip


@torch.no_grad()
def shake(module, seed=0):
    """Draws hyper-connections whose every coefficient matters: gates, scales and biases apart."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name.rpartition(".")[2] in ("fn", "hc_fn"):
            p.copy_(torch.randn(p.shape, generator=g) * 2 * p.shape[1] ** -0.5)
        elif name.rpartition(".")[2] in ("base", "hc_base"):
            p.copy_(torch.randn(p.shape, generator=g))
        elif name.rpartition(".")[2] in ("scale", "hc_scale"):
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)


def v4_model(n=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = v4.DeepseekV4ForCausalLM(v4_config(n, **kwargs)).eval()
    shake(model, seed)
    for layer in model.model.layers:  # expert tables come from the checkpoint, zeros otherwise
        if layer.mlp.is_hash:
            layer.mlp.gate.tid2eid.copy_(torch.stack(
                [torch.randperm(4)[:2] for _ in range(VOCABULARY)]))  # fmt: skip
    return model


def connections_of(model):
    """The hyper-connections of a state dict, by V4's names."""
    return {k: v for k, v in model.state_dict().items() if re.search(r"(attn|ffn)_hc|hc_head", k)}


class PlainLayer(nn.Module):
    """DeepseekV4DecoderLayer with x + F(x) in the place of its hyper-connections."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(self, x, input_ids, **kwargs):
        x = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x), input_ids=input_ids)


class PlainV4(nn.Module):
    """DeepseekV4ForCausalLM on one residual stream, made of the same sublayers."""

    def __init__(self, model):
        super().__init__()
        self.v4_config, inner = model.config, model.model
        self.embed_tokens, self.rotary_emb = inner.embed_tokens, inner.rotary_emb
        self.layers = nn.ModuleList([PlainLayer(layer) for layer in inner.layers])
        self.norm, self.lm_head = inner.norm, model.lm_head

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        at = torch.arange(x.shape[1])[None]
        mask = create_sliding_window_causal_mask(
            config=self.v4_config, inputs_embeds=x, attention_mask=None, past_key_values=None,
            position_ids=at,
        )  # fmt: skip
        ropes = {kind: self.rotary_emb(x, position_ids=at, layer_type=kind)
                 for kind in ("main", "compress")}  # fmt: skip
        for layer in self.layers:
            x = layer(x, input_ids, position_embeddings=ropes, position_ids=at,
                      attention_mask=mask)  # fmt: skip
        return self.lm_head(self.norm(x))


def twin_of(model, n=4, **kwargs):
    ids = tokens()
    return mc.transform(PlainV4(model), streams=n, example_inputs=(ids,), **V4, **kwargs)


def tokens(batch=2, length=13, seed=0):
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def small(n=4, **kwargs):
    torch.manual_seed(n)
    return mc.transform(llama(), **{"streams": n, **V4, **kwargs})


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
@torch.no_grad()
def test_each_connection_equals_transformers(n, seed):
    """(a) Coefficients, mixing and head of every site, on random and unequal streams."""
    theirs, ours = v4_model(n, seed), small(n)
    tensors = connections_of(theirs)
    mc.import_checkpoint(
        ours, {k: v for k, v in tensors.items() if not k.startswith("model.layers.2.")}
    )
    x, f = normal(2, 5, n, C, seed=seed) * 3, normal(2, 5, C, seed=seed + 1)
    for k, block in enumerate(ours.model.layers):
        for mine, other in ((block.mhc["0"], theirs.model.layers[k].attn_hc),
                            (block.mhc["1"], theirs.model.layers[k].ffn_hc)):  # fmt: skip
            post, comb, collapsed = other(x)
            h, state = mine.pre(x)
            torch.testing.assert_close(h, collapsed, **CLOSE)
            torch.testing.assert_close(state.post, post, **CLOSE)
            torch.testing.assert_close(state.res, comb.mT, **CLOSE)
            if n > 2:  # the transpose would be seen; a doubly stochastic 2 x 2 is symmetric
                assert (state.res - comb).abs().max() > 0.05
            mixed = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.mT @ x
            torch.testing.assert_close(mine.post(x, f, state), mixed, **CLOSE)
    (head,) = (m for m in ours.modules() if isinstance(m, StreamCollapse))
    torch.testing.assert_close(head(x), theirs.model.hc_head(x), **CLOSE)


@pytest.mark.parametrize("n", [2, 4])
@torch.no_grad()
def test_any_sublayers_equal_a_loop_over_transformers_modules(n):
    """(b) Llama's own sublayers, around which the modules of transformers stand by hand."""
    torch.manual_seed(n)
    model, ids = llama().eval(), tokens(2, 9)
    theirs = v4_model(n)
    inner, kept = model.model, []
    for k, layer in enumerate(inner.layers):
        parts = layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp
        kept.append((*parts, theirs.model.layers[k].attn_hc, theirs.model.layers[k].ffn_hc))

    mc.transform(model, streams=n, **V4)
    before = model(ids).logits
    mc.import_checkpoint(model, {
        k: v for k, v in connections_of(theirs).items() if not k.startswith("model.layers.2.")
    })  # fmt: skip
    got = model(ids).logits

    x = inner.embed_tokens(ids)
    rope = inner.rotary_emb(x, torch.arange(9)[None])
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    x = x.unsqueeze(2).expand(-1, -1, n, -1).contiguous()
    for norm1, attention, norm2, mlp, attn_hc, ffn_hc in kept:
        post, comb, h = attn_hc(x)
        f = attention(norm1(h), position_embeddings=rope, attention_mask=causal)[0]
        x = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.mT @ x
        post, comb, h = ffn_hc(x)
        x = post.unsqueeze(-1) * mlp(norm2(h)).unsqueeze(-2) + comb.mT @ x
    expected = model.lm_head(inner.norm(theirs.model.hc_head(x)))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got - before).abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 4])
@torch.no_grad()
def test_a_plain_twin_becomes_deepseek_v4(n):
    """(c) DeepseekV4ForCausalLM without hyper-connections, transformed, against itself."""
    theirs, ids = v4_model(n), tokens()
    twin = twin_of(theirs, n)
    assert [s.name for s in mc.find_residuals(PlainV4(theirs), (ids,))] == [
        f"layers.{k}.{part}" for k in range(LAYERS) for part in ("self_attn", "mlp")
    ]
    expected = theirs(ids).logits
    assert (twin(ids) - expected).abs().max() > 0.05
    mc.import_checkpoint(twin, connections_of(theirs))
    for seed, shape in enumerate([(2, 13), (1, 20), (3, 1)]):
        ids = tokens(*shape, seed=seed)
        torch.testing.assert_close(twin(ids), theirs(ids).logits, **CLOSE)


def test_gradients_equal_deepseek_v4():
    theirs, ids = v4_model(), tokens()
    twin = mc.import_checkpoint(twin_of(theirs), connections_of(theirs))
    theirs(ids).logits.square().mean().backward()
    twin(ids).square().mean().backward()
    pairs = [(twin.layers[-1].mhc["collapse"], theirs.model.hc_head, "hc_")]
    for ours, layer in zip(twin.layers, theirs.model.layers, strict=True):
        pairs += [(ours.mhc["0"], layer.attn_hc, ""), (ours.mhc["1"], layer.ffn_hc, "")]
    for ours, other, prefix in pairs:
        for name, part in (("phi", "fn"), ("bias", "base"), ("alpha", "scale")):
            got, expected = getattr(ours, name).grad, getattr(other, prefix + part).grad
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(got.T if name == "phi" else got, expected,
                                       rtol=1e-4, atol=1e-6)  # fmt: skip


@torch.no_grad()
def test_an_export_loads_into_deepseek_v4():
    theirs, ids = v4_model(seed=3), tokens()
    twin = twin_of(theirs)
    for _, p in mc.mhc_parameters(twin):
        p.add_(torch.randn_like(p) * 0.3)
    tensors = mc.export_checkpoint(twin)
    result = theirs.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert not connections_of(theirs).keys() & set(result.missing_keys)
    torch.testing.assert_close(theirs(ids).logits, twin(ids), **CLOSE)


# --- names, shapes, round trip --------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_names_shapes_and_dtypes_are_those_of_transformers(n):
    theirs = connections_of(v4_model(n))
    ours = mc.export_checkpoint(twin_of(v4_model(n), n))
    assert list(ours) == sorted(theirs, key=list(ours).index)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    assert all(v.is_contiguous() and not v.requires_grad for v in ours.values())


def test_released_names_are_those_that_transformers_renames():
    model = twin_of(v4_model())
    released = mc.export_checkpoint(model, "deepseek_v4_release")
    assert "layers.2.hc_ffn_fn" in released and "hc_head_scale" in released
    renamings = [r for r in get_checkpoint_conversion_mapping("deepseek_v4")
                 if isinstance(r, WeightRenaming)]  # fmt: skip
    renamed = {}
    for name, value in released.items():
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        renamed[f"model.{name}"] = value  # from_pretrained adds the base model's prefix
    assert {k: v.sum() for k, v in renamed.items()} == {
        k: v.sum() for k, v in mc.export_checkpoint(model).items()
    }


@pytest.mark.parametrize("format", ["deepseek_v4", "deepseek_v4_release"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
@torch.no_grad()
def test_the_round_trip_is_bitwise(n, format):
    model = small(n)
    for _, p in mc.mhc_parameters(model):
        p.copy_(torch.randn_like(p))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = mc.export_checkpoint(model, format)
    for _, p in mc.mhc_parameters(model):
        p.zero_()
    assert all(v.abs().max() > 0 for v in tensors.values())  # no memory shared with the model
    names = list(tensors)
    random.Random(n).shuffle(names)
    assert mc.import_checkpoint(model, {k: tensors[k] for k in names}, format) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_a_whole_checkpoint_is_cut_as_the_page_says():
    theirs = v4_model(seed=5)
    twin, ids = twin_of(theirs), tokens()
    text = PAGE.read_text()
    cuts = re.findall(r"`(\{k: v for k, v in tensors.items\(\).*?\})`", text)
    assert len(cuts) == 2
    whole = theirs.state_dict()
    mc.import_checkpoint(twin, eval(cuts[0], {"tensors": whole}))
    expected = theirs(ids).logits
    torch.testing.assert_close(twin(ids), expected, **CLOSE)
    released = mc.export_checkpoint(twin, "deepseek_v4_release")
    for _, p in mc.mhc_parameters(twin):
        p.zero_()
    others = {f"mtp.0.{k}": v for k, v in released.items()}
    others |= {"embed.weight": torch.ones(1), "layers.0.attn.wkv.weight": torch.ones(1)}
    cut = eval(cuts[1], {"tensors": {**others, **released}})
    mc.import_checkpoint(twin, cut, "deepseek_v4_release")
    torch.testing.assert_close(twin(ids), expected, **CLOSE)


@torch.no_grad()
def test_values_take_the_dtype_of_the_parameters():
    model = small().to(torch.bfloat16)
    tensors = mc.export_checkpoint(model)
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    mc.import_checkpoint(model, {k: v.double() + 1 for k, v in tensors.items()})
    for name, value in mc.export_checkpoint(model).items():
        torch.testing.assert_close(value, tensors[name] + 1, rtol=2**-8, atol=0)
    assert {p.dtype for _, p in mc.mhc_parameters(model)} == {torch.bfloat16}


def test_config_values_for_deepseek_v4():
    model = small(3, sinkhorn_iters=7, norm_eps=1e-5, pre_eps=1e-4, sinkhorn_eps=1e-4)
    values = mc.deepseek_v4_config(model)
    assert values == {
        "hc_mult": 3, "hc_sinkhorn_iters": 7, "hc_eps": 1e-4, "rms_norm_eps": 1e-5
    }  # fmt: skip


@torch.no_grad()
def test_other_config_values_give_the_same_numbers_too():
    values = {"hc_sinkhorn_iters": 2, "hc_eps": 3e-2, "rms_norm_eps": 0.1}
    theirs, ids = v4_model(**values), tokens()
    # So large an eps keeps rows of res from summing to 1, and with them init="preserve".
    twin = twin_of(
        theirs, init="paper", sinkhorn_iters=2, pre_eps=3e-2, sinkhorn_eps=3e-2, norm_eps=0.1
    )
    assert mc.deepseek_v4_config(twin) == {"hc_mult": 4, **values}
    mc.import_checkpoint(twin, connections_of(theirs))
    torch.testing.assert_close(twin(ids), theirs(ids).logits, **CLOSE)


# --- the head in a transformed model --------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_a_head_keeps_the_function_and_learns(make, n):
    torch.manual_seed(0)
    model = make().eval()
    ids = {"input_ids": tokens(2, 9)}
    if make is t5:
        ids["decoder_input_ids"] = tokens(2, 7, seed=1)
    before = model(**ids).logits
    mc.transform(model, streams=n, collapse="head", example_inputs=ids)
    after = model(**ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    heads = [m for m in model.modules() if isinstance(m, StreamCollapse)]
    assert len(heads) == (2 if make is t5 else 1)
    # While all streams are equal, the gates only scale what the last norm scales back: their
    # gradients are 0 until the streams part, at the first step; phi's until alpha has moved.
    optimizer = torch.optim.Adam([p for _, p in mc.mhc_parameters(model)], lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(**ids).logits.square().mean().backward()
        optimizer.step()
    for head in heads:
        parameters = dict(head.named_parameters())
        assert list(parameters) == ["phi", "alpha", "bias"]
        assert all(p.grad.abs().max() > 1e-7 for p in parameters.values()), parameters


def test_a_head_is_saved_and_loaded(tmp_path):
    model, ids = small(), tokens(2, 9)
    with torch.no_grad():
        for _, p in mc.mhc_parameters(model):
            p.add_(torch.randn_like(p))
    mc.save_pretrained(model, tmp_path)
    loaded = mc.load_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


# --- refusals -------------------------------------------------------------------------------------


def refused(model, tensors=None, error=CheckpointError, **kwargs):
    """Both directions are refused; returns the import's message. The model must not change."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if tensors is None:
        with pytest.raises(error):
            mc.export_checkpoint(model, **kwargs)
    with pytest.raises(error) as caught:
        mc.import_checkpoint(model, tensors or {}, **kwargs)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return str(caught.value)


def test_missing_unknown_and_misshaped_names_change_nothing():
    model = small()
    tensors = {k: torch.ones_like(v) for k, v in mc.export_checkpoint(model).items()}

    def without(*names):
        return {k: v for k, v in tensors.items() if k not in names}

    name = "model.layers.1.ffn_hc.scale"
    assert f"missing: {name}" in refused(model, without(name))
    assert "missing: model.hc_head.hc_fn" in refused(model, without("model.hc_head.hc_fn"))
    extra = {**tensors, "model.layers.2.attn_hc.fn": torch.ones(24, 128)}
    message = refused(model, extra)
    assert "unknown: model.layers.2.attn_hc.fn" in message and "2 layers" in message
    assert "unknown: lm_head.weight" in refused(model, {**tensors, "lm_head.weight": tensors[name]})
    fn = "model.layers.1.attn_hc.fn"
    message = refused(model, {**tensors, fn: tensors[fn].T})  # our own layout
    assert f"{fn} has the shape [128, 24], the model's is [24, 128]" in message
    last = "model.hc_head.hc_scale"
    assert last in refused(model, {**tensors, last: torch.tensor(1.0)})
    assert last in refused(model, {**tensors, last: torch.ones(1, dtype=torch.long)})
    assert last in refused(model, {**tensors, last: [1.0]})
    assert last in refused(model, {**tensors, last: torch.ones(1, device="meta")})
    both = refused(model, {**without(name), "odd": torch.ones(1)})
    assert f"missing: {name}" in both and "unknown: odd" in both


def test_another_n_or_c_names_both_numbers():
    message = refused(small(4), mc.export_checkpoint(small(2)))
    assert "4 streams of 32 channels" in message and "[8, 64]" in message
    wide = mc.transform(llama(), streams=4, **V4)
    tensors = {k: torch.cat([v, v], -1) if "fn" in k else v
               for k, v in mc.export_checkpoint(wide).items()}  # fmt: skip
    message = refused(wide, tensors)
    assert "[24, 256]" in message and "[24, 128]" in message


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"convention": "paper"}, ["'paper'", "res_transposed=False, not True"]),
        ({"convention": "liger"}, ["'liger'", "res_transposed=False", "pre_eps=0"]),
        ({"convention": "transformer_engine"}, ["sinkhorn_start='exp', not 'softmax'"]),
        ({"convention": "tilekernels", "init": "paper"}, ["post_multiplier=1.0, not 2.0"]),
        ({"norm_eps_place": "outside"}, ["norm_eps_place='outside', not 'inside'"]),
        ({"pre_eps": 1e-3}, ["pre_eps=0.001 beside sinkhorn_eps=1e-06"]),
        ({"collapse": "learned"}, ["collapse='learned', not 'head'"]),
        ({"connection": "hc"}, ["connection='hc', not 'mhc'"]),
        ({"n": 1}, ["streams=1"]),
    ],
    ids=str,
)
def test_another_design_is_named(kwargs, parts):
    message = refused(small(**kwargs))
    assert all(part in message for part in [*parts, "collapse='head'"])


class Block(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(C, C))

    def forward(self, x):
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


class Scaled(Block):
    def forward(self, x):
        for name in self.names:
            x = 0.9 * x + torch.tanh(self.get_submodule(name)(x))
        return x


def blocks(*names, count=2, kind=Block):
    model = nn.Sequential(*[kind(*names) for _ in range(count)])
    return mc.transform(model, example_inputs=(normal(2, 3, C),), streams=2, **V4)


def test_sites_that_are_not_attention_and_mlp_in_turn():
    assert "3 residual sites" in refused(blocks("attn", "mlp", "fc", count=1))
    assert "not attention and MLP in turn" in refused(blocks("attn", count=3))
    for names in (("attn", "cross_attn"), ("mlp", "attn"), ("a", "b"), ("attn",)):
        message = refused(blocks(*names))
        assert "0." in message and "layers=" in message
    assert "attention_model" not in str(blocks("mlp", "fc"))
    nested = nn.ModuleDict({"attention_model": blocks("mlp", "fc")})
    assert "do not look like attention" in refused(nested["attention_model"])


def test_layers_name_what_the_names_do_not_tell():
    model = blocks("a", "b")
    pairs = [("0.a", "0.b"), ("1.a", "1.b")]
    tensors = mc.export_checkpoint(model, layers=pairs)
    assert "model.layers.1.ffn_hc.fn" in tensors
    mc.import_checkpoint(model, tensors, layers=pairs)
    for wrong in ([("0.b", "0.a"), ("1.a", "1.b")], pairs[:1], [("0.a",), ("0.b", "1.a", "1.b")]):
        message = refused(model, layers=wrong)
        assert "layers must be pairs" in message and "0.a, 0.b, 1.a, 1.b" in message


def test_models_with_other_streams():
    encoder_decoder = mc.transform(t5(), streams=2, **V4)
    assert "2 residual streams" in refused(encoder_decoder)
    post_norm = mc.transform(bert(), streams=2, **V4)
    assert "an operation between sublayers" in refused(post_norm)
    assert "in Scaled" in refused(blocks("attn", "mlp", kind=Scaled))


@pytest.mark.parametrize(
    ("left", "why"),
    [
        ("model.layers.0.mlp", "split in two"),
        ("model.layers.0", "2 plain residual adds before the first"),
        ("model.layers.1", "stayed plain, such as 'model.layers.1'"),
        ("model.layers.1.mlp", "3 residual sites"),
    ],
)
def test_layers_left_out(left, why):
    model = mc.transform(llama(), streams=2, **V4,
                         filter_fn=lambda s: not s.name.startswith(left))  # fmt: skip
    assert why in refused(model)


def test_models_without_values_or_connections():
    with pytest.raises(NotTransformedError, match="transform"):
        mc.export_checkpoint(llama())
    with pytest.raises(NotTransformedError, match="transform"):
        mc.import_checkpoint(mc.revert(small()), {})
    with pytest.raises(ConfigError, match="torch.nn.Module"):
        mc.export_checkpoint("llama")
    model = small()
    tensors = mc.export_checkpoint(model)
    for call in (mc.export_checkpoint, lambda m: mc.import_checkpoint(m, tensors)):
        with pytest.raises(CheckpointError, match="meta device"):
            call(small().to("meta"))


@pytest.mark.parametrize("format", ["deepseek-v4", "safetensors", 4, None])
def test_another_format_is_named(format):
    with pytest.raises(ConfigError, match="'deepseek_v4', 'deepseek_v4_release'") as error:
        mc.export_checkpoint(small(), format)
    assert ("did you mean" in str(error.value)) == (format == "deepseek-v4")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5
