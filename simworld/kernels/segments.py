"""Gathers to edges and sums back to nodes: the memory traffic of message passing."""

import torch
from torch import Tensor

FEW_ROWS = 512  # under which the plain version is the faster one


def segment_sum(values: Tensor, starts: Tensor) -> Tensor:
    """Return [n, k]: sums of consecutive rows of `values` [e, k]; segment i begins at row `starts` [n].

    Each segment ends where the next begins, the last at the end, as rows sorted by receiver do. Segments
    without rows are zero. Differentiable in `values`.
    """
    rows = torch.arange(values.shape[0], device=values.device)
    return torch.embedding_bag(values, rows, starts)[0]


def segment_sum_reference(values: Tensor, starts: Tensor) -> Tensor:
    """Define `segment_sum`: number the rows by segment and add each where its number says."""
    ends = torch.cat([starts[1:], starts.new_tensor([len(values)])])
    index = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), ends - starts)
    return values.new_zeros(len(starts), values.shape[1]).index_add_(0, index, values)


def gather_sum(values: Tensor, index: Tensor) -> Tensor:
    """Return [e, k]: for each row of `index` [e, j], the sum of the j rows of `values` [n, k] it names.

    Differentiable in `values`.
    """
    if index.shape[0] < FEW_ROWS:
        return gather_sum_reference(values, index)
    starts = torch.arange(0, index.numel(), index.shape[1], device=index.device)
    return torch.embedding_bag(values, index.flatten(), starts)[0]


def gather_sum_reference(values: Tensor, index: Tensor) -> Tensor:
    """Define `gather_sum`: look the rows up, then add them."""
    return values.index_select(0, index.flatten()).view(*index.shape, values.shape[1]).sum(1)
