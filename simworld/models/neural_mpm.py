"""Particles that act on each other through a grid, after NeuralMPM (Rochman-Sharabi et al. 2024, arXiv 2408.15753)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from simworld.models.base import check_sizes
from simworld.models.grids import MARGIN, THIN, Meeting
from simworld.models.particle_motion import Actions, ParticleMotion, ParticleSimulator, plain_arguments
from simworld.models.unet import UNet
from simworld.state import State


class NeuralMPM(ParticleSimulator):
    """Particles that are summed to the nodes of a grid, convolutions over it, and what particles read of it.

    As in the material point method, particles are the memory and the grid is where they meet: each gives to the
    3^d nodes round it what a perceptron makes of what it is told (velocity and past changes, type, walls, its place
    among the nodes), weighted by quadratic B-splines; with that, nodes have the number of particles, their mean
    velocity and how far walls are. A U-Net makes latents of these, and a perceptron reads those round a particle,
    weighted likewise, and gives the change of velocity. To and from the grid go plain sums and those times the way to
    the node, so that slopes are told too (as affine transfers do). The original predicts velocities of several frames
    at nodes and interpolates these; here a step is a step, and the output, `known_gravity` and `solid_walls` are
    those of a `GNS`.

    Boxes need walls, no periodic axes. A particle more than about two cells beyond a wall acts on none.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Sequence[float]],
        cell_size: float,
        num_dimensions: int = 2,
        num_velocities: int = 1,
        num_particle_types: int = 9,
        embedding_size: int = 16,
        feature_size: int = 16,
        latent_size: int = 32,
        widths: Sequence[int] = (32, 48, 64),
        actions: Actions = "none",
        further_fields: tuple[str, ...] = (),
        solid_walls: bool = False,
        known_gravity: bool = False,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `cell_size` is the spacing of the grid, in the unit of positions: about two particles' distances. A particle
        gives `feature_size` numbers to its nodes and reads `latent_size` of them; `widths` are the channels of the
        U-Net at each spacing. Told more than the present velocity (`num_velocities`), networks predict single steps
        better and rollouts may be worse, since past changes tell that an impact is on, but not when one begins. All
        else is as in `GNS`.

        Raises:
            ValueError: a choice or size is outside its range, or a statistic is missing.
        """
        said: dict[str, Any] = {
            "statistics": statistics,
            "cell_size": cell_size,
            "num_dimensions": num_dimensions,
            "num_velocities": num_velocities,
            "num_particle_types": num_particle_types,
            "embedding_size": embedding_size,
            "feature_size": feature_size,
            "latent_size": latent_size,
            "widths": list(widths),
            "actions": actions,
            "further_fields": further_fields,
            "solid_walls": solid_walls,
            "known_gravity": known_gravity,
        }
        super().__init__(dt, plain_arguments(said))
        _check_sizes(said)
        # Walls count from where a particle's nodes begin to lie beyond them.
        self.motion = ParticleMotion(self.arguments, wall_distance=3 * cell_size)
        self.cell_size, self.num_dimensions = float(cell_size), num_dimensions
        self.embedding = nn.Embedding(num_particle_types, embedding_size) if num_particle_types > 1 else None
        told, moments, hidden = self.motion.num_features + num_dimensions, 1 + num_dimensions, 2 * latent_size
        given = moments * (1 + num_dimensions + feature_size) + 3 * num_dimensions
        self.encoder = _perceptron([told, hidden, feature_size])
        self.grid_network = UNet(given, widths, latent_size, num_dimensions)
        self.decoder = _perceptron([moments * latent_size + told, hidden, hidden, num_dimensions])

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        self.motion.check("NeuralMPM", self.dtype, state, action)
        if "boundaries" not in state:
            raise ValueError(
                f"A NeuralMPM lays its grid in a box; give the state boundaries [b, 2, {self.num_dimensions}]."
            )
        if "periodic" in state and bool(state.periodic.any()):
            raise ValueError("A NeuralMPM takes boxes with walls, this state has periodic axes; use a GNS.")

    @property
    def reach(self) -> float:
        """How far something can be felt within one step, in the unit of positions: the diagonal of what is seen."""
        return math.sqrt(self.num_dimensions) * (self.grid_network.reach + 3) * self.cell_size

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, d]: the normalized change of velocity, or of what gravity leaves of it; zero for what stays."""
        told = self.motion.features(state, action, self.embedding)
        places = (state.positions - state.boundaries[state.batch, 0]) / self.cell_size
        boxes = (state.boundaries[:, 1] - state.boundaries[:, 0]) / self.cell_size
        own = torch.cat([told, places - places.detach().round()], 1)
        change = told.new_zeros(state.num_entities, self.num_dimensions)
        for meeting in Meeting.of(places, state.batch, state.active, boxes, self.grid_network):
            found = self._changes(state.velocities[meeting.rows], own[meeting.rows], boxes, meeting)
            change = change.index_copy(0, meeting.rows, found)
        return torch.where(self.free(state)[:, None], change, 0.0)

    def _changes(self, velocities: Tensor, own: Tensor, boxes: Tensor, meeting: Meeting) -> Tensor:
        """Return the change [r, d] of particles that meet, of their velocities [r, d] and what else they know."""
        velocities = self.motion.in_spreads(velocities)
        given = meeting.summed(torch.cat([torch.ones_like(own[:, :1]), velocities, self.encoder(own)], 1))
        mean = given[:, 1 : 1 + self.num_dimensions] / (given[:, :1] + THIN)
        nodes = meeting.nodes(velocities)
        walls = torch.cat([nodes, boxes[meeting.scenes, None] - nodes], -1).flatten(0, 1).clamp(-MARGIN, MARGIN)
        latents = meeting.convolved(self.grid_network, torch.cat([given, mean, walls], 1))
        change: Tensor = self.decoder(torch.cat([meeting.read(latents), own], 1))
        return change


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _check_sizes(arguments: Mapping[str, Any]) -> None:
    check_sizes(arguments, "feature_size", "latent_size")
    size, widths = arguments["cell_size"], arguments["widths"]
    if not (isinstance(size, int | float) and 0 < size < float("inf")):
        raise ValueError(f"cell_size must be a positive distance; got {size!r}.")
    if not widths or any(not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"widths must be whole numbers, 1 or more, one for each spacing; got {widths!r}.")
