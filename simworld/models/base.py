"""What every learned simulator keeps: a network predicts a normalized change, a rule applies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, final

from torch import Tensor, nn

from simworld.state import State
from simworld.trajectory import Trajectory

Noise = float | Mapping[str, float]
"""Standard deviation of the noise in velocities, or in each field that is named, in the fields' units."""


def noise_by_field(noise_std: Noise) -> dict[str, float]:
    """Return the standard deviation of noise by field: a number alone is that of velocities."""
    return dict(noise_std) if isinstance(noise_std, Mapping) else {"velocities": float(noise_std)}


def check_sizes(arguments: Mapping[str, Any], *names: str) -> None:
    """Raise a ValueError unless the named constructor arguments are whole numbers of 1 or more."""
    for name in names:
        value = arguments[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")


def told_to_measure(kind: type[LearnedSimulator], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a constructor's arguments that the `measure` of its class takes, too."""
    return {name: value for name, value in arguments.items() if name in signature(kind.measure).parameters}


class LearnedSimulator(nn.Module, ABC):
    """A simulator with weights.

    `arguments` are the constructor's, as plain values: with the weights they are all that a checkpoint
    holds. `provenance` says, in words and numbers, where the weights come from. `auxiliary` names the fields that the
    model predicts of kinematic entities, too, whose motion alone is given; `told`, those that a step writes and does
    not look at, so that to change them would change nothing.
    """

    auxiliary: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    arguments: dict[str, Any]
    provenance: dict[str, Any]

    def __init__(self, dt: float, arguments: dict[str, Any]) -> None:
        super().__init__()
        if not (isinstance(dt, int | float) and 0 < dt < float("inf")):
            raise ValueError(f"dt must be a positive number of seconds; got {dt}.")
        self._dt = float(dt)
        self.arguments = {"dt": float(dt), **arguments}
        self.provenance = {}

    @property
    @final
    def dt(self) -> float:
        """Seconds that one step covers."""
        return self._dt

    @final
    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state one `dt` later; the given one stays as it is."""
        self.check(state, action)
        return self.integrate(state, self(state, action), action)

    @property
    @final
    def num_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @staticmethod
    @abstractmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Any = "none"
    ) -> Mapping[str, Any]:
        """Return the `statistics` of training data that the constructor takes, for its choice of `actions`."""

    def observe(self, trajectory: Trajectory, noise_std: Noise = 0.0) -> None:
        """Take note of recorded data before a training step on them; statistics that training counts in do."""

    @abstractmethod
    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""

    @abstractmethod
    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return the predicted change, normalized to about unit size."""

    @abstractmethod
    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state that a normalized change leads to."""

    @abstractmethod
    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`: its inverse."""

    @abstractmethod
    def free(self, state: State) -> Tensor:
        """Return which entities [n] the model moves."""

    def learned(self, state: State) -> Tensor:
        """Return which entities [n] enter a training loss: those of which the model predicts anything."""
        if not self.auxiliary:
            return self.free(state)
        return state.active
