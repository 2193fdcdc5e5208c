"""Exams on slots of films: episodes are filmed, and what an encoder makes of the films is told by body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from simworld.bench.rows import Progress, episodes_of
from simworld.bench.slot_exam import PROBED_FILMS, SEEDS, Exam, Seen, dataset_of
from simworld.data.generate import GENERATORS, Film
from simworld.encode import body_slots, check_not_collapsed, check_room, matched, with_rows
from simworld.kinds import ObjectState
from simworld.models import LatentWorld, SlotAttention
from simworld.models.probes import Probe
from simworld.render.filming import View
from simworld.trajectory import Trajectory

HISTORY = 3  # frames of slots known beside the present one
Pairs = tuple[list[Trajectory], list[Trajectory]]


@dataclass(frozen=True, kw_only=True)
class Films:
    """The films of an exam's episodes, and `training` episodes with theirs, which probes are fitted on."""

    factual: Sequence[View]
    training: Sequence[tuple[Trajectory, View]]


def film_exam(exam: Exam, *, size: int, count: int = PROBED_FILMS, progress: Progress | None = None) -> Films:
    """Return the films [size x size pixels] of an exam and of `count` episodes of the training data."""
    stage = GENERATORS[dataset_of(exam.world)].stage
    assert stage is not None
    training = episodes_of(dataset_of(exam.world), SEEDS[exam.world], count, split="train")
    views = []
    for path in (*exam.factual, *training):
        views.append(Film(size=size).take(stage, path, []))
        if progress:
            progress(len(views))
    few = len(exam.factual)
    return Films(factual=views[:few], training=list(zip(training, views[few:], strict=True)))


@torch.no_grad()
def see_films(exam: Exam, films: Films, name: str, encoder: SlotAttention | LatentWorld) -> Seen:
    """Return what an encoder makes of the films of an exam.

    Slots that part bodies stand in the rows of those that they overlap most with, in films up to the branch frame; in
    training films over all frames. Of one slot for all bodies each is told by a probe for its color.

    Raises:
        ValueError: the encoder has collapsed, an episode has more bodies than it has slots for, or one of a color that
            no training film has, where there is one slot for all.
    """
    training, fitted = [], []
    for path, view in films.training:
        check_room(encoder, path)
        encoded = encoder.encode(view.rgb, history=HISTORY)
        training.append(encoded)
        if isinstance(encoder, SlotAttention):
            fitted.append(matched(encoder, encoded, view, path.initial.num_entities)[0])
    check_not_collapsed(name, training)
    whole = [encoder.encode(view.rgb, history=HISTORY) for view in films.factual]
    scales = torch.cat([path["slots"].flatten(0, 1) for path in training]).double().std(0)
    bodies = [path for path, _ in films.training]
    if not isinstance(encoder, SlotAttention):
        probes = _probes_by_color(training, bodies)
        strange = {color for path in exam.factual for color in _colors(path)} - set(probes)
        if strange:
            raise ValueError(f"No training film has a body of the color {min(strange)}; probe on more films.")
        told = [[(probes[color], 0) for color in _colors(path)] for path in exam.factual]
        return Seen(encoded=whole, bodies=told, scales=scales)
    probe, found, told = Probe.fit(fitted, bodies), [], []
    for path, view, branch, encoded in zip(exam.factual, films.factual, exam.branches, whole, strict=True):
        check_room(encoder, path)
        count = path.initial.num_entities
        known = encoded.window(0, branch - HISTORY + 1)
        rows = body_slots(encoder, known, view.window(0, branch + 1), count)[0].tolist()
        rest = [row for row in range(encoder.num_slots) if row not in rows]
        found.append(with_rows(encoded, rows + rest))
        told.append([(probe, row) for row in range(count)])
    return Seen(encoded=found, bodies=told, scales=scales)


def _colors(path: Trajectory) -> list[str]:
    return [" ".join(f"{part:.3f}" for part in color) for color in path["colors"].tolist()]


def _probes_by_color(encoded: Sequence[Trajectory], recorded: Sequence[Trajectory]) -> Mapping[str, Probe]:
    """Return for each color of bodies the probe of the embeddings of episodes that have such a body."""
    found: dict[str, Pairs] = {}
    for slots, path in zip(encoded, recorded, strict=True):
        for body, color in enumerate(_colors(path)):
            frames = {name: path[name][:, body : body + 1] for name in ("positions", "velocities")}
            first = ObjectState(positions=frames["positions"][0], velocities=frames["velocities"][0])
            one = Trajectory(initial=first, frames=frames, active=path.active[:, body : body + 1], dt=path.dt)
            known = found.setdefault(color, ([], []))
            known[0].append(slots)
            known[1].append(one)
    return {color: Probe.fit(*pairs) for color, pairs in found.items()}
