from __future__ import annotations

import gzip
import tracemalloc

import numpy as np
import pytest
import torch

from simworld.kinds import SplatState
from simworld.quaternions import quaternion, rotations
from simworld.render.camera import Camera
from simworld.render.files import read_splats, write_splats
from simworld.render.splats import moved, render_splats, with_covariances


def splats(count=50, degree=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SplatState(
        means=torch.randn(count, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=0.05 + 0.2 * torch.rand(count, 3, generator=generator),
        opacities=torch.rand(count, generator=generator),
        harmonics=0.3 * torch.randn(count, (degree + 1) ** 2, 3, generator=generator),
    )


CAMERA = Camera.look_at((4, 1, 1.5), (0, 0, 0), width=48, height=32)


@pytest.mark.parametrize("degree", range(4))
def test_what_is_written_as_ply_renders_as_before(tmp_path, degree):
    given = splats(degree=degree)
    again = read_splats(write_splats(tmp_path / "a.ply", given))
    for name in given:
        assert torch.allclose(again[name], given[name], atol=1e-6), name
    assert torch.allclose(render_splats(again, CAMERA), render_splats(given, CAMERA), atol=1e-5)
    twice = read_splats(write_splats(tmp_path / "b.ply", again))
    assert all(torch.allclose(twice[name], again[name], atol=1e-6) for name in again)
    assert not list(tmp_path.glob("*.partial"))


def test_splat_files_are_rounded_and_hold_what_covers_most_first(tmp_path):
    given = splats(degree=0)
    again = read_splats(write_splats(tmp_path / "a.splat", given))
    order = (given.scales.prod(1) * given.opacities).argsort(descending=True)
    assert torch.equal(again.means, given.means[order])
    assert torch.equal(again.scales, given.scales[order])
    assert torch.allclose(again.opacities, given.opacities[order], atol=1 / 255)
    assert ((again.quats * given.quats[order]).sum(1).abs() > 0.9998).all()
    assert (render_splats(again, CAMERA) - render_splats(given, CAMERA)).abs().max() < 0.03
    twice = read_splats(write_splats(tmp_path / "b.splat", again))
    assert torch.allclose(render_splats(twice, CAMERA), render_splats(again, CAMERA), atol=5e-3)


def ply(names, rows, kind="float", form="binary_little_endian", count=None, more=""):
    head = [
        "ply",
        f"format {form} 1.0",
        "comment antialiased 0",
        f"element vertex {len(rows) if count is None else count}",
    ]
    head += [*(f"property {kind} {name}" for name in names), *([more] if more else []), "end_header", ""]
    return "\n".join(head).encode() + np.asarray(rows, "<f4" if kind == "float" else "<f8").tobytes()


NAMES = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"]
NAMES += ["rot_0", "rot_1", "rot_2", "rot_3"]
ROW = [1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.0, -1.0, -2.0, -3.0, 2.0, 0.0, 0.0, 0.0]


def test_properties_may_stand_in_any_order_with_others_between(tmp_path):
    order = np.random.default_rng(0).permutation(len(NAMES) + 1)
    names, row = [*NAMES, "confidence"], [*ROW, 7.0]
    for kind in ("float", "double"):
        (tmp_path / "a.ply").write_bytes(ply([names[k] for k in order], [[row[k] for k in order]] * 2, kind))
        found = read_splats(tmp_path / "a.ply")
        assert found.means.tolist() == [[1, 2, 3]] * 2
        assert found.quats.tolist() == [[1, 0, 0, 0]] * 2  # of unit length
        assert found.opacities.tolist() == [0.5] * 2
        assert torch.allclose(found.scales[0], torch.tensor([-1.0, -2.0, -3.0]).exp())
        assert torch.allclose(found.harmonics[0, 0], torch.tensor([0.1, 0.2, 0.3]))


def test_further_harmonics_stand_by_colour(tmp_path):
    names = [*NAMES, *(f"f_rest_{k}" for k in range(9))]
    (tmp_path / "a.ply").write_bytes(ply(names, [[*ROW, *range(9)]]))
    wanted = torch.tensor([[0.0, 3.0, 6.0], [1.0, 4.0, 7.0], [2.0, 5.0, 8.0]])
    assert torch.equal(read_splats(tmp_path / "a.ply").harmonics[0, 1:], wanted)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"plx", "is no .ply"),
        (ply(NAMES[:-1], [ROW[:-1]]), "have no rot_3"),
        (ply(NAMES, [ROW], form="binary_big_endian"), "in the format binary_big_endian"),
        (ply(NAMES, [ROW], count=1000000000), "says 1000000000 vertices and holds 1"),
        (ply(NAMES, [[*ROW[:10], 0.0, 0.0, 0.0, 0.0]]), "quaternion of splat 0 is zero"),
        (ply(NAMES, [ROW, [np.nan, *ROW[1:]]]), "means of splat 1 are not finite"),
        (ply(NAMES, [[*ROW[:7], 1000.0, *ROW[8:]]]), "scales of splat 0 are not finite"),
        (ply([*NAMES, "f_rest_0"], [[*ROW, 0.0]]), "0, 9, 24 or 45 properties"),
        (ply(NAMES, [ROW], more="property list uchar int faces"), "is no number"),
        (b"ply\nformat binary_little_endian 1.0\nelement face 3\nend_header\n", "must begin with the element vertex"),
    ],
)
def test_files_that_are_refused(tmp_path, raw, says):
    (tmp_path / "a.ply").write_bytes(raw)
    with pytest.raises(ValueError, match=says):
        read_splats(tmp_path / "a.ply")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.splat").write_bytes(b"\0" * 33)
    with pytest.raises(ValueError, match="32 bytes for each splat; got 33"):
        read_splats(tmp_path / "a.splat")
    (tmp_path / "a.splat").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no splat"):
        read_splats(tmp_path / "a.splat")
    with pytest.raises(ValueError, match=r"read from \.ply, \.splat, \.spz, \.usd"):
        read_splats(tmp_path / "a.obj")
    with pytest.raises(ValueError, match="There is no file"):
        read_splats(tmp_path / "b.ply")
    with pytest.raises(ValueError, match=r"written to \.ply, \.splat, \.spz, \.usd"):
        write_splats(tmp_path / "a.obj", splats())
    with pytest.raises(ValueError, match="active splats of one scene; the state has 2 scenes"):
        write_splats(tmp_path / "a.ply", SplatState.cat([splats(), splats()]))
    given = splats()
    with pytest.raises(ValueError, match="has 1 scenes and 0 active splats"):
        write_splats(tmp_path / "a.ply", given.replace(active=torch.zeros(len(given), dtype=torch.bool)))
    with pytest.raises(ValueError, match="The state: opacities of splat 0 are not finite"):
        write_splats(tmp_path / "a.ply", given.replace(opacities=given.opacities * torch.nan))
    assert not list(tmp_path.glob("*.ply*"))


def test_what_is_moved_looks_the_same_from_where_it_went():
    given = splats()
    turn = rotations(torch.tensor([0.3, -0.5, 0.7, 0.4], dtype=torch.float64))
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    move = torch.eye(4, dtype=torch.float64)
    move[:3, :3], move[:3, 3] = turn, shift
    there = Camera(viewmat=(CAMERA.viewmat.double() @ move.inverse()), K=CAMERA.K, width=48, height=32)
    before = render_splats(given, CAMERA)
    assert torch.allclose(render_splats(moved(given, turn, shift), there), before, atol=1e-4)
    assert torch.allclose(render_splats(moved(with_covariances(given), turn, shift), there), before, atol=1e-4)
    twice = moved(given, torch.eye(3), scale=2.0)
    far = Camera.look_at((8, 2, 3), (0, 0, 0), width=48, height=32)
    assert torch.allclose(render_splats(twice, far), before, atol=1e-4)
    with pytest.raises(ValueError, match="must be a rotation matrix"):
        moved(given, -torch.eye(3))


def test_quaternions_of_rotations():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)  # half turns, too
    for quat in torch.cat([found, eye]):
        assert torch.allclose(rotations(quaternion(rotations(quat))), rotations(quat), atol=1e-12)


def test_pictures_of_one_and_of_several():
    given = splats()
    one, several = render_splats(given, CAMERA), render_splats(given, [CAMERA, CAMERA], background=(0.0, 0.0, 0.0))
    assert one.shape == (32, 48, 3)
    assert torch.equal(several[1], several[0])
    # One product of matrices or a batch of them: processors round these differently.
    assert torch.allclose(several[1], one, atol=1e-6, rtol=0)
    assert render_splats(given, CAMERA, render_mode="RGB+D").shape == (32, 48, 4)
    gone = given.replace(active=torch.zeros(len(given), dtype=torch.bool))
    assert (render_splats(gone, CAMERA, background=(1.0, 0.5, 0.0)) == torch.tensor([1.0, 0.5, 0.0])).all()
    with pytest.raises(ValueError, match="several of one size"):
        render_splats(given, [CAMERA, CAMERA.resized(24, 16)])
    with pytest.raises(ValueError, match="one scene; the state has 2"):
        render_splats(SplatState.cat([given, given]), CAMERA)


def damaged(raw, seed):
    """Yield 100 files cut short, and 100 with a few bits or bytes changed, most of them early."""
    generator = np.random.default_rng(seed)
    for _ in range(100):
        yield raw[: generator.integers(len(raw))]
    for _ in range(100):
        changed, most = bytearray(raw), len(raw) if generator.random() < 0.5 else min(len(raw), 700)
        for place in generator.integers(most, size=generator.integers(1, 5)):
            changed[place] = generator.integers(256) if generator.random() < 0.5 else changed[place] ^ 1 << 3
        yield bytes(changed)


@pytest.mark.parametrize("kind", ["a.ply", "a.splat", "a.spz", "raw.spz", "packed.spz"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    path = tmp_path / kind
    raw = write_splats(path, splats(20, degree=1)).read_bytes()
    raw = raw if kind.startswith("a") else gzip.decompress(raw)
    read, said = 0, []
    tracemalloc.start()
    for content in damaged(raw, seed=len(kind)):
        path.write_bytes(gzip.compress(content) if kind == "packed.spz" else content)
        try:
            found = read_splats(path)
        except ValueError as error:
            said.append(str(error))
        else:
            assert all(bool(found[name].isfinite().all()) for name in found)
            read += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25
    assert len(said) > 90
    assert all(str(path) in sentence for sentence in said)  # none from deep inside
    assert kind == "a.spz" or read > 5  # a checksum betrays every change
