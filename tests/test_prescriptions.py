from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simworld import SlotState, Trajectory, do, evaluate, pushforward, rollout, unrolled
from simworld.data import from_arrays
from simworld.fields import Field
from simworld.prescriptions import script

DT = 0.1


class Driven(torch.nn.Module):
    """Particles that the context of their scene accelerates, and no learned part but a share of it."""

    auxiliary = ()

    def __init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    dt = DT

    def step(self, state, action=None):
        velocities = state.velocities + self.forward(state)
        return state.advanced(velocities=velocities, positions=state.positions + DT * velocities)

    def forward(self, state, action=None):
        return self.share * state.context[state.batch]

    def target(self, state, after, action=None):
        return after.velocities - state.velocities

    def free(self, state):
        return state.free

    learned = free


def driven(num_steps=12):
    """Return a recording whose accelerations are its context, which goes up and down."""
    context = torch.sin(torch.arange(num_steps + 1, dtype=torch.float64))[:, None] * torch.tensor([[1.0, 0.5]])
    velocities, positions = [torch.zeros(3, 2).double()], [torch.rand(3, 2, generator=torch.manual_seed(0)).double()]
    for step in range(num_steps):
        velocities.append(velocities[-1] + context[step])
        positions.append(positions[-1] + DT * velocities[-1])
    return from_arrays(positions=torch.stack(positions).numpy(), dt=DT, context=context.numpy(), history=0)


@torch.no_grad()
def test_scenes_are_under_what_is_recorded_of_them():
    recorded = driven()
    (surroundings,) = script(recorded)
    told = rollout(recorded.initial, simulator=Driven(), num_steps=recorded.num_steps, interventions=[surroundings])
    torch.testing.assert_close(told["positions"], recorded["positions"])
    assert torch.equal(told["context"], recorded["context"])
    frozen = rollout(recorded.initial, simulator=Driven(), num_steps=recorded.num_steps)
    assert float((frozen["positions"] - recorded["positions"]).abs().max()) > 0.1
    assert surroundings.to_json() == {"prescribe": ["context"], "steps": len(recorded)}


def test_each_scene_keeps_its_own_context():
    """What is asked of one scene holds until its own recorded context changes, whoever is beside it."""
    late, early = driven(), driven()
    held = {**late.frames, "context": torch.zeros_like(late["context"])}
    held["context"][9:] = 1.0
    late = replace(late, frames=held, initial=late.initial.replace(context=held["context"][0]))
    asked = do(at=0, context=torch.tensor([7.0, 7.0], dtype=torch.float64))
    found = []
    for paths in ([late], [late, early]):
        state = type(late.initial).cat([path.initial for path in paths])
        frames = {name: torch.cat([path[name] for path in paths], 1) for name in late.frames}
        both = Trajectory(initial=state, frames=frames, active=torch.ones(12, 3 * len(paths), dtype=torch.bool), dt=DT)
        with torch.no_grad():
            made = rollout(state, simulator=Driven(), num_steps=11, interventions=[*script(both), asked])
        found.append(made["context"][:, 0])
    assert torch.equal(*found)
    assert found[0][:, 0].tolist() == [7.0] * 9 + [1.0] * 3


def test_what_simulators_know_of_scenes_is_left_to_them():
    """A field of scenes of one's own is no context, and what it was recorded to be is not given."""
    kind = SlotState.with_fields(memory=Field(unit="1", shape=("m",), per="scene"))
    frames = {"slots": torch.zeros(3, 2, 4), "memory": torch.arange(3.0)[:, None, None]}
    start = kind(slots=frames["slots"][0], memory=frames["memory"][0])
    path = Trajectory(initial=start, frames=frames, active=torch.ones(3, 2, dtype=torch.bool), dt=DT)
    assert script(path) == ()


def test_a_context_that_stays_is_nothing_from_outside():
    recorded = driven()
    still = {**recorded.frames, "context": recorded["context"][:1].expand(len(recorded), -1, -1)}
    assert script(Trajectory(initial=recorded.initial, frames=still, active=recorded.active, dt=DT)) == ()


def test_errors_are_of_rollouts_under_the_recorded_context():
    rows = evaluate({"driven": Driven()}, [driven()], dataset="driven", horizons=(1, 10))
    found = {row.horizon: row.value for row in rows if row.model == "driven"}
    assert found[1] < 1e-20
    assert found[10] < 1e-20


@pytest.mark.parametrize("loss", [unrolled(5), pushforward(4)])
def test_losses_are_of_rollouts_under_the_recorded_context(loss):
    found = loss.measure(Driven(), driven().window(0, loss.num_steps + 1), torch.Generator().manual_seed(0))
    assert float(found.detach()) < 1e-20
