"""Splats fitted to pictures of known ones; how they come and go; going on where a fit was interrupted."""

import dataclasses
import math

import pytest
import torch

from simworld.kinds import SplatState
from simworld.render.camera import orbit
from simworld.render.fit_splats import SplatFit, fit_splats
from simworld.render.grow import Adapted, _shared, densify, relocate
from simworld.render.photos import Photos
from simworld.render.rasterize import rasterization
from simworld.render.splats import render_splats
from simworld.render.starts import seen_sphere, starting_points

QUICK = {"num_steps": 200, "most": 300, "initial": 150, "degree": 1, "degree_every": 80, "refine_from": 50}
QUICK |= {"refine_every": 25, "evaluate_every": 100}


def known():
    g = torch.Generator().manual_seed(0)
    return SplatState(
        means=0.3 * torch.randn(60, 3, generator=g),
        quats=torch.randn(60, 4, generator=g),
        scales=0.04 + 0.08 * torch.rand(60, 3, generator=g),
        opacities=0.5 + 0.5 * torch.rand(60, generator=g),
        harmonics=torch.randn(60, 1, 3, generator=g),
    )


@pytest.fixture(scope="module")
def photos():
    cameras = [*orbit((0, 0, 0), distance=3, count=8, width=48, height=40)]
    cameras += orbit((0, 0, 0), distance=3, count=4, elevation=60, width=48, height=40)
    images = []
    for camera in cameras:
        made, alphas, _ = rasterization(
            *(known()[n] for n in ("means", "quats", "scales", "opacities")),
            known().harmonics,
            camera.viewmat[None],
            camera.K[None],
            camera.width,
            camera.height,
            sh_degree=0,
        )
        straight = made / alphas.clamp(min=1e-3)
        images.append((torch.cat([straight, alphas], -1)[0].clamp(0, 1) * 255).round().byte())
    return Photos(images=tuple(images), cameras=tuple(cameras), names=tuple(str(k) for k in range(len(images))))


@pytest.mark.parametrize("strategy", ["mcmc", "densify"])
def test_pictures_held_out_are_met(photos, strategy):
    held = [2, 9]
    rest = [k for k in range(len(photos)) if k not in held]
    found = []
    how = SplatFit(**{**QUICK, "num_steps": 400}, strategy=strategy)
    made = fit_splats(photos.chosen(rest), how, valid=photos.chosen(held), watch=found.append)
    assert found[-1].psnr > 21
    assert found[-1].psnr > found[0].psnr + 1
    assert len(made) <= 300
    picture = render_splats(made, photos.cameras[2], background=(1.0, 1.0, 1.0))
    target = photos.picture(2, torch.ones(3))
    assert float((picture - target).square().mean()) < float((target - 1).square().mean()) / 5


@pytest.mark.parametrize("strategy", ["mcmc", "densify"])
def test_an_interrupted_fit_goes_on_as_if_it_had_not_been(photos, strategy, tmp_path, monkeypatch):
    how = SplatFit(**QUICK, strategy=strategy)
    whole = fit_splats(photos, how)
    file = tmp_path / "training.safetensors"

    class Cut(Exception):
        pass

    def cut(report):
        raise Cut

    with pytest.raises(Cut):
        fit_splats(photos, how, training=file, watch=cut)
    reports = []
    again = fit_splats(photos, how, training=file, watch=reports.append)
    assert [report.step for report in reports] == [200]
    for name in whole:
        assert torch.equal(whole[name], again[name])
    with pytest.raises(ValueError, match="belongs to a fit with other settings"):
        fit_splats(photos, dataclasses.replace(how, seed=1), training=file)


def test_a_fit_ends_when_its_minutes_are_over(photos):
    reports = []
    fit_splats(photos, SplatFit(**QUICK, minutes=0.02), watch=reports.append)
    assert reports[-1].seconds >= 1.2


def adapted(count=40):
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return Adapted.start(points, torch.full_like(points, 0.3), 1, named={})


def test_relocated_splats_leave_the_picture_nearly_as_it_was():
    run = adapted()
    with torch.no_grad():
        run["opacities"][:] = torch.logit(torch.tensor(0.6))
        run["opacities"][:10] = torch.logit(torch.tensor(0.001))
        run["scales"][:] = math.log(0.2)
    camera = orbit((0, 0, 0), distance=6, count=1, width=60, height=60)[0]
    before = render_splats(run.state(), camera, background=(1.0, 1.0, 1.0))
    relocate(run, 60, torch.Generator().manual_seed(1))
    after = render_splats(run.state(), camera, background=(1.0, 1.0, 1.0))
    assert len(run["means"]) == 42
    assert float(run.opacities().detach().min()) > 0.1
    assert float((before - 1).abs().max()) > 0.3
    assert float((before - after).abs().mean()) < 0.02 * float((before - 1).abs().mean())


def test_shared_splats_let_as_much_light_through():
    opacities, several = torch.tensor([0.3, 0.9, 0.99]).double(), torch.tensor([1, 2, 5])
    faint, narrow = _shared(opacities, several)
    torch.testing.assert_close((1 - faint) ** several, 1 - opacities)
    assert float(narrow[0]) == pytest.approx(1.0)
    # The integral of the opacity along a line through the middle stays: checked by quadrature.
    x = torch.linspace(-8, 8, 4001).double()
    for old, new, k, n in zip(opacities, faint, narrow, several, strict=True):
        one = torch.trapezoid(old * torch.exp(-x.square() / 2), x)
        many = torch.trapezoid(1 - (1 - new * torch.exp(-(x / k).square() / 2)) ** int(n), x)
        assert float(many) == pytest.approx(float(one), rel=1e-3)


def test_one_splat_is_shared_among_many_without_overflow():
    run = adapted(400)
    with torch.no_grad():
        run["opacities"][:] = -9.0
        run["opacities"][:2] = 1.0
    relocate(run, 400, torch.Generator().manual_seed(0))
    assert all(bool(group["params"][0].isfinite().all()) for group in run.adam.param_groups)


def test_densify_clones_the_small_splits_the_large_and_drops_the_faint():
    run = adapted(6)
    with torch.no_grad():
        run["scales"][:] = math.log(0.005 * run.extent)
        run["scales"][1] = math.log(0.05 * run.extent)
        run["opacities"][2] = -9.0
    run.pulls[:2], run.seen[:] = 1.0, 1.0
    old = run["means"].detach().clone()
    densify(run, 100, torch.Generator().manual_seed(0))
    means = run["means"].detach()
    assert len(means) == 6 - 1 - 1 + 1 + 2  # the split and the faint go; a clone and two halves come
    assert int((means == old[0]).all(1).sum()) == 2
    assert not bool((means == old[1]).all(1).any())
    assert not bool((means == old[2]).all(1).any())
    widths = run.scales().detach()[-2:, 0]
    torch.testing.assert_close(widths, torch.full((2,), 0.05 * run.extent / 1.6))


def test_adam_follows_splats_as_rows_come_and_go():
    run = adapted(5)
    for group in run.adam.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    run.descend(1e-3)
    kept = torch.tensor([4, 1])
    old = {group["name"]: group["params"][0].detach() for group in run.adam.param_groups}
    run.rearrange(kept, {name: value[:1] for name, value in old.items()})
    for group in run.adam.param_groups:
        value = group["params"][0]
        assert torch.equal(value.detach()[:2], old[group["name"]][kept])
        past = run.adam.state[value]
        assert bool((past["exp_avg"][:2] > 0).all())
        assert not bool(past["exp_avg"][2].any())


def test_points_begin_within_silhouettes_and_where_cameras_look(photos):
    centre, radius = seen_sphere(photos.cameras)
    assert float(centre.norm()) < 1e-4
    assert 0.5 < radius < 1.6
    points, colors = starting_points(photos, 200)
    assert points.shape == colors.shape == (200, 3)
    camera = photos.cameras[0]
    away = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    x, y = ((away @ camera.K.T)[:, :2] / away[:, 2:]).long().unbind(1)
    assert float((photos.images[0][y, x, 3] > 0).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"minutes": 0.0}, "minutes must be above 0; got 0.0"),
        ({"initial": 30_000}, "initial no more than most"),
        ({"degree": 4}, "degree must be 0 to 3"),
        ({"strategy": "grow"}, "strategy must be one of mcmc, densify"),
        ({"num_steps": 0}, "num_steps must be 1 or more; got 0"),
    ],
)
def test_settings_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        SplatFit(**wrong)


def test_threads_are_as_before(photos):
    before = torch.get_num_threads()
    seen = []
    fit_splats(photos, SplatFit(**{**QUICK, "num_steps": 1}), watch=lambda _: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == before
