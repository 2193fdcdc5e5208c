"""The commands for counterfactuals of whole worlds and for slots; they call the public API, print and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simworld.screen import counting, prepare, print_rows, write_json, wrote

SHOWN = ("cf_gain", "cf_gain_median", "cf_rmse", "effect_error_relative", "direction_cosine", "leakage", "placebo")
FOOTER = "over n cases; in parentheses the 95 % bootstrap interval over them"
INTERVALS = "mean over seeds (95 % of bootstrap samples, in which seeds and n episodes are drawn anew)"


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
    from simworld.bench.counterfactual import refuse, reports
    from simworld.view import plot_doses, plot_gains

    refuse(data)
    prepare(plots, json_to)
    rows = []
    for name in worlds or tuple(WORLDS):
        with counting(f"{name}: questions", None) as tell:
            (report,) = reports([name], checkpoints=checkpoints, count=count, progress=tell)
        print_rows(f"{name}: what if", [row for row in report.rows if row.metric in SHOWN], note=FOOTER)
        rows += report.rows
        if plots is not None:
            made = [plot_gains(report.gains, dt=report.dt, path=plots / f"{name}_gain.png")] if report.gains else []
            if report.doses:
                made.append(plot_doses(report.doses, unit=report.unit, path=plots / f"{name}_dose.png"))
            for path in made:
                wrote(path)
    write_json(json_to, bench.result(rows))


def judge_slots(
    data: Path | None,
    worlds: Sequence[str] | None,
    checkpoints: Sequence[str] | None,
    count: int | None,
    plots: Path | None,
    json_to: str | None,
) -> None:
    """Print and write the rows of `simworld bench slots`, and plot scores and gains over |M|, errors over time."""
    from simworld import bench
    from simworld.bench.slots import CODE, slots
    from simworld.view import plot_masked, plot_over_horizons

    prepare(plots, json_to)
    with counting("slots: episodes", None) as tell:
        rows = slots(data, worlds=worlds, checkpoints=checkpoints, count=count, progress=tell)
    for world in dict.fromkeys(row.dataset for row in rows):
        print_rows(f"slots: {world}", [row for row in rows if row.dataset == world], note=INTERVALS)
    if plots is not None:
        swept = [row for row in rows if not row.dataset.endswith(CODE)]  # variants of one |M| are no sweep
        for name in ("ablation_auroc", "attention_auroc", "cf_gain", "cf_gain_corrected"):
            wrote(plot_masked(swept, name, path=plots / f"{name}.png"))
        wrote(plot_over_horizons(swept, "position_error", path=plots / "errors.png"))
    write_json(json_to, bench.result(rows))
