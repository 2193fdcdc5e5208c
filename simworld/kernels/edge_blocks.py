"""Messages along edges, a cache-full of edges at a time: the fast backends of `graph_block`.

The first layer is linear in what a sender, a receiver and an edge are, so the terms of the first two are
worked out once per node and only looked up and added per edge. Edges go through all layers in blocks whose activations
stay in the cache; sums at receivers, the residual update of edges and all gradients are formed on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simworld.kernels.graph_block import LAYER_NORM_EPS, Block, Connections, PerceptronWeights, affine

BLOCK_BYTES = 2**20  # of one activation of a block, for each CPU thread: the few at hand stay in the outer cache
CUDA_EDGES = 2**18  # keeps a large accelerator busy; 128 MiB for each activation of 128


@dataclass(frozen=True)
class BlockMessages:
    """How messages are computed: what `graph_block` was asked for, by blocks or the kernels of Warp or Triton."""

    backend: str
    recompute: bool
    in_place: bool
    size: int | None

    def __call__(
        self, nodes: Tensor, latents: Tensor, connections: Connections, network: PerceptronWeights
    ) -> tuple[Tensor, Tensor]:
        """Return sums of messages [n, l] and updated edge latents [e, l]."""
        if network.scale is None or network.shift is None:
            raise ValueError("An edge network needs a layer norm for this backend; use backend='torch'.")
        width = nodes.shape[1]
        first = network.weights[0]
        ends = torch.cat([first[:, width : 2 * width], first[:, :width]])
        bias = torch.cat([torch.zeros_like(network.biases[0]), network.biases[0]])
        terms = affine(nodes, ends, bias).view(2 * len(nodes), len(first))
        later = [t for pair in zip(network.weights[1:], network.biases[1:], strict=True) for t in pair]
        weights = (first[:, 2 * width :], *later, network.scale, network.shift)
        latents = latents.contiguous()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (terms, latents, *weights)):
            return _EdgeMessages.apply(self, connections, latents, terms, *weights)  # type: ignore[no-untyped-call,no-any-return]
        updated = latents if self.in_place else torch.empty_like(latents)
        return self.forward(connections, latents, terms, _Layers.of(weights), updated, None), updated

    def edges_at_once(self, latents: Tensor, layers: _Layers) -> int:
        """Return how many edges a block has, where not said: as many as the cache holds."""
        if self.size is not None or latents.is_cuda:
            return self.size or CUDA_EDGES
        width = max(weight.shape[0] for weight in layers.weights)
        return max(1, BLOCK_BYTES * torch.get_num_threads() // (width * latents.element_size()))

    def forward(
        self,
        connections: Connections,
        latents: Tensor,
        terms: Tensor,
        layers: _Layers,
        updated: Tensor,
        kept: Sequence[_Kept] | None,
    ) -> Tensor:
        """Return sums of messages [n, l]; write edge latents to `updated` and each block's activations to `kept`."""
        if self.backend == "triton":
            from simworld.kernels.graph_block_triton import edge_update

            norm = (layers.scale, layers.shift)
            return edge_update(connections, latents, terms, layers.weights, layers.biases, norm, updated)
        size = self.edges_at_once(latents, layers)
        room = _Kept.room(latents, layers, min(size, len(latents)))
        gather = _Gather(connections, terms, size, self.backend)
        sums = latents.new_zeros(len(connections.starts), layers.scale.shape[0])
        rows = torch.arange(size, device=latents.device)
        for number, block in enumerate(connections.blocks(size)):
            here = room.first(block.num_edges) if kept is None else kept[number]
            _activate(gather, block, latents[block.edges], layers, here)
            if self.backend == "warp":
                from simworld.kernels.graph_block_warp import normalize_and_sum

                normalize_and_sum(
                    here.activations[-1], latents[block.edges], layers.scale, layers.shift, block.offsets,
                    updated[block.edges], sums[block.nodes], here.mean, here.deviation,
                )  # fmt: skip
                continue
            messages, mean, deviation = _normalize(here.activations[-1], layers)
            sums[block.nodes] += torch.embedding_bag(messages, rows[: len(messages)], block.offsets)[0]
            torch.add(latents[block.edges], messages, out=updated[block.edges])
            here.mean.copy_(mean)
            here.deviation.copy_(deviation)
        return sums

    def backward(
        self,
        connections: Connections,
        latents: Tensor,
        terms: Tensor,
        layers: _Layers,
        kept: Sequence[_Kept] | None,
        from_sums: Tensor,
        from_updated: Tensor | None,
    ) -> tuple[Tensor, Tensor, _Layers]:
        """Return the gradients of the latents [e, l], of the terms [2 n, h] and of the layers."""
        size = self.edges_at_once(latents, layers)
        at_once = min(size, len(latents))
        room = _Kept.room(latents, layers, at_once)
        gather = _Gather(connections, terms, size, self.backend)
        work = [latents.new_empty(at_once, max(w.shape[0] for w in layers.weights)) for _ in range(2)]
        rows = torch.arange(size, device=latents.device)
        to_layers, to_terms, to_latents = layers.zeros(), torch.zeros_like(terms), torch.empty_like(latents)
        to_senders, to_receivers = to_terms.view(-1, 2, to_terms.shape[1]).unbind(1)
        for number, block in enumerate(connections.blocks(size)):
            here = room.first(block.num_edges) if kept is None else kept[number]
            if kept is None:
                _activate(gather, block, latents[block.edges], layers, here)
                here = _Kept(here.activations, *_normalize(here.activations[-1], layers)[1:])
            gradient = from_sums.index_select(0, connections.receivers[block.edges])
            if from_updated is not None:
                gradient += from_updated[block.edges]
            gradient = _layers_backward(gradient, here, latents[block.edges], layers, to_layers, work)
            if from_updated is None:
                torch.mm(gradient, layers.weights[0], out=to_latents[block.edges])
            else:
                torch.addmm(from_updated[block.edges], gradient, layers.weights[0], out=to_latents[block.edges])
            to_receivers[block.nodes] += torch.embedding_bag(gradient, rows[: len(gradient)], block.offsets)[0]
            to_senders.index_add_(0, connections.senders[block.edges], gradient)
        return to_latents, to_terms, to_layers


class _Layers(NamedTuple):
    """The first layer's weight for edge latents, the other layers', and the layer norm's."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(flat: tuple[Tensor, ...]) -> _Layers:
        return _Layers((flat[0], *flat[1:-2:2]), flat[2:-2:2], *flat[-2:])

    def flat(self) -> tuple[Tensor, ...]:
        later = [t for pair in zip(self.weights[1:], self.biases, strict=True) for t in pair]
        return (self.weights[0], *later, self.scale, self.shift)

    def zeros(self) -> _Layers:
        return _Layers.of(tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in self.flat()))


class _Kept(NamedTuple):
    """Outputs [e, h] of each layer after its ReLU, the last's before its layer norm, and that norm's moments [e, 1]."""

    activations: tuple[Tensor, ...]
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def room(like: Tensor, layers: _Layers, count: int) -> _Kept:
        outputs = tuple(like.new_empty(count, weight.shape[0]) for weight in layers.weights)
        return _Kept(outputs, like.new_empty(count, 1), like.new_empty(count, 1))

    def first(self, count: int) -> _Kept:
        return _Kept(tuple(t[:count] for t in self.activations), self.mean[:count], self.deviation[:count])


class _Gather:
    """Looks up and adds what each edge's two ends contribute."""

    def __init__(self, connections: Connections, terms: Tensor, size: int, backend: str) -> None:
        self.connections, self.terms, self.backend = connections, terms.detach(), backend
        self.pairs = torch.arange(0, 2 * size, 2, device=terms.device)

    def __call__(self, block: Block, latents: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Return `out` [e, h], the first layer's output after its ReLU."""
        start, stop = block.edges.start, block.edges.stop
        if self.backend == "warp":
            from simworld.kernels.graph_block_warp import gather_add_relu

            torch.mm(latents, weight.t(), out=out)
            gather_add_relu(self.terms, self.connections, block.edges, out)
            return out
        ends = self.connections.ends[2 * start : 2 * stop]
        gathered = torch.embedding_bag(self.terms, ends, self.pairs[: stop - start])[0]
        return affine(latents, weight, gathered, out=out).relu_()


def _activate(gather: _Gather, block: Block, latents: Tensor, layers: _Layers, into: _Kept) -> None:
    hidden = gather(block, latents, layers.weights[0], into.activations[0])
    for number, bias in enumerate(layers.biases, start=1):
        hidden = affine(hidden, layers.weights[number], bias, out=into.activations[number])
        if number < len(layers.biases):
            hidden.relu_()


def _normalize(outputs: Tensor, layers: _Layers) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(outputs, outputs.shape[1:], layers.scale, layers.shift, LAYER_NORM_EPS)


def _layers_backward(
    gradient: Tensor, kept: _Kept, latents: Tensor, layers: _Layers, to_layers: _Layers, work: list[Tensor]
) -> Tensor:
    """Return the gradient [e, h] of what the first ReLU took, given that of the messages; add up the layers'."""
    gradient, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
        gradient, kept.activations[-1], gradient.shape[1:], kept.mean, kept.deviation,
        layers.scale, layers.shift, [True, True, True],
    )  # fmt: skip
    to_layers.scale.add_(to_scale)
    to_layers.shift.add_(to_shift)
    for number in range(len(layers.biases), 0, -1):
        inputs, weight = kept.activations[number - 1], layers.weights[number]
        to_layers.weights[number].addmm_(gradient.t(), inputs)
        to_layers.biases[number - 1].add_(gradient.sum(0))
        out = work[number % 2].flatten()[: len(inputs) * weight.shape[1]].view(len(inputs), -1)
        torch.mm(gradient, weight, out=out)
        gradient = torch.ops.aten.threshold_backward.grad_input(out, inputs, 0, grad_input=out)
    to_layers.weights[0].addmm_(gradient.t(), latents)
    return gradient


class _EdgeMessages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: BlockMessages, connections: Connections, latents: Tensor, terms: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        layers = _Layers.of(weights)
        size = how.edges_at_once(latents, layers)
        how = replace(how, size=size)  # on the way back, too, whatever torch is set to by then
        # By block: memory of whole edge sets would go back to the system after each step, and come back cleared.
        blocks = [] if how.recompute or how.backend == "triton" else connections.blocks(size)
        kept = [_Kept.room(latents, layers, block.num_edges) for block in blocks]
        updated = torch.empty_like(latents)
        sums = how.forward(connections, latents, terms, layers, updated, kept or None)
        ctx.how, ctx.connections, ctx.num_weights = how, connections, len(weights)
        ctx.set_materialize_grads(False)
        saved = [t for each in kept for t in (*each.activations, each.mean, each.deviation)]
        ctx.save_for_backward(latents, terms, *weights, *saved)
        return sums, updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_sums: Tensor | None, from_updated: Tensor | None) -> tuple[Tensor | None, ...]:
        latents, terms, *rest = ctx.saved_tensors
        weights, saved = tuple(rest[: ctx.num_weights]), rest[ctx.num_weights :]
        layers = _Layers.of(weights)
        each = len(layers.weights) + 2
        parts = [saved[first : first + each] for first in range(0, len(saved), each)]
        kept = [_Kept(tuple(part[:-2]), *part[-2:]) for part in parts] or None
        if from_sums is None:
            from_sums = latents.new_zeros(len(ctx.connections.starts), len(layers.scale))
        to_latents, to_terms, to_layers = ctx.how.backward(
            ctx.connections, latents, terms, layers, kept, from_sums, from_updated
        )
        return (None, None, to_latents, to_terms, *to_layers.flat())
