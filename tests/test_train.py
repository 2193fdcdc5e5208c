from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simworld import (
    Fit,
    InteractionNetwork,
    MeshState,
    ParticleState,
    Trajectory,
    fit,
    load_checkpoint,
    one_step,
    pushforward,
    rollout_relative_l2,
    unrolled,
    write_trajectories,
)
from simworld.fields import Field
from simworld.models.checkpoint import read_tensors
from simworld.train import _batch, _chances, resume_training

HOW = {"num_steps": 6, "batch_size": 4, "evaluate_every": 3, "accelerator": "cpu", "warm_up": 2}


@pytest.fixture
def make(episodes):
    def make(**arguments):
        torch.manual_seed(0)
        statistics = InteractionNetwork.measure(episodes)
        given = {"latent_size": 8, "num_message_passing_steps": 2, "margin": 2.0, **arguments}
        return InteractionNetwork(dt=1 / 50, statistics=statistics, **given)

    return make


def test_training_makes_the_error_smaller(make, episodes, tmp_path):
    how = Fit(**{**HOW, "num_steps": 150, "evaluate_every": 150, "learning_rate": 5e-3})
    reports = []
    model = make()
    before = one_step().measure(model, episodes[0].window(3, 5), torch.Generator()).item()
    trained = fit(model, episodes, one_step(), how, out=tmp_path, valid=episodes[:1], watch=reports.append)
    after = one_step().measure(trained, episodes[0].window(3, 5), torch.Generator()).item()
    assert after < 0.5 * before
    assert reports[-1].step == 150
    found = {(row.model, row.horizon): row.value for row in reports[-1].errors}
    assert 0 < found["simworld", 1] < found["static", 1]


def test_an_interrupted_run_ends_with_the_same_bits(make, episodes, tmp_path):
    loss, how = one_step(noise_std=0.5), Fit(**HOW)
    fit(make(), episodes, loss, how, out=tmp_path / "whole")

    class Stop(Exception): ...

    def stop(report):
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(make(), episodes, loss, how, out=tmp_path / "cut", watch=stop)
    fit(make(), episodes, loss, how, out=tmp_path / "cut")
    for name in ("training", "model"):
        schema = f"simworld.{'checkpoint' if name == 'model' else name}"
        _, a = read_tensors(tmp_path / "whole" / f"{name}.safetensors", schema, 1)
        _, b = read_tensors(tmp_path / "cut" / f"{name}.safetensors", schema, 1)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_rollouts_that_break_down_are_said_and_training_goes_on(make, episodes, tmp_path):
    start = episodes[0].initial
    wild = dataclasses.replace(episodes[0], initial=start.replace(velocities=torch.full_like(start.velocities, 3e38)))
    reports = []
    with pytest.warns(UserWarning, match=r"Held out: nothing to measure yet\. Step . made"):
        fit(make(), episodes, one_step(), Fit(**HOW), out=tmp_path, valid=[wild], watch=reports.append)
    assert [(report.step, report.errors) for report in reports] == [(3, []), (6, [])]


def test_another_run_in_the_same_folder_is_refused(make, episodes, tmp_path):
    fit(make(), episodes, one_step(), Fit(**HOW), out=tmp_path)
    with pytest.raises(ValueError, match="a run with other settings"):
        fit(make(), episodes, one_step(), Fit(**{**HOW, "learning_rate": 0.1}), out=tmp_path)
    with pytest.raises(ValueError, match="a run with other settings"):
        fit(make(), episodes[:2], one_step(), Fit(**HOW), out=tmp_path)
    with pytest.raises(ValueError, match="a run with other settings"):
        fit(make(), episodes, unrolled(2), Fit(**HOW), out=tmp_path)
    pushed = [dataclasses.replace(path, actions=-path.actions) for path in episodes]
    with pytest.raises(ValueError, match="a run with other settings"):
        fit(make(), pushed, one_step(), Fit(**HOW), out=tmp_path)


def test_the_saved_model_is_the_returned_one(make, episodes, tmp_path):
    model = make()
    model.provenance = {"dataset": "rope"}
    trained = fit(model, episodes, one_step(), Fit(**HOW), out=tmp_path)
    again = load_checkpoint(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    assert again.provenance["dataset"] == "rope"
    assert again.provenance["steps"] == 6


def test_longer_losses_reduce_to_the_short_one(make, episodes):
    """Along one step all losses are the same number."""
    model, window = make(), episodes[0].window(2, 4)
    wanted = one_step().measure(model, window, torch.Generator())
    assert torch.allclose(unrolled(1).measure(model, window, torch.Generator()), wanted, rtol=1e-4)
    assert torch.equal(pushforward(1).measure(model, window, torch.Generator()), wanted)


def test_unrolled_gradients_reach_through_the_rollout_and_pushforward_ones_do_not(make, episodes):
    model, window = make(), episodes[0].window(2, 5)
    gradient = {}
    for name, loss in (("unrolled", unrolled(2)), ("pushforward", pushforward(2)), ("one_step", one_step())):
        model.zero_grad()
        loss.measure(model, window, torch.Generator()).backward()
        gradient[name] = model.edge_encoder[0].weight.grad.clone()
    # Cut off between its steps, the unrolled loss would be the mean of the other two.
    cut = (gradient["one_step"] + gradient["pushforward"]) / 2
    assert (gradient["unrolled"] - cut).abs().max() > 0.01 * cut.abs().max()


def test_noise_is_a_function_of_the_generator(make, episodes):
    model, window = make(), episodes[0].window(2, 4)
    values = [one_step(noise_std=2.0).measure(model, window, torch.Generator().manual_seed(k)) for k in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_bad_settings(make, episodes, tmp_path):
    with pytest.raises(ValueError, match="num_steps must be 1 or more"):
        Fit(num_steps=0)
    slow = InteractionNetwork(dt=0.5, statistics=InteractionNetwork.measure(episodes))
    with pytest.raises(ValueError, match=r"The model makes steps of 0\.5 s, the data has 0\.02 s"):
        fit(slow, episodes, one_step(), Fit(**HOW), out=tmp_path)
    with pytest.raises(ValueError, match="trained without actions"):
        fit(make(actions="none"), episodes, one_step(), Fit(**HOW), out=tmp_path)
    broken = dataclasses.replace(episodes[0], actions=episodes[0].actions * torch.nan)
    with pytest.raises(ValueError, match="loss is not finite at step 1"):
        fit(make(), [broken], one_step(), Fit(**HOW), out=tmp_path)
    for loss in (unrolled, pushforward, rollout_relative_l2):
        with pytest.raises(ValueError, match="num_steps of 1 or more"):
            loss(0)
    with pytest.raises(ValueError, match="trajectories of 50 steps or more; got 4 shorter"):
        fit(make(), episodes, unrolled(50), Fit(**HOW), out=tmp_path)


def test_two_processes_average_their_gradients(make, episodes, tmp_path):
    """The weights after training in two gloo processes are those of the averaged gradients of both batches."""
    write_trajectories(tmp_path / "train.h5", episodes, dataset="rope")
    script = Path(__file__).with_name("two_processes.py")
    threads = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script), str(tmp_path / "train.h5"), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, **threads}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    _, tensors = read_tensors(tmp_path / "out/training.safetensors", "simworld.training", 1)
    how = Fit(num_steps=2, batch_size=3, evaluate_every=2, accelerator="cpu", devices=2, warm_up=1)
    both, alone = _by_hand(make(), episodes, how, (0, 1)), _by_hand(make(), episodes, how, (0,))
    got = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    assert max(float((got[k] - both[k]).abs().max()) for k in got) < 1e-5
    assert max(float((got[k] - alone[k]).abs().max()) for k in got) > 1e-4


def _by_hand(model, episodes, how, ranks):
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(2):
        optimizer.param_groups[0]["lr"] = how.rate(step)
        optimizer.zero_grad()
        batches = [_batch(episodes, 1, how, step, rank) for rank in ranks]
        (sum(one_step().measure(model, *batch) for batch in batches) / len(ranks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.max_grad_norm)
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def test_resuming_from_nothing_starts_at_the_beginning(make, tmp_path):
    model = make()
    assert (
        resume_training(tmp_path, model, torch.optim.Adam(model.parameters()), "", averaged=copy.deepcopy(model)) == 0
    )


@pytest.mark.parametrize("num_steps", [1, 3])
def test_emphasis_draws_windows_in_proportion_to_how_much_velocities_change(episodes, num_steps):
    assert _chances(episodes, num_steps, 0.0) is None
    still = dataclasses.replace(
        episodes[0], frames={k: v[:1].expand_as(v).clone() for k, v in episodes[0].frames.items()}
    )
    frames = dict(still.frames)
    frames["velocities"][6:] += 1.0  # one change, in the step from frame 5 to frame 6
    jolted = dataclasses.replace(still, frames=frames)
    half, whole = (_chances([jolted], num_steps, emphasis)[0] for emphasis in (0.5, 1.0))
    assert len(half) == jolted.num_steps - num_steps + 1
    hit = torch.zeros(len(half), dtype=torch.float64)
    hit[6 - num_steps : 6] = 1 / num_steps
    assert torch.allclose(whole, hit)
    assert torch.allclose(half, 0.5 * hit + 0.5 / len(half))
    firsts = [
        _batch([jolted], num_steps, Fit(num_steps=1, batch_size=1), step, 0, [whole])[0]["velocities"].diff(dim=0)
        for step in range(5)
    ]
    assert all(bool((changes != 0).any()) for changes in firsts)
    unmoved = dataclasses.replace(episodes[0], frames={k: v[:1].expand_as(v) for k, v in episodes[0].frames.items()})
    assert torch.allclose(_chances([unmoved], num_steps, 0.5)[0], torch.full_like(half, 1 / len(half)))


def test_an_emphasis_that_cannot_be():
    with pytest.raises(ValueError, match="emphasis must be from 0 to 1"):
        Fit(num_steps=1, emphasis=1.5)


def test_mirrored_windows_are_what_a_mirror_shows():
    bounds = torch.tensor([[[0.0, 0.0], [4.0, 3.0]]])
    state = ParticleState(
        positions=torch.tensor([[1.0, 0.5], [2.0, 2.5]]),
        velocities=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        history=torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]]),
        gravity=torch.tensor([[0.5, -9.81]]),
        boundaries=bounds,
    )
    frames = {name: torch.stack([state[name], 2 * state[name]]) for name in state.dynamic_fields}
    path = Trajectory(initial=state, frames=frames, active=torch.ones(2, 2, dtype=torch.bool), dt=0.1)
    shown = path.mirrored(1)
    assert shown.initial.positions.tolist() == [[1.0, -0.5], [2.0, -2.5]]
    assert shown["velocities"][1].tolist() == [[2.0, -4.0], [6.0, -8.0]]
    assert shown.initial.history.tolist() == [[[5.0, -6.0]], [[7.0, -8.0]]]
    assert shown.initial.gravity.tolist() == [[0.5, torch.tensor(9.81).item()]]
    assert shown.initial.boundaries.tolist() == [[[0.0, -3.0], [4.0, 0.0]]]
    again = shown.mirrored(1)
    assert all(torch.equal(again.initial[name], state[name]) for name in state)
    batches = [_batch([path], 1, Fit(num_steps=1, batch_size=64, mirror=[1]), step, 0)[0] for step in range(2)]
    upward = [batch.initial.velocities[::2, 1] > 0 for batch in batches]
    assert all(0.3 < float(part.double().mean()) < 0.7 for part in upward)
    assert not torch.equal(*upward)
    plain, _ = _batch([path], 1, Fit(num_steps=1, batch_size=64), 0, 0)
    assert bool((plain.initial.velocities > 0).all())


def test_a_mirror_between_two_axes_exchanges_them():
    stresses = torch.arange(6.0)[None]  # xx, yy, zz, xy, xz, yz
    state = MeshState(
        rest_positions=torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        positions=torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        stresses=torch.cat([stresses, stresses]),
        cells=torch.tensor([[0, 1]]),
    )
    frames = {"positions": torch.stack([state.positions] * 2), "stresses": torch.stack([state.stresses] * 2)}
    forces = torch.tensor([[[4.0, 5.0, 6.0], [0.0, 0.0, 0.0]]])
    active = torch.ones(2, 2, dtype=torch.bool)
    path = Trajectory(initial=state, frames=frames, active=active, dt=0.1, actions=forces)
    shown = path.mirrored((1, 2))
    assert shown["positions"][1, 0].tolist() == shown.initial.rest_positions[0].tolist() == [1.0, 3.0, 2.0]
    assert shown["stresses"][1, 0].tolist() == [0.0, 2.0, 1.0, 4.0, 3.0, 5.0]
    assert shown.actions[0, 0].tolist() == [4.0, 6.0, 5.0]
    assert path.mirrored(1)["stresses"][0, 0].tolist() == [0.0, 1.0, 2.0, -3.0, 4.0, -5.0]
    assert path.mirrored(1).actions[0, 0].tolist() == [4.0, -5.0, 6.0]
    quarter = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # two mirrors make a turn

    def tensor(path):
        xx, yy, zz, xy, xz, yz = path["stresses"][0, 0]
        return torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).view(3, 3)

    turned = path.mirrored((1, 2)).mirrored(1)
    torch.testing.assert_close(turned["positions"][0, 0], quarter @ path["positions"][0, 0])
    torch.testing.assert_close(tensor(turned), quarter @ tensor(path) @ quarter.T)
    boxed = ParticleState(
        positions=torch.ones(1, 2),
        velocities=torch.zeros(1, 2),
        boundaries=torch.tensor([[[0.0, 0.0], [4.0, 3.0]]]),
        periodic=torch.tensor([[True, False]]),
    )
    still = Trajectory(initial=boxed, frames={}, active=torch.ones(1, 1, dtype=torch.bool), dt=0.1)
    assert still.mirrored([0, 1]).initial.boundaries.tolist() == [[[0.0, 0.0], [3.0, 4.0]]]
    assert still.mirrored([0, 1]).initial.periodic.tolist() == [[False, True]]


def test_what_a_mirror_does_not_know_is_refused(episodes):
    with pytest.raises(ValueError, match="What a mirror makes of actions is not known"):
        dataclasses.replace(episodes[0], actions=episodes[0].actions[..., :1]).mirrored(0)
    solid = MeshState(positions=torch.zeros(2, 3), stresses=torch.zeros(2, 1), cells=torch.tensor([[0, 1]]))
    held = Trajectory(initial=solid, frames={}, active=torch.ones(1, 2, dtype=torch.bool), dt=0.1)
    with pytest.raises(ValueError, match="What a mirror makes of stresses is not known"):
        held.mirrored(0)
    kind = MeshState.with_fields(fibres=Field(unit="1", shape=(3,)))
    own = kind(positions=torch.zeros(2, 3), fibres=torch.ones(2, 3), cells=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="What a mirror makes of fibres is not known"):
        dataclasses.replace(held, initial=own).mirrored(0)
    with pytest.raises(ValueError, match="or between two of them; got 2"):
        dataclasses.replace(episodes[0], actions=None).mirrored(2)
    for wrong in (-1, 1.5, "x", [0, -1]):
        with pytest.raises(ValueError, match="mirror lists axes of space"):
            Fit(num_steps=1, mirror=[wrong])
