"""Import of other projects' recordings into HDF5, and export of trajectories to theirs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from simworld.data.deepmind import read_deepmind, write_deepmind
from simworld.data.dpinet import read_dpinet
from simworld.data.geoelements import read_geoelements, write_geoelements
from simworld.data.lagrangebench import read_lagrangebench, write_lagrangebench
from simworld.data.meshes import read_meshes
from simworld.data.meshgraphnets import read_meshgraphnets
from simworld.data.metadata import other_scene, peer_metadata, write_metadata
from simworld.data.store import TrajectoryFile, open_trajectories, write_trajectories
from simworld.data.tignn import read_tignn
from simworld.data.vtk import write_vtk
from simworld.data.vtk_points import read_vtk
from simworld.data.xdmf import write_xdmf
from simworld.saving import folder, replacing
from simworld.trajectory import Trajectory

Progress = Callable[[int], object]
WRITTEN = ("positions", "velocities", "history", "particle_types", "kinematic", "boundaries", "periodic")
"""Fields that go into all peers' formats; velocities as differences of positions."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one project keeps its recordings: what its files are called, and who reads and writes them.

    A reader that makes velocities from positions takes how many of them the first frame is to know. `takes` are its
    further options; `beside` is the file with metadata that lies beside recordings. Where suffixes are none, a folder
    is one recording. A writer `keeps` further fields than positions, types and the box.
    """

    suffixes: tuple[str, ...]
    takes_history: bool = True
    takes: tuple[str, ...] = ()
    beside: str = "metadata.json"
    read: Callable[..., Iterator[Trajectory]] | None = None
    write: Callable[[Path, Iterable[Trajectory]], None] | None = None
    keeps: tuple[str, ...] = ()


FORMATS = {
    "deepmind": Format(suffixes=(".tfrecord",), read=read_deepmind, write=write_deepmind, keeps=("context",)),
    "geoelements": Format(
        suffixes=(".npz", ".pkl"), read=read_geoelements, write=write_geoelements, keeps=("materials",)
    ),
    "lagrangebench": Format(suffixes=(".h5",), read=read_lagrangebench, write=write_lagrangebench),
    "dpinet": Format(suffixes=(".npz",), read=read_dpinet),
    "tignn": Format(suffixes=(".npz",), read=read_tignn, takes_history=False),
    "meshgraphnets": Format(
        suffixes=(".tfrecord",), read=read_meshgraphnets, takes_history=False, takes=("dt",), beside="meta.json"
    ),
    "meshio": Format(suffixes=(), read=read_meshes, takes_history=False, takes=("names", "units", "dt")),
    "vtk": Format(suffixes=(), read=read_vtk, takes=("names", "units", "dt")),
}

SERIES: Mapping[str, tuple[str, Callable[..., list[Path]]]] = {
    "vtk": (".pvd", write_vtk),
    "xdmf": (".xdmf", write_xdmf),
}
"""Formats that a viewer opens, a file or more for each episode."""


def import_data(
    name: str,
    source: str | Path,
    out: str | Path,
    *,
    history: int = 5,
    held_out: int | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress = lambda _: None,
) -> list[Path]:
    """Write another project's recordings as HDF5 files in the folder `out`, and return these.

    `source` is a file, or a folder whose files are all read; each keeps its name. Where there is a
    metadata.json, the new files hold it verbatim as their recipe. With `held_out` = k, each k-th episode of one file
    goes to valid.h5 and the others to train.h5. `options` go to the reader: names, units and dt of `read_meshes` and of
    `read_vtk`. All files are written or none.

    Raises:
        ValueError: the format is unknown or written only, there are no such files, or one is damaged.
    """
    known = [key for key, one in FORMATS.items() if one.read is not None]
    if name not in known:
        raise ValueError(f"There is no reader of the format '{name}'; the known ones are {', '.join(known)}.")
    form, out = FORMATS[name], Path(out)
    assert form.read is not None
    foreign = [option for option in options if option not in form.takes]
    if foreign:
        raise ValueError(f"The reader of the format '{name}' takes no {foreign[0]}; leave it out.")
    files = _files(Path(source), form.suffixes) if form.suffixes else [Path(source)]
    if held_out is not None and (held_out < 2 or len(files) != 1):
        raise ValueError(
            f"held_out, 2 or more, splits the episodes of one file; got {held_out} and {len(files)} files."
        )
    made: list[Path] = []
    with folder(out), ExitStack() as whole:  # all files or none
        for file in files:
            recipe = _said_beside(file.parent / form.beside)
            taken = {**options, **({"history": history} if form.takes_history else {})}
            episodes = _counted(form.read(file, **taken), progress)
            parts = {file.stem: episodes} if held_out is None else _split(episodes, held_out)
            for stem, part in parts.items():
                target = out / f"{stem}.h5"
                if target.exists() and target.samefile(file):
                    raise ValueError(f"--out would write over the recording '{file}' itself; give another folder.")
                partial = whole.enter_context(replacing(target))
                write_trajectories(partial, part, dataset=file.resolve().parent.name, recipe=recipe)
                made.append(target)
    return made


def _said_beside(path: Path) -> str:
    """Return the text of the metadata beside a recording; nothing where there are none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); copy it again or take it away.") from error


def _split(episodes: Iterable[Trajectory], held_out: int) -> dict[str, Iterable[Trajectory]]:
    """Return the episodes to train on and those to look at, each `held_out`-th."""
    every = list(episodes)
    kept = [episode for number, episode in enumerate(every, 1) if number % held_out]
    valid = every[held_out - 1 :: held_out]
    if not (kept and valid):
        raise ValueError(f"There are {len(every)} episodes, too few to hold each {held_out}-th out.")
    return {"train": kept, "valid": valid}


def export_data(
    name: str,
    source: str | Path,
    out: str | Path,
    *,
    connectivity_radius: float | None = None,
    spacing: float | None = None,
    every: int = 1,
    progress: Progress = lambda _: None,
) -> list[Path]:
    """Write HDF5 files of trajectories in another project's format to the folder `out`, and return what is new.

    `source` is a file, or a folder whose files are all written; each keeps its name. Peers' formats get a
    metadata.json with statistics of train.h5, or of the first file; it needs the `connectivity_radius` [m]
    of their graphs and may have the `spacing` [m] of particles, both taken from an imported file if it knows
    them. "vtk" and "xdmf" (of meshes) write a series for ParaView of each episode, each `every`-th frame of it. Peers'
    files are all written or none.

    Raises:
        ValueError: the format is unknown or read only, there are no such files, no radius is known, or files differ in
            what peers' metadata says once.

    Warns:
        UserWarning: the format has no place for some fields, or a metric of LagrangeBench's lacks the spacing.
    """
    known = [*(key for key, one in FORMATS.items() if one.write is not None), *SERIES]
    if name not in known:
        raise ValueError(f"There is no writer of the format '{name}'; the known ones are {', '.join(known)}.")
    if name in SERIES and (connectivity_radius, spacing) != (None, None):
        raise ValueError(f"The format '{name}' holds no --radius and no --spacing of particles; leave them out.")
    if name not in SERIES and every != 1:
        raise ValueError(f"The format '{name}' takes all frames; leave --every out, it is of {' and '.join(SERIES)}.")
    files, out = _files(Path(source), (".h5", ".hdf5")), Path(out)
    with folder(out), ExitStack() as whole:  # all files or none
        if name in SERIES:
            return _series(name, files, out, every, progress)
        described = _description(name, files, connectivity_radius, spacing)
        made = []
        for file in files:
            made.append(out / f"{file.stem}{FORMATS[name].suffixes[0]}")
            if made[-1].exists() and made[-1].samefile(file):
                raise ValueError(f"--out would write over the trajectories '{file}' themselves; give another folder.")
            _write(FORMATS[name], file, whole.enter_context(replacing(made[-1])), progress)
        write_metadata(out / "metadata.json", described)
    return [*made, out / "metadata.json"]


def _write(form: Format, file: Path, target: Path, progress: Progress) -> None:
    assert form.write is not None
    with open_trajectories(file) as data, _named(file):
        form.write(target, _counted(data, progress))


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say of which file an error is, unless it says so itself."""
    try:
        yield
    except ValueError as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file}: {error}") from error


def _series(name: str, files: list[Path], out: Path, every: int, progress: Progress) -> list[Path]:
    """Write a series for each episode beside its place, and put all there when all are whole."""
    suffix, write = SERIES[name]
    with TemporaryDirectory(dir=out, prefix=".partial") as stage:
        made: list[Path] = []
        for file in files:
            with open_trajectories(file) as data, _named(file):
                for number, trajectory in enumerate(_counted(data, progress)):
                    made += write(Path(stage, f"{file.stem}_{number:06d}{suffix}"), trajectory, every=every)
        targets = [out / one.relative_to(stage) for one in made]
        for one, target in zip(made, targets, strict=True):
            target.parent.mkdir(exist_ok=True)
            one.replace(target)
    for frames in {target.parent for target in targets} - {out}:
        for old in set(frames.glob("frame_??????.vtu")) - set(targets):  # of a longer series of this name
            old.unlink()
    return [target for target in targets if target.suffix == suffix]


def _description(name: str, files: list[Path], radius: float | None, spacing: float | None) -> dict[str, Any]:
    """Return metadata of all files: statistics of the first or of train.h5, and what must hold for every one."""
    first = next((file for file in files if file.stem == "train"), files[0])
    with open_trajectories(first) as data:
        said = _recipe(data)
    radius = said.get("default_connectivity_radius") if radius is None else radius
    spacing = said.get("dx") if spacing is None else spacing
    if radius is None:
        raise ValueError(
            f"{first} does not say within which radius particles interact; give it by --radius, "
            "connectivity_radius= in Python."
        )
    described: dict[str, Any] = {}
    for file in [first, *(file for file in files if file != first)]:
        with open_trajectories(file) as data, _named(file):
            own = peer_metadata(data, connectivity_radius=radius)
            described = described or own
            if other := other_scene(own, described):
                raise ValueError(f"it {other}")
            length, wanted = own["sequence_length"] + 1, described["sequence_length"] + 1
            if name == "deepmind" and length != wanted:
                raise ValueError(
                    f"its episodes have {length} frames and those of {first} {wanted}, where DeepMind's metadata has "
                    "one length for all; cut them with window() or export them apart."
                )
            for key, chosen in (("num_particles_max", max), ("sequence_length", min)):
                described[key] = chosen(described[key], own[key])
            described[f"num_trajs_{file.stem}"] = len(data)
    _warn_of_losses(name, files)
    if name == "geoelements":
        described["sequence_length"] = None  # that of each episode
    if name == "lagrangebench":
        described["write_every"] = 1  # dt is from one stored frame to the next
        if spacing is None:
            warnings.warn(
                "metadata.json has no dx, the spacing of particles, without which LagrangeBench cannot measure e_kin; "
                "give it by --spacing, spacing= in Python.",
                stacklevel=4,
            )
    return described if spacing is None else {**described, "dx": spacing}


def _warn_of_losses(name: str, files: list[Path]) -> None:
    """Warn of what the trajectories of some files hold and a format does not."""
    lost: dict[str, None] = {}
    for file in files:
        with open_trajectories(file) as data:
            held = [*data[0].initial, *(["actions"] if data[0].actions is not None else [])]
            lost |= dict.fromkeys(field for field in held if field not in (*WRITTEN, *FORMATS[name].keeps))
    if lost:
        warnings.warn(f"The format '{name}' holds no {', '.join(lost)}; left out.", stacklevel=5)


def _recipe(data: TrajectoryFile) -> dict[str, Any]:
    """Return the metadata that an imported file holds as its recipe; nothing of one that was generated."""
    try:
        said = json.loads(data.recipe)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _files(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not source.exists():
        raise ValueError(f"There is no file or folder '{source}'; give one that is there.")
    if source.is_file():
        return [source]
    found = sorted(file for file in source.iterdir() if file.suffix in suffixes)
    twice = {file.stem for file in found if sum(file.stem == other.stem for other in found) > 1}
    if not found or twice:
        got = f"several called {', '.join(sorted(twice))}" if twice else "none"
        raise ValueError(f"{source} must hold files {' or '.join('*' + s for s in suffixes)}; got {got}.")
    return found


def _counted(episodes: Iterable[Trajectory], progress: Progress) -> Iterator[Trajectory]:
    for number, episode in enumerate(episodes):
        yield episode
        progress(number + 1)
