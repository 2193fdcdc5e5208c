"""Splats that follow what is simulated: exactly, differentiably, in every mode."""

import math

import pytest
import torch

from simworld.kernels.projection import covariances
from simworld.kinds import MeshState, ObjectState, SplatState
from simworld.quaternions import rotations
from simworld.render.bind import bind, polar_rotation, pose
from simworld.render.camera import Camera
from simworld.render.splats import moved, render_splats

SHEAR = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.8, 0.1], [0.2, 0.0, 1.1]], dtype=torch.float64)


def splats(count=40, degree=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return SplatState(
        means=torch.rand(count, 3, generator=g, dtype=torch.float64),
        quats=torch.randn(count, 4, generator=g, dtype=torch.float64),
        scales=0.01 + 0.05 * torch.rand(count, 3, generator=g, dtype=torch.float64),
        opacities=torch.rand(count, generator=g, dtype=torch.float64),
        harmonics=0.3 * torch.randn(count, (degree + 1) ** 2, 3, generator=g, dtype=torch.float64),
    )


def cube():
    """Six tetrahedra round a diagonal of the unit cube, as a mesh."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    paths = [(4, 6), (4, 5), (2, 6), (2, 3), (1, 5), (1, 3)]
    cells = torch.tensor([[0, a, b, 7] for a, b in paths])
    return MeshState(positions=corners, cells=cells)


def cloud(kind="full"):
    g = torch.Generator().manual_seed(1)
    places = torch.rand(150, 3, generator=g, dtype=torch.float64)
    places[:, {"full": 3, "plane": 2, "row": 1}[kind] :] = 0.5
    return ObjectState(positions=places, velocities=torch.zeros_like(places))


def at_rest(mode):
    if mode in ("mesh", "tet"):
        return cube()
    if mode == "rigid":
        quats = torch.nn.functional.normalize(
            torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double(), dim=1
        )
        places = torch.rand(5, 3, generator=torch.Generator().manual_seed(3)).double()
        return ObjectState(
            positions=places,
            velocities=torch.zeros_like(places),
            quats=quats,
            angular_velocities=torch.zeros_like(places),
        )
    return cloud()


def turn(seed=4):
    quat = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    return torch.nn.functional.normalize(quat, dim=0), rotations(quat)


def turned_state(state, quat, shift):
    from simworld.quaternions import product

    changes = {"positions": state["positions"] @ rotations(quat).T + shift}
    if "quats" in state:
        changes["quats"] = product(quat, state["quats"])
    return state.replace(**changes)


MODES = ["particle", "knn", "mesh", "tet", "rigid"]


@pytest.mark.parametrize("mode", MODES)
def test_at_rest_nothing_changes_at_all(mode):
    state, given = at_rest(mode), splats()
    binding = bind(given, state, mode=mode)
    posed = pose(binding, state)
    assert torch.equal(posed.means, given.means)
    assert torch.equal(posed.covars, covariances(given.quats, given.scales))
    assert torch.equal(posed.harmonics, given.harmonics)


@pytest.mark.parametrize("mode", MODES)
def test_what_moves_as_a_whole_takes_its_splats_along(mode):
    state, given = at_rest(mode), splats()
    quat, matrix = turn()
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    posed = pose(bind(given, state, mode=mode), turned_state(state, quat, shift))
    wanted = moved(given, matrix, shift)
    torch.testing.assert_close(posed.means, wanted.means, atol=1e-9, rtol=0)
    torch.testing.assert_close(posed.covars, covariances(wanted.quats, wanted.scales), atol=1e-9, rtol=0)
    torch.testing.assert_close(posed.harmonics, wanted.harmonics, atol=1e-9, rtol=0)


def test_splats_and_camera_that_turn_together_leave_the_picture_as_it_is():
    state, given = at_rest("knn"), splats(200)
    quat, matrix = turn()
    posed = pose(bind(given, state), turned_state(state, quat, torch.ones(3).double()))
    camera = Camera.look_at((2.0, 1.0, 1.5), (0.5, 0.5, 0.5), width=64, height=48, dtype=torch.float64)
    along = torch.eye(4, dtype=torch.float64)
    along[:3, :3], along[:3, 3] = matrix, 1.0
    other = Camera(viewmat=camera.viewmat @ torch.linalg.inv(along), K=camera.K, width=64, height=48)
    before, after = render_splats(given, camera), render_splats(posed, other)
    assert float(before.std()) > 0.05
    assert float((before - after).abs().max()) < 1e-5


@pytest.mark.parametrize("mode", ["particle", "knn", "tet"])
def test_a_motion_that_is_affine_shears_splats_by_it(mode):
    state, given = at_rest(mode), splats()
    posed = pose(bind(given, state, mode=mode), state.replace(positions=state["positions"] @ SHEAR.T))
    torch.testing.assert_close(posed.means, given.means @ SHEAR.T, atol=1e-9, rtol=0)
    whole = covariances(given.quats, given.scales)
    torch.testing.assert_close(posed.covars, SHEAR @ whole @ SHEAR.T, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mode", ["particle", "knn"])
def test_on_a_sheet_splats_keep_their_thickness(mode):
    state, given = cloud("plane"), splats()
    stretch = torch.diag(torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    _, matrix = turn()
    whole = matrix @ stretch
    posed = pose(bind(given, state, mode=mode), state.replace(positions=state["positions"] @ whole.T))
    covars = covariances(given.quats, given.scales)
    torch.testing.assert_close(posed.covars, whole @ covars @ whole.T, atol=1e-9, rtol=0)


def test_along_a_rope_splats_turn_with_it_by_the_least_rotation():
    state, given = cloud("row"), splats(degree=1)
    quarter = rotations(torch.tensor([math.cos(math.pi / 4), 0.0, 0.0, math.sin(math.pi / 4)], dtype=torch.float64))
    middle = torch.full((3,), 0.5, dtype=torch.float64)
    posed = pose(bind(given, state), state.replace(positions=(state["positions"] - middle) @ quarter.T + middle))
    wanted = moved(given, quarter, middle - quarter @ middle)
    torch.testing.assert_close(posed.means, wanted.means, atol=1e-9, rtol=0)
    torch.testing.assert_close(posed.covars, covariances(wanted.quats, wanted.scales), atol=1e-9, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_pose(mode):
    state, given = at_rest(mode), splats(2, degree=1)
    binding = bind(given, state, mode=mode)
    names = [name for name in ("positions", "quats") if name in state]
    start = turned_state(state, *turn()[:1], torch.ones(3).double())

    def go(*values):
        posed = pose(binding, start.replace(**dict(zip(names, values, strict=True))))
        return posed.means, posed.covars, posed.harmonics

    noise = torch.Generator().manual_seed(5)
    values = [start[n] + 0.02 * torch.randn(start[n].shape, generator=noise).double() for n in names]
    values = [v.requires_grad_() for v in values]
    torch.autograd.gradcheck(go, values, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_at_rest_there_are_gradients_too(mode):
    state, given = at_rest(mode), splats(8, degree=1)
    names = [name for name in ("positions", "quats") if name in state]
    values = {name: state[name].clone().requires_grad_() for name in names}
    posed = pose(bind(given, state, mode=mode), state.replace(**values))
    weights = torch.randn(posed.covars.shape, generator=torch.Generator().manual_seed(7)).double()
    (posed.means.sum() + (weights * posed.covars).sum()).backward()
    assert all(bool(value.grad.isfinite().all()) and float(value.grad.abs().max()) > 1e-6 for value in values.values())


def test_a_folded_motion_is_said_and_the_splats_keep_their_shape():
    state, given = cloud(), splats()
    flat = state["positions"] * torch.tensor([1.0, 1.0, 0.0]).double()
    with pytest.warns(UserWarning, match=r"singular or inverted at 40 of 40"):
        posed = pose(bind(given, state), state.replace(positions=flat))
    kept = torch.linalg.eigvalsh(covariances(given.quats, given.scales))
    torch.testing.assert_close(torch.linalg.eigvalsh(posed.covars), kept, atol=1e-9, rtol=0)


def test_shapes_frozen_and_capped():
    state, given = cloud(), splats()
    binding = bind(given, state)
    long = state.replace(positions=state["positions"] * torch.tensor([8.0, 1.0, 1.0]).double())
    frozen = pose(binding, long, freeze_shape=True)
    torch.testing.assert_close(frozen.covars, covariances(given.quats, given.scales), atol=1e-9, rtol=0)
    values = torch.linalg.eigvalsh(pose(binding, long, anisotropy_cap=3.0).covars)
    assert float((values[:, 2] / values[:, 0]).max()) <= 9.0 + 1e-6
    free = torch.linalg.eigvalsh(pose(binding, long).covars)
    assert float((free[:, 2] / free[:, 0]).max()) > 20


def test_inactive_entities_take_their_splats_with_them():
    state, given = at_rest("rigid"), splats()
    binding = bind(given, state, mode="rigid")
    gone = state.replace(active=torch.arange(5) != int(binding.entities[0, 0]))
    posed = pose(binding, gone)
    assert not bool(posed.active[0])
    assert bool(posed.active.any())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_polar_rotations_are_those_of_the_singular_values(scale):
    matrices = torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(6)).double()
    matrices = scale * matrices * torch.linalg.det(matrices).sign()[:, None, None]
    left, _, right = torch.linalg.svd(matrices)
    torch.testing.assert_close(polar_rotation(matrices), left @ right, atol=1e-9, rtol=0)


def test_what_cannot_be_bound_is_said():
    state, given = cloud(), splats()
    with pytest.raises(ValueError, match="mode must be one of particle, knn, mesh, tet, rigid; got 'near'"):
        bind(given, state, mode="near")
    with pytest.raises(ValueError, match="'mesh' needs a mesh; ObjectState has no cells"):
        bind(given, state, mode="mesh")
    with pytest.raises(ValueError, match="bound to 150 entities; the state has 5"):
        pose(bind(given, state), at_rest("rigid"))
    with pytest.raises(ValueError, match="anisotropy_cap must be 1 or more; got 0.5"):
        pose(bind(given, state), state, anisotropy_cap=0.5)


@pytest.mark.parametrize("mode", MODES)
def test_single_precision_is_kept(mode):
    state, given = at_rest(mode), splats()
    state = state.replace(**{n: state[n].float() for n in state if state[n].is_floating_point()})
    given = given.replace(**{n: given[n].float() for n in given})
    posed = pose(bind(given, state, mode=mode), state)
    assert torch.equal(posed.means, given.means)
    assert posed.covars.dtype == torch.float32


@pytest.mark.parametrize("mode", ["particle", "knn"])
def test_of_two_entities_nothing_changes_at_rest_either(mode):
    g = torch.Generator().manual_seed(3)
    state = ObjectState(positions=torch.rand(2, 3, generator=g), velocities=torch.zeros(2, 3))
    given = splats(33)
    given = given.replace(**{n: given[n].float() for n in given})
    posed = pose(bind(given, state, mode=mode), state)
    assert torch.equal(posed.means, given.means)
    assert torch.equal(posed.covars, covariances(given.quats, given.scales))


@pytest.mark.parametrize("mode", ["particle", "knn"])
@pytest.mark.parametrize("lost", ["inactive", "nan"])
def test_entities_that_are_lost_move_no_splats_of_others(mode, lost):
    state, given = cloud(), splats()
    binding = bind(given, state, mode=mode)
    far = state["positions"].clone()
    far[5] = 100.0 if lost == "inactive" else math.nan
    there = torch.arange(150) != 5
    moved_away = state.replace(positions=far, active=there if lost == "inactive" else state.active)
    posed = pose(binding, moved_away)
    kept = posed.active
    assert torch.equal(posed.means[kept], given.means[kept])
    main = binding.entities.gather(1, binding.weights.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(kept, main != 5)


def test_at_rest_inactive_entities_are_not_bound_to():
    state, given = cloud(), splats()
    state = state.replace(active=torch.arange(150) >= 75)
    for mode in ("particle", "knn"):
        assert int(bind(given, state, mode=mode).entities.min()) >= 75


def test_sheets_are_no_tetrahedra_and_scenes_come_one_at_a_time():
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0), torch.zeros(1)).double()
    sheet = MeshState(positions=grid, cells=torch.tensor([[0, 1, 4, 3], [1, 2, 5, 4]]))
    with pytest.raises(ValueError, match="'tet' needs tetrahedra"):
        bind(splats(), sheet, mode="tet")
    with pytest.raises(ValueError, match="bind takes one scene; got 1 of splats and 2 of entities"):
        bind(splats(), cloud().repeat(2))
