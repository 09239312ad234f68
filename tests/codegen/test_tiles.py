"""Tiles of every size: they cover all channels and tokens, and their kernels render."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mhc_compile.codegen import signature
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.render import render
from mhc_compile.codegen.shares import shares_of
from mhc_compile.codegen.signature import counts, grid, group_tokens, parameters
from mhc_compile.codegen.spec import DTYPES, GATED
from mhc_compile.codegen.tiles import GIVEN, WHOLE_ROWS

TOKENS = (1, 100, 8192)


def covered_channels(spec):
    """Channels of one stream that the programs for one token tile work on."""
    tile = spec.tile
    if spec.op == "split_phi":
        return grid(spec, 1)[0] * tile.width
    if spec.op == "phi_backward":  # rows of phi, or of one stream for all
        return grid(spec, 1)[0] * tile.width // (1 if spec.equal else spec.streams)
    if spec.op.startswith("gates") or spec.op in GIVEN:
        return spec.channels
    if spec.norm != "none" and spec.op in WHOLE_ROWS:
        return tile.width
    return spec.span * (1 if spec.op == "pre_backward" else tile.parts)


def covered_tokens(spec, tokens):
    count = counts(spec, tokens)
    if spec.op == "phi_backward":
        return count["groups"] * group_tokens(spec, tokens)
    return count["tiles"] * spec.tile.tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 9))
def test_everything_is_covered(n, dtype):
    for channels in (1, 8, 33, 1000, 4099, 16384):
        for spec in kernel_set(n, channels, dtype):
            tile = spec.tile
            assert covered_channels(spec) >= channels, spec
            assert all(covered_tokens(spec, tokens) >= tokens for tokens in TOKENS), spec
            assert 1 <= tile.warps <= 32 and not tile.warps & (tile.warps - 1)
            if "tl.dot(" in (text := render(spec)):  # the least that matrix units take
                rows = tile.tokens
                if spec.op == "mix_backward":  # streams are rows too
                    rows *= 1 << (n - 1).bit_length()
                assert min(rows, tile.width, spec.columns) >= 16, spec
            assert parameters(text)


def test_defaults_of_eight_streams():
    """Measured with bf16; with masks or rows that begin anywhere they would spill."""

    def shapes(channels, dtype="bf16"):
        specs = kernel_set(8, channels, dtype)
        return {
            spec.op: (spec.tile.tokens, spec.tile.width, spec.tile.warps, spec.tile.stages)
            for spec in specs if spec.op in ("mix", "mix_backward", "read_backward", "phi_backward")
        }  # fmt: skip

    measured = {
        "mix": (4, 256, 2, 1), "mix_backward": (8, 64, 4, 1), "read_backward": (64, 64, 4, 2),
        "phi_backward": (32, 128, 4, 2),
    }  # fmt: skip
    assert shapes(3072) == measured
    assert shapes(1000) == measured | {"read_backward": (64, 64, 8, 2)}
    odd = {"mix": (2, 512, 4, 1), "mix_backward": (4, 256, 4, 1), "read_backward": (64, 64, 8, 2)}
    assert shapes(1001) == measured | odd
    for dtype in ("fp16", "fp32"):
        assert shapes(3072, dtype)["mix"] == (2, 512, 4, 1)
        assert shapes(3072, dtype)["phi_backward"] == (32, 32, 4, 3)


@pytest.mark.parametrize("n", (4, 5))
def test_kernels_of_one_strip_have_no_loop(n):
    """Some templates work on `tile.width` channels a part and do not loop over more."""
    for channels in (1, 1000, 16384):
        for spec in kernel_set(n, channels):
            if spec.op in ("pre", "seam_backward", "mix_backward") and not spec.tile.flat:
                assert spec.span == spec.tile.width


@pytest.mark.parametrize("n", range(1, 9))
def test_pieces_cover_the_columns_of_phi(n):
    spec = kernel_set(n, 64)[0]
    ends = [first + width for first, width in spec.pieces]
    assert [first for first, _ in spec.pieces] == [0, *ends[:-1]]
    assert spec.maps <= ends[-1] < spec.maps + 16 and ends[-1] <= spec.columns
    assert all(width >= 16 and not width & (width - 1) for _, width in spec.pieces)


@pytest.mark.parametrize("n", range(1, 9))
def test_all_shares_are_added(n):
    """In as many parts, for as many tiles of tokens, and to as many programs as there are."""
    for channels in (1, 1000, 4096):
        specs = kernel_set(n, channels)
        tiles = {spec.op: spec.tile for spec in specs}
        dots = {spec.op: spec.dots for spec in specs}
        last = dots.get("seam_backward", dots["mix_backward"])
        for spec in (spec for spec in specs if spec.op == "add_shares"):
            assert spec.tile.tokens == tiles["gates_backward"].tokens
            assert spec.tile.parts == last
            for tokens in TOKENS:
                count = counts(spec, tokens)
                sizes = [(part, part.size * (tokens if part.by_token else 1))
                         for part in shares_of(spec)]  # fmt: skip
                assert all(part.programs(count) * part.columns >= size for part, size in sizes)
                assert grid(spec, tokens) == (sum(part.programs(count) for part, _ in sizes),)


def test_gates_add_up_the_parts_of_the_products():
    for n in range(1, 9):
        specs = kernel_set(n, 1000)
        (parts,) = {spec.tile.parts for spec in specs if spec.op == "gates"}
        assert parts in {spec.tile.parts for spec in specs if spec.op == "project"}


def test_measured_tiles():
    """Tiles that were measured on an H100, 8192 tokens of 4 x 4096 bf16, stay as they are."""
    tiles = {
        spec.name: tuple(vars(spec.tile).values())[:6]
        for spec in kernel_set(4, 4096)
        if spec.op not in GATED and spec.norm == "none"
    }
    measured = {
        "project_mix": (16, 64, 8, 2, 2, 64),
        "pre": (4, 512, 8, 4, 1, 64),
        "pre_backward": (1, 1024, 1, 4, 1, 64),
        "seam_backward": (16, 128, 32, 4, 3, 128),
        "read_backward": (16, 32, 32, 1, 2, 64),
        "mix_backward": (4, 256, 16, 4, 1, 64),
        "mix": (4, 512, 8, 4, 1, 64),
        "phi_backward": (32, 128, 1, 4, 3, 64),
    }
    assert measured.items() <= tiles.items()


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fit"),
    [(168, 22, 4, 3), (169, 22, 4, 2), (255, 22, 4, 2), (72, 22, 4, 7), (72, 120, 4, 1),
     (255, 200, 16, 1), (32, 0, 8, 8)],
)  # fmt: skip
def test_programs_that_fit_a_multiprocessor(registers, shared, warps, fit, monkeypatch):
    gpu = SimpleNamespace(
        shared_memory_per_multiprocessor=228 * 1024, max_threads_per_multi_processor=2048,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(signature, "_residents", {})
    monkeypatch.setattr(signature, "multiprocessors", lambda: 10)
    spec = next(spec for spec in kernel_set(4, 4096) if spec.op == "seam_backward")
    spec = replace(spec, tile=replace(spec.tile, warps=warps))
    compiled = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared * 1024))
    assert signature.grid(spec, 8192) == (20,)
    signature.learn_residents(spec, compiled)
    assert signature.grid(spec, 8192) == (10 * fit,)
    assert signature.grid(spec, 1) == (min(10 * fit, spec.dots),)
