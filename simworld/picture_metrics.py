"""How wrong a rollout looks: predicted pictures against those of the true state, and against photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simworld.kernels.nearest import nearest
from simworld.kinds import SplatState
from simworld.metrics import ConstantVelocity, Row, moves
from simworld.prescriptions import script
from simworld.render.camera import Camera
from simworld.render.images import overlap, psnr, ssim
from simworld.render.photos import Photos
from simworld.render.splats import render_splats, render_with_alpha
from simworld.simulate import rollout
from simworld.state import State
from simworld.trajectory import Trajectory

UNITS = {"psnr": "dB", "ssim": "1", "silhouette_iou": "1"}
OPAQUE = 0.5  # opacity from which a pixel belongs to a silhouette


@dataclass(frozen=True, kw_only=True)
class PictureErrors:
    """PSNR [dB] of a predicted state's pictures, by what is to blame, over photographs [k].

    `simulator`: predicted against true state, both rendered. `appearance`: true state rendered against the photograph.
    `whole`: predicted state rendered against the photograph.
    """

    simulator: Tensor
    appearance: Tensor
    whole: Tensor


def split_errors(
    predicted: SplatState, true: SplatState, photos: Photos, *, background: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> PictureErrors:
    """Return how much of the error of pictures is the simulator's, and how much the appearance's.

    Of photographs with opacities the pixels that are opaque, of others all count.

    Raises:
        ValueError: there is no photograph.
    """
    if not len(photos):
        raise ValueError("split_errors needs a photograph or more; got none.")
    found: dict[str, list[Tensor]] = {"simulator": [], "appearance": [], "whole": []}
    behind = torch.tensor(background).to(true.means)
    with torch.no_grad():
        for number, camera in enumerate(photos.cameras):
            photo = photos.picture(number, behind)
            image = photos.images[number]
            mask = image[..., 3] > 255 * OPAQUE if image.shape[-1] == 4 else None
            one, other = (render_splats(state, camera, background=behind).clamp(0, 1) for state in (predicted, true))
            found["simulator"].append(psnr(one, other, mask=mask))
            found["appearance"].append(psnr(other, photo, mask=mask))
            found["whole"].append(psnr(one, photo, mask=mask))
    return PictureErrors(**{name: torch.stack(values) for name, values in found.items()})


def picture_rows(
    models: dict[str, Trajectory],
    target: Trajectory,
    camera: Camera,
    dress: Callable[[State], SplatState],
    *,
    dataset: str,
    horizons: Sequence[int | str] = (1, 20, "all"),
) -> list[Row]:
    """Return how pictures of predicted trajectories differ from those of the recorded one, after so many steps.

    PSNR [dB], SSIM, the overlap of silhouettes, and the mean distance of entities from the nearest true one (chamfer,
    one way, in the unit of places), of the last frame that each horizon reaches. Beside them stands the first frame,
    standing still, and going on with its velocities where there are some. `dress` turns a state into splats, for all
    the same.

    Raises:
        ValueError: trajectories differ in length.
    """
    lengths = {len(t) for t in (*models.values(), target)}
    if len(lengths) != 1:
        raise ValueError(f"Pictures are compared of trajectories of one length; got lengths {sorted(lengths)}.")
    places = next(name for name in ("positions", "rest_positions", "means") if name in target.initial)
    units = {**UNITS, "chamfer": target.initial.fields[places].unit}
    shown = dict(models)
    if moves(target):
        naive = ConstantVelocity(dt=target.dt)
        shown["constant_velocity"] = rollout(
            target.initial, target.actions, simulator=naive, num_steps=target.num_steps, interventions=script(target)
        )
    rows = []
    for horizon in horizons:
        last = target.num_steps if horizon == "all" else int(horizon)
        if last > target.num_steps:
            continue
        true = _Seen.of(target.frame(last), dress, camera)
        states = {name: trajectory.frame(last) for name, trajectory in shown.items()} | {"static": target.frame(0)}
        for name, state in states.items():
            for metric, value in _Seen.of(state, dress, camera).errors(true).items():
                rows.append(
                    Row(
                        model=name,
                        dataset=dataset,
                        metric=metric,
                        horizon=horizon,
                        value=value,
                        unit=units[metric],
                        trajectories=1,
                    )
                )
    return rows


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A picture [h, w, 3], its opacities [h, w], and where its entities are."""

    picture: Tensor
    opacities: Tensor
    places: Tensor

    @staticmethod
    @torch.no_grad()
    def of(state: State, dress: Callable[[State], SplatState], camera: Camera) -> _Seen:
        splats = dress(state)
        made, alphas = render_with_alpha(splats, camera, background=(1.0, 1.0, 1.0))
        # Of splats alone the splats: where there are entities, walls and what else is drawn do not count.
        places = state["positions"][state.active] if "positions" in state else splats.means[splats.active]
        return _Seen(picture=made.clamp(0, 1), opacities=alphas[..., 0], places=places)

    def errors(self, true: _Seen) -> dict[str, float]:
        return {
            "psnr": float(psnr(self.picture, true.picture)),
            "ssim": float(ssim(self.picture, true.picture)),
            "silhouette_iou": float(overlap(self.opacities > OPAQUE, true.opacities > OPAQUE)),
            "chamfer": chamfer(self.places, true.places),
        }


def chamfer(predicted: Tensor, true: Tensor) -> float:
    """Return the mean distance of points [n, d] from the nearest of others [m, d]; NaN where there are none."""
    if not len(predicted) or not len(true):
        return float("nan")
    return float(nearest(predicted, true, 1)[0].mean())
