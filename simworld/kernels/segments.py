"""Sums over the edges that end at each node."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Return [num_segments, k]: the sum of the rows of `values` [e, k] that share an `index` [e].

    Differentiable in `values`. Segments without rows are zero.
    """
    return values.new_zeros(num_segments, values.shape[1]).index_add_(0, index, values)
