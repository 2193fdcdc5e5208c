from __future__ import annotations

import dataclasses
import math
import pickle
import re
import shutil
from itertools import pairwise

import pytest
import torch

import simworld.models.flow_terms as flow_module
from simworld import (
    MeshGraphNet,
    MeshState,
    Trajectory,
    load_checkpoint,
    one_step,
    rollout,
    save_checkpoint,
    write_trajectories,
)
from simworld.kinds import INFLOW, NORMAL, OUTFLOW, WALL
from simworld.models.flow_terms import ACCELERATIONS, FLOW, flow_terms
from simworld.runs import read_run, start
from simworld.testing import check_simulator

pytest.importorskip("scipy")
DT = 0.01


def square(side=9, *, flow=None, open_right=True, uneven=0.0, **fields):
    """The unit square in triangles: walls above and below, let in on the left and out on the right, or closed."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double() / (side - 1)
    inside = ((grid > 0) & (grid < 1)).all(1)
    rest = grid + uneven / side * inside[:, None] * torch.randn(grid.shape, generator=generator, dtype=torch.float64)
    corner = (torch.arange(side - 1)[:, None] * side + torch.arange(side - 1)).flatten()
    quads = torch.stack([corner, corner + side, corner + side + 1, corner + 1], 1)
    types = torch.full((len(grid),), NORMAL)
    if open_right:
        types[grid[:, 0] == 1], types[grid[:, 0] == 0] = OUTFLOW, INFLOW
    types[(grid[:, 1] == 0) | (grid[:, 1] == 1)] = WALL
    given = {
        "rest_positions": rest,
        "velocities": torch.zeros_like(rest) if flow is None else flow(rest),
        "pressures": torch.zeros(len(rest), dtype=torch.float64),
        "node_types": types,
        "kinematic": (types == INFLOW) | (types == WALL),
        "cells": torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]),
    }
    return MeshState(**given | fields)


def cube():
    """Six tetrahedra that make a cube, its corners moved a little."""
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    paths = [(1, 3), (1, 5), (2, 3), (2, 6), (4, 5), (4, 6)]
    cells = torch.tensor([[0, a, b, 7] for a, b in paths])
    generator = torch.Generator().manual_seed(3)
    rest = corners + 0.1 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    types = torch.tensor([NORMAL] * 7 + [OUTFLOW])
    velocities = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return MeshState(rest_positions=rest, velocities=velocities, node_types=types, cells=cells)


def vortices(places):
    x, y = (math.pi * places).unbind(1)
    return torch.stack([x.sin() * y.cos(), -x.cos() * y.sin()], 1)


def wavy(places):
    return 1.0 + 0.3 * torch.stack([(3 * places).sum(1).sin(), (2 * places[:, 0] - places[:, 1]).cos()], 1)


def recorded(steps=6, flow_scale=1.0):
    state = square(5, flow=lambda places: flow_scale * wavy(places), uneven=0.1)
    times = torch.arange(steps + 1, dtype=torch.float64)
    frames = {
        "velocities": state.velocities * (1 + 0.1 * times[:, None, None]),
        "pressures": torch.outer(times, state.rest_positions[:, 0]),
    }
    active = torch.ones(steps + 1, len(state), dtype=torch.bool)
    return Trajectory(initial=state, frames=frames, active=active, dt=DT)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {
        "outputs": {"velocities": 1, "pressures": 0},
        "inputs": ("velocities",),
        "num_node_types": 7,
        "num_dimensions": 0,
        "incompressible": True,
        "latent_size": 16,
        "num_message_passing_steps": 2,
    }
    statistics = MeshGraphNet.measure([recorded()], incompressible=True)
    return MeshGraphNet(dt=DT, statistics=statistics, **arguments | changes).double()


def test_a_flow_that_is_the_same_everywhere_goes_on():
    state = square(flow=lambda places: torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(len(places), 2))
    for terms in flow_terms(state, DT):
        torch.testing.assert_close(terms, torch.zeros_like(terms), atol=1e-10, rtol=0)


def test_pressures_of_vortices_are_those_of_the_books_ever_nearer_on_finer_meshes():
    # Taylor & Green's vortices are steady but for viscosity: p = (cos 2 pi x + cos 2 pi y) / 4, whose gradient
    # is what convection brings.
    errors, left = [], []
    for side in (9, 17, 33):
        state = square(side, flow=vortices, open_right=False)
        found = flow_terms(state, 1e-6)
        wanted = (2 * math.pi * state.rest_positions).cos().sum(1) / 4
        pressure = found.pressures[:, 0]
        errors.append(float((pressure - pressure.mean() - wanted + wanted.mean()).abs().max()))
        inner = ((state.rest_positions > 0.2) & (state.rest_positions < 0.8)).all(1)
        left.append(float(found.accelerations[inner, :2].sum(1).norm(dim=1).max()))
    for figures, ratio in ((errors, 0.35), (left, 0.5)):
        assert all(finer < ratio * coarser for coarser, finer in pairwise(figures))
    assert errors[-1] < 0.01


def test_convection_is_that_of_a_whole_step_in_which_waves_travel_on():
    wind, number, dt = 1.5, 4 * math.pi, 1 / 32  # one and a half cells in a step

    def wave(places):
        return torch.stack([torch.full_like(places[:, 0], wind), 0.01 * (number * places[:, 0]).sin()], 1)

    state = square(33, flow=wave)
    inner = ((state.rest_positions - 0.5).abs() < 0.3).all(1)
    found = flow_terms(state, dt).accelerations[inner, 0, 1]
    x = state.rest_positions[inner, 0]
    wanted = 0.01 * ((number * (x - wind * dt)).sin() - (number * x).sin()) / dt
    at_first = -0.01 * wind * number * (number * x).cos()
    assert float((found - wanted).norm()) < 0.06 * float(wanted.norm())
    assert float((at_first - wanted).norm()) > 0.25 * float(wanted.norm())


@pytest.mark.parametrize(("order", "stays"), [(1, False), (flow_module.ORDER, True)])
def test_a_flow_that_goes_far_in_a_step_stays_within_bounds(order, stays, monkeypatch):
    monkeypatch.setattr(flow_module, "ORDER", order)

    def channel(places):
        across = 6 * places[:, 1] * (1 - places[:, 1])
        return 8 * torch.stack([across, 0.3 * across * (9 * places[:, 0]).sin()], 1)

    state = square(17, flow=channel, uneven=0.1)
    fastest = float(state.velocities.norm(dim=1).max())
    assert 2.0 < fastest * DT * 16 < 2.8  # cells in a step
    for _ in range(80):
        change = DT * flow_terms(state, DT).accelerations[:, :3].sum(1)
        state = state.replace(velocities=torch.where(state.free[:, None], state.velocities + change, state.velocities))
        if not float(state.velocities.norm(dim=1).max()) < 1e3:
            break
    assert (float(state.velocities.norm(dim=1).max()) < 2 * fastest) == stays


def test_diffusion_is_the_laplacian():
    state = square(17, flow=lambda places: torch.stack([places[:, 1].square(), 3 * places[:, 0].square()], 1))
    inner = ((state.rest_positions > 0) & (state.rest_positions < 1)).all(1)
    found = flow_terms(state, DT).accelerations[inner, 3]
    torch.testing.assert_close(found, torch.tensor([[2.0, 6.0]], dtype=torch.float64).expand_as(found))


def test_a_potential_takes_out_what_diverges():
    state = square(17, uneven=0.1)  # at rest, when all at once fluid is let in
    let_in = (state.node_types == INFLOW).double()
    profile = 4 * let_in * state.rest_positions[:, 1] * (1 - state.rest_positions[:, 1])
    jolted = state.replace(velocities=torch.stack([profile, torch.zeros_like(profile)], 1))
    moved = jolted.velocities + DT * flow_terms(jolted, DT).accelerations[:, 2]
    middle = (jolted.rest_positions[:, 0] - 0.5).abs() < 0.3
    assert float(jolted.velocities[middle].abs().max()) == 0
    through = moved[(jolted.rest_positions[:, 0] - 0.5).abs() < 0.02, 0].mean()
    assert float(through) == pytest.approx(float(profile[let_in > 0].mean()), rel=0.15)  # what comes in goes on
    left = flow_terms(jolted.replace(velocities=torch.where(jolted.free[:, None], moved, jolted.velocities)), DT)
    assert float(left.pressures[:, 1].abs().max()) < 0.25 * float(flow_terms(jolted, DT).pressures[:, 1].abs().max())


@pytest.mark.parametrize("state", [square(5, flow=wavy, uneven=0.2), cube()], ids=["triangles", "tetrahedra"])
def test_slopes_are_those_of_differences(state):
    def total(speeds):
        found = flow_terms(state.replace(velocities=speeds), DT)
        return sum((values * torch.linspace(-1, 2, values.numel()).double().view_as(values)).sum() for values in found)

    speeds = state.velocities.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(speeds), speeds)
    way = torch.randn(speeds.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = (total(speeds.detach() + 1e-5 * way) - total(speeds.detach() - 1e-5 * way)) / 2e-5
    assert float((slope * way).sum()) == pytest.approx(float(measured), rel=1e-6)


def test_turning_a_flow_turns_its_terms():
    state = cube()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    turned = state.replace(rest_positions=state.rest_positions @ turn, velocities=state.velocities @ turn)
    first, second = flow_terms(state, DT), flow_terms(turned, DT)
    torch.testing.assert_close(second.accelerations, first.accelerations @ turn)
    torch.testing.assert_close(second.pressures, first.pressures)


def test_scenes_together_are_as_alone_and_nodes_of_no_cell_have_no_terms():
    open_one, closed = square(5, flow=wavy, uneven=0.2), square(6, flow=wavy, open_right=False)
    both = MeshState.cat([open_one, closed])
    for state, rows in ((open_one, slice(0, 25)), (closed, slice(25, 61))):
        for alone, together in zip(flow_terms(state, DT), flow_terms(both, DT), strict=True):
            torch.testing.assert_close(together[rows], alone)
    fields = {name: open_one[name] for name in open_one if name != "cells"}
    lonely = {name: torch.cat([values, values[:1]]) for name, values in fields.items()}
    found = flow_terms(MeshState(**lonely, cells=open_one.cells), DT)
    for alone, beside in zip(flow_terms(open_one, DT), found, strict=True):
        torch.testing.assert_close(beside[:-1], alone)
        assert not beside[-1].any()


@pytest.mark.parametrize("open_right", [True, False])
def test_parts_of_a_mesh_that_do_not_touch_are_as_alone(open_right):
    one, other = square(5, flow=wavy, uneven=0.1, open_right=open_right), square(6, flow=vortices, open_right=False)
    shared = {name: torch.cat([one[name], other[name]]) for name in one if name != "cells"}
    shared["rest_positions"] = torch.cat([one.rest_positions, other.rest_positions + 3])
    together = flow_terms(MeshState(**shared, cells=torch.cat([one.cells, other.cells + len(one)])), DT)
    for found, parts in zip(together, zip(flow_terms(one, DT), flow_terms(other, DT), strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts))


def test_a_cell_without_an_inside_is_refused_by_name():
    state = square(4, flow=wavy)
    flat = state.rest_positions.clone()
    flat[state.cells[3]] = flat[state.cells[3, :1]] + torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.2, 0.2]])
    with pytest.raises(ValueError, match=re.escape(f"nodes {state.cells[3].tolist()} has no inside")):
        flow_terms(state.replace(rest_positions=flat), DT)


def test_a_network_that_says_nothing_steps_by_the_equations():
    model, state = make(), recorded().initial
    for weights in model.network.decoder.parameters():
        weights.data.zero_()
    change = model.integrate(state, model(state)).velocities - state.velocities
    mean = torch.tensor(model.arguments["statistics"]["velocities_change_mean"], dtype=torch.float64)
    wanted = DT * flow_terms(state, DT).accelerations[:, :3].sum(1) + mean
    torch.testing.assert_close(change, torch.where(state.free[:, None], wanted, 0.0))


def test_what_comes_in_is_felt_everywhere_within_a_step():
    model, state = make(num_message_passing_steps=1), square(17, flow=wavy)
    faster = torch.where((state.node_types == INFLOW)[:, None], 2.0, 1.0) * state.velocities
    far = state.rest_positions[:, 0] > 0.8
    plain = make(num_message_passing_steps=1, incompressible=False)
    for network, felt in ((model, True), (plain, False)):
        before, after = network(state), network(state.replace(velocities=faster))
        assert (not torch.equal(before[far], after[far])) is felt


def test_it_keeps_the_contract():
    check_simulator(make(), recorded().initial)


def test_a_checkpoint_is_the_same_model(tmp_path):
    model, state = make().float(), recorded().initial.to(torch.float32)
    save_checkpoint(model, tmp_path / "flow.safetensors")
    again = rollout(state, simulator=load_checkpoint(tmp_path / "flow.safetensors"), num_steps=3)
    assert torch.equal(again["velocities"], rollout(state, simulator=model, num_steps=3)["velocities"])


def test_statistics_are_of_the_terms():
    path = recorded()
    found = MeshGraphNet.measure([path], incompressible=True)
    assert {f"{name}_std" for name in FLOW} <= found.keys()
    terms = [flow_terms(path.frame(t), DT) for t in range(len(path))]
    for number, name in enumerate(ACCELERATIONS):
        values = torch.cat([one.accelerations[:, number] for one in terms])
        assert found[f"{name}_std"] == pytest.approx(values.std(0, correction=0).tolist())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outputs": {"velocities": 0}}, "outputs = {velocities = 1, pressures = 0}"),
        ({"outputs": {"velocities": 1, "pressures": 1}}, "outputs = {velocities = 1, pressures = 0}"),
        ({"outputs": {"pressures": 0}}, "outputs = {velocities = 1, pressures = 0}"),
        ({"num_dimensions": 2}, "got outputs {'velocities': 1, 'pressures': 0} and dimensions 2 and 2"),
        ({"statistics": MeshGraphNet.measure([recorded()])}, "statistics lack convection"),
        ({"inputs": ["velocity"]}, "statistics lack velocity; those there are of rest_positions, "),
    ],
)
def test_arguments_that_cannot_be(changes, says):
    statistics = MeshGraphNet.measure([recorded()], incompressible=True)
    arguments = make().arguments | {"dt": DT, "statistics": statistics} | changes
    with pytest.raises(ValueError, match=re.escape(says)):
        MeshGraphNet(**arguments)


def test_cells_that_are_no_simplices_are_refused():
    state = square(3, flow=wavy)
    quads = {name: state[name] for name in state} | {"cells": torch.tensor([[0, 3, 4, 1]])}
    with pytest.raises(ValueError, match="cells of 3 nodes; got cells of 4"):
        make().step(MeshState(**quads))


def test_a_mesh_that_is_changed_is_factorized_anew():
    state = square(5, flow=wavy)
    flow_terms(state, DT)
    wider = state.replace(rest_positions=2 * state.rest_positions)
    fresh = MeshState(**{name: wider[name] for name in wider})
    for again, anew in zip(flow_terms(wider, DT), flow_terms(fresh, DT), strict=True):
        assert torch.equal(again, anew)


def test_states_go_to_other_processes_without_what_was_factorized():
    state = square(5, flow=wavy)
    wanted = flow_terms(state, DT)
    again = pickle.loads(pickle.dumps(state))
    for there, here in zip(flow_terms(again, DT), wanted, strict=True):
        assert torch.equal(there, here)


def run_of(tmp_path, **changes):
    (tmp_path / "run.toml").write_text(
        f"""
        model = "MeshGraphNet"
        data = "{tmp_path / "some"}"
        also = {changes.pop("also", [str(tmp_path / "more")])!r}
        out = "{tmp_path / "out"}"

        [arguments]
        outputs = {{velocities = 1, pressures = 0}}
        inputs = ["velocities"]
        num_node_types = 7
        num_dimensions = 0
        incompressible = true
        latent_size = 8
        num_message_passing_steps = 1

        [fit]
        num_steps = 2
        batch_size = 2
        mirror = [1]
        accelerator = "cpu"
        """
    )
    for name, path in {"some": recorded(), "more": recorded(flow_scale=3.0), **changes}.items():
        write_trajectories(tmp_path / name / "train.h5", [path], dataset=name, seed=len(name))
    return read_run(tmp_path / "run.toml")


@pytest.mark.parametrize("name", ["node_types", "rest_positions", "cells"])
def test_noise_in_what_does_not_change_is_refused(name):
    loss = one_step(noise_std={name: 0.01})
    with pytest.raises(
        ValueError, match=f"noise_std names {name}, which does not change; name one of velocities, pressures"
    ):
        loss.measure(make(), recorded().window(0, 2), torch.Generator())


def test_a_run_trains_on_further_folders_besides(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "more").mkdir()
    model = start(run_of(tmp_path))
    wanted = MeshGraphNet.measure([recorded(), recorded(flow_scale=3.0)], incompressible=True)
    for name in ("velocities_std", "convection_std", "flow_pressure_std"):
        assert model.arguments["statistics"][name] == pytest.approx(wanted[name], rel=1e-4)
    assert model.provenance["dataset"] == "some"
    assert model.provenance["also"] == [{"dataset": "more", "dataset_seed": 4}]
    slower = dataclasses.replace(recorded(), dt=2 * DT)
    with pytest.raises(ValueError, match=r"more.train\.h5 has dt 0\.02 and .* dt 0\.01 and .*trained on one of these"):
        start(run_of(tmp_path, more=slower))
    shutil.rmtree(tmp_path / "out")
    start(run_of(tmp_path, more=dataclasses.replace(recorded(), dt=DT * (1 + 1e-9))))  # as other programs write it
    with pytest.raises(ValueError, match="also must be a list of folders"):
        run_of(tmp_path, also="more")
