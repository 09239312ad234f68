"""Puts this directory on the path, so that tests share `models`, and fixes the thread count."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tests run in parallel processes; tensors here are far too small for more threads.
    torch.set_num_threads(1)
