"""Visual Interaction Networks on films of unseen episodes: how far predicted positions are off, and what is better.

Six frames of a film of 32 x 32 pixels are seen (or true states, by state-IN), then 50 steps predicted. Intervals are
of 95 %, over episodes, and over seeds too where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.bench.rows import Progress
from simworld.causal_metrics import bootstrap
from simworld.data.generate import GENERATORS, SPLITS
from simworld.metrics import Row
from simworld.models import VisualInteractionNetwork, load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.render.filmed import filmed
from simworld.render.filming import film, square_camera
from simworld.simulate import rollout
from simworld.slot_metrics import collapse
from simworld.trajectory import Trajectory

SEED, COUNT, LENGTH = 2026, 60, 60
WORLDS = ("springs", "gravity", "billiards", "drift")
SIZES = (3, 6)
HORIZONS = (1, 8, 20, 50)
TITLES: Mapping[tuple[str, str], str] = {
    ("films", "interactions"): "VIN",
    ("films", "alone"): "VIN without relations",
    ("films", "lstm"): "LSTM",
    ("films", "mlp"): "MLP",
    ("states", "interactions"): "state-IN",
}
"""What models are called, by what they see and how codes change."""
DRAWN = 64  # pixels of the films in plots
UNIT = "frame widths"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows of one world, mean errors [T] by model from the last frame seen on, and films of one episode.

    `films` are uint8 [T, h, w, 3] from the last frame seen on: the true one, and those of predicted positions by model.
    """

    dataset: str
    rows: list[Row]
    errors: Mapping[str, Tensor]
    films: Mapping[str, Tensor]
    dt: float


def vin(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    worlds: Sequence[str] | None = None,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Objects in films: distances of predicted positions over 50 steps, by VIN, without relations, LSTM, MLP, state-IN.

    `worlds` are among WORLDS, all if None; `count` episodes of each. `checkpoints` are measured on the worlds of which
    they say that they were trained on them; the shipped ones if None.

    Raises:
        ValueError: there is no such world, data is given (films are made of the worlds' episodes), or a checkpoint
            holds another kind of model.
        FileNotFoundError: there is no such checkpoint.
    """
    refuse(data)
    made = reports(worlds, checkpoints=checkpoints, count=count, progress=progress)
    return [row for report in made for row in report.rows]


def refuse(data: str | Path | None) -> None:
    """Raise a ValueError if data is given, which this table makes itself."""
    if data is not None:
        raise ValueError("This table films unseen episodes of its own worlds; leave --data out.")


@torch.no_grad()
def reports(
    worlds: Sequence[str] | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    count: int | None = None,
    with_films: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Return a report of each world and number of objects of which there are models, as `vin` asks for them."""
    unknown = [name for name in worlds or () if name not in WORLDS]
    if unknown:
        raise ValueError(f"There is no world '{unknown[0]}' in this table; the known ones are {', '.join(WORLDS)}.")
    names = checkpoints or [name for name in shipped(".safetensors") if name.startswith("vin_")]
    known = _by_world(names)
    found = []
    for world in worlds or WORLDS:
        for size in SIZES:
            if (world, size) in known:
                found.append(report(world, size, known[world, size], count or COUNT, with_films))
                if progress:
                    progress(len(found))
    if not found:
        raise ValueError("None of these checkpoints was trained on one of these worlds; give others.")
    return found


def _by_world(names: Sequence[str | Path]) -> dict[tuple[str, int], list[VisualInteractionNetwork]]:
    """Return the models in some checkpoints by the world and number of objects that they were trained on."""
    found: dict[tuple[str, int], list[VisualInteractionNetwork]] = {}
    for name in names:
        model = load_checkpoint(name)
        if not isinstance(model, VisualInteractionNetwork):
            raise ValueError(
                f"This table is one of VisualInteractionNetworks; '{name}' holds a {type(model).__name__}."
            )
        world = str(model.provenance.get("dataset")).removeprefix("video_")
        found.setdefault((world, model.num_objects), []).append(model)
    return found


@torch.no_grad()
def report(
    world: str, size: int, models: Sequence[VisualInteractionNetwork], count: int, with_films: bool = False
) -> Report:
    """Return what models make of unseen episodes of a world with `size` objects, beside what needs no training."""
    paths, seen = unseen(world, size, count, models[0])
    start = models[0].num_frames - 1
    truth = Trajectory.cat([path.window(start, start + max(HORIZONS) + 1) for path in paths])
    titles: dict[str, list[VisualInteractionNetwork]] = {}
    for model in models:
        title = TITLES.get((model.sight, model.arguments["dynamics"]), f"{model.sight}, {model.arguments['dynamics']}")
        titles.setdefault(title, []).append(model)
    order = [title for title in TITLES.values() if title in titles] + [t for t in titles if t not in TITLES.values()]
    places = {title: torch.stack([predict(model, seen) for model in titles[title]]) for title in order}
    first, steps = truth["positions"][0], torch.arange(max(HORIZONS) + 1, dtype=torch.float64)[:, None, None]
    places["static"] = first.expand(1, max(HORIZONS) + 1, -1, -1)
    places["constant_velocity"] = (first + steps * truth.dt * truth["velocities"][0])[None]
    distances = {title: _distances(made, truth) for title, made in places.items()}
    dataset = f"{world}, {size} objects"
    rows = [row for title, away in distances.items() for row in _rows(dataset, title, away)]
    rows += [row for title in order[1:] for row in _difference_rows(dataset, order[0], title, distances)]
    rows += [row for title in order for row in _collapse_rows(dataset, title, titles[title], seen)]
    return Report(
        dataset=dataset,
        rows=rows,
        errors={title: away.mean((0, 1)) for title, away in distances.items()},
        films=_films(truth, places) if with_films else {},
        dt=truth.dt,
    )


def unseen(world: str, size: int, count: int, model: VisualInteractionNetwork) -> tuple[list[Trajectory], Trajectory]:
    """Return episodes that no model was trained on, and their first frames, filmed, as one trajectory."""
    generator, camera = GENERATORS[f"video_{world}"], square_camera(model.image_size)
    seeds = [[SEED, SPLITS.index("test"), number] for number in range(count)]
    paths = generator.make(seeds, num_bodies=size, num_steps=LENGTH, fixed_colors=True)
    firsts = [path.window(0, model.num_frames) for path in paths]
    return paths, Trajectory.cat([filmed(path, film(path, camera)) for path in firsts])


def predict(model: VisualInteractionNetwork, seen: Trajectory) -> Tensor:
    """Return the positions [51, n, 2] that a model reads from the last frame seen and predicts for 50 steps."""
    path = rollout(model.encode(seen).frame(0), simulator=model, num_steps=max(HORIZONS))
    return model.decode(path)[0].double()


def _distances(places: Tensor, truth: Trajectory) -> Tensor:
    """Return how far positions [s, T, n, 2] of several seeds are off, averaged over a scene's objects, [s, e, T]."""
    away: Tensor = (places - truth["positions"]).norm(dim=-1)
    return away.view(*away.shape[:2], truth.initial.num_scenes, -1).mean(-1).transpose(1, 2)


def interval(values: Tensor, *, num_samples: int = 2000) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the mean of values [seeds, episodes], both drawn with replacement."""
    if len(values) == 1:
        return bootstrap(values[0], num_samples=num_samples)
    generator = torch.Generator().manual_seed(0)
    seeds, episodes = (torch.randint(k, (num_samples, k), generator=generator) for k in values.shape)
    means = values[seeds[:, :, None], episodes[:, None]].mean((1, 2)).sort().values
    out = int(0.025 * (num_samples - 1))
    return float(means[out]), float(means[num_samples - 1 - out])


def _rows(dataset: str, title: str, away: Tensor) -> list[Row]:
    made = []
    for horizon in HORIZONS:
        low, high = interval(away[:, :, horizon])
        value = float(away[:, :, horizon].mean())
        made.append(_row(dataset, title, "position_distance", horizon, value, away, low, high))
    return made


def _difference_rows(dataset: str, one: str, other: str, distances: Mapping[str, Tensor]) -> list[Row]:
    """Return by how much one is nearer the truth than another on the same episodes; below 0 where it is farther."""
    made = []
    for horizon in HORIZONS:
        gained = (distances[other][:, :, horizon].mean(0) - distances[one][:, :, horizon].mean(0))[None]
        low, high = interval(gained)
        title = f"{one} instead of {other}"
        made.append(_row(dataset, title, "distance_saved", horizon, float(gained.mean()), gained, low, high))
    return made


def _collapse_rows(dataset: str, title: str, models: Sequence[VisualInteractionNetwork], seen: Trajectory) -> list[Row]:
    """Return how much of their space the codes fill that models make of what they see, at the median seed."""
    told = [collapse(model.encode(seen)["slots"].flatten(0, 1)).figures() for model in models]
    shared: dict[str, Any] = {"model": title, "dataset": dataset, "unit": "1", "horizon": 0}
    shared |= {"trajectories": seen.initial.num_scenes, "seeds": len(told)}
    return [Row(metric=name, value=float(np.median([one[name] for one in told])), **shared) for name in told[0]]


def _row(
    dataset: str, title: str, metric: str, horizon: int, value: float, away: Tensor, low: float, high: float
) -> Row:
    return Row(
        model=title,
        dataset=dataset,
        metric=metric,
        horizon=horizon,
        value=value,
        unit=UNIT,
        trajectories=away.shape[1],
        seeds=len(away),
        low=low,
        high=high,
    )


def orderings(rows: Sequence[Row]) -> list[str]:
    """Return sentences on the paper's orderings, one per world, horizon and other model: do they hold, how clearly.

    Watters et al. 2017: VIN is better than without relations, than the LSTM, than the MLP, and close to state-IN.
    """
    said = []
    table = {(row.dataset, row.horizon, row.model): row for row in rows if row.metric == "position_distance"}
    pairs = {(row.dataset, row.horizon, row.model): row for row in rows if row.metric == "distance_saved"}
    for (dataset, horizon, title), own in table.items():
        for other in TITLES.values() if title == "VIN" else ():
            beside = table.get((dataset, horizon, other))
            saved = pairs.get((dataset, horizon, f"VIN instead of {other}"))
            if beside is not None and saved is not None:
                steps = "1 step" if horizon == 1 else f"{horizon} steps"
                said.append(f"{dataset}, {steps}: {_compared(other, own, beside, saved)}")
    return said


def _compared(other: str, own: Row, beside: Row, saved: Row) -> str:
    better = own.value < beside.value
    (low, high), (lowest, highest), (least, most) = _ends(own), _ends(beside), _ends(saved)
    if high < lowest or highest < low:
        word = "intervals apart"
    else:
        word = "intervals overlap, paired difference clear" if least > 0 or most < 0 else "not to be told apart"
    return f"VIN {own.value:.3g} is {'better' if better else 'worse'} than {other} {beside.value:.3g}, {word}"


def _ends(row: Row) -> tuple[float, float]:
    assert row.low is not None
    assert row.high is not None
    return row.low, row.high


def _films(truth: Trajectory, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the film of the first episode, and those of the positions predicted for it by each model's first seed."""
    camera, count = square_camera(DRAWN), len(truth.initial) // truth.initial.num_scenes
    scene = truth.scenes()[0]
    films = {"truth": film(scene, camera).rgb}
    for title, made in places.items():
        moved = {**scene.frames, "positions": made[0, :, :count].to(scene["positions"])}
        initial = scene.initial.replace(positions=moved["positions"][0])
        films[title] = film(replace(scene, initial=initial, frames=moved), camera).rgb
    return films
