"""From films to slots in files, with what can be known of them: how well they part bodies, and what they tell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.data.store import TrajectoryFile, open_trajectories, write_trajectories
from simworld.kinds import ObjectState, SlotState
from simworld.metrics import Row
from simworld.models.base import LearnedSimulator
from simworld.models.encoder import Encoder
from simworld.models.probes import Probe, probe_errors
from simworld.models.slot_attention import SlotAttention
from simworld.models.true_slots import TrueSlots, under_actions, with_proprioception
from simworld.models.visual_interaction_network import VisualInteractionNetwork
from simworld.render.filmed import filmed
from simworld.render.filming import View
from simworld.simulate import check_suits
from simworld.slot_metrics import COLLAPSED_STD, Collapse, best_matching, clip_ari, collapse, foreground_ari, overlaps
from simworld.trajectory import Trajectory

Told = tuple[list[Trajectory], list[Trajectory]]
Progress = Callable[[int], None] | None
JUDGED = 10  # episodes at most by which a file's encoder is found collapsed or not
PROBED = ("positions", "velocities", "color", "radius")


def only_view(data: TrajectoryFile, number: int) -> View:
    """Return the first film of an episode.

    Raises:
        ValueError: the episode has none.
    """
    views = data.views(number)
    if not views:
        raise ValueError(
            f"{data.path} has no film of episode {number}; generate it from a recipe with a [film], as that of "
            "video_billiards."
        )
    return views[0]


def collapse_of(encoded: Sequence[Trajectory]) -> Collapse:
    """Return the collapse diagnostics of all slots of all frames of some episodes."""
    return collapse(torch.cat([path["slots"].flatten(0, 1) for path in encoded]))


def check_not_collapsed(name: str, encoded: Sequence[Trajectory]) -> None:
    """Raise a ValueError if slots do not tell frames or things apart, or are the same whatever the film shows."""
    found = collapse_of(encoded)
    length = min(len(path) for path in encoded)
    alike = torch.stack([path["slots"][:length].double() for path in encoded])
    apart = float(alike.var(0, unbiased=False).mean().sqrt())  # of films, at the same frame and slot
    several = [path["slots"].double() for path in encoded if path["slots"].shape[1] > 1]
    within = min((float(slots.var(1, unbiased=False).mean().sqrt()) for slots in several), default=math.inf)
    least = COLLAPSED_STD * found.scale
    if found.collapsed or (len(encoded) > 1 and apart <= least) or within <= least:
        raise ValueError(
            f"The encoder {name} has collapsed: its slots are nearly the same whatever it sees, or as each other "
            f"(effective rank {found.effective_rank:.3g} of {len(found.variances)}, mean cosine "
            f"{found.mean_cosine:.4f}, standard deviation over films {apart:.2g}, over the slots of a frame "
            f"{within:.2g}, of {found.scale:.2g}); train it longer, or with another seed."
        )


@torch.no_grad()
def figures(encoder: Encoder, views: Sequence[View]) -> dict[str, float]:
    """Return, by name, what an encoder makes of films whose masks are known.

    `foreground_ari` is the mean over frames, `clip_ari` that of whole films, in which a body that changes slots counts
    as two; both of encoders that part pixels alone. The others, of all slots, tell whether they have collapsed.
    """
    encoded = [encoder.encode(view.rgb) for view in views]
    told = collapse_of(encoded).figures()
    if not isinstance(encoder, SlotAttention):
        return told
    by_frame, by_clip = [], []
    for view, path in zip(views, encoded, strict=True):
        owners = encoder.owners(path["slots"])
        by_frame.append(foreground_ari(view.masks, owners))
        by_clip.append(clip_ari(view.masks, owners))
    return {
        "foreground_ari": float(torch.cat(by_frame).nanmean()),
        "clip_ari": sum(by_clip) / len(by_clip),
        **told,
    }


def body_slots(encoder: SlotAttention, encoded: Trajectory, view: View, num_bodies: int) -> tuple[Tensor, float]:
    """Return the slot of each body [n], and in which share of frames each body is where it mostly is.

    A body has one slot for the whole film: that of the matching with the largest sum of overlaps (intersection over
    union) over all frames. Frames are those of `encoded`, the last of the film.

    Raises:
        ValueError: there are more bodies than slots.
    """
    owners = encoder.owners(encoded["slots"])
    scores = overlaps(view.masks[len(view) - len(owners) :], owners, num_bodies, encoder.num_slots)
    rows = best_matching(scores.sum(0))
    return rows, float((scores.argmax(2) == rows)[scores.amax(2) > 0].float().mean())


def matched(encoder: SlotAttention, encoded: Trajectory, view: View, num_bodies: int) -> tuple[Trajectory, float]:
    """Return the slots of bodies, row for row, and the share that `body_slots` tells."""
    rows, kept = body_slots(encoder, encoded, view, num_bodies)
    return with_rows(encoded, rows.tolist()), kept


def with_rows(path: Trajectory, rows: Sequence[int]) -> Trajectory:
    """Return a trajectory of slots with some of its rows, in their order."""
    chosen, initial = list(rows), path.initial
    changes: dict[str, Any] = {name: initial[name][chosen] for name in ("slots", "history") if name in initial}
    return Trajectory(
        initial=SlotState(**changes),
        frames={"slots": path["slots"][:, chosen]},
        active=path.active[:, chosen],
        dt=path.dt,
    )


def seen(recorded: Trajectory, view: View) -> Trajectory:
    """Return what a film shows of its bodies, in widths and heights of the frame, as a trajectory to probe for.

    `positions` are in the picture (x to the right, y downwards), `velocities` their change since the frame before, per
    second (0 at frame 0), beside `color` and `radius` [T, n, 1], where bodies have them.
    """
    height, width = view.rgb.shape[1:3]
    places = recorded["positions"].double()
    places = torch.nn.functional.pad(places, (0, 3 - places.shape[2]))
    eye = places @ view.viewmat[:3, :3].double().T + view.viewmat[:3, 3].double()
    pixels = eye @ view.K.double().T
    shown = pixels[..., :2] / pixels[..., 2:] / pixels.new_tensor([width, height])
    frames = {"positions": shown, "velocities": shown.diff(dim=0, prepend=shown[:1]) / recorded.dt}
    for name, field in (("color", "colors"), ("radius", "radii")):
        if field in recorded.initial:
            value = recorded.initial[field].double()
            frames[name] = value.reshape(len(value), -1).expand(len(shown), -1, -1)
    first = ObjectState(positions=shown[0], velocities=frames["velocities"][0])
    return Trajectory(initial=first, frames=frames, active=recorded.active, dt=recorded.dt)


def told(encoder: SlotAttention, data: TrajectoryFile, numbers: Sequence[int]) -> Told:
    """Return of some episodes the slots of their bodies, row for row, and what films show of these, for `Probe.fit`.

    Slots know the frame before, as `history`, and begin with frame 1.

    Raises:
        ValueError: an episode has no film, one of another size, or more bodies than the encoder has slots.
    """
    slots, bodies = [], []
    for number in numbers:
        recorded, view = data[number], only_view(data, number)
        check_room(encoder, recorded)
        slots.append(matched(encoder, encoder.encode(view.rgb, history=1), view, recorded.initial.num_entities)[0])
        bodies.append(seen(recorded, view))
    return slots, bodies


def check_room(encoder: Encoder, recorded: Trajectory) -> None:
    """Raise a ValueError if a scene has more bodies than an encoder of several slots has for them."""
    bodies = recorded.initial.num_entities
    if 1 < encoder.num_slots < bodies + 1:
        raise ValueError(
            f"An episode has {bodies} bodies before a background, and this encoder {encoder.num_slots} slots; train "
            f"one with num_slots = {bodies + 1} or more."
        )


def probe_rows(name: str, encoder: Encoder, train: TrajectoryFile, test: TrajectoryFile, count: int = 100) -> list[Row]:
    """Return mean errors of linear probes of slots, fitted to `count` episodes of training data, told on test data.

    Beside each is that of the mean of the training data, as model `mean`. Lengths are in widths of the frame. Slots
    that part bodies are probed each for its own, for what both files record of them; an embedding of the whole scene
    for the body of each color, or of each number where a file has no colors, by a probe for each.
    """
    few = range(min(count, len(train)))
    if isinstance(encoder, SlotAttention):
        fitted, judged = {"": told(encoder, train, few)}, {"": told(encoder, test, range(len(test)))}
        known = [path.frames for _, bodies in (fitted[""], judged[""]) for path in bodies]
        names = [one for one in PROBED if all(one in frames for frames in known)]
    else:
        colored = all("colors" in data[0].initial for data in (train, test))
        fitted, judged = (_apart(encoder, *some, colored) for some in ((train, few), (test, range(len(test)))))
        names = ["positions", "velocities"]
    errors: dict[str, list[float]] = {f"{model} {one}": [] for model in ("probe", "mean") for one in names}
    weights = []
    for key, (slots, bodies) in judged.items():
        if key not in fitted:
            raise ValueError(f"No training episode has a body {key}; probe on data of the same bodies.")
        probe = Probe.fit(*fitted[key], names=names)
        missed = probe_errors(probe, slots, bodies)
        weights.append(sum(path.active[1:].sum().item() for path in bodies))
        for one in names:
            mean = torch.cat([path[one][1:].flatten(0, 1) for path in fitted[key][1]]).mean(0)
            away = torch.cat([(path[one][1:] - mean).norm(dim=2).flatten() for path in bodies])
            errors[f"probe {one}"].append(missed[one])
            errors[f"mean {one}"].append(float(away.mean()))
    units = {"positions": "frame widths", "velocities": "frame widths/s", "color": "1", "radius": "frame widths"}
    rows = []
    for one in names:
        for model, key in ((name, f"probe {one}"), ("mean", f"mean {one}")):
            value = sum(w * e for w, e in zip(weights, errors[key], strict=True)) / sum(weights)
            rows.append(_row(model, test, f"probed_{one}", value, units[one]))
    return rows


def _apart(encoder: Encoder, data: TrajectoryFile, numbers: Sequence[int], colored: bool) -> dict[str, Told]:
    """Return by the color or number of bodies the embeddings of episodes with such a one, and what films show of it."""
    found: dict[str, Told] = {}
    for number in numbers:
        recorded, view = data[number], only_view(data, number)
        encoded, shown = encoder.encode(view.rgb, history=1), seen(recorded, view)
        for body in range(recorded.initial.num_entities):
            color = " ".join(f"{part:.3f}" for part in shown["color"][0, body].tolist()) if colored else ""
            key = f"of the color {color}" if colored else f"of number {body}"
            frames = {k: shown[k][:, body : body + 1] for k in ("positions", "velocities")}
            first = ObjectState(positions=frames["positions"][0], velocities=frames["velocities"][0])
            one = Trajectory(initial=first, frames=frames, active=recorded.active[:, body : body + 1], dt=recorded.dt)
            slots, bodies = found.setdefault(key, ([], []))
            slots.append(encoded)
            bodies.append(one)
    return found


def figure_rows(name: str, encoder: Encoder, data: TrajectoryFile) -> list[Row]:
    """Return the `figures` of all films of a file as rows."""
    views = [only_view(data, number) for number in range(len(data))]
    found = figures(encoder, views)
    return [_row(name, data, metric, value, "1") for metric, value in found.items()]


def _row(model: str, data: TrajectoryFile, metric: str, value: float, unit: str) -> Row:
    """Return a line of a table; slots are of frames as they are seen, none ahead: horizon 0."""
    return Row(
        model=model, dataset=data.dataset, metric=metric, horizon=0, value=value, unit=unit, trajectories=len(data)
    )


@torch.no_grad()
def encode_file(
    name: str,
    encoder: Encoder,
    data: str | Path,
    out: str | Path,
    *,
    history: int = 3,
    actor: int | None = None,
    progress: Progress = None,
) -> None:
    """Write the slots of all films of a file to another, episode for episode; `name` is what the encoder is called.

    Frame 0 of an episode of slots is recorded frame `history`; actions go with them, and as `past_actions` those
    before it; so does what the body number `actor` knows of itself. The true states stay where they are: the file of
    slots says in its recipe, as JSON, of which file and by which encoder it is.

    Raises:
        ValueError: a film is missing, damaged or of another size, there are more bodies than slots, actions are not
            per scene, the frames are of another step than the encoder was trained on, or the encoder has collapsed.
    """
    made = []
    with open_trajectories(data) as recorded:
        if abs(recorded.dt - encoder.dt) > 1e-6 * encoder.dt:
            raise ValueError(f"{name} was trained on frames {encoder.dt} s apart, {data} has {recorded.dt} s.")
        for number in range(len(recorded)):
            view = only_view(recorded, number)
            episode = recorded[number]
            check_room(encoder, episode)
            slots = under_actions(encoder.encode(view.rgb, history=history), episode)
            made.append(with_proprioception(slots, episode, actor))
            if progress:
                progress(number + 1)
        check_not_collapsed(name, made[:JUDGED])
        said = {"slots_of": recorded.path.name, "encoder": name, "history": history, "recipe": recorded.recipe}
        write_trajectories(
            out,
            made,
            dataset=recorded.dataset,
            seed=recorded.seed,
            recipe=json.dumps(said),
            action_unit=recorded.action_unit,
        )


def encoder_said(data: TrajectoryFile) -> dict[str, Any] | None:
    """Return which encoder made the slots in a file, as models trained on them carry it; None if no encoder did."""
    try:
        said = json.loads(data.recipe)
        return {"encoder": said["encoder"], "history": said["history"]}
    except (ValueError, TypeError, KeyError):
        return None


@torch.no_grad()
def seen_by(
    name: str, model: LearnedSimulator, data: TrajectoryFile, count: int | None = None
) -> TrajectoryFile | list[Trajectory]:
    """Return the first episodes of a file as a model sees them.

    Bodies are slots, where it was trained on true slots; of films it is given those frames that it has seen enough for.

    Raises:
        ValueError: the file holds slots by another encoder than the model says that its own were, or bodies in
            another unit or at other steps than those that it learned from, or there are no films for one that sees
            films.
    """
    learned, made = model.provenance.get("slots"), encoder_said(data)
    episodes = data if count is None else data[:count]
    if isinstance(model, VisualInteractionNetwork):
        check_suits(name, model, data[0])
        films = model.sight == "films"
        return [
            model.watch(path, filmed(path, only_view(data, k)) if films else path) for k, path in enumerate(episodes)
        ]
    if not isinstance(learned, Mapping):
        return episodes
    if made is not None and Path(str(learned.get("encoder"))).resolve() != Path(str(made["encoder"])).resolve():
        raise ValueError(
            f"{name} was trained on slots by the encoder '{learned.get('encoder')}', {data.path} holds those by "
            f"'{made['encoder']}'; encode its films with the former."
        )
    if learned.get("encoder") == "true" and issubclass(data.kind, ObjectState):
        encoder = TrueSlots.from_json(learned)
        check_suits(name, model, data[0])  # slots have no unit by which it could be told later
        return [encoder.encode(path) for path in episodes]
    return episodes


def as_bodies(name: str, model: LearnedSimulator, recorded: Trajectory, path: Trajectory) -> Trajectory:
    """Return what a model sees or predicts of a recorded episode as something with places, to be shown.

    Raises:
        ValueError: these are slots of films, which do not say where they are.
    """
    if "slots" not in path.frames or "positions" in path.frames:
        return path
    learned = model.provenance.get("slots")
    if not isinstance(learned, Mapping) or learned.get("encoder") != "true" or "positions" not in recorded.frames:
        raise ValueError(
            f"A film shows places, and the slots that {name} predicts do not say them; fit a probe to them "
            "(simworld.Probe), or leave the film out."
        )
    return TrueSlots.from_json(learned).bodies(path, recorded)
