"""Starts the ranks of a pipeline as processes, and leaves none behind."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass
class Rank:
    """How a rank ended: its exit status (negative: killed), what it reported, what it printed."""

    status: int
    report: dict
    text: str
    seconds: float


def launch(folder, ranks, jobs, *, limit=100, stop_after=None):
    """Runs functions of jobs.py on some ranks, one after the other in the same processes.

    Args:
        folder: for the ranks' files.
        ranks: how many.
        jobs: for each name in the report, a function's name and its keyword arguments.
        limit: seconds until all are killed.
        stop_after: seconds that the others may go on after one has failed, as torchrun's do;
            None lets them go on.
    """
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), *filter(None, sys.path)])
    environment = {
        **os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "RANK_FOLDER": str(folder), "WORLD_SIZE": str(ranks),
    }  # fmt: skip
    start, processes, logs = time.monotonic(), [], []
    for rank in range(ranks):
        logs.append((folder / f"log{rank}.txt").open("w"))
        processes.append(subprocess.Popen(
            [sys.executable, str(FOLDER / "jobs.py"), json.dumps(jobs)],
            env=environment | {"RANK": str(rank)}, stdout=logs[-1], stderr=subprocess.STDOUT,
            start_new_session=True,
        ))  # fmt: skip
    ended = {}
    try:
        while len(ended) < ranks and time.monotonic() - start < limit:
            time.sleep(0.05)
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic() - start
            failed = [at for rank, at in ended.items() if processes[rank].returncode]
            late = stop_after is not None and failed
            if late and time.monotonic() - start - min(failed) > stop_after:
                break
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    results = []
    for rank, process in enumerate(processes):
        report = folder / f"report{rank}.json"
        results.append(Rank(
            process.returncode, json.loads(report.read_text()) if report.exists() else {},
            (folder / f"log{rank}.txt").read_text(), ended.get(rank, limit),
        ))  # fmt: skip
    return results
