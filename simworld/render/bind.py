"""Splats bound to a simulated state at rest, and posed as it moves: exactly, and differentiable in the state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simworld.kernels.nearest import nearest
from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.quaternions import rotations
from simworld.render.faces import seen_triangles
from simworld.render.harmonics import degree_of, turn_harmonics
from simworld.state import State

Mode = Literal["particle", "knn", "mesh", "tet", "rigid"]
FLAT = 0.02  # of the widest variance of a neighbourhood: along an axis with less it says nothing about the motion
SINGULAR = 1e-4  # least of F's singular values over its largest, from which it counts as having no inside
NEWTON_STEPS = 12
CELL_FLAT = 1e-12  # the same of cells, which are given, not chosen
FLAT_TET = 1e-6  # of the cube of its longest side at the first corner: volume of a cell that is no tetrahedron
AT_ONCE = 2**24  # distances laid out together


@dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """Which entities each of n splats follows, and how.

    A splat at x goes to x + u + D (x - c): u the mean of the displacements of its `entities` [n, k] by `weights`
    [n, k], c that of their places at rest, and D = F - 1 the sum of displacements times `gradients` [n, k, 3], which
    says how the motion changes from place to place. Along the last 3 - `ranks` [n] of the axes `frames` [n, 3, 3] (in
    columns) the entities, in a row or a plane, say nothing: there the splat turns with them. Bodies turn by `quats`.
    """

    splats: SplatState
    covars: Tensor
    rest: Tensor
    quats: Tensor | None
    entities: Tensor
    weights: Tensor
    gradients: Tensor
    frames: Tensor
    ranks: Tensor


def bind(splats: SplatState, rest_state: State, *, mode: Mode = "knn", num_neighbors: int = 12) -> Binding:
    """Return splats bound to the entities of a state at rest, in the same frame and unit.

    "particle": each splat moves with its nearest particle, and deforms as that one's neighbours do. "knn": with the
    mean of its nearest entities. "mesh": with the nearest triangle of a mesh's surface. "tet": with the tetrahedron
    that it is in, or the nearest. "rigid": with its nearest body, whose `quats` turn it. `num_neighbors` is for the
    first two.

    Raises:
        ValueError: there is no such mode, or the state lacks what it needs.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}.")
    _check_scenes("bind", splats, rest_state)
    points, rest = splats.means.detach(), _places(rest_state).detach().to(splats.means)
    there = rest_state.active.to(rest.device)
    if not bool(there.any()) or not bool(torch.isfinite(rest[there]).all()):
        raise ValueError("bind needs active entities at finite places; the state at rest has others, or none.")
    if mode in ("mesh", "tet"):
        entities, weights, gradients, spread = _in_cells(points, rest, _cells(rest_state, mode))
    elif mode == "rigid":
        _, entities = nearest(points, rest, 1, among=there)
        weights, gradients = torch.ones_like(points[:, :1]), torch.zeros_like(points[:, None])
        spread = points.new_zeros(len(points), 3, 3)
    else:
        entities, weights, gradients, spread = _among(points, rest, there, mode, num_neighbors)
    quats = rest_state["quats"].detach().to(points) if mode == "rigid" and "quats" in rest_state else None
    frames, ranks = _frames(spread.to(points), CELL_FLAT if mode in ("mesh", "tet") else FLAT)
    whole = splats.covars if "covars" in splats else covariances(splats.quats, splats.scales)
    return Binding(
        splats=splats,
        covars=whole,
        rest=rest,
        quats=quats,
        entities=entities,
        weights=weights,
        gradients=gradients,
        frames=frames,
        ranks=ranks,
    )


def pose(
    binding: Binding, state: State, *, anisotropy_cap: float | None = None, freeze_shape: bool = False
) -> SplatState:
    """Return the bound splats where a state of the same entities takes them; differentiable in the state.

    Covariances become F S F^T, F the local deformation gradient, and harmonics turn by its rotation. Where entities
    are at rest, the splats are as they were bound, bit for bit. `anisotropy_cap` is the most that a splat's longest
    axis may be times its shortest; `freeze_shape` lets splats turn only, for noisy predictions. Entities that are
    inactive, or no longer at finite places, take along the splats that follow them most, and move no others. Splats
    where the motion is singular or inverted keep their shape, with a warning that says how many.

    Raises:
        ValueError: the state has other entities or several scenes, or the cap is less than 1.
    """
    _check_scenes("pose", binding.splats, state)
    places = _places(state).to(binding.rest)
    if places.shape != binding.rest.shape:
        raise ValueError(
            f"The splats are bound to {len(binding.rest)} entities; the state has {len(places)}. Bind them to this one."
        )
    if anisotropy_cap is not None and anisotropy_cap < 1:
        raise ValueError(f"anisotropy_cap must be 1 or more; got {anisotropy_cap}.")
    there = state.active.to(places.device) & torch.isfinite(places).all(1)
    moved = torch.where(there[:, None], places - binding.rest, 0.0)[binding.entities]
    if not bool(there.all()):
        moved = _without(moved, binding.weights, there[binding.entities])
    change, turn = _gradients(binding, moved, state)
    centres = (binding.weights[..., None] * binding.rest[binding.entities]).sum(1)
    shift = (binding.weights[..., None] * moved).sum(1)
    means = binding.splats.means + shift + (change @ (binding.splats.means - centres)[..., None])[..., 0]
    eye = torch.eye(3, dtype=change.dtype, device=change.device)
    shape = turn if freeze_shape else eye + change
    covars = shape @ binding.covars @ shape.transpose(1, 2)
    if anisotropy_cap is not None:
        covars = _capped(covars, anisotropy_cap)
    harmonics = binding.splats.harmonics
    if degree_of(harmonics):
        harmonics = turn_harmonics(harmonics, turn)
    most = binding.entities.gather(1, binding.weights.argmax(1, keepdim=True))[:, 0]
    return SplatState(
        means=means,
        covars=covars,
        opacities=binding.splats.opacities,
        harmonics=harmonics,
        active=binding.splats.active & there[most],
    )


def _without(moved: Tensor, weights: Tensor, there: Tensor) -> Tensor:
    """Return displacements [n, k, 3], those of entities that are not there as the mean of the others'."""
    shares = weights.clamp(min=0) * there
    mean = (shares[..., None] * moved).sum(1) / shares.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.where(there[..., None], moved, mean[:, None])


def polar_rotation(matrices: Tensor) -> Tensor:
    """Return the rotations [..., 3, 3] nearest to matrices [..., 3, 3] of positive determinant.

    By Newton's method (Higham 1986), which has a gradient where singular values are equal, as a decomposition by
    singular values has not.
    """
    found: Tensor = matrices
    for _ in range(NEWTON_STEPS):
        inverse = _cofactors(found) / torch.linalg.det(found)[..., None, None]
        scale = (inverse.detach().norm(dim=(-2, -1)) / found.detach().norm(dim=(-2, -1))).sqrt()[..., None, None]
        found = 0.5 * (scale * found + inverse / scale)
    return found


def _gradients(binding: Binding, moved: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Return D = F - 1 [n, 3, 3] and the rotation of F; of singular and inverted ones a rotation alone."""
    if binding.quats is not None:
        turn = _body_turns(binding, state)
        eye = torch.eye(3, dtype=turn.dtype, device=turn.device)
        return turn - eye, turn
    eye = torch.eye(3, dtype=moved.dtype, device=moved.device)
    change = moved.transpose(1, 2) @ binding.gradients
    change = change + _completed(change, binding.frames, binding.ranks)
    sizes = torch.linalg.svdvals((eye + change).detach())
    folded = torch.linalg.det((eye + change).detach()) <= 0
    bad = folded | (sizes[:, 2] < SINGULAR * sizes[:, 0]) | ~torch.isfinite(sizes).all(1)
    turn = polar_rotation(eye + torch.where(bad[:, None, None], 0.0, change))
    if bool(bad.any()):
        warnings.warn(
            f"The motion is singular or inverted at {int(bad.sum())} of {len(bad)} splats; these keep their shape.",
            stacklevel=3,
        )
        left, _, right = torch.linalg.svd(torch.nan_to_num(eye + change.detach())[bad])
        ends = torch.ones_like(sizes[bad])
        ends[:, 2] = torch.linalg.det(left @ right)
        nearest = (left * ends[:, None]) @ right
        turn = turn.index_put((bad.nonzero()[:, 0],), nearest)
        change = torch.where(bad[:, None, None], turn - eye, change)
    return change, turn


def _body_turns(binding: Binding, state: State) -> Tensor:
    assert binding.quats is not None
    if "quats" not in state:
        raise ValueError("The splats are bound to bodies that turn; this state has no quats.")
    own = binding.entities[:, 0]
    now, rest = rotations(state["quats"].to(binding.quats))[own], rotations(binding.quats)[own]
    eye = torch.eye(3, dtype=now.dtype, device=now.device)
    return eye + (now - rest) @ rest.transpose(1, 2)  # at rest exactly 1, with the gradient of a turn


def _completed(change: Tensor, frames: Tensor, ranks: Tensor) -> Tensor:
    """Return what D lacks along the axes of which neighbourhoods say nothing.

    In a plane, the normal goes to the normal. In a row, what is across it turns by the least rotation that takes the
    row along. The same arithmetic is done at rest and after, so that without motion nothing is added.
    """
    # Laid out alike, so that at rest the same sums are taken in the same order.
    first, second, third = (axis.contiguous() for axis in frames.unbind(-1))
    one = first + (change @ first[..., None])[..., 0]
    two = second + (change @ second[..., None])[..., 0]
    normal = normalize(torch.linalg.cross(one, two), dim=1) - normalize(torch.linalg.cross(first, second), dim=1)
    plane = normal[:, :, None] * third[:, None]
    before, after = normalize(first, dim=1), normalize(one, dim=1)
    axis = torch.linalg.cross(before, after - before)  # exactly 0 at rest
    cosine = (before * after).sum(1)
    steep = 1 / (1 + cosine.clamp(min=-0.999))

    def turned(vector: Tensor) -> Tensor:
        across = torch.linalg.cross(axis, vector)
        added: Tensor = across + steep[:, None] * torch.linalg.cross(axis, across)
        return added

    row = turned(second)[:, :, None] * second[:, None] + turned(third)[:, :, None] * third[:, None]
    ranks = ranks[:, None, None]
    return torch.where(ranks == 2, plane, torch.where(ranks == 1, row, 0.0))


def _capped(covars: Tensor, most: float) -> Tensor:
    """Return covariances whose least eigenvalue is no less than the greatest over `most` squared.

    The correction is a constant to gradients: eigenvectors of round splats have none.
    """
    values, vectors = torch.linalg.eigh(covars.detach())
    lifted = torch.maximum(values, values[:, 2:] / most**2)
    # Of a splat without thickness there is nothing to stretch: what is missing is added.
    correct: Tensor = (vectors * (lifted - values)[:, None]) @ vectors.transpose(1, 2)
    return covars + correct


def _among(points: Tensor, rest: Tensor, there: Tensor, mode: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return entities, weights, gradients and variances of splats between points: moving least squares."""
    if count < 1:
        raise ValueError(f"num_neighbors must be 1 or more; got {count}.")
    count = min(count, int(there.sum()))
    if mode == "particle":
        own = nearest(points, rest, 1, among=there)[1][:, 0]
        near = nearest(rest, rest, count, among=there)[1][own]  # a particle's nearest is itself
        centres = rest[own]
        weights = (near == own[:, None]).to(rest)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        from_here = points * 0 + centres
    else:
        _, near = nearest(points, rest, count, among=there)
        from_here = points
    away = (rest[near] - from_here[:, None]).norm(dim=2)
    # Weights fade to nothing a little beyond the farthest, so that none jumps as neighbours change from splat to splat.
    width = 1.1 * away.amax(1, keepdim=True) + 1e-12
    falling = (1 - (away / width).square()).clamp(min=0).square()
    falling = falling / falling.sum(1, keepdim=True)
    if mode == "knn":
        weights = falling
    centres = (weights[..., None] * rest[near]).sum(1)
    offsets = rest[near] - centres[:, None]
    spread = (offsets * falling[..., None]).transpose(1, 2) @ offsets
    gradients = falling[..., None] * (offsets @ _inverse(spread))
    # Displacements count from that of the centre: gradients of a motion that all share add up to nothing.
    gradients = gradients - weights[..., None] * gradients.sum(1, keepdim=True)
    return near, weights, gradients, spread


def _inverse(spread: Tensor) -> Tensor:
    """Return the inverse [n, 3, 3] of variances, nothing along axes that are flat."""
    values, vectors = torch.linalg.eigh(spread.double())
    widest = values[:, 2:].clamp(min=1e-300)
    inverse = torch.where(values > FLAT * widest, 1 / values, 0.0)
    found: Tensor = (vectors * inverse[:, None]) @ vectors.transpose(1, 2)
    return found.to(spread)


def _frames(spread: Tensor, flat: float) -> tuple[Tensor, Tensor]:
    """Return the axes [n, 3, 3] of variances, the widest first, and how many of them are not flat [n]."""
    values, vectors = torch.linalg.eigh(spread.double())
    frames = vectors.flip(-1)
    turned = torch.linalg.det(frames)[:, None].sign()
    frames = torch.cat([frames[..., :2], (frames[..., 2] * turned)[..., None]], -1)
    return frames.to(spread), (values > flat * values[:, 2:].clamp(min=1e-300)).sum(1)


def _in_cells(points: Tensor, rest: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the corners of the cell nearest to each splat, its place among them, how that changes, and variances."""
    corners = rest[cells]
    sides = (corners[:, 1:] - corners[:, :1]).double()
    slopes = torch.linalg.pinv(sides, rtol=1e-9)  # [c, 3, corners - 1]
    slopes = torch.cat([-slopes.sum(2, keepdim=True), slopes], 2).transpose(1, 2).to(points)  # [c, corners, 3]
    own = _nearest_cell(points, corners, slopes)
    inside = (slopes[own] @ (points - corners[own, 0])[..., None])[..., 0]
    weights = torch.cat([1 + inside[:, :1], inside[:, 1:]], 1)
    return cells[own], weights, slopes[own], sides[own].transpose(1, 2) @ sides[own]


def _nearest_cell(points: Tensor, corners: Tensor, slopes: Tensor) -> Tensor:
    """Return which of cells [c] is nearest to each point: by a point of it, where the weights below 0 are set to 0."""
    found = []
    flat = corners.shape[1] == 3
    for part in torch.split(points, max(1, AT_ONCE // (16 * max(1, len(corners))))):
        places = torch.einsum("ckd,ncd->nck", slopes, part[:, None] - corners[None, :, 0])
        places = torch.cat([1 + places[..., :1], places[..., 1:]], 2)
        clipped = places.clamp(min=0)
        clipped = clipped / clipped.sum(2, keepdim=True)
        nearest = torch.einsum("nck,ckd->ncd", clipped, corners)
        away = (part[:, None] - nearest).square().sum(2)
        depth = torch.where((places >= 0).all(2), 0.0, away) if not flat else away
        found.append(depth.argmin(1))
    return torch.cat(found)


def _cells(state: State, mode: str) -> Tensor:
    if "cells" not in state:
        raise ValueError(f"The mode {mode!r} needs a mesh; {type(state).__name__} has no cells. Use 'knn'.")
    cells = seen_triangles(state)[0] if mode == "mesh" else state["cells"]
    if not len(cells):
        raise ValueError(f"The mode {mode!r} needs a mesh with cells; this one has none. Use 'knn'.")
    if mode == "tet":
        sides = (_places(state)[cells[:, 1:4]] - _places(state)[cells[:, :1]]).detach().double()
        volumes = torch.linalg.det(sides).abs() if cells.shape[1] == 4 else sides.new_zeros(1)
        if float((volumes / sides.norm(dim=2).amax(1) ** 3).median()) < FLAT_TET:
            raise ValueError(
                f"The mode 'tet' needs tetrahedra; got flat cells, or of {cells.shape[1]} nodes. Use 'mesh'."
            )
    return cells


def _check_scenes(what: str, splats: SplatState, state: State) -> None:
    if splats.num_scenes != 1 or state.num_scenes != 1:
        raise ValueError(
            f"{what} takes one scene; got {splats.num_scenes} of splats and {state.num_scenes} of entities. Take "
            "scene(i) of each."
        )


def _places(state: State) -> Tensor:
    """Return where entities are, in space: [n, 3], planar ones at height 0."""
    if "positions" not in state and "rest_positions" not in state:
        raise ValueError(f"Splats follow positions; {type(state).__name__} here has only {', '.join(state)}.")
    places = state["positions" if "positions" in state else "rest_positions"]
    return torch.nn.functional.pad(places, (0, 3 - places.shape[1]))


def _cofactors(matrices: Tensor) -> Tensor:
    """Return the cofactors [..., 3, 3]: the inverse transposed times the determinant."""
    a, b, c = matrices.unbind(-2)
    return torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -2)
