"""The command line: parses, calls the public API, prints; nothing else."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeGuard

import typer
from rich.console import Console
from rich.progress import TaskID

from simworld import cli_encoders, cli_queries, cli_scenes
from simworld.cli_causes import ask_worlds, judge_slots
from simworld.cli_films import predict_films
from simworld.metrics import Row
from simworld.models.base import LearnedSimulator
from simworld.screen import JsonOption, bars, check_json, counting, print_rows, screen, write_json, wrote

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learned physical simulators: generate data, train, roll out, and know the error.",
    epilog="Start with: simworld demo",
)
PartsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Take graphs larger than memory through the network in parts of so many nodes."),
]
OutOption = Annotated[Path, typer.Option(help="Folder for what is written.")]


@app.command()
def demo(out: OutOption = Path("simworld_demo"), json_to: JsonOption = None) -> None:
    """Roll out the shipped rope model, print its errors, ask "what if", write films and plots.

    Example: simworld demo --out simworld_demo
    """
    from simworld import bench
    from simworld.demo import run

    check_json(json_to)
    with screen.status("rolling out the shipped model and drawing films"):
        found = run(out)
    print_rows("Rope: predicted beside recorded, shipped test episodes", found.errors)
    print_rows(found.question, found.answers)
    for path in found.files:
        wrote(path)
    write_json(json_to, bench.result([*found.errors, *found.answers]))


@app.command()
def generate(
    recipe: Annotated[Path, typer.Argument(help="Recipe TOML, as in datasets/rope/recipe.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for train.h5, valid.h5 and test.h5.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 is one per core.")] = 0,
) -> None:
    """Generate episodes from a recipe; run it again after an interruption and it goes on.

    Example: simworld generate datasets/rope/recipe.toml --out data/rope
    """
    from simworld.data.generate import generate as make
    from simworld.data.generate import read_recipe

    plan = read_recipe(recipe)
    with bars() as shown:
        tasks: dict[str, TaskID] = {}

        def told(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = shown.add_task(split, total=total)
            shown.update(tasks[split], completed=done)

        paths = make(plan, out, num_workers=workers, progress=told)
    for path in paths:
        wrote(path)


@app.command("import")
def import_(
    form: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help="deepmind, geoelements, lagrangebench, dpinet, vtk, meshgraphnets, meshio or tignn."
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A recording, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the HDF5 files.")],
    history: Annotated[int, typer.Option(min=0, help="Earlier velocities that the first frame knows.")] = 5,
    held_out: Annotated[
        int | None, typer.Option(min=2, help="Each how-many-th episode goes to valid.h5, the others to train.h5.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="meshio, vtk: data and its field, U=velocities.")] = None,
    unit: Annotated[
        list[str] | None, typer.Option(help="meshio, vtk: a further field and its unit, vorticity=1/s.")
    ] = None,
    dt: Annotated[
        float | None,
        typer.Option(help="meshio, vtk, meshgraphnets: seconds between frames that do not say their times."),
    ] = None,
) -> None:
    """Turn another project's recordings of particles or meshes into trajectories (.h5).

    Example: simworld import deepmind WaterDrop --out data/water_drop
    """
    from simworld.data import import_data

    said = {"names": _pairs("--name", name), "units": _pairs("--unit", unit), "dt": dt}
    options = {key: value for key, value in said.items() if value not in (None, {})}
    with counting("episodes", None) as tell:
        paths = import_data(form, source, out, history=history, held_out=held_out, options=options, progress=tell)
    for path in paths:
        wrote(path)


def _pairs(option: str, values: list[str] | None) -> dict[str, str]:
    """Return what was said as NAME=VALUE, once or several times."""
    wrong = [value for value in values or () if "=" not in value]
    if wrong:
        raise ValueError(f"{option} is said as NAME=VALUE; got '{wrong[0]}'.")
    return {key: value for key, _, value in (one.partition("=") for one in values or ())}


@app.command()
def export(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="geoelements, lagrangebench, deepmind, vtk or xdmf.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Trajectories (.h5), or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for what is written.")],
    radius: Annotated[
        float | None,
        typer.Option(help="Radius within which particles interact, in m, for other formats than vtk and xdmf."),
    ] = None,
    spacing: Annotated[float | None, typer.Option(help="Spacing of particles in m, for LagrangeBench.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Each how-many-th frame, for vtk and xdmf.")] = 1,
) -> None:
    """Write trajectories of particles in another project's format, or of anything as VTK files for ParaView.

    Example: simworld export vtk predicted.h5 --out paraview
    """
    from simworld.data import export_data

    with counting("episodes", None) as tell:
        paths = export_data(form, source, out, connectivity_radius=radius, spacing=spacing, every=every, progress=tell)
    for path in paths:
        wrote(path)


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Trajectories (.h5), a checkpoint (.safetensors, or a name), or a mesh; none: list shipped."
        ),
    ] = None,
) -> None:
    """Say what a file holds, or without one which checkpoints come with simworld.

    Example: simworld info rope
    """
    from simworld.data import read_mesh
    from simworld.fields import time_unit
    from simworld.models import holds_encoder, load_checkpoint, load_encoder, shipped_checkpoints

    if file is None:
        for name, said in shipped_checkpoints().items():
            screen.print(f"{name}: {said}", markup=False)
    elif file.suffix in (".h5", ".hdf5"):
        _say_data(file)
    elif file.suffix not in ("", ".safetensors") and file.is_file():
        state, faults = read_mesh(file)
        screen.print(f"{file}: {state}", markup=False)
        screen.print("\n".join(faults) if faults else "nothing is wrong with the mesh", markup=False)
    else:
        model = load_encoder(file) if holds_encoder(file) else load_checkpoint(file)
        units = model.provenance.get("units")
        step = f"dt {model.dt:g} {time_unit(units if isinstance(units, dict) else {})}"
        number = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        screen.print(f"{file}: {type(model).__name__}, {number} parameters, {step}", markup=False)
        screen.print_json(json.dumps({"arguments": model.arguments, "provenance": model.provenance}))


def _say_data(file: Path) -> None:
    from simworld.data import mesh_faults, open_trajectories
    from simworld.fields import time_unit

    with open_trajectories(file) as data:
        first = data[0]
        step = f"dt {data.dt:g} {time_unit(data.units)}"
        screen.print(f"{file}: {len(data)} episodes of {data.dataset}, {step}, seed {data.seed}", markup=False)
        screen.print(f"first episode: {len(first)} frames of {first.initial}", markup=False)
        for fault in mesh_faults(first.initial) if "cells" in first.initial else ():
            screen.print(f"its mesh: {fault}", markup=False)
        if first.actions is not None:
            screen.print(f"actions {list(first.actions.shape)} {data.action_unit}", markup=False)
        for number, view in enumerate(data.views(0)):
            height, width = view.rgb.shape[1:3]
            screen.print(f"view {number}: {len(view)} frames of {width} x {height} pixels, with masks", markup=False)
        branches = [len(data.views(0, k)) for k in range(len(data.counterfactuals(0)))]
        if branches:
            screen.print(f"counterfactual branches: {len(branches)}, {sum(map(bool, branches))} of them filmed")
        for name, said in data.statistics.items():
            unit = data.kind.fields[name].unit if name in data.kind.fields else data.action_unit
            numbers = f"mean {said['mean']:.4g}, standard deviation {said['std']:.4g}"
            screen.print(f"  {name}: {numbers} {unit}", markup=False)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Run TOML, as in datasets/rope/train.toml.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the model, instead of the file's.")] = None,
    initial: Annotated[str | None, typer.Option(help="Checkpoint to go on from, instead of the file's.")] = None,
) -> None:
    """Train a model as a run file says; run it again after an interruption and it goes on.

    Example: simworld train datasets/springs_nri/train.toml --seed 1 --out runs/springs_nri_1
    """
    from simworld.runs import read_run, start
    from simworld.train import Progress as Report
    from simworld.train_encoder import is_encoder_run

    if is_encoder_run(run):
        cli_encoders.train_encoder(run, seed, out, initial)
        return
    plan = read_run(run, seed=seed, out=out, initial=initial)

    def watch(report: Report) -> None:
        screen.print(f"step {report.step} of {plan.fit.num_steps}: loss {report.loss:.4g}", highlight=False)
        if report.errors:
            print_rows("held out", report.errors)

    start(plan, watch=watch)
    wrote(plan.out / "model.safetensors")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint file, or the name of a shipped one.")],
    data: Annotated[Path, typer.Argument(help="Trajectories (.h5).")],
    horizons: Annotated[
        str, typer.Option(help="Steps, comma-separated; 1 is one-step, all the whole length.")
    ] = "1,20,all",
    metrics: Annotated[
        str, typer.Option(help="Further figures for particles, comma-separated, as sinkhorn_divergence; or all.")
    ] = "",
    nodes_at_once: PartsOption = None,
    json_to: JsonOption = None,
) -> None:
    """Measure a checkpoint on recorded trajectories, naive predictions beside it.

    Example: simworld evaluate rope data/rope/test.h5 --horizons 1,50,all
    """
    from simworld import bench
    from simworld.data import open_trajectories
    from simworld.encode import seen_by
    from simworld.metrics import evaluate as measure
    from simworld.models import load_checkpoint
    from simworld.particle_metrics import named_metrics

    check_json(json_to)
    further = named_metrics([name.strip() for name in metrics.split(",") if name.strip()])
    wanted: list[int | str] = [int(h) if h.strip().isdecimal() else h.strip() for h in horizons.split(",")]
    model = load_checkpoint(checkpoint)
    with open_trajectories(data) as file, counting("episodes", len(file)) as tell:
        trajectories = seen_by(checkpoint, model, file)
        model = _in_parts(model.to(trajectories[0].initial.dtype), nodes_at_once)  # as precise as the data
        named = {checkpoint: model}
        rows = measure(named, trajectories, dataset=data.name, horizons=wanted, metrics=further or None, progress=tell)
    print_rows(f"{checkpoint} on {data.name}", rows)
    write_json(json_to, bench.result(rows))


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="Which benchmark; --list names them; objects: all of object worlds.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="Recorded data to measure on, instead of the table's own.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Checkpoint file or name, once per seed, instead of the shipped.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    world: Annotated[
        list[str] | None,
        typer.Option(
            help="counterfactual: rope, springs, charged, balls, water or flow; slots: billiards, springs or push_t; "
            "vin: springs, gravity, billiards or drift; once each."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="counterfactual, slots, vin: episodes to ask about.")] = None,
    plots: Annotated[Path | None, typer.Option(help="counterfactual, slots, vin: folder for plots.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="fluid-fall, lj3, which train: folder for that, runs/ and their name by default."),
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Measure models on a named benchmark, naive and published rows beside them.

    Example: simworld bench rope --data Rope_valid.npz --json rope.json
    """
    from simworld import bench as benchmarks

    if list_all:
        for known, function in benchmarks.BENCHMARKS.items():
            screen.print(f"{known}: {(function.__doc__ or '').splitlines()[0]}", markup=False)
        screen.print(f"objects: {', '.join(benchmarks.OBJECTS)}, one after the other.", markup=False)
        return
    if name not in (*benchmarks.BENCHMARKS, "objects"):
        said = f"There is no benchmark '{name}'" if name else "Say which benchmark"
        raise ValueError(f"{said}; the known ones are {', '.join(benchmarks.BENCHMARKS)} and objects.")
    if name == "objects" and (data or checkpoint):
        raise ValueError("objects are many tables; give --data or --checkpoint to one of them.")
    asking = {"counterfactual": ask_worlds, "slots": judge_slots, "vin": predict_films}
    if name not in asking and (world or count or plots):
        raise ValueError(f"--world, --count and --plots are of the benchmarks {', '.join(asking)}, not of {name}.")
    if out and (checkpoint or name not in benchmarks.TRAINING):
        raise ValueError(
            f"--out is of benchmarks that train, {', '.join(benchmarks.TRAINING)} without --checkpoint; leave it out."
        )
    check_json(json_to)
    if data is not None and not data.exists():
        raise ValueError(f"There is no data file '{data}'; give one that is there.")
    if name in asking:
        asking[name](data, world, checkpoint, count, plots, json_to)
        return
    given: dict[str, Any] = ({"checkpoints": checkpoint} if checkpoint else {}) | ({"out": out} if out else {})
    found: list[Row] = []
    for one in benchmarks.OBJECTS if name == "objects" else (name,):
        with counting(f"{one}: episodes", None) as tell:
            rows = benchmarks.BENCHMARKS[one](data, progress=tell, **given)
        print_rows(one, rows)
        found += rows
    write_json(json_to, benchmarks.result(found))


@app.command()
def rollout(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint file, or the name of a shipped one.")],
    data: Annotated[Path, typer.Argument(help="Trajectories (.h5) to start from, and whose actions to apply.")],
    out: Annotated[Path, typer.Option(help="File for the predicted trajectories (.h5).")],
    episodes: Annotated[int | None, typer.Option(min=1, help="How many episodes; all, if not given.")] = None,
    film: Annotated[Path | None, typer.Option(help="GIF of the first episode, recorded beside predicted.")] = None,
    nodes_at_once: PartsOption = None,
) -> None:
    """Predict trajectories from the first frames of recorded ones and write them.

    Example: simworld rollout rope data/rope/test.h5 --out predicted.h5 --film predicted.gif
    """
    import torch

    from simworld.data import open_trajectories, write_trajectories
    from simworld.encode import as_bodies, seen_by
    from simworld.models import load_checkpoint
    from simworld.prescriptions import script
    from simworld.simulate import check_suits
    from simworld.simulate import rollout as roll

    if film is not None and (film.suffix != ".gif" or not film.parent.is_dir()):
        raise ValueError(f"--film writes a .gif into a folder that is there; got '{film}'.")
    if out.is_dir() or (out.exists() and out.samefile(data)):
        raise ValueError(f"--out must be a new file, not a folder nor the recording itself; got '{out}'.")
    model = load_checkpoint(checkpoint)
    with open_trajectories(data) as file, counting("episodes", len(file)) as tell, torch.no_grad():
        recorded = seen_by(checkpoint, model, file, episodes)
        check_suits(checkpoint, model, recorded[0])
        model = _in_parts(model.to(recorded[0].initial.dtype), nodes_at_once)  # as precise as the data
        first, made = file[0], []
        shown = {} if film is None else {"recorded": as_bodies(checkpoint, model, first, recorded[0])}
        for episode in recorded:
            steps, moved = episode.num_steps, script(episode, model.auxiliary)
            made.append(roll(episode.initial, episode.actions, simulator=model, num_steps=steps, interventions=moved))
            tell(len(made))
        said = f"predicted by {checkpoint}"
        write_trajectories(out, made, dataset=file.dataset, seed=file.seed, recipe=said, action_unit=file.action_unit)
    wrote(out)
    if film is not None:
        from simworld.view import film as draw

        shown["predicted"] = as_bodies(checkpoint, model, first, made[0])
        wrote(draw(shown, path=film))


app.command()(cli_encoders.encode)
app.command()(cli_queries.counterfactual)
app.command("fit-scene")(cli_scenes.fit_scene)
app.command()(cli_scenes.render)
app.command()(cli_scenes.view)


def main() -> None:
    """Run the command line; a user's error is one sentence and exit code 2, SIMWORLD_TRACEBACK=1 shows more."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, tomllib.TOMLDecodeError) as error:
        if os.environ.get("SIMWORLD_TRACEBACK"):
            raise
        where = f"{error.filename}: {error.strerror}; choose another path." if _is_bare(error) else error
        _fail(where)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("SIMWORLD_TRACEBACK") or not _is_memory(error):
            raise
        _fail("This needs more memory than is free; take fewer scenes at once, a smaller radius or a smaller model.")


def _fail(what: object) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"error: {what}", style="red", markup=False, highlight=False)
    sys.exit(2)


def _is_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on a CPU torch says so by a RuntimeError, on CUDA by a class of its own."""
    return isinstance(error, MemoryError) or "enough memory" in str(error) or "out of memory" in str(error)


def _is_bare(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error is the system's own, which names a file but says no sentence."""
    return isinstance(error, OSError) and error.filename is not None and error.strerror is not None


def _in_parts(model: LearnedSimulator, nodes_at_once: int | None) -> LearnedSimulator:
    """Return the model, told to take large graphs in parts of so many nodes."""
    from simworld.models.graph_network import EncodeProcessDecode

    networks = [part for part in model.modules() if isinstance(part, EncodeProcessDecode)]
    if nodes_at_once is not None and not networks:
        raise ValueError(f"--nodes-at-once is for networks of particles and meshes; this is a {type(model).__name__}.")
    for network in networks:
        network.nodes_at_once = nodes_at_once
    return model


if __name__ == "__main__":
    main()
