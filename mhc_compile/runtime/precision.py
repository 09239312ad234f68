"""In which precision the streams are worked on: float32, or float64 for float64 streams."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mhc_compile._torch_compat import AUTOCAST_DEVICES, autocast_state


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would take the matmuls back to bfloat16, which moves row sums by 3e-3.

    It is entered even where autocast is off, since a trace may run where it is on.
    """
    if x.device.type in AUTOCAST_DEVICES:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def autocast_off_now(x: Tensor) -> AbstractContextManager[object]:
    """The same for what is never traced: where autocast is off, nothing is entered."""
    on, _ = autocast_state(x.device.type) or (False, None)
    return autocast_off(x) if on else nullcontext()
