"""Pictures of states and trajectories, how wrong they are, and films of them."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from simworld.kinds import MeshState, ObjectState, SplatState
from simworld.picture_metrics import chamfer, picture_rows, split_errors
from simworld.render import bind, pose, render, render_splats, to_splats
from simworld.render.appearance import Look
from simworld.render.camera import Camera, orbit
from simworld.render.fields import PositionalField, render_field
from simworld.render.photos import Photos
from simworld.render.scenes import alone, dresser
from simworld.render.splats import render_with_alpha
from simworld.screen import write_json
from simworld.trajectory import Trajectory
from simworld.view_scene import BAR, TITLE, film_scene, playing_speed


def rolling(speed=1.0, frames=5, count=4, dt=0.1):
    """Return balls in a plane that all roll to the right."""
    places = torch.stack([torch.arange(count) * 1.0, torch.arange(count) % 2 * 1.0], 1)
    shift = torch.arange(frames)[:, None, None] * torch.tensor([speed * dt, 0.0])
    state = ObjectState(
        positions=places,
        velocities=torch.tensor([[speed, 0.0]]).repeat(count, 1),
        radii=torch.full((count,), 0.3),
    )
    return Trajectory(
        initial=state,
        frames={"positions": places + shift, "velocities": state.velocities.expand(frames, -1, -1)},
        active=torch.ones(frames, count, dtype=torch.bool),
        dt=dt,
    )


def ball(x=0.0, color=(0.9, 0.2, 0.1)):
    g = torch.Generator().manual_seed(0)
    means = 0.2 * torch.randn(40, 3, generator=g) + torch.tensor([x, 0.0, 0.0])
    return SplatState(
        means=means,
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(40, 1),
        scales=torch.full((40, 3), 0.1),
        opacities=torch.full((40,), 0.9),
        harmonics=((torch.tensor(color) - 0.5) / 0.28209479177387814).repeat(40, 1, 1),
    )


@pytest.fixture
def camera():
    return Look.of(rolling()).camera(width=60, height=40)


def test_a_state_and_a_trajectory_are_drawn_alike(camera):
    trajectory = rolling()
    film = render(trajectory, camera)
    assert film.shape == (5, 40, 60, 3)
    dress = dresser(trajectory)
    assert torch.equal(film[3], render(trajectory.frame(3), camera, dress=dress))
    assert torch.equal(film[3], render_splats(dress(trajectory.frame(3)), camera, background=(1.0, 1.0, 1.0)))
    assert float((film[4] - film[0]).abs().max()) > 0.3
    one = render(trajectory.initial, Look.of(alone(trajectory.initial)).camera(width=60, height=40))
    assert one.shape == (40, 60, 3)
    dark = render(trajectory.initial, camera, background=(0.0, 0.0, 0.0), dress=dress)
    assert float(dark[0, 0].max()) < 0.01 < 0.99 < float(film[0, 0, 0].min())


def test_splats_and_fields_are_drawn_as_they_are():
    camera = orbit((0, 0, 0), distance=3, count=1, width=24, height=16)[0]
    splats = ball()
    splats = splats.replace(means=splats.means.requires_grad_())
    picture = render(splats, camera)
    assert torch.equal(picture, render_splats(splats, camera, background=(1.0, 1.0, 1.0)))
    picture.sum().backward()
    assert float(splats.means.grad.abs().max()) > 0
    still = alone(ball())
    assert torch.equal(render(still, camera)[0], render(ball(), camera))
    torch.manual_seed(0)
    field = PositionalField([[-1.0] * 3, [1.0] * 3], width=16)
    assert torch.equal(render(field, camera), render_field(field, camera, background=(1.0, 1.0, 1.0)))


def test_splats_follow_a_trajectory(camera):
    trajectory = rolling(speed=2.0)
    splats = ball()
    binding = bind(splats, trajectory.initial)
    film = render(trajectory, camera, dress=lambda state: pose(binding, state))
    for t in (0, 4):
        alike = splats.replace(means=splats.means + torch.tensor([0.2 * t, 0.0, 0.0]))
        assert torch.allclose(film[t], render(alike, camera), atol=1e-4)


def test_two_scenes_and_nothing_to_draw_are_refused(camera):
    with pytest.raises(ValueError, match="draws one scene; the state has 2"):
        render(rolling().initial.repeat(2), camera)
    with pytest.raises(ValueError, match="nothing to draw"):
        render(rolling().initial.replace(active=torch.zeros(4, dtype=torch.bool)), camera)


def rows_of(models, target, camera, **given):
    look = Look.of(target)
    found = picture_rows(models, target, camera, lambda s: to_splats(s, look), dataset="balls", **given)
    return {(row.model, row.metric, row.horizon): row for row in found}


def test_what_is_predicted_rightly_has_no_error_and_what_stands_still_has(camera):
    found = rows_of({"right": rolling(), "slow": rolling(0.5)}, rolling(), camera, horizons=(1, 3, 20, "all"))
    assert {key[0] for key in found} == {"right", "slow", "static", "constant_velocity"}
    assert {key[2] for key in found} == {1, 3, "all"}, "no frame is 20 steps on"
    assert found["right", "psnr", 3].value == math.inf
    assert found["right", "ssim", 3].value == pytest.approx(1)
    assert found["right", "silhouette_iou", "all"].value == 1
    assert found["right", "chamfer", "all"].value == 0
    for metric, sign in (("psnr", 1), ("ssim", 1), ("silhouette_iou", 1), ("chamfer", -1)):
        values = [sign * found[model, metric, "all"].value for model in ("static", "slow", "right")]
        assert values == sorted(values), metric
        assert values[0] < values[1], metric
    assert found["constant_velocity", "chamfer", "all"].value == pytest.approx(0, abs=1e-6), "they roll on as they did"
    units = {metric: found["slow", metric, 3].unit for metric in ("psnr", "ssim", "silhouette_iou", "chamfer")}
    assert units == {"psnr": "dB", "ssim": "1", "silhouette_iou": "1", "chamfer": "m"}
    with pytest.raises(ValueError, match=r"of one length; got lengths \[3, 5\]"):
        rows_of({"short": rolling(frames=3)}, rolling(), camera)


def test_constant_velocity_goes_on_with_the_velocities_of_the_first_frame_alone(camera):
    stopped = rolling(count=1)
    stopped = replace(stopped, frames={name: values[:1].expand_as(values) for name, values in stopped.frames.items()})
    found = rows_of({}, stopped, camera, horizons=(3,))
    assert found["static", "chamfer", 3].value == 0
    assert found["constant_velocity", "chamfer", 3].value == pytest.approx(0.3, abs=1e-6)


def test_the_chamfer_distance_of_one_ball_is_how_far_it_is_off(camera):
    one, other = (rolling(speed, count=1) for speed in (0.0, 0.1))
    found = rows_of({"off": one}, other, camera, horizons=(1,))
    assert 0 < found["off", "chamfer", 1].value <= 0.01 + 1e-6
    points = torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]])
    assert chamfer(points, points + torch.tensor([0.0, 3.0, 4.0])) == pytest.approx(5)
    assert chamfer(points[:1], points) == 0
    assert chamfer(points, points[:1]) == pytest.approx(5)
    assert math.isnan(chamfer(points[:0], points))


def test_units_of_places_are_those_of_the_data(camera):
    trajectory = rolling()
    kind = ObjectState.with_units(positions="px", velocities="px/s")
    state = kind(**{name: trajectory.initial[name] for name in trajectory.initial})
    pixels = Trajectory(initial=state, frames=trajectory.frames, active=trajectory.active, dt=0.1)
    assert rows_of({"right": pixels}, pixels, camera, horizons=(1,))["right", "chamfer", 1].unit == "px"


def test_errors_are_split_by_what_is_to_blame():
    cameras = orbit((0, 0, 0), distance=3, count=3, width=32, height=32)
    white = (1.0, 1.0, 1.0)
    shots = [render_splats(ball(), camera, background=white).clamp(0, 1) for camera in cameras]
    photos = Photos(
        images=tuple((shot * 255).round().byte() for shot in shots), cameras=tuple(cameras), names=("a", "b", "c")
    )
    exact = split_errors(ball(), ball(), photos)
    assert bool(torch.isinf(exact.simulator).all())
    assert bool((exact.appearance > 50).all())
    assert torch.equal(exact.whole, exact.appearance)
    wrong = split_errors(ball(0.4), ball(), photos)
    assert bool((wrong.simulator < 25).all())
    assert bool((wrong.appearance > 50).all())
    assert torch.allclose(wrong.whole, wrong.simulator, atol=0.1), "all of the error is the simulator's"
    faded = split_errors(ball(color=(0.5, 0.5, 0.5)), ball(color=(0.5, 0.5, 0.5)), photos)
    assert bool(torch.isinf(faded.simulator).all())
    assert bool((faded.appearance < 25).all())
    both = split_errors(ball(0.4, (0.5, 0.5, 0.5)), ball(color=(0.5, 0.5, 0.5)), photos)
    assert bool((both.whole < torch.minimum(both.simulator, both.appearance) + 1).all())
    # Of photographs with opacities only what is opaque counts: a wrong background is none.
    solid = [render_with_alpha(ball(), camera)[1] > 0.99 for camera in cameras]
    cut = tuple(torch.cat([image, 255 * kept.byte()], 2) for image, kept in zip(photos.images, solid, strict=True))
    masked = Photos(images=cut, cameras=photos.cameras, names=photos.names)
    assert bool((split_errors(ball(), ball(), masked).whole > 30).all())
    assert bool((split_errors(ball(), ball(), masked, background=(0.0, 0.0, 0.0)).whole > 35).all())
    assert bool((split_errors(ball(), ball(), photos, background=(0.0, 0.0, 0.0)).whole < 10).all())
    with pytest.raises(ValueError, match="a photograph or more; got none"):
        split_errors(ball(), ball(), Photos(images=(), cameras=(), names=()))


def test_json_has_no_infinity(tmp_path):
    write_json(str(tmp_path / "a.json"), {"rows": [{"value": math.inf}, {"value": (1.5, math.nan)}]})
    assert "".join((tmp_path / "a.json").read_text().split()) == '{"rows":[{"value":null},{"value":[1.5,null]}]}'


def frames_of(path):
    with Image.open(path) as film:
        found, times = [], []
        for number in range(film.n_frames):
            film.seek(number)
            found.append(film.convert("RGB").copy())
            times.append(film.info.get("duration"))
    return found, times


def test_a_film_of_panels_has_their_names_errors_and_bars(tmp_path):
    recorded, predicted = rolling(), rolling(0.5)
    look = Look.of(recorded)
    camera = look.camera(width=120, height=80)
    errors = (predicted["positions"] - recorded["positions"]).norm(dim=2)
    panels = {"recorded": recorded, "predicted": predicted}
    path = film_scene(panels, path=tmp_path / "a.gif", camera=camera, look=look, errors={"predicted": errors})
    frames, times = frames_of(path)
    assert len(frames) == 5
    assert times == [100] * 5
    assert frames[0].size == (3 * 120, TITLE + 80 + BAR)
    pixels = [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(148, 360, 3) for frame in frames]
    for panel in range(3):  # each has a name above
        assert int(pixels[0][:TITLE, panel * 120 : panel * 120 + 120].min()) < 100
    below = pixels[0][TITLE + 80 :]
    assert int(below[:, :240].min()) > 250, "panels without a scale have no bar"
    assert int(below[:, 240:].min()) < 100
    bar = below[8, 240 + 32 : 240 + 88].float()
    assert float((bar[-1] - bar[0]).abs().max()) > 100
    first, last = (shot[TITLE : TITLE + 80] for shot in (pixels[0].int(), pixels[4].int()))
    assert float((first[:, :120] - first[:, 120:240]).abs().float().mean()) < 2, "at first both are alike"
    assert float((last[:, :120] - last[:, 120:240]).abs().float().mean()) > 5
    assert float((first[:, 240:] - last[:, 240:]).abs().float().mean()) > 2, "errors grow"


def test_bars_below_meshes_and_every_so_many_frames(tmp_path):
    steps = torch.linspace(0, 1, 3)
    cells = torch.tensor([[0, 3, 1], [1, 3, 4], [3, 6, 4], [4, 6, 7], [1, 4, 2], [2, 4, 5], [4, 7, 5], [5, 7, 8]])
    state = MeshState(rest_positions=torch.cartesian_prod(steps, steps), cells=cells, temperatures=torch.rand(9))
    trajectory = Trajectory(
        initial=state,
        frames={"temperatures": torch.rand(7, 9)},
        active=torch.ones(7, 9, dtype=torch.bool),
        dt=0.05,
    )
    look = Look.of(trajectory)
    camera = look.camera(width=64, height=48)
    path = film_scene({"plate": trajectory}, path=tmp_path / "a.gif", camera=camera, look=look, every=3)
    frames, times = frames_of(path)
    assert len(frames) == 3
    assert frames[0].size == (64, TITLE + 48 + BAR)
    assert times == [150] * 3
    strip = film_scene({"plate": trajectory}, path=tmp_path / "a.png", camera=camera, look=look)
    with Image.open(strip) as image:
        assert image.size == (4 * 64, TITLE + 48 + BAR), "each second of seven frames"


@pytest.mark.parametrize(("dt", "shown"), [(0.1, 100), (86400.0, 40), (2.0, 40)])
def test_slow_worlds_are_shown_faster(tmp_path, dt, shown):
    look = Look.of(rolling(dt=dt))
    film = film_scene(
        {"a": rolling(dt=dt)}, path=tmp_path / "a.gif", camera=look.camera(width=32, height=32), look=look
    )
    assert frames_of(film)[1] == [shown] * 5


def test_playing_speed():
    assert playing_speed(0.1) == 1
    assert playing_speed(2.0, every=4) == 1
    assert 86400 / playing_speed(86400.0) == pytest.approx(0.04)
    assert 2 * 86400 / playing_speed(2 * 86400.0, every=2) == pytest.approx(0.08)


def test_films_of_several_lengths_are_refused(tmp_path):
    look = Look.of(rolling())
    with pytest.raises(ValueError, match=r"of one length; got lengths \[3, 5\]"):
        film_scene({"a": rolling(), "b": rolling(frames=3)}, path=tmp_path / "a.gif", camera=look.camera(), look=look)
    assert isinstance(look.camera(), Camera)
    assert not list(tmp_path.iterdir())
