"""Rays through a volume: where they run in a box, where along them to look, and what is seen there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simworld.render.camera import Camera


@dataclass(frozen=True, kw_only=True, eq=False)
class RaySamples:
    """Stretches of rays, sorted by ray, then outwards: those of ray r in rows `offsets[r]` to `offsets[r + 1]`.

    `distances` [n] from the ray's origin to where a stretch is looked at and its `lengths` [n], both in the scene's
    unit; `offsets` [r + 1].
    """

    distances: Tensor
    lengths: Tensor
    offsets: Tensor

    @property
    def rays(self) -> Tensor:
        """Return the ray [n] of each stretch."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def points(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return places [n, 3] on rays from `origins` [r, 3] along `directions` [r, 3], and the directions there."""
        rays = self.rays
        along = directions[rays]
        return torch.addcmul(origins[rays], along, self.distances[:, None]), along

    def kept(self, there: Tensor) -> RaySamples:
        """Return the stretches where `there` [n] is true."""
        before = torch.cat([there.new_zeros(1, dtype=torch.long), there.long().cumsum(0)])
        return RaySamples(distances=self.distances[there], lengths=self.lengths[there], offsets=before[self.offsets])


class Seen(NamedTuple):
    """What is seen along rays: `colors` [r, c], `opacities` [r] and `depths` [r], distances from the origin."""

    colors: Tensor
    opacities: Tensor
    depths: Tensor


def composite_rays(densities: Tensor, colors: Tensor, samples: RaySamples, background: Tensor | None = None) -> Seen:
    """Return what rays see of `densities` [n], per unit of length, and `colors` [n, c] along them; differentiable.

    A stretch of density s and length l lets exp(-s l) through (Max 1995; Mildenhall et al. 2020). `background` [c] or
    [r, c] shows through what is left; none is black. The depth is that of what is seen, 0 where nothing is.

    Raises:
        ValueError: there is not a density and a colour for each stretch.
    """
    count = len(samples.distances)
    if densities.shape != (count,) or colors.ndim != 2 or len(colors) != count:
        raise ValueError(
            f"composite_rays takes densities [{count}] and colors [{count}, c], as there are samples; got "
            f"{list(densities.shape)} and {list(colors.shape)}."
        )
    weights, rays = weights_of(densities, samples)[:, None], samples.rays
    rows = torch.cat([colors, torch.ones_like(weights), samples.distances[:, None].to(colors)], 1)
    sums = colors.new_zeros(len(samples.offsets) - 1, rows.shape[1]).index_add(0, rays, weights * rows)
    made, opacities = sums[:, :-2], sums[:, -2]
    if background is not None:
        made = made + (1 - opacities)[:, None] * background
    return Seen(made, opacities, sums[:, -1] / opacities.clamp(min=1e-10))


def weights_of(densities: Tensor, samples: RaySamples) -> Tensor:
    """Return the share [n] of each stretch in what its ray sees: what it stops of the light that gets there."""
    thick = densities * samples.lengths
    return light_before(thick, samples) * -torch.expm1(-thick)


def light_before(thick: Tensor, samples: RaySamples) -> Tensor:
    """Return the light [n] that gets to each stretch through those before it, of optical thickness `thick` [n]."""
    # One sum over all rays, less what it was where a ray begins: in double precision, since it grows long.
    sums = torch.cat([thick.new_zeros(1, dtype=torch.float64), thick.double().cumsum(0)])
    return torch.exp(sums[samples.offsets[:-1]][samples.rays] - sums[:-1]).to(thick.dtype)


def rays_of(camera: Camera, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return origins [r, 3] and unit directions [r, 3] of the rays through pixels' centres, row after row of pixels.

    `rows` [r] are the numbers of the pixels, all by default.
    """
    device = camera.K.device
    rows = torch.arange(camera.width * camera.height, device=device) if rows is None else rows.to(device)
    down, across = torch.div(rows, camera.width, rounding_mode="floor"), rows % camera.width
    pixels = torch.stack([across + 0.5, down + 0.5, torch.ones_like(rows)], 1).to(camera.K.dtype)
    ahead = pixels @ torch.linalg.inv(camera.K).T @ camera.viewmat[:3, :3]
    return camera.position.expand(len(rows), 3), torch.nn.functional.normalize(ahead, dim=1)


def clip(origins: Tensor, directions: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return where rays [r] enter and leave the box `bounds` [2, 3]; they leave where they enter if they miss it."""
    # A direction of 0 along an axis makes infinities of the right sign; within the box on its face, NaN: no bound.
    one, other = ((bounds - origins[:, None]) / directions[:, None]).unbind(1)
    near = torch.minimum(one, other).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1).clamp(min=0)
    far = torch.maximum(one, other).nan_to_num(torch.inf, torch.inf, -torch.inf).amin(1)
    return near, torch.maximum(near, far)


def stratified(near: Tensor, far: Tensor, count: int, generator: torch.Generator | None = None) -> RaySamples:
    """Return `count` stretches of one length on each ray that is in the box at all, from `near` to `far` [r].

    They are looked at in the middle, or with a generator anywhere within.
    """
    hit = far > near
    place = _placed((int(hit.sum()), count), near, generator) + torch.arange(count, device=near.device)
    length = ((far - near) / count)[hit, None]
    return RaySamples(
        distances=(near[hit, None] + place * length).flatten(),
        lengths=length.expand(-1, count).flatten(),
        offsets=_offsets(hit.long() * count),
    )


def refined(
    samples: RaySamples, weights: Tensor, near: Tensor, far: Tensor, count: int, generator: torch.Generator | None
) -> RaySamples:
    """Return samples of `stratified` with `count` more on each ray, where the `weights` [n] of those are.

    The new places are drawn by the inverse of the weights' cumulative sum, constant within a stretch; without a
    generator at even quantiles. A stretch then reaches half-way to its neighbours.
    """
    hit = far > near
    rays, begin, end = int(hit.sum()), near[hit, None], far[hit, None]
    if not rays:
        return samples
    old = samples.distances.view(rays, -1)
    shares = weights.detach().view(rays, -1) + 1e-5  # nowhere quite unseen
    sums = torch.nn.functional.pad(shares.cumsum(1) / shares.sum(1, keepdim=True), (1, 0))
    asked = _placed((rays, count), near, generator) + torch.arange(count, device=near.device)
    asked = asked / count
    cell = (torch.searchsorted(sums, asked, right=True) - 1).clamp(0, old.shape[1] - 1)
    low, high = sums.gather(1, cell), sums.gather(1, cell + 1)
    part = ((asked - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    new = begin + (cell + part) * (end - begin) / old.shape[1]
    places = torch.cat([old, new], 1).sort(1).values
    edges = torch.cat([begin, (places[:, 1:] + places[:, :-1]) / 2, end], 1)
    counts = hit.long() * places.shape[1]
    return RaySamples(distances=places.flatten(), lengths=edges.diff(dim=1).flatten(), offsets=_offsets(counts))


def _placed(shape: tuple[int, int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return numbers in 0 to 1: drawn, or all 0.5."""
    if generator is None:
        return like.new_full(shape, 0.5)
    return torch.rand(shape, generator=generator, dtype=torch.float32).to(like)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
