"""The command for counterfactuals of whole worlds; it calls the public API, prints and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simworld.screen import check_json, counting, print_rows, screen, write_json

SHOWN = ("cf_gain", "cf_gain_median", "cf_rmse", "effect_error_relative", "direction_cosine", "leakage", "placebo")
FOOTER = "over n cases; in parentheses the 95 % bootstrap interval over them"


def ask_worlds(
    data: Path | None,
    worlds: Sequence[str] | None,
    checkpoints: Sequence[str] | None,
    count: int | None,
    plots: Path | None,
    json_to: str | None,
) -> None:
    """Print and write the answers of `simworld bench counterfactual`, and plot doses and gains of each world."""
    from simworld import bench
    from simworld.bench.causal_worlds import WORLDS
    from simworld.bench.counterfactual import reports
    from simworld.view import plot_doses, plot_gains

    if data is not None:
        raise ValueError("Counterfactuals are asked of worlds whose engine answers; leave --data out.")
    check_json(json_to)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)  # before minutes are spent on what is to be plotted
    rows = []
    for name in worlds or tuple(WORLDS):
        with counting(f"{name}: questions", None) as tell:
            (report,) = reports([name], checkpoints=checkpoints, count=count, progress=tell)
        print_rows(f"{name}: what if", [row for row in report.rows if row.metric in SHOWN], footer=FOOTER)
        rows += report.rows
        if plots is not None:
            made = [plot_gains(report.gains, dt=report.dt, path=plots / f"{name}_gain.png")] if report.gains else []
            if report.doses:
                made.append(plot_doses(report.doses, unit=report.unit, path=plots / f"{name}_dose.png"))
            for path in made:
                screen.print(f"wrote {path}", markup=False)
    write_json(json_to, bench.result(rows))
