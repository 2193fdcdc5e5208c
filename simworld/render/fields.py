"""Radiance fields: density and colour of every place, seen along rays; the original NeRF, and one of hashed grids."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simworld.kernels.hash_grid import GridLevels, encode
from simworld.kernels.ray_march import march
from simworld.models.checkpoint import read_tensors, write_tensors
from simworld.render.camera import Camera
from simworld.render.harmonics import MOST_DEGREE, bases
from simworld.render.volume import (
    RaySamples,
    Seen,
    clip,
    composite_rays,
    light_before,
    rays_of,
    refined,
    stratified,
    weights_of,
)

SCHEMA, SCHEMA_VERSION = "simworld.field", 1
DENSEST = 11.0  # logarithm of the density, by the box's side, beyond which nothing can be told apart
LEAST_LIGHT = 1e-4  # that gets through to a place which is still looked at
LEAST_THICK = 0.003  # optical thickness of a step through a cell that counts as occupied
FORGETTING = 0.95  # of a cell's density each time that it is looked at again
POINTS_AT_ONCE = 2**16
MOST_SIZE = 4096  # of a layer, or of cells along the occupancy grid

Bounds = Tensor | Sequence[Sequence[float]]


class Pass(NamedTuple):
    """A model's answer along rays: where it was looked at, and the densities [n] and colours [n, 3] there."""

    samples: RaySamples
    densities: Tensor
    colors: Tensor


class RadianceField(nn.Module, ABC):
    """A scene as density, per unit of length, and colour, 0 to 1, within the box `bounds` [2, 3], lowest and highest.

    `arguments` are those of the constructor, as plain values.
    """

    bounds: Tensor
    arguments: Mapping[str, Any]

    @abstractmethod
    def density_and_color(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities [n] and colours [n, 3] at `points` [n, 3] seen along unit `directions` [n, 3].

        Nothing is outside the bounds.
        """

    @abstractmethod
    def passes(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None = None) -> list[Pass]:
        """Return how rays from `origins` [r, 3] along unit `directions` [r, 3] are looked at, the best answer last.

        The earlier ones are trained too. With a generator the places are drawn, without they are fixed.
        """


def render_field(
    field: RadianceField,
    cameras: Camera | Sequence[Camera],
    *,
    background: Tensor | Sequence[float] | None = None,
    rays_at_once: int = 2048,
) -> Tensor:
    """Return the picture [h, w, 3] of a camera, or those [b, h, w, 3] of several of one size; differentiable.

    `background` [3] is what shows where there is nothing, black by default. Rays are looked at in groups, to bound
    the memory.

    Raises:
        ValueError: there is no camera, their pictures differ in size, or a group has no ray.
    """
    several = [cameras] if isinstance(cameras, Camera) else list(cameras)
    sizes = {(one.width, one.height) for one in several}
    if len(sizes) != 1 or rays_at_once < 1:
        raise ValueError(
            f"render takes a camera, or several of one size, and a ray or more at once; got sizes {sorted(sizes)} and "
            f"{rays_at_once} rays."
        )
    behind = None if background is None else torch.as_tensor(background).to(field.bounds)
    made = []
    for camera in several:
        here = camera.to(field.bounds)
        pixels = torch.split(torch.arange(here.width * here.height), rays_at_once)
        colors = [see(field, *rays_of(here, rows), background=behind).colors for rows in pixels]
        made.append(torch.cat(colors).view(here.height, here.width, 3))
    return made[0] if isinstance(cameras, Camera) else torch.stack(made)


def see(field: RadianceField, origins: Tensor, directions: Tensor, *, background: Tensor | None = None) -> Seen:
    """Return what rays from `origins` [r, 3] along unit `directions` [r, 3] see of a field; differentiable."""
    last = field.passes(origins, directions)[-1]
    return composite_rays(last.densities, last.colors, last.samples, background)


class PositionalField(RadianceField):
    """The field of Mildenhall et al. (2020): a network of sines of the place, a coarse one that says where to look.

    `num_layers` layers of `width`, the input given again half-way; places by `place_octaves` octaves of sines,
    directions by `direction_octaves`. On each ray the coarse network is looked at in `coarse` stretches and the fine
    one in as many and `fine` more, where the coarse one sees something. Densities are softplus in place of ReLU, which
    can be born dead, and lengths are measured by half of the box's longest side.

    Raises:
        ValueError: the bounds are no box, or a size is not positive.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        width: int = 256,
        num_layers: int = 8,
        place_octaves: int = 10,
        direction_octaves: int = 4,
        coarse: int = 64,
        fine: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "num_layers": num_layers, "place_octaves": place_octaves, "coarse": coarse}
        sizes |= {"direction_octaves": direction_octaves, "fine": fine}
        _check_sizes("PositionalField", sizes)
        self.register_buffer("bounds", _box(bounds))
        self.arguments = {"bounds": self.bounds.tolist(), **sizes, "seed": seed}
        self.place_octaves, self.direction_octaves, self.coarse, self.fine = (
            place_octaves,
            direction_octaves,
            coarse,
            fine,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = (3 + 6 * place_octaves, 3 + 6 * direction_octaves, width, num_layers)
            self.coarse_network, self.fine_network = _SkipNetwork(*shape), _SkipNetwork(*shape)

    def density_and_color(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities [n] and colours [n, 3] by the fine network."""
        return self._look(self.fine_network, points, directions)

    def passes(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None = None) -> list[Pass]:
        """Return the coarse network's answer and the fine one's."""
        near, far = clip(origins, directions, self.bounds)
        first = stratified(near, far, self.coarse, generator)
        seen = Pass(first, *self._look(self.coarse_network, *first.points(origins, directions)))
        weights = weights_of(seen.densities.detach(), first)
        second = refined(first, weights, near, far, self.fine, generator)
        return [seen, Pass(second, *self.density_and_color(*second.points(origins, directions)))]

    def _look(self, network: _SkipNetwork, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bounds
        half = (high - low).max() / 2
        place = _octaves((points - (low + high) / 2) / half, self.place_octaves)
        thick, colors = network(place, _octaves(directions, self.direction_octaves))
        return torch.where(_inside(points, self.bounds), thick / half, 0.0), colors


class HashField(RadianceField):
    """The field of Müller et al. (2022): features from hashed grids of many resolutions, and two small networks.

    `num_levels` grids of `features` features from `coarsest` to `finest` cells along a side, with at most 2^`log2_rows`
    rows each; networks of `width`, the colour's with `color_layers` hidden layers and directions by harmonics of
    degree 3. What is empty is skipped: a grid of `num_cells`^3 cells keeps their densities as last seen, where
    something is `possible` at all. Rays are
    looked at in stretches of a `num_steps`th of the box's diagonal, until no light is left.

    Raises:
        ValueError: the bounds are no box, or a size is not positive or beyond reason.
    """

    cell_densities: Tensor
    possible: Tensor
    occupied: Tensor

    def __init__(
        self,
        bounds: Bounds,
        *,
        num_levels: int = 8,
        features: int = 4,
        coarsest: int = 16,
        finest: int = 512,
        log2_rows: int = 17,
        width: int = 64,
        color_layers: int = 1,
        num_cells: int = 128,
        num_steps: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"num_levels": num_levels, "features": features, "coarsest": coarsest, "finest": finest}
        sizes |= {"log2_rows": log2_rows, "width": width, "color_layers": color_layers, "num_cells": num_cells}
        _check_sizes("HashField", sizes | {"num_steps": num_steps})
        self.levels = GridLevels.geometric(num_levels, coarsest, finest, 2**log2_rows)
        self.register_buffer("bounds", _box(bounds))
        self.arguments = {"bounds": self.bounds.tolist(), **sizes, "num_steps": num_steps, "seed": seed}
        self.step = float((self.bounds[1] - self.bounds[0]).norm()) / num_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Parameter(torch.empty(self.levels.starts[-1], features).uniform_(-1e-4, 1e-4))
            self.density_network = _layers(num_levels * features, width, 1, 1 + 15)
            self.color_network = _layers(15 + (MOST_DEGREE + 1) ** 2, width, color_layers, 3)
        self.register_buffer("cell_densities", torch.zeros(num_cells, num_cells, num_cells))
        self.register_buffer("possible", torch.ones(num_cells, num_cells, num_cells, dtype=torch.bool))
        self.register_buffer("occupied", torch.ones(num_cells, num_cells, num_cells, dtype=torch.bool))

    def density_and_color(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities [n] and colours [n, 3]; nothing is in cells that are not occupied."""
        cells = (points - self.bounds[0]) * len(self.occupied) / (self.bounds[1] - self.bounds[0])
        x, y, z = cells.long().clamp(0, len(self.occupied) - 1).unbind(1)
        densities, features = self._densities(points)
        there = _inside(points, self.bounds) & self.occupied[x, y, z]
        return torch.where(there, densities, 0.0), self._colors(features, directions)

    def passes(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None = None) -> list[Pass]:
        """Return the answer in occupied cells as far as light gets."""
        near, far = clip(origins, directions, self.bounds)
        places = near.new_full((len(near),), 0.5)
        if generator is not None:
            places = torch.rand(len(near), generator=generator, dtype=torch.float32).to(near)
        found, offsets = march(origins, directions, near, far, places, self.occupied, self.bounds, self.step)
        samples = RaySamples(distances=found, lengths=found.new_full((len(found),), self.step), offsets=offsets)
        points, along = samples.points(origins, directions)
        with torch.no_grad():
            densities, features = self._densities(points)
            lit = light_before(densities * self.step, samples) > LEAST_LIGHT
        samples = samples.kept(lit)
        if torch.is_grad_enabled():  # once more, of what is seen, for the gradients
            densities, features = self._densities(points[lit])
            return [Pass(samples, densities, self._colors(features, along[lit]))]
        return [Pass(samples, densities[lit], self._colors(features[lit], along[lit]))]

    @torch.no_grad()
    def update_occupancy(self, generator: torch.Generator, *, count: int = MOST_SIZE**3) -> None:
        """Look anew at the possible cells, or at about `count` of them if there are more, at a random place in each.

        A cell keeps the highest density seen there, which fades each time it is looked at again.
        """
        side, cells = len(self.occupied), self.possible.flatten().nonzero()[:, 0].cpu()
        if len(cells) > count:
            cells = cells[torch.rand(len(cells), generator=generator) < count / len(cells)]
        corners = torch.stack([cells // side**2, cells // side % side, cells % side], 1)
        shift = torch.rand(len(cells), 3, generator=generator)
        size = self.bounds[1] - self.bounds[0]
        points = self.bounds[0] + (corners + shift).to(size) / side * size
        cells = cells.to(size.device)
        found = torch.cat([self._densities(part)[0] for part in torch.split(points, POINTS_AT_ONCE)])
        kept = self.cell_densities.view(-1)
        kept[cells] = torch.maximum(FORGETTING * kept[cells], found)
        self.occupied.copy_(self.possible & (self.cell_densities * self.step > LEAST_THICK))

    def _densities(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities [n] and what the colours depend on [n, 15]."""
        size = self.bounds[1] - self.bounds[0]
        made = self.density_network(encode((points - self.bounds[0]) / size, self.table, self.levels))
        return torch.exp(made[:, 0].clamp(max=DENSEST)) / size.max(), made[:, 1:]

    def _colors(self, features: Tensor, directions: Tensor) -> Tensor:
        inputs = torch.cat([features, bases(directions, MOST_DEGREE)], 1)
        colors: Tensor = torch.sigmoid(self.color_network(inputs))
        return colors


class _SkipNetwork(nn.Module):
    """Layers of one width from encoded places to optical thickness [n] and, with directions, colours [n, 3]."""

    def __init__(self, place: int, direction: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.again = num_layers // 2 + 1 if num_layers > 2 else num_layers  # the layer that gets the input again
        sizes = [place] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.Linear(size + (place if k == self.again else 0), width) for k, size in enumerate(sizes)
        )
        self.thickness, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.shade, self.color = nn.Linear(width + direction, width // 2), nn.Linear(width // 2, 3)

    def forward(self, place: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return optical thickness [n] by unit of length and colours [n, 3]."""
        made = place
        for number, layer in enumerate(self.layers):
            made = torch.relu(layer(torch.cat([made, place], 1) if number == self.again else made))
        shade = torch.relu(self.shade(torch.cat([self.feature(made), direction], 1)))
        return nn.functional.softplus(self.thickness(made)[:, 0]), torch.sigmoid(self.color(shade))


def save_field(path: str | Path, field: RadianceField) -> Path:
    """Write a field to a safetensors file, whole or not at all, and return it."""
    path = Path(path)
    write_tensors(tensors_of(field), header_of(field), path)
    return path


def load_field(path: str | Path) -> RadianceField:
    """Return the field in a file of `save_field` or `fit_field`; nothing in the file is executed.

    Raises:
        ValueError: there is no such file, it is damaged, of another kind, or does not hold what it says.
    """
    return read_field(path)[0]


def header_of(field: RadianceField) -> dict[str, str]:
    """Return what a file says of a field beside its tensors."""
    return {
        "schema": SCHEMA,
        "schema_version": str(SCHEMA_VERSION),
        "field": type(field).__name__,
        "arguments": json.dumps(dict(field.arguments)),
    }


def tensors_of(field: RadianceField) -> dict[str, Tensor]:
    """Return the tensors that a file has of a field."""
    return {f"field.{name}": value.detach().cpu().contiguous() for name, value in field.state_dict().items()}


def read_field(path: str | Path) -> tuple[RadianceField, dict[str, str], dict[str, Tensor]]:
    """Return the field in a file, with the file's header and tensors; see `load_field`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    header, tensors = read_tensors(path, SCHEMA, SCHEMA_VERSION)
    kind = FIELDS.get(header.get("field", ""))
    if kind is None:
        raise ValueError(f"{path} holds a field '{header.get('field')}'; this version knows {', '.join(FIELDS)}.")
    mine = {name.removeprefix("field."): value for name, value in tensors.items() if name.startswith("field.")}
    try:
        with torch.device("meta"):  # sizes alone: a header that lies costs no memory
            field = kind(**json.loads(header["arguments"]))
        field.load_state_dict(mine, assign=True)
        wanted = field.bounds.new_tensor(field.arguments["bounds"])
        sound = all(bool(torch.isfinite(value).all()) for value in mine.values())
        if not sound or not torch.equal(field.bounds, wanted):
            raise ValueError("numbers are not finite, or the bounds are others")
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the {kind.__name__} that it says ({reason}); copy it again.") from error
    return field, header, tensors


FIELDS: Mapping[str, type[PositionalField] | type[HashField]] = MappingProxyType(
    {"PositionalField": PositionalField, "HashField": HashField}
)


def _layers(inputs: int, width: int, hidden: int, outputs: int) -> nn.Sequential:
    sizes = [inputs] + [width] * hidden + [outputs]
    layers: list[nn.Module] = []
    for number in range(hidden + 1):
        layers += [nn.Linear(sizes[number], sizes[number + 1], bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _octaves(values: Tensor, count: int) -> Tensor:
    """Return values [n, d] with their sines and cosines at `count` octaves, from half a wave over the unit."""
    waves = values[:, None] * (math.pi * 2.0 ** torch.arange(count, device=values.device)).to(values)[:, None]
    return torch.cat([values, torch.sin(waves).flatten(1), torch.cos(waves).flatten(1)], 1)


def _inside(points: Tensor, bounds: Tensor) -> Tensor:
    return ((points >= bounds[0]) & (points <= bounds[1])).all(1)


def _box(bounds: Bounds) -> Tensor:
    found = torch.as_tensor(bounds, dtype=torch.float32, device="cpu").detach().clone()
    if found.shape != (2, 3) or not bool(torch.isfinite(found).all()) or not bool((found[1] > found[0]).all()):
        raise ValueError(f"bounds must be the lowest and the highest corner [2, 3] of a box; got {found.tolist()}.")
    return found


def _check_sizes(what: str, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= MOST_SIZE:
            raise ValueError(f"{name} of a {what} must be 1 to {MOST_SIZE}; got {size}.")
    if sizes.get("log2_rows", 3) not in range(3, 27):
        raise ValueError(f"log2_rows of a {what} must be 3 to 26; got {sizes['log2_rows']}.")
