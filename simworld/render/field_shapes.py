"""Radiance fields as other things: splats where they are seen, meshes of where they are dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from simworld.kernels.neighbors import neighbor_pairs
from simworld.kinds import SplatState
from simworld.render.camera import Camera
from simworld.render.fields import RadianceField
from simworld.render.harmonics import FLAT
from simworld.render.volume import rays_of, weights_of

RAYS_AT_ONCE, CAMERAS_AT_ONCE, POINTS_AT_ONCE = 4096, 8, 2**16
LEAST_SEEN = 0.5  # opacity of a ray that is taken to hit a surface
VIEWS, SPREAD = 8, 0.5  # directions that a splat's colour is the mean of, and how far they are from the ray's
WIDTH, THICKNESS, OPACITY = 0.45, 0.1, 0.7  # of a splat: by the distance to the next ones, and its opacity
MOST_APART = 2.0  # by the median, since what lies alone need not be large
FEWEST = 6  # neighbours that tell a surface


class FieldMesh(NamedTuple):
    """Triangles: `vertices` [v, 3] in the scene's unit, `faces` [f, 3], outwards by the right hand, `colors` [v, 3]."""

    vertices: Tensor
    faces: Tensor
    colors: Tensor


@torch.no_grad()
def field_to_splats(
    field: RadianceField, *, count: int = 20000, cameras: Sequence[Camera] | None = None, seed: int = 0
) -> SplatState:
    """Return disks on the surfaces of a field, of its colours, as large as they lie apart.

    Rays are cast from `cameras`, those of the photographs that the field was fitted to, since what none of them saw is
    anything; without, through the box from all sides. Each ray that is stopped puts a splat where half of what it sees
    is before and half behind.

    Raises:
        ValueError: no splat is asked for, there is no camera, or next to no ray is stopped: the field is empty.
    """
    if not 0 < count <= 10**7:
        raise ValueError(f"field_to_splats makes 1 to 10 million splats; got {count}.")
    if cameras is not None and not cameras:
        raise ValueError("field_to_splats needs a camera or more, or none given for rays from all sides; got [].")
    drawn = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    cast = 0
    while (have := sum(len(points) for points, _ in found)) < count:
        if cast >= RAYS_AT_ONCE * 4 and have < cast / 1000:
            raise ValueError(f"Of {cast} rays through the field {have} are stopped; fit the field first.")
        found.append(_hits(field, *_cast(field, cameras, drawn), drawn))
        cast += RAYS_AT_ONCE
    points, directions = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    shades = torch.zeros_like(points)
    for _ in range(VIEWS):
        turned = directions + SPREAD * torch.randn(points.shape, generator=drawn).to(points)
        turned = torch.nn.functional.normalize(turned, dim=1)
        shades += _looked(field, points, turned)[1] / VIEWS
    quats, scales = _disks(points, float((field.bounds[1] - field.bounds[0]).max()))
    return SplatState(
        means=points,
        quats=quats,
        scales=scales,
        opacities=points.new_full((count,), OPACITY),
        harmonics=((shades - 0.5) / FLAT)[:, None],
    )


@torch.no_grad()
def field_to_mesh(field: RadianceField, *, resolution: int = 128, level: float | None = None) -> FieldMesh:
    """Return the surface where a field's density is `level`, closed at the bounds, with the colours seen there.

    `resolution` cells lie along the box's longest side. By default the level is that of which a 400th of that
    side stops half of the light.

    Raises:
        ValueError: the resolution is not 2 to 1024, the level not positive, or nowhere reached.
    """
    size = field.bounds[1] - field.bounds[0]
    longest = float(size.max())
    level = 400 * math.log(2) / longest if level is None else level
    if not 2 <= resolution <= 1024 or not (math.isfinite(level) and level > 0):
        raise ValueError(
            f"field_to_mesh needs 2 to 1024 cells along a side and a level above 0; got {resolution} and {level}."
        )
    step = longest / resolution
    counts = [max(2, math.ceil(float(side) / step - 1e-6)) + 1 for side in size]
    axes = [torch.linspace(float(field.bounds[0, k]), float(field.bounds[1, k]), counts[k]) for k in range(3)]
    slabs = []
    for x in axes[0]:
        points = torch.cartesian_prod(x[None], axes[1], axes[2]).to(field.bounds)
        slabs.append(_looked(field, points, points.new_tensor([0.0, 0.0, 1.0]).expand_as(points))[0].cpu())
    values = torch.stack(slabs).view(*counts)
    if not bool((values > level).any()):
        raise ValueError(
            f"The density is nowhere above {level:g}, at most {float(values.max()):g}; give a lower level."
        )
    vertices, faces = isosurface(values, level)
    spacing = torch.tensor([float(axis[1] - axis[0]) for axis in axes])
    vertices = (vertices * spacing + torch.stack([axis[0] for axis in axes])).to(field.bounds)
    vertices = torch.minimum(torch.maximum(vertices, field.bounds[0]), field.bounds[1])
    faces = faces.to(vertices.device)
    colors = _looked(field, vertices, -_normals(vertices, faces))[1]
    return FieldMesh(vertices, faces, colors)


def isosurface(values: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return vertices [v, 3], in cells, and faces [f, 3] of the closed surface where `values` [a, b, c] are `level`.

    Every cell is six tetrahedra round its diagonal, which fit those of its neighbours (Kuhn 1960); along their edges
    the values are taken to be linear. What is beyond the grid is below the level. Faces are outwards: from above the
    level to below.
    """
    padded = torch.nn.functional.pad(values.double(), (1, 1, 1, 1, 1, 1), value=-math.inf)
    padded = padded.clamp(min=2 * level - float(values.max()) - 1.0)
    corners = _tetrahedra(padded > level)
    inside = (padded > level).view(-1)[corners]
    order = torch.argsort((~inside).byte(), dim=1, stable=True)
    corners, counts = corners.gather(1, order), inside.sum(1)
    places = _places(corners, padded.shape).double()
    outwards = torch.linalg.det(places[:, 1:] - places[:, :1]) > 0
    edges = []
    # Of the corners a, b, c, d those above the level come first; faces of edges between above and below.
    for number, triangles in (
        (1, ["ab ac ad"]),
        (2, ["ac ad bd", "ac bd bc"]),
        (3, ["da db dc"]),
    ):
        rows = counts == number
        for triangle in triangles:
            ends = torch.tensor([["abcd".index(corner) for corner in edge] for edge in triangle.split()])
            made = corners[rows][:, ends]  # [m, 3, 2]
            edges.append(torch.where(outwards[rows, None, None], made, made.flip(1)))
    ends, faces = torch.unique(torch.cat(edges).sort(-1).values.view(-1, 2), dim=0, return_inverse=True)
    low, high = padded.view(-1)[ends].unbind(1)
    part = ((level - low) / (high - low)).clamp(1e-4, 1 - 1e-4)[:, None]  # a face never shrinks to nothing
    one, other = _places(ends, padded.shape).double().unbind(1)
    return (one + part * (other - one) - 1).to(values.dtype), faces.view(-1, 3)


def _tetrahedra(above: Tensor) -> Tensor:
    """Return the corners [t, 4], as numbers of nodes, of the tetrahedra in cells that the surface goes through."""
    whole = above[:-1, :-1, :-1].byte().clone().zero_()
    sides = [(slice(None, -1), slice(1, None))[k] for k in (0, 1)]
    for x in sides:
        for y in sides:
            for z in sides:
                whole += above[x, y, z]
    cells = ((whole > 0) & (whole < 8)).nonzero()
    steps = (above.shape[1] * above.shape[2], above.shape[2], 1)
    base = cells @ torch.tensor(steps)
    shifts = [[0, steps[a], steps[a] + steps[b], sum(steps)] for a, b, _ in permutations(range(3))]
    return (base[:, None, None] + torch.tensor(shifts)).view(-1, 4)


def _places(nodes: Tensor, shape: torch.Size) -> Tensor:
    """Return the places [..., 3] of nodes by number."""
    return torch.stack([nodes // (shape[1] * shape[2]), nodes // shape[2] % shape[1], nodes % shape[2]], -1)


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[faces].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices).index_add_(0, faces.flatten(), across.repeat_interleave(3, 0))
    return torch.nn.functional.normalize(sums, dim=1)


def _looked(field: RadianceField, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return densities [n] and colours [n, 3], some points at a time."""
    pairs = zip(*(torch.split(value, POINTS_AT_ONCE) for value in (points, directions)), strict=True)
    densities, colors = zip(*(field.density_and_color(*pair) for pair in pairs), strict=True)
    return torch.cat(densities), torch.cat(colors)


def _cast(field: RadianceField, cameras: Sequence[Camera] | None, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return origins and unit directions of random rays: through a camera's pixels, or through the box."""
    if cameras is not None:
        chosen = torch.randint(len(cameras), (CAMERAS_AT_ONCE,), generator=drawn).tolist()
        parts = []
        for camera in (cameras[number].to(field.bounds) for number in chosen):
            count = RAYS_AT_ONCE // CAMERAS_AT_ONCE
            parts.append(rays_of(camera, torch.randint(camera.width * camera.height, (count,), generator=drawn)))
        origins, directions = zip(*parts, strict=True)
        return torch.cat(origins), torch.cat(directions)
    low, high = field.bounds
    within = low + torch.rand(RAYS_AT_ONCE, 3, generator=drawn).to(low) * (high - low)
    along = torch.nn.functional.normalize(torch.randn(RAYS_AT_ONCE, 3, generator=drawn).to(low), dim=1)
    return within - along * (high - low).norm(), along


def _hits(field: RadianceField, origins: Tensor, directions: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return places [n, 3] that stop rays, and the directions [n, 3] of those rays."""
    last = field.passes(origins, directions, drawn)[-1]
    weights = weights_of(last.densities, last.samples)
    sums = torch.nn.functional.pad(weights.double().cumsum(0), (1, 0))
    begin, end = sums[last.samples.offsets[:-1]], sums[last.samples.offsets[1:]]
    hit = (end - begin) > LEAST_SEEN
    row = torch.searchsorted(sums, (begin + end) / 2, right=True) - 1
    row = torch.minimum(torch.maximum(row, last.samples.offsets[:-1]), last.samples.offsets[1:] - 1)[hit]
    points, along = last.samples.points(origins, directions)
    return points[row], along[row]


def _disks(points: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Return quaternions [n, 4] and scales [n, 3] of disks, the third axis across, that cover what points lie on.

    How wide, from how many others are nearby, and how turned, from where those are; balls where there are few.
    """
    radius = 4 * size / math.sqrt(len(points))
    pairs = neighbor_pairs(points.cpu(), radius)
    receivers, senders = (rows.to(points.device) for rows in (pairs.receivers, pairs.senders))
    counts = receivers.bincount(minlength=len(points))
    away = points[senders] - points[receivers]
    spread = points.new_zeros(len(points), 9).index_add_(0, receivers, (away[:, :, None] * away[:, None]).flatten(1))
    x, y, z = torch.linalg.eigh(spread.view(-1, 3, 3)).eigenvectors[..., 0].unbind(1)
    # The shortest turn of the third axis to the normal, or to its opposite.
    up = torch.where(z < 0, -1.0, 1.0)
    quats = torch.stack([1 + up * z, -up * y, up * x, torch.zeros_like(z)], 1)
    apart = radius * torch.sqrt(math.pi / (counts + 1).to(points))
    apart = apart.clamp(max=MOST_APART * float(apart.median()))
    flat = torch.where(counts < FEWEST, WIDTH, THICKNESS)
    return torch.nn.functional.normalize(quats, dim=1), apart[:, None] * torch.stack(
        [torch.full_like(flat, WIDTH), torch.full_like(flat, WIDTH), flat], 1
    )
