"""The solar system as recorded: positions and velocities of its bodies from a JPL ephemeris."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simworld.extras import needed
from simworld.kinds import ObjectState
from simworld.trajectory import Trajectory

Array = NDArray[np.float64]

BODIES = ("sun", "mercury", "venus", "earth", "moon", "mars", "jupiter", "saturn", "uranus", "neptune", "pluto")
GM = (
    2.959122082855911e-04,
    4.912549571867940e-11,
    7.243452332698441e-10,
    8.887692462968594e-10,
    1.093189452994545e-11,
    9.549548695622390e-11,
    2.825345840855050e-07,
    8.459706073308477e-08,
    1.292024825792650e-08,
    1.524359109249740e-08,
    2.178441051990520e-12,
)
"""GM of BODIES [au^3/d^2] from DE421's header (Folkner et al. 2009, IPN Progress Report 42-178)."""
ASTRONOMICAL_UNIT = 149597870.700  # km, exact by definition (IAU 2012)
SolarState = ObjectState.with_units(positions="au", velocities="au/d", masses="solar masses")
FIRST_DAY = 2444239.5  # Julian date of 1980-01-01 00:00 TDB
SPLIT_DAYS: Mapping[int, tuple[int, int]] = MappingProxyType({0: (0, 10958), 1: (10958, 11323), 2: (11323, 15341)})
"""Days since FIRST_DAY of each split: train 1980 to 2009, valid 2010, test 2011 to 2021."""

# Segments (centre, target) of DE421 that add up to each body, seen from the barycentre of the solar system.
SEGMENTS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "sun": ((0, 10),),
        "mercury": ((0, 1), (1, 199)),
        "venus": ((0, 2), (2, 299)),
        "earth": ((0, 3), (3, 399)),
        "moon": ((0, 3), (3, 301)),
        "mars": ((0, 4),),
        "jupiter": ((0, 5),),
        "saturn": ((0, 6),),
        "uranus": ((0, 7),),
        "neptune": ((0, 8),),
        "pluto": ((0, 9),),
    }
)


def read_ephemeris(days: Array, path: str | Path | None = None) -> tuple[Array, Array]:
    """Return positions [au] and velocities [au/d] of BODIES, [T, 11, 3], at Julian dates `days` (TDB).

    Seen from the barycentre, equatorial axes (ICRF). `path` is a JPL ephemeris in SPK format; DE421 as the
    package skyfield-data brings it, if None. Mars and the outer planets are the barycentres of their systems.

    Raises:
        ImportError: jplephem, or without `path` skyfield-data, is missing.
        FileNotFoundError: there is no such file.
        ValueError: the file is no SPK ephemeris, lacks a body or does not cover the days.
    """
    days = np.asarray(days, dtype=np.float64)
    if days.ndim != 1 or not len(days) or not np.isfinite(days).all():
        raise ValueError(f"days must be Julian dates [T], one or more and finite; got {list(days.shape)}.")
    path = _de421() if path is None else Path(path)
    kernel = _open(path)
    try:
        known = {(segment.center, segment.target): segment for segment in kernel.segments}
        rows = []
        for body in BODIES:
            missing = [pair for pair in SEGMENTS[body] if pair not in known]
            if missing:
                raise ValueError(f"{path} has no segment {missing[0]} for {body}; use DE421 or another planetary SPK.")
            parts = [_compute(known[pair], days, path) for pair in SEGMENTS[body]]
            rows.append(np.sum(parts, axis=0))  # [2, 3, T]
    finally:
        kernel.close()
    positions, velocities = np.stack(rows, 1).transpose(0, 3, 1, 2)
    return positions, velocities


def _de421() -> Path:
    package = find_spec("skyfield_data")  # found, not imported: it warns of other files' age
    if package is None or package.origin is None:
        raise ImportError(
            "The DE421 ephemeris comes with skyfield-data; install it with: pip install 'simworld[ephemeris]', "
            "or give the path of an SPK file."
        )
    return Path(package.origin).with_name("data") / "de421.bsp"


def _open(path: Path) -> Any:
    spk = needed("jplephem.spk", "Reading an ephemeris", "ephemeris").SPK
    if not path.is_file():
        raise FileNotFoundError(f"There is no ephemeris file '{path}'; give an SPK file such as de421.bsp.")
    try:
        return spk.open(str(path))
    except (ValueError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole SPK ephemeris; give a planetary one such as de421.bsp.") from error


def _compute(segment: Any, days: Array, path: object) -> Array:
    if days.min() < segment.start_jd or days.max() > segment.end_jd:
        raise ValueError(
            f"{path} covers Julian dates {segment.start_jd} to {segment.end_jd}; asked were {days.min()} to "
            f"{days.max()}. Ask for days within."
        )
    try:
        position, velocity = segment.compute_and_differentiate(days)
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is cut off or damaged; fetch it again.") from error
    return np.stack([position, velocity]) / ASTRONOMICAL_UNIT


def solar_system(seed: Sequence[int], *, num_steps: int = 365, spacing: int = 30) -> Trajectory:
    """Return recorded daily states [au, au/d] of the Sun, the planets, the Moon and Pluto.

    The seed's second entry is the split, its third says where to start: `spacing` days after the start before.
    Time is in days here (dt 1), and `object_types` tell the bodies apart, in the order of BODIES. Masses
    are not given: they are to be found.
    """
    if len(seed) != 3 or seed[1] not in SPLIT_DAYS or seed[2] < 0:
        raise ValueError(
            f"A seed here is (seed, split, number) with split 0, 1 or 2 and number >= 0; got {list(seed)}."
        )
    _, split, number = seed
    first, last = SPLIT_DAYS[split]
    start = first + number * spacing
    if num_steps < 1 or spacing < 1 or start + num_steps > last:
        raise ValueError(
            f"Episode {number} of {num_steps} days, {spacing} days apart, goes beyond the days {first} to {last} of "
            "its split; ask for fewer or shorter ones."
        )
    return solar_trajectory(*read_ephemeris(FIRST_DAY + start + np.arange(num_steps + 1.0)))


def solar_trajectory(positions: Array, velocities: Array) -> Trajectory:
    """Return the trajectory of daily positions [T, 11, 3] and velocities of BODIES."""
    x, v = torch.from_numpy(positions).contiguous(), torch.from_numpy(velocities).contiguous()
    initial = SolarState(positions=x[0], velocities=v[0], object_types=torch.arange(len(BODIES)))
    active = torch.ones(x.shape[:2], dtype=torch.bool)
    return Trajectory(initial=initial, frames={"positions": x, "velocities": v}, active=active, dt=1.0)


def read_solar_npz(path: str | Path, *, from_day: float = FIRST_DAY) -> Trajectory:
    """Return the daily states in an .npz with t_jd_tdb [T], pos_au and vel_au_per_day [T, 11, 3], from a day on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such .npz, its days are not consecutive, or it ends before `from_day`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no data file '{path}'; give an .npz of daily states.")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            days, positions, velocities = (file[name] for name in ("t_jd_tdb", "pos_au", "vel_au_per_day"))
    except (
        ValueError,
        KeyError,
        OSError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is no .npz with t_jd_tdb, pos_au and vel_au_per_day; give one that is.") from error
    if any(values.dtype.kind != "f" for values in (days, positions, velocities)) or days.ndim != 1:
        raise ValueError(
            f"{path} must hold numbers with a fraction, and days [T]; got {days.dtype} {list(days.shape)}."
        )
    for name, values in (("positions", positions), ("velocities", velocities)):
        if values.shape != (len(days), len(BODIES), 3):
            raise ValueError(f"{path} must hold {name} {[len(days), len(BODIES), 3]}; got {list(values.shape)}.")
    if not np.allclose(np.diff(days), 1.0):
        raise ValueError(f"{path} must hold one state for each day, in order; give one that does.")
    kept = days >= from_day
    if kept.sum() < 2 or days[0] > from_day:
        raise ValueError(f"{path} must hold Julian date {from_day} and later ones; it has {days[:1]} to {days[-1:]}.")
    made = solar_trajectory(positions[kept].astype(np.float64), velocities[kept].astype(np.float64))
    made.check_finite()
    return made
