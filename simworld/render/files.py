"""Files of splats: .ply as 3D Gaussian splatting writes it (Kerbl et al. 2023), .splat of antimatter15's viewer.

And .spz and USD, which have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.kinds import SplatState
from simworld.render.harmonics import FLAT
from simworld.render.splats import decomposed, splats_of
from simworld.render.spz import read_spz, spz_bytes
from simworld.render.usd import USD, read_usd, write_usd
from simworld.saving import replacing

Array = np.ndarray[Any, np.dtype[Any]]
NUMBERS = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
NUMBERS |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
NUMBERS |= {"float32": "f4", "float64": "f8"}
"""Types of a .ply's properties, and numpy's."""
NEEDED = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1",
          "rot_2", "rot_3")  # fmt: skip
MOST_HEADER = 2**16  # bytes: a header that is longer is none
SPLAT = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("shade", "u1", 4), ("quats", "u1", 4)])
NEARLY = 1e-6  # opacities this near 0 or 1 have a finite logit


def read_splats(path: str | Path) -> SplatState:
    """Return the splats in a file: .ply, .splat, .spz, or the first frame of .usd, .usda or .usdc.

    Scales and opacities are as they act, not their logarithms and logits; quaternions have unit length.

    Raises:
        ValueError: the file is of another kind, damaged, lacks a property, or holds NaN, infinity or a zero quaternion.
        ImportError: the format needs a package that is not there.
    """
    path = Path(path)
    if path.suffix in USD:
        return read_usd(path).frames[0]
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"Splats are read from {', '.join((*READERS, *USD))}; got '{path}'.")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    return splats_of(reader(path), str(path))


def write_splats(path: str | Path, splats: SplatState) -> Path:
    """Write the active splats of a state to a file, and return it.

    .ply and .usd, .usda, .usdc hold them exactly; .spz rounds them, .splat too, and leaves out harmonics. Covariances
    are written as quaternions and scales.

    Raises:
        ValueError: the file is of another kind, the state has no active splat, several scenes, or splats that
            `read_splats` would refuse or the format does not hold.
        ImportError: the format needs a package that is not there.
    """
    path = Path(path)
    if path.suffix in USD:
        return write_usd(path, splats)
    writer = WRITERS.get(path.suffix)
    if writer is None:
        raise ValueError(f"Splats are written to {', '.join((*WRITERS, *USD))}; got '{path}'.")
    if splats.num_scenes != 1 or not bool(splats.active.any()):
        raise ValueError(
            f"A file holds the active splats of one scene; the state has {splats.num_scenes} scenes and "
            f"{int(splats.active.sum())} active splats. Take scene(i) of it."
        )
    there, splats = splats.active, decomposed(splats)
    clean = splats_of({name: splats[name][there].detach().cpu().numpy() for name in splats}, "The state")
    with replacing(path) as partial:
        partial.write_bytes(writer({name: clean[name].numpy() for name in clean}))
    return path


def read_cloud(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Return the points [p, 3] of a .ply and their colours [p, 3] in 0 to 1, each None where there are none.

    Raises:
        ValueError: the file is no .ply or damaged, or a point is not finite.
    """
    rows = _vertices(path)
    names = rows.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{path} holds no points: its vertices have no x, y, z.")
    with np.errstate(over="ignore"):
        points = np.stack([rows[name].astype(np.float32) for name in ("x", "y", "z")], 1)
    if not np.isfinite(points).all():
        wrong = int((~np.isfinite(points).all(1)).argmax())
        raise ValueError(f"{path}: point {wrong} is not finite; take it out.")
    if not len(points):
        return None, None
    if not {"red", "green", "blue"} <= set(names):
        return torch.from_numpy(points), None
    most = np.iinfo(rows.dtype["red"]).max if rows.dtype["red"].kind in "iu" else 1
    colors = np.stack([rows[name].astype(np.float32) / most for name in ("red", "green", "blue")], 1)
    return torch.from_numpy(points), torch.from_numpy(colors.clip(0, 1))


def _read_ply(path: Path) -> dict[str, Array]:
    rows = _vertices(path)
    missing = [name for name in NEEDED if name not in (rows.dtype.names or ())]
    if missing:
        raise ValueError(f"{path} is no .ply of splats: its vertices have no {', '.join(missing)}.")
    found = {name for name in rows.dtype.names or () if name.startswith("f_rest_")}
    rest = [f"f_rest_{k}" for k in range(len(found))]
    if len(rest) not in (0, 9, 24, 45) or found != set(rest):
        raise ValueError(f"{path} must have 0, 9, 24 or 45 properties f_rest_0, f_rest_1, ...; got {len(rest)}.")

    def columns(*names: str) -> Array:
        with np.errstate(invalid="ignore"):  # of NaN, which is refused later
            return np.stack([rows[name].astype(np.float64) for name in names], 1)

    flat = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:  # all of one colour, then of the next
        more = columns(*rest).reshape(len(rows), 3, -1).transpose(0, 2, 1)
        flat = np.concatenate([flat, more], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            "means": columns("x", "y", "z"),
            "quats": columns("rot_0", "rot_1", "rot_2", "rot_3"),
            "scales": np.exp(columns("scale_0", "scale_1", "scale_2")),
            "opacities": 1 / (1 + np.exp(-rows["opacity"].astype(np.float64))),
            "harmonics": flat,
        }


def _vertices(path: Path) -> Array:
    """Return the rows of the element `vertex` of a .ply, in any order of properties."""
    raw = path.read_bytes()
    end = raw.find(b"end_header", 0, MOST_HEADER)
    start = raw.find(b"\n", end) + 1
    if not raw.startswith(b"ply") or end < 0 or start < 1:
        raise ValueError(f"{path} is no .ply; convert it, or copy it again.")
    lines = [line.split() for line in raw[:end].decode("ascii", errors="replace").splitlines()]
    form = next((words[1] for words in lines if words[:1] == ["format"] and len(words) > 1), "none")
    if form not in ("binary_little_endian", "ascii"):
        raise ValueError(f"{path} is in the format {form}; binary_little_endian and ascii are read. Convert it.")
    elements = [words for words in lines if words[:1] == ["element"]]
    if not elements or elements[0][1:2] != ["vertex"] or len(elements[0]) != 3 or not elements[0][2].isdecimal():
        raise ValueError(f"{path} must begin with the element vertex and its number; got {elements[:1]}.")
    first = lines.index(elements[0]) + 1
    last = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    properties = [words for words in lines[first:last] if words[:1] == ["property"]]
    names = {words[-1] for words in properties}
    if len(names) != len(properties) or not names:
        raise ValueError(f"{path} must have vertices with properties, each of its own name; got {sorted(names)}.")
    if any(len(words) != 3 or words[1] not in NUMBERS for words in properties):
        raise ValueError(f"{path} has a property of vertices that is no number; only numbers are read.")
    kind = np.dtype([(name, "<" + NUMBERS[number]) for _, number, name in properties])
    count = int(elements[0][2])
    if form == "ascii":
        return _written_rows(path, raw[start:], count, kind)
    if count * kind.itemsize > len(raw) - start:
        raise ValueError(
            f"{path} says {count} vertices and holds {(len(raw) - start) // kind.itemsize}; copy it again."
        )
    return np.frombuffer(raw, dtype=kind, count=count, offset=start)


def _written_rows(path: Path, text: bytes, count: int, kind: np.dtype[Any]) -> Array:
    """Return the vertices that stand as text, a line for each."""
    lines = text.split(b"\n", min(count, len(text)))[:count]
    words, names = [line.split() for line in lines], kind.names or ()
    if len(words) < count or any(len(row) != len(names) for row in words):
        raise ValueError(f"{path} says {count} vertices of {len(names)} numbers each, and holds others; copy it again.")
    try:
        numbers = np.array(words, dtype=np.float64).reshape(count, len(names))
    except ValueError as error:
        raise ValueError(f"{path} holds vertices that are no numbers ({error}); copy it again.") from error
    rows = np.empty(count, dtype=kind)
    with np.errstate(over="ignore", invalid="ignore"):
        for column, name in enumerate(names):
            rows[name] = numbers[:, column]
    return rows


def _write_ply(values: dict[str, Array]) -> bytes:
    harmonics = values["harmonics"].astype(np.float64)
    opacities = values["opacities"].astype(np.float64).clip(NEARLY, 1 - NEARLY)
    rest = harmonics[:, 1:].transpose(0, 2, 1).reshape(len(harmonics), -1)
    columns = [
        values["means"],
        np.zeros_like(values["means"]),
        harmonics[:, 0],
        rest,
        np.log(opacities / (1 - opacities))[:, None],
        np.log(values["scales"].astype(np.float64).clip(1e-30)),
        values["quats"],
    ]
    names = ["x", "y", "z", "nx", "ny", "nz", *NEEDED[3:6], *(f"f_rest_{k}" for k in range(rest.shape[1])), *NEEDED[6:]]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(harmonics)}"]
    head += [*(f"property float {name}" for name in names), "end_header", ""]
    return "\n".join(head).encode() + np.concatenate(columns, 1).astype("<f4").tobytes()


def _read_splat(path: Path) -> dict[str, Array]:
    raw = path.read_bytes()
    if len(raw) % SPLAT.itemsize:
        raise ValueError(f"{path} must hold {SPLAT.itemsize} bytes for each splat; got {len(raw)}. Copy it again.")
    rows = np.frombuffer(raw, dtype=SPLAT)
    return {
        "means": rows["means"],
        "quats": (rows["quats"].astype(np.float64) - 128) / 128,
        "scales": rows["scales"],
        "opacities": rows["shade"][:, 3] / 255,
        "harmonics": ((rows["shade"][:, :3] / 255 - 0.5) / FLAT)[:, None],
    }


def _write_splat(values: dict[str, Array]) -> bytes:
    """Return the rows, those that cover most first, as viewers expect them."""
    rows = np.zeros(len(values["means"]), dtype=SPLAT)
    rows["means"], rows["scales"] = values["means"], values["scales"]
    shade = np.concatenate([values["harmonics"][:, 0] * FLAT + 0.5, values["opacities"][:, None]], 1)
    rows["shade"] = np.round(shade * 255).clip(0, 255)
    rows["quats"] = np.round(values["quats"] * 128 + 128).clip(0, 255)
    order = np.argsort(-values["scales"].prod(1) * values["opacities"], kind="stable")
    return rows[order].tobytes()


READERS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".ply": _read_ply,
    ".splat": _read_splat,
    ".spz": read_spz,
}
WRITERS: dict[str, Callable[[dict[str, Array]], bytes]] = {
    ".ply": _write_ply,
    ".splat": _write_splat,
    ".spz": spz_bytes,
}
FORMATS = (*WRITERS, *USD)
"""Suffixes of files of splats."""
