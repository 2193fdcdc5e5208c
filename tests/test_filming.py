"""Films of episodes: bodies are where the states say, who is in front hides who is behind, masks say who is who."""

from __future__ import annotations

import pytest
import torch

from simworld import ObjectState, Trajectory
from simworld.render.filming import BACKGROUND, SQUARE, TABLE, View, film, square_camera, table_camera, texture


def still(positions, *, frames=1, active=None, **fields):
    """Return an episode in which nothing moves."""
    positions = torch.tensor(positions)
    state = ObjectState(positions=positions, velocities=torch.zeros_like(positions), **fields)
    there = torch.ones(frames, len(positions), dtype=torch.bool) if active is None else torch.tensor(active)
    held = {name: state[name].expand(frames, *state[name].shape) for name in state.dynamic_fields}
    return Trajectory(initial=state.replace(active=there[0]), frames=held, active=there, dt=0.1)


def discs(positions, radius=0.1, **changes):
    count = len(positions)
    colors = torch.eye(3)[torch.arange(count) % 3]
    return still(positions, radii=torch.full((count,), radius), colors=colors, **changes)


def centroids(view, count, frame=0):
    """Return the middles [count, 2] of bodies in pixels, (0, 0) being the picture's corner."""
    rows = [(view.masks[frame] == k + 1).nonzero().double().mean(0).flip(0) + 0.5 for k in range(count)]
    return torch.stack(rows)


def projected(points, camera):
    """Return where a camera sees points [n, 3], in pixels."""
    seen = (torch.cat([points, torch.ones(len(points), 1)], 1) @ camera.viewmat.T)[:, :3] @ camera.K.T
    return (seen[:, :2] / seen[:, 2:]).double()


@pytest.mark.parametrize("size", [32, 64])
def test_discs_are_seen_where_they_are_and_as_large(size):
    path = discs([[0.2, 0.3], [0.75, 0.8], [0.5, 0.12]])
    view = SQUARE.film(path, size)
    assert view.rgb.shape == (1, size, size, 3)
    places = torch.nn.functional.pad(path["positions"][0], (0, 1))
    found = centroids(view, 3)
    assert float((found - projected(places, square_camera(size))).abs().max()) < 0.6
    # From the front x goes to the right and y up.
    wanted = torch.stack([places[:, 0], 1 - places[:, 1]], 1).double() * size
    assert float((found - wanted).abs().max()) < 0.6
    areas = torch.stack([(view.masks == k + 1).sum() for k in range(3)]).double()
    assert float(((areas / torch.pi).sqrt() - 0.1 * size).abs().max()) < 0.7
    for k in range(3):
        mean = view.rgb[0][view.masks[0] == k + 1].double().mean(0)
        assert int(mean.argmax()) == k
    empty = view.rgb[0][view.masks[0] == 0].double()
    assert float((empty.median(0).values - round(255 * BACKGROUND)).abs().max()) < 1


def test_bodies_on_the_table_are_seen_where_they_are():
    places = [[-0.4, -0.4, 0.08], [0.4, 0.3, 0.08], [0.0, 0.0, 0.08]]
    path = still(
        places,
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(3, 1),
        half_extents=torch.full((3, 3), 0.08),
        radii=torch.tensor([0.08, 0.08, 0.139]),
        object_types=torch.tensor([1, 1, 0]),
        gravity=torch.tensor([[0.0, 0.0, -9.81]]),
        colors=torch.eye(3),
    )
    view = TABLE.film(path, 64)
    assert float((centroids(view, 3) - projected(torch.tensor(places), table_camera(64))).abs().max()) < 1
    # Balls are round, boxes are not: of two as wide, the box shows more.
    areas = [int((view.masks == k + 1).sum()) for k in range(3)]
    assert areas[2] > 1.2 * max(areas[:2])


def test_later_bodies_pass_in_front_and_hide_the_earlier():
    alone, both = discs([[0.5, 0.5]]), discs([[0.5, 0.5], [0.55, 0.5]])
    one, two = SQUARE.film(alone, 64), SQUARE.film(both, 64)
    hidden = (one.masks == 1) & (two.masks == 2)
    assert hidden.sum() > 100
    assert torch.equal(one.masks == 1, (two.masks == 1) | hidden)
    assert two.rgb[hidden].double().mean(0).argmax() == 1


def test_who_is_removed_is_not_seen_from_then_on():
    active = [[True, True], [True, True], [False, True]]
    view = SQUARE.film(discs([[0.3, 0.5], [0.7, 0.5]], frames=3, active=active), 32)
    assert [(view.masks[t] == 1).any().item() for t in range(3)] == [True, True, False]
    assert torch.equal(view.masks[2] == 2, view.masks[0] == 2)
    empty = SQUARE.film(discs([[0.3, 0.5]], frames=1, active=[[True]]), 32)
    gone = film(discs([[0.3, 0.5]], frames=2, active=[[True], [False]]), square_camera(32))
    assert (empty.masks == 1).any()
    assert not gone.masks[1].any()
    assert int(gone.rgb[1].max()) == int(gone.rgb[1].min()) == round(255 * BACKGROUND)


def test_a_texture_lies_behind():
    path = discs([[0.3, 0.5], [0.7, 0.5]])
    behind = texture(64, torch.Generator().manual_seed(3))
    assert behind.shape == (64, 64, 3)
    assert 0 <= float(behind.min()) <= float(behind.max()) <= 1
    assert torch.equal(behind, texture(64, torch.Generator().manual_seed(3)))
    plain, textured = SQUARE.film(path, 64), SQUARE.film(path, 64, background=behind)
    assert torch.equal(plain.masks, textured.masks)
    changed = (plain.rgb.int() - textured.rgb.int()).abs().amax(-1)[0]
    inside = torch.nn.functional.max_pool2d((plain.masks == 0).float(), 5, 1, 2)[0] == 0
    assert inside.sum() > 50
    assert int(changed[inside].max()) <= 12
    outside = torch.nn.functional.max_pool2d((plain.masks > 0).float(), 7, 1, 3)[0] == 0
    assert torch.equal(textured.rgb[0][outside], (behind * 255).round().to(torch.uint8)[outside])


def test_a_body_of_boxes_is_seen_with_its_outline():
    """Bar and stem of a T, turned by a right angle: what was up points to the left."""
    outlines = torch.tensor([[[0.0, 0.1, 0.2, 0.05], [0.0, -0.1, 0.05, 0.15]], [[0.0] * 4] * 2])
    half = 0.5**0.5
    path = still(
        [[0.4, 0.5], [0.85, 0.85]],
        quats=torch.tensor([[half, 0.0, 0.0, half], [1.0, 0.0, 0.0, 0.0]]),
        radii=torch.tensor([0.3, 0.05]),
        outlines=outlines,
        colors=torch.eye(3)[:2],
    )
    view = SQUARE.film(path, 64)
    grid = (torch.arange(64) + 0.5) / 64
    y, x = torch.meshgrid(1 - grid - 0.5, grid - 0.4, indexing="ij")
    wanted = torch.zeros(64, 64, dtype=torch.bool)
    for cx, cy, across, up in outlines[0].tolist():
        wanted |= ((y - cx).abs() < across) & ((-x - cy).abs() < up)
    shown = view.masks[0] == 1
    around = torch.nn.functional.max_pool2d(wanted[None].float(), 3, 1, 1)[0] > 0
    within = torch.nn.functional.max_pool2d(1 - wanted[None].float(), 3, 1, 1)[0] == 0
    assert within.sum() > 100
    assert not (within & ~shown).any()
    assert (shown & ~around).sum() <= 4  # corners spill over
    assert float((centroids(view, 2)[1] - torch.tensor([0.85, 0.15]) * 64).abs().max()) < 0.7
    assert int((view.masks == 2).sum()) < 60


def test_what_cannot_be_filmed_is_told():
    path = discs([[0.3, 0.5]])
    with pytest.raises(
        ValueError, match=r"A background must be \[16, 16, 3\], as the camera's picture; got \[8, 8, 3\]"
    ):
        SQUARE.film(path, 16, background=torch.zeros(8, 8, 3))
    with pytest.raises(ValueError, match=r"A film is of one scene; got 2"):
        SQUARE.film(Trajectory.cat([path, path]), 16)
    rgb, masks = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"A view's rgb must be uint8 \[T, h, w, 3\]; got torch.float32"):
        View(rgb=rgb.float(), masks=masks, viewmat=torch.eye(4), K=torch.eye(3))
    with pytest.raises(ValueError, match=r"A view's masks must be uint8 \[2, 4, 4\]; got torch.uint8 \[1, 4, 4\]"):
        View(rgb=rgb, masks=masks[:1], viewmat=torch.eye(4), K=torch.eye(3))
    assert len(View(rgb=rgb, masks=masks, viewmat=torch.eye(4), K=torch.eye(3)).window(1, 2)) == 1
