"""Training what sees: an encoder of films learns from films alone, without states or masks."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.data import open_trajectories
from simworld.data.toml import check_arguments, read_run_file, read_toml
from simworld.encode import figures, only_view
from simworld.models.checkpoint import ENCODERS, load_encoder
from simworld.models.encoder import Encoder
from simworld.train import check_counts, resume_training, save_training, share_of_rate, weights_checksum

MOST_MEASURED = 50  # films from which statistics are taken


@dataclass(frozen=True, kw_only=True)
class EncoderFit:
    """How long and how fast to train an encoder; the fields are the keys of a run file's [fit] table.

    A batch is `batch_size` clips of `num_frames` frames, drawn evenly from all films. The learning rate rises over the
    first `warm_up` steps and falls to zero along a half cosine.
    """

    num_steps: int
    num_frames: int = 4
    batch_size: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 200
    max_grad_norm: float = 1.0
    evaluate_every: int = 500
    num_valid: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, ("num_steps", "num_frames", "batch_size", "evaluate_every"))
        if not (0 < self.learning_rate < math.inf and 0 < self.max_grad_norm < math.inf):
            raise ValueError(
                "learning_rate and max_grad_norm must be positive numbers; got "
                f"{self.learning_rate} and {self.max_grad_norm}."
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * share_of_rate(step, self.num_steps, self.warm_up)


@dataclass
class EncoderProgress:
    """What the loop tells whoever watches it, every `evaluate_every` steps: `told` are figures of held-out films."""

    step: int
    loss: float
    told: Mapping[str, float] = field(default_factory=dict)


def fit_encoder(
    encoder: Encoder,
    films: Sequence[Tensor],
    how: EncoderFit,
    *,
    out: str | Path,
    judge: Callable[[Encoder], Mapping[str, float]] | None = None,
    watch: Callable[[EncoderProgress], None] | None = None,
) -> Encoder:
    """Train an encoder on films [T, h, w, 3] and return it; it is also in `out`/model.safetensors.

    A batch is a function of the seed and its number, and `out`/training.safetensors holds all that changes, so a run
    that was interrupted goes on, when called again, as if it had not been, to the same bits. `judge` returns figures
    by name, which `watch` is told.

    Raises:
        ValueError: films are too short or of another size, `out` holds another run, or the loss is not finite.
    """
    if not films:
        raise ValueError("There are no films to train on; give at least one.")
    short = [len(rgb) for rgb in films if len(rgb) < how.num_frames]
    if short:
        raise ValueError(f"Clips are of {how.num_frames} frames; a film has {short[0]}. Ask for a lower num_frames.")
    for rgb in films:
        encoder.prepare(rgb[:1])
    out, run = Path(out), _identity(encoder, films, how)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=how.learning_rate)
    encoder.train()
    total, since = 0.0, 0
    for step in range(resume_training(out, encoder, optimizer, run), how.num_steps):
        clips, generator = _batch(films, how, step)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        value = encoder.loss(clips, generator)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), how.max_grad_norm)
        optimizer.step()
        total, since = total + float(value.detach()), since + 1
        if not math.isfinite(total):
            raise ValueError(
                f"The loss is not finite at step {step + 1}; lower the learning rate or look at the films."
            )
        if (step + 1) % how.evaluate_every == 0 or step + 1 == how.num_steps:
            save_training(out, encoder, optimizer, run, step + 1)
            if watch:
                told = judge(encoder.eval()) if judge else {}
                watch(EncoderProgress(step + 1, total / since, told))
                encoder.train()
            total, since = 0.0, 0
    return encoder.eval()


def _batch(films: Sequence[Tensor], how: EncoderFit, step: int) -> tuple[Tensor, torch.Generator]:
    """Return random clips [b, t, h, w, 3] and the generator of what else is drawn: a function of seed and step."""
    seed = int(np.random.SeedSequence([how.seed, step]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(films), (how.batch_size,), generator=generator).tolist()
    places = torch.rand(how.batch_size, generator=generator).tolist()
    clips = []
    for number, place in zip(chosen, places, strict=True):
        first = int(place * (len(films[number]) - how.num_frames + 1))
        clips.append(films[number][first : first + how.num_frames])
    return torch.stack(clips), generator


def _identity(encoder: Encoder, films: Sequence[Tensor], how: EncoderFit) -> str:
    """Return what a run is, its films by checksum, so that it goes on only as what it was."""
    data = 0
    for rgb in films:
        data = zlib.crc32(rgb.contiguous().numpy().tobytes(), data)
    said = {"model": type(encoder).__name__, "arguments": encoder.arguments, "fit": vars(how), "data": data}
    said |= {key: encoder.provenance[key] for key in ("initial_checksum",) if key in encoder.provenance}
    return json.dumps(said, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class EncoderRun:
    """A training run of an encoder: `data` holds train.h5 and perhaps valid.h5, with films in them.

    `initial` is a checkpoint to go on from; then `arguments` may change what leaves the shapes of its weights as they
    are, and weights that are new start as they do in an untrained encoder.
    """

    model: str
    data: Path
    out: Path
    fit: EncoderFit
    arguments: Mapping[str, Any]
    initial: str | None = None
    num_train: int | None = None
    text: str = ""


def is_encoder_run(path: str | Path) -> bool:
    """Return whether a run file asks for an encoder of films.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML.
    """
    return read_toml(path)[0].get("model") in list(ENCODERS)


def read_encoder_run(
    path: str | Path, *, seed: int | None = None, out: str | Path | None = None, initial: str | Path | None = None
) -> EncoderRun:
    """Return the run in a TOML file; paths in it are relative to where the command runs.

    `seed`, `out` and `initial` are put in the place of what the file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, lacks a key, or has one that nothing reads.
    """
    path = Path(path)
    known = [f.name for f in fields(EncoderRun) if f.name != "text"]
    said, text = read_run_file(path, known, ENCODERS, out=out, initial=initial)
    arguments = said.get("arguments", {})
    check_arguments(f"{path} [arguments]", arguments, ENCODERS[said["model"]], leave=("statistics", "dt"))
    check_arguments(f"{path} [fit]", said["fit"], EncoderFit, required=("num_steps",))
    if seed is not None:
        said["fit"]["seed"] = seed
    return EncoderRun(
        model=said["model"],
        data=Path(said["data"]),
        out=Path(said["out"]),
        fit=EncoderFit(**said["fit"]),
        arguments=arguments,
        initial=said.get("initial"),
        num_train=said.get("num_train"),
        text=text,
    )


def start_encoder(run: EncoderRun, *, watch: Callable[[EncoderProgress], None] | None = None) -> Encoder:
    """Train as a run says, or go on where it was interrupted, and return the encoder.

    Raises:
        ValueError: the files hold no films, or as `fit_encoder`.
    """
    with open_trajectories(run.data / "train.h5") as data:
        count = min(len(data), run.num_train or len(data))
        films = [only_view(data, number).rgb for number in range(count)]
        said = {"dataset": data.dataset, "dataset_seed": data.seed, "run": run.text, "seed": run.fit.seed}
        dt = data.dt
    torch.manual_seed(run.fit.seed)
    if run.initial is not None:
        encoder, begun = _continued(run.initial, run)
        said |= {"initial": begun.provenance, "initial_checksum": weights_checksum(begun)}
    else:
        kind = ENCODERS[run.model]
        statistics = kind.measure_films(films[:MOST_MEASURED], **run.arguments)
        made: Callable[..., Encoder] = kind
        encoder = made(dt=dt, statistics=statistics, **run.arguments)
    encoder.provenance = said
    valid, judge = run.data / "valid.h5", None
    if valid.is_file() and run.fit.num_valid:
        with open_trajectories(valid) as data:
            held_out = [only_view(data, number) for number in range(min(len(data), run.fit.num_valid))]

        def judge(encoder: Encoder) -> Mapping[str, float]:
            return figures(encoder, held_out)

    return fit_encoder(encoder, films, run.fit, out=run.out, judge=judge, watch=watch)


def _continued(name: str, run: EncoderRun) -> tuple[Encoder, Encoder]:
    """Return an encoder with the arguments that the run changes and a checkpoint's weights, and the checkpoint's."""
    begun = load_encoder(name)
    if type(begun).__name__ != run.model:
        raise ValueError(f"'{name}' holds a {type(begun).__name__}; say model = '{type(begun).__name__}'.")
    made: Callable[..., Encoder] = type(begun)
    changed = made(**{**begun.arguments, **run.arguments})
    known, weights = changed.state_dict(), begun.state_dict()
    if any(key not in known or known[key].shape != value.shape for key, value in weights.items()):
        raise ValueError(
            f"The weights in '{name}' do not fit a {run.model} with {dict(run.arguments)}; leave out of [arguments] "
            "what changes their shapes."
        )
    changed.load_state_dict(known | weights)
    return changed, begun
