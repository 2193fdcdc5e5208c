from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from simworld.kernels import splats as splats_kernels
from simworld.kernels.projection import Lens, covariances, project_reference
from simworld.kernels.projection_warp import project_compiled
from simworld.kernels.splats import Projected, composite, tile_threads, tiles_of
from simworld.kernels.splats_warp import list_tiles
from simworld.kinds import SplatState
from simworld.quaternions import rotations
from simworld.render.camera import Camera, orbit
from simworld.render.harmonics import bases, evaluate_harmonics, turn_harmonics
from simworld.render.rasterize import rasterization
from simworld.render.splats import moved, render_splats


def splats(count=60, *, degree=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "means": 0.5 * rand(count, 3),
        "quats": rand(count, 4),
        "scales": 0.02 + 0.1 * torch.rand(count, 3, generator=generator, dtype=torch.float64),
        "opacities": torch.rand(count, generator=generator, dtype=torch.float64),
        "colors": 0.4 * rand(count, (degree + 1) ** 2, 3),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def seen_by(cameras, dtype=torch.float64):
    return {
        "viewmats": torch.stack([camera.viewmat for camera in cameras]).to(dtype),
        "Ks": torch.stack([camera.K for camera in cameras]).to(dtype),
        "width": cameras[0].width,
        "height": cameras[0].height,
    }


CAMERAS = orbit((0, 0, 0), distance=2.5, count=2, width=37, height=25)


def rotation(seed=0):
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return turn * torch.linalg.det(turn)


@pytest.mark.parametrize("mode", ["RGB", "D", "RGB+ED"])
@pytest.mark.parametrize("how", ["classic", "antialiased"])
@pytest.mark.parametrize("moving", [False, True])
def test_fast_pictures_agree_with_the_definition_in_value_and_gradient(mode, how, moving):
    found = {}
    for backend, dtype in (("torch", torch.float64), ("warp", torch.float32)):
        given = {name: value.requires_grad_(True) for name, value in splats(200, dtype=dtype).items()}
        cameras = seen_by(CAMERAS, dtype)
        cameras["viewmats"].requires_grad_(moving)
        made, alphas, _ = rasterization(
            **given, **cameras, sh_degree=2, render_mode=mode, rasterize_mode=how, backend=backend
        )
        weights = torch.Generator().manual_seed(1)
        total = 0.0
        for value in (made, alphas):
            total = total + (value * torch.randn(value.shape, generator=weights, dtype=torch.float64).to(dtype)).sum()
        total.backward()
        slopes = {name: value.grad for name, value in (given | {"viewmats": cameras["viewmats"]}).items()}
        found[backend] = (made.detach(), alphas.detach(), slopes)
    for fast, wanted in zip(found["warp"][:2], found["torch"][:2], strict=True):
        assert (fast - wanted).abs().max() < 1e-4
    for name, wanted in found["torch"][2].items():
        if wanted is None or not wanted.abs().any():
            assert name == "colors" or (name == "viewmats" and not moving)  # depths show no colours
            continue
        assert (found["warp"][2][name] - wanted).norm() < 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("antialiased", [False, True])
def test_compiled_projections_show_the_same_splats_in_the_same_order(antialiased):
    given, cameras = splats(3000), seen_by(CAMERAS)
    given["means"][:40] *= 30  # beyond the picture, and behind
    given["opacities"][40:60] = 0.0
    lens = Lens(**cameras, near=0.5, far=4.0, clip=1.0, widened=0.3, antialiased=antialiased)
    covars = covariances(given["quats"], given["scales"])
    wanted = project_reference(given["means"], covars, given["opacities"], lens)
    single = {name: value.float() for name, value in given.items()}
    fast = covariances(single["quats"], single["scales"])
    assert torch.allclose(fast.double(), covars, atol=1e-6)
    found = project_compiled(single["means"], fast, single["opacities"], lens)
    assert 500 < len(found.rows) < 6000
    for name in ("rows", "pictures", "radii"):
        assert (getattr(found, name) == getattr(wanted, name)).double().mean() > 0.998, name  # but for rounding
    same = (found.rows == wanted.rows) & (found.pictures == wanted.pictures)
    for name in ("means", "conics", "opacities", "depths"):
        fast, slow = getattr(found, name)[same].double(), getattr(wanted, name)[same]
        assert torch.allclose(fast, slow, rtol=1e-3, atol=1e-4), name


def test_covariances_of_one_shape_for_all_or_of_each():
    made = splats(5, dtype=torch.float32)
    all_alike = covariances(made["quats"][:1], made["scales"])
    assert torch.allclose(all_alike, covariances(made["quats"][:1].expand(5, 4), made["scales"]))
    with pytest.raises(RuntimeError):
        covariances(made["quats"][:2], made["scales"])
    assert covariances(made["quats"][:0], made["scales"][:0]).shape == (0, 3, 3)


def test_as_many_threads_as_there_are_make_the_same_bits(monkeypatch):
    monkeypatch.setattr(splats_kernels, "FEW", 50)
    given, cameras = splats(300, dtype=torch.float32), seen_by(CAMERAS, torch.float32)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            means = given["means"].clone().requires_grad_(True)
            picture, _, _ = rasterization(**{**given, "means": means}, **cameras, sh_degree=2, backend="warp")
            picture.square().sum().backward()
            made.append((picture.detach(), means.grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_one_splat_is_the_gaussian_that_was_asked_for():
    camera = Camera.look_at((0, 0, -2), (0, 0, 0), up=(0, -1, 0), width=21, height=21, dtype=torch.float64)
    focal = float(camera.K[0, 0])
    scale, colour = 0.2, torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64)
    made, alphas, found = rasterization(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
        torch.full((1, 3), scale, dtype=torch.float64),
        torch.tensor([0.8], dtype=torch.float64),
        colour,
        camera.viewmat[None],
        camera.K[None],
        21,
        21,
        backend="torch",
    )
    steps = torch.arange(21, dtype=torch.float64) - 10
    spread = (focal * scale / 2) ** 2 + 0.3
    wanted = 0.8 * torch.exp(-(steps[:, None] ** 2 + steps**2) / (2 * spread))
    wanted = torch.where(wanted >= 1 / 255, wanted, 0.0)
    assert torch.allclose(alphas[0, ..., 0], wanted, atol=1e-12)
    assert torch.allclose(made[0], wanted[..., None] * colour[0], atol=1e-12)
    assert found["depths"].tolist() == [2.0]


def test_what_lies_in_front_hides_what_lies_behind_and_light_runs_out():
    row = {"means": torch.tensor([[4.0, 4.0]] * 4), "conics": torch.tensor([[1e-6, 0.0, 1e-6]] * 4)}
    row |= {"opacities": torch.tensor([0.5, 1.0, 1.0, 1.0]), "radii": torch.full((4, 2), 99.0)}
    row |= {"colors": torch.eye(4), "pictures": torch.zeros(4, dtype=torch.long)}
    for backend in ("torch", "warp"):
        made, alphas = composite(Projected(**row, num_pictures=1, width=8, height=8), backend=backend)
        # 0.999 of the half that is left; of what then gets through, the third would leave less than 1e-4.
        assert made[0, 4, 4].tolist() == pytest.approx([0.5, 0.4995, 0.0, 0.0], abs=1e-4)
        assert float(alphas[0, 4, 4]) == pytest.approx(0.9995, abs=1e-4)


def test_moving_splats_and_cameras_together_changes_nothing():
    given, cameras = splats(), seen_by(CAMERAS)
    turn, shift = rotation(), torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    before, _, _ = rasterization(**given, **cameras, sh_degree=2)
    move = torch.eye(4, dtype=torch.float64)
    move[:3, :3], move[:3, 3] = turn, shift
    sides = covariances(given["quats"], given["scales"])
    moved = {
        "means": given["means"] @ turn.T + shift,
        "quats": None,
        "scales": None,
        "covars": turn @ sides @ turn.T,
        "opacities": given["opacities"],
        "colors": turn_harmonics(given["colors"], turn),
    }
    after, _, _ = rasterization(**moved, **{**cameras, "viewmats": cameras["viewmats"] @ move.inverse()}, sh_degree=2)
    assert (after - before).abs().max() < 1e-8


@pytest.mark.parametrize("degree", range(4))
def test_harmonics_turn_with_what_they_sit_on(degree):
    generator = torch.Generator().manual_seed(degree)
    coefficients = torch.randn(20, (degree + 1) ** 2, 3, generator=generator, dtype=torch.float64)
    directions = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    turns = torch.stack([rotation(seed) for seed in range(20)])
    turned = evaluate_harmonics(turn_harmonics(coefficients, turns), (turns @ directions[..., None])[..., 0])
    assert torch.allclose(turned, evaluate_harmonics(coefficients, directions), atol=1e-12)
    assert torch.allclose(turn_harmonics(coefficients, torch.eye(3, dtype=torch.float64)), coefficients, atol=1e-12)


def test_harmonics_are_orthonormal():
    # Gauss-Legendre in height and even steps round it integrate products of degree 6 exactly.
    heights, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(8))
    around = torch.arange(16, dtype=torch.float64) * math.tau / 16
    wide = (1 - heights**2).sqrt()
    directions = torch.stack(
        [wide[:, None] * around.cos(), wide[:, None] * around.sin(), heights[:, None].expand(8, 16)], -1
    )
    values = bases(directions, 3)
    products = torch.einsum("h,hai,haj->ij", weights * math.tau / 16, values, values)
    assert torch.allclose(products, torch.eye(16, dtype=torch.float64), atol=1e-12)
    with pytest.raises(ValueError, match="degree 0 to 3; got 4"):
        bases(directions, 4)


def test_rotations_of_quaternions():
    quats = torch.tensor([[2.0, 0, 0, 2.0], [1.0, 0, 0, 0]], dtype=torch.float64)  # a quarter about z, of any length
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(rotations(quats), torch.stack([quarter, torch.eye(3, dtype=torch.float64)]), atol=1e-15)


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_hold_every_splat_that_reaches_them_front_to_back(monkeypatch, threads):
    monkeypatch.setattr(splats_kernels, "FEW", 20)
    given = splats(100, dtype=torch.float32)
    _, _, found = rasterization(**given, **seen_by(CAMERAS, torch.float32), sh_degree=2, backend="torch")
    rows = {
        name: found[said] for name, said in (("means", "means2d"), ("conics", "conics"), ("opacities", "opacities"))
    }
    laid = Projected(
        **rows, radii=found["radii"], pictures=found["camera_ids"], colors=rows["opacities"][:, None], num_pictures=2,
        width=37, height=25,
    )  # fmt: skip
    with tile_threads(threads):
        tiles, fast = tiles_of(laid), list_tiles(laid)
        turned = {name: getattr(laid, name).t().contiguous().t() for name in ("means", "radii")}
        assert torch.equal(list_tiles(replace(laid, **turned)).splats, tiles.splats)
    assert torch.equal(fast.splats, tiles.splats)
    assert torch.equal(fast.starts, tiles.starts)
    assert (tiles.across, tiles.down) == (3, 2)
    for tile in range(12):
        here = tiles.splats[tiles.starts[tile] : tiles.starts[tile + 1]].long()
        assert (here.diff() > 0).all()
        left, top = 16 * (tile % 3), 16 * (tile // 3 % 2)
        low, high = laid.means - laid.radii, laid.means + laid.radii
        reach = (low < laid.means.new_tensor([left + 16, top + 16])) & (high > laid.means.new_tensor([left, top]))
        wanted = (reach.all(1) & (laid.pictures == tile // 6)).nonzero()[:, 0]
        assert here.tolist() == wanted.tolist()


def test_cameras_look_where_they_are_told():
    camera = Camera.look_at((3, 0, 1), (0, 0, 0), width=64, height=48, field_of_view=60, dtype=torch.float64)
    assert torch.allclose(camera.position, torch.tensor([3.0, 0, 1], dtype=torch.float64))
    places = torch.tensor([[0.0, 0, 0], [0, 0, 0.1], [0, 0.1, 0]], dtype=torch.float64)
    here = places @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    pixels = here @ camera.K.T
    middle, above, left = (pixels[:, :2] / pixels[:, 2:]).tolist()
    assert middle == pytest.approx([32, 24])
    assert above[1] < 24
    assert left[0] > 32  # seen from +x with z up, +y is to the right
    edge = torch.tensor([0.0, math.tan(math.radians(30)), 1.0], dtype=torch.float64)
    assert float((camera.K @ edge)[1]) == pytest.approx(48)
    small = camera.resized(32, 12)
    assert small.K[0].tolist() == pytest.approx([float(camera.K[0, 0]) / 2, 0, 16])
    assert small.K[1].tolist() == pytest.approx([0, float(camera.K[1, 1]) / 4, 6])


def test_cameras_that_cannot_be():
    with pytest.raises(ValueError, match="needs a direction to look in"):
        Camera.look_at((0, 0, 1), (0, 0, 0))
    good = CAMERAS[0]
    for changes, says in (
        ({"viewmat": good.viewmat * 2}, "is no rotation"),
        ({"viewmat": good.viewmat[:3]}, r"viewmat must be finite numbers \[4, 4\]"),
        ({"K": good.K * torch.nan}, "K must be finite"),
        ({"width": 0}, "focal lengths above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            Camera(**{"viewmat": good.viewmat, "K": good.K, "width": 8, "height": 8, **changes})
    with pytest.raises(ValueError, match="elevation between"):
        orbit((0, 0, 0), distance=1, count=3, elevation=90)


def test_shapes_and_choices_that_do_not_fit():
    given, cameras = splats(), seen_by(CAMERAS)
    for changes, says in (
        ({"quats": given["quats"][:, :3]}, r"takes quats of shape \[60, 4\]; got \[60, 3\]"),
        ({"scales": None}, r"takes scales of shape \[60, 3\]; got None"),
        ({"render_mode": "depth"}, "render_mode must be one of RGB, D"),
        ({"backend": "cuda"}, "backend must be one of torch, warp; got 'cuda'"),
        ({"backend": "warp"}, "composites float32; got torch.float64"),
        ({"sh_degree": 3}, "Degree 3 needs 16 coefficients; got 9"),
    ):
        with pytest.raises(ValueError, match=says):
            rasterization(**{**given, **cameras, "sh_degree": 2, **changes})


def test_nothing_in_sight_is_the_background():
    given = splats(5)
    behind = {**given, "means": given["means"] + 100.0}
    grey = torch.full((2, 3), 0.5, dtype=torch.float64)
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "warp")):
        rows = {name: value.to(dtype) for name, value in behind.items()}
        made, alphas, _ = rasterization(
            **rows, **seen_by(CAMERAS, dtype), sh_degree=2, backgrounds=grey.to(dtype), backend=backend
        )
        assert (made == 0.5).all()
        assert (alphas == 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1e8])
def test_tiny_and_vast_scenes_are_seen_as_others_are(scale):
    given = splats(80, dtype=torch.float32)
    colors = given.pop("colors")
    camera = Camera.look_at((2.0, 1.0, 0.5), (0.0, 0.0, 0.0), width=40, height=30)
    far = Camera.look_at((2 * scale, scale, 0.5 * scale), (0.0, 0.0, 0.0), width=40, height=30)
    state = SplatState(**given, harmonics=colors)
    wanted = render_splats(state, camera)
    made = render_splats(moved(state, torch.eye(3), scale=scale), far)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close(made, wanted, atol=2e-3, rtol=0)


def test_many_channels_are_those_of_few():
    given = splats(60, dtype=torch.float32) | {"colors": torch.rand(60, 70)}
    cameras = seen_by(CAMERAS, torch.float32)
    made, alphas, _ = rasterization(**given, **cameras)
    for part in (slice(0, 32), slice(32, 64), slice(64, 70)):
        few, same, _ = rasterization(**given | {"colors": given["colors"][:, part]}, **cameras)
        assert torch.equal(made[..., part], few)
        assert torch.equal(alphas, same)


def test_what_cannot_be_drawn_is_said(monkeypatch):
    given, cameras = splats(60, dtype=torch.float32), seen_by(CAMERAS, torch.float32)
    with pytest.raises(ValueError, match=r"backgrounds must be \[2, 1\], .*; got \[2, 3\]"):
        rasterization(**given, **cameras, sh_degree=2, render_mode="D", backgrounds=torch.ones(2, 3))
    deep, _, _ = rasterization(**given, **cameras, sh_degree=2, render_mode="RGB+D", backgrounds=torch.ones(2, 3))
    plain, _, _ = rasterization(**given, **cameras, sh_degree=2, render_mode="RGB+D")
    assert torch.equal(deep[..., 3], plain[..., 3])
    given["scales"][7, 1] = math.nan
    with pytest.raises(ValueError, match="Splat 7 has a place or shape that is NaN"):
        rasterization(**given, **cameras, sh_degree=2)
    monkeypatch.setattr("simworld.kernels.splats.MOST_PAIRS", 10)
    with pytest.raises(ValueError, match="10 can be gone through. They are giants"):
        rasterization(**splats(60, dtype=torch.float32), **cameras, sh_degree=2)
