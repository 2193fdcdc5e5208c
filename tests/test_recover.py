"""From films back to states: known motions of known splats are found again."""

import math

import pytest
import torch

from simworld.kinds import ObjectState, SplatState
from simworld.render.bind import bind, pose
from simworld.render.camera import orbit
from simworld.render.recover import Recovery, recover
from simworld.render.splats import render_splats

CAMERAS = orbit((0, 0, 0), distance=4, count=3, width=48, height=40)
DT = 0.1


def body():
    g = torch.Generator().manual_seed(0)
    splats = SplatState(
        means=torch.randn(60, 3, generator=g) * torch.tensor([0.4, 0.2, 0.15]),
        quats=torch.randn(60, 4, generator=g),
        scales=0.03 + 0.06 * torch.rand(60, 3, generator=g),
        opacities=0.7 + 0.3 * torch.rand(60, generator=g),
        harmonics=torch.randn(60, 1, 3, generator=g),
    )
    zero = torch.zeros(1, 3)
    rest = ObjectState(
        positions=zero, velocities=zero, quats=torch.tensor([[1.0, 0, 0, 0]]), angular_velocities=zero.clone()
    )
    return bind(splats, rest, mode="rigid"), rest


def turned(rest, t):
    angle = 0.3 + 0.25 * t
    quat = torch.tensor([[math.cos(angle / 2), 0, 0, math.sin(angle / 2)]])
    place = torch.tensor([[0.1 + 0.08 * t, -0.05 * t, 0.2 + 0.1 * t - 0.02 * t * t]])
    return rest.replace(positions=place, quats=quat)


def test_the_motion_of_a_body_is_found_from_its_film():
    binding, rest = body()
    states = [turned(rest, t) for t in range(5)]
    film = torch.stack([render_splats(pose(binding, s), CAMERAS, background=(1.0, 1.0, 1.0)) for s in states])
    found = recover(binding, rest, film, CAMERAS, dt=DT)
    places = torch.stack([s.positions for s in states])
    assert float((found["positions"] - places).norm(dim=2).max()) < 0.003
    standing = float((places - places[:1]).norm(dim=2).max())
    assert standing > 0.3
    cosines = (found["quats"] * torch.stack([s.quats for s in states])).sum(2).abs()
    assert float(2 * torch.arccos(cosines.clamp(max=1)).max()) < 0.02
    spin = found["angular_velocities"][1:, 0]
    torch.testing.assert_close(spin, torch.tensor([0.0, 0.0, 2.5]).expand(4, 3), atol=0.1, rtol=0)
    speeds = places.diff(dim=0) / DT
    torch.testing.assert_close(found["velocities"][1:], speeds, atol=0.05, rtol=0)


def test_a_film_of_other_cameras_is_refused():
    binding, rest = body()
    with pytest.raises(ValueError, match=r"film must be \[t, 3, 40, 48, 3\], .* got \[2, 1, 40, 48, 3\]"):
        recover(binding, rest, torch.zeros(2, 1, 40, 48, 3), CAMERAS, dt=DT)
    with pytest.raises(ValueError, match="A recovery needs steps"):
        Recovery(num_steps=0)


def test_fields_that_are_not_searched_for_stay_and_frames_can_be_rolled_on_from():
    _, rest = body()
    splats = body()[0].splats
    three = rest.replace(positions=rest.positions)
    binding = bind(splats, three, mode="knn", num_neighbors=1)
    film = torch.stack([render_splats(splats, CAMERAS, background=(1.0, 1.0, 1.0))])
    found = recover(binding, three, film, CAMERAS, dt=DT, how=Recovery(first_steps=2))
    assert set(found.frame(0)) == set(three)
    assert torch.equal(found.frame(0).quats, three.quats)


def test_films_that_are_none_are_refused_and_a_guess_out_of_sight_is_said():
    binding, rest = body()
    film = torch.ones(1, 3, 40, 48, 3)
    for wrong, dt in ((film * float("nan"), DT), (film.byte(), DT), (film, 0.0)):
        with pytest.raises(ValueError, match="film must be finite floats from 0 to 1, and dt above 0"):
            recover(binding, rest, wrong, CAMERAS, dt=dt)
    away = rest.replace(positions=torch.full((1, 3), 50.0))
    with pytest.warns(UserWarning, match="see nothing of the guess"):
        recover(binding, away, film, CAMERAS, dt=DT, how=Recovery(first_steps=1))
