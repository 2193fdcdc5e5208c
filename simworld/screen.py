"""What commands print: tables of errors, JSON, progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from simworld.metrics import Row
from simworld.saving import replacing

screen = Console(stderr=True)
NOTE = "mean ± standard deviation over n trajectories, or median (lowest to highest) over seeds"
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE; - for standard output.")
]


def print_rows(title: str, rows: list[Row], *, note: str = NOTE) -> None:
    """Print a table for each kind of figure, and a note that says what its figures are."""
    kinds = [row.metric.removeprefix("one_step_").removeprefix("rollout_") for row in rows]
    for kind in dict.fromkeys(kinds):
        here = [row for row, other in zip(rows, kinds, strict=True) if other == kind]
        _print_table(f"{title}: {kind.replace('_', ' ')}", here, kind)
    screen.print(note, markup=False)


def _print_table(title: str, rows: list[Row], kind: str) -> None:
    """Print a line per data set and model and a column per metric and horizon."""
    table = Table()
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    if len(datasets) > 1:
        table.add_column("data", overflow="fold")
    table.add_column("model", overflow="fold", width=min(20, max(len(row.model) for row in rows)))
    columns = list(dict.fromkeys((row.metric, row.horizon, row.unit) for row in rows))
    for metric, horizon, unit in columns:
        way = metric.removesuffix(kind).replace("_", " ")  # one step, rollout, or what needs no word
        table.add_column(f"{way}@ {horizon}\n[{unit}]", justify="right", overflow="fold")
    table.add_column("n", justify="right", overflow="fold")
    for dataset in datasets:
        here = [row for row in rows if row.dataset == dataset]
        for model in dict.fromkeys(row.model for row in here):
            found = {(row.metric, row.horizon, row.unit): row for row in here if row.model == model}
            cells = [_figure(found[column]) if column in found else "" for column in columns]
            name = [dataset] if len(datasets) > 1 else []
            table.add_row(*name, model, *cells, str(next(iter(found.values())).trajectories))
        table.add_section()
    screen.print(f"\n{title}", markup=False, highlight=False, soft_wrap=True)
    screen.print(table, markup=False)


def _figure(row: Row) -> str:
    if row.low is not None and row.high is not None:
        return f"{row.value:.3g} ({row.low:.3g} to {row.high:.3g})"
    return f"{row.value:.3g}" + (f" ± {row.spread:.2g}" if row.spread is not None else "")


def check_json(where: str | None) -> None:
    """Raise a ValueError before long work if `write_json` could not write to this file after it."""
    if where not in (None, "-") and (not Path(str(where)).parent.is_dir() or Path(str(where)).is_dir()):
        raise ValueError(f"--json must be a file in a folder that is there, or -; got '{where}'.")


def prepare(plots: Path | None, json_to: str | None) -> None:
    """Make the folder for plots, and see that JSON can be written, before long work is spent on what goes there."""
    check_json(json_to)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)


def wrote(path: object) -> None:
    """Say what was written, on one line however long: it may be copied."""
    screen.print(f"wrote {path}", markup=False, soft_wrap=True)


def write_json(where: str | None, found: dict[str, Any]) -> None:
    """Write what was found to a file, or to standard output for "-"; nowhere for None."""
    if where is None:
        return
    text = json.dumps(_plain(found), indent=1, allow_nan=False)
    if where == "-":
        typer.echo(text)
        return
    with replacing(where) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    wrote(where)


def _plain(value: Any) -> Any:
    """Return a value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bars() -> Progress:
    """Return bars that go away when all is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=screen, transient=True)


class counting:
    """A progress bar that is told how many are done."""

    def __init__(self, what: str, total: int | None) -> None:
        self._bars = bars()
        self._task = self._bars.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bars.start()
        return lambda done: self._bars.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
