# mypy: ignore-errors
"""The messages of one round as a single Triton kernel, for CUDA: an edge's activations never leave the chip.

A program owns a few consecutive receivers. It goes through their edges, which are sorted by receiver and so lie side
by side, a tile at a time: looks up and adds what sender and receiver contribute to the first layer, passes the tile
through all layers and the layer norm, writes the updated edges and adds the messages up. Each sum is thus formed by
one program in the order of the edges, without atomics, and comes out the same each time. What it costs: a receiver
with very many edges keeps one program busy while others are done.

Matrix products of float32 are what torch.set_float32_matmul_precision says. "high" rounds factors to TF32 and "medium"
to bfloat16. "highest", the default, splits each number into two of TF32 and makes three products, which comes near
float32. Compiled for latents of 128, none of them fits into registers entirely, and this one by far not, so it is not
chosen unless asked for. What is bfloat16 itself is multiplied as it is. All is accumulated, normalized and summed
in float32. Float64 is the interpreter's only.

The gradient is not here: blocks of edges are computed again through PyTorch (see edge_blocks), so that nothing but
inputs is kept for it, at the price of a second pass forward. It adds at senders as PyTorch does, on CUDA by atomics.

Tested in Triton's interpreter, on CPU, and compiled for GPUs; not yet run or timed on one. Imported where first used,
because it imports Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton  # noqa: TID253 (this module is itself imported late)
import triton.language as tl  # noqa: TID253
from torch import Tensor
from torch.nn import functional

from simworld.kernels.graph_block import LAYER_NORM_EPS, Connections

TILE = 64  # edges
ROWS = 16  # the fewest that a matrix product has
MOST_OWNED = 32  # receivers of a program
PROGRAMS = 4  # wanted at least for each multiprocessor
PRODUCTS = {"highest": "split", "high": "tf32", "medium": "bf16"}
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which Triton, too, looks at only once
TF32 = -(2**13)  # the bits of a float32 that a TF32 has
WORKING = 5 * 2**14  # bytes of shared memory, beside weights that stay there


def edge_update(
    connections: Connections,
    latents: Tensor,
    terms: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm: tuple[Tensor, Tensor],
    updated: Tensor,
) -> Tensor:
    """Return sums of messages [n, l]; write latents [e, l] and messages together to `updated`, which may be `latents`.

    `terms` [2 n, h] is what each node contributes to the first layer as sender and, with its bias, as receiver.
    `weights` are [out, in], the first only of the edge's latents; `biases` are those of the other layers; `norm` is
    scale and shift [l].
    """
    count, width, products = len(connections.starts), _power(weights), _products(latents.dtype)
    sums = latents.new_empty(count, latents.shape[1])
    exact = torch.float64 if latents.dtype == torch.float64 else torch.float32
    matrices = _padded(weights, width).to(torch.bfloat16 if products == "bf16" else exact)
    if products == "split":
        high = (matrices.view(torch.int32) & TF32).view(torch.float32)
        matrices = torch.cat([high, matrices - high])
    vectors = _padded([*biases, *norm], width).to(exact)
    graph = (t.contiguous() for t in (connections.senders, connections.receivers, connections.starts))
    owned = min(MOST_OWNED, triton.next_power_of_2(max(1, count // _programs(latents.device))))
    if count:
        _edge_update[(triton.cdiv(count, owned),)](
            latents, terms, *graph, matrices, vectors, updated, sums, count, len(latents),
            LATENT=latents.shape[1], HIDDEN=terms.shape[1], WIDTH=width, LAYERS=len(weights),
            OWNED=owned, HELD=max(ROWS, owned), EDGES=TILE, PRODUCTS=products,
            KEPT=products == "bf16" and _fits(matrices), EPS=LAYER_NORM_EPS,
            num_warps=8 if width >= 128 else 4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return sums


def _programs(device: torch.device) -> int:
    """Return how many programs there should be at least; the interpreter, on a CPU, runs them in turn."""
    if device.type == "cpu":
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _fits(matrices: Tensor) -> bool:
    """Return whether the weights may stay in shared memory; else each tile reads them anew, from a cache."""
    if not matrices.is_cuda:
        return True
    properties = torch.cuda.get_device_properties(matrices.device)
    return matrices.nbytes + WORKING < getattr(properties, "shared_memory_per_multiprocessor", 0)


def _padded(tensors: Sequence[Tensor], width: int) -> Tensor:
    """Return tensors as one, each filled up with zeros to `width` along every axis."""
    return torch.stack(
        [functional.pad(t, [n for size in reversed(t.shape) for n in (0, width - size)]) for t in tensors]
    )


def _power(weights: Sequence[Tensor]) -> int:
    return max(ROWS, triton.next_power_of_2(max(max(weight.shape) for weight in weights)))


def _products(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return PRODUCTS[torch.get_float32_matmul_precision()]
    return "ieee" if dtype == torch.float64 else "bf16"


@triton.jit
def _split(a):
    high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def _product(a, matrices, kept, layer: tl.constexpr, at, LAYERS: tl.constexpr, WIDTH: tl.constexpr, HOW: tl.constexpr):
    """Return a [e, i] times the transpose of a layer's weight [o, i]."""
    HALF: tl.constexpr = LAYERS * WIDTH * WIDTH
    b = kept[layer] if len(kept) else tl.load(matrices + layer * WIDTH * WIDTH + at)
    if HOW == "split":
        high, low = _split(a)
        made = tl.dot(low, b, input_precision="tf32")
        made = tl.dot(high, tl.load(matrices + HALF + layer * WIDTH * WIDTH + at), made, input_precision="tf32")
        made = tl.dot(high, b, made, input_precision="tf32")
    elif HOW == "bf16" and INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as whole numbers
        made = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.float32))
    elif HOW == "bf16":
        made = tl.dot(a.to(tl.bfloat16), b)
    else:
        made = tl.dot(a, b, input_precision=HOW)
    return made


@triton.jit
def _summed(heard, message, HOW: tl.constexpr):
    """Return sums [n, l] of the messages [e, l] that each receiver has heard [n, e], 0 or 1, to the last bit or so."""
    if HOW == "ieee":
        made = tl.dot(heard, message, input_precision="ieee")
    else:
        high, low = _split(message)
        made = tl.dot(heard, low, input_precision="tf32")
        made = tl.dot(heard, high, made, input_precision="tf32")
    return made


@triton.jit
def _edge_update(
    latents, terms, senders, receivers, starts, matrices, vectors, updated, sums, count, num_edges,
    LATENT: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, LAYERS: tl.constexpr,
    OWNED: tl.constexpr, HELD: tl.constexpr, EDGES: tl.constexpr, PRODUCTS: tl.constexpr, KEPT: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    exact: tl.constexpr = matrices.dtype.element_ty if PRODUCTS != "bf16" else tl.float32
    first = tl.program_id(0).to(tl.int64) * OWNED
    after = first + OWNED
    begin = tl.load(starts + first)
    end = tl.load(starts + after, mask=after < count, other=num_edges)
    columns, inner, held = tl.arange(0, WIDTH), tl.arange(0, WIDTH), tl.arange(0, HELD)
    weight = inner[:, None] + columns[None, :] * WIDTH
    latent, hidden = columns < LATENT, columns < HIDDEN
    scale = tl.load(vectors + (LAYERS - 1) * WIDTH + columns)
    shift = tl.load(vectors + LAYERS * WIDTH + columns)
    kept = ()
    if KEPT:
        for layer in tl.static_range(LAYERS):
            kept = kept + (tl.load(matrices + layer * WIDTH * WIDTH + weight),)
    total = tl.zeros([HELD, WIDTH], exact)
    for tile in range(begin, end, EDGES):
        edges = tile + tl.arange(0, EDGES)
        here = edges < end
        at = edges[:, None] * LATENT + columns[None, :]
        known = here[:, None] & latent[None, :]
        seen = here[:, None] & hidden[None, :]
        sender = tl.load(senders + edges, mask=here, other=0)
        receiver = tl.load(receivers + edges, mask=here, other=0)
        before = tl.load(latents + at, mask=known, other=0.0).to(exact)
        values = tl.load(terms + 2 * sender[:, None] * HIDDEN + columns[None, :], mask=seen, other=0.0).to(exact)
        values += tl.load(terms + (2 * receiver[:, None] + 1) * HIDDEN + columns[None, :], mask=seen, other=0.0)
        values += _product(before, matrices, kept, 0, weight, LAYERS, WIDTH, PRODUCTS)
        for layer in tl.static_range(1, LAYERS):
            values = tl.maximum(values, 0.0)
            bias = tl.load(vectors + (layer - 1) * WIDTH + columns)
            values = _product(values, matrices, kept, layer, weight, LAYERS, WIDTH, PRODUCTS) + bias[None, :]
        # Columns past the latents are zero, by the padding of the weights, until the mean is taken away.
        values = tl.where(latent[None, :], values - (tl.sum(values, 1) / LATENT)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(values * values, 1) / LATENT + EPS)
        message = values / deviation[:, None] * scale[None, :] + shift[None, :]
        tl.store(updated + at, before + message, mask=known)
        heard = (receiver - first)[None, :] == held[:, None]
        heard = tl.where(heard & here[None, :], 1.0, 0.0).to(exact)
        total += _summed(heard, message, PRODUCTS)
    nodes = first + held
    mine = (held < OWNED) & (nodes < count)
    tl.store(sums + nodes[:, None] * LATENT + columns[None, :], total, mask=mine[:, None] & latent[None, :])
