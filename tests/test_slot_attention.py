from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from simworld import load_checkpoint, open_trajectories, write_trajectories
from simworld.cli import main
from simworld.encode import (
    check_not_collapsed,
    encode_file,
    figures,
    matched,
    probe_rows,
    seen,
)
from simworld.kinds import SlotState
from simworld.models import CausalJEPA, SlotAttention, load_encoder, save_checkpoint
from simworld.models.checkpoint import read_tensors
from simworld.physics.video_worlds import video_billiards, video_drift
from simworld.render.filming import film, square_camera
from simworld.train_encoder import EncoderFit, fit_encoder, read_encoder_run, start_encoder

SMALL = {"image_size": 32, "num_slots": 5, "slot_size": 10, "num_channels": 8, "decoder_size": 8, "num_cells": 8}
HOW = {"num_steps": 6, "num_frames": 2, "batch_size": 3, "evaluate_every": 3, "warm_up": 2}


@pytest.fixture(scope="module")
def recorded():
    paths = [video_billiards([7, 0, k], num_steps=7, num_bodies=3) for k in range(4)]
    return paths, [film(path, square_camera(32)) for path in paths]


@pytest.fixture
def make():
    def make(**arguments):
        torch.manual_seed(0)
        return SlotAttention(**{**SMALL, **arguments})

    return make


@pytest.fixture
def file(recorded, tmp_path):
    paths, views = recorded
    write_trajectories(tmp_path / "data.h5", paths, dataset="video_billiards", views=lambda k: [views[k]])
    return tmp_path / "data.h5"


def clips(recorded, count=3, length=4):
    return torch.stack([view.rgb[:length] for view in recorded[1][:count]])


def test_slots_are_a_trajectory_that_knows_its_past(make, recorded):
    model, rgb = make(), recorded[1][0].rgb
    whole, path = model.encode(rgb), model.encode(rgb, history=3)
    assert isinstance(path.initial, SlotState)
    assert whole["slots"].shape == (8, 5, 10)
    assert path["slots"].shape == (5, 5, 10)
    assert torch.equal(path.initial.history, whole["slots"][:3].transpose(0, 1))
    assert torch.equal(path["slots"], whole["slots"][3:])
    assert torch.equal(path.frame(2).history, whole["slots"][2:5].transpose(0, 1))
    assert path.active.all()
    assert path.dt == model.dt


def test_permuted_starts_give_permuted_slots(make, recorded):
    model = make(initial="random")
    with torch.no_grad():
        model.decoder[-1].weight.normal_(std=0.3)
    frames = model.prepare(clips(recorded))
    start = model.start_slots(frames, torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    slots, permuted = model(frames, start), model(frames, start[:, order])
    assert torch.allclose(permuted, slots[:, :, order], atol=1e-5)
    assert not torch.allclose(permuted, slots, atol=1e-2)
    assert torch.allclose(model.shown_again(permuted), model.shown_again(slots), atol=1e-5)


def test_slots_do_not_know_the_future(make, recorded):
    model, rgb = make(), recorded[1][0].rgb
    assert torch.allclose(model.encode(rgb[:4])["slots"], model.encode(rgb)["slots"][:4], atol=1e-6)
    other = torch.cat([rgb[:4], rgb[:4].flip(2)])
    assert torch.allclose(model.encode(other)["slots"][:4], model.encode(rgb)["slots"][:4], atol=1e-6)
    assert not torch.allclose(model.encode(other)["slots"][4:], model.encode(rgb)["slots"][4:], atol=1e-4)


@pytest.mark.parametrize("initial", ["random", "learned", "seeds", "colors"])
def test_the_same_seed_gives_the_same_bits(make, recorded, initial):
    model, rgb = make(initial=initial), recorded[1][0].rgb
    assert torch.equal(model.encode(rgb, seed=3)["slots"], model.encode(rgb, seed=3)["slots"])
    same = torch.equal(model.encode(rgb, seed=3)["slots"], model.encode(rgb, seed=4)["slots"])
    assert same == (initial != "random")


@pytest.mark.parametrize("initial", ["seeds", "colors"])
def test_seeds_are_where_bodies_are(make, initial):
    """Before anything is learned, most bodies of unseen films have a slot of their own in frame 0."""
    model = make(num_slots=7, image_size=64, initial=initial)
    views = [film(video_billiards([8, 0, k], num_steps=0, num_bodies=3 + k), square_camera(64)) for k in range(4)]
    assert figures(model, views)["foreground_ari"] > 0.7


def test_a_body_is_one_seed_by_color_even_beside_another(make):
    """Large shaded discs side by side start one slot each, and the rest start in corners, with the median color."""
    middles = [(20.0, 30.0), (36.0, 30.0)]
    model = make(num_slots=7, image_size=64, initial="colors")
    rgb = painted(middles).expand(1, 1, -1, -1, -1)
    places = (model.start_slots(model.prepare(rgb))[0, :, -2:] + 1) * 32
    inside = (places[:, None] - torch.tensor(middles)).norm(dim=2) < 8
    assert inside.sum(0).tolist() == [1, 1]
    assert (model.start_slots(model.prepare(rgb))[0, 2:, -2:].abs() == 1).all()


def test_what_comes_out_later_has_a_slot_from_then_on(make):
    """A disc that frame 0 does not show takes the first slot that has started on nothing; discs that move take none."""
    still, moving, late = (20.0, 20.0), [(44.0, 16.0 + 2 * t) for t in range(6)], (16.0, 46.0)
    rgb = torch.stack([painted([still, moving[t], *([late] if t > 2 else [])]) for t in range(6)])
    model = make(num_slots=5, image_size=64, initial="colors", newcomers=True)
    blind = make(num_slots=5, image_size=64, initial="colors")
    for one in (model, blind):
        one.corrector.forward = lambda content, places, seen, grid, num_iterations: (content, places)
        one.predictor.forward = lambda slots: slots
    found, same = (one.encode(rgb)["slots"] for one in (model, blind))
    assert torch.equal(found[:3], same[:3])
    corner, there = same[0, 2, -2:], found[3:, 2, -2:]
    assert (corner.abs() == 1).all()
    assert (((there + 1) * 32 - torch.tensor(late)).norm(dim=1) < 8).all()
    assert torch.equal(found[:, [0, 1, 3, 4]], same[:, [0, 1, 3, 4]])


def painted(middles):
    """Return a frame [64, 64, 3] of shaded discs of radius 8: one yellow, one blue, one red."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    frame = torch.full((64, 64, 3), 40.0)
    colors = [(240.0, 220.0, 40.0), (40.0, 90.0, 200.0), (220.0, 40.0, 60.0)]
    for (cx, cy), color in zip(middles, colors, strict=False):
        away = ((x - cx).square() + (y - cy).square()).sqrt()
        shade = (1.2 - away / 10).clamp(max=1)  # darker towards the rim
        frame[away < 8] = (torch.tensor(color) * shade[..., None])[away < 8]
    return frame.to(torch.uint8)


def test_slots_that_see_nothing_keep_their_course(make):
    """Slots that went on by 0.1 a frame go on so where they win nothing; without motion they stay."""

    class Corrector(torch.nn.Module):
        def look(self, features):
            return features, features

        def forward(self, content, places, seen, grid, num_iterations):
            self.frame += 1
            return content, torch.full_like(places, 0.1 * self.frame) if self.frame < 4 else places

    for motion, expected in (("steady", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), ("none", [0.0, 0.1, 0.2, 0.3, 0.3, 0.3])):
        model = make(motion=motion)
        model.corrector = Corrector()
        model.corrector.frame = -1
        if motion == "steady":
            torch.nn.init.constant_(model.turn, 30.0)  # believes what it sees at once
        found = model(torch.zeros(1, 6, 3, 16, 16), torch.zeros(1, 5, 10))
        assert torch.allclose(found[0, :, 2, -1], torch.tensor(expected), atol=1e-5)


def test_slots_that_win_nothing_take_nothing(make):
    model = make(motion="steady")
    with torch.no_grad():
        model.corrector.nobody.fill_(30.0)
    slots, keys, values = torch.randn(2, 5, 10), torch.randn(2, 64, 8), torch.randn(2, 64, 8)
    places = slots[..., -2:].tanh()
    content, found = model.corrector(slots[..., :-2], places, (keys, values), model.seen_grid, 1)
    other = model.corrector(slots[..., :-2], places, (keys, 9 * values), model.seen_grid, 1)[0]
    assert torch.allclose(found, places, atol=1e-5)
    assert torch.allclose(other, content, atol=1e-5)
    with torch.no_grad():
        model.corrector.nobody.fill_(-30.0)
    assert not torch.allclose(model.corrector(slots[..., :-2], places, (keys, values), model.seen_grid, 1)[1], places)


def test_a_loss_of_some_frames_is_that_of_all_on_average(make, recorded):
    every, some, rgb = make(), make(num_drawn=1), clips(recorded)
    with torch.no_grad():
        for model in (every, some):
            model.decoder[-1].weight.copy_(
                torch.linspace(-1, 1, model.decoder[-1].weight.numel()).view_as(model.decoder[-1].weight)
            )
        whole = float(every.loss(rgb, torch.Generator().manual_seed(0)))
        drawn = torch.stack([some.loss(rgb, torch.Generator().manual_seed(k)) for k in range(60)])
    assert drawn.std() > 0
    assert float(drawn.mean()) == pytest.approx(whole, abs=4 * float(drawn.std()) / 60**0.5)


def test_alphas_share_out_every_pixel(make, recorded):
    model = make()
    drawn, alphas = model.decode(model.encode(recorded[1][0].rgb)["slots"])
    assert drawn.shape == (8, 5, 3, 16, 16)
    assert torch.allclose(alphas.sum(1), torch.ones(8, 16, 16), atol=1e-5)


def test_a_thing_is_drawn_alike_wherever_it_is(make):
    """A slot that lies two places further to the right draws the same, two places further to the right."""
    model = make()
    with torch.no_grad():
        model.decoder[-1].weight.normal_(std=0.3)
    slots = torch.randn(1, 5, 10)
    slots[..., -2:] = torch.tensor([-0.3, 0.1])
    moved = slots.clone()
    moved[..., -2] += 2 * 2 / SMALL["num_cells"]
    near, far = (model.decode(one)[0] for one in (slots, moved))
    shift = 2 * model.patch
    assert torch.allclose(near[..., :-shift], far[..., shift:], atol=1e-5)
    assert not torch.allclose(near, far, atol=1e-3)


@pytest.mark.parametrize("reconstruct", ["pixels", "features"])
@pytest.mark.parametrize("initial", ["random", "learned", "seeds"])
def test_training_makes_the_loss_smaller(make, recorded, tmp_path, reconstruct, initial):
    films = [view.rgb for view in recorded[1]]
    arguments = {"reconstruct": reconstruct, "initial": initial}
    arguments["statistics"] = SlotAttention.measure_films(films, **{**SMALL, **arguments})
    model = make(**arguments)
    before = float(model.loss(clips(recorded), torch.Generator().manual_seed(0)).detach())
    how = EncoderFit(**{**HOW, "num_steps": 60, "evaluate_every": 60, "learning_rate": 1e-2})
    fit_encoder(model, films, how, out=tmp_path)
    after = float(model.loss(clips(recorded), torch.Generator().manual_seed(0)).detach())
    assert after < (0.85 if reconstruct == "pixels" else 0.95) * before


def test_features_to_be_shown_are_of_unit_spread(make, recorded):
    films = [view.rgb for view in recorded[1]]
    chosen = {**SMALL, "reconstruct": "features"}
    model = SlotAttention(**chosen, statistics=SlotAttention.measure_films(films, **chosen))
    aims = torch.cat([model.aim(model.prepare(rgb)) for rgb in films])
    assert torch.allclose(aims.std((0, 2, 3)), torch.ones(16), atol=1e-3)
    assert model.shown_again(model.encode(films[0])["slots"]).shape == (8, 16, 8, 8)
    other = SlotAttention(**chosen, feature_seed=1)
    assert not torch.equal(other.first_filter, model.first_filter)
    assert all("filter" not in name for name in model.state_dict())


def test_an_interrupted_training_ends_with_the_same_bits(make, recorded, tmp_path):
    films, how = [view.rgb for view in recorded[1]], EncoderFit(**HOW)
    fit_encoder(make(), films, how, out=tmp_path / "whole")

    class Stop(Exception): ...

    def stop(report):
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        fit_encoder(make(), films, how, out=tmp_path / "cut", watch=stop)
    fit_encoder(make(), films, how, out=tmp_path / "cut")
    for name, schema in (("training", "simworld.training"), ("model", "simworld.checkpoint")):
        (_, a), (_, b) = (read_tensors(tmp_path / run / f"{name}.safetensors", schema, 1) for run in ("whole", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="a run with other settings"):
        fit_encoder(make(), films, dataclasses.replace(how, batch_size=2), out=tmp_path / "cut")
    with pytest.raises(ValueError, match="a run with other settings"):
        fit_encoder(make(), films[:3], how, out=tmp_path / "cut")


def test_checkpoints_hold_all_that_rebuilds_an_encoder(make, recorded, tmp_path):
    films = [view.rgb for view in recorded[1]]
    statistics = SlotAttention.measure_films(films, **SMALL, reconstruct="features")
    model = make(reconstruct="features", statistics=statistics, dt=0.2)
    save_checkpoint(model, tmp_path / "m.safetensors", dataset="video_billiards")
    again = load_encoder(tmp_path / "m.safetensors")
    assert torch.equal(again.encode(films[0])["slots"], model.encode(films[0])["slots"])
    assert torch.equal(again.aim(again.prepare(films[0])), model.aim(model.prepare(films[0])))
    assert again.provenance["dataset"] == "video_billiards"
    assert again.dt == 0.2
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["arguments"])["num_slots"] == 5
    with pytest.raises(ValueError, match="holds a SlotAttention, which makes slots of films"):
        load_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not see films"):
        load_encoder("rope")


def test_films_that_cannot_be_seen(make, recorded):
    model, rgb = make(), recorded[1][0].rgb
    with pytest.raises(ValueError, match=r"takes films \[T, 32, 32, 3\]; got \[8, 16, 32, 3\]"):
        model.encode(rgb[:, ::2])
    broken = rgb / 255
    broken[2, 5, 5, 1] = torch.nan
    with pytest.raises(ValueError, match="A film must be finite; frame 2 holds NaN"):
        model.encode(broken)
    with pytest.raises(ValueError, match=r"Floats in a film are from 0 to 1; got 0 to 237\. Divide .* by 255"):
        model.encode(rgb.float().clamp(0, 237).index_fill(1, torch.tensor(0), 0.0).index_fill(1, torch.tensor(1), 237))
    with pytest.raises(ValueError, match=r"bytes \(torch.uint8\) or floats from 0 to 1; got torch.int64\. Convert"):
        model.encode(rgb.long())
    with pytest.raises(ValueError, match="history of 8 has 9 frames or more"):
        model.encode(rgb, history=8)
    with pytest.raises(ValueError, match=r"give a torch\.Generator"):
        make(initial="random").start_slots(model.prepare(rgb)[None])
    assert torch.allclose(model.encode(rgb / 255)["slots"], model.encode(rgb)["slots"], atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"initial": "none"}, "initial must be one of seeds, colors, random, learned"),
        ({"motion": "quick"}, "motion must be one of none, steady"),
        ({"num_drawn": -1}, "num_drawn must be 0"),
        ({"newcomers": True}, "newcomers are told by their colors; set initial = 'colors', not 'seeds'"),
        ({"reconstruct": "sound"}, "reconstruct must be one of pixels, features"),
        ({"slot_size": 9}, "2 above a multiple of num_heads=4"),
        ({"image_size": 36}, "a multiple of 4 and of 16"),
        ({"num_slots": 0}, "num_slots must be 1 or more"),
        ({"dt": 0.0}, "dt must be a positive"),
    ],
)
def test_sizes_that_do_not_fit(make, wrong, said):
    with pytest.raises(ValueError, match=said):
        make(**wrong)


def test_bad_trainings(make, recorded, tmp_path):
    films = [view.rgb for view in recorded[1]]
    with pytest.raises(ValueError, match="no films"):
        fit_encoder(make(), [], EncoderFit(**HOW), out=tmp_path)
    with pytest.raises(ValueError, match="Clips are of 9 frames; a film has 8"):
        fit_encoder(make(), films, EncoderFit(**{**HOW, "num_frames": 9}), out=tmp_path)
    with pytest.raises(ValueError, match="takes films"):
        fit_encoder(make(image_size=64), films, EncoderFit(**HOW), out=tmp_path)
    with pytest.raises(ValueError, match="num_frames must be 1 or more"):
        EncoderFit(num_steps=3, num_frames=0)


class Told(SlotAttention):
    """Slots that a test says: they own the pixels of bodies as the masks have them."""

    def owners(self, slots):
        return self.masks[len(self.masks) - len(slots) :]


def test_slots_are_matched_to_bodies(recorded):
    torch.manual_seed(0)
    paths, views = recorded
    encoder = Told(**SMALL)
    view = views[0]
    encoder.masks = torch.tensor([4, 2, 0, 3])[view.masks.long()].to(torch.uint8)  # the background's slot is 4
    encoded = encoder.encode(view.rgb, history=1)
    path, kept = matched(encoder, encoded, view, 3)
    assert kept == 1
    assert torch.equal(path["slots"], encoded["slots"][:, [2, 0, 3]])
    assert torch.equal(path.frame(3).history, encoded.frame(3).history[[2, 0, 3]])
    assert figures(encoder, [view])["foreground_ari"] == 1
    encoder.masks = torch.where(torch.arange(8)[:, None, None] < 5, encoder.masks, (encoder.masks + 1) % 5)
    assert matched(encoder, encoded, view, 3)[1] == pytest.approx(4 / 7)
    told = figures(encoder, [view])
    assert told["foreground_ari"] == 1
    assert told["clip_ari"] < 0.8
    assert paths[0].initial.num_entities == 3


def test_what_a_film_shows_of_bodies_is_where_their_masks_are(recorded):
    path, view = recorded[0][1], recorded[1][1]
    shown = seen(path, view)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for body in range(3):
        here = view.masks[5] == body + 1
        middle = torch.stack([(part[here] + 0.5).mean() / 32 for part in (columns, rows)])
        assert torch.allclose(shown["positions"][5, body], middle.double(), atol=0.02)
    assert torch.allclose(shown["velocities"][3], (shown["positions"][3] - shown["positions"][2]) / path.dt, atol=1e-9)
    assert shown["color"].shape == (8, 3, 3)
    assert torch.equal(shown["radius"][4, :, 0], path.initial.radii)


def test_a_file_of_films_becomes_a_file_of_slots(make, file, tmp_path):
    model, out = make(), tmp_path / "slots.h5"
    with torch.no_grad():
        model.corrector.values.weight.mul_(10)  # an untrained encoder tells films apart by too little
    encode_file("mine", model, file, out, history=2)
    with open_trajectories(out) as slots, open_trajectories(file) as data:
        assert len(slots) == len(data) == 4
        assert slots.kind.__name__ == "SlotState"
        assert torch.equal(slots[1]["slots"], model.encode(data.views(1)[0].rgb, history=2)["slots"])
        said = json.loads(slots.recipe)
        assert (said["slots_of"], said["encoder"], said["history"]) == ("data.h5", "mine", 2)
        with pytest.raises(ValueError, match="has no film of episode 0"):
            encode_file("mine", model, out, tmp_path / "again.h5")


def test_slots_of_films_under_actions_know_them(make, recorded, tmp_path):
    path, view = recorded[0][0], recorded[1][0]
    model, out = make(), tmp_path / "slots.h5"
    with torch.no_grad():
        model.corrector.values.weight.mul_(10)
    acted = torch.randn(len(path) - 1, 1, 2, generator=torch.Generator().manual_seed(0))
    for actions in (acted, acted.expand(-1, path.initial.num_entities, -1)):
        episodes = [dataclasses.replace(path.to(torch.float32), actions=actions)]
        write_trajectories(tmp_path / "data.h5", episodes, dataset="pushed", views=lambda n: [view], action_unit="N")
        if actions is not acted:
            with pytest.raises(ValueError, match="actions .T, b, a. per scene"):
                encode_file("mine", model, tmp_path / "data.h5", out, history=2)
            continue
        encode_file("mine", model, tmp_path / "data.h5", out, history=2)
        with open_trajectories(out) as slots:
            assert slots.action_unit == "N"
            assert torch.equal(slots[0].actions, acted[2:])
            assert torch.equal(slots[0].frame(1).past_actions, acted[1:3].transpose(0, 1))
            CausalJEPA.measure([slots[0]], actions="input")


def test_slots_that_are_all_alike_in_a_frame_have_collapsed(make, file):
    with open_trajectories(file) as data:
        paths = [make().encode(data.views(number)[0].rgb) for number in range(3)]
    drawn = torch.randn(3, *paths[0]["slots"].shape, generator=torch.Generator().manual_seed(0))
    apart = [dataclasses.replace(path, frames={"slots": slots}) for path, slots in zip(paths, drawn, strict=True)]
    check_not_collapsed("mine", apart)
    alike = [
        dataclasses.replace(path, frames={"slots": path["slots"].mean(1, True) + 1e-4 * path["slots"]})
        for path in apart
    ]
    with pytest.raises(ValueError, match="or as each other"):
        check_not_collapsed("mine", alike)


def test_what_cannot_be_encoded(make, file, tmp_path):
    with pytest.raises(ValueError, match="3 bodies before a background, and this encoder 3 slots"):
        encode_file("mine", make(num_slots=3), file, tmp_path / "a.h5")
    with pytest.raises(ValueError, match="trained on frames 0.2 s apart"):
        encode_file("mine", make(dt=0.2), file, tmp_path / "a.h5")
    flat = make(initial="learned")
    with torch.no_grad():
        for parameter in flat.corrector.parameters():
            parameter.zero_()
        flat.start.fill_(1.0)
    with pytest.raises(ValueError, match="mine has collapsed"):
        encode_file("mine", flat, file, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def test_probes_tell_what_slots_hold(make, file):
    """Slots that say where their thing is are probed without error, beside the mean's."""

    class Knowing(Told):
        def slots(self, rgb, seed):
            index = next(k for k in range(4) if torch.equal(self.films[k].rgb, rgb))
            self.masks = self.films[index].masks
            places = seen(self.paths[index], self.films[index])["positions"]
            slots = torch.zeros(len(rgb), 5, 10)
            slots[:, 1:4, :2] = places.float()
            return slots

    with open_trajectories(file) as data:
        encoder = Knowing(**SMALL)
        encoder.paths, encoder.films = data[:], [data.views(k)[0] for k in range(4)]
        rows = {(row.model, row.metric): row.value for row in probe_rows("mine", encoder, data, data)}
    assert rows["mine", "probed_positions"] < 1e-5
    assert rows["mine", "probed_velocities"] < 1e-4
    assert 0.1 < rows["mean", "probed_positions"] < 0.6
    assert rows["mine", "probed_color"] > 0.1


@pytest.mark.parametrize("lacking", ["fitted", "judged"])
def test_probes_are_of_what_both_files_record(make, recorded, file, tmp_path, lacking):
    paths, views = recorded
    bare = [replace(path, initial=_without(path.initial, "colors")) for path in paths]
    write_trajectories(tmp_path / "bare.h5", bare, dataset="video_billiards", views=lambda k: [views[k]])
    with open_trajectories(file) as data, open_trajectories(tmp_path / "bare.h5") as other:
        files = (other, data) if lacking == "fitted" else (data, other)
        found = {row.metric for row in probe_rows("mine", make(), *files)}
    assert found == {"probed_positions", "probed_velocities", "probed_radius"}


def _without(state, name):
    return type(state)(**{key: state[key] for key in state if key != name})


def test_more_bodies_than_slots_in_training_data_are_no_matter_but_in_matching_are(make):
    path = video_drift([0], num_steps=2, num_bodies=6)
    view, model = film(path, square_camera(32)), make()
    with pytest.raises(ValueError, match="more bodies than slots"):
        matched(model, model.encode(view.rgb), view, 6)


def test_the_command_line(file, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.h5").write_bytes(file.read_bytes())
    arguments = "\n".join(f"{key} = {value}" for key, value in SMALL.items())
    fit = "\n".join(f"{key} = {value}" for key, value in HOW.items())
    run = tmp_path / "run.toml"
    run.write_text(
        f'model = "SlotAttention"\ndata = "{folder}"\nout = "{tmp_path}/run"\n[arguments]\n{arguments}\n[fit]\n{fit}\n'
    )

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["simworld", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capfd.readouterr().err

    code, said = call("train", run)
    assert not code
    assert "foreground_ari" in said
    model = tmp_path / "run/model.safetensors"
    out, picture = tmp_path / "slots.h5", tmp_path / "slots.png"
    for wrong, told in (
        (("--plot", tmp_path / "none/a.png"), "--plot writes a .png into a folder that is there"),
        (("--probes", tmp_path / "none.h5"), "none.h5"),
        (("--json", tmp_path), "json"),
    ):
        code, said = call("encode", model, file, "--out", tmp_path / "wrong.h5", *wrong)
        assert code == 2
        assert told in said
        assert not (tmp_path / "wrong.h5").exists()
    code, said = call("encode", model, file, "--out", out, "--probes", file, "--plot", picture)
    assert not code
    assert "probed positions" in said
    assert out.is_file()
    assert picture.stat().st_size > 1000
    code, said = call("encode", model, file, "--out", file)
    assert code == 2
    assert "--out must be a new file" in said
    run.write_text(run.read_text().replace("batch_size", "batch"))
    code, said = call("train", run)
    assert code == 2
    assert "unknown key 'batch'" in said


def test_a_second_stage_goes_on_from_weights(file, make, tmp_path):
    """Weights stay, new ones are those of an untrained encoder, and a second stage is no other's interrupted run."""
    first = make()
    save_checkpoint(first, tmp_path / "first.safetensors", dataset="video_billiards")
    run = tmp_path / "run.toml"
    run.write_text(
        f'model = "SlotAttention"\ndata = "{tmp_path}"\nout = "{tmp_path / "run"}"\n'
        f'initial = "{tmp_path / "first.safetensors"}"\n[arguments]\nmotion = "steady"\ninitial = "colors"\n'
        "[fit]\nnum_steps = 1\nnum_frames = 2\nbatch_size = 2\nlearning_rate = 1e-12\n"
    )
    file.rename(tmp_path / "train.h5")
    start_encoder(read_encoder_run(run))
    second = load_encoder(tmp_path / "run/model.safetensors")
    assert (second.motion, second.initial, second.num_slots) == ("steady", "colors", SMALL["num_slots"])
    for name, value in first.state_dict().items():
        assert torch.allclose(second.state_dict()[name], value, atol=1e-9)
    assert second.provenance["initial"]["dataset"] == "video_billiards"
    with torch.no_grad():
        first.claim += 1
    save_checkpoint(first, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a run with other settings"):
        start_encoder(read_encoder_run(run, initial=tmp_path / "other.safetensors"))
    run.write_text(run.read_text().replace("[arguments]", "[arguments]\nnum_channels = 16"))
    with pytest.raises(ValueError, match="leave out of .arguments. what changes their shapes"):
        start_encoder(read_encoder_run(run, out=tmp_path / "wide"))
