"""Episodes from a recipe: seeded, in parallel, and resumed where an earlier run stopped."""

from __future__ import annotations

import inspect
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.data.ephemeris import solar_system
from simworld.data.store import Answers, TrajectoryFile, write_trajectories
from simworld.data.toml import check_arguments, check_keys, read_toml
from simworld.data.variations import check_variations, vary
from simworld.intervention_tables import interventions_from
from simworld.physics import (
    cloth_worlds,
    flow_worlds,
    force_worlds,
    particle_worlds,
    push,
    push_t,
    solid_worlds,
    sph_worlds,
    video_collisions,
    video_worlds,
)
from simworld.physics.cradle import cradle_episode
from simworld.physics.interaction_worlds import balls_episode, string_episode
from simworld.physics.rope import ACTION_UNIT, rope_episode
from simworld.render.filming import SQUARE, TABLE, Stage, View, texture
from simworld.trajectory import Trajectory

SPLITS = ("train", "valid", "test")
SMALLEST, LARGEST = 8, 1024  # pixels along a film's edge
TEXTURE = 7  # sets the draws of textures apart from those of the worlds
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A world that recipes can ask episodes of: its episode function and its actions' unit.

    `episode` takes a seed; with `at_once` it takes `seeds` and returns as many trajectories, made together. Where it
    takes `interventions`, it also makes what would have happened under them. Worlds that can be filmed have a `stage`.
    """

    episode: Callable[..., Any]
    action_unit: str = "1"
    at_once: bool = False
    stage: Stage | None = None

    def make(self, seeds: Sequence[Sequence[int]], **arguments: Any) -> list[Trajectory]:
        """Return an episode for each seed.

        Raises:
            ValueError: an argument is outside its range, or an episode does not begin with its initial state.
        """
        one_by_one = (self.episode(seed, **arguments) for seed in seeds)
        made: list[Trajectory] = list(self.episode(seeds, **arguments) if self.at_once else one_by_one)
        for path in made:
            apart = [k for k, v in path.frames.items() if k in path.initial and not _near(v[0], path.initial[k])]
            if apart:
                raise ValueError(f"An episode's first frame must be its initial state; {', '.join(apart)} differ.")
        return made


def _near(value: Tensor, other: Tensor) -> bool:
    """Return whether two values are the same but for rounding."""
    return torch.allclose(value.double(), other.double(), rtol=1e-6, atol=1e-9)


GENERATORS: Mapping[str, Generator] = {
    "solar_system": Generator(episode=solar_system),
    "springs_nri": Generator(episode=force_worlds.springs_nri, at_once=True),
    "charged_nri": Generator(episode=force_worlds.charged_nri, at_once=True),
    "nbody_egnn": Generator(episode=force_worlds.nbody_egnn, at_once=True),
    "nbody_in": Generator(episode=force_worlds.nbody_in, at_once=True),
    "cradle": Generator(episode=cradle_episode),
    "balls_in": Generator(episode=balls_episode),
    "string_in": Generator(episode=string_episode),
    "rope": Generator(episode=rope_episode, action_unit=ACTION_UNIT),
    "water_drop": Generator(episode=particle_worlds.water_drop, at_once=True),
    "water_drop_small": Generator(episode=particle_worlds.water_drop, at_once=True),
    "sand_ramps": Generator(episode=particle_worlds.sand_ramps, at_once=True),
    "water_ramps": Generator(episode=particle_worlds.water_ramps, at_once=True),
    "goop": Generator(episode=particle_worlds.goop, at_once=True),
    "water_3d": Generator(episode=particle_worlds.water_3d, at_once=True),
    "tgv_2d": Generator(episode=sph_worlds.tgv_2d, at_once=True),
    "tgv_2d_small": Generator(episode=sph_worlds.tgv_2d, at_once=True),
    "cylinder_flow": Generator(episode=flow_worlds.cylinder_flow),
    "cylinder_flow_small": Generator(episode=flow_worlds.cylinder_flow),
    "deforming_plate": Generator(episode=solid_worlds.deforming_plate),
    "deforming_plate_small": Generator(episode=solid_worlds.deforming_plate),
    "flag_simple": Generator(episode=cloth_worlds.flag_simple),
    "flag_simple_small": Generator(episode=cloth_worlds.flag_simple),
    "sphere_cloth": Generator(episode=cloth_worlds.sphere_cloth),
    "sphere_cloth_small": Generator(episode=cloth_worlds.sphere_cloth),
    "push_3d": Generator(episode=push.push_episode, action_unit=push.ACTION_UNIT),
    "video_billiards": Generator(episode=video_worlds.video_billiards, stage=SQUARE),
    "video_springs": Generator(episode=video_worlds.video_springs, stage=SQUARE),
    "video_gravity": Generator(episode=video_worlds.video_gravity, stage=SQUARE),
    "video_drift": Generator(episode=video_worlds.video_drift, stage=SQUARE),
    "push_t": Generator(episode=push_t.push_t, action_unit=push_t.ACTION_UNIT, stage=SQUARE),
    "video_collisions": Generator(episode=video_collisions.video_collisions, stage=TABLE),
}


@dataclass(frozen=True, kw_only=True)
class Film:
    """How episodes are filmed: `size` pixels wide and high, before a `texture` of the episode's own if asked for."""

    size: int = 64
    texture: bool = False

    def __post_init__(self) -> None:
        if not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"A film's size must be {SMALLEST} to {LARGEST} pixels; got {self.size}.")

    def take(self, stage: Stage, trajectory: Trajectory, seed: Sequence[int]) -> View:
        """Return the film of an episode; the texture is a function of the episode's `seed`."""
        behind = None
        if self.texture:
            number = int(np.random.default_rng([*seed, TEXTURE]).integers(2**62))
            behind = texture(self.size, torch.Generator().manual_seed(number))
        return stage.film(trajectory, self.size, background=behind)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to generate: `splits` maps train, valid and test to numbers of episodes, stored in `precision`.

    Of each test episode there is a branch for each of the `counterfactuals`, which are lists of interventions as
    `interventions_from` reads them. With `variations`, which `simworld.data.variations` describes, each episode
    begins with interventions of its own. With a `film` each episode and each branch is filmed.
    """

    dataset: str
    seed: int
    splits: Mapping[str, int]
    episode: Mapping[str, Any]
    counterfactuals: tuple[list[dict[str, Any]], ...] = ()
    variations: tuple[Mapping[str, Any], ...] = ()
    film: Film | None = None
    shard_size: int = 100
    precision: str = "float32"
    text: str = ""

    def __post_init__(self) -> None:
        if self.precision not in list(PRECISIONS):
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}.")
        if not self.text:  # made in Python: what it says is what it is
            said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "text"}
            object.__setattr__(self, "text", json.dumps(said, default=asdict))
        if self.film is not None and GENERATORS[self.dataset].stage is None:
            raise ValueError(_unseen("film", self.dataset))

    def seed_of(self, split: str, number: int) -> list[int]:
        """Return the seed of an episode."""
        return [self.seed, SPLITS.index(split), number]

    def views(self, trajectory: Trajectory, split: str, number: int) -> list[View]:
        """Return the films of an episode or of a branch of it: one, or none without a `film`."""
        stage = GENERATORS[self.dataset].stage
        if self.film is None or stage is None:
            return []
        return [self.film.take(stage, trajectory, self.seed_of(split, number))]

    def make(self, split: str, number: int) -> tuple[Trajectory, Answers]:
        """Return an episode and, in the test split, what the engine makes of it under each of the counterfactuals."""
        return self.make_all(split, [number])[0]

    def make_all(self, split: str, numbers: Sequence[int]) -> list[tuple[Trajectory, Answers]]:
        """Return some episodes of a split, each with its answers, as `make` returns one."""
        generator = GENERATORS[self.dataset]
        seeds = [self.seed_of(split, number) for number in numbers]
        answers: list[Answers] = [[] for _ in seeds]
        for number, tables in enumerate(self.counterfactuals if split == "test" else ()):
            where = f"counterfactuals, number {number}"
            edits = interventions_from(tables, where)
            try:
                outcomes = generator.make(seeds, **self.episode, interventions=edits)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            for known, outcome in zip(answers, outcomes, strict=True):
                known.append(({"interventions": tables}, outcome))
        if not self.variations:
            return list(zip(generator.make(seeds, **self.episode), answers, strict=True))
        varied = [(seed, vary(self.variations, seed)) for seed in seeds]
        made = [generator.make([seed], **self.episode, interventions=edits)[0] for seed, edits in varied]
        return list(zip(made, answers, strict=True))


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, lacks a key, or has one that nothing reads.
    """
    path = Path(path)
    said, text = read_toml(path)
    known = [f.name for f in fields(Recipe) if f.name != "text"]
    check_keys(f"{path}", said, known, required=("dataset", "seed", "splits"))
    if not isinstance(said["dataset"], str) or said["dataset"] not in GENERATORS:
        raise ValueError(f"{path}: dataset must be one of {', '.join(GENERATORS)}; got {said['dataset']!r}.")
    generator = GENERATORS[said["dataset"]]
    episode = said.get("episode", {})
    check_arguments(f"{path} [episode]", episode, generator.episode, leave=("seed", "seeds", "interventions"))
    check_keys(f"{path} [splits]", said["splits"], SPLITS)
    for name, count in {**said["splits"], "seed": said["seed"], "shard_size": said.get("shard_size", 1)}.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < (1 if name == "shard_size" else 0):
            raise ValueError(f"{path}: {name} must be a whole number, not negative; got {count!r}.")
    if not any(said["splits"].values()):
        raise ValueError(f"{path} [splits] asks for no episodes; give train, valid or test a number.")
    asked = _counterfactuals(f"{path} [[counterfactuals]]", said.get("counterfactuals", []), generator)
    varied = check_variations(said.get("variations", []), f"{path} [[variations]]")
    if varied and (asked or "interventions" not in inspect.signature(generator.episode).parameters):
        raise ValueError(
            f"{path}: variations are of worlds whose engine answers interventions, and of episodes without "
            "counterfactuals; leave one of them out."
        )
    filmed = _film(f"{path} [film]", said["film"], said["dataset"]) if "film" in said else None
    read = {"episode": episode, "counterfactuals": asked, "variations": varied, "film": filmed, "text": text}
    return Recipe(**{**said, **read})


def _film(where: str, said: object, dataset: str) -> Film:
    """Return the film that a recipe's table asks for."""
    if GENERATORS[dataset].stage is None:
        raise ValueError(_unseen(where, dataset))
    check_arguments(where, said, Film)
    assert isinstance(said, Mapping)
    try:
        return Film(**said)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _unseen(where: str, dataset: str) -> str:
    seen = ", ".join(name for name, generator in GENERATORS.items() if generator.stage)
    return f"{where}: no camera is known for {dataset}; leave films out, or film one of {seen}."


def _counterfactuals(where: str, said: object, generator: Generator) -> tuple[list[dict[str, Any]], ...]:
    """Return the lists of interventions in a recipe's tables, once they have been read."""
    if not isinstance(said, list) or not all(isinstance(table, dict) for table in said):
        raise ValueError(f"{where} must be tables, each headed so; got {said!r}.")
    if said and "interventions" not in inspect.signature(generator.episode).parameters:
        raise ValueError(f"{where}: this world is a recording, which answers no interventions; leave them out.")
    for number, table in enumerate(said):
        check_keys(f"{where} {number}", table, ("interventions",), required=("interventions",))
        interventions_from(table["interventions"], f"{where} {number}, interventions")
    return tuple(table["interventions"] for table in said)


def generate(
    recipe: Recipe, out: str | Path, *, num_workers: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> list[Path]:
    """Write `{train,valid,test}.h5` into the folder `out` and return their paths.

    Work is done in shards of `recipe.shard_size` episodes by `num_workers` processes (0: one per core). A
    finished shard or split stays, so calling again after an interruption goes on from there; which
    process made an episode does not matter to its content. `progress(split, done, total)` is told of episodes.

    Raises:
        ValueError: `out` holds a split that another recipe made, or the first test episode does not fit the
            interventions that are asked of it: that is tried before all else.
        OSError: a file could not be written; finished shards stay, so free space and call again.
    """
    out = Path(out)
    if recipe.counterfactuals and recipe.splits.get("test") and not (out / "test.h5").is_file():
        recipe.make("test", 0)  # what is asked must fit, before hours are spent on other splits
    paths = []
    for split, count in recipe.splits.items():
        path = out / f"{split}.h5"
        paths.append(path)
        if path.is_file():
            _check_same(path, recipe)
        elif count:
            _make_split(recipe, split, path, num_workers, progress)
        if progress:
            progress(split, count, count)
    return [path for path in paths if path.is_file()]


def _check_same(path: Path, recipe: Recipe) -> None:
    with TrajectoryFile(path) as file:
        if (file.recipe, file.seed) != (recipe.text, recipe.seed):
            raise ValueError(f"{path} was made from another recipe; choose another folder or move that file away.")


def _make_split(
    recipe: Recipe, split: str, path: Path, num_workers: int, progress: Callable[[str, int, int], None] | None
) -> None:
    count, size = recipe.splits[split], recipe.shard_size
    folder = path.with_name(f"{split}.shards")
    jobs = [(recipe, split, folder / f"{k:06d}.h5", k, min(k + size, count)) for k in range(0, count, size)]
    for job in jobs:
        if job[2].is_file():
            _check_same(job[2], recipe)
    # Workers are spawned, not forked: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(num_workers or multiprocessing.cpu_count()) as pool:
        done = 0
        for job_done in pool.imap_unordered(_make_shard, jobs):
            done += job_done
            if progress:
                progress(split, done, count)
    shards = [job[2] for job in jobs]

    def beside(number: int, read: Callable[[TrajectoryFile, int], Any]) -> Any:
        with TrajectoryFile(shards[number // size]) as file:
            return read(file, number % size)

    _write(
        path,
        recipe,
        _gather(shards),
        counterfactuals=lambda number: beside(number, TrajectoryFile.counterfactuals),
        views=lambda number: beside(number, TrajectoryFile.views),
        counterfactual_views=lambda number, k: beside(number, lambda file, n: file.views(n, k)),
    )
    for shard in shards:
        shard.unlink()
    folder.rmdir()


def _gather(shards: list[Path]) -> Iterator[Trajectory]:
    for shard in shards:
        with TrajectoryFile(shard) as file:
            yield from file


def _make_shard(job: tuple[Recipe, str, Path, int, int]) -> int:
    recipe, split, path, start, stop = job
    if not path.is_file():
        dtype = PRECISIONS[recipe.precision]
        made = [
            (episode.to(dtype), [(said, outcome.to(dtype)) for said, outcome in answers])
            for episode, answers in recipe.make_all(split, range(start, stop))
        ]
        _write(
            path,
            recipe,
            (episode for episode, _ in made),
            counterfactuals=lambda number: made[number][1],
            views=lambda number: recipe.views(made[number][0], split, start + number),
            counterfactual_views=lambda number, k: recipe.views(made[number][1][k][1], split, start + number),
        )
    return stop - start


def _write(path: Path, recipe: Recipe, episodes: Iterator[Trajectory], **beside: Callable[..., Any]) -> None:
    write_trajectories(
        path,
        episodes,
        dataset=recipe.dataset,
        seed=recipe.seed,
        recipe=recipe.text,
        action_unit=GENERATORS[recipe.dataset].action_unit,
        **beside,
    )
