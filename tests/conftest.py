"""Puts this directory on the path, so that tests share `models`; fixes threads and seeds."""

import os
import zlib

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tests run in parallel processes; tensors here are far too small for more threads.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(request):
    """Each test draws from a state of its own; MHC_TEST_SEED=7 make test draws anew."""
    torch.manual_seed(
        zlib.crc32(request.node.nodeid.encode()) + int(os.getenv("MHC_TEST_SEED", "0"))
    )
