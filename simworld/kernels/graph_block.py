"""One round of a graph network: messages along edges, their sums at nodes, residual updates of both.

The processor step of Graph Network-based Simulators (Sanchez-Gonzalez et al., ICML 2020) and MeshGraphNets
(Pfaff et al., ICLR 2021). `graph_block_reference` defines it; `graph_block` computes the same faster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

LAYER_NORM_EPS = 1e-5


class PerceptronWeights(NamedTuple):
    """Weights of linear layers with a ReLU between each two, and of the layer norm after them, if any.

    `weights` are [out, in] and `biases` [out], as `nn.Linear` keeps them; `scale` and `shift` are [out] of the last.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None


@runtime_checkable
class Connected(Protocol):
    """What tells who sends to whom: edges sorted by receiver, and the first edge of each receiver."""

    @property
    def senders(self) -> Tensor:
        """Senders [e]."""

    @property
    def receivers(self) -> Tensor:
        """Receivers [e], ascending."""

    @property
    def starts(self) -> Tensor:
        """First edge [n] of each receiver."""


class Block(NamedTuple):
    """Consecutive edges, the receivers they may belong to, and where in the block each receiver's edges begin."""

    edges: slice
    nodes: slice
    offsets: Tensor

    @property
    def num_edges(self) -> int:
        """Return how many edges there are."""
        return int(self.edges.stop - self.edges.start)


@dataclass(frozen=True, kw_only=True, eq=False)
class Connections:
    """Edges sorted by receiver, with what the rounds of a forward pass need of them, worked out once.

    `senders` and `receivers` are [e], `starts` [n] is the first edge of each receiver.
    """

    senders: Tensor
    receivers: Tensor
    starts: Tensor

    @staticmethod
    def of(edges: Connected) -> Connections:
        """Return the connections of anything that has senders, receivers and starts."""
        if isinstance(edges, Connections):
            return edges
        return Connections(senders=edges.senders, receivers=edges.receivers, starts=edges.starts)

    @cached_property
    def ends(self) -> Tensor:
        """Return [2 e]: in turn the row of each edge's sender and receiver in a table [2 n] that has nodes as both."""
        return torch.stack([2 * self.senders, 2 * self.receivers + 1], 1).flatten()

    @cached_property
    def _planned(self) -> dict[int, list[Block]]:
        return {}

    def blocks(self, size: int) -> list[Block]:
        """Return the edges in blocks of `size`, cut anywhere: a receiver's edges may lie in several."""
        if len(self.senders) <= size:  # no value is read, which a recording for CUDA could not
            whole = Block(slice(0, len(self.senders)), slice(0, len(self.starts)), self.starts)
            return [whole] if len(self.senders) else []
        if size not in self._planned:
            cuts = list(range(0, len(self.senders), size))
            ends = [min(cut + size, len(self.senders)) for cut in cuts]
            firsts = self.receivers[cuts].tolist()
            lasts = self.receivers[[end - 1 for end in ends]].tolist()
            self._planned[size] = [
                Block(slice(cut, end), slice(first, last + 1), (self.starts[first : last + 1] - cut).clamp_(0))
                for cut, end, first, last in zip(cuts, ends, firsts, lasts, strict=True)
            ]
        return self._planned[size]


Messages = Callable[[Tensor, Tensor, Connections, PerceptronWeights], tuple[Tensor, Tensor]]
"""(nodes [n, l], latents [e, l], connections, network) -> sums of messages [n, l], updated latents [e, l]."""

FEW = 2**15  # numbers in an edge set's latents, up to which the definition itself has less overhead on CPU
TRITON_VERSION, TRITON_CAPABILITY = (3, 4), (8, 0)  # the oldest tried; of products of TF32 and bfloat16
TRITON_WIDTH = 128  # of layers whose weights fit in shared memory
BACKENDS = ("blocks", "warp", "triton", "scatter", "torch")


def graph_block(
    nodes: Tensor,
    latents: Sequence[Tensor],
    connections: Sequence[Connections],
    edge_networks: Sequence[PerceptronWeights],
    node_network: PerceptronWeights,
    *,
    backend: str | None = None,
    recompute: bool = False,
    in_place: bool = False,
    edges_at_once: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return node latents [n, l] and the edge latents [e, l] of each edge set after one round.

    Columns of an edge network's first weight stand for receiver, sender and edge, in this order; those of the
    node network's for the node and for the sums of each edge set. `backend` is one of `BACKENDS`: "blocks" goes
    through the edges a cache-full at a time, "warp" does so with fused Warp kernels, "triton" is one kernel for all
    that happens along an edge (CUDA, float32 or bfloat16; see graph_block_triton), "scatter" uses
    torch_scatter, "torch" is the definition itself. None chooses on CUDA "triton" where it multiplies in TF32 or
    bfloat16, as the tensors or torch.set_float32_matmul_precision say, and otherwise "warp"; on CPU "blocks" for each
    edge set but small ones and networks without a layer norm, for which it is "torch".

    The first three are differentiable once. Two keep each edge's activations for the gradient, unless told to
    `recompute` them, "triton" always does; without gradients they hold no more than the latents of all edges, which
    `in_place` overwrites. `edges_at_once` is the size of the blocks, by default what fits the cache.

    Raises:
        ImportError: torch_scatter or triton is asked for and not installed.
        ValueError: there is no such backend, it cannot compute what is given, or `in_place` with gradients enabled.
    """
    if in_place and torch.is_grad_enabled():
        raise ValueError("in_place overwrites edge latents that gradients need; use it under torch.no_grad().")
    messages = _messages(_chosen(backend, nodes, edge_networks), recompute, in_place, edges_at_once)
    if backend is None and not (nodes.is_cuda or recompute or edges_at_once):
        messages = _plain_if_few(messages)
    return _block(nodes, latents, connections, edge_networks, node_network, messages)


def graph_block_reference(
    nodes: Tensor,
    latents: Sequence[Tensor],
    connections: Sequence[Connections],
    edge_networks: Sequence[PerceptronWeights],
    node_network: PerceptronWeights,
) -> tuple[Tensor, list[Tensor]]:
    """Define `graph_block`: what each edge sees is laid side by side, passed on, and added up at its receiver."""
    return _block(nodes, latents, connections, edge_networks, node_network, _plain_messages)


def perceptron(inputs: Tensor, network: PerceptronWeights, *beside: Tensor) -> Tensor:
    """Return [n, out]: linear layers with a ReLU between each two, then a layer norm where the network has one.

    What is `beside` the inputs [n, in] is more columns of them.
    """
    if _adds_up(inputs):  # to lay columns side by side takes longer than to multiply each by itself
        first = torch.split(network.weights[0], [inputs.shape[1], *(more.shape[1] for more in beside)], 1)
        hidden = affine(inputs, first[0], network.biases[0])
        for more, weight in zip(beside, first[1:], strict=True):
            hidden = hidden.addmm_(more, weight.t())
    else:
        hidden = affine(torch.cat([inputs, *beside], 1), network.weights[0], network.biases[0])
    for weight, bias in zip(network.weights[1:], network.biases[1:], strict=True):
        hidden = affine(hidden.relu_(), weight, bias)
    if network.scale is None:
        return hidden
    return functional.layer_norm(hidden, hidden.shape[1:], network.scale, network.shift, LAYER_NORM_EPS)


def affine(inputs: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return `functional.linear` of inputs [n, in], in `out` where given; the bias may be [n, out] as well.

    On CPU that lays the bias out before it multiplies; to add it to the product takes less time.
    """
    if _adds_up(inputs):
        return torch.mm(inputs, weight.t(), out=out).add_(bias)
    return torch.addmm(bias, inputs, weight.t(), out=out)


def _adds_up(inputs: Tensor) -> bool:
    """Return whether sums are better formed one by one: neither on CUDA nor where each is rounded to half precision."""
    return not inputs.is_cuda and inputs.dtype.itemsize > 2


def _block(
    nodes: Tensor,
    latents: Sequence[Tensor],
    connections: Sequence[Connections],
    edge_networks: Sequence[PerceptronWeights],
    node_network: PerceptronWeights,
    messages: Messages,
) -> tuple[Tensor, list[Tensor]]:
    heard = [messages(nodes, *each) for each in zip(latents, connections, edge_networks, strict=True)]
    heard_at = [sums for sums, _ in heard]
    return nodes + perceptron(nodes, node_network, *heard_at), [updated for _, updated in heard]


def _messages(backend: str, recompute: bool, in_place: bool, edges_at_once: int | None) -> Messages:
    if backend == "torch":
        return _plain_messages
    if backend == "scatter":
        return _scatter_messages
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    from simworld.kernels.edge_blocks import BlockMessages

    return BlockMessages(backend=backend, recompute=recompute, in_place=in_place, size=edges_at_once)


def _chosen(backend: str | None, nodes: Tensor, networks: Sequence[PerceptronWeights]) -> str:
    if backend is None and not nodes.is_cuda:
        return "blocks"
    if backend not in (None, "triton"):
        return backend
    hindrance = _against_triton(nodes, networks)
    if backend and hindrance:
        raise hindrance
    # Three products for each in float32 need more registers than there are, by the compiler's count.
    exact = nodes.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "warp" if hindrance or (exact and backend is None) else "triton"


@cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # that of PyTorch's nightly builds has another name
        return True
    return tuple(int(part) for part in version.split(".")[:2]) >= TRITON_VERSION


def _against_triton(nodes: Tensor, networks: Sequence[PerceptronWeights]) -> Exception | None:
    """Return the error to raise where the Triton kernel cannot compute this; None where it can."""
    if not _has_triton():
        return ImportError(
            f"The triton backend needs triton {'.'.join(map(str, TRITON_VERSION))} or newer, which PyTorch for CUDA "
            "brings along on Linux: pip install triton; or leave backend out."
        )
    widest = max((max(w.shape[0] for w in network.weights) for network in networks), default=0)
    reason = ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not nodes.is_cuda:
            reason = f"computes on CUDA; got tensors on {nodes.device}"
        elif torch.cuda.get_device_capability(nodes.device) < TRITON_CAPABILITY:
            reason = f"needs a GPU of compute capability {'.'.join(map(str, TRITON_CAPABILITY))} or newer"
        elif nodes.dtype not in (torch.float32, torch.bfloat16):
            reason = f"computes in float32 and bfloat16; got {nodes.dtype}"
    if widest > TRITON_WIDTH:
        reason = f"takes layers of up to {TRITON_WIDTH} outputs, which fit on a chip; got {widest}"
    return ValueError(f"The triton backend {reason}; leave backend out, or choose 'warp'.") if reason else None


def _plain_if_few(otherwise: Messages) -> Messages:
    def messages(
        nodes: Tensor, latents: Tensor, connections: Connections, network: PerceptronWeights
    ) -> tuple[Tensor, Tensor]:
        chosen = _plain_messages if latents.numel() <= FEW or network.scale is None else otherwise
        return chosen(nodes, latents, connections, network)

    return messages


def _plain_messages(
    nodes: Tensor, latents: Tensor, connections: Connections, network: PerceptronWeights
) -> tuple[Tensor, Tensor]:
    messages = _each_message(nodes, latents, connections, network)
    sums = messages.new_zeros(len(nodes), messages.shape[1]).index_add(0, connections.receivers, messages)
    return sums, latents + messages


def _scatter_messages(
    nodes: Tensor, latents: Tensor, connections: Connections, network: PerceptronWeights
) -> tuple[Tensor, Tensor]:
    try:
        from torch_scatter import segment_csr  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError("The scatter backend needs torch_scatter: pip install 'simworld[scatter]'.") from error
    messages = _each_message(nodes, latents, connections, network)
    starts = connections.starts
    bounds = torch.cat([starts, starts.new_tensor([len(messages)])])
    return segment_csr(messages, bounds, reduce="sum"), latents + messages


def _each_message(nodes: Tensor, latents: Tensor, connections: Connections, network: PerceptronWeights) -> Tensor:
    seen = [nodes.index_select(0, connections.receivers), nodes.index_select(0, connections.senders), latents]
    return perceptron(torch.cat(seen, 1), network)
