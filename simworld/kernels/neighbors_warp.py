# mypy: ignore-errors
# ruff: noqa: UP018, RUF046 - int(0) declares a variable to Warp, 0 a constant
"""Warp kernels of the neighbour search, on CPU and CUDA: over cells, over pairs, over candidates held.

Imported where first used, because it imports Warp and builds kernels. All distances are taken in float64
and without fused multiplication and addition, so that every device finds the same pairs.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simworld.kernels.warp_start import stream_of, wp

wp.set_module_options({"fuse_fp": False, "enable_backward": False})


@wp.func
def _near(a: wp.vec3d, b: wp.vec3d, box: wp.vec3d, reach2: wp.float64) -> bool:
    x = wp.abs(a[0] - b[0])
    y = wp.abs(a[1] - b[1])
    z = wp.abs(a[2] - b[2])
    x = wp.min(x, box[0] - x)
    y = wp.min(y, box[1] - y)
    z = wp.min(z, box[2] - z)
    return x * x + y * y + z * z <= reach2


@wp.func
def _beside(cell: wp.int64, step: int, wrapped: wp.int64, size: wp.int64) -> wp.int64:
    """Return the cell a step away, or -1 for none; `wrapped` cells close a circle, 0 of them none."""
    if step == 0:
        return cell
    moved = cell + wp.int64(step)
    if wrapped == wp.int64(0):
        if moved < size:
            return moved
        return wp.int64(-1)
    if wrapped == wp.int64(1) or (wrapped == wp.int64(2) and step < 0):
        return wp.int64(-1)
    return (moved + wrapped) % wrapped


@wp.func
def _lower_bound(keys: wp.array(dtype=wp.int64), key: wp.int64) -> int:
    low = int(0)
    high = keys.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@wp.kernel
def find_ranges(
    keys: wp.array(dtype=wp.int64),
    firsts: wp.array(dtype=wp.int64),
    wraps: wp.array2d(dtype=wp.int64),
    sizes: wp.vec3l,
    rows: wp.vec3i,
    ranges: wp.array2d(dtype=wp.vec2i),
):
    """Write for each cell which places in the sorted order its neighbourhood takes, row by row."""
    cell = wp.tid()
    z = keys[cell] % sizes[2]
    rest = keys[cell] // sizes[2]
    y = rest % sizes[1]
    rest = rest // sizes[1]
    x = rest % sizes[0]
    scene = rest // sizes[0]
    number = int(scene)
    around = wraps[number, 2]
    last = sizes[2] - wp.int64(1)
    if around > wp.int64(0):
        last = around - wp.int64(1)
    for row in range(rows[0] * rows[1] * rows[2]):
        part = row % rows[2]
        column = row // rows[2]
        step_y = int(0)
        if rows[1] > 1:
            step_y = column % rows[1] - 1
        step_x = int(0)
        if rows[0] > 1:
            step_x = column // rows[1] - 1
        next_x = _beside(x, step_x, wraps[number, 0], sizes[0])
        next_y = _beside(y, step_y, wraps[number, 1], sizes[1])
        low = wp.max(z - wp.int64(1), wp.int64(0))
        high = wp.min(z + wp.int64(1), last)
        if part == 1:  # the cell at the other end of a periodic axis
            high = wp.int64(-1)
            if around > wp.int64(2) and z == wp.int64(0):
                low = last
                high = low
            if around > wp.int64(2) and z == last:
                low = wp.int64(0)
                high = low
        found = wp.vec2i(0, 0)
        if next_x >= wp.int64(0) and next_y >= wp.int64(0) and high >= low:
            base = ((scene * sizes[0] + next_x) * sizes[1] + next_y) * sizes[2]
            start = _lower_bound(keys, base + low)
            stop = start
            while stop < keys.shape[0] and keys[stop] <= base + high:
                stop += 1
            found = wp.vec2i(int(firsts[start]), int(firsts[stop]))
        ranges[cell, row] = found


@wp.kernel
def count_pairs(
    stride: int,
    points: wp.array(dtype=wp.vec3d),
    boxes: wp.array(dtype=wp.vec3d),
    scenes: wp.array(dtype=wp.int32),
    cells: wp.array(dtype=wp.int32),
    ranges: wp.array2d(dtype=wp.vec2i),
    receives: wp.array(dtype=wp.bool),
    reach2: wp.float64,
    counts: wp.array(dtype=wp.int32),
):
    """Write how many points are near each of every `stride`-th, itself among them."""
    item = wp.tid()
    place = item * stride
    count = int(0)
    if receives[place]:
        point = points[place]
        box = boxes[scenes[place]]
        for row in range(ranges.shape[1]):
            span = ranges[cells[place], row]
            for other in range(span[0], span[1]):
                if _near(point, points[other], box, reach2):
                    count += 1
    counts[item] = count


@wp.func
def _sort(values: wp.array(dtype=wp.int64), start: wp.int64, count: int):
    """Sort a short stretch: Shell's sort, in place."""
    gap = int(1)
    while gap < count // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for k in range(gap, count):
            value = values[start + wp.int64(k)]
            place = int(k)
            while place >= gap and values[start + wp.int64(place - gap)] > value:
                values[start + wp.int64(place)] = values[start + wp.int64(place - gap)]
                place -= gap
            values[start + wp.int64(place)] = value
        gap = gap // 3


@wp.kernel
def fill_pairs(
    loops: bool,
    points: wp.array(dtype=wp.vec3d),
    boxes: wp.array(dtype=wp.vec3d),
    scenes: wp.array(dtype=wp.int32),
    cells: wp.array(dtype=wp.int32),
    ranges: wp.array2d(dtype=wp.vec2i),
    receives: wp.array(dtype=wp.bool),
    reach2: wp.float64,
    order: wp.array(dtype=wp.int32),
    starts: wp.array(dtype=wp.int64),
    senders: wp.array(dtype=wp.int64),
):
    """Write who is near each point, in ascending order, from the place its receiver starts at."""
    place = wp.tid()
    if receives[place]:
        point = points[place]
        box = boxes[scenes[place]]
        start = starts[order[place]]
        count = int(0)
        for row in range(ranges.shape[1]):
            span = ranges[cells[place], row]
            for other in range(span[0], span[1]):
                if (loops or other != place) and _near(point, points[other], box, reach2):
                    senders[start + wp.int64(count)] = wp.int64(order[other])
                    count += 1
        _sort(senders, start, count)


@wp.kernel
def count_held(
    points: wp.array(dtype=wp.vec3d),
    boxes: wp.array(dtype=wp.vec3d),
    scenes: wp.array(dtype=wp.int32),
    held: wp.array(dtype=wp.int32),
    bounds: wp.array(dtype=wp.int64),
    reach2: wp.float64,
    counts: wp.array(dtype=wp.int32),
):
    """Write how many of the candidates of each point are near it."""
    item = wp.tid()
    box = boxes[scenes[item]]
    count = int(0)
    for k in range(int(bounds[item + 1] - bounds[item])):
        if _near(points[item], points[held[bounds[item] + wp.int64(k)]], box, reach2):
            count += 1
    counts[item] = count


@wp.kernel
def fill_held(
    points: wp.array(dtype=wp.vec3d),
    boxes: wp.array(dtype=wp.vec3d),
    scenes: wp.array(dtype=wp.int32),
    held: wp.array(dtype=wp.int32),
    bounds: wp.array(dtype=wp.int64),
    reach2: wp.float64,
    starts: wp.array(dtype=wp.int64),
    senders: wp.array(dtype=wp.int64),
):
    """Write those of the candidates of each point that are near it, in the order they are held."""
    item = wp.tid()
    box = boxes[scenes[item]]
    place = starts[item]
    for k in range(int(bounds[item + 1] - bounds[item])):
        other = held[bounds[item] + wp.int64(k)]
        if _near(points[item], points[other], box, reach2):
            senders[place] = wp.int64(other)
            place += wp.int64(1)


def launch(kernel: Any, items: int, arguments: Sequence[Any]) -> None:
    """Run a kernel on the device of its tensors, in torch's order of work there."""
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    stream = stream_of(device)
    given = [_argument(value, kind.type) for value, kind in zip(arguments, kernel.adj.args, strict=True)]
    wp.launch(kernel, items, given, device="cpu" if stream is None else None, stream=stream)


def _argument(value: Any, kind: Any) -> Any:
    return wp.from_torch(value, dtype=kind.dtype, return_ctype=True) if isinstance(value, Tensor) else value
