"""What engines make of interventions: worlds built anew, the past kept, and what cannot be heeded refused."""

from __future__ import annotations

import pytest
import torch

from simworld import do, pin, rollout
from simworld.data.generate import GENERATORS
from simworld.intervene import negate, scale
from simworld.kinds import HANDLE, INFLOW, NORMAL, OBSTACLE
from simworld.physics import PushEngine, balls_engine, balls_episode, push_episode, rope_episode, string_engine
from simworld.physics.interaction_worlds import string_episode
from simworld.physics.planar import PlanarEngine

SEEDS = ([7, 0, 0], [7, 0, 1])
SMALL_PARTICLES = {"num_steps": 4, "num_cells": 12, "min_particles": 20, "max_particles": 60}
SMALL = {
    "rope": {"num_steps": 12, "warm_up_steps": 5},
    "balls_in": {"num_steps": 12},
    "string_in": {"num_steps": 6},
    "cradle": {"num_steps": 12},
    "push_3d": {"num_steps": 6, "num_bodies": 3},
    "springs_nri": {"num_frames": 6},
    "charged_nri": {"num_frames": 6},
    "nbody_egnn": {"num_frames": 5, "every": 2},
    "nbody_in": {"num_steps": 6},
    "water_drop": SMALL_PARTICLES,
    "sand_ramps": SMALL_PARTICLES | {"num_cells": 28},
    "water_ramps": SMALL_PARTICLES | {"num_cells": 28},
    "goop": SMALL_PARTICLES,
    "water_3d": SMALL_PARTICLES | {"num_cells": 8, "num_steps": 3, "max_particles": 100},
    "tgv_2d": {"num_steps": 4, "num_per_side": 12, "num_sub_steps": 10, "num_relax_steps": 1},
    "cylinder_flow": {"num_steps": 5, "size": 0.1, "obstacle_size": 0.04, "warm_up": 0.05, "length": 1.0},
    "deforming_plate": {"num_steps": 4, "size": 0.05},
    "flag_simple": {"num_steps": 4, "size": 0.3, "warm_up": 0.1},
    "sphere_cloth": {"num_steps": 4, "size": 0.3},
}
EXTRAS = {
    **dict.fromkeys(("rope", "balls_in", "string_in", "cradle"), "pymunk"),
    "push_3d": "mujoco",
    "cylinder_flow": "gmsh",
    "deforming_plate": "scipy",
    **dict.fromkeys(("flag_simple", "sphere_cloth"), "newton"),
}


def make(name, *interventions, seeds=SEEDS[:1], **arguments):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], exc_type=(ImportError, OSError))
    paths = GENERATORS[name].make(seeds, **{**SMALL[name], **arguments}, interventions=interventions)
    return paths if len(seeds) > 1 else paths[0]


def same(path, other, frames=slice(None)):
    return set(path.frames) == set(other.frames) and all(
        torch.equal(path[name][frames], other[name][frames]) for name in path.frames
    )


def faster(state, moves):
    """Velocities with those that `moves` has changed."""
    return torch.where(moves[:, None], state.velocities + 0.05 * state.velocities.abs().amax(), state.velocities)


def hurry(at):
    """What an engine of any world answers: another velocity, of a node of known velocity where there are such."""

    def change(state, step):
        if step != at:
            return state
        free = torch.arange(len(state)) == int(state.free.nonzero()[0, 0])
        if "node_types" in state:
            types = state.node_types
            free = types == (OBSTACLE if (types == OBSTACLE).any() and "pressures" not in state else NORMAL)
            free = types == INFLOW if (types == INFLOW).any() else free
        return state.replace(velocities=faster(state, free))

    return change


@pytest.mark.parametrize("name", SMALL)
def test_every_world_answers_and_keeps_its_past(name):
    plain = make(name)
    still = make(
        name, do(at=range(9), positions=lambda x: x.clone()) if "positions" in plain.frames else lambda s, t: s
    )
    assert same(plain, still)
    path = make(name, hurry(2))
    assert same(plain, path, slice(2))
    assert torch.equal(plain.initial.active, path.initial.active)
    assert not torch.equal(plain["velocities"][2], path["velocities"][2])
    known = "positions" if "positions" in plain.frames else "velocities"
    assert not torch.equal(plain[known][3], path[known][3])


@pytest.mark.parametrize("name", sorted(set(GENERATORS) - set(SMALL) - {"solar_system"}))
def test_the_others_are_the_same_functions(name):
    assert GENERATORS[name].episode is GENERATORS[name.removesuffix("_small")].episode


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("rope", {"object_types": 1}, "object_types at frame 0 .* PlanarEngine does not read it. Change positions"),
        ("rope", {"velocities": 1.0, "entities": [0]}, "Body 0 is fixed"),
        ("rope", {"radii": 40.0, "entities": [3]}, "leaves bodies 3 and 0 overlapping by"),
        ("balls_in", {"positions": 0.0, "entities": [0]}, "leaves body 0 .* deep in a wall"),
        ("push_3d", {"radii": 0.01}, "PushEngine does not read it"),
        ("push_3d", {"positions": lambda x: x - 0.02, "entities": [0]}, "Body 0 is below the table z = 0 by"),
        ("springs_nri", {"charges": 1.0}, "does not carry"),
        ("springs_nri", {"positions": 5.5, "entities": [0]}, "Bodies must be inside the walls"),
        ("springs_nri", {"positions": 9.0, "entities": [0]}, "far outside its box from"),
        ("water_drop", {"positions": 2.0, "entities": [0]}, "particle 0 is outside"),
        ("water_drop", {"particle_types": 3}, "Say kinematic=True"),
        ("tgv_2d", {"particle_types": 6}, "SPHEngine does not read it"),
        ("cylinder_flow", {"pressures": 0.0}, "ChannelFlow does not read it. Change velocities"),
        ("cylinder_flow", {"active": False, "entities": [0]}, "ChannelFlow does not read it"),
        ("deforming_plate", {"stresses": 1.0}, "Solid does not read it"),
        ("deforming_plate", {"positions": 0.0, "entities": [9]}, "move its held nodes or the ball"),
        ("deforming_plate", {"active": False, "entities": [-1]}, "ball is there or not"),
        ("flag_simple", {"active": False, "entities": [3]}, "A cloth keeps its nodes"),
        ("flag_simple", {"velocities": 1.0, "entities": [0]}, "Held nodes of a cloth stay"),
        ("flag_simple", {"node_types": 0}, "Cloth does not read it"),
        ("sphere_cloth", {"positions": 0.0, "entities": [-1]}, "The ball is rigid"),
    ],
)
def test_what_cannot_be_heeded_is_refused(name, change, says):
    where = change.get("entities")
    if where == [-1] or where == [9]:
        start = make(name).initial
        last = len(start) - 1 if where == [-1] else int((start.node_types == NORMAL).nonzero()[0, 0])
        change = {**change, "entities": [last]}
    at = 0 if name != "water_drop" or "positions" not in change else 1
    with pytest.raises(ValueError, match=says):
        make(name, do(at=at, **change))


def test_a_removed_body_no_longer_matters():
    plain = make("rope", num_steps=60, warm_up_steps=50, seeds=[[7, 1, 1]])
    path = make("rope", do(active=False, entities=[15, 16]), num_steps=60, warm_up_steps=50, seeds=[[7, 1, 1]])
    assert torch.equal(path["positions"][:, 15:], plain["positions"][:, 15:])
    assert not path.active[:, 15:].any()
    assert torch.equal(path.actions, plain.actions)
    engine, small = PlanarEngine(dt=path.dt), path.initial.replace(radii=path.initial.radii.where(path.active[0], 1.0))
    again = engine.replay(small, path.actions)
    assert torch.equal(again["positions"], path["positions"])
    assert (path["positions"] - plain["positions"]).norm(dim=2).max() > 0.1


@pytest.mark.parametrize(
    ("episode", "engine", "change"),
    [
        (lambda *i: rope_episode([7, 1, 1], num_steps=25, interventions=i), PlanarEngine(dt=1 / 50), {"entities": [5]}),
        (lambda *i: balls_episode([7, 1, 0], num_steps=60, interventions=i), balls_engine(), {"entities": [2]}),
        (lambda *i: string_episode([7, 1, 0], num_steps=25, interventions=i), string_engine(), {"entities": [5]}),
        (lambda *i: push_episode([7, 1, 0], num_steps=20, interventions=i), PushEngine(), {"entities": [0]}),
    ],
)
def test_from_a_change_on_it_is_the_run_of_a_fresh_solver(episode, engine, change):
    plain = episode()
    path = episode(do(at=10, velocities=lambda v: 0.5 * v, **change))
    rest = None if path.actions is None else path.actions[10:]
    again = engine.replay(path.frame(10), rest, num_steps=path.num_steps - 10)
    assert same(path.window(10, len(path)), again)
    assert same(path, plain, slice(10))
    assert torch.equal(path["positions"][10], plain["positions"][10])


def test_restarts_make_a_twin_that_differs_by_the_change_alone():
    engine, start = balls_engine(), balls_episode([7, 1, 3], num_steps=0).initial
    whole = engine.replay(start, num_steps=120)
    twin = engine.replay(start, num_steps=120, restarts=range(120))
    assert (twin["positions"] - rollout(start, simulator=engine, num_steps=120)["positions"]).abs().max() < 1e-12
    assert not same(whole, twin)
    tiny = do(at=40, entities=[0], velocities=lambda v: v * (1 + 1e-12))
    changed, restarted = (
        engine.replay(start, num_steps=60, interventions=i, restarts=r) for i, r in (([tiny], (0,)), ((), (40,)))
    )
    assert 0 < (changed["positions"] - restarted["positions"]).abs().max() < 1e-9
    assert same(whole, restarted, slice(41))


def test_a_batch_is_replayed_as_its_scenes():
    starts = [balls_episode([7, 1, k], num_steps=0).initial for k in range(2)]
    both = type(starts[0]).cat(starts)
    change = do(at=5, entities=[1], velocities=0.0)
    path = balls_engine().replay(both, num_steps=40, interventions=[change]).scenes()
    assert same(path[0], balls_engine().replay(starts[0], num_steps=40, interventions=[change]))
    assert same(path[1], balls_engine().replay(starts[1], num_steps=40))
    pushes = torch.randn(4, len(both), 3)
    with pytest.raises(ValueError, match="takes impulses"):
        balls_engine().replay(both, pushes)


@pytest.mark.parametrize("name", ["springs_nri", "water_drop", "tgv_2d"])
def test_worlds_made_together_are_changed_one_by_one(name):
    change = do(at=1, entities=[2], velocities=lambda v: 1.01 * v)
    for together, seed in zip(make(name, change, seeds=SEEDS), SEEDS, strict=True):
        alone = make(name, change, seeds=[seed])
        assert all(torch.allclose(together[k], alone[k], atol=1e-6) for k in together.frames)
        assert not torch.equal(alone["velocities"][1, 2], make(name, seeds=[seed])["velocities"][1, 2])


def test_each_world_waits_for_its_own_event():
    event = do(at="positions.x[0] > 0.1", once=True, entities=[0], velocities=negate())
    seeds = [[7, 0, 0], [7, 0, 2]]
    found, plain = (make("springs_nri", *edits, seeds=seeds, num_frames=10) for edits in ((event,), ()))
    came = [path.interventions[0]["came"] for path in found]
    assert came == [5, 8]
    for path, other, step in zip(found, plain, came, strict=True):
        assert same(path, other, slice(step))
        assert torch.equal(path["velocities"][step, 0], -other["velocities"][step, 0])
    assert make("springs_nri").interventions == ()
    with pytest.raises(ValueError, match="needs actions to change"):
        make("springs_nri", do(actions=scale(2.0)))


def test_pinned_bodies_stay_and_actions_are_those_that_acted():
    path = make("rope", pin([14], at=3), do(at=range(5, 99), actions=scale(0.0)))
    assert torch.equal(path["positions"][3:, 14], path["positions"][3, 14].expand(10, 2))
    assert not path.actions[5:].any()
    assert path.actions[:5].any()
    assert [said["at"] for said in path.interventions] == [[3], [5, 99]]
    nailed = make("rope", do(entities=[14], fixed=True, velocities=0.0))
    assert torch.equal(nailed["positions"][:, 14], nailed["positions"][0, 14].expand(13, 2))
    assert not torch.equal(nailed["positions"][5, 13], make("rope")["positions"][5, 13])


def test_heavier_bodies_are_harder_to_move():
    plain = push_episode([7, 1, 0], num_steps=10, num_bodies=1)
    path = push_episode([7, 1, 0], num_steps=10, num_bodies=1, interventions=[do(masses=lambda m: 3 * m, frictions=0)])
    pushed = (path.actions.cumsum(0) * path.dt / path.initial.masses)[:, 0, :2]
    assert torch.allclose(path["velocities"][1:, 0, :2], pushed, atol=1e-4)
    assert torch.equal(plain.actions, path.actions)


def test_charges_may_change_their_sign_and_bodies_go():
    path = make("charged_nri", do(charges=lambda q: -q), num_frames=10)
    assert torch.equal(path["positions"], make("charged_nri", num_frames=10)["positions"])  # like repels like
    alone = make("charged_nri", do(active=False, entities=[1, 2, 3, 4]), num_frames=10)
    steps = alone["positions"][:, 0].diff(dim=0)
    assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-6) or (alone["positions"][:, 0].abs() > 4.5).any()


def test_frames_count_where_steps_are_between_them():
    plain, path = make("nbody_egnn"), make("nbody_egnn", do(at=3, entities=[0], velocities=0.0))
    assert same(plain, path, slice(3))
    assert torch.equal(path["velocities"][3, 0], torch.zeros(3).double())


def test_gravity_turns_and_obstacles_go():
    plain = make("water_drop", num_steps=20)
    up = make("water_drop", do(gravity=lambda g: -g), num_steps=20)
    fall = (up["velocities"] - plain["velocities"])[-1, :, 1]
    assert torch.allclose(fall.median(), torch.tensor(2 * 9.8 * 20 * plain.dt), rtol=0.2)
    assert torch.equal(up.initial.gravity, -plain.initial.gravity)
    falls = {"seeds": [[7, 0, 1]], "min_particles": 60, "max_particles": 120, "num_steps": 100}
    ramp = make("water_ramps", **falls)
    kinematic = ramp.initial.kinematic
    without = make("water_ramps", do(active=False, entities=kinematic), **falls)
    apart = (ramp["positions"] - without["positions"]).norm(dim=2).amax(1)
    assert apart[40] == 0
    assert apart[100] > 0.05


def test_water_that_is_stopped_begins_to_fall_anew():
    path = make("water_drop", do(at=3, velocities=0.0), num_steps=4)
    assert path["velocities"][4].norm(dim=1).median() < 2.5 * 9.8 * path.dt


def test_inflow_and_cylinder_change():
    plain = make("cylinder_flow")
    inflow = plain.initial.node_types == INFLOW
    path = make("cylinder_flow", do(at=2, entities=inflow, velocities=lambda v: 1.5 * v))
    assert torch.allclose(path["velocities"][2:, inflow], 1.5 * plain["velocities"][2:, inflow])
    assert same(plain, path, slice(2))
    out = (plain.initial.rest_positions[:, 0] > 0.99).nonzero()[:, 0]
    out = out[plain.initial.rest_positions[out, 1].argsort()]
    heights = plain.initial.rest_positions[out, 1]
    through = [torch.trapezoid(p["velocities"][3:, out, 0], heights).mean() for p in (plain, path)]
    assert float(through[1] / through[0]) == pytest.approx(1.5, rel=0.05)
    faster = make("cylinder_flow", inflow_scale=1.5, num_steps=1)
    assert torch.allclose(faster.initial.velocities[inflow], 1.5 * plain.initial.velocities[inflow])
    moved = make("cylinder_flow", shift=(0.1, 0.0), radius_scale=0.5, num_steps=1)
    hole, before = (p.initial.rest_positions[p.initial.node_types == OBSTACLE] for p in (moved, plain))
    assert torch.allclose(hole.mean(0) - before.mean(0), torch.tensor([0.1, 0.0]).double(), atol=5e-3)
    assert float((hole - hole.mean(0)).norm(dim=1).mean() / (before - before.mean(0)).norm(dim=1).mean()) < 0.6
    with pytest.raises(ValueError, match="must lie in the channel"):
        make("cylinder_flow", shift=(2.0, 0.0))


def test_flags_let_go_and_winds_turn():
    plain = make("flag_simple")
    held = plain.initial.node_types == HANDLE
    path = make("flag_simple", do(kinematic=False, entities=held))
    assert (path["positions"][-1, held] - plain["positions"][-1, held]).norm(dim=1).min() > 1e-3
    turned = make("flag_simple", do(parameters=lambda w: -w))
    assert (turned["velocities"] - plain["velocities"]).norm(dim=2)[-1].max() > 0.01
    moved = make("flag_simple", do(at=1, entities=held, positions=lambda x: x + 0.01))
    assert torch.allclose(moved["positions"][-1, held], plain["positions"][-1, held] + 0.01, atol=1e-6)


@pytest.mark.parametrize("name", ["sphere_cloth", "deforming_plate"])
def test_balls_are_moved_stopped_and_removed(name):
    plain = make(name)
    ball = plain.initial.node_types == OBSTACLE
    stopped = make(name, do(at=2, entities=ball, velocities=0.0))
    assert (stopped["positions"][3:, ball] - stopped["positions"][2, ball]).abs().max() < 1e-6
    moved = make(name, do(at=1, entities=ball, positions=lambda x: x + 0.01))
    assert torch.allclose(moved["positions"][1:, ball], plain["positions"][1:, ball] + 0.01, atol=1e-6)
    gone = make(name, do(active=False, entities=ball))
    assert torch.equal(gone["positions"][:, ball], plain["positions"][:1, ball].expand(5, -1, -1))
    if name == "deforming_plate":
        assert plain["stresses"].abs().max() > 100
        assert gone["stresses"].abs().max() == 0
