from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from simworld import load_checkpoint, open_trajectories, rollout, write_trajectories
from simworld.encode import probe_rows, seen
from simworld.kinds import SlotState
from simworld.models import LatentWorld, load_encoder, save_checkpoint
from simworld.models.latent_world import sigreg
from simworld.physics.video_worlds import video_billiards
from simworld.render.filming import film, square_camera
from simworld.slot_metrics import collapse
from simworld.testing import check_simulator
from simworld.train_encoder import EncoderFit, fit_encoder

SMALL = {"image_size": 32, "slot_size": 6, "num_channels": 4, "hidden_size": 16, "num_directions": 64}


@pytest.fixture(scope="module")
def films():
    return [film(video_billiards([3, 0, k], num_steps=9, num_bodies=3), square_camera(32)).rgb for k in range(4)]


@pytest.fixture
def make():
    def make(**arguments):
        torch.manual_seed(0)
        return LatentWorld(**{**SMALL, **arguments})

    return make


def directions(count, size):
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def test_the_regularizer_by_its_definition():
    """Beside the integral by a fine rule over the whole interval, of complex characteristic functions."""
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    u = directions(2, 3)
    t = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    found = []
    for one in u:
        phi = torch.exp(1j * t * (z @ one)[:, None]).mean(0)
        found.append(20 * torch.trapezoid(torch.exp(-t * t / 2) * (phi - torch.exp(-t * t / 2)).abs() ** 2, t))
    assert float(sigreg(z, u)) == pytest.approx(float(sum(found) / 2), rel=2e-3)


def test_gaussians_score_about_one_and_collapsed_ones_much_more():
    z = torch.randn(40, 500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = directions(64, 8)
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)  # integral of exp(-t^2/2) (1 - exp(-t^2))
    assert float(sigreg(z, u)) == pytest.approx(expected, rel=0.05)
    assert float(sigreg(torch.zeros(500, 8, dtype=torch.float64), u)) > 100
    assert float(sigreg(3 * z[0], u)) > 20
    assert float(sigreg(z[0] + 1, u)) > 20


def test_its_gradient_leads_out_of_collapse():
    z = (1e-2 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    u = directions(32, 4).float()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        sigreg(z, u).backward()
        optimizer.step()
    assert z.detach().std(0).min() > 0.5
    assert not collapse(z.detach()).collapsed


def test_the_regularizer_keeps_what_prediction_alone_gives_up(make, films, tmp_path):
    spread = {}
    how = EncoderFit(num_steps=150, num_frames=4, batch_size=8, learning_rate=3e-3, warm_up=5, evaluate_every=150)
    for weight in (0.0, 0.5):
        model = fit_encoder(make(weight=weight), films, how, out=tmp_path / str(weight))
        slots = torch.cat([model.encode(rgb)["slots"][:, 0] for rgb in films])
        spread[weight] = float(slots.std(0).mean())
    assert spread[0.5] > 0.3
    assert spread[0.0] < 0.2 * spread[0.5]


def test_it_is_a_simulator_of_one_slot_a_scene(make, films):
    model = make()
    first = [model.encode(rgb, history=3).initial for rgb in films[:2]]
    state = SlotState.cat(first)
    check_simulator(model, state, tolerance=1e-5)
    path = rollout(first[0], simulator=model, num_steps=4)
    assert path["slots"].shape == (5, 1, 6)
    known = torch.cat([first[0].history[:, 1:], first[0].slots[:, None]], 1)
    assert torch.allclose(path["slots"][1], model.next_embedding(known))


def test_bad_input(make, films):
    model = make()
    state = model.encode(films[0], history=2).initial
    with pytest.raises(ValueError, match="trained without actions"):
        model.step(state, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs a history of 2 frames; got 1"):
        model.step(model.encode(films[0], history=1).initial)
    with pytest.raises(ValueError, match="steps slots of 6 numbers; got slots of 4"):
        model.step(SlotState(slots=torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="set num_frames to 4 or more"):
        model.loss(torch.stack(films)[:, :3], torch.Generator())
    with pytest.raises(ValueError, match="image_size=40"):
        make(image_size=40)
    with pytest.raises(ValueError, match="takes films"):
        model.encode(films[0][:, :16])


def test_checkpoints(make, films, tmp_path):
    model = make()
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_encoder(tmp_path / "m.safetensors")
    assert isinstance(again, LatentWorld)
    with pytest.raises(ValueError, match="predicts its own embeddings of them; load it with load_encoder"):
        load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(again.encode(films[0])["slots"], model.encode(films[0])["slots"])


def test_an_embedding_is_probed_for_the_body_of_each_colour(tmp_path):
    """One that holds the places of bodies by their colour is probed without error."""
    paths = [video_billiards([3, 0, k], num_steps=9, num_bodies=3) for k in range(6)]
    views = [film(path, square_camera(32)) for path in paths]
    hues = torch.cat([path.initial.colors for path in paths]).unique(dim=0)

    class Knowing(LatentWorld):
        def slots(self, rgb, seed):
            index = next(k for k in range(6) if torch.equal(views[k].rgb, rgb))
            made = torch.zeros(len(rgb), 1, 2 * len(hues))
            for body, color in enumerate(paths[index].initial.colors):
                column = 2 * int((hues == color).all(1).nonzero()[0, 0])
                made[:, 0, column : column + 2] = seen(paths[index], views[index])["positions"][:, body].float()
            return made

    write_trajectories(tmp_path / "data.h5", paths, dataset="video_billiards", views=lambda k: [views[k]])
    states = [path.initial for path in paths]
    bare = [type(state)(**{name: state[name] for name in state if name != "colors"}) for state in states]
    bare = [replace(path, initial=state) for path, state in zip(paths, bare, strict=True)]
    write_trajectories(tmp_path / "bare.h5", bare, dataset="video_billiards", views=lambda k: [views[k]])
    with open_trajectories(tmp_path / "data.h5") as data, open_trajectories(tmp_path / "bare.h5") as other:
        rows = {(row.model, row.metric): row.value for row in probe_rows("mine", Knowing(**SMALL), data, data)}
        numbered = {(row.model, row.metric): row.value for row in probe_rows("mine", Knowing(**SMALL), data, other)}
    assert rows["mine", "probed_positions"] < 1e-4
    assert rows["mean", "probed_positions"] > 0.03
    assert numbered.keys() == rows.keys()
    assert numbered["mean", "probed_positions"] != rows["mean", "probed_positions"]  # bodies of a number, not a colour
