from __future__ import annotations

import numpy as np
import pytest
import torch

from simworld import open_trajectories
from simworld.data import import_data, read_tignn


def flow(**changes):
    """A file of three short simulations of five nodes in a row, as ThermodynamicsGNN keeps Couette flows."""
    rng = np.random.default_rng(0)
    ends = np.array([[0, 1, 1, 2, 2, 3, 3, 4], [1, 0, 2, 1, 3, 2, 4, 3]])
    types = np.eye(2, dtype="float32")[[1, 0, 0, 0, 1]]
    given = {
        "states": rng.random((3, 4, 5, 5), dtype="float32"),
        "edge_index": ends,
        "node_type_onehot": types,
        "g": rng.random((3, 2), dtype="float32"),
    }
    return {k: v for k, v in {**given, **changes}.items() if v is not None}


def test_a_couette_flow_is_read(tmp_path):
    given = flow()
    np.savez(tmp_path / "couette.npz", **given)
    paths = list(read_tignn(tmp_path / "couette.npz"))
    assert len(paths) == 3
    path, states = paths[1], torch.from_numpy(given["states"])[1]
    assert path.dt == 1 / 150
    assert torch.equal(path["positions"], states[..., :2])
    assert torch.equal(path["velocities"][..., 0], states[..., 2])
    assert not path["velocities"][..., 1].any()
    assert torch.equal(path["energies"], states[..., 3])
    assert torch.equal(path["stresses"], states[..., 4:])
    assert torch.equal(path.initial.parameters[0], torch.from_numpy(given["g"])[1])
    assert path.initial.cells.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert path.initial.kinematic.tolist() == [True, False, False, False, True]


def test_a_beam_is_read_with_its_forces(tmp_path):
    rng = np.random.default_rng(0)
    states, forces = rng.random((3, 4, 5, 12), dtype="float32"), rng.random((3, 3, 5, 3), dtype="float32")
    np.savez(tmp_path / "beam.npz", **flow(states=states, f=forces, g=None))
    path = list(read_tignn(tmp_path / "beam.npz"))[2]
    for name, part in (("positions", slice(0, 3)), ("velocities", slice(3, 6)), ("stresses", slice(6, 12))):
        assert torch.equal(path[name], torch.from_numpy(states[2, ..., part]))
    assert torch.equal(path.actions, torch.from_numpy(forces[2]))
    assert path.dt == 1 / 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"states": None}, "no array 'states'"),
        ({"states": np.zeros((3, 4, 5, 7))}, r"5 or 12\] of a simulation and two frames or more"),
        ({"g": None}, r"must hold g \[3, 2\] beside its states; got none"),
        ({"g": np.zeros((2, 2))}, r"got \[2, 2\]"),
        ({"edge_index": np.array([[0], [7]])}, "of nodes 0 to 4"),
        ({"edge_index": np.zeros((2, 0), int)}, "of nodes 0 to 4"),
        ({"edge_index": np.array([[0.5], [1.0]])}, "whole numbers"),
        ({"edge_index": np.array([[1], [1]])}, "of two of nodes"),
        ({"states": np.float32(1)}, "must hold states"),
        ({"node_type_onehot": np.zeros((4, 2))}, r"node_type_onehot \[5, 2\]"),
        ({"states": np.full((3, 4, 5, 5), np.nan)}, "must be finite"),
    ],
)
def test_files_that_are_refused(tmp_path, changes, says):
    np.savez(tmp_path / "broken.npz", **flow(**changes))
    with pytest.raises(ValueError, match=says):
        list(read_tignn(tmp_path / "broken.npz"))


def test_some_episodes_are_held_out(tmp_path):
    np.savez(tmp_path / "couette.npz", **flow())
    wanted = list(read_tignn(tmp_path / "couette.npz"))
    made = import_data("tignn", tmp_path / "couette.npz", tmp_path / "out", held_out=2)
    assert [path.name for path in made] == ["train.h5", "valid.h5"]
    for path, numbers in zip(made, ([0, 2], [1]), strict=True):
        with open_trajectories(path) as found:
            assert len(found) == len(numbers)
            for episode, number in zip(found, numbers, strict=True):
                assert torch.equal(episode["energies"], wanted[number]["energies"])
                assert episode.initial.fields["energies"].unit == "1"
    with pytest.raises(ValueError, match="too few to hold each 5-th out"):
        import_data("tignn", tmp_path / "couette.npz", tmp_path / "none", held_out=5)
