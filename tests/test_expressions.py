"""The language of conditions: what it says of a state, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from simworld.expressions import Expression
from simworld.kinds import ObjectState, ParticleState


@pytest.fixture
def three():
    return ObjectState(
        positions=torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]]),
        velocities=torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]),
        radii=torch.tensor([1.0, 2.0, 3.0]),
        object_types=torch.tensor([0, 1, 1]),
        active=torch.tensor([True, True, False]),
    )


def test_distances_are_the_shortest_through_periodic_axes():
    box = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    places = torch.tensor([[0.05, 0.1], [0.95, 0.9]])
    state = ParticleState(
        positions=places, velocities=0 * places, boundaries=box, periodic=torch.tensor([[True, False]])
    )
    assert Expression("distance(0, 1)").number(state) == pytest.approx((0.1**2 + 0.8**2) ** 0.5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1 + 2 * 3", 7),
        ("-(1 - 4) / 2", 1.5),
        ("2 - 1 - 1", 0),
        ("distance(0, 1)", 5),
        ("gap(0, 1)", 2),
        ("positions.x[2]", 10),
        ("speed[1]", 2),
        ("max(speed)", 2),
        ("count(object_types == 1)", 2),
        ("count(object_types == 1 and active)", 1),
        ("mean(positions.y)", 4 / 3),
        ("norm(positions)[1]", 5),
        ("step + 1", 8),
        ("abs(velocities.y[1])", 2),
        ("sum(radii) - min(radii)", 5),
        ("1e1 - .5", 9.5),
    ],
)
def test_numbers(three, text, wanted):
    assert Expression(text).number(three, 7) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("gap(0, 1) <= 2", True),
        ("not gap(0, 1) < 2", True),
        ("any(positions.x > 9) and all(radii > 0)", True),
        ("1 > 2 or 2 > 1 and 1 > 2", False),
        ("(1 > 2 or 2 > 1) and true", True),
        ("step == 7", True),
    ],
)
def test_conditions(three, text, wanted):
    assert Expression(text).holds(three, 7) is wanted


def test_entities(three):
    assert Expression("object_types == 1 and positions.x < 5").entities(three).tolist() == [1]
    names = {"sun": [2], "pair": [0, 1]}
    assert Expression("pair", names).entities(three).tolist() == [0, 1]
    assert Expression("sun", names).entities(three).tolist() == [2]
    assert Expression("distance(sun, 0)", names).number(three) == 10


@pytest.mark.parametrize(
    "text",
    [
        "",
        "positions.x >",
        "__import__('os')",
        "(1",
        "1)",
        "positions.w > 1",
        "open(1)",
        "1 2",
        "x = 1",
        "lambda: 1",
        "distance(1)",
        "and 1",
        "[1]",
        "positions[",
        "(" * 100 + "1" + ")" * 100,
        "-" * 100 + "1",
        "1 +" * 500 + "1",
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="expression"):
        Expression(text)


@pytest.mark.parametrize(
    "text",
    ["charges[0] > 1", "positions.z[0]", "positions[9]", "distance(0, 9)", "positions[0.5]", "1 and 2", "any(3)"],
)
def test_what_a_state_does_not_tell_is_refused(three, text):
    with pytest.raises(ValueError, match="cannot be told|condition"):
        Expression(text).holds(three)


def test_many_where_one_belongs(three):
    with pytest.raises(ValueError, match=r"any\(\.\.\.\)"):
        Expression("radii > 1").holds(three)
    with pytest.raises(ValueError, match="one number"):
        Expression("radii").number(three)
    with pytest.raises(ValueError, match="for each entity"):
        Expression("radii[0] > 1").entities(three)


@pytest.mark.parametrize(
    "text",
    [
        "positions.x[99999999999999999999999] > 0",
        "positions.x[1e999] > 0",
        "positions.x[0.5] > 0",
        "positions.x[true] > 0",
        "gap(0, 99999999999999999999999) <= 0",
        "gap(0, true) <= 0",
    ],
)
def test_numbers_of_no_entity(three, text):
    with pytest.raises(ValueError, match="cannot be told"):
        Expression(text).holds(three)


def test_numbers_beyond_integers_are_compared(three):
    assert Expression("speed[0] < 99999999999999999999999").holds(three)
