"""Splats while they are fitted: their parameters, and how they come and go."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from simworld.kernels.nearest import nearest
from simworld.kinds import SplatState
from simworld.models.checkpoint import read_tensors, write_tensors
from simworld.quaternions import rotations
from simworld.render.harmonics import FLAT

RATES: Mapping[str, float] = MappingProxyType(
    {"means": 1.6e-4, "quats": 1e-3, "scales": 5e-3, "opacities": 5e-2, "flat": 2.5e-3, "rest": 2.5e-3 / 20}
)
"""Rates of learning (Kerbl et al. 2023); that of the means is times the extent of the scene."""
SCHEMA, VERSION = "simworld.splat_fit", 1
FAINT = 0.005  # opacity of a splat that does nothing
PULL = 2e-4  # mean gradient of the place on the picture, in half pictures, from which a splat is too few
SMALL, LARGE = 0.01, 0.1  # of the extent: splats up to the one are cloned, larger ones split; above the other dropped
SHRUNK = 1.6
MOST_SHARES = 51  # splats that one is shared among: sums of binomials of more overflow
WANDER = 5e5


class Adapted:
    """Splats as they are adapted, by Adam: means, quats, logarithms of scales, logits of opacities, harmonics.

    `extent` is the scene's half width, `step` and `seconds` how far the fit has come, `named` what fit it is.
    """

    def __init__(self, values: Mapping[str, Tensor], extent: float, named: Mapping[str, Any]) -> None:
        self.extent, self.named = extent, json.dumps(named, sort_keys=True)
        self.step, self.seconds = 0, 0.0
        groups = [
            {"params": [torch.nn.Parameter(value)], "name": name, "lr": RATES[name]} for name, value in values.items()
        ]
        self.adam = torch.optim.Adam(groups, eps=1e-15, fused=True)
        self.forget_pulls()

    @staticmethod
    def start(points: Tensor, colors: Tensor, degree: int, named: Mapping[str, Any]) -> Adapted:
        """Return round splats at points [n, 3], as wide as their neighbours are away, half opaque."""
        extent = float((points - points.mean(0)).norm(dim=1).quantile(0.95)) if len(points) > 1 else 1.0
        values = {
            "means": points,
            "quats": torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(points), 1),
            "scales": _spacing(points).log()[:, None].repeat(1, 3),
            "opacities": torch.full((len(points),), -1.0),
            "flat": ((colors - 0.5) / FLAT)[:, None],
            "rest": torch.zeros(len(points), (degree + 1) ** 2 - 1, 3),
        }
        return Adapted({k: v.float().contiguous() for k, v in values.items()}, extent or 1.0, named)

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = next(group["params"][0] for group in self.adam.param_groups if group["name"] == name)
        return found

    @property
    def degree(self) -> int:
        """The degree of the harmonics."""
        return math.isqrt(self["rest"].shape[1] + 1) - 1

    def scales(self) -> Tensor:
        """Return the scales [n, 3]."""
        return self["scales"].exp()

    def opacities(self) -> Tensor:
        """Return the opacities [n]."""
        return self["opacities"].sigmoid()

    def harmonics(self, degree: int) -> Tensor:
        """Return the coefficients [n, k, 3] up to a degree."""
        return torch.cat([self["flat"], self["rest"][:, : (degree + 1) ** 2 - 1]], 1)

    @torch.no_grad()
    def state(self) -> SplatState:
        """Return the splats as a state."""
        return SplatState(
            means=self["means"].detach().clone(),
            quats=torch.nn.functional.normalize(self["quats"].detach(), dim=1),
            scales=self.scales(),
            opacities=self.opacities(),
            harmonics=self.harmonics(self.degree),
        )

    def descend(self, rate: float) -> None:
        """Take a step of Adam by the gradients that are there, the means' at a `rate`."""
        for group in self.adam.param_groups:
            if group["name"] == "means":
                group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def rearrange(self, kept: Tensor, added: Mapping[str, Tensor]) -> None:
        """Keep the splats of rows `kept`, and append others, of which Adam knows nothing yet."""
        for group in self.adam.param_groups:
            old, name = group["params"][0], group["name"]
            made = torch.nn.Parameter(torch.cat([old.detach()[kept], added[name]]) if added else old.detach()[kept])
            past = self.adam.state.pop(old, None)
            if past:
                more = len(made) - len(kept)
                for key in ("exp_avg", "exp_avg_sq"):
                    past[key] = torch.cat([past[key][kept], past[key].new_zeros(more, *past[key].shape[1:])])
                self.adam.state[made] = past
            group["params"] = [made]
        self.forget_pulls()

    def forget(self, rows: Tensor) -> None:
        """Let Adam begin anew with some splats."""
        for past in self.adam.state.values():
            past["exp_avg"][rows] = 0
            past["exp_avg_sq"][rows] = 0

    def pulled(self, rows: Tensor, gradients: Tensor, size: tuple[int, int]) -> None:
        """Add up how strongly a picture of a size (width, height) pulls at the places of splats."""
        half = gradients.new_tensor(size) / 2
        self.pulls.index_add_(0, rows, (gradients * half).norm(dim=1))
        self.seen.index_add_(0, rows, torch.ones_like(rows, dtype=self.seen.dtype))

    def forget_pulls(self) -> None:
        """Begin to add up anew."""
        self.pulls = torch.zeros(len(self["means"]))
        self.seen = torch.zeros(len(self["means"]))

    def save(self, path: Path) -> None:
        """Write all that changes to a file."""
        tensors = {"pulls": self.pulls, "seen": self.seen}
        for group in self.adam.param_groups:
            tensors[group["name"]] = group["params"][0].detach()
            for key, value in self.adam.state.get(group["params"][0], {}).items():
                tensors[f"{group['name']}.{key}"] = value
        head = {"schema": SCHEMA, "schema_version": str(VERSION), "run": self.named}
        head |= {"step": str(self.step), "seconds": str(self.seconds)}
        write_tensors({k: v.contiguous() for k, v in tensors.items()}, head, path)

    def resume(self, path: Path) -> None:
        """Put back what `save` wrote.

        Raises:
            ValueError: the file is of another fit.
        """
        head, tensors = read_tensors(path, SCHEMA, VERSION)
        if head["run"] != self.named:
            raise ValueError(f"{path} belongs to a fit with other settings; remove it, or give another file.")
        for group in self.adam.param_groups:
            name = group["name"]
            group["params"] = [torch.nn.Parameter(tensors[name])]
            past = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if past:
                self.adam.state[group["params"][0]] = past
        self.pulls, self.seen = tensors["pulls"], tensors["seen"]
        self.step, self.seconds = int(head["step"]), float(head["seconds"])


@torch.no_grad()
def densify(run: Adapted, most: int, generator: torch.Generator) -> None:
    """Clone and split splats at which pictures pull, up to `most` of them; drop transparent and giant ones.

    Kerbl et al. 2023, section 5.
    """
    strength = run.pulls / run.seen.clamp(min=1)
    widths, room = run.scales().amax(1), most - len(strength)
    chosen = (strength > PULL).nonzero()[:, 0]
    chosen = chosen[strength[chosen].argsort(descending=True)[: max(0, room)]]
    large = widths[chosen] > SMALL * run.extent
    split, cloned = chosen[large], chosen[~large]
    values = {group["name"]: group["params"][0].detach() for group in run.adam.param_groups}
    parts = [{name: value[cloned] for name, value in values.items()}]
    for _ in range(2):
        part = {name: value[split] for name, value in values.items()}
        part["means"] = part["means"] + _within(part, generator)
        part["scales"] = part["scales"] - math.log(SHRUNK)
        parts.append(part)
    drop = (run.opacities() < FAINT) | (widths > LARGE * run.extent)
    drop[split] = True
    run.rearrange((~drop).nonzero()[:, 0], {name: torch.cat([part[name] for part in parts]) for name in values})


@torch.no_grad()
def relocate(run: Adapted, most: int, generator: torch.Generator) -> None:
    """Move transparent splats onto others, and add a twentieth, up to `most`, so that the picture stays as it is.

    Kheradmand et al. 2024, "3D Gaussian splatting as Markov chain Monte Carlo", section 3.3.
    """
    opacities = run.opacities()
    dead, live = (opacities <= FAINT).nonzero()[:, 0], (opacities > FAINT).nonzero()[:, 0]
    if not len(live):
        return
    more = max(0, min(most - len(opacities), max(1, len(opacities) // 20)))
    chosen = live[torch.multinomial(opacities[live], len(dead) + more, replacement=True, generator=generator)]
    if not len(chosen):
        return
    several = (torch.bincount(chosen, minlength=len(opacities)) + 1).clamp(max=MOST_SHARES)
    rows = (several > 1).nonzero()[:, 0]
    faint, narrow = _shared(opacities[rows], several[rows])
    run["opacities"][rows] = torch.logit(faint.clamp(FAINT, 1 - 1e-6))
    run["scales"][rows] += narrow.log()[:, None]
    run.forget(rows)
    values = {group["name"]: group["params"][0].detach() for group in run.adam.param_groups}
    for value in values.values():
        value[dead] = value[chosen[: len(dead)]]
    run.forget(dead)
    added = {name: value[chosen[len(dead) :]] for name, value in values.items()}
    run.rearrange(torch.arange(len(opacities)), added)


@torch.no_grad()
def wander(run: Adapted, rate: float, generator: torch.Generator) -> None:
    """Let splats wander within themselves, the transparent ones most."""
    opacities = run.opacities()
    by = WANDER * rate * torch.sigmoid(100 * (1 - opacities - 0.995))
    rows = (by > 1e-3 * WANDER * rate).nonzero()[:, 0]
    part = {name: run[name].detach()[rows] for name in ("means", "quats", "scales")}
    turns, scales = rotations(part["quats"]), part["scales"].exp()
    step = torch.randn(part["means"].shape, generator=generator) * by[rows, None]
    inside = (turns.transpose(1, 2) @ step[..., None])[..., 0] * scales.square()
    run["means"][rows] += (turns @ inside[..., None])[..., 0]


def _within(part: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Return offsets [n, 3] drawn from the splats themselves."""
    local = torch.randn(part["means"].shape, generator=generator) * part["scales"].exp()
    return (rotations(part["quats"]) @ local[..., None])[..., 0]


def _shared(opacities: Tensor, several: Tensor) -> tuple[Tensor, Tensor]:
    """Return the opacity [n] and the narrowing [n] of splats each of which stands in for one as `several`, equal ones.

    Together they let as much light through at the centre, and the integral over a line through it stays.
    """
    faint = 1 - (1 - opacities) ** (1 / several)
    most = int(several.max())
    total = torch.zeros_like(opacities)
    for i in range(1, most + 1):
        here = several >= i
        for k in range(i):
            term = math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1)
            total = total + here * term * faint ** (k + 1)
    return faint, (opacities / total.clamp(min=1e-12)).clamp(max=1.0)


def _spacing(points: Tensor) -> Tensor:
    """Return the root mean squared distance [n] of points from their three nearest neighbours."""
    if len(points) < 4:
        return torch.full((len(points),), 0.1)
    distances, _ = nearest(points, points, 4)
    return distances[:, 1:].square().mean(1).sqrt().clamp(min=1e-7)
