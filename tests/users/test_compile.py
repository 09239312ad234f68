"""torch.compile with torch's own backends, without graph breaks, and torch.export."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import WIDTH, NanoGPT, largest, logits, perturb, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import KINDS, assert_lengths_equal, result, transformed

import mhc_compile as mc

COMPILED = ["gpt2", "llama", "qwen3_moe", "bert", "t5", "vit"]
BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def built(name, dropout=0.0, **overrides):
    """With two Sinkhorn iterations: each is some more nodes to compile, and nothing new."""
    kind = KINDS[name]
    overrides = {"sinkhorn_iters": 2, "streams": 3, **overrides}
    model = mc.transform(kind.build(dropout=dropout), example_inputs=kind.inputs(), **overrides)
    return perturb(model), kind


def test_blocks_alike_are_compiled_once():
    """Each block by itself: the first, which expands, the last, and one for all in between."""
    graphs, depth = [], 11  # more than Dynamo would compile one by one
    model = perturb(mc.transform(NanoGPT(depth=depth), example_inputs=(tokens(2, 8),), streams=2))
    idx = tokens(3, 8, seed=4)
    wanted = model(idx)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    blocks = [block for block in model.modules() if hasattr(block, "mhc")]
    for block in blocks:
        block.compile(backend=backend)
    assert torch.equal(model(idx), wanted)
    assert len(blocks) == depth and len(graphs) == 3


def scaled(factor):
    """A function of the same name whatever its factor; Dynamo breaks the graph at it."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.as_tensor(factor).numpy().item()

        @staticmethod
        def backward(ctx, g):
            return g * factor

    return Scaled


class Scaling(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.function = scaled(factor)

    def forward(self, x):
        return x + self.linear(self.function.apply(self.norm(x)))


def test_blocks_whose_names_mean_other_things_share_nothing():
    """The same source with other objects behind its names, and graphs that break in it."""
    model = nn.Sequential(*(Scaling(float(k)) for k in range(1, 7)))
    x = torch.randn(2, 3, 8)
    perturb(mc.transform(model, example_inputs=(x,), streams=2))
    wanted = model(x)
    for block in model:
        block.compile(backend="eager")
    assert torch.equal(model(x), wanted)


@torch._dynamo.config.patch(error_on_recompile=True)
def check(name, backend, training, **overrides):
    """One graph a mode serves several lengths; values and gradients are the eager ones."""
    model, kind = built(name, **overrides)
    model.train(training)
    # A recompilation raises; the plain models compile once for these lengths too.
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_lengths_equal(compiled, model, kind, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_own_module(training):
    check("nanogpt", "eager", training)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPILED)
def test_backends(name, backend, training):
    check(name, backend, training)


@pytest.mark.long
def test_all_sinkhorn_iterations():
    check("llama", "inductor", True, sinkhorn_iters=20, streams=4)


def test_hidden_states_are_collapsed_in_the_graph():
    model, kind = built("gpt2")
    inputs = {**kind.inputs(), "output_hidden_states": True}
    wanted = model(**inputs)
    got = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert a.shape == b.shape == (2, 8, WIDTH)
        assert (a - b).abs().max() <= 1e-5 * largest(b)


@pytest.mark.long
@pytest.mark.parametrize("name", COMPILED)
def test_hidden_states_and_attentions(name):
    model, kind = built(name)
    model.set_attn_implementation("eager")
    inputs = {**kind.inputs(), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted = model(**inputs)
        got = torch.compile(model, backend="inductor", fullgraph=True)(**inputs)
    assert list(got) == list(wanted)
    for key in [k for k in wanted if "states" in k or "attentions" in k]:
        for a, b in zip(got[key], wanted[key], strict=True):
            assert a.shape == b.shape, key
            assert (a - b).abs().max() <= 1e-4 * largest(b)


class CollectsStates(torch.nn.Module):
    """Returns what lies between the blocks, under the names of the wrapped model's parts."""

    def __init__(self, inner, checkpointing):
        super().__init__()
        self.inner, self.checkpointing = inner, checkpointing

    def forward(self, idx):
        x = self.inner.wte(idx)
        states = []
        for block in self.inner.h:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            states.append(x)
        return x, states


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_stream_is_known_by_its_mark_and_not_by_its_shape(checkpointing):
    """A tensor of a user that looks like three streams keeps its shape."""
    kind = KINDS["nanogpt"]
    model = CollectsStates(kind.build(), checkpointing)
    inputs = kind.inputs()
    mc.transform(model, streams=3, example_inputs=inputs, sinkhorn_iters=2)
    lookalike = torch.randn(2, 8, 3, WIDTH)
    model.register_forward_hook(lambda *args: (*args[2], lookalike), prepend=True)
    wanted, got = model(**inputs), torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    for out in (wanted, got):
        assert out[2].shape == (2, 8, 3, WIDTH)
        assert [state.shape for state in out[1]] == [(2, 8, WIDTH)] * 2
    torch.testing.assert_close(got[1], wanted[1])


def test_compiled_blocks_in_an_eager_model():
    kind = KINDS["nanogpt"]
    model = CollectsStates(kind.build(), checkpointing=False)
    inputs = kind.inputs()
    mc.transform(model, streams=3, example_inputs=inputs, sinkhorn_iters=2)
    wanted = model(**inputs)
    for block in model.inner.h:
        block.compile(backend="eager", fullgraph=True)
    got = model(**inputs)
    assert [state.shape for state in got[1]] == [(2, 8, WIDTH)] * 2
    torch.testing.assert_close(got, wanted)


def test_a_new_kind_of_call_says_what_to_do():
    model, kind = built("nanogpt")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="without torch.compile first"):
            compiled(**kind.inputs())
        model(**kind.inputs())
        assert (compiled(**kind.inputs()) - model(**kind.inputs())).abs().max() <= 0.05


# --- torch.export ---------------------------------------------------------------------------------


def export(name, strict):
    model, kind = built(name)
    inputs = kind.inputs()
    if name in ("t5", "llama", "gpt2", "qwen3_moe"):
        inputs["use_cache"] = False  # torch.export takes no cache as a result, plain or not
        if strict:
            model(**inputs)  # a kind of call that transform has not seen, see docs/using.md
    axis = torch.export.Dim.AUTO
    shapes = {
        key: None if value is False else {0: axis, 1: axis} if value.dim() == 2 else {0: axis}
        for key, value in inputs.items()
    }
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()
    for shape in ((2, 8), (3, 11)):
        call = {**inputs, **kind.inputs(*shape, seed=5)}
        with torch.no_grad():
            wanted, got = logits(model, call), logits(program, call)
        assert (got - wanted).abs().max() <= 1e-5 * largest(wanted)


def test_export():
    export("nanogpt", strict=False)


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", [*COMPILED, "nanogpt"])
def test_export_of_every_kind(name, strict):
    export(name, strict)


def test_a_pickled_model_compiles_after_one_call():
    import pickle

    model, inputs = transformed("nanogpt")
    loaded = pickle.loads(pickle.dumps(model))
    wanted = result(loaded, inputs)
    got = torch.compile(loaded, backend="eager", fullgraph=True)(**inputs)
    assert (got - wanted).abs().max() <= 1e-5 * largest(wanted)
