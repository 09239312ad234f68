"""The stability report against matrices whose gains are known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import NotTransformedError


def encoder(layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def set_res(model: nn.Module, res: list[list[float]]) -> None:
    """Makes every H_res of an HC model a constant matrix."""
    with torch.no_grad():
        for name, parameter in mc.mhc_parameters(model):
            if name.endswith("alpha"):
                parameter.zero_()
            if name.endswith("bias"):
                parameter[4:] = torch.tensor(res).flatten()


def test_known_gains_of_a_product() -> None:
    model = mc.transform(encoder(), streams=2, connection="hc")
    set_res(model, [[1.0, 1.0], [0.0, 1.0]])
    report = mc.stability(model, torch.randn(2, 5, 16))
    assert [round(s.forward_gain, 6) for s in report.sites] == [2.0] * 4
    assert [round(s.composite_forward_gain, 6) for s in report.sites] == [2.0, 3.0, 4.0, 5.0]
    assert [round(s.composite_backward_gain, 6) for s in report.sites] == [2.0, 3.0, 4.0, 5.0]
    assert report.sites[0].error == pytest.approx(1.0)
    assert report.sites[0].divergence == 0.0 and report.sites[1].divergence > 0.01
    assert report.forward_gain == pytest.approx(5.0)


def test_row_and_column_sums_are_not_confused() -> None:
    model = mc.transform(encoder(1), streams=2, connection="hc")
    set_res(model, [[3.0, -1.0], [0.0, 0.5]])
    site = mc.stability(model, torch.randn(1, 3, 16)).sites[0]
    assert (site.forward_gain, site.backward_gain) == (4.0, 3.0)


def test_mhc_stays_doubly_stochastic() -> None:
    model = mc.transform(encoder())
    with torch.no_grad():
        for _, parameter in mc.mhc_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    report = mc.stability(model, torch.randn(2, 5, 16))
    assert all(abs(s.forward_gain - 1) < 1e-4 for s in report.sites)
    assert report.forward_gain == pytest.approx(1.0, abs=1e-4)


def test_streams_are_separate_and_output_forms_agree() -> None:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    mc.transform(model, example_inputs=(torch.randn(2, 4, 16), torch.randn(2, 3, 16)))
    model.train()
    report = mc.stability(model, torch.randn(2, 4, 16), torch.randn(2, 3, 16))
    assert [s.stream for s in report.sites] == [0, 0, 1, 1, 1]
    assert model.training
    assert json.loads(report.to_json())["sites"][0]["name"] == report.sites[0].name
    assert report.sites[-1].name in str(report)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(NotTransformedError, match="transform"):
        mc.stability(encoder(), torch.randn(1, 3, 16))
