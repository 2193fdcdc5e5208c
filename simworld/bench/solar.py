"""The solar system: one-year rollouts of a network that learned law and masses, beside Newton's law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.bench.rows import models_of, over_seeds
from simworld.data.ephemeris import (
    BODIES,
    FIRST_DAY,
    GM,
    SPLIT_DAYS,
    read_ephemeris,
    read_solar_npz,
    solar_trajectory,
)
from simworld.metrics import ConstantVelocity, Row, Static
from simworld.models import ForceNetwork
from simworld.physics.forces import ForceEngine, gravity
from simworld.simulate import Simulator, rollout
from simworld.state import State

YEAR, SPACING = 365, 30


@torch.no_grad()
def solar_system(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Solar system: distance from DE421 after a year, per body, beside Newton's law; masses found.

    Rollouts start every 30 days from 2011 on; figures are medians over the starts [au]. `data` is an .npz of
    daily states with t_jd_tdb, pos_au and vel_au_per_day, DE421 through jplephem if None. Newton's law is
    integrated by velocity Verlet in 15-minute steps from the same states, with DE421's masses. "mass_error" is
    that of GM, the learned law's strength at 1 au times the learned mass, beside DE421's [%].
    """
    models = models_of("solar_system", checkpoints, ForceNetwork)
    if any((model.masses, model.num_bodies) != ("learned", len(BODIES)) for model in models):
        raise ValueError(f"This table is one of models with {len(BODIES)} learned masses; one here has others.")
    starts, ends = _years(data)
    masses = torch.tensor(GM, dtype=torch.float64).repeat(starts.num_scenes) / GM[0]
    newton = ForceEngine(dt=1.0, law=gravity(constant=GM[0]), num_sub_steps=96, rule="velocity_verlet")
    rows = []
    for name, simulator, state in (
        ("static", Static(dt=1.0), starts),
        ("constant_velocity", ConstantVelocity(dt=1.0), starts),
        ("Newton's law", newton, _with_masses(starts, masses)),
    ):
        rows += _distance_rows(name, simulator, state, ends)
        if progress:
            progress(starts.num_scenes)
    found = [_distance_rows("simworld", model, starts, ends) + _mass_rows(model) for model in models]
    return over_seeds(found) + rows


def _years(data: str | Path | None) -> tuple[State, Tensor]:
    """Return the states at all starts, as scenes, and the positions of all bodies a year later [b, 11, 3]."""
    first, last = SPLIT_DAYS[2]
    days: NDArray[np.float64] = FIRST_DAY + np.arange(first, last).astype(np.float64)
    path = solar_trajectory(*read_ephemeris(days)) if data is None else read_solar_npz(data, from_day=days[0])
    if path.num_steps < YEAR:
        raise ValueError(f"{data} must hold a year of daily states from 2011 on; it ends after {path.num_steps} days.")
    starts = range(0, path.num_steps - YEAR + 1, SPACING)
    kind = type(path.initial)
    return kind.cat([path.frame(start) for start in starts]), torch.stack(
        [path["positions"][start + YEAR] for start in starts]
    )


def _with_masses(state: State, masses: Tensor) -> State:
    given: dict[str, Any] = {name: state[name] for name in state}
    return type(state)(batch=state.batch, **{**given, "masses": masses})


def _distance_rows(name: str, simulator: Simulator, starts: State, ends: Tensor) -> list[Row]:
    path = rollout(starts, simulator=simulator, num_steps=YEAR, every=YEAR)
    distances = (path["positions"][-1].view(ends.shape) - ends).norm(dim=-1).quantile(0.5, dim=0)
    return [
        Row(
            model=name,
            dataset=f"DE421, {body}",
            metric="median_distance",
            horizon=YEAR,
            value=float(distance),
            unit="au",
            trajectories=len(ends),
        )
        for body, distance in zip(BODIES, distances, strict=True)
    ]


def _mass_rows(model: ForceNetwork) -> list[Row]:
    found = model.masses_found * model.strength(1.0)
    return [
        Row(
            model="simworld",
            dataset=f"DE421, {body}",
            metric="mass_error",
            horizon="training",
            value=100 * abs(float(mass) / truth - 1),
            unit="%",
            trajectories=1,
        )
        for body, mass, truth in zip(BODIES, found, GM, strict=True)
    ]
