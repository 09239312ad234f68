"""Text, JSON, CSV in torch's runtime, Chrome trace and pictures of a plan."""

import json
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from pipelines import sizes
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

import mhc_compile as mc
from mhc_compile.scheduler.layout import VARIANTS
from mhc_compile.scheduler.overlap_plan import OverlapPlan


@given(sizes())
@settings(max_examples=40, deadline=None)
def test_json_round_trips(size):
    variant, ranks, microbatches = size
    costs = {"F": 0.1, "B": 0.3, "I": 0.2, "W": 0.1, "FB": 1 / 3, "latency": 0.01}
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, streams=3, costs=costs)
    text = plan.to_json()
    again = OverlapPlan.from_json(text)
    assert again == plan and hash(again) == hash(plan) and again.to_json() == text
    assert again != mc.plan_pipeline(ranks, microbatches, variant=variant)
    assert OverlapPlan.from_json(json.dumps(json.loads(text), indent=2)) == plan


def test_plans_differ():
    plan = mc.plan_pipeline(2, 4)
    assert plan != mc.plan_pipeline(2, 4, streams=2) and plan != mc.plan_pipeline(2, 5)
    assert plan != plan.with_costs({"F": 2, "B": 2, "I": 1, "W": 1}) and plan != "plan"


@pytest.mark.parametrize("variant, ranks, microbatches", [
    ("dualpipev", 1, 2), ("dualpipev", 4, 9), ("1f1b", 4, 6), ("zb1p", 3, 7),
])  # fmt: skip
@pytest.mark.parametrize("defer", [False, True])
def test_torch_loads_the_csv(variant, ranks, microbatches, defer, tmp_path):
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    path = tmp_path / "plan.csv"
    path.write_text(plan.to_csv())
    runtime = runtime_of(plan, defer)
    runtime._load_csv(str(path), format="compute_only")
    assert [list(map(str, rank)) for rank in runtime.pipeline_order.values()] == (
        plan.actions_as_text()
    )
    assert runtime.stage_index_to_group_rank == {
        stage: plan.layout.rank_of(stage, 0) for stage in range(plan.layout.stages)
    }
    lowered = runtime.pipeline_order_with_comms.values()
    sends = sum(a.computation_type.value.startswith("SEND") for rank in lowered for a in rank)
    assert sends == len(plan.messages())


def runtime_of(plan, defer=False):
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod = 0, plan.ranks, None
    stage.num_stages = plan.layout.stages
    stages = [stage] * (plan.layout.stages // plan.ranks)
    try:
        return _PipelineScheduleRuntime(stages, plan.microbatches, defer_pp_recv=defer)
    except TypeError:  # torch 2.11
        return _PipelineScheduleRuntime(stages, plan.microbatches)


def test_torch_reads_but_refuses_the_bidirectional_csv(tmp_path):
    plan = mc.plan_pipeline(4, 8, variant="dualpipe")
    rows = plan.to_csv().splitlines()
    assert len(rows) == 4
    for row in rows:
        assert all(str(_Action.from_str(cell)) == cell for cell in row.split(","))
    path = tmp_path / "plan.csv"
    path.write_text(plan.to_csv())
    with pytest.raises(AssertionError, match="assigned to both rank"):
        runtime_of(plan)._load_csv(str(path), format="compute_only")


@pytest.mark.parametrize("variant", VARIANTS)
def test_chrome_trace(variant):
    """The parts of the trace-event format that Perfetto needs: no overlap in a track, pairs."""
    plan = mc.plan_pipeline(4, 8, variant=variant)
    events = json.loads(plan.to_chrome_trace(unit_us=10))["traceEvents"]
    kinds = {kind: [event for event in events if event["ph"] == kind] for kind in "MXsf"}
    assert sum(map(len, kinds.values())) == len(events)
    names = [e["args"]["name"] for e in kinds["M"] if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1", "rank 2", "rank 3"]
    tracks = {(e["pid"], e["tid"]) for e in kinds["M"] if e["name"] == "thread_name"}
    slices = {}
    for event in kinds["X"]:
        slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
        assert event["name"] and event["dur"] > 0
    assert set(slices) == tracks
    for track in slices.values():
        assert all(a + b <= c + 1e-6 for (a, b), (c, _) in zip(track, track[1:], strict=False))
    assert max(ts + dur for track in slices.values() for ts, dur in track) == plan.makespan * 10
    assert len(kinds["X"]) == sum(map(len, plan.actions))
    ends = {event["id"]: event for event in kinds["f"]}
    assert len(ends) == len(kinds["s"]) == len(plan.messages())
    for begin in kinds["s"]:
        end = ends[begin["id"]]
        assert begin["ts"] <= end["ts"] and end["bp"] == "e"
        for event in (begin, end):  # an arrow hangs on a slice
            times = slices[event["pid"], event["tid"]]
            assert any(ts <= event["ts"] <= ts + dur for ts, dur in times)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures(variant, tmp_path):
    plan = mc.plan_pipeline(8, 20, variant=variant)
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        plan.plot(tmp_path / f"plan.{ending}")
        data = (tmp_path / f"plan.{ending}").read_bytes()
        assert data.startswith(start) and len(data) > 20_000


def test_no_picture(monkeypatch, tmp_path):
    with pytest.raises(mc.MHCError, match="12288 actions cannot be read"):
        mc.plan_pipeline(64, 64, variant="zb1p").plot(tmp_path / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mc.MHCError, match="pip install 'mhc_compile\\[plots\\]'"):
        mc.plan_pipeline(2, 4).plot(tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


def test_text():
    text = str(mc.plan_pipeline(8, 20, variant="dualpipe"))
    assert "makespan   66" in text and "bubble     6 (9.1%)" in text and "holds" in text
    last = [line.split() for line in text.splitlines()][-1]
    assert last == "7 0, 7 11 4 7 7 9 6 9".split()
    wide = str(mc.plan_pipeline(40, 80, costs={"F": 2, "B": 3, "I": 1, "W": 2}))
    assert "need not hold; needs no latency" in wide
    assert [line.split()[0] for line in wide.splitlines()[-32:]] == [
        str(rank) for rank in [*range(16), *range(24, 40)]
    ]
