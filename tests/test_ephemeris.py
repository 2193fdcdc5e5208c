from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.data.ephemeris import BODIES, FIRST_DAY, SPLIT_DAYS, _de421, read_ephemeris, read_solar_npz, solar_system

RECORDED = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data")) / "solar_system"


def test_the_earth_is_where_the_almanac_has_it():
    """At the perihelion of 2011-01-03 19 h the Earth was 0.983341 au from the Sun; the Moon is near the Earth."""
    positions, velocities = read_ephemeris(np.array([2455565.29]))
    sun, earth, moon = (positions[0, BODIES.index(name)] for name in ("sun", "earth", "moon"))
    assert np.linalg.norm(earth - sun) == pytest.approx(0.983341, abs=2e-6)
    assert 0.0023 < np.linalg.norm(moon - earth) < 0.0028
    speed = np.linalg.norm(velocities[0, BODIES.index("earth")]) * 149597870.7 / 86400
    assert speed == pytest.approx(30.29, abs=0.05)


def test_velocities_are_the_slopes_of_positions():
    days = 2451545.0 + np.array([-0.01, 0.0, 0.01])
    positions, velocities = read_ephemeris(days)
    assert np.allclose((positions[2] - positions[0]) / 0.02, velocities[1], atol=1e-8)


def test_it_is_what_was_recorded():
    path = next(iter(RECORDED.glob("*.npz")), None)
    if path is None:
        pytest.skip(f"recorded data is not here ({RECORDED}); set SIMWORLD_DATA to its folder")
    known = read_solar_npz(path, from_day=2457000.5)
    positions, velocities = read_ephemeris(2457000.5 + np.arange(20.0))
    assert np.allclose(known["positions"][:20].numpy(), positions, atol=1e-9)
    assert np.allclose(known["velocities"][:20].numpy(), velocities, atol=1e-11)


def test_splits_do_not_overlap():
    assert SPLIT_DAYS[0][1] <= SPLIT_DAYS[1][0] < SPLIT_DAYS[1][1] <= SPLIT_DAYS[2][0]
    path = solar_system([0, 2, 1], num_steps=3, spacing=30)
    first = FIRST_DAY + SPLIT_DAYS[2][0] + 30
    assert np.allclose(path["positions"].numpy(), read_ephemeris(first + np.arange(4.0))[0])
    assert torch.equal(path.initial.object_types, torch.arange(11))
    with pytest.raises(ValueError, match="number >= 0"):
        solar_system([0, 1, -5])
    with pytest.raises(ValueError, match="goes beyond the days"):
        solar_system([0, 1, 0], num_steps=400)


def test_files_of_the_wrong_kind(tmp_path):
    wrong = tmp_path / "wrong.bsp"
    wrong.write_bytes(b"not an ephemeris" * 100)
    with pytest.raises(ValueError, match=r"wrong.bsp is no whole SPK ephemeris"):
        read_ephemeris(np.array([2451545.0]), wrong)
    whole = _de421().read_bytes()
    for size in (1024, 4096, 100_000, len(whole) // 2):
        wrong.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"wrong.bsp (is no whole SPK ephemeris|is cut off or damaged|has no segment)"
        ):
            read_ephemeris(np.array([2451545.0]), wrong)
    for days in (np.array([]), np.array([np.nan]), np.array(2451545.0)):
        with pytest.raises(ValueError, match="days must be Julian dates"):
            read_ephemeris(days)
    with pytest.raises(FileNotFoundError, match="no ephemeris file"):
        read_ephemeris(np.array([2451545.0]), tmp_path / "none.bsp")
    with pytest.raises(ValueError, match="de421.bsp covers Julian dates"):
        read_ephemeris(np.array([2551545.0]))


def test_npz_files_of_the_wrong_kind(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="no data file"):
        read_solar_npz(path)
    np.savez(path, t_jd_tdb=np.arange(3.0), pos_au=np.zeros((3, 9, 3)), vel_au_per_day=np.zeros((3, 9, 3)))
    with pytest.raises(ValueError, match=r"positions \[3, 11, 3\]; got \[3, 9, 3\]"):
        read_solar_npz(path)
    np.savez(path, t_jd_tdb=np.arange(3.0) * 2, pos_au=np.zeros((3, 11, 3)), vel_au_per_day=np.zeros((3, 11, 3)))
    with pytest.raises(ValueError, match="one state for each day"):
        read_solar_npz(path)
    np.savez(path, t_jd_tdb=np.arange(3.0), pos_au=np.zeros((3, 11, 3)), vel_au_per_day=np.zeros((3, 11, 3)))
    with pytest.raises(ValueError, match="must hold Julian date 2444239.5"):
        read_solar_npz(path)
    np.savez(path, t_jd_tdb=np.arange(3), pos_au=np.zeros((3, 11, 3)), vel_au_per_day=np.zeros((3, 11, 3)))
    with pytest.raises(ValueError, match="numbers with a fraction"):
        read_solar_npz(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"a.npz is no .npz"):
        read_solar_npz(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.npz is no .npz"):
        read_solar_npz(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a.npz is no .npz"):
        read_solar_npz(path)


@pytest.mark.parametrize(("package", "message"), [("jplephem", "needs jplephem"), ("skyfield_data", "skyfield-data")])
def test_a_missing_package_is_one_sentence(package, message, monkeypatch):
    import importlib.util

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    known = importlib.util.find_spec
    monkeypatch.setattr("simworld.data.ephemeris.find_spec", lambda name: None if name == package else known(name))
    with pytest.raises(ImportError, match=rf"{message}.*simworld\[ephemeris\]"):
        read_ephemeris(np.array([2451545.0]))
