"""Plots and films of trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.extras import needed
from simworld.kinds import GOOP, KINEMATIC, RIGID, SAND, WATER, MeshState, ObjectState, ParticleState
from simworld.metrics import Row
from simworld.quaternions import rotations
from simworld.render.shade import Shade
from simworld.state import State
from simworld.trajectory import Trajectory
from simworld.view_meshes import are_meshes, draw_mesh, node_places

BALL, FIXED, CYLINDER, SPRING = "#2a6fbb", "#222222", "#c9ccd1", "#9aa4b0"
TYPES: Mapping[int, str] = {RIGID: "#8a5a44", KINEMATIC: "#555a61", WATER: BALL, SAND: "#c9a227", GOOP: "#5b9a55"}
"""Colours of particles by type: rigid, kinematic, water, sand, goop."""
LINES = ((FIXED, "-"), (BALL, "--"), ("#c9a227", ":"), ("#b0413e", "-."), ("#5b9a55", "-"), (SPRING, "-"))
"""Colours and strokes of the lines of a plot, in order."""
LEVELS = ((FIXED, "--"), ("#c9a227", ":"), ("#b0413e", "-."), ("#5b9a55", "--"), (SPRING, ":"), (FIXED, ":"),
          ("#7a5195", "-."), ("#ef7c31", "--"), ("#2f9fa8", "-."), ("#d45087", ":"))  # fmt: skip
"""Colours and strokes of levels that lines are compared with."""
OBLIQUE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.35, -0.25]])
"""How places in space are drawn on paper: the second axis up, the third towards who looks."""


def plot_errors(errors: Mapping[str, Tensor], *, dt: float, unit: str, path: str | Path) -> Path:
    """Write a plot of errors [T] over time, one line per name, on a logarithmic axis, and return its path."""
    figure, axes = _figure(7.2, 4.4)
    for name, values in errors.items():
        times = torch.arange(len(values)) * dt
        axes.plot(times[1:], values[1:].clamp(min=1e-12), label=name, linewidth=1.6)
    axes.set(xlabel="time [s]", ylabel=f"position error [{unit}]", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return Path(path)


def plot_series(rows: Sequence[Mapping[str, Mapping[str, Tensor]]], *, dt: float, path: str | Path) -> Path:
    """Write plots of quantities over time, and return the path: a row for each episode, a column for each quantity.

    `rows` name quantities, with their units, and in each lines [T] by name: a simulator's over the recorded one.
    """
    columns = len(rows[0])
    figure, all_axes = _figure(4.4 * columns, 2.1 * len(rows) + 0.4, (len(rows), columns))
    for axes, (quantity, lines) in zip(all_axes, (item for row in rows for item in row.items()), strict=True):
        for (name, values), colour, style in zip(
            lines.items(), (FIXED, BALL, "#c9a227"), ("-", "--", ":"), strict=False
        ):
            axes.plot(torch.arange(len(values)) * dt, values.cpu(), style, color=colour, label=name, linewidth=1.4)
        axes.set(xlabel="time [s]", ylabel=quantity)
        axes.grid(alpha=0.3)
    all_axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return Path(path)


def plot_gains(gains: Mapping[str, Mapping[str, Tensor]], *, dt: float, path: str | Path) -> Path:
    """Write plots of counterfactual gains [T] over time, and return the path: one for each kind of intervention.

    `gains` maps kinds to lines by name; 1 is the truth, 0 a copy of what was, and what is below -1 is left out.
    """
    figure, all_axes = _figure(3.6 * len(gains), 3.2, (1, len(gains)))
    for axes, (kind, lines) in zip(all_axes, gains.items(), strict=True):
        for (name, values), (colour, style) in zip(lines.items(), LINES, strict=False):
            axes.plot(torch.arange(len(values)) * dt, values, style, color=colour, label=name, linewidth=1.5)
        axes.set(xlabel="time after the intervention [s]", title=kind, ylim=(-1, 1.05))
        axes.grid(alpha=0.3)
    all_axes[0].set(ylabel="median gain")
    all_axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return Path(path)


def plot_doses(
    doses: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, unit: str, path: str | Path
) -> Path:
    """Write plots of mean sizes of effects over doses, and return the path: one for each kind of intervention.

    `doses` maps kinds to names to doses and sizes, in `unit`.
    """
    figure, all_axes = _figure(3.6 * len(doses), 3.2, (1, len(doses)))
    for axes, (kind, lines) in zip(all_axes, doses.items(), strict=True):
        for (name, (x, y)), (colour, style) in zip(lines.items(), LINES, strict=False):
            axes.plot(x, y, style, color=colour, marker="o", markersize=4, label=name, linewidth=1.5)
        axes.set(xlabel="dose", title=kind, ylim=(0, None))
        axes.grid(alpha=0.3)
    all_axes[0].set(ylabel=f"size of the effect [{unit}]")
    all_axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return Path(path)


def plot_masked(rows: Sequence[Row], metric: str, *, path: str | Path) -> Path:
    """Write plots of a metric over |M| with its intervals, and return the path: one for each world and horizon.

    `rows` are those of the benchmark of slots; models that have no |M| are levels.
    """
    rows = [row for row in rows if row.metric == metric]
    panels = list(dict.fromkeys((row.dataset, row.horizon) for row in rows))
    if not panels:
        raise ValueError(f"There are no rows of {metric} to plot.")
    levels = list(dict.fromkeys(row.model for row in rows if "|M| = " not in row.model))
    # What follows the number tells sweeps apart: "causal_jepa, |M| = 2, four times the steps".
    sweeps = list(dict.fromkeys(row.model.partition("|M| = ")[2][1:] for row in rows if "|M| = " in row.model))
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    figure, all_axes = _figure(3.4 * across + 2, 3.4 * down, (down, across))
    for axes in all_axes[len(panels) :]:
        axes.remove()
    all_axes = all_axes[: len(panels)]
    for axes, panel in zip(all_axes, panels, strict=True):
        here = [row for row in rows if (row.dataset, row.horizon) == panel]
        for number, sweep in enumerate(sweeps):
            swept = [row for row in here if row.model not in levels]
            swept = [row for row in swept if row.model.partition("|M| = ")[2][1:] == sweep]
            _plot_sweep(axes, swept, sweep, number)
        for row in here:
            if row.model in levels:
                colour, style = LEVELS[levels.index(row.model) % len(LEVELS)]
                axes.axhline(row.value, linestyle=style, color=colour, label=row.model, linewidth=1.2)
        axes.set(xlabel="|M|, most objects masked in training", title=f"{panel[0]}, {panel[1]} frames")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if metric.endswith("auroc"):  # a score that means the same in every world
        for axes in all_axes:
            axes.set_ylim(min(one.get_ylim()[0] for one in all_axes), 1.02)
    known: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    last = all_axes[across - 1]
    last.legend(known.values(), known, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    all_axes[0].set(ylabel=metric.replace("_", " "))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return Path(path)


def _plot_sweep(axes: Any, rows: Sequence[Row], name: str, number: int) -> None:
    """Draw the values of one sweep over |M| with their intervals."""
    if not rows:
        return
    places = [int(row.model.partition("|M| = ")[2][0]) for row in rows]
    values = torch.tensor(
        [[row.value, *(row.value if end is None else end for end in (row.low, row.high))] for row in rows]
    )
    middle, low, high = values.unbind(1)
    ends = torch.stack([middle - low, high - middle]).clamp(min=0)
    label = f"Causal-JEPA{name}"
    axes.errorbar(places, middle, yerr=ends, color=f"C{number}", marker="o", capsize=3, label=label)


def plot_over_horizons(rows: Sequence[Row], metric: str, *, path: str | Path) -> Path:
    """Write plots of an error over horizons, one for each world and a line for each model, and return the path."""
    rows = [row for row in rows if row.metric == metric]
    worlds, names = list(dict.fromkeys(row.dataset for row in rows)), list(dict.fromkeys(row.model for row in rows))
    if not worlds:
        raise ValueError(f"There are no rows of {metric} to plot.")
    figure, all_axes = _figure(4 * len(worlds) + 2, 3.6, (1, len(worlds)))
    for axes, world in zip(all_axes, worlds, strict=True):
        here = [row for row in rows if row.dataset == world]
        for number, name in enumerate(names):
            line = [row for row in here if row.model == name]
            places, errors = [row.horizon for row in line], [max(row.value, 1e-6) for row in line]
            style = "-" if number < 10 else "--"
            axes.plot(places, errors, style, color=f"C{number % 10}", marker="o", label=name)
        axes.set(xlabel="frames ahead", title=world, yscale="log")
        axes.grid(alpha=0.3)
    all_axes[0].set(ylabel=f"{metric.replace('_', ' ')} [frame widths]")
    all_axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return Path(path)


def film(panels: Mapping[str, Trajectory], *, path: str | Path, every: int = 1) -> Path:
    """Write a GIF of trajectories side by side under their names, and return its path.

    Bodies are drawn in their colours and outlines, or as discs of their radii, inactive ones dashed; particles as dots
    in the colour of their type; meshes in the colours of a field, on the scale of the first trajectory. Scenes in space
    are drawn obliquely, the second axis up, of meshes the third. It plays at the speed of the recording, kept to 25
    frames per second or fewer.

    Raises:
        ValueError: bodies are not planar, or the trajectories differ in length.
    """
    image = needed("PIL.Image", "A film", "view", "pillow")
    meshes = are_meshes(list(panels.values()))
    lengths = {len(t) for t in panels.values()}
    spatial = any(isinstance(t.initial, ObjectState) and t.initial.positions.shape[1] != 2 for t in panels.values())
    if len(lengths) != 1 or spatial:
        raise ValueError(f"A film needs planar bodies, or particles, of one length; got lengths {sorted(lengths)}.")
    dt = next(iter(panels.values())).dt
    every = max(every, math.ceil(0.04 / dt - 1e-9))
    limits = _limits(list(panels.values()))
    shade = Shade.of(next(iter(panels.values()))) if meshes else None
    figure, all_axes = _panels(len(panels), limits, shade)
    frames = []
    for t in range(0, lengths.pop(), every):
        for axes, (name, trajectory) in zip(all_axes, panels.items(), strict=True):
            _draw(axes, trajectory.frame(t), limits, shade)
            axes.set_title(f"{name}, {t * dt:.2f} s", fontsize=10)
        figure.canvas.draw()
        frames.append(_image(figure))
    if shade:
        shades = [frame.quantize(palette=shade.palette(), dither=image.Dither.NONE) for frame in frames]
    else:
        shades = [frame.convert("P", palette=image.Palette.ADAPTIVE, colors=64) for frame in frames]
    duration = round(1000 * dt * every)
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=duration, loop=0, optimize=False)
    return Path(path)


def _panels(count: int, limits: tuple[float, float, float, float], shade: Shade | None) -> tuple[Any, Any]:
    """Return a figure of panels beside each other, or below if they are wide, with a colour bar for a shade."""
    wide = (limits[3] - limits[2]) / (limits[1] - limits[0])
    across, rows, columns = (8.0, count, 1) if wide < 0.6 else (4.0, 1, count)
    room = 0.9 if shade else 0.0
    width, height = across * columns, (across * wide + 0.3) * rows
    figure, axes = _figure(width, height + room, (rows, columns))
    top, bottom = 1 - 0.28 / (height + room), (room + 0.01 * height) / (height + room)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=bottom, top=top, wspace=0.02, hspace=0.3 / (across * wide))
    if shade:
        bar = figure.add_axes((0.3, 0.55 / (height + room), 0.4, 0.16 / (height + room)))
        figure.colorbar(shade.scale(), cax=bar, orientation="horizontal", label=shade.label)
    return figure, axes


def _figure(width: float, height: float, grid: tuple[int, int] | None = None) -> tuple[Any, Any]:
    """Return a figure and its axes (a list, where a `grid` of rows and columns is given), leaving pyplot's state."""
    needed("matplotlib", "A plot or film", "view")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    if grid is None:
        return figure, figure.add_subplot()
    return figure, [figure.add_subplot(*grid, k + 1) for k in range(grid[0] * grid[1])]


def _image(figure: Any) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def _limits(trajectories: Sequence[Trajectory]) -> tuple[float, float, float, float]:
    """Return a window that holds every body at every frame, or the box if there is one, whoever leaves it.

    A square, but for meshes, whose first trajectory alone counts.
    """
    ends = [_ends(t) for t in trajectories]
    if are_meshes(trajectories):
        (low, high), spare = ends[0], 0.03 * float((ends[0][1] - ends[0][0]).max())
        (x, y), (right, top) = (low - spare).tolist(), (high + spare).tolist()
        return x, right, y, top
    low, high = torch.stack([low for low, _ in ends]).amin(0), torch.stack([high for _, high in ends]).amax(0)
    half = float((high - low).max()) / 2 * 1.03
    x, y = ((high + low) / 2).tolist()
    return x - half, x + half, y - half, y + half


def _ends(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    state = trajectory.initial
    if isinstance(state, MeshState):
        shown = torch.cat([_on_paper(node_places(trajectory.frame(t))) for t in range(len(trajectory))])
        return shown.amin(0), shown.amax(0)
    places, reach = trajectory["positions"].double().cpu().flatten(0, 1), _reach(trajectory)
    if "boundaries" in state:
        corners = torch.cartesian_prod(*state.boundaries[0].double().cpu().T)
        places = torch.cat([corners, places[: len(state)]])
    shown = _on_paper(places)
    return shown.amin(0) - reach, shown.amax(0) + reach


def _on_paper(positions: Tensor) -> Tensor:
    return positions if positions.shape[1] == 2 else positions @ OBLIQUE.to(positions)


def _reach(trajectory: Trajectory) -> float:
    return float(trajectory.initial["radii"].max()) if "radii" in trajectory.initial else 0.0


def _draw(axes: Any, state: State, limits: tuple[float, float, float, float], shade: Shade | None) -> None:
    from matplotlib.collections import LineCollection, PatchCollection

    axes.clear()
    axes.set(xlim=limits[:2], ylim=limits[2:], aspect="equal", xticks=[], yticks=[])
    if isinstance(state, ParticleState):
        _dots(axes, state)
        return
    if shade:
        draw_mesh(axes, state, _on_paper(node_places(state)), shade)
        return
    positions, active = state.positions.detach().cpu(), state.active.cpu()
    fixed = state.fixed.cpu() if "fixed" in state else torch.zeros_like(active)
    radii = state.radii.cpu() if "radii" in state else torch.full(active.shape, (limits[1] - limits[0]) / 80)
    held = torch.zeros_like(active)
    if "springs" in state:
        joined = state.springs.cpu()
        held[joined.flatten()] = True
        joined = joined[active[joined].all(1)]
        axes.add_collection(LineCollection(list(positions[joined].numpy()), colors=SPRING, linewidths=0.7))

    def bodies(rows: Tensor, facecolor: Any, **style: Any) -> None:
        for i in rows.nonzero()[:, 0].tolist():
            colour = state.colors[i].tolist() if facecolor == BALL and "colors" in state else facecolor
            axes.add_collection(PatchCollection(_patches(state, i, float(radii[i])), facecolor=colour, **style))

    bodies(~active, "none", edgecolor=SPRING, linewidth=0.8, linestyle="--")
    for rows, colour in ((fixed & ~held, CYLINDER), (fixed & held, FIXED), (~fixed, BALL)):
        bodies(rows & active, colour, edgecolor="white", linewidth=0.4)


def _patches(state: State, row: int, radius: float) -> list[Any]:
    """Return the shape of a body in the plane: the boxes that it is made of, turned as it is, or a disc."""
    from matplotlib.patches import Circle, Polygon

    boxes = state.outlines[row].cpu() if "outlines" in state else torch.zeros(0, 4)
    boxes, place = boxes[(boxes[:, 2:] > 0).all(1)], state.positions[row].detach().cpu()
    if not len(boxes):
        return [Circle(tuple(place.tolist()), radius)]
    turn = torch.eye(2).to(place)
    if "quats" in state:
        turn = rotations(state.quats[row].detach().cpu().to(place))[:2, :2].T
    corners = place.new_tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    return [Polygon((place + (box[:2] + box[2:] * corners) @ turn).numpy()) for box in boxes.to(place)]


def _dots(axes: Any, state: ParticleState) -> None:
    """Draw the particles that are there, those in front last."""
    positions = state.positions.detach().cpu()
    there = state.active.cpu()
    if positions.shape[1] == 3:
        order = positions[:, 2].argsort()
        there = order[there[order]]
    places = _on_paper(positions)[there]
    types = state.particle_types.cpu() if "particle_types" in state else torch.full((len(state),), WATER)
    colours = [TYPES.get(kind, BALL) for kind in types[there].tolist()]
    size = min(40.0, 9000.0 / max(1, len(places)))
    axes.scatter(*places.T.numpy(), s=size, c=colours, edgecolors="white", linewidths=0.15)
    if "boundaries" in state and positions.shape[1] == 2:
        (left, bottom), (right, top) = state.boundaries[0].tolist()
        axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=FIXED, linewidth=0.8)
