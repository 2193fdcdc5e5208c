"""Training: the loop, visible in one file."""

from __future__ import annotations

import copy
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from simworld.losses import Loss
from simworld.metrics import Row, evaluate
from simworld.models.base import LearnedSimulator
from simworld.models.checkpoint import Kept, read_tensors, save_checkpoint, write_tensors
from simworld.models.visual_interaction_network import VisualInteractionNetwork
from simworld.simulate import BrokeDown, check_suits, rollout
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAINING_SCHEMA, TRAINING_VERSION = "simworld.training", 1
# Models' arguments that early runs do not say.
LATER: dict[str, Any] = {
    "strains": [],
    "normalizer": "dataset",
    "incompressible": False,
    "num_kernels": 0,
    "kernel_radius": None,
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How long and how fast to train; the fields are the keys of a run file's [fit] table.

    The learning rate rises over the first `warm_up` steps and falls to zero along a half cosine. Matrices of
    weights decay by `learning_rate * weight_decay` of themselves in each step (decoupled, as in AdamW), vectors
    and scalars do not. The saved weights are an exponential moving average with `ema_decay`.

    Windows are drawn evenly but for a share `emphasis` of them, which are drawn in proportion to how much velocities
    change in them, so that what is rare and matters, such as impacts, is seen often. A world that is the same in a
    mirror across some axes of space, or between two, is shown mirrored in each of `mirror` half of the time
    (`Trajectory.mirrored`): 1, 2 and [1, 2] are all symmetries of a square bar along axis 0.
    """

    num_steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: int = 500
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    evaluate_every: int = 1000
    num_valid: int = 20
    emphasis: float = 0.0
    mirror: Sequence[int | Sequence[int]] = ()
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        check_counts(self, ("num_steps", "batch_size", "evaluate_every", "devices"))
        if not 0 <= self.emphasis <= 1:
            raise ValueError(f"emphasis must be from 0 to 1; got {self.emphasis}.")
        planes = [one if isinstance(one, list | tuple) else [one] for one in self.mirror]
        if any(not isinstance(axis, int) or axis < 0 for plane in planes for axis in plane):
            raise ValueError(f"mirror lists axes of space, 0 and up, or pairs of them; got {self.mirror}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}.")
        if not (0 < self.learning_rate < math.inf and 0 < self.max_grad_norm < math.inf and 0 <= self.ema_decay < 1):
            raise ValueError(
                "learning_rate and max_grad_norm must be positive numbers and ema_decay from 0 to below 1; "
                f"got {self.learning_rate}, {self.max_grad_norm} and {self.ema_decay}."
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * share_of_rate(step, self.num_steps, self.warm_up)


def check_counts(how: Any, positive: Sequence[str]) -> None:
    """Raise a ValueError unless the `positive` settings of a loop are 1 or more, and what may be none 0 or more."""
    for name in positive:
        if getattr(how, name) < 1:
            raise ValueError(f"{name} must be 1 or more; got {getattr(how, name)}.")
    for name in ("warm_up", "num_valid", "seed"):
        if getattr(how, name) < 0:
            raise ValueError(f"{name} must be 0 or more; got {getattr(how, name)}.")


def share_of_rate(step: int, num_steps: int, warm_up: int) -> float:
    """Return by what the learning rate is multiplied at a step: rising at first, then along a half cosine to 0."""
    return min(1.0, (step + 1) / max(1, warm_up)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


@dataclass
class Progress:
    """What the loop tells whoever watches it, every `evaluate_every` steps: errors are on held-out data."""

    step: int
    loss: float
    errors: list[Row] = field(default_factory=list)


def fit(
    model: LearnedSimulator,
    trajectories: Sequence[Trajectory],
    loss: Loss,
    how: Fit,
    *,
    out: str | Path,
    valid: Sequence[Trajectory] = (),
    watch: Callable[[Progress], None] | None = None,
) -> LearnedSimulator:
    """Train a model and return it with its averaged weights, which are also in `out`/model.safetensors.

    A batch is a function of the seed and its number, and `out`/training.safetensors holds all that changes,
    so a run that was interrupted goes on, when called again, as if it had not been: on a CPU to the same bits.
    Several processes (`how.devices`) each take their own batches and average their gradients.

    Raises:
        ValueError: trajectories are shorter than the loss needs or do not fit the model, `out` holds another
            run (settings or data), or the loss is no longer finite.
    """
    from lightning_fabric import Fabric

    short = [t for t in trajectories if t.num_steps < loss.num_steps]
    if not trajectories:
        raise ValueError("There are no trajectories to train on; give at least one.")
    if short:
        raise ValueError(
            f"This loss needs trajectories of {loss.num_steps} steps or more; got {len(short)} shorter ones."
        )
    first = trajectories[0]
    check_suits("The model", model, first)
    if loss.of_films:
        loss.measure(model, first.window(0, loss.num_steps + 1), torch.Generator())
    else:
        model.check(first.initial, None if first.actions is None else first.actions[0])
    strategy = "auto" if how.devices == 1 else "ddp"
    try:
        fabric = Fabric(accelerator=how.accelerator, devices=how.devices, strategy=strategy)
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(
            f"accelerator='{how.accelerator}' with devices={how.devices} is not to be had here ({error}); "
            "use accelerator='auto' or 'cpu'."
        ) from error
    if how.devices > 1:
        fabric.launch()  # starts this script again for every further process; each comes to this line
    out = Path(out)
    _loop(fabric, model, trajectories, loss, how, out, valid, watch)
    _, tensors = read_tensors(out / "training.safetensors", TRAINING_SCHEMA, TRAINING_VERSION)
    model.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
    return model.eval()


class _Objective(nn.Module):
    """The loss as a module: its forward is the one door through which parallel training must go."""

    def __init__(self, model: LearnedSimulator, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        return self.loss.measure(self.model, trajectory, generator)


def _loop(
    fabric: Fabric,
    model: LearnedSimulator,
    trajectories: Sequence[Trajectory],
    loss: Loss,
    how: Fit,
    out: Path,
    valid: Sequence[Trajectory],
    watch: Callable[[Progress], None] | None,
) -> None:
    run = _identity(model, loss, how, trajectories)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    adam = _optimizer(model, how)
    objective, optimizer = fabric.setup(_Objective(model, loss), adam)
    averaged = averaged.to(fabric.device)
    start = resume_training(out, model, adam, run, averaged=averaged)
    chances = _chances(trajectories, loss.num_steps, how.emphasis)
    total, since = 0.0, 0
    for step in range(start, how.num_steps):
        batch, generator = _batch(trajectories, loss.num_steps, how, step, fabric.global_rank, chances)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        batch = batch.to(fabric.device)
        model.observe(batch, loss.noise_std)
        value = objective(batch, generator)
        optimizer.zero_grad()
        fabric.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.max_grad_norm)
        optimizer.step()
        _average(averaged, model, how.ema_decay, step)
        total, since = total + float(value.detach()), since + 1
        if not math.isfinite(total):
            raise ValueError(f"The loss is not finite at step {step + 1}; lower the learning rate or look at the data.")
        if (step + 1) % how.evaluate_every == 0 or step + 1 == how.num_steps:
            if fabric.is_global_zero:
                save_training(out, model, adam, run, step + 1, averaged=averaged)
                if watch:
                    watch(Progress(step + 1, total / since, _held_out(averaged, loss, valid[: how.num_valid])))
            fabric.barrier()
            total, since = 0.0, 0


def _optimizer(model: nn.Module, how: Fit) -> torch.optim.Optimizer:
    if not how.weight_decay:
        return torch.optim.Adam(model.parameters(), lr=how.learning_rate)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=how.learning_rate)


def _batch(
    trajectories: Sequence[Trajectory],
    num_steps: int,
    how: Fit,
    step: int,
    rank: int,
    chances: Sequence[Tensor] | None = None,
) -> tuple[Trajectory, torch.Generator]:
    """Return random windows joined into one trajectory: a function of seed, step and process alone."""
    seed = int(np.random.SeedSequence([how.seed, step, rank]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(trajectories), (how.batch_size,), generator=generator).tolist()
    places = torch.rand(how.batch_size, generator=generator).tolist()
    windows = []
    for number, place in zip(chosen, places, strict=True):
        trajectory = trajectories[number]
        first = int(place * (trajectory.num_steps - num_steps + 1))
        if chances is not None:
            first = int(torch.multinomial(chances[number], 1, generator=generator))
        windows.append(trajectory.window(first, first + num_steps + 1))
    for axis in how.mirror:
        shown = (torch.rand(len(windows), generator=generator) < 0.5).tolist()
        windows = [one.mirrored(axis) if turned else one for one, turned in zip(windows, shown, strict=True)]
    return Trajectory.cat(windows), generator


def _chances(trajectories: Sequence[Trajectory], num_steps: int, emphasis: float) -> list[Tensor] | None:
    """Return for each trajectory the chances of its windows, or None where all are even."""
    if not emphasis:
        return None
    if any("velocities" not in trajectory.frames for trajectory in trajectories):
        raise ValueError("emphasis needs trajectories with velocities; set it to 0.")
    found = []
    for trajectory in trajectories:
        changes = trajectory["velocities"].diff(dim=0).square().flatten(1).mean(1).double()
        sizes = changes.unfold(0, num_steps, 1).mean(1).sqrt()
        even, total = torch.full_like(sizes, 1 / len(sizes)), sizes.sum()
        found.append(torch.lerp(even, sizes / total, emphasis) if total > 0 else even)
    return found


@torch.no_grad()
def _average(averaged: LearnedSimulator, model: LearnedSimulator, decay: float, step: int) -> None:
    """Move the averaged weights; early steps count more, so that the random start is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for mine, other in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(other)  # what online normalizers have counted


def _held_out(model: LearnedSimulator, loss: Loss, valid: Sequence[Trajectory]) -> list[Row]:
    if not valid:
        return []
    if isinstance(model, VisualInteractionNetwork):
        return _followed(model, valid)
    first = next(model.parameters())
    horizons = (1, min(20, *(t.num_steps for t in valid)), "all")
    here = (t.to(first.device) for t in valid)
    try:
        return evaluate({"simworld": model}, here, dataset="valid", horizons=horizons)
    except BrokeDown as error:  # as rollouts of a network hardly trained may; what it learns meanwhile is not lost
        warnings.warn(f"Held out: nothing to measure yet. {error}", stacklevel=2)
        return []


def _followed(model: VisualInteractionNetwork, valid: Sequence[Trajectory]) -> list[Row]:
    """Return how far predictions from the first frames of films are off on the whole, in the unit of positions."""
    steps = min(path.num_steps for path in valid) - model.num_frames + 1
    path = Trajectory.cat([path.window(0, model.num_frames + steps) for path in valid])
    unit = path.initial.fields["positions"].unit
    path = path.to(next(model.parameters()).device)
    with torch.no_grad():
        start = model.encode(path.window(0, model.num_frames)).frame(0)
        places, _ = model.decode(rollout(start, simulator=model, num_steps=steps))
    away = (places - path["positions"][model.num_frames - 1 :]).norm(dim=-1).mean(1)
    return [
        Row(
            model="simworld",
            dataset="valid",
            metric="position_distance",
            horizon=horizon,
            value=float(away[horizon]),
            unit=unit,
            trajectories=len(valid),
        )
        for horizon in (1, 8, 20, 50)
        if horizon <= steps
    ]


def _named(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{name}.{key}", value


def save_training(
    out: Path,
    model: Kept,
    optimizer: torch.optim.Optimizer,
    run: str,
    step: int,
    *,
    averaged: Kept | None = None,
) -> None:
    """Write what a run has come to, to `out`/model.safetensors, and all that it needs to go on, beside it.

    The checkpoint holds the `averaged` model where there is one; `run` says what the run is.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {} if averaged is None else {f"ema.{k}": v for k, v in averaged.state_dict().items()}
    tensors |= dict(_named(optimizer, model))
    header = {"schema": TRAINING_SCHEMA, "schema_version": str(TRAINING_VERSION), "step": str(step), "run": run}
    out.mkdir(parents=True, exist_ok=True)
    # The checkpoint first: were it second, a run cut off between the two would count as done without one.
    save_checkpoint(model if averaged is None else averaged, out / "model.safetensors", steps=step)
    write_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, header, out / "training.safetensors")


def _identity(model: LearnedSimulator, loss: Loss, how: Fit, trajectories: Sequence[Trajectory]) -> str:
    """Return what a run is, its data by checksum, so that it goes on only as what it was."""
    data = 0
    for trajectory in trajectories:
        state = trajectory.initial
        others = [state[name] for name in (*state.static_fields, *state.past_fields)]
        others += [] if trajectory.actions is None else [trajectory.actions]
        others += [] if bool(trajectory.active.all()) else [trajectory.active]
        for value in (*trajectory.frames.values(), *others):
            data = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), data)
    said = {"loss": loss.name, "num_steps": loss.num_steps, "noise_std": loss.noise_std, "data": data}
    said |= {} if loss.noise_gamma == 1 else {"noise_gamma": loss.noise_gamma}
    said |= dict(loss.settings)
    said |= {} if loss.tolerance is None else {"tolerance": loss.tolerance, "robust": loss.robust}
    # Runs from before these were known go on.
    fit = {k: v for k, v in vars(how).items() if k not in ("weight_decay", "emphasis", "mirror") or v}
    arguments = {k: v for k, v in model.arguments.items() if k not in LATER or v != LATER[k]}
    run = {"model": type(model).__name__, "arguments": arguments, "loss": said, "fit": fit}
    run |= {key: model.provenance[key] for key in ("initial_checksum",) if key in model.provenance}
    return json.dumps(run, sort_keys=True)


def weights_checksum(model: nn.Module) -> int:
    """Return a checksum of the weights a run goes on from: with others it is another run."""
    found = 0
    for value in model.state_dict().values():
        found = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


def resume_training(
    out: Path, model: Kept, optimizer: torch.optim.Optimizer, run: str, *, averaged: Kept | None = None
) -> int:
    """Put back what an interrupted run saved, and return the step it had reached.

    Raises:
        ValueError: what is there belongs to another run.
    """
    path = out / "training.safetensors"
    if not path.is_file():
        return 0
    header, tensors = read_tensors(path, TRAINING_SCHEMA, TRAINING_VERSION)
    if header["run"] != run:
        raise ValueError(f"{path} belongs to a run with other settings; choose another folder or remove that file.")
    for target, prefix in ((model, "model."), (averaged, "ema.")):
        if target is not None:
            target.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        kept = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if kept:
            # Adam counts its steps on the CPU, its averages live with the parameters.
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in kept.items()}
    return int(header["step"])
