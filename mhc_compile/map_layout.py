"""How maps and their gradients lie in memory: component by component, `[k, tokens]`.

So kernels load the same component of neighbouring tokens together. Outside, maps have the shape
`[..., n]` or `[..., n, n]`, as views of that memory, on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def as_maps(components: Tensor, lead: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The view `[*lead, *shape]` of `[k, tokens]`, k and tokens in any number of dimensions.

    Example:
        >>> import torch
        >>> as_maps(torch.empty(4, 6), (2, 3), (2, 2)).stride()
        (3, 1, 12, 6)
    """
    own, count = len(shape), len(shape) + len(lead)
    return components.view(*shape, *lead).permute(*range(own, count), *range(own))


def as_components(maps: Tensor, kept: int) -> Tensor:
    """`[k, tokens]` of maps whose last `kept` dimensions are those of one token.

    Contiguous; a view of maps that lie so already.
    """
    lead, shape = maps.shape[: maps.dim() - kept], maps.shape[maps.dim() - kept :]
    return maps.reshape(math.prod(lead), math.prod(shape)).t().contiguous()
