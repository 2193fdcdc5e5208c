from __future__ import annotations

import warnings

import pytest
import torch

import simworld
from simworld import ConstantVelocity, ObjectState, ParticleState, SlotState, do, prescribe, rollout
from simworld.testing import check_simulator


class Pushed:
    """A point mass under an acceleration: one exact solution per number of steps."""

    dt = 0.5

    def step(self, state, action=None):
        velocities = state.velocities if action is None else state.velocities + action
        return state.replace(velocities=velocities, positions=state.positions + self.dt * velocities)


@pytest.fixture
def points():
    return ObjectState(positions=torch.arange(6.0).view(3, 2), velocities=torch.ones(3, 2))


def test_the_call_the_library_exists_for(points):
    actions = torch.ones(4, 3, 2)
    path = simworld.rollout(points.using(Pushed()), actions)
    assert path["positions"].shape == (5, 3, 2)
    assert torch.equal(path["velocities"][:, 0, 0], torch.arange(1.0, 6))
    assert torch.allclose(path["positions"][4], points.positions + 0.5 * (2 + 3 + 4 + 5))
    assert path.dt == 0.5
    assert torch.equal(path.actions, actions)
    check_simulator(Pushed(), points, torch.ones(6, 3, 2))


def test_a_start_that_is_no_number_is_told_as_such(points):
    broken = points.velocities.clone()
    broken[2, 0] = torch.nan
    with pytest.raises(ValueError, match="start state holds NaN or infinity in velocities of entity 2; repair it"):
        rollout(points.replace(velocities=broken), simulator=Pushed(), num_steps=2)
    slots = SlotState(slots=torch.ones(3, 2), history=torch.ones(3, 1, 2))
    for name in ("slots", "history"):
        wrong = slots[name].clone()
        wrong[1, ..., 0] = torch.inf
        with pytest.raises(ValueError, match=f"start state holds NaN or infinity in {name} of slot 1;"):
            rollout(slots.replace(**{name: wrong}), simulator=simworld.Static(dt=0.1), num_steps=1)


def test_without_a_simulator_both_ways_out_are_named(points):
    with pytest.raises(ValueError, match=r"simulator=.*state\.using"):
        rollout(points, num_steps=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "actions or num_steps"),
        ({"actions": torch.zeros(4, 2, 2)}, r"\[T, 3, a\] per entity or \[T, 1, a\]"),
        ({"actions": torch.zeros(4, 3, 2), "num_steps": 5}, "num_steps=5 needs as many actions; got 4"),
        ({"num_steps": -1}, "0 or more"),
        ({"num_steps": 2, "every": 0}, "every must be 1 or more"),
        ({"num_steps": 2, "noise": {"masses": torch.zeros(2, 3)}}, "change in time"),
        ({"num_steps": 2, "noise": {"velocities": torch.zeros(1, 3, 2)}}, r"noise for velocities must be \[2, 3, 2\]"),
    ],
)
def test_bad_arguments(points, arguments, says):
    with pytest.raises(ValueError, match=says):
        rollout(points, simulator=Pushed(), **arguments)


def test_no_steps_is_the_state_itself(points):
    assert rollout(points, simulator=Pushed(), num_steps=0).frame(0).identical(points)


def test_every_keeps_each_kth_frame(points):
    full = rollout(points, simulator=Pushed(), num_steps=6)
    thin = rollout(points, simulator=Pushed(), num_steps=6, every=3)
    assert torch.equal(thin["positions"], full["positions"][::3])
    assert thin.dt == 1.5


def test_observing_keeps_only_what_is_asked_for(points):
    path = rollout(points, simulator=Pushed(), num_steps=3, observe=lambda s: {"centre": s.positions.mean(0)})
    assert path["centre"].shape == (4, 2)
    with pytest.raises(KeyError, match="observe"):
        path.frame(1)


def test_noise_is_data(points):
    noise = torch.zeros(3, 3, 2)
    noise[1, 0, 0] = 1.0
    path = rollout(points, simulator=Pushed(), num_steps=3, noise={"velocities": noise})
    assert path["velocities"][:, 0, 0].tolist() == [1, 1, 2, 2]


def test_gradients_flow_through_a_rollout(points):
    actions = torch.ones(3, 3, 2, requires_grad=True)
    rollout(points, actions, simulator=Pushed())["positions"][-1].sum().backward()
    assert actions.grad[:, 0, 0].tolist() == [1.5, 1.0, 0.5]


def test_noise_does_not_move_what_is_inactive(points):
    gone = points.replace(active=torch.tensor([True, False, True]))
    path = rollout(gone, simulator=Pushed(), num_steps=3, noise={"positions": torch.ones(3, 3, 2)})
    assert torch.equal(path["positions"][:, 1], points.positions[1].expand(4, 2))


def test_bad_actions_and_masks(points):
    with pytest.raises(ValueError, match="actions must be finite"):
        rollout(points, torch.full((2, 3, 2), torch.nan), simulator=Pushed())
    masked = do(velocities=0.0, entities=torch.tensor([False, False, True]))(points, 0)
    assert masked.velocities.tolist() == [[1, 1], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="entity numbers or a mask"):
        do(velocities=0.0, entities=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="finite values"):
        do(velocities=float("nan"))(points, 0)
    with pytest.raises(ValueError, match=r"one value or \[3, 2\] of them; got \[5\]"):
        do(velocities=torch.ones(5))(points, 0)
    with pytest.raises(ValueError, match="does not carry"):
        do(charges=1.0)(points, 0)
    with pytest.raises(ValueError, match="a mask of 2 entities; 'velocities' has 3 rows"):
        do(velocities=0.0, entities=torch.tensor([True, False]))(points, 0)
    with pytest.raises(ValueError, match="a mask of 2 entities; the trajectory has 3"):
        prescribe(rollout(points, simulator=Pushed(), num_steps=1), torch.tensor([True, False]))


def test_removed_entities_are_held(points):
    path = rollout(points, simulator=Pushed(), num_steps=4, interventions=[do(at=2, active=False, entities=1)])
    assert path.active[:, 1].tolist() == [True, True, False, False, False]
    assert torch.equal(path["positions"][2:, 1], path["positions"][2:3, 1].expand(3, 2))
    assert not torch.equal(path["positions"][4, 0], path["positions"][2, 0])


def test_an_intervention_may_stand_by_itself(points):
    actions = torch.ones(4, 3, 2)
    stop = do(at=1, velocities=0.0)
    alone, listed = (simworld.rollout(points, actions, simulator=Pushed(), interventions=one) for one in (stop, [stop]))
    assert torch.equal(alone["positions"], listed["positions"])
    assert alone.interventions == listed.interventions


def test_a_step_beyond_the_last_is_warned_of(points):
    actions, simulator = torch.ones(4, 3, 2), Pushed()
    with pytest.warns(UserWarning, match=f"from step {len(actions) + 1} on, after the last, {len(actions)}"):
        simworld.rollout(points, actions, simulator=simulator, interventions=do(at=len(actions) + 1, velocities=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simworld.rollout(points, actions, simulator=simulator, interventions=do(at=len(actions), velocities=0.0))


def test_static_fields_change_at_step_zero_only(state):
    heavy = do(at=0, masses=2.0)
    assert rollout(state, simulator=Pushed(), num_steps=1, interventions=[heavy]).initial.masses[0] == 2
    with pytest.raises(ValueError, match="'masses' is constant in time; change it at step 0"):
        rollout(state, simulator=Pushed(), num_steps=3, interventions=[do(at=2, masses=2.0)])


def test_do_applies_where_it_says(points):
    assert do(at=3, velocities=0.0)(points, 2) is points
    assert do(at=range(2, 4), velocities=0.0)(points, 3).velocities.sum() == 0
    assert do(at=lambda s, t: bool(s.positions[0, 0] > 5), velocities=0.0)(points, 0) is points
    one = do(velocities=lambda v: 2 * v, entities=[2])(points, 0)
    assert one.velocities.tolist() == [[1, 1], [1, 1], [2, 2]]
    with pytest.raises(ValueError, match="changes nothing"):
        do(at=1)
    with pytest.raises(ValueError, match="cannot change 'speed'"):
        do(speed=1.0)(points, 0)
    with pytest.raises(ValueError, match="rows 0 to 2"):
        do(velocities=1.0, entities=[3])(points, 0)


def test_naive_simulators_keep_the_contract(points):
    check_simulator(ConstantVelocity(dt=0.1), points)


class Remembers(Pushed):
    def __init__(self):
        self.count = 0.0

    def step(self, state, action=None):
        self.count += 1
        return state.replace(positions=state.positions + self.count)


class Overwrites(Pushed):
    def step(self, state, action=None):
        state.positions.add_(1)
        return state


class Order(Pushed):
    def step(self, state, action=None):
        return state.replace(positions=state.positions + torch.arange(len(state))[:, None])


class Crowd(Pushed):
    def step(self, state, action=None):
        return state.replace(positions=state.positions + state.positions.mean())


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Remembers, "two and then four"),
        (Overwrites, "wrote into"),
        (Order, "batch is not equal|order of entities"),
        (Crowd, "batch is not equal"),
    ],
)
def test_the_contract_catches_simulators_that_break_it(points, broken, says):
    with pytest.raises(AssertionError, match=says):
        check_simulator(broken(), points)


def test_rollouts_do_not_start_far_outside_the_box():
    """A little is what recordings have; who is kinematic, absent or on a periodic axis may be anywhere."""
    box = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    places = torch.tensor([[0.5, 0.5], [1.15, -0.15], [4.0, 1.0]])
    start = ParticleState(positions=places, velocities=torch.zeros(3, 2), boundaries=box)
    with pytest.raises(
        ValueError, match=r"entity 2 at \[4.0, 1.0\], far outside its box from \[0.0, 0.0\] to \[1.0, 2"
    ):
        rollout(start, simulator=ConstantVelocity(dt=0.1), num_steps=1)
    there = {"velocities": torch.zeros(3, 2), "boundaries": box}
    last = torch.tensor([False, False, True])
    for known in ({"kinematic": last}, {"active": ~last}, {"periodic": torch.tensor([[True, False]])}):
        made = rollout(
            ParticleState(positions=places, **there, **known), simulator=ConstantVelocity(dt=0.1), num_steps=1
        )
        assert len(made) == 2
    led = do(positions=places, at=0)
    inside = ParticleState(positions=places.clamp(0, 1), **there)
    assert (
        float(rollout(inside, simulator=ConstantVelocity(dt=0.1), num_steps=1, interventions=led)["positions"].max())
        > 3
    )
    went_on = ParticleState(positions=places, **there)
    assert len(rollout(went_on, simulator=ConstantVelocity(dt=0.1), num_steps=1, first_step=3)) == 2
