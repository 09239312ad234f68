"""Measured tiles: the table, what is tried, and which tile a kernel gets; times are made up."""

import json
import logging
from dataclasses import asdict, replace

import pytest
import torch

from mhc_compile.backend.options import parse_options
from mhc_compile.codegen import tune_kernel as search
from mhc_compile.codegen import tuning
from mhc_compile.codegen.interpreter import interpreting, mend
from mhc_compile.codegen.kernel_calls import kernel_calls
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.codegen.tile_table import Entry, TileTable, read_table
from mhc_compile.codegen.tiles import GIVEN, choose_tile, tile_fault
from mhc_compile.codegen.tune_kernel import Trial, best_of, entry_of, neighbours, tune_kernel
from mhc_compile.errors import ConfigError, MHCError

CPU = torch.device("cpu")
ON_H100 = tuning.Tuning("cached", "sm_90")


def pick(name, n=4, channels=4096, dtype="bf16", **kwargs):
    return next(s for s in kernel_set(n, channels, dtype, **kwargs) if s.name == name)


MIX = pick("mix")
FOUND = replace(MIX.tile, tokens=8, warps=8)


def entry(tokens=8192, tile=FOUND, **fields):
    given = dict(arch="sm_90", kernel="mix", dtype="bf16", streams=4, channels=4096)
    rest = dict(us=200.0, default_us=205.0, measured_on="a GPU")
    return Entry(**{**given, "tokens": tokens, "tile": tile, **rest, **fields})


PACKAGED = tuning.PACKAGED


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    """No mode, no tables, and a cache directory of the test's own."""
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.ENV, raising=False)
    monkeypatch.setattr(tuning._State, "mode", None)
    monkeypatch.setattr(tuning._State, "table", None)
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "packaged" / "tiles.json")
    return tmp_path / "cache"


# --- the table ----------------------------------------------------------------------------


def test_nearest_count_of_tokens_wins():
    table = TileTable([entry(1024, replace(FOUND, tokens=2)), entry(16384)])
    assert table.lookup("sm_90", MIX, 2048).tokens == 2
    assert table.lookup("sm_90", MIX, 8192).tokens == 8
    assert table.lookup("sm_90", MIX, 4 * 16384).tokens == 8
    assert table.lookup("sm_90", MIX, 255) is None and table.lookup("sm_90", MIX, 65537) is None


@pytest.mark.parametrize(
    "other", [{"arch": "sm_100"}, {"kernel": "pre"}, {"dtype": "fp16"}, {"streams": 3},
              {"channels": 4104}], ids=lambda other: next(iter(other))
)  # fmt: skip
def test_everything_else_must_be_the_same(other):
    assert TileTable([entry(**other)]).lookup("sm_90", MIX, 8192) is None


def test_parts_that_another_kernel_decides_stay():
    for name, field in (("gates", "parts"), ("gates_backward", "parts"), ("read", "shares")):
        spec = pick(name)
        spec = replace(spec, tile=replace(spec.tile, **{field: 3}))
        row = entry(kernel=name, tile=replace(spec.tile, **{field: 7}))
        assert getattr(TileTable([row]).lookup("sm_90", spec, 8192), field) == 3


def test_written_and_read(tmp_path):
    path = tmp_path / "tiles.json"
    table = TileTable([entry(), entry(1, us=3.0), entry(kernel="gates", tile=pick("gates").tile)])
    table.write(path)
    assert read_table(path).entries == table.entries
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]
    later = read_table(path)
    later.add([entry(us=1.0)])
    assert len(later.entries) == 3 and later.lookup("sm_90", MIX, 8192) == FOUND
    assert read_table(tmp_path / "none.json").entries == {}


def test_packaged_table_is_sound():
    entries = read_table(PACKAGED).entries.values()
    assert len(entries) > 50
    for found in entries:
        assert found.us <= found.default_us and found.arch


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no table of tiles"),
        ("[]", 'no list "entries"'),
        ('{"version": 9, "entries": []}', "version 9"),
        ("row", "entry 0 cannot be used.*unexpected keyword"),
        ("tokens", "tile.tokens must be a power of two"),
        ("parts", "1 parts of 512 channels do not cover 4096"),
        ("kernel", "there is no kernel 'mixed'"),
        ("time", "must be positive"),
        ("flat", "no flat form"),
        ("registers", "registers must be a multiple of 8"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, message):
    row = asdict(entry())
    changed = {
        "row": row | {"more": 1},
        "tokens": row | {"tile": {"tokens": 3}},
        "parts": row | {"kernel": "pre", "tile": {"tokens": 4, "width": 512}},
        "kernel": row | {"kernel": "mixed"},
        "time": row | {"us": 0},
        "flat": row | {"tile": {"tokens": 4, "width": 512, "flat": True}},
        "registers": row | {"tile": {"tokens": 4, "width": 512, "parts": 8, "registers": 100}},
    }
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"version": 1, "entries": [changed.get(text, {})]})
                    if text in changed else text)  # fmt: skip
    with pytest.raises(MHCError, match=message) as error:
        read_table(path)
    assert "tiles.json" in str(error.value) and "tune.py" in str(error.value)


def test_most_registers_are_for_nvidia_alone():
    spec = KernelSpec("seam_backward", 4, 4096, "bf16", Tile(16, 128, 32, registers=128))
    assert spec.options == {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
    assert "maxnreg" not in replace(spec, target="hip").options
    assert "maxnreg" not in replace(spec, tile=Tile(16, 128, 32)).options
    assert Tile(16, 128, 32, 4, 1, registers=168) in neighbours(spec)


def test_parts_are_joined_where_they_are_a_multiple():
    chosen = [
        choose_tile(KernelSpec("seam_backward", n, channels, "bf16", Tile(1)), tokens).joined
        for n, channels, tokens in (
            (4, 4096, 8192), (4, 4096, 1000), (4, 2560, 8192), (4, 4224, 8192), (2, 4096, 8192),
        )
    ]  # fmt: skip
    assert chosen == [2, 1, 1, 1, 1]
    even = KernelSpec("seam_backward", 4, 4096, "bf16", Tile(16, 128, 32))
    odd = KernelSpec("seam_backward", 4, 1920, "bf16", Tile(16, 128, 15))
    assert all(tile.joined == 1 for tile in neighbours(odd))
    halved = neighbours(replace(even, tile=replace(even.tile, joined=2)))
    assert all(tile.parts % tile.joined == 0 for tile in halved)
    assert "joined" in tile_fault(replace(odd, tile=replace(odd.tile, joined=2)))
    assert "joined" in tile_fault(replace(MIX, tile=replace(MIX.tile, joined=2)))


def test_names_say_which_kernel():
    for n in (4, 8):
        for spec in kernel_set(n, 64):
            fields = KernelSpec.fields_of(spec.name)
            assert all(getattr(spec, name) == value for name, value in fields.items())


def test_tiles_by_sizes_have_no_fault():
    for n in range(1, 9):
        for channels in (1, 33, 1000, 4096):
            for dtype in ("bf16", "fp32"):
                for spec in kernel_set(n, channels, dtype):
                    assert tile_fault(spec) == "", spec


# --- which tile a kernel gets -------------------------------------------------------------


def test_cached_takes_what_is_in_a_table(own_state):
    assert tuning.tile_for(MIX, 8192, ON_H100) == choose_tile(MIX, 8192)
    own_state.mkdir(mode=0o700)
    TileTable([entry()]).write(own_state / "tiles.json")
    tuning.forget_tables()
    assert tuning.tile_for(MIX, 8192, ON_H100) == FOUND
    assert tuning.tile_for(MIX, 1, ON_H100) == choose_tile(MIX, 1)  # no entry is near
    assert tuning.tile_for(MIX, 8192, tuning.Tuning("off", "sm_90")) == choose_tile(MIX, 8192)


def test_h_made_again_takes_the_tile_that_is_best_without(own_state):
    plain = pick("pre_backward_rms_weight")
    best = replace(plain.tile, stages=plain.tile.stages + 1)
    own_state.mkdir(mode=0o700)
    TileTable([entry(kernel=plain.name, tile=best)]).write(own_state / "tiles.json")
    again = pick("pre_backward_again_rms_weight")
    assert again == replace(plain, again=True)
    assert tuning.tile_for(again, 8192, ON_H100) == tuning.tile_for(plain, 8192, ON_H100) == best


@pytest.mark.parametrize(
    ("measured", "norms"),
    [("seam_backward", ("rms_weight", "layer")), ("gates_backward_mix", ("rms", "layer"))],
)
def test_a_backward_with_a_norm_takes_the_tile_that_is_best_without(measured, norms, own_state):
    plain = pick(measured)
    best = replace(plain.tile, tokens=2 * plain.tile.tokens)
    own_state.mkdir(mode=0o700)
    TileTable([entry(kernel=measured, tile=best)]).write(own_state / "tiles.json")
    for norm in norms:
        normed = pick(f"{measured}_{norm}")
        assert normed.tile == plain.tile and normed.tiled_as == plain
        assert tuning.tile_for(normed, 8192, ON_H100) == best


def test_a_damaged_table_is_said_where_a_kernel_needs_it(own_state):
    own_state.mkdir(mode=0o700)
    (own_state / "tiles.json").write_text("{")
    with pytest.raises(MHCError, match="no table of tiles"):
        tuning.tile_for(MIX, 8192, ON_H100)
    tuning.tile_for(MIX, 8192, tuning.Tuning("off", "sm_90"))


def test_full_measures_once_and_keeps(own_state, monkeypatch, caplog):
    calls = []

    def measured(spec, tokens, device):
        calls.append(spec.name)
        return [Trial(spec.tile, 10.0), Trial(FOUND, 5.0)]

    monkeypatch.setattr(search, "tune_kernel", measured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    full = tuning.Tuning("full", "sm_90", CPU)
    with caplog.at_level(logging.INFO, "mhc_compile"):
        assert [tuning.tile_for(MIX, 8192, full) for _ in range(2)] == [FOUND] * 2
    assert calls == ["mix"] and "5.0 us" in caplog.text
    (kept,) = read_table(own_state / "tiles.json").entries.values()
    assert (kept.us, kept.default_us, kept.tokens) == (5.0, 10.0, 8192)
    tuning.forget_tables()  # as another process would find it
    assert tuning.tile_for(MIX, 8192, ON_H100) == FOUND


def test_full_without_memory_runs_the_default(monkeypatch, caplog):
    def measured(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(search, "tune_kernel", measured)
    full = tuning.Tuning("full", "sm_90", CPU)
    assert tuning.tile_for(MIX, 8192, full) == choose_tile(MIX, 8192)
    assert "no memory" in caplog.text


def test_modes(monkeypatch):
    assert tuning.tuning_of(CPU).mode == "off"
    with pytest.raises(ConfigError, match="did you mean 'cached'"):
        tuning.set_tuning("cache")
    for mode in tuning.MODES:
        assert parse_options({"tune": mode}).tune == mode
    assert parse_options({}).tune is None
    with pytest.raises(ConfigError, match="the option tune must be one of 'off', 'cached', 'full'"):
        parse_options({"tune": "of"})
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.tuning_of(gpu).mode == "cached"
    monkeypatch.setenv(tuning.ENV, "off")
    assert tuning.tuning_of(gpu).mode == "off"
    tuning.set_tuning("full")
    assert tuning.tuning_of(gpu).mode == "full"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tuning_of(gpu).mode == "cached"  # nothing can be timed in a graph
    tuning._State.mode = None
    monkeypatch.setenv(tuning.ENV, "never")
    with pytest.raises(ConfigError, match="MHC_COMPILE_TUNE"):
        tuning.tuning_of(gpu)


def test_the_backend_sets_the_mode():
    import mhc_compile as mc
    from mhc_compile.backend import mhc

    model = torch.nn.Sequential(mc.HyperConnection(8, mc.MHCConfig(streams=2)))
    call = torch.compile(model, backend=mhc, options={"lower": "eager", "tune": "off"})
    call(torch.randn(3, 2, 8))
    torch.compiler.reset()
    assert tuning._State.mode == "off"


def test_launches_ask_again_after_a_table_changed(own_state):
    """Kept specs belong to a state of the tables; each tile is a kernel with a key of its own."""
    streams = torch.Size((8192, 4, 4096)), torch.bfloat16, torch.device("meta"), None
    before = kernel_calls(*streams, ON_H100).spec("mix")
    own_state.mkdir(mode=0o700)
    TileTable([entry()]).write(own_state / "tiles.json")
    tuning.forget_tables()
    again = ON_H100._replace(generation=tuning._State.generation)
    after = kernel_calls(*streams, again).spec("mix")
    assert after.tile == FOUND != before.tile and after.key != before.key


# --- what is tried ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 8])
def test_neighbours_can_all_run(n):
    for channels in (1000, 2560, 4096):
        for spec in kernel_set(n, channels):
            found = neighbours(spec)
            assert bool(found) == (spec.op not in GIVEN)
            assert spec.tile not in found and len(set(found)) == len(found) < 20
            for tile in found:
                assert tile_fault(replace(spec, tile=tile)) == ""
                assert tile.shares == spec.tile.shares and tile.flat >= spec.tile.flat


needs_interpreter = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is off")


def tried_with(spec, tokens, times, **kwargs):
    """Tries tiles in the interpreter; `times` gives a tile's microseconds."""
    mend()
    seen = []

    def measure(call):
        call()
        return times(seen[-1])

    launch = search.Launches.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            search.Launches, "call",
            lambda self, spec, outputs: seen.append(spec.tile) or launch(self, spec, outputs),
        )  # fmt: skip
        return tune_kernel(spec, tokens, CPU, measure=measure, **kwargs)


@needs_interpreter
@pytest.mark.parametrize("name", ["mix", "project_mix", "gates", "phi_backward", "mix_backward"])
def test_tiles_agree_and_the_fastest_is_found(name):
    spec = pick(name, 2, 64, target="interpret")
    prepared = []
    tried = tried_with(
        spec, 20, lambda tile: 100 / (tile.tokens + tile.width), rounds=2, prepare=prepared.extend
    )
    assert len(tried) > 2 and all(trial.us is not None for trial in tried), tried
    best = best_of(tried).tile
    assert best.tokens + best.width == max(t.tile.tokens + t.tile.width for t in tried)
    assert {s.tile for s in prepared} == {trial.tile for trial in tried[1:]}


@needs_interpreter
def test_wrong_and_failing_tiles_get_no_time(monkeypatch):
    mend()
    spec = pick("mix", 2, 64, target="interpret")
    launch = search.Launches.call

    def call(self, spec, outputs):
        if spec.tile.tokens == 2:
            raise RuntimeError("out of resource: shared memory")
        return (lambda: None) if spec.tile.tokens == 8 else launch(self, spec, outputs)

    monkeypatch.setattr(search.Launches, "call", call)  # 8 tokens: results stay NaN
    tried = tune_kernel(spec, 20, CPU, measure=lambda call: 1.0, rounds=1)
    whys = {trial.tile.tokens: trial.why for trial in tried}
    assert "shared memory" in whys[2] and "y differs" in whys[8] and whys[4] == ""
    assert best_of(tried).tile == spec.tile


def test_differences():
    right = {"y": torch.ones(3, 2), "g": torch.ones(2, dtype=torch.bfloat16)}
    assert search._difference({k: v + 1e-3 for k, v in right.items()}, right) == ""
    assert "y" in search._difference(right | {"y": right["y"] + 1e-2}, right)
    assert "g" in search._difference(right | {"g": right["g"] * 1.1}, right)
    assert "y" in search._difference(right | {"y": right["y"] * torch.nan}, right)


def test_the_default_stays_where_nothing_is_clearly_faster():
    default = Trial(MIX.tile, 100.0)
    assert best_of([default, Trial(FOUND, 99.0)]) == default
    assert best_of([default, Trial(FOUND, 90.0), Trial(FOUND, None, "spills 8")]).us == 90.0
    assert best_of([Trial(MIX.tile, None, "fails"), Trial(FOUND, 90.0)]).us == 90.0
    assert entry_of(MIX, 8192, "sm_90", [Trial(MIX.tile, None, "fails")]) is None


def test_no_tile_is_begun_after_the_end():
    spec = pick("mix", 2, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_try", lambda launches, spec, *_: (Trial(spec.tile, 1.0), {}))
        assert len(tune_kernel(spec, 4, CPU, until=0.0)) == 1
