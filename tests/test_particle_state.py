from __future__ import annotations

import pytest
import torch

from simworld import (
    ConstantVelocity,
    ParticleState,
    State,
    Static,
    Trajectory,
    do,
    one_step_position_mse,
    open_trajectories,
    position_mse,
    rollout,
    write_trajectories,
)
from simworld.space import outside, shortest, wrapped
from simworld.testing import check_simulator


def random_state(num=6, length=3, scenes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {"generator": generator, "dtype": torch.float64}
    return ParticleState(
        positions=torch.rand(num, 2, **rows),
        velocities=torch.randn(num, 2, **rows),
        history=torch.randn(num, length, 2, **rows),
        boundaries=torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64).repeat(scenes, 1, 1),
        periodic=torch.tensor([[True, False]]).repeat(scenes, 1),
        batch=torch.arange(num) * scenes // num,
    )


class Turning:
    """A simulator whose next velocities are made from the oldest ones it knows."""

    dt = 0.1

    def step(self, state: State, action=None) -> State:
        velocities = 0.5 * state.velocities + 0.3 * state.history[:, 0].flip(1)
        return state.advanced(positions=wrapped(state, state.positions + self.dt * velocities), velocities=velocities)


def test_a_rollout_rebuilds_the_past_of_each_frame():
    state = random_state()
    path = rollout(state, simulator=Turning(), num_steps=7)
    assert set(path.frames) == {"positions", "velocities"}
    for t in range(8):
        assert path.frame(t).identical(state), t
        assert path.frame(t - 8).identical(state)
        state = Turning().step(state)


def test_frames_kept_now_and_then_know_their_past():
    state = random_state()
    whole, some = (rollout(state, simulator=Turning(), num_steps=6, every=k) for k in (1, 3))
    assert all(some.frame(t).identical(whole.frame(3 * t)) for t in range(3))
    assert some.window(1, 3).frame(1).identical(whole.frame(6))
    assert some.scenes()[1].frame(2).identical(whole.scenes()[1].frame(6))


def test_noise_is_part_of_the_past():
    state = random_state()
    noise = {"velocities": state.velocities.new_full((4, *state.velocities.shape), 0.1)}
    path = rollout(state, simulator=Turning(), num_steps=4, noise=noise)
    later = {name: value[2:] for name, value in noise.items()}
    assert rollout(path.frame(2), simulator=Turning(), num_steps=2, noise=later).frame(-1).identical(path.frame(-1))


def test_windows_scenes_and_single_states_keep_the_past():
    path = rollout(random_state(), simulator=Turning(), num_steps=7)
    late = path.window(5, 8)
    assert late.frame(1).identical(path.frame(6))
    assert path.window(2, 8).window(2, 5).frame(1).identical(path.frame(5))
    together = path.as_scenes(7)
    for t in (0, 2, 6):
        rows = slice(6 * t, 6 * t + 6)
        assert torch.equal(together.history[rows], path.frame(t).history)
    assert torch.equal(path["history"][4], path.frame(4).history)
    for number, alone in enumerate(path.scenes()):
        assert alone.frame(5).identical(path.frame(5).scene(number))


def test_single_steps_from_recorded_frames_see_their_own_past():
    path = rollout(random_state(), simulator=Turning(), num_steps=7)
    assert one_step_position_mse(Turning(), path) < 1e-30


@pytest.mark.parametrize("length", [0, 1, 3])
def test_simulators_with_a_past_keep_the_contract(length):
    simulator = ConstantVelocity(dt=0.1) if length == 0 else Turning()
    check_simulator(simulator, random_state(length=length, scenes=1))


def test_naive_simulators_move_the_past_on():
    state = random_state()
    for simulator in (Static(dt=0.1), ConstantVelocity(dt=0.1)):
        path = rollout(state, simulator=simulator, num_steps=2)
        after = simulator.step(simulator.step(state))
        assert path.frame(2).identical(after)
        assert torch.equal(after.history[:, -1], state.velocities)


def test_files_hold_the_past_of_the_first_frame_only(tmp_path):
    import h5py

    path = rollout(random_state(scenes=1), simulator=Turning(), num_steps=7)
    write_trajectories(tmp_path / "train.h5", [path], dataset="turning")
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["episodes/000000/history"].shape == (6, 3, 2)
        assert "history" not in file["statistics"]
    with open_trajectories(tmp_path / "train.h5") as file:
        again = file[0]
    for t in range(8):
        assert again.frame(t).identical(path.frame(t))


def test_a_counterfactual_shares_the_past_with_what_was_observed(tmp_path):
    path = rollout(random_state(scenes=1), simulator=Turning(), num_steps=7)
    other = rollout(path.initial, simulator=Turning(), num_steps=7, interventions=[do(at=2, velocities=0.0)])
    write_trajectories(
        tmp_path / "a.h5", [path], dataset="turning", counterfactuals=lambda _: [({"velocities": 0.0}, other)]
    )
    with open_trajectories(tmp_path / "a.h5") as file:
        ((said, outcome),) = file.counterfactuals(0)
    assert said == {"velocities": 0.0}
    assert outcome.frame(6).identical(other.frame(6))


def test_the_past_cannot_be_intervened_on():
    with pytest.raises(ValueError, match="follows from velocities"):
        do(history=0.0)(random_state(), 0)


def test_errors_are_shortest_ways_along_periodic_axes_only():
    state = random_state(num=1, scenes=1)
    near = state.replace(positions=torch.tensor([[0.01, 0.01]], dtype=torch.float64))
    paths = []
    for place in ((0.01, 0.01), (0.99, 0.01), (0.01, 0.99)):
        positions = torch.tensor([[place]], dtype=torch.float64)
        frames = {"positions": positions, "velocities": near.velocities[None]}
        paths.append(Trajectory(initial=near, frames=frames, active=near.active[None], dt=0.1))
    assert float(position_mse(paths[1], paths[0])[0]) == pytest.approx(0.02**2 / 2)
    assert float(position_mse(paths[2], paths[0])[0]) == pytest.approx(0.98**2 / 2)


def test_wrapping_moves_by_whole_boxes_and_only_along_periodic_axes():
    state = random_state(num=4, scenes=1)
    far = torch.tensor([[-0.25, -0.25], [1.0, 1.0], [-1e-18, 0.0], [7.5, 7.5]], dtype=torch.float64)
    inside = wrapped(state, far)
    assert inside[:, 0].tolist() == [0.75, 0.0, 0.0, 0.5]
    assert torch.equal(inside[:, 1], far[:, 1])
    assert float(shortest(state, far - inside)[:, 0].abs().max()) < 1e-12


def test_what_lies_in_the_box_stays_as_it_is():
    state = random_state(num=4, scenes=1)
    state = state.replace(boundaries=state.boundaries + 0.1)
    inside = torch.rand(9, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.999 + 0.1
    assert torch.equal(wrapped(state, inside), inside)


def test_walls_are_passed_along_open_axes_only():
    state = random_state(num=4, scenes=1)
    places = torch.tensor([[0.5, 0.5], [1.5, 0.5], [0.5, 1.5], [0.5, -0.1]], dtype=torch.float64)
    assert outside(state, places).tolist() == [False, False, True, True]
    assert outside(state, places[None]).tolist() == [[False, False, True, True]]


def test_periodic_axes_need_ends():
    state = ParticleState(
        positions=torch.zeros(1, 2), velocities=torch.zeros(1, 2), periodic=torch.tensor([[True, False]])
    )
    with pytest.raises(ValueError, match="boundaries"):
        wrapped(state, state.positions)


def test_kinematic_particles_are_not_free():
    state = random_state(num=3, scenes=1).replace(
        kinematic=torch.tensor([True, False, False]), active=torch.tensor([True, True, False])
    )
    assert state.free.tolist() == [False, True, False]
