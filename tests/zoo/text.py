"""Text models of transformers: tiny, with random weights.

The sites of each were read off its modeling file before any tool ran on it.
"""

import dataclasses

import transformers as hf
from entry import GENERATE, Entry
from models import LENGTH, SPREAD, VOCABULARY, tokens

NO_STATIC = ("greedy", "beam", "left_padding")
NO_BEAM = ("greedy", "static_cache", "left_padding")
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
    # The library's own generate() with a static cache gives other tokens than without one.
    decoder("GPT-Neo", config="GPTNeo", attention_types=[[["global", "local"], 1]], window_size=4,
            generate=NO_STATIC),
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
    # The library's beam search does not reorder the states of linear attention.
    moe("MiniMax", generate=NO_BEAM, why="2 layers x (attention, experts), post-norm, the skip times a constant; "
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
    # The library's beam search does not reorder the states of the recurrence.
    hybrid("RecurrentGemma", (6,), generate=NO_BEAM, why="3 layers x (recurrence or attention, MLP)", head_dim=8,
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

ENTRIES = (*DECODERS, *MIXTURES, *HYBRIDS)
