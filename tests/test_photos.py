from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simworld.render import shots
from simworld.render.camera import Camera, orbit
from simworld.render.photos import Photos, read_photos, write_transforms

RECORDED = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data"))
SIZE = (12, 8)
ABOVE = [[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.25], [0.0, 0.0, 1.0, 4.0], [0.0, 0.0, 0.0, 1.0]]
"""Camera to world in OpenGL's axes: at (0.5, 0.25, 4), x to the right, y up, looking down along -z."""


@pytest.fixture
def data():
    def need(name: str) -> Path:
        if not (RECORDED / name).exists():
            pytest.skip(f"recorded data is not here ({RECORDED / name}); set SIMWORLD_DATA to its folder")
        return RECORDED / name

    return need


def paint(path, size=SIZE, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(mode) if mode != "P" else 3
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    (image.convert(mode) if mode == "P" else image).save(path)
    return torch.from_numpy(pixels)


def scene(folder, count=1, name="transforms.json", **changes):
    """Write transforms.json with photographs images/0.png and on; a key of None leaves it out."""
    frames = [{"file_path": f"images/{k}.png", "transform_matrix": ABOVE} for k in range(count)]
    for k in range(count):
        if not (folder / f"images/{k}.png").exists():
            paint(folder / f"images/{k}.png", seed=k)
    told = {"fl_x": 10.0, "fl_y": 11.0, "cx": 6.5, "cy": 3.5, "w": SIZE[0], "h": SIZE[1], "frames": frames, **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    return folder


def pixel(camera, point):
    here = camera.viewmat.double() @ torch.tensor([*point, 1.0], dtype=torch.float64)
    assert here[2] > 0
    return (camera.K.double() @ (here[:3] / here[2]))[:2].tolist()


def test_axes_of_opengl_and_own_lens(tmp_path):
    pixels = paint(tmp_path / "images/0.png")
    photos = read_photos(scene(tmp_path))
    assert photos.names == ("images/0.png",)
    assert torch.equal(photos.images[0], pixels)
    assert (photos.cameras[0].width, photos.cameras[0].height) == SIZE
    # 2 below the camera, 0.4 to its right, 0.2 up: right of and above the principal point.
    assert pixel(photos.cameras[0], (0.9, 0.45, 2.0)) == pytest.approx([6.5 + 10 * 0.2, 3.5 - 11 * 0.1], abs=1e-5)
    assert photos.cameras[0].position.tolist() == pytest.approx([0.5, 0.25, 4.0])
    assert photos.points is None


def test_blenders_scenes_have_an_angle_and_no_endings(tmp_path):
    for split, ending in (("train", ".png"), ("test", ".jpg"), ("odd", ".jpeg")):
        paint(tmp_path / f"{split}/r_0{ending}", mode="RGBA" if ending == ".png" else "RGB")
        frame = {"file_path": f"./{split}/r_0", "transform_matrix": ABOVE, "rotation": 0.01}
        told = {"camera_angle_x": 2 * math.atan(0.5), "frames": [frame]}
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps(told))
    assert read_photos(tmp_path).names == ("train/r_0",)
    assert read_photos(tmp_path).images[0].shape == (8, 12, 4)
    assert read_photos(tmp_path, split="test").names == ("test/r_0",)
    assert read_photos(tmp_path, split="odd").names == ("odd/r_0",)
    assert read_photos(tmp_path / "transforms_test.json").names == ("test/r_0",)
    camera = read_photos(tmp_path / "transforms_train.json", split="train").cameras[0]
    assert camera.K.tolist() == [[12, 0, 6], [0, 12, 4], [0, 0, 1]]
    # The left edge of the picture is half as far aside as it is deep.
    assert pixel(camera, (0.5 - 0.5, 0.25, 3.0)) == pytest.approx([0, 4], abs=1e-5)
    with pytest.raises(ValueError, match=r"must hold .* transforms_val\.json .* has transforms_odd\.json, "):
        read_photos(tmp_path, split="val")
    with pytest.raises(ValueError, match="photographs for train, not for test"):
        read_photos(tmp_path / "transforms_train.json", split="test")


def test_lenses_of_frames_come_before_the_scenes(tmp_path):
    own = {"file_path": "images/0.png", "transform_matrix": ABOVE[:3], "fl_x": 20, "cy": 4.0, "fl_y": None}
    angle = {"file_path": ".\\images\\0.png", "transform_matrix": ABOVE}
    photos = read_photos(scene(tmp_path, frames=[own, angle]))
    assert photos.cameras[0].K.tolist() == [[20, 0, 6.5], [0, 11, 4], [0, 0, 1]]
    lens = {"fl_x": None, "fl_y": None, "cx": None, "cy": None, "w": None, "h": None}
    both = {"camera_angle_x": 2 * math.atan(0.25), "camera_angle_y": 2 * math.atan(0.5)}
    camera = read_photos(scene(tmp_path, frames=[angle], **lens, **both)).cameras[0]
    assert camera.K.flatten().tolist() == pytest.approx([24, 0, 6, 0, 8, 4, 0, 0, 1])


def test_splits_by_lists_or_every_eighth_name(tmp_path):
    scene(tmp_path, count=17)  # by name: 0, 1, 10, ..., 16, 2, ...
    assert len(read_photos(tmp_path)) == 17
    assert [n[7:-4] for n in read_photos(tmp_path, split="test").names] == ["0", "9", "16"]
    train = read_photos(tmp_path / "transforms.json", split="train")
    assert len(train) == 14
    assert not set(train.names) & {"images/0.png", "images/9.png", "images/16.png"}
    with pytest.raises(ValueError, match="has the splits train, test; got 'val'"):
        read_photos(tmp_path, split="val")
    lists = {"train_filenames": ["./images/2.png"], "val_filenames": ["images/0.png", "images/1.png"]}
    scene(tmp_path, count=3, **lists)
    assert read_photos(tmp_path, split="val").names == ("images/0.png", "images/1.png")
    assert read_photos(tmp_path, split="train").names == ("images/2.png",)
    with pytest.raises(ValueError, match="has the splits train, val; got 'test'"):
        read_photos(tmp_path, split="test")
    scene(tmp_path, train_filenames=["images/7.png"])
    with pytest.raises(ValueError, match=r"lists 1 photographs for train that no frame describes: images/7\.png"):
        read_photos(tmp_path, split="train")
    with pytest.raises(ValueError, match="no photograph for train, of 1"):
        read_photos(scene(tmp_path), split="train")


def test_other_sizes_of_the_same_picture(tmp_path):
    camera = read_photos(scene(tmp_path, w=24, h=16)).cameras[0]
    assert (camera.width, camera.height) == SIZE
    assert camera.K.tolist() == [[5, 0, 3.25], [0, 5.5, 1.75], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"the shape of 12 x 12 pixels; it has 12 x 8"):
        read_photos(scene(tmp_path, w=12, h=12))


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4), ("L", 3), ("LA", 4), ("P", 3)], ids=str)
def test_kinds_of_images(tmp_path, mode, channels):
    scene(tmp_path)
    pixels = paint(tmp_path / "images/0.png", mode=mode)
    found = read_photos(tmp_path).images[0]
    assert found.shape == (8, 12, channels)
    assert found.dtype == torch.uint8
    if mode in ("L", "LA"):
        assert torch.equal(found[..., 0], pixels[..., 0])
        assert torch.equal(found[..., -1], pixels[..., -1])


def test_missing_photographs_are_listed_or_left_out(tmp_path):
    scene(tmp_path, count=12)
    for k in range(1, 11):
        (tmp_path / f"images/{k}.png").unlink()
    with pytest.raises(
        ValueError, match=r"10 of 12 .* images/1\.png, .* images/8\.png and 2 more\..* skip_missing=True"
    ):
        read_photos(tmp_path)
    assert read_photos(tmp_path, skip_missing=True).names == ("images/0.png", "images/11.png")
    assert len(read_photos(tmp_path, split="test", skip_missing=True)) == 1  # the split is that of all
    for k in (0, 11):
        (tmp_path / f"images/{k}.png").unlink()
    with pytest.raises(ValueError, match=r"12 of 12 .* and 4 more\. Copy them there\.$"):
        read_photos(tmp_path, skip_missing=True)


def frame(**changes):
    told = {"file_path": "images/0.png", "transform_matrix": ABOVE, **changes}
    return {"frames": [{k: v for k, v in told.items() if v is not None}]}


def rows(scale=1.0, last=(0.0, 0.0, 0.0, 1.0), corner=None):
    made = [[scale * v for v in row[:3]] + row[3:] for row in ABOVE[:3]] + [list(last)]
    made[0][3] = made[0][3] if corner is None else corner
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": None}, "frames must be a list .* got nothing"),
        ({"frames": []}, "frames must be a list"),
        ({"frames": {"a": 1}}, "frames must be a list"),
        ({"frames": ["a.png"]}, "frame 0 must be an object .* got 'a.png'"),
        (frame(file_path=None), "frame 0: file_path must be the path of a file; got nothing"),
        (frame(file_path=7), "file_path must be the path of a file; got 7"),
        (frame(file_path="/etc/passwd"), "'/etc/passwd', which leaves the scene's folder"),
        (frame(file_path="../images/0.png"), "which leaves the scene's folder"),
        (frame(file_path="images/../../0.png"), "which leaves the scene's folder"),
        (frame(file_path="C:\\0.png"), "which leaves the scene's folder"),
        (frame(file_path="a" * 5000), "1 of 1 photographs"),
        (frame(file_path="a\0"), "1 of 1 photographs"),
        (frame(file_path="images"), "1 of 1 photographs"),
        (frame(transform_matrix=None), "transform_matrix must be 4 rows .* got nothing"),
        (frame(transform_matrix=ABOVE[:2]), "transform_matrix must be 4 rows"),
        (frame(transform_matrix=[1.0] * 16), "transform_matrix must be 4 rows"),
        (frame(transform_matrix=[row[:3] for row in ABOVE]), "transform_matrix must be 4 rows"),
        (frame(transform_matrix=rows(corner="0.5")), "transform_matrix must be 4 rows"),
        (frame(transform_matrix=rows(corner=math.nan)), "transform_matrix must be 4 rows of 4 finite"),
        (frame(transform_matrix=rows(corner=math.inf)), "transform_matrix must be 4 rows of 4 finite"),
        (frame(transform_matrix=rows(corner=1e300)), "frame 0: .* must be finite"),
        (frame(transform_matrix=rows(corner=10**400)), "transform_matrix must be 4 rows of 4 finite"),
        (frame(transform_matrix=rows(scale=2.0)), "frame 0: .*Take a scale out of it"),
        (frame(transform_matrix=rows(scale=-1.0)), "frame 0: .*no rotation"),
        (frame(transform_matrix=rows(scale=0.0)), "it has no inverse"),
        (frame(transform_matrix=rows(last=(0, 0, 0, 2))), "the last row"),
        ({"fl_x": "10"}, "frame 0: fl_x must be a finite number; got '10'"),
        ({"fl_x": True}, "fl_x must be a finite number; got True"),
        ({"fl_x": -3.0}, "frame 0: .*focal lengths above 0"),
        ({"fl_x": math.nan}, "fl_x must be a finite number; got nan"),
        ({"cx": [1]}, r"cx must be a finite number; got \[1\]"),
        ({"fl_x": None, "fl_y": None}, "needs fl_x in pixels, or camera_angle_x"),
        ({"fl_x": None, "camera_angle_x": 4.0}, "camera_angle_x must be between 0 and pi"),
        ({"w": 0}, "a photograph has 1 to"),
        ({"w": -12}, "a photograph has 1 to"),
        ({"w": 2**20, "h": 2**20}, "a photograph has 1 to"),
        ({"w": 12.5}, "both w and h, in whole pixels"),
        ({"w": None}, "both w and h, in whole pixels"),
        ({"camera_model": "OPENCV_FISHEYE"}, "by the camera 'OPENCV_FISHEYE' cannot be undistorted"),
        ({"camera_model": ["OPENCV"]}, "cannot be undistorted"),
        ({"is_fisheye": True}, "by the camera is_fisheye cannot be undistorted"),
        ({"k4": 0.1, "k5": 0.0}, "distortion by k4 cannot be undone, only by k1, k2, k3, p1, p2"),
        ({"k1": {}}, "k1 must be a finite number"),
        ({"k1": -3.0}, "k1=-3, .* folds the picture over itself"),
        ({"train_filenames": "a.png"}, "train_filenames must be a list"),
        ({"test_filenames": [1]}, "test_filenames must be a list"),
        ({"train_filenames": ["../a.png"]}, "leaves the scene's folder"),
        ({"ply_file_path": 3}, "ply_file_path must be the path"),
        ({"ply_file_path": "../points.ply"}, "leaves the scene's folder"),
        ({"ply_file_path": "images/0.png"}, "is no .ply"),
    ],
)
def test_transforms_that_are_refused(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        read_photos(scene(tmp_path, **changes))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe\xff", "is no JSON"),
        (b"[" * 200000, "is no JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"", "is no JSON"),
    ],
)
def test_files_that_are_no_transforms(tmp_path, raw, says):
    (tmp_path / "transforms.json").write_bytes(raw)
    with pytest.raises(ValueError, match=says):
        read_photos(tmp_path)


def test_folders_that_hold_no_scene(tmp_path):
    with pytest.raises(ValueError, match="must hold transforms.json, .* of these it has none"):
        read_photos(tmp_path)
    with pytest.raises(ValueError, match="There is no folder or file"):
        read_photos(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="read from a transforms.json or a folder"):
        read_photos(tmp_path / "a.txt")


def test_images_that_are_none(tmp_path, monkeypatch):
    scene(tmp_path)
    file = tmp_path / "images/0.png"
    whole = file.read_bytes()
    for raw in (b"", b"no image", whole[: len(whole) // 2], whole[:20]):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="cannot be read as a photograph"):
            read_photos(tmp_path)
    Image.fromarray(np.zeros((8, 12), dtype=np.uint16)).save(file)
    with pytest.raises(ValueError, match="must have 8 bits"):
        read_photos(tmp_path)
    wide = struct.pack(">II", 30000, 30000)  # as its header says; nothing of it is there
    file.write_bytes(whole[:16] + wide + whole[24:])
    with pytest.raises(ValueError, match="cannot be read as a photograph"):
        read_photos(tmp_path)
    file.write_bytes(whole)
    monkeypatch.setattr(shots, "MOST_PIXELS", 90)
    with pytest.raises(ValueError, match="has 12 x 8 pixels, more than 90"):
        read_photos(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs pillow; install it with: pip install 'simworld\[view\]'"):
        read_photos(tmp_path)


def ply(form, names, lines, kinds=None):
    kinds = kinds or ["float"] * 3 + ["uchar"] * (len(names) - 3)
    head = ["ply", f"format {form} 1.0", "comment made by hand", f"element vertex {len(lines)}"]
    head += [*(f"property {kind} {name}" for kind, name in zip(kinds, names, strict=True)), "end_header", ""]
    return "\n".join(head).encode() + "\n".join(" ".join(map(str, line)) for line in lines).encode()


def test_points_of_transforms(tmp_path):
    scene(tmp_path, ply_file_path="points.ply")
    assert read_photos(tmp_path).points is None  # named, and not there
    lines = [[1, 2.5, -3, 255, 0, 51], [0, 0, 1e-3, 0, 102, 255]]
    for end in (b"", b"\n", b"\n3 0 1 2\n"):
        (tmp_path / "points.ply").write_bytes(ply("ascii", ["x", "y", "z", "red", "green", "blue"], lines) + end)
        photos = read_photos(tmp_path)
        assert torch.equal(photos.points, torch.tensor([[1, 2.5, -3], [0, 0, 1e-3]]))
        assert torch.allclose(photos.colors, torch.tensor([[1, 0, 0.2], [0, 0.4, 1]]))
    (tmp_path / "points.ply").write_bytes(ply("ascii", ["x", "y", "z"], [[1, 2, 3]]))
    assert read_photos(tmp_path).points.tolist() == [[1, 2, 3]]
    assert read_photos(tmp_path).colors is None
    for names, lines, says in (
        ("xyw", [[1, 2, 3]], "have no x, y, z"),
        ("xyz", [[1, 2, "nan"]], "point 0 is not finite"),
        ("xyz", [[1, 2, "1e200"]], "point 0 is not finite"),
        ("xyz", [[1, 2]], "says 1 vertices of 3 numbers each"),
        ("xyz", [[1, 2, "a"]], "vertices that are no numbers"),
        ("xyx", [[1, 2, 3]], "each of its own name"),
    ):
        (tmp_path / "points.ply").write_bytes(ply("ascii", list(names), lines))
        with pytest.raises(ValueError, match=says):
            read_photos(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    draw = torch.Generator().manual_seed(0)
    cameras = orbit((0.3, -0.2, 0.5), distance=3.7, count=5, width=12, height=8)
    cameras[1] = cameras[1].resized(20, 10)
    K = cameras[2].K + torch.tensor([[1.3, 0, 0.7], [0, -2.1, -0.4], [0, 0, 0]])
    cameras[2] = Camera(viewmat=cameras[2].viewmat, K=K, width=12, height=8)
    images = [torch.randint(256, (c.height, c.width, 3 + k % 2), generator=draw) for k, c in enumerate(cameras)]
    images[3][0, :, 3] = 0  # the colours of what is not to be seen are kept, too
    photos = Photos(
        images=tuple(image.to(torch.uint8) for image in images),
        cameras=tuple(camera.to(torch.float32) for camera in cameras),
        names=tuple("abcde"),
        points=torch.randn(7, 3, generator=draw),
        colors=torch.rand(7, 3, generator=draw),
    )
    path = write_transforms(tmp_path / "new/scene", photos)
    assert path == tmp_path / "new/scene/transforms.json"
    for again in (read_photos(path), read_photos(path.parent)):
        assert all(torch.equal(a, b) for a, b in zip(photos.images, again.images, strict=True))
        for a, b in zip(photos.cameras, again.cameras, strict=True):
            assert torch.allclose(a.viewmat, b.viewmat, rtol=0, atol=1e-6)
            assert torch.equal(a.K, b.K)
            assert (a.width, a.height) == (b.width, b.height)
        assert torch.equal(again.points, photos.points)
        assert torch.allclose(again.colors, photos.colors, atol=0.5 / 255 + 1e-6)
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ValueError, match="a photograph or more"):
        write_transforms(tmp_path, photos.chosen([]))
    K = cameras[0].K.clone()
    K[0, 1] = 0.1
    with pytest.raises(ValueError, match="K must be .* without skew"):
        Camera(viewmat=cameras[0].viewmat, K=K, width=12, height=8)


BENDS = {"k1": -0.15, "k2": 0.03, "k3": 0.01, "p1": 0.004, "p2": -0.003}
WIDE = {"w": 160, "h": 120, "fl_x": 130.0, "fl_y": 128.0, "cx": 82.0, "cy": 57.0}


def bent(u, v, k1=0.0, k2=0.0, k3=0.0, p1=0.0, p2=0.0):
    """Return where a lens shows what a pinhole shows at pixels u, v: OpenCV's formula."""
    x, y = (u - WIDE["cx"]) / WIDE["fl_x"], (v - WIDE["cy"]) / WIDE["fl_y"]
    r2 = x**2 + y**2
    f = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    across = x * f + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    down = y * f + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return WIDE["fl_x"] * across + WIDE["cx"], WIDE["fl_y"] * down + WIDE["cy"]


def grid(u, v):
    """Return the brightness of a smooth grid, 0 to 255, at pixels u, v of a pinhole's picture."""
    return 127.5 + 60 * np.cos(2 * np.pi * u / 16) + 60 * np.cos(2 * np.pi * v / 16)


def photograph(path, bends, alpha=False):
    """Write the photograph of the grid by a lens: each pixel shows what a pinhole would where the lens shows it."""
    v, u = np.mgrid[: WIDE["h"], : WIDE["w"]] + 0.5
    x, y = u.copy(), v.copy()
    for _ in range(100):  # until the lens shows x, y at u, v
        across, down = bent(x, y, **bends)
        x, y = x + u - across, y + v - down
    assert max(np.abs(across - u).max(), np.abs(down - v).max()) < 1e-6
    gray = grid(x, y).round().astype(np.uint8)
    pixels = np.stack([gray, 255 - gray, gray // 2], -1)
    if alpha:  # nothing to the left, where a bright green lies hidden
        shown = x + 0.3 * y > 60
        pixels[~shown] = (0, 255, 0)
        pixels = np.concatenate([pixels, np.where(shown, 255, 0)[..., None].astype(np.uint8)], -1)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    "names", [("k1",), ("k1", "k2"), ("p1",), ("p2",), ("k1", "k2", "p1", "p2"), tuple(BENDS)], ids="".join
)
def test_distortion_is_undone(tmp_path, names):
    bends = {name: BENDS[name] for name in names}
    scene(tmp_path, **WIDE, **bends, camera_model="OPENCV")
    photograph(tmp_path / "images/0.png", bends)
    photos = read_photos(tmp_path)
    v, u = np.mgrid[: WIDE["h"], : WIDE["w"]] + 0.5
    across, down = bent(u, v, **bends)
    whole = (across > 1) & (across < WIDE["w"] - 1) & (down > 1) & (down < WIDE["h"] - 1)
    assert whole.mean() > 0.9
    straight = np.abs(photos.images[0][..., 0].numpy() - grid(u, v))[whole]
    scene(tmp_path, **WIDE)
    crooked = np.abs(read_photos(tmp_path).images[0][..., 0].numpy() - grid(u, v))[whole]
    assert straight.max() < 6  # of 240, by the rounding and the interpolation
    assert crooked.mean() > 4 * straight.mean()
    assert photos.cameras[0].K.tolist() == [[130, 0, 82], [0, 128, 57], [0, 0, 1]]


def test_colours_of_what_is_not_there_do_not_mix_in(tmp_path):
    scene(tmp_path, **WIDE, **BENDS)
    photograph(tmp_path / "images/0.png", BENDS, alpha=True)
    seen = read_photos(tmp_path).images[0].numpy().astype(int)
    edge = (seen[..., 3] > 8) & (seen[..., 3] < 247)
    assert edge.sum() > 50
    assert np.abs(seen[..., 1] + seen[..., 0] - 255)[edge].max() <= 12  # as on the grid; with the green, up to 240 more


def test_distortion_of_a_smaller_picture_is_undone_alike(tmp_path):
    scene(tmp_path, **{**WIDE, "fl_x": 260.0, "fl_y": 256.0, "cx": 164.0, "cy": 114.0, "w": 320, "h": 240}, **BENDS)
    photograph(tmp_path / "images/0.png", BENDS)
    half = read_photos(tmp_path)
    scene(tmp_path, **WIDE, **BENDS)
    photograph(tmp_path / "images/0.png", BENDS)
    assert torch.equal(half.images[0], read_photos(tmp_path).images[0])


# A camera at (1, 2, 3) that looks along the world's x, its right along -y, its down along -z.
QUAT = (0.5, 0.5, -0.5, 0.5)
SHIFT = (2.0, 3.0, -1.0)
PINHOLE = (1, 1, 12, 8, (10.0, 11.0, 6.5, 3.5))
POINTS = [(9, (3.0, 1.8, 3.4), (255, 0, 51)), (4, (1.0, 0.0, -1.0), (0, 102, 255))]
NAMES = ("PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "OPENCV_FISHEYE")
NUMBERS = dict(zip(NAMES, (1, 0, 2, 3, 4, 6, 5), strict=True))


def cameras_bin(*cameras):
    made = [struct.pack(f"<iiQQ{len(p)}d", number, model, w, h, *p) for number, model, w, h, p in cameras]
    return struct.pack("<Q", len(made)) + b"".join(made)


def images_bin(*names, quat=QUAT, shift=SHIFT, camera=1):
    made = [
        struct.pack("<i7di", 40 - k, *quat, *shift, camera)
        + name.encode()
        + b"\0"
        + struct.pack("<Q", k)
        + struct.pack("<ddq", 1.5, 2.5, -1) * k
        for k, name in enumerate(names)
    ]
    return struct.pack("<Q", len(made)) + b"".join(made)


def points_bin(points=POINTS):
    made = [
        struct.pack("<Q3d3BdQ", number, *where, *color, 0.5, k) + struct.pack("<ii", 1, 2) * k
        for k, (number, where, color) in enumerate(points)
    ]
    return struct.pack("<Q", len(made)) + b"".join(made)


def model(folder, place="sparse/0", **files):
    """Write a model with photographs b.png, a c.png and sub/a.png."""
    names = ("b.png", "a c.png", "sub/a.png")
    for k, name in enumerate(names):
        paint(folder / "images" / name, seed=k)
    (folder / place).mkdir(parents=True, exist_ok=True)
    made = {"cameras": cameras_bin(PINHOLE), "images": images_bin(*names), "points3D": points_bin(), **files}
    for name, raw in made.items():
        if raw is not None:
            (folder / place / f"{name}.bin").write_bytes(raw)
    return folder


def write_text(folder, camera="1 PINHOLE 12 8 10 11 6.5 3.5", image=None, point="1 2 3 4 5 6 7 0.5"):
    paint(folder / "images/a c.png")
    pose = " ".join(map(str, (*QUAT, *SHIFT)))
    first = f"7 {pose} 1 a c.png" if image is None else image
    (folder / "cameras.txt").write_text(f"# Camera list\n{camera}\n")
    (folder / "images.txt").write_text(f"# Image list\n\n{first}\n\n8 {pose} 1 b.png\n1.5 2.5 -1\n")
    (folder / "points3D.txt").write_text(f"# Points\n{point} 1 2 3 4\n2 0 0 0 255 255 255 0.5\n")
    paint(folder / "images/b.png")
    return folder


def check_axes(camera):
    assert camera.position.tolist() == pytest.approx([1, 2, 3])
    # 2 ahead, 0.2 to the right, 0.4 up.
    assert pixel(camera, (3.0, 1.8, 3.4)) == pytest.approx([6.5 + 10 * 0.1, 3.5 - 11 * 0.2], abs=1e-5)


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "."])
def test_colmaps_models(tmp_path, place):
    photos = read_photos(model(tmp_path, place))
    assert photos.names == ("a c.png", "b.png", "sub/a.png")
    check_axes(photos.cameras[0])
    assert torch.equal(photos.points, torch.tensor([POINTS[0][1], POINTS[1][1]]))
    assert torch.allclose(photos.colors, torch.tensor([[1, 0, 0.2], [0, 0.4, 1]]))
    assert read_photos(tmp_path, split="test").names == ("a c.png",)
    (tmp_path / "images/b.png").unlink()
    assert len(read_photos(tmp_path, skip_missing=True)) == 2


def test_colmaps_models_as_text(tmp_path):
    photos = read_photos(write_text(tmp_path))
    assert photos.names == ("a c.png", "b.png")
    check_axes(photos.cameras[0])
    assert photos.points.tolist() == [[2, 3, 4], [0, 0, 0]]
    assert photos.colors[1].tolist() == [1, 1, 1]
    (tmp_path / "points3D.txt").unlink()
    assert read_photos(tmp_path).points is None


@pytest.mark.parametrize(
    ("name", "bends"),
    [
        ("SIMPLE_RADIAL", ("k1",)),
        ("RADIAL", ("k1", "k2")),
        ("OPENCV", ("k1", "k2", "p1", "p2")),
        ("FULL_OPENCV", ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
        ("SIMPLE_PINHOLE", ()),
    ],
)
@pytest.mark.parametrize("binary", [True, False], ids=["bin", "txt"])
def test_colmaps_lenses(tmp_path, name, bends, binary):
    focal = (130.0, 128.0) if "OPENCV" in name else (130.0,)
    values = (*focal, WIDE["cx"], WIDE["cy"], *(BENDS.get(bend, 0.0) for bend in bends))
    if binary:
        model(tmp_path, cameras=cameras_bin((1, NUMBERS[name], 160, 120, values)), images=images_bin("b.png"))
    else:
        write_text(tmp_path, camera=f"1 {name} 160 120 {' '.join(map(str, values))}")
        photograph(tmp_path / "images/a c.png", {})
    photograph(tmp_path / "images/b.png", {})
    found = read_photos(tmp_path)
    frames = [{"file_path": "images/b.png", "transform_matrix": ABOVE}]
    known = {**WIDE, "fl_y": focal[-1], **{bend: BENDS[bend] for bend in bends if bend in BENDS}, "frames": frames}
    wanted = read_photos(scene(tmp_path, **known))
    assert torch.equal(found.images[-1], wanted.images[0])
    assert torch.equal(found.cameras[-1].K, wanted.cameras[0].K)


LIE = struct.pack("<Q", 2**60)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"cameras": b""}, "cameras.bin ends within a record"),
        ({"cameras": LIE + cameras_bin(PINHOLE)[8:]}, "cameras.bin says 1152921504606846976 records"),
        ({"cameras": cameras_bin(PINHOLE)[:-4]}, "cameras.bin ends within a record"),
        ({"cameras": cameras_bin(PINHOLE) + b"a"}, "says 1 records, and goes on"),
        ({"cameras": cameras_bin((1, 5, 12, 8, (1.0,) * 8))}, "by the camera OPENCV_FISHEYE cannot be undistorted"),
        ({"cameras": cameras_bin((1, 77, 12, 8, (1.0,)))}, "by the camera number 77 cannot"),
        ({"cameras": cameras_bin((1, -1, 12, 8, (1.0,)))}, "by the camera number -1 cannot"),
        ({"cameras": cameras_bin((2, *PINHOLE[1:]))}, "camera 1, which the model does not have"),
        ({"cameras": cameras_bin((1, 1, 0, 8, PINHOLE[4]))}, "a photograph has 1 to"),
        ({"cameras": cameras_bin((1, 1, 2**40, 2**40, PINHOLE[4]))}, "a photograph has 1 to"),
        ({"cameras": cameras_bin((1, 1, 12, 8, (math.nan, 1, 1, 1)))}, "4 finite parameters"),
        ({"cameras": cameras_bin((1, 1, 12, 8, (0.0, 1, 1, 1)))}, "focal lengths above 0"),
        ({"cameras": cameras_bin((1, 6, 12, 8, (10.0, 10, 6, 4, *(0.1,) * 8)))}, "distortion by k4, k5, k6 cannot"),
        ({"images": None}, "There is no file .*images.bin"),
        ({"images": b"\1"}, "images.bin ends within a record"),
        ({"images": LIE + images_bin("b.png")[8:]}, "images.bin says 1152921504606846976 records"),
        ({"images": images_bin("b.png", "a c.png")[:-9]}, "images.bin"),
        ({"images": images_bin("b.png")[:-8] + LIE}, "images.bin ends within a record"),
        ({"images": images_bin("b" * 5000)}, "has no end"),
        ({"images": images_bin("b.png") + b"\0"}, "and goes on after them"),
        ({"images": images_bin()}, "holds no photograph"),
        ({"images": images_bin("../b.png")}, "leaves the scene's folder"),
        ({"images": images_bin("/b.png")}, "leaves the scene's folder"),
        ({"images": images_bin("")}, "1 of 1 photographs"),
        ({"images": images_bin("none.png")}, r"1 of 1 photographs .*images/none\.png' to begin with"),
        ({"images": images_bin("b.png", quat=(0, 0, 0, 0))}, "a quaternion of length 1"),
        ({"images": images_bin("b.png", quat=(math.nan, 0, 0, 0))}, "a quaternion of length 1"),
        ({"images": images_bin("b.png", shift=(math.inf, 0, 0))}, "image b.png: .* must be finite"),
        ({"points3D": b"\1\2"}, "points3D.bin ends within a record"),
        ({"points3D": LIE + points_bin()[8:]}, "points3D.bin says"),
        ({"points3D": points_bin()[:-4]}, "points3D.bin ends within a record"),
        ({"points3D": points_bin([(1, (0.0, math.nan, 0.0), (0, 0, 0))])}, "point 0 is not finite"),
    ],
)
def test_models_that_are_refused(tmp_path, files, says):
    with pytest.raises(ValueError, match=says):
        read_photos(model(tmp_path, **files))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ({"camera": "1 PINHOLE 12"}, "cameras.txt, line 2 is no line"),
        ({"camera": "1 PINHOLE 12 8 10 11 6.5"}, "cameras.txt, line 2 is no line"),
        ({"camera": "1 PINHOLE 12 8 10 11 6.5 3.5 4"}, "has 4 finite parameters"),
        ({"camera": "1 FOV 12 8 10 11 6.5 3.5 4"}, "by the camera FOV cannot be undistorted"),
        ({"camera": "one PINHOLE 12 8 10 11 6.5 3.5"}, "cameras.txt, line 2 is no line"),
        ({"image": "7 1 0 0 0 0 0 0 1"}, "1 of 2 photographs"),
        ({"image": "7 1 0 0 0 0 0"}, "images.txt, line 3 is no line"),
        ({"image": "7 1 0 0 0 0 0 zero 1 a c.png"}, "images.txt, line 3 is no line"),
        ({"image": "7 nan 0 0 0 0 0 0 1 a c.png"}, "a quaternion of length 1"),
        ({"point": "1 2 a 4 5 6 7 0.5"}, "points3D.txt, line 2 is no line"),
        ({"point": "1 2 inf 4 5 6 7 0.5"}, "point 0 is not finite"),
    ],
)
def test_texts_that_are_refused(tmp_path, lines, says):
    with pytest.raises(ValueError, match=says):
        read_photos(write_text(tmp_path, **lines))


def test_the_bulldozer_is_seen_where_its_cameras_look(data):
    folder = data("nerf_synthetic_lego/lego_100")
    train, test = read_photos(folder), read_photos(folder, split="test")
    assert (len(train), len(test)) == (100, 200)
    side = torch.linspace(-1.5, 1.5, 31)
    points = torch.cartesian_prod(side, side, side)
    kept = torch.ones(len(points), dtype=torch.bool)
    for photos in (train, test):
        for image, camera in zip(photos.images, photos.cameras, strict=True):
            here = points @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
            at = (here @ camera.K.T)[:, :2] / here[:, 2:]
            column, row = at.floor().long().clamp(0, 99).unbind(1)
            kept &= image[row, column, 3] > 0
    hull = points[kept]
    assert len(hull) > 300  # a visual hull: with other axes, nothing is left
    assert (hull.abs().amax(0) < torch.tensor([0.8, 1.25, 1.25])).all()


def observations(file):
    """Return for each image of an images.bin its name and the pixels [m, 2] with the numbers of their points [m]."""
    raw, at = file.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", raw)[0]):
        end = raw.index(b"\0", at + 64)
        name = raw[at + 64 : end].decode()
        count = struct.unpack_from("<Q", raw, end + 1)[0]
        rows = np.frombuffer(raw, np.dtype([("at", "<f8", 2), ("point", "<i8")]), count, end + 9)
        at = end + 9 + rows.nbytes
        yield name, rows[rows["point"] >= 0]


def test_points_of_a_model_are_seen_where_colmap_found_them(data):
    folder = data("colmap_small")
    photos = read_photos(folder)
    assert len(photos) == 3
    assert photos.points.shape == (1334, 3)
    raw = (folder / "sparse/0/points3D.bin").read_bytes()
    numbers, at = {}, 8
    while at < len(raw):
        numbers[struct.unpack_from("<Q", raw, at)[0]] = len(numbers)
        at += 51 + 8 * struct.unpack_from("<Q", raw, at + 43)[0]
    seen = dict(observations(folder / "sparse/0/images.bin"))
    for name, camera, image in zip(photos.names, photos.cameras, photos.images, strict=True):
        rows = seen[name][np.isin(seen[name]["point"], list(numbers))]
        assert len(rows) > 300
        chosen = [numbers[number] for number in rows["point"].tolist()]
        here = photos.points[chosen] @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        at = (here @ camera.K.T)[:, :2] / here[:, 2:]
        away = (at - torch.from_numpy(rows["at"].copy())).norm(dim=1)
        assert away.mean() < 2
        column, row = at.floor().long().unbind(1)
        inside = (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        there = image[row[inside], column[inside]].float() / 255
        wanted = photos.colors[chosen][inside]
        assert (there - wanted).abs().mean() < 0.5 * (there.roll(7, 0) - wanted).abs().mean()  # their colours, too
