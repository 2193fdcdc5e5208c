"""What Visual Interaction Networks see with: codes of objects from films, or from true states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FilmEyes(nn.Module):
    """Codes from three frames that follow each other, by convolutions over both pairs of them.

    Each object has a map of weights over pixels for either frame of a pair. The mean places of both maps, how far it
    is from one to the other, and the mean features of the second are what a pair tells of an object; the codes are
    a network, the same for all objects, of what the two pairs of a triplet tell. Pictures show the unit square, their
    first row the upper edge.
    """

    grid: Tensor
    places: Tensor

    def __init__(
        self,
        *,
        num_objects: int,
        slot_size: int,
        latent_size: int,
        image_size: int,
        num_channels: int,
        scales: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.scales = dict(scales)
        self.convolutions = nn.Sequential(
            nn.Conv2d(8, num_channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
            nn.ReLU(),
        )
        self.maps = nn.Conv2d(num_channels, 2 * num_objects, 1)
        told = 2 * (6 + num_channels)
        self.direct = nn.Linear(told, slot_size)
        self.bent = nn.Sequential(nn.Linear(told, latent_size), nn.ReLU(), nn.Linear(latent_size, slot_size))
        self.register_buffer("grid", _grid(image_size)[None], persistent=False)
        self.register_buffer("places", _grid((image_size + 1) // 2).flatten(1).T.contiguous(), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the codes [b, T - 2, n, s] of frames 2 and on of films [b, T, 3, h, w]."""
        scenes, length = pictures.shape[:2]
        pairs = torch.cat([pictures[:, :-1], pictures[:, 1:]], 2).flatten(0, 1)
        pairs = torch.cat([pairs, self.grid.expand(len(pairs), -1, -1, -1)], 1)
        told = self._told(pairs)
        told = told.view(scenes, length - 1, *told.shape[1:])
        triplets = torch.cat([told[:, :-1], told[:, 1:]], -1)
        codes: Tensor = self.direct(triplets) + self.bent(triplets)
        return codes

    def _told(self, pairs: Tensor) -> Tensor:
        """Return what each pair of frames [p, 8, h, w] tells of each object, [p, n, k]."""
        features = self.convolutions(pairs)
        weights = self.maps(features).flatten(2).softmax(2)
        before, after = (weights @ self.places).chunk(2, 1)
        seen = weights[:, before.shape[1] :] @ features.flatten(2).transpose(1, 2)
        moved = (after - before) / self.scales["step"]
        centred = [(place - self.scales["centre"]) / self.scales["spread"] for place in (before, after)]
        return torch.cat([*centred, moved, seen], 2)


class StateEyes(nn.Module):
    """Codes from the true positions, velocities and radii of single frames."""

    def __init__(self, *, slot_size: int, latent_size: int, statistics: Mapping[str, float]) -> None:
        super().__init__()
        self.statistics = dict(statistics)
        self.direct = nn.Linear(5, slot_size)
        self.bent = nn.Sequential(nn.Linear(5, latent_size), nn.ReLU(), nn.Linear(latent_size, slot_size))

    def forward(self, positions: Tensor, velocities: Tensor, radii: Tensor) -> Tensor:
        """Return the codes [b, T, n, s] of positions and velocities [b, T, n, 2] and radii [b, n, 1]."""
        places = (positions - self.statistics["centre"]) / self.statistics["spread"]
        sizes = (radii / self.statistics["spread"])[:, None].expand(-1, places.shape[1], -1, -1)
        known = torch.cat([places, velocities / self.statistics["velocity"], sizes], -1)
        codes: Tensor = self.direct(known) + self.bent(known)
        return codes


def _grid(size: int) -> Tensor:
    """Return the coordinates [2, size, size] of pixels in the unit square, the first row at its upper edge."""
    middles = (torch.arange(size) + 0.5) / size
    x, y = torch.meshgrid(middles, 1 - middles, indexing="xy")
    return torch.stack([x, y])
