"""Errors of predicted particles: of where they are, as a set too, of their energy, density and momentum.

Each function `(predicted, target) -> [T]` returns a figure per frame, in float64, for `evaluate` to average. Those
of sets do not ask which particle is which, so a liquid whose particles have changed places is not charged. They
compare the active particles of each scene and average over scenes, and every one but `density_error` measures
along periodic axes by the shortest way. Comparing two sets takes a matrix of all pairs, so they have a `stride`:
frame 0 and frames 1, 1 + stride, 1 + 2 stride, ... are measured and the others are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simworld.extras import needed
from simworld.metrics import Metric, position_mse
from simworld.space import shortest
from simworld.state import rows_between
from simworld.trajectory import Trajectory

Definition = Literal["ott", "pot"]
HORIZONS = (1, 5, 10, 20, 50, 100)  # of LagrangeBench
PAIRS_AT_ONCE = 2**22  # a matrix of 32 MiB
LARGEST_EXPONENT = 500.0  # beyond which exp(-C / epsilon) is near the smallest float64, and logarithms are taken
MOST_ITERATIONS = 10_000
SETTLED, ALMOST_SETTLED = 1e-7, 1e-4  # by how much marginals are missed: aimed at, and accepted


def mse_n(per_frame: Tensor, n: int) -> Tensor:
    """Return the mean of an error per frame, [T], over the first `n` frames after frame 0.

    With `position_mse` this is LagrangeBench's MSE_n (Toshev et al. 2023, evaluate/metrics.py): its rollouts lack
    the frame that they start from.
    """
    if not 1 <= n < len(per_frame):
        raise ValueError(f"n must be from 1 to {len(per_frame) - 1}, the steps of the rollout; got {n}.")
    return per_frame[1 : n + 1].mean()


def blocks(trajectory: Trajectory, num_steps: int, *, num_inputs: int = 6) -> list[Trajectory]:
    """Return windows of `num_steps` steps that start `num_inputs` + `num_steps` frames apart.

    LagrangeBench's validation chops a recording into blocks of 6 + n frames, gives a model the first six and rolls
    it out n steps. The first frame of a window is the last of those six and carries the velocities between
    them. The windows are the same as there if frame 0 of `trajectory` is the recording's sixth, as
    `read_lagrangebench(path, history=4)` has it. What is left at the end is not used.

    Raises:
        ValueError: `num_steps` or `num_inputs` is below 1, or there is no whole block.
    """
    if num_steps < 1 or num_inputs < 1:
        raise ValueError(f"num_steps and num_inputs must be 1 or more; got {num_steps} and {num_inputs}.")
    starts = range(0, len(trajectory) - num_steps, num_inputs + num_steps)
    if not starts:
        raise ValueError(f"A block of {num_steps} steps needs {num_steps + 1} frames; got {len(trajectory)}.")
    return [trajectory.window(start, start + num_steps + 1) for start in starts]


def kinetic_energy(trajectory: Trajectory, *, spacing: float | None = None) -> Tensor:
    """Return [T]: the sum of w |v|^2 over active particles, v what they moved in the step to a frame, per dt.

    LagrangeBench's E_kin: without the half, w = `spacing`^d for all, and numbered one frame earlier there. Without
    `spacing`, w are the masses, or 1 where the state has none. Frame 0 has the velocities that the state tells.
    """
    return (_weights(trajectory, spacing) * _velocities(trajectory).square().sum(2)).sum(1)


def kinetic_energy_mse(predicted: Trajectory, target: Trajectory, *, spacing: float | None = None) -> Tensor:
    """Return [T]: the squared difference of the two kinetic energies; see `kinetic_energy`.

    Its mean over frames 2, 2 + stride, ... is LagrangeBench's MSE_Ekin; see `lagrangebench_metrics`.
    """
    _check_same(predicted, target)
    return (kinetic_energy(predicted, spacing=spacing) - kinetic_energy(target, spacing=spacing)).square()


def momentum_error(predicted: Trajectory, target: Trajectory) -> Tensor:
    """Return [T]: |sum m v - sum m v*| / sum m |v*| over active particles, v* those of the target.

    Velocities are as in `kinetic_energy`, masses 1 where the state has none. NaN where the target is at rest.
    """
    _check_same(predicted, target)
    ours, theirs = _velocities(predicted), _velocities(target)
    w, u = _weights(predicted)[..., None], _weights(target)[..., None]
    missed = ((w * ours).sum(1) - (u * theirs).sum(1)).norm(dim=1)
    total = (u[..., 0] * theirs.norm(dim=2)).sum(1)
    return torch.where(total > 0, missed / total, torch.nan)


def density_error(predicted: Trajectory, target: Trajectory, *, cell: float | None = None) -> Tensor:
    """Return [T]: sqrt(sum (N - N*)^2 / sum N*^2) over the cells of a grid, N* the target's particles in a cell.

    All cells are of one size, so this is the relative error of the number density in the root mean square: 0 for
    equal counts, sqrt(2) or so for sets that share no cell. Cells are cubes of side `cell`, counted
    from the lower corner of the box, or from 0; along a periodic axis they are stretched or shrunk to fit it a
    whole number of times. `cell` is three times the mean distance to the nearest neighbour in the target's first
    frame, if not given. The definition is ours: no peer measures density.
    """
    _check_same(predicted, target)
    side = 3 * _spacing(target) if cell is None else cell
    if not 0 < side < float("inf"):
        raise ValueError(f"cell must be a positive length; got {side!r}. Particles of the first frame may coincide.")
    lower, sides, counts = _grid(target, side)
    totals = []
    for t in range(len(target)):
        found = [
            torch.where(counts > 0, places.remainder(counts.clamp(min=1)), places)
            for path in (predicted, target)
            for places in [((path["positions"][t].double() - lower) / sides).floor()]
        ]
        keys = [torch.cat([target.initial.batch[:, None].double(), places], 1) for places in found]
        totals.append(_relative_difference(keys[0][predicted.active[t]], keys[1][target.active[t]]))
    return torch.stack(totals)


def maximum_mean_discrepancy(
    predicted: Trajectory, target: Trajectory, *, bandwidth: float = 0.1, stride: int = 1
) -> Tensor:
    """Return [T]: the squared maximum mean discrepancy of the two sets of positions under a Gaussian kernel.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), all pairs of particles with themselves too, which is the biased
    estimate (V-statistic) of Gretton et al. (2012, equation 5), squared; k(x, y) = exp(-|x - y|^2 / (2
    bandwidth^2)), `bandwidth` in the unit of the positions. Sanchez-Gonzalez et al. (2020) report this
    discrepancy for GNS without code for it, so the bandwidth is a choice; the default suits a box of side 1. Memory
    is bounded: kernels are summed by blocks.
    """
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth must be a positive length; got {bandwidth!r}.")

    def measure(cost: Callable[[str], Iterator[Tensor]]) -> float:
        own, others, both = (_mean_kernel(cost(pair), bandwidth) for pair in ("xx", "yy", "xy"))
        return max(0.0, own + others - 2 * both)

    return _compare_sets(predicted, target, stride, measure)


def sinkhorn_divergence(
    predicted: Trajectory,
    target: Trajectory,
    *,
    definition: Definition = "ott",
    epsilon: float | None = None,
    stride: int = 1,
) -> Tensor:
    """Return [T]: S(x, y) - (S(x, x) + S(y, y)) / 2, S the entropic cost of moving one set of particles to the other.

    The cost of a pair is its squared distance; all particles weigh the same. The two definitions of LagrangeBench,
    by the library each is named after (its own default is "ott"):

    * "ott": S is the transport cost plus `epsilon` times the divergence of the plan from independence, iterated
      until marginals hold to 1e-7, where LagrangeBench stops at 1e-4 in single precision.
      `epsilon`, the same in all three, is 0.05 of the mean cost between the two sets, as OTT 0.4 has it.
    * "pot": S is the transport cost alone, `epsilon` is 0.1 whatever the size of the box, at most 500 iterations
      until marginals hold to 1e-5, no less than 0 in the end.

    For a small `epsilon` both tend to the squared Wasserstein distance. A matrix of all pairs is held, three at
    most at a time: 24 bytes for each pair of particles.

    Raises:
        ImportError: POT is missing.
        ValueError: the definition is unknown, `epsilon` is not positive, or "ott" did not come to an end.
    """
    if definition not in ("ott", "pot"):
        raise ValueError(f"definition must be 'ott' or 'pot'; got {definition!r}.")
    if epsilon is not None and not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive; got {epsilon!r}.")

    def measure(cost: Callable[[str], Iterator[Tensor]]) -> float:
        both = torch.cat(list(cost("xy")))
        reg = 0.1 if definition == "pot" else 0.05 * float(both.mean())
        reg = epsilon or reg
        if reg == 0:  # all particles are in one place
            return 0.0
        across = _transport_cost(both, reg) if definition == "pot" else _entropic_cost(both, reg)
        del both
        alone = _transport_cost if definition == "pot" else _entropic_cost_to_itself
        own, others = (alone(torch.cat(list(cost(pair))), reg) for pair in ("xx", "yy"))
        divergence = across - (own + others) / 2
        return max(0.0, divergence) if definition == "pot" else divergence

    return _compare_sets(predicted, target, stride, measure)


def lagrangebench_metrics(
    predicted: Trajectory,
    target: Trajectory,
    *,
    spacing: float,
    stride: int = 10,
    definition: Definition = "ott",
) -> dict[str, float]:
    """Return the figures that LagrangeBench gives for a rollout, under its names (evaluate/metrics.py).

    `loss` is the mean squared error over all steps, `mse5` and the like over the first ones, for 1, 5, 10, 20, 50
    and 100 steps if the rollout is longer; `e_kin` is the mean squared difference of kinetic energies and
    `sinkhorn` the mean divergence, at a `stride` from the first predicted frame on. `spacing` is its dx. Arithmetic
    is double where it is single there, and walls count as they do there.
    """
    errors = position_mse(predicted, target)
    found = {f"mse{n}": float(mse_n(errors, n)) for n in HORIZONS if n < len(errors) - 1}
    found["loss"] = float(errors[1:].mean())
    if len(errors) > 2:
        found["e_kin"] = float(kinetic_energy_mse(predicted, target, spacing=spacing)[2::stride].mean())
        sets = sinkhorn_divergence(predicted, target, definition=definition, stride=stride)[1:-1:stride]
        found["sinkhorn"] = float(sets.mean())
    return found


PARTICLE_METRICS: Mapping[str, tuple[Metric, str]] = MappingProxyType(
    {
        "kinetic_energy_mse": (kinetic_energy_mse, "({masses} ({velocities})^2)^2"),
        "momentum_error": (momentum_error, "1"),
        "density_error": (density_error, "1"),
        "maximum_mean_discrepancy": (partial(maximum_mean_discrepancy, stride=10), "1"),
        "sinkhorn_divergence": (partial(sinkhorn_divergence, stride=10), "{positions}^2"),
    }
)
"""Metrics for `evaluate`, those of sets at every tenth frame."""


def named_metrics(names: Sequence[str]) -> dict[str, tuple[Metric, str]]:
    """Return metrics of `PARTICLE_METRICS` by name, for "all" all of them."""
    known = PARTICLE_METRICS
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise ValueError(f"There is no metric {unknown[0]!r}; the known ones are {', '.join(known)} and all.")
    return {name: metric for name, metric in known.items() if name in names or "all" in names}


def _check_same(predicted: Trajectory, target: Trajectory) -> None:
    if "positions" not in target.frames:
        raise ValueError(
            f"Metrics of particles compare positions; this {type(target.initial).__name__} has "
            f"{', '.join(target.frames)}. Leave --metrics out: fields of meshes have metrics of their own."
        )
    shapes = list(predicted["positions"].shape), list(target["positions"].shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"Trajectories to compare must have positions of one shape; got {shapes[0]} and {shapes[1]}.")


def _velocities(trajectory: Trajectory) -> Tensor:
    """Return [T, n, d]: what particles moved in the step to each frame, per dt; 0 for who was not there throughout."""
    positions, active = trajectory["positions"].double(), trajectory.active[..., None]
    moved = shortest(trajectory.initial, positions.diff(dim=0)) / trajectory.dt
    first = torch.where(active[0], trajectory["velocities"][0].double(), 0.0)
    return torch.cat([first[None], torch.where(active[1:] & active[:-1], moved, 0.0)])


def _weights(trajectory: Trajectory, spacing: float | None = None) -> Tensor:
    """Return what each particle weighs, [n]."""
    positions = trajectory["positions"]
    if spacing is not None:
        return torch.full_like(positions[0, :, 0], spacing, dtype=torch.float64) ** positions.shape[2]
    masses = trajectory.initial.masses if "masses" in trajectory.initial else torch.ones_like(positions[0, :, 0])
    return masses.double()


def _compare_sets(
    predicted: Trajectory,
    target: Trajectory,
    stride: int,
    measure: Callable[[Callable[[str], Iterator[Tensor]]], float],
) -> Tensor:
    """Return [T]: a figure of the squared distances within and between two sets of particles, averaged over scenes.

    `measure` is given a function that yields the squared distances of pairs "xx", "yy" or "xy" by blocks of rows.
    """
    _check_same(predicted, target)
    if stride < 1:
        raise ValueError(f"stride must be 1 or more, the distance between measured frames; got {stride}.")
    start = target.initial
    scenes = [rows_between(start.batch, scene) for scene in range(start.num_scenes)]
    found = torch.full((len(target),), torch.nan, dtype=torch.float64)
    for t in sorted({0, *range(1, len(target), stride)}):
        places = {"x": predicted["positions"][t].double(), "y": target["positions"][t].double()}
        values = []
        for here in scenes:
            entities = torch.arange(here.start, here.stop, device=start.device)
            rows = {"x": entities[predicted.active[t, here]], "y": entities[target.active[t, here]]}
            if not len(rows["x"]) or not len(rows["y"]):
                raise ValueError(f"Frame {t} has a scene without active particles; compare frames in which some are.")
            values.append(measure(partial(_squared_distances, target, places, rows)))
        found[t] = sum(values) / len(values)
    return found


def _squared_distances(
    target: Trajectory, places: Mapping[str, Tensor], rows: Mapping[str, Tensor], pair: str
) -> Iterator[Tensor]:
    """Yield blocks [rows, m] of the squared distances between the particles of one set and those of another."""
    entities = rows[pair[1]]
    starts, ends = places[pair[0]][rows[pair[0]]], places[pair[1]][entities]
    for some in torch.split(starts, max(1, PAIRS_AT_ONCE // len(ends))):
        yield shortest(target.initial, some[:, None] - ends, entities).square().sum(2)


def _mean_kernel(costs: Iterable[Tensor], bandwidth: float) -> float:
    total, count = 0.0, 0
    for cost in costs:
        total += float((cost / (-2 * bandwidth**2)).exp().sum())
        count += cost.numel()
    return total / count


def _transport_cost(cost: Tensor, epsilon: float) -> float:
    """Return the transport cost as LagrangeBench has POT compute it."""
    weights = [np.full(size, 1 / size) for size in cost.shape]
    options = {"numItermax": 500, "stopThr": 1e-5, "warn": False}
    return float(
        needed("ot.bregman", "The Sinkhorn divergence", "metrics", "POT").sinkhorn2(
            *weights, cost.cpu().numpy(), epsilon, **options
        )
    )


def _entropic_cost(cost: Tensor, epsilon: float) -> float:
    """Return the transport cost plus epsilon times the plan's divergence from independence, from its potentials."""
    bregman, logarithmic = (
        needed("ot.bregman", "The Sinkhorn divergence", "metrics", "POT"),
        float(cost.max()) > LARGEST_EXPONENT * epsilon,
    )
    solve = bregman.sinkhorn_log if logarithmic else bregman.sinkhorn_knopp
    weights = [np.full(size, 1 / size) for size in cost.shape]
    options = {"numItermax": MOST_ITERATIONS, "stopThr": SETTLED, "log": True, "warn": False}
    with np.errstate(over="ignore"):  # of the scalings, whose logarithms are used
        _, said = solve(*weights, cost.cpu().numpy(), epsilon, **options)
    _check_settled(float(said["err"][-1]) * math.sqrt(cost.shape[1]), epsilon)
    potentials = [said[f"log_{name}"] if logarithmic else np.log(said[name]) for name in ("u", "v")]
    return epsilon * float(sum(np.mean(f - np.log(w)) for f, w in zip(potentials, weights, strict=True)))


def _entropic_cost_to_itself(cost: Tensor, epsilon: float) -> float:
    """Return `_entropic_cost` of a set to itself by symmetric updates (Feydy et al. 2019, equation 25), as OTT does.

    Where particles lie far apart for `epsilon`, alternating updates would take very long.
    """
    kernel, weight = (cost / -epsilon).exp(), 1 / len(cost)
    scaling = torch.full_like(cost[0], math.sqrt(weight))
    missed = math.inf
    for _ in range(MOST_ITERATIONS):
        sums = kernel @ scaling
        missed = float((scaling * sums - weight).abs().sum())
        if missed < SETTLED:
            break
        scaling = (scaling * weight / sums).sqrt()
    _check_settled(missed, epsilon)
    return 2 * epsilon * float((scaling.log() - math.log(weight)).mean())


def _check_settled(missed: float, epsilon: float) -> None:
    if not missed < ALMOST_SETTLED:
        raise ValueError(
            f"The Sinkhorn divergence did not settle in {MOST_ITERATIONS} iterations with epsilon={epsilon:g}; "
            "give a larger epsilon."
        )


def _spacing(target: Trajectory) -> float:
    """Return the mean distance from a particle to the nearest other one of its scene, in the first frame."""
    start, active = target.initial, target.active[0]
    nearest = []
    for scene in range(start.num_scenes):
        here = rows_between(start.batch, scene)
        rows = torch.arange(here.start, here.stop, device=start.device)[active[here]]
        if len(rows) < 2:
            continue
        pairs = _squared_distances(target, {"x": start.positions.double()}, {"x": rows}, "xx")
        nearest += [block.kthvalue(2, dim=1).values.sqrt() for block in pairs]
    if not nearest:
        raise ValueError("The spacing of fewer than two particles is unknown; give cell, the side of a cell.")
    return float(torch.cat(nearest).mean())


def _grid(target: Trajectory, side: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower corner and sides of the cells that each particle is counted in, and how many go round, [n, d]."""
    start = target.initial
    lower = torch.zeros_like(start.positions, dtype=torch.float64)
    sides, counts = torch.full_like(lower, side), torch.zeros_like(lower)
    if "boundaries" in start:
        lower, upper = start.boundaries.double()[start.batch].unbind(1)
        if "periodic" in start:
            fitting = ((upper - lower) / side).round().clamp(min=1)
            periodic = start.periodic[start.batch]
            sides = torch.where(periodic, (upper - lower) / fitting, sides)
            counts = torch.where(periodic, fitting, counts)
    return lower, sides, counts


def _relative_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the difference of two lists of cells, counted, relative to the second's counts."""
    cells, which = torch.unique(torch.cat([ours, theirs]), dim=0, return_inverse=True)
    found, wanted = (torch.bincount(w, minlength=len(cells)).double() for w in (which[: len(ours)], which[len(ours) :]))
    return (found - wanted).square().sum().sqrt() / wanted.square().sum().sqrt()
