# mypy: ignore-errors
"""Compositing by tiles of 16 by 16 pixels, compiled by Warp, on CPU and CUDA: one thread goes through a tile.

Forward, splats front to back while light gets through; backward, from each pixel's last splat to the front, by the same
arithmetic. A tile writes the gradient of each of its splats to a row of its own, and rows are added up afterwards in
their order: no two threads write to one place, and the result does not depend on how many there are.
Imported where first used, because it imports Warp and builds kernels.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simworld.kernels.splats import (
    LEAST_LIGHT,
    LEAST_OPAQUE,
    MOST_OPAQUE,
    TILE,
    Projected,
    Tiles,
    chosen_threads,
    refuse_giants,
    threads_for,
    tiles_of,
)
from simworld.kernels.warp_start import evenly, in_bands, wp

BANDS = 4  # of tiles for each thread
SHAPE = 6  # gradients of a splat beside those of its colours: its mean (2), conic (3) and opacity

ALPHA = f"""
    // exp(-half) as a power of two: whole part by its bits, the rest by a polynomial, so that rows become vectors.
    float power = half * -1.44269504f;
    power = power < -126.0f ? -126.0f : power;
    float whole = floorf(power);
    float rest = power - whole;
    float shape = 1.0f + rest * (0.693147182f + rest * (0.240226462f + rest * (0.0555032864f + rest * (0.00961843136f
        + rest * (0.00133298263f + rest * 0.000154352139f)))));
    union {{ int bits; float value; }} two;
    two.bits = ((int)whole + 127) << 23;
    float fade = shape * two.value;
    float full = opacity * fade;
    float alpha = full < {MOST_OPAQUE}f ? full : {MOST_OPAQUE}f;
    bool counts = half >= 0.0f && alpha >= {LEAST_OPAQUE:.9g}f;
"""

PLACE = f"""
    const int S = {TILE};
    const int inside = tile % (across * down);
    const int left = (inside % across) * S, top = (inside / across) * S;
    const int base = (tile / (across * down)) * width * height;
    const int begin = starts.data[tile], end = starts.data[tile + 1];
"""

SPLAT = """
    const int splat = splats.data[k];
    const float x = means.data[2 * splat] - ((float)left + 0.5f), y = means.data[2 * splat + 1] - ((float)top + 0.5f);
    const float xx = conics.data[3 * splat], xy = conics.data[3 * splat + 1], yy = conics.data[3 * splat + 2];
    const float opacity = opacities.data[splat];
    const float up = y - radii.data[2 * splat + 1], low = y + radii.data[2 * splat + 1];
    const int first = up > 0.0f ? (int)up : 0;
    const int last = low < (float)(S - 1) ? (int)low + 1 : S - 1;
"""


FORWARD = f"""{PLACE}
    const int C = CHANNELS;
    float light[S * S], live[S * S], sums[C * S * S];
    int ended[S * S];
    for (int i = 0; i < S * S; ++i) {{
        light[i] = 1.0f;
        live[i] = (left + i % S < width && top + i / S < height) ? 1.0f : 0.0f;
        ended[i] = -1;
    }}
    for (int i = 0; i < C * S * S; ++i) sums[i] = 0.0f;
    for (int k = begin; k < end; ++k) {{
        {SPLAT}
        float shade[C];
        for (int c = 0; c < C; ++c) shade[c] = colors.data[C * splat + c];
        for (int row = first; row <= last; ++row) {{
            const float dy = (float)row - y;
            for (int column = 0; column < S; ++column) {{
                const int i = row * S + column;
                const float dx = (float)column - x;
                const float half = 0.5f * (xx * dx * dx + yy * dy * dy) + xy * dx * dy;
                {ALPHA}
                float part = counts ? alpha * live[i] : 0.0f;
                const bool stops = part > 0.0f && light[i] * (1.0f - part) <= {LEAST_LIGHT}f;
                live[i] = stops ? 0.0f : live[i];
                part = stops ? 0.0f : part * light[i];
                light[i] -= part;
                ended[i] = part > 0.0f ? k : ended[i];
                for (int c = 0; c < C; ++c) sums[c * S * S + i] += part * shade[c];
            }}
        }}
        if (((k - begin) & 31) == 31) {{
            float any = 0.0f;
            for (int i = 0; i < S * S; ++i) any += live[i];
            if (any == 0.0f) break;
        }}
    }}
    for (int i = 0; i < S * S; ++i) {{
        const int column = left + i % S, row = top + i / S;
        if (column >= width || row >= height) continue;
        const int pixel = base + row * width + column;
        for (int c = 0; c < C; ++c) made.data[C * pixel + c] = sums[c * S * S + i];
        through.data[pixel] = light[i];
        ended_.data[pixel] = ended[i];
    }}
"""

BACKWARD = f"""{PLACE}
    const int C = CHANNELS;
    const int N = {SHAPE} + C;
    float light[S * S], behind[S * S], given[C * S * S];
    int ended[S * S];
    int latest = -1;
    for (int i = 0; i < S * S; ++i) {{
        const int column = left + i % S, row = top + i / S;
        const bool there = column < width && row < height;
        const int pixel = there ? base + row * width + column : 0;
        light[i] = there ? through.data[pixel] : 1.0f;
        ended[i] = there ? ended_.data[pixel] : -1;
        // What is behind a splat is seen through it: the colours there, and the background, whose share is the light.
        behind[i] = there ? from_through.data[pixel] : 0.0f;
        for (int c = 0; c < C; ++c) given[c * S * S + i] = there ? from_colors.data[C * pixel + c] : 0.0f;
        latest = ended[i] > latest ? ended[i] : latest;
    }}
    for (int k = latest; k >= begin; --k) {{
        {SPLAT}
        float shade[C];
        for (int c = 0; c < C; ++c) shade[c] = colors.data[C * splat + c];
        float lanes[N * S];
        for (int n = 0; n < N * S; ++n) lanes[n] = 0.0f;
        for (int row = first; row <= last; ++row) {{
            const float dy = (float)row - y;
            for (int column = 0; column < S; ++column) {{
                const int i = row * S + column;
                const float dx = (float)column - x;
                const float half = 0.5f * (xx * dx * dx + yy * dy * dy) + xy * dx * dy;
                {ALPHA}
                alpha = counts && k <= ended[i] ? alpha : 0.0f;
                const float over = 1.0f / (1.0f - alpha);
                const float before = light[i] * over;
                const float part = alpha * before;
                float seen = 0.0f;
                for (int c = 0; c < C; ++c) {{
                    seen += shade[c] * given[c * S * S + i];
                    lanes[({SHAPE} + c) * S + column] += part * given[c * S * S + i];
                }}
                const float to_alpha = alpha > 0.0f && full < {MOST_OPAQUE}f ? before * seen - behind[i] * over : 0.0f;
                behind[i] += part * seen;
                light[i] = before;
                const float to_half = -alpha * to_alpha;
                lanes[0 * S + column] -= to_half * (xx * dx + xy * dy);
                lanes[1 * S + column] -= to_half * (xy * dx + yy * dy);
                lanes[2 * S + column] += to_half * 0.5f * dx * dx;
                lanes[3 * S + column] += to_half * dx * dy;
                lanes[4 * S + column] += to_half * 0.5f * dy * dy;
                lanes[5 * S + column] += to_alpha * fade;
            }}
        }}
        for (int n = 0; n < N; ++n) {{
            float sum = 0.0f;
            for (int column = 0; column < S; ++column) sum += lanes[n * S + column];
            rows.data[(long long)N * k + n] = sum;
        }}
    }}
"""


LISTING = f"""
    const int S = {TILE};
    const int tiles = across * down;
    int* places = counts.data + (long long)task * tiles * num_pictures;
    for (int k = cuts.data[task]; k < cuts.data[task + 1]; ++k) {{
        const float x = means.data[2 * k], y = means.data[2 * k + 1];
        const float wide = radii.data[2 * k], high = radii.data[2 * k + 1];
        const float left = floorf((x - wide) / S), right = ceilf((x + wide) / S);
        const float top = floorf((y - high) / S), low = ceilf((y + high) / S);
        const int first = left > 0.0f ? (left < across ? (int)left : across) : 0;
        const int last = right > 0.0f ? (right < across ? (int)right : across) : 0;
        const int upper = top > 0.0f ? (top < down ? (int)top : down) : 0;
        const int lower = low > 0.0f ? (low < down ? (int)low : down) : 0;
        int* picture = places + pictures.data[k] * tiles;
        for (int line = upper; line < lower; ++line) {{
            int* row = picture + line * across;
            if (listing)
                for (int column = first; column < last; ++column) listed.data[row[column]++] = k;
            else
                for (int column = first; column < last; ++column) row[column]++;
        }}
    }}
"""


def list_tiles(splats: Projected) -> Tiles:
    """Return what `splats.tiles_of` does, on CPU: bands of splats count what they add to each tile, then list it.

    Within a tile a band's splats come after those of the bands before it, so that all stay in their order.
    """
    across, down, count = -(-splats.width // TILE), -(-splats.height // TILE), len(splats.means)
    cuts = evenly(count, threads_for(count))
    bands = len(cuts) - 1
    counts = torch.zeros(bands, splats.num_pictures * across * down, dtype=torch.int32)
    given = (torch.tensor(cuts, dtype=torch.int32), splats.pictures.int(), splats.means.detach(), splats.radii, counts)
    told = [value.contiguous() for value in given]  # kept: Warp is told where they lie and holds nothing

    def run(listed: Tensor) -> None:
        arrays = [_flat(value) for value in (*told, listed)]
        sizes = [splats.num_pictures, across, down, int(len(listed) > 0)]
        in_bands(_listing_kernel(), range(bands + 1), [*sizes, *arrays], counts.device)

    run(counts[:0])
    ends = counts.t().flatten().cumsum(0, dtype=torch.int64)
    total = int(ends[-1]) if len(ends) else 0
    refuse_giants(total)
    places = torch.nn.functional.pad(ends.int(), (1, 0))
    counts.copy_(places[:-1].view(-1, bands).t())
    listed = torch.empty(total, dtype=torch.int32)
    if total:
        run(listed)
    return Tiles(splats=listed, starts=places[::bands].contiguous(), across=across, down=down)


def _flat(value: Tensor) -> Any:
    return wp.from_torch(value.reshape(-1), requires_grad=False, return_ctype=True)


@cache
def _listing_kernel() -> wp.Kernel:
    listing = wp.func_native(LISTING)(_listing_signature)

    @wp.kernel(module="unique", enable_backward=False)
    def list_bands(
        base: int,
        num_pictures: int,
        across: int,
        down: int,
        second: int,
        cuts: wp.array(dtype=wp.int32),
        pictures: wp.array(dtype=wp.int32),
        means: wp.array(dtype=wp.float32),
        radii: wp.array(dtype=wp.float32),
        counts: wp.array(dtype=wp.int32),
        listed: wp.array(dtype=wp.int32),
    ):
        listing(wp.tid() + base, num_pictures, across, down, second, cuts, pictures, means, radii, counts, listed)

    return list_bands


def _listing_signature(
    task: int,
    num_pictures: int,
    across: int,
    down: int,
    listing: int,
    cuts: wp.array(dtype=wp.int32),
    pictures: wp.array(dtype=wp.int32),
    means: wp.array(dtype=wp.float32),
    radii: wp.array(dtype=wp.float32),
    counts: wp.array(dtype=wp.int32),
    listed: wp.array(dtype=wp.int32),
): ...


def composite_tiles(splats: Projected) -> tuple[Tensor, Tensor]:
    """Return colours [b, h, w, c] and opacities [b, h, w, 1]; see `splats.composite`."""
    colors, through = _Composite.apply(splats, splats.means, splats.conics, splats.opacities, splats.colors)
    return colors, 1 - through


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, splats: Projected, means: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor
    ) -> tuple[Tensor, Tensor]:
        tiles = list_tiles(splats) if means.device.type == "cpu" else tiles_of(splats)
        given = [value.detach().contiguous() for value in (means, conics, opacities, colors, splats.radii)]
        shape = (splats.num_pictures, splats.height, splats.width)
        made = means.new_empty(*shape, colors.shape[1])
        through = means.new_empty(*shape, 1)
        ended = torch.empty(shape, dtype=torch.int32, device=means.device)
        _launch(_forward_kernel(colors.shape[1]), splats, tiles, [*given, made, through, ended])
        ctx.splats, ctx.tiles = splats, tiles
        ctx.save_for_backward(*given, through, ended)
        return made, through

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_colors: Tensor, from_through: Tensor) -> tuple[Tensor | None, ...]:
        *given, through, ended = ctx.saved_tensors
        means, colors = given[0], given[3]
        rows = means.new_zeros(len(ctx.tiles.splats), SHAPE + colors.shape[1])
        told = [from_colors.contiguous(), (from_through * through).contiguous()]
        _launch(_backward_kernel(colors.shape[1]), ctx.splats, ctx.tiles, [*given, through, ended, *told, rows])
        sums = means.new_zeros(len(means), rows.shape[1]).index_add_(0, ctx.tiles.splats.long(), rows)
        return (None, sums[:, :2], sums[:, 2:5], sums[:, 5], sums[:, SHAPE:])


def _launch(kernel: wp.Kernel, splats: Projected, tiles: Tiles, values: list[Tensor]) -> None:
    """Run a kernel over all tiles."""
    count = len(tiles.starts) - 1
    arrays = [_flat(value) for value in (tiles.starts, tiles.splats, *values)]
    sizes = [tiles.across, tiles.down, splats.width, splats.height]
    threads = min(chosen_threads(), count) if splats.means.device.type == "cpu" else 1
    # Bands with as many splats each, not as many tiles: pictures are full in the middle. Which tiles end early nobody
    # knows, so threads find several bands each.
    bands = min(BANDS * threads, count) if threads > 1 else 1
    shares = torch.arange(1, bands) * (len(tiles.splats) / bands)
    cuts = [0, *torch.searchsorted(tiles.starts[:count].cpu(), shares.int()).tolist(), count]
    in_bands(kernel, cuts, [*sizes, *arrays], splats.means.device, threads=threads)


@cache
def _forward_kernel(channels: int) -> wp.Kernel:
    forward = wp.func_native(FORWARD.replace("CHANNELS", str(channels)))(_forward_signature)

    @wp.kernel(module="unique", enable_backward=False)
    def composite(
        base: int,
        across: int,
        down: int,
        width: int,
        height: int,
        starts: wp.array(dtype=wp.int32),
        splats: wp.array(dtype=wp.int32),
        means: wp.array(dtype=wp.float32),
        conics: wp.array(dtype=wp.float32),
        opacities: wp.array(dtype=wp.float32),
        colors: wp.array(dtype=wp.float32),
        radii: wp.array(dtype=wp.float32),
        made: wp.array(dtype=wp.float32),
        through: wp.array(dtype=wp.float32),
        ended: wp.array(dtype=wp.int32),
    ):
        tile = wp.tid() + base
        forward(
            tile, across, down, width, height, starts, splats, means, conics, opacities, colors, radii, made, through,
            ended,
        )  # fmt: skip

    return composite


@cache
def _backward_kernel(channels: int) -> wp.Kernel:
    backward = wp.func_native(BACKWARD.replace("CHANNELS", str(channels)))(_backward_signature)

    @wp.kernel(module="unique", enable_backward=False)
    def composite_backward(
        base: int,
        across: int,
        down: int,
        width: int,
        height: int,
        starts: wp.array(dtype=wp.int32),
        splats: wp.array(dtype=wp.int32),
        means: wp.array(dtype=wp.float32),
        conics: wp.array(dtype=wp.float32),
        opacities: wp.array(dtype=wp.float32),
        colors: wp.array(dtype=wp.float32),
        radii: wp.array(dtype=wp.float32),
        through: wp.array(dtype=wp.float32),
        ended: wp.array(dtype=wp.int32),
        from_colors: wp.array(dtype=wp.float32),
        from_through: wp.array(dtype=wp.float32),
        rows: wp.array(dtype=wp.float32),
    ):
        tile = wp.tid() + base
        backward(
            tile, across, down, width, height, starts, splats, means, conics, opacities, colors, radii, through, ended,
            from_colors, from_through, rows,
        )  # fmt: skip

    return composite_backward


def _forward_signature(
    tile: int,
    across: int,
    down: int,
    width: int,
    height: int,
    starts: wp.array(dtype=wp.int32),
    splats: wp.array(dtype=wp.int32),
    means: wp.array(dtype=wp.float32),
    conics: wp.array(dtype=wp.float32),
    opacities: wp.array(dtype=wp.float32),
    colors: wp.array(dtype=wp.float32),
    radii: wp.array(dtype=wp.float32),
    made: wp.array(dtype=wp.float32),
    through: wp.array(dtype=wp.float32),
    ended_: wp.array(dtype=wp.int32),
): ...


def _backward_signature(
    tile: int,
    across: int,
    down: int,
    width: int,
    height: int,
    starts: wp.array(dtype=wp.int32),
    splats: wp.array(dtype=wp.int32),
    means: wp.array(dtype=wp.float32),
    conics: wp.array(dtype=wp.float32),
    opacities: wp.array(dtype=wp.float32),
    colors: wp.array(dtype=wp.float32),
    radii: wp.array(dtype=wp.float32),
    through: wp.array(dtype=wp.float32),
    ended_: wp.array(dtype=wp.int32),
    from_colors: wp.array(dtype=wp.float32),
    from_through: wp.array(dtype=wp.float32),
    rows: wp.array(dtype=wp.float32),
): ...
