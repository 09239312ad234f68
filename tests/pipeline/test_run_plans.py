"""Plans on gloo processes: loss and gradients as the serial model's, and what runs when."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import launch

TOLERANCE = 1e-5
COMPILED = 3e-5  # the backend alone, without a pipeline, differs from eager by 1e-5 here


def case(model, variant, microbatches, **options):
    return ["train", {"model": model, "variant": variant, "microbatches": microbatches, **options}]


TWO = {
    **{
        f"nanogpt {variant}{' recompute' * recompute}": case(
            "nanogpt", variant, m, recompute=recompute
        )
        for variant, m in (("1f1b", 3), ("zb1p", 4), ("dualpipev", 5))
        for recompute in (False, True)
    },
    "nanogpt dualpipev, a pair's backward first": case(
        "nanogpt", "dualpipev", 6, times={"F": 1, "I": 1, "W": 1, "f_ready": 3, "b_ready": 2}
    ),
    "gpt2 zb1p recompute": case("gpt2", "zb1p", 4, recompute=True),
    "llama zb1p": case("llama", "zb1p", 4),
    "bert 1f1b": case("bert", "1f1b", 2),
    "t5 dualpipev": case("t5", "dualpipev", 4),
    "nanogpt dualpipev compiled": case(
        "nanogpt", "dualpipev", 4, compile={"lower": "aot_eager", "recompute": "paper"}
    ),
    "nanogpt dualpipev in pieces": case(
        "nanogpt", "dualpipev", 4, compile={"lower": "aot_eager", "overlap": True}
    ),
}
FOUR = {
    f"nanogpt {variant}": case("nanogpt", variant, m)
    for variant, m in (("1f1b", 4), ("zb1p", 5), ("dualpipev", 8))
}


def check_training(ranks, cases):
    """Loss and gradients as the serial model's; blocks run once, and once more to recompute."""
    for number, rank in enumerate(ranks):
        assert rank.status == 0, rank.text
        for name, (_, options) in cases.items():
            found = rank.report[name]
            print(f"rank {number}, {name}: loss {found['loss']:.1e}, {found['gradient']:.1e}")
            assert found["loss"] < TOLERANCE, (number, name)
            most = COMPILED if "compile" in options else TOLERANCE
            assert found["gradient"] < most, (number, name)
            assert not found["silent"], (number, name)
            if "compile" not in options and options["model"] == "nanogpt":
                times = options["microbatches"] * (1 + options.get("recompute", False))
                assert set(found["calls"].values()) == {times}, (number, name)


def check_early_sends(found):
    """A chunk's result leaves at once, in a pair before the other half begins.

    Its last block runs again before it waits for the gradient.
    """
    events, pairs = found["events"], 0
    for at, event in enumerate(events):
        if event.startswith("send "):
            assert events[at - 1] == f"end {event.split()[-1]}"
        if event.startswith("wait for the gradient for "):  # recompute needs no message
            stage, chunk = re.fullmatch(r"(\d+)[BI](\d+)", event.split()[-1]).groups()
            ahead = f"end recomputing {stage}F{chunk}"
            assert (events[at - 1] == ahead) == (stage != str(found["last"]))
    for cell in found["plan"]:
        if cell.endswith("OVERLAP_F_B"):
            forward, backward = cell[1:].split(")")[0].split(";")
            sent = f"send the result of {forward}"
            if sent in events:  # not where the next stage is on the same rank
                pairs += 1
                assert events.index(sent) < events.index(f"begin {backward}")
    assert pairs
    # What was received is held as long as its chunk is in flight, and a receive early.
    assert found["held"] <= found["in_flight"] + 1 and not found["left"]


def check_merges(found, recomputed):
    """Of 4 chunks' 2 blocks those after an MLP have high priority, but for what runs again."""
    assert found["same"]
    assert found["places"] == {
        "post_res on own": 8 + recomputed, "post_res on high": 8, "post_res_backward on own": 16,
        "high waits for own": 8, "own waits for high": 8, "memory kept for own": 8,
    }  # fmt: skip


def test_two_ranks(tmp_path):
    others = {
        "events": ["order_of_events", {"variant": "dualpipev", "microbatches": 6}],
        "merges": ["merges", {"recompute": False}],
        "merges, recompute": ["merges", {"recompute": True}],
        "tied across ranks": ["several_steps", {"variant": "zb1p"}],
        "tied on a rank": ["several_steps", {"variant": "dualpipev"}],
    }
    ranks = launch(tmp_path, 2, TWO | others)
    check_training(ranks, TWO)
    for rank in ranks:
        check_early_sends(rank.report["events"])
        check_merges(rank.report["merges"], 0)
        check_merges(rank.report["merges, recompute"], 16)
        for tied in ("tied across ranks", "tied on a rank"):
            steps = rank.report[tied]
            assert steps["losses"] == pytest.approx(steps["wanted"], rel=TOLERANCE)
            assert steps["losses"][-1] < steps["losses"][1]
            assert max(steps["state"].values()) < TOLERANCE


def test_four_ranks(tmp_path):
    check_training(launch(tmp_path, 4, FOUR), FOUR)


@pytest.mark.long
def test_compiled_stages(tmp_path):
    cases = {
        "inductor": case("nanogpt", "dualpipev", 4, compile={"recompute": "paper"}),
        "in pieces": case("nanogpt", "dualpipev", 4, compile={"overlap": True}),
        "llama zb1p": case("llama", "zb1p", 2, compile={"lower": "aot_eager"}),
        "checkpoints": case("nanogpt", "zb1p", 2, recompute=True, compile={"lower": "aot_eager"}),
    }
    check_training(launch(tmp_path, 2, cases, limit=300), cases)


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--variant", "zb1p", "--recompute"]], ids=str)
def test_the_example(options):
    root = Path(__file__).parents[2]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(root / "examples" / "pipeline.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"gradients differ by ([\d.e+-]+)", done.stdout)
    assert len(differences) == 5 and max(map(float, differences)) < TOLERANCE
