"""Who is near whom: all pairs of particles within a radius, exact, across periodic boundaries and many scenes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

EDGE_BYTES = 16  # of a sender and a receiver
MOST_EDGES = 2**31 - 1  # that a kernel can address
UNCHECKED_EDGES = 2**24  # a quarter of a GiB, which is not worth asking how much memory there is
SAMPLED_DISTANCES = 2**27  # about a third of a second on a CPU
LARGEST_KEY = 2**62
MOST_CELLS = 2**18  # along one axis
MARGIN = 2.0**-20  # by which cells are larger than the radius, more than rounding moves a particle
DISTANCES_OF_BLOCK = 2**22  # compared at once by the definition


class NeighborPairs(NamedTuple):
    """Ordered pairs, sorted by receiver and then by sender: `senders` [e], `receivers` [e], all int64.

    `starts` [n] is the first pair of each receiver.
    """

    senders: Tensor
    receivers: Tensor
    starts: Tensor


@torch.no_grad()
def neighbor_pairs(
    positions: Tensor,
    radius: float,
    *,
    batch: Tensor | None = None,
    boundaries: Tensor | None = None,
    periodic: Tensor | None = None,
    active: Tensor | None = None,
    receives: Tensor | None = None,
    loops: bool = False,
    max_edges: int | None = None,
) -> NeighborPairs:
    """Return all ordered pairs of different particles of a scene at most `radius` apart.

    `positions` [n, d] are in two or three dimensions, `radius` in their unit. `batch` [n] is the scene of each,
    ascending. Where `periodic` [b, d], what leaves the box `boundaries` [b, 2, d] on one side comes back on
    the other, distances are to the nearest image, and positions may lie outside; open axes have no box.
    Particles that are not `active` [n] are in no pair; those that do not `receives` [n] send only. `loops` adds
    the pair of each receiver with itself. Distances are taken in float64, whatever the positions are in.

    The same pairs in the same order on every device. Memory grows with the number of pairs, which is
    known before they are stored: more than `max_edges`, or than fit in the free memory, are refused.

    Raises:
        ValueError: shapes disagree, a position is not finite, `radius` is over half a periodic box, or there
            are too many pairs.
    """
    points = _checked(positions, radius, batch, boundaries, periodic, active, receives)
    starts, senders = _search(points, radius, radius, loops, max_edges)
    return _pairs(starts, senders)


@torch.no_grad()
def neighbor_pairs_reference(
    positions: Tensor,
    radius: float,
    *,
    batch: Tensor | None = None,
    boundaries: Tensor | None = None,
    periodic: Tensor | None = None,
    active: Tensor | None = None,
    receives: Tensor | None = None,
    loops: bool = False,
) -> NeighborPairs:
    """Define `neighbor_pairs`: compare every particle with every other, some rows at a time."""
    points = _checked(positions, radius, batch, boundaries, periodic, active, receives)
    count = len(points.places)
    everyone = torch.arange(count, device=positions.device)
    found = [torch.zeros(2, 0, dtype=torch.int64, device=positions.device)]
    block = max(1, DISTANCES_OF_BLOCK // max(1, count))
    for first in range(0, count, block):
        rows = everyone[first : first + block]
        gaps = (points.places[rows, None] - points.places).abs()
        gaps = torch.minimum(gaps, points.boxes[points.scenes[rows]][:, None] - gaps)
        x, y, z = (gaps * gaps).unbind(2)
        near = (x + y + z <= radius * radius) & (points.scenes[rows, None] == points.scenes)
        near &= points.receives[rows, None] & points.active
        if not loops:
            near &= rows[:, None] != everyone
        receivers, senders = near.nonzero(as_tuple=True)
        found.append(torch.stack([rows[receivers], senders]))
    receivers, senders = torch.cat(found, 1)
    return NeighborPairs(senders, receivers, torch.searchsorted(receivers, everyone))


class NeighborSearch:
    """`neighbor_pairs`, faster for particles that have moved little since the last call, and equal bit for bit.

    It holds the pairs within `radius` + `skin` of some earlier positions. As long as no particle is more than half
    of `skin` from there, whoever is now within `radius` is among them; otherwise, or when anything but the
    positions differs, it searches anew. What it holds changes the time of a call and never its result.
    `builds` counts the searches.
    """

    def __init__(self, radius: float, *, skin: float) -> None:
        if not (math.isfinite(skin) and skin >= 0):
            raise ValueError(f"a skin is a finite length of at least 0, got {skin}")
        _check_radius(radius)
        self.radius = radius
        self.skin = skin
        self.builds = 0
        self._held: _Held | None = None

    @torch.no_grad()
    def __call__(
        self,
        positions: Tensor,
        *,
        batch: Tensor | None = None,
        boundaries: Tensor | None = None,
        periodic: Tensor | None = None,
        active: Tensor | None = None,
        receives: Tensor | None = None,
        loops: bool = False,
        max_edges: int | None = None,
    ) -> NeighborPairs:
        """Return what `neighbor_pairs` returns for the same arguments; `max_edges` bounds what is held, too."""
        points = _checked(positions, self.radius, batch, boundaries, periodic, active, receives)
        held = self._held
        if held is None or not held.covers(points, loops):
            # Past half of a periodic box all images are near.
            reach = max(self.radius, min(self.radius + self.skin, float(points.boxes.min()) / 2))
            starts, senders = _search(points, reach, self.radius, loops, max_edges)
            bounds = torch.cat([starts, starts.new_tensor([len(senders)])])
            held = _Held(points=points, loops=loops, skin=reach - self.radius, senders=senders.int(), bounds=bounds)
            self.builds += 1
            self._held = held
        return _pairs(*_filter(held, points, self.radius, max_edges))


@dataclass(frozen=True, kw_only=True)
class _Points:
    """Particles in three dimensions: `places` [n, 3] in their boxes, `boxes` [b, 3] infinite where open.

    `lowers` [b, 3] are the lower corners, 0 where open. Who is not active does not receive, and is at no place.
    """

    places: Tensor
    boxes: Tensor
    lowers: Tensor
    scenes: Tensor
    active: Tensor
    receives: Tensor
    dimensions: int


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Candidates: those of particle i are `senders` from `bounds[i]` to `bounds[i + 1]`, found at `points`."""

    points: _Points
    loops: bool
    skin: float
    senders: Tensor
    bounds: Tensor

    def covers(self, points: _Points, loops: bool) -> bool:
        """Tell whether every pair of `points` is among the candidates."""
        old = self.points
        if loops != self.loops or old.places.shape != points.places.shape or old.places.device != points.places.device:
            return False
        names = ("boxes", "lowers", "scenes", "active", "receives")
        if not all(torch.equal(getattr(old, name), getattr(points, name)) for name in names):
            return False
        moved = (points.places - old.places).abs_()
        moved = torch.minimum(moved, points.boxes[points.scenes] - moved)
        farthest = float((moved * moved).sum(1).amax().sqrt()) if len(moved) else 0.0
        return 2 * farthest <= self.skin * (1 - MARGIN)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Particles `order` [m] by cell, in cells of at least the radius; inactive ones are left out.

    `keys` [u] are the cells that hold particles, `firsts` [u + 1] the place of the first in each, `cells` [m] the
    cell of each place. A key numbers scene and cell of the three axes, which have `sizes` cells; `wraps`
    [b, 3] is the number of cells round each axis, 0 where it is open.
    """

    order: Tensor
    keys: Tensor
    firsts: Tensor
    cells: Tensor
    sizes: list[int]
    wraps: Tensor


def _search(points: _Points, reach: float, radius: float, loops: bool, max_edges: int | None) -> tuple[Tensor, Tensor]:
    """Return starts and senders of all pairs within `reach`; errors name `radius`."""
    from simworld.kernels import neighbors_warp as kernels

    device = points.places.device
    starts = torch.zeros(len(points.places), dtype=torch.int64, device=device)
    if not bool(points.active.any()):
        return starts, starts[:0]
    grid = _grid(points, reach)
    # Rows of neighbouring cells: the last axis is contiguous, but for the far end of a periodic one.
    rows = [3 if grid.sizes[0] > 1 else 1, 3 if grid.sizes[1] > 1 else 1, 2 if bool(grid.wraps[:, 2].any()) else 1]
    ranges = torch.empty(len(grid.keys), math.prod(rows), 2, dtype=torch.int32, device=device)
    cells = [grid.keys, grid.firsts, grid.wraps, grid.sizes, rows, ranges]
    kernels.launch(kernels.find_ranges, len(grid.keys), cells)
    order = grid.order
    receives = points.receives[order]
    near = [points.places[order], points.boxes, points.scenes[order].int(), grid.cells, ranges, receives, reach * reach]

    def count(stride: int) -> Tensor:
        counts = torch.empty(-(-len(order) // stride), dtype=torch.int32, device=device)
        kernels.launch(kernels.count_pairs, len(counts), [stride, *near, counts])
        return counts if loops else counts - receives[::stride].int()

    widths = (ranges[..., 1] - ranges[..., 0]).sum(1, dtype=torch.int64)
    _refuse_many(int((widths * grid.firsts.diff()).sum()), count, points, reach, radius, max_edges)
    counts = torch.zeros_like(starts).index_copy_(0, order, count(1).long())
    ends = counts.cumsum(0)
    total = int(ends[-1])
    _check_total(total, points, reach, radius, max_edges)
    starts = ends - counts
    senders = torch.empty(total, dtype=torch.int64, device=device)
    kernels.launch(kernels.fill_pairs, len(order), [loops, *near, order.int(), starts, senders])
    return starts, senders


def _filter(held: _Held, points: _Points, radius: float, max_edges: int | None) -> tuple[Tensor, Tensor]:
    """Return starts and senders of those candidates that are within the radius."""
    from simworld.kernels import neighbors_warp as kernels

    near = [points.places, points.boxes, points.scenes.int(), held.senders, held.bounds, radius * radius]
    counts = torch.zeros(len(points.places), dtype=torch.int32, device=points.places.device)
    if not len(held.senders):
        return held.bounds[:-1], held.bounds[:0]
    kernels.launch(kernels.count_held, len(counts), [*near, counts])
    ends = counts.cumsum(0)
    total = int(ends[-1])
    _check_total(total, points, radius, radius, max_edges)
    starts, senders = ends - counts, torch.empty(total, dtype=torch.int64, device=counts.device)
    kernels.launch(kernels.fill_held, len(counts), [*near, starts, senders])
    return starts, senders


def _pairs(starts: Tensor, senders: Tensor) -> NeighborPairs:
    counts = torch.cat([starts, starts.new_tensor([len(senders)])]).diff()
    everyone = torch.arange(len(starts), device=starts.device)
    receivers = torch.repeat_interleave(everyone, counts, output_size=len(senders))
    return NeighborPairs(senders, receivers, starts)


def _grid(points: _Points, reach: float) -> _Grid:
    chosen = points.active.nonzero()[:, 0]
    places, scenes = points.places[chosen], points.scenes[chosen]
    wraps = torch.where(points.boxes.isfinite(), points.boxes / (reach * (1 + MARGIN)), 0.0)
    wraps = torch.where(points.boxes.isfinite(), wraps.floor().clamp(1, MOST_CELLS), 0.0).long()
    along = [_along_axis(places[:, axis], points, scenes, wraps, axis, reach) for axis in range(3)]
    sizes = [size for _, size in along]
    # Keys of a few particles strewn over a vast space would overflow: go without the finest axes.
    while len(points.boxes) * math.prod(sizes) > LARGEST_KEY:
        axis = sizes.index(max(sizes))
        along[axis], sizes[axis] = (torch.zeros_like(scenes), 1), 1
        wraps[:, axis] = torch.where(wraps[:, axis] > 0, 1, 0)
    keys = scenes
    for cells, size in along:
        keys = keys * size + cells
    keys, order = torch.sort(keys, stable=True)
    keys, cells, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Grid(order=chosen[order], keys=keys, firsts=firsts, cells=cells.int(), sizes=sizes, wraps=wraps)


def _along_axis(
    places: Tensor, points: _Points, scenes: Tensor, wraps: Tensor, axis: int, reach: float
) -> tuple[Tensor, int]:
    """Return the cell of each particle along an axis, and how many cells there are."""
    if axis < 3 - points.dimensions:
        return torch.zeros_like(scenes), 1
    around = wraps[:, axis]
    closed = around > 0
    if not bool(closed.any()):
        return _open_cells(places, reach)
    count, box = around[scenes], points.boxes[scenes, axis]
    cells = ((places - points.lowers[scenes, axis]) / box * count).floor().long()
    cells = torch.minimum(cells.clamp_(min=0), count - 1)
    size = int(around.max())
    if not bool(closed.all()):
        straight = (~closed[scenes]).nonzero()[:, 0]
        if len(straight):
            cells[straight], wide = _open_cells(places[straight], reach)
            size = max(size, wide)
    return cells, size


def _open_cells(places: Tensor, reach: float) -> tuple[Tensor, int]:
    """Return the cells along an open axis, which begins and ends with its particles."""
    width = reach * (1 + MARGIN)
    low, high = (float(end) for end in places.aminmax())
    if (high - low) / width < MOST_CELLS:
        size = int((high - low) / width) + 1
        return ((places - low) / width).long().clamp_(max=size - 1), size  # devices round quotients differently
    # Some have strayed far. Cells begin anew after each gap, so that there are at most two for a particle.
    ordered, order = torch.sort(places)
    new = torch.cat([torch.ones_like(order[:1], dtype=torch.bool), ordered.diff() > width])
    group = new.cumsum(0) - 1
    begins = ordered[new]
    inside = ((ordered - begins[group]) / width).long()
    lasts = inside[torch.cat([new[1:], new[:1]])] + 2
    cells = torch.empty_like(inside)
    cells[order] = inside + (lasts.cumsum(0) - lasts)[group]
    return cells, int(lasts.sum())


def room(device: torch.device, edge_bytes: int = EDGE_BYTES) -> int:
    """Return how many pairs fit in the memory that is free on the device, where one takes `edge_bytes`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // edge_bytes
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return (free[0] if free else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // edge_bytes


def _allowed(device: torch.device, max_edges: int | None) -> int:
    return min(room(device), MOST_EDGES, MOST_EDGES if max_edges is None else max_edges)


def _refuse_many(
    distances: int,
    count: Callable[[int], Tensor],
    points: _Points,
    reach: float,
    radius: float,
    max_edges: int | None,
) -> None:
    """Raise if there are far too many pairs, told from a sample; `distances` bounds their number."""
    device = points.places.device
    if distances <= (UNCHECKED_EDGES if max_edges is None else max_edges):
        return
    allowed = _allowed(device, max_edges)
    stride = -(-distances // SAMPLED_DISTANCES)
    if distances <= allowed or stride == 1:
        return
    sample = count(stride)
    estimate = int(sample.sum()) * int(points.active.sum()) // len(sample)
    if estimate > 2 * allowed:
        raise _too_many(estimate, "about ", points, reach, radius, allowed)


def _check_total(total: int, points: _Points, reach: float, radius: float, max_edges: int | None) -> None:
    if total <= (UNCHECKED_EDGES if max_edges is None else max_edges):
        return
    allowed = _allowed(points.places.device, max_edges)
    if total > allowed:
        raise _too_many(total, "", points, reach, radius, allowed)


def _too_many(total: int, about: str, points: _Points, reach: float, radius: float, allowed: int) -> ValueError:
    skin = f" with a skin of {reach - radius:.3g}" if reach > radius else ""
    return ValueError(
        f"a radius of {radius:.6g}{skin} makes {about}{total} edges ({total * EDGE_BYTES / 1e9:.3g} GB) of "
        f"{int(points.active.sum())} particles, and {allowed} are allowed or fit in memory; lower the radius, or raise "
        "max_edges where it is the limit"
    )


def _check_radius(radius: float) -> None:
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"a radius is a finite length over 0, got {radius}")


def _checked(
    positions: Tensor,
    radius: float,
    batch: Tensor | None,
    boundaries: Tensor | None,
    periodic: Tensor | None,
    active: Tensor | None,
    receives: Tensor | None,
) -> _Points:
    """Return the particles in float64, three dimensions and their boxes, or raise what is wrong with them."""
    _check_radius(radius)
    if positions.ndim != 2 or positions.shape[1] not in (2, 3) or not positions.is_floating_point():
        raise ValueError(f"positions are real, [n, 2] or [n, 3], got {positions.dtype} {list(positions.shape)}")
    dimensions = positions.shape[1]
    active = _flags("active", active, positions)
    receives = active if receives is None else _flags("receives", receives, positions) & active
    places = positions.detach().double()
    if not bool(active.all()):
        places = torch.where(active[:, None], places, 0.0)
    if not bool(places.isfinite().all()):
        first = int((~places.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"positions must be finite, but those of particle {first} are {positions[first].tolist()}")
    scenes, num_scenes = _scenes(batch, boundaries, periodic, positions)
    lowers, boxes = _boxes(boundaries, periodic, num_scenes, positions, radius)
    padding = (3 - dimensions, 0)
    places = torch.nn.functional.pad(places, padding)
    lowers = torch.nn.functional.pad(lowers, padding)
    boxes = torch.nn.functional.pad(boxes, padding, value=torch.inf)
    if periodic is not None:
        low, box = lowers[scenes], boxes[scenes]
        turns = ((places - low) / box).floor()
        places = torch.where(turns == 0, places, places - box * turns)
    return _Points(
        places=places.contiguous(),
        boxes=boxes.contiguous(),
        lowers=lowers,
        scenes=scenes,
        active=active,
        receives=receives,
        dimensions=dimensions,
    )


def _flags(name: str, flags: Tensor | None, positions: Tensor) -> Tensor:
    if flags is None:
        return torch.ones(len(positions), dtype=torch.bool, device=positions.device)
    if flags.dtype != torch.bool or flags.shape != positions.shape[:1]:
        raise ValueError(f"{name} is bool, [{len(positions)}], got {flags.dtype} {list(flags.shape)}")
    return flags.clone()


def _scenes(
    batch: Tensor | None, boundaries: Tensor | None, periodic: Tensor | None, positions: Tensor
) -> tuple[Tensor, int]:
    """Return the scene of each particle and how many scenes there are."""
    told = periodic if periodic is not None else boundaries
    if batch is None:
        batch = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    if batch.dtype != torch.int64 or batch.shape != positions.shape[:1]:
        raise ValueError(f"batch is int64, [{len(positions)}], got {batch.dtype} {list(batch.shape)}")
    first, last = (int(batch[0]), int(batch[-1])) if len(batch) else (0, 0)
    num_scenes = last + 1 if told is None else len(told)
    if num_scenes < 1 or first < 0 or last >= num_scenes or bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(
            f"batch ascends from 0 to at most {num_scenes - 1}, the last scene; sort the particles by scene"
        )
    return batch.clone(), num_scenes


def _boxes(
    boundaries: Tensor | None, periodic: Tensor | None, num_scenes: int, positions: Tensor, radius: float
) -> tuple[Tensor, Tensor]:
    """Return lower corners and lengths [b, d] of what is periodic: 0 and infinite where open."""
    dimensions = positions.shape[1]
    lowers = torch.zeros(num_scenes, dimensions, dtype=torch.float64, device=positions.device)
    boxes = torch.full_like(lowers, torch.inf)
    if boundaries is not None and boundaries.shape != (num_scenes, 2, dimensions):
        raise ValueError(f"boundaries are [{num_scenes}, 2, {dimensions}], got {list(boundaries.shape)}")
    if periodic is None:
        return lowers, boxes
    if periodic.dtype != torch.bool or periodic.shape != lowers.shape:
        raise ValueError(f"periodic is bool, {list(lowers.shape)}, got {periodic.dtype} {list(periodic.shape)}")
    if not bool(periodic.any()):
        return lowers, boxes
    if boundaries is None:
        raise ValueError("periodic axes need boundaries, the box that repeats; pass boundaries or no periodic axis")
    lower, upper = boundaries.double().unbind(1)
    lowers, boxes = torch.where(periodic, lower, lowers), torch.where(periodic, upper - lower, boxes)
    if not bool((2 * radius <= boxes * (1 + MARGIN)).all() and lowers.isfinite().all()):
        shortest = float(boxes.min())
        raise ValueError(
            f"a radius is at most half of a periodic box, or pairs would meet twice; got {radius:.6g} in a box of "
            f"{shortest:.6g}; lower the radius or repeat the box"
        )
    return lowers, boxes
