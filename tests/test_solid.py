from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.data import mesh_faults
from simworld.data.generate import GENERATORS, read_recipe
from simworld.kinds import HANDLE, NORMAL, OBSTACLE
from simworld.physics.solid import Elastic, Solid
from simworld.physics.solid_worlds import ball_mesh, block, deforming_plate

pytest.importorskip("scipy")
DATASETS = Path(__file__).parents[1] / "datasets"
FAR = np.array([0.0, 0.0, 9.0])


def cantilever(edge=0.03, **material):
    nodes, cells = block((0.3, 0.1, 0.04), edge)
    return Solid(nodes, cells, nodes[:, 0] == 0, Elastic(**material))


def test_forces_are_slopes_of_the_energy_and_the_matrix_is_theirs():
    solid, rng = cantilever(), np.random.default_rng(0)
    there = solid.nodes + 0.002 * rng.standard_normal(solid.nodes.shape)
    way, centre, radius, small = rng.standard_normal(solid.nodes.shape), np.array([0.25, 0.05, 0.07]), 0.04, 1e-7
    assert (solid._depths(there, centre, radius)[0] > 0).any()
    rise = (solid._energy(there + small * way, centre, radius) - solid._energy(there - small * way, centre, radius)) / (
        2 * small
    )
    assert rise == pytest.approx(-(solid._forces(there, centre, radius) * way).sum(), rel=1e-6)
    change = solid._forces(there + small * way, centre, radius) - solid._forces(there - small * way, centre, radius)
    wanted = -(solid._matrix(there, centre, radius) @ way.ravel()).reshape(-1, 3)
    assert np.allclose(change / (2 * small), wanted, atol=1e-6 * np.abs(wanted).max())


def test_what_is_at_rest_has_no_stress():
    solid = cantilever(young=1e5, poisson=0.3)
    solid.positions = solid.nodes + 1e-16  # as rounding would
    assert (solid.stresses() == 0).all()
    solid.positions = solid.nodes @ np.diag([1 + 1e-7, 1, 1])
    assert solid.stresses().min() > 0


def test_a_uniform_stretch_is_a_rest_and_has_the_stress_of_its_law():
    nodes, cells = block((0.3, 0.2, 0.2), 0.1)
    border = ((nodes == 0) | np.isclose(nodes, nodes.max(0))).any(1)
    solid = Solid(nodes, cells, border, Elastic(young=1e5, poisson=0.3))
    stretch = np.diag([1.2, 0.95, 0.9])
    solid.positions = nodes @ stretch
    solid.positions[~border] += 0.001
    solid.press(FAR, 0.1)
    assert np.allclose(solid.positions, nodes @ stretch, atol=1e-9)
    lam, mu = 1e5 * 0.3 / (1.3 * 0.4), 1e5 / 2.6
    jacobian = 1.2 * 0.95 * 0.9
    main = (mu * (np.array([1.2, 0.95, 0.9]) ** 2 - 1) + lam * np.log(jacobian)) / jacobian
    mises = np.sqrt(0.5 * ((main - np.roll(main, 1)) ** 2).sum())
    assert np.allclose(solid.stresses(), mises, rtol=1e-9)


def test_turning_a_body_costs_nothing():
    solid = cantilever()
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    assert solid._energy(solid.nodes @ turn, FAR, 0.1) == pytest.approx(0.0, abs=1e-12)


def test_the_push_back_converges_as_the_mesh_becomes_finer():
    # The energy that a plate held at both ends takes up under a ball: linear tetrahedra are too stiff, less if small.
    energies = []
    for edge in (0.04, 0.02, 0.01):
        nodes, cells = block((0.24, 0.08, 0.04), edge)
        solid = Solid(nodes, cells, (nodes[:, 0] == 0) | np.isclose(nodes[:, 0], 0.24), Elastic())
        for share in (0.5, 1.0):
            centre = np.array([0.12, 0.04, 0.04 + 0.04 - 0.02 * share])
            solid.press(centre, 0.04)
        energies.append(solid._energy(solid.positions, centre, 0.04))
    assert abs(energies[2] - energies[1]) < 0.6 * abs(energies[1] - energies[0])


def test_a_ball_pushes_nodes_out_and_held_nodes_stay():
    solid = cantilever()
    centre = np.array([0.27, 0.05, 0.04 + 0.03])
    solid.press(centre, 0.04)
    depths, _ = solid._depths(solid.positions, centre, 0.04)
    assert depths.max() < 1e-3
    assert np.array_equal(solid.positions[solid.held], solid.nodes[solid.held])
    assert solid.positions[:, 2].min() < -0.005
    assert np.abs(solid._forces(solid.positions, centre, 0.04)[~solid.held]).max() < 1e-6


def test_an_episode_is_a_function_of_its_seed():
    small = {"num_steps": 4, "size": 0.05}
    first, again, other = (deforming_plate(seed, **small) for seed in ([1, 0, 0], [1, 0, 0], [1, 0, 1]))
    assert torch.equal(first["positions"], again["positions"])
    assert first["positions"].shape != other["positions"].shape or not torch.equal(
        first["positions"], other["positions"]
    )
    state = first.initial
    assert set(state.node_types.unique().tolist()) == {NORMAL, HANDLE, OBSTACLE}
    assert mesh_faults(state) == []
    ball = state.node_types == OBSTACLE
    assert torch.allclose(
        first["positions"][1:, ball] - first["positions"][:-1, ball], 0.02 * first["velocities"][:-1, ball]
    )
    assert (
        first["positions"][:, state.node_types == HANDLE] == first["positions"][0, state.node_types == HANDLE]
    ).all()
    assert (first["stresses"][0] < 1e-3).all()
    assert (first["stresses"][-1, ~ball] > 1).any()
    assert (first["stresses"][:, ball] == 0).all()


def test_meshes_fill_their_bodies():
    nodes, cells = block((0.3, 0.2, 0.1), 0.04)
    assert np.linalg.det(nodes[cells[:, 1:]] - nodes[cells[:, :1]]).sum() / 6 == pytest.approx(0.3 * 0.2 * 0.1)
    nodes, cells = ball_mesh(0.5)
    volume = np.linalg.det(nodes[cells[:, 1:]] - nodes[cells[:, :1]]).sum() / 6
    assert 0.8 < volume / (4 / 3 * np.pi * 0.5**3) < 1


@pytest.mark.parametrize("world", ["deforming_plate", "deforming_plate_small"])
def test_recipes_are_read(world):
    assert read_recipe(DATASETS / world / "recipe.toml").dataset == world
    assert world in GENERATORS


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Elastic(poisson=0.5), "poisson between -1 and 0.5"),
        (lambda: deforming_plate([0], num_steps=0), "num_steps >= 1"),
        (lambda: Solid(*block((1, 1, 1), 1.0), np.zeros(8, dtype=bool), Elastic()), "needs nodes that are held"),
        (
            lambda: Solid(block((1, 1, 1), 1.0)[0], np.array([[0, 2, 1, 3]]), np.ones(8, dtype=bool), Elastic()),
            "must have an inside",
        ),
    ],
)
def test_what_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()
