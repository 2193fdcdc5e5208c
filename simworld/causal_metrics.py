"""How well a simulator answers "what if": predicted counterfactuals against those of an engine.

Everything is computed in float64, over the entities that a case compares and over frames after frame 0, which is
given and not predicted. Sizes of effects are root mean squares over frames, entities and coordinates, so they are in
the unit of the field and cases of different sizes can be put side by side. A rollout that broke down (NaN, infinity)
is infinitely far from the truth: its error is inf and its gain is -inf, so that it is never dropped as unmeasured. NaN
is kept for what has no answer. Along periodic axes positions must be unwrapped first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROWN, SATURATED = 10.0, 0.01  # distances of twins from so many times the first to such a part of the largest count
FEWEST_FRAMES = 3  # that tell a growth
CLEARLY = 0.5  # of the squares that an exponential leaves: what leaves less fits better for more than chance
STEADY = 2.0  # power of time by which a steady acceleration drives bodies apart
FLIPPED = 0.5  # of the effect: noise that moves the truth farther has changed the answer


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question, its true answer and a predicted one: what was, and what would have been.

    Rollouts are [T, n, d]; frame 0 is the state at the intervention. `factual` and `counterfactual` are the truth
    without and with the intervention, `predicted_factual` and `predicted` the simulator's own rollouts without and
    with it. `compared` [n] are the entities that move freely and are there in both worlds: removed and fixed ones are
    left out, and their rows may hold anything. `touched` [n] are those that the intervention acted on. `dose` is in
    the unit of its kind, 0 for nothing.

    Raises:
        ValueError: shapes or dtypes do not fit, there is a single frame, nothing is compared, or the truth of
            what is compared or the dose is not finite.
    """

    factual: Tensor
    counterfactual: Tensor
    predicted_factual: Tensor
    predicted: Tensor
    compared: Tensor
    touched: Tensor
    dose: float

    def __post_init__(self) -> None:
        shape = list(self.factual.shape)
        if len(shape) != 3 or shape[0] < 2:
            raise ValueError(f"A case has rollouts [T, n, d] of two frames or more; got factual {shape}.")
        truth = {"factual": self.factual, "counterfactual": self.counterfactual}
        made = {"predicted_factual": self.predicted_factual, "predicted": self.predicted}
        for name, values in (truth | made).items():
            if list(values.shape) != shape or not values.is_floating_point():
                raise ValueError(
                    f"A case has four rollouts of floats of one shape, factual {shape}; got {name} "
                    f"{list(values.shape)} of {values.dtype}."
                )
        _check_flags("compared", self.compared, shape[1])
        _check_flags("touched", self.touched, shape[1])
        if not bool(self.compared.any()):
            raise ValueError("A case compares one entity or more; all of this one's are removed or fixed.")
        for name, values in truth.items():
            if not bool(values[:, self.compared].isfinite().all()):
                raise ValueError(f"The truth of a case is finite; {name} has NaN or infinity in a compared entity.")
        if not math.isfinite(self.dose):
            raise ValueError(f"The dose of a case is a finite number, 0 for nothing; got {self.dose!r}.")

    @property
    def effect(self) -> Tensor:
        """Return [T, n, d]: the true effect, tau* = counterfactual - factual."""
        return self.counterfactual.double() - self.factual.double()

    @property
    def predicted_effect(self) -> Tensor:
        """Return [T, n, d]: the effect that the simulator predicts, tau-hat = predicted - predicted_factual."""
        return self.predicted.double() - self.predicted_factual.double()


@dataclass(frozen=True, kw_only=True)
class EffectError:
    """The error of predicted effects in the unit of the field, and relative to the true effects' root mean square."""

    error: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class AverageEffectError:
    """The error of the average effect in the unit of the field, with the ends of its bootstrap interval."""

    error: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """How predicted effects grow with the dose.

    `rank` is the rank correlation of the dose with the size of the predicted effect, `true_rank` that with the size
    of the true one, and `slope` how many times as strong as the true effects the predicted ones are.
    """

    rank: float
    true_rank: float
    slope: float


def distance(a: Tensor, b: Tensor, compared: Tensor) -> float:
    """Return the root mean square of a - b, [T, n, d], over compared entities, coordinates and frames after frame 0.

    In the unit of a and b; inf where a difference is not finite.
    """
    return _size(a.double() - b.double(), compared)


def distance_per_frame(a: Tensor, b: Tensor, compared: Tensor) -> Tensor:
    """Return [T]: the root mean square of a - b, [T, n, d], over compared entities and coordinates of each frame."""
    return _squares(a.double() - b.double(), compared).mean((1, 2)).sqrt()


def cf_gain(case: Case, eps: float = 0.0) -> float:
    """Return 1 - d(predicted, counterfactual) / d(factual, counterfactual), d as in `distance`.

    1 for the truth, 0 for a copy of what was, below 0 for what is worse than ignoring the intervention; NaN where
    the true effect is not above `eps`, in the unit of the field.
    """
    effect = _size(case.effect, case.compared)
    return 1 - distance(case.predicted, case.counterfactual, case.compared) / effect if effect > eps else math.nan


def cf_gain_per_frame(case: Case, eps: float = 0.0) -> Tensor:
    """Return [T]: `cf_gain` of each frame, NaN at frame 0 and where the true effect is not above `eps`."""
    effect = distance_per_frame(case.factual, case.counterfactual, case.compared)
    missed = distance_per_frame(case.predicted, case.counterfactual, case.compared)
    gains = torch.where(effect > eps, 1 - missed / effect, torch.nan)
    gains[0] = torch.nan
    return gains


def effect_error(cases: Sequence[Case]) -> EffectError:
    """Return the root over cases of the mean squared size of tau-hat - tau*, each case counting the same.

    The "precision in estimation of heterogeneous effects" (Hill 2011) of effects that are rollouts. An error
    that both of the simulator's rollouts share cancels. Relative is NaN where nothing has a true effect.
    """
    _check_some(cases)
    missed = _root_mean_square([_size(case.predicted_effect - case.effect, case.compared) for case in cases])
    return EffectError(
        error=missed, relative=_ratio(missed, _root_mean_square([_size(case.effect, case.compared) for case in cases]))
    )


def average_effect_error(
    cases: Sequence[Case], *, num_samples: int = 2000, level: float = 0.95, seed: int = 0
) -> AverageEffectError:
    """Return how far the average predicted effect is from the average true one, over cases of one kind.

    Cases may differ in their entities, so each is summarized by its mean effect over compared entities at each
    frame, [T, d]; these are averaged over cases, each counting the same. The error is the root mean square of the
    difference over frames after frame 0 and coordinates. Effects of opposite directions cancel, as they do in any
    average effect. The interval is that of `bootstrap` over cases; a size cannot be below 0, so for a nearly exact
    simulator the interval lies above it.

    Raises:
        ValueError: there are no cases, or they differ in their frames or coordinates.
    """
    _check_some(cases)
    kinds = sorted({(len(case.factual), case.factual.shape[2]) for case in cases})
    if len(kinds) > 1:
        raise ValueError(f"Average effects are of cases of as many frames and coordinates; got (T, d) {kinds}.")
    missed = [(case.predicted_effect - case.effect)[1:, case.compared].mean(1) for case in cases]
    missed = [part.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf) for part in missed]

    def size(rows: Tensor) -> Tensor:
        return rows.mean(0).square().mean().sqrt()

    summaries = torch.stack(missed)
    low, high = bootstrap(summaries, size, num_samples=num_samples, level=level, seed=seed)
    return AverageEffectError(error=float(size(summaries)), low=low, high=high)


def direction_cosine(case: Case) -> float:
    """Return the cosine between tau-hat and tau*, flattened.

    NaN where there is no true effect; 0 where the predicted effect is 0 or not finite, and so has no direction.
    """
    predicted, true = (effect[1:, case.compared].flatten() for effect in (case.predicted_effect, case.effect))
    if not bool(true.any()):
        return math.nan
    if not bool(predicted.any()) or not bool(predicted.isfinite().all()):
        return 0.0
    one, other = (values / values.abs().max() for values in (predicted, true))  # squares neither over- nor underflow
    return float((one @ other) / (one.norm() * other.norm()))


def sign_agreement(case: Case, eps: float = 0.0) -> float:
    """Return the share of components with |tau*| > `eps` whose predicted effect has the same sign; NaN without any."""
    predicted, true = (effect[1:, case.compared] for effect in (case.predicted_effect, case.effect))
    large = true.abs() > eps
    same = (predicted.sign() == true.sign()) & large
    return _ratio(int(same.sum()), int(large.sum()))


def dose_response(cases: Sequence[Case]) -> DoseResponse:
    """Return how predicted effects grow with the dose, over cases of one episode and one kind at several doses.

    Ranks are `spearman` of |dose|; the slope is of least squares through the origin, of the sizes of tau-hat on
    those of tau*. NaN where there is no true effect, or for ranks where doses or effects do not differ.
    """
    _check_some(cases)
    doses = torch.tensor([abs(case.dose) for case in cases], dtype=torch.float64)
    predicted = torch.tensor([_size(case.predicted_effect, case.compared) for case in cases], dtype=torch.float64)
    true = torch.tensor([_size(case.effect, case.compared) for case in cases], dtype=torch.float64)
    there = true > 0
    return DoseResponse(
        rank=spearman(doses, predicted),
        true_rank=spearman(doses, true),
        slope=_ratio(float((predicted * true)[there].sum()), float(true.square().sum())),
    )


def affected_auroc(case: Case, eps: float, *, among: Tensor | None = None) -> float:
    """Return the area under the ROC curve of the largest |tau-hat_j| as a score of who is affected, |tau*_j| > `eps`.

    Lengths are the largest over frames after frame 0. `among` [n] narrows the compared entities, for example to
    those not touched, of whom the question does not say that they are affected. Ties count half; NaN where all or
    none are affected.
    """
    scores, affected = _scored(case, eps, among)
    positives, negatives = int(affected.sum()), int((~affected).sum())
    if not positives or not negatives:
        return math.nan
    return float((_ranks(scores)[affected].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def affected_average_precision(case: Case, eps: float, *, among: Tensor | None = None) -> float:
    """Return the average precision of the score of `affected_auroc`: sum of precision times the step of recall.

    Entities of one score are taken together. NaN where all or none are affected.
    """
    scores, affected = _scored(case, eps, among)
    positives = int(affected.sum())
    if not positives or positives == len(affected):
        return math.nan
    levels, place, counts = torch.unique(-scores, return_inverse=True, return_counts=True)
    found = torch.zeros(len(levels), dtype=torch.float64, device=scores.device).index_add_(0, place, affected.double())
    return float((found.cumsum(0) / counts.cumsum(0) * found).sum() / positives)


def leakage(case: Case, reachable: Tensor) -> float:
    """Return the largest |tau-hat_j| over frames and compared entities out of reach; 0 where all are in reach.

    `reachable` [n] is the intervention's light cone, as `light_cone` has it.
    """
    _check_flags("reachable", reachable, len(case.compared))
    lengths = _lengths(case.predicted_effect, case.compared & ~reachable)
    return float(lengths.max()) if len(lengths) else 0.0


def light_cone(pairs_per_step: Sequence[Tensor], touched: Tensor, hops_per_step: int = 1) -> Tensor:
    """Return [n] bool: who can be reached from the touched entities, themselves included, along edges.

    `pairs_per_step` has the edges [2, e] of each step, of both worlds together, taken in either direction;
    `hops_per_step` are the rounds of message passing of one step.

    Raises:
        ValueError: edges are not [2, e] or name entities that `touched` [n] does not have, or there is no hop.
    """
    _check_flags("touched", touched, len(touched))
    if hops_per_step < 1:
        raise ValueError(f"hops_per_step must be 1 or more; got {hops_per_step}.")
    reached = touched.clone()
    for pairs in pairs_per_step:
        if pairs.ndim != 2 or len(pairs) != 2 or pairs.is_floating_point():
            raise ValueError(f"Edges are entity numbers [2, e]; got {list(pairs.shape)} of {pairs.dtype}.")
        if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < len(touched):
            raise ValueError(
                f"Edges name entities 0 to {len(touched) - 1}; got {int(pairs.min())} to {int(pairs.max())}."
            )
        ends, others = torch.cat([pairs, pairs.flip(0)], 1).long()
        for _ in range(hops_per_step):
            before = reached
            reached = before.clone()
            reached[others[before[ends]]] = True
            if bool((reached == before).all()):
                break
    return reached


def lyapunov_time(twin_distances: Tensor, dt: float, *, scale: float | None = None) -> float:
    """Return the time [s] in which runs that were put slightly apart get e times as far apart.

    `twin_distances` is [T], or [k, T] for k pairs of runs, whose geometric mean is taken; frames are `dt` [s] apart.
    A line is fitted to the logarithm of the distance over the frames from the first of 10 times the distance in frame
    0 to the last before it passes a hundredth of `scale`, in the same unit, or of the largest distance. Give the size
    of the world as `scale` where runs end before their distance has stopped growing, and several pairs where
    distances grow by leaps, at collisions.

    The result is inf where growth is not exponential: there are fewer than 3 such frames, the slope is not above 0,
    or a power of time, the second at most, leaves less than half of the squares that an exponential leaves, as for
    bodies that fly apart at a steady speed or acceleration.

    Raises:
        ValueError: distances are not [T] or [k, T], not finite, or 0 in frame 0; `dt` or `scale` is not positive.
    """
    apart = twin_distances.double()
    if apart.ndim not in (1, 2) or not apart.numel():
        raise ValueError(f"Distances of twins are [T] or [k, T]; got {list(apart.shape)}.")
    if not bool(apart.isfinite().all()) or bool((apart < 0).any()) or bool((apart[..., 0] == 0).any()):
        raise ValueError("Distances of twins must be finite, and above 0 in frame 0: put the runs apart there.")
    if not dt > 0 or (scale is not None and not scale > 0):
        raise ValueError(f"dt and scale must be above 0; got {dt!r} and {scale!r}.")
    smallest = torch.finfo(torch.float64).tiny
    logarithms = apart.reshape(-1, apart.shape[-1]).clamp(min=smallest).log().mean(0)
    top = float(logarithms.max()) if scale is None else math.log(scale)
    grown = logarithms >= logarithms[0] + math.log(GROWN)
    saturated = logarithms > top + math.log(SATURATED)
    first, last = _first(grown), _first(saturated)
    if last - first < FEWEST_FRAMES:
        return math.inf
    frames = torch.arange(first, last, dtype=torch.float64, device=apart.device)
    slope, missed = _line(frames, logarithms[first:last])
    power, missed_by_power = _line(frames.log(), logarithms[first:last])
    steady = power <= STEADY and missed_by_power < CLEARLY * missed
    return dt / slope if slope > 0 and not steady else math.inf


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] = torch.mean,
    *,
    num_samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the ends of the percentile interval of a statistic of values [k, ...], drawn again with replacement.

    `statistic` takes rows [k, ...] to one number, by operations that torch.vmap knows. Rows with NaN are dropped;
    without rows the ends are NaN. The same `seed` gives the same interval (Efron 1979).
    """
    _check_level(level)
    if num_samples < 1:
        raise ValueError(f"num_samples must be 1 or more; got {num_samples}.")
    if not values.ndim:
        raise ValueError("bootstrap needs values [k, ...], a row for each case; got a single number.")
    rows = values.double()
    rows = rows[~rows.reshape(len(rows), -1).isnan().any(1)] if len(rows) else rows
    if not len(rows):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (num_samples, len(rows)), generator=generator).to(rows.device)
    found = torch.vmap(lambda sample: statistic(rows[sample]), chunk_size=64)(drawn).sort().values
    # Values of the sample itself, none between two: between infinity and a number there is nothing to interpolate.
    out = int((1 - level) / 2 * (num_samples - 1))
    return float(found[out]), float(found[num_samples - 1 - out])


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two lists [k], with average ranks for ties; NaN where one does not vary."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"Rank correlation is of two lists of one length; got {list(a.shape)} and {list(b.shape)}.")
    if bool(a.isnan().any() | b.isnan().any()) or len(a) < 2:
        return math.nan
    one, other = (ranks - ranks.mean() for ranks in (_ranks(a.double()), _ranks(b.double())))
    return _ratio(float(one @ other), float(one.norm() * other.norm()))


def crps_ensemble(members: Tensor, truth: Tensor) -> Tensor:
    """Return [...]: the continuous ranked probability score of members [k, ...], in the unit of the truth [...].

    That of the members' empirical distribution: E|X - y| - E|X - X'| / 2, for one member the absolute error
    (Gneiting and Raftery 2007).
    """
    _check_members(members, truth)
    ordered, count = members.double().sort(0).values, len(members)
    weights = 2 * torch.arange(1, count + 1, dtype=torch.float64, device=members.device) - count - 1
    spread: Tensor = torch.tensordot(weights, ordered, dims=1) / count**2
    return (ordered - truth.double()).abs().mean(0) - spread


def coverage(members: Tensor, truth: Tensor, level: float) -> float:
    """Return the share of values [...] inside the central interval that an ensemble [k, ...] gives a chance of `level`.

    The ends lie at positions p (k + 1) of the ordered members, so that a truth that is drawn like a member falls
    inside as often as `level` says. That takes (1 + level) / (1 - level) members, 3 for 0.5 and 19 for 0.9; fewer
    cannot claim as much, and give the interval from the least to the largest of them.
    """
    _check_members(members, truth)
    _check_level(level)
    ordered, wanted = members.double().sort(0).values, truth.double()
    position = max((1 - level) / 2 * (len(members) + 1) - 1, 0.0)
    below = min(int(position), len(members) - 1)
    above, part = min(below + 1, len(members) - 1), position - below
    low, high = (torch.lerp(side[below], side[above], part) for side in (ordered, ordered.flip(0)))
    return float(((wanted >= low) & (wanted <= high)).double().mean())


def flips(counterfactual: Tensor, noisy_counterfactual: Tensor, factual: Tensor, compared: Tensor) -> bool:
    """Return whether a case's true answer hangs on noise: the sieve that drops cases no simulator can be asked.

    `noisy_counterfactual` is the truth once more, from a start with noise (of 1e-4, say). The answer flips where the
    two are farther apart than half of the effect, distances as in `distance`.
    """
    noise = distance(noisy_counterfactual, counterfactual, compared)
    return noise > FLIPPED * distance(factual, counterfactual, compared)


def _squares(differences: Tensor, compared: Tensor) -> Tensor:
    return differences[:, compared].square().nan_to_num(nan=math.inf, posinf=math.inf)


def _size(differences: Tensor, compared: Tensor) -> float:
    return float(_squares(differences, compared)[1:].mean().sqrt())


def _lengths(effect: Tensor, among: Tensor) -> Tensor:
    """Return [m]: the largest length of each entity's effect over frames after frame 0; inf where it is not finite."""
    lengths: Tensor = effect[1:, among].norm(dim=2)
    return lengths.nan_to_num(nan=math.inf, posinf=math.inf).amax(0)


def _scored(case: Case, eps: float, among: Tensor | None) -> tuple[Tensor, Tensor]:
    chosen = case.compared
    if among is not None:
        _check_flags("among", among, len(chosen))
        chosen = chosen & among
    return _lengths(case.predicted_effect, chosen), _lengths(case.effect, chosen) > eps


def _ranks(values: Tensor) -> Tensor:
    """Return [k]: the places of values in their order from 1, those of equal values averaged."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    return ranks


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the slope of the line of least squares, and the sum of squares that it leaves."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float((y - slope * x).square().sum())


def _first(flags: Tensor) -> int:
    """Return where the first True is; the length where there is none."""
    found = flags.nonzero()
    return int(found[0]) if len(found) else len(flags)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _root_mean_square(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())


def _check_some(cases: Sequence[Case]) -> None:
    if not cases:
        raise ValueError("There are no cases to measure; give one or more.")


def _check_flags(name: str, flags: Tensor, count: int) -> None:
    if flags.dtype != torch.bool or flags.shape != (count,):
        raise ValueError(f"{name} must be bool, [{count}]; got {list(flags.shape)} of {flags.dtype}.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")


def _check_members(members: Tensor, truth: Tensor) -> None:
    if not members.ndim or not len(members) or members.shape[1:] != truth.shape:
        raise ValueError(
            f"An ensemble has members [k, ...] of a truth [...]; got {list(members.shape)} and {list(truth.shape)}."
        )
