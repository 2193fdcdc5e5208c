"""Worlds to be filmed: what acts on whom in them, and their recipes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from simworld import open_trajectories
from simworld.data import generate as module
from simworld.data.generate import GENERATORS, Film, Recipe, generate, read_recipe
from simworld.intervene import remove
from simworld.physics.video_worlds import video_billiards, video_drift, video_gravity, video_springs

DATASETS = Path(__file__).parents[1] / "datasets"
WORLDS = sorted(name for name, generator in GENERATORS.items() if generator.stage)
SMALL = """
dataset = "video_billiards"
seed = 5
shard_size = 2
[splits]
train = 3
test = 1
[episode]
num_steps = 4
[film]
size = 16
texture = true
[[counterfactuals]]
interventions = [{entities = [0], remove = true, at = 2}]
"""


def others(path):
    """Return who acted on whom at frames [T, n, n] without the columns of bodies that no episode here has."""
    return path["influences"][..., : len(path.initial)]


def turned(path):
    """Return whether bodies turned or changed pace in the interval that led to a frame, or at its start, [T - 1, n].

    The engine goes on parting two bodies for one of its steps after they met, by less than the bound here.
    """
    x = path["positions"]
    steps = x.diff(dim=0)
    return torch.cat([(steps[0] - path.dt * path["velocities"][0])[None], steps.diff(dim=0)]).norm(dim=-1) > 3e-4


def at_wall(path, margin):
    """Return whether bodies [T - 1, n] were near a wall at either end of an interval."""
    x, r = path["positions"], path.initial.radii[:, None]
    near = ((x - r < margin) | (x + r > 1 - margin)).any(-1)
    return near[1:] | near[:-1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_billiards_keep_their_energy_and_turn_only_where_something_acts(seed):
    path = video_billiards([seed], num_bodies=3)
    energy = 0.5 * (path.initial.masses * path["velocities"].square().sum(-1)).sum(-1)
    met = others(path)
    assert torch.equal(met, met.transpose(1, 2))
    assert not met.diagonal(dim1=1, dim2=2).any()
    hit = met.any(-1)
    # A velocity is the mean of its interval: it shows a hit in that interval and in the next.
    caused = hit[1:] | hit[:-1] | at_wall(path, 0.04)
    assert not (turned(path) & ~caused).any()
    quiet = ~(caused.any(1) | turned(path).any(1))
    assert quiet.sum() >= 5
    assert float((energy[1:][quiet] / energy[1:][quiet][0] - 1).abs().max()) < 1e-6
    # ... and bodies that met had come near each other.
    gaps = torch.cdist(path["positions"], path["positions"]) - path.initial.radii - path.initial.radii[:, None]
    nearest = torch.minimum(gaps[1:], gaps[:-1])
    assert met.any()
    assert float(nearest[met[1:]].max()) < 0.07


def test_influences_of_springs_are_their_graph_and_nothing_else_accelerates():
    path = video_springs([1], num_bodies=4)
    graph = torch.zeros(4, 4, dtype=torch.bool)
    one, other = path.initial.springs.unbind(1)
    graph[one, other] = graph[other, one] = True
    assert graph.any()
    assert not graph[~torch.eye(4, dtype=torch.bool)].all()
    assert torch.equal(others(path), graph.expand(50, 4, 4))
    # The sum of the springs' pulls, by finite differences, off the walls.
    x = path["positions"]
    away = x[:, None] - x[:, :, None]
    lengths = away.norm(dim=-1).clamp(min=1e-9)
    pulls = (2.0 * (lengths - 0.35) * graph)[..., None] * away / lengths[..., None]
    wanted = pulls.sum(2) / path.initial.masses[:, None]
    found = (x[2:] - 2 * x[1:-1] + x[:-2]) / path.dt**2
    free = ~(at_wall(path, 0.1)[1:] | at_wall(path, 0.1)[:-1])
    assert free.sum() > 20
    assert float((found - wanted[1:-1])[free].norm(dim=-1).median()) < 0.02


def test_all_pull_each_other_or_none():
    assert torch.equal(others(video_gravity([2], num_bodies=3)), ~torch.eye(3, dtype=torch.bool).expand(50, 3, 3))
    drift = video_drift([2], num_bodies=6)
    assert not drift["influences"].any()
    assert not (turned(drift) & ~at_wall(drift, 0.1)).any()


@pytest.mark.parametrize("world", [video_billiards, video_springs])
def test_who_is_removed_acts_no_more(world):
    whole, changed = world([7], num_bodies=4), world([7], num_bodies=4, interventions=[remove([0], at=10)])
    assert changed.active[9].all()
    assert not changed.active[10:, 0].any()
    assert torch.equal(whole["positions"][:10], changed["positions"][:10])
    assert not changed["influences"][11:, :, 0].any()
    assert not torch.equal(whole["positions"][-1, 1:], changed["positions"][-1, 1:])


@pytest.mark.parametrize("name", WORLDS)
def test_the_first_episode_of_the_recipe_is_the_golden_one(name):
    recipe = read_recipe(DATASETS / name / "recipe.toml")
    path, _ = recipe.make("train", 0)
    (view,) = recipe.views(path.window(0, 1), "train", 0)
    assert len(path) == 50
    frames = [0, 1, 5]  # before collisions make it a matter of the last bits
    found = {
        "positions": path["positions"][frames].tolist(),
        "radii": path.initial.radii.tolist(),
        "colors": path.initial.colors.tolist(),
        "brightness": (view.rgb[0].double() / 255).mean((0, 1)).tolist(),
        "shares": [float((view.masks[0] == k + 1).double().mean()) for k in range(len(path.initial))],
    }
    golden = DATASETS / name / "first_episode.json"
    if not golden.is_file():
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{golden} was missing and is written; look at it and commit it")
    for key, wanted in json.loads(golden.read_text()).items():
        assert torch.allclose(torch.tensor(found[key]), torch.tensor(wanted), atol=1e-3), key


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL)
    return path


class OneByOne:
    """A pool that works here and now."""

    def Pool(self, _):
        return nullcontext(self)

    def imap_unordered(self, function, jobs):
        return map(function, jobs)


def test_films_are_generated_beside_the_episodes_and_their_branches(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: OneByOne())
    plan = read_recipe(recipe)
    train, test = generate(plan, tmp_path / "out", num_workers=1)
    with open_trajectories(train) as file:
        for number, path in enumerate(file):
            (view,), (again,) = file.views(number), plan.views(path, "train", number)
            assert view.rgb.shape == (5, 16, 16, 3)
            assert torch.equal(view.rgb, again.rgb)
            assert torch.equal(view.masks, again.masks)
        backgrounds = [file.views(k)[0].rgb[0].double().std() for k in range(3)]
        assert len({float(value) for value in backgrounds}) == 3
    with open_trajectories(test) as file:
        (whole,), (branch,) = file.views(0), file.views(0, 0)
        assert torch.equal(whole.rgb[:2], branch.rgb[:2])
        assert (whole.masks == 1).any((1, 2)).all()
        assert (branch.masks == 1).any((1, 2)).tolist() == [True, True, False, False, False]
        # Where nobody is in both, they show the same texture.
        empty = (whole.masks == 0) & (branch.masks == 0)
        close = (whole.rgb.int() - branch.rgb.int()).abs().amax(-1) <= 40
        assert float(close[empty].double().mean()) > 0.97


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("size = 16", "sizes = 16", r"\[film\] has an unknown key 'sizes'; the known ones are size, texture"),
        ("size = 16", "size = 7", r"\[film\]: A film's size must be 8 to 1024 pixels; got 7"),
        ("size = 16", "size = 1.5", r"\[film\]: size must be a whole number; got 1.5"),
        ("texture = true", "texture = 1", r"\[film\]: texture must be true or false; got 1"),
        ("video_billiards", "balls_in", r"\[film\]: no camera is known for balls_in; .* film one of video_billiards"),
        ("[film]\nsize = 16\ntexture = true", "", None),
    ],
)
def test_films_that_recipes_cannot_have(recipe, old, new, says):
    recipe.write_text((new and SMALL.replace(old, new)) or "film = 3\n" + SMALL.replace(old, ""))
    with pytest.raises(ValueError, match=says or r"\[film\] must be a table of keys; got 3"):
        read_recipe(recipe)


def test_recipes_made_in_python_say_their_film():
    plan = Recipe(dataset="video_drift", seed=1, splits={"train": 1}, episode={}, film=Film(size=8))
    assert json.loads(plan.text)["film"] == {"size": 8, "texture": False}
    with pytest.raises(ValueError, match="film: no camera is known for rope"):
        Recipe(dataset="rope", seed=1, splits={"train": 1}, episode={}, film=Film())
