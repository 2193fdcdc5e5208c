"""One call that draws whatever there is: splats, radiance fields, simulated states and trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simworld.kinds import SplatState
from simworld.render.appearance import Look, to_splats
from simworld.render.camera import Camera
from simworld.render.fields import RadianceField, render_field
from simworld.render.splats import render_splats
from simworld.state import State
from simworld.trajectory import Trajectory

WHITE = (1.0, 1.0, 1.0)


def render(
    scene: State | Trajectory | RadianceField,
    camera: Camera,
    *,
    background: Tensor | Sequence[float] = WHITE,
    dress: Callable[[State], SplatState] | None = None,
) -> Tensor:
    """Return the picture [h, w, 3] of a state or a field, or those [t, h, w, 3] of a trajectory, in 0 to 1.

    Splats and radiance fields are drawn as they are, differentiably; splats may be brighter than 1. Other states are
    dressed first: by `dress`, a function of a state that returns splats, as `lambda state: pose(binding, state)` does,
    or else by `to_splats`, which is for looking only.

    Raises:
        ValueError: a state has nothing to draw, or holds several scenes.
    """
    if isinstance(scene, RadianceField):
        return render_field(scene, camera, background=background)
    if isinstance(scene, Trajectory):
        given = dress or dresser(scene)
        frames = (scene.frame(t) for t in range(len(scene)))
        return torch.stack([render(frame, camera, background=background, dress=given) for frame in frames])
    if isinstance(scene, SplatState):
        return render_splats(scene, camera, background=background)
    return render_splats((dress or dresser(scene))(scene), camera, background=background)


def dresser(scene: State | Trajectory) -> Callable[[State], SplatState]:
    """Return a function that turns states like these into splats, by one look."""
    whole = scene if isinstance(scene, Trajectory) else alone(scene)
    if isinstance(whole.initial, SplatState):
        return _as_splats
    look = Look.of(whole)
    return lambda state: to_splats(state, look)


def alone(state: State) -> Trajectory:
    """Return a state as a trajectory of one frame."""
    frames = {name: state[name][None] for name in state.dynamic_fields if name in state}
    return Trajectory(initial=state, frames=frames, active=state.active[None], dt=1.0)


def _as_splats(state: State) -> SplatState:
    assert isinstance(state, SplatState)
    return state
