from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.quaternions import rotations
from simworld.render.camera import Camera
from simworld.render.splats import quarter_turns, render_splats
from simworld.render.surfaces import _outer, _spacing, register, sample_mesh, splats_from_mesh, surface

DATA = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data"))
BUNNY = DATA / "meshes/bunny.obj"


def turn(degrees, axis):
    half = math.radians(degrees) / 2
    axis = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
    return rotations(torch.cat([torch.tensor([math.cos(half)], dtype=torch.float64), math.sin(half) * axis]))


def blob(count=700, seed=0):
    """Points on a body without symmetry: an ellipsoid with three bumps."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    bumps = torch.tensor([[1.0, 0, 0], [0, 0.8, 0.6], [-0.6, 0, 0.8]], dtype=torch.float64)
    heights = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64)
    sides = torch.tensor([1.4, 1.0, 0.6], dtype=torch.float64)
    return sides * ways * (1 + (heights * torch.exp(8 * (ways @ bumps.T - 1))).sum(1, keepdim=True))


def angle(one, other):
    return math.degrees(math.acos(min(1.0, float(((one @ other.T).trace() - 1) / 2))))


@pytest.mark.parametrize("degrees", [0, 20, 40])
def test_shuffled_clouds_that_overlap_in_part_are_laid_onto_each_other(degrees):
    points, rotation = blob(), turn(degrees, (0.3, -0.5, 0.8))
    translation = torch.tensor([0.4, -1.0, 3.0], dtype=torch.float64)
    mixed = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))]
    source, target = mixed[mixed[:, 0] < 1.2], (points @ rotation.T + translation)[points[:, 1] > -0.8]
    assert len(source) < 0.95 * len(points) > len(target)
    found, shift = register(source, target, backend="torch")
    assert torch.allclose(found, rotation, atol=1e-6)
    assert torch.allclose(shift, translation, atol=1e-6)


def test_clouds_of_other_points_of_one_body_come_near():
    rotation = turn(30, (1, 0, 1))
    found, shift = register(blob(900, seed=1).float(), (blob(seed=2) @ rotation.T).float(), backend="torch")
    assert found.dtype == shift.dtype == torch.float32
    assert angle(found.double(), rotation) < 3
    assert float(shift.norm()) < 0.05


def test_any_turn_is_found_from_several_starts():
    points, rotation = blob(300), turn(170, (0.2, 0.9, -0.3))
    found, _ = register(points, points @ rotation.T, starts=quarter_turns(), backend="torch")
    assert torch.allclose(found, rotation, atol=1e-6)
    assert angle(register(points, points @ rotation.T, backend="torch")[0], rotation) > 10


def test_rotations_are_never_mirrors():
    flat = torch.cat([blob()[:, :2], torch.zeros(700, 1, dtype=torch.float64)], 1)
    found, _ = register(flat, flat * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64), backend="torch")
    assert float(torch.linalg.det(found)) == pytest.approx(1)


def test_clouds_that_are_refused():
    for source, target in [(torch.zeros(2, 3), blob()), (blob(), torch.zeros(5, 2)), (blob() * torch.nan, blob())]:
        with pytest.raises(ValueError, match="register takes finite points"):
            register(source, target)
    with pytest.raises(ValueError, match="no way to bring the clouds within reach"):
        register(blob(), 100 * blob(), reach=1e-3, backend="torch")


def test_open3d_lays_the_same():
    pytest.importorskip("open3d", reason="needs open3d, of the extra of that name")
    points, rotation = blob(), turn(20, (1, 2, 3))
    found, shift = register(points, points @ rotation.T + 1, backend="open3d")
    assert torch.allclose(found, rotation, atol=1e-6)
    assert torch.allclose(shift, torch.ones(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("filled", [False, True])
def test_surfaces_of_particles(filled):
    pytest.importorskip("open3d", reason="needs open3d, of the extra of that name")
    line = torch.arange(-1.2, 1.2, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line, line)
    grid = grid + 0.02 * torch.rand(grid.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ball = grid[grid.norm(dim=1) < 1] if filled else blob(3000)
    vertices, faces = surface(ball)
    corners = vertices[faces]
    volume = float(torch.linalg.det(corners).sum()) / 6
    assert volume > 0
    assert float(torch.cdist(vertices, ball).min(1).values.max()) < 0.3
    if filled:
        assert volume == pytest.approx(4 / 3 * math.pi, rel=0.2)


def test_of_particles_that_fill_a_body_the_outer_ones_count():
    line = torch.arange(-1.05, 1.1, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line, line)
    ball = grid[grid.norm(dim=1) < 1]
    outer = _outer(ball, 0.1)
    assert outer.norm(dim=1).min() > 0.6
    assert len(outer) > 0.9 * int((ball.norm(dim=1) > 0.9).sum())
    assert len(_outer(blob(2000), _spacing(blob(2000)))) == 2000


def test_surfaces_of_few_points_are_refused():
    with pytest.raises(ValueError, match="surface takes finite points"):
        surface(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="spacing > 0 of different points; got 0"):
        surface(torch.zeros(30, 3))


def test_points_lie_evenly_on_a_mesh():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 2], [2, 0, 2], [0, 2, 2]])
    faces = torch.tensor([[0, 1, 2], [3, 5, 4]])
    points, normals = sample_mesh((vertices, faces), 5000, seed=3)
    low = points[:, 2] == 0
    assert int(low.sum()) == pytest.approx(1000, abs=10)
    assert torch.equal(normals[low], torch.tensor([0.0, 0, 1]).expand(int(low.sum()), 3))
    assert torch.equal(normals[~low], torch.tensor([0.0, 0, -1]).expand(int((~low).sum()), 3))
    assert torch.allclose(points[low].mean(0), torch.tensor([1 / 3, 1 / 3, 0]), atol=0.01)
    assert (points[:, :2].sum(1) <= torch.where(low, 1, 2) + 1e-6).all()
    assert torch.equal(sample_mesh((vertices, faces), 5000, seed=3)[0], points)
    assert not torch.equal(sample_mesh((vertices, faces), 5000, seed=4)[0], points)


def ball(path, colours=False):
    import trimesh

    made = trimesh.creation.icosphere(subdivisions=3)
    if colours:
        red, blue = (255, 0, 0, 255), (0, 0, 255, 255)
        made.visual.vertex_colors = [red if vertex[0] > 0 else blue for vertex in made.vertices]
    made.export(path)
    return path


def test_splats_of_a_mesh_lie_flat_on_it_and_cover_it(tmp_path):
    given = splats_from_mesh(ball(tmp_path / "a.ply"), count=4000)
    assert given.means.norm(dim=1).sub(1).abs().max() < 0.01
    thin = rotations(given.quats)[:, :, 2]
    assert ((thin * given.means).sum(1) > 0.99).all()
    camera = Camera.look_at((0, 0, 4), (0, 0, 0), up=(0, 1, 0), width=64, height=64)
    seen = render_splats(given, camera, background=(1.0, 0.0, 0.0))
    rows, columns = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    away = (rows**2 + columns**2).sqrt() / float(camera.K[0, 0]) * 4
    assert (seen[away < 0.9, 0] - seen[away < 0.9, 1]).abs().max() < 0.02  # grey: nothing red shines through
    assert (seen[away > 1.2] == torch.tensor([1.0, 0.0, 0.0])).all()
    below = Camera.look_at((0, 0, -4), (0, 0, 0), up=(0, 1, 0), width=64, height=64)
    assert float(seen[32, 32, 0]) > 1.5 * float(render_splats(given, below)[32, 32, 0])  # the lamp is above


def test_splats_have_the_colours_of_vertices(tmp_path):
    given = splats_from_mesh(ball(tmp_path / "a.ply", colours=True), count=4000)
    for side, wanted in [(1, (1.0, 0.0, 0.0)), (-1, (0.0, 0.0, 1.0))]:
        camera = Camera.look_at((4.0 * side, 0, 0), (0, 0, 0), width=32, height=32)
        assert torch.allclose(render_splats(given, camera)[16, 16], torch.tensor(wanted), atol=0.05)


def test_meshes_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        splats_from_mesh(tmp_path / "a.obj")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(ValueError, match="no surface of triangles|is no mesh"):
        splats_from_mesh(tmp_path / "a.obj")
    (tmp_path / "a.stl").write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(ValueError, match="no surface of triangles|is no mesh"):
        sample_mesh(tmp_path / "a.stl", 10)
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match="have no area"):
        splats_from_mesh(tmp_path / "a.obj")
    vertices, faces = torch.eye(3), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="positive count"):
        sample_mesh((vertices, faces), 0)


@pytest.mark.skipif(not BUNNY.is_file(), reason="needs bunny.obj of the folder meshes")
def test_a_bunny_has_no_holes():
    import trimesh

    given = splats_from_mesh(BUNNY, count=8000)
    centre = (given.means.amin(0) + given.means.amax(0)) / 2
    camera = Camera.look_at(centre + torch.tensor([0.0, 0.05, 0.25]), centre, up=(0, 1, 0), width=64, height=64)
    seen = render_splats(given, camera, background=(1.0, 0.0, 0.0))
    # Rays through pixels hit the mesh, well within its outline, where no red is seen.
    mesh = trimesh.load(BUNNY, force="mesh")
    corners = torch.tensor(np.asarray(mesh.triangles)).float()
    shot = corners @ camera.viewmat[:3, :3].float().T + camera.viewmat[:3, 3].float()
    flat = (shot @ camera.K.float().T)[..., :2] / shot[..., 2:]
    pixels = torch.cartesian_prod(torch.arange(64), torch.arange(64)).float() + 0.5
    a, b, c = flat.unbind(1)

    def side(p, q, at):
        return (q - p)[:, 0] * (at[:, None] - p)[..., 1] - (q - p)[:, 1] * (at[:, None] - p)[..., 0]

    inside = torch.zeros(64, 64, dtype=torch.bool)
    for k, part in enumerate(pixels.flip(1).split(512)):
        signs = torch.stack([side(a, b, part), side(b, c, part), side(c, a, part)])
        inside.view(-1)[512 * k : 512 * k + len(part)] = ((signs >= 0).all(0) | (signs <= 0).all(0)).any(1)
    edge = torch.nn.functional.max_pool2d((~inside).float()[None], 3, 1, 1)[0] > 0
    assert int((inside & ~edge).sum()) > 800
    assert (seen[inside & ~edge][:, 0] - seen[inside & ~edge][:, 1]).max() < 0.05
    assert (seen[~inside & (torch.nn.functional.max_pool2d(inside.float()[None], 7, 1, 3)[0] == 0)][:, 1] == 0).all()
