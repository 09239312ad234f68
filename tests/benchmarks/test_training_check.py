"""The check of training runs: what it calls equal, and that it runs at all, tiny on a CPU."""

import json

import pytest
import torch
import training_check
from training_check import compare, first_difference


def test_noise_of_seeds():
    torch.manual_seed(0)
    curves = torch.linspace(5, 2, 50) + 0.1 * torch.randn(4, 50)
    again = curves + 0.001 * torch.randn(4, 50)
    assert compare(curves, again, 10, 1e-3)["ok"]
    assert not compare(curves, curves + 0.3, 10, 1e-3)["ok"]
    late = curves + torch.where(torch.arange(50) >= 40, 0.3, 0.0)
    middle = curves + torch.where((torch.arange(50) >= 20) & (torch.arange(50) < 30), 0.3, 0.0)
    assert not compare(late, curves, 10, 1e-3)["ok"]
    assert not compare(middle, curves, 10, 1e-3)["ok"]
    assert not compare(curves * torch.nan, curves, 10, 1e-3)["ok"]


def test_small_differences_always_pass():
    curves = torch.ones(3, 20)  # seeds without any spread
    result = compare(curves, curves + 1e-4, 10, 1e-3)
    assert result["ok"] and result["same seed"] == pytest.approx(1e-4, rel=1e-2)


def test_tiny(tmp_path, capsys):
    path = tmp_path / "check.json"
    try:
        training_check.main(
            ["--device", "cpu", "--lower", "eager", "--channels", "32", "--blocks", "1",
             "--steps", "4", "--window", "2", "--length", "16", "--batch", "2", "--seeds", "2",
             "--json", str(path)]
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
        torch.compiler.reset()
    found = json.loads(path.read_text())
    assert found["compared"]["same seed"] == 0 and found["differs"] == ""
    assert "equal in every bit" in capsys.readouterr().out


def test_a_difference_is_found(monkeypatch):
    model = torch.nn.Linear(2, 1)
    runs = iter([torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])])
    monkeypatch.setattr(training_check, "train", lambda *_: next(runs))
    assert first_difference(model, None, None) == ""
    assert first_difference(model, None, None) == "the loss of step 1"
