"""The peak of a step on a CPU, against patterns of allocations whose peak is known."""

import torch

from mhc_compile.runtime.memory_events import peak_bytes, peak_of


def block(size):
    return torch.empty(size, dtype=torch.uint8)


def test_peak_is_neither_sum_nor_end():
    def step():
        first, second = block(1000), block(2000)
        del first
        third = block(500)  # 2500 alive, less than the 3000 before
        del second
        return third, block(700)

    assert peak_bytes(step) == 3000


def test_blocks_from_before_do_not_count():
    kept = {}

    def keep():
        kept["block"] = block(4096)

    assert peak_bytes(keep) == 4096

    def step():
        kept.clear()  # known to the profiler, from the profile before
        return block(100), block(200)

    assert peak_bytes(step) == 300


def test_forward_and_backward():
    x = torch.randn(16, 256, requires_grad=True)  # 16 KiB
    row = x.numel() * x.itemsize

    def step():
        x.grad = None
        (x.sigmoid() * 2).sum().backward()

    # With both results alive the loss comes; in the backward three are: the sigmoid's result, the
    # gradient of it and that of x.
    assert 3 * row <= peak_bytes(step) < 3 * row + 1024


def test_an_address_that_comes_again():
    assert peak_of([(8, 100), (8, -100), (8, 300), (16, 50), (8, -300), (16, -50)]) == 350


def test_nothing():
    assert peak_bytes(lambda: None) == 0
