"""Checkpoints: bitwise in a new process, atomic, and clear about what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import AlreadyTransformedError, CheckpointError, NotTransformedError
from mhc_compile.runtime import checkpoint

BUILD = """
import torch, transformers
torch.manual_seed({seed})
def build():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=61, n_positions=32,
        bos_token_id=0, eos_token_id=0))
"""


def build(seed: int) -> nn.Module:
    scope: dict = {}
    exec(BUILD.format(seed=seed), scope)
    return scope["build"]().eval()


@pytest.fixture
def trained() -> nn.Module:
    model = mc.transform(build(1), streams=3)
    with torch.no_grad():
        for _, parameter in mc.mhc_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_logits_are_bitwise_equal_in_a_new_process(trained: nn.Module, tmp_path: Path) -> None:
    mc.save_pretrained(trained, tmp_path / "model")
    torch.save(logits(trained), tmp_path / "logits.pt")
    script = BUILD.format(seed=2) + (
        "import mhc_compile as mc\n"
        f"model = mc.load_pretrained(build(), {str(tmp_path / 'model')!r}).eval()\n"
        "with torch.no_grad(): got = model(input_ids=torch.arange(14).reshape(2, 7)).logits\n"
        f"assert torch.equal(got, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
        "assert model.lm_head.weight is model.transformer.wte.weight\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_safetensors_and_json(trained: nn.Module, tmp_path: Path) -> None:
    mc.save_pretrained(trained, tmp_path)
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".json", ".safetensors"]
    manifest = json.loads((tmp_path / "mhc_compile.json").read_text())
    assert mc.MHCConfig.from_dict(manifest["config"]).streams == 3
    assert manifest["aliases"] == {"lm_head.weight": "transformer.wte.weight"}


def test_only_mhc_is_small_and_keeps_the_base_weights(trained: nn.Module, tmp_path: Path) -> None:
    mc.save_pretrained(trained, tmp_path, only_mhc=True)
    tensors, _ = checkpoint.read_checkpoint(tmp_path)
    assert set(tensors) == {name for name, _ in mc.mhc_parameters(trained)}
    loaded = mc.load_pretrained(build(1), tmp_path)
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.equal(logits(mc.load_pretrained(build(2), tmp_path)), logits(trained))


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    mc.save_pretrained(trained, tmp_path)
    old = logits(trained)
    with torch.no_grad():
        trained.lm_head.weight.mul_(2)

    def crash(*args: object, **_: object) -> None:
        if step == "save_file":
            Path(str(args[1])).write_bytes(b"half a file")
            raise KeyboardInterrupt
        if str(args[1]).endswith("json"):
            raise KeyboardInterrupt
        Path(str(args[0])).rename(str(args[1]))

    target = "save_file" if step == "save_file" else "os.replace"
    with monkeypatch.context() as patch:
        patch.setattr(f"mhc_compile.runtime.checkpoint.{target}", crash)
        with pytest.raises(KeyboardInterrupt):
            mc.save_pretrained(trained, tmp_path)
    assert torch.equal(logits(mc.load_pretrained(build(3), tmp_path)), old)
    mc.save_pretrained(trained, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(logits(mc.load_pretrained(build(3), tmp_path)), logits(trained))


def test_a_site_left_out_is_left_out_again(tmp_path: Path) -> None:
    model = mc.transform(build(1), filter_fn=lambda site: not site.name.endswith("0.attn"))
    mc.save_pretrained(model, tmp_path)
    loaded = mc.load_pretrained(build(2), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def damage_truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def damage_manifest(folder: Path) -> None:
    (folder / "mhc_compile.json").write_text("{")


def damage_missing(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def damage_path(folder: Path) -> None:
    path = folder / "mhc_compile.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "weights": "../other.safetensors"}))


def damage_version(folder: Path) -> None:
    path = folder / "mhc_compile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_manifest, damage_missing, damage_path, damage_version]
)
def test_a_damaged_checkpoint_is_refused(trained: nn.Module, tmp_path: Path, damage) -> None:
    mc.save_pretrained(trained, tmp_path)
    damage(tmp_path)
    base = build(2)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=tmp_path.name):
        mc.load_pretrained(base, tmp_path)
    assert not mc.is_transformed(base)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    mc.save_pretrained(trained, tmp_path)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(mc.MHCError, match="site|residual"):
        mc.load_pretrained(layer, tmp_path)
    assert type(layer) is nn.TransformerEncoderLayer
    wider = build(1)
    wider.transformer.wte = nn.Embedding(62, 16)
    wider.lm_head = nn.Linear(16, 62, bias=False)
    with pytest.raises(CheckpointError, match="of another shape: .*wte"):
        mc.load_pretrained(wider, tmp_path)
    assert not mc.is_transformed(wider)


def test_wrong_models(trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(NotTransformedError, match="transform"):
        mc.save_pretrained(build(1), tmp_path)
    mc.save_pretrained(trained, tmp_path)
    with pytest.raises(AlreadyTransformedError, match="revert"):
        mc.load_pretrained(trained, tmp_path)
    with pytest.raises(CheckpointError, match="save_pretrained"):
        mc.load_pretrained(build(1), tmp_path / "nothing")
