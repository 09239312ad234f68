"""Training a transformed model with what torch, transformers, PEFT and accelerate bring."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from models import largest, logits, perturb, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint
from zoo import HUGGING_FACE, KINDS, gradients, loss_of, on_two_processes, result, transformed

import mhc_compile as mc
from mhc_compile.api import sites_of

ALL = [*HUGGING_FACE, "nanogpt", "encoder_post"]


def assert_same(got, wanted, tolerance=1e-6):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (got[name] - value).abs().max()
        assert difference <= tolerance * largest(value), (name, float(difference))


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_checkpointing(name, reentrant, dropout):
    model, inputs = transformed(name, dropout=dropout)
    model.train()
    wanted = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    block = model.get_submodule(sites_of(model)[0].module)
    block.mhc["0"].register_forward_hook(lambda *_: calls.append(1))
    assert_same(gradients(model, inputs), wanted)
    assert len(calls) == 2, "nothing was recomputed"


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_by_hand(reentrant):
    model, inputs = transformed("nanogpt", dropout=0.3)
    model.train()
    wanted = gradients(model, inputs)
    for block in model.h:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=reentrant)
    assert_same(gradients(model, inputs), wanted)


@pytest.mark.parametrize("name", ALL)
def test_activation_checkpointing_wrappers(name):
    model, inputs = transformed(name, dropout=0.3)
    if name == "t5":  # recomputed layers would find their own keys in the cache, as in any T5
        inputs["use_cache"] = False
    model.train()
    wanted = gradients(model, inputs)
    blocks = {id(model.get_submodule(site.module)) for site in sites_of(model)}
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
    got = gradients(model, inputs)
    assert any("_checkpoint_wrapped_module" in name for name in got)
    got = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in got.items()}
    assert_same(got, wanted)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_autocast_at_step_0(name):
    kind = KINDS[name]
    plain, inputs = kind.build().train(), kind.inputs(seed=1)
    model = mc.transform(kind.build(), example_inputs=kind.inputs()).train()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = logits(plain, inputs), logits(model, inputs)
        loss = loss_of(model, inputs)
    assert got.dtype == wanted.dtype
    # n copies of a bfloat16 stream sum to the stream up to one rounding, 2^-8.
    assert (got.float() - wanted.float()).abs().max() <= 2**-8 * largest(wanted.float())
    loss.backward()
    for _, parameter in mc.mhc_parameters(model):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def cast(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


# In float16 T5 clamps the stream between its sublayers, so that a T5 cast before has other streams.
CASTS = [(name, dtype) for name in ALL for dtype in (torch.bfloat16, torch.float16)]
CASTS.remove(("t5", torch.float16))


@pytest.mark.parametrize(("name", "dtype"), CASTS)
def test_casts_before_and_after_transform_are_the_same(name, dtype):
    """Connections stay float32; everything else gets the new dtype."""
    kind = KINDS[name]
    after, inputs = transformed(name, moved=False)
    before = kind.build().to(dtype)
    mc.transform(before, streams=3, example_inputs=cast(kind.inputs(), dtype))
    before.load_state_dict(
        {k: p for k, p in after.named_parameters() if ".mhc." in k}, strict=False
    )
    wanted = result(perturb(copy.deepcopy(after)), inputs)
    after.to(dtype)
    own = {k for k, _ in mc.mhc_parameters(after)}
    for key, parameter in after.named_parameters():
        assert parameter.dtype == (torch.float32 if key in own else dtype), key
    inputs = cast(inputs, dtype)
    perturb(before), perturb(after)
    assert torch.equal(result(before, inputs), result(after, inputs))
    # Rounding of a few layers: 2^-8 each in bfloat16, less in float16.
    difference = (result(after, inputs).float() - wanted).abs().max()
    assert difference <= 0.05 * largest(wanted)
    loss_of(after, inputs).backward()
    assert all(p.grad.isfinite().all() for _, p in mc.mhc_parameters(after))


def test_half_and_bfloat16_methods_and_double():
    model, _ = transformed("gpt2")
    for convert, dtype in [("half", torch.float32), ("bfloat16", torch.float32),
                           ("double", torch.float64)]:  # fmt: skip
        getattr(model, convert)()
        assert {p.dtype for _, p in mc.mhc_parameters(model)} == {dtype}


# --- optimizers and the Trainer -------------------------------------------------------------------


def groups(model):
    own = {id(p) for _, p in mc.mhc_parameters(model)}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [
        {"params": rest, "weight_decay": 0.1},
        {"params": [p for _, p in mc.mhc_parameters(model)], "weight_decay": 0.0, "lr": 3e-3},
    ]


@pytest.mark.parametrize("name", ALL)
def test_optimizer_groups(name):
    model, inputs = transformed(name, moved=False)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    together = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in together}) == len(together) == len(list(model.parameters()))
    before = {k: p.detach().clone() for k, p in mc.mhc_parameters(model)}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {k for k, p in mc.mhc_parameters(model) if not torch.equal(p, before[k])}
    # alpha = 0 at the start: phi's first gradient is zero, but not its second.
    assert moved == set(before)


class Texts(torch.utils.data.Dataset):
    def __init__(self, count=16):
        self.ids = tokens(count, 12, seed=4)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model, directory, steps):
    arguments = hf.TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3,
        save_steps=3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=Texts())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_trainer_saves_and_resumes(name, tmp_path):
    model, inputs = transformed(name, moved=False)
    start = copy.deepcopy(model)
    whole = trainer(model, tmp_path, steps=6)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]

    second = trainer(start, tmp_path / "resumed", steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 6
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in start.state_dict().items())

    # What the Trainer wrote is a directory that load_pretrained reads.
    base = type(model).from_pretrained(tmp_path / "checkpoint-6")
    loaded = mc.load_pretrained(base, tmp_path / "checkpoint-6").eval()
    assert torch.equal(result(loaded, inputs), result(model.eval(), inputs))


# --- LoRA -----------------------------------------------------------------------------------------

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "qwen3_moe": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"],
    "t5": ["q", "v", "wo"], "vit": ["q_proj", "v_proj", "fc1"],
}  # fmt: skip


def lora(name, **kwargs):
    return peft.LoraConfig(r=2, target_modules=TARGETS[name], **kwargs)


def step(model, inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model.train(), inputs).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_lora_on_top(name, tmp_path):
    """modules_to_save trains the connections too and keeps them in the adapter's file."""
    model, inputs = transformed(name)
    before = result(model, inputs)
    connections = sorted({key.rsplit(".", 1)[0] for key, _ in mc.mhc_parameters(model)})
    adapted = peft.get_peft_model(model, lora(name, modules_to_save=connections))
    assert torch.equal(result(adapted, inputs), before)  # LoRA's B starts at zero
    step(adapted, inputs)
    trained = result(adapted, inputs)
    assert not torch.allclose(trained, before, atol=1e-3)
    changed = {k for k, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in key for key in changed)
    assert sum("mhc" in key for key in changed) == len(
        list(mc.mhc_parameters(transformed(name)[0]))
    )

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(transformed(name)[0], tmp_path).eval()
    assert torch.equal(result(again, inputs), trained)
    merged = again.merge_and_unload()
    assert mc.is_transformed(merged)
    assert (result(merged, inputs) - trained).abs().max() <= 1e-5 * largest(trained)
    mc.save_pretrained(merged, tmp_path / "merged")
    kind = KINDS[name]
    loaded = mc.load_pretrained(kind.build(), tmp_path / "merged", example_inputs=kind.inputs())
    assert torch.equal(result(loaded.eval(), inputs), result(merged, inputs))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_lora_below(name):
    """LoRA's own sums are no residuals."""
    kind, inputs = KINDS[name], KINDS[name].inputs(seed=1)
    model = peft.get_peft_model(kind.build(), lora(name, init_lora_weights=False)).eval()
    before = result(model, inputs)
    prefix = "base_model.model."
    found = mc.find_residuals(model, kind.inputs())
    assert [s.name for s in found] == [prefix + site for site, _ in kind.sites]
    mc.transform(model, example_inputs=kind.inputs())
    assert (result(model, inputs) - before).abs().max() <= 1e-5 * largest(before)
    perturb(model)
    moved = result(model, inputs)
    loss_of(model.train(), inputs).backward()
    assert all(p.grad is not None for _, p in mc.mhc_parameters(model))
    assert all(p.grad is not None for key, p in model.named_parameters() if "lora_" in key)
    merged = model.eval().merge_and_unload()
    assert (result(merged, inputs) - moved).abs().max() <= 1e-5 * largest(moved)
    assert [s.name for s in sites_of(merged)] == [site for site, _ in kind.sites]


# --- several processes ----------------------------------------------------------------------------


def _ddp(rank, path):
    model, _ = transformed("gpt2")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    batch = {"input_ids": tokens(4, 8, seed=3)[2 * rank : 2 * rank + 2]}
    loss_of(parallel, batch).backward()
    if rank == 0:
        torch.save({k: p.grad for k, p in model.named_parameters()}, path)


@pytest.mark.long
def test_distributed_data_parallel(tmp_path):
    on_two_processes(_ddp, tmp_path / "gradients.pt")
    model, _ = transformed("gpt2")
    # Both halves have the same size, so the mean of their means is that of the whole batch.
    wanted = gradients(model, {"input_ids": tokens(4, 8, seed=3)})
    assert_same(torch.load(tmp_path / "gradients.pt"), wanted)
