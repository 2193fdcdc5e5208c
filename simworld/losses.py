"""What training makes small: errors of one step or of rollouts, from states with or without noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from simworld.models.base import LearnedSimulator, Noise, noise_by_field
from simworld.models.causal_jepa import CausalJEPA
from simworld.models.slot_tokens import dense, places
from simworld.models.visual_interaction_network import VisualInteractionNetwork
from simworld.prescriptions import script
from simworld.simulate import rollout
from simworld.space import shortest, wrapped
from simworld.state import State
from simworld.trajectory import Trajectory

Robust = Literal["cauchy", "geman_mcclure"]
SMALLEST = 1e-30


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What training makes small: `measure(model, trajectory, generator)` on windows of `num_steps` steps.

    The generator is the only source of randomness, so that a batch's loss is a function of its number. A loss that
    makes the states that a model steps out of what the data holds, films say, is `of_films`: then the data is
    trajectories with their films.
    """

    name: str
    num_steps: int
    measure: Callable[[LearnedSimulator, Trajectory, torch.Generator], Tensor]
    noise_std: Noise = 0.0
    noise_gamma: float = 1.0
    tolerance: float | None = None
    robust: Robust = "cauchy"
    of_films: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        noise = all(0 <= std < math.inf for std in noise_by_field(self.noise_std).values())
        if not noise or not (self.tolerance is None or 0 < self.tolerance < math.inf):
            raise ValueError(
                f"noise_std must be 0 or more, tolerance positive or None; got {self.noise_std}, {self.tolerance}."
            )
        if not 0 <= self.noise_gamma <= 1:
            raise ValueError(f"noise_gamma must be from 0 to 1; got {self.noise_gamma}.")
        if self.robust not in get_args(Robust):
            raise ValueError(f"robust must be one of {', '.join(get_args(Robust))}; got {self.robust!r}.")


def one_step(
    *,
    noise_std: Noise = 0.0,
    noise_gamma: float = 1.0,
    tolerance: float | None = None,
    robust: Robust = "cauchy",
) -> Loss:
    """Return the squared error of the normalized change, from recorded states with noise added.

    With a `tolerance`, a body's squared error e counts as `robust` says, so that the few close encounters whose
    outcome no model can know do not rule the rest: log(1 + e / tolerance), or e / (tolerance + e), which ignores
    large errors altogether and so needs a start that is nearly right.
    Noise in velocities is a random walk over those that a state knows, of `noise_std` [unit of velocity] in the last
    one, and positions move along with it (Sanchez-Gonzalez et al. 2020); other fields that `noise_std` names are
    moved each by itself. The target takes the noise out of the next velocity with `noise_gamma` 1, out of the next
    position with 0, and between them in proportion (Pfaff et al. 2021, A.2.2, used 0.1 for cloth), for models whose
    next velocity leads to the next position (semi-implicit Euler); out of other fields it is taken whole.
    """

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        state, after = trajectory.frame(0), trajectory.frame(1)
        action = None if trajectory.actions is None else trajectory.actions[0]
        clean, state = state, _noisy(model, state, noise_std, generator)
        if noise_gamma < 1 and "positions" in state and noise_by_field(noise_std).get("velocities"):
            moved = shortest(clean, state.positions - clean.positions) / model.dt
            after = after.replace(velocities=after.velocities - (1 - noise_gamma) * moved)
        difference: Tensor = model(state, action) - model.target(state, after, action)
        return _mean_square(difference[model.learned(state) & after.active], tolerance, robust)

    return Loss(
        name="one_step",
        num_steps=1,
        measure=measure,
        noise_std=noise_std,
        noise_gamma=noise_gamma,
        tolerance=tolerance,
        robust=robust,
    )


def unrolled(
    num_steps: int, *, noise_std: Noise = 0.0, tolerance: float | None = None, robust: Robust = "cauchy"
) -> Loss:
    """Return the mean over `num_steps` of the same error along the model's own rollout, differentiated through.

    At each step the target is the change that leads from where the model got to, to the recorded next state.
    """
    if num_steps < 1:
        raise ValueError(f"unrolled needs num_steps of 1 or more; got {num_steps}.")

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        start = _noisy(model, trajectory.frame(0), noise_std, generator)
        predicted = _rolled(model, start, trajectory, num_steps)
        errors = torch.cat([_miss(model, predicted, trajectory, t) for t in range(num_steps)])
        return _mean_square(errors, tolerance, robust)

    return Loss(
        name="unrolled",
        num_steps=num_steps,
        measure=measure,
        noise_std=noise_std,
        tolerance=tolerance,
        robust=robust,
    )


def pushforward(num_steps: int, *, noise_std: Noise = 0.0) -> Loss:
    """Return the one-step error after `num_steps` - 1 steps of the model's own, not differentiated through.

    Brandstetter et al. 2022, arXiv 2202.03376.
    """
    if num_steps < 1:
        raise ValueError(f"pushforward needs num_steps of 1 or more; got {num_steps}.")
    last = one_step()

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        start = _noisy(model, trajectory.frame(0), noise_std, generator)
        with torch.no_grad():
            state = _rolled(model, start, trajectory, num_steps - 1).frame(-1)
        frames = {k: torch.stack([state[k], trajectory.frames[k][num_steps]]) for k in state.dynamic_fields}
        window = Trajectory(
            initial=state,
            frames=frames,
            active=trajectory.active[num_steps - 1 :],
            dt=trajectory.dt,
            actions=None if trajectory.actions is None else trajectory.actions[num_steps - 1 : num_steps],
        )
        return last.measure(model, window, generator)

    return Loss(name="pushforward", num_steps=num_steps, measure=measure, noise_std=noise_std)


def rollout_positions(num_steps: int, *, tolerance: float | None = None, robust: Robust = "cauchy") -> Loss:
    """Return the squared error of positions alone after 1 to `num_steps` steps of the model's own rollout.

    Differentiated through, and divided by how far the batch's bodies went, squared. For data in which only
    positions are given at later frames. `tolerance` and `robust` as in `one_step`.
    """
    if num_steps < 1:
        raise ValueError(f"rollout_positions needs num_steps of 1 or more; got {num_steps}.")

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        predicted = _rolled(model, trajectory.frame(0), trajectory, num_steps)
        moving = model.free(trajectory.frame(0)) & trajectory.active.all(0)
        wanted = trajectory["positions"]
        gone, missed = (
            shortest(predicted.initial, wanted[1:] - other)[:, moving]
            for other in (wanted[0], predicted["positions"][1:])
        )
        errors = missed / gone.square().mean().sqrt().clamp(min=1e-12)
        return _mean_square(errors.flatten(0, 1), tolerance, robust)

    return Loss(name="rollout_positions", num_steps=num_steps, measure=measure, tolerance=tolerance, robust=robust)


def rollout_relative_l2(num_steps: int, *, noise_std: Noise = 0.0) -> Loss:
    """Return the relative L2 error of every field that moves, over 1 to `num_steps` steps of the model's own rollout.

    Differentiated through; per frame and scene the root of (summed squares of the error over those of the recorded
    values), as `metrics.relative_l2` has it, then the mean over frames, scenes and fields. Frames at which a field is
    zero throughout count as zero. Small beginnings, of a flow that starts up say, count as much as what follows.
    """
    if num_steps < 1:
        raise ValueError(f"rollout_relative_l2 needs num_steps of 1 or more; got {num_steps}.")

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        start = _noisy(model, trajectory.frame(0), noise_std, generator)
        predicted = _rolled(model, start, trajectory, num_steps)
        fields = [name for name, values in predicted.frames.items() if values.is_floating_point()]
        return torch.stack([_relative(predicted, trajectory, name) for name in fields]).mean()

    return Loss(name="rollout_relative_l2", num_steps=num_steps, measure=measure, noise_std=noise_std)


def film_prediction(
    num_steps: int = 8,
    *,
    num_frames: int = 6,
    discount: float = 0.9,
    auxiliary: float = 1.0,
    velocity_weight: float = 0.1,
    mirrored: bool = True,
) -> Loss:
    """Return the squared error of positions and velocities read from codes, as Watters et al. 2017 train.

    Of the codes that a model predicts over `num_steps` steps after `num_frames` frames of a film, step k weighted by
    `discount` to the power k - 1, and, `auxiliary` times, of those that it encodes. Positions are in units of their
    standard deviation, velocities in units of their root mean square, and weighted. With `mirrored` each batch is
    turned and mirrored at random, as a square world with nothing else allows.

    Raises:
        ValueError: a number is outside its range.
    """
    if num_steps < 1 or num_frames < 3 or not 0 < discount <= 1 or min(auxiliary, velocity_weight) < 0:
        raise ValueError(
            "film_prediction needs num_steps of 1 or more, num_frames of 3 or more, a discount above 0 and up to 1 "
            f"and weights of 0 or more; got {num_steps}, {num_frames}, {discount}, {auxiliary}, {velocity_weight}."
        )

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        model = _seeing(model, num_frames)
        path = _turned(trajectory, generator) if mirrored else trajectory
        start = model.encode(path.window(0, num_frames)).frame(0)
        predicted = rollout(start, simulator=model, num_steps=num_steps)["slots"][1:]
        encoded = torch.cat([start.history.transpose(0, 1), start.slots[None]])
        errors = []
        for codes, first in ((encoded, num_frames - len(encoded)), (predicted, num_frames)):
            places, velocities = model.read(codes)
            span = slice(first, first + len(codes))
            missed = (places - path["positions"][span]) / model.statistics["spread"]
            moved = (velocities - path["velocities"][span]) / model.statistics["velocity"]
            errors.append((missed.square() + velocity_weight * moved.square()).mean((1, 2)))
        weights = discount ** torch.arange(num_steps, device=errors[1].device)
        return auxiliary * errors[0].mean() + (weights * errors[1]).sum() / weights.sum()

    return Loss(
        name="film_prediction",
        num_steps=num_frames - 1 + num_steps,
        measure=measure,
        of_films=True,
        settings={
            "discount": discount,
            "auxiliary": auxiliary,
            "velocity_weight": velocity_weight,
            "mirrored": mirrored,
        },
    )


def masked_slots(
    num_steps: int,
    *,
    max_masked: int = 0,
    exactly: bool = False,
    same_mask_every_batch: bool = False,
    loss_on_anchor: bool = False,
    tolerance: float | None = None,
) -> Loss:
    """Return what a `CausalJEPA` is trained on: squared errors of masked histories and of the future, added.

    `num_steps` is the model's `num_future`. Of each scene the history after its first frame is masked for |M|
    slots, 0 to `max_masked` drawn anew, or `max_masked` with `exactly`; one slot or more always stays visible.
    Errors are in standard deviations of slots, averaged over masked history, and over all slots' future with that
    of proprioception. With a `tolerance`, a token's squared error e counts as log(1 + e / tolerance), so that what
    nobody can know of a masked slot does not rule what can be known of the others. As the authors' code does it:
    with `same_mask_every_batch` the same numbers of slots are masked throughout, with `loss_on_anchor` the visible
    first frame counts to the history (Nam et al. 2026, arXiv 2602.11389).
    """
    if num_steps < 1 or max_masked < 0:
        raise ValueError(
            f"masked_slots needs num_steps of 1 or more and max_masked of 0 or more; got {num_steps}, {max_masked}."
        )

    def measure(model: LearnedSimulator, trajectory: Trajectory, generator: torch.Generator) -> Tensor:
        if not isinstance(model, CausalJEPA) or model.num_future != num_steps:
            said = f"num_future={model.num_future}" if isinstance(model, CausalJEPA) else type(model).__name__
            raise ValueError(f"masked_slots with num_steps={num_steps} trains a CausalJEPA of as many; got {said}.")
        state = trajectory.frame(0)
        drawn = torch.Generator().manual_seed(0) if same_mask_every_batch else generator
        hidden = masked_objects(state, max_masked, drawn, exactly=exactly, alike=same_mask_every_batch)
        action = None if trajectory.actions is None else trajectory.actions[0]
        with _seeded(generator, bool(model.training and model.dropout)):
            past, *ahead = model.errors(trajectory, action, hidden=hidden)
        parts = [past[hidden, 0 if loss_on_anchor else 1 :].flatten(), *ahead]
        weighed = (part if tolerance is None else (part / tolerance).log1p() for part in parts if len(part))
        return torch.stack([part.mean() for part in weighed]).sum()

    options = {"exactly": exactly, "same_mask_every_batch": same_mask_every_batch, "loss_on_anchor": loss_on_anchor}
    said = [f"max_masked={max_masked}", *(name for name, on in options.items() if on)]
    name = f"masked_slots({', '.join(said)})"
    return Loss(name=name, num_steps=num_steps, measure=measure, tolerance=tolerance)


def masked_objects(
    state: State, max_masked: int, generator: torch.Generator, *, exactly: bool = False, alike: bool = False
) -> Tensor:
    """Return which slots [n] of each scene are masked, as `masked_slots` says; `alike` masks the same in all scenes.

    Raises:
        ValueError: more are to be masked than the largest scene has slots.
    """
    scene, column = places(state)
    most = int(column.max()) + 1
    if max_masked >= most and max_masked > 0:
        raise ValueError(
            f"max_masked={max_masked} leaves nothing visible: scenes have {most} slots or fewer; ask for {most - 1}."
        )
    rows = 1 if alike else state.num_scenes
    keys = torch.rand(rows, most, generator=generator).expand(state.num_scenes, most).to(state.device)
    counts = torch.randint(max_masked + 1, (rows,), generator=generator).expand(state.num_scenes).to(state.device)
    counts = torch.full_like(counts, max_masked) if exactly else counts
    there = dense(state.active, scene, column)
    counts = counts.minimum((there.sum(1) - 1).clamp(min=0))
    order = torch.where(there, keys, 2.0).argsort(1).argsort(1)  # ranks: of those not there the last
    return (order < counts[:, None])[scene, column]


LOSSES: dict[str, Callable[..., Loss]] = {
    "one_step": one_step,
    "unrolled": unrolled,
    "pushforward": pushforward,
    "rollout_positions": rollout_positions,
    "rollout_relative_l2": rollout_relative_l2,
    "film_prediction": film_prediction,
    "masked_slots": masked_slots,
}


def _seeing(model: LearnedSimulator, num_frames: int) -> VisualInteractionNetwork:
    if not isinstance(model, VisualInteractionNetwork):
        raise ValueError(f"film_prediction trains VisualInteractionNetworks; got a {type(model).__name__}.")
    if model.num_frames != num_frames:
        raise ValueError(
            f"This model sees {model.num_frames} frames before it predicts; say num_frames = {model.num_frames} in the "
            f"loss, not {num_frames}."
        )
    return model


def _turned(trajectory: Trajectory, generator: torch.Generator) -> Trajectory:
    """Return filmed scenes of the unit square turned and mirrored, in one of the eight ways drawn at random."""
    flip_x, flip_y, swap = torch.randint(2, (3,), generator=generator).tolist()
    frames = dict(trajectory.frames)
    places, velocities = frames["positions"], frames["velocities"]
    signs = places.new_tensor([1 - 2 * flip_x, 1 - 2 * flip_y])
    places, velocities = (places - 0.5) * signs + 0.5, velocities * signs
    # The first row of a picture is the upper edge, so y goes against rows.
    axes = [axis for axis, flipped in ((-2, flip_x), (-3, flip_y)) if flipped]
    pictures = frames["rgb"].flip(axes)
    if swap:
        places, velocities = places.flip(-1), velocities.flip(-1)
        pictures = pictures.flip((-2, -3)).transpose(-2, -3)
    frames |= {"positions": places, "velocities": velocities, "rgb": pictures}
    first = trajectory.initial.replace(positions=places[0], velocities=velocities[0], rgb=pictures[0])
    return replace(trajectory, initial=first, frames=frames)


@contextmanager
def _seeded(generator: torch.Generator, needed: bool) -> Iterator[None]:
    """Let layers that drop out draw from a generator, not from torch's own state."""
    if not needed:
        yield
        return
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _mean_square(errors: Tensor, tolerance: float | None, robust: Robust) -> Tensor:
    """Return the mean square of errors [n, k], or the mean over n of what becomes of it beyond a tolerance."""
    squares = errors.square().mean(1)
    if tolerance is None:
        return squares.mean()
    return (squares / tolerance).log1p().mean() if robust == "cauchy" else (squares / (squares + tolerance)).mean()


def _relative(predicted: Trajectory, target: Trajectory, name: str) -> Tensor:
    """Return a field's relative L2 error, averaged over frames after the first and over scenes."""
    start = predicted.initial
    made, wanted = (path[name][1:].reshape(len(path) - 1, start.num_entities, -1) for path in (predicted, target))
    made, wanted = (torch.where(target.active[1:, :, None], values, 0.0) for values in (made, wanted))
    errors, sizes = (
        torch.zeros(len(made), start.num_scenes, dtype=made.dtype, device=made.device).index_add(
            1, start.batch, values.square().sum(2)
        )
        for values in (made - wanted, wanted)
    )
    # A root has no slope at zero: an error that small is nothing beside what is recorded.
    relative = (errors / sizes.clamp(min=SMALLEST) + SMALLEST).sqrt()
    return torch.where(sizes > 0, relative, 0.0).mean()


def _miss(model: LearnedSimulator, predicted: Trajectory, target: Trajectory, t: int) -> Tensor:
    state = predicted.frame(t)
    action = None if target.actions is None else target.actions[t]
    made, wanted = (model.target(state, after, action) for after in (predicted.frame(t + 1), target.frame(t + 1)))
    return (made - wanted)[model.learned(state) & target.active[t + 1]]  # who vanishes goes nowhere


def _rolled(model: LearnedSimulator, start: State, recorded: Trajectory, num_steps: int) -> Trajectory:
    """Return a rollout under recorded actions, in which what comes from outside is as recorded (`script`)."""
    moved = script(recorded, model.auxiliary)
    return rollout(start, recorded.actions, simulator=model, num_steps=num_steps, interventions=moved)


def _noisy(model: LearnedSimulator, state: State, noise_std: Noise, generator: torch.Generator) -> State:
    """Return the state with noise: a random walk over velocities, which positions follow, and in other named fields."""
    named = {name: std for name, std in noise_by_field(noise_std).items() if std}
    missing = [name for name in named if name not in state]
    if missing:
        raise ValueError(f"noise_std names {missing[0]}; the states in the data have {', '.join(state)}.")
    fixed = [name for name in named if name not in state.dynamic_fields or state.fields[name].kind != "float"]
    if fixed:
        raise ValueError(
            f"noise_std names {fixed[0]}, which does not change; name one of {', '.join(state.dynamic_fields)}."
        )
    free = model.free(state)
    changes: dict[str, Tensor] = {}
    for name, std in named.items():
        past = state.history.shape[1] if name == "velocities" and "history" in state else 0
        num, *shape = state[name].shape
        noise = torch.randn(num, past + 1, *shape, generator=generator, dtype=state[name].dtype).to(state.device)
        walk = noise.cumsum(1) * (std / (past + 1) ** 0.5)
        walk = torch.where(free.reshape(-1, *[1] * (walk.ndim - 1)), walk, 0.0)
        changes[name] = changes.get(name, state[name]) + walk[:, -1]
        if name != "velocities":
            continue
        if "positions" in state:
            moved = changes.get("positions", state.positions) + model.dt * walk.sum(1)
            changes["positions"] = wrapped(state, moved)
        if past:
            changes["history"] = state.history + walk[:, :-1]
    return state.replace(**changes) if changes else state
