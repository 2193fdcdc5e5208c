"""Surfaces: of particles, as splats, sampled, and laid onto each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kernels.nearest import nearest
from simworld.kinds import SplatState
from simworld.quaternions import quaternion
from simworld.render.harmonics import FLAT

GREY, LAMP, SHADE = 0.75, (0.3, -0.5, 0.8), 0.25  # of meshes without colours; where light comes from; least of it
COVER, THIN = 0.85, 0.05  # standard deviation of a splat along its face to the distance of splats; across it to that
DISTANCES_AT_ONCE = 2**22
SAMPLED = 500  # points that tell the spacing of a cloud, and roughly where it lies
MOST_STEPS, STILL, EXACT = 60, 1e-2, 1e-6  # of ICP within one reach; moves, to the reach, that end it
NEIGHBORHOOD, SURROUNDED, OUTER = 3.0, 50, 0.15  # spacings; neighbours of a solid's particles; their shift at its edge


class _Placing(NamedTuple):
    rotation: Tensor
    translation: Tensor


def surface(points: Tensor, *, spacing: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the vertices [v, 3] and triangles [f, 3] of the surface on or round which `points` [n, 3] lie.

    Poisson reconstruction (Kazhdan et al. 2006) by open3d, closed but where it strays from all points, which is cut
    off. Of particles that fill a body the outer ones count alone.
    `spacing` is the distance of neighbours, by default the median one. Triangles have their outer side to the front.

    Raises:
        ValueError: the points are not [n, 3] of 16 or more, not finite, or the spacing is not positive.
        ImportError: open3d is not there.
    """
    _check_cloud("surface", points, 16)
    spacing = _spacing(points.double()) if spacing is None else spacing
    if not spacing > 0:
        raise ValueError(f"surface needs a spacing > 0 of different points; got {spacing}.")
    o3d = needed("open3d", "surface", "open3d")
    cloud = _cloud(o3d, _outer(points.detach().double().cpu(), spacing))
    near = o3d.geometry.KDTreeSearchParamHybrid(radius=NEIGHBORHOOD * spacing, max_nn=30)
    cloud.estimate_normals(search_param=near)
    cloud.orient_normals_consistent_tangent_plane(15)
    extent = float(np.ptp(np.asarray(cloud.points), axis=0).max())
    depth = min(max(math.ceil(math.log2(1.1 * extent / spacing)), 4), 10)
    mesh, _ = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(cloud, depth=depth, n_threads=1)
    vertices = torch.tensor(np.asarray(mesh.vertices), dtype=points.dtype)
    faces = torch.tensor(np.asarray(mesh.triangles), dtype=torch.int64)
    near_points = _nearest(vertices.double(), points.detach().double().cpu())[0] <= NEIGHBORHOOD * spacing
    vertices, faces = _kept(vertices, faces, near_points)
    corners = vertices[faces].double()
    volume = torch.linalg.det(corners).sum()  # six times; negative where the normals came out inwards
    return vertices.to(points.device), (faces if float(volume) >= 0 else faces.flip(1)).to(points.device)


def _kept(vertices: Tensor, faces: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the triangles all of whose corners are kept, and their vertices."""
    faces = faces[kept[faces].all(1)]
    used, numbers = torch.unique(faces, return_inverse=True)
    return vertices[used], numbers.reshape(-1, 3)


def register(
    source: Tensor,
    target: Tensor,
    *,
    reach: float | None = None,
    starts: Tensor | None = None,
    backend: Literal["torch", "open3d"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rotation [3, 3] and translation [3] that lay points `source` [n, 3] onto `target` [m, 3]: R x + t.

    Iterated closest points (Besl and McKay 1992): pairs of nearest points within a reach that is halved from the size
    of the target to `reach`, by default thrice the target's spacing; at the last only pairs nearest both ways. So
    clouds may overlap in part, and points need no order. `starts` [k, 3, 3] are rotations about the cloud's centre to
    begin from; the one counts that brings most points nearest. By default there is one, none: good for turns of up to
    some 45 degrees. From `quarter_turns()` any turn is mostly found. The backend brings near what is always laid down
    exactly by torch: open3d where it is there, by default.

    Raises:
        ValueError: a cloud is not [n, 3] of 3 or more finite points, or they never come within reach.
        ImportError: the backend open3d is asked for and not there.
    """
    _check_cloud("register", source, 3)
    _check_cloud("register", target, 3)
    moving, fixed = source.detach().double().cpu(), target.detach().double().cpu()
    centre, goal = moving.mean(0), fixed.mean(0)
    moving, fixed = moving - centre, fixed - goal
    few, some = (cloud[:: math.ceil(len(cloud) / SAMPLED)] for cloud in (moving, fixed))
    reach = 3 * _spacing(fixed) if reach is None else reach
    step = _icp_open3d if (backend or ("open3d" if find_spec("open3d") else "torch")) == "open3d" else _icp_torch
    turns = torch.eye(3, dtype=torch.float64)[None] if starts is None else starts.detach().double().cpu()
    near = max((_brought_near(few, some, turn, reach, step) for turn in turns), key=lambda found: found[0])[1]
    rotation, translation = _icp_torch(moving, fixed, near, reach, both_ways=True)
    distances, _, _ = _nearest(moving @ rotation.T + translation, fixed)
    if int((distances <= reach).sum()) < 3:
        raise ValueError(f"register found no way to bring the clouds within reach, {reach:.3g}; give other starts.")
    return rotation.to(source), (translation + goal - rotation @ centre).to(source)


def _brought_near(
    source: Tensor, target: Tensor, turn: Tensor, reach: float, step: Callable[..., _Placing]
) -> tuple[float, _Placing]:
    """Return how well a placing fits, from 0 to 1, and the placing."""
    placing, far = _Placing(turn, source.new_zeros(3)), max(float((target.amax(0) - target.amin(0)).norm()) / 2, reach)
    while True:
        placing = step(source, target, placing, far)
        if far <= reach:
            break
        far = max(far / 2, reach)
    distances, _, _ = _nearest(source @ placing.rotation.T + placing.translation, target)
    return float((1 - distances / reach).clamp(min=0).mean()), placing


def _icp_torch(source: Tensor, target: Tensor, placing: _Placing, reach: float, both_ways: bool = False) -> _Placing:
    """Return a placing after which pairs of nearest points within reach stay the same, all but.

    Of pairs nearest `both_ways` none is of points that lie beyond the other cloud's edge.
    """
    still = reach * (EXACT if both_ways else STILL)
    for _ in range(MOST_STEPS):
        here = source @ placing.rotation.T + placing.translation
        distances, found, back = _nearest(here, target)
        near = distances <= reach
        if both_ways:
            near &= back[found] == torch.arange(len(here))
        if int(near.sum()) < 3:
            return placing
        placing = _kabsch(source[near], target[found[near]])
        if float((source @ placing.rotation.T + placing.translation - here).norm(dim=1).max()) <= still:
            break
    return placing


def _icp_open3d(source: Tensor, target: Tensor, placing: _Placing, reach: float) -> _Placing:
    o3d = needed("open3d", "register", "open3d")
    start = np.eye(4)
    start[:3, :3], start[:3, 3] = placing.rotation.numpy(), placing.translation.numpy()
    tools = o3d.pipelines.registration
    found = tools.registration_icp(
        _cloud(o3d, source),
        _cloud(o3d, target),
        reach,
        start,
        tools.TransformationEstimationPointToPoint(),
        tools.ICPConvergenceCriteria(relative_fitness=1e-9, relative_rmse=1e-9, max_iteration=MOST_STEPS),
    )
    matrix = torch.tensor(np.array(found.transformation), dtype=torch.float64)
    return _Placing(matrix[:3, :3], matrix[:3, 3])


def _kabsch(source: Tensor, target: Tensor) -> _Placing:
    """Return the placing with the least squared distances of pairs of points (Kabsch 1976)."""
    a, b = source.mean(0), target.mean(0)
    left, _, right = torch.linalg.svd((source - a).T @ (target - b))
    signs = source.new_tensor([1.0, 1.0, float(torch.linalg.det(left @ right).sign())])
    rotation = right.T * signs @ left.T
    return _Placing(rotation, b - rotation @ a)


def _nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distances [n] to the nearest of `others` [m], its numbers [n], and the numbers [m] of theirs."""
    rows, distances, found = max(1, DISTANCES_AT_ONCE // len(others)), [], []
    best, back = others.new_full((len(others),), math.inf), torch.zeros(len(others), dtype=torch.int64)
    for first, part in enumerate(torch.split(points, rows)):
        every = torch.cdist(part, others)
        there, here = every.min(1), every.min(0)
        distances.append(there.values)
        found.append(there.indices)
        back = torch.where(here.values < best, here.indices + first * rows, back)
        best = torch.minimum(best, here.values)
    return torch.cat(distances), torch.cat(found), back


def _spacing(points: Tensor) -> float:
    """Return the median distance of points to their nearest neighbours."""
    distances, _ = nearest(points[:: math.ceil(len(points) / SAMPLED)], points, 2)
    return float(distances[:, 1].median())


def _outer(points: Tensor, spacing: float) -> Tensor:
    """Return the points, or those at the edge of a body that they fill: the ones whose neighbours lie to one side."""
    rows, counts, shifts = max(1, DISTANCES_AT_ONCE // len(points)), [], []
    for part in torch.split(points, rows):
        near = (torch.cdist(part, points) <= NEIGHBORHOOD * spacing).to(points)
        counts.append(near.sum(1))
        shifts.append((near @ points / counts[-1][:, None] - part).norm(dim=1))
    if float(torch.cat(counts).median()) < SURROUNDED:
        return points
    return points[torch.cat(shifts) > OUTER * NEIGHBORHOOD * spacing]


def _cloud(o3d: Any, points: Tensor) -> Any:
    return o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points.numpy()))


def _check_cloud(what: str, points: Tensor, least: int) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < least or not bool(points.isfinite().all()):
        raise ValueError(f"{what} takes finite points [n, 3], n >= {least}; got {list(points.shape)} {points.dtype}.")


def sample_mesh(mesh: str | Path | tuple[Tensor, Tensor], count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points [count, 3] spread evenly over a mesh, and the unit normals [count, 3] of the faces they lie on.

    `mesh` is a file that trimesh reads (OBJ, STL, PLY, GLB, OFF), or vertices [v, 3] and triangles [f, 3].

    Raises:
        ValueError: there is no such file, it has no triangle, or none with an area; the count is not positive.
    """
    vertices, faces, _ = _mesh(mesh) if isinstance(mesh, str | Path) else (*mesh, None)
    found = _samples(vertices, faces, count, seed)
    return (found.weights[..., None] * vertices[found.corners]).sum(1), found.normals.to(vertices)


def splats_from_mesh(path: str | Path, *, count: int = 20_000, seed: int = 0) -> SplatState:
    """Return opaque flat splats that lie on the faces of a mesh and cover them, in its vertices' colours.

    A mesh without colours is grey, brighter where it faces a lamp above. Details smaller than a splat's standard
    deviation, about the root of the area that each of `count` has, are blurred.

    Raises:
        ValueError: there is no such file, it has no triangle, or none with an area; the count is not positive.
    """
    vertices, faces, colours = _mesh(path)
    found = _samples(vertices, faces, count, seed)
    normals = found.normals
    if colours is None:
        lit = (normals @ torch.nn.functional.normalize(torch.tensor(LAMP).to(normals), dim=0) + 1) / 2
        shades = (GREY * (SHADE + (1 - SHADE) * lit))[:, None].expand(-1, 3)
    else:
        shades = (found.weights[..., None] * colours[found.corners]).sum(1)
    # Any direction along the face will do for its first axis: the one across the normal's least number.
    least = torch.nn.functional.one_hot(normals.abs().argmin(1), 3).to(normals)
    first = torch.nn.functional.normalize(torch.linalg.cross(least, normals), dim=1)
    axes = torch.stack([first, torch.linalg.cross(normals, first), normals], 2)
    width = math.sqrt(found.area / count)
    made: dict[str, Any] = {
        "means": (found.weights[..., None] * vertices[found.corners]).sum(1),
        "quats": quaternion(axes),
        "scales": torch.tensor([COVER, COVER, THIN]).mul(width).expand(count, 3),
        "opacities": torch.full((count,), 0.99),
        "harmonics": ((shades - 0.5) / FLAT)[:, None],
    }
    return SplatState(**{name: value.float().contiguous() for name, value in made.items()})


class _Samples(NamedTuple):
    """The corners [n, 3] of the faces that points lie on, their weights [n, 3], the faces' normals, and all area."""

    corners: Tensor
    weights: Tensor
    normals: Tensor
    area: float


def _samples(vertices: Tensor, faces: Tensor, count: int, seed: int) -> _Samples:
    if count < 1:
        raise ValueError(f"Meshes are sampled at a positive count of points; got {count}.")
    corners = vertices[faces].double()
    across = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = across.norm(dim=1) / 2
    ends = areas.cumsum(0)
    if not len(faces) or not bool(ends[-1].isfinite() and ends[-1] > 0):
        raise ValueError(f"The mesh's {len(faces)} triangles have no area, or no finite one; nothing lies on them.")
    # Quasi-random numbers leave fewer holes, and faces that follow each other mostly lie beside each other.
    engine: Any = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    found = engine.draw(count, dtype=torch.float64).to(ends.device)
    rows = torch.searchsorted(ends, found[:, 0] * ends[-1], right=True).clamp(max=len(faces) - 1)
    side, along = found[:, 1].sqrt(), found[:, 2]
    weights = torch.stack([1 - side, side * (1 - along), side * along], 1)
    return _Samples(faces[rows], weights.to(vertices), across[rows] / (2 * areas[rows])[:, None], float(ends[-1]))


def _mesh(path: str | Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return vertices [v, 3], triangles [f, 3] and the colours of vertices [v, 3], if it has any, of a file."""
    import trimesh

    if not Path(path).is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    try:
        found = trimesh.load(Path(path), force="mesh")
    except Exception as error:  # its readers raise what they meet
        raise ValueError(f"{path} is no mesh that trimesh reads ({error}); give an OBJ, STL, PLY or GLB.") from error
    if not isinstance(found, trimesh.Trimesh) or not len(found.faces):
        raise ValueError(f"{path} holds no surface of triangles; give an OBJ, STL, PLY or GLB file of one.")
    visual: Any = found.visual
    colours = None
    if visual.kind is not None:
        visual = visual.to_color() if visual.kind == "texture" else visual
        colours = torch.tensor(np.asarray(visual.vertex_colors)[:, :3] / 255.0)
    vertices = torch.tensor(np.asarray(found.vertices), dtype=torch.float64)
    return vertices, torch.tensor(np.asarray(found.faces), dtype=torch.int64), colours
