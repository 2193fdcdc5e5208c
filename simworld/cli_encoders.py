"""The commands for what sees: encoders of films, trained and put to use; they call the public API and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simworld.screen import JsonOption, check_json, counting, print_rows, screen, write_json, wrote


def train_encoder(run: Path, seed: int | None, out: Path | None, initial: str | None) -> None:
    """Train an encoder as a run file says, and print figures of held-out films on the way."""
    from simworld.train_encoder import EncoderProgress, read_encoder_run, start_encoder

    plan = read_encoder_run(run, seed=seed, out=out, initial=initial)

    def watch(report: EncoderProgress) -> None:
        told = "".join(f", {name} {value:.4g}" for name, value in report.told.items())
        screen.print(f"step {report.step} of {plan.fit.num_steps}: loss {report.loss:.4g}{told}", highlight=False)

    start_encoder(plan, watch=watch)
    wrote(plan.out / "model.safetensors")


def encode(
    encoder: Annotated[str, typer.Argument(help="Checkpoint file of an encoder, or the name of a shipped one.")],
    data: Annotated[Path, typer.Argument(help="Trajectories (.h5) with films.")],
    out: Annotated[Path, typer.Option(help="File for the slots (.h5), episode for episode.")],
    history: Annotated[int, typer.Option(min=0, help="Frames before the first that each episode of slots knows.")] = 3,
    actor: Annotated[
        int | None, typer.Option(help="Number of the body whose place and velocity are told as proprioception.")
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(help="Training data with films: fits linear probes to it and tells their errors.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png) of slots on the first film.")] = None,
    json_to: JsonOption = None,
) -> None:
    """Make slots of the films in a file, and say how well they part the bodies.

    Example: simworld encode slots_billiards_0 data/video_billiards/test.h5 --out slots.h5
    """
    from simworld import bench
    from simworld.data import open_trajectories
    from simworld.encode import encode_file, figure_rows, only_view, probe_rows
    from simworld.models import SlotAttention, load_encoder
    from simworld.view_slots import draw_slots

    if out.is_dir() or (out.exists() and out.samefile(data)):
        raise ValueError(f"--out must be a new file, not a folder nor the recording itself; got '{out}'.")
    check_json(json_to)
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise ValueError(f"--plot writes a .png into a folder that is there; got '{plot}'.")
    model = load_encoder(encoder)
    if probes is not None:  # what is wrong with them is told before the work
        with open_trajectories(probes) as train:
            model.prepare(only_view(train, 0).rgb[:1])
    if plot is not None and not isinstance(model, SlotAttention):
        raise ValueError(f"--plot shows which slot owns which pixel; a {type(model).__name__} has one for all of them.")
    with open_trajectories(data) as recorded, counting("episodes", len(recorded)) as tell:
        encode_file(encoder, model, data, out, history=history, actor=actor, progress=tell)
        rows = figure_rows(encoder, model, recorded)
        if probes is not None:
            with open_trajectories(probes) as train:
                rows += probe_rows(encoder, model, train, recorded)
        if plot is not None and isinstance(model, SlotAttention):
            draw_slots(model, only_view(recorded, 0), plot)
    print_rows(f"{encoder} on {data.name}", rows)
    for path in (out, *([plot] if plot else [])):
        wrote(path)
    write_json(json_to, bench.result(rows))
