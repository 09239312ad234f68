"""Control flow that a graph cannot hold, layer drop, and inputs that make no sense."""

import copy
import inspect

import pytest
import torch
import transformers as hf
from models import WIDTH, Block, NanoGPT, assert_unchanged, normal, perturb, snapshot, tokens
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import ExampleInputsError, MHCError, TraceError

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def line_of(cls, text):
    lines, start = inspect.getsourcelines(cls)
    return f"test_bad_input.py:{start + next(k for k, line in enumerate(lines) if text in line)}"


def refused(model, error, *parts, **kwargs):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        mc.transform(model, streams=2, **kwargs)
    assert_unchanged(before, model)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    return message


# --- branches on data -----------------------------------------------------------------------------


class IfSum(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + (self.mlp(self.ln_2(x)) if x.sum() > 0 else 0 * x)


class WhileLoop(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        while x.norm() > 1e3:
            x = x / 2
        return x + self.mlp(self.ln_2(x))


class Item(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)) * [1.0, 2.0][x.argmax() % 2]


class MaskIndex(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)) * float(x.abs().max())


@pytest.mark.parametrize(
    ("block", "text"),
    [(IfSum, "if x.sum() > 0"), (WhileLoop, "while x.norm()"), (Item, "x.argmax()"),
     (MaskIndex, "float(x.abs()")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_control_flow_that_depends_on_data(block, text):
    refused(NanoGPT(block=block), TraceError, line_of(block, text), block.__name__)


def routed(x):
    """Control flow on data in a helper function: a call in the graph."""
    return x * 2 if x.sum() > 0 else x * 3


class WithHelper(Block):
    def forward(self, x):
        x = x + routed(self.attn(self.ln_1(x)))
        return x + self._pick(self.mlp(self.ln_2(x)))

    def _pick(self, x):
        return x * 5 if bool((x > 0).any()) and float(x.max()) > 0 else x


def test_control_flow_in_a_helper_stays_a_call():
    original = NanoGPT(block=WithHelper).eval()
    model = mc.transform(copy.deepcopy(original), streams=2)
    for seed in range(6):
        torch.testing.assert_close(model(tokens(seed=seed)), original(tokens(seed=seed)),
                                   **TOLERANCE)  # fmt: skip
    with torch.no_grad():
        for m in (model, original):
            m.h[0].attn.out.bias.sub_(10.0)  # takes the other way
    torch.testing.assert_close(model(tokens()), original(tokens()), **TOLERANCE)


class ChecksOverflow(Block):
    """As T5 and BART do for half precision."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        if x.dtype == torch.bfloat16 and (torch.isinf(x).any() or torch.isnan(x).any()):
            x = torch.clamp(x, min=-1e3, max=1e3)
        return x


@torch.no_grad()
def test_a_check_for_overflow():
    original = NanoGPT(block=ChecksOverflow).eval()
    model = mc.transform(copy.deepcopy(original), streams=2)
    torch.testing.assert_close(model(tokens()), original(tokens()), **TOLERANCE)
    model.bfloat16()
    original.bfloat16()
    assert (model(tokens()) - original(tokens())).abs().max() <= 0.1
    model.h[0].mlp[2].bias.fill_(float("inf"))
    with pytest.raises(TraceError, match=r"test_bad_input.py:\d+ saw False .* True now"):
        model(tokens())


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_overflow_checks_of_half_precision_models(name):
    shared = {"vocab_size": 97, "d_model": WIDTH, "decoder_start_token_id": 2, "pad_token_id": 0}
    if name == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(**shared, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
    else:
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(**shared, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
                          decoder_ffn_dim=64, encoder_attention_heads=4,
                          decoder_attention_heads=4, max_position_embeddings=64)
        )  # fmt: skip
    model = model.eval().half()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5)}
    before = model(**inputs).logits.float()
    mc.transform(model, streams=2, example_inputs=inputs)
    assert (model(**inputs).logits.float() - before).abs().max() <= 0.05


# --- site counts that differ between calls --------------------------------------------------------


class EarlyExit(Block):
    exit = False

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if self.exit:
            return x
        return x + self.mlp(self.ln_2(x))


def test_an_early_exit_by_a_flag():
    model = mc.transform(NanoGPT(block=EarlyExit).eval(), streams=2)
    before = model(tokens())
    model.h[1].exit = True
    with pytest.raises(MHCError, match=r"'h\.1'.*test_bad_input.py:\d+.*found at"):
        model(tokens())
    model.h[1].exit = False
    assert torch.equal(model(tokens()), before)


class OnlyInTraining(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if self.training:
            x = x + self.mlp(self.ln_2(x))
        return x + self.mlp(self.ln_1(x))


def test_a_site_that_only_training_has():
    message = refused(NanoGPT(block=OnlyInTraining), MHCError, "'h.0'", "OnlyInTraining")
    assert line_of(OnlyInTraining, "self.mlp(self.ln_2(x))") in message


class DropsItself(Block):
    """Stochastic depth in Python: with some luck the whole block is skipped in training."""

    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return x
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def test_stochastic_depth_by_a_random_number():
    message = None
    for seed in range(4):
        torch.manual_seed(seed)
        model = NanoGPT(block=DropsItself)
        before = snapshot(model)
        with pytest.raises(MHCError) as caught:
            mc.transform(model, streams=2)
            model.train()
            for _ in range(20):
                model(tokens())
        message = str(caught.value)
        assert "test_bad_input.py" in message
        if not mc.is_transformed(model):
            assert_unchanged(before, model)
    assert message


class LayerDrop(NanoGPT):
    """Skips whole blocks in training, as BART, OPT and wav2vec2 do."""

    skipped = ()

    def forward(self, idx):
        x = self.wte(idx)
        for number, block in enumerate(self.h):
            if self.training and number in self.skipped:
                continue
            x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("skipped", [(1,), (0,), (2,), (0, 1), (0, 1, 2)])
def test_layer_drop_is_right_or_an_error(skipped):
    original = LayerDrop(depth=3)
    model = mc.transform(copy.deepcopy(original), streams=2)
    model.skipped = original.skipped = skipped
    model.train()
    original.train()
    if skipped in ((1,), (0, 1, 2)):  # neither the block that expands nor the one that collapses
        torch.testing.assert_close(model(tokens()), original(tokens()), **TOLERANCE)
        return
    with pytest.raises(MHCError, match=r"'h\.[12]'"):
        model(tokens())
    model.eval()
    torch.testing.assert_close(model(tokens()), original.eval()(tokens()), **TOLERANCE)


def test_layer_drop_of_the_last_block_names_the_remedy():
    model = mc.transform(LayerDrop(depth=3), streams=2).train()
    perturb(model)
    model.skipped = (2,)
    with pytest.raises(MHCError, match=r"'h\.2'.*did not run.*layer drop"):
        model(tokens())
    model.skipped = ()
    model(tokens()).sum().backward()


# --- later calls that fail ------------------------------------------------------------------------


def test_a_later_call_that_fails_leaves_the_model_as_it_was():
    model = mc.transform(NanoGPT().eval(), streams=2)
    idx = tokens()
    before, state = model(idx), snapshot(model)
    for wrong in (normal(2, 8), tokens() + 1000, None):
        with pytest.raises((RuntimeError, IndexError, AttributeError, TypeError)):
            model(wrong)
    with pytest.raises(MHCError, match="call the whole model"):
        model.h[1](normal(2, 8, WIDTH))
    assert_unchanged(state, model)
    assert torch.equal(model(idx), before)


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ({"tokens": tokens()}, "'tokens'"),
        ((tokens().float(),), "NanoGPT failed"),
        ((tokens(), tokens()), "NanoGPT failed"),
        ([], "missing"),
        (3.5, "float"),
        (({"idx": tokens()},), "NanoGPT failed"),
        (tokens().tolist(), "NanoGPT failed"),
    ],
    ids=["name", "dtype", "many", "none", "number", "nested", "lists"],
)
def test_example_inputs_that_make_no_sense(inputs, part):
    message = refused(NanoGPT(), ExampleInputsError, part, example_inputs=inputs)
    assert "example_inputs" in message


class Numpy(nn.Module):
    """A trunk whose residual adds stand in the loop, among much other Python."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.subs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scales = [1.0, 0.5, 0.25]

    def forward(self, x, scale=None, **kwargs):
        import numpy as np

        steps = np.linspace(0.1, 1.0, len(self.subs))
        noise = torch.from_numpy(np.ones((x.shape[0], 1, 1), dtype=np.float32))
        x = x * noise * float(np.sqrt(x.shape[-1])) ** 0
        states = {}
        for number, (norm, sub, s) in enumerate(
            zip(self.norms, self.subs, self.scales, strict=True)
        ):
            x = x + sub(norm(x)) * s * float(steps[number])
            states[f"layer {number}"] = x.mean()
        return x, states


@torch.no_grad()
def test_numpy_in_a_trunk():
    original = Numpy().eval()
    x = normal(2, 6, WIDTH)
    model = mc.transform(copy.deepcopy(original), streams=2, example_inputs=x)
    for x in (normal(2, 6, WIDTH), normal(3, 4, WIDTH)):
        torch.testing.assert_close(model(x), original(x), **TOLERANCE)
