"""From pictures back to states: places and turns of bound splats that make the pictures of a film."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from simworld.quaternions import inverse, logarithm, product
from simworld.render.bind import Binding, pose
from simworld.render.camera import Camera
from simworld.render.splats import render_splats
from simworld.state import State
from simworld.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How states are searched for: steps for the first frame and for others, and their size.

    A step is `rate` times the half width of the splats, and falls to nothing; turns are by half as many radians.
    Pictures are compared at `scales`, coarse to fine, in pixels, for equal parts of the steps: coarse ones see farther.
    """

    first_steps: int = 150
    num_steps: int = 45
    rate: float = 0.05
    scales: tuple[int, ...] = (4, 2, 1)

    def __post_init__(self) -> None:
        if min(self.first_steps, self.num_steps, len(self.scales), *self.scales) < 1 or not self.rate > 0:
            raise ValueError(f"A recovery needs steps, scales of a pixel or more and a rate above 0; got {self}.")


def recover(
    binding: Binding,
    start: State,
    film: Tensor,
    cameras: Sequence[Camera],
    *,
    dt: float,
    how: Recovery | None = None,
    background: Sequence[float] = (1.0, 1.0, 1.0),
) -> Trajectory:
    """Return the states, of the kind of `start`, whose bound splats make the pictures of a film (visual de-animation).

    `film` [t, c, h, w, 3] in 0 to 1 is what `cameras` [c] saw every `dt` seconds, `start` a guess of the first frame.
    Positions, and turns where the splats are bound to bodies, are found by descent of the mean absolute difference
    through `pose` and the rasterizer (Wu et al. 2017 named the task), each frame from where the last two lead. From
    them follow velocities, of the interval that ended at a frame; those of the first are of the second. From the last
    frame a simulator can roll on.

    Raises:
        ValueError: the film is not of these cameras, or of no frame.
    """
    how = how or Recovery()
    size = (cameras[0].height, cameras[0].width) if cameras else (0, 0)
    if film.ndim != 5 or not len(film) or film.shape[1:] != (len(cameras), *size, 3):
        raise ValueError(
            f"film must be [t, {len(cameras)}, {size[0]}, {size[1]}, 3], a picture for each camera and frame; got "
            f"{list(film.shape)}."
        )
    if not film.is_floating_point() or not bool(torch.isfinite(film).all()) or not dt > 0:
        raise ValueError(f"film must be finite floats from 0 to 1, and dt above 0 s; got {film.dtype}, dt {dt}.")
    names = ["positions", "quats"] if binding.quats is not None else ["positions"]
    behind = torch.tensor(background)
    found: list[dict[str, Tensor]] = []
    for t in range(len(film)):
        guess = _led(found) if found else {name: start[name].detach() for name in names}
        steps = how.num_steps if found else how.first_steps
        found.append(_descend(binding, start, guess, film[t], cameras, how, steps, behind))
    frames = {name: torch.stack([one[name] for one in found]) for name in names}
    frames |= _rates(frames, start, dt)
    rest = {name: start[name].expand(len(film), *start[name].shape) for name in start.dynamic_fields}
    frames = {**rest, **frames}  # what is not searched for stays as it was
    first = start.replace(**{name: value[0] for name, value in frames.items()})
    return Trajectory(initial=first, frames=frames, active=start.active.expand(len(film), -1).clone(), dt=dt)


def _descend(
    binding: Binding,
    start: State,
    guess: dict[str, Tensor],
    pictures: Tensor,
    cameras: Sequence[Camera],
    how: Recovery,
    num_steps: int,
    background: Tensor,
) -> dict[str, Tensor]:
    """Return the places and turns whose pictures come nearest, from a guess."""
    width = float((binding.splats.means - binding.splats.means.mean(0)).norm(dim=1).quantile(0.95))
    values = {name: value.clone().requires_grad_() for name, value in guess.items()}
    rates = {"positions": how.rate * width, "quats": how.rate / 4}
    adam = torch.optim.Adam([{"params": [value], "lr": rates[name]} for name, value in values.items()])
    highest = [group["lr"] for group in adam.param_groups]
    for step in range(num_steps):
        scale = how.scales[step * len(how.scales) // num_steps]
        for group, rate in zip(adam.param_groups, highest, strict=True):
            group["lr"] = rate * (1 - step / num_steps) ** 2
        shown = render_splats(pose(binding, start.replace(**values)), list(cameras), background=background)
        loss = (_coarse(shown, scale) - _coarse(pictures.to(shown), scale)).abs().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not step and torch.equal(shown.detach(), background.to(shown).expand_as(shown)):
            warnings.warn("The cameras see nothing of the guess, and it stays as it is; give another.", stacklevel=3)
        adam.step()
    found = {name: value.detach() for name, value in values.items()}
    if "quats" in found:
        found["quats"] = normalize(found["quats"], dim=1)
    return found


def _coarse(pictures: Tensor, scale: int) -> Tensor:
    """Return pictures [c, h, w, 3] in windows of so many pixels, that reach half over each other."""
    if scale == 1 or min(pictures.shape[1:3]) < 2 * scale:
        return pictures
    return avg_pool2d(pictures.permute(0, 3, 1, 2), 2 * scale, scale, scale // 2 or 1, count_include_pad=False)


def _led(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return where the last two frames lead if they go on as they did."""
    if len(found) == 1:
        return found[0]
    before, last = found[-2:]
    led = {"positions": 2 * last["positions"] - before["positions"]}
    if "quats" in last:
        led["quats"] = product(product(last["quats"], inverse(before["quats"])), last["quats"])
    return led


def _rates(frames: dict[str, Tensor], start: State, dt: float) -> dict[str, Tensor]:
    """Return the velocities that a state carries, of the intervals between frames."""
    if len(frames["positions"]) < 2:
        return {}
    made = {}
    if "velocities" in start:
        rates = frames["positions"].diff(dim=0) / dt
        made["velocities"] = torch.cat([rates[:1], rates])
    if "angular_velocities" in start and "quats" in frames:
        rates = logarithm(product(frames["quats"][1:], inverse(frames["quats"][:-1]))) / dt
        made["angular_velocities"] = torch.cat([rates[:1], rates])
    return made
