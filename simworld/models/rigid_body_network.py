"""An Interaction Network for rigid bodies: contacts are the edges, impulses at contact points the messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.models.base import LearnedSimulator, Noise, check_sizes
from simworld.models.contacts import BALL, SIDEWAYS, Candidates, Contacts, Poses, find_candidates, locate, shapes_of
from simworld.quaternions import exponential, inverse, logarithm, product, rotations
from simworld.state import State
from simworld.trajectory import Trajectory

NODE_FEATURES, STILL_FEATURES, MOVING_FEATURES, ANSWERS = 4, 5, 7, 6
STATISTICS = ("speed", "position", "velocity", "rotation", "angular_velocity")
"""Root mean squares: of speeds, and of the four parts of the change that a step makes."""


class RigidBodyNetwork(LearnedSimulator):
    """Boxes and balls on a table that push each other through contacts, as a learned contact solver.

    A step of `dt` is `num_sub_steps` steps of equal length with the same weights. In each, gravity and the
    action (a force [N] on the centre of mass) change the velocities, then contacts do, in
    `num_message_passing_steps` rounds, then bodies drift and turn. In a round the relation network looks at
    every contact: the latents of the two bodies, gap, friction, how hard the bodies are to move there, how
    they close and slip, what the contact has given so far. It answers how much of the closing and slipping
    speed to take away, how much of the gap to close, and how much of the last round's impulse to repeat.
    The impulse, never pulling and inside the friction cone, acts on both bodies at the contact point, and
    an object network hears the sum of the messages (Battaglia et al. 2016, arXiv 1612.00222; contacts as
    impulses solved by relaxation: Moreau 1988, Stewart & Trinkle 1996). What contacts gave in one sub-step
    is where the next begins.

    Momentum is conserved between bodies, and results are equivariant to turns about the vertical and shifts
    along the table. The change [n, 12] is that of position beyond dt v, of velocity, of orientation beyond
    dt w (a rotation vector) and of angular velocity w, all in the world's axes, each over its rms.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, float],
        margin: float = 0.03,
        latent_size: int = 32,
        num_message_passing_steps: int = 6,
        num_sub_steps: int = 4,
    ) -> None:
        """Make a network of given size, its weights drawn from torch's generator.

        `statistics` is what `RigidBodyNetwork.measure` returns for the training data. `margin` is the gap
        [m] under which surfaces may touch within a step.

        Raises:
            ValueError: a size is outside its range, or a statistic is missing.
        """
        arguments = {
            "statistics": dict(statistics),
            "margin": margin,
            "latent_size": latent_size,
            "num_message_passing_steps": num_message_passing_steps,
            "num_sub_steps": num_sub_steps,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.scales = {name: float(statistics[name]) for name in STATISTICS}
        self.margin, self.num_sub_steps = float(margin), num_sub_steps
        self.node_encoder = nn.Linear(NODE_FEATURES, latent_size)
        self.table = nn.Parameter(torch.randn(1, latent_size))
        self.blocks = nn.ModuleList(_Block(latent_size) for _ in range(num_message_passing_steps))

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: str = "none"
    ) -> dict[str, float]:
        """Return the sizes of speeds and changes in recorded data, by which the network normalizes.

        Raises:
            ValueError: there are no steps.
        """
        sums, counts = dict.fromkeys(STATISTICS, 0.0), dict.fromkeys(STATISTICS, 0)
        for trajectory in trajectories:
            moving = trajectory.active[1:] & trajectory.initial.free
            frames = [trajectory[name].double() for name in MOVING]
            parts = _difference([v[:-1] for v in frames], [v[1:] for v in frames], trajectory.dt)
            for name, values in zip(STATISTICS, (frames[2][1:], *parts), strict=True):
                sums[name] += float(values[moving].square().sum())
                counts[name] += values[moving].numel()
        if not counts["speed"]:
            raise ValueError("Statistics need at least one trajectory of two frames with a body that moves; got none.")
        return {k: (sums[k] / counts[k]) ** 0.5 or 1.0 for k in STATISTICS}

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        missing = [name for name in NEEDED if name not in state]
        if missing:
            raise ValueError(f"A RigidBodyNetwork steps boxes and balls; the state lacks {', '.join(missing)}.")
        if state.positions.shape[1] != 3:
            raise ValueError(f"A RigidBodyNetwork works in space; got positions {list(state.positions.shape)}.")
        if state.positions.dtype != self.table.dtype:
            raise ValueError(
                f"This model computes in {self.table.dtype}; got a state in {state.positions.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        if not state.derived("types < 2", ("object_types",), lambda s: bool(((s.object_types | 1) == 1).all())):
            raise ValueError("This model knows object_types 0 (box) and 1 (ball); the state has others.")
        if action is not None and (action.shape != state.positions.shape or action.dtype != state.positions.dtype):
            raise ValueError(
                f"This model takes forces {list(state.positions.shape)} in {state.positions.dtype}, a row per body; "
                f"got {list(action.shape)} in {action.dtype}."
            )

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, 12]: the change of position, velocity, orientation and angular velocity, normalized."""
        bodies = state.derived("rigid_bodies", SOURCES, _bodies)
        shapes = state.derived("shapes", SOURCES, shapes_of)
        now = [state[name] for name in MOVING]
        motion = _Motion(now[0], now[1], torch.cat([now[2], now[3]], 1))
        candidates = find_candidates(shapes, motion.poses(state.half_extents), self.margin)
        nodes = torch.cat([self.node_encoder(bodies.features), self.table])
        pull = state.gravity[state.batch]
        if action is not None:
            pull = pull + action * bodies.inverse_masses[:-1]
        given = motion.positions.new_zeros(len(candidates.ends), 3)
        h = self.dt / self.num_sub_steps
        for _ in range(self.num_sub_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                poses = motion.poses(state.half_extents)
                solver = _Solver(candidates, locate(candidates, poses), poses, bodies, h, self.scales["speed"])
            twists = motion.accelerated(pull, poses.axes, bodies, h)
            twists, given = self._solve(solver, twists, given, nodes)
            motion = motion.drifted(twists[:-1], h)
        after = [motion.positions, motion.quats, *torch.split(motion.twists, 3, dim=1)]
        return self._normalized(state, now, after)

    def _solve(self, solver: _Solver, twists: Tensor, given: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocities [n + 1, 6] after all rounds, and the impulses [c, 3] that contacts gave."""
        twists = torch.cat([twists, torch.zeros_like(twists[:1])])
        given, twists = solver.begin(given, twists)
        before = given
        for block in self.blocks:
            relative = solver.relative(twists)
            nodes, answers = block(nodes, solver.features(relative, given), solver.ends)
            following = solver.relaxed(relative, given, before, answers)
            twists = solver.applied(twists, following - given)
            before, given = given, following
        return twists, solver.in_world(given)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: the changes added to x + dt v, v, exp(dt w) q and w; fixed bodies stay."""
        now = [state[name] for name in MOVING]
        x, q, v, w = now
        parts = [
            part * self.scales[name] for name, part in zip(STATISTICS[1:], torch.split(change, 3, dim=1), strict=True)
        ]
        turned = product(exponential(parts[2]), product(exponential(self.dt * w), q))
        after = [x + self.dt * v + parts[0], functional.normalize(turned, dim=1), v + parts[1], w + parts[3]]
        moves = state.free[:, None]
        return state.replace(**{name: torch.where(moves, a, b) for name, a, b in zip(MOVING, after, now, strict=True)})

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for fixed bodies."""
        return self._normalized(state, [state[name] for name in MOVING], [next_state[name] for name in MOVING])

    def _normalized(self, state: State, now: list[Tensor], after: list[Tensor]) -> Tensor:
        parts = _difference(now, after, self.dt)
        change = torch.cat([part / self.scales[k] for k, part in zip(STATISTICS[1:], parts, strict=True)], 1)
        return torch.where(state.free[:, None], change, 0.0)

    def free(self, state: State) -> Tensor:
        """Return which bodies [n] move: active and not fixed."""
        return state.free


MOVING = ("positions", "quats", "velocities", "angular_velocities")
NEEDED = (*MOVING[1:], "masses", "half_extents", "frictions", "object_types", "gravity")
SOURCES = ("masses", "half_extents", "frictions", "object_types", "fixed", "batch", "active")


class _Block(nn.Module):
    """One round of messages: the relation network at every contact, the object network at every body.

    The two ends of a contact enter alike, as the sum of what a layer makes of each.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ends = nn.Linear(size, size)
        self.inputs = nn.Linear(STILL_FEATURES + MOVING_FEATURES, size)
        self.hidden = nn.Linear(size, size)
        self.answer = nn.Linear(size, ANSWERS)
        self.heard = nn.Linear(size, size)
        self.update = nn.Linear(size, size)
        nn.init.normal_(self.answer.weight, std=0.1 / size**0.5)
        nn.init.zeros_(self.answer.bias)
        nn.init.normal_(self.update.weight, std=0.1 / size**0.5)

    def forward(self, nodes: Tensor, features: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [n + 1, size] and answers [c, 6] of contacts between entities `ends` [2 c]."""
        met = self.ends(nodes).index_select(0, ends).view(-1, 2, nodes.shape[1]).sum(1)
        messages = functional.silu(self.inputs(features) + met)
        messages = functional.silu(self.hidden(messages))
        heard = torch.zeros_like(nodes).index_add(0, ends, messages.repeat_interleave(2, 0))
        # The table is one row for all scenes: what it heard must not lead from one to another.
        heard = torch.cat([heard[:-1], torch.zeros_like(heard[:1])])
        return nodes + self.update(functional.silu(self.heard(heard) + nodes)), self.answer(messages)


@dataclass(frozen=True)
class _Bodies:
    """What bodies are, the table last: 1 / mass [n + 1, 1], 1 / moments of inertia along own axes [n + 1, 3].

    Zero for what does not move. `features` [n, 4] are those of the object network.
    """

    inverse_masses: Tensor
    inverse_inertias: Tensor
    frictions: Tensor
    features: Tensor


def _bodies(state: State) -> _Bodies:
    masses, extents = state.masses[:, None], state.half_extents
    balls = (state.object_types == BALL)[:, None]
    squares = extents.square()
    inertias = masses * torch.where(balls, 0.4 * squares, (squares.sum(1, keepdim=True) - squares) / 3)
    moves = state.free[:, None]
    none = masses.new_zeros(1, 3)
    flatness = extents[:, 2:] / extents.mean(1, keepdim=True)
    return _Bodies(
        torch.cat([torch.where(moves, 1 / masses, 0.0), none[:, :1]]),
        torch.cat([torch.where(moves, 1 / inertias, 0.0), none]),
        torch.cat([state.frictions[:, None], none[:, :1]]),
        torch.cat([masses.log(), balls.to(masses), state.frictions[:, None], flatness], 1),
    )


@dataclass(frozen=True)
class _Motion:
    """Positions [n, 3], quats [n, 4], and velocities with angular velocities, twists [n, 6]."""

    positions: Tensor
    quats: Tensor
    twists: Tensor

    def poses(self, half_extents: Tensor) -> Poses:
        return Poses(positions=self.positions, axes=rotations(self.quats), half_extents=half_extents)

    def accelerated(self, pull: Tensor, axes: Tensor, bodies: _Bodies, h: float) -> Tensor:
        """Return the twists after h seconds of `pull` [m/s^2] and of free rotation, which is not steady."""
        v, w = torch.split(self.twists, 3, dim=1)
        inverse = bodies.inverse_inertias[:-1]
        spin = (axes.mT @ w[:, :, None])[:, :, 0]
        momenta = torch.where(inverse > 0, spin / inverse.clamp(min=1e-12), 0.0)
        turn = -torch.linalg.cross(spin, momenta, dim=1) * inverse
        w = w + h * (axes @ turn[:, :, None])[:, :, 0]
        return torch.cat([torch.where(inverse[:, :1] > 0, v + h * pull, v), w], 1)

    def drifted(self, twists: Tensor, h: float) -> _Motion:
        v, w = torch.split(twists, 3, dim=1)
        quats = functional.normalize(product(exponential(h * w), self.quats), dim=1)
        return _Motion(self.positions + h * v, quats, twists)


class _Solver:
    """The contacts of one sub-step: what does not change from round to round, and what impulses do.

    Impulses [c, 3] and relative velocities [c, 3] are in each contact's own axes: first the normal, then
    two along the surfaces, on whose choice nothing depends.
    """

    def __init__(
        self, candidates: Candidates, contacts: Contacts, poses: Poses, bodies: _Bodies, h: float, speed: float
    ) -> None:
        self.ends, self.speed = candidates.ends.flatten(), speed
        count, bodies_count = len(candidates.ends), len(poses.positions)
        self.frames = _frames(contacts.normals)
        none = torch.zeros_like(poses.positions[:1])
        arms = contacts.points[:, None] - torch.cat([poses.positions, none])[self.ends].view(count, 2, 3)
        signs = arms.new_tensor([1.0, -1.0])[:, None, None]
        linear = signs * self.frames[:, None]  # [c, 2, 3, 3]: a body's velocity in the contact's axes
        angular = -linear @ _crossing(arms)
        inverse = (poses.axes * bodies.inverse_inertias[:-1, None]) @ poses.axes.mT
        inertias = torch.cat([inverse, torch.zeros_like(inverse[:1])])[self.ends].view(count, 2, 3, 3)
        lightness = bodies.inverse_masses[self.ends].view(count, 2, 1, 1)
        both = torch.cat([linear, angular], 3)
        self.jacobians = both.movedim(1, 2).reshape(count, 3, 12)
        self.effects = torch.cat([lightness * linear, angular @ inertias], 3).mT.reshape(count, 12, 3)
        ease = self.jacobians @ self.effects  # from impulses to relative velocities
        self.ease = ease[:, :1, 0].clamp(min=1e-9)
        self.ease_aside = ease[:, 1:, 1:]
        self.mu = bodies.frictions[self.ends].view(count, 2).amax(1, keepdim=True)
        self.approach = contacts.gaps / h
        self.near = (contacts.beside < SIDEWAYS).to(arms)
        self.still = self._still(lightness.sum(1)[:, 0], bodies_count)

    def _still(self, lightness: Tensor, count: int) -> Tensor:
        """Return the features [c, 5] that stay: gap, how hard to move, how crowded, friction, whether there."""
        touching = torch.sigmoid(-self.approach / self.speed) * self.near
        crowd = touching.new_zeros(count + 1, 1).index_add(0, self.ends, touching.repeat_interleave(2, 0))
        crowd = torch.cat([crowd[:-1], torch.zeros_like(crowd[:1])])[self.ends].view(-1, 2).amax(1, keepdim=True)
        gap = _squash(self.approach / self.speed)
        return torch.cat([gap, (self.ease / lightness).log(), crowd.log1p(), self.mu, self.near], 1)

    def begin(self, given: Tensor, twists: Tensor) -> tuple[Tensor, Tensor]:
        """Return the impulses [c, 3] and twists to start from, where contacts gave `given` before, in world axes."""
        self.first = self.relative(twists)
        impulses = (self.frames @ given[:, :, None])[:, :, 0] * self.near
        impulses = torch.cat([functional.relu(impulses[:, :1]), impulses[:, 1:]], 1)
        return impulses, self.applied(twists, impulses)

    def features(self, relative: Tensor, given: Tensor) -> Tensor:
        """Return the features [c, 13] of contacts, as bodies move after `given` impulses [c, 3]."""
        closing, press = relative[:, :1], given[:, :1]
        slip, rub = _length(relative[:, 1:], TINY), _length(given[:, 1:], TINY)
        first = self.first
        speeds = [closing, closing + self.approach, slip, press * self.ease, rub * self.ease, first[:, :1]]
        used = rub / (self.mu * press + rub)
        return torch.cat([self.still, _squash(torch.cat(speeds, 1) / self.speed), used], 1)

    def relaxed(self, relative: Tensor, given: Tensor, before: Tensor, answers: Tensor) -> Tensor:
        """Return the impulses [c, 3] after a round: closing and slip taken away, inside the friction cone."""
        gains = GAIN * answers[:, :2].exp()
        # Untrained, a body may come as near as the gap, half of what closes is left, and contacts push softly.
        offsets = torch.where(self.approach > 0, 3.0, -3.0)
        habits = answers.new_tensor([0.0, 0.0, -1.0])
        parts = torch.sigmoid(torch.cat([answers[:, 2:3] + offsets, answers[:, 3:] + habits], 1))
        close, keep, again = torch.split(parts, [1, 2, 1], dim=1)
        repeat = given + again * (given - before)
        wanted = self.first * torch.cat([keep[:, :1], keep[:, 1:], keep[:, 1:]], 1)
        excess = relative[:, :1] + self.approach * close - wanted[:, :1].clamp(max=0)
        press = functional.relu(repeat[:, :1] - gains[:, :1] * excess / self.ease) * self.near
        slip = relative[:, 1:] - wanted[:, 1:]
        # Along the slip, not through an inverse matrix: only so is friction opposed to it in the end.
        slower = (slip * (self.ease_aside @ slip[:, :, None])[:, :, 0]).sum(1, keepdim=True) + TINY**2 * self.ease
        rub = repeat[:, 1:] - gains[:, 1:] * slip * (slip.square().sum(1, keepdim=True) + TINY**2) / slower
        return torch.cat([press, rub * (self.mu * press / _length(rub, TINY)).clamp(max=1)], 1)

    def applied(self, twists: Tensor, impulses: Tensor) -> Tensor:
        """Return the twists [n + 1, 6] after impulses [c, 3] on the first bodies, and their reactions."""
        kicks = (self.effects @ impulses[:, :, None]).view(-1, 6)
        return twists.index_add(0, self.ends, kicks)

    def relative(self, twists: Tensor) -> Tensor:
        """Return the velocities [c, 3] of the first bodies against the second, at the contacts."""
        return (self.jacobians @ twists.index_select(0, self.ends).view(-1, 12, 1))[:, :, 0]

    def in_world(self, impulses: Tensor) -> Tensor:
        """Return impulses [c, 3] in the world's axes."""
        return (self.frames.mT @ impulses[:, :, None])[:, :, 0]


GAIN = 0.4  # part of a contact's closing speed that an untrained network takes away in a round
TINY = 1e-5  # m/s or N s: far below what matters, far above where float32 gradients of directions overflow


def _frames(normals: Tensor) -> Tensor:
    """Return rotations [c, 3, 3] whose first rows are the normals."""
    level = normals.new_zeros(normals.shape)
    level[:, 0] = (normals[:, 0].abs() < 0.7).to(normals)
    level[:, 1] = 1 - level[:, 0]
    aside = functional.normalize(torch.linalg.cross(normals, level, dim=1), dim=1)
    return torch.stack([normals, aside, torch.linalg.cross(normals, aside, dim=1)], 1)


def _difference(now: list[Tensor], after: list[Tensor], dt: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four parts of a step's change, each [..., 3], not normalized."""
    (x, q, v, w), (x2, q2, v2, w2) = now, after
    drifted = product(exponential(dt * w), q)
    turned = product(q2, inverse(drifted))
    return x2 - x - dt * v, v2 - v, logarithm(turned), w2 - w


def _crossing(vectors: Tensor) -> Tensor:
    """Return the matrices [..., 3, 3] that take u to v x u."""
    x, y, z = vectors.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(*x.shape, 3, 3)


def _length(vectors: Tensor, least: float = 1e-9) -> Tensor:
    """Return lengths [..., 1], never under `least`, so that dividing by them and differentiating is safe."""
    return (vectors.square().sum(-1, keepdim=True) + least**2).sqrt()


def _squash(values: Tensor) -> Tensor:
    """Return values of any size as features: linear when small, logarithmic when large."""
    return torch.asinh(5 * values)


def _check_arguments(arguments: Mapping[str, object]) -> None:
    check_sizes(arguments, "latent_size", "num_message_passing_steps", "num_sub_steps")
    margin = arguments["margin"]
    if not (isinstance(margin, int | float) and 0 < margin < float("inf")):
        raise ValueError(f"margin must be a positive distance [m]; got {margin!r}.")
    statistics = arguments["statistics"]
    missing = [name for name in STATISTICS if not isinstance(statistics, Mapping) or name not in statistics]
    if missing:
        raise ValueError(
            f"statistics lack {', '.join(missing)}; compute them with RigidBodyNetwork.measure(trajectories)."
        )
    if isinstance(statistics, Mapping) and not all(
        isinstance(value, int | float) and 0 < value < float("inf") for value in statistics.values()
    ):
        raise ValueError(f"statistics must be positive numbers, as measure() returns them; got {dict(statistics)}.")
