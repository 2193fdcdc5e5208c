from __future__ import annotations

import copy
import pickle

import pytest
import torch

from simworld import Field, MeshState, ObjectState, State, Trajectory


def two(**changes):
    values = {"positions": torch.zeros(2, 2), "velocities": torch.ones(2, 2), **changes}
    return ObjectState(**values)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"velocities": torch.zeros(3, 2)}, ValueError, r"velocities must have shape \[2, 2\].*got \[3, 2\]"),
        ({"velocities": torch.zeros(2, 3)}, ValueError, r"velocities must have shape \[2, 2\]"),
        ({"masses": torch.zeros(2, 1)}, ValueError, r"masses must have shape \[2\]"),
        ({"velocities": torch.zeros(2, 2).long()}, TypeError, "velocities must hold float.*float"),
        ({"velocities": [[0, 0], [0, 0]]}, TypeError, "torch.Tensor"),
        ({"positions": torch.tensor([[0, 0], [0, torch.nan]])}, ValueError, "positions must be finite; row 1"),
        ({"masses": torch.tensor([1, torch.inf])}, ValueError, "masses must be finite"),
        ({"batch": torch.tensor([1, 0])}, ValueError, "batch must be sorted"),
        ({"batch": torch.tensor([0.0, 0.0])}, ValueError, "batch must be int64"),
        ({"active": torch.ones(3, dtype=torch.bool)}, ValueError, r"active must be bool of shape \[2\]"),
        ({"temperature": torch.zeros(2)}, ValueError, "no field 'temperature'.*positions.*with_fields"),
        ({"springs": torch.tensor([[0, 2]])}, ValueError, "springs must hold entity numbers from 0 to 1"),
        ({"spring_lengths": torch.ones(1)}, ValueError, "spring_lengths has a row for each of springs"),
        ({"springs": torch.tensor([[0, 1]]), "spring_lengths": torch.ones(2)}, ValueError, r"shape \[1\]"),
        ({"springs": torch.tensor([[0, 1]]), "batch": torch.tensor([0, 1])}, ValueError, "different scenes"),
    ],
)
def test_bad_values_are_told_at_construction(changes, error, says):
    with pytest.raises(error, match=says):
        two(**changes)


def test_missing_required_field_is_named():
    with pytest.raises(ValueError, match="needs velocities; got positions"):
        ObjectState(positions=torch.zeros(1, 2))


def test_the_abstract_state_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        State(positions=torch.zeros(1, 2))


def test_states_are_frozen_and_replace_makes_a_new_one():
    state = two()
    with pytest.raises(AttributeError, match="replace"):
        state.positions = torch.ones(2, 2)
    after = state.replace(positions=torch.ones(2, 2))
    assert torch.equal(state.positions, torch.zeros(2, 2))
    assert torch.equal(after.positions, torch.ones(2, 2))
    with pytest.raises(ValueError, match="shape"):
        state.replace(positions=torch.ones(3, 2))
    with pytest.raises(ValueError, match="no field 'speed'"):
        state.replace(speed=torch.ones(2))
    with pytest.raises(ValueError, match="active"):
        state.replace(active=torch.ones(2))


def test_replacing_a_table_checks_what_has_a_row_for_each_of_it():
    state = two(springs=torch.tensor([[0, 1]]), spring_lengths=torch.ones(1))
    with pytest.raises(ValueError, match="spring_lengths must have shape"):
        state.replace(springs=torch.tensor([[0, 1], [1, 0]]))


def test_absent_and_unknown_fields_are_told_apart():
    with pytest.raises(AttributeError, match="carries no masses"):
        two().masses  # noqa: B018
    with pytest.raises(AttributeError, match="has no field 'mass'"):
        two().mass  # noqa: B018
    assert "masses" not in two()


def test_own_fields_are_fields_like_any_other():
    kind = ObjectState.with_fields(temperature=Field(unit="K"), pressure=Field(unit="Pa", per="scene", static=True))
    state = kind(
        positions=torch.zeros(3, 2),
        velocities=torch.zeros(3, 2),
        temperature=torch.tensor([1.0, 2, 3]),
        pressure=torch.tensor([5.0, 6.0]),
        batch=torch.tensor([0, 0, 1]),
    )
    assert state.scene(1).temperature.tolist() == [3]
    assert state.scene(1).pressure.tolist() == [6]
    assert state.repeat(2).pressure.tolist() == [5, 6, 5, 6]
    assert "temperature" in state.dynamic_fields
    assert "pressure" in state.static_fields
    with pytest.raises(ValueError, match="already has positions"):
        ObjectState.with_fields(positions=Field(unit="m"))


def test_meshes_of_other_cells_or_dimensions_do_not_join():
    flat = MeshState(rest_positions=torch.rand(4, 2), cells=torch.tensor([[0, 1, 2]]))
    quads = MeshState(rest_positions=torch.rand(4, 2), cells=torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match=r"alike .*: cells are \[1, 3\] and \[1, 4\]"):
        MeshState.cat([flat, quads])


def test_joining_scenes_and_taking_them_apart(state):
    other = state.replace(velocities=state.velocities + 1)
    both = type(state).cat([state, other])
    assert both.num_scenes == 2
    assert both.scene(0).identical(state)
    assert both.scene(1).identical(other)
    assert both.springs[len(state.springs) :].min() == len(state)
    with pytest.raises(ValueError, match="same fields"):
        ObjectState.cat([state, two()])
    with pytest.raises(IndexError, match="2 scenes"):
        both.scene(2)


def test_repeat_gives_whole_copies(state):
    copies = type(state).cat([state, state]).repeat(3)
    assert copies.num_scenes == 6
    assert all(copies.scene(k).identical(state) for k in range(6))


def test_ragged_scenes():
    ragged = ObjectState.cat([two(), ObjectState(positions=torch.ones(3, 2), velocities=torch.ones(3, 2))])
    assert ragged.batch.tolist() == [0, 0, 1, 1, 1]
    assert len(ragged.scene(1)) == 3


def test_moving_to_another_dtype_keeps_integers(state):
    single = state.to(torch.float32)
    assert single.positions.dtype == torch.float32
    assert single.springs.dtype == torch.int64
    assert single.fixed.dtype == torch.bool


def test_derived_values_follow_the_fields_they_are_made_from(state):
    calls = []

    def count(s):
        calls.append(1)
        return float(s.masses.sum())

    assert state.derived("mass", ("masses",), count) == 17
    moved = state.replace(positions=state.positions + 1)
    assert moved.derived("mass", ("masses",), count) == 17
    assert len(calls) == 1
    heavier = moved.replace(masses=2 * state.masses)
    assert heavier.derived("mass", ("masses",), count) == 34
    assert type(state).cat([state, state]).derived("mass", ("masses",), count) == 34
    assert state.derived("mass", ("masses",), count) == 17


def test_states_can_be_copied_and_pickled():
    state = two()
    assert copy.deepcopy(state).identical(state)
    assert pickle.loads(pickle.dumps(state)).identical(state)


def test_trajectory_frames_windows_and_names(episode):
    assert len(episode) == 31
    assert episode.num_steps == 30
    assert episode.frame(0).identical(episode.initial)
    assert torch.equal(episode.frame(-1).positions, episode["positions"][30])
    window = episode.window(5, 9)
    assert window.initial.identical(episode.frame(5))
    assert torch.equal(window.actions, episode.actions[5:8])
    assert episode["masses"].shape == (17,)
    with pytest.raises(KeyError, match="no 'forces'"):
        episode["forces"]
    with pytest.raises(IndexError, match="frames 0 to 30"):
        episode.frame(31)
    with pytest.raises(ValueError, match="window"):
        episode.window(5, 40)
    with pytest.raises(ValueError, match="30 actions"):
        Trajectory(initial=episode.initial, frames=episode.frames, active=episode.active, dt=1, actions=torch.zeros(3))


def test_frames_as_scenes(episode):
    scenes = episode.as_scenes(4)
    assert scenes.num_scenes == 4
    assert scenes.scene(3).identical(episode.frame(3))


def test_trajectories_join_into_scenes(episodes):
    both = Trajectory.cat(episodes[:2])
    assert both.frame(3).scene(1).identical(episodes[1].frame(3))
    with pytest.raises(ValueError, match="same number of frames"):
        Trajectory.cat([episodes[0], episodes[1].window(0, 5)])


@pytest.mark.parametrize(
    ("field", "rows", "message"),
    [
        ("masses", [1.0, 0.0], "masses must be positive; row 1 holds 0.0.*fixed=True"),
        ("masses", [-1.0, 1.0], "masses must be positive; row 0 holds -1.0"),
        ("quats", [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], "quats must be of unit length; row 1.*0.7071.*Divide"),
        ("half_extents", [[1.0, 1, 1], [1.0, 0, 1]], r"half_extents must be positive; row 1 holds \[1.0, 0.0, 1.0\]"),
    ],
)
def test_values_that_no_body_has_are_refused(field, rows, message):
    given = {"positions": torch.zeros(2, 3), "velocities": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        ObjectState(**given, **{field: torch.tensor(rows)})


def test_a_static_value_that_no_body_has_is_refused_by_replace():
    state = ObjectState(positions=torch.zeros(2, 3), velocities=torch.zeros(2, 3), masses=torch.ones(2))
    with pytest.raises(ValueError, match="masses must be positive"):
        state.replace(masses=torch.tensor([0.0, 1.0]))


def test_the_number_of_bodies_cannot_change_within_an_episode():
    state = ObjectState(positions=torch.zeros(2, 3), velocities=torch.zeros(2, 3))
    frames = {"positions": torch.zeros(4, 3, 3), "velocities": torch.zeros(4, 2, 3)}
    with pytest.raises(ValueError, match=r"'positions' must have shape \[4, 2, 3\].*say so by active"):
        Trajectory(initial=state, frames=frames, active=torch.ones(4, 2, dtype=torch.bool), dt=0.1)


def test_scenes_are_the_inverse_of_cat():
    def path(count, seed):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(3, count, 2, generator=draw)
        state = ObjectState(positions=x[0], velocities=x[0], springs=torch.tensor([[0, count - 1]]))
        active = torch.ones(3, count, dtype=torch.bool)
        actions = torch.randn(2, count, 2, generator=draw)
        return Trajectory(
            initial=state, frames={"positions": x, "velocities": x}, active=active, dt=0.1, actions=actions
        )

    paths = [path(3, 0), path(2, 1), path(4, 2)]
    for made, wanted in zip(Trajectory.cat(paths).scenes(), paths, strict=True):
        assert made.initial.identical(wanted.initial)
        assert torch.equal(made["positions"], wanted["positions"])
        assert torch.equal(made.actions, wanted.actions)
