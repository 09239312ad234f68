"""Text models of transformers: tiny, with random weights.

The sites of each were read off its modeling file before any tool ran on it.
"""

import dataclasses

import torch
import transformers as hf
from entry import GENERATE, Entry
from models import LENGTH, SPREAD, VOCABULARY, tokens

NO_STATIC = ("greedy", "beam", "left_padding")
RECURRENT = ("greedy", "beam")

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


PRE = "2 layers x (attention, MLP), pre-norm"
SANDWICH = "2 layers x (attention, MLP), a norm before and behind each branch"
PARALLEL = "2 layers, x + attention + MLP is one add each"
BRANCH_NORM = "2 layers x (attention, MLP), the norm behind each branch, none before"
MULTIPLIER = "2 layers x (attention, MLP), each branch times a constant"

DECODERS = (
    decoder("GPT-2", config="GPT2", model="GPT2LMHeadModel"),
    decoder("OpenAI GPT", why="2 blocks x (attention, MLP), LayerNorm(x + F(x))",
            config="OpenAIGPT", model="OpenAIGPTLMHeadModel", generate=NO_STATIC),
    decoder("CTRL", model="CTRLLMHeadModel", dff=64),
    decoder("GPT-Neo", config="GPTNeo", attention_types=[[["global", "local"], 1]], window_size=4),
    decoder("GPT-J", (2,), PARALLEL, config="GPTJ", rotary_dim=4),
    decoder("GPT-NeoX parallel", (2,), PARALLEL, config="GPTNeoX", use_parallel_residual=True),
    decoder("GPT-NeoX", config="GPTNeoX", use_parallel_residual=False),
    decoder("GPT-NeoX Japanese", config="GPTNeoXJapanese"),
    decoder("GPT-BigCode", config="GPTBigCode"),
    decoder("OPT", word_embed_proj_dim=32),
    decoder("OPT post-norm", why="2 layers x (attention, MLP), LayerNorm behind each add",
            config="OPT", word_embed_proj_dim=32, do_layer_norm_before=False),
    decoder("BLOOM", why="2 layers x (attention, MLP), both adds in a helper dropout_add",
            config="Bloom"),
    decoder("Falcon parallel", (2,), PARALLEL, config="Falcon", parallel_attn=True,
            new_decoder_architecture=False, bias=True),
    decoder("Falcon new", (2,), PARALLEL, config="Falcon", new_decoder_architecture=True),
    # The library's alibi has not the length of a static cache: the plain model raises.
    decoder("Falcon alibi", generate=NO_STATIC, config="Falcon", parallel_attn=False, alibi=True,
            new_decoder_architecture=False),
    decoder("MPT", config="Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
            expansion_ratio=2),
    decoder("Phi", (2,), PARALLEL),
    decoder("Phi-3", config="Phi3"),
    decoder("CodeGen", (2,), PARALLEL, config="CodeGen", rotary_dim=4),
    decoder("StarCoder2", config="Starcoder2"),
    decoder("XGLM", model="XGLMForCausalLM"),
    decoder("BioGPT", config="BioGpt"),
    decoder("Llama"),
    decoder("Llama4 text", config="Llama4Text", model="Llama4ForCausalLM", head_dim=8,
            intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=16,
            interleave_moe_layer_step=2),
    decoder("Mistral"),
    decoder("Ministral", head_dim=8),
    decoder("Qwen2"),
    decoder("Qwen3", head_dim=8),
    decoder("Gemma", head_dim=8),
    decoder("Gemma2", why=SANDWICH, head_dim=8),
    decoder("Gemma3 text", why=SANDWICH, config="Gemma3Text", model="Gemma3ForCausalLM",
            head_dim=8),
    decoder("Gemma4 text", (6,), "2 layers x (attention, MLP, input of the layer), sandwich norms; "
            "times a buffer behind the last", config="Gemma4Text", model="Gemma4ForCausalLM",
            head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY),
    decoder("VaultGemma", head_dim=8),
    decoder("Granite", why=MULTIPLIER, residual_multiplier=0.5),
    decoder("MiniCPM3", why=MULTIPLIER, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4),
    decoder("Cohere", (2,), PARALLEL),
    decoder("Cohere2", (2,), PARALLEL),
    decoder("OLMo", config="Olmo"),
    decoder("OLMo2", why=BRANCH_NORM, config="Olmo2"),
    decoder("OLMo3", why=BRANCH_NORM, config="Olmo3"),
    decoder("StableLM", config="StableLm"),
    decoder("StableLM parallel", (2,), PARALLEL, config="StableLm", use_parallel_residual=True),
    decoder("Nemotron"),
    decoder("Persimmon"),
    decoder("GLM", config="Glm", head_dim=8),
    decoder("GLM4", why=SANDWICH, config="Glm4", head_dim=8),
    decoder("Helium", head_dim=8),
    decoder("SmolLM3"),
    decoder("EXAONE4", why=BRANCH_NORM, config="Exaone4"),
    decoder("ERNIE 4.5", config="Ernie4_5"),
    decoder("Seed-OSS", config="SeedOss", head_dim=8),
    decoder("Apertus"),
    decoder("Arcee"),
    decoder("ModernBERT decoder", config="ModernBertDecoder"),
    decoder("NanoChat"),
    decoder("DiffLlama"),
    decoder("Doge", why="2 layers x (attention, MLP), the skip times a learned vector"),
    decoder("HunYuan dense", config="HunYuanDenseV1", head_dim=8),
    decoder("BitNet"),
    decoder("CWM", config="Cwm", head_dim=8),
    decoder("Jais2"),
)  # fmt: skip

MOE_PRE = "2 layers x (attention, experts); sums over experts lie inside the branch"
SHARED = "2 layers x (attention, experts); shared + routed is a sum inside the branch"


def moe(name, sites=(4,), why=MOE_PRE, **kwargs):
    return entry("mixture of experts", name, sites, why, **{"generate": GENERATE, **kwargs})


MIXTURES = (
    moe("Mixtral", num_local_experts=4),
    moe("Qwen2-MoE", why=SHARED, config="Qwen2Moe", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=32),
    moe("Qwen3-MoE", config="Qwen3Moe", num_experts=4, num_experts_per_tok=2, head_dim=8,
        moe_intermediate_size=16),
    moe("DeepSeek-V2", why=SHARED + "; latent attention", config="DeepseekV2", q_lora_rank=16,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1,
        first_k_dense_replace=1, n_shared_experts=1, topk_method="greedy", num_key_value_heads=4),
    moe("DeepSeek-V3", why=SHARED + "; latent attention", config="DeepseekV3", q_lora_rank=16,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1,
        first_k_dense_replace=1, n_shared_experts=1, num_key_value_heads=4),
    moe("OLMoE", config="Olmoe", num_experts=4, num_experts_per_tok=2),
    moe("FlexOlmo", why="2 layers x (attention, experts), the norm behind each branch",
        config="FlexOlmo", num_experts=4, num_experts_per_tok=2),
    moe("GPT-OSS", config="GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    moe("GLM4-MoE", why=SHARED, config="Glm4Moe", n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, head_dim=8, first_k_dense_replace=1, n_group=1, topk_group=1),
    moe("Granite-MoE", config="GraniteMoe", num_local_experts=4, residual_multiplier=0.5),
    moe("Granite-MoE shared", why=SHARED, config="GraniteMoeShared", num_local_experts=4,
        residual_multiplier=0.5, shared_intermediate_size=32),
    moe("PhiMoE", config="Phimoe", num_local_experts=4),
    moe("DBRX", why="2 blocks x (attention, experts), the first add one module deeper",
        config="Dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}),
    moe("JetMoE", config="JetMoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8,
        num_key_value_heads=2, num_attention_heads=4),
    moe("HunYuan MoE", why=SHARED, config="HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=8),
    moe("ERNIE 4.5 MoE", why=SHARED, config="Ernie4_5_Moe", moe_num_experts=4, moe_k=2,
        moe_intermediate_size=16, moe_num_shared_experts=1, moe_layer_start_index=1),
    moe("dots1", why=SHARED, config="Dots1", n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, head_dim=8, first_k_dense_replace=1, n_group=1, topk_group=1,
        n_shared_experts=1),
    moe("MiniMax", why="2 layers x (attention, experts), post-norm, the skip times a constant; "
        "one layer of linear attention", num_local_experts=4, head_dim=8, block_size=4),
    moe("LongCat-Flash", (8,), "2 layers x (attention, MLP, attention, MLP); the experts' "
        "shortcut is added behind the last", config="LongcatFlash", num_layers=2, q_lora_rank=16,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        moe_topk=2, ffn_hidden_size=64, expert_ffn_hidden_size=16, zero_expert_num=2,
        head_dim=4, num_key_value_heads=4),
)  # fmt: skip

STATE_SPACE = "1 add a block, around the mixer"


def hybrid(name, sites=(4,), why="2 layers x (mixer or attention, MLP)", **kwargs):
    return entry("state-space and hybrid", name, sites, why, **{"generate": GENERATE, **kwargs})


HYBRIDS = (
    hybrid("Mamba", (2,), STATE_SPACE, state_size=4, generate=RECURRENT),
    hybrid("Mamba2", (2,), STATE_SPACE, state_size=4, num_heads=8, head_dim=8, n_groups=2,
           chunk_size=4, generate=RECURRENT),
    hybrid("FalconMamba", (2,), STATE_SPACE, state_size=4, generate=RECURRENT),
    hybrid("Jamba", (8,), "4 layers x (attention or Mamba, MLP or experts)", num_hidden_layers=4,
           num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
           expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    hybrid("Zamba", (5,), "5 layers, 1 add each around Mamba; the shared transformer lies inside "
           "the branch", num_hidden_layers=5, attn_layer_period=2, attn_layer_offset=1,
           mamba_d_state=4, mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False,
           attention_head_dim=16),
    hybrid("Zamba2", (4,), "4 layers, 1 add each around Mamba2; the shared transformer lies inside "
           "the branch", num_hidden_layers=4, mamba_d_state=4, mamba_ngroups=1, n_mamba_heads=4,
           mamba_headdim=16, chunk_size=4, attention_head_dim=16, num_mem_blocks=1,
           layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], hybrid_layer_ids=[1, 3],
           use_mamba_kernels=False, adapter_rank=4),
    hybrid("Bamba", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
           mamba_chunk_size=4, attn_layer_indices=[1]),
    hybrid("Falcon-H1", why="2 layers x (Mamba + attention, MLP): the first branch is a sum",
           config="FalconH1", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4,
           mamba_n_groups=1, mamba_chunk_size=4, head_dim=8),
    hybrid("Granite-MoE hybrid", config="GraniteMoeHybrid", residual_multiplier=0.5,
           num_local_experts=4, shared_intermediate_size=32, mamba_n_heads=8, mamba_d_head=8,
           mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4,
           layer_types=["mamba", "attention"]),
    hybrid("RecurrentGemma", (6,), "3 layers x (recurrence or attention, MLP)", head_dim=8,
           lru_width=32, num_hidden_layers=3, attention_window_size=16),
    hybrid("RWKV", config="Rwkv", why="2 blocks x (time mix, channel mix), a norm before the first",
           context_length=64, attention_hidden_size=32, generate=()),
    hybrid("Qwen3-Next", why="2 layers x (linear or full attention, experts)", config="Qwen3Next",
           head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
           shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4,
           linear_key_head_dim=8, linear_value_head_dim=8,
           layer_types=["linear_attention", "full_attention"]),
    hybrid("LFM2", config="Lfm2", why="2 layers x (convolution or attention, MLP)",
           block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    hybrid("Nemotron-H", (4,), "4 blocks, 1 add each: Mamba2, MLP, attention, MLP",
           config="NemotronH", head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4,
           n_groups=1, chunk_size=4, layers_block_type=["mamba", "mlp", "attention", "mlp"]),
    hybrid("OLMo hybrid", config="OlmoHybrid", layer_types=["linear_attention", "full_attention"],
           linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
           linear_value_head_dim=8),
    hybrid("Kimi-Linear", config="KimiLinear", why="2 layers x (linear or latent attention, MLP or "
           "experts); shared + routed is a sum inside the branch", q_lora_rank=16, kv_lora_rank=8,
           qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
           num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, linear_head_dim=8,
           linear_num_heads=4, layer_types=["linear_attention", "full_attention"],
           mlp_layer_types=["dense", "sparse"]),
    hybrid("xLSTM", why="2 blocks x (mLSTM, MLP)", config="xLSTM", hidden_size=128, num_heads=2,
           mode="inference", chunk_size=16, autocast_kernel_dtype="float32",
           generate=("greedy",)),
)  # fmt: skip

POST = "2 layers x (attention, MLP), LayerNorm(x + F(x))"


def encoder(name, sites=(4,), why=POST, config="", model="", **kwargs):
    config = config or name.replace("-", "").replace(" ", "")
    model = model or f"{config}ForMaskedLM"
    return entry("encoder-only", name, sites, why, config=config, model=model, **kwargs)


def boxes(batch=2, length=8, seed=0):
    """LiLT wants a bounding box a token, corners in order."""
    corner = tokens(batch, length, seed + 2000).unsqueeze(-1)
    return {**ids(batch, length, seed), "bbox": corner + torch.tensor([0, 0, 10, 5])}


def long_ids(batch=2, length=8, seed=0):
    """Local attention needs more tokens than one window."""
    return ids(batch, 3 * length, seed)


ENCODERS = (
    encoder("BERT", config="Bert"),
    encoder("RoBERTa", config="Roberta"),
    encoder("RoBERTa pre-norm", why=PRE, config="RobertaPreLayerNorm"),
    encoder("XLM-RoBERTa", config="XLMRoberta"),
    encoder("XLM-RoBERTa XL", why=PRE, config="XLMRobertaXL"),
    encoder("X-MOD", (6,), "2 layers x (attention, MLP, adapter of the language)", config="Xmod",
            languages=["en_XX", "de_DE"], default_language="en_XX"),
    encoder("CamemBERT", config="Camembert"),
    encoder("Data2Vec text", config="Data2VecText"),
    encoder("DistilBERT", config="DistilBert", hidden_dim=64),
    encoder("ELECTRA", config="Electra", embedding_size=16),
    encoder("DeBERTa", config="Deberta", pos_att_type=["c2p", "p2c"], relative_attention=True),
    encoder("DeBERTa-v2", config="DebertaV2", pos_att_type=["c2p", "p2c"], relative_attention=True,
            position_buckets=8, norm_rel_ebd="layer_norm"),
    encoder("ALBERT", why="one shared block called twice x (attention, MLP), LayerNorm(x + F(x))",
            config="Albert", embedding_size=16),
    encoder("MPNet"),
    encoder("ERNIE", config="Ernie"),
    encoder("MegatronBERT", why=PRE, config="MegatronBert"),
    encoder("RemBERT", config="RemBert", input_embedding_size=16, output_embedding_size=16),
    encoder("RoFormer", config="RoFormer", embedding_size=32),
    encoder("ConvBERT", config="ConvBert", embedding_size=32, head_ratio=2, num_groups=1),
    encoder("ModernBERT", why=PRE, config="ModernBert"),
    encoder("EuroBERT", why=PRE, config="EuroBert"),
    encoder("Nystromformer", segment_means_seq_len=64, num_landmarks=64),
    encoder("YOSO", config="Yoso", use_expectation=True, use_fast_hash=False, conv_window=None),
    encoder("FNet", why="2 layers x (Fourier transform, MLP), LayerNorm(x + F(x))"),
    encoder("SqueezeBERT", (), "2 layers x 2 adds on [batch, channels, tokens]",
            config="SqueezeBert", refused=("channel axis", 4), embedding_size=32, q_groups=1,
            k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1,
            output_groups=1),
    encoder("Longformer", inputs=long_ids, attention_window=[4, 4]),
    encoder("BigBird", attention_type="original_full"),
    encoder("BigBird sparse", config="BigBird", attention_type="block_sparse", block_size=2,
            num_random_blocks=1, max_position_embeddings=128, inputs=long_ids),
    encoder("ESM", why=PRE, config="Esm", position_embedding_type="rotary", token_dropout=False,
            mask_token_id=3),
    encoder("XLNet", model="XLNetLMHeadModel"),
    # In training mode the quantizer that adds branches on what the sum's extrema are.
    encoder("I-BERT", (), "2 layers x (attention, MLP), each add in a module QuantAct",
            config="IBert", refused=("control flow depends on data", 0)),
    encoder("MobileBERT", (4, 4), "a layer narrows the state, adds 4 feed-forward nets to it, "
            "and widens it again: 4 adds a layer, within the one add around the layer; attention "
            "reads another projection than the one it is added to", config="MobileBert",
            embedding_size=32, true_hidden_size=16, intra_bottleneck_size=16,
            num_feedforward_networks=4, normalization_type="layer_norm"),
    encoder("LiLT", (4, 2), "two streams, text and layout, each 2 layers x (attention, MLP); the "
            "model returns no layout state, so that of the last layer is unused",
            config="Lilt", model="LiltModel", result=last_hidden_state, inputs=boxes,
            max_2d_position_embeddings=128, channel_shrink_ratio=2, hidden_size=48),
    encoder("XLM", why="2 layers x (attention, MLP) in the model's own forward, "
            "LayerNorm(x + F(x))", model="XLMWithLMHeadModel", emb_dim=32, n_layers=2, n_heads=4,
            n_words=VOCABULARY, embed_init_std=SPREAD, init_std=SPREAD),
    encoder("FlauBERT", why="2 layers x (attention, MLP) in the model's own forward, "
            "LayerNorm(x + F(x))", config="Flaubert", model="FlaubertWithLMHeadModel", emb_dim=32,
            n_layers=2, n_heads=4, n_words=VOCABULARY, embed_init_std=SPREAD, init_std=SPREAD),
    encoder("Funnel", (6,), "blocks of 1 layer x (attention, MLP), pooled between; 1 decoder layer "
            "behind upsampling, with a long skip from the first block", block_sizes=[1, 1],
            num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=64),
)  # fmt: skip

ENCODER_DECODER = ("encoder 2 layers x (attention, MLP), decoder 2 layers x (attention, "
                   "cross-attention, MLP)")  # fmt: skip


def source_and_target(batch=2, length=8, seed=0):
    target = tokens(batch, max(2, length - 3), seed + 1000)
    return {**ids(batch, length, seed), "decoder_input_ids": target}


def long_source(batch=2, length=8, seed=0):
    target = tokens(batch, max(2, length - 3), seed + 1000)
    return {**long_ids(batch, length, seed), "decoder_input_ids": target}


def seq2seq(name, sites=(4, 6), why=ENCODER_DECODER, config="", model="", **kwargs):
    config = config or name.replace("-", "").replace(" ", "")
    model = model or f"{config}ForConditionalGeneration"
    kwargs = {"inputs": source_and_target, "generate": GENERATE, **kwargs}
    return entry("encoder-decoder", name, sites, why, config=config, model=model,
                 decoder_start_token_id=2, **kwargs)  # fmt: skip


T5_LIKE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
BART_LIKE = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": SPREAD,
}  # fmt: skip
PROPHET_LIKE = {
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "init_std": SPREAD,
}  # fmt: skip
GEMMA_LIKE = {"head_dim": 8, "num_key_value_heads": 2, "num_attention_heads": 4,
              "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH,
              "initializer_range": SPREAD, "bos_token_id": 0, "eos_token_id": 1,
              "pad_token_id": 2}  # fmt: skip

ENCODER_DECODERS = (
    seq2seq("T5", **T5_LIKE),
    seq2seq("T5 gated", config="T5", feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            **T5_LIKE),
    seq2seq("mT5", config="MT5", **T5_LIKE),
    seq2seq("UMT5", **T5_LIKE),
    seq2seq("LongT5 local", config="LongT5", encoder_attention_type="local", local_radius=3,
            inputs=long_source, **T5_LIKE),
    seq2seq("LongT5 global", config="LongT5", encoder_attention_type="transient-global",
            local_radius=3, global_block_size=4, inputs=long_source, **T5_LIKE),
    seq2seq("Switch Transformers", config="SwitchTransformers", num_experts=4,
            num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            expert_capacity=16, **T5_LIKE),
    seq2seq("BART", config="Bart", **BART_LIKE),
    seq2seq("mBART", config="MBart", **BART_LIKE),
    seq2seq("PLBART", config="PLBart", **BART_LIKE),
    seq2seq("MVP", config="Mvp", **BART_LIKE),
    seq2seq("Pegasus", **BART_LIKE),
    seq2seq("PEGASUS-X", (4, 2, 6), ENCODER_DECODER + "; the encoder's global tokens are a second "
            "stream, unused behind the last layer's attention",
            config="PegasusX", block_size=8, num_global_tokens=4, inputs=long_source,
            **BART_LIKE),
    seq2seq("BigBird-Pegasus", config="BigBirdPegasus", attention_type="original_full",
            **BART_LIKE),
    seq2seq("Blenderbot", **BART_LIKE),
    seq2seq("Blenderbot small", config="BlenderbotSmall", **BART_LIKE),
    seq2seq("Marian", model="MarianMTModel", **BART_LIKE),
    seq2seq("FSMT", model="FSMTForConditionalGeneration", langs=["en", "de"],
            src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, **BART_LIKE),
    seq2seq("M2M100", **BART_LIKE),
    seq2seq("NLLB-MoE", config="NllbMoe", num_experts=4, encoder_sparse_step=2,
            decoder_sparse_step=2, expert_capacity=16, **BART_LIKE),
    seq2seq("LED", attention_window=[4, 4], max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64, **BART_LIKE),
    # The library's generate() raises for the plain model.
    seq2seq("ProphetNet", config="ProphetNet", generate=(), ngram=2, **PROPHET_LIKE),
    seq2seq("T5Gemma", config="T5Gemma", encoder=GEMMA_LIKE, decoder=GEMMA_LIKE,
            vocab_size=VOCABULARY),
    # The plain model has no static cache of its mask's kind: a KeyError.
    seq2seq("T5Gemma2", (4, 4), generate=NO_STATIC, why="encoder and decoder 2 layers x "
            "(attention, MLP); the decoder attends to itself and the encoder at once",
            config="T5Gemma2", encoder={"text_config": GEMMA_LIKE}, decoder=GEMMA_LIKE,
            vocab_size=VOCABULARY),
)  # fmt: skip

NATIVE = (
    entry("native hyper-connections", "DeepSeek-V4", (), "has hyper-connections of its own",
          config="DeepseekV4", refused=("hyper-connections of its own", 0)),
)  # fmt: skip

ENTRIES = (*DECODERS, *MIXTURES, *HYBRIDS, *ENCODERS, *ENCODER_DECODERS, *NATIVE)
