"""A network's pass over a graph as a single CUDA graph: recorded once, then replayed by one launch for each step.

A step of a small scene is hundreds of kernels of a few microseconds each, which take longer to launch than to run. A
recording has fixed shapes and addresses, while the edges of particles come and go. So it has room for more edges than
there are, and those that are not there lie among nodes that nobody reads. `Captured` decides when a recording is made.

On a CPU nothing is recorded: the padded pass itself is run, which is how it is tested; not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simworld.kernels.graph_block import Connections

ROOM = 1.1  # for how many edges there is room, over how many there are when a recording is made
HEARD = 64  # padding edges that end at one node: as many as a tile of the Triton kernel has
WARM_UPS = 3  # passes before a recording, in which kernels are compiled and loaded

Pass = Callable[[Tensor, list[Tensor], list[Connections]], Tensor]
"""(features of nodes [n, i], features [e, j] of each edge set, their connections) -> outputs [n, o], no value read."""


class Captured:
    """Keeps the last recording of a pass, and makes another where shapes, addresses or settings are others."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._recording: _Recording | None = None

    def __reduce__(self) -> tuple[type[Captured], tuple[()]]:
        """Copy without the recording, which is bound to the memory of one network."""
        return Captured, ()

    def __call__(
        self, run: Pass, settings: Hashable, nodes: Tensor, features: Sequence[Tensor], edges: Sequence[Connections]
    ) -> Tensor:
        """Return what `run` returns. `settings` is all that it depends on beside these arguments and values."""
        key = (settings, nodes.shape, nodes.dtype, nodes.device, *(each.shape[1] for each in features))
        if self._recording is None or key != self._key or not self._recording.fits(edges):
            self._recording = None  # its memory first
            self._key, self._recording = key, _Recording(run, nodes, features, edges)
        return self._recording(nodes, features, edges)


def room_for(count: int) -> int:
    """Return for how many edges a recording has room that is made for `count`."""
    return math.ceil(ROOM * count) + HEARD


@dataclass(frozen=True, eq=False)
class _PaddedEdges:
    """Buffers of one edge set: `features` [r, j], `senders` and `receivers` [r], `starts` [n + s]."""

    features: Tensor
    senders: Tensor
    receivers: Tensor
    starts: Tensor
    padding: Tensor  # [s HEARD], the spare node at which each padding edge begins and ends

    @staticmethod
    def of(num_nodes: int, spare: int, features: Tensor, edges: Connections) -> _PaddedEdges:
        room = room_for(len(features))
        padding = num_nodes + torch.arange(spare * HEARD, device=features.device) // HEARD
        return _PaddedEdges(
            features.new_zeros(room, features.shape[1]),
            edges.senders.new_empty(room),
            edges.receivers.new_empty(room),
            edges.starts.new_empty(num_nodes + spare),
            padding.to(edges.receivers),
        )

    @property
    def room(self) -> int:
        return len(self.senders)

    def fill(self, features: Tensor, edges: Connections) -> None:
        count, nodes, padded = len(features), len(edges.starts), self.room - len(features)
        self.features[:count] = features
        for buffer, given in ((self.senders, edges.senders), (self.receivers, edges.receivers)):
            buffer[:count] = given
            buffer[count:] = self.padding[:padded]
        self.starts[:nodes] = edges.starts
        firsts = torch.arange(0, len(self.padding), HEARD, device=features.device)
        self.starts[nodes:] = (count + firsts).clamp_(max=self.room)

    def connections(self) -> Connections:
        """Return them anew: what a pass works out of connections belongs to the recording."""
        return Connections(senders=self.senders, receivers=self.receivers, starts=self.starts)


class _Recording:
    def __init__(self, run: Pass, nodes: Tensor, features: Sequence[Tensor], edges: Sequence[Connections]) -> None:
        half = max((room_for(len(each)) / 2 for each in features), default=0)  # may vanish until it is made anew
        self.spare = 1 + math.ceil(half / HEARD)
        self.nodes = nodes.new_zeros(len(nodes) + self.spare, nodes.shape[1])
        self.edges = [
            _PaddedEdges.of(len(nodes), self.spare, each, there) for each, there in zip(features, edges, strict=True)
        ]
        self._fill(nodes, features, edges)
        self.replay, self.outputs = _recorded(self._pass_by(run), nodes.device)

    def fits(self, edges: Sequence[Connections]) -> bool:
        return all(
            0 <= padded.room - len(there.senders) <= self.spare * HEARD
            for padded, there in zip(self.edges, edges, strict=True)
        )

    def __call__(self, nodes: Tensor, features: Sequence[Tensor], edges: Sequence[Connections]) -> Tensor:
        self._fill(nodes, features, edges)
        self.replay()
        return self.outputs()[: len(nodes)].clone()  # the next step overwrites it

    def _fill(self, nodes: Tensor, features: Sequence[Tensor], edges: Sequence[Connections]) -> None:
        self.nodes[: len(nodes)] = nodes
        for padded, each, there in zip(self.edges, features, edges, strict=True):
            padded.fill(each, there)

    def _pass_by(self, run: Pass) -> Callable[[], Tensor]:
        return lambda: run(self.nodes, [each.features for each in self.edges], [e.connections() for e in self.edges])


def _recorded(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """Return what runs it again, and what returns the outputs of the last time."""
    if device.type != "cuda":
        found: list[Tensor] = []

        def again() -> None:
            found[:] = [run()]

        return again, lambda: found[0]
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    return graph.replay, lambda: outputs
