from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from simworld.kernels.projection import covariances
from simworld.kinds import SplatState
from simworld.quaternions import rotations
from simworld.render.camera import Camera
from simworld.render.files import read_splats, write_splats
from simworld.render.splats import decomposed, moved, render_splats, with_covariances
from simworld.render.usd import USD, read_usd, write_usd

CAMERA = Camera.look_at((4, 1, 1.5), (0, 0, 0), width=48, height=32)
QUARTER = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def splats(count=50, degree=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SplatState(
        means=torch.randn(count, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=0.05 + 0.2 * torch.rand(count, 3, generator=generator),
        opacities=torch.rand(count, generator=generator),
        harmonics=0.3 * torch.randn(count, (degree + 1) ** 2, 3, generator=generator),
    )


def turning(count=6, of=None):
    """Frames of splats that turn about the third axis, by 10 degrees each, and stretch along it."""
    given, frames = splats() if of is None else of, []
    for number in range(count):
        angle = torch.tensor(number * torch.pi / 18)
        turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
        stretch = torch.diag(torch.tensor([1.0, 1.0, 1.0 + 0.1 * number]))
        now = with_covariances(moved(given, turn))
        frames.append(now.replace(means=now.means @ stretch, covars=stretch @ now.covars @ stretch))
    return frames


def usd():
    return pytest.importorskip("pxr.UsdVol", reason="needs usd-core, of the extra formats")


@pytest.mark.parametrize("suffix", USD)
@pytest.mark.parametrize("degree", range(4))
def test_one_frame_renders_as_before(tmp_path, suffix, degree):
    usd()
    given = splats(degree=degree)
    again = read_splats(write_splats(tmp_path / f"a{suffix}", given))
    for name in ("means", "scales", "opacities", "harmonics"):
        assert torch.equal(again[name], given[name]), name
    assert torch.allclose(again.quats, given.quats, atol=1e-6)
    assert torch.allclose(render_splats(again, CAMERA), render_splats(given, CAMERA), atol=1e-6)
    assert read_usd(tmp_path / f"a{suffix}").dt is None
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_rollouts_render_as_before_at_each_instant(tmp_path):
    usd()
    given = turning()
    found = read_usd(write_usd(tmp_path / "a.usdc", given, dt=0.02))
    assert len(found.frames) == len(given)
    assert found.dt == pytest.approx(0.02, rel=1e-12)
    for again, frame in zip(found.frames, given, strict=True):
        assert torch.allclose(render_splats(again, CAMERA), render_splats(frame, CAMERA), atol=2e-5)
    for one, after in zip(found.frames, found.frames[1:], strict=False):  # what is between may be interpolated
        assert ((one.quats * after.quats).sum(1) > 0.9).all()


def test_what_does_not_change_is_written_once(tmp_path):
    from_pxr = usd()
    from pxr import Usd

    given = splats()
    frames = [given.replace(means=given.means + 0.1 * k) for k in range(4)]
    stage = Usd.Stage.Open(str(write_usd(tmp_path / "a.usda", frames, dt=0.1)))
    field = from_pxr.ParticleField3DGaussianSplat(stage.GetDefaultPrim())
    assert field.GetPositionsAttr().GetTimeSamples() == [0, 1, 2, 3]
    assert field.GetRadianceSphericalHarmonicsCoefficientsAttr().GetTimeSamples() == []
    assert field.GetScalesAttr().GetTimeSamples() == []
    assert stage.GetTimeCodesPerSecond() == 10
    low, high = np.array(field.GetExtentAttr().Get(3))
    assert (low < frames[3].means.amin(0).numpy()).all()
    assert (high > frames[3].means.amax(0).numpy()).all()
    quat = field.GetOrientationsAttr().Get()[0]
    assert [quat.GetReal(), *quat.GetImaginary()] == pytest.approx(given.quats[0].tolist(), abs=1e-6)


def test_what_stays_has_as_many_instants(tmp_path):
    usd()
    found = read_usd(write_usd(tmp_path / "a.usd", [splats()] * 3, dt=0.5))
    assert (len(found.frames), found.dt) == (3, 0.5)


def test_splats_that_are_not_active_stay_in_their_rows_unseen(tmp_path):
    usd()
    given = splats()
    gone = given.replace(active=torch.arange(len(given)) % 2 == 0)
    found = read_usd(write_usd(tmp_path / "a.usd", [given, gone], dt=1.0)).frames
    assert [len(frame) for frame in found] == [50, 50]
    assert torch.allclose(render_splats(found[1], CAMERA), render_splats(gone, CAMERA), atol=1e-6)
    write_splats(tmp_path / "a.ply", gone)
    assert len(read_splats(tmp_path / "a.ply")) == 25


def test_prims_in_which_a_field_lies_move_it(tmp_path):
    usd()
    from pxr import Gf, Usd, UsdGeom

    given = splats()
    write_usd(tmp_path / "inner.usda", given)
    stage = Usd.Stage.CreateNew(str(tmp_path / "a.usda"))
    outer = UsdGeom.Xform.Define(stage, "/world")
    stage.OverridePrim("/world/field").GetReferences().AddReference("./inner.usda")
    matrix = np.eye(4)
    matrix[:3, :3], matrix[3, :3] = 2 * QUARTER.T.numpy(), (1, 2, 3)
    op = outer.AddTransformOp()
    op.Set(Gf.Matrix4d(matrix.tolist()))
    stage.Save()
    wanted = moved(given, QUARTER, torch.tensor([1.0, 2.0, 3.0]), 2.0)
    found = read_splats(tmp_path / "a.usda")
    assert torch.allclose(found.means, wanted.means, atol=1e-5)
    assert torch.allclose(found.harmonics, wanted.harmonics, atol=1e-5)
    assert torch.allclose(covariances(found.quats, found.scales), covariances(wanted.quats, wanted.scales), atol=1e-5)
    for time in (0, 1):
        op.Set(Gf.Matrix4d(np.eye(4).tolist()).SetTranslate(Gf.Vec3d(time, 0, 0)), time)
    stage.Save()
    frames = read_usd(tmp_path / "a.usda").frames
    assert [float((frame.means - given.means).mean(0)[0]) for frame in frames] == pytest.approx([0, 1], abs=1e-5)
    op.GetAttr().Clear()
    for value, what in [(np.diag([1.0, 2, 1, 1]), "along an axis"), (np.diag([-1.0, 1, 1, 1]), "mirrored")]:
        op.Set(Gf.Matrix4d(value.tolist()))
        stage.Save()
        with pytest.raises(ValueError, match=what):
            read_usd(tmp_path / "a.usda")


def test_half_numbers_are_read_where_they_stand_alone(tmp_path):
    from_pxr = usd()
    from pxr import Usd, Vt

    given = splats(count=2, degree=0)
    stage = Usd.Stage.Open(str(write_usd(tmp_path / "a.usda", given)))
    field = from_pxr.ParticleField3DGaussianSplat(stage.GetDefaultPrim())
    field.GetPrim().RemoveProperty("positions")
    field.CreatePositionshAttr(Vt.Vec3hArray.FromNumpy(given.means.half().numpy()))
    stage.Save()
    assert torch.equal(read_splats(tmp_path / "a.usda").means, given.means.half().float())


def test_stages_that_are_refused(tmp_path):
    usd()
    given, path = splats(count=3, degree=1), tmp_path / "a.usda"
    text = write_usd(path, given).read_text()
    for change, says in [
        (lambda t: t.replace("ParticleField3DGaussianSplat", "Xform"), "must have one ParticleField3D.*got 0"),
        (lambda t: t + t[t.index("def ") :].replace('"splats"', '"others"'), "got 2"),
        (lambda t: t.replace("float[] opacities", "float[] other"), "has no opacities"),
        (lambda t: t.replace("sphericalHarmonicsDegree = 1", "sphericalHarmonicsDegree = 7"), "degree 7"),
        (lambda t: t.replace("sphericalHarmonicsDegree = 1", "sphericalHarmonicsDegree = 2"), "other lengths"),
        (lambda t: t.replace("float[] opacities = [", "float[] opacities = [0.5, "), "other lengths"),
        (lambda t: t.replace("float[] opacities = [", "float[] opacities = [nan]#"), "other lengths"),
        (lambda t: t.replace("float[] opacities = [0", "float[] opacities = [7"), "opacity of splat 0 is not 0 to 1"),
        (lambda t: t[: len(t) // 2], "no stage of OpenUSD"),
        (lambda t: "#usda 1.0", "got 0"),
        (lambda t: "hello", "no stage of OpenUSD"),
    ]:
        path.write_text(change(text))
        with pytest.raises(ValueError, match=says):
            read_usd(path)
    with pytest.raises(ValueError, match="There is no file"):
        read_usd(tmp_path / "b.usda")
    with pytest.raises(ValueError, match="Stages are read from"):
        read_usd(tmp_path / "b.ply")


def test_states_that_are_not_written(tmp_path):
    usd()
    given, path = splats(), tmp_path / "a.usd"
    for frames, dt, says in [
        ([], 0.1, "got 0, dt 0.1"),
        ([given, given], None, "got 2, dt None"),
        ([given, given], 0.0, "got 2, dt 0.0"),
        ([given, splats(degree=1)], 0.1, r"of one degree; got \[1, 2\]"),
        (SplatState.cat([given, given]), None, "has 2 scenes"),
        (given.replace(means=given.means * torch.inf), None, "Frame 0: means of splat 0 are not finite"),
    ]:
        with pytest.raises(ValueError, match=says):
            write_usd(path, frames, dt=dt)
    with pytest.raises(ValueError, match="Stages are written to"):
        write_usd(tmp_path / "a.ply", given)
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_sentence_says_so(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "pxr" or name.startswith("pxr.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pxr", None)
    with pytest.raises(ImportError, match=r"writing USD needs usd-core>=26.3.*simworld\[formats\]"):
        write_usd(tmp_path / "a.usd", splats())


def test_covariances_are_decomposed():
    given = splats(200)
    flat = given.replace(scales=given.scales * torch.tensor([1.0, 1.0, 0.0]))
    round_ = given.replace(scales=given.scales[:, :1].expand(-1, 3).clone())
    disc = given.replace(scales=given.scales[:, [0, 0, 1]])
    thin = given.replace(scales=given.scales * torch.tensor([1.0, 1e-3, 1e-4]))
    for one in (given, flat, round_, disc, thin, given.replace(scales=0 * given.scales)):
        covars = with_covariances(one)
        for like in (None, one, covars):
            found = decomposed(covars, like)
            again = covariances(found.quats, found.scales)
            assert ((again - covars.covars).abs().amax((1, 2)) <= 1e-6 * covars.covars.abs().amax((1, 2))).all()
            assert torch.allclose(torch.linalg.det(rotations(found.quats)), torch.ones(200), atol=1e-5)
            assert torch.allclose(found.quats.norm(dim=1), torch.ones(200), atol=1e-6)
        near = decomposed(covars, one)
        assert ((near.quats * one.quats).sum(1) > 0.9).all()
        if one is given:
            assert torch.allclose(near.quats, one.quats, atol=1e-3)
            assert torch.allclose(near.scales, one.scales, atol=1e-6)
    assert decomposed(given) is given


def test_axes_go_on_from_frame_to_frame():
    for of in (splats(), splats().replace(scales=splats().scales[:, [0, 0, 1]])):
        frames, before = turning(36, of), None
        for frame in frames:
            now = decomposed(frame, before)
            if before is not None:
                assert ((now.quats * before.quats).sum(1) > 0.9).all()
            before = now


def test_covariances_that_are_refused():
    given = with_covariances(splats())
    with pytest.raises(ValueError, match="covariance of splat 0 is not finite"):
        decomposed(given.replace(covars=given.covars * torch.nan))
    with pytest.raises(ValueError, match="like of as many splats, 50; it has 3"):
        decomposed(given, splats(3))
    shapeless = SplatState(means=given.means, opacities=given.opacities, harmonics=given.harmonics)
    with pytest.raises(ValueError, match="these have neither"):
        decomposed(shapeless)


def test_stages_in_centimetres_are_read_in_metres(tmp_path):
    given, path = splats(), tmp_path / "a.usda"
    write_usd(path, given)
    text = path.read_text()
    assert "metersPerUnit = 1" in text
    path.write_text(text.replace("metersPerUnit = 1", "metersPerUnit = 0.01"))
    read = read_usd(path).frames[0]
    assert torch.allclose(read.means, 0.01 * given.means, atol=1e-7)
    assert torch.allclose(read.scales, 0.01 * given.scales, rtol=1e-4)
