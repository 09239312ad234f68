"""`set_recompute`: the backward in eager execution rebuilds streams, and nothing else changes."""

import copy
import gc
import pickle

import pytest
import torch
from models import WIDTH
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import HUGGING_FACE, KINDS, gradients, loss_of, result, transformed

import mhc_compile as mc
from mhc_compile.runtime.eager_recompute import eager_recompute

ALL = [*HUGGING_FACE, "nanogpt", "encoder_post"]


def assert_bitwise(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def blocks(model):
    return [choice.block_sizes for choice in eager_recompute(model).choices]


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def states_alive(streams=3):
    """How many different tensors of n streams there are."""
    gc.collect()
    found = {
        t.untyped_storage().data_ptr()
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.dim() > 2 and t.shape[-2:] == (streams, WIDTH)
        and t._base is None and t.untyped_storage().nbytes()
    }  # fmt: skip
    return len(found)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_bitwise_equal(name, dropout):
    model, inputs = transformed(name, dropout=dropout)
    model.train()
    wanted = gradients(model, inputs)
    for recompute in ("paper", 1, 3, 100, "timeline"):
        mc.set_recompute(model, recompute)
        for _ in range(2):  # the second follows what the first has seen
            assert_bitwise(gradients(model, inputs), wanted)
    mc.set_recompute(model, "off")
    assert eager_recompute(model) is None
    assert_bitwise(gradients(model, inputs), wanted)


def test_plans_follow_the_streams_of_a_model():
    model, inputs = transformed("t5")
    mc.set_recompute(model, 3)
    loss_of(model, inputs).backward()
    assert blocks(model) == [(3, 1), (3, 3)]  # encoder and decoder
    model, inputs = transformed("llama")
    mc.set_recompute(model, (1, 2, 1))
    loss_of(model, inputs).backward()
    assert blocks(model) == [(1, 2, 1)]


class Counts(nn.Module):
    """Counts the runs of its parts, those in a backward included."""

    def __init__(self, model):
        super().__init__()
        self.model, self.runs = model, {}
        for name, module in model.named_modules():
            forward = module.forward

            def run(*args, name=name, forward=forward, **kwargs):
                self.runs[name] = self.runs.get(name, 0) + 1
                return forward(*args, **kwargs)

            if not list(module.children()):
                module.forward = run


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
def test_no_part_but_norms_runs_again(name):
    model, inputs = transformed(name)
    mc.set_recompute(model, 4)
    loss_of(model, inputs).backward()
    counts = Counts(model)
    loss = loss_of(model, inputs)
    forward = dict(counts.runs)
    loss.backward()
    again = {part for part in forward if counts.runs[part] != forward[part]}
    connections = [k for k, m in model.named_modules() if isinstance(m, mc.HyperConnection)]
    assert len(again) == len(connections), again
    assert all("norm" in part or "ln_" in part for part in again), again


@pytest.mark.parametrize("recompute, kept", [("off", 5), (1, 3), (2, 1), (4, 0), ((1, 3), 1)])
def test_states_kept(recompute, kept):
    """Of x_0 to x_4, those that start a block; x_0 is rebuilt from the embedding."""
    model, inputs = transformed("llama")
    mc.set_recompute(model, recompute)
    loss_of(model, inputs).backward()
    model.zero_grad()
    before = states_alive()
    loss = loss_of(model, inputs)
    assert states_alive() - before == kept
    loss.backward()
    assert states_alive() == before


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(name, reentrant):
    model, inputs = transformed(name, dropout=0.3)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    wanted = gradients(model, inputs)
    mc.set_recompute(model, 3)
    for _ in range(2):
        assert_bitwise(gradients(model, inputs), wanted)


def test_the_model_within_a_checkpoint():
    model, inputs = transformed("nanogpt", dropout=0.3)
    model.train()

    def run(call):
        model.zero_grad()
        torch.manual_seed(0)
        call(**inputs).square().mean().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters()}

    wanted = run(model)
    mc.set_recompute(model, 2)
    assert_bitwise(run(lambda **kw: checkpoint(model, **kw, use_reentrant=False)), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "nanogpt"])
def test_autocast(name):
    model, inputs = transformed(name, dropout=0.3)
    model.train()

    def run():
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs)
        loss.backward()  # outside, as one does
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    wanted = run()
    mc.set_recompute(model, 3)
    for _ in range(2):
        assert_bitwise(run(), wanted)


def test_several_forwards_before_a_backward():
    model, _ = transformed("llama")
    calls = [KINDS["llama"].inputs(2, length, seed=length) for length in (5, 8, 5)]

    def run():
        model.zero_grad()
        losses = [loss_of(model, call) for call in calls]
        for loss in (losses[1], losses[2], losses[0]):
            loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters()}

    wanted = run()
    mc.set_recompute(model, "timeline")
    run()
    assert_bitwise(run(), wanted)


def test_a_graph_that_is_kept_runs_backward_twice():
    model, inputs = transformed("llama")
    loss = loss_of(model, inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    mc.set_recompute(model, 4)
    loss = loss_of(model, inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_bitwise({k: p.grad.clone() for k, p in model.named_parameters()}, wanted)


class Written(nn.Module):
    """Written with connections, with an auxiliary result and a state that is changed in place."""

    def __init__(self, layers=5):
        super().__init__()
        config = mc.MHCConfig(streams=3, init="paper")
        self.connections = nn.ModuleList(
            mc.HyperConnection(WIDTH, config, index=i) for i in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x):
        x = mc.expand_streams(x, 3)
        for k, (connection, norm, part) in enumerate(
            zip(self.connections, self.norms, self.parts, strict=True)
        ):
            h, state = connection.pre(x)
            x = connection.post(x, part(norm(h)), state)
            if k == 1:
                seen = x[..., 0, :].square().mean()  # keeps a view of x_2
            if k == 2:
                x = x.mul_(1.5)  # x_3 is another tensor from here on
        return mc.collapse_streams(x, mode="mean").square().mean() + seen


@pytest.mark.parametrize("recompute", [1, 2, 5])
def test_own_modules(recompute):
    model, x = Written(), torch.randn(2, 7, WIDTH)

    def run():
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        model(leaf).backward()
        return {"x": leaf.grad} | {k: p.grad.clone() for k, p in model.named_parameters()}

    wanted = run()
    mc.set_recompute(model, recompute)
    for _ in range(2):
        assert_bitwise(run(), wanted)


class SomeTokens(Written):
    """Sublayers and norms that get views: of some tokens, of the streams in another order."""

    def forward(self, x):
        x = mc.expand_streams(x, 3)
        for k, (connection, norm, part) in enumerate(
            zip(self.connections, self.norms, self.parts, strict=True)
        ):
            some = x[:, k % 2 :]
            h, state = connection.pre(some)
            result = part(norm(h[:, k % 3 :]))
            result = torch.cat([h[:, : k % 3], result], 1)
            x = torch.cat([x[:, : k % 2], connection.post(some, result, state)], 1)
            if k == 3:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return mc.collapse_streams(x, mode="mean").square().mean()


class SwappedAxes(Written):
    """Reads the streams with batch and tokens swapped, which a square shape does not show."""

    def forward(self, x):
        x = mc.expand_streams(x, 3)
        for connection, norm, part in zip(self.connections, self.norms, self.parts, strict=True):
            x = x.transpose(0, 1)
            h, state = connection.pre(x)
            x = connection.post(x, part(norm(h.transpose(0, 1))).transpose(0, 1), state)
        return mc.collapse_streams(x, mode="mean").square().mean()


@pytest.mark.parametrize("recompute", [1, 2, 5])
@pytest.mark.parametrize("kind", [SomeTokens, SwappedAxes])
def test_views_of_streams(kind, recompute):
    model, x = kind(), torch.randn(4, 4, WIDTH)

    def run():
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        model(leaf).backward()
        return {"x": leaf.grad} | {k: p.grad.clone() for k, p in model.named_parameters()}

    wanted = run()
    mc.set_recompute(model, recompute)
    for _ in range(2):
        assert_bitwise(run(), wanted)


def test_a_chain_longer_than_pythons_stack():
    model, x = Written(3), torch.randn(1, 2, WIDTH)
    model.connections = nn.ModuleList([model.connections[0]] * 1200)
    model.norms = nn.ModuleList([model.norms[0]] * 1200)
    model.parts = nn.ModuleList([model.parts[0]] * 1200)
    mc.set_recompute(model, 1200)
    model(x).backward()
    assert blocks(model) == [(3,), (1197,)]  # the change in place begins a stream


def test_what_is_changed_in_place_is_found():
    class Changes(Written):
        def forward(self, x):
            x = mc.expand_streams(x, 3)
            results = []
            for connection, part in zip(self.connections, self.parts, strict=True):
                h, state = connection.pre(x)
                results.append(part(h))
                x = connection.post(x, results[-1], state)
            loss = x.square().mean()
            results[1].data.mul_(1.0)  # autograd does not see this either
            with torch.no_grad():
                results[1].mul_(2.0)
            return loss

    model = mc.set_recompute(Changes(), 5)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        model(torch.randn(2, WIDTH)).backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model, inputs = transformed("nanogpt")
    wanted, before = gradients(model, inputs), hooks(model)
    mc.set_recompute(model, 3)
    twin = copied(model)
    assert_bitwise(gradients(twin, inputs), wanted)
    assert blocks(twin) == [(3, 1)] and eager_recompute(model).choices == []
    mc.set_recompute(twin, "off")
    assert hooks(twin) == before != hooks(model)
    assert_bitwise(gradients(model, inputs), wanted)


def test_a_failed_forward_leaves_nothing_open():
    model, inputs = transformed("nanogpt")
    wanted = gradients(model, inputs)
    mc.set_recompute(model, 3)

    def fail(*_):
        raise RuntimeError("on purpose")

    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for module in (norms[1], model.h[1], model):
        handle = module.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs)
        handle.remove()
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs)
        handle.remove()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert_bitwise(gradients(model, inputs), wanted)


def test_without_gradients_nothing_is_noted():
    model, inputs = transformed("llama")
    wanted = result(model, inputs)
    mc.set_recompute(model)
    assert torch.equal(result(model, inputs), wanted)
    assert eager_recompute(model).choices == []


def test_compiled_calls_are_the_backends():
    model, inputs = transformed("nanogpt")
    wanted = gradients(model, inputs)
    mc.set_recompute(model, 3)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = {k.removeprefix("_orig_mod."): g for k, g in gradients(compiled, inputs).items()}
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max()
    assert eager_recompute(model).choices == []


def test_revert_ends_it():
    model, _ = transformed("nanogpt")
    mc.set_recompute(model, 3)
    mc.revert(model)
    assert eager_recompute(model) is None and not any(hooks(model))


WRONG = {
    "unknown": (dict(recompute="papr"), "did you mean 'paper'"),
    "zero": (dict(recompute=0), "at least 1"),
    "bool": (dict(recompute=True), "at least 1"),
    "none": (dict(recompute=None), "recompute must be one of"),
    "empty": (dict(recompute=()), "recompute must be one of"),
    "budget alone": (dict(recompute="budget"), "belong together"),
    "budget beside": (dict(recompute="paper", memory_budget=9), "belong together"),
    "budget zero": (dict(recompute="budget", memory_budget=0), "at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    kwargs, message = WRONG[case]
    model, _ = transformed("nanogpt")
    before = hooks(model)
    with pytest.raises(mc.MHCError, match=message):
        mc.set_recompute(model, **kwargs)
    assert eager_recompute(model) is None and hooks(model) == before


def test_wrong_for_the_model():
    model, inputs = transformed("nanogpt")
    mc.set_recompute(model, (2, 3))
    with pytest.raises(mc.MHCError, match="stream 0 of .* which has 4 sublayers: .* got 5"):
        loss_of(model, inputs)
    mc.set_recompute(model, "budget", memory_budget=10)
    with pytest.raises(mc.MHCError, match="memory_budget must be at least"):
        loss_of(model, inputs)
    with pytest.raises(mc.MHCError, match="no hyper-connections of several streams"):
        mc.set_recompute(nn.Linear(2, 2))
