"""Whatever goes wrong, model and torch are left exactly as they were; the error says what to do."""

import builtins
import inspect
import random

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    SPREAD,
    VOCABULARY,
    WIDTH,
    Attention,
    Block,
    NanoGPT,
    assert_unchanged,
    normal,
    snapshot,
    tokens,
)
from torch import nn

import mhc_compile as mc
from mhc_compile import api, errors


def global_state():
    return {
        "call": nn.Module.__call__,
        "isinstance": builtins.isinstance,
        "apply": torch.autograd.Function.__dict__["apply"],
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    before = global_state()
    yield
    after = global_state()
    assert all(after[key] is value or after[key] == value for key, value in before.items())


def dress(model):
    """Gives a model what a user's has: hooks, frozen weights, gradients, mixed modes."""
    model.train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    for parameter in parameters[1::2]:
        parameter.grad = torch.ones_like(parameter)
    first = next(model.children())
    first.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    return model


def check_refusal(model, error, *parts, call=mc.transform, **kwargs):
    """Expects an error of exactly this class, all `parts` in its message, and no change."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call(model, **kwargs)
    assert_unchanged(before, model)
    assert type(caught.value) is error, repr(caught.value)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    return message


def line_of(cls, text):
    """The place of a source line in this file, as messages give it."""
    lines, start = inspect.getsourcelines(cls)
    return f"test_atomic.py:{start + next(k for k, line in enumerate(lines) if text in line)}"


# --- models without, or with other, residuals -----------------------------------------------------


class NoResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_a_model_without_residuals():
    check_refusal(
        dress(NoResidual()), errors.NoResidualError, "NoResidual", "no residual add",
        "example inputs",
    )  # fmt: skip


class ConvBlock(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = x + self.one(self.norm(x))
        return x + self.two(torch.relu(x))


@pytest.mark.parametrize("size", [8, 5])  # 8: width and channels cannot be told apart by size
def test_channels_that_are_not_last(size):
    model = dress(nn.Sequential(ConvBlock(), ConvBlock()))
    x = normal(2, 8, size, size)
    check_refusal(
        model, errors.UnsupportedResidualError, line_of(ConvBlock, "self.one(self.norm"),
        "channel", "channels-last", "strict=False", example_inputs=x,
    )  # fmt: skip
    message = check_refusal(
        model, errors.NoResidualError, "none of the 4", example_inputs=x, strict=False
    )
    assert "channel" in message
    before = snapshot(model)
    assert not any(site.accepted for site in mc.find_residuals(model, x))
    assert_unchanged(before, model)


def test_a_transformed_model():
    architecture = ARCHITECTURES["gpt2"]
    model = mc.transform(architecture.build(), example_inputs=architecture.inputs())
    for call in (mc.transform, mc.find_residuals):
        check_refusal(
            model, errors.AlreadyTransformedError, "GPT2LMHeadModel", "transformer.h.0", "revert",
            call=call,
        )  # fmt: skip
    part = model.transformer
    check_refusal(part, errors.AlreadyTransformedError, "revert")


def deepseek_v4():
    config = transformers.DeepseekV4Config(
        vocab_size=97, hidden_size=WIDTH, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, q_lora_rank=16,
        num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1, max_position_embeddings=64,
        o_groups=2, o_lora_rank=8, index_n_heads=2, index_head_dim=8, index_topk=4,
        sliding_window=8, hc_mult=2, num_hash_layers=0, initializer_range=SPREAD,
    )  # fmt: skip
    return transformers.DeepseekV4ForCausalLM(config)


def test_a_model_with_hyper_connections_of_its_own():
    model = dress(deepseek_v4())
    check_refusal(
        model, errors.AlreadyTransformedError, "DeepseekV4ForCausalLM", "attn_hc",
        "DeepseekV4HyperConnection", example_inputs={"input_ids": tokens()},
    )  # fmt: skip


# --- blocks that cannot be rewritten --------------------------------------------------------------


class Overwrites(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x[:, 0] = 0.0
        return x + self.mlp(self.ln_2(x))


class OverwritesLast(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        x[..., :1] = 0.0
        return x


class DataDependent(Block):
    def forward(self, x):
        if x.sum() > 0:
            x = x + self.attn(self.ln_1(x))
        else:
            x = x + self.attn(self.ln_1(-x))
        return x + self.mlp(self.ln_2(x))


class Unregistered(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x)) * torch.full((1,), 2.0).requires_grad_(False)
        return x + self.mlp(self.ln_2(x)) * FACTOR


FACTOR = torch.full((WIDTH,), 0.5)


class TakenName(Block):
    def __init__(self, width, dropout=0.0):
        super().__init__(width, dropout)
        self.mhc = nn.Linear(width, width)

    def forward(self, x):
        return super().forward(self.mhc(x))


REFUSED = [
    (Overwrites, errors.UnsupportedResidualError, "x[:, 0] = 0.0"),
    (OverwritesLast, errors.UnsupportedResidualError, "x[..., :1] = 0.0"),
    (DataDependent, errors.TraceError, "if x.sum() > 0"),
    (Unregistered, errors.TraceError, "* FACTOR"),
]


@pytest.mark.parametrize(("block", "error", "text"), REFUSED, ids=[c[0].__name__ for c in REFUSED])
def test_a_block_that_cannot_be_rewritten(block, error, text):
    message = check_refusal(dress(NanoGPT(block=block)), error)
    assert line_of(block, text) in message or "'h.0" in message
    assert any(remedy in message for remedy in ("filter_fn", "submodule", "register"))


def test_the_error_names_the_users_class():
    """Not that of the subclass under which the block is traced."""
    message = check_refusal(
        NanoGPT(block=OverwritesLast), errors.UnsupportedResidualError, "(OverwritesLast)"
    )
    assert "MHCOverwritesLast" not in message


def test_filter_fn_is_the_remedy_that_the_message_offers():
    model = NanoGPT(block=Overwrites).eval()
    before = model(tokens())
    mc.transform(model, filter_fn=lambda site: site.name.endswith("attn"))
    torch.testing.assert_close(model(tokens()), before)


def test_a_block_that_has_an_attribute_of_our_name():
    check_refusal(
        dress(NanoGPT(block=TakenName)), errors.UnsupportedResidualError, "h.0", "'mhc'", "rename"
    )


class OneIsOdd(nn.Module):
    """A transformer whose last layer's channels stand in front."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.conv = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(2))

    def forward(self, x):
        for block in self.body:
            x = block(x)
        x = torch.tanh(x.transpose(1, 2) @ x)
        for conv in self.conv:
            x = x + conv(x)
        return x


def test_strict_refuses_what_strict_false_leaves():
    model, x = dress(OneIsOdd()), normal(2, 8, WIDTH)
    check_refusal(
        model, errors.UnsupportedResidualError, line_of(OneIsOdd, "x + conv(x)"), "strict=False",
        example_inputs=x,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        before = model(x)
        mc.transform(model, example_inputs=x, strict=False)
        assert {n.split(".mhc")[0] for n, _ in mc.mhc_parameters(model)} == {"body.0", "body.1"}
        torch.testing.assert_close(model(x), before)


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"streams": 0}, ["streams", "from 1 to 16", "0"]),
        ({"streams": 2.0}, ["streams", "integer", "2.0"]),
        ({"streams": True}, ["streams", "integer", "True"]),
        ({"stream": 4}, ["'stream'", "did you mean 'streams'?"]),
        ({"connection": "mhcc"}, ["connection", "'mhc', 'hc'", "did you mean 'mhc'?"]),
        ({"init": "zero"}, ["init", "'preserve', 'paper'"]),
        ({"collapse": "max"}, ["collapse", "'learned', 'mean', 'sum', 'head'"]),
        ({"convention": "deepseek"}, ["convention", "did you mean 'deepseek_v4'?"]),
        ({"sinkhorn_iters": 0}, ["sinkhorn_iters", "at least 1"]),
        ({"convention": "tilekernels"}, ["init='preserve'", "post_multiplier", "init='paper'"]),
        ({"config": {"streams": 4}}, ["config", "MHCConfig", "dict", "from_dict"]),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_wrong_config_values(kwargs, parts):
    check_refusal(dress(NanoGPT()), errors.ConfigError, *parts, **kwargs)


@pytest.mark.parametrize("call", [mc.transform, mc.find_residuals, mc.revert, mc.is_transformed])
def test_something_that_is_no_module(call):
    with pytest.raises(errors.MHCError, match="torch.nn.Module"):
        call(torch.relu)


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ("text", ["str", "example_inputs", "tuple"]),
        (7, ["int", "example_inputs", "dict"]),
        ({"ids": tokens()}, ["NanoGPT", "TypeError", "'ids'"]),
        ((normal(2, 8),), ["NanoGPT", "example inputs"]),
        ((), ["NanoGPT", "missing", "'idx'"]),
        ((tokens() + 1000,), ["NanoGPT", "IndexError"]),
    ],
    ids=["string", "number", "unknown-keyword", "wrong-dtype", "none", "out-of-range"],
)
@pytest.mark.parametrize("call", [mc.transform, mc.find_residuals])
def test_wrong_example_inputs(call, inputs, parts):
    check_refusal(
        dress(NanoGPT()), errors.ExampleInputsError, *parts, call=call, example_inputs=inputs
    )


class NoHint(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = nn.Identity()

    def forward(self, x):
        return x + self.inner(x * self.weight)


def test_inputs_that_cannot_be_derived():
    check_refusal(
        dress(NoHint()), errors.ExampleInputsError, "cannot derive", "NoHint", "example_inputs="
    )


# --- errors in the middle -------------------------------------------------------------------------


class UsersOwnError(Exception):
    pass


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_error_in_the_middle_of_the_install(monkeypatch, number):
    calls = []
    install = api.install_block

    def failing(block, rewrite):
        calls.append(block)
        if len(calls) > number:
            raise UsersOwnError
        install(block, rewrite)

    monkeypatch.setattr(api, "install_block", failing)
    architecture = ARCHITECTURES["t5"]
    check_refusal(dress(architecture.build()), UsersOwnError, example_inputs=architecture.inputs())
    assert len(calls) == number + 1


@pytest.mark.parametrize("error", [UsersOwnError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "step", ["record_forward", "plan_rewrite", "prepare_blocks", "_check_step0"]
)
def test_an_error_in_any_step(monkeypatch, step, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(api, step, failing)
    check_refusal(dress(ARCHITECTURES["gpt2"].build()), error)


def test_an_error_of_filter_fn():
    def filter_fn(site):
        raise UsersOwnError(site.name)

    check_refusal(dress(NanoGPT()), UsersOwnError, "h.0.attn", filter_fn=filter_fn)


def test_a_filter_that_takes_nothing():
    check_refusal(
        dress(NanoGPT()), errors.NoResidualError, "filter_fn", filter_fn=lambda site: False
    )


class Noisy(Block):
    """Random in evaluation mode, by torch's generator."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x) + torch.randn(x.shape))
        return x + self.mlp(self.ln_2(x))


def test_a_forward_that_is_random_in_evaluation_mode():
    model, idx = NanoGPT(block=Noisy).eval(), tokens()
    torch.manual_seed(5)
    before = model(idx)
    mc.transform(model, example_inputs={"idx": idx})
    torch.manual_seed(5)
    assert torch.allclose(model(idx), before, atol=1e-5)


class Unseeded(nn.Linear):
    """Random by a generator of its own, so that no check at step 0 can hold."""

    def forward(self, x):
        return super().forward(x) * random.SystemRandom().uniform(1, 2)


def test_a_forward_that_is_random_beyond_torch_s_seed():
    model = NanoGPT()
    model.head = Unseeded(WIDTH, VOCABULARY)
    check_refusal(dress(model), errors.MHCError, "NanoGPT", "random")


class FailsLater(NanoGPT):
    """Its third forward fails: the check at step 0, when the blocks are installed."""

    calls = 0

    def forward(self, idx):
        FailsLater.calls += 1  # transform puts back what a run leaves on the model itself
        self.last = idx
        if FailsLater.calls > 2:
            raise UsersOwnError("third call")
        return super().forward(idx)


def test_a_forward_that_fails_after_the_install():
    """Buffers and attributes that the model's own forward changed are put back as well."""
    check_refusal(dress(FailsLater()), UsersOwnError, "third call")


class ChangesItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.BatchNorm1d(8), Attention()
        self.register_buffer("calls", torch.zeros(1))
        self.history = []

    def forward(self, x):
        self.calls += 1
        x = x + self.attn(self.norm(x))
        return x + self.attn(x)


def test_find_residuals_leaves_random_state_and_buffers():
    model = dress(ChangesItself())
    before, state = snapshot(model), torch.get_rng_state()
    assert len(mc.find_residuals(model, normal(2, 8, WIDTH))) == 2
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "encoder_pre"])
def test_derived_inputs_do_not_use_the_random_state(name):
    model = ARCHITECTURES[name].build()
    state = torch.get_rng_state()
    mc.find_residuals(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_example_inputs_are_not_changed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = x + self.one(x)
            return x + self.two(x)

    x = normal(2, 8, WIDTH).requires_grad_()
    copy = x.detach().clone()
    mc.transform(InPlace(), example_inputs=x)
    assert torch.equal(x, copy)
    assert x.grad is None
    assert x.requires_grad
