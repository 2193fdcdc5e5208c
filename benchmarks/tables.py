"""Writes the tables of the documents from recorded JSON, so that no figure is typed by hand.

python benchmarks/tables.py           # rewrite what stands between the markers
python benchmarks/tables.py --check   # exit 1 if anything would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "datasets").glob("*/README.md"))]
SPLATS = ("scene", "splats", "scale", "width", "height", "forward_cpu", "backward_cpu", "backward_per_forward",
          "speedup_of_two", "speedup_of_two_backward", "most_of_two")  # fmt: skip
"""What is shown of how long splats take."""
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def heading(metric: str, horizon: int | str, unit: str) -> str:
    if metric in ("one_step_position_mse", "rollout_position_mse"):
        return {1: "one step", "all": "whole rollout"}.get(horizon, f"first {horizon} steps")
    words = metric.replace("_", " ") + (f" [{unit}]" if unit != "1" else "")
    said = horizon == 1 and not metric.endswith(
        ("normalized_mse", "_relative_l2", "_rmse", "position_distance", "_saved")
    )
    return words if horizon == "training" or said else f"{words} @ {horizon}"


def figure(row: dict) -> str:
    """Return a value, over several seeds the median with the range."""
    return f"{row['value']:.3g}" + (f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else "")


def errors(rows: list[dict]) -> str:
    """Return a line per model and data set, a column per metric and horizon."""
    columns = list(dict.fromkeys((row["metric"], row["horizon"], row["unit"]) for row in rows))
    lines = [
        f"| model | data | {' | '.join(heading(*column) for column in columns)} | episodes |",
        f"|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for model, data in dict.fromkeys((row["model"], row["dataset"]) for row in rows):
        found = {(r["metric"], r["horizon"], r["unit"]): r for r in rows if (r["model"], r["dataset"]) == (model, data)}
        count = next(iter(found.values()))["trajectories"]
        cells = [figure(found[c]) if c in found else "" for c in columns]
        lines.append(f"| {model} | {data} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


def bodies(rows: list[dict]) -> str:
    """Return a line per body of the solar system, a column per model and a last one for the masses found."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        f"| body | {' | '.join(models)} | error of the mass found [%] |",
        f"|---|{'---|' * (len(models) + 1)}",
    ]
    for data in dict.fromkeys(row["dataset"] for row in rows):
        found = {(r["model"], r["metric"]): r for r in rows if r["dataset"] == data}
        cells = [figure(found[model, "median_distance"]) for model in models]
        cells.append(figure(found["simworld", "mass_error"]))
        lines.append(f"| {data.rpartition(', ')[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def distances(rows: list[dict]) -> str:
    """Return tables of how far predictions are off, by how much one is nearer than another, and what codes are like."""

    def kind(row: dict) -> str:
        return row["metric"] if row["horizon"] else "codes"

    return "\n\n".join(errors([r for r in rows if kind(r) == one]) for one in dict.fromkeys(map(kind, rows)))


ANSWERED = ("cf_rmse", "effect_error_relative", "direction_cosine", "affected_auroc", "dose_slope", "event_f1",
            "changed_event_f1", "leakage", "placebo", "placebo_irrelevant", "composition", "lyapunov_steps",
            "sieved_share")  # fmt: skip
"""What is shown of how a model answers, beside its gains."""


def interval(row: dict | None) -> str:
    """Return a mean with its bootstrap interval."""
    if row is None:
        return ""
    if row["value"] is None:
        return "breaks down"  # an error without bounds, in one of the cases at least
    said = f" ({row['low']:.3g} to {row['high']:.3g})" if row.get("low") is not None else ""
    return f"{row['value']:.3g}{said}"


def gains(rows: list[dict]) -> str:
    """Return a line per question with the gain of each who answers, then what else is told of models and world."""
    found = {(r["dataset"], r["horizon"], r["model"]): r for r in rows if r["metric"] == "cf_gain"}
    models = [m for m in dict.fromkeys(model for _, _, model in found) if m not in ("engine, true parameters",
              "copy of the factual")]  # fmt: skip
    head = ["question", "steps", *models, "cases"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for question, horizon in dict.fromkeys((question, horizon) for question, horizon, _ in found):
        here = [found.get((question, horizon, model)) for model in models]
        count = next(row for row in here if row)["trajectories"]
        lines.append(f"| {question} | {horizon} | {' | '.join(map(interval, here))} | {count} |")
    lines += ["", "| world | who | what | value |", "|---|---|---|---|"]
    for row in rows:
        if row["metric"] in ANSWERED and ":" not in row["dataset"]:
            unit = f" {row['unit']}" if row["unit"] != "1" else ""
            value = "none" if row["value"] is None else f"{row['value']:.3g}{unit}"
            lines.append(f"| {row['dataset']} | {row['model']} | {row['metric'].replace('_', ' ')} | {value} |")
    return "\n".join(lines)


SLOTS = (("position_error", "velocity_error", "slot_rmse"), ("cf_gain", "cf_gain_corrected", "ablation_auroc",
         "probed_ablation_auroc", "attention_auroc"), ("effective_rank", "mean_cosine", "mean_variance",
         "least_variance"))  # fmt: skip
LESS = {"_less_that_of_m0": " less that of |M| = 0", "_less_that_of_text": " less that of the text"}


def slots(rows: list[dict]) -> str:
    """Return for each world errors, effects and who acts on whom, how far slots fill their space, then differences."""
    groups = [(names, "", "") for names in SLOTS]
    groups += [((f"position_error{less}", *(f"{name}{less}" for name in SLOTS[1])), less, LESS[less]) for less in LESS]
    parts = []
    for world in dict.fromkeys(row["dataset"] for row in rows):
        for names, less, told in groups:
            here = [row for name in names for row in rows if (row["dataset"], row["metric"]) == (world, name)]
            if not here:
                continue
            columns = list(dict.fromkeys((row["metric"], row["horizon"]) for row in here))
            heads = [f"{name.removesuffix(less).replace('_', ' ')} @ {horizon}" for name, horizon in columns]
            lines = [f"| {world}{told.replace('|', '&#124;')} | {' | '.join(heads)} | seeds |"]
            lines.append(f"|{'---|' * (len(columns) + 2)}")
            for model in dict.fromkeys(row["model"] for row in rows):
                found = {(row["metric"], row["horizon"]): row for row in here if row["model"] == model}
                if found:
                    seeds = next(iter(found.values())).get("seeds", 1)
                    cells = " | ".join(interval(found.get(column)) for column in columns)
                    lines.append(f"| {model.replace('|', '&#124;')} | {cells} | {seeds} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def speed(found: dict) -> str:
    """Return the figures of speed.json as a table."""
    one, many = found["one_scene"], found["many_scenes"]
    lines = [
        "| | step [ms] | its matrix products alone [ms] | ratio |",
        "|---|---|---|---|",
        f"| one scene | {one['step']:.2f} | {one['products']:.2f} | {one['step_per_products']:.1f} |",
        f"| {many['scenes']} scenes at once | {many['step']:.0f} | {many['products']:.0f} "
        f"| {many['step_per_products']:.2f} |",
    ]
    return "\n".join(lines)


def records(rows: list[dict]) -> str:
    """Return a line per record and a column per key, three digits to a figure that is no whole number."""
    keys = list(rows[0])
    shown = [[f"{row[k]:.3g}" if isinstance(row[k], float) else str(row[k]) for k in keys] for row in rows]
    head = [f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", f"|{'---|' * len(keys)}"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in shown)])


def wide(rows: list[dict]) -> str:
    """Return a line per model with a column per metric, in the units that the metrics have."""
    names = list(dict.fromkeys((row["metric"], row["unit"]) for row in rows))
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        known = {(row["metric"], row["unit"]): row["value"] for row in rows if row["model"] == model}
        titles = {key: key[0] if key[1] == "1" else f"{key[0]} [{key[1]}]" for key in names}
        lines.append({"model": model} | {titles[key]: known.get(key, "") for key in names})
    return records(lines)


def runs(found: dict) -> str:
    """Return the rows of several runs under one another, each led by what tells the runs apart."""
    told = [{k: v for k, v in run.items() if k in ("recipe", "transport", "particles")} for run in found["runs"]]
    return records([said | row for said, run in zip(told, found["runs"], strict=True) for row in run["rows"]])


def messages(found: dict) -> str:
    """Return the figures of message_passing.json: times, then the ratios that count, by threads and size."""
    rows = []
    for one in found["times"]:
        times = {f"{name} [ms]": value for name, value in one["milliseconds"].items()}
        ratios = {
            k: one[k] for k in ("forward_per_products_split", "both_per_forward", "plain_forward_per_products_plain")
        }
        rows.append({k: one[k] for k in ("threads", "nodes", "edges")} | times | ratios)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return records([{name: row.get(name, "") for name in names} for row in rows])


def table(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    if "runs" in found:
        return runs(found)
    if "times" in found:
        return messages(found)
    if "seconds_per_step" in found:
        kept = ("particles", "edges", "parameters", "processor_seconds_per_step", "peak_MiB", "libraries_MiB")
        return records([{name: found[name] for name in kept}])
    if "rows" not in found:
        return speed(found)
    if "metric" not in found["rows"][0]:
        kept = SPLATS if name == "rasterizer" else tuple(found["rows"][0])
        return records([{key: row.get(key, "") for key in kept} for row in found["rows"]])
    metrics = {row["metric"] for row in found["rows"]}
    kinds = {
        "foreground_ari": wide,
        "ablation_auroc": slots,
        "cf_gain": gains,
        "median_distance": bodies,
        "distance_saved": distances,
    }
    shown = next((kind for metric, kind in kinds.items() if metric in metrics), errors)
    return shown(found["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        made = MARKED.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)
        if made != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(made)
    if stale:
        print("out of date:" if check else "written:", ", ".join(stale))
        sys.exit(check)


if __name__ == "__main__":
    main()
