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
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "datasets").glob("*/README.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def errors(rows: list[dict]) -> str:
    """Return a line per model and data set, a column per horizon."""
    columns = list(dict.fromkeys((row["metric"], row["horizon"]) for row in rows))
    names = {1: "one step", "all": "whole rollout"}
    lines = [
        f"| model | data | {' | '.join(names.get(h, f'first {h} steps') for _, h in columns)} | episodes |",
        f"|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for model, data in dict.fromkeys((row["model"], row["dataset"]) for row in rows):
        found = {(r["metric"], r["horizon"]): r for r in rows if (r["model"], r["dataset"]) == (model, data)}
        count = next(iter(found.values()))["trajectories"]
        cells = [f"{found[c]['value']:.3g}" if c in found else "" for c in columns]
        lines.append(f"| {model} | {data} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


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


def table(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return errors(found["rows"]) if "rows" in found else speed(found)


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
