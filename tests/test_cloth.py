from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.data import mesh_faults
from simworld.data.generate import GENERATORS, read_recipe
from simworld.kinds import HANDLE, NORMAL, OBSTACLE
from simworld.physics.cloth import Cloth, Fabric
from simworld.physics.cloth_worlds import flag_simple, sheet, sphere_cloth

pytest.importorskip("newton")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DATASETS = Path(__file__).parents[1] / "datasets"


def made(*, held=(), ball=None, edge=0.25, dt=0.005, flat=True, **fabric):
    rest, triangles = sheet((1.0, 0.5), edge)
    zeros = np.zeros(len(rest))
    nodes = np.stack([*rest.T, zeros], 1) if flat else np.stack([rest[:, 0], zeros, rest[:, 1]], 1)
    fixed = np.isin(np.arange(len(rest)), held)
    return Cloth(nodes, triangles, fixed, fabric=Fabric(**fabric), dt=dt, ball=ball)


def test_a_cloth_that_nothing_holds_falls_freely():
    cloth = made()
    start = cloth.positions
    cloth.advance(40)
    fallen = cloth.positions - start
    assert np.allclose(fallen[:, 2], -0.5 * 9.81 * 0.2**2, rtol=0.03)
    assert np.abs(fallen[:, :2]).max() < 1e-4


def test_held_nodes_stay_and_the_others_hang():
    cloth = made(held=(0, 2))
    start = cloth.positions
    cloth.advance(100)
    assert np.array_equal(cloth.positions[[0, 2]], start[[0, 2]])
    assert cloth.positions[:, 2].min() < -0.3
    sides = np.linalg.norm(cloth.positions[cloth.triangles[:, 0]] - cloth.positions[cloth.triangles[:, 1]], axis=1)
    rest = np.linalg.norm(start[cloth.triangles[:, 0]] - start[cloth.triangles[:, 1]], axis=1)
    assert np.abs(sides / rest - 1).max() < 0.1


def test_wind_pushes_along_normals_with_the_square_of_its_speed():
    cloth = made(flat=False)
    first, second = (cloth._wind_forces(np.array([0.0, speed, 0.0])) for speed in (2.0, 4.0))
    assert np.allclose(second, 4 * first)
    assert first.sum(0) == pytest.approx([0, 0.6 * 1.2 * 0.5 * 4.0, 0], abs=1e-9)  # half a square metre, 2 m/s
    assert np.allclose(cloth._wind_forces(np.array([5.0, 0.0, 0.0])), 0)
    assert np.allclose(cloth._wind_forces(np.array([0.0, -2.0, 0.0])), -first)


def test_an_episode_of_a_flag_is_a_function_of_its_seed():
    small = {"num_steps": 6, "size": 0.25, "warm_up": 0.1}
    first, again, other = (flag_simple(seed, **small) for seed in ([1, 0, 0], [1, 0, 0], [1, 0, 1]))
    assert torch.equal(first["positions"], again["positions"])
    assert not torch.equal(first.initial.parameters, other.initial.parameters)
    state = first.initial
    assert set(state.node_types.tolist()) == {NORMAL, HANDLE}
    assert int(state.kinematic.sum()) == 2
    assert mesh_faults(state) == []
    assert torch.allclose(first["positions"].diff(dim=0) / first.dt, first["velocities"][1:], atol=1e-9)
    held = first["positions"][:, state.kinematic]
    assert (held == held[0]).all()
    assert state.fields["parameters"].unit == "m/s"


def test_a_ball_pushes_the_cloth_before_it():
    path = sphere_cloth([1, 0, 0], num_steps=40, size=0.15)
    state = path.initial
    ball = state.node_types == OBSTACLE
    moved = path["positions"][-1, ball] - path["positions"][0, ball]
    assert torch.allclose(moved, 40 * 0.02 * path["velocities"][0, ball], atol=1e-4)
    cloth = path["positions"][-1, ~ball]
    assert float(cloth[:, 1].max()) > 0.1
    centre = path["positions"][-1, ball].mean(0)
    radius = float((path["positions"][-1, ball] - centre).norm(dim=1).mean())
    assert float((cloth - centre).norm(dim=1).min()) > 0.95 * radius


def test_sheets_fill_their_rectangle_and_turn_alike():
    nodes, triangles = sheet((1.0, 0.6), 0.2)
    a, b, c = (nodes[triangles[:, k]] for k in range(3))
    areas = 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(0.6)


@pytest.mark.parametrize("world", ["flag_simple", "flag_simple_small", "sphere_cloth", "sphere_cloth_small"])
def test_recipes_are_read(world):
    assert read_recipe(DATASETS / world / "recipe.toml").dataset == world
    assert world in GENERATORS


def test_what_cannot_be():
    with pytest.raises(ValueError, match="flag_simple needs num_steps >= 1"):
        flag_simple([0], num_steps=0)
    with pytest.raises(ValueError, match=r"size to 0\.3 m"):
        sphere_cloth([0], size=1.0)
