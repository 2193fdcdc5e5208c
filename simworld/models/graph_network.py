"""Encode, process, decode: the graph network of GNS (Sanchez-Gonzalez 2020) and MeshGraphNets (Pfaff 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from simworld.kernels.captured import Captured, room_for
from simworld.kernels.edge_blocks import CUDA_EDGES
from simworld.kernels.graph_block import BACKENDS, Connected, Connections, PerceptronWeights, graph_block, perceptron
from simworld.models.partition import parts_of

ROWS_AT_ONCE = 4096  # encoded together without gradients: 2 MiB for each activation of 128


class Perceptron(nn.Module):
    """Linear layers with a ReLU between each two, then a layer norm where asked for."""

    def __init__(self, sizes: Sequence[int], *, norm: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norm = nn.LayerNorm(sizes[-1]) if norm else None

    def weights(self) -> PerceptronWeights:
        """Return the parameters as the kernels take them."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        return PerceptronWeights(
            weights=tuple(layer.weight for layer in linear),
            biases=tuple(layer.bias for layer in linear),
            scale=None if self.norm is None else self.norm.weight,
            shift=None if self.norm is None else self.norm.bias,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n, out] of inputs [n, in]; without gradients no hidden layer of all rows is held."""
        weights = self.weights()
        if torch.is_grad_enabled() or inputs.is_cuda or len(inputs) <= ROWS_AT_ONCE:
            return perceptron(inputs, weights)
        outputs = inputs.new_empty(len(inputs), weights.weights[-1].shape[0])
        for first in range(0, len(inputs), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            outputs[rows] = perceptron(inputs[rows], weights)
        return outputs


class GraphBlock(nn.Module):
    """The networks of one round of messages: one for the edges of each edge set, one for nodes."""

    def __init__(self, latent_size: int, hidden: Sequence[int], num_edge_sets: int = 1) -> None:
        super().__init__()
        edge_sizes = [3 * latent_size, *hidden, latent_size]
        self.edge_networks = nn.ModuleList(Perceptron(edge_sizes) for _ in range(num_edge_sets))
        self.node_network = Perceptron([(1 + num_edge_sets) * latent_size, *hidden, latent_size])

    def forward(
        self, nodes: Tensor, latents: Sequence[Tensor], connections: Sequence[Connections], **how: object
    ) -> tuple[Tensor, list[Tensor]]:
        """Return node latents [n, l] and edge latents [e, l] after this round; `how` are options of `graph_block`."""
        networks = [network.weights() for network in self.edge_networks if isinstance(network, Perceptron)]
        return graph_block(nodes, latents, connections, networks, self.node_network.weights(), **how)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Nodes by scene and kind: `scenes` and `numbers` of the group [n], of which each scene has `per_scene`.

    `weights` [n] add up to 1 in each group that has nodes; those of nodes that are not there are 0.
    """

    scenes: Tensor
    numbers: Tensor
    weights: Tensor
    num_scenes: int
    per_scene: int

    @staticmethod
    def of(scenes: Tensor, kinds: Tensor, present: Tensor, num_scenes: int, num_kinds: int) -> Groups:
        """Return the groups of nodes of given scene, kind and presence, each [n]."""
        numbers = scenes * num_kinds + kinds
        counts = torch.bincount(numbers[present], minlength=num_scenes * num_kinds)
        weights = torch.where(present, 1 / counts.clamp(min=1)[numbers], 0.0)
        return Groups(scenes=scenes, numbers=numbers, weights=weights, num_scenes=num_scenes, per_scene=num_kinds)


class Context(nn.Module):
    """What every node is told of its whole scene at once: a linear map of the mean latents of each kind of nodes.

    It begins as telling nothing, so that a network that was trained without goes on from where it was.
    """

    def __init__(self, latent_size: int, num_kinds: int) -> None:
        super().__init__()
        self.told = nn.Linear(num_kinds * latent_size, latent_size)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, nodes: Tensor, groups: Groups) -> Tensor:
        """Return node latents [n, l] with what they were told added."""
        means = nodes.new_zeros(groups.num_scenes * groups.per_scene, nodes.shape[1])
        means = means.index_add(0, groups.numbers, nodes * groups.weights.to(nodes)[:, None])
        told: Tensor = self.told(means.view(groups.num_scenes, -1))
        return nodes + told.index_select(0, groups.scenes)


class EncodeProcessDecode(nn.Module):
    """A graph network from features of nodes and edges to outputs of nodes, with separate weights for each round.

    Nodes and edges are each encoded by a perceptron. In each of `num_message_passing_steps` rounds, every edge
    sends the layer norm of a perceptron of (receiver, sender, edge); a node adds to itself what a perceptron makes of
    itself and the sum of messages, and an edge adds its message to itself. A last perceptron reads the nodes.

    `edge_inputs` is the number of features of an edge, or of the edges of each set where there are several, which
    have networks of their own; `hidden_size` is `latent_size` where not given. `backend`, `recompute` and
    `edges_at_once` (see `graph_block`) change neither what is computed nor the names of parameters, and may be
    set at any time. So may `nodes_at_once`: a larger graph goes through all rounds in parts of so many nodes, each with
    a halo of as many hops as there are rounds, so that memory is that of a part; halos cost time. Not with gradients.

    With `capture` a pass without gradients is recorded as a CUDA graph and replayed, which saves small scenes the time
    to launch its kernels; it is recorded anew where nodes, settings or many edges come and go. Edge sets of more than
    `edges_at_once`, on CUDA 2^18, are not: to launch what they take is nothing beside it.

    With `num_contexts`, before each of the first so many rounds every node is told the mean latents of each of
    `num_kinds` kinds of nodes in its scene (a `Context`), so that what is far away counts at once.
    """

    def __init__(
        self,
        node_inputs: int,
        edge_inputs: int | Sequence[int],
        outputs: int,
        latent_size: int = 128,
        num_message_passing_steps: int = 10,
        num_hidden_layers: int = 2,
        *,
        hidden_size: int | None = None,
        num_contexts: int = 0,
        num_kinds: int = 1,
        backend: str | None = None,
        recompute: bool = False,
        edges_at_once: int | None = None,
        nodes_at_once: int | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("latent_size", latent_size),
            ("num_message_passing_steps", num_message_passing_steps),
            ("num_hidden_layers", num_hidden_layers),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
        sets = [edge_inputs] if isinstance(edge_inputs, int) else list(edge_inputs)
        hidden = [hidden_size or latent_size] * num_hidden_layers
        self.node_encoder = Perceptron([node_inputs, *hidden, latent_size])
        self.edge_encoders = nn.ModuleList(Perceptron([size, *hidden, latent_size]) for size in sets)
        self.blocks = nn.ModuleList(
            GraphBlock(latent_size, hidden, len(sets)) for _ in range(num_message_passing_steps)
        )
        self.contexts = nn.ModuleList(Context(latent_size, num_kinds) for _ in range(num_contexts))
        self.decoder = Perceptron([latent_size, *hidden, outputs], norm=False)
        self.backend, self.recompute, self.edges_at_once = backend, recompute, edges_at_once
        self.nodes_at_once, self.capture = nodes_at_once, capture
        self._captured = Captured()

    def forward(
        self,
        node_features: Tensor,
        edge_features: Tensor | Sequence[Tensor],
        edges: Connected | Sequence[Connected],
        order: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """Return outputs [n, o] of features of nodes [n, i] and edges [e, j], of one edge set or of each of several.

        `order` [n] lists nodes so that those near each other in it are near in the graph; parts are cut from it.
        Networks with contexts need the `groups` of nodes.
        """
        features = [edge_features] if isinstance(edge_features, Tensor) else list(edge_features)
        given = [edges] if isinstance(edges, Connected) else list(edges)
        if not len(features) == len(given) == len(self.edge_encoders):
            raise ValueError(
                f"The network has {len(self.edge_encoders)} edge sets; got features of {len(features)} and "
                f"edges of {len(given)}."
            )
        connections = [Connections.of(each) for each in given]
        size = self.nodes_at_once
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"nodes_at_once must be a whole number, 1 or more, or None; got {size!r}.")
        if size is None or len(node_features) <= size or torch.is_grad_enabled():
            if self.capture and not torch.is_grad_enabled():
                return self._from_recording(node_features, features, connections)
            return self._outputs(node_features, features, connections, groups)
        if len(self.contexts):
            raise ValueError("Contexts are of whole scenes, which cannot be cut in parts; set nodes_at_once to None.")
        order = torch.arange(len(node_features), device=node_features.device) if order is None else order
        outputs = node_features.new_empty(len(node_features), self.decoder.weights().weights[-1].shape[0])
        for part in parts_of(connections, order, size, len(self.blocks)):
            there = [each[numbers] for each, numbers in zip(features, part.edges, strict=True)]
            found = self._outputs(node_features[part.nodes], there, part.connections)
            outputs[part.nodes[part.own]] = found[part.own]
        return outputs

    def _from_recording(
        self, node_features: Tensor, edge_features: Sequence[Tensor], connections: Sequence[Connections]
    ) -> Tensor:
        if len(self.contexts):
            raise ValueError("Contexts are of the scenes at hand, which no recording knows; set capture to False.")
        most = self.edges_at_once or CUDA_EDGES
        if any(room_for(len(each)) > most for each in edge_features):
            return self._outputs(node_features, edge_features, connections)
        addresses = tuple(each.data_ptr() for each in self.parameters())
        kept = torch.is_inference_mode_enabled()  # what is made there cannot be written to elsewhere
        settings = (self.backend, self.edges_at_once, torch.get_float32_matmul_precision(), kept, addresses)
        return self._captured(self._outputs, settings, node_features, edge_features, connections)

    def _outputs(
        self,
        node_features: Tensor,
        edge_features: Sequence[Tensor],
        connections: Sequence[Connections],
        groups: Groups | None = None,
    ) -> Tensor:
        nodes = self.node_encoder(node_features)
        latents = [encoder(each) for encoder, each in zip(self.edge_encoders, edge_features, strict=True)]
        how = {"backend": self.backend, "recompute": self.recompute, "edges_at_once": self.edges_at_once}
        in_place = not torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            if number < len(self.contexts):
                nodes = self.contexts[number](nodes, groups)
            nodes, latents = block(nodes, latents, connections, **how, in_place=in_place)
        outputs: Tensor = self.decoder(nodes)
        return outputs
