"""The command for counterfactual queries; it parses, calls the public API and prints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from simworld.query import Answer
from simworld.screen import JsonOption, check_json, screen, write_json, wrote

NOTHING = "if nothing changes"


def counterfactual(
    query: Annotated[Path, typer.Argument(metavar="QUERY", help="TOML, as in scenes/queries/rope_cylinder_gone.toml.")],
    film: Annotated[Path | None, typer.Option(help="The worlds beside each other, and the effect: .mp4, .gif.")] = None,
    json_to: JsonOption = None,
) -> None:
    """Answer a "what if" that a file asks, beside the engine's answer where it is known and the naive one.

    Example: simworld counterfactual scenes/queries/rope_cylinder_gone.toml --film film.mp4
    """
    from simworld import bench
    from simworld.query import explore, read_query
    from simworld.view_scene import check_film, film_worlds

    check_json(json_to)
    if film is not None:
        check_film(film)
    asked = read_query(query)
    with screen.status("asking"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = explore(asked)
    for text in dict.fromkeys(str(one.message) for one in caught):
        screen.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    _print_answers(asked.about, found.answers)
    if film is not None:
        with screen.status("drawing"):
            film_worlds(found.worlds, path=film)
        wrote(film)
    write_json(json_to, {"schema": 1, "environment": bench.environment(), **found.to_json()})


def _print_answers(title: str, answers: tuple[Answer, ...]) -> None:
    """Print a line per question: the answer, the engine's, and that of who says that nothing changes."""
    known = any(answer.truth for answer in answers)
    table = Table(show_lines=True)
    for column in ("question", "answer", *(["engine"] if known else []), NOTHING):
        table.add_column(column, overflow="fold")
    for answer in answers:
        truth = [answer.truth.text if answer.truth else ""] if known else []
        table.add_row(answer.question, answer.answer.text, *truth, answer.naive.text)
    screen.print(f"\n{title}", markup=False, highlight=False, soft_wrap=True)
    screen.print(table, markup=False)
