"""A model in stages: one after the other they are the model, for any kind of root."""

import copy

import models
import pytest
import torch
from torch import nn

import mhc_compile as mc
from mhc_compile.pipeline import split_stages

CONSTANTS = {name: {"use_cache": False} for name in ("gpt2", "llama", "qwen3_moe", "t5")}


def transformed(name, dropout=0.0, **overrides):
    model = models.ARCHITECTURES[name].build(dropout=dropout)
    inputs = models.ARCHITECTURES[name].inputs()
    mc.transform(model, example_inputs=inputs, streams=4, **overrides)
    return models.perturb(model).train(), {**inputs, **CONSTANTS.get(name, {})}


def run(stages, inputs):
    """The stages one after the other, cut from each other as on ranks."""
    leaves, values, ends = stages.leaves(inputs), (), []
    for module, reads in zip(stages.modules, stages.reads, strict=True):
        values = module(*values, **{name: leaves[name] for name in reads})
        ends.append(values)
        values = tuple(v.detach().requires_grad_(v.requires_grad) for v in values)
        ends.append(values)
    return stages.result(ends[-2]), ends[:-1]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_stages_are_the_model(name, recompute):
    model, inputs = transformed(name)
    stages = split_stages(model, 4 if name == "t5" else 2, inputs, recompute=recompute)
    other = {k: torch.flip(v, [0, 1]) if isinstance(v, torch.Tensor) else v
             for k, v in inputs.items()}  # fmt: skip
    wanted = models.logits(model, other)
    (wanted.float() ** 2).sum().backward()
    goal = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    result, ends = run(stages, other)
    scores = result if isinstance(result, torch.Tensor) else result.logits
    assert type(result) is type(model(**other))
    torch.testing.assert_close(scores, wanted)
    (scores**2).sum().backward()
    while len(ends) > 1:
        received, made = ends[-2], ends[-3]
        pairs = [(m, r.grad) for m, r in zip(made, received, strict=True) if r.grad is not None]
        torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
        ends = ends[:-2]
    for name, parameter in model.named_parameters():
        if name in goal:
            torch.testing.assert_close(parameter.grad, goal[name], rtol=1e-4, atol=1e-5)


def test_what_crosses_borders_are_n_streams():
    model, inputs = transformed("gpt2")
    stages = split_stages(model, mc.plan_pipeline(2, 2, variant="1f1b"), inputs)
    assert [list(map(str, border)) for border in stages.borders] == [
        ["[2, 8, 4, 32] float32"], ["[2, 8, 97] float32"]
    ]  # fmt: skip
    assert stages.blocks == (("transformer.h.0",), ("transformer.h.1",))
    assert stages.reads == (("input_ids",), ())
    assert stages.shared == ({0: "transformer.wte.weight", 1: "lm_head.weight"},)
    assert "expand" not in str(stages[1].code)
    text = str(stages)
    assert "transformer.h.1" in text and "shared: transformer.wte.weight (stage 0)" in text


def test_names_and_parameters_are_the_models():
    model, inputs = transformed("llama")
    whole = model.state_dict(keep_vars=True)
    for module in split_stages(model, 2, inputs):
        for name, value in module.state_dict(keep_vars=True).items():
            assert whole[name] is value


def test_side_values_are_sent_or_computed_again():
    model, inputs = transformed("llama")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    stages = split_stages(model, 2, {**inputs, "attention_mask": mask})
    kinds = sorted(map(str, stages.borders[0]))  # the mask, cosines, sines and the streams
    assert kinds == ["[1, 8, 8] float32"] * 2 + ["[2, 1, 8, 8] bool", "[2, 8, 4, 32] float32"]
    assert [spec.requires_grad for spec in stages.borders[0]] == [False, False, False, True]
    assert stages.reads == (("input_ids", "attention_mask"), ())


def test_the_model_may_compute_its_loss():
    model, inputs = transformed("gpt2")
    stages = split_stages(model, 2, {**inputs, "labels": inputs["input_ids"]})
    assert stages.reads[1] == ("labels",)
    result, _ = run(stages, {**inputs, "labels": inputs["input_ids"]})
    torch.testing.assert_close(result.loss, model(**inputs, labels=inputs["input_ids"]).loss)


class GatedBlock(models.Block):
    def forward(self, x, gate, shift):
        x = x + self.attn(self.ln_1(x) + shift) * gate
        return x + self.mlp(self.ln_2(x))


class Gated(nn.Module):
    """A weight of the root at both ends, and two values that every block reads."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(GatedBlock(32) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        shape = x.shape
        shift = torch.linspace(0, 1, shape[1])[:, None]
        gate = self.scale.tanh()
        for block in self.blocks:
            x = block(x, gate, shift)
        return x * self.scale + torch.zeros(shape)


def test_a_weight_and_values_of_the_root():
    model, x = Gated(3), torch.randn(2, 5, 32)
    mc.transform(model, example_inputs=x, streams=2)
    stages = split_stages(model.train(), 3, x)
    assert [len(border) for border in stages.borders] == [2, 2, 1]  # streams and the gate
    assert "linspace" in stages[2].code and "tanh" not in stages[2].code
    assert stages.shared == ({0: "scale", 2: "scale"},)


class Counting(nn.Module):
    """Returns a number beside the tensor, which a later block takes."""

    def __init__(self, number):
        super().__init__()
        self.layer, self.number = nn.Linear(8, 8), number

    def forward(self, x, power=1):
        return x + self.layer(x) ** power, {"power": power + self.number, "rest": (x.sum(), None)}


class Powers(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counting(k) for k in range(3))

    def forward(self, x):
        power = 1
        for block in self.blocks:
            x, more = block(x, power)
            power = more["power"]
        return x


def test_a_number_that_a_block_returns():
    model, x = Powers(), torch.randn(2, 5, 8)
    mc.transform(model, example_inputs=x, streams=2)
    stages = split_stages(model.train(), 3, x)
    run(stages, x)
    model.blocks[0].number = 2
    with pytest.raises((mc.MHCError, RuntimeError), match="1 on the example inputs"):
        run(stages, x)


def test_even_costs():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
    model = nn.Sequential(nn.Linear(4, 16), *(copy.deepcopy(layer) for _ in range(6)),
                          nn.Linear(16, 9000))  # fmt: skip
    x = torch.randn(2, 5, 4)
    mc.transform(model, example_inputs=x, streams=2)
    sizes = [len(b) for b in split_stages(model, 3, x).blocks]
    assert sizes[2] == 1  # the head counts as many blocks
    assert [len(b) for b in split_stages(model, 3, x, split=[1, 2, 3]).blocks] == [1, 2, 3]
    by_number = split_stages(model, 2, x, costs=[5, 1, 1, 1, 1, 1])
    assert [len(b) for b in by_number.blocks] == [1, 5]
    assert sum(len(b) for b in split_stages(model, 3, x, costs="time").blocks) == 6


def test_dropout_in_training():
    model, inputs = transformed("gpt2", dropout=0.5)
    stages = split_stages(model, 2, inputs)  # compares under the same random numbers
    assert any(isinstance(m, nn.Dropout) and m.training for m in stages[0].modules())


def test_on_the_meta_device():
    with torch.device("meta"):
        model = models.NanoGPT(depth=2)
        ids = torch.zeros(2, 8, dtype=torch.long)
    mc.transform(model, example_inputs=(ids,), streams=4)
    stages = split_stages(model, 2, (ids,))
    assert list(map(str, stages.borders[0])) == ["[2, 8, 4, 32] float32"]


def hooked(model):
    model.transformer.register_forward_hook(lambda *_: None)
    return model


def checkpointed(model):
    model.transformer.gradient_checkpointing = True
    return model


@pytest.mark.parametrize(
    "change, inputs, options, error, words",
    [
        (None, {"use_cache": True}, {}, mc.errors.SplitError, "use_cache=False"),
        (None, {"output_hidden_states": True}, {}, mc.errors.SplitError, "output_hidden_states"),
        (hooked, {}, {}, mc.errors.SplitError, "'transformer' (GPT2Model) around the blocks"),
        (checkpointed, {}, {}, mc.errors.SplitError, "recompute=True"),
        (torch.compile, {}, {}, mc.errors.SplitError, "wrapped by torch.compile"),
        (mc.revert, {}, {}, mc.errors.NotTransformedError, "call mhc_compile.transform"),
        (None, {}, {"plan": 3}, mc.errors.ConfigError, "calls 2 mHC blocks, too few for 3"),
        (None, {}, {"plan": 0}, mc.errors.ConfigError, "at least 1, got 0"),
        (None, {}, {"split": [2, 1]}, mc.errors.ConfigError, "2 in all, got [2, 1]"),
        (None, {}, {"costs": [1.0]}, mc.errors.ConfigError, "each of the 2 blocks"),
        (None, {}, {"costs": "times"}, mc.errors.ConfigError, "did you mean 'time'"),
    ],
    ids=lambda value: None,
)
def test_refusals(change, inputs, options, error, words):
    model, example = transformed("gpt2")
    model = change(model) if change else model
    arguments = {"plan": 2, **options}
    with pytest.raises(error) as caught:
        split_stages(model, example_inputs={**example, **inputs}, **arguments)
    assert words in str(caught.value)


def test_other_inputs_than_the_examples():
    model, inputs = transformed("llama")
    whole = {**inputs, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    stages = split_stages(model, 2, whole)
    padded = torch.ones(2, 8, dtype=torch.long)
    padded[0, :3] = 0
    stages.check(stages.leaves(whole))
    with pytest.raises(mc.errors.SplitError, match="saw True on the example inputs"):
        stages.check(stages.leaves({**whole, "attention_mask": padded}))
    with pytest.raises(mc.errors.SplitError, match="'attention_mask' is missing"):
        stages.leaves(inputs)
    with pytest.raises(mc.errors.SplitError, match="'labels' is not among those of the split"):
        stages.leaves({**whole, "labels": inputs["input_ids"]})


def test_adds_in_the_roots_own_forward():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = mc.transform(Root(), example_inputs=torch.randn(2, 3, 8), streams=2)
    with pytest.raises(mc.errors.SplitError, match="the root's own forward adds"):
        split_stages(model, 2, torch.randn(2, 3, 8))
