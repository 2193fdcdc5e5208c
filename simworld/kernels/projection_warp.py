# mypy: ignore-errors
"""Splats in space onto pictures, compiled by Warp, on CPU and CUDA: a task per splat, gradients by Warp's own adjoints.

A task has a picture and a splat of its own: what several pictures give to one splat, torch adds up in their order.
Imported where first used, because it imports Warp and builds kernels.
"""

from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simworld.kernels.projection import FARTHEST, MARGIN, Flat, Lens, refuse_nan
from simworld.kernels.splats import LEAST_OPAQUE, threads_for
from simworld.kernels.warp_start import evenly, in_bands, stream_of, wp

_SORTING = Lock()  # older releases of Warp sort through one table of the whole program


@wp.kernel(module="unique")
def _covariances(
    base: int,
    quats: wp.array(dtype=wp.vec4),
    scales: wp.array(dtype=wp.vec3),
    covars: wp.array(dtype=wp.mat33),
):
    i = wp.tid() + base
    q = quats[i] / wp.max(wp.length(quats[i]), 1e-12)
    w, x, y, z = q[0], q[1], q[2], q[3]
    s = scales[i]
    sides = wp.mat33(
        (1.0 - 2.0 * (y * y + z * z)) * s[0], 2.0 * (x * y - w * z) * s[1], 2.0 * (x * z + w * y) * s[2],
        2.0 * (x * y + w * z) * s[0], (1.0 - 2.0 * (x * x + z * z)) * s[1], 2.0 * (y * z - w * x) * s[2],
        2.0 * (x * z - w * y) * s[0], 2.0 * (y * z + w * x) * s[1], (1.0 - 2.0 * (x * x + y * y)) * s[2],
    )  # fmt: skip
    covars[i] = sides * wp.transpose(sides)


@wp.kernel(module="unique")
def _project(
    base: int,
    count: int,
    size: wp.vec2,
    planes: wp.vec2,
    widened: float,
    antialiased: int,
    views: wp.array(dtype=wp.mat44),
    Ks: wp.array(dtype=wp.mat33),
    means: wp.array(dtype=wp.vec3),
    covars: wp.array(dtype=wp.mat33),
    opacities: wp.array(dtype=wp.float32),
    centres: wp.array(dtype=wp.vec2),
    conics: wp.array(dtype=wp.vec3),
    faint: wp.array(dtype=wp.float32),
    depths: wp.array(dtype=wp.float32),
    spreads: wp.array(dtype=wp.vec3),
):
    i = wp.tid() + base
    view = views[i / count]
    K = Ks[i / count]
    m = means[i]
    turn = wp.mat33(
        view[0, 0], view[0, 1], view[0, 2], view[1, 0], view[1, 1], view[1, 2], view[2, 0], view[2, 1], view[2, 2]
    )
    here = turn * m + wp.vec3(view[0, 3], view[1, 3], view[2, 3])
    z = here[2]
    depths[i] = z
    if z > planes[0] and z < planes[1]:
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        x, y = here[0] / z, here[1] / z
        centres[i] = wp.vec2(fx * x + cx, fy * y + cy)
        aside, below = MARGIN * 0.5 * size[0] / fx, MARGIN * 0.5 * size[1] / fy
        tx = wp.min(wp.max(x, -cx / fx - aside), (size[0] - cx) / fx + aside)
        ty = wp.min(wp.max(y, -cy / fy - below), (size[1] - cy) / fy + below)
        across = (wp.vec3(turn[0, 0], turn[0, 1], turn[0, 2]) - tx * wp.vec3(turn[2, 0], turn[2, 1], turn[2, 2])) * (
            fx / z
        )
        down = (wp.vec3(turn[1, 0], turn[1, 1], turn[1, 2]) - ty * wp.vec3(turn[2, 0], turn[2, 1], turn[2, 2])) * (
            fy / z
        )
        covar = covars[i]
        xx, xy, yy = wp.dot(across, covar * across), wp.dot(across, covar * down), wp.dot(down, covar * down)
        wide, high = xx + widened, yy + widened
        area = wide * high - xy * xy
        spreads[i] = wp.vec3(wide, xy, high)
        opacity = opacities[i]
        if area > 0.0:
            conics[i] = wp.vec3(high / area, -xy / area, wide / area)
            plain = xx * yy - xy * xy
            if antialiased == 0:
                faint[i] = opacity
            elif plain > 0.0:
                faint[i] = opacity * wp.sqrt(plain / area)
            else:
                faint[i] = 0.0 * opacity


@wp.kernel(module="unique", enable_backward=False)
def _reach(
    base: int,
    size: wp.vec2,
    planes: wp.vec2,
    clip: float,
    centres: wp.array(dtype=wp.vec2),
    faint: wp.array(dtype=wp.float32),
    depths: wp.array(dtype=wp.float32),
    spreads: wp.array(dtype=wp.vec3),
    radii: wp.array(dtype=wp.vec2),
):
    """Radii of what the picture shows; 0 of what it does not, and -1 of what is NaN."""
    i = wp.tid() + base
    radii[i] = wp.vec2(0.0, 0.0)
    if depths[i] > planes[0] and depths[i] < planes[1]:
        s = spreads[i]
        area = s[0] * s[2] - s[1] * s[1]
        if wp.isnan(area):
            radii[i] = wp.vec2(-1.0, -1.0)
        elif area > 0.0:
            far = wp.min(wp.sqrt(2.0 * wp.log(wp.max(faint[i] / LEAST_OPAQUE, 1.0))), FARTHEST)
            x, y = wp.ceil(far * wp.sqrt(wp.max(s[0], 0.0))), wp.ceil(far * wp.sqrt(wp.max(s[2], 0.0)))
            c = centres[i]
            there = c[0] + x > 0.0 and c[1] + y > 0.0 and c[0] - x < size[0] and c[1] - y < size[1]
            if x > 0.0 and y > 0.0 and there and (x > clip or y > clip):
                radii[i] = wp.vec2(x, y)


def covariances_compiled(quats: Tensor, scales: Tensor) -> Tensor:
    """Return covariances [n, 3, 3]; see `projection.covariances`."""
    return _Covariances.apply(quats, scales)


def project_compiled(means: Tensor, covars: Tensor, opacities: Tensor, lens: Lens) -> Flat:
    """Return splats on pictures; see `projection.project`."""
    count, pictures = len(means), len(lens.viewmats)
    each = [value.expand(pictures, *value.shape).flatten(0, 1) for value in (means, covars, opacities)]
    *values, spreads = _Project.apply(*each, lens)
    centres, _, faint, depths = (value.detach() for value in values)
    radii = torch.empty_like(centres)
    arrays = _arrays((centres, faint, depths, spreads, radii), (wp.vec2, wp.float32, wp.float32, wp.vec3, wp.vec2))
    _launch(_reach, [_size(lens), _planes(lens), lens.clip, *arrays], radii)
    refuse_nan((radii[:, 0] < 0).view(pictures, count).any(0))
    kept = _nearest_first((radii[:, 0] > 0).nonzero()[:, 0], depths, count)
    names = ("means", "conics", "opacities", "depths", "radii")
    rows = {name: value.index_select(0, kept) for name, value in zip(names, (*values, radii), strict=True)}
    where = torch.div(kept, max(1, count), rounding_mode="floor")
    return Flat(**rows, pictures=where, rows=kept - count * where)


def _nearest_first(pairs: Tensor, depths: Tensor, count: int) -> Tensor:
    """Return pairs [m] of pictures and `count` splats sorted by picture, then depth, among equals as they were.

    On CPU this is several times as fast as torch sorts.
    """
    size = len(pairs)
    keys, values = (torch.empty(2 * size, dtype=kind, device=pairs.device) for kind in (torch.int64, torch.int32))
    # Positive numbers sort as their bits do.
    keys[:size] = depths.index_select(0, pairs).view(torch.int32)
    keys[:size] += torch.div(pairs, max(1, count), rounding_mode="floor") << 32
    values[:size] = pairs
    with wp.ScopedStream(stream_of(pairs.device), sync_enter=False) if pairs.is_cuda else nullcontext(), _SORTING:
        wp.utils.radix_sort_pairs(wp.from_torch(keys), wp.from_torch(values), size)
    return values[:size].long()


class _Covariances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, quats: Tensor, scales: Tensor) -> Tensor:
        given = [value.detach().contiguous() for value in (quats, scales)]
        made = scales.new_empty(len(scales), 3, 3)
        ctx.save_for_backward(*given, made)
        _launch(_covariances, _arrays([*given, made], (wp.vec4, wp.vec3, wp.mat33)), made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values = ctx.saved_tensors
        slopes = [*(torch.zeros_like(value) for value in values[:2]), gradient.contiguous()]
        kinds = (wp.vec4, wp.vec3, wp.mat33)
        _launch(_covariances, _arrays(values, kinds), gradient, _arrays(slopes, kinds))
        return slopes[0], slopes[1]


KINDS = (wp.vec3, wp.mat33, wp.float32, wp.vec2, wp.vec3, wp.float32, wp.float32, wp.vec3)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, means: Tensor, covars: Tensor, opacities: Tensor, lens: Lens) -> tuple[Tensor, ...]:
        given = [value.detach().contiguous() for value in (means, covars, opacities)]
        made = [means.new_empty(len(means), *size) for size in ((2,), (3,), (), (), (3,))]
        ctx.lens = lens
        ctx.save_for_backward(*given, *made)
        ctx.mark_non_differentiable(made[-1])
        _launch(_project, [*_seen(lens, len(means)), *_arrays([*given, *made], KINDS)], means)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors
        slopes = [torch.zeros_like(value) for value in values[:3]]
        slopes += [value.contiguous() for value in gradients[:4]] + [torch.zeros_like(values[-1])]
        seen = _seen(ctx.lens, len(values[0]))
        none = [*seen[:5], None, None]  # of numbers as given, of cameras none
        _launch(_project, [*seen, *_arrays(values, KINDS)], values[0], [*none, *_arrays(slopes, KINDS)])
        return (*slopes[:3], None)


def _seen(lens: Lens, pairs: int) -> list[Any]:
    views, Ks = (value.detach().to(torch.float32).contiguous() for value in (lens.viewmats, lens.Ks))
    said = [max(1, pairs // len(views)), _size(lens), _planes(lens), lens.widened, int(lens.antialiased)]
    # As arrays, which hold on to what may be a copy; what `_arrays` returns holds on to nothing.
    kinds = (wp.mat44, wp.mat33)
    return [*said, *(wp.from_torch(v, dtype=k, requires_grad=False) for v, k in zip((views, Ks), kinds, strict=True))]


def _size(lens: Lens) -> Any:
    return wp.vec2(float(lens.width), float(lens.height))


def _planes(lens: Lens) -> Any:
    return wp.vec2(lens.near, lens.far)


def _arrays(values: Any, kinds: Any) -> list[Any]:
    """Return what Warp is passed for tensors that the caller holds on to until it has run."""
    return [
        wp.from_torch(value, dtype=kind, requires_grad=False, return_ctype=True)
        for value, kind in zip(values, kinds, strict=True)
    ]


def _launch(kernel: Any, inputs: list[Any], like: Tensor, gradients: list[Any] | None = None) -> None:
    """Run a kernel, or with `gradients` its adjoint, over the rows of `like`, on the threads that compositing takes."""
    count = len(like)
    threads = threads_for(count) if like.device.type == "cpu" else 1
    cuts = evenly(count, threads)
    in_bands(kernel, cuts, inputs, like.device, gradients)
