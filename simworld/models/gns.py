"""Graph Network-based Simulators of particles (Sanchez-Gonzalez et al. 2020, arXiv 2002.09405)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simworld.graph import particle_edges
from simworld.kernels.neighbors import NeighborPairs, room
from simworld.models.base import Noise, check_sizes
from simworld.models.graph_network import EncodeProcessDecode
from simworld.models.particle_motion import SMALLEST, Actions, ParticleMotion, ParticleSimulator, plain_arguments
from simworld.models.smoothed_terms import fitted_gains, in_units, num_terms, smoothed_terms
from simworld.space import shortest
from simworld.state import State
from simworld.trajectory import Trajectory


class GNS(ParticleSimulator):
    """Particles that act on their neighbours, as a graph network that encodes, processes and decodes.

    A particle is told its last velocities, how far the walls are and its type; an edge between particles nearer
    than `connectivity_radius` the way between them. The output is the change of velocity in units of its
    standard deviation about its mean, and v' = v + change, x' = x + dt v', wrapped along periodic axes. Of the
    velocities the last is told as it is and the others as the changes that led to it, in units of changes.

    With `known_gravity` what gravity g of the state does is added, not learned: the output is the rest of the change
    in units of its rms, and v' = v + dt g + rms * output, so that no output is a free fall. What lies still then needs
    an answer to gravity, which the network can give where `further_fields` tell it "gravity".

    With `num_kernels` particles are also told sums over their neighbours as solvers of smoothed particles form them
    (`simworld.models.smoothed_terms`), and the output is what the network adds to a share of each that was fitted to
    the data: few recordings then go further, at the cost of a longer step. Particles then feel two `kernel_radius`
    farther, and `nodes_at_once` does not bound the memory of these sums.

    Kinematic particles are seen and not moved: they go on at their velocity, or as interventions set them.
    """

    term_rms: Tensor
    term_gain: Tensor

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Sequence[float]],
        connectivity_radius: float,
        num_dimensions: int = 2,
        num_velocities: int = 5,
        num_particle_types: int = 9,
        embedding_size: int = 16,
        latent_size: int = 128,
        num_message_passing_steps: int = 10,
        num_hidden_layers: int = 2,
        actions: Actions = "none",
        further_fields: tuple[str, ...] = (),
        relative_velocities: bool = False,
        solid_walls: bool = False,
        known_gravity: bool = False,
        num_kernels: int = 0,
        kernel_radius: float | None = None,
        backend: str | None = None,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `GNS.measure` returns for the training data. `connectivity_radius` is in the unit of
        positions. `num_velocities` counts the present one and those of the state's `history`. `actions` [n, a] or
        [b, a], forces for example, are features if "input", no action being zeros; so are the `further_fields` of
        the state, by particle (masses, materials) or scene (gravity, context). `backend` is that of the message
        passing; all compute the same. Four choices go beyond the paper: with `relative_velocities` edges are told
        these too, with `solid_walls` what would leave the box stops at its wall, `known_gravity` and `num_kernels` are
        said above; `kernel_radius` is how far the latter reach, `connectivity_radius` where it is not given.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        said: dict[str, Any] = {
            "statistics": statistics,
            "connectivity_radius": connectivity_radius,
            "num_dimensions": num_dimensions,
            "num_velocities": num_velocities,
            "num_particle_types": num_particle_types,
            "embedding_size": embedding_size,
            "latent_size": latent_size,
            "num_message_passing_steps": num_message_passing_steps,
            "num_hidden_layers": num_hidden_layers,
            "actions": actions,
            "further_fields": further_fields,
            "relative_velocities": relative_velocities,
            "solid_walls": solid_walls,
            "known_gravity": known_gravity,
            "num_kernels": num_kernels,
            "kernel_radius": kernel_radius,
        }
        super().__init__(dt, plain_arguments(said))
        check_sizes(said, "latent_size", "num_message_passing_steps")
        reach = connectivity_radius if kernel_radius is None else kernel_radius
        for name, radius in (("connectivity_radius", connectivity_radius), ("kernel_radius", reach)):
            if not (isinstance(radius, int | float) and 0 < radius < float("inf")):
                raise ValueError(f"{name} must be a positive distance; got {radius!r}.")
        self.num_kernels, self.kernel_radius = num_kernels, float(reach)
        self._register_terms(statistics)
        self.motion = ParticleMotion(self.arguments, wall_distance=connectivity_radius)
        self.connectivity_radius, self.relative_velocities = float(connectivity_radius), relative_velocities
        self.latent_size, self.num_message_passing_steps = latent_size, num_message_passing_steps
        self.embedding = nn.Embedding(num_particle_types, embedding_size) if num_particle_types > 1 else None
        self.network = EncodeProcessDecode(
            self.motion.num_features + num_terms(num_kernels) * num_dimensions,
            num_dimensions * (1 + relative_velocities) + 1,
            num_dimensions,
            latent_size,
            num_message_passing_steps,
            num_hidden_layers,
            backend=backend,
        )

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory],
        *,
        noise_std: Noise = 0.0,
        actions: Any = "none",
        connectivity_radius: float | None = None,
        num_kernels: int = 0,
        kernel_radius: float | None = None,
    ) -> dict[str, list[float]]:
        """Return `ParticleMotion.measure` of trajectories and, with `num_kernels`, what their terms say of changes.

        `num_kernels` and the radii are those of the constructor, to which `actions` do not matter.

        Raises:
            ValueError: there are no steps with a particle that moves, or kernels and no radius.
        """
        paths = list(trajectories)
        found = ParticleMotion.measure(paths, noise_std)
        if not num_kernels:
            return found
        radius = connectivity_radius if kernel_radius is None else kernel_radius
        if radius is None:
            raise ValueError("num_kernels need a radius; give measure the connectivity_radius or kernel_radius.")
        return found | fitted_gains(paths, radius, num_kernels)

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        self.motion.check("GNS", self.dtype, state, action)

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, d]: the normalized change of velocity, or of what gravity leaves of it; zero for what stays."""
        kept = self.num_message_passing_steps + 1 if torch.is_grad_enabled() else 1
        edge_bytes = 2 * kept * self.latent_size * state.positions.element_size()
        edges = particle_edges(state, self.connectivity_radius, max_edges=room(state.device, edge_bytes))
        nodes = self.motion.features(state, action, self.embedding)
        known: Tensor | float = 0.0
        if self.num_kernels:
            terms = in_units(smoothed_terms(state, self.kernel_radius, self.dt, self.num_kernels), self.term_rms)
            nodes = torch.cat([nodes, terms.flatten(1)], 1)
            known = self.motion.in_outputs(state, torch.einsum("ntd,t->nd", terms, self.term_gain.to(terms)))
        change: Tensor = self.network(nodes, [self._edge_features(state, edges)], [edges]) + known
        return torch.where(self.free(state)[:, None], change, 0.0)

    def _register_terms(self, statistics: Mapping[str, Sequence[float]]) -> None:
        count = self.num_kernels
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"num_kernels must be a whole number, 0 for none; got {count!r}.")
        for name in ("term_rms", "term_gain"):
            values = statistics.get(name, ()) if count else ()
            if len(values) != num_terms(count):
                raise ValueError(
                    f"num_kernels={count} need {num_terms(count)} numbers {name} in statistics, which have "
                    f"{len(values)}; compute them with GNS.measure(trajectories, num_kernels=..., kernel_radius=...)."
                )
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def _edge_features(self, state: State, edges: NeighborPairs) -> Tensor:
        positions = state.positions
        ways = positions.index_select(0, edges.senders) - positions.index_select(0, edges.receivers)
        ways = shortest(state, ways, edges.receivers) / self.connectivity_radius
        lengths = (ways.square().sum(1, keepdim=True) + SMALLEST).sqrt()
        if not self.relative_velocities:
            return torch.cat([ways, lengths], 1)
        # In units of changes, not of velocities: what neighbours do to each other shows in small differences.
        velocities = self.motion.in_changes(state.velocities)
        relative = velocities.index_select(0, edges.senders) - velocities.index_select(0, edges.receivers)
        return torch.cat([ways, lengths, relative], 1)
