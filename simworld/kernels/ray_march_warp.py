# mypy: ignore-errors
"""The march of `ray_march`, compiled by Warp for the CPU: each ray counts what it finds, and then writes it down.

Imported where first used, because it imports Warp and builds kernels.
"""

from functools import cache

import torch
from torch import Tensor

from simworld.kernels.warp_start import evenly, in_bands, wp

MARCH = """
    float from[3], along[3], low[3], scale[3];
    for (int d = 0; d < 3; ++d) {
        from[d] = origins.data[3 * ray + d];
        along[d] = directions.data[3 * ray + d];
        low[d] = bounds.data[d];
        scale[d] = (float)cells / (bounds.data[3 + d] - bounds.data[d]);
    }
    const float begin = near.data[ray], end = far.data[ray], place = places.data[ray];
    long long found = 0;
    const long long row = writes ? offsets.data[ray] : 0;
    for (int k = 0; ; ++k) {
        const float at = begin + ((float)k + place) * step;
        if (!(at < end)) break;
        int cell = 0;
        for (int d = 0; d < 3; ++d) {
            int c = (int)((from[d] + at * along[d] - low[d]) * scale[d]);
            c = c < 0 ? 0 : c;
            cell = cell * cells + (c < cells ? c : cells - 1);
        }
        if (occupied.data[cell]) {
            if (writes) distances.data[row + found] = at;
            ++found;
        }
    }
    if (!writes) offsets.data[ray + 1] = found;
"""


def march_rays(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    places: Tensor,
    occupied: Tensor,
    bounds: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Return distances and offsets; see `ray_march.march`."""
    given = [origins, directions, near, far, places, bounds]
    values = [value.detach().float().reshape(-1) for value in given]
    grid = occupied.contiguous().view(torch.uint8).reshape(-1)
    offsets = torch.zeros(len(near) + 1, dtype=torch.int64)
    distances = torch.empty(1)
    _launch([len(occupied), step, 0], [*values, grid, offsets, distances], len(near))
    offsets = offsets.cumsum(0)
    distances = torch.empty(int(offsets[-1]))
    if len(distances):
        _launch([len(occupied), step, 1], [*values, grid, offsets, distances], len(near))
    return distances, offsets


def _launch(sizes: list[float], values: list[Tensor], rays: int) -> None:
    """Run the kernel over all rays, on as many threads as torch uses."""
    arrays = [wp.from_torch(value, requires_grad=False) for value in values]
    threads = max(1, min(torch.get_num_threads(), rays))
    cuts = evenly(rays, threads)
    in_bands(_march_kernel(), cuts, [*sizes, *arrays], torch.device("cpu"))


@cache
def _march_kernel() -> wp.Kernel:
    march = wp.func_native(MARCH)(_march)

    @wp.kernel(module="unique", enable_backward=False)
    def march_kernel(
        base: int,
        cells: int,
        step: float,
        writes: int,
        origins: wp.array(dtype=wp.float32),
        directions: wp.array(dtype=wp.float32),
        near: wp.array(dtype=wp.float32),
        far: wp.array(dtype=wp.float32),
        places: wp.array(dtype=wp.float32),
        bounds: wp.array(dtype=wp.float32),
        occupied: wp.array(dtype=wp.uint8),
        offsets: wp.array(dtype=wp.int64),
        distances: wp.array(dtype=wp.float32),
    ):
        march(
            wp.tid() + base, cells, step, writes, origins, directions, near, far, places, bounds, occupied, offsets,
            distances,
        )  # fmt: skip

    return march_kernel


def _march(
    ray: int,
    cells: int,
    step: float,
    writes: int,
    origins: wp.array(dtype=wp.float32),
    directions: wp.array(dtype=wp.float32),
    near: wp.array(dtype=wp.float32),
    far: wp.array(dtype=wp.float32),
    places: wp.array(dtype=wp.float32),
    bounds: wp.array(dtype=wp.float32),
    occupied: wp.array(dtype=wp.uint8),
    offsets: wp.array(dtype=wp.int64),
    distances: wp.array(dtype=wp.float32),
): ...
