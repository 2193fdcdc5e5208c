"""Episodes with their films in them: trajectories whose frames hold pictures, for models that learn from both."""

from __future__ import annotations

from typing import Any

from simworld.fields import Field
from simworld.render.filming import View
from simworld.trajectory import Trajectory

PICTURE = Field(unit="1", shape=("h", "w", 3), per="scene")
"""The picture `rgb` [b, h, w, 3] of the scene that bodies are in, in 0 to 1."""
KEPT = ("positions", "velocities", "masses", "radii")


def filmed(trajectory: Trajectory, view: View) -> Trajectory:
    """Return positions, velocities, masses and radii of an episode with its film, in half precision, in the frames.

    Half precision tells all 256 levels of a colour apart and takes a quarter of the memory that a state's numbers do.

    Raises:
        ValueError: the film is not of as many frames, or the trajectory holds several scenes.
    """
    if trajectory.initial.num_scenes != 1 or len(view) != len(trajectory):
        raise ValueError(
            f"A film is of one scene and of every frame; got {trajectory.initial.num_scenes} scenes of "
            f"{len(trajectory)} frames and a film of {len(view)}."
        )
    pictures = (view.rgb[:, None] / 255).half()
    first = trajectory.initial
    known: dict[str, Any] = {name: first[name] for name in KEPT if name in first}
    state = type(first).with_fields(rgb=PICTURE)(**known, rgb=pictures[0], batch=first.batch, active=first.active)
    moving = {name: trajectory[name] for name in ("positions", "velocities")}
    return Trajectory(initial=state, frames={**moving, "rgb": pictures}, active=trajectory.active, dt=trajectory.dt)
