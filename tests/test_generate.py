from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simworld import open_trajectories
from simworld.data import generate as module
from simworld.data.generate import generate, read_recipe
from simworld.physics import rope_episode

RECIPES = sorted((Path(__file__).parents[1] / "datasets").glob("*/recipe.toml"))
SMALL = """
dataset = "rope"
seed = 5
shard_size = 2
[splits]
train = 5
test = 1
[episode]
num_steps = 4
warm_up_steps = 2
[[counterfactuals]]
interventions = [{entities = [15], remove = true}]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.parent.name)
def test_every_recipe_makes_its_first_episode(path):
    """Its first twenty steps, where it has more and asks nothing of them."""
    plan = read_recipe(path)
    if not plan.counterfactuals and plan.episode.get("num_steps", 0) > 20:
        plan = replace(plan, episode={**plan.episode, "num_steps": 20})
    episode, answers = plan.make("test", 0)
    assert len(answers) == len(plan.counterfactuals)
    assert all(torch.isfinite(values).all() for values in episode.frames.values())


def test_files_hold_the_episodes_of_their_seeds(recipe, tmp_path):
    told = []
    paths = generate(read_recipe(recipe), tmp_path / "out", num_workers=2, progress=lambda *said: told.append(said))
    assert [p.name for p in paths] == ["train.h5", "test.h5"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.h5", "train.h5"]
    assert told[-1] == ("test", 1, 1)
    assert ("train", 5, 5) in told
    with open_trajectories(paths[0]) as file:
        assert len(file) == 5
        assert file.recipe == SMALL
        wanted = rope_episode([5, 0, 3], num_steps=4, warm_up_steps=2).to(torch.float32)
        assert torch.equal(file[3]["positions"], wanted["positions"])
    with open_trajectories(paths[1]) as file:
        ((said, answer),) = file.counterfactuals(0)
        assert said == {"interventions": [{"entities": [15], "remove": True}]}
        assert not answer.active[:, 15].any()


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ("entities = [99], remove = true", r"^counterfactuals, number 0: .*99"),
        ("entities = [15], scale = {weights = 2.0}", r"^counterfactuals, number 0: .*weights"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_made(recipe, tmp_path, new, says):
    recipe.write_text(SMALL.replace("entities = [15], remove = true", new))
    with pytest.raises(ValueError, match=says):
        generate(read_recipe(recipe), tmp_path / "out", num_workers=1)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on(recipe, tmp_path, monkeypatch):
    whole = generate(read_recipe(recipe), tmp_path / "whole", num_workers=1)[0]

    class Interrupted:
        """A pool that dies after two shards."""

        def __init__(self, _): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def imap_unordered(self, function, jobs):
            for number, job in enumerate(jobs):
                if number == 2:
                    raise KeyboardInterrupt
                yield function(job)

    class Context:
        Pool = Interrupted

    plan, out = read_recipe(recipe), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module.multiprocessing, "get_context", lambda _: Context)
        with pytest.raises(KeyboardInterrupt):
            generate(plan, out, num_workers=1)
    assert not (out / "train.h5").exists()
    shards = sorted((out / "train.shards").iterdir())
    assert len(shards) == 2
    merged = []

    def keep(paths):
        merged.extend((path, path.stat().st_mtime_ns) for path in paths)
        return gather(paths)

    gather, times = module._gather, [path.stat().st_mtime_ns for path in shards]
    monkeypatch.setattr(module, "_gather", keep)
    path = generate(plan, out, num_workers=1)[0]
    assert [time for found, time in merged if found in shards] == times
    with open_trajectories(path) as a, open_trajectories(whole) as b:
        assert all(torch.equal(x["positions"], y["positions"]) for x, y in zip(a, b, strict=True))


def test_another_recipe_does_not_overwrite(recipe, tmp_path):
    generate(read_recipe(recipe), tmp_path / "out", num_workers=1)
    recipe.write_text(SMALL.replace("seed = 5", "seed = 6"))
    with pytest.raises(ValueError, match="made from another recipe"):
        generate(read_recipe(recipe), tmp_path / "out", num_workers=1)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_steps", "num_step", r"\[episode\] has an unknown key 'num_step'; the known ones are num_steps"),
        ("seed = 5", "sead = 5", "unknown key 'sead'"),
        ("seed = 5", "", "lacks the key 'seed'"),
        ("train = 5", "trian = 5", r"\[splits\] has an unknown key 'trian'"),
        ("train = 5", "train = -5", "train must be a whole number"),
        ("train = 5", "train = true", "train must be a whole number"),
        ("remove =", "removed =", r"\[\[counterfactuals\]\] 0, interventions, table 0 has an unknown key 'removed'"),
        ("interventions", "questions", r"\[\[counterfactuals\]\] 0 has an unknown key 'questions'"),
        ('"rope"', '"string"', "dataset must be one of solar_system.*; got 'string'"),
        ('"rope"', "rope", "not valid TOML"),
        ("num_steps = 4", 'num_steps = "4"', r"\[episode\]: num_steps must be a whole number; got '4'"),
        ("num_steps = 4", "num_steps = true", "num_steps must be a whole number; got True"),
        ("num_steps = 4", "dt = nan", "dt must be a finite number"),
        ("[15]", "1.5", r"entities must be numbers of entities, a name or a condition; got 1.5"),
        ("[[counterfactuals]]", "[counterfactuals]", r"\[\[counterfactuals\]\] must be tables, each headed so"),
        ("[{", '"', "not valid TOML"),
        ("train = 5\ntest = 1", "", "asks for no episodes"),
        ('"rope"', '["rope"]', "dataset must be one of solar_system"),
        ("[splits]", "splits = 3\n[other]", "unknown key 'other'"),
    ],
)
def test_recipes_that_say_something_else(recipe, old, new, says):
    recipe.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=says):
        read_recipe(recipe)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are a Unix facility")
def test_a_full_disk_is_one_sentence_and_leaves_finished_shards(recipe, tmp_path):
    """A file size limit stands in for a full disk: the shards fit, the whole file does not."""
    text = SMALL.replace("train = 5", "train = 40").replace("num_steps = 4", "num_steps = 60")
    recipe.write_text(text)
    limit = 110_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "simworld.cli", "generate", str(recipe), "--out", str(tmp_path / "out")]
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from simworld.cli import main; main()"
    command = [sys.executable, "-c", code, *command[3:], "--workers", "1"]
    found = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False, env=os.environ)
    assert found.returncode == 2, found.stderr
    assert "could not be written" in found.stderr
    assert "Traceback" not in found.stderr
    out = tmp_path / "out"
    assert not (out / "train.h5").exists()
    assert len(list((out / "train.shards").glob("*.h5"))) == 20
    assert not list(out.rglob("*.partial"))
    generate(read_recipe(recipe), out, num_workers=1)
    with open_trajectories(out / "train.h5") as file:
        assert len(file) == 40
