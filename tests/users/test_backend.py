"""backend="mhc" on transformed models: one graph, equal to eager execution, in every use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from models import largest, logits, perturb
from zoo import KINDS, assert_lengths_equal, gradients, loss_of, result, transformed

import mhc_compile as mc
from mhc_compile.backend import mhc
from mhc_compile.backend.records import last_record

SEAMS = {"gpt2": 3, "llama": 3, "qwen3_moe": 3, "bert": 0, "t5": 8, "vit": 3}
"""Sublayers but one a stream: BERT norms its streams between them; T5 has 4 and 6."""
LOWER = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


def compiled(model, lower="eager", **options):
    keys = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    keys = {"fullgraph": True, **keys}
    return torch.compile(model, backend=mhc, options={"lower": lower, **options}, **keys)


@torch._dynamo.config.patch(error_on_recompile=True)
def check(name, lower, training, streams=4):
    """One graph a mode serves several lengths; values and gradients are the eager ones."""
    model, _ = transformed(name, streams=streams)
    model.train(training)
    call = compiled(model, lower, dynamic=True)
    assert_lengths_equal(call, model, KINDS[name], training)
    assert last_record().count("seam") == SEAMS[name]


@pytest.mark.parametrize("name", SEAMS)
def test_seams(name):
    check(name, "eager", training=name in ("gpt2", "t5"))


@pytest.mark.long
@pytest.mark.parametrize("name", SEAMS)
def test_aot(name):
    check(name, "aot_eager", True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "t5" else pytest.mark.long)
                                  for n in SEAMS])  # fmt: skip
def test_in_pieces(name):
    """Cut where the overlap plan changes servers, gradients have the same bits."""
    model, inputs = transformed(name)
    model.train()
    options = {"lower": "aot_eager", "recompute": "off"}
    whole = gradients(compiled(model, **options), inputs)
    torch.compiler.reset()
    apart = gradients(compiled(model, overlap=True, **options), inputs)
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[name], apart[name]) for name in whole)
    assert any(piece.server == "hp" for piece in last_record().pieces["forward"])


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SEAMS)
def test_inductor(name, training):
    check(name, "inductor", training)


def test_inductor_with_a_dynamic_length():
    check("llama", "inductor", True)


@pytest.mark.long
@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_a_second_length_recompiles_once(lower):
    model, inputs = transformed("llama")
    call, kind = compiled(model, lower), KINDS["llama"]
    torch._dynamo.utils.counters.clear()
    for length in (8, 11, 13, 17):
        inputs = kind.inputs(2, length)
        a, b = result(call, inputs), result(model, inputs)
        assert (a - b).abs().max() <= 1e-5 * largest(b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("lower", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_autocast(lower):
    model, inputs = transformed("llama")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(model, inputs)
        got = gradients(compiled(model, lower), inputs)
    assert last_record().count("seam") == 3
    for key, b in wanted.items():
        a = got["_orig_mod." + key]
        assert a.dtype == b.dtype and (a - b).norm() <= 0.1 * b.norm() + 1e-6


@pytest.mark.parametrize("lower", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_bfloat16(lower):
    model, inputs = transformed("llama")
    model.to(torch.bfloat16)
    b = result(model, inputs)
    a = result(compiled(model, lower), inputs)
    assert a.dtype == torch.bfloat16
    assert (a - b).float().norm() <= 0.03 * b.float().norm()


def test_dropout_draws_the_same_masks():
    model, inputs = transformed("gpt2", dropout=0.2)
    model.train()
    torch.manual_seed(3)
    wanted = loss_of(model, inputs)
    torch.manual_seed(3)
    got = loss_of(compiled(model, "aot_eager"), inputs)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_decoding_with_a_cache(lower):
    """Token by token through a compiled model equals one eager call on the whole."""
    from transformers import DynamicCache

    model, inputs = transformed("llama")
    model.eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = logits(model, {"input_ids": ids})
        model(input_ids=ids[:, :2], past_key_values=DynamicCache(config=model.config))
        call = compiled(model, lower, fullgraph=False, dynamic=True)
        cache = DynamicCache(config=model.config)
        for k in range(ids.shape[1]):
            out = call(input_ids=ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits
            assert (out[:, 0] - whole[:, k]).abs().max() <= 1e-5 * largest(whole)


@pytest.mark.parametrize("lower", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_runs_repeat_bit_by_bit(lower):
    model, inputs = transformed("gpt2")
    call = compiled(model, lower)
    first, second = gradients(call, inputs), gradients(call, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_options_change_what_runs():
    """In one process, on one model, with whatever Inductor keeps in its caches."""
    from torch._inductor.utils import run_and_get_code

    model, inputs = transformed("nanogpt")
    wanted = result(model, inputs)
    merges = []
    for options in ({}, {"fuse": False}, {}, {"inductor": {"post_grad_custom_pre_pass": None}}):
        torch.compiler.reset()
        call = torch.compile(model, backend=mhc, fullgraph=True, options=options)
        with torch.no_grad():
            out, code = run_and_get_code(lambda c=call: logits(c, inputs))
        assert (out - wanted).abs().max() <= 1e-5 * largest(wanted)
        merges.append((last_record().count("seam"), "mhc.read" in "".join(code)))
    assert merges == [(3, False), (0, False), (3, False), (3, False)]
    with torch.no_grad():
        stock = torch.compile(model, backend="inductor", fullgraph=True)
        torch.compiler.reset()
        _, code = run_and_get_code(lambda: logits(stock, inputs))
    assert "mhc.read" in "".join(code)


def test_report():
    model, inputs = transformed("gpt2")
    assert mc.report(model).kernels == ()
    call = compiled(model, "eager")
    result(call, inputs)
    report = mc.report(call, inputs)
    text = str(report)
    for part in ("transformer.h.1.mhc.0", "merge and collapse", "layer norm", "not measured",
                 "the operators read stored streams", "composite forward"):  # fmt: skip
        assert part in text
    assert len(report.sites) == 4 and report.graphs[-1].count("seam") == 3
    assert sum(use.fused for use in report.kernels) == 7
    other, _ = transformed("gpt2", seed=1)
    assert mc.report(other).kernels == ()


def test_report_files(tmp_path):
    import json

    model, _ = transformed("nanogpt")
    report = mc.report(model)
    assert json.loads(report.to_json())["memory"] is None
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>") == 8 and "not measured" in page
    with pytest.raises(mc.MHCError, match="no hyper-connections to report on"):
        mc.report(torch.nn.Linear(2, 2))


def test_found_without_an_import():
    """In a process of its own: by name, after a reload, and with a second registration refused."""
    code = """
        import torch, importlib
        assert "mhc" in torch._dynamo.list_backends()
        model = torch.nn.Linear(4, 4)
        x = torch.randn(2, 4)
        out = torch.compile(model, backend="mhc", options={"lower": "eager"})(x)
        assert torch.equal(out, model(x))
        import mhc_compile.backend.compile_graph as where
        importlib.reload(where)
        torch.compiler.reset()
        out = torch.compile(model, backend="mhc", options={"lower": "aot_eager"})(x)
        assert torch.equal(out, model(x))
        print("found")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "found\n", done.stderr


def test_logs():
    """TORCH_LOGS="+mhc_compile" prints graphs and times."""
    code = """
        import torch, mhc_compile as mc
        from mhc_compile.backend import mhc
        model = torch.nn.Sequential(mc.HyperConnection(8, mc.MHCConfig(streams=2)))
        torch.compile(model, backend=mhc, options={"lower": "eager"})(torch.randn(3, 2, 8))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True,
        env={**__import__("os").environ, "TORCH_LOGS": "+mhc_compile"},
    )  # fmt: skip
    for part in ("before fuse_seams", "fuse_norms took", "after the passes", "torch.ops.mhc.read"):
        assert part in done.stderr


def test_perturbed_models_differ():
    """The helper does what these tests rely on: connections depend on their input."""
    model, inputs = transformed("llama")
    before = result(model, inputs)
    perturb(model)
    assert (result(model, inputs) - before).abs().max() > 1e-3
