"""Recordings of particles in other projects' formats: read, written, and refused where they are damaged."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld import Trajectory, open_trajectories, write_trajectories
from simworld.cli import main
from simworld.data import (
    export_data,
    from_arrays,
    import_data,
    peer_metadata,
    read_deepmind,
    read_dpinet,
    read_geoelements,
    read_lagrangebench,
    read_vtk,
    vtk_points,
    write_deepmind,
    write_geoelements,
    write_lagrangebench,
    write_metadata,
    write_vtk,
)
from simworld.data.arrays import displacements, recorded_positions, step_statistics
from simworld.data.tfrecord import crc32c, read_tfrecord
from simworld.data.unpickle import load_pickle
from simworld.kinds import MeshState, ParticleState, SlotState
from simworld.space import wrapped

RECORDED = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data"))
BOUNDS = [[0.1, 0.9], [0.2, 0.8]]
METADATA = {"bounds": BOUNDS, "sequence_length": 9, "default_connectivity_radius": 0.015, "dim": 2, "dt": 0.0025}


@pytest.fixture
def data():
    def need(name: str) -> Path:
        if not (RECORDED / name).exists():
            pytest.skip(f"recorded data is not here ({RECORDED / name}); set SIMWORLD_DATA to its folder")
        return RECORDED / name

    return need


def walk(frames=10, num=4, dim=2, seed=0):
    """Return positions [T, n, d] float32 between 0.3 and 0.7 that drift a little."""
    draw = np.random.default_rng(seed)
    steps = draw.normal(scale=1e-3, size=(frames, num, dim)).cumsum(0).cumsum(0)
    return (draw.uniform(0.35, 0.65, (num, dim)) + np.clip(steps, -0.05, 0.05)).astype(np.float32)


def metadata(folder, **changes):
    said = {k: v for k, v in {**METADATA, **changes}.items() if v is not None}
    (folder / "metadata.json").write_text(json.dumps(said))


def same(trajectory, positions, history=5):
    assert torch.equal(trajectory["positions"], torch.from_numpy(positions[history + 1 :]))
    back = recorded_positions(trajectory)
    assert back.dtype == positions.dtype
    return np.array_equal(back, positions)


# Plain arrays


@pytest.mark.parametrize("history", [0, 1, 5])
def test_frame_0_is_the_first_that_knows_its_past(history):
    places = walk().astype(np.float64)
    speeds = np.diff(places, axis=0) / 0.5
    made = from_arrays(positions=places, dt=0.5, history=history)
    assert len(made) == 10 - history - 1
    for k in range(len(made)):
        state = made.frame(k)
        assert np.array_equal(state.positions.numpy(), places[history + 1 + k])
        assert np.array_equal(state.velocities.numpy(), speeds[history + k])
        if history:
            assert np.array_equal(state.history.numpy(), speeds[k : k + history].transpose(1, 0, 2))
    assert ("history" in made.initial) == (history > 0)


def test_all_arrays_find_their_fields():
    places = walk()
    made = from_arrays(
        positions=places,
        dt=0.1,
        history=2,
        particle_types=np.array([3, 5, 5, 6]),
        masses=np.ones(4),
        materials=np.arange(4.0),
        boundaries=[[0.0, 0.0], [1.0, 2.0]],
        gravity=[0.0, -9.8],
        context=np.arange(10.0)[:, None],
        actions=np.arange(9.0)[:, None, None],
    )
    state = made.initial
    assert state.kinematic.tolist() == [True, False, False, False]
    assert state.materials[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state.boundaries.tolist() == [[[0.0, 0.0], [1.0, 2.0]]]
    assert state.context.tolist() == [[3.0]]
    assert made["context"][:, 0, 0].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert made.actions[:, 0, 0].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert state.fields["gravity"].unit == "m/s^2"
    same(made, places, history=2)


def test_velocities_go_the_shortest_way_round_periodic_axes():
    x = np.float32([0.9, 0.95, 0.0, 0.05, 0.1])
    places = np.stack([x, x], axis=1)[:, None]
    made = from_arrays(
        positions=places, dt=1.0, history=1, boundaries=np.float64([[0, 0], [1, 1]]), periodic=[True, False]
    )
    past = torch.cat([made.initial.history[0], made["velocities"][:, 0]])
    assert past[:, 0].numpy() == pytest.approx(0.05, abs=1e-6)
    assert past[1, 1] == pytest.approx(-0.95)
    again = recorded_positions(made)
    assert np.abs(again - places).max() < 1e-6
    assert torch.equal(wrapped(made.initial, torch.from_numpy(again)), torch.from_numpy(again))


def test_episodes_of_different_sizes_make_a_list(tmp_path):
    places = [walk(8, 3), walk(12, 5, seed=1)]
    made = from_arrays(positions=places, dt=0.1, particle_types=[5, np.full(5, 6)], boundaries=np.array(BOUNDS).T)
    assert [(len(m), len(m.initial)) for m in made] == [(2, 3), (6, 5)]
    assert [m.initial.particle_types[0].item() for m in made] == [5, 6]
    write_trajectories(tmp_path / "train.h5", made, dataset="walks")
    with open_trajectories(tmp_path / "train.h5") as file:
        assert all(a.frame(-1).identical(b.frame(-1)) for a, b in zip(file, made, strict=True))
        speeds = torch.cat([m["velocities"].flatten() for m in made]).double()
        assert file.statistics["velocities"]["std"] == pytest.approx(float(speeds.std(correction=0)))


@pytest.mark.parametrize("count", [2, 3])
def test_a_list_that_is_one_value_is_for_all_episodes(count):
    box = [[0.0, 0.0], [1.0, 1.0]]
    said = {"gravity": [0.0, -9.8], "periodic": [True, False], "masses": [1.0, 2.0, 3.0, 4.0], "context": [1.0, 2.0]}
    made = from_arrays(positions=[walk()] * count, dt=np.float32(0.1), boundaries=box, particle_types=[5] * 4, **said)
    assert made[1].initial.boundaries.tolist() == [box]
    assert made[1].initial.gravity[0].tolist() == pytest.approx([0.0, -9.8])
    assert made[1].initial.masses.tolist() == said["masses"]
    assert made[1].initial.context.tolist() == [said["context"]]
    assert made[1].dt == pytest.approx(0.1)
    with pytest.raises(ValueError, match="one for all 4 episodes"):
        from_arrays(positions=[walk()] * 4, dt=0.1, masses=list(np.ones((4, 4))), particle_types=list(np.arange(4)))
    each = {"gravity": [[0.0, -k] for k in range(count)], "materials": [np.full(4, k) for k in range(count)]}
    made = from_arrays(positions=[walk()] * count, dt=0.1, particle_types=[5 + k for k in range(count)], **each)
    assert made[1].initial.gravity.tolist() == [[0.0, -1.0]]
    assert made[1].initial.materials.tolist() == [[1.0]] * 4
    assert made[1].initial.particle_types.tolist() == [6] * 4


NAN = walk()
NAN[4, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positions": walk(6)}, "have 6 frames.*number 6: give 7 frames"),
        ({"positions": walk()[0]}, r"\[frames, particles, dimensions\]"),
        ({"positions": walk(10, 0)}, "none of them 0"),
        ({"positions": walk().astype(int)}, "real numbers"),
        ({"positions": walk(10, 4, 4)}, "3 dimensions at most"),
        ({"positions": NAN}, "particle 2 at frame 4"),
        ({"positions": []}, "empty list"),
        ({"positions": [walk(), NAN]}, "Episode 1: positions must be finite"),
        ({"positions": [walk()], "masses": [1, 2]}, "lists 2 values where positions lists 1 episodes"),
        ({"positions": [walk()] * 2, "masses": [np.ones(4), np.ones(3)]}, r"Episode 1: masses must have shape \[4\]"),
        (
            {"positions": [walk(num=2)] * 2, "particle_types": [5, 6]},
            r"say np.array\(particle_types\) if it is for all",
        ),
        ({"positions": [walk(num=2)] * 2, "materials": [[1, 2], [3, 4]]}, "one for all 2 episodes or a list"),
        ({"particle_types": [5, 5, -1, 5]}, "0 or more; particle 2 is of type -1"),
        ({"dt": 0}, "dt must be a positive"),
        ({"dt": float("nan")}, "dt must be a positive"),
        ({"history": -1}, "history must be a whole number"),
        ({"particle_types": np.zeros(3, int)}, r"particle_types must have shape \[4\]"),
        ({"particle_types": np.zeros(4)}, "whole numbers"),
        ({"kinematic": np.zeros(4)}, "True or False"),
        ({"boundaries": BOUNDS[0]}, r"boundaries must have shape \[2, 2\]"),
        ({"boundaries": [[1.0, 1.0], [0.0, 2.0]]}, "a lower and a higher upper corner"),
        ({"periodic": [True, False]}, "need their ends"),
        ({"masses": np.zeros(4)}, "masses must be positive"),
        ({"context": np.zeros((9, 1))}, r"context must be numbers \[10, c\]"),
        ({"actions": np.zeros((10, 4, 1))}, r"actions must be numbers \[9, ...\]"),
        ({"pressure": np.zeros(4)}, "knows no array 'pressure'"),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        from_arrays(**{"positions": walk(), "dt": 0.1, **changes})


# TFRecord


def write_records(path, episodes, types=None, **sequences):
    """Write episodes as DeepMind does, by the independent writer of the tfrecord package."""
    writer = pytest.importorskip("tfrecord").TFRecordWriter(str(path))
    for key, places in enumerate(episodes):
        own = np.full(places.shape[1], 5) if types is None else types
        context = {"key": (key, "int"), "particle_type": (own.astype("<i8").tobytes(), "byte")}
        frames = {"position": ([f.tobytes() for f in places], "byte")}
        frames |= {name: ([f.tobytes() for f in rows], "byte") for name, rows in sequences.items()}
        writer.write(context, frames)
    writer.close()


def test_checksums_are_those_of_published_examples():
    """The first are RFC 3720's, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(b"a") == 0xC1D04330


def test_checksums_of_any_length_agree_with_an_independent_one():
    other = pytest.importorskip("crc32c").crc32c
    draw = np.random.default_rng(0)
    for size in (1, 3, 4, 5, 31, 63, 64, 65, 1000, 4096, 65537, 300001):
        data = draw.bytes(size)
        assert crc32c(data) == other(data), size


def test_deepmind_episodes_come_bit_for_bit(tmp_path):
    episodes = [walk(num=3), walk(num=5, seed=1)]
    context = np.arange(20, dtype=np.float32).reshape(10, 2)
    metadata(tmp_path, context_mean=[0, 0])
    write_records(tmp_path / "train.tfrecord", episodes, step_context=context)
    made = list(read_deepmind(tmp_path / "train.tfrecord"))
    assert [same(m, places) for m, places in zip(made, episodes, strict=True)] == [True, True]
    assert made[0].dt == 0.0025
    assert torch.equal(made[1]["context"][:, 0], torch.from_numpy(context[6:]))
    assert made[0].initial.boundaries[0].T.numpy() == pytest.approx(np.array(BOUNDS))
    assert made[0].initial.particle_types.tolist() == [5, 5, 5]


def test_kinematic_particles_of_deepmind_are_of_type_3(tmp_path):
    metadata(tmp_path)
    write_records(tmp_path / "a.tfrecord", [walk()], types=np.array([3, 6, 6, 3]))
    (made,) = read_deepmind(tmp_path / "a.tfrecord")
    assert made.initial.kinematic.tolist() == [True, False, False, True]


def test_written_tfrecords_are_read_by_the_independent_reader(tmp_path):
    tfrecord = pytest.importorskip("tfrecord")
    places = walk()
    write_deepmind(tmp_path / "a.tfrecord", [from_arrays(positions=places, dt=0.0025, particle_types=6)])
    kinds = {"position": "byte"}
    ((context, frames),) = tfrecord.tfrecord_loader(
        str(tmp_path / "a.tfrecord"), None, {"particle_type": "byte", "key": "int"}, sequence_description=kinds
    )
    assert np.frombuffer(context["particle_type"], "<i8").tolist() == [6, 6, 6, 6]
    assert context["key"] == [0]
    found = np.stack([np.frombuffer(f, "<f4").reshape(4, 2) for f in frames["position"]])
    assert np.array_equal(found, places)
    metadata(tmp_path)
    (again,) = read_deepmind(tmp_path / "a.tfrecord")
    assert same(again, places)


def test_any_damage_to_a_tfrecord_is_noticed(tmp_path):
    metadata(tmp_path)
    path = tmp_path / "a.tfrecord"
    write_records(path, [walk(num=2), walk(num=2)])
    whole = path.read_bytes()
    second = len(whole) // 2
    for cut in (3, 11, 12, 200, second - 1, second + 5, len(whole) - 1):
        path.write_bytes(whole[:cut])
        number, start = (0, 0) if cut < second else (1, second)
        with pytest.raises(ValueError, match=f"a.tfrecord, record {number} at byte {start}: .*ends"):
            list(read_deepmind(path))
    for place in (0, 9, 40, 300, second - 2):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="record 0 at byte 0: the (length|payload) does not match its checksum"):
            list(read_deepmind(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no record"):
        list(read_deepmind(path))
    path.write_bytes(b"\x89HDF\r\n\x1a\n" * 9)
    with pytest.raises(ValueError, match="not a TFRecord"):
        list(read_deepmind(path))


def framed(payload):
    import crc32c as other

    def masked(data):
        value = other.crc32c(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    head = struct.pack("<Q", len(payload))
    return head + masked(head) + payload + masked(payload)


@pytest.mark.parametrize("payload", [b"\x0a\xff", b"\x0a\x02\x0a\x7f", b"\xff" * 20, b"\x08\x01", b"\x0b", b"\x0a"])
def test_whole_records_that_are_no_messages_are_refused(tmp_path, payload):
    pytest.importorskip("crc32c")
    (tmp_path / "a.tfrecord").write_bytes(framed(payload))
    with pytest.raises(ValueError, match="record 0 at byte 0"):
        list(read_tfrecord(tmp_path / "a.tfrecord"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequence_length": 8}, "no multiple of the 9 frames|10 frames, where metadata.json says 9"),
        ({"sequence_length": 4}, "10 frames, where metadata.json says 5"),
        ({"sequence_length": None}, "positive sequence_length"),
        ({"dim": 3}, "says dim 3 but bounds of 2 axes"),
        ({"dim": 3, "bounds": [*BOUNDS, [0, 1]]}, "no multiple|4 particle types"),
        ({"bounds": None}, "lacks bounds"),
        ({"bounds": [[0.9, 0.1], [0, 1]]}, "a lower and an upper end"),
        ({"bounds": "wide"}, "no numbers"),
        ({"dt": None}, "positive dt; got None"),
        ({"dt": -1}, "positive dt; got -1"),
    ],
)
def test_metadata_that_disagree_are_named(tmp_path, changes, says):
    metadata(tmp_path, **changes)
    write_records(tmp_path / "a.tfrecord", [walk()])
    with pytest.raises(ValueError, match=says):
        list(read_deepmind(tmp_path / "a.tfrecord"))


def test_metadata_must_be_there_and_be_json(tmp_path):
    write_records(tmp_path / "a.tfrecord", [walk()])
    with pytest.raises(ValueError, match=r"There is no '.*metadata.json'"):
        list(read_deepmind(tmp_path / "a.tfrecord"))
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        list(read_deepmind(tmp_path / "a.tfrecord"))
    (tmp_path / "metadata.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object"):
        list(read_deepmind(tmp_path / "a.tfrecord"))


def test_types_and_sequences_of_a_record_must_fit(tmp_path):
    metadata(tmp_path)
    write_records(tmp_path / "a.tfrecord", [walk()], types=np.full(3, 5))
    with pytest.raises(ValueError, match="record 0: it has 3 particle types and positions of 4"):
        list(read_deepmind(tmp_path / "a.tfrecord"))
    write_records(tmp_path / "a.tfrecord", [NAN])
    with pytest.raises(ValueError, match="record 0: positions must be finite; particle 2 at frame 4"):
        list(read_deepmind(tmp_path / "a.tfrecord"))
    with open(tmp_path / "a.tfrecord", "wb") as file:
        file.write(framed(b""))
    with pytest.raises(ValueError, match="no sequence 'position'"):
        list(read_deepmind(tmp_path / "a.tfrecord"))


# geoelements


def row(*parts):
    made = np.empty(len(parts), dtype=object)
    made[:] = parts
    return made


def listed(*rows):
    made = np.empty(len(rows), dtype=object)
    made[:] = rows
    return made


@pytest.mark.parametrize("types", [6, np.int64(6), np.full(4, 6)])
def test_geoelements_episodes_come_bit_for_bit(tmp_path, types):
    places = [walk(), walk(14, 4, seed=1)]
    metadata(tmp_path)
    layouts = {
        "named": {"a": row(places[0], types), "b": row(places[1], types)},
        "tuples": {"gns_data": listed((places[0], types), (places[1], types))},
        "rows": {"gns_data": listed(row(places[0], types), row(places[1], types))},
        "table": {"gns_data": np.array([row(places[0], types), row(places[1], types)], dtype=object)},
    }
    for name, arrays in layouts.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        made = list(read_geoelements(tmp_path / f"{name}.npz"))
        assert [same(m, p) for m, p in zip(made, places, strict=True)] == [True, True], name
        assert made[1].initial.particle_types.tolist() == [6] * 4


def test_sections_of_metadata_and_material_properties(tmp_path):
    train = {**METADATA, "dt": 0.5}
    (tmp_path / "metadata.json").write_text(json.dumps({"train": train, "rollout": METADATA}))
    for name in ("train", "test"):
        np.savez_compressed(tmp_path / f"{name}.npz", only=row(walk(), np.full(4, 6), np.full(4, 30.0)))
    (first,), (second,) = (list(read_geoelements(tmp_path / f"{n}.npz")) for n in ("train", "test"))
    assert (first.dt, second.dt) == (0.5, 0.0025)
    assert first.initial.materials.tolist() == [[30.0]] * 4


def test_written_npz_load_as_geoelements_loads_them(tmp_path):
    places = [walk(), walk(14, 3, seed=1)]
    made = from_arrays(positions=places, dt=0.0025, materials=[np.arange(4.0), np.arange(3.0)], particle_types=6)
    made[0] = from_arrays(positions=places[0], dt=0.0025, materials=np.arange(4.0), kinematic=np.arange(4) == 1)
    write_geoelements(tmp_path / "train.npz", made)
    with np.load(tmp_path / "train.npz", allow_pickle=True) as file:
        found = [item for _, item in file.items()]
    for (positions, types, materials), own in zip(found, places, strict=True):
        assert positions.dtype == np.float32
        assert np.array_equal(positions, own)
        assert materials.tolist() == list(range(len(materials)))
        assert np.full(positions.shape[1], types, dtype=int).shape == materials.shape
    assert found[0][1].tolist() == [5, 3, 5, 5]
    assert found[1][1].tolist() == [6, 6, 6]
    metadata(tmp_path)
    again = list(read_geoelements(tmp_path / "train.npz"))
    assert all(same(m, p) for m, p in zip(again, places, strict=True))


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['SIMWORLD_EVIL']}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_code_are_refused_and_never_run(tmp_path, monkeypatch, protocol):
    trace = tmp_path / "ran"
    monkeypatch.setenv("SIMWORLD_EVIL", str(trace))
    metadata(tmp_path)
    for number, bad in enumerate((Evil(), [Evil()], row(walk(), Evil()), {"a": Evil()}, listed((walk(), 5), Evil()))):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(bad, protocol=protocol))
        with pytest.raises(ValueError, match=r"'(posix|nt)\.system' in it; nothing of it was run"):
            list(read_geoelements(path))
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("a.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
            file.write(path.read_bytes())
        with pytest.raises(ValueError, match=r"'a.npy' holds a pickle with '(posix|nt)\.system'"):
            list(read_geoelements(tmp_path / "a.npz"))
    assert not trace.exists()
    Evil().__reduce__()[0](Evil().__reduce__()[1][0])
    assert trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"c_codecs\nencode\n(V1\nVzip\ntR.",
        b"c_codecs\nencode\n}Vx\nI1\nsb.",
        b"cnumpy\ndtype\n(VV8\ntR.",
        b"cnumpy\ndtype\n(VO\ntR.",
        b"cnumpy\ndtype\n(Vf4\ntR(I3\nV<\nN(Va\ntNI-1\nI-1\nI0\ntb.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO\ntRVx\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR.",
        b"P1\n.",
        b"\x82\x01.",
        b"N",
        b"",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)
def test_hand_made_pickles_are_refused(program):
    with pytest.raises(ValueError, match=r"^here (holds a pickle|is not a)"):
        load_pickle(io.BytesIO(program), "here")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol_are_let_in(protocol):
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = {
        "rows": row((table.T, np.int64(3)), (np.asfortranarray(table), np.array([1, 2]))),
        "big": table.astype(">f8"),
        "flags": np.array([True, False]),
        "words": np.array(["ab", "c"]),
        "bytes": np.array([b"abc"]),
        "empty": np.zeros((0, 3)),
        "number": np.float32(2.5),
    }
    found = load_pickle(io.BytesIO(pickle.dumps(values, protocol=protocol)), "here")
    assert np.array_equal(found["rows"][0][0], table.T)
    assert found["rows"][0][1] == 3
    assert np.array_equal(found["rows"][1][0], table)
    for name in ("big", "flags", "words", "bytes", "empty"):
        assert np.array_equal(found[name], values[name]), name
        assert found[name].dtype.newbyteorder("=") == values[name].dtype.newbyteorder("="), name
    assert found["number"] == 2.5


def test_a_pickle_that_unfolds_without_end_is_refused():
    folded = [1]
    for _ in range(15):
        folded = [folded] * 100
    assert len(load_pickle(io.BytesIO(pickle.dumps(folded)), "here")) == 100
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="too deep"):
        load_pickle(io.BytesIO(pickle.dumps(endless)), "here")


def test_damaged_or_foreign_npz_are_refused(tmp_path):
    metadata(tmp_path)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=row(walk(), 5))
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a whole"):
            list(read_geoelements(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError, match="'a.npy' is not a whole array"):
        list(read_geoelements(path))
    for arrays, says in (
        ({}, "holds no episode"),
        ({"a": walk()}, "'a' must be positions, particle type"),
        ({"a": row(walk())}, "'a' must be positions, particle type"),
        ({"a": row(walk(), 5, 1.0, 2.0)}, "'a' must be positions, particle type"),
        ({"a": row(walk(10, 4, 3), 5)}, "positions have 3 dimensions, where metadata.json says 2"),
        ({"a": row(walk()[0], 5)}, r"\[frames, particles, dimensions\]"),
        ({"a": row(NAN, 5)}, "'a': positions must be finite"),
        ({"a": row(walk(), 5.5)}, "whole numbers"),
        ({"a": row(walk(), np.full(3, 5))}, r"particle_types must have shape \[4\]"),
        ({"a": row(walk(), 5, np.zeros(3))}, "'a': "),
        ({"a": row("here", 5)}, "'a': positions must be real numbers"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=says):
            list(read_geoelements(path))


def test_a_rollout_of_geoelements_gives_the_truth(tmp_path):
    places = walk()
    saved = {
        "initial_positions": places[:6],
        "predicted_rollout": places[6:] + 1,
        "ground_truth_rollout": places[6:],
        "particle_types": np.full(4, 6),
        "loss": np.float32(0.5),
        "metadata": METADATA,
    }
    metadata(tmp_path)
    (tmp_path / "rollout_ex0.pkl").write_bytes(pickle.dumps(saved))
    (made,) = read_geoelements(tmp_path / "rollout_ex0.pkl")
    assert same(made, places)
    (tmp_path / "rollout_ex0.pkl").write_bytes(pickle.dumps({**saved, "particle_types": None}))
    with pytest.raises(ValueError, match="must hold the arrays initial_positions"):
        list(read_geoelements(tmp_path / "rollout_ex0.pkl"))


# LagrangeBench


def write_bench(path, episodes, types):
    import h5py

    with h5py.File(path, "w") as file:
        for k, places in enumerate(episodes):
            file[f"{k:05d}/position"] = places
            file[f"{k:05d}/particle_type"] = np.asarray(types, dtype=np.int32)


def test_lagrangebench_episodes_come_bit_for_bit(tmp_path):
    places = walk(num=6)
    metadata(tmp_path, write_every=10, dt=0.01, periodic_boundary_conditions=[True, False])
    write_bench(tmp_path / "train.h5", [places, places[:9]], [0, 1, 2, 3, -1, 0])
    first, second = read_lagrangebench(tmp_path / "train.h5")
    kept = places[:, [0, 1, 2, 3, 5]]
    assert same(first, kept)
    assert same(second, kept[:9])
    assert first.dt == pytest.approx(0.1)
    assert first.initial.particle_types.tolist() == [5, 3, 2, 0, 5]
    assert first.initial.kinematic.tolist() == [False, True, True, False, False]
    assert first.initial.periodic.tolist() == [[True, False]]


def test_lagrangebench_files_go_and_come_back(tmp_path):
    import h5py

    places = walk(num=4)
    places[:, 1] = places[0, 1]
    metadata(tmp_path, periodic_boundary_conditions=[True, True])
    write_bench(tmp_path / "a.h5", [places], [0, 1, 2, 3])
    write_lagrangebench(tmp_path / "b.h5", read_lagrangebench(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "b.h5") as file:
        assert list(file) == ["00000"]
        assert np.array_equal(file["00000/position"][()], places)
        assert file["00000/position"].dtype == np.float32
        assert file["00000/particle_type"][()].tolist() == [0, 1, 2, 3]
    plain = from_arrays(positions=[places, places[:9]], dt=0.1)
    write_lagrangebench(tmp_path / "c.h5", plain[:1])
    with pytest.raises(ValueError, match="9 frames and the first 10"):
        write_lagrangebench(tmp_path / "c.h5", plain)


def test_damaged_lagrangebench_files_are_refused(tmp_path):
    metadata(tmp_path)
    path = tmp_path / "a.h5"
    for places, types, says in (
        (walk(), [0, 0, 0], r"position must be \[frames, n, 2\] and particle_type \[n\]"),
        (walk(10, 4, 3), [0] * 4, r"got \[10, 4, 3\]"),
        (walk(), [0, 0, 7, 0], "particle_type must be from -1 to 3; got 7"),
        (walk(5), [0] * 4, "have 5 frames"),
        (NAN, [0] * 4, "episode 00000: positions must be finite"),
        (walk(), [-1] * 4, "none of them 0"),
    ):
        write_bench(path, [places], types)
        with pytest.raises(ValueError, match=says):
            list(read_lagrangebench(path))
    write_bench(path, [walk()], [0] * 4)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is not a whole HDF5 file"):
        list(read_lagrangebench(path))
    write_bench(path, [], [])
    with pytest.raises(ValueError, match="holds no episode"):
        list(read_lagrangebench(path))
    import h5py

    with h5py.File(path, "w") as file:
        file["00000/position"] = walk()
    with pytest.raises(ValueError, match="episode 00000: it lacks 'particle_type'"):
        list(read_lagrangebench(path))
    metadata(tmp_path, periodic_boundary_conditions=[True])
    with pytest.raises(ValueError, match="true or false for each of 2 axes"):
        list(read_lagrangebench(path))


# What peers train with


def test_statistics_are_those_of_steps_of_free_particles():
    places = walk(40, 6)
    made = from_arrays(positions=places, dt=0.5, boundaries=np.array(BOUNDS).T, kinematic=np.arange(6) == 2)
    said = peer_metadata([made], connectivity_radius=0.1)
    free = np.delete(places, 2, axis=1).astype(np.float64)
    moves = np.diff(free, axis=0)
    assert said["vel_mean"] == pytest.approx(moves.mean((0, 1)).tolist())
    assert said["vel_std"] == pytest.approx(moves.std((0, 1)).tolist())
    assert said["acc_std"] == pytest.approx(np.diff(moves, axis=0).std((0, 1)).tolist())
    assert (said["sequence_length"], said["num_particles_max"], said["dim"]) == (39, 6, 2)
    assert np.array(said["bounds"]) == pytest.approx(np.array(BOUNDS))
    with pytest.raises(ValueError, match="positive number of metres"):
        peer_metadata([made], connectivity_radius=0)
    with pytest.raises(ValueError, match="boundaries"):
        peer_metadata([from_arrays(positions=places, dt=0.5)], connectivity_radius=1.0)
    with pytest.raises(ValueError, match="no trajectory"):
        peer_metadata([], connectivity_radius=1.0)


def test_particles_that_come_or_go_cannot_be_exported(tmp_path):
    made = from_arrays(positions=walk(), dt=0.5)
    gone = made.active.clone()
    gone[-1, 0] = False
    cut = type(made)(initial=made.initial, frames=made.frames, active=gone, dt=made.dt)
    for write in (write_geoelements, write_lagrangebench, write_deepmind):
        with pytest.raises(ValueError, match="all active throughout"):
            write(tmp_path / "a", [cut])


def test_periodic_axes_go_to_lagrangebench_only(tmp_path):
    made = from_arrays(positions=walk(), dt=0.5, boundaries=np.array(BOUNDS).T, periodic=[False, True])
    for write in (write_geoelements, write_deepmind):
        with pytest.raises(ValueError, match="use the lagrangebench format"):
            write(tmp_path / "a", [made])
    assert peer_metadata([made], connectivity_radius=0.1)["periodic_boundary_conditions"] == [False, True]


@pytest.mark.parametrize(("dim", "inputs"), [(2, 30), (3, 37)])
def test_metadata_count_the_inputs_that_a_material_adds(dim, inputs):
    box = np.stack([np.zeros(dim), np.ones(dim)])
    made = from_arrays(positions=walk(dim=dim), dt=0.5, boundaries=box, materials=np.ones(4))
    said = peer_metadata([made], connectivity_radius=0.1)
    assert (said["nnode_in"], said["nedge_in"]) == (inputs + 1, dim + 1)


# VTK


def test_meshio_reads_what_is_written_for_paraview(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meshio = pytest.importorskip("meshio")
    places = walk()
    made = from_arrays(positions=places, dt=0.25, particle_types=6, context=np.zeros((10, 2)), gravity=[0.0, -9.8])
    active = made.active.clone()
    active[3, 1] = False
    made = type(made)(initial=made.initial, frames=made.frames, active=active, dt=made.dt)
    collection, *frames = write_vtk(tmp_path / "water.pvd", made, every=3)
    assert [f.name for f in frames] == ["frame_000000.vtu", "frame_000003.vtu"]
    text = collection.read_text()
    assert 'timestep="0.75" file="water/frame_000003.vtu"' in text
    assert ">m/s</InformationKey>" in frames[0].read_text()
    for index, file, rows in ((0, frames[0], [0, 1, 2, 3]), (3, frames[1], [0, 2, 3])):
        found = meshio.read(file)
        assert found.points.dtype == np.float32
        assert np.array_equal(found.points[:, :2], places[6 + index][rows])
        assert not found.points[:, 2].any()
        assert np.array_equal(found.point_data["velocities"][:, :2], made.frame(index).velocities.numpy()[rows])
        assert found.point_data["ids"].tolist() == rows
        assert found.point_data["particle_types"].tolist() == [6] * len(rows)
        assert found.point_data["history"].shape == (len(rows), 10)
        assert found.cells_dict["vertex"].tolist() == [[k] for k in range(len(rows))]


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_series_of_points_comes_back_as_it_went(tmp_path, history, dim):
    pytest.importorskip("meshio")
    made = from_arrays(
        positions=walk(dim=dim),
        dt=0.25,
        history=history,
        particle_types=[5, 3, 6, 6],
        masses=np.arange(1.0, 5.0),
        materials=np.arange(8.0).reshape(4, 2),
        boundaries=[[0.0] * dim, [1.0] * dim],
        periodic=[True] + [False] * (dim - 1),
        gravity=[0.0, -9.8, 0.0][:dim],
        context=np.arange(10.0)[:, None],
    )
    write_vtk(tmp_path / "water.pvd", made)
    (again,) = read_vtk(tmp_path / "water.pvd", history=0)
    assert isinstance(again.initial, ParticleState)
    assert again.initial.fields == made.initial.fields
    assert again.initial.identical(made.initial)
    assert set(again.frames) == set(made.frames)
    assert all(torch.equal(again[name], made[name]) for name in made.frames)
    assert (again.dt, len(again)) == (0.25, len(made))
    if not history:
        (late,) = read_vtk(tmp_path / "water.pvd", history=2)
        assert torch.equal(late.initial.history, made["velocities"][:2].transpose(0, 1))
        assert torch.equal(late["positions"], made["positions"][2:])


def test_points_that_come_and_go_are_known_by_their_ids(tmp_path, call):
    pytest.importorskip("meshio")
    made = from_arrays(positions=walk(), dt=0.25, history=0, particle_types=[5, 6, 7, 5])
    active = made.active.clone()
    active[3:6, 1] = active[:2, 2] = False
    made = type(made)(initial=made.initial, frames=made.frames, active=active, dt=made.dt)
    write_trajectories(tmp_path / "a.h5", [made, made], dataset="walks")
    assert call("export", "vtk", tmp_path / "a.h5", "--out", tmp_path / "vtk")[0] == 0
    code, said = call("import", "vtk", tmp_path / "vtk", "--out", tmp_path / "back", "--history", 0)
    assert code == 0, said
    with open_trajectories(tmp_path / "back/vtk.h5") as data:
        assert len(data) == 2
        again = data[1]
    assert torch.equal(again.active, active)
    assert again.initial.particle_types.tolist() == [5, 6, 7, 5]
    for name in ("positions", "velocities"):
        assert torch.equal(again[name][active], made[name][active])
        assert torch.equal(again[name][3:6, 1], made[name][2, 1].expand(3, 2))
        assert torch.equal(again[name][:2, 2], made[name][2, 2].expand(2, 2))


def test_what_was_predicted_to_leave_the_box_comes_back(tmp_path):
    pytest.importorskip("meshio")
    made = boxed(history=0)
    frames = {**made.frames, "positions": made["positions"] + 3}
    write_vtk(tmp_path / "a.pvd", type(made)(initial=made.initial, frames=frames, active=made.active, dt=made.dt))
    (again,) = read_vtk(tmp_path / "a.pvd", history=0)
    assert torch.equal(again["positions"], made["positions"] + 3)


def points(folder, suffix, places, **data):
    """Write numbered files of points by meshio's own writers."""
    meshio = pytest.importorskip("meshio")
    folder.mkdir()
    for number, rows in enumerate(places):
        own = {name: value[number] for name, value in data.items()}
        cells = [("vertex", np.arange(len(rows))[:, None])]
        meshio.Mesh(rows, cells, point_data=own).write(folder / f"frame_{number}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".vtu", ".vtk"])
def test_series_of_points_by_other_writers(tmp_path, suffix):
    places = walk(dim=3).astype(np.float64)
    (made,) = read_vtk(points(tmp_path / "plain", suffix, places), dt=0.5, history=1)
    assert made.initial.identical(from_arrays(positions=places, dt=0.5, history=1).initial)
    assert torch.equal(made["velocities"], from_arrays(positions=places, dt=0.5, history=1)["velocities"])
    speeds, heat = np.full_like(places, 3.0), np.arange(40.0).reshape(10, 4)
    folder = points(tmp_path / "fast", suffix, places, U=speeds, heat=heat)
    (made,) = read_vtk(folder, dt=0.5, history=1, names={"U": "velocities"}, units={"heat": "K"})
    assert torch.equal(made["velocities"], torch.from_numpy(speeds[1:]))
    assert torch.equal(made["heat"], torch.from_numpy(heat[1:]))
    assert made.initial.fields["heat"].unit == "K"
    places[..., 2] = 0
    (made,) = read_vtk(points(tmp_path / "flat", suffix, places), dt=0.5, history=1)
    assert made["positions"].shape == (8, 4, 2)


def test_series_of_points_that_are_refused(tmp_path):
    places = walk(dim=3)
    for name, rows, data, says in (
        ("count", [*places[:9], places[9, :3]], {}, "no point data 'ids' says which"),
        ("twice", places, {"ids": np.zeros((10, 4), int)}, "ids that are there twice"),
        ("short", places[:3], {}, "positions have 3 frames"),
        ("masses", places, {"masses": np.arange(1.0, 41.0).reshape(10, 4)}, "masses change in frame 1"),
        ("types", places, {"particle_types": np.full((10, 4), -1)}, "0 or more"),
        ("unknown", places, {"heat": np.zeros((10, 4))}, "'heat' has no unit and is no field of ParticleState"),
        ("past", places, {"history": np.zeros((10, 4, 3))}, "no velocities"),
    ):
        with pytest.raises(ValueError, match=says):
            list(read_vtk(points(tmp_path / name, ".vtu", rows, **data), dt=0.5))
    import meshio

    for number in range(2):
        triangle = meshio.Mesh(places[number], [("triangle", np.array([[0, 1, 2]]))])
        (tmp_path / "mesh").mkdir(exist_ok=True)
        triangle.write(tmp_path / f"mesh/frame_{number}.vtu")
    with pytest.raises(ValueError, match="cells of the kind triangle, a mesh; import it by the format meshio"):
        list(read_vtk(tmp_path / "mesh", dt=0.5))


def test_a_series_needs_one_scene_and_a_name(tmp_path):
    made = from_arrays(positions=walk(), dt=0.25)
    with pytest.raises(ValueError, match=r"ends in \.pvd"):
        write_vtk(tmp_path / "water.vtk", made)
    with pytest.raises(ValueError, match="2 scenes"):
        write_vtk(tmp_path / "water.pvd", type(made).cat([made, made]))


# The command line


@pytest.fixture
def call(monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["simworld", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, " ".join(capfd.readouterr()[1].split())

    return run


def test_through_all_formats_and_back(tmp_path, call):
    places = [walk(), walk(seed=1)]
    metadata(tmp_path, dx=0.01)
    source = tmp_path / "given"
    source.mkdir()
    (tmp_path / "metadata.json").rename(source / "metadata.json")
    np.savez(source / "train.npz", a=row(places[0], 6), b=row(places[1], 6))
    np.savez(source / "test.npz", a=row(places[1], 6))
    own = ("geoelements", source)
    for form in ("lagrangebench", "deepmind", "geoelements"):
        code, said = call("import", *own, "--out", tmp_path / f"to_{form}")
        assert code == 0, said
        code, said = call("export", form, tmp_path / f"to_{form}", "--out", tmp_path / form)
        assert code == 0, said
        told = json.loads((tmp_path / form / "metadata.json").read_text())
        assert (told["default_connectivity_radius"], told["dx"], told["num_trajs_train"]) == (0.015, 0.01, 2)
        own = (form, tmp_path / form)
    with np.load(tmp_path / "geoelements/train.npz", allow_pickle=True) as file:
        found = [item for _, item in file.items()]
    assert all(np.array_equal(a[0], b) for a, b in zip(found, places, strict=True))
    with open_trajectories(tmp_path / "to_lagrangebench/train.h5") as data:
        assert data.dataset == "given"
        assert json.loads(data.recipe)["dx"] == 0.01
    code, said = call("export", "vtk", tmp_path / "to_deepmind/test.h5", "--out", tmp_path / "vtk", "--every", 2)
    assert code == 0, said
    assert len(list((tmp_path / "vtk/test_000000").glob("*.vtu"))) == 2


def test_what_cannot_be_imported_or_exported_is_said_in_a_sentence(tmp_path, call):
    metadata(tmp_path)
    np.savez(tmp_path / "train.npz", a=row(walk(), 6))
    write_bench(tmp_path / "valid.h5", [walk()], [0] * 4)
    plain = from_arrays(positions=walk(), dt=0.1)
    write_trajectories(tmp_path / "own/train.h5", [plain], dataset="walks")
    (tmp_path / "none").mkdir()
    for words, says in (
        (("import", "exodus", tmp_path, "--out", tmp_path), "no reader of the format 'exodus'"),
        (("import", "xdmf", tmp_path, "--out", tmp_path), "no reader of the format 'xdmf'"),
        (("import", "geoelements", tmp_path / "gone", "--out", tmp_path), "no file or folder"),
        (("import", "geoelements", tmp_path / "none", "--out", tmp_path), "must hold files *.npz or *.pkl; got none"),
        (("import", "lagrangebench", tmp_path, "--out", tmp_path), "write over the recording"),
        (("import", "geoelements", tmp_path, "--out", tmp_path / "x", "--history", 9), "have 10 frames"),
        (("export", "dpinet", tmp_path / "own", "--out", tmp_path), "no writer of the format 'dpinet'"),
        (("export", "geoelements", tmp_path / "own", "--out", tmp_path), "give it by --radius"),
        (("export", "geoelements", tmp_path / "own", "--out", tmp_path, "--radius", 1), "give the trajectories bound"),
        (("export", "lagrangebench", tmp_path / "valid.h5", "--out", tmp_path, "--radius", 1), "import it first"),
        (("export", "vtk", tmp_path / "own", "--out", tmp_path / "y", "--radius", 1), "holds no --radius"),
        (("export", "deepmind", tmp_path / "own", "--out", tmp_path / "y", "--every", 2), "leave --every out"),
    ):
        code, said = call(*words)
        assert code == 2, words
        assert says in said
        assert "Traceback" not in said
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def boxed(frames=10, num=4, box=BOUNDS, **said):
    return from_arrays(positions=walk(frames, num), boundaries=np.array(box).T, **{"dt": 0.0025, **said})


def stored(folder, **files):
    for name, trajectories in files.items():
        write_trajectories(folder / f"{name}.h5", trajectories, dataset="walks")
    return folder


@pytest.mark.parametrize("form", ["geoelements", "lagrangebench", "deepmind"])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"dt": 0.5}, "another dt than the first: 0.5 where it is 0.0025"),
        ({"box": [[0, 1], [0, 1]]}, "another box than the first"),
        ({"materials": np.ones(4)}, "another nnode_in"),
    ],
)
def test_files_that_one_metadata_cannot_describe_are_not_exported(tmp_path, form, other, says):
    stored(tmp_path / "own", train=[boxed()], test=[boxed(**other)])
    with pytest.raises(ValueError, match=f"test.h5: it has {says}"):
        export_data(form, tmp_path / "own", tmp_path / "deep/out", connectivity_radius=0.1, spacing=0.1)
    assert not (tmp_path / "deep").exists()


def test_metadata_hold_for_all_files(tmp_path):
    import h5py

    stored(tmp_path / "own", train=[boxed(), boxed()], test=[boxed(12, 30)])
    said = {"connectivity_radius": 0.1, "spacing": 0.1}
    for form, length in (("geoelements", None), ("lagrangebench", 9)):
        export_data(form, tmp_path / "own", tmp_path / form, **said)
        told = json.loads((tmp_path / form / "metadata.json").read_text())
        assert (told["num_particles_max"], told["sequence_length"], told["num_trajs_test"]) == (30, length, 1)
        assert told.get("write_every") == (1 if form == "lagrangebench" else None)
        assert len(list((tmp_path / form).iterdir())) == 3
    with h5py.File(tmp_path / "lagrangebench/test.h5") as file:
        assert file["00000/position"].shape == (12, 30, 2)
    (again,) = read_geoelements(tmp_path / "geoelements/test.npz")
    assert len(again) == 6
    with pytest.raises(ValueError, match=r"test.h5: its episodes have 12 frames and those of .*train.h5 10"):
        export_data("deepmind", tmp_path / "own", tmp_path / "dm", **said)
    assert not (tmp_path / "dm").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path):
    stored(tmp_path / "own", a=[boxed()], b=[boxed(), boxed(12)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tfrecord").write_bytes(b"as it was")
    with pytest.raises(ValueError, match=r"b.h5: Trajectory 1 has another length"):
        export_data("deepmind", tmp_path / "own", tmp_path / "out", connectivity_radius=0.1)
    assert [file.read_bytes() for file in (tmp_path / "out").iterdir()] == [b"as it was"]
    slots = SlotState(slots=torch.zeros(2, 3))
    there = torch.ones(2, 2, dtype=torch.bool)
    stored(
        tmp_path / "own",
        b=[Trajectory(initial=slots, frames={"slots": torch.zeros(2, 2, 3)}, active=there, dt=1.0)],
    )
    with pytest.raises(ValueError, match=r"b.h5: .*SlotState"):
        export_data("vtk", tmp_path / "own", tmp_path / "vtk")
    assert not (tmp_path / "vtk").exists()


def test_a_shorter_export_leaves_no_frames_of_a_longer_one(tmp_path):
    for every, count in ((1, 4), (2, 2)):
        stored(tmp_path, a=[boxed()])
        (collection,) = export_data("vtk", tmp_path / "a.h5", tmp_path / "vtk", every=every)
        assert sorted(file.name for file in (tmp_path / "vtk").iterdir()) == ["a_000000", "a_000000.pvd"]
        assert len(list(collection.with_suffix("").iterdir())) == count


def test_an_import_that_fails_leaves_nothing(tmp_path):
    metadata(tmp_path)
    np.savez(tmp_path / "a.npz", a=row(walk(), 6))
    np.savez(tmp_path / "b.npz", a=row(NAN, 6))
    with pytest.raises(ValueError, match="b.npz, 'a': positions must be finite"):
        import_data("geoelements", tmp_path, tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("write", [write_geoelements, write_lagrangebench, write_deepmind])
def test_writers_that_fail_leave_what_was_there(tmp_path, write):
    path = tmp_path / "a"
    path.write_bytes(b"as it was")
    broken = MeshState(rest_positions=torch.zeros(3, 2), cells=torch.tensor([[0, 1, 2]]))
    wrong = type(boxed())(initial=broken, frames={}, active=torch.ones(1, 3, dtype=torch.bool), dt=1.0)
    for trajectories, says in (
        ([], "There is no trajectory to write"),
        ([boxed(), wrong], "got MeshState|of MeshState"),
    ):
        with pytest.raises(ValueError, match=says):
            write(path, trajectories)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"as it was"]
    with pytest.raises(TypeError, match=r"put the trajectory in a list, \[trajectory\]"):
        write(path, boxed())


def test_what_a_format_has_no_place_for_is_told(tmp_path):
    rich = {"gravity": [0.0, -9.8], "context": np.zeros((10, 1)), "materials": np.ones(4), "masses": np.ones(4)}
    stored(tmp_path, train=[boxed(actions=np.zeros((9, 4, 1)), **rich)])
    for form, lost in (
        ("deepmind", "masses, materials, gravity, actions"),
        ("geoelements", "masses, gravity, context, actions"),
        ("lagrangebench", "masses, materials, gravity, context, actions"),
    ):
        with pytest.warns(UserWarning, match=f"'{form}' holds no {lost}; left out"):
            export_data(form, tmp_path, tmp_path / form, connectivity_radius=0.1, spacing=0.1)


def test_a_lagrangebench_without_spacing_is_told(tmp_path):
    stored(tmp_path, train=[boxed()])
    with pytest.warns(UserWarning, match=r"no dx, .* e_kin; give it by --spacing"):
        export_data("lagrangebench", tmp_path, tmp_path / "out", connectivity_radius=0.1)


def test_faults_of_single_episodes_are_told(tmp_path):
    import h5py

    made = boxed()
    gone = made.active.clone()
    gone[2, 1] = False
    cut = type(made)(initial=made.initial, frames=made.frames, active=gone, dt=made.dt)
    stored(tmp_path / "own", train=[made, cut])
    with pytest.raises(ValueError, match=r"train.h5: Trajectory 1: .*particle 1 is not in frame 2\. Leave out"):
        export_data("lagrangebench", tmp_path / "own", tmp_path / "out", connectivity_radius=0.1)
    metadata(tmp_path)
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["position"] = walk()
    with pytest.raises(ValueError, match="episode position: it is an array; an episode is a group"):
        list(read_lagrangebench(tmp_path / "flat.h5"))
    np.savez(tmp_path / "a.npz", a=row(walk(), 5, np.ones(7)))
    with pytest.raises(ValueError, match=r"'a': materials must have shape \[4, 1\] for 4 particles; got \[7, 1\]"):
        list(read_geoelements(tmp_path / "a.npz"))
    for read in (read_deepmind, read_geoelements, read_dpinet):
        for path in (tmp_path, tmp_path / "gone.npz"):
            with pytest.raises(ValueError, match=f"There is no file '{path}'; give one that is there"):
                list(read(path))
    (tmp_path / "metadata.json").write_bytes(b"\xff\xfe{}")
    for form in ("deepmind", "geoelements"):
        write_records(tmp_path / "a.tfrecord", [walk()])
        with pytest.raises(ValueError, match="metadata.json is not text"):
            import_data(form, tmp_path, tmp_path / "out")


# Recorded data


def test_recorded_lagrangebench_data(data, tmp_path):
    """Its published statistics are means over two files, train and valid: variances added and halved."""
    import h5py

    folder = data("lagrangebench_lj3/train.h5").parent
    said = json.loads((folder / "metadata.json").read_text())
    variances = []
    for split in ("train", "valid"):
        with h5py.File(folder / f"{split}.h5") as file:
            places = file["00000/position"][()]
        (made,) = read_lagrangebench(folder / f"{split}.h5")
        assert same(made, places)
        assert isinstance(made.initial, ParticleState)
        found = step_statistics([displacements(recorded_positions(made), np.full(3, 5.0))])
        variances.append([np.square(found[k]) for k in ("vel_std", "acc_std")])
    vel, acc = np.sqrt(np.mean(variances, axis=0))
    assert vel == pytest.approx(np.array(said["vel_std"]), rel=1e-3)
    assert acc == pytest.approx(np.array(said["acc_std"]), rel=1e-3)
    import_data("lagrangebench", folder, tmp_path / "in")
    export_data("lagrangebench", tmp_path / "in", tmp_path / "out")
    for split in ("train", "valid", "test"):
        with h5py.File(folder / f"{split}.h5") as old, h5py.File(tmp_path / f"out/{split}.h5") as new:
            assert np.array_equal(old["00000/position"][()], new["00000/position"][()])
            assert np.array_equal(old["00000/particle_type"][()], new["00000/particle_type"][()])


def test_recorded_flex_data(data):
    """Its velocities are differences of positions, and 64 of the particles of BoxBath are a box."""
    for name, rigid in (("FluidFall", 0), ("BoxBath", 64)):
        path = data(f"dpinet_flex/{name}_valid.npz")
        with np.load(path) as file:
            places, speeds = file["positions"], file["velocities"]
        made = list(read_dpinet(path, history=2))
        assert len(made) == 5
        assert (made[0].initial.particle_types == 0).sum() == rigid
        assert not made[0].initial.particle_types[:rigid].any()
        for own, rows, fast in zip(made, places, speeds, strict=True):
            same(own, rows, history=2)
            assert np.abs(own["velocities"].numpy() - fast[3:]).max() < 2e-4


def test_recorded_flume(data):
    path = data("flume_gns/flume_ex0.npz")
    (made,) = read_geoelements(path)
    with np.load(path) as file:
        assert same(made, file["positions"])
    assert made.initial.particle_types.unique().tolist() == [5]


def test_dpinet_recordings_of_other_shapes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    places = np.stack([walk(dim=3)] * 2)
    for arrays, says in (
        ({"positions": places}, "no array 'velocities'"),
        ({"positions": places, "velocities": places[:, 1:]}, r"got \[2, 10, 4, 3\] and \[2, 9, 4, 3\]"),
        ({"positions": places[0], "velocities": places[0]}, r"\[e, T, n, 3\]"),
        ({"positions": places, "velocities": places, "clusters": np.zeros((2, 10, 1, 9))}, "4 particles at most"),
        ({"positions": places * np.nan, "velocities": places}, "episode 0: positions must be finite"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=says):
            list(read_dpinet(path))


def test_velocities_that_are_not_those_of_the_positions_are_told(tmp_path):
    places = np.stack([walk(dim=3)] * 2)
    speeds = np.diff(places, axis=1, prepend=places[:, :1]) * 60
    speeds[1] += 9
    np.savez(tmp_path / "a.npz", positions=places, velocities=speeds)
    with pytest.warns(UserWarning, match="episode 1: recorded velocities are not those that its positions have"):
        assert len(list(read_dpinet(tmp_path / "a.npz"))) == 2


def test_metadata_are_written_as_they_are_read(tmp_path):
    made = from_arrays(positions=walk(), dt=0.0025, boundaries=np.array(BOUNDS).T)
    write_metadata(tmp_path / "metadata.json", peer_metadata([made], connectivity_radius=0.015))
    write_deepmind(tmp_path / "train.tfrecord", [made])
    (again,) = read_deepmind(tmp_path / "train.tfrecord")
    assert again.frame(-1).boundaries.equal(made.frame(-1).boundaries)
    assert again.dt == made.dt


def test_particles_far_outside_the_box_are_refused():
    places = np.full((4, 3, 2), 0.5, np.float32)
    places[2, 1] = (0.5, 4.5)
    box = {"boundaries": [[0.1, 0.1], [0.9, 0.9]], "history": 1, "dt": 0.1}
    with pytest.raises(ValueError, match=r"Particle 1 is at \[0.5, 4.5\] in frame 2, outside the box"):
        from_arrays(positions=places, **box)
    from_arrays(positions=places, kinematic=[False, True, False], **box)  # part of a wall, perhaps
    from_arrays(positions=places, periodic=[False, True], **box)
    from_arrays(positions=np.clip(places, 0.05, 0.95), **box)  # into a soft wall


def test_recorded_positions_are_brought_into_a_periodic_box():
    drift = np.linspace(0, 3, 20, dtype=np.float32)[:, None, None] + np.zeros((1, 5, 2), np.float32)
    path = from_arrays(positions=drift, dt=0.1, history=2, boundaries=[[0, 0], [1, 3]], periodic=[True, False])
    assert float(path["positions"][..., 0].max()) < 1
    assert float(path["positions"][..., 1].max()) == 3
    assert torch.allclose(path["velocities"], torch.full((17, 5, 2), 3 / 19 / 0.1))


def test_who_appears_among_points_is_there_once_its_velocity_is_known(tmp_path):
    places = np.zeros((8, 4, 3))
    places[:, :, 0] = np.arange(4) + np.arange(8)[:, None] * 0.5
    folder = tmp_path / "come"
    folder.mkdir()
    meshio = pytest.importorskip("meshio")
    for number, rows in enumerate(places):
        there = np.arange(3 if number < 4 else 4)
        cells = [("vertex", there[:, None])]
        meshio.Mesh(rows[there], cells, point_data={"ids": there}).write(folder / f"frame_{number}.vtu")
    (made,) = read_vtk(folder, dt=0.5, history=1)
    speeds = made["velocities"][made.active]
    assert torch.equal(speeds, torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(speeds))
    assert made.active[:, 3].tolist() == [False] * 3 + [True] * 3


def test_places_are_in_the_length_of_velocities(tmp_path):
    places = walk(dim=3).astype(np.float64)
    folder = points(tmp_path / "small", ".vtu", places, velocities=places)
    (made,) = read_vtk(folder, dt=0.5, history=1, units={"velocities": "nm/s"})
    assert made.initial.fields["positions"].unit == "nm"
    (made,) = read_vtk(folder, dt=0.5, history=1, units={"velocities": "nm/s", "positions": "m"})
    assert made.initial.fields["positions"].unit == "m"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"gravity": [9.81]}, "'gravity' must be 3 numbers; got 1"),
        ({"gravity": [0.0, -9.81]}, "'gravity' must be 3 numbers; got 2"),
        ({"boundaries": [0.0, 1.0, 2.0, 3.0, 4.0]}, "'boundaries' must be 6 numbers; got 5"),
    ],
)
def test_field_data_of_another_space_is_refused(monkeypatch, tmp_path, data, says):
    meshio = pytest.importorskip("meshio")
    own = {name: np.array(value) for name, value in data.items()}
    meshes = [meshio.Mesh(rows, [], field_data=own) for rows in walk(dim=3).astype(np.float64)]
    monkeypatch.setattr(vtk_points, "read_series", lambda path, dt: (meshes, dt))  # meshio writes no field data
    with pytest.raises(ValueError, match=says):
        list(read_vtk(tmp_path, dt=0.5, history=1))
    for number, mesh in enumerate(meshes):
        mesh.field_data = {"context": np.zeros(2)} if number else {}
    with pytest.raises(ValueError, match="9 of 10 frames have a context"):
        list(read_vtk(tmp_path, dt=0.5, history=1))
