from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch

from simworld import Field, ObjectState, Trajectory, open_trajectories, write_trajectories
from simworld.data import read_propnet_rope
from simworld.render.filming import View


@pytest.fixture
def path(tmp_path, episodes):
    path = tmp_path / "train.h5"
    write_trajectories(path, episodes, dataset="rope", seed=3, recipe="a = 1", action_unit="px/s")
    return path


def test_what_is_written_is_read(path, episodes):
    with open_trajectories(path) as file:
        assert len(file) == 4
        assert (file.dt, file.dataset, file.seed, file.recipe) == (1 / 50, "rope", 3, "a = 1")
        assert file.units["positions"] == "px"
        for made, wanted in zip(file, episodes, strict=True):
            assert made.initial.identical(wanted.initial)
            assert all(torch.equal(made[name], wanted[name]) for name in wanted.frames)
            assert torch.equal(made.actions, wanted.actions)
        assert len(file[1:3]) == 2
        with pytest.raises(IndexError, match="4 episodes"):
            file[4]


def test_statistics_and_units_are_in_the_file(path, episodes):
    everything = torch.cat([t["velocities"].flatten() for t in episodes]).double()
    with open_trajectories(path) as file:
        assert file.statistics["velocities"]["mean"] == pytest.approx(float(everything.mean()), abs=1e-6)
        assert file.statistics["velocities"]["std"] == pytest.approx(float(everything.std(correction=0)), rel=1e-6)
    with h5py.File(path) as raw:
        assert raw.attrs["schema"] == "simworld.trajectories"
        assert raw["episodes/000000/velocities"].attrs["unit"] == "px/s"
        assert raw["episodes/000000/actions"].attrs["unit"] == "px/s"
        assert raw["episodes/000000/masses"].shape == (17,)


def test_own_fields_and_removals_are_read_back_without_any_code(tmp_path):
    kind = ObjectState.with_fields(temperature=Field(unit="K"), viscosity=Field(unit="Pa s", per="scene", static=True))
    initial = kind(
        positions=torch.zeros(3, 2),
        velocities=torch.zeros(3, 2),
        temperature=torch.ones(3),
        viscosity=torch.tensor([0.5]),
    )
    frames = {"positions": torch.zeros(4, 3, 2), "velocities": torch.zeros(4, 3, 2), "temperature": torch.rand(4, 3)}
    active = torch.ones(4, 3, dtype=torch.bool)
    active[2:, 1] = False
    initial = initial.replace(temperature=frames["temperature"][0])
    write_trajectories(
        tmp_path / "x.h5", [Trajectory(initial=initial, frames=frames, active=active, dt=1.0)], dataset="x"
    )
    with open_trajectories(tmp_path / "x.h5") as file:
        assert file.kind.fields["temperature"].unit == "K"
        assert torch.equal(file[0]["temperature"], frames["temperature"])
        assert file[0]["viscosity"].item() == 0.5
        assert torch.equal(file[0].active, active)


def test_counterfactuals_share_the_static_fields(tmp_path, episodes):
    said = {"removed": [15]}
    outcome = dataclasses.replace(
        episodes[2], initial=episodes[1].initial.replace(masses=torch.full((17,), 3.0)), frames=episodes[2].frames
    )
    write_trajectories(tmp_path / "t.h5", episodes[:2], dataset="rope", counterfactuals={1: [(said, outcome)]}.get)
    with h5py.File(tmp_path / "t.h5") as raw:
        assert sorted(raw["episodes/000001/counterfactuals/0000"]) == ["actions", "masses", "positions", "velocities"]
    with open_trajectories(tmp_path / "t.h5") as file:
        assert file.counterfactuals(0) == []
        ((intervention, outcome),) = file.counterfactuals(1)
        assert intervention == said
        assert torch.equal(outcome["positions"], episodes[2]["positions"])
        assert torch.equal(outcome.initial.radii, episodes[1].initial.radii)
        assert outcome.initial.masses[0] == 3


def edit(path, change):
    with h5py.File(path, "r+") as raw:
        change(raw)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.attrs.modify("schema", "h5md"), r"not a simworld\.trajectories file \(its schema: h5md\)"),
        (lambda f: f.attrs.modify("schema_version", 9), "schema version 9.*update"),
        (lambda f: f.attrs.modify("state", "FluidState"), "kind 'FluidState', where this version knows ObjectState"),
        (lambda f: f.attrs.__delitem__("fields"), "train.h5: .*fields"),
        (lambda f: f.attrs.modify("fields", "{}"), "too few fields"),
        (lambda f: f.attrs.modify("dt", np.nan), "dt nan"),
        (lambda f: f.attrs.__setitem__("dt", "fast"), "train.h5: could not convert"),
        (lambda f: f.attrs.__setitem__("schema_version", "one"), "schema version one"),
        (lambda f: [f["episodes"].__delitem__(k) for k in list(f["episodes"])], "0 episodes"),
        (lambda f: _put(f, "positions", np.zeros(17)), "episodes/000000"),
        (lambda f: _put(f, "positions", np.zeros((0, 17, 2))), "episodes/000000"),
        (
            lambda f: _put(f, "positions", np.where(np.arange(13)[:, None, None] == 5, np.nan, np.ones((13, 17, 2)))),
            "frame 5",
        ),
        (lambda f: f["episodes/000000"].__delitem__("velocities"), "episodes/000000: it lacks the field 'velocities'"),
        (
            lambda f: f["episodes/000000"].__delitem__("spring_lengths") or _put(f, "radii", np.ones(3)),
            "radii must have shape",
        ),
        (lambda f: _put(f, "radii", np.full(17, np.nan)), "radii must be finite"),
        (lambda f: _put(f, "actions", np.zeros((3, 17, 2))), "12 actions between them; got 3"),
    ],
)
def test_files_that_say_otherwise(path, change, says):
    edit(path, change)
    with pytest.raises(ValueError, match=says), open_trajectories(path) as file:
        file[0]


def _put(file, name, value):
    del file[f"episodes/000000/{name}"]
    file[f"episodes/000000/{name}"] = value.astype("f4")


def test_damaged_foreign_and_missing_files(path, tmp_path):
    whole = path.read_bytes()
    for count in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:count])
        with pytest.raises(ValueError, match="not a whole HDF5 file"):
            open_trajectories(path)
    path.write_text("time,x,y\n0,1,2\n")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        open_trajectories(path)
    with h5py.File(path, "w") as raw:
        raw["data"] = [1]
    with pytest.raises(ValueError, match=r"not a simworld\.trajectories file"):
        open_trajectories(path)
    with pytest.raises(FileNotFoundError, match="no trajectory file.*simworld generate"):
        open_trajectories(tmp_path / "none.h5")


def test_a_single_trajectory_wants_a_list(tmp_path, episodes):
    with pytest.raises(TypeError, match=r"put the trajectory in a list, \[trajectory\]"):
        write_trajectories(tmp_path / "deep/a.h5", episodes[0], dataset="x")
    with pytest.raises(ValueError, match="no trajectory to write"):
        write_trajectories(tmp_path / "deep/a.h5", [], dataset="x")
    assert not (tmp_path / "deep").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path, episodes):
    def breaks():
        yield episodes[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="could not be written.*No space left"):
        write_trajectories(tmp_path / "a.h5", breaks(), dataset="rope")
    with pytest.raises(ValueError, match="no trajectory to write"):
        write_trajectories(tmp_path / "a.h5", [], dataset="rope")
    both = Trajectory.cat(episodes[:2])
    with pytest.raises(ValueError, match="2 scenes"):
        write_trajectories(tmp_path / "a.h5", [both], dataset="rope")
    assert list(tmp_path.iterdir()) == []


def test_propnet_files(tmp_path):
    path = tmp_path / "rope.npz"
    states, attributes = np.random.default_rng(0).normal(size=(2, 5, 17, 4)), np.ones((2, 5, 17, 3))
    actions = np.ones((2, 5, 17, 2))
    np.savez(path, states=states, attrs=attributes, actions=actions)
    first, _ = read_propnet_rope(path)
    assert torch.equal(first["positions"], torch.from_numpy(states[0, ..., :2]))
    assert first.actions.shape == (4, 17, 2)
    assert first.actions[:, 0].abs().sum() == 0
    np.savez(path, states=states[..., :3], attrs=attributes, actions=actions)
    with pytest.raises(ValueError, match=r"must hold states \[e, T, n, 4\].*got \[2, 5, 17, 3\]"):
        read_propnet_rope(path)
    np.savez(path, positions=states)
    with pytest.raises(ValueError, match="not a rope recording"):
        read_propnet_rope(path)
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="not a rope recording"):
        read_propnet_rope(path)
    np.savez(path, states=np.array([{"a": 1}], dtype=object), attrs=attributes, actions=actions)
    with pytest.raises(ValueError, match="not a rope recording"):
        read_propnet_rope(path)


def films(trajectory, size=8):
    """Return two films of as many frames: noise, and masks of its bodies."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(trajectory), size, size)
    return [
        View(
            rgb=torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator),
            masks=torch.randint(18, shape, dtype=torch.uint8, generator=generator),
            viewmat=torch.randn(4, 4, generator=generator),
            K=torch.randn(3, 3, generator=generator),
        )
        for _ in range(2)
    ]


@pytest.fixture
def filmed(tmp_path, episodes):
    path = tmp_path / "filmed.h5"
    write_trajectories(
        path,
        episodes,
        dataset="rope",
        counterfactuals=lambda number: [({"remove": 3}, episodes[0])] if number == 1 else None,
        views=lambda number: films(episodes[number])[: number % 3],
        counterfactual_views=lambda number, k: films(episodes[0])[1:],
    )
    return path


def same(one, other):
    return all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("rgb", "masks", "viewmat", "K"))


def test_films_are_read_as_they_were_written(filmed, episodes):
    with open_trajectories(filmed) as file:
        assert [len(file.views(k)) for k in range(4)] == [0, 1, 2, 0]
        assert all(same(*both) for both in zip(file.views(2), films(episodes[2]), strict=True))
        (branch,) = file.views(1, 0)
        assert same(branch, films(episodes[0])[1])
        assert branch.viewmat.dtype == torch.float32
        with pytest.raises(IndexError, match="has 4 episodes; got number 4"):
            file.views(4)
        with pytest.raises(IndexError, match="episodes/000002 has 0 counterfactuals; got number 0"):
            file.views(2, 0)


def test_films_of_another_length_are_not_written(tmp_path, episodes):
    with pytest.raises(ValueError, match="View 0 has 2 frames where its trajectory has [0-9]+; film the whole of it"):
        write_trajectories(
            tmp_path / "x.h5",
            episodes,
            dataset="rope",
            views=lambda number: [films(episodes[number])[0].window(0, 2)],
        )
    assert not list(tmp_path.iterdir())


def test_damaged_films_are_told_by_file_and_episode(filmed):
    def spoil(change):
        with h5py.File(filmed, "r+") as raw:
            change(raw["episodes/000002/views/0001"])
        with open_trajectories(filmed) as file:
            assert len(file.views(1)) == 1
            with pytest.raises(ValueError, match=r"filmed.h5, episodes/000002: (.*); write, copy or") as found:
                file.views(2)
        return str(found.value)

    def put(group, name, value):
        del group[name]
        group[name] = value

    def cut(group):
        put(group, "rgb", group["rgb"][:3])
        put(group, "masks", group["masks"][:3])

    with h5py.File(filmed) as raw:
        length, masks = raw["episodes/000002/positions"].shape[0], raw["episodes/000002/views/0001/masks"][()]
    masks[0, 0, 0] = 18
    assert "shows body 17, of 17 that are there" in spoil(lambda view: put(view, "masks", masks))
    assert f"view 0001 has 3 frames where the states have {length}" in spoil(cut)
    assert "rgb must be uint8; got float32" in spoil(lambda view: put(view, "rgb", np.zeros((3, 8, 8, 3), "f4")))
    assert "K that is not 3 x 3 finite numbers" in spoil(lambda view: view.attrs.update(K=np.full((3, 3), np.nan)))
    assert "view 0001 lacks viewmat, where a view has" in spoil(lambda view: view.attrs.pop("viewmat"))
    assert "view 0001 lacks masks, viewmat" in spoil(lambda view: view.pop("masks"))
