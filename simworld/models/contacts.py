"""Where boxes and balls touch, or soon may: points, normals and gaps, differentiable in where the bodies are.

Contacts are between two bodies, or between a body and the table z = 0, which stands as the entity number n
after the last. The normal points from the second body to the first. Two boxes meet as in clipping: along
the axis that separates them most (Gottschalk et al. 1996), at the corners of the overlap of their faces, or
where two edges cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from simworld.state import State

SLOTS = 25  # of two boxes: 4 corners of one face, 4 of the other, 16 crossings of edges, 1 of edges across
SIDEWAYS = 1e-4  # m by which a point may lie beside a face and still count as on it
EDGE_BIAS = 2e-4  # m by which edges must separate boxes more than faces do, to be what touches
BALL = 1


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a scene's geometry is whatever the positions: all that could ever touch, inactive bodies left out.

    `corners` [m] are bodies with a point each at `offsets` [m, 3] in their axes, the centre of a ball of
    `corner_radii` [m, 1]: eight corners of a box (radius 0), the centre of a ball. The others are pairs [p, 2].
    """

    corners: Tensor
    offsets: Tensor
    corner_radii: Tensor
    balls: Tensor
    ball_boxes: Tensor
    boxes: Tensor


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What may touch within a step: rows of `Shapes`, and of pairs of boxes which of their `SLOTS`.

    `ends` [c, 2] are the two entities of each contact, in the order in which `locate` returns them.
    """

    shapes: Shapes
    slots: Tensor
    ends: Tensor


@dataclass(frozen=True, kw_only=True)
class Contacts:
    """Contact points [c, 3], unit normals [c, 3] from second to first, gaps [c, 1] [m], negative in contact.

    `beside` [c, 1] is how far [m] the point lies outside the faces that would touch there, 0 or less within.
    """

    points: Tensor
    normals: Tensor
    gaps: Tensor
    beside: Tensor


@dataclass(frozen=True, kw_only=True)
class Poses:
    """Where bodies are: positions [n, 3], axes as the columns of [n, 3, 3], half extents [n, 3]."""

    positions: Tensor
    axes: Tensor
    half_extents: Tensor


def shapes_of(state: State) -> Shapes:
    """Return what can touch in a state of boxes and balls."""
    entities = torch.arange(state.num_entities, device=state.device)
    balls = state.object_types == BALL
    first, second = torch.triu_indices(len(entities), len(entities), 1, device=state.device)
    together = (state.batch[first] == state.batch[second]) & state.active[first] & state.active[second]
    pairs = torch.stack([first, second], 1)[together]
    kinds = balls[pairs].sum(1)
    mixed = pairs[kinds == 1]
    extents = state.half_extents.detach()
    signs = extents.new_tensor(list(product((-1, 1), repeat=3)))
    boxes, round_ones = entities[~balls & state.active], entities[balls & state.active]
    return Shapes(
        corners=torch.cat([boxes.repeat_interleave(8), round_ones]),
        offsets=torch.cat(
            [(state.half_extents[boxes, None] * signs).flatten(0, 1), extents.new_zeros(len(round_ones), 3)]
        ),
        corner_radii=torch.cat([extents.new_zeros(8 * len(boxes), 1), state.half_extents[round_ones, :1]]),
        balls=pairs[kinds == 2],
        ball_boxes=torch.where(balls[mixed[:, :1]], mixed, mixed.flip(1)),
        boxes=pairs[kinds == 0],
    )


@torch.no_grad()
def find_candidates(shapes: Shapes, poses: Poses, margin: float) -> Candidates:
    """Return what is nearer than `margin` [m] or might slide to where it is."""
    count = len(poses.positions)
    reach = poses.half_extents.norm(dim=1)
    corner = _corners(shapes, poses)[:, 2:] - shapes.corner_radii < margin
    corner = corner[:, 0]
    near = {
        name: pairs[
            (poses.positions[pairs[:, 0]] - poses.positions[pairs[:, 1]]).norm(dim=1) < reach[pairs].sum(1) + margin
        ]
        for name, pairs in (("balls", shapes.balls), ("ball_boxes", shapes.ball_boxes), ("boxes", shapes.boxes))
    }
    chosen = Shapes(
        corners=shapes.corners[corner],
        offsets=shapes.offsets[corner],
        corner_radii=shapes.corner_radii[corner],
        **near,
    )
    _, _, gaps, beside = _boxes(near["boxes"], poses)
    slots = ((gaps < margin) & (beside < margin)).flatten().nonzero()[:, 0]
    ends = [
        torch.stack([chosen.corners, torch.full_like(chosen.corners, count)], 1),
        chosen.balls,
        chosen.ball_boxes,
        chosen.boxes[slots // SLOTS],
    ]
    return Candidates(shapes=chosen, slots=slots, ends=torch.cat(ends))


def locate(candidates: Candidates, poses: Poses) -> Contacts:
    """Return where the candidates are as bodies stand now."""
    shapes = candidates.shapes
    parts = [_table(shapes, poses), _balls(shapes.balls, poses), _ball_boxes(shapes.ball_boxes, poses)]
    if len(candidates.slots):
        points, normals, gaps, beside = (part.flatten(0, 1)[candidates.slots] for part in _boxes(shapes.boxes, poses))
        parts.append((points, normals, gaps, beside))
    points, normals, gaps, beside = (torch.cat(part) for part in zip(*parts, strict=True))
    return Contacts(points=points, normals=normals, gaps=gaps, beside=beside)


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _corners(shapes: Shapes, poses: Poses) -> Tensor:
    turned = torch.einsum("mij,mj->mi", poses.axes[shapes.corners], shapes.offsets)
    return poses.positions[shapes.corners] + turned


def _table(shapes: Shapes, poses: Poses) -> Parts:
    centres = _corners(shapes, poses)
    up = torch.zeros_like(centres)
    up[:, 2] = 1
    gaps = centres[:, 2:] - shapes.corner_radii
    return centres - (shapes.corner_radii + gaps / 2) * up, up, gaps, torch.full_like(gaps, -1.0)


def _balls(pairs: Tensor, poses: Poses) -> Parts:
    first, second = poses.positions[pairs].unbind(1)
    radii = poses.half_extents[pairs][:, :, :1]
    between = first - second
    distances = (between.square().sum(1, keepdim=True) + 1e-16).sqrt()
    normals = between / distances
    gaps = distances - radii.sum(1)
    return second + (radii[:, 1] + gaps / 2) * normals, normals, gaps, torch.full_like(gaps, -1.0)


def _ball_boxes(pairs: Tensor, poses: Poses) -> Parts:
    ball, box = pairs.unbind(1)
    extents, axes = poses.half_extents[box], poses.axes[box]
    local = _into(axes, poses.positions[ball] - poses.positions[box])
    nearest = local.clamp(-extents, extents)
    outside = local - nearest
    distances = (outside.square().sum(1, keepdim=True) + 1e-16).sqrt()
    # A centre within the box leaves it through the nearest face.
    depths = local.abs() - extents
    face = torch.nn.functional.one_hot(depths.argmax(1), 3).to(local) * local.sign()
    within = (depths < 0).all(1, keepdim=True)
    normals = torch.where(within, face, outside / distances)
    distances = torch.where(within, depths.amax(1, keepdim=True), distances)
    gaps = distances - poses.half_extents[ball, :1]
    surface = torch.where(within, local - distances * face, nearest)
    points = poses.positions[box] + _out(axes, surface + normals * gaps / 2)
    return points, _out(axes, normals), gaps, torch.full_like(gaps, -1.0)


def _boxes(pairs: Tensor, poses: Poses) -> Parts:
    """Return points and normals [p, 25, 3], gaps and sideways distances [p, 25, 1] of pairs of boxes."""
    a, b = pairs.unbind(1)
    axes_a, axes_b, ext_a, ext_b = poses.axes[a], poses.axes[b], poses.half_extents[a], poses.half_extents[b]
    between = poses.positions[b] - poses.positions[a]
    cosines = axes_a.mT @ axes_b
    in_a, in_b = _into(axes_a, between), _into(axes_b, between)
    apart_a = in_a.abs() - ext_a - (cosines.abs() @ ext_b[:, :, None])[:, :, 0]
    apart_b = in_b.abs() - ext_b - (cosines.abs().mT @ ext_a[:, :, None])[:, :, 0]
    (best_a, face_a), (best_b, face_b) = apart_a.max(1), apart_b.max(1)
    a_refers = (best_a >= best_b)[:, None]
    face = torch.where(a_refers[:, 0], face_a, face_b)[:, None]
    towards = torch.where(a_refers, in_a, -in_b).gather(1, face)
    reference = (
        torch.where(a_refers, poses.positions[a], poses.positions[b]),
        torch.where(a_refers[:, :, None], axes_a, axes_b),
        torch.where(a_refers, ext_a, ext_b),
    )
    incident = (
        torch.where(a_refers, poses.positions[b], poses.positions[a]),
        torch.where(a_refers[:, :, None], axes_b, axes_a),
        torch.where(a_refers, ext_b, ext_a),
    )
    sign = torch.where(towards < 0, -1.0, 1.0).to(between)
    points, normal, gaps, beside = _faces(reference, incident, face, sign)
    # Normals point from the second of the pair to the first; the reference's face points to the incident.
    normal = torch.where(a_refers, -normal, normal)
    edge_point, edge_normal, edge_apart = _edges(between, poses.positions[a], (axes_a, ext_a), (axes_b, ext_b), cosines)
    across = edge_apart > torch.maximum(best_a, best_b)[:, None] + EDGE_BIAS
    never = torch.full_like(beside, 1.0)
    return (
        torch.cat([points, edge_point[:, None]], 1),
        torch.cat([normal[:, None].expand_as(points), edge_normal[:, None]], 1),
        torch.cat([gaps, edge_apart[:, None]], 1),
        torch.cat([torch.where(across[:, None], never, beside), torch.where(across, -1.0, 1.0).to(gaps)[:, None]], 1),
    )


Box = tuple[Tensor, Tensor, Tensor]


def _faces(reference: Box, incident: Box, face: Tensor, sign: Tensor) -> Parts:
    """Return the corners of the overlap of two faces [p, 24, 3], the reference's normal [p, 3], gaps, sideways."""
    frame, sizes = _turned(reference[1], reference[2], face)
    frame = torch.cat([frame[:, :, :2], frame[:, :, 2:] * sign[:, :, None]], 2)
    # The other box's face that looks most against the normal, in the frame (along, along, normal).
    local = frame.mT @ incident[1]
    facing = local[:, 2].abs().argmax(1, keepdim=True)
    rows, other_sizes = _turned(local, incident[2], facing)
    side = torch.where(rows[:, 2, 2:] > 0, -1.0, 1.0).to(rows)
    centre = _into(frame, incident[0] - reference[0]) + side * other_sizes[:, 2:] * rows[:, :, 2]
    spans = (rows[:, :, :2] * other_sizes[:, None, :2]).mT  # [p, 2, 3]: half the face's sides
    lengths, limits = other_sizes[:, :2], sizes[:, :2]
    parts = (
        _incident_corners(centre, spans, limits),
        _reference_corners(centre, spans, lengths, limits),
        _crossings(centre, spans, lengths, limits),
    )
    places, beside = torch.cat([p for p, _ in parts], 1), torch.cat([s for _, s in parts], 1)
    gaps = places[:, :, 2:] - sizes[:, None, 2:]
    midway = torch.cat([places[:, :, :2], places[:, :, 2:] - gaps / 2], 2)
    return reference[0][:, None] + midway @ frame.mT, frame[:, :, 2], gaps, beside[:, :, None]


def _incident_corners(centre: Tensor, spans: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    signs = centre.new_tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    places = centre[:, None] + signs @ spans
    return places, (places[:, :, :2].abs() - limits[:, None]).amax(2)


def _reference_corners(centre: Tensor, spans: Tensor, lengths: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    signs = centre.new_tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    corners = signs * limits[:, None]
    flat = spans[:, :, :2]
    # The face looks at the reference within 55 degrees, so its shadow there has an area.
    area = (flat[:, 0, 0] * flat[:, 1, 1] - flat[:, 0, 1] * flat[:, 1, 0])[:, None]
    area = torch.where(area.abs() < 1e-12, 1e-12, area)
    away = corners - centre[:, None, :2]
    s = (away[:, :, 0] * flat[:, 1, 1, None] - away[:, :, 1] * flat[:, 1, 0, None]) / area
    t = (away[:, :, 1] * flat[:, 0, 0, None] - away[:, :, 0] * flat[:, 0, 1, None]) / area
    part = torch.stack([s, t], 2)
    heights = centre[:, None, 2:] + part @ spans[:, :, 2:]
    return torch.cat([corners, heights], 2), ((part.abs() - 1) * lengths[:, None]).amax(2)


def _crossings(centre: Tensor, spans: Tensor, lengths: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the four sides of one face cross the four lines along those of the other."""
    signs = centre.new_tensor([-1.0, 1.0])
    # Side (k, sign): the middle centre + sign * span of the other, running along span k.
    middles = centre[:, None, None] + signs[:, None] * spans.flip(1)[:, :, None]  # [p, k, sign, 3]
    runs = spans[:, :, None].expand_as(middles)
    lines = signs * limits[:, :, None]  # [p, coordinate, sign]
    along = runs[..., :2, None]
    # Sides this close to parallel cross a line anywhere; their corners lie close enough to it.
    level = along.abs() < 0.002 * lengths[:, :, None, None, None]
    along = torch.where(level, 1.0, along)
    part = (lines[:, None, None] - middles[..., :2, None]) / along  # [p, k, sign, coordinate, sign]
    places = middles[:, :, :, None, None] + part[..., None] * runs[:, :, :, None, None]
    other = places[..., :2].flip(-1).diagonal(dim1=3, dim2=5).movedim(-1, 3)  # the coordinate along the line
    beside = other.abs() - limits.flip(1)[:, None, None, :, None]
    beyond = torch.where(level, 1.0, (part.abs() - 1) * lengths[:, :, None, None, None])
    return places.flatten(1, 4), torch.maximum(beside, beyond).flatten(1)


def _edges(
    between: Tensor, start: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], cosines: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return point [p, 3], normal [p, 3] and gap [p, 1] of the two edges that separate boxes most."""
    (axes_a, ext_a), (axes_b, ext_b) = first, second
    crosses = torch.linalg.cross(axes_a.mT[:, :, None], axes_b.mT[:, None], dim=-1).flatten(1, 2)  # [p, 9, 3]
    sines = (1 - cosines.square()).clamp(min=1e-6).sqrt().flatten(1)
    lines = crosses / sines[:, :, None]
    spread = (lines @ axes_a).abs() @ ext_a[:, :, None] + (lines @ axes_b).abs() @ ext_b[:, :, None]
    along = (lines @ between[:, :, None])[:, :, 0]
    apart = torch.where(sines > 0.02, along.abs() - spread[:, :, 0], -1.0)
    gap, which = apart.max(1, keepdim=True)
    chosen = which[:, :, None]
    normal = lines.gather(1, chosen.expand(-1, 1, 3))[:, 0]
    normal = torch.where(along.gather(1, which) > 0, -normal, normal)  # from the second box to the first
    i, j = which // 3, which % 3
    on_a = start + _out(axes_a, _support(axes_a, ext_a, -normal, i))
    on_b = start + between + _out(axes_b, _support(axes_b, ext_b, normal, j))
    run_a = axes_a.gather(2, i[:, None].expand(-1, 3, 1))[:, :, 0]
    run_b = axes_b.gather(2, j[:, None].expand(-1, 3, 1))[:, :, 0]
    cosine = (run_a * run_b).sum(1, keepdim=True)
    away = on_b - on_a
    sine = (1 - cosine.square()).clamp(min=1e-4)
    part = ((away * run_a).sum(1, keepdim=True) - cosine * (away * run_b).sum(1, keepdim=True)) / sine
    return on_a + part * run_a - normal * gap / 2, normal, gap


def _support(axes: Tensor, extents: Tensor, direction: Tensor, edge: Tensor) -> Tensor:
    """Return the middle, in a box's axes, of its farthest edge in a direction, of those along one axis."""
    side = torch.where(_into(axes, direction) > 0, 1.0, -1.0).to(extents)
    return (extents * side).scatter(1, edge, 0.0)


def _turned(columns: Tensor, sizes: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns [p, 3, 3] and sizes [p, 3] in cyclic order such that number `last` [p, 1] comes last."""
    order = (last + torch.tensor([1, 2, 3], device=last.device)) % 3
    return columns.gather(2, order[:, None].expand(-1, 3, 3)), sizes.gather(1, order)


def _into(axes: Tensor, vectors: Tensor) -> Tensor:
    return (axes.mT @ vectors[:, :, None])[:, :, 0]


def _out(axes: Tensor, vectors: Tensor) -> Tensor:
    return (axes @ vectors[:, :, None])[:, :, 0]
