from __future__ import annotations

import gzip
import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.quaternions import quaternion
from simworld.render.camera import Camera
from simworld.render.files import read_splats, write_splats
from simworld.render.images import psnr
from simworld.render.splats import moved, quarter_turns, render_splats

DATA = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data"))
CAMERA = Camera.look_at((4, 1, 1.5), (0, 0, 0), width=64, height=48)


def splats(count=200, degree=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SplatState(
        means=torch.randn(count, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=0.02 + 0.1 * torch.rand(count, 3, generator=generator),
        opacities=torch.rand(count, generator=generator),
        harmonics=(0.3 * torch.randn(count, (degree + 1) ** 2, 3, generator=generator)).clamp(-0.9, 0.9),
    )


@pytest.mark.parametrize("degree", range(4))
def test_what_is_read_differs_by_rounding_alone_and_is_written_unchanged(tmp_path, degree):
    given = splats(degree=degree)
    again = read_splats(write_splats(tmp_path / "a.spz", given))
    assert (again.means - given.means).abs().max() <= 2.0**-21 + 1e-7
    assert (again.scales / given.scales).log().abs().max() <= 1 / 32 + 1e-5
    assert (again.opacities - given.opacities).abs().max() <= 0.5 / 255 + 1e-6
    assert ((again.quats * given.quats).sum(1).abs() > np.cos(2.5e-3)).all()
    bounds = [0.5 / 255 / 0.15, *[4.5 / 128] * 3, *[8.5 / 128] * 12]
    for number, bound in enumerate(bounds[: given.harmonics.shape[1]]):
        assert (again.harmonics[:, number] - given.harmonics[:, number]).abs().max() <= bound + 1e-6, number
    write_splats(tmp_path / "b.spz", again)
    assert (tmp_path / "b.spz").read_bytes() == (tmp_path / "a.spz").read_bytes()
    assert psnr(render_splats(again, CAMERA), render_splats(given, CAMERA)) > 33


def test_quaternions_of_equal_numbers_are_written_unchanged(tmp_path):
    turns = quaternion(quarter_turns()).float()
    generator = torch.Generator().manual_seed(0)
    near = turns.repeat(40, 1) + 2e-3 * torch.randn(960, 4, generator=generator)  # about as large, which rounding swaps
    given = splats(960 + len(turns), degree=0)
    given = given.replace(quats=torch.nn.functional.normalize(torch.cat([turns, near]), dim=1))
    again = read_splats(write_splats(tmp_path / "a.spz", given))
    assert ((again.quats * given.quats).sum(1).abs() > np.cos(4e-3)).all()
    write_splats(tmp_path / "b.spz", again)
    assert (tmp_path / "b.spz").read_bytes() == (tmp_path / "a.spz").read_bytes()


def test_its_axes_are_turned_half_about_the_first(tmp_path):
    """What another reader makes of the bytes, as they are, is what `moved` makes of the state."""
    given = splats(degree=3)
    body = gzip.decompress(write_splats(tmp_path / "a.spz", given).read_bytes())
    magic, version, count, degree, bits, flags, spare = struct.unpack("<4sIIBBBB", body[:16])
    assert (magic, version, count, degree, flags, spare) == (b"NGSP", 3, 200, 3, 0, 0)
    turned = moved(given, torch.diag(torch.tensor([1.0, -1.0, -1.0])))
    place = np.frombuffer(body[16 : 16 + 9 * count], np.uint8).reshape(-1, 3).astype(np.int64)
    fixed = place @ [1, 256, 65536]
    means = np.where(fixed >= 2**23, fixed - 2**24, fixed).reshape(-1, 3) / 2**bits
    assert np.abs(means - turned.means.numpy()).max() < 1e-6
    words = np.frombuffer(body[16 + 16 * count : 16 + 20 * count], "<u4")
    quats = given.quats * torch.tensor([1.0, 1.0, -1.0, -1.0])  # other axes of a splat than those of moved, as good
    assert torch.allclose(covariances(quats, given.scales), covariances(turned.quats, given.scales), atol=1e-7)
    for word, wanted in zip(words.tolist(), quats.tolist(), strict=True):
        xyzw, rest = [0.0] * 4, word
        for k in (3, 2, 1, 0):
            if k != word >> 30:
                xyzw[k] = (rest & 511) / 511 * 0.5**0.5 * (-1 if rest & 512 else 1)
                rest >>= 10
        xyzw[word >> 30] = max(0, 1 - sum(x * x for x in xyzw)) ** 0.5
        assert abs(np.dot(xyzw, [*wanted[1:], wanted[0]])) > 0.9999
    harmonics = (np.frombuffer(body[16 + 20 * count :], np.uint8).reshape(count, 15, 3) - 128.0) / 128
    assert np.abs(harmonics - turned.harmonics[:, 1:].numpy()).max() <= 8.5 / 128 + 1e-6


def raw(version=3, count=1, degree=0, bits=12, flags=0, spare=0, body=None):
    size = 9 + 1 + 3 + 3 + (4 if version > 2 else 3) + 3 * ((min(degree, 4) + 1) ** 2 - 1)
    body = b"\x55" * min(count, 9) * size if body is None else body
    return struct.pack("<4sIIBBBB", b"NGSP", version, count, degree, bits, flags, spare) + body


SAFE = struct.pack("<IIfff", 0xADBE0002, 12, 0, 1, 2)
FRAME = struct.pack("<III", 0xADBE0003, 4, 6)


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"NGSP", "is no .spz"),
        (raw(version=1), "of version 1; 2 to 4 are read"),
        (raw(version=5), "of version 5; 2 to 4 are read"),
        (raw(degree=4), "harmonics of degree 4"),
        (raw(flags=0x80), "has the flags 0x80"),
        (raw(bits=30), "says 30 fractional bits"),
        (raw(count=4_000_000_000), "says 4000000000 splats; a .spz has 10000000"),
        (raw(count=9_999_999), "9999999 splats"),
        (raw(count=2)[:-1], "says 2 splats of degree 0 and holds fewer"),
        (raw(count=2) + b"\0", "says 2 splats of degree 0 and holds more"),
        (raw(count=0), "holds no splat"),
        (raw(flags=2) + SAFE + FRAME, "has other axes"),
    ],
)
def test_files_that_are_refused(tmp_path, packed, content, says):
    (tmp_path / "a.spz").write_bytes(packed(content))
    with pytest.raises(ValueError, match=says):
        read_splats(tmp_path / "a.spz")


def test_extensions_that_change_no_splat_are_passed_over(tmp_path):
    unknown = struct.pack("<II", 0x12340001, 3) + b"abc"
    for version in (2, 3):
        (tmp_path / "a.spz").write_bytes(gzip.compress(raw(version, flags=3) + unknown + SAFE))
        assert len(read_splats(tmp_path / "a.spz")) == 1


def test_what_is_compressed_beyond_what_the_header_needs_is_not_unpacked(tmp_path):
    bomb = gzip.compress(raw(count=1) + bytes(2**26))  # 64 MB of zeros in 64 KB
    (tmp_path / "a.spz").write_bytes(bomb)
    with pytest.raises(ValueError, match="holds more than the 1 splats"):
        read_splats(tmp_path / "a.spz")
    (tmp_path / "a.spz").write_bytes(gzip.compress(raw(count=9))[:-9])
    with pytest.raises(ValueError, match="ends early"):
        read_splats(tmp_path / "a.spz")
    (tmp_path / "a.spz").write_bytes(b"\x1f\x8b" + bytes(30))
    with pytest.raises(ValueError, match="is damaged"):
        read_splats(tmp_path / "a.spz")


def version_4(parts, count=2, degree=1, table=32, said=None, more=b""):
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard, of the extra formats")
    packed = [zstandard.ZstdCompressor().compress(part) for part in parts]
    rows = b"".join(
        struct.pack("<QQ", len(a), len(b) if said is None else said) for a, b in zip(packed, parts, strict=True)
    )
    flags = 2 if more else 0
    head = struct.pack("<4sIIBBBBI12x", b"NGSP", 4, count, degree, 12, flags, len(parts), table + len(more))
    return head + more + rows + b"".join(packed)


def parts_of(body, count, degree):
    sizes = [9, 1, 3, 3, 4, 3 * ((degree + 1) ** 2 - 1)]
    ends = np.cumsum([16, *(count * size for size in sizes if size)])
    return [body[a:b] for a, b in pairwise(ends)]


def test_version_4_holds_the_same_parts(tmp_path):
    for degree in (0, 3):
        body = gzip.decompress(write_splats(tmp_path / "a.spz", splats(degree=degree)).read_bytes())
        wanted, parts = read_splats(tmp_path / "a.spz"), parts_of(body, 200, degree)
        for more in (b"", SAFE):
            made = bytearray(version_4(parts, 200, degree, more=more))
            made[13] = body[13]
            (tmp_path / "b.spz").write_bytes(made)
            found = read_splats(tmp_path / "b.spz")
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_versions_4_that_are_refused(tmp_path):
    parts = parts_of(raw(count=2, degree=1), 2, 1)
    for content, says in [
        (version_4(parts, count=3), "its parts are of other sizes"),
        (version_4(parts, said=100), "its parts are of other sizes"),
        (version_4([*parts[:-1], bytes(2**24)])[:-1], "its parts are of other sizes"),
        (version_4(parts[:-1]), "no table of 6 parts"),
        (version_4(parts, table=2**31), "no table of 6 parts"),
        (version_4(parts)[:20], "no table of 6 parts"),
        (version_4(parts, more=FRAME), "has other axes"),
        (version_4(parts)[:-3] + b"abc", "is damaged|holds fewer"),
        (gzip.compress(version_4(parts)), "not compressed as a whole"),
    ]:
        (tmp_path / "a.spz").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_splats(tmp_path / "a.spz")
    lying = version_4([*parts[:-1], bytes(18)])
    bomb = version_4([*parts[:-1], bytes(2**24)])
    made = bytearray(bomb)
    made[32 + 16 * 5 + 8 : 32 + 16 * 6] = struct.pack("<Q", 18)  # what the table says is right, and untrue
    (tmp_path / "a.spz").write_bytes(made)
    with pytest.raises(ValueError, match="holds more"):
        read_splats(tmp_path / "a.spz")
    (tmp_path / "a.spz").write_bytes(lying)
    assert len(read_splats(tmp_path / "a.spz")) == 2


def test_states_that_are_not_written(tmp_path):
    given = splats(degree=0)
    with pytest.raises(ValueError, match="none farther out than 8388606"):
        write_splats(tmp_path / "a.spz", given.replace(means=given.means * 1e7))
    far = given.replace(means=given.means.clone().index_fill_(0, torch.tensor([0]), 2000.0), scales=0 * given.scales)
    again = read_splats(write_splats(tmp_path / "a.spz", far))
    assert (again.means - far.means).abs().max() <= 2.0**-13 + 1e-6
    assert torch.allclose(again.scales, torch.tensor(-10.0).exp())


@pytest.mark.skipif(not (DATA / "splat_formats").is_dir(), reason="needs the files of the folder splat_formats")
@pytest.mark.parametrize("name", ["minimal-raw", "minimal-v2", "minimal-v3", "minimal-v4"])
def test_files_of_others(name):
    if name == "minimal-v4":
        pytest.importorskip("zstandard", reason="needs zstandard, of the extra formats")
    found = read_splats(DATA / f"splat_formats/{name}.spz")
    known = read_splats(DATA / "splat_formats/minimal.splat")
    # The first two hold as they are the numbers that the others hold turned.
    sign = -1.0 if name in ("minimal-raw", "minimal-v2") else 1.0
    assert torch.equal(found.means, known.means * torch.tensor([1.0, 1.0, sign]))
    assert torch.equal(found.opacities, known.opacities)
    assert (found.scales / known.scales).log().abs().max() <= 1 / 32
    assert (found.quats[:, 0] > 0.9999).all()
    if name in ("minimal-v3", "minimal-v4"):
        assert (found.harmonics - known.harmonics).abs().max() <= 0.5 / 255 / 0.15 + 1e-6


@pytest.mark.skipif(not (DATA / "trained_splat").is_dir(), reason="needs the file of the folder trained_splat")
def test_a_trained_scene_looks_alike(tmp_path):
    given = read_splats(DATA / "trained_splat/point_cloud_iter7000.ply")
    again = read_splats(write_splats(tmp_path / "a.spz", given))
    centre = given.means.median(0).values
    away = float((given.means - centre).norm(dim=1).median())
    camera = Camera.look_at(centre + away * torch.tensor([3.0, 0.0, 1.0]), centre, width=96, height=72)
    one, other = (render_splats(each, camera).clamp(0, 1) for each in (given, again))
    assert psnr(other, one) > 33
    assert float(one.mean()) > 0.1
