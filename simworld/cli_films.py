"""The command for predictions from films; it calls the public API, prints and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simworld.screen import counting, prepare, print_rows, screen, write_json, wrote

SHOWN_FRAMES = (0, 4, 8, 12, 16, 20, 30, 40, 50)
DRAWN = ("truth", "VIN", "VIN without relations", "LSTM", "MLP", "state-IN")


def predict_films(
    data: Path | None,
    worlds: Sequence[str] | None,
    checkpoints: Sequence[str] | None,
    count: int | None,
    plots: Path | None,
    json_to: str | None,
) -> None:
    """Print and write the errors of `simworld bench vin`, and plot them and films of predictions for each world."""
    from simworld import bench
    from simworld.bench.vin import orderings, refuse, reports
    from simworld.view import plot_errors
    from simworld.view_films import plot_strips

    refuse(data)
    prepare(plots, json_to)
    with counting("vin: worlds", None) as tell:
        found = reports(worlds, checkpoints=checkpoints, count=count, with_films=plots is not None, progress=tell)
    rows = [row for one in found for row in one.rows]
    for one in found:
        print_rows(one.dataset, [row for row in one.rows if row.metric == "position_distance"])
        screen.print(
            "Here brackets hold 95 % intervals of means, over episodes and, where there are several, seeds.",
            markup=False,
        )
        print_rows(f"{one.dataset}: codes of what is seen", [row for row in one.rows if row.horizon == 0])
        for sentence in orderings(one.rows):
            screen.print(sentence, markup=False)
        if plots is not None:
            name = one.dataset.replace(", ", "_").removesuffix(" objects")
            films = {title: one.films[title] for title in DRAWN if title in one.films}
            for path in (
                plot_errors(one.errors, dt=one.dt, unit="frame widths", path=plots / f"vin_{name}_errors.png"),
                plot_strips(films, frames=SHOWN_FRAMES, path=plots / f"vin_{name}_films.png"),
            ):
                wrote(path)
    write_json(json_to, bench.result(rows))
