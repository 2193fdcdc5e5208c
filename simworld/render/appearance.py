"""What states look like that have no appearance of their own: bodies, particles and meshes as splats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from simworld.kernels import neighbor_pairs
from simworld.kernels.nearest import nearest
from simworld.kinds import GOOP, KINEMATIC, RIGID, SAND, WATER, MeshState, ObjectState, ParticleState, SplatState
from simworld.physics.push import BALL
from simworld.quaternions import rotations
from simworld.render.camera import Camera
from simworld.render.faces import seen_faces, seen_triangles
from simworld.render.harmonics import FLAT
from simworld.render.shade import COLOURED, Shade, lengths
from simworld.state import State
from simworld.trajectory import Trajectory

BODY, FIXED, LINE = (0.16, 0.44, 0.73), (0.35, 0.37, 0.41), (0.60, 0.64, 0.69)
TYPES: Mapping[int, tuple[float, float, float]] = MappingProxyType(
    {RIGID: (0.54, 0.35, 0.27), KINEMATIC: FIXED, WATER: BODY, SAND: (0.79, 0.64, 0.15), GOOP: (0.36, 0.60, 0.33)}
)
"""Colours of particles by type."""
HUES = (BODY, (0.84, 0.36, 0.20), (0.30, 0.60, 0.33), (0.79, 0.62, 0.14), (0.53, 0.36, 0.66), (0.20, 0.62, 0.64),
        (0.80, 0.40, 0.56), (0.45, 0.47, 0.20))  # fmt: skip
"""Colours of bodies where there are few."""
DARK, BRIGHT, BAND = 0.55, 0.45, 0.8  # light from everywhere; from the lamp; of a body's dark stripes, which show spin
ON_BALL, ON_EDGE, ON_LINE, ON_MESH = 200, 12, 40, 30_000  # splats of a ball, along a box's edge, a line, of a mesh
WIDE = 0.6  # of their spacing: standard deviation of splats beside each other on a surface
SOLID, THIN = 0.98, 0.02  # opacity of what is not transparent; thickness of surfaces, over their spacing
FAR = 1e6  # sizes of the scene from its middle, beyond which a body of a rollout gone wrong is not drawn
FLAT_BOX = 0.05  # of the longest side: a box less high than that is a plane
VIEW, FILL = 30.0, 0.95  # degrees that pictures show by default, and how much of that the scene fills


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the frames of a trajectory are drawn, the same in all: which way is up, sizes, and colours of a field.

    `up` [3] is of unit length, `low` and `high` [3] are the corners of the box that holds all frames, `radius` is that
    of particles, and of bodies without one, in the unit of positions. `planar` scenes are seen from the front. Without
    a `shade` colours go by type.
    """

    up: Tensor
    low: Tensor
    high: Tensor
    radius: float
    planar: bool
    shade: Shade | None

    @staticmethod
    def of(trajectory: Trajectory, *, field: str | None = None) -> Look:
        """Return how a trajectory is drawn, in the colours of a `field`, of meshes by default the first that is shown.

        Raises:
            ValueError: the states have no positions, or not the field.
        """
        state = trajectory.initial
        places = _all_places(trajectory)
        coloured = field is not None or (isinstance(state, MeshState) and any(name in state for name in COLOURED))
        radius = float(state["radii"].min()) if "radii" in state else _spacing(_places(state)[state.active.cpu()]) / 2
        reach = float(state["radii"].max()) if "radii" in state else radius
        if "half_extents" in state:
            reach = float(state["half_extents"].norm(dim=1).max())
        if isinstance(state, MeshState) and "cells" in state and state["cells"].shape[1] > 2:
            reach = 0.0
        dimensions = (state["positions"] if "positions" in state else state["rest_positions"]).shape[1]
        return Look(
            up=_up(state, dimensions),
            low=places.amin(0) - reach,
            high=places.amax(0) + reach,
            radius=radius,
            planar=dimensions < 3,
            shade=Shade.of(trajectory, field) if coloured else None,
        )

    @staticmethod
    def box(low: Tensor, high: Tensor) -> Look:
        """Return the look of what lies between two corners [3], the third axis up; from the front if it is flat."""
        sides = high - low
        flat = float(sides[2]) < FLAT_BOX * float(sides.max())
        up = torch.eye(3)[1 if flat else 2]
        return Look(up=up, low=low.float(), high=high.float(), radius=float(sides.max()) / 100, planar=flat, shade=None)

    @property
    def size(self) -> float:
        """Half the diagonal of the box that holds all frames."""
        return float((self.high - self.low).norm()) / 2

    def camera(self, *, width: int = 640, height: int = 480, azimuth: float = -60.0, elevation: float = 20.0) -> Camera:
        """Return a camera that just sees all frames: planar ones from the front, others from an angle, in degrees."""
        side, back = self._sides()
        turn, rise = math.radians(azimuth), math.radians(elevation)
        toward = math.cos(rise) * (math.cos(turn) * side + math.sin(turn) * back) + math.sin(rise) * self.up
        if self.planar:
            toward = torch.tensor([0.0, 0.0, 1.0])
        centre = (self.low + self.high) / 2
        across = normalize(torch.linalg.cross(self.up, toward), dim=0)
        corners = torch.cartesian_prod(*torch.stack([self.low, self.high]).T) - centre
        tall = math.tan(math.radians(VIEW / 2)) * FILL
        reach = torch.maximum((corners @ across).abs() * height / width, (corners @ toward.cross(across, dim=0)).abs())
        away = float((reach / tall + corners @ toward).max())
        eye = centre + away * toward
        return Camera.look_at(eye, centre, up=self.up, width=width, height=height, field_of_view=VIEW)

    def lamp(self) -> Tensor:
        """Return the direction [3] in which the lamp is: above, to one side."""
        side, back = self._sides()
        return normalize(self.up + 0.4 * side - 0.6 * back, dim=0)

    def _sides(self) -> tuple[Tensor, Tensor]:
        first = torch.eye(3)[0] if float(self.up[0].abs()) < 0.9 else torch.eye(3)[1]
        first = normalize(first - (first @ self.up) * self.up, dim=0)
        return first, torch.linalg.cross(self.up, first)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Splats of one thing: where they are [n, 3], how they spread [n, 3, 3], and their colours [n, 3]."""

    means: Tensor
    covars: Tensor
    colors: Tensor


def to_splats(state: State, look: Look, *, values: Tensor | None = None) -> SplatState:
    """Return a state of one scene as splats: balls, boxes, springs, particles by type, meshes by field, and walls.

    Inactive entities are left out. Surfaces are lit by a lamp from above. `values` [n, ...] give entities the colours
    of the look's shade in place of its field: errors, say.

    Raises:
        ValueError: the state holds several scenes, or has no positions.
    """
    if isinstance(state, SplatState):
        return state
    if state.num_scenes != 1:
        raise ValueError(f"to_splats draws one scene; the state has {state.num_scenes}. Take scene(i) of it.")
    if isinstance(state, MeshState) and "cells" in state:
        parts = [_mesh(state, look, values)]
    elif isinstance(state, ObjectState):
        parts = [_bodies(state, look, _colors(state, look, values))[0], _springs(state, look)]
    else:
        parts = [_particles(state, look, _colors(state, look, values))]
    if "boundaries" in state and bool(torch.isfinite(state["boundaries"]).all()):
        parts.append(_walls(state["boundaries"][0].detach().cpu().float(), look))
    whole = _joined(parts)
    if not len(whole.colors):  # a state has an entity or more
        return _nothing()
    return SplatState(
        means=whole.means,
        covars=whole.covars,
        opacities=torch.full((len(whole.colors),), SOLID),
        harmonics=((whole.colors - 0.5) / FLAT)[:, None],
    )


def bodies_to_splats(state: State, look: Look) -> tuple[SplatState, Tensor]:
    """Return the bodies of a scene as splats, without springs and walls, and the number of the body of each splat.

    `harmonics` [m, 1, 3] of these are plain colours, as nothing depends on where they are seen from.
    """
    part, owners = _bodies(cast(ObjectState, state), look, _colors(state, look, None))
    if not len(owners):
        return _nothing(), torch.zeros(1, dtype=torch.long)
    splats = SplatState(
        means=part.means,
        covars=part.covars,
        opacities=torch.full((len(part.means),), SOLID),
        harmonics=part.colors[:, None],
    )
    return splats, owners


def _nothing() -> SplatState:
    """Return one splat that is not active: a frame in which nothing is."""
    eye = torch.eye(3)[None]
    colors, none = torch.zeros(1, 1, 3), torch.zeros(1)
    return SplatState(means=none.repeat(1, 3), covars=eye, opacities=none, harmonics=colors, active=none.bool())


def _there(state: State, look: Look) -> Tensor:
    """Return which entities [n] are drawn: active ones, unless a rollout has thrown them out of the world."""
    away = (_places(state) - (look.low + look.high) / 2).abs().amax(1)
    return state.active.cpu() & (away < FAR * look.size)


def _bodies(state: ObjectState, look: Look, colors: Tensor) -> tuple[_Part, Tensor]:
    """Return balls and boxes, striped so that one sees them turn, and the number of the body of each splat."""
    there = _there(state, look)
    centres, halves, owners = (value[there[_boxes(state)[2]]] for value in _boxes(state))
    normals, spots = _on_box()
    # As wide as they lie apart on each face, or they would reach far beyond the edges of slabs.
    wide = (WIDE * 2 / ON_EDGE * halves)[:, None] * (1 - (1 - THIN) * normals.abs())
    spots = centres[:, None] + spots * halves[:, None]
    boxes = _placed(state, look, owners, normals.expand_as(spots), spots, wide.square().diag_embed(), colors)
    there[_boxes(state)[2]] = False
    balls = there.nonzero()[:, 0]
    radii = state["radii"].cpu().float()[balls] if "radii" in state else torch.full((len(balls),), look.radius)
    normals = _on_ball().expand(len(balls), -1, -1)
    discs = _discs(normals, WIDE * math.sqrt(4 * math.pi / ON_BALL) * radii[:, None])
    round_ones = _placed(state, look, balls, normals, normals * radii[:, None, None], discs, colors)
    numbers = [owners.repeat_interleave(len(_on_box()[0])), balls.repeat_interleave(ON_BALL)]
    return _joined([boxes, round_ones]), torch.cat(numbers)


def _boxes(state: ObjectState) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes that bodies are: centres [k, 3] and half sides [k, 3] in their own axes, and whose each is."""
    if "half_extents" in state:
        angular = state["object_types"].cpu() != BALL if "object_types" in state else torch.ones(len(state)).bool()
        rows = angular.nonzero()[:, 0]
        return torch.zeros(len(rows), 3), state["half_extents"].detach().cpu().float()[rows], rows
    if "outlines" in state:
        outlines = state["outlines"].detach().cpu().float()
        rows, columns = (outlines[..., 2:] > 0).all(-1).nonzero().unbind(1)
        found = outlines[rows, columns]
        return pad(found[:, :2], (0, 1)), torch.cat([found[:, 2:], found[:, 2:].amin(1, keepdim=True)], 1), rows
    return torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)


def _placed(
    state: ObjectState, look: Look, owners: Tensor, normals: Tensor, spots: Tensor, covars: Tensor, colors: Tensor
) -> _Part:
    """Return splats of things [k, m, ...] in the axes of their `owners` [k] where these are, striped and lit."""
    shown = colors[owners, None].repeat(1, normals.shape[1], 1)
    if "quats" in state:
        turns = rotations(state["quats"].detach().cpu().float())[owners]
        stripes = torch.where(torch.atan2(spots[..., 1], spots[..., 0]).div(math.pi / 3).floor() % 2 == 0, 1.0, BAND)
        shown = shown * stripes[..., None]
        normals, spots = normals @ turns.transpose(1, 2), spots @ turns.transpose(1, 2)
        covars = turns[:, None] @ covars @ turns[:, None].transpose(2, 3)
    lit = DARK + BRIGHT * (normals @ look.lamp()).clamp(min=0)
    return _Part(
        means=(_places(state)[owners, None] + spots).flatten(0, 1),
        covars=covars.flatten(0, 1),
        colors=(shown * lit[..., None]).flatten(0, 1),
    )


def _joined(parts: list[_Part]) -> _Part:
    return _Part(
        means=torch.cat([part.means for part in parts]),
        covars=torch.cat([part.covars for part in parts]),
        colors=torch.cat([part.colors for part in parts]),
    )


def _colors(state: State, look: Look, values: Tensor | None) -> Tensor:
    """Return the colour [n, 3] of each entity: by a shade, else by its type, or of few bodies by their number."""
    if look.shade is not None:
        return look.shade.colors(state[look.shade.field] if values is None else values).float()
    if isinstance(state, ParticleState) and "particle_types" in state:
        return torch.tensor([TYPES.get(kind, BODY) for kind in state["particle_types"].tolist()]).reshape(-1, 3)
    if "colors" in state:
        return state["colors"].detach().cpu().float()
    colors = torch.tensor(BODY).repeat(len(state), 1)
    if isinstance(state, ObjectState) and "springs" not in state and len(state) <= len(HUES):
        colors = torch.tensor(HUES[: len(state)])
    if "fixed" in state:
        colors[state["fixed"].cpu()] = torch.tensor(FIXED)
    return colors


def _springs(state: ObjectState, look: Look) -> _Part:
    ends = state["springs"].cpu() if "springs" in state else torch.zeros(0, 2, dtype=torch.long)
    return _lines(_places(state)[ends[_there(state, look)[ends].all(1)]], look.radius / 4)


def _particles(state: State, look: Look, colors: Tensor) -> _Part:
    """Return a round splat for each particle; in space lit by where it has no neighbours."""
    there = _there(state, look).nonzero()[:, 0]
    places = _places(state)[there]
    colors = colors[there]
    if not look.planar and len(places) > 1:
        colors = colors * (DARK + BRIGHT * (_outward(places, 6 * look.radius) @ look.lamp()).clamp(min=0))[:, None]
    covars = (1.1 * look.radius) ** 2 * torch.eye(3).repeat(len(places), 1, 1)
    return _Part(means=places, covars=covars, colors=colors)


def _outward(places: Tensor, radius: float) -> Tensor:
    """Return [n, 3] the directions away from neighbours, shorter where these are all round."""
    pairs = neighbor_pairs(places, radius)
    away = (places[pairs.receivers] - places[pairs.senders]) / radius
    sums = torch.zeros_like(places).index_add_(0, pairs.receivers, away)
    counts = torch.bincount(pairs.receivers, minlength=len(places)).clamp(min=1)[:, None]
    mean = 4 * sums / counts
    found: Tensor = mean / mean.norm(dim=1, keepdim=True).clamp(min=1)
    return found


def _mesh(state: MeshState, look: Look, values: Tensor | None) -> _Part:
    """Return flat splats that cover the faces, or the lines, of a mesh, in the colours of its field."""
    places, there, faces = _places(state), _there(state, look), seen_faces(state)
    if faces.shape[1] == 2:
        faces = faces[there[faces].all(1)]
        along = ((torch.arange(ON_LINE) + 0.5) / ON_LINE)[:, None]
        mixed = _mixed(state, look, values, faces, torch.cat([1 - along, along], 1))
        return _lines(places[faces], look.radius / 2, mixed.flatten(0, 1))
    triangles, _ = seen_triangles(state)
    triangles = triangles[there[triangles].all(1)]
    corners = places[triangles]
    shares = _within_triangle(max(1, math.ceil(math.sqrt(ON_MESH / max(1, len(triangles))))))
    parts = math.isqrt(len(shares))
    one, two = ((corners[:, k] - corners[:, 0]) / parts for k in (1, 2))
    normals = normalize(torch.linalg.cross(one, two), dim=1)
    both = one[:, :, None] * two[:, None]
    covars = (one[:, :, None] * one[:, None] + two[:, :, None] * two[:, None]) / 18
    covars = 12 * WIDE**2 * (covars - (both + both.transpose(1, 2)) / 36)
    thin = THIN**2 * (one.square().sum(1) + two.square().sum(1))
    covars = covars + thin[:, None, None] * normals[:, :, None] * normals[:, None]
    colors = _mixed(state, look, values, triangles, shares)
    if not look.planar:
        colors = colors * (DARK + BRIGHT * (normals @ look.lamp()).abs())[:, None, None]
    return _Part(
        means=(shares @ corners).flatten(0, 1),
        covars=covars.repeat_interleave(len(shares), 0),
        colors=colors.flatten(0, 1),
    )


def _mixed(state: MeshState, look: Look, values: Tensor | None, nodes: Tensor, shares: Tensor) -> Tensor:
    """Return the colours [f, m, 3] of the field between `nodes` [f, k], `shares` [m, k] of each."""
    if look.shade is None:
        return torch.tensor(BODY).expand(len(nodes), len(shares), 3)
    # Colours between those of two nodes may be none of the scale's.
    numbers = lengths(state[look.shade.field] if values is None else values)[nodes] @ shares.double().T
    return look.shade.colors(numbers.flatten()).float().view(*numbers.shape, 3)


def _walls(box: Tensor, look: Look) -> _Part:
    """Return the edges of a box between its lower and upper corner [2, d]."""
    corners = torch.cartesian_prod(*box.T)
    pairs = torch.combinations(torch.arange(len(corners)))
    along = pairs[((corners[pairs[:, 0]] != corners[pairs[:, 1]]).sum(1) == 1)]
    return _lines(pad(corners, (0, 3 - corners.shape[1]))[along], 0.004 * look.size)


def _lines(ends: Tensor, width: float, colors: Tensor | None = None) -> _Part:
    """Return splats along lines [m, 2, 3], each `ON_LINE` of them."""
    shares = ((torch.arange(ON_LINE) + 0.5) / ON_LINE)[:, None]
    along = (ends[:, 1] - ends[:, 0]) / ON_LINE
    covars = WIDE**2 * along[:, :, None] * along[:, None] + width**2 * torch.eye(3)
    means = (ends[:, :1] * (1 - shares) + ends[:, 1:] * shares).flatten(0, 1)
    colors = torch.tensor(LINE).expand(len(means), 3) if colors is None else colors
    return _Part(means=means, covars=covars.repeat_interleave(ON_LINE, 0), colors=colors)


def _discs(normals: Tensor, radii: Tensor) -> Tensor:
    """Return covariances [..., 3, 3] of flat round splats across `normals` [..., 3]."""
    eye = torch.eye(3)
    through = normals[..., :, None] * normals[..., None, :]
    return radii.square()[..., None, None] * (eye - (1 - (3 * THIN) ** 2) * through)


@cache
def _on_ball() -> Tensor:
    """Return points [m, 3] spread evenly over the unit sphere, along a spiral."""
    number = torch.arange(ON_BALL) + 0.5
    height = 1 - 2 * number / ON_BALL
    turn = number * math.pi * (1 + math.sqrt(5))
    wide = (1 - height.square()).sqrt()
    return torch.stack([wide * turn.cos(), wide * turn.sin(), height], 1)


@cache
def _on_box() -> tuple[Tensor, Tensor]:
    """Return normals [m, 3] and points [m, 3] on the faces of the box from -1 to 1."""
    steps = (torch.arange(ON_EDGE) + 0.5) / ON_EDGE * 2 - 1
    normals, points = [], []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            spots = torch.cartesian_prod(steps, steps)
            point = torch.full((len(spots), 3), sign)
            point[:, [k for k in range(3) if k != axis]] = spots
            points.append(point)
            normals.append(sign * torch.eye(3)[axis].expand(len(spots), 3))
    return torch.cat(normals), torch.cat(points)


@cache
def _within_triangle(parts: int) -> Tensor:
    """Return weights [parts^2, 3] of corners: the middles of the triangles into which a triangle is cut."""
    found = []
    for i in range(parts):
        for j in range(parts - i):
            found.append(((i + 1 / 3) / parts, (j + 1 / 3) / parts))
            if i + j < parts - 1:
                found.append(((i + 2 / 3) / parts, (j + 2 / 3) / parts))
    inner = torch.tensor(found)
    return torch.cat([1 - inner.sum(1, keepdim=True), inner], 1)


def _all_places(trajectory: Trajectory) -> Tensor:
    """Return where entities are at any time, and the corners of walls [m, 3]."""
    state = trajectory.initial
    there = trajectory["positions"].detach().cpu().float().flatten(0, 1) if "positions" in state else _places(state)
    if "positions" in state and not bool(trajectory.active.all()):
        there = there[trajectory.active.cpu().flatten()]
    places = pad(there, (0, 3 - there.shape[1]))
    places = places[torch.isfinite(places).all(1)]
    if not len(places):
        raise ValueError("There is nothing to draw: no entity is active at a finite place.")
    if "boundaries" in state and bool(torch.isfinite(state["boundaries"]).all()):
        box = state["boundaries"][0].detach().cpu().float()
        places = torch.cat([places, pad(box, (0, 3 - box.shape[1]))])
    return places


def _places(state: State) -> Tensor:
    if "positions" not in state and "rest_positions" not in state:
        raise ValueError(f"What is drawn has positions; {type(state).__name__} here has {', '.join(state)}.")
    places = state["positions" if "positions" in state else "rest_positions"].detach().cpu().float()
    return pad(places, (0, 3 - places.shape[1]))


def _up(state: State, dimensions: int) -> Tensor:
    """Return which way is up: against gravity, or the second axis of planes and particles, the third of others."""
    if "gravity" in state:
        down: Tensor = pad(state["gravity"][0].detach().cpu().float(), (0, 3 - dimensions))
        if float(down.norm()) > 0:
            return -normalize(down, dim=0)
    return torch.eye(3)[1 if dimensions < 3 or isinstance(state, ParticleState) else 2]


def _spacing(places: Tensor) -> float:
    """Return the median distance of a point from its nearest neighbour, of a thousand of them."""
    places = places[torch.isfinite(places).all(1)]
    if len(places) < 2:
        return 1.0
    distances, _ = nearest(places[:: max(1, len(places) // 1000)], places, 2)
    return float(distances[:, 1].median()) or 1.0
