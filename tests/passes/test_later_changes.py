"""What users do to a transformed model: attributes, hooks, wrappers, checkpointing, modes."""

import copy
import functools
import warnings

import pytest
import torch
from models import ARCHITECTURES, WIDTH, Attention, Block, NanoGPT, largest, normal, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc_compile as mc
from mhc_compile.errors import TraceError
from mhc_compile.passes.install_blocks import rewrite_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def both(block=Block, n=2, **kwargs):
    original = NanoGPT(block=block).eval()
    return original, mc.transform(copy.deepcopy(original), streams=n, **kwargs)


def variants_of(block):
    return sum(map(len, rewrite_of(block).variants.values()))


# --- attributes -----------------------------------------------------------------------------------


class Settings:
    def __init__(self):
        self.scale, self.name = 1.0, "plain"


class HasAttributes(Block):
    factor = 1.0  # on the class

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.scale, self.mode, self.weights, self.gate = 0.5, "full", [1.0, 2.0], None
        self.settings = Settings()

    def forward(self, x):
        branch = self.attn(self.ln_1(x)) * self.scale * self.settings.scale
        if self.mode == "half":
            branch = branch / 2
        if self.gate is not None:
            branch = branch * self.gate
        x = x + branch * self.factor
        return x + self.mlp(self.ln_2(x)) * self.weights[0] / self.attn.heads


CHANGES = {
    "number": lambda b: setattr(b, "scale", 2.0),
    "string": lambda b: setattr(b, "mode", "half"),
    "list": lambda b: b.weights.__setitem__(0, 3.0),
    "none": lambda b: setattr(b, "gate", 0.25),
    "class": lambda b: setattr(b, "factor", 1.5),
    "settings": lambda b: setattr(b.settings, "scale", 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_attributes_may_change(change):
    original, model = both(HasAttributes)
    idx = tokens()
    before = model(idx)
    count = variants_of(model.h[0])
    CHANGES[change](model.h[0])
    CHANGES[change](original.h[0])
    torch.testing.assert_close(model(idx), original(idx), **TOLERANCE)
    assert (model(idx) - before).abs().max() > 1e-4
    assert (variants_of(model.h[0]), variants_of(model.h[1])) == (count + 1, count)


@torch.no_grad()
def test_an_attribute_that_the_forward_does_not_read_costs_no_trace():
    _, model = both(HasAttributes)
    count = variants_of(model.h[0])
    for number in range(20):
        model.h[0].unrelated = model.h[0].settings.name = str(number)
        model(tokens())
    assert variants_of(model.h[0]) == count


@torch.no_grad()
def test_attributes_of_opened_modules_may_change():
    """BERT's adds stand in BertSelfOutput and BertOutput, which are traced into."""
    architecture = ARCHITECTURES["bert"]
    model = mc.transform(architecture.build(), streams=2)
    layer = model.bert.encoder.layer[0]
    idx = architecture.inputs()
    before = model(**idx).logits

    class Louder(type(layer.output)):
        def forward(self, hidden_states, input_tensor):
            return super().forward(2 * hidden_states, input_tensor)

    replaced = Louder(model.config)
    replaced.load_state_dict(layer.output.state_dict())
    layer.output = replaced.eval()
    wanted = copy.deepcopy(mc.revert(copy.deepcopy(model)))
    assert (model(**idx).logits - before).abs().max() > 1e-4
    torch.testing.assert_close(model(**idx).logits, wanted(**idx).logits, **TOLERANCE)


class DropsSome(Block):
    drop_prob = 0.0

    def forward(self, x):
        x = x + nn.functional.dropout(self.attn(self.ln_1(x)), self.drop_prob, self.training)
        return x + self.mlp(self.ln_2(x))


@torch.no_grad()
def test_a_dropout_rate_may_change():
    _, model = both(DropsSome)
    model.train()
    assert torch.equal(model(tokens()), model(tokens()))
    model.h[0].drop_prob = 0.5
    assert not torch.equal(model(tokens()), model(tokens()))


# --- hooks ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_on_blocks_see_n_streams_between_blocks():
    _, model = both(n=3)
    seen = {}
    for number, block in enumerate(model.h):
        block.register_forward_pre_hook(
            lambda _, args, k=number: seen.setdefault(f"in {k}", args[0].shape) and None
        )
        block.register_forward_hook(
            lambda _, args, out, k=number: seen.setdefault(f"out {k}", out.shape) and None
        )
    model(tokens(2, 8))
    # The first block expands the stream and the last one collapses it.
    assert seen == {
        "in 0": (2, 8, WIDTH), "out 0": (2, 8, 3, WIDTH),
        "in 1": (2, 8, 3, WIDTH), "out 1": (2, 8, WIDTH),
    }  # fmt: skip


def test_a_backward_hook_on_a_block_fires():
    _, model = both()
    seen = []
    model.h[0].register_full_backward_hook(lambda *_: seen.append("block"))
    model.h[0].mlp.register_full_backward_hook(lambda *_: seen.append("leaf"))
    model(tokens()).sum().backward()
    assert seen == ["leaf", "block"]


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_forward_hooks_on_opened_modules_fire(when):
    architecture = ARCHITECTURES["bert"]
    model = architecture.build()
    seen = []

    def register(model):
        output = model.bert.encoder.layer[0].output
        output.register_forward_pre_hook(lambda _, args: seen.append([a.shape for a in args]))
        output.register_forward_hook(lambda _, args, out: seen.append(out.shape))

    if when == "before":
        register(model)
    mc.transform(model, streams=2)
    if when == "after":
        register(model)
    seen.clear()
    model(**architecture.inputs(2, 8))
    # hidden_states and input_tensor; the latter is the stream, of which hooks see the mean.
    assert seen == [[(2, 8, 64), (2, 8, WIDTH)], (2, 8, WIDTH)]
    seen.clear()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model(**architecture.inputs(2, 8))
    assert seen == []


@torch.no_grad()
def test_hooks_on_opened_modules_that_change_something_are_refused():
    architecture = ARCHITECTURES["bert"]
    model = mc.transform(architecture.build(), streams=2)
    output = model.bert.encoder.layer[0].output
    handle = output.register_forward_hook(lambda _, args, out: 2 * out)
    with pytest.raises(TraceError, match="hook of a BertOutput returns a value"):
        model(**architecture.inputs())
    handle.remove()
    handle = output.register_full_backward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="'output' .*backward hook"):
        model(**architecture.inputs())
    handle.remove()
    assert model(**architecture.inputs()).logits.isfinite().all()


@torch.no_grad()
def test_hooks_that_change_something_before_transform_are_listed_and_refused():
    architecture = ARCHITECTURES["bert"]
    model = architecture.build()
    hooks = dict(model.bert.encoder.layer[0].output._forward_hooks)
    handle = model.bert.encoder.layer[0].output.register_forward_hook(lambda _, args, out: 2 * out)
    refused = [site for site in mc.find_residuals(model) if not site.accepted]
    assert {site.module for site in refused} == {"bert.encoder.layer.0"}
    assert "test_later_changes.py:" in refused[0].reason
    with pytest.raises(mc.MHCError, match=r"returns a value \(.*test_later_changes.py:\d+\)"):
        mc.transform(model)
    before = model(**architecture.inputs()).logits
    mc.transform(model, strict=False, streams=2)
    assert (model(**architecture.inputs()).logits - before).abs().max() <= 1e-5
    handle.remove()
    assert dict(model.bert.encoder.layer[0].output._forward_hooks) == hooks


# --- checkpointing inside a block -----------------------------------------------------------------


class CheckpointsChildren(Block):
    reentrant = False

    def forward(self, x):
        if self.training:
            x = x + checkpoint(self.attn, self.ln_1(x), use_reentrant=self.reentrant)
            return x + checkpoint(self._feed, x, use_reentrant=self.reentrant)
        x = x + self.attn(self.ln_1(x))
        return x + self._feed(x)

    def _feed(self, x):
        return self.mlp(self.ln_2(x))


class CheckpointsReentrant(CheckpointsChildren):
    reentrant = True


class CheckpointsTheAdd(Block):
    def forward(self, x):
        x = checkpoint(self._attend, x, use_reentrant=False)
        return x + self.mlp(self.ln_2(x))

    def _attend(self, x):
        return x + self.attn(self.ln_1(x))


class CheckpointsAClosure(Block):
    def forward(self, x):
        x = x + checkpoint(lambda y: self.attn(self.ln_1(y)), x, use_reentrant=False)
        return x + self.mlp(self.ln_2(x))


def gradients(model, idx):
    model.zero_grad()
    model(idx).square().mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", [CheckpointsChildren, CheckpointsReentrant])
def test_checkpointed_submodules_and_methods_stay_checkpointed(block):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        original, model = both(block)
    calls = []
    for module in (model.h[0].attn, model.h[0].mlp):
        module.register_forward_pre_hook(lambda m, *_: calls.append(type(m).__name__))
    wanted = gradients(original.train(), tokens())
    got = gradients(model.train(), tokens())
    assert sorted(calls) == ["Attention", "Attention", "MLP", "MLP"]  # forward and recomputation
    for key, value in wanted.items():
        assert (got[key] - value).abs().max() <= 1e-5 * largest(value), key


@pytest.mark.parametrize("block", [CheckpointsTheAdd, CheckpointsAClosure])
def test_other_checkpointed_code_is_reported(block):
    with pytest.warns(UserWarning, match=r"h\.0.*test_later_changes.py:\d+ .*without checkpoint"):
        original, model = both(block)
    wanted, got = gradients(original.train(), tokens()), gradients(model.train(), tokens())
    for key, value in wanted.items():
        assert (got[key] - value).abs().max() <= 1e-5 * largest(value), key


# --- grad mode, autocast, scripted functions, autograd functions --------------------------------


class StopsGradients(Block):
    def forward(self, x):
        with torch.no_grad():
            scale = self.ln_1(x).abs().mean(-1, keepdim=True)
        x = x + self.attn(self.ln_1(x)) * scale
        return x + self.mlp(self.ln_2(x)) * self._gate(x)

    @torch.no_grad()
    def _gate(self, x):
        return torch.sigmoid(x)


def test_no_grad_is_kept():
    original, model = both(StopsGradients)
    wanted, got = gradients(original, tokens()), gradients(model, tokens())
    for key, value in wanted.items():
        assert (got[key] - value).abs().max() <= 1e-5 * largest(value), key
    assert torch.is_grad_enabled()


class OwnAutocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            branch = x @ self.attn.out.weight
        with torch.autocast("cpu", enabled=False):
            branch = branch.float() @ self.attn.out.weight
        x = x + branch
        return x + self.mlp(self.ln_2(x))


@pytest.mark.parametrize("outer", [False, True])
@torch.no_grad()
def test_autocast_inside_a_block_is_kept(outer):
    original, model = both(OwnAutocast)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        got, wanted = model(tokens()), original(tokens())
    assert (got - wanted).abs().max() <= (2e-2 if outer else 1e-5) * largest(wanted)
    assert not torch.is_autocast_enabled("cpu")


class Fails(nn.Module):
    on = False

    def forward(self, x):
        if self.on:
            raise ValueError("from a user's module")
        return x


class FailsInMode(Block):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.fails = Fails()

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            scale = self.fails(x).abs().mean()
        x = x + self.attn(self.ln_1(x)) * scale
        return x + self.mlp(self.ln_2(x))


def test_modes_are_left_when_a_submodule_fails():
    _, model = both(FailsInMode)
    model.h[1].fails.on = True
    with pytest.raises(ValueError, match="from a user's module"):
        model(tokens())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@torch.jit.script
def bias_dropout_add(x, bias, residual, prob: float, training: bool):
    return residual + torch.nn.functional.dropout(x + bias, p=prob, training=training)


class Megatron(Block):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        x = bias_dropout_add(self.attn(self.ln_1(x)), self.bias, x, 0.0, self.training)
        return bias_dropout_add(self.mlp(self.ln_2(x)), self.bias, x, 0.0, self.training)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual):
        total = x + residual
        ctx.save_for_backward(total)
        return total, total / total.norm(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx, grad, grad_normed):
        (total,) = ctx.saved_tensors
        with torch.enable_grad():
            total = total.detach().requires_grad_()
            normed = total / total.norm(dim=-1, keepdim=True)
            (inner,) = torch.autograd.grad(normed, total, grad_normed)
        return grad + inner, grad + inner


class Fused(Block):
    def forward(self, x):
        x, normed = AddNorm.apply(self.attn(self.ln_1(x)), x)
        return x + self.mlp(normed)


@pytest.mark.parametrize("block", [Megatron, Fused])
def test_adds_inside_scripted_and_autograd_functions(block):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original, model = both(block)
    assert any("AddNorm" in str(w.message) for w in caught) == (block is Fused)
    assert len(mc.find_residuals(original)) == 4
    wanted, got = gradients(original, tokens()), gradients(model, tokens())
    for key, value in wanted.items():
        assert (got[key] - value).abs().max() <= 1e-4 * largest(value), key


# --- wrappers -------------------------------------------------------------------------------------


def compiled_parts(model):
    for block in model.h:
        block.mlp = torch.compile(block.mlp, backend="eager")


def compiled_blocks(model):
    for number, block in enumerate(model.h):
        model.h[number] = torch.compile(block, backend="eager")


def checkpoint_wrapper(model, part=None):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    for number, block in enumerate(model.h):
        if part:
            setattr(block, part, wrappers.checkpoint_wrapper(getattr(block, part)))
        else:
            model.h[number] = wrappers.checkpoint_wrapper(block)


def weight_norm(model):
    for block in model.h:
        nn.utils.parametrizations.weight_norm(block.mlp[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(block.mlp[2])
        nn.utils.parametrizations.spectral_norm(block.attn.out)


def gathers_weights(model):
    """As sharding does: parameters exist between the pre-hook and the hook only."""

    def gather(module, args):
        module.weight.data = module.full

    def free(module, args, out):
        module.weight.data = torch.empty(0)

    for block in model.h:
        linear = block.mlp[0]
        linear.full = linear.weight.data
        linear.weight.data = torch.empty(0)
        linear.register_forward_pre_hook(gather)
        linear.register_forward_hook(free)


def own_forward(model):
    """As accelerate does: the forward on the instance."""
    for block in model.h:
        old = block.mlp.forward
        block.mlp.forward = functools.partial(lambda old, x: old(x) * 1.0, old)


WRAPPERS = {
    "compiled parts": compiled_parts,
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpoint_wrapper,
    "checkpointed parts": functools.partial(checkpoint_wrapper, part="mlp"),
    "weight_norm": weight_norm,
    "gathered weights": gathers_weights,
    "forward on the instance": own_forward,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_wrapped_parts_and_blocks(wrapper):
    original = NanoGPT().eval()
    WRAPPERS[wrapper](original)
    before = original(tokens(seed=3))
    model = mc.transform(original, streams=2, example_inputs=tokens())
    assert len([n for n, _ in mc.mhc_parameters(model) if n.endswith("phi")]) == 4
    torch.testing.assert_close(model(tokens(seed=3)), before, **TOLERANCE)
    if wrapper == "gathered weights":  # whose stand-in frees what the backward would need
        return
    model.train()
    with torch.enable_grad():
        model(tokens()).sum().backward()
    assert all(p.grad is not None for _, p in mc.mhc_parameters(model))


def test_data_parallel_wrappers():
    model = NanoGPT().eval()
    wrapped = nn.DataParallel(model)
    with torch.no_grad():
        before = wrapped(tokens())
        mc.transform(wrapped, streams=2, example_inputs=tokens())
        torch.testing.assert_close(wrapped(tokens()), before, **TOLERANCE)


@torch.no_grad()
def test_quantised_linears():
    original = NanoGPT().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(original, {nn.Linear})
    idx = tokens()
    before = quantised(idx)
    mc.transform(quantised, streams=2, example_inputs=idx)
    # Activations are rounded to 8 bits, so that a difference of 1e-7 may move one to the next.
    assert (quantised(idx) - before).abs().max() <= 0.02 * largest(before)


def test_a_block_with_a_forward_of_its_own_is_refused():
    """It would hide the generated forward, which is on the class."""
    model = NanoGPT()
    block = model.h[1]
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(mc.MHCError, match=r"h\.1.*forward.*instance"):
        mc.transform(model, streams=2)
    assert not mc.is_transformed(model)


def test_attention_module_names_are_used():
    assert Attention().heads == 4
    assert normal(1, 2, 3).shape == (1, 2, 3)
