# mypy: ignore-errors
"""The encoding of `hash_grid`, compiled by Warp for the CPU: a level at a time, so that its rows stay in the cache.

Backward, all additions to a level's rows are made by one thread in the order of the points: the result does not depend
on how many threads there are. Imported where first used, because it imports Warp and builds kernels.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simworld.kernels.hash_grid import PRIMES, GridLevels
from simworld.kernels.warp_start import evenly, in_bands, wp

BLOCK = 1024  # points that a thread takes at a time, forward

CORNERS = f"""
        float part[3];
        unsigned low[3], high[3];
        for (int d = 0; d < 3; ++d) {{
            float at = points.data[3 * i + d];
            at = (at > 0.0f ? (at < 1.0f ? at : 1.0f) : 0.0f) * (float)resolution;
            int cell = (int)at;
            cell = cell < resolution - 1 ? cell : resolution - 1;
            part[d] = at - (float)cell;
            low[d] = (unsigned)cell;
        }}
        const unsigned along = (unsigned)resolution + 1u;
        const unsigned steps[3] = {{
            mask ? {PRIMES[0]}u : 1u, mask ? {PRIMES[1]}u : along, mask ? {PRIMES[2]}u : along * along
        }};
        for (int d = 0; d < 3; ++d) {{
            low[d] *= steps[d];
            high[d] = low[d] + steps[d];
        }}
        long long rows[8];
        float weights[8];
        for (int c = 0; c < 8; ++c) {{
            const unsigned x = c & 4 ? high[0] : low[0], y = c & 2 ? high[1] : low[1], z = c & 1 ? high[2] : low[2];
            rows[c] = F * ((long long)start + (long long)(mask ? ((x ^ y ^ z) & mask) : x + y + z));
            weights[c] = (c & 4 ? part[0] : 1.0f - part[0]) * (c & 2 ? part[1] : 1.0f - part[1])
                * (c & 1 ? part[2] : 1.0f - part[2]);
        }}
"""

LEVEL = """
    const int F = FEATURES;
    const int resolution = shapes.data[3 * level], start = shapes.data[3 * level + 1];
    const unsigned mask = (unsigned)shapes.data[3 * level + 2];
"""

FORWARD = f"""
    const int blocks = (count + {BLOCK - 1}) / {BLOCK}, level = task / blocks, first = (task % blocks) * {BLOCK};
    const int last = first + {BLOCK} < count ? first + {BLOCK} : count;
    {LEVEL}
    for (int i = first; i < last; ++i) {{
        {CORNERS}
        float sums[F];
        for (int f = 0; f < F; ++f) sums[f] = 0.0f;
        for (int c = 0; c < 8; ++c)
            for (int f = 0; f < F; ++f) sums[f] += weights[c] * table.data[rows[c] + f];
        for (int f = 0; f < F; ++f) made.data[((long long)i * num_levels + level) * F + f] = sums[f];
    }}
"""

BACKWARD = f"""
    {LEVEL}
    for (int i = 0; i < count; ++i) {{
        {CORNERS}
        const float* given = &from_made.data[((long long)i * num_levels + level) * F];
        for (int c = 0; c < 8; ++c)
            for (int f = 0; f < F; ++f) to_table.data[rows[c] + f] += weights[c] * given[f];
    }}
"""

SLOPES = f"""
    float sums[3] = {{0.0f, 0.0f, 0.0f}};
    for (int level = 0; level < num_levels; ++level) {{
        {LEVEL}
        {CORNERS}
        const float* given = &from_made.data[((long long)i * num_levels + level) * F];
        for (int c = 0; c < 8; ++c) {{
            float seen = 0.0f;
            for (int f = 0; f < F; ++f) seen += given[f] * table.data[rows[c] + f];
            const float x = c & 4 ? part[0] : 1.0f - part[0], y = c & 2 ? part[1] : 1.0f - part[1];
            const float z = c & 1 ? part[2] : 1.0f - part[2];
            seen *= (float)resolution;
            sums[0] += (c & 4 ? seen : -seen) * y * z;
            sums[1] += (c & 2 ? seen : -seen) * x * z;
            sums[2] += (c & 1 ? seen : -seen) * x * y;
        }}
    }}
    for (int d = 0; d < 3; ++d) {{
        const float at = points.data[3 * i + d];
        to_points.data[3 * i + d] = at >= 0.0f && at <= 1.0f ? sums[d] : 0.0f;
    }}
"""


def encode_tables(points: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
    """Return features [n, l * f] of points [n, 3] in the unit cube; see `hash_grid.encode`."""
    return _Encode.apply(points, table, levels)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, levels: GridLevels) -> Tensor:
        points, table = points.detach().contiguous(), table.detach().contiguous()
        made = torch.empty(len(points), len(levels.resolutions) * table.shape[1])
        tasks = len(levels.resolutions) * -(-len(points) // BLOCK)
        _launch(_kernels(table.shape[1])[0], tasks, levels, points, [table, made])
        ctx.levels = levels
        ctx.save_for_backward(points, table)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_made: Tensor) -> tuple[Tensor | None, ...]:
        points, table = ctx.saved_tensors
        given, to_points, to_table = from_made.contiguous(), None, None
        _, backward, slopes = _kernels(table.shape[1])
        if ctx.needs_input_grad[0]:
            to_points = torch.empty_like(points)
            _launch(slopes, len(points), ctx.levels, points, [table, given, to_points])
        if ctx.needs_input_grad[1]:
            to_table = torch.zeros_like(table)
            _launch(backward, len(ctx.levels.resolutions), ctx.levels, points, [given, to_table])
        return to_points, to_table, None


def _launch(kernel: wp.Kernel, tasks: int, levels: GridLevels, points: Tensor, values: list[Tensor]) -> None:
    """Run a kernel over all tasks, on as many threads as torch uses."""
    shapes = [wp.from_torch(value.reshape(-1), requires_grad=False) for value in (_shapes(levels), points, *values)]
    threads = max(1, min(torch.get_num_threads(), tasks))
    cuts = evenly(tasks, threads)
    in_bands(kernel, cuts, [len(levels.resolutions), len(points), *shapes], points.device)


@cache
def _shapes(levels: GridLevels) -> Tensor:
    """Return resolution, first row and mask (0 where there is no hash) of each level."""
    masks = [levels.most_entries - 1 if levels.is_hashed(k) else 0 for k in range(len(levels.resolutions))]
    rows = zip(levels.resolutions, levels.starts[:-1], masks, strict=True)
    return torch.tensor(list(rows), dtype=torch.int32)


@cache
def _kernels(features: int) -> tuple[wp.Kernel, wp.Kernel, wp.Kernel]:
    """Return the kernels forward, backward to the table, and backward to the points."""
    forward, backward, slopes = (
        wp.func_native(text.replace("FEATURES", str(features)))(signature)
        for text, signature in ((FORWARD, _forward), (BACKWARD, _backward), (SLOPES, _slopes))
    )

    @wp.kernel(module="unique", enable_backward=False)
    def encode(
        base: int,
        num_levels: int,
        count: int,
        shapes: wp.array(dtype=wp.int32),
        points: wp.array(dtype=wp.float32),
        table: wp.array(dtype=wp.float32),
        made: wp.array(dtype=wp.float32),
    ):
        forward(wp.tid() + base, num_levels, count, shapes, points, table, made)

    @wp.kernel(module="unique", enable_backward=False)
    def encode_backward(
        base: int,
        num_levels: int,
        count: int,
        shapes: wp.array(dtype=wp.int32),
        points: wp.array(dtype=wp.float32),
        from_made: wp.array(dtype=wp.float32),
        to_table: wp.array(dtype=wp.float32),
    ):
        backward(wp.tid() + base, num_levels, count, shapes, points, from_made, to_table)

    @wp.kernel(module="unique", enable_backward=False)
    def encode_slopes(
        base: int,
        num_levels: int,
        count: int,
        shapes: wp.array(dtype=wp.int32),
        points: wp.array(dtype=wp.float32),
        table: wp.array(dtype=wp.float32),
        from_made: wp.array(dtype=wp.float32),
        to_points: wp.array(dtype=wp.float32),
    ):
        slopes(wp.tid() + base, num_levels, count, shapes, points, table, from_made, to_points)

    return encode, encode_backward, encode_slopes


def _forward(
    task: int,
    num_levels: int,
    count: int,
    shapes: wp.array(dtype=wp.int32),
    points: wp.array(dtype=wp.float32),
    table: wp.array(dtype=wp.float32),
    made: wp.array(dtype=wp.float32),
): ...


def _backward(
    level: int,
    num_levels: int,
    count: int,
    shapes: wp.array(dtype=wp.int32),
    points: wp.array(dtype=wp.float32),
    from_made: wp.array(dtype=wp.float32),
    to_table: wp.array(dtype=wp.float32),
): ...


def _slopes(
    i: int,
    num_levels: int,
    count: int,
    shapes: wp.array(dtype=wp.int32),
    points: wp.array(dtype=wp.float32),
    table: wp.array(dtype=wp.float32),
    from_made: wp.array(dtype=wp.float32),
    to_points: wp.array(dtype=wp.float32),
): ...
