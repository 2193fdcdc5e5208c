"""Two worlds that part at an intervention: what they share, and what the effect is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import simworld
from simworld import branches, counterfactual, do, negate, pin, remove, rollout, scale
from simworld.kinds import ObjectState
from simworld.physics.forces import ForceEngine, gravity, springs

ENGINE = ForceEngine(dt=0.1, law=gravity(constant=1.0, min_distance=0.1), rule="velocity_verlet", num_sub_steps=4)


@pytest.fixture
def observed():
    generator = torch.Generator().manual_seed(3)
    state = ObjectState(
        positions=torch.randn(4, 2, generator=generator, dtype=torch.float64),
        velocities=torch.randn(4, 2, generator=generator, dtype=torch.float64),
        masses=torch.rand(4, generator=generator, dtype=torch.float64) + 0.5,
    )
    return rollout(state, simulator=ENGINE, num_steps=20)


def test_no_module_hides_behind_a_name_of_the_package():
    folder = Path(simworld.__file__).parent
    assert [name for name in simworld.__all__ if (folder / name).exists() or (folder / f"{name}.py").exists()] == []
    assert {"scale", "shift", "negate", "rotate", "hold"} <= set(simworld.__all__)


def test_worlds_share_the_past_bit_for_bit(observed):
    asked = counterfactual(observed, do(at=7, entities=1, velocities=negate()), simulator=ENGINE)
    assert asked.step == 7
    for world in (asked.factual, asked.counterfactual):
        assert torch.equal(world["positions"][:8], observed["positions"][:8])
        assert len(world) == len(observed)
    assert torch.equal(asked.factual["positions"], observed["positions"])
    wanted = rollout(
        observed.initial, simulator=ENGINE, num_steps=20, interventions=[do(at=7, entities=1, velocities=negate())]
    )
    assert torch.equal(asked.counterfactual["positions"], wanted["positions"])
    assert asked.effect()[:8].abs().max() == 0
    assert asked.effect("velocities")[7].abs().sum() > 0
    assert asked.counterfactual.interventions == ({"at": 7, "entities": [1], "negate": ["velocities"]},)


def test_changing_nothing_has_no_effect(observed):
    same = counterfactual(observed, do(at=3, masses=scale(1.0)), simulator=ENGINE)
    assert same.effect().abs().max() == 0
    assert not same.affected(0.0).any()


def test_an_event_parts_the_worlds_where_it_came(observed):
    asked = counterfactual(observed, do(at="step >= 5", once=True, velocities=0.0), simulator=ENGINE)
    assert asked.step == 5


def test_who_is_affected():
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [6.0, 0.0]]),
        velocities=torch.zeros(4, 2),
        springs=torch.tensor([[0, 1], [2, 3]]),
        spring_stiffnesses=torch.ones(2),
    )
    engine = ForceEngine(dt=0.1, law=springs, graph="springs")
    asked = counterfactual(state, remove([0]), simulator=engine, num_steps=10)
    assert asked.affected(1e-6).tolist() == [True, True, False, False]


def test_a_wrong_simulator_is_corrected_by_what_was_observed(observed):
    observed = observed.window(0, 10)
    wrong = ForceEngine(dt=0.1, law=gravity(constant=0.97, min_distance=0.1), rule="velocity_verlet", num_sub_steps=4)
    push = do(at=4, entities=0, velocities=scale(1.02))
    truth = counterfactual(observed, push, simulator=ENGINE).counterfactual["positions"]
    asked = counterfactual(observed, push, simulator=wrong)
    plain = (asked.counterfactual["positions"] - truth).norm()
    assert (asked.corrected() - truth).norm() < 0.2 * plain
    assert torch.equal(asked.corrected()[:5], observed["positions"][:5])


def test_static_fields_are_asked_of_from_their_step_on(observed):
    with pytest.raises(ValueError, match=r"observed\.window\(3, 21\)"):
        counterfactual(observed, do(at=3, masses=scale(2.0)), simulator=ENGINE)
    later = counterfactual(observed.window(3, 21), do(masses=scale(2.0)), simulator=ENGINE)
    assert later.effect()[-1].abs().max() > 0


def test_other_actions():
    engine = ForceEngine(dt=0.1, law=springs, graph="springs")
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        velocities=torch.zeros(2, 2),
        springs=torch.tensor([[0, 1]]),
        spring_stiffnesses=torch.ones(1),
    )
    actions = torch.zeros(8, 2, 2)
    observed = rollout(state, actions, simulator=engine)
    other = actions.clone()
    other[3] = 1.0
    asked = counterfactual(observed, [], actions=other, simulator=engine)
    assert asked.step == 3
    assert torch.equal(asked.counterfactual.actions, other)
    assert asked.effect()[:4].abs().max() == 0
    assert asked.effect()[-1].abs().min() >= 0
    assert asked.effect()[-1].abs().max() > 0
    with pytest.raises(ValueError, match="got neither"):
        counterfactual(observed, [], simulator=engine)


def test_beyond_what_was_observed(observed):
    asked = counterfactual(observed, do(at=20, velocities=0.0), simulator=ENGINE, num_steps=25)
    assert len(asked.counterfactual) == 26
    assert len(asked.corrected()) == 21
    with pytest.warns(UserWarning, match="never came"):
        never = counterfactual(observed, do(at="step > 99", velocities=0.0), simulator=ENGINE)
    assert never.effect().abs().max() == 0


def test_branches_are_what_each_alone_would_be(observed):
    heavy, turned, held = do(entities=1, masses=scale(3.0)), do(at=4, entities=[2], velocities=negate()), pin(0, at=2)
    other = observed.window(5, 21)
    starts, asked = [observed, observed, other, observed], [[heavy], [turned, held], [heavy, turned], []]
    alone = [
        rollout(path.initial, simulator=ENGINE, num_steps=15, interventions=edits)
        for path, edits in zip(starts, asked, strict=True)
    ]
    for most in (1, 3, 10):
        found = branches(starts, asked, simulator=ENGINE, num_steps=15, max_scenes=most)
        for one, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(one["positions"], wanted["positions"], rtol=0, atol=1e-12)
            assert one.interventions == wanted.interventions
    with pytest.raises(ValueError, match="not about the event speed"):
        branches([observed], [[do(at="speed[0] > 1", velocities=0.0)]], simulator=ENGINE)
    with pytest.raises(ValueError, match="2 starts, 1 sets"):
        branches([observed, observed], [[heavy]], simulator=ENGINE)


def test_branches_change_actions_scene_by_scene():
    engine = ForceEngine(dt=0.1, law=springs, graph="springs")
    state = ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        velocities=torch.zeros(2, 2),
        springs=torch.tensor([[0, 1]]),
        spring_stiffnesses=torch.ones(1),
    )
    observed = rollout(state, torch.ones(6, 2, 2), simulator=engine)
    asked = [[do(at=range(2, 4), entities="speed > -1", actions=scale(k))] for k in (0.0, 1.0, 5.0)]
    found = branches([observed] * 3, asked, simulator=engine)
    assert [float(path.actions[2, 0, 0]) for path in found] == [0, 1, 5]
    assert torch.equal(found[1]["positions"], observed["positions"])
    assert not torch.equal(found[0]["positions"], found[2]["positions"])


def joined(stiffnesses):
    return ObjectState(
        positions=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.3, 1.0]], dtype=torch.float64),
        velocities=torch.tensor([[0.0, 0.1], [0.2, 0.0], [-0.1, 0.0]], dtype=torch.float64),
        springs=torch.tensor([[0, 1], [0, 2], [1, 2]]),
        spring_stiffnesses=torch.tensor(stiffnesses, dtype=torch.float64),
    )


def test_a_spring_of_inferred_stiffness_is_cut():
    engine = ForceEngine(dt=0.2, law=springs, graph="springs", num_sub_steps=2)
    path = rollout(joined([0.5, 0.1, 0.2]), simulator=engine, num_steps=20)
    cut = do(spring_stiffnesses=0.0, entities=[0])
    wanted = counterfactual(path, cut, simulator=engine)
    unknown = replace(path, initial=joined([0.2, 0.2, 0.2]))
    options = {"fields": ["spring_stiffnesses"], "window": 5, "num_starts": 1}
    asked = counterfactual(unknown, cut, simulator=engine, infer=options)
    assert (asked.counterfactual["positions"] - wanted.counterfactual["positions"]).abs().max() < 1e-4
    assert torch.allclose(asked.abduction.values["spring_stiffnesses"], path.initial.spring_stiffnesses, atol=1e-6)
    assert asked.counterfactual.initial.spring_stiffnesses[0] == 0
    assert asked.observed is unknown
    given = counterfactual(unknown, cut, simulator=engine)
    assert given.abduction is None
    assert (given.counterfactual["positions"] - wanted.counterfactual["positions"]).abs().max() > 1e-2
    by_name = counterfactual(unknown, cut, simulator=engine, infer="spring_stiffnesses")
    assert torch.allclose(by_name.effect(), asked.effect(), atol=1e-6)


@pytest.mark.parametrize(
    ("infer", "says"),
    [
        ("velocities", "static fields of numbers.* got 'velocities'"),
        (["weight"], "got 'weight'"),
        ([], "each named once"),
        ({"window": 3}, "each named once"),
        ({"fields": "masses", "windows": 3}, "unknown key 'windows'; the known ones are fields, entities"),
        ({"fields": "masses", "window": 99}, "window must be from 1 to the 20 steps"),
    ],
)
def test_what_cannot_be_inferred(observed, infer, says):
    with pytest.raises(ValueError, match=says):
        counterfactual(observed, remove([0]), simulator=ENGINE, infer=infer)
    with pytest.raises(ValueError, match="two frames or more|unknown key"):
        counterfactual(observed.initial, remove([0]), simulator=ENGINE, infer=infer)
