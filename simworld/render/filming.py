"""Trajectories as films for models that see: pictures by the splat rasterizer, and which body shows in each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from simworld.render.appearance import Look, bodies_to_splats
from simworld.render.camera import Camera
from simworld.render.rasterize import rasterization
from simworld.state import State
from simworld.trajectory import Trajectory

BACKGROUND = 0.12  # grey level of plain backgrounds
FAR = 40.0  # widths of the square from which it is seen: perspective moves no edge by a pixel
DEPTH = 0.25  # widths by which a body lies before the one numbered before it: who passes hides who is passed
COARSEST, OCTAVES = 4, 4  # of textured backgrounds: cells along an edge, and how often they are halved


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A film of one episode: `rgb` uint8 [T, h, w, 3], `masks` uint8 [T, h, w], and the camera that took it.

    A mask is 0 where the background shows and k + 1 where body k does. `viewmat` [4, 4] and `K` [3, 3] as in `Camera`.
    """

    rgb: Tensor
    masks: Tensor
    viewmat: Tensor
    K: Tensor

    def __post_init__(self) -> None:
        if self.rgb.ndim != 4 or self.rgb.shape[3] != 3 or self.rgb.dtype != torch.uint8:
            raise ValueError(f"A view's rgb must be uint8 [T, h, w, 3]; got {self.rgb.dtype} {list(self.rgb.shape)}.")
        if self.masks.shape != self.rgb.shape[:3] or self.masks.dtype != torch.uint8:
            raise ValueError(
                f"A view's masks must be uint8 {list(self.rgb.shape[:3])}; got {self.masks.dtype} "
                f"{list(self.masks.shape)}."
            )

    def __len__(self) -> int:
        return len(self.rgb)

    def window(self, start: int, stop: int) -> View:
        """Return frames `start` to `stop` - 1."""
        return View(rgb=self.rgb[start:stop], masks=self.masks[start:stop], viewmat=self.viewmat, K=self.K)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a world is filmed: `camera(size)` sees all of it, and `color` (red, green, blue; 0 to 1) lies behind."""

    camera: Callable[[int], Camera]
    color: tuple[float, float, float] = (BACKGROUND, BACKGROUND, BACKGROUND)

    def film(self, trajectory: Trajectory, size: int, *, background: Tensor | None = None) -> View:
        """Return the film [size x size pixels] of an episode; a `background` [size, size, 3] in place of the colour.

        Raises:
            ValueError: as `film` does.
        """
        plain = torch.tensor(self.color).expand(size, size, 3)
        return film(trajectory, self.camera(size), background=plain if background is None else background)


def square_camera(size: int) -> Camera:
    """Return the camera [size x size pixels] that sees the unit square, from (0, 0) to (1, 1), from far in front."""
    angle = 2 * math.degrees(math.atan(0.5 / FAR))
    eye, centre = (0.5, 0.5, FAR), (0.5, 0.5, 0.0)
    return Camera.look_at(eye, centre, up=(0.0, 1.0, 0.0), width=size, height=size, field_of_view=angle)


SQUARE = Stage(camera=square_camera)
"""The unit square, seen from the front."""


@torch.no_grad()
def film(trajectory: Trajectory, camera: Camera, *, background: Tensor | None = None) -> View:
    """Return the film of an episode of bodies in their `colors`; `background` [h, w, 3] in 0 to 1 lies behind them.

    Raises:
        ValueError: the trajectory holds several scenes, or states that have no positions.
    """
    if trajectory.initial.num_scenes != 1:
        raise ValueError(f"A film is of one scene; got {trajectory.initial.num_scenes}. Film trajectory.scenes() each.")
    behind = torch.full((camera.height, camera.width, 3), BACKGROUND) if background is None else background
    if behind.shape != (camera.height, camera.width, 3):
        raise ValueError(
            f"A background must be [{camera.height}, {camera.width}, 3], as the camera's picture; got "
            f"{list(behind.shape)}."
        )
    look = Look.of(trajectory)
    taken = [_picture(trajectory.frame(t), look, camera, behind) for t in range(len(trajectory))]
    rgb, masks = (torch.stack(part) for part in zip(*taken, strict=True))
    return View(rgb=rgb, masks=masks, viewmat=camera.viewmat, K=camera.K)


def _picture(state: State, look: Look, camera: Camera, behind: Tensor) -> tuple[Tensor, Tensor]:
    splats, numbers = bodies_to_splats(state, look)
    if look.planar:
        splats = splats.replace(
            means=splats.means + DEPTH * numbers[:, None] * splats.means.new_tensor([0.0, 0.0, 1.0])
        )
    owners = functional.one_hot(numbers, state.num_entities).float()
    colors = torch.cat([splats.harmonics[:, 0], owners], 1)
    made, alphas, _ = rasterization(
        splats.means,
        None,
        None,
        splats.opacities,
        colors,
        camera.viewmat[None],
        camera.K[None],
        camera.width,
        camera.height,
        covars=splats.covars,
        eps2d=0.05,
    )
    shown, shares = made[0, ..., :3] + (1 - alphas[0]) * behind, made[0, ..., 3:]
    masks = torch.cat([1 - alphas[0], shares], -1).argmax(-1)
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8), masks.to(torch.uint8)


def texture(size: int, generator: torch.Generator) -> Tensor:
    """Return a background [size, size, 3] in 0 to 1: coloured noise of several scales, to distract who looks."""
    total = torch.zeros(1, 3, size, size)
    for octave in range(OCTAVES):
        cells = min(size, COARSEST * 2**octave)
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        total += functional.interpolate(noise, (size, size), mode="bilinear", align_corners=False) / 2**octave
    return (total / total.max())[0].permute(1, 2, 0) * 0.8
