"""Copies of a transformed model: deepcopy, pickle, other processes, Hugging Face directories."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil

import pytest
import torch
from models import assert_unchanged, llama, perturb, snapshot, tokens
from safetensors.torch import load_file, save_file
from zoo import HUGGING_FACE, KINDS, result, transformed

import mhc_compile as mc
from mhc_compile.errors import CheckpointError
from mhc_compile.passes.install_blocks import rewritten_blocks

ALL = [*HUGGING_FACE, "nanogpt", "encoder_post"]


def variants(model):
    return [
        sum(map(len, rewrite.variants.values())) for _, rewrite in rewritten_blocks(model).values()
    ]


@pytest.mark.parametrize("name", ALL)
def test_deepcopy_is_independent(name):
    model, inputs = transformed(name)
    expected = result(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(result(twin, inputs), expected)
    assert all(p is not q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(result(twin, inputs), expected)
    # A kind of call that is new to the copy stays unknown to the original.
    before = variants(model)
    with torch.autocast("cpu", torch.bfloat16):
        result(twin, inputs)
    assert variants(model) == before
    assert all(now > then for now, then in zip(variants(twin), before, strict=True))
    assert torch.equal(result(model, inputs), expected)
    mc.revert(twin)
    assert mc.is_transformed(model)
    assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("name", ALL)
def test_pickle(name):
    model, inputs = transformed(name)
    expected = result(model, inputs)
    loaded = pickle.loads(pickle.dumps(model))
    assert mc.is_transformed(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(result(loaded, inputs), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(result(loaded, inputs), expected)
    loaded.train()(**inputs)  # every kind of call is there again
    mc.revert(loaded)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in KINDS[name].build().modules()}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(protocol):
    model, inputs = transformed("nanogpt")
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(result(loaded, inputs), result(model, inputs))


def test_pickled_blocks_hold_no_generated_code():
    model, _ = transformed("gpt2")
    assert sum(variants(model)) >= 4  # two blocks, both modes
    assert sum(variants(pickle.loads(pickle.dumps(model)))) == 0


def _in_another_process(model, ids, pipe):
    torch.set_num_threads(1)
    pipe.send(result(model, {"input_ids": ids}).tolist())


@pytest.mark.long
def test_a_spawned_process_gets_the_model():
    model, inputs = transformed("gpt2")
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_in_another_process, args=(model, inputs["input_ids"], there))
    process.start()
    assert here.poll(120), "no answer"
    assert torch.equal(torch.tensor(here.recv()), result(model, inputs))
    process.join(60)
    assert process.exitcode == 0


# --- the model's own save_pretrained and from_pretrained ------------------------------------------


def files_of(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_directory(name, shard, tmp_path):
    model, inputs = transformed(name)
    expected = result(model, inputs)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert ("model.safetensors.index.json" in files_of(tmp_path)) == bool(shard)
    base = type(model).from_pretrained(tmp_path)
    assert not mc.is_transformed(base)
    loaded = mc.load_pretrained(base, tmp_path, example_inputs=inputs).eval()
    assert loaded is base
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(result(loaded, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
def test_hugging_face_directory_in_bfloat16(name, tmp_path):
    # Not model.to(bfloat16), which casts the rotary frequencies too; from_pretrained does not.
    kind, inputs = KINDS[name], KINDS[name].inputs(seed=1)
    kind.build().save_pretrained(tmp_path / "plain")
    cls = type(kind.build())
    model = cls.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).eval()
    perturb(mc.transform(model, streams=3)).save_pretrained(tmp_path / "mhc")
    tmp_path = tmp_path / "mhc"
    base = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = mc.load_pretrained(base, tmp_path).eval()
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    assert {p.dtype for _, p in mc.mhc_parameters(loaded)} == {torch.float32}


def test_the_note_in_the_config_comes_and_goes():
    kind = KINDS["llama"]
    model = kind.build()
    before = model.config.to_dict()
    mc.transform(model, streams=3)
    note = json.loads(model.config.to_json_string())["mhc_compile"]
    assert mc.MHCConfig.from_dict(note["config"]).streams == 3
    assert note["sites"] == [name for name, _ in kind.sites]
    assert mc.revert(model).config.to_dict() == before


def test_an_error_leaves_no_note(monkeypatch):
    model = KINDS["llama"].build()
    before = model.config.to_dict()

    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr("mhc_compile.api._check_step0", fail)
    with pytest.raises(RuntimeError, match="late"):
        mc.transform(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama(tie_word_embeddings=tied).eval()
    mc.transform(model, streams=2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    loaded = mc.load_pretrained(type(model).from_pretrained(tmp_path), tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(
        result(loaded, {"input_ids": tokens()}), result(model, {"input_ids": tokens()})
    )


def test_from_pretrained_alone_says_what_it_drops(tmp_path, caplog):
    """It builds the plain class; its load report lists the connections' keys."""
    import transformers

    model, inputs = transformed("llama")
    model.save_pretrained(tmp_path)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        plain = type(model).from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "UNEXPECTED" in caplog.text
    assert "mhc" in caplog.text
    assert not mc.is_transformed(plain)
    assert plain.config.mhc_compile["sites"]  # tells a program that the directory needs more
    assert not torch.allclose(result(plain, inputs), result(model, inputs), atol=1e-3)


def test_a_base_model_with_other_weights_is_refused(tmp_path):
    model, _ = transformed("llama")
    model.save_pretrained(tmp_path)
    other = KINDS["llama"].build(seed=9)
    before = snapshot(other)
    with pytest.raises(CheckpointError, match="from_pretrained"):
        mc.load_pretrained(other, tmp_path)
    assert_unchanged(before, other)


def damaged(directory, how):
    weights = directory / "model.safetensors"
    if how == "missing":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        name = "model.layers.1.mhc.0.phi"
        if how == "a key missing":
            del tensors[name]
        elif how == "a key too many":
            tensors[name.replace("phi", "psi")] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][1:].clone()
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "word"),
    [("missing", "model.safetensors"), ("truncated", "can be read"),
     ("a key missing", "missing: model.layers.1.mhc.0.phi"),
     ("a key too many", "unknown: model.layers.1.mhc.0.psi"),
     ("of another shape", "of another shape: model.layers.1.mhc.0.phi")],
)  # fmt: skip
def test_a_damaged_directory(how, word, tmp_path):
    model, _ = transformed("llama")
    model.save_pretrained(tmp_path / "good")
    base = type(model).from_pretrained(tmp_path / "good")
    note = base.config.mhc_compile
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damaged(tmp_path / "bad", how)
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=word):
        mc.load_pretrained(base, tmp_path / "bad")
    assert_unchanged(before, base)
    assert base.config.mhc_compile == note


def test_a_directory_of_a_plain_model(tmp_path):
    KINDS["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no mhc_compile.json"):
        mc.load_pretrained(KINDS["llama"].build(), tmp_path)


def test_a_reverted_model_saves_as_a_plain_one(tmp_path):
    model, inputs = transformed("gpt2")
    mc.revert(model).save_pretrained(tmp_path)
    assert "mhc_compile" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(
        result(type(model).from_pretrained(tmp_path).eval(), inputs), result(model, inputs)
    )


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name, tmp_path):
    model, inputs = transformed(name)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other, _ = transformed(name, seed=7)
    other.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    assert torch.equal(result(other, inputs), result(model, inputs))
