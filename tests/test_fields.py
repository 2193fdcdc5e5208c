from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from simworld.kernels.hash_grid import GridLevels, encode, encode_reference, row_of
from simworld.kernels.ray_march import march
from simworld.quaternions import rotations
from simworld.render.camera import Camera, orbit
from simworld.render.field_shapes import field_to_mesh, field_to_splats, isosurface
from simworld.render.fields import (
    HashField,
    Pass,
    PositionalField,
    RadianceField,
    load_field,
    render_field,
    save_field,
    see,
)
from simworld.render.fit_fields import box_seen, carve, field_for, fit_field
from simworld.render.images import psnr
from simworld.render.photos import Photos
from simworld.render.splats import render_splats
from simworld.render.volume import (
    RaySamples,
    clip,
    composite_rays,
    light_before,
    rays_of,
    refined,
    stratified,
    weights_of,
)

BOX = [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
SMALL = {"num_levels": 4, "features": 2, "coarsest": 4, "finest": 32, "log2_rows": 10, "width": 16, "num_cells": 16}
SMALL |= {"num_steps": 64, "color_layers": 1}
TINY = {"width": 16, "num_layers": 4, "place_octaves": 4, "direction_octaves": 2, "coarse": 8, "fine": 8}
CENTRES = torch.tensor([[0.0, 0.0, 0.4], [0.4, 0.1, -0.3], [-0.4, -0.1, -0.3]])
SHADES = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.3, 0.9]])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Balls(RadianceField):
    """Balls of one density and three colours, known in closed form."""

    def __init__(self, density=20.0, radius=0.3, steps=200):
        super().__init__()
        self.register_buffer("bounds", torch.tensor(BOX))
        self.density, self.radius, self.steps, self.arguments = density, radius, steps, {}

    def density_and_color(self, points, directions):
        near = (points[:, None] - CENTRES).norm(dim=-1)
        inside = near.amin(1) < self.radius
        return torch.where(inside, self.density, 0.0), SHADES[near.argmin(1)]

    def passes(self, origins, directions, generator=None):
        samples = stratified(*clip(origins, directions, self.bounds), self.steps, generator)
        return [Pass(samples, *self.density_and_color(*samples.points(origins, directions)))]


def photos(count=16, size=48, channels=4):
    cameras = [c for k in (-25.0, 30.0) for c in orbit((0, 0, 0), distance=3, count=count // 2, elevation=k,
                                                       width=size, height=size, field_of_view=40)]  # fmt: skip
    images = []
    for camera in cameras:
        seen = see(Balls(density=60.0, steps=200), *rays_of(camera))
        colors = seen.colors / seen.opacities.clamp(min=1e-6)[:, None]
        if channels == 3:
            colors = seen.colors + 1 - seen.opacities[:, None]
        image = torch.cat([colors, seen.opacities[:, None]], 1)[:, :channels]
        images.append((image * 255).round().clamp(0, 255).byte().view(size, size, channels))
    return Photos(images=tuple(images), cameras=tuple(cameras), names=tuple(str(k) for k in range(count)))


def test_constant_density_lets_its_exponential_through():
    near, far = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([2.5, 1.0, 6.0])  # the second misses
    samples = stratified(near, far, 50)
    density, shade = 0.7, torch.tensor([0.2, 0.5, 0.9])
    densities = torch.full_like(samples.distances, density)
    seen = composite_rays(densities, shade.expand(100, 3), samples, torch.ones(3))
    opaque = 1 - torch.exp(-density * (far - near))
    assert torch.allclose(seen.opacities, opaque, atol=1e-6)
    assert torch.allclose(seen.colors, opaque[:, None] * shade + 1 - opaque[:, None], atol=1e-6)
    long, inner = far - near, density * (far - near)
    depths = near + 1 / density - long * torch.exp(-inner) / -torch.expm1(-inner)
    assert torch.allclose(seen.depths[[0, 2]], depths[[0, 2]], atol=2e-3)
    assert seen.depths[1] == 0


def test_what_is_behind_is_hidden_and_gradients_are_those_of_the_definition():
    offsets = torch.tensor([0, 3, 3, 7])
    lengths, distances = random(7, dtype=torch.float64).abs(), torch.arange(7.0, dtype=torch.float64)
    samples = RaySamples(distances=distances, lengths=lengths, offsets=offsets)
    densities, colors = (random(*s, seed=k, dtype=torch.float64).abs() for k, s in enumerate([(7,), (7, 3)]))

    def plain(densities, colors):
        rows = []
        for begin, end in pairwise(offsets.tolist()):
            light, sums = torch.ones((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
            for k in range(begin, end):
                through = torch.exp(-densities[k] * lengths[k])
                light, sums = light * through, sums + light * (1 - through) * colors[k]
            rows.append(sums + light * 0.5)
        return torch.stack(rows)

    given = (densities.requires_grad_(True), colors.requires_grad_(True))
    made = composite_rays(*given, samples, torch.full((3,), 0.5, dtype=torch.float64)).colors
    wanted = plain(*given)
    assert torch.allclose(made, wanted, atol=1e-12)
    weights = random(3, 3, seed=5, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((v * weights).sum(), given) for v in (made, wanted)), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    kept = samples.kept(torch.tensor([1, 0, 1, 0, 0, 1, 1], dtype=torch.bool))
    assert kept.offsets.tolist() == [0, 2, 2, 4]
    assert kept.rays.tolist() == [0, 0, 2, 2]
    thick = torch.tensor([1e6, 1.0, 1.0, 1e-7, 0.0, 0.0, 3.0])  # a dense ray does not blur the next
    assert torch.allclose(light_before(thick, samples)[3:], torch.tensor([1, 1 - 1e-7, 1 - 1e-7, 1 - 1e-7]), atol=1e-9)


def test_rays_go_through_the_pixels_that_cameras_show():
    camera = Camera.look_at((2.0, -1.0, 1.5), (0.1, 0.2, 0.0), width=9, height=7)
    origins, directions = rays_of(camera)
    places = origins + 1.7 * directions
    here = places @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
    at = (here @ camera.K.T)[:, :2] / here[:, 2:]
    v, u = torch.meshgrid(torch.arange(7) + 0.5, torch.arange(9) + 0.5, indexing="ij")
    assert torch.allclose(at, torch.stack([u, v], -1).view(-1, 2), atol=1e-4)
    assert torch.equal(rays_of(camera, torch.tensor([40]))[1], directions[40:41])


def test_rays_are_clipped_to_the_box():
    box = torch.tensor(BOX)
    origins = torch.tensor([[-3.0, 0, 0], [0, 0, 0], [-3, 2, 0], [3, 0, 0], [0, -5, 1.0]])
    directions = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    near, far = clip(origins, directions, box)
    assert torch.allclose(near[:2], torch.tensor([2.0, 0.0]))
    assert torch.allclose(far[:2], torch.tensor([4.0, 1.25]))
    assert (far[2:4] == near[2:4]).all()
    assert (near[4], far[4]) == (4.0, 6.0)


def test_finer_places_follow_the_weights():
    near, far = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 0.0, 4.0])
    first = stratified(near, far, 4)
    assert torch.allclose(first.distances[:4], torch.tensor([1.25, 1.75, 2.25, 2.75]))
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    second = refined(first, weights, near, far, 100, None)
    assert second.offsets.tolist() == [0, 104, 104, 208]
    one, other = second.distances[:104], second.distances[104:]
    assert ((one > 2.0) & (one < 2.5)).sum() >= 100
    spread = other.diff()
    assert spread.max() < 0.03  # even weights, even places
    assert torch.allclose(second.lengths[:104].sum(), torch.tensor(2.0), atol=1e-5)
    assert (second.lengths >= 0).all()
    drawn = refined(first, weights, near, far, 100, torch.Generator().manual_seed(0)).distances[:104]
    assert ((drawn > 2.0) & (drawn < 2.5)).sum() >= 100


def test_rows_of_a_grid():
    levels = GridLevels((2, 4, 100), 256)
    assert levels.entries == (27, 125, 256)
    assert levels.starts == (0, 27, 152, 408)
    assert row_of(torch.tensor([[1, 2, 3]]), 1, levels).item() == 27 + 1 + 5 * (2 + 5 * 3)
    corner = (70, 99, 41)
    mixed = (corner[0] ^ (corner[1] * 2654435761) ^ (corner[2] * 805459861)) % 256
    assert row_of(torch.tensor([corner]), 2, levels).item() == 152 + mixed
    assert GridLevels.geometric(3, 16, 256, 64).resolutions == (16, 64, 256)
    # A dense level gives linear functions of the place exactly.
    one = GridLevels((4,), 256)
    corners = torch.cartesian_prod(*[torch.arange(5.0)] * 3) / 4
    table = torch.zeros(125, 1, dtype=torch.float64)
    table[row_of((corners * 4).long(), 0, one)] = (corners @ torch.tensor([[1.0], [2.0], [-3.0]])).double()
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(
        encode_reference(points, table, one), points @ torch.tensor([[1.0], [2.0], [-3.0]]).double(), atol=1e-12
    )


@pytest.mark.parametrize("features", [1, 2, 4])
def test_compiled_encoding_agrees_with_the_definition_in_value_and_gradient(features):
    levels = GridLevels.geometric(5, 3, 60, 2**9)
    table, points = random(levels.starts[-1], features), torch.rand(3000, 3, generator=torch.Generator().manual_seed(1))
    points = 1.1 * points - 0.05
    points[:2] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    weights, found = random(3000, 5 * features, seed=2), {}
    for backend, dtype in (("warp", torch.float32), ("torch", torch.float64)):
        given = [value.to(dtype).requires_grad_(True) for value in (points, table)]
        made = encode(*given, levels, backend=backend)
        found[backend] = (made.detach(), *torch.autograd.grad((made * weights.to(dtype)).sum(), given))
    assert (found["warp"][0] - found["torch"][0]).abs().max() < 1e-4
    for fast, wanted in zip(found["warp"][1:], found["torch"][1:], strict=True):
        rows = torch.isclose(fast.double(), wanted, atol=1e-2).all(1)  # a place may round to the next cell
        assert rows.float().mean() > 0.999
        assert (fast - wanted)[rows].norm() < 1e-4 * wanted.norm()


def test_as_many_threads_as_there_are_make_the_same_bits():
    levels = GridLevels.geometric(5, 3, 60, 2**9)
    table, points = random(levels.starts[-1], 2), torch.rand(3000, 3, generator=torch.Generator().manual_seed(1))
    field, before, made = HashField(BOX, **SMALL), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            value = table.clone().requires_grad_(True)
            codes = encode(points, value, levels, backend="warp")
            (slope,) = torch.autograd.grad(codes.square().sum(), value)
            rays = [random(200, 3), torch.nn.functional.normalize(random(200, 3, seed=1), dim=1)]
            near, far = clip(*rays, field.bounds)
            along = march(*rays, near, far, torch.full((200,), 0.5), field.occupied, field.bounds, 0.05)
            made.append((codes, slope, *along))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def test_compiled_march_agrees_with_the_definition():
    box, occupied = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 1.0, 1.0]]), random(8, 8, 8) > 0.8
    rays = [2 * random(500, 3), torch.nn.functional.normalize(random(500, 3, seed=1), dim=1)]
    near, far = clip(*rays, box)
    places = torch.rand(500, generator=torch.Generator().manual_seed(2))
    found = {b: march(*rays, near, far, places, occupied, box, 0.01, backend=b) for b in ("warp", "torch")}
    counts = [offsets.diff() for _, offsets in found.values()]
    assert (counts[0] - counts[1]).abs().sum() < 0.002 * counts[1].sum()  # on faces of cells roundings differ
    same = counts[0] == counts[1]
    assert same.float().mean() > 0.95
    for ray in same.nonzero()[:, 0].tolist()[::20]:
        one, other = (d[o[ray] : o[ray + 1]] for d, o in found.values())
        assert torch.allclose(one, other, atol=1e-5)
    none = march(*rays, near, far, places, torch.zeros_like(occupied), box, 0.01)
    assert len(none[0]) == 0
    assert none[1].tolist() == [0] * 501


def test_skipping_what_is_empty_changes_nothing():
    field = HashField(BOX, **SMALL)
    with torch.no_grad():
        field.table.copy_(random(*field.table.shape))
    field.occupied.copy_(random(16, 16, 16, seed=1) > 0.5)
    rays = rays_of(orbit((0, 0, 0), distance=3, count=3, width=24, height=24, field_of_view=40)[1])
    near, far = clip(*rays, field.bounds)
    everywhere = torch.ones_like(field.occupied)
    with torch.no_grad():
        skipped = see(field, *rays)
        found, offsets = march(*rays, near, far, torch.full_like(near, 0.5), everywhere, field.bounds, field.step)
        samples = RaySamples(distances=found, lengths=torch.full_like(found, field.step), offsets=offsets)
        whole = composite_rays(*field.density_and_color(*samples.points(*rays)), samples)
    assert len(field.passes(*rays)[0].densities) < 0.6 * len(found)
    assert whole.opacities.max() > 0.2
    assert (skipped.colors - whole.colors).abs().max() < 2e-3
    assert (skipped.colors - whole.colors).abs().mean() < 1e-4


def test_cells_are_occupied_where_they_were_seen_dense():
    field = HashField(BOX, **SMALL)
    field.possible[:8] = False
    with torch.no_grad():
        field.table.copy_(3 * random(*field.table.shape))
    drawn = torch.Generator().manual_seed(0)
    for _ in range(20):
        field.update_occupancy(drawn)
    assert not field.occupied[:8].any()
    assert torch.equal(field.occupied, field.possible & (field.cell_densities * field.step > 0.003))
    places = 2 * torch.rand(4000, 3, generator=drawn) - 1
    with torch.no_grad():
        densities, _ = field.density_and_color(places, torch.zeros(4000, 3))
    x, y, z = ((places + 1) * 8).long().unbind(1)
    assert (densities[~field.occupied[x, y, z]] == 0).all()
    before = field.cell_densities.clone()
    field.update_occupancy(drawn, count=200)
    assert 100 < (field.cell_densities != before).sum() < 300


@pytest.mark.parametrize("make", [lambda: HashField(BOX, **SMALL), lambda: PositionalField(BOX, **TINY)])
def test_fields_are_rendered_saved_and_loaded_exactly(tmp_path, make):
    field = make()
    camera = Camera.look_at((0.0, -2.5, 1.0), (0, 0, 0), width=11, height=7)
    picture = render_field(field, camera, background=(0.2, 0.4, 0.6))
    assert picture.shape == (7, 11, 3)
    assert torch.allclose(
        render_field(field, [camera, camera], background=(0.2, 0.4, 0.6), rays_at_once=10)[1], picture, atol=1e-5
    )
    slopes = torch.autograd.grad(picture.sum(), list(field.parameters()), materialize_grads=True)
    assert any(slope.abs().sum() > 0 for slope in slopes)
    with torch.no_grad():
        assert torch.allclose(render_field(field, camera, background=(0.2, 0.4, 0.6)), picture, atol=1e-5)
    again = load_field(save_field(tmp_path / "field.safetensors", field))
    assert type(again) is type(field)
    for name, value in field.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(render_field(again, camera, background=(0.2, 0.4, 0.6)), picture)
    outside = torch.tensor([[1.5, 0.0, 0.0], [0.0, 0.0, -1.01]])
    assert (field.density_and_color(outside, torch.tensor([[0.0, 0.0, 1.0]] * 2))[0] == 0).all()
    assert not list(tmp_path.glob("*.partial"))
    away = Camera.look_at((0.0, -2.5, 1.0), (0, -5.0, 1.0), width=5, height=4)
    assert (render_field(field, away, background=(0.2, 0.4, 0.6)) == torch.tensor([0.2, 0.4, 0.6])).all()


def test_three_balls_are_fitted_and_become_splats_and_a_mesh():
    shown, reports = photos(), []
    train, valid = shown.chosen([k for k in range(16) if k % 5]), shown.chosen([0, 5, 10, 15])
    field = fit_field(
        train,
        valid=valid,
        field=HashField(BOX, **(SMALL | {"log2_rows": 12, "num_cells": 32})),
        num_steps=200,
        samples_per_step=2**12,
        learning_rate=3e-2,
        threads=1,
        log=reports.append,
    )
    assert reports[-1].step == 200
    assert reports[-1].psnr > 22
    assert reports[-1].ssim > 0.8
    splats = field_to_splats(field, count=3000, cameras=train.cameras)
    seen = render_splats(splats, valid.cameras[1], background=(1.0, 1.0, 1.0)).clamp(0, 1)
    wanted = valid.picture(1, torch.ones(3))
    assert float(psnr(seen, wanted)) > float(psnr(torch.ones_like(wanted), wanted)) + 4
    mesh = field_to_mesh(field, resolution=32)
    away = (mesh.vertices[:, None] - CENTRES).norm(dim=-1).amin(1)
    assert (away - 0.3).abs().median() < 0.05
    near = (mesh.vertices[:, None] - CENTRES).norm(dim=-1).argmin(1)
    assert (mesh.colors - SHADES[near]).abs().median() < 0.15


def test_pictures_without_opacities_and_the_original_field_are_fitted_too():
    shown, reports = photos(8, 16, channels=3), []
    field = PositionalField(BOX, **(TINY | {"place_octaves": 2, "width": 32}))
    fit_field(shown, valid=shown, field=field, num_steps=100, samples_per_step=2**12, learning_rate=2e-2,
              threads=2, log=reports.append, report_every=20)  # fmt: skip
    assert [report.step for report in reports] == [20, 40, 60, 80, 100]
    assert reports[-1].psnr > reports[0].psnr + 2


def test_going_on_is_as_never_having_stopped(tmp_path):
    shown, path = photos(8, 24), tmp_path / "fit.safetensors"

    def fit(steps, **more):
        field = HashField(BOX, **SMALL)
        return fit_field(
            shown, field=field, samples_per_step=2**11, threads=1, learning_rate=1e-2, num_steps=steps, **more
        )

    class Stop(Exception):
        pass

    def stop(report):
        if report.step == 20:
            raise Stop

    whole = fit(40)
    with pytest.raises(Stop):
        fit(40, out=path, report_every=20, log=stop)
    gone_on = fit(40, out=path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(gone_on.state_dict()[name], value), name
        assert torch.equal(load_field(path).state_dict()[name], value), name
    with pytest.raises(ValueError, match="another fit"):
        fit(40, out=path, resume=True, seed=3)
    save_field(path, whole)
    with pytest.raises(ValueError, match="does not hold a fit that could go on|another fit"):
        fit(40, out=path, resume=True)


def test_cells_that_photographs_show_to_be_empty_are_skipped():
    field, shown = HashField(BOX, **SMALL), photos(8, 48)
    carve(field, shown)
    centres = torch.cartesian_prod(*[(torch.arange(16) + 0.5) / 8 - 1] * 3)
    away = (centres[:, None] - CENTRES).norm(dim=-1).amin(1)
    occupied = field.occupied.flatten()
    assert occupied[away < 0.3].all()  # nothing that is there is lost
    assert occupied.float().mean() < 0.4
    other = HashField(BOX, **SMALL)
    carve(other, photos(8, 24, channels=3))
    assert other.occupied.all()


def test_photographs_of_nothing_make_an_empty_field():
    shown = photos(4, 16)
    nothing = Photos(images=tuple(0 * image for image in shown.images), cameras=shown.cameras, names=shown.names)
    field = fit_field(nothing, field=HashField(BOX, **SMALL), num_steps=12, samples_per_step=256, threads=2)
    assert not field.occupied.any()
    assert (render_field(field, shown.cameras[0], background=(0.1, 0.5, 0.2)) == torch.tensor([0.1, 0.5, 0.2])).all()
    with pytest.raises(ValueError, match="went to infinity at step"):
        fit_field(shown, field=HashField(BOX, **SMALL), num_steps=20, samples_per_step=256, learning_rate=1e20)


def test_new_fields_are_as_fine_as_the_photographs():
    found = []
    for size in (64, 128):
        cameras = orbit((0, 0, 0), distance=3, count=2, width=size, height=size, field_of_view=40)
        images = (torch.zeros(size, size, 3, dtype=torch.uint8),) * 2
        found.append(field_for(Photos(images=images, cameras=tuple(cameras), names=("a", "b")), BOX).arguments)
    assert [arguments["finest"] for arguments in found] == [64, 128]
    assert found[1]["num_steps"] == pytest.approx(2 * found[0]["num_steps"], abs=1)


def test_the_box_is_what_all_cameras_see():
    shown = photos(8, 24)
    low, high = box_seen(shown)
    assert torch.allclose(low, -high, atol=1e-5)
    assert float(high[0]) == pytest.approx(3 * math.sin(math.radians(20)), rel=1e-3)
    points = random(1000, 3)
    told = Photos(images=shown.images, cameras=shown.cameras, names=shown.names, points=points)
    assert ((points > box_seen(told)[0]) & (points < box_seen(told)[1])).all(1).float().mean() > 0.95
    aside = Photos(images=shown.images[:1] * 2, cameras=shown.cameras[:1] * 2, names=("a", "b"))
    with pytest.raises(ValueError, match="give the bounds"):
        box_seen(aside)


def test_surface_of_a_sphere():
    import trimesh

    side = torch.linspace(-1, 1, 49)
    x, y, z = torch.meshgrid(side, side, side, indexing="ij")
    vertices, faces = isosurface(0.7 - (x * x + y * y + z * z).sqrt(), 0.0)
    mesh = trimesh.Trimesh((vertices * (2 / 48) - 1).numpy(), faces.numpy(), process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.02)  # and outwards, or it is negative
    assert mesh.area == pytest.approx(4 * math.pi * 0.7**2, rel=0.02)
    assert mesh.euler_number == 2


def test_surfaces_of_balls_and_of_what_the_box_cuts():
    import trimesh

    found = field_to_mesh(Balls(), resolution=60, level=10.0)
    mesh = trimesh.Trimesh(found.vertices.numpy(), found.faces.numpy(), process=False)
    assert mesh.is_watertight
    assert mesh.body_count == 3
    assert mesh.volume == pytest.approx(3 * 4 / 3 * math.pi * 0.3**3, rel=0.05)
    near = (found.vertices[:, None] - CENTRES).norm(dim=-1).argmin(1)
    assert torch.equal(found.colors, SHADES[near])
    full = isosurface(random(5, 6, 7) + 10, 0.0)
    assert trimesh.Trimesh(full[0].numpy(), full[1].numpy(), process=False).is_watertight
    noise = isosurface(random(9, 9, 9), 0.3)
    assert trimesh.Trimesh(noise[0].numpy(), noise[1].numpy(), process=False).is_watertight


def test_splats_of_balls_lie_on_them():
    balls = Balls(density=300.0, steps=200)
    splats = field_to_splats(balls, count=1500, seed=1)
    away = (splats.means[:, None] - CENTRES).norm(dim=-1)
    assert (away.amin(1) - 0.3).abs().quantile(0.95) < 0.03
    assert torch.allclose(splats.harmonics[:, 0] * 0.28209479 + 0.5, SHADES[away.argmin(1)], atol=1e-5)
    assert torch.equal(field_to_splats(balls, count=1500, seed=1).means, splats.means)
    normals = torch.nn.functional.normalize(splats.means - CENTRES[away.argmin(1)], dim=1)
    assert (rotations(splats.quats)[:, :, 2] * normals).sum(1).abs().median() > 0.98
    camera = Camera.look_at((2.0, 2.0, 1.0), (0, 0, 0), width=160, height=160, field_of_view=40)
    wanted = see(balls, *rays_of(camera), background=torch.ones(3)).colors.view(160, 160, 3)
    seen = render_splats(splats, camera, background=(1.0, 1.0, 1.0)).clamp(0, 1)
    assert float(psnr(seen, wanted)) > 19
    above = [Camera.look_at((0.0, 0.1, 3.0), (0, 0, 0), width=20, height=20)]
    assert field_to_splats(balls, count=500, cameras=above).means[:, 2].min() > -0.35


def test_weights_of_what_is_opaque_are_on_its_front():
    samples = stratified(torch.zeros(1), torch.ones(1), 10)
    weights = weights_of(torch.tensor([0.0] * 5 + [1e6] * 5), samples)
    assert weights.tolist() == [0] * 5 + [1] + [0] * 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: HashField([[0, 0, 0], [1, 1, 0]]), "corner .2, 3. of a box"),
        (lambda: HashField(BOX, width=0), "width of a HashField must be 1 to"),
        (lambda: HashField(BOX, log2_rows=40), "log2_rows of a HashField must be 3 to 26"),
        (lambda: HashField(BOX, coarsest=64, finest=32), "from coarse to fine"),
        (lambda: PositionalField(BOX, coarse=10**9), "coarse of a PositionalField"),
        (lambda: GridLevels((4,), 100), "power of two"),
        (lambda: encode(torch.zeros(2, 3), torch.zeros(5, 2), GridLevels((4,), 256)), "a table .125, f."),
        (lambda: encode(torch.zeros(2, 3), torch.zeros(125, 2), GridLevels((4,), 256), backend="x"), "got 'x'"),
        (lambda: render_field(Balls(), []), "a camera, or several of one size"),
        (lambda: HashField(BOX, **SMALL).passes(torch.full((1, 3), math.nan), torch.eye(3)[:1]), "rays that end"),
        (lambda: field_to_mesh(Balls(), resolution=1), "2 to 1024 cells"),
        (lambda: field_to_mesh(Balls(), resolution=16, level=1e6), "nowhere above 1e.06, at most 20"),
        (lambda: field_to_splats(Balls(), count=0), "1 to 10 million"),
        (lambda: field_to_splats(Balls(), cameras=[]), "needs a camera or more"),
        (lambda: field_to_splats(Balls(density=0.0, steps=10), count=10), "are stopped; fit the field first"),
        (lambda: fit_field(photos(2, 8)), "needs an end"),
        (lambda: fit_field(photos(2, 8), num_steps=0), "num_steps of fit_field must be above 0"),
        (lambda: fit_field(photos(2, 8).chosen([]), num_steps=3), "needs a photograph"),
        (lambda: composite_rays(torch.zeros(3), torch.zeros(2, 3), stratified(torch.zeros(1), torch.ones(1), 3)),
         "densities .3. and colors .3, c."),
    ],
)  # fmt: skip
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_files_that_are_refused(tmp_path):
    path = save_field(tmp_path / "a.safetensors", HashField(BOX, **SMALL))
    tensors = load_file(path)
    head = {"schema": "simworld.field", "schema_version": "1", "field": "HashField"}
    arguments = HashField(BOX, **SMALL).arguments

    def refused(says, tensors=tensors, **changes):
        save_file(tensors, path, metadata=head | {"arguments": json.dumps(arguments)} | changes)
        with pytest.raises(ValueError, match=says):
            load_field(path)

    refused("knows PositionalField, HashField", field="Other")
    refused("not a simworld.field file", schema="other")
    refused("does not hold the PositionalField", field="PositionalField")
    refused("does not hold the HashField", arguments="[")
    refused("does not hold the HashField", arguments=json.dumps(arguments | {"log2_rows": 26, "features": 4096}))
    refused("does not hold the HashField", arguments=json.dumps(arguments | {"bounds": [[0, 0, 0], [1, 1, 1]]}))
    refused("not finite", tensors | {"field.table": torch.full_like(tensors["field.table"], math.nan)})
    refused("does not hold", {name: value for name, value in tensors.items() if "table" not in name})
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_field(path)
    with pytest.raises(ValueError, match="There is no file"):
        load_field(tmp_path / "b.safetensors")
