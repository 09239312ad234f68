"""Tiny models with random weights, and what is known of them before any test runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import mhc_compile as mc

VOCABULARY, WIDTH, LENGTH = 97, 32, 64
# Wider than a library's default of 0.02: sublayers then matter as much as the skip.
SPREAD = 0.1
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(dropout=0.0, **kwargs):
    config = hf.GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=SPREAD,
        **_TOKENS, **kwargs,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def llama(dropout=0.0, **kwargs):
    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
        attention_dropout=dropout, initializer_range=SPREAD, **_TOKENS, **kwargs,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def qwen3_moe(dropout=0.0):
    config = hf.Qwen3MoeConfig(
        hidden_size=WIDTH, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
        attention_dropout=dropout, initializer_range=SPREAD, **_TOKENS,
    )  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config)


def bert(dropout=0.0):
    config = hf.BertConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, initializer_range=SPREAD,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def t5(dropout=0.0):
    config = hf.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
        dropout_rate=dropout, decoder_start_token_id=2, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def torch_encoder(dropout=0.0, *, norm_first):
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 64, dropout=dropout, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Attention(nn.Module):
    def __init__(self, width=WIDTH, heads=4, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2)
            for t in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Sequential):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )


class Block(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, dropout=dropout)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    """A plain pre-norm decoder around any kind of block."""

    def __init__(self, dropout=0.0, block=Block, depth=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(block(WIDTH, dropout=dropout) for _ in range(depth))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=SPREAD)
        nn.init.normal_(self.wpe.weight, std=SPREAD)

    def forward(self, idx):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def tokens(batch=2, length=8, seed=0):
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def normal(*shape, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class Architecture:
    """A model with the residual sites that its source code shows: `(name, stream)` in order."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    sites: tuple[tuple[str, int], ...]

    def build(self, seed=0, dropout=0.0):
        """A model in evaluation mode; its norms and biases are not at 1 and 0."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make(dropout).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def _ids(name="input_ids"):
    return lambda batch=2, length=8, seed=0: {name: tokens(batch, length, seed)}


def _source_and_target(batch=2, length=8, seed=0):
    target = tokens(batch, max(1, length - 3), seed + 1000)
    return {"input_ids": tokens(batch, length, seed), "decoder_input_ids": target}


def _states(batch=2, length=8, seed=0):
    return {"src": normal(batch, length, WIDTH, seed=seed)}


def _per_layer(pattern, *roles, stream=0):
    return tuple((pattern.format(layer, role), stream) for layer in range(2) for role in roles)


_GPT2 = _per_layer("transformer.h.{}.{}", "attn", "mlp")
_LLAMA = _per_layer("model.layers.{}.{}", "self_attn", "mlp")
_BERT = _per_layer("bert.encoder.layer.{}.{}", "attention", "output")
_TORCH = _per_layer("layers.{}.{}", "self_attn", "linear2")
_NANO = _per_layer("h.{}.{}", "attn", "mlp")
# The encoder and the decoder never add to each other: they meet in the cross attention alone.
_T5_ENCODER = ("layer.0.SelfAttention", "layer.1.DenseReluDense")
_T5_DECODER = ("layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense")
_T5 = _per_layer("encoder.block.{}.{}", *_T5_ENCODER) + _per_layer(
    "decoder.block.{}.{}", *_T5_DECODER, stream=1
)

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("gpt2", gpt2, _ids(), _GPT2),
        Architecture("llama", llama, _ids(), _LLAMA),
        # The sum over experts is no site of its own: it lies inside the mlp's branch.
        Architecture("qwen3_moe", qwen3_moe, _ids(), _LLAMA),
        # Post-norm: LayerNorm(F(x) + x) twice a layer, the adds in self.output and output.
        Architecture("bert", bert, _ids(), _BERT),
        Architecture("t5", t5, _source_and_target, _T5),
        Architecture(
            "encoder_pre", lambda dropout=0.0: torch_encoder(dropout, norm_first=True), _states,
            _TORCH,
        ),
        Architecture(
            "encoder_post", lambda dropout=0.0: torch_encoder(dropout, norm_first=False), _states,
            _TORCH,
        ),
        Architecture("nanogpt", NanoGPT, _ids("idx"), _NANO),
    )
}  # fmt: skip


def logits(model, inputs):
    """The main result of a call, whatever the model wraps it in."""
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def largest(reference):
    """The scale of tolerances: the largest result, at least 1."""
    return max(1.0, float(reference.abs().max()))


def perturb(model, seed=0, scale=1.0):
    """Moves the connections away from their start, so that every coefficient depends on x."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in mc.mhc_parameters(model):
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            if name.endswith("alpha"):
                p.add_(scale * (0.7 + 0.3 * noise))
            elif name.endswith("bias"):
                p.add_(scale * 0.5 * noise)
            elif name.endswith("collapse.weight"):
                p.add_(scale * 0.2 * noise)
    return model


def snapshot(model):
    """Everything that can tell whether a model was touched: objects, values and modes."""
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inner = {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict)}
        modules[name] = (module, type(module), dict(vars(module)), inner)
    tensors = {
        name: (t, t.detach().clone(), t.requires_grad, t.grad)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return modules, tensors


def assert_unchanged(before, model):
    """Compares with a `snapshot`, by identity where there are objects and bitwise in values."""
    (modules, tensors), (modules_now, tensors_now) = before, snapshot(model)
    assert list(modules_now) == list(modules)
    for name, (module, cls, attributes, inner) in modules.items():
        module_now, cls_now, attributes_now, inner_now = modules_now[name]
        assert module_now is module, name
        assert cls_now is cls, name
        assert list(attributes_now) == list(attributes), name
        changed = [k for k, v in attributes.items() if attributes_now[k] is not v]
        assert not changed, f"{name}: {changed}"
        for key, items in inner.items():  # parameters, children, hooks
            assert list(inner_now[key]) == list(items), f"{name}.{key}"
            assert all(inner_now[key][k] is v for k, v in items.items()), f"{name}.{key}"
    assert list(tensors_now) == list(tensors)
    for name, (tensor, value, requires_grad, grad) in tensors.items():
        now = tensors_now[name]
        assert now[0] is tensor, name
        assert torch.equal(now[1], value), name
        assert now[2] == requires_grad, name
        assert now[3] is grad, name
