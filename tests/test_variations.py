"""Episodes in which interventions drawn anew happen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simworld.data.generate import GENERATORS, read_recipe
from simworld.data.variations import check_variations, vary
from simworld.kinds import ObjectState

VARIED = Path(__file__).parents[1] / "datasets/balls_in/varied.toml"


def test_the_same_seed_draws_the_same_and_shares_are_kept():
    tables = check_variations(
        [{"share": 0.25, "scale": {"masses": [0.5, 2.0]}}, {"share": 1.0, "shift": {"velocities": [-1.0, 1.0]}}], "x"
    )
    drawn = [vary(tables, [1, 0, number]) for number in range(400)]
    assert all(len(edits) in (1, 2) for edits in drawn)
    assert 70 <= sum(len(edits) == 2 for edits in drawn) <= 130
    shifts = [edits[-1].to_json()["shift"]["velocities"] for edits in drawn]
    assert -1 <= min(shifts) < -0.9
    assert 0.9 < max(shifts) <= 1
    factors = [edits[0].to_json()["scale"]["masses"] for edits in drawn if len(edits) == 2]
    assert 0.5 <= min(factors) < 0.6
    assert 1.8 < max(factors) <= 2
    assert [e.to_json() for e in vary(tables, [1, 0, 7])] == [e.to_json() for e in drawn[7]]


def test_episodes_of_a_recipe_begin_with_what_was_drawn():
    pytest.importorskip("pymunk")
    recipe = read_recipe(VARIED)
    recipe.episode["num_steps"] = 3
    plain = GENERATORS["balls_in"].make([[recipe.seed, 0, k] for k in range(8)], num_steps=3)
    made = [path for path, _ in recipe.make_all("train", range(8))]
    heavier = [not torch.equal(a.initial.masses, b.initial.masses) for a, b in zip(made, plain, strict=True)]
    gone = [int((~path.initial.active).sum()) for path in made]
    assert any(heavier)
    assert not all(heavier)
    assert {0, 1} <= set(gone) <= {0, 1, 2}
    for path, other in zip(made, plain, strict=True):
        changed = (path.initial.masses != other.initial.masses).sum()
        assert int(changed) <= 1
        ratio = path.initial.masses / other.initial.masses
        assert 0.2 <= float(ratio.min()) <= float(ratio.max()) <= 5


def test_frames_at_which_something_happens_are_drawn_and_one_entity_is_meant_there():
    tables = check_variations([{"at": [2, 4], "entities": "one", "scale": {"velocities": [2.0, 2.0]}}], "x")
    generator = torch.Generator().manual_seed(0)
    state = ObjectState(
        positions=torch.randn(5, 2, generator=generator), velocities=torch.randn(5, 2, generator=generator)
    )
    frames, rows = set(), set()
    for number in range(60):
        (edit,) = vary(tables, [1, 0, number])
        acted = [step for step in range(8) if edit(state, step) is not state]
        assert len(acted) == 1
        changed = (edit(state, acted[0]).velocities != state.velocities).any(1).nonzero()[:, 0].tolist()
        assert len(changed) == 1
        frames |= set(acted)
        rows |= set(changed)
    assert frames == {2, 3, 4}
    assert rows == set(range(5))
    (plain,) = vary(check_variations([{"at": 3, "scale": {"velocities": 2.0}}], "x"), [0])
    assert plain(state, 2) is state
    assert torch.equal(plain(state, 3).velocities, 2 * state.velocities)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"share": 2.0, "remove": True}, "share must be"),
        ({"scale": {"masses": [0.0, 1.0]}}, "above 0"),
        ({"shift": {"positions": [1.0, 0.0]}}, "rise"),
        ({"scale": {"masses": ["a", 1.0]}}, "rise"),
        ({"share": 0.5}, "does nothing"),
        ({"at": -1, "entities": "one", "remove": True}, "at is a frame"),
        ({"at": [5, 2], "entities": "one", "remove": True}, "at is a frame"),
        ({"at": "x > 2", "entities": "one", "remove": True}, "at is a frame"),
        ({"at": [2, 5, 1], "entities": "one", "remove": True}, "at is a frame"),
        ({"once": True, "entities": "one", "remove": True}, "leave it out"),
        ("remove", "list of tables"),
    ],
)
def test_refusals(table, message):
    with pytest.raises(ValueError, match=message):
        check_variations([table], "recipe.toml")
