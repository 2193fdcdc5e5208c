# mypy: ignore-errors
"""Warp kernels of message passing, on CPU and CUDA: what lies between the matrix products, one pass over memory each.

Imported where first used, because it imports Warp and builds kernels.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from simworld.kernels.graph_block import LAYER_NORM_EPS, Connections
from simworld.kernels.warp_start import stream_of, wp

THREADS = 128  # of a CUDA block, which share a row


def gather_add_relu(terms: Tensor, connections: Connections, edges: slice, values: Tensor) -> None:
    """Add to `values` [e, h] what sender and receiver contribute, and cut below zero.

    `terms` [2 n, h] are those of each node as sender and as receiver.
    """
    given = [terms, connections.senders[edges], connections.receivers[edges]]
    _launch(_gather_kernel(terms.dtype), values.shape, given, [values])


def normalize_and_sum(
    outputs: Tensor,
    latents: Tensor,
    scale: Tensor,
    shift: Tensor,
    offsets: Tensor,
    updated: Tensor,
    sums: Tensor,
    mean: Tensor,
    deviation: Tensor,
) -> None:
    """Normalize each row of `outputs` [e, l]: the messages, added to `latents` [e, l] and up in `sums` [n, l].

    Receiver i's edges begin at row `offsets` [n] of the rows given and end where the next receiver's begin. Writes
    `updated` [e, l], which may be the latents, and the moments `mean` and `deviation` (its inverse) [e, 1].
    """
    given = [outputs, latents, scale, shift, offsets, len(outputs)]
    kernel = _normalize_kernel(outputs.dtype, outputs.shape[1])
    _launch(kernel, (len(sums),), given, [updated, sums, mean, deviation], tiled=True)


def _launch(
    kernel: wp.Kernel, dim: tuple[int, ...], given: list[Any], written: list[Tensor], *, tiled: bool = False
) -> None:
    arrays = [wp.from_torch(v.detach(), requires_grad=False) if isinstance(v, Tensor) else v for v in given + written]
    device, stream = wp.device_from_torch(written[0].device), stream_of(written[0].device)
    if tiled:
        wp.launch_tiled(kernel, dim=list(dim), inputs=arrays, device=device, stream=stream, block_dim=THREADS)
    else:
        wp.launch(kernel, dim=dim, inputs=arrays, device=device, stream=stream)


@cache
def _gather_kernel(dtype: torch.dtype) -> wp.Kernel:
    number = wp.dtype_from_torch(dtype)

    @wp.kernel(module="unique", enable_backward=False)
    def gather(
        terms: wp.array2d(dtype=number),
        senders: wp.array(dtype=wp.int64),
        receivers: wp.array(dtype=wp.int64),
        values: wp.array2d(dtype=number),
    ):
        edge, column = wp.tid()
        sender = 2 * int(senders[edge])
        receiver = 2 * int(receivers[edge]) + 1
        value = values[edge, column] + terms[sender, column] + terms[receiver, column]
        values[edge, column] = wp.max(value, number(0.0))

    return gather


@cache
def _normalize_kernel(dtype: torch.dtype, width: int) -> wp.Kernel:
    number = wp.dtype_from_torch(dtype)
    share = 1.0 / width

    @wp.kernel(module="unique", enable_backward=False)
    def normalize(
        outputs: wp.array2d(dtype=number),
        latents: wp.array2d(dtype=number),
        scale: wp.array(dtype=number),
        shift: wp.array(dtype=number),
        offsets: wp.array(dtype=wp.int64),
        count: int,
        updated: wp.array2d(dtype=number),
        sums: wp.array2d(dtype=number),
        means: wp.array2d(dtype=number),
        deviations: wp.array2d(dtype=number),
    ):
        node = wp.tid()
        first = int(offsets[node])
        end = count
        if node + 1 < offsets.shape[0]:
            end = int(offsets[node + 1])
        scales = wp.tile_load(scale, shape=width)
        shifts = wp.tile_load(shift, shape=width)
        total = wp.tile_load(sums[node], shape=width)
        for edge in range(first, end):
            row = wp.tile_load(outputs[edge], shape=width)
            mean = wp.tile_sum(row) * number(share)
            row = row - wp.tile_broadcast(mean, shape=(width,))
            variance = wp.tile_sum(wp.tile_map(wp.mul, row, row))
            factor = number(1.0) / wp.sqrt(wp.tile_extract(variance, 0) * number(share) + number(LAYER_NORM_EPS))
            message = wp.tile_map(wp.mul, row * factor, scales) + shifts
            wp.tile_store(updated[edge], wp.tile_load(latents[edge], shape=width) + message)
            total += message
            means[edge, 0] = wp.tile_extract(mean, 0)
            deviations[edge, 0] = factor
        wp.tile_store(sums[node], total)

    return normalize
