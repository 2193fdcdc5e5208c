"""Abduction: hidden parameters of a world, inferred from what was observed of it, with their uncertainty.

An observed trajectory is cut into windows (multiple shooting), each rolled out from its first, observed, frame;
what the simulator misses at its last frame is explained by other parameters. Copies of the world with other
parameters are scenes of one rollout, so slopes are differences of outcomes: any simulator can be asked, also one
that passes no gradients, and what it computes need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from simworld.expressions import Expression
from simworld.intervene import Entities
from simworld.prescriptions import script
from simworld.simulate import Intervention, Simulator, check_suits, rollout
from simworld.space import shortest
from simworld.state import State
from simworld.trajectory import Trajectory

STEP = 1e-2  # of the differences that slopes are made of, in coordinates of spread 1
MAX_STEP = 2.0
DAMPINGS = (1e-8, 1e-4, 1e-2, 1e-1, 1.0, 10.0, 1e3)
IMPROVED = 1e-2  # nats of likelihood: less than that tells no parameters apart
ENTITIES_AT_ONCE = 2**15
FREEDOM, NORMAL, SCALE_ROUNDS = 4.0, 1e9, 20  # of Student's t distribution; as good as a normal one
ROUNDING = 100  # in units of the last place: what a rollout misses for no other reason


@dataclass(frozen=True, kw_only=True)
class Abduction:
    """Inferred parameters of a world, and how well they are known.

    `state` is the first observed state with the inferred values: to be acted upon and rolled out. `values`, `stds`
    and `starts` [num_starts, ...] have a row for each row of the field; rows that were given have no deviation.
    `error` is the root mean square of what the simulator misses at the ends of windows beside that of what changed
    within them, over all fields: 0 where it misses nothing, 1 where it is no better than a world at rest.
    `error_at_start` is that of the parameters that the search started from.
    """

    state: State
    values: Mapping[str, Tensor]
    stds: Mapping[str, Tensor]
    starts: Mapping[str, Tensor]
    error: float
    error_at_start: float
    _posterior: _Posterior = field(repr=False)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0) -> State:
        """Return `count` scenes: the state with parameters drawn from the posterior, for an ensemble."""
        if count < 1:
            raise ValueError(f"sample() draws 1 scene or more; got count={count}.")
        drawn = self._posterior.parameters.values(self._posterior.sample(count, seed))
        return self.state.repeat(count).replace(**{name: value.flatten(0, 1) for name, value in drawn.items()})


@torch.no_grad()
def abduct(
    observed: Trajectory,
    *names: str,
    simulator: Simulator | None = None,
    entities: Entities | None = None,
    interventions: Sequence[Intervention] = (),
    window: int = 10,
    num_windows: int | None = None,
    num_starts: int = 4,
    start: Mapping[str, Tensor] | None = None,
    max_iterations: int = 30,
    prior_std: float = 3.0,
    seed: int = 0,
) -> Abduction:
    """Return the static fields `names` with which a simulator explains an observed trajectory of one scene.

    The search starts from what the first state says of them, or from `start`, and from `num_starts` - 1 further
    values drawn round it. `entities` are the rows to be inferred, all if None; others are taken as given. Windows of
    `window` steps are taken one after the other; `num_windows` takes fewer of them, or more that overlap, evenly
    spread. Recorded actions act, kinematic entities follow the recording; `interventions` see all windows as scenes
    of one state and count steps from their beginnings.

    Parameters are searched as logarithms where a field must be positive, and otherwise in units of the root mean
    square of their start. In these coordinates the prior is a normal distribution round the start of standard
    deviation `prior_std`: what the observation says nothing of keeps it.

    What is missed at the last frames of windows has Student's t distribution of 4 degrees of freedom (Lange et al.
    1989), as a window in which bodies pass close by is missed by far more than others, with a scale for each field of
    each entity that is inferred too: one body may move by 1e-5 of what another does and still be what tells the mass
    of a third, and no simulator is equally wrong about all. Frames within a window are missed alike, so they are not
    counted; windows that overlap count as many as lie side by side.

    The search goes by Gauss-Newton steps, several dampings (Levenberg 1944, Marquardt 1963) tried at once, first on
    windows of a single step. The standard deviations are those of Laplace's approximation round all ends of the search,
    each weighted by its posterior probability, larger where windows contradict each other. What is missed in the same
    way in all windows is bias, which no deviation shows.

    Fields are known only as far as forces and motion depend on them: charges up to the sign of all together, masses
    under springs or contacts up to a common factor. Let `entities` leave one out, whose value is given.

    Raises:
        ValueError: a field is not static, not of floating-point numbers or not known, windows are longer than the
            trajectory, there are several scenes, numbers are not finite, or a rollout of them goes to pieces.
    """
    simulator = observed.initial.simulator if simulator is None else simulator
    if simulator is None:
        raise ValueError("This trajectory is tied to no simulator; pass abduct(..., simulator=...).")
    observed = _prepared(observed, names, start)
    check_suits("The simulator", simulator, observed)
    if not 1 <= window <= observed.num_steps:
        raise ValueError(
            f"window must be from 1 to the {observed.num_steps} steps that were observed; got {window}. Shorten it."
        )
    fit = 1 if num_windows is None else num_windows
    if min(fit, num_starts) < 1 or max_iterations < 0 or not 0 < prior_std < math.inf:
        raise ValueError(
            "abduct() needs 1 or more num_windows and num_starts, 0 or more max_iterations and a positive prior_std; "
            f"got {num_windows}, {num_starts}, {max_iterations} and {prior_std}."
        )
    parameters = _Parameters.of(observed.initial, names, entities)
    shots = _Shots(observed, simulator, interventions, window, num_windows)
    likelihood = _Likelihood(shots, parameters, prior_std)
    seeded = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_starts, parameters.count, dtype=torch.float64, generator=seeded)
    drawn[0] = 0
    points = drawn.to(observed.initial.device) * min(prior_std, 1)
    # Within one step forces add up, and outcomes have no other optimum to be caught in.
    single = shots if window == 1 else _Shots(observed, simulator, interventions, 1, window * len(shots))
    near = _descend(_Likelihood(single, parameters, prior_std, plain=True), points, max_iterations)
    points = torch.where((likelihood.at(near) < likelihood.at(points))[:, None], near, points)
    return _found(observed, likelihood, _descend(likelihood, points, max_iterations))


def _found(observed: Trajectory, likelihood: _Likelihood, ends: Tensor) -> Abduction:
    posterior = likelihood.posterior(ends)
    best = int(posterior.costs.argmin())
    parameters = likelihood.parameters
    values = {name: value[best] for name, value in parameters.values(ends).items()}
    errors = likelihood.errors(torch.stack([ends[best], torch.zeros_like(ends[best])]))
    return Abduction(
        state=observed.initial.replace(**values),
        values=values,
        stds=parameters.stds(ends[best], posterior.stds(best)),
        starts=parameters.values(ends),
        error=float(errors[0]),
        error_at_start=float(errors[1]),
        _posterior=posterior,
    )


def _prepared(observed: Trajectory, names: Sequence[str], start: Mapping[str, Tensor] | None) -> Trajectory:
    """Return the trajectory with the values from which to start, all checked."""
    state, given = observed.initial, dict(start or {})
    if not names or len(set(names)) < len(names):
        raise ValueError(f'abduct() infers fields, each named once, as in abduct(observed, "masses"); got {names}.')
    possible = [name for name, declared in state.fields.items() if declared.static and declared.kind == "float"]
    if wrong := [name for name in names if name not in possible]:
        raise ValueError(f"abduct() infers static fields of numbers, {', '.join(possible)}; got '{wrong[0]}'.")
    if unused := [name for name in given if name not in names]:
        raise ValueError(f"start is for the fields to be inferred, {', '.join(names)}; got '{unused[0]}'.")
    if missing := [name for name in names if name not in state and name not in given]:
        raise ValueError(
            f"The observed states carry no {missing[0]}; say where to start, start={{'{missing[0]}': tensor}}."
        )
    if state.num_scenes != 1:
        raise ValueError(
            f"abduct() infers the parameters of one scene; got {state.num_scenes}. Give one of observed.scenes()."
        )
    if lacking := [name for name in state.dynamic_fields if name not in observed.frames]:
        raise ValueError(f"The observed frames lack {', '.join(lacking)}, without which no window can start.")
    observed.check_finite()
    given = {name: torch.as_tensor(value, dtype=state.dtype, device=state.device) for name, value in given.items()}
    return replace(observed, initial=state.replace(**given))


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """The coordinates [..., p] of the parameters: 0 at the start; of positive fields logarithms."""

    state: State
    rows: Mapping[str, Tensor]
    scales: Mapping[str, float | None]  # None: a logarithm

    @staticmethod
    def of(state: State, names: Sequence[str], entities: Entities | None) -> _Parameters:
        rows: dict[str, Tensor] = {}
        scales: dict[str, float | None] = {}
        for name in names:
            told = Expression(entities) if isinstance(entities, str) else entities
            chosen = told.entities(state) if isinstance(told, Expression) else told
            rows[name] = _rows(chosen, name, len(state[name])).to(state.device)
            size = float(state[name][rows[name]].double().square().mean().sqrt())
            scales[name] = None if state.fields[name].limits == "positive" else size or 1.0
        return _Parameters(state=state, rows=rows, scales=scales)

    @property
    def count(self) -> int:
        return sum(self.state[name][rows].numel() for name, rows in self.rows.items())

    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return the fields at points [k, p], each [k, rows, ...], those rows included that are given."""
        made, first = {}, 0
        for name, rows in self.rows.items():
            current = self.state[name]
            start = current[rows].double()
            here = points[:, first : first + start.numel()].reshape(len(points), *start.shape)
            scale = self.scales[name]
            value = start * here.exp() if scale is None else start + scale * here
            made[name] = current.repeat(len(points), *[1] * current.ndim).index_copy(1, rows, value.to(current.dtype))
            first += start.numel()
        return made

    def stds(self, point: Tensor, stds: Tensor) -> dict[str, Tensor]:
        """Return deviations of the fields, to first order, from those of the coordinates [p] at a point [p]."""
        slopes, first = {}, 0
        for name, value in self.values(point[None]).items():
            rows, scale = self.rows[name], self.scales[name]
            size = value[0, rows].numel()
            here = stds[first : first + size].view(value[0, rows].shape).to(value.dtype)
            slope = value[0, rows] if scale is None else torch.full_like(here, scale)
            slopes[name] = torch.zeros_like(value[0]).index_copy(0, rows, slope * here)
            first += size
        return slopes


def _rows(entities: Tensor | Sequence[int] | int | None, name: str, count: int) -> Tensor:
    if entities is None:
        return torch.arange(count)
    chosen = torch.as_tensor(entities)
    if chosen.dtype == torch.bool and len(chosen) != count:
        raise ValueError(f"abduct() got a mask of {len(chosen)} entities; '{name}' has {count} rows.")
    if chosen.is_floating_point() and len(chosen.reshape(-1)):
        raise ValueError(f"abduct() takes entity numbers or a mask of entities; got {chosen.dtype}.")
    rows = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen.long().reshape(-1)
    if not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < count or len(set(rows.tolist())) < len(rows):
        raise ValueError(
            f"abduct() got entities {rows.tolist()}; name one or more, each once, of rows 0 to {count - 1} of '{name}'."
        )
    return rows


class _Shots:
    """The windows of an observed trajectory, and what a simulator misses at their ends."""

    def __init__(
        self,
        observed: Trajectory,
        simulator: Simulator,
        interventions: Sequence[Intervention],
        window: int,
        count: int | None,
    ) -> None:
        self.simulator, self.interventions, self.length = simulator, tuple(interventions), window
        side_by_side = observed.num_steps // window
        count = side_by_side if count is None else count
        starts = torch.linspace(0, observed.num_steps - window, count).long().tolist() if count > 1 else [0]
        starts = list(dict.fromkeys(starts))
        self.share = min(1.0, side_by_side / len(starts))
        self.size = len(observed.initial)
        at_once = max(1, ENTITIES_AT_ONCE // self.size)
        self.parts = [
            Trajectory.cat([observed.window(t, t + window + 1) for t in starts[k : k + at_once]])
            for k in range(0, len(starts), at_once)
        ]
        self._copies: dict[tuple[int, int], tuple[Trajectory, tuple[Intervention, ...]]] = {}

    def __len__(self) -> int:
        return sum(part.initial.num_scenes for part in self.parts)

    def missed(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return [k, w, q]: what is missed of all fields at the ends of windows with each of k sets of parameters."""
        count = len(next(iter(values.values())))
        found = []
        for number, part in enumerate(self.parts):
            at_once = max(1, ENTITIES_AT_ONCE // len(part.initial))
            pieces = [
                self._missed(number, {name: value[k : k + at_once] for name, value in values.items()})
                for k in range(0, count, at_once)
            ]
            found.append(torch.cat(pieces))
        return torch.cat(found, 1)

    def changed(self) -> Tensor:  # [w, q], within the windows
        return torch.cat([_apart(part, part.frame(0)) for part in self.parts])

    def _missed(self, number: int, values: Mapping[str, Tensor]) -> Tensor:
        count, windows = len(next(iter(values.values()))), self.parts[number].initial.num_scenes
        if (number, count) not in self._copies:
            made = Trajectory.cat([self.parts[number]] * count)
            self._copies[number, count] = made, (*script(made), *self.interventions)
        target, interventions = self._copies[number, count]
        rows = {k: v[:, None].expand(-1, windows, *v.shape[1:]).flatten(0, 2) for k, v in values.items()}
        try:
            end = rollout(
                target.initial.replace(**rows),
                target.actions,
                simulator=self.simulator,
                num_steps=self.length,
                interventions=interventions,
                every=self.length,
            ).frame(-1)
        except ValueError as error:
            raise ValueError(
                f"The simulator does not take a world that abduct() tried: {error} Give a smaller prior_std, shorter "
                "windows or another start."
            ) from error
        return _apart(target, end).view(count, windows, -1)

    def groups(self) -> tuple[Tensor, Tensor]:
        """Return the number of the field and entity [q] of each number that can be missed, and that of the field."""
        state, groups, fields, first = self.parts[0].initial, [], [], 0
        for number, name in enumerate(state.dynamic_fields):
            rows, columns = self.size if state.fields[name].per == "entity" else 1, state[name][0].numel()
            groups.append((first + torch.arange(rows)).repeat_interleave(columns))
            fields.append(torch.full((rows * columns,), number))
            first += rows
        return torch.cat(groups).to(state.device), torch.cat(fields).to(state.device)

    def sizes(self) -> Tensor:
        """Return [w, q]: all fields at the ends of windows, beside which rounding is small."""
        ends = [part.frame(-1) for part in self.parts]
        columns = [[end[name].double().reshape(end.num_scenes, -1) for name in end.dynamic_fields] for end in ends]
        return torch.cat([torch.cat(found, 1) for found in columns])


def _apart(target: Trajectory, state: State) -> Tensor:
    """Return [scenes, q]: the last frame of a trajectory less a state, 0 for entities that are not there in both."""
    last = target.frame(-1)
    there = last.active & state.active
    made = []
    for name in last.dynamic_fields:
        away, declared = last[name].double() - state[name].double(), last.fields[name]
        if name == "positions":
            away = shortest(last, away)
        if declared.limits == "unit length":
            same = (last[name] * state[name]).sum(-1, keepdim=True) >= 0
            away = torch.where(same, away, last[name].double() + state[name].double())
        if declared.per == "entity":
            away = torch.where(there.view(-1, *[1] * (away.ndim - 1)), away, 0.0)
        made.append(away.reshape(last.num_scenes, -1))
    return torch.cat(made, 1)


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """Normal distributions round the ends of the search [k, p], weighted by how probable each is."""

    parameters: _Parameters
    ends: Tensor
    costs: Tensor
    covariances: Tensor

    @property
    def weights(self) -> Tensor:
        heights = 0.5 * torch.logdet(self.covariances) - self.costs
        return (heights - heights.max()).softmax(0)

    def stds(self, about: int) -> Tensor:
        """Return [p]: root mean square distances of the distribution from one of the ends."""
        spread = self.covariances.diagonal(dim1=1, dim2=2) + (self.ends - self.ends[about]).square()
        return (self.weights[:, None] * spread).sum(0).sqrt()

    def sample(self, count: int, seed: int) -> Tensor:
        """Return points [count, p], drawn."""
        drawn = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.weights.cpu(), count, replacement=True, generator=drawn).to(self.ends.device)
        normal = torch.randn(count, self.ends.shape[1], 1, dtype=torch.float64, generator=drawn).to(self.ends)
        off: Tensor = torch.linalg.cholesky(self.covariances)[chosen] @ normal
        return self.ends[chosen] + off[..., 0]


class _Likelihood:
    """The negative logarithm of the posterior of points [k, p], and its slopes.

    Each group, a field of an entity, has a scale of its own by which it is missed. From far away that would let some
    groups be explained at the cost of others, and strokes of chance be taken for outliers: a `plain` one has one scale,
    times what changes in each group, and (almost) normal distributions.
    """

    def __init__(self, shots: _Shots, parameters: _Parameters, prior_std: float, *, plain: bool = False) -> None:
        self.shots, self.parameters, self.prior, self.plain = shots, parameters, 1 / prior_std**2, plain
        self.freedom = NORMAL if plain else FREEDOM
        self.group, self.field = shots.groups()
        sizes, self.changes = shots.sizes().square().mean(0), shots.changed().square().mean(0)
        self.width = self._totals(torch.ones_like(sizes), self.group)
        # What is missed by rounding alone tells nothing; without a floor, it would weigh without limit.
        rounding = (ROUNDING * torch.finfo(parameters.state.dtype).eps) ** 2
        self.floor = (rounding * self._totals(sizes, self.group) / self.width).clamp(min=1e-60)
        self.change = self._totals(self.changes, self.group) / self.width + self.floor

    def _totals(self, values: Tensor, groups: Tensor) -> Tensor:
        """Return sums over groups [..., g] of [..., q]."""
        zeros = values.new_zeros(*values.shape[:-1], int(groups.max()) + 1)
        totals: Tensor = zeros.index_add(-1, groups, values)
        return totals

    def missed(self, points: Tensor) -> Tensor:
        """Return [k, w, q]: what is missed with the parameters at points."""
        return self.shots.missed(self.parameters.values(points))

    def _scaled(self, missed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return squares of what is missed [k, w, g], their most probable scales [k, 1, g], and weights [k, w, g]."""
        squares = self._totals(missed.square(), self.group)
        weights = torch.ones_like(squares)
        for _ in range(SCALE_ROUNDS):
            scales = (weights * squares).mean(1, keepdim=True) / self.width
            if self.plain:
                scales = self.change * (scales / self.change * self.width).sum(-1, keepdim=True) / self.width.sum()
            scales = scales.maximum(self.floor)
            weights = (self.freedom + self.width) / (self.freedom + squares / scales)
        return squares, scales, weights

    def at(self, points: Tensor) -> Tensor:
        return self.costs(points, self.missed(points))

    def costs(self, points: Tensor, missed: Tensor) -> Tensor:
        """Return [k]: the cost of points, from what is missed there."""
        squares, scales, _ = self._scaled(missed)
        tails = (self.freedom + self.width) * (squares / (self.freedom * scales)).log1p()
        fitted: Tensor = 0.5 * self.shots.share * (tails + self.width * scales.log()).sum((1, 2))
        return fitted + 0.5 * self.prior * points.square().sum(-1)

    def model(self, points: Tensor, missed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slopes [k, p, w] of each window's cost, and the curvature [k, p, p] of all by Gauss and Newton.

        Both without the prior's. The scales' own slopes vanish, as they are the most probable.
        """
        count = points.shape[1]
        off = STEP * torch.eye(count, dtype=points.dtype, device=points.device)
        _, scales, weights = self._scaled(missed)
        heights = (self.shots.share * weights / scales)[..., self.group]
        slopes, curvatures = [], []
        for point, miss, height in zip(points, missed, heights, strict=True):
            ends = self.missed(point + torch.cat([off, -off])).view(2, count, -1)
            jacobian = (ends[0] - ends[1]) / (2 * STEP)  # [p, w q]
            weighted = jacobian * height.flatten()
            slopes.append((weighted.view(count, *miss.shape) * miss).sum(-1))
            curvatures.append(weighted @ jacobian.T)
        return torch.stack(slopes), torch.stack(curvatures)

    def posterior(self, ends: Tensor) -> _Posterior:
        """Return the distribution round the ends of the search [k, p].

        Where slopes scatter from window to window by more than the curvature says (few windows tell, and they are
        missed by more than the others), they say how well parameters are known: the sandwich of Huber 1967 and White
        1982, in the directions in which it is the larger.
        """
        missed = self.missed(ends)
        slopes, curvature = self.model(ends, missed)
        numbers = self.shots.share * len(self.shots) * float((self.changes > 0).sum())
        told = max(1 - ends.shape[1] / max(numbers, 1), 1e-3)  # scales are of what is left after the parameters' fit
        unit = torch.eye(ends.shape[1]).to(ends)
        root = torch.linalg.cholesky(told * curvature + self.prior * unit)
        back = torch.linalg.solve_triangular(root, unit.expand_as(root), upper=False)
        scatter = slopes @ slopes.mT / self.shots.share - told * curvature
        sizes, ways = torch.linalg.eigh(back @ scatter @ back.mT)
        excess = torch.diag_embed(1 + sizes.clamp(min=0))
        covariances = back.mT @ ways @ excess @ ways.mT @ back
        costs = self.costs(ends, missed)
        return _Posterior(parameters=self.parameters, ends=ends, costs=costs, covariances=covariances)

    def errors(self, points: Tensor) -> Tensor:
        """Return [k]: root mean squares of what is missed over those of what changed, over all fields that change."""
        changed = self._totals(self.changes, self.field)
        missed = self._totals(self.missed(points).square().mean(1), self.field)
        return (missed[:, changed > 0] / changed[changed > 0]).mean(1).sqrt()


def _descend(likelihood: _Likelihood, points: Tensor, max_iterations: int) -> Tensor:
    """Return where damped Gauss-Newton steps from points [k, p] end."""
    points, missed = points.clone(), likelihood.missed(points)
    costs = likelihood.costs(points, missed)
    running = torch.arange(len(points), device=points.device)
    dampings = torch.tensor(DAMPINGS, dtype=points.dtype, device=points.device)
    for _ in range(max_iterations):
        here = points[running]
        slopes, curvature = likelihood.model(here, missed[running])
        slope = slopes.sum(-1) + likelihood.prior * here
        curvature = curvature + likelihood.prior * torch.eye(here.shape[1]).to(here)
        diagonal = torch.diag_embed(curvature.diagonal(dim1=1, dim2=2))
        damped = curvature[:, None] + dampings[:, None, None] * diagonal[:, None]
        way = -torch.linalg.solve(damped, slope[:, None, :, None].expand(-1, len(dampings), -1, -1))[..., 0]
        way = way * (MAX_STEP / way.abs().amax(-1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
        tried = here[:, None] + way  # [k, dampings, p]
        ends = likelihood.missed(tried.flatten(0, 1))
        cost, best = likelihood.costs(tried.flatten(0, 1), ends).view(len(here), -1).min(1)
        rows = torch.arange(len(here), device=points.device)
        gained = costs[running] - cost
        better = gained > 0
        moved = running[better]
        points[moved] = tried[rows, best][better]
        missed[moved] = ends.view(*tried.shape[:2], *ends.shape[1:])[rows, best][better]
        costs[moved] = cost[better]
        running = running[gained > IMPROVED]
        if not len(running):
            break
    return points
