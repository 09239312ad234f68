"""Ranks that fail, hang, never come or run something else: the others say so, in time."""

import signal

import pytest
from launch import launch


def test_what_is_found_before_anything_is_sent(tmp_path):
    ranks = launch(tmp_path, 2, {"disagree": ["disagree", {}], "refusals": ["refusals", {}]})
    for rank in ranks:
        assert rank.status == 0, rank.text
        plans, stages = rank.report["disagree"]["plans"], rank.report["disagree"]["stages"]
        assert plans.startswith("PipelineError: the ranks have different plans: ranks [0] have ")
        assert "M = 4" in plans and "M = 5" in plans and "ranks [1] have " in plans
        assert stages.startswith("PipelineError: the ranks have different stages: ranks [0] have ")
        found = rank.report["refusals"]
        assert "variant='dualpipev'" in found["dualpipe"]
        assert "the plan has 4 stages and the model was split into 2" in found["stages"]
        assert "the plan is for 4 ranks, and 2 are running" in found["ranks"]
        assert "shape [3, 8]" in found["batch"] and "batch of [4, 8]" in found["batch"]
        assert "shape [4, 5]" in found["length"]
        assert "input 'idx' is missing" in found["name"]
        assert "shape [3, 8]" in found["target"]
        assert found["after"] > 0


def test_a_rank_that_raises_is_named_with_its_error(tmp_path):
    jobs = {"fail": ["fail", {"how": "raises", "timeout": 20}]}
    healthy, failing = launch(tmp_path, 2, jobs)
    assert healthy.status == failing.status == 1
    assert "FloatingPointError" in failing.text and "in 1F1 on rank 1 of a pipeline" in failing.text
    assert healthy.report["error"].startswith("PipelineError: rank 0 could not finish a step")
    assert "rank 1: 1F1: FloatingPointError: the test's own" in healthy.report["error"]


@pytest.mark.parametrize("how, timeout, stop_after", [("dies", 30, 20), ("hangs", 4, 0.5)])
def test_a_rank_that_dies_or_hangs_ends_the_others(how, timeout, stop_after, tmp_path):
    jobs = {"fail": ["fail", {"how": how, "timeout": timeout}]}
    healthy, failing = launch(tmp_path, 2, jobs, stop_after=stop_after)
    assert healthy.status == 1, healthy.text
    assert healthy.report["error"].startswith("PipelineError: rank 0 could not finish a step, ")
    assert how == "dies" or "waiting for the gradient for 0I" in healthy.report["error"]
    assert "one of them died or hangs" in healthy.report["error"]
    assert healthy.report["seconds"] < (timeout + 5 if how == "hangs" else timeout / 2)
    assert failing.status == (3 if how == "dies" else -signal.SIGKILL)


@pytest.mark.long
def test_a_rank_that_never_comes(tmp_path):
    healthy, absent = launch(tmp_path, 2, {"absent": ["absent", {}]}, stop_after=0.5)
    assert healthy.status == 1, healthy.text
    assert healthy.report["error"].startswith("PipelineError: rank 0 could not finish its start")
    assert absent.status == -signal.SIGKILL
