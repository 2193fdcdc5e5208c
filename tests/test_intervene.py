"""Interventions: what they change, when, what they tell of themselves, and what they refuse."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from simworld import ConstantVelocity, do, open_trajectories, pin, remove, reserve, rollout, write_trajectories
from simworld.intervene import Rule, hold, negate, rotate, scale, shift
from simworld.intervention_tables import interventions_from
from simworld.kinds import ObjectState
from simworld.physics.forces import ForceEngine, gravity


@dataclass(frozen=True)
class Gliding:
    """Goes on as it went, an action being added to velocities."""

    dt: float = 1.0

    def step(self, state, action=None):
        velocities = state.velocities if action is None else state.velocities + action
        return state.replace(positions=state.positions + self.dt * velocities, velocities=velocities)


@pytest.fixture
def two():
    return ObjectState(
        positions=torch.tensor([[0.0, 0.0], [10.0, 0.0]]),
        velocities=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        radii=torch.tensor([1.0, 1.0]),
        masses=torch.tensor([1.0, 2.0]),
        object_types=torch.tensor([0, 1]),
    )


def velocities_after(state, **changes):
    return do(**changes)(state, 0).velocities.tolist()


def test_rules(two):
    assert velocities_after(two, velocities=scale(3.0)) == [[3.0, 0.0], [0.0, 0.0]]
    assert velocities_after(two, velocities=scale([3.0, 1.0]), entities=0) == [[3.0, 0.0], [0.0, 0.0]]
    assert velocities_after(two, velocities=shift((0.0, 2.0)), entities=[1]) == [[1.0, 0.0], [0.0, 2.0]]
    assert velocities_after(two, velocities=negate()) == [[-1.0, 0.0], [0.0, 0.0]]
    turned = do(velocities=rotate(90.0))(two, 0).velocities
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    space = ObjectState(positions=torch.eye(3), velocities=torch.eye(3))
    spun = do(velocities=rotate(-90.0))(space, 0).velocities
    torch.testing.assert_close(spun, torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))


def test_nothing_changed_is_the_same_rollout_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    state = ObjectState(
        positions=torch.randn(4, 2, generator=generator),
        velocities=torch.randn(4, 2, generator=generator),
        masses=torch.rand(4, generator=generator) + 0.5,
    )
    engine = ForceEngine(dt=0.1, law=gravity(constant=1.0, min_distance=0.1), rule="velocity_verlet")
    plain = rollout(state, simulator=engine, num_steps=9)
    same = [do(masses=scale(1.0)), do(at=3, velocities=scale(1.0)), do(at=range(2, 5), positions=shift(0.0))]
    asked = rollout(state, simulator=engine, num_steps=9, interventions=same)
    for name in plain.frames:
        assert torch.equal(plain[name], asked[name])
    heavier = rollout(state, simulator=engine, num_steps=9, interventions=[do(masses=scale(2.0))])
    assert not torch.equal(plain["positions"][1], heavier["positions"][1])
    later = rollout(state, simulator=engine, num_steps=9, interventions=[do(at=4, velocities=negate())])
    assert torch.equal(plain["positions"][:5], later["positions"][:5])
    assert not torch.equal(plain["positions"][5], later["positions"][5])


def test_events(two):
    def run(**said):
        return rollout(two, simulator=Gliding(), num_steps=12, interventions=[do(**said)])

    while_near = run(at="gap(0, 1) <= 3", entities=0, velocities=scale(2.0))
    assert while_near["positions"][:8, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 11]
    first = run(at="gap(0, 1) <= 3", once=True, entities=0, velocities=scale(2.0))
    assert first["positions"][:8, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
    assert first.interventions[0]["came"] == 5
    with pytest.warns(UserWarning, match=r"gap\(0, 1\) <= -5 never came in 12 steps"):
        run(at="gap(0, 1) <= -5", velocities=0.0)
    by_type = run(entities="object_types == 1", velocities=1.0)
    assert by_type["velocities"][0].tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_actions_are_changed(two):
    actions = torch.ones(5, 2, 2)
    path = rollout(
        two, actions, simulator=Gliding(), interventions=[do(at=range(1, 3), entities=1, actions=scale(10.0))]
    )
    assert path["velocities"][:, 1, 0].tolist() == [0, 1, 11, 21, 22, 23]
    assert path["velocities"][:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert path.actions[:, 1, 0].tolist() == [1, 10, 10, 1, 1]
    with pytest.raises(ValueError, match="needs actions to change"):
        rollout(two, simulator=Gliding(), num_steps=2, interventions=[do(actions=scale(2.0))])


def test_pins_hold_what_was(two):
    path = rollout(two, simulator=Gliding(), num_steps=6, interventions=[pin(0, at=2, until=4)])
    assert path["positions"][:, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2]
    held = rollout(two, simulator=Gliding(), num_steps=4, interventions=[do(at=range(1, 3), positions=hold())])
    assert held["positions"][:, 0, 0].tolist() == [0, 1, 1, 2, 3]


def test_reserved_entities_come_and_matter_only_then():
    engine = ForceEngine(dt=0.1, law=gravity(constant=1.0))
    state = ObjectState(positions=torch.eye(3), velocities=torch.zeros(3, 3), masses=torch.ones(3))
    both = ObjectState.cat([state, state])
    more = reserve(both, 2)
    assert more.active.tolist() == [True, True, True, False, False] * 2
    plain, waiting = (rollout(s, simulator=engine, num_steps=4) for s in (both, more))
    there = more.active
    torch.testing.assert_close(waiting["positions"][:, there], plain["positions"], rtol=0, atol=1e-7)
    new = do(at=2, entities=[3], active=True, positions=(5.0, 5.0, 5.0))
    added = rollout(more, simulator=engine, num_steps=4, interventions=[new])
    assert torch.equal(added["positions"][:3, there], waiting["positions"][:3, there])
    assert not torch.equal(added["positions"][3, :3], waiting["positions"][3, :3])
    assert torch.equal(added["positions"][3:, 5:8], waiting["positions"][3:, 5:8])
    with pytest.raises(ValueError, match="0 to 2 of a scene"):
        reserve(state, like=3)


def test_overlaps_are_told_by_how_much(two):
    with pytest.raises(ValueError, match="bodies 1 and 0 overlapping by 1.5"):
        do(entities=1, positions=(0.5, 0.0))(two, 0)
    with pytest.raises(ValueError, match="overlapping by"):
        do(entities=1, radii=9.5)(two, 0)
    touching = two.replace(positions=torch.tensor([[0.0, 0.0], [1.9, 0.0]]))
    apart = do(entities=1, positions=shift((0.05, 0.0)))(touching, 0)  # still overlapping, but less
    assert float(apart.positions[1, 0]) == pytest.approx(1.95)
    hidden = two.replace(active=torch.tensor([True, False]), positions=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="overlapping by 2"):
        do(entities=1, active=True)(hidden, 0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"masses": -1.0}, "masses must be positive"),
        ({"masses": float("inf")}, "finite"),
        ({"colour": 1.0}, "cannot change 'colour'"),
        ({"charges": 1.0}, "does not carry"),
        ({"velocities": 1.0, "entities": [2]}, "rows 0 to 1"),
        ({"velocities": 1.0, "entities": "weights > 1"}, "no 'weights'"),
        ({"velocities": rotate(30.0), "masses": rotate(30.0)}, "rotate is for vectors"),
        ({"velocities": Rule("rotate", [1, 2])}, "a number of degrees"),
        ({"springs": 1}, "different entities from 0 to 1"),
        ({"springs": [[0, 2]]}, "different entities from 0 to 1"),
        ({"springs": scale(2)}, "nothing can scale"),
        ({"object_types": -1}, "0 or more"),
    ],
)
def test_refusals(two, said, message):
    two = two.replace(springs=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=message):
        do(**said)(two, 0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"colour": hold()}, "cannot change 'colour'"),
        ({"quats": hold()}, "does not carry"),
        ({"positions": hold(), "entities": [99]}, "rows 0 to 1"),
        ({"positions": hold(), "entities": torch.ones(3, dtype=torch.bool)}, "mask of 3"),
    ],
)
def test_what_cannot_be_held_is_refused(two, said, message):
    with pytest.raises(ValueError, match=message):
        rollout(two, simulator=ConstantVelocity(dt=0.1), num_steps=2, interventions=do(at=range(2), **said))


@pytest.mark.parametrize("none", [[], "object_types == 7"])
def test_acting_on_nobody_is_told(two, none):
    with pytest.warns(UserWarning, match="changes nothing at step 1: (none is named|.*holds of no entity)"):
        rollout(
            two, simulator=ConstantVelocity(dt=0.1), num_steps=2, interventions=do(at=1, entities=none, velocities=0.0)
        )


def test_refusals_at_once():
    with pytest.raises(ValueError, match="once=True is for events"):
        do(at=3, once=True, velocities=0.0)
    with pytest.raises(ValueError, match="no expression"):
        do(at="speed[0] >", velocities=0.0)


def test_static_fields_change_at_the_start_alone(two):
    with pytest.raises(ValueError, match="'masses' is constant in time.*or begin a rollout there"):
        rollout(two, simulator=Gliding(), num_steps=3, interventions=[do(at=1, masses=scale(2.0))])


def test_what_was_done_is_told_stored_and_read_back(two, tmp_path):
    done = [
        do(at=range(1, 4), entities=[0], velocities=scale(2.0), positions=shift([0.0, 5.0])),
        do(at="speed[0] > 3", once=True, entities="object_types == 1", velocities=negate()),
        remove([1], at=5),
        pin(0, at=6),
    ]
    path = rollout(two, simulator=Gliding(), num_steps=8, interventions=done)
    assert path.interventions[0] == {
        "at": [1, 4],
        "entities": [0],
        "scale": {"velocities": 2.0},
        "shift": {"positions": [0.0, 5.0]},
    }
    assert path.interventions[1]["came"] == 2
    assert path.interventions[2] == {"at": 5, "entities": [1], "set": {"active": False}}
    assert path.interventions[3] == {"at": [6], "entities": [0], "hold": ["positions"], "set": {"velocities": 0.0}}
    write_trajectories(tmp_path / "a.h5", [path], dataset="test")
    with open_trajectories(tmp_path / "a.h5") as file:
        stored = file[0]
    assert stored.interventions == path.interventions
    again = rollout(
        two, simulator=Gliding(), num_steps=8, interventions=interventions_from(list(stored.interventions), "stored")
    )
    assert torch.equal(again["positions"], path["positions"])
    assert again.interventions == path.interventions
    assert path.window(2, 5).interventions == path.interventions

    def nothing(state, step):
        return state

    assert "nothing" in str(rollout(two, simulator=Gliding(), num_steps=1, interventions=[nothing]).interventions)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"set": {"velocities": "fast"}}, "finite number"),
        ({"set": {"velocities": 1.0}, "scale": {"velocities": 2.0}}, "twice"),
        ({"at": 3}, "does nothing"),
        ({"at": -1, "remove": True}, "at must be"),
        ({"at": [1, 2, 3, 4], "remove": True}, "at must be"),
        ({"entities": 1.5, "remove": True}, "entities must be"),
        ({"entities": "speed >", "remove": True}, "no expression"),
        ({"speed": 2}, "unknown key 'speed'"),
        ({"negate": "charges"}, "must be a list"),
        ({"once": True, "at": 3, "remove": True}, "once=True is for events"),
        ({"set": {"masses": float("nan")}}, "finite number"),
        ("remove", "must be a table"),
    ],
)
def test_tables_refused(table, message):
    with pytest.raises(ValueError, match=message):
        interventions_from([table], "query.toml")


def test_tables_read_names(two):
    (made,) = interventions_from([{"entities": "sun", "at": [2], "add": True}], "here", names={"sun": [1]})
    assert made.at == range(2, sys.maxsize)
    off = two.replace(active=torch.tensor([True, False]))
    assert made(off, 2).active.tolist() == [True, True]


@pytest.mark.parametrize("change", [1.5, scale(1.5), shift(0.5), lambda rows: rows + 0.5])
def test_whole_numbers_and_flags_stay_what_they_are(two, change):
    with pytest.raises(ValueError, match="'object_types' so: these rows are whole numbers"):
        do(object_types=change)(two, 0)
    assert do(object_types=scale(2.0))(two, 0).object_types.tolist() == [0, 2]
    with pytest.raises(ValueError, match="true or false; got 0.5"):
        do(active=0.5)(two, 0)
    assert do(active=0)(two, 0).active.tolist() == [False, False]


@pytest.mark.parametrize("value", ["x", None, [[1.0], [1.0, 2.0]], scale("x"), scale([1.0, 2.0, 3.0])])
def test_what_is_no_value_is_refused(two, value):
    with pytest.raises(ValueError, match=r"do\(\) cannot change 'masses' so: (do|scale) takes"):
        do(masses=value)(two, 0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"entities": True}, "mask of entities"),
        ({"entities": ["a"]}, "entity numbers"),
        ({"entities": [10**30]}, "entity numbers"),
        ({"entities": torch.ones(2, 1, dtype=torch.bool)}, "mask of entities"),
        ({"at": -1}, "0 or more"),
        ({"at": 1.5}, "0 or more"),
        ({"at": range(5, 2)}, "range without a step"),
        ({"actions": hold()}, "hold"),
    ],
)
def test_no_entities_steps_or_actions(said, message):
    with pytest.raises(ValueError, match=message):
        do(**({"masses": 1.0} | said))


@pytest.mark.parametrize("none", [[], torch.zeros(2, dtype=torch.bool), "object_types == 7"])
def test_nobody_chosen_changes_nobody(two, none):
    assert do(entities=none, positions=5.0)(two, 0).identical(two)


@pytest.mark.parametrize(
    "value", [torch.tensor([0.5, 2.0]), np.array([0.5, 2.0]), np.float32(0.5), [torch.tensor(0.5), 2], True, (0.5, 2)]
)
@pytest.mark.parametrize("at", [range(1, 9, 3), range(2, sys.maxsize, 3), range(5), "speed[0] > 2", np.int64(3)])
def test_all_values_are_told_as_plain_ones(two, value, at):
    for change in (value, scale(value)):
        said = do(at=at, entities=torch.tensor([0, 1]), masses=change).to_json()
        (back,) = interventions_from([json.loads(json.dumps(said))], "file")
        assert back.to_json() == said
        first = do(at=0, masses=change)(two, 0).masses
        assert torch.equal(replace(back, at=0)(two, 0).masses, first)


def test_functions_are_not_read_back(two):
    for told in (do(masses=lambda rows: rows), do(at=lambda state, step: True, masses=1.0)):
        with pytest.raises(ValueError, match="function <lambda>.* none is read from a file"):
            interventions_from([told.to_json()], "file")


def test_overlaps_among_many_are_looked_for_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("simworld.intervene.DISTANCES_AT_ONCE", 100)
    places = torch.arange(50.0)[:, None] * torch.tensor([[3.0, 0.0]])
    state = ObjectState(positions=places, velocities=torch.zeros(50, 2), radii=torch.ones(50))
    assert do(positions=shift([1.0, 0.0]))(state, 0).positions[49, 0] == 148.0
    with pytest.raises(ValueError, match="leaves bodies 48 and 49 overlapping by 1"):
        do(entities=48, positions=shift([2.0, 0.0]))(state, 0)
    with pytest.raises(ValueError, match="overlapping"):
        do(positions=scale(0.5))(state, 0)


def test_reserved_entities_of_several_scenes_leave_springs_as_they_were():
    one = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [5.0, 0.0]]),
        velocities=torch.zeros(2, 2),
        springs=torch.tensor([[0, 1]]),
        spring_stiffnesses=torch.ones(1),
    )
    more = reserve(one.repeat(2), 2, like=1)
    assert more.springs.tolist() == [[0, 1], [4, 5]]
    assert more.batch.tolist() == [0] * 4 + [1] * 4
    assert more.active.tolist() == [True, True, False, False] * 2


def test_every_kind_of_state_can_be_changed_and_is_drawn_as_changed():
    from simworld.kinds import MeshState, ParticleState, SplatState
    from simworld.render import Camera, render

    water = ParticleState(positions=torch.rand(5, 2), velocities=torch.zeros(5, 2), gravity=torch.tensor([[0.0, -9.8]]))
    tilted = do(gravity=rotate(90.0))(water, 0)
    torch.testing.assert_close(tilted.gravity, torch.tensor([[9.8, 0.0]]))
    sheet = MeshState(
        rest_positions=torch.rand(4, 2), velocities=torch.ones(4, 2), node_types=torch.tensor([0, 4, 4, 0])
    )
    faster = do(entities="node_types == 4", velocities=scale(2.0))(sheet, 0)
    assert faster.velocities[:, 0].tolist() == [1, 2, 2, 1]
    assert type(faster) is MeshState
    splats = SplatState(
        means=torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2),
        scales=torch.full((2, 3), 0.2),
        opacities=torch.ones(2),
        harmonics=torch.ones(2, 1, 3),
    )
    camera = Camera.look_at((0.0, -3.0, 0.0), (0.0, 0.0, 0.0), width=24, height=16)
    plain = render(splats, camera)
    darker = do(entities=1, harmonics=scale(0.0))(splats, 0)
    assert torch.equal(darker.means, splats.means)
    changed = (render(darker, camera) - plain).abs().amax(2)
    assert float(changed.max()) > 0.1
    assert float(changed[:, 0].max()) < 1e-3
    bodies = ObjectState(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3), radii=torch.ones(1))
    seen, moved = (render(s, camera) for s in (bodies, do(positions=shift((1.0, 0.0, 0.0)))(bodies, 0)))
    assert float((seen - moved).abs().max()) > 0.1
