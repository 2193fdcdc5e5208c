"""The T that a disc pushes: as the reference's constants have it, and who acts on whom."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from simworld import ObjectState, Trajectory, rollout, view
from simworld.intervene import do, remove
from simworld.physics.push_t import ACTION_UNIT, PushTEngine, push_t, push_t_state
from simworld.render.filming import SQUARE
from simworld.testing import check_simulator


@pytest.fixture(scope="module")
def path():
    return push_t([4])


def angles(path):
    """Return the T's angle [T] in radians."""
    return 2 * torch.atan2(path["quats"][:, 1, 3], path["quats"][:, 1, 0])


def reference(disc, edge, angle, targets):
    """Return disc, T's edge and angle [T, 5] in pixels, of a T built as gym-pusht does: about its bar's edge."""
    pymunk = pytest.importorskip("pymunk")
    space = pymunk.Space()
    space.damping = 0.0
    for ends in (((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506))):
        space.add(pymunk.Segment(space.static_body, *ends, 2))
    agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
    agent.position = disc
    space.add(agent, pymunk.Circle(agent, 15))
    bar = [(-60, 30), (60, 30), (60, 0), (-60, 0)]
    block = pymunk.Body(1, 2 * pymunk.moment_for_poly(1, bar))
    shapes = [pymunk.Poly(block, bar), pymunk.Poly(block, [(-15, 30), (-15, 120), (15, 120), (15, 30)])]
    block.center_of_gravity = (shapes[0].center_of_gravity + shapes[1].center_of_gravity) / 2
    block.angle = angle
    block.position = edge
    space.add(block, *shapes)
    rows = [[*agent.position, *block.position, block.angle]]
    for target in targets:
        for _ in range(10):
            agent.velocity += (100 * (pymunk.Vec2d(*target) - agent.position) - 20 * agent.velocity) * 0.01
            space.step(0.01)
        rows.append([*agent.position, *block.position, block.angle])
    return np.array(rows)


def test_it_moves_as_the_reference_does(path):
    """The reference itself is built about another point of the block."""
    actions, first = path.actions[:, 0] * 512, path["positions"][0] * 512
    angle = float(angles(path)[0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    edge = first[1].numpy() - turn @ [0.0, 45.0]
    wanted = reference(tuple(first[0].tolist()), tuple(edge), angle, actions.tolist())
    cos, sin = np.cos(wanted[:, 4]), np.sin(wanted[:, 4])
    centres = wanted[:, 2:4] + 45.0 * np.stack([-sin, cos], 1)
    assert path["influences"][:20, 1, 0].any()
    assert np.abs(path["positions"][:, 0].numpy() * 512 - wanted[:, :2]).max() < 1e-6
    assert np.abs(path["positions"][:20, 1].numpy() * 512 - centres[:20]).max() < 1e-3
    assert np.abs(np.unwrap(angles(path).numpy()) - np.unwrap(wanted[:, 4]))[:20].max() < 1e-5


def test_the_t_moves_only_where_the_disc_acts_on_it(path):
    met = path["influences"]
    assert not met[:, 0].any()
    assert not met[:, 1, 1].any()
    moved = path["positions"][:, 1].diff(dim=0).norm(dim=-1) + angles(path).diff().abs()
    touched = met[1:, 1, 0] | met[:-1, 1, 0]
    assert 5 < int(met[:, 1, 0].sum()) < 45
    assert float(moved[~touched].max()) < 1e-9
    assert float(moved[met[1:, 1, 0]].max()) > 0.01
    # What is within the disc's reach is at most its radius and the T's away.
    gaps = (path["positions"][:, 0] - path["positions"][:, 1]).norm(dim=-1) - path.initial.radii.sum()
    assert float(torch.minimum(gaps[1:], gaps[:-1])[met[1:, 1, 0]].max()) < 0.01


def test_lengths_are_in_widths_of_the_film(path):
    units = {name: field.unit for name, field in path.initial.fields.items() if name in path.initial}
    assert {units[name] for name in ("positions", "radii", "outlines", "boundaries")} == {ACTION_UNIT}
    assert (units["velocities"], units["masses"]) == ("frame widths/s", "1")


def test_it_keeps_the_contract():
    one, other = (push_t([k]) for k in (1, 2))
    both = Trajectory.cat([one, other])
    start = type(one.initial).cat([one.frame(6), other.frame(9)])
    check_simulator(PushTEngine(), start, both.actions[6:14], order_matters=True)


def test_scenes_of_a_batch_go_their_own_ways():
    alone = [push_t([k], num_steps=15) for k in (1, 2, 3)]
    both = Trajectory.cat(alone)
    together = PushTEngine().replay(both.initial, both.actions)
    for one, wanted in zip(together.scenes(), alone, strict=True):
        assert torch.equal(one["positions"], wanted["positions"])
        assert torch.equal(one.actions, wanted.actions)


def test_a_step_from_a_frame_goes_on_as_the_run(path):
    engine = PushTEngine()
    misses = [(engine.step(path.frame(t), path.actions[t]).positions - path["positions"][t + 1]).abs().max()
              for t in range(49)]  # fmt: skip
    misses = torch.stack(misses) * 512
    assert float(misses.median()) < 0.02
    assert float(misses.max()) < 4  # what was being parted is lost


def test_without_the_disc_the_t_stays():
    whole, changed = push_t([4]), push_t([4], interventions=[remove([0], at=10)])
    assert torch.equal(whole["positions"][:10], changed["positions"][:10])
    assert not changed.active[10:, 0].any()
    assert not changed["influences"][11:, 1].any()
    assert float((changed["positions"][-1, 1] - changed["positions"][11, 1]).abs().max()) < 1e-9
    assert float((whole["positions"][-1, 1] - whole["positions"][11, 1]).norm()) > 0.02
    view = SQUARE.film(changed.window(8, 12), 32)
    assert (view.masks == 1).any((1, 2)).tolist() == [True, True, False, False]
    assert (view.masks == 2).any((1, 2)).all()


def test_interventions_that_make_sense_act_and_others_are_refused():
    whole = push_t([4], num_steps=12)
    moved = push_t([4], num_steps=12, interventions=[do(at=3, entities=[1], positions=torch.tensor([0.8, 0.8]))])
    assert torch.equal(moved["positions"][3, 1], torch.tensor([0.8, 0.8]).double())
    assert torch.equal(moved["positions"][:, 0], whole["positions"][:, 0])
    shifted = push_t([4], num_steps=12, interventions=[do(at=range(2, 12), actions=lambda old: old + 0.1)])
    assert float((shifted["positions"] - whole["positions"])[-1, 0].min()) > 0.05
    with pytest.raises(ValueError, match="A change of colors at frame 0 would change nothing else: PushTEngine"):
        push_t([4], num_steps=1, interventions=[do(colors=lambda old: old / 2)])
    with pytest.raises(ValueError, match=r"quats must be \(w, 0, 0, z\); the state has others"):
        push_t([4], num_steps=1, interventions=[do(quats=torch.tensor([0.0, 1.0, 0.0, 0.0]))])
    with pytest.raises(ValueError, match="no negative number of steps; got num_steps=-1"):
        push_t([4], num_steps=-1)


def test_walls_hold_the_t_and_the_disc_comes_to_its_target():
    start = push_t_state(torch.tensor([0.3, 0.5]), torch.tensor([0.7, 0.5]), 0.0)
    path = rollout(start, torch.tensor([0.75, 0.5]).expand(30, 1, 2), simulator=PushTEngine())
    assert float((path["positions"][-1, 0] - torch.tensor([0.75, 0.5])).abs().max()) < 1e-3
    reach = path["positions"][:, 1, 0] + 60 / 512
    assert 0.9 < float(reach[-1]) < 504.5 / 512
    held = PushTEngine().step(start)
    assert torch.equal(held.positions, start.positions)


def test_states_and_actions_that_do_not_fit_are_told():
    engine, start = PushTEngine(), push_t_state(torch.tensor([0.3, 0.5]), torch.tensor([0.7, 0.5]), 0.0)
    bare = ObjectState(positions=torch.zeros(2, 2), velocities=torch.zeros(2, 2), masses=torch.ones(2))
    with pytest.raises(
        ValueError, match="PushTEngine needs quats, angular_velocities, radii, outlines, object_types of"
    ):
        engine.step(bare)
    with pytest.raises(ValueError, match=r"takes targets \[1, 2\], one for each scene's disc; got \[2, 2\]"):
        engine.step(start, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"steers one disc \(object_types 1\) in each scene; got \[2\]"):
        engine.step(start.replace(object_types=torch.ones(2, dtype=torch.long)))
    with pytest.raises(ValueError, match="give each block outlines with half sides above 0"):
        engine.step(start.replace(outlines=torch.zeros(2, 2, 4)))


def test_without_pymunk_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymunk", None)
    with pytest.raises(ImportError, match=r"needs pymunk; install it with: pip install 'simworld\[physics\]'"):
        push_t([0])


def test_a_film_shows_the_block_in_its_outline_and_colour(path, tmp_path):
    """Of the film's pixels in the block's colour nearly all lie in its boxes as they are turned, and fill them."""
    image = pytest.importorskip("PIL.Image", reason="Pillow comes with simworld[view]")
    view.film({"": path.window(0, 2)}, path=tmp_path / "t.gif")
    west, east, south, _ = view._limits([path.window(0, 2)])
    with image.open(tmp_path / "t.gif") as film:
        pixels = torch.tensor(np.asarray(film.convert("RGB")).astype(float)) / 255
    state = path.initial
    coloured = (pixels - state.colors[1]).abs().amax(2) < 0.1
    area = float(state.outlines[1, :, 2:].prod(1).sum()) * 4
    dark = ((pixels < 0.1).all(2)).nonzero()  # the frame round the picture
    left, (bottom, right) = dark[dark[:, 0] > 30, 1].amin(), dark.amax(0)
    pixel = (east - west) / float(right - left)
    assert float(coloured.sum()) * pixel**2 == pytest.approx(area, rel=0.1)
    rows, columns = coloured.nonzero().double().unbind(1)
    places = torch.stack([west + (columns - left) * pixel, south + (bottom - rows) * pixel], 1)
    w, z = state.quats[1, [0, 3]]
    turn = torch.stack([w * w - z * z, -2 * w * z, 2 * w * z, w * w - z * z]).view(2, 2)
    local = (places - state.positions[1]) @ turn
    boxes = state.outlines[1]
    inside = ((local[:, None] - boxes[:, :2]).abs() < boxes[:, 2:] + 0.01).all(2).any(1)
    assert float(inside.double().mean()) > 0.98
