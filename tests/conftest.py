"""Puts this directory on the path, so that tests share `models`; fixes threads and seeds.

Generated kernels run in Triton's interpreter, which a process chooses once, when it first imports
triton: hence here. Compiling for a GPU has a process of its own, see `compile_ahead`.
TRITON_INTERPRET=0 in the environment leaves the interpreter off, for tests on a GPU.
"""

import os
import zlib

os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch, which may import triton

import pytest  # noqa: E402
import torch  # noqa: E402


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
