"""A field's values as colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.extras import needed
from simworld.trajectory import Trajectory

COLOURED = ("stresses", "temperatures", "velocities", "pressures")
"""Fields that give meshes their colour, the first that is there; of vectors and tensors their length."""
COLOURS = "viridis"


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A field's values as colours: its name and unit, and the ends of the scale."""

    field: str
    unit: str
    low: float
    high: float

    @staticmethod
    def of(trajectory: Trajectory, field: str | None = None) -> Shade:
        """Return a scale from the least to the greatest value of a field in a trajectory.

        Raises:
            ValueError: the states lack the field, or all that are shown by default.
        """
        state = trajectory.initial
        found = [name for name in (COLOURED if field is None else (field,)) if name in state]
        if not found:
            wanted = f"one of {', '.join(COLOURED)}" if field is None else field
            raise ValueError(f"A picture in colours shows {wanted}; the states have {', '.join(state)}.")
        if state.fields[found[0]].per != "entity":
            raise ValueError(f"A picture in colours shows a field of each entity; {found[0]} is of another kind.")
        values = lengths(trajectory[found[0]].flatten(0, 1) if found[0] in trajectory.frames else state[found[0]])
        values = values[values.isfinite()]
        if not len(values):
            raise ValueError(f"A picture in colours needs finite numbers; {found[0]} has none.")
        return Shade(
            field=found[0], unit=state.fields[found[0]].unit, low=float(values.min()), high=float(values.max())
        )

    @property
    def label(self) -> str:
        """The name and unit of what is shown."""
        return f"{self.field} [{self.unit}]"

    def scale(self) -> Any:
        """Return matplotlib's mapping of values to colours."""
        needed("matplotlib", "A colour scale", "view")
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        return ScalarMappable(Normalize(self.low, self.high), COLOURS)

    def colors(self, values: Tensor) -> Tensor:
        """Return the colours [n, 3], in 0 to 1, of a field's values [n, ...]."""
        return torch.as_tensor(self.scale().to_rgba(lengths(values).numpy())[:, :3])

    def palette(self) -> Any:
        """Return an image whose palette is the scale's colours, and greys."""
        from PIL import Image

        greys = torch.arange(32).mul(255).div(31, rounding_mode="floor")[:, None].expand(32, 3)
        span = torch.linspace(self.low, self.high, 224, dtype=torch.float64)
        colours = torch.as_tensor(self.scale().to_rgba(span.numpy(), bytes=True)[:, :3].astype("int64"))
        image = Image.new("P", (1, 1))
        image.putpalette(torch.cat([greys, colours]).flatten().tolist())
        return image


def lengths(values: Tensor) -> Tensor:
    """Return values [n, ...] of a field as one number each: a scalar itself, of others the root of summed squares."""
    rows = values.detach().double().cpu().reshape(len(values), -1)
    return rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)
