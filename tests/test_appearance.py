"""States as splats: where their splats lie and what colours they have; cameras that see all of a trajectory."""

import math
import sys

import pytest
import torch

from simworld.kinds import GOOP, SAND, WATER, MeshState, ObjectState, ParticleState, SplatState
from simworld.quaternions import rotations
from simworld.render.appearance import BODY, FIXED, TYPES, Look, to_splats
from simworld.render.camera import Camera
from simworld.render.faces import seen_faces, seen_triangles
from simworld.render.harmonics import FLAT
from simworld.render.scenes import alone
from simworld.render.shade import Shade
from simworld.render.splats import render_splats, render_with_alpha
from simworld.trajectory import Trajectory


def drawn(state, field=None, values=None):
    look = Look.of(alone(state), field=field)
    return to_splats(state, look, values=values), look


def colors_of(splats):
    return splats.harmonics[:, 0] * FLAT + 0.5


def bodies(positions, **more):
    positions = torch.as_tensor(positions)
    return ObjectState(positions=positions, velocities=torch.zeros_like(positions), **more)


def particles(positions, **more):
    positions = torch.as_tensor(positions)
    return ParticleState(positions=positions, velocities=torch.zeros_like(positions), **more)


def grid(count, *, height=None, **more):
    """Return a square mesh from 0 to 1 of triangles, in a plane or in space at a height."""
    steps = torch.linspace(0, 1, count)
    places = torch.cartesian_prod(steps, steps)
    first = torch.tensor([i * count + j for i in range(count - 1) for j in range(count - 1)])
    cells = torch.cat([torch.stack([first, first + count, first + 1], 1)])
    cells = torch.cat([cells, torch.stack([first + 1, first + count, first + count + 1], 1)])
    if height is not None:
        places = torch.cat([places, torch.full((len(places), 1), height)], 1)
    return MeshState(rest_positions=places, cells=cells, **more)


def moving(state, shifts):
    """Return a trajectory in which a state goes along shifts [t, d]."""
    shifts = torch.as_tensor(shifts, dtype=torch.float32)
    frames = {name: state[name].expand(len(shifts), *state[name].shape) for name in state.dynamic_fields}
    frames["positions"] = state.positions + shifts[:, None]
    start = state.replace(positions=frames["positions"][0])
    return Trajectory(initial=start, frames=frames, active=state.active.expand(len(shifts), -1), dt=0.1)


def projected(camera: Camera, points):
    away = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    assert bool((away[:, 2] > 0).all())
    return (away @ camera.K.T)[:, :2] / away[:, 2:]


def turned(angle):
    return torch.tensor([[math.cos(angle / 2), 0.0, math.sin(angle / 2), 0.0]])


def test_the_splats_of_a_ball_lie_on_its_sphere_and_face_outwards():
    centre = torch.tensor([[1.0, -2.0, 3.0]])
    splats, _ = drawn(bodies(centre, radii=torch.tensor([0.7])))
    away = splats.means - centre
    assert torch.allclose(away.norm(dim=1), torch.full((len(away),), 0.7), atol=1e-5)
    assert away.mean(0).norm() < 0.01
    variances, axes = torch.linalg.eigh(splats.covars)
    assert torch.allclose((axes[:, :, 0] * away / 0.7).sum(1).abs(), torch.ones(len(away)), atol=1e-3)
    assert bool((variances[:, 0] < 0.01 * variances[:, 1]).all())


def test_a_ball_turns_with_its_quaternion_and_shows_it():
    still = bodies([[0.0, 0.0, 0.0]], radii=torch.tensor([1.0]), quats=turned(0.0))
    now = still.replace(quats=turned(0.8))
    one, other = (drawn(state)[0] for state in (still, now))
    turn = rotations(turned(0.8))[0]
    assert torch.allclose(other.means, one.means @ turn.T, atol=1e-5)
    assert torch.allclose(other.covars, turn @ one.covars @ turn.T, atol=1e-5)
    camera = Look.of(alone(still)).camera(width=64, height=64)
    first, second = (render_splats(splats, camera) for splats in (one, other))
    assert float((first - second).abs().max()) > 0.05


def test_the_splats_of_a_box_lie_on_its_faces():
    half = torch.tensor([[0.5, 1.0, 0.25]])
    box = bodies([[2.0, 0.0, 0.0]], quats=turned(0.6), half_extents=half)
    splats, look = drawn(box)
    along = (splats.means - box.positions) @ rotations(turned(0.6))[0] / half
    assert torch.allclose(along.abs().amax(1), torch.ones(len(along)), atol=1e-5)
    for axis in range(3):
        for sign in (-1, 1):
            assert int(((along[:, axis] * sign - 1).abs() < 1e-5).sum()) >= len(along) // 6
    camera = look.camera(width=80, height=60)
    _, alphas = render_with_alpha(splats, camera)
    edges = torch.cat([alphas[0].flatten(), alphas[-1].flatten(), alphas[:, 0].flatten(), alphas[:, -1].flatten()])
    assert float(edges.max()) < 0.05, "a box without radii reaches out of its picture"
    assert float(alphas[26:34, 36:44].min()) > 0.95


def test_few_bodies_have_colours_of_their_own_and_fixed_ones_grey():
    places = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    state = bodies(places, radii=torch.full((3,), 0.5), fixed=torch.tensor([False, False, True]))
    colors = colors_of(drawn(state)[0]).view(3, -1, 3).amax(1)
    assert float((colors[0] - colors[1]).abs().max()) > 0.2
    shade = colors[2] / torch.tensor(FIXED)
    assert float(shade.max() - shade.min()) < 1e-4


def test_springs_join_bodies_that_are_both_there():
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    springs = torch.tensor([[0, 1], [1, 2]])
    plain = bodies(places, radii=torch.full((3,), 0.1))
    joined = bodies(places, radii=torch.full((3,), 0.1), springs=springs)
    camera = Look.of(alone(joined)).camera(width=120, height=60)
    middle, other = projected(camera, torch.tensor([[0.5, 0.0, 0.0], [1.5, 0.0, 0.0]])).long()
    _, without = render_with_alpha(drawn(plain)[0], camera)
    _, alphas = render_with_alpha(drawn(joined)[0], camera)
    assert float(without[middle[1], middle[0]]) < 0.05
    assert float(alphas[middle[1], middle[0]]) > 0.8
    gone = joined.replace(active=torch.tensor([True, True, False]))
    _, cut = render_with_alpha(to_splats(gone, Look.of(alone(joined))), camera)
    assert float(cut[middle[1], middle[0]]) > 0.8
    assert float(cut[other[1], other[0]]) < 0.05


def test_walls_are_drawn_and_seen():
    box = torch.tensor([[[-1.0, -1.0], [3.0, 2.0]]])
    splats, look = drawn(particles([[0.0, 0.0], [0.1, 0.0]], boundaries=box))
    assert len(splats) == 2 + 4 * 40
    on = splats.means[2:, :2]
    low, high = box[0]
    assert bool((((on - low).abs() < 1e-5) | ((on - high).abs() < 1e-5)).any(1).all())
    assert torch.allclose(on.amin(0), low, atol=0.1)
    assert torch.allclose(on.amax(0), high, atol=0.1)
    pixels = projected(look.camera(width=200, height=160), splats.means)
    assert bool(((pixels > 0) & (pixels < torch.tensor([200.0, 160.0]))).all())
    corners = torch.tensor([[[-1.0, -1.0, 0.0], [3.0, 2.0, 1.0]]])
    assert len(drawn(particles([[0.0, 0.0, 0.5], [0.1, 0.0, 0.5]], boundaries=corners))[0]) == 2 + 12 * 40


def test_particles_have_the_colours_of_their_types():
    kinds = torch.tensor([WATER, SAND, GOOP, 99])
    places = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    colors = colors_of(drawn(particles(places, particle_types=kinds))[0])
    assert torch.allclose(colors, torch.tensor([TYPES[WATER], TYPES[SAND], TYPES[GOOP], BODY]), atol=1e-5)


def test_water_in_space_is_brighter_above_than_within():
    steps = torch.arange(7) * 0.1
    places = torch.cartesian_prod(steps, steps, steps)
    splats, look = drawn(particles(places))
    assert torch.equal(look.up, torch.tensor([0.0, 1.0, 0.0]))
    brightness = colors_of(splats).sum(1)
    above = places[:, 1] == steps[-1]
    deep = ((places > 0.15) & (places < 0.45)).all(1)
    assert float(brightness[above].mean()) > 1.3 * float(brightness[deep].mean())


@pytest.mark.parametrize("kind", ["bodies", "particles", "mesh"])
def test_what_is_not_active_or_has_left_the_world_is_left_out(kind):
    places = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [5.0, 5.0, 0.0]])
    cells = torch.tensor([[0, 1, 2], [1, 3, 2], [1, 4, 3]])
    active = torch.tensor([True, True, True, True, False])
    made = {
        "bodies": bodies(places, radii=torch.full((5,), 0.2), active=active),
        "particles": particles(places, active=active),
        "mesh": MeshState(rest_positions=places, positions=places, cells=cells, active=active),
    }[kind]
    look = Look.of(alone(made))
    splats = to_splats(made, look)
    assert float(splats.means.max()) < 1.5
    assert float(look.high.max()) < 2, "an inactive entity counts in the camera"
    for far in (math.nan, math.inf, 1e30):
        thrown = made.replace(positions=torch.where(places == 1.0, far, places))
        few = to_splats(thrown, look)
        assert bool(torch.isfinite(few.covars).all())
        assert float(few.means.abs().max()) < 1.5
        assert len(few) < len(splats) or not bool(few.active.any())
    nobody = to_splats(made.replace(active=torch.zeros(5, dtype=torch.bool)), look)
    assert not bool(nobody.active.any())
    picture = render_splats(nobody, look.camera(width=16, height=16), background=(1.0, 1.0, 1.0))
    assert torch.equal(picture, torch.ones(16, 16, 3))


@pytest.mark.parametrize("count", [2, 3, 12])
def test_a_linear_field_has_the_colours_of_the_scale_everywhere(count):
    mesh = grid(count, temperatures=torch.zeros(count**2))
    field = 300 + 50 * mesh.rest_positions[:, 0] - 20 * mesh.rest_positions[:, 1]
    splats, look = drawn(mesh.replace(temperatures=field))
    assert (look.shade.field, look.shade.low, look.shade.high) == ("temperatures", 280.0, 350.0)
    there = 300 + 50 * splats.means[:, 0].double() - 20 * splats.means[:, 1].double()
    # A step of the scale, of 256: between two colours the last bit decides.
    assert torch.allclose(colors_of(splats), look.shade.colors(there).float(), atol=0.03)
    assert float((colors_of(splats) - look.shade.colors(there).float()).abs().mean()) < 2e-4


def test_a_flat_square_is_covered_without_holes():
    splats, look = drawn(grid(5))
    camera = look.camera(width=160, height=160)
    _, alphas = render_with_alpha(splats, camera)
    corners = projected(camera, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    (left, top), (right, bottom) = corners.round().long().tolist()
    assert right - left > 80
    assert float(alphas[top + 3 : bottom - 3, left + 3 : right - 3].min()) > 0.95
    outside = alphas[..., 0].clone()
    outside[top - 4 : bottom + 4, left - 4 : right + 4] = 0
    assert float(outside.max()) < 0.05


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_a_scene_in_another_unit_has_the_same_picture(scale):
    places = torch.rand(30, 3, generator=torch.Generator().manual_seed(1))
    made = []
    for factor in (1.0, scale):
        state = bodies(places * factor, radii=torch.full((30,), 0.1 * factor))
        splats, look = drawn(state)
        camera = look.camera(width=48, height=36)
        assert len(splats) == 30 * 200
        made.append((projected(camera, splats.means), colors_of(splats)))
    assert torch.allclose(made[0][0], made[1][0], atol=0.05)
    assert torch.allclose(made[0][1], made[1][1], atol=1e-4)


def test_values_colour_entities_in_place_of_the_field():
    mesh = grid(4, temperatures=torch.rand(16))
    splats, look = drawn(mesh, values=torch.full((16,), float(mesh.temperatures.max())))
    assert torch.allclose(colors_of(splats), look.shade.colors(mesh.temperatures.max()[None]).float(), atol=1e-4)
    state = bodies(torch.rand(3, 2), radii=torch.full((3,), 0.1))
    state = state.replace(velocities=torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.5]]))
    shade = Look.of(alone(state), field="velocities").shade
    assert (shade.low, shade.high, shade.label) == (0.0, 5.0, "velocities [m/s]")


def test_meshes_of_lines_of_cells_and_without_any():
    line = MeshState(rest_positions=torch.eye(3), cells=torch.tensor([[0, 1], [1, 2]]), temperatures=torch.arange(3.0))
    splats, look = drawn(line)
    assert len(splats) == 2 * 40
    along = splats.means @ torch.arange(3.0)
    assert torch.allclose(colors_of(splats), look.shade.colors(along.double()).float(), atol=0.03)
    points = MeshState(rest_positions=torch.rand(6, 3))
    assert len(drawn(points)[0]) == 6
    steps = torch.tensor([0.0, 1.0])
    corners = torch.cartesian_prod(torch.arange(3.0), steps, steps)
    order = torch.tensor([0, 4, 6, 2, 1, 5, 7, 3])
    cubes = MeshState(rest_positions=corners, cells=torch.stack([order, order + 4]))
    faces = seen_faces(cubes)
    assert len(faces) == 10, "the face that two cubes share is not seen"
    places = corners[seen_triangles(cubes)[0]]
    normals = torch.linalg.cross(places[:, 1] - places[:, 0], places[:, 2] - places[:, 0])
    assert float(normals.norm(dim=1).sum() / 2) == pytest.approx(10)
    outwards = ((places.mean(1) - corners.mean(0)) * normals).sum(1)
    assert bool((outwards > 0).all())
    with pytest.raises(ValueError, match="consists of lines"):
        seen_triangles(line)


def kinds():
    g = torch.Generator().manual_seed(2)
    plane, space = torch.rand(20, 2, generator=g), torch.rand(20, 3, generator=g)
    radii = 0.02 + 0.1 * torch.rand(20, generator=g)
    turns = torch.nn.functional.normalize(torch.randn(20, 4, generator=g), dim=1)
    sides = 0.02 + 0.2 * torch.rand(20, 3, generator=g)
    down = torch.tensor([[0.0, -9.81, 0.0]])
    cloth = grid(4, height=0.5)
    return {
        "balls in a plane": bodies(plane, radii=radii),
        "balls in space": bodies(space, radii=radii, gravity=down),
        "boxes": bodies(space, quats=turns, half_extents=sides),
        "points": bodies(space),
        "one point": bodies(space[:1]),
        "water in a plane": particles(plane),
        "water in space": particles(space),
        "cloth": cloth.replace(positions=cloth.rest_positions),
    }


@pytest.mark.parametrize("name", list(kinds()))
@pytest.mark.parametrize("view", [(-60.0, 20.0), (10.0, -35.0), (200.0, 89.0)])
def test_the_camera_sees_every_entity_of_every_frame_large(name, view):
    state = kinds()[name]
    steps = torch.linspace(0, 1, 4)[:, None]
    trajectory = moving(state, steps * torch.tensor([1.0, 0.0, 0.0])[: state.positions.shape[1]])
    look = Look.of(trajectory)
    camera = look.camera(width=90, height=60, azimuth=view[0], elevation=view[1])
    seen = torch.cat(
        [projected(camera, to_splats(trajectory.frame(t), look).means) for t in range(len(trajectory))]
    ) / torch.tensor([90.0, 60.0])
    assert float(seen.min()) > 0
    assert float(seen.max()) < 1
    assert float((seen.amax(0) - seen.amin(0)).max()) > 0.45, "the scene is small in its picture"


@pytest.mark.parametrize("down", [(0.0, 0.0, -9.81), (0.0, -9.81, 0.0), (3.0, 0.0, 0.0), (1.0, -2.0, 0.5)])
def test_up_is_against_gravity(down):
    down = torch.tensor(down)
    state = bodies(torch.rand(5, 3), gravity=down[None])
    camera = Look.of(alone(state)).camera(elevation=0)
    fall = camera.viewmat[:3, :3] @ down / down.norm()
    assert torch.allclose(fall, torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)
    flat = bodies(torch.rand(5, 2), gravity=torch.tensor([[0.0, 1.0]]))
    assert torch.allclose(Look.of(alone(flat)).camera().viewmat[1, :3], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


def test_planes_are_seen_from_the_front_in_their_own_proportions():
    state = bodies([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]], radii=torch.full((3,), 0.1))
    pixels = projected(
        Look.of(alone(state)).camera(width=320, height=200), torch.nn.functional.pad(state.positions, (0, 1))
    )
    right, above = pixels[1] - pixels[0], pixels[2] - pixels[0]
    assert right[0] > 150
    assert above[1] < -75
    assert float(right[0]) == pytest.approx(-2 * float(above[1]), rel=1e-4)
    assert abs(float(right[1])) + abs(float(above[0])) < 1e-2


@pytest.mark.parametrize("name", ["bodies", "particles"])
def test_the_order_of_entities_does_not_change_the_picture(name):
    g = torch.Generator().manual_seed(3)
    places, order = torch.rand(12, 3, generator=g), torch.randperm(12, generator=g)
    kinds = torch.tensor([WATER, SAND, GOOP]).repeat(4)
    made = {
        "bodies": lambda p, k: bodies(p, radii=0.1 + 0.01 * k),
        "particles": lambda p, k: particles(p, particle_types=k),
    }[name]
    pictures = []
    for rows in (torch.arange(12), order):
        splats, look = drawn(made(places[rows], kinds[rows]))
        pictures.append(render_splats(splats, look.camera(width=48, height=48)))
    assert float((pictures[0] - pictures[1]).abs().max()) < 1e-3
    assert float(pictures[0].std()) > 0.05


def test_what_cannot_be_drawn_says_why():
    state = bodies(torch.rand(3, 3))
    look = Look.of(alone(state))
    with pytest.raises(ValueError, match=r"draws one scene; the state has 2. Take scene\(i\)"):
        to_splats(state.repeat(2), look)
    with pytest.raises(ValueError, match="nothing to draw: no entity is active"):
        Look.of(alone(state.replace(active=torch.zeros(3, dtype=torch.bool))))
    with pytest.raises(ValueError, match="shows temperature; the states have positions, velocities"):
        Look.of(alone(state), field="temperature")
    with pytest.raises(ValueError, match="a field of each entity; gravity is of another kind"):
        Look.of(alone(bodies(torch.rand(3, 3), gravity=torch.ones(1, 3))), field="gravity")
    with pytest.raises(ValueError, match=r"has positions; MeshState here has temperatures"):
        Look.of(alone(MeshState(temperatures=torch.rand(3))))
    splats = SplatState(
        means=torch.zeros(1, 3), covars=torch.eye(3)[None], opacities=torch.ones(1), harmonics=torch.zeros(1, 1, 3)
    )
    assert to_splats(splats, look) is splats


def test_a_rollout_gone_wrong_still_has_a_scale():
    trajectory = moving(bodies(torch.rand(3, 2)), [[0.0, 0.0]] * 3)
    values = torch.rand(3, 3, 2)
    values[2] = math.nan
    broken = Trajectory(
        initial=trajectory.initial, frames={**trajectory.frames, "velocities": values}, active=trajectory.active, dt=0.1
    )
    shade = Shade.of(broken, "velocities")
    assert (shade.low, shade.high) == (
        pytest.approx(float(values[:2].double().norm(dim=2).min())),
        pytest.approx(float(values[:2].double().norm(dim=2).max())),
    )


def test_colours_without_matplotlib_say_what_to_install(monkeypatch):
    mesh = grid(3, temperatures=torch.rand(9))
    look = Look.of(alone(mesh))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"A colour scale needs matplotlib; install it with: pip install 'simworld\[view\]'"
    ):
        to_splats(mesh, look)
