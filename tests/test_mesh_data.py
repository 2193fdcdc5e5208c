from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from simworld import Field, MeshState, Trajectory
from simworld.cli import main
from simworld.data import (
    import_data,
    mesh_faults,
    mesh_state,
    open_trajectories,
    read_meshes,
    read_meshgraphnets,
    read_surface,
    write_trajectories,
    write_vtk,
    write_xdmf,
)
from simworld.kinds import HANDLE, NORMAL, WALL

meshio = pytest.importorskip("meshio")
GRID = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]], dtype=float)
TRIANGLES = np.array([[0, 1, 3], [1, 4, 3], [1, 2, 4], [2, 5, 4]])
FlowState = MeshState.with_units(pressures="m^2/s^2").with_fields(vorticity=Field(unit="1/s"))


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line and return its exit code, standard output and error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["simworld", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capfd.readouterr()
        return end.value.code or 0, " ".join(out.split()), " ".join(error.split())

    return run


def flow(frames=4, dt=0.5):
    """A flow over four triangles, and a held wall."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "velocities": torch.rand(frames, 6, 2, generator=generator, dtype=torch.float64),
        "pressures": torch.rand(frames, 6, generator=generator, dtype=torch.float64),
        "vorticity": torch.rand(frames, 6, generator=generator, dtype=torch.float64),
    }
    wall = torch.tensor([True, False, False, True, False, False])
    state = FlowState(
        rest_positions=torch.from_numpy(GRID),
        cells=torch.from_numpy(TRIANGLES),
        node_types=torch.where(wall, WALL, NORMAL),
        kinematic=wall,
        **{name: value[0] for name, value in values.items()},
    )
    return Trajectory(initial=state, frames=values, active=torch.ones(frames, 6, dtype=torch.bool), dt=dt)


def solid(frames=3):
    """A tetrahedron whose tip moves."""
    rest = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    positions = rest.repeat(frames, 1, 1)
    positions[:, 3, 2] += 0.1 * torch.arange(frames)
    state = MeshState(rest_positions=rest, positions=rest, cells=torch.arange(4)[None])
    there = torch.ones(frames, 4, dtype=torch.bool)
    return Trajectory(initial=state, frames={"positions": positions}, active=there, dt=0.1)


def sheet(frames=4):
    """A cloth of quads, flat at first: its rest has two coordinates, its nodes move in three."""
    rest = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0)).double()
    positions = torch.nn.functional.pad(rest, (0, 1)).repeat(frames, 1, 1)
    positions[..., 2] += 0.1 * torch.arange(frames)[:, None] * rest[:, 0]
    cells = torch.tensor([[0, 2, 3, 1], [2, 4, 5, 3]])
    state = MeshState(rest_positions=rest, positions=positions[0], cells=cells)
    there = torch.ones(frames, 6, dtype=torch.bool)
    return Trajectory(initial=state, frames={"positions": positions}, active=there, dt=0.1)


@pytest.mark.parametrize("path", [flow(), solid(), sheet()], ids=["flow", "solid", "sheet"])
@pytest.mark.parametrize(("suffix", "write"), [(".xdmf", write_xdmf), (".pvd", write_vtk)])
def test_series_come_back_as_they_went(tmp_path, path, suffix, write):
    files = write(tmp_path / f"series{suffix}", path)
    assert all(file.is_file() for file in files)
    assert not list(tmp_path.glob("*.partial"))
    (again,) = read_meshes(files[0])
    assert again.dt == pytest.approx(path.dt)
    assert set(again.frames) == set(path.frames)
    assert set(again.initial) == set(path.initial)
    for name in path.initial:
        assert torch.equal(again[name], path[name]), name
        assert again.initial.fields[name].unit == path.initial.fields[name].unit


def test_a_shorter_series_leaves_no_frames_of_a_longer_one(tmp_path):
    write_vtk(tmp_path / "series.pvd", flow(frames=5))
    write_vtk(tmp_path / "series.pvd", flow(frames=3))
    assert len(list((tmp_path / "series").iterdir())) == 3


def test_exporting_leaves_trajectories_alone(tmp_path, call):
    for name in ("flow", "flow_000000"):
        write_trajectories(tmp_path / f"{name}.h5", [flow()], dataset="flow")
    for _ in range(2):
        assert call("export", "xdmf", tmp_path, "--out", tmp_path)[0] == 0
    with open_trajectories(tmp_path / "flow_000000.h5") as data:
        assert torch.equal(data[0]["pressures"], flow()["pressures"])


def test_every_second_frame(tmp_path):
    (again,) = read_meshes(write_xdmf(tmp_path / "series.xdmf", flow(), every=2)[0])
    assert len(again) == 2
    assert again.dt == pytest.approx(1.0)


def test_a_folder_of_frames_that_another_writer_made(tmp_path):
    # meshio's own writers; no times, foreign names, points with a third coordinate.
    path = flow(frames=11)
    for number in range(11):
        points = np.pad(GRID, ((0, 0), (0, 1)))
        data = {
            "U": np.pad(path["velocities"][number].numpy(), ((0, 0), (0, 1))),
            "vorticity": np.full(6, float(number)),
        }
        meshio.Mesh(points, [("line", TRIANGLES[:, :2]), ("triangle", TRIANGLES)], point_data=data).write(
            tmp_path / f"frame_{number}.vtk"
        )
    said = {"names": {"U": "velocities"}, "units": {"vorticity": "1/s"}}
    (made,) = read_meshes(tmp_path, dt=0.5, **said)
    assert torch.equal(made["vorticity"][:, 0], torch.arange(11.0, dtype=torch.float64))  # 10 comes after 9
    assert made.initial.fields["vorticity"].unit == "1/s"
    assert torch.allclose(made["velocities"], path["velocities"])
    assert torch.equal(made.initial.cells, torch.from_numpy(TRIANGLES))
    with pytest.raises(ValueError, match="at even distances in time"):
        list(read_meshes(tmp_path, **said))
    with pytest.raises(ValueError, match="'vorticity' has no unit .* --unit vorticity=m/s"):
        list(read_meshes(tmp_path, dt=0.5, names=said["names"]))
    with pytest.raises(ValueError, match="the unit of 'vorticity' is empty; say 1 for what has none"):
        list(read_meshes(tmp_path, dt=0.5, names=said["names"], units={"vorticity": " "}))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["t_0.5", "t_1.0", "t_1.25", "t_1.5"], [0.5, 1.0, 1.25, 1.5]),
        (["step2_v1", "step9_v1", "step10_v1"], [2, 9, 10]),
        (["a1_b2", "a2_b1"], None),
        (["x1", "notes"], None),
    ],
)
def test_files_are_taken_in_the_order_of_the_number_that_differs(tmp_path, names, wanted):
    for name in names:
        value = float(name.split("_")[-1] if name[0] == "t" else name.lstrip("stepaxno").split("_")[0] or 0)
        mesh = meshio.Mesh(
            np.pad(GRID, ((0, 0), (0, 1))), [("triangle", TRIANGLES)], point_data={"T": np.full(6, value)}
        )
        mesh.write(tmp_path / f"{name}.vtu")
    said = {"names": {"T": "temperatures"}, "dt": 1.0}
    if wanted is None:
        with pytest.raises(ValueError, match="names differ in one number"):
            list(read_meshes(tmp_path, **said))
        return
    (made,) = read_meshes(tmp_path, **said)
    assert made["temperatures"][:, 0].tolist() == wanted


def test_data_that_would_be_lost_or_mistaken_is_told(tmp_path):
    points = np.pad(GRID, ((0, 0), (0, 1)))

    def write(number, cells=TRIANGLES, **how):
        meshio.Mesh(points, [("triangle", cells)], **how).write(tmp_path / f"frame_{number}.vtu")

    write(0, point_data={"U": np.zeros((6, 3)), "masses": np.ones(6)})
    write(1, point_data={"U": np.zeros((6, 3)), "masses": np.full(6, 2.0)})
    said = {"names": {"U": "velocities"}, "dt": 1.0}
    with pytest.raises(ValueError, match="frame 1 has other masses than frame 0"):
        list(read_meshes(tmp_path, **said))
    with pytest.raises(ValueError, match="has no data 'W'; it has U, masses"):
        list(read_meshes(tmp_path, names={**said["names"], "W": "velocities"}, dt=1.0))
    with pytest.raises(ValueError, match="has no data 'pressures'"):
        list(read_meshes(tmp_path, units={"pressures": "kPa"}, **said))
    with pytest.raises(ValueError, match="has 'velocities' twice"):
        mesh_state(
            meshio.Mesh(points, [("triangle", TRIANGLES)], point_data={"U": points, "velocities": points}),
            names=said["names"],
        )
    with pytest.raises(ValueError, match=r"node_types must be whole numbers; got 1\.7"):
        mesh_state(meshio.Mesh(points, [("triangle", TRIANGLES)], point_data={"node_types": np.full(6, 1.7)}))
    write(1, point_data={"U": np.zeros((6, 3)), "masses": np.ones(6)}, cell_data={"p": [np.ones(4)]})
    with pytest.warns(UserWarning, match="data of cells is left out: p"):
        list(read_meshes(tmp_path, **said))
    write(0, point_data={"w [1/s]": np.ones(6)})
    write(1, point_data={"w [1/h]": np.ones(6)})
    with pytest.raises(ValueError, match=r"frame 1 has w \[6\] 1/h; frame 0 has \[6\] 1/s"):
        list(read_meshes(tmp_path, dt=1.0))
    kilo = mesh_state(
        meshio.Mesh(points, [("triangle", TRIANGLES)], point_data={"pressures": np.ones(6)}), units={"pressures": "kPa"}
    )
    assert kilo.fields["pressures"].unit == "kPa"
    for by in ("p", "pressures"):  # the file's name, or the field's
        renamed = meshio.Mesh(points, [("triangle", TRIANGLES)], point_data={"p": np.ones(6)})
        assert mesh_state(renamed, names={"p": "pressures"}, units={by: "kPa"}).fields["pressures"].unit == "kPa"


def test_nodes_are_held_by_their_types_where_nothing_else_says_so():
    points, types = np.pad(GRID, ((0, 0), (0, 1))), np.array([0, 5, 4, 6, 1, 3])

    def read(**data):
        return mesh_state(meshio.Mesh(points, [("triangle", TRIANGLES)], point_data=data))

    assert read(node_types=types).kinematic.tolist() == [False, False, True, True, True, True]
    own = read(node_types=types + 70, kinematic=types == 6)
    assert own.kinematic.tolist() == (types == 6).tolist()
    for number in (77, -3):
        with pytest.raises(ValueError, match=f"has nodes of type {number}; those known are 0 to 8"):
            read(node_types=np.where(types == 5, number, types))


def test_what_programs_number_for_themselves_is_left_out():
    points = np.pad(GRID, ((0, 0), (0, 1)))
    data = {"gmsh:dim_tags": np.zeros((6, 2)), "GlobalNodeId": np.arange(6), "pressures": np.ones(6)}
    state = mesh_state(meshio.Mesh(points, [("triangle", TRIANGLES)], point_data=data))
    assert {*state} == {"rest_positions", "cells", "pressures"}


def test_bodies_may_touch_after_the_first_frame(tmp_path):
    points = np.concatenate([np.pad(GRID, ((0, 0), (0, 1))), np.pad(GRID + [0, 1.5], ((0, 0), (0, 1)))])
    for number, gap in enumerate((0.5, 0.0)):
        points[6:, 1] = points[:6, 1] + 1 + gap
        meshio.Mesh(points, [("triangle", np.concatenate([TRIANGLES, TRIANGLES + 6]))]).write(
            tmp_path / f"{number}.vtu"
        )
    (path,) = read_meshes(tmp_path, dt=1.0)
    assert torch.equal(path["positions"][1, 6], path["positions"][1, 3])


def test_a_vector_of_one_number_per_node_is_told_what_it_should_be():
    points = np.pad(GRID, ((0, 0), (0, 1)))
    with pytest.raises(ValueError, match=r"velocities must have shape \[6, d\] .*got \[6\]"):
        mesh_state(meshio.Mesh(points, [("triangle", TRIANGLES)], point_data={"velocities": np.ones(6)}))


def test_an_xdmf_series_whose_mesh_moves_or_changes(tmp_path):
    moved = """<?xml version="1.0"?><Xdmf Version="3.0"><Domain>
    <Grid Name="series" GridType="Collection" CollectionType="Temporal">{}</Grid></Domain></Xdmf>"""
    grid = """<Grid Name="g" GridType="Uniform"><Time Value="{time}"/>
    <Topology TopologyType="Triangle" NumberOfElements="2"><DataItem DataType="Int" Dimensions="2 3" Format="XML">
    {cells}</DataItem></Topology><Geometry GeometryType="XYZ"><DataItem DataType="Float" Precision="8"
    Dimensions="4 3" Format="XML">0 0 0 1 0 0 0 1 0 {x} {x} 0</DataItem></Geometry></Grid>"""
    cells = "0 1 2 1 3 2"
    path = tmp_path / "moving.xdmf"
    path.write_text(moved.format("".join(grid.format(time=t, x=1 + t, cells=cells) for t in (0.0, 0.5, 1.0))))
    (made,) = read_meshes(path)
    assert made["positions"][:, 3, 0].tolist() == [1.0, 1.5, 2.0]
    assert made.initial.rest_positions.shape == (4, 2)
    others = (cells, cells, "0 1 3 0 3 2")
    path.write_text(moved.format("".join(grid.format(time=t, x=1, cells=c) for t, c in enumerate(others))))
    with pytest.raises(ValueError, match="frame 2: the mesh is another"):
        list(read_meshes(path))


@pytest.mark.parametrize("text", ["", "not xml", "<Xdmf><Domain/></Xdmf>"])
@pytest.mark.parametrize("suffix", [".xdmf", ".pvd"])
def test_broken_series_are_a_sentence(tmp_path, call, text, suffix):
    path = tmp_path / f"series{suffix}"
    code, _, said = call("import", "meshio", path, "--out", tmp_path / "data")
    assert code == 2
    assert f"There is no file '{path}'" in said
    path.write_text(text)
    code, _, said = call("import", "meshio", path, "--out", tmp_path / "data")
    assert code == 2
    assert "series" in said
    assert "free some space" not in said
    assert not (tmp_path / "data/series.h5").exists()


@pytest.mark.parametrize("suffix", [".xdmf", ".pvd", "/"])
def test_a_folder_of_series_is_a_set_to_train_on(suffix, tmp_path, call):
    episodes = [flow(frames=count, dt=step) for count, step in ((4, 0.5), (3, 0.5 + 1e-9), (5, 0.5))]
    (tmp_path / "all").mkdir()
    for number, path in enumerate(episodes):
        if suffix == "/":
            (tmp_path / f"all/run_{number}").mkdir()
            for k in range(len(path)):
                mesh = meshio.Mesh(np.pad(GRID, ((0, 0), (0, 1))), [("triangle", TRIANGLES)])
                mesh.point_data = {"pressures": path["pressures"][k].numpy()}
                mesh.write(tmp_path / f"all/run_{number}/frame_{k}.vtu")
        else:
            (write_xdmf if suffix == ".xdmf" else write_vtk)(tmp_path / f"all/run_{number}{suffix}", path)
    step = ("--dt", "0.5") if suffix == "/" else ()
    code, _, said = call("import", "meshio", tmp_path / "all", "--out", tmp_path / "data", "--held-out", "3", *step)
    assert code == 0, said
    with open_trajectories(tmp_path / "data/train.h5") as train, open_trajectories(tmp_path / "data/valid.h5") as valid:
        assert [len(one) for one in train] + [len(one) for one in valid] == [4, 3, 5]
        assert train.dt == valid.dt == 0.5
        assert torch.equal(valid[0]["pressures"], episodes[2]["pressures"])


@pytest.mark.parametrize("suffix", [".xdmf", ".pvd"])
def test_the_mesh_of_an_exported_series_is_told(suffix, tmp_path, call):
    (write_xdmf if suffix == ".xdmf" else write_vtk)(tmp_path / f"flow{suffix}", flow())
    code, _, said = call("info", tmp_path / f"flow{suffix}")
    assert code == 0
    assert "nothing is wrong with the mesh" in said


def test_the_command_line_imports_and_exports(tmp_path, call):
    source = write_xdmf(tmp_path / "flow.xdmf", flow())[0]
    (made,) = import_data("meshio", source, tmp_path / "data")
    assert call("import", "meshio", source, "--out", tmp_path / "again", "--dt", "0.25")[0] == 0
    with open_trajectories(tmp_path / "again/flow.h5") as data:
        assert data.dt == 0.25
        assert torch.allclose(data[0]["pressures"], flow()["pressures"])
    assert call("export", "xdmf", made, "--out", tmp_path / "out")[0] == 0
    assert len(list(read_meshes(tmp_path / "out/flow_000000.xdmf"))) == 1
    code, _, said = call("import", "tignn", made, "--out", tmp_path / "x", "--name", "U=velocities")
    assert code == 2
    assert "takes no names" in said
    code, _, said = call("import", "meshio", made, "--out", tmp_path / "x", "--name", "U")
    assert code == 2
    assert "--name is said as NAME=VALUE" in said


FAULTS = {
    "cell has no inside": (GRID, np.vstack([TRIANGLES, [[0, 1, 2]]])),
    "cell is inverted": (GRID, np.vstack([TRIANGLES[:3], TRIANGLES[3:, ::-1]])),
    "node is in no cell": (np.vstack([GRID, [[5, 5]]]), TRIANGLES),
    "nodes lie on one another": (np.vstack([GRID, GRID[5:]]), np.vstack([TRIANGLES, [[2, 6, 4]]])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_meshes_are_told_by_their_fault(fault, tmp_path, call):
    points, cells = FAULTS[fault]
    mesh = meshio.Mesh(points, [("triangle", cells)])
    with pytest.raises(ValueError, match=fault):
        mesh_state(mesh)
    meshio.Mesh(np.pad(points, ((0, 0), (0, 1))), mesh.cells).write(tmp_path / "mesh.vtu")
    code, _, said = call("info", tmp_path / "mesh.vtu")
    assert code == 0
    assert fault in said


def test_small_and_thin_cells_are_sound_and_folded_ones_are_not():
    tip = np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.8, 0], [0.5, 0.3, 0.8]])
    points = np.vstack([tip, tip * 1e-4 + 5, [[400, 0, 0], [401, 0, 0], [400, 1, 0], [400, 0, 1]]])
    mesh_state(meshio.Mesh(points, [("tetra", np.arange(12).reshape(3, 4))]))
    layer = np.array([[0, 0], [1e-3, 0], [1e-3, 1e-4], [0, 1e-4], [10, 0], [10, 1e-4]])
    mesh_state(meshio.Mesh(layer, [("quad", [[0, 1, 2, 3], [1, 4, 5, 2]])]))
    with pytest.raises(ValueError, match="1 cell is folded"):
        mesh_state(meshio.Mesh(np.array([[0, 0], [1, 0], [0, 1], [1, 1.0]]), [("quad", [[0, 1, 2, 3]])]))
    cube = np.array([[x, y, z] for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], dtype=float)
    mesh_state(meshio.Mesh(cube, [("hexahedron", [np.arange(8)])]))
    pushed = cube.copy()
    pushed[6] = (-0.5, -0.5, -0.5)
    with pytest.raises(ValueError, match="1 cell is folded"):
        mesh_state(meshio.Mesh(pushed, [("hexahedron", [np.arange(8)])]))
    with pytest.raises(ValueError, match="has quads in space"):
        mesh_state(meshio.Mesh(cube, [("quad", [[0, 1, 2, 3], [1, 2, 6, 5]])]))


def test_a_sound_mesh_has_no_faults(tmp_path, call):
    assert mesh_faults(flow().initial) == mesh_faults(solid().initial) == []
    turned = mesh_state(meshio.Mesh(GRID, [("triangle", TRIANGLES[:, ::-1])]))  # all alike: nothing is inverted
    assert mesh_faults(turned) == []
    write_trajectories(tmp_path / "flow.h5", [flow()], dataset="flow")
    code, _, said = call("info", tmp_path / "flow.h5")
    assert code == 0
    assert "its mesh" not in said


def test_meshes_that_are_no_mesh(tmp_path):
    with pytest.raises(ValueError, match="mixes cells: quad and triangle"):
        mesh_state(meshio.Mesh(GRID, [("triangle", TRIANGLES[:2]), ("quad", [[1, 2, 5, 4]])]))
    with pytest.raises(ValueError, match="of the kind wedge"):
        mesh_state(meshio.Mesh(np.random.rand(6, 3), [("wedge", [[0, 1, 2, 3, 4, 5]])]))
    with pytest.raises(ValueError, match="points but no cells"):
        mesh_state(meshio.Mesh(GRID, [("vertex", [[0]])]))
    with pytest.raises(ValueError, match=r"must be an \.xdmf or \.pvd"):
        list(read_meshes(tmp_path / "missing.vtu"))
    for number, cells in enumerate((TRIANGLES, TRIANGLES[:, [1, 2, 0]])):
        meshio.Mesh(np.pad(GRID, ((0, 0), (0, 1))), [("triangle", cells)]).write(tmp_path / f"frame_{number}.vtu")
    with pytest.raises(ValueError, match="frame 1: the mesh is another"):
        list(read_meshes(tmp_path, dt=1.0))
    (tmp_path / "frame_1.vtu").write_text("<VTKFile>")
    with pytest.raises(ValueError, match=r"frame_1\.vtu is not a mesh"):
        list(read_meshes(tmp_path, dt=1.0))


def test_surfaces_are_read_by_trimesh(tmp_path, call):
    trimesh = pytest.importorskip("trimesh")
    for suffix in (".stl", ".glb"):
        trimesh.creation.box((1, 2, 3)).export(tmp_path / f"box{suffix}")
        code, _, said = call("info", tmp_path / f"box{suffix}")
        assert code == 0, said
        assert "MeshState(" in said
    state = read_surface(tmp_path / "box.stl")
    assert len(state) == 8
    assert state.cells.shape == (12, 3)
    trimesh.PointCloud(np.random.rand(4, 3)).export(tmp_path / "cloud.ply")
    with pytest.raises(ValueError, match="no surface"):
        read_surface(tmp_path / "cloud.ply")
    (tmp_path / "run.toml").write_text("a = 1")
    with pytest.raises(ValueError, match="no surface that trimesh reads"):
        read_surface(tmp_path / "run.toml")


def write_records(folder, records, features, **more):
    """Files as TensorFlow would write them, by the package tfrecord."""
    tfrecord = pytest.importorskip("tfrecord")
    said = {"features": features, "field_names": list(features), **more}
    (folder / "meta.json").write_text(json.dumps(said))
    writer = tfrecord.TFRecordWriter(str(folder / "train.tfrecord"))
    for record in records:
        writer.write({name: (value.tobytes(), "byte") for name, value in record.items()})
    writer.close()
    return folder / "train.tfrecord"


def test_flows_of_meshgraphnets(tmp_path):
    path = flow()
    record = {
        "cells": TRIANGLES.astype("<i4"),
        "mesh_pos": GRID.astype("<f4"),
        "node_type": path.initial.node_types.numpy().astype("<i4"),
        "velocity": path["velocities"].numpy().astype("<f4"),
        "pressure": path["pressures"].numpy().astype("<f4"),
    }
    features = {
        "cells": {"type": "static", "shape": [1, -1, 3], "dtype": "int32"},
        "mesh_pos": {"type": "static", "shape": [1, -1, 2], "dtype": "float32"},
        "node_type": {"type": "static", "shape": [1, -1, 1], "dtype": "int32"},
        "velocity": {"type": "dynamic", "shape": [4, -1, 2], "dtype": "float32"},
        "pressure": {"type": "dynamic", "shape": [4, -1, 1], "dtype": "float32"},
    }
    file = write_records(tmp_path, [record, record], features, dt=0.01)
    made = list(read_meshgraphnets(file))
    assert len(made) == 2
    assert made[0].dt == 0.01
    assert torch.equal(made[0]["velocities"], path["velocities"].float())
    assert torch.equal(made[0]["pressures"], path["pressures"].float())
    assert torch.equal(made[0].initial.kinematic, path.initial.kinematic)
    folder = tmp_path / "faulty"
    folder.mkdir()
    twisted = record | {"cells": np.concatenate([TRIANGLES[:1, ::-1], TRIANGLES[1:]]).astype("<i4")}
    with pytest.warns(UserWarning, match="1 cell is inverted"):
        assert len(list(read_meshgraphnets(write_records(folder, [twisted], features, dt=0.01)))) == 1
    odd = record | {"node_type": np.full(len(GRID), 99, "<i4")}
    with pytest.raises(ValueError, match="nodes of type 99; those known are 0 to 8"):
        list(read_meshgraphnets(write_records(folder, [odd], features, dt=0.01)))
    (h5,) = import_data("meshgraphnets", file, tmp_path / "data")
    with open_trajectories(h5) as data:
        assert len(data) == 2
        assert json.loads(data.recipe)["dt"] == 0.01
    for none in ({}, {"dt": 0}):  # as those of states at rest are
        (tmp_path / "meta.json").write_text(json.dumps({"features": features, **none}))
        with pytest.raises(ValueError, match="says no time between frames"):
            list(read_meshgraphnets(file))
    (h5,) = import_data("meshgraphnets", file, tmp_path / "data", options={"dt": 0.05})
    with open_trajectories(h5) as data:
        assert data.dt == 0.05
    features["velocity"]["shape"] = [5, -1, 2]
    (tmp_path / "meta.json").write_text(json.dumps({"features": features, "dt": 0.01}))
    with pytest.raises(ValueError, match="record 0: velocity holds 48 numbers, no multiple of the 5 frames"):
        list(read_meshgraphnets(file))
    for wrong in ([4, -1, 0], [4], None, "abc", [4, -1, 2, 2]):
        features["velocity"]["shape"] = wrong
        (tmp_path / "meta.json").write_text(json.dumps({"features": features, "dt": 0.01}))
        with pytest.raises(ValueError, match="velocity must have a type .* a shape of two or three sizes"):
            list(read_meshgraphnets(file))
    (tmp_path / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"There is no '.*meta\.json'"):
        list(read_meshgraphnets(file))


def test_cloth_of_meshgraphnets_knows_its_velocities(tmp_path):
    positions = np.random.default_rng(0).random((5, 6, 3)).astype("<f4")
    types = np.array([HANDLE, 0, 0, 0, 0, 0], "<i4")
    features = {
        "cells": {"type": "static", "shape": [1, -1, 3], "dtype": "int32"},
        "mesh_pos": {"type": "static", "shape": [1, -1, 2], "dtype": "float32"},
        "node_type": {"type": "static", "shape": [1, -1, 1], "dtype": "int32"},
        "world_pos": {"type": "dynamic", "shape": [5, -1, 3], "dtype": "float32"},
    }
    record = {"cells": TRIANGLES.astype("<i4"), "mesh_pos": GRID.astype("<f4"), "node_type": types}
    file = write_records(tmp_path, [{**record, "world_pos": positions}], features, dt=0.02)
    (made,) = read_meshgraphnets(file)
    assert len(made) == 4
    assert torch.equal(made["positions"], torch.from_numpy(positions[1:]))
    assert torch.allclose(made["velocities"][0], torch.from_numpy((positions[1] - positions[0]) / 0.02))
    assert made.initial.kinematic.tolist() == [True, False, False, False, False, False]


def test_meshes_that_are_cut_anew_become_an_episode_for_each_mesh(tmp_path):
    generator = np.random.default_rng(0)
    counts = [6, 6, 6, 7, 7, 6]  # frames 0 to 2, 3 to 4, and 5 alone
    places = [np.vstack([GRID, [[0.5, 0.5]]])[:count].astype("<f4") for count in counts]
    cells = [TRIANGLES if count == 6 else np.vstack([TRIANGLES, [[0, 1, 6]]]) for count in counts]
    moving = [generator.random((count, 3)).astype("<f4") for count in counts]
    rows = {
        "cells": ("int32", 3, [c.astype("<i4") for c in cells]),
        "mesh_pos": ("float32", 2, places),
        "node_type": ("int32", 1, [np.zeros((count, 1), "<i4") for count in counts]),
        "world_pos": ("float32", 3, moving),
    }
    features = {
        name: {"type": "dynamic_varlen", "shape": [6, -1, width], "dtype": dtype}
        for name, (dtype, width, _) in rows.items()
    }
    record = {name: np.concatenate([v.ravel() for v in values]) for name, (_, _, values) in rows.items()}
    record |= {f"length_{name}": np.array([len(v) for v in values], "<i4") for name, (_, _, values) in rows.items()}
    # As their files of remeshed cloth are: flat shapes, a dtype as TensorFlow prints it, a field for the remesher.
    features["world_pos"] |= {"shape": [-1, 3], "dtype": "<dtype: 'float32'>"}
    features["sizing_field"] = {"type": "dynamic_varlen", "shape": [-1, 4], "dtype": "<dtype: 'float32'>"}
    file = write_records(tmp_path, [record], features, dt=1.0)
    (made,) = read_meshgraphnets(file)  # two frames with one mesh are one velocity: not yet a step
    assert len(made) == 2
    assert torch.equal(made["positions"], torch.from_numpy(np.stack(moving[1:3])))
    record["length_cells"] = record["length_cells"][:-1]
    write_records(tmp_path, [record], features, dt=1.0)
    with pytest.raises(ValueError, match="length_cells adds up"):
        list(read_meshgraphnets(file))
