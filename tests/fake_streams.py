"""CUDA streams without CUDA: where merges of streams run, and what waits for what."""

import contextlib
from unittest import mock

import torch

from mhc_compile.runtime import fused


class FakeStream:
    """A stream by its name."""

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, torch.device("cpu")

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def fake_streams():
    """Yields a stream "high" and a list, which tells what merges do beside the stream "own"."""
    log = []
    current = [FakeStream("own", log)]

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    def noted(name):
        operator = getattr(fused, name)

        def call(*args):
            log.append(f"{name} on {current[-1].name}")
            return operator(*args)

        return mock.patch.object(fused, name, call)

    def record(tensor, stream):
        log.append(f"memory kept for {stream.name}")

    with (
        noted("post_res"), noted("post_res_backward"),
        mock.patch.object(torch.cuda, "current_stream", lambda device: current[-1]),
        mock.patch.object(torch.cuda, "stream", entered),
        mock.patch.object(torch.Tensor, "record_stream", record),
    ):  # fmt: skip
        yield FakeStream("high", log), log
