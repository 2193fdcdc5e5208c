from __future__ import annotations

import dataclasses

import pytest
import torch
from backends import COMPILED

from simworld import (
    Field,
    MeshGraphNet,
    MeshState,
    Trajectory,
    evaluate,
    load_checkpoint,
    one_step,
    rollout,
    rollout_relative_l2,
    save_checkpoint,
    unrolled,
    write_trajectories,
)
from simworld.graph import coarse_edges, mesh_edges, world_edges
from simworld.kinds import NORMAL, WALL
from simworld.metrics import relative_l2
from simworld.models.graph_network import Context, Groups
from simworld.models.meshgraphnet import PLACES
from simworld.models.normalizer import mean_and_std
from simworld.models.strains import edge_strains, node_strains
from simworld.prescriptions import script
from simworld.runs import read_run, start
from simworld.testing import check_simulator
from simworld.train import Fit, fit

Heated = MeshState.with_fields(heat=Field(unit="J"))


def plate(side=4, *, size=3, seed=0, **fields):
    """A square of `side`^2 nodes, cut into triangles (or quads, or lines), a little uneven, its left end held."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"generator": generator, "dtype": torch.float64}
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    rest = grid / side + 0.02 * torch.rand(grid.shape, **rows)
    corner = (torch.arange(side - 1)[:, None] * side + torch.arange(side - 1)).flatten()
    quads = torch.stack([corner, corner + side, corner + side + 1, corner + 1], 1)
    cells = {
        2: torch.cat([quads[:, [0, 1]], quads[:, [0, 3]]]),
        3: torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]),
        4: quads,
    }[size]
    held = grid[:, 0] == 0
    given = {
        "rest_positions": rest,
        "positions": rest + 0.01 * torch.randn(rest.shape, **rows),
        "velocities": 0.1 * torch.randn(rest.shape, **rows),
        "stresses": torch.randn(len(rest), 3, **rows),
        "heat": torch.rand(len(rest), **rows),
        "node_types": torch.where(held, WALL, NORMAL),
        "kinematic": held,
        "cells": cells,
        "parameters": torch.tensor([[2.0, 0.5]], dtype=torch.float64),
    }
    return Heated(**given | fields)


def recorded(state=None, steps=8, seed=1):
    """Something that happened to a plate: smooth at random."""
    state = plate() if state is None else state
    generator = torch.Generator().manual_seed(seed)
    times = torch.arange(steps + 1, dtype=torch.float64)
    frames = {}
    for name in state.dynamic_fields:
        way = torch.randn(state[name].shape, generator=generator, dtype=torch.float64) * 0.01
        frames[name] = state[name] + times.reshape(-1, *[1] * way.ndim).square() * way
    return Trajectory(initial=state, frames=frames, active=torch.ones(steps + 1, len(state), dtype=torch.bool), dt=0.1)


def make(seed=0, paths=None, **changes):
    torch.manual_seed(seed)
    arguments = {
        "outputs": {"positions": 2, "stresses": 0, "heat": 1},
        "inputs": ("velocities", "heat", "parameters"),
        "num_node_types": 7,
        "latent_size": 16,
        "num_message_passing_steps": 2,
    }
    measured = {"strains": changes.get("strains", ())}
    statistics = MeshGraphNet.measure([recorded()] if paths is None else paths, **measured)
    return MeshGraphNet(dt=0.1, statistics=statistics, **arguments | changes).double()


def talkative(model):
    """The model with contexts that say something: as made, they say nothing."""
    generator = torch.Generator().manual_seed(1)
    for context in model.network.contexts:
        for weights in context.parameters():
            weights.data.copy_(torch.randn(weights.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"world_radius": 0.4, "relative_inputs": ("heat", "velocities")},
        {"outputs": {"positions": 1, "velocities": 1}, "num_coarse_levels": 2},
        {"told": True, "num_contexts": 2},
        {"strains": ("edges", "nodes"), "num_coarse_levels": 1},
        {"normalizer": "online"},
    ],
)
@pytest.mark.parametrize("backend", COMPILED)
def test_it_keeps_the_contract(changes, backend):
    changes = dict(changes)
    told, model = changes.pop("told", False), make(backend=backend, **changes)
    check_simulator(talkative(model).eval() if told else model.eval(), plate(), tolerance=1e-9)


def test_it_keeps_the_contract_under_forces_in_space_without_rest_positions():
    flat = plate(size=2)
    state = MeshState(
        positions=torch.cat([flat.positions, flat.heat[:, None]], 1),
        velocities=torch.cat([flat.velocities, flat.heat[:, None]], 1),
        cells=flat.cells,
    )
    path = recorded(state)
    forces = torch.randn(8, len(state), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = Trajectory(initial=state, frames=path.frames, active=path.active, dt=0.1, actions=forces)
    sizes = {"num_dimensions": 3, "num_rest_dimensions": 0, "num_node_types": 1, "actions": "input"}
    model = make(paths=[path], outputs={"positions": 2}, inputs=("velocities",), **sizes)
    check_simulator(model, state, forces, tolerance=1e-9)
    with pytest.raises(ValueError, match="needs actions"):
        model.step(state)
    for wrong in (torch.ones(16, 1), torch.ones(5, 3), torch.ones(3)):
        with pytest.raises(ValueError, match=r"takes actions \[16, 3\] of nodes or \[1, 3\] of scenes; got"):
            model.step(state, wrong.double())


@pytest.mark.parametrize("orders", [{"positions": 2, "stresses": 0}, {"positions": 1, "heat": 1}, {"velocities": 1}])
def test_integrating_the_target_gives_the_next_state(orders):
    path = recorded()
    model = make(outputs=orders)
    before, after = path.frame(3), path.frame(4)
    if orders.get("positions") == 2:  # what comes after must be where its velocity led
        after = after.replace(positions=before.positions + 0.1 * after.velocities)
    made = model.integrate(before, model.target(before, after))
    free = before.free
    for name, order in orders.items():
        assert torch.allclose(made[name][free], after[name][free], atol=1e-12)
        if order == 0:  # nobody holds what is read off: it is predicted of held nodes, too
            assert torch.allclose(made[name][~free], after[name][~free], atol=1e-12)
        else:
            assert torch.equal(made[name][~free], before[name][~free])
    if "positions" in orders:
        assert torch.allclose(made.positions[free] - before.positions[free], 0.1 * made.velocities[free], atol=1e-12)


def test_it_has_as_many_parameters_as_the_published_network():
    state = plate()
    flow = MeshState(**{k: state[k] for k in ("rest_positions", "velocities", "cells", "node_types", "kinematic")})
    model = make(
        paths=[recorded(flow)],
        outputs={"velocities": 1},
        inputs=("velocities",),
        num_node_types=9,
        num_dimensions=0,
        latent_size=128,
        num_message_passing_steps=15,
    )
    # Encoders of 11 features of nodes and 3 of edges, 15 rounds of an edge and a node network, a decoder of 2.
    perceptron = [128 * 128 + 128] * 2
    encoders = (11 * 128 + 128) + (3 * 128 + 128) + 2 * (sum(perceptron) + 256)
    rounds = 15 * ((3 * 128 * 128 + 128) + (2 * 128 * 128 + 128) + 2 * (sum(perceptron) + 256))
    assert model.num_parameters == encoders + rounds + sum(perceptron) + 2 * 128 + 2


@pytest.mark.parametrize(("size", "count"), [(2, 18), (3, 33), (4, 24)])
def test_edges_are_those_of_cells_once_in_each_direction(size, count):
    state = plate(size=size)
    edges = mesh_edges(state)
    pairs = set(zip(edges.senders.tolist(), edges.receivers.tolist(), strict=True))
    assert len(pairs) == len(edges.senders) == 2 * count
    assert pairs == {(b, a) for a, b in pairs}
    assert (edges.receivers.diff() >= 0).all()
    assert edges.starts.tolist() == [int((edges.receivers < n).sum()) for n in range(len(state))]
    assert mesh_edges(state.replace(velocities=-state.velocities)) is edges  # found once for a rollout


def test_a_tetrahedron_has_six_edges_and_a_hexahedron_twelve():
    for nodes, count in ((4, 6), (8, 12)):
        places = torch.rand(nodes, 3, generator=torch.Generator().manual_seed(0))
        state = MeshState(rest_positions=places, velocities=places, cells=torch.arange(nodes)[None])
        assert len(mesh_edges(state).senders) == 2 * count
    with pytest.raises(ValueError, match="got cells of 5"):
        mesh_edges(MeshState(rest_positions=torch.rand(5, 2), velocities=torch.rand(5, 2), cells=torch.arange(5)[None]))


def test_world_edges_join_what_is_near_and_no_mesh_edge_joins():
    state, radius = plate(), 0.6
    edges, mesh = world_edges(state, radius), mesh_edges(state)
    far = torch.cdist(state.positions, state.positions)
    joined = torch.eye(len(state), dtype=torch.bool)
    joined[mesh.receivers, mesh.senders] = True
    wanted = ((far <= radius) & ~joined & state.free[:, None]).nonzero()
    assert len(wanted) > 20
    assert torch.equal(torch.stack([edges.receivers, edges.senders], 1), wanted)


def line(count, parts=1):
    """Nodes in a row, or in several rows that nothing joins."""
    number = torch.arange(count * parts)
    cells = torch.stack([number[:-1], number[1:]], 1)
    places = number[:, None].double()
    return MeshState(rest_positions=places, velocities=places, cells=cells[cells[:, 1] % count != 0])


def test_coarser_levels_of_a_line_are_every_second_node():
    for state in (line(17), line(17, parts=3), MeshState.cat([line(17), line(17)])):
        for level, edges in enumerate(coarse_edges(state, 3), start=1):
            stride, rows = 2**level, len(state) // 17
            assert (edges.senders - edges.receivers).abs().unique().tolist() == [stride]
            assert len(edges.senders) == 2 * rows * (16 // stride)
            assert (edges.receivers % 17 % stride == 0).all()


def test_coarser_levels_join_nodes_kept_that_were_two_edges_apart():
    state = plate(side=6)
    mesh, (coarse, coarser) = mesh_edges(state), coarse_edges(state, 2)
    near = torch.zeros(36, 36, dtype=torch.bool)
    near[mesh.receivers, mesh.senders] = True
    two = near | ((near.float() @ near.float()) > 0)
    assert two[coarse.receivers, coarse.senders].all()
    kept = coarse.receivers.unique()
    assert len(kept) < 36
    assert set(coarser.receivers.tolist()) < set(kept.tolist())
    wanted = two[kept][:, kept].fill_diagonal_(False)
    assert len(coarse.senders) == int(wanted.sum())
    assert (coarse.receivers.diff() >= 0).all()


def test_messages_over_coarser_levels_reach_further():
    state = plate(side=9)
    pushed = state.replace(heat=state.heat.index_add(0, torch.tensor([80]), torch.ones(1, dtype=torch.float64)))
    reached = []
    for levels in (0, 2):
        model = make(num_coarse_levels=levels, paths=[recorded(state)])
        reached.append(int((model(pushed) != model(state)).any(1).sum()))
    assert reached[0] < reached[1]


def test_contexts_carry_across_the_mesh_at_once_and_begin_as_nothing():
    state = plate(side=9)
    pushed = state.replace(heat=state.heat.index_add(0, torch.tensor([80]), torch.ones(1, dtype=torch.float64)))
    plain, model = (make(num_contexts=count, paths=[recorded(state)]) for count in (0, 1))
    model.load_state_dict(model.state_dict() | plain.state_dict())
    assert torch.equal(model(state), plain(state))
    talkative(model)
    free = model.free(state)
    assert not bool((plain(pushed) != plain(state)).any(1)[free].all())
    assert bool((model(pushed) != model(state)).any(1)[free].all())
    model.network.nodes_at_once = 20
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be cut in parts"):
        model(state)


def test_a_run_goes_on_with_contexts_and_normalizers_that_were_not_there(tmp_path):
    plain, path = make(), recorded()
    save_checkpoint(plain, tmp_path / "plain.safetensors")
    write_trajectories(tmp_path / "train.h5", [path], dataset="plates")
    text = f"""
    model = "MeshGraphNet"
    precision = "float64"
    data = "{tmp_path}"
    out = "{tmp_path / "run"}"
    initial = "{tmp_path / "plain.safetensors"}"
    arguments = {{num_contexts = 1, normalizer = "online"}}
    fit = {{num_steps = 1, batch_size = 1, learning_rate = 1e-12, accelerator = "cpu"}}
    """

    def run(text):
        (tmp_path / "run.toml").write_text(text)
        return start(read_run(tmp_path / "run.toml"))

    model = run(text)
    assert (len(model.network.contexts), model.arguments["num_contexts"]) == (1, 1)
    assert model._of("heat").sums[0].tolist() == [1 + 2 * 16]
    back = f'initial = "{tmp_path / "run" / "model.safetensors"}"'
    back = text.replace(f'initial = "{tmp_path / "plain.safetensors"}"', back).replace('"online"', '"dataset"')
    again = run(back.replace(f'out = "{tmp_path / "run"}"', f'out = "{tmp_path / "again"}"'))
    assert torch.allclose(again(path.initial), plain(path.initial), atol=1e-6)
    with pytest.raises(ValueError, match="do not fit a MeshGraphNet"):
        run(text.replace("num_contexts = 1", "num_contexts = 1, latent_size = 8"))


def test_contexts_tell_of_means_of_each_type_of_those_that_are_there():
    groups = Groups.of(
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([0, 1, 1, 1, 1]),
        torch.tensor([True, True, True, True, False]),
        2,
        2,
    )
    assert groups.weights.tolist() == [1.0, 0.5, 0.5, 1.0, 0.0]
    context = Context(1, 2).double()
    context.told.weight.data.copy_(torch.tensor([[1.0, 10.0]]))
    nodes = torch.tensor([[1.0], [2.0], [4.0], [5.0], [7.0]], dtype=torch.float64)
    told = context(nodes, groups) - nodes
    assert told[:, 0].tolist() == [31.0, 31.0, 31.0, 50.0, 50.0]


def test_the_trapezoidal_rule_takes_the_mean_velocity():
    path, model = recorded(), make(outputs={"positions": 2}, integrator="trapezoid")
    before, after = path.frame(3), path.frame(4)
    made = model.integrate(before, model.target(before, after))
    free = before.free
    assert torch.allclose(made.velocities[free], after.velocities[free], atol=1e-12)
    way = 0.05 * (before.velocities + after.velocities)
    assert torch.allclose((made.positions - before.positions)[free], way[free], atol=1e-12)


def test_the_relative_loss_is_the_metric_averaged_over_scenes_frames_and_fields():
    model, paths = make(), [recorded(), recorded(plate(3, seed=4), seed=5)]
    loss = rollout_relative_l2(8).measure(model, Trajectory.cat(paths), torch.Generator())
    wanted = []
    for path in paths:
        made = rollout(path.initial, simulator=model, num_steps=8, interventions=script(path, model.auxiliary))
        wanted += [relative_l2(name)(made, path)[1:] for name in ("positions", "velocities", "stresses", "heat")]
    assert torch.isclose(loss, torch.stack(wanted).mean())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_components_that_do_not_vary_are_measured_by_those_that_do():
    """Velocities along one axis only: noise, and other files, have the other axis, too."""
    path = recorded()
    still = {name: values.clone() for name, values in path.frames.items()}
    still["velocities"][..., 1] = 0.0
    still["heat"][:] = 3.0
    start = path.initial.replace(velocities=still["velocities"][0], heat=still["heat"][0])
    flat = dataclasses.replace(path, initial=start, frames=still)
    found = MeshGraphNet.measure([flat])
    for name in ("velocities", "velocities_change", "velocities_edge"):
        across, along = found[f"{name}_std"]
        assert along == across > 0
    assert found["heat_std"] == [3.0]
    assert found["heat_edge_std"] == [1.0]
    noisy = MeshGraphNet.measure([flat], noise_std=0.5)
    for name, added in (("velocities", 0.5), ("velocities_change", 0.5), ("velocities_edge", 0.5 * 2**0.5)):
        assert noisy[f"{name}_std"][1] == pytest.approx(added)
    for name, added in (("positions_change", 0.05), ("positions_edge", 0.05 * 2**0.5)):
        wanted = (torch.tensor(found[f"{name}_std"]).square() + added**2).sqrt().tolist()
        assert noisy[f"{name}_std"] == pytest.approx(wanted)


def test_kinematic_nodes_are_seen_and_held():
    path, model = recorded(), make()
    held = path.initial.kinematic
    moved = rollout(path.initial, simulator=model, num_steps=8, interventions=script(path, model.auxiliary))
    for name in ("positions", "velocities", "heat"):
        assert torch.equal(moved[name][:, held], path[name][:, held])
    assert model.auxiliary == ("stresses",)
    assert ((moved["stresses"] - path["stresses"])[1:, held].abs() > 1e-6).all()
    alone = rollout(path.initial, simulator=model, num_steps=8)
    first = rollout(path.initial, simulator=make(outputs={"positions": 1}), num_steps=8)
    for name in ("positions", "velocities"):
        assert torch.equal(alone[name][-1, held], path[name][0, held])
        assert torch.equal(first[name][-1, held], path[name][0, held])
    assert not torch.allclose(alone["positions"][-1, ~held], moved["positions"][-1, ~held])


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_noise_is_taken_out_of_the_next_position_or_velocity(gamma):
    """A network that gives the target meets the recorded next position, or velocity, from a state with noise."""
    path, clean = recorded(), {}
    clean["positions"] = path["positions"]
    clean["velocities"] = torch.cat([path["velocities"][:1], path["positions"].diff(dim=0) / 0.1])
    path = dataclasses.replace(path, frames={**path.frames, **clean}).window(0, 2)
    model, seen = make(outputs={"positions": 2}), {}

    def target(state, after, action=None):
        seen["made"] = model.integrate(state, MeshGraphNet.target(model, state, after, action))
        return MeshGraphNet.target(model, state, after, action)

    model.target = target
    one_step(noise_std=0.3, noise_gamma=gamma).measure(model, path, torch.Generator().manual_seed(0))
    free, made = path.initial.free, seen["made"]
    misses = {k: (made[k] - path[k][1])[free].abs().max() for k in ("positions", "velocities")}
    assert misses["positions" if gamma == 0 else "velocities"] < 1e-9
    assert misses["velocities" if gamma == 0 else "positions"] > 1e-3
    heat = one_step(noise_std={"heat": 0.1}, noise_gamma=gamma)
    assert heat.measure(make(outputs={"heat": 1}), path, torch.Generator()).isfinite()


def test_steps_from_recorded_frames_need_no_velocities():
    path = recorded()
    fields = {k: v for k, v in path.initial.fields.items() if k in path.initial and k != "velocities"}
    start = Heated(**{k: path.initial[k] for k in fields})
    frames = {k: v for k, v in path.frames.items() if k != "velocities"}
    bare = dataclasses.replace(path, initial=start, frames=frames)
    rows = evaluate({}, [bare], dataset="x", horizons=(1,))
    assert {row.metric for row in rows} >= {"one_step_position_mse", "heat_relative_l2"}


def test_what_is_predicted_of_held_nodes_is_learned_and_measured_there():
    """Stresses of nodes that are held enter the loss and the error, of this model and of the naive rows beside it."""
    path, model = recorded(), make()
    held = path.initial.kinematic
    changed = path["stresses"].clone()
    changed[1:, held] += 5.0
    other = dataclasses.replace(path, frames={**path.frames, "stresses": changed})
    for loss in (one_step(), unrolled(2), rollout_relative_l2(2)):
        window, moved = (one.window(0, 1 + loss.num_steps) for one in (path, other))
        assert loss.measure(model, window, torch.Generator()) != loss.measure(model, moved, torch.Generator())
    rows = [evaluate({"m": model}, [one], dataset="x", horizons=("all",)) for one in (path, other)]
    found = [{row.model: row.value for row in table if row.metric == "stresses_relative_l2"} for table in rows]
    assert found[0]["m"] != found[1]["m"]
    assert found[0]["static"] != found[1]["static"]


def test_where_a_mesh_lies_does_not_matter():
    state, model = plate(), make()
    way = torch.tensor([3.0, -2.0], dtype=torch.float64)
    there = state.replace(positions=state.positions + way, rest_positions=state.rest_positions - way)
    assert torch.allclose(model(there), model(state), atol=1e-9)


STRAINS = pytest.mark.parametrize("strains", [edge_strains, node_strains])


def solid(kind):
    """A mesh at rest: a plate in its plane, or in space a sheet, and a line, whose nodes' edges do not span it."""
    if kind == "plate":
        return plate()
    flat = plate().rest_positions
    places = torch.cat([flat, torch.zeros(len(flat), 1, dtype=torch.float64)], 1)
    ends = torch.arange(len(flat))
    cells = plate().cells if kind == "sheet" else torch.stack([ends[:-1], ends[1:]], 1)
    return MeshState(rest_positions=places, positions=places, velocities=0 * places, cells=cells)


@STRAINS
@pytest.mark.parametrize("kind", ["plate", "sheet", "line"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strains_are_of_the_shape_and_not_of_the_place(strains, kind, dtype):
    state = solid(kind)
    edges, size = mesh_edges(state), state.rest_positions.shape[1]
    generator = torch.Generator().manual_seed(3)
    turn, spin = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    there = state.rest_positions @ torch.linalg.qr(turn)[0] + 3.0
    turned = state.replace(positions=there, velocities=there @ (spin - spin.T) - 2.0).to(dtype)
    assert strains(turned, edges, rates=False).abs().max() < (1e-2 if dtype == torch.float32 else 1e-9)
    assert strains(turned, edges, rates=True).abs().max() < (1e-2 if dtype == torch.float32 else 1e-9)


def test_strains_of_what_grew_are_those_of_the_books():
    state, edges = plate(), mesh_edges(plate())
    grown = state.replace(positions=1.5 * state.rest_positions, velocities=2.0 * state.rest_positions)
    green, almansi, rate = (1.5**2 - 1) / 2, (1 - 1 / 1.5**2) / 2, 2.0 / 1.5
    assert torch.allclose(edge_strains(grown, edges, rates=False), torch.tensor(green, dtype=torch.float64))
    assert torch.allclose(edge_strains(grown, edges, rates=True), torch.tensor(1.5**2 * rate, dtype=torch.float64))
    for rates, wanted in ((False, almansi), (True, rate)):
        found = node_strains(grown, edges, rates=rates)
        assert torch.allclose(found, torch.tensor([wanted, 0.0, wanted], dtype=torch.float64), atol=2e-3)
    sheared = state.replace(positions=state.rest_positions, velocities=state.rest_positions[:, [1, 0]])
    wanted = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(node_strains(sheared, edges, rates=True), wanted, atol=2e-3)
    line = solid("line")
    along = line.rest_positions - line.rest_positions[0]
    stretched = node_strains(line.replace(velocities=along), mesh_edges(line), rates=True)
    assert torch.allclose(stretched[0, [0, 3, 5]].sum(), torch.tensor(1.0, dtype=torch.float64), atol=2e-3)


def test_nodes_without_edges_have_no_strains():
    state = plate()
    alone = state.replace(cells=state.cells[(state.cells != 5).all(1)])
    for rates in (False, True):
        found = node_strains(alone, mesh_edges(alone), rates=rates)
        assert (found[5] == 0).all()
        assert found[6].abs().max() > 0


def test_cloth_has_strains_along_its_edges():
    flat = plate()
    sheet = solid("sheet").replace(positions=1.1 * solid("sheet").positions)
    cloth = {"rest_positions": flat.rest_positions, "positions": sheet.positions, "velocities": sheet.velocities}
    found = edge_strains(cloth, mesh_edges(flat), rates=False)
    assert torch.allclose(found, torch.tensor((1.1**2 - 1) / 2, dtype=torch.float64))


@STRAINS
def test_strain_rates_are_how_fast_strains_change(strains):
    state, edges, dt = plate(), mesh_edges(plate()), 1e-6
    if strains is node_strains:  # in the axes of space, rates are those of strains from the present shape
        state = state.replace(positions=state.rest_positions)
    later = state.replace(positions=state.positions + dt * state.velocities)
    found = (strains(later, edges, rates=False) - strains(state, edges, rates=False)) / dt
    wanted = strains(state, edges, rates=True)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))


def test_strains_are_told_in_units_of_what_they_are_in_the_data():
    path, both = recorded(), ("edges", "nodes")
    measured, edges = MeshGraphNet.measure([path], strains=both), mesh_edges(path.initial)
    assert not any(name.startswith("strain") for name in MeshGraphNet.measure([path]))
    for name, rates in (("strains", False), ("strain_rates", True)):
        for where, strains in (("edge", edge_strains), ("node", node_strains)):
            values = torch.stack([strains(path.frame(step), edges, rates=rates) for step in range(len(path))])
            wanted = values.flatten(0, 1).std(0, correction=0)
            assert measured[f"{name}_{where}_std"] == pytest.approx(wanted.tolist())
    features = make(strains=both)._edge_features(path.initial, edges, PLACES)[:, -2:]
    std = torch.tensor([measured[f"{name}_edge_std"][0] for name in ("strains", "strain_rates")], dtype=torch.float64)
    wanted = torch.cat([edge_strains(path.initial, edges, rates=rates) for rates in (False, True)], 1) / std
    assert torch.allclose(features, wanted)


def test_strains_that_data_do_not_have_are_refused():
    with pytest.raises(ValueError, match=r"strains are of 'edges' and 'nodes'.*got \['faces'\]"):
        MeshGraphNet.measure([recorded()], strains=("faces",))
    state = plate()
    double = state.replace(rest_positions=torch.cat([state.rest_positions[:1], state.rest_positions[:-1]]))
    with pytest.raises(ValueError, match="edges of no length"):
        MeshGraphNet.measure([recorded(double)], strains="edges")


def test_an_online_normalizer_measures_what_it_is_shown_and_nothing_else():
    paths = [recorded(seed=number) for number in range(3)]
    noise = {"velocities": 0.05, "heat": 0.1}
    online = make(paths=paths[:1], normalizer="online", strains="edges")
    at_first = online(paths[0].initial)
    for path in paths * 20:
        online.observe(path, noise)
    whole = MeshGraphNet.measure(paths, noise_std=noise, strains="edges")
    found = {name: mean_and_std(online._of(name).sums) for name in ("heat", "velocities_change", "strains_edge")}
    for name, (mean, std) in found.items():  # what it began with is one row of thousands
        assert mean.tolist() == pytest.approx(whole[f"{name}_mean"], rel=1e-2, abs=1e-3)
        assert std.tolist() == pytest.approx(whole[f"{name}_std"], rel=1e-2)
    later = online(paths[0].initial)
    assert not torch.equal(later, at_first)
    online.train()(paths[1].initial)
    assert torch.equal(online(paths[0].initial), later)  # what it predicts from is not what it is shown
    kept = make(paths=paths[:1])
    before = kept(paths[0].initial)
    kept.observe(paths[1])
    assert torch.equal(kept(paths[0].initial), before)
    assert online.half()._of("heat").sums.dtype == torch.float64


def test_a_run_with_online_normalizers_goes_on_to_the_same_bits(tmp_path):
    paths = [recorded(seed=number).to(torch.float32) for number in range(3)]
    how = {"batch_size": 2, "warm_up": 0, "num_valid": 0, "evaluate_every": 2, "accelerator": "cpu"}

    def model():
        return make(paths=paths[:1], normalizer="online").float()

    whole = fit(model(), paths, one_step(), Fit(num_steps=4, **how), out=tmp_path / "whole")
    seen = whole._of("heat").sums
    assert float(seen[0, 0]) == 1 + 4 * 2 * 2 * 16  # a row, then each step's two windows of two frames of 16 nodes

    class Stopped(Exception): ...

    def stop(progress):
        raise Stopped

    with pytest.raises(Stopped):
        fit(model(), paths, one_step(), Fit(num_steps=4, **how), out=tmp_path / "cut", watch=stop)
    again = fit(model(), paths, one_step(), Fit(num_steps=4, **how), out=tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    loaded = load_checkpoint(tmp_path / "whole" / "model.safetensors")  # of which the weights and the sums are
    state = plate().to(torch.float32)
    assert torch.equal(loaded(state), whole(state))


def test_a_checkpoint_is_the_same_model(tmp_path):
    model, state = make(world_radius=0.4, strains="edges").float(), plate().to(torch.float32)
    save_checkpoint(model, tmp_path / "plate.safetensors")
    again = load_checkpoint(tmp_path / "plate.safetensors")
    assert torch.equal(again(state), model(state))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outputs": {}}, "outputs names fields"),
        ({"outputs": {"positions": 3}}, "outputs names fields"),
        ({"outputs": {"heat": 2}}, "Only positions are integrated twice"),
        ({"outputs": {"positions": 2, "velocities": 1}}, "leave velocities out"),
        ({"inputs": ("wetness",)}, "statistics lack wetness"),
        ({"inputs": (), "num_node_types": 1}, "name fields in inputs"),
        ({"num_dimensions": 4}, "must be 0 to 3"),
        ({"world_radius": -1.0}, "world_radius must be a positive distance"),
        ({"num_dimensions": 0, "world_radius": 1.0}, "between nodes with positions"),
        ({"latent_size": 0}, "latent_size must be a whole number"),
        ({"actions": "maybe"}, "actions must be"),
        ({"num_coarse_levels": -1}, "num_coarse_levels must be a whole number"),
        ({"num_contexts": -1}, "num_contexts must be a whole number"),
        ({"num_contexts": 3}, "at most num_message_passing_steps, 2; got 3"),
        ({"integrator": "verlet"}, "integrator must be"),
        ({"normalizer": "batch"}, "normalizer must be 'dataset' or 'online'"),
        ({"strains": ("stress",)}, "strains are of 'edges' and 'nodes'"),
        ({"strains": ("edges",), "num_rest_dimensions": 0}, "have positions, rest_positions and velocities"),
        ({"strains": ("nodes",), "num_rest_dimensions": 3}, "in as many dimensions"),
    ],
)
def test_arguments_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        make(**changes)


def test_states_it_cannot_step():
    model, state = make(), plate()
    for lacking in ("heat", "positions", "node_types"):
        fields = {name: state[name] for name in state if name != lacking}
        with pytest.raises(ValueError, match=lacking):
            model.step(Heated(**fields))
    with pytest.raises(ValueError, match="node_types from 0 to 6"):
        model.step(state.replace(node_types=torch.full((16,), 9)))
    with pytest.raises(ValueError, match=r"made for parameters of 2 numbers; got 3"):
        model.step(plate(parameters=torch.ones(1, 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="computes in torch.float64"):
        model.step(state.to(torch.float32))
    with pytest.raises(ValueError, match="without actions"):
        model.step(state, torch.zeros(16, 2, dtype=torch.float64))
