"""The table of predictions from films: errors, intervals, orderings, films, and what wrong questions are told."""

from __future__ import annotations

import pytest
import torch

from simworld import Trajectory
from simworld.bench.vin import _distances, interval, orderings, report, reports, unseen, vin
from simworld.metrics import Row
from simworld.models import VisualInteractionNetwork, save_checkpoint
from simworld.view_films import plot_strips
from tests.test_visual_interaction_network import STATISTICS

SMALL = {"dt": 0.1, "statistics": STATISTICS, "num_channels": 4, "slot_size": 6, "latent_size": 8}


def make(sight="films", dynamics="interactions", seed=0, **said):
    torch.manual_seed(seed)
    model = VisualInteractionNetwork(sight=sight, dynamics=dynamics, **{**SMALL, **said})
    model.provenance = {"dataset": "video_drift"}
    return model.eval()


@pytest.fixture(scope="module")
def made():
    models = [make(), make(seed=1), make(dynamics="lstm"), make("states")]
    return report("drift", 3, models, 4, with_films=True)


def test_rows_of_models_and_of_what_needs_no_training(made):
    rows = [row for row in made.rows if row.metric == "position_distance"]
    assert list(dict.fromkeys(row.model for row in rows)) == ["VIN", "LSTM", "state-IN", "static", "constant_velocity"]
    assert {row.horizon for row in rows} == {1, 8, 20, 50}
    for row in rows:
        assert row.low <= row.value <= row.high
        assert (row.trajectories, row.unit) == (4, "frame widths")
        assert row.seeds == (2 if row.model == "VIN" else 1)
    found = {(row.model, row.horizon): row.value for row in rows}
    assert found["constant_velocity", 1] < 0.01 < found["static", 8]
    assert found["constant_velocity", 50] > found["constant_velocity", 8]  # walls


def test_errors_are_distances_in_frame_widths():
    paths, _ = unseen("drift", 3, 2, make())
    truth = Trajectory.cat([path.window(5, 56) for path in paths])
    away = _distances((truth["positions"] + torch.tensor([0.3, 0.4]))[None], truth)
    assert away.shape == (1, 2, 51)
    assert torch.allclose(away, torch.tensor(0.5, dtype=away.dtype))


def test_unseen_episodes_are_not_those_of_training_and_seeded():
    (one, _), (again, _) = (unseen("drift", 3, 2, make()) for _ in range(2))
    assert all(torch.equal(a["positions"], b["positions"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["positions"], one[1]["positions"])


def test_intervals_over_seeds_are_wider_where_seeds_differ():
    episodes = torch.linspace(0, 1, 20)
    alike, apart = torch.stack([episodes, episodes]), torch.stack([episodes, episodes + 1])
    widths = [high - low for low, high in map(interval, (alike, apart))]
    assert widths[1] > 2 * widths[0]
    low, high = interval(episodes[None])
    assert low < 0.5 < high


def row(model, value, low, high, metric="position_distance"):
    return Row(
        model=model, dataset="d", metric=metric, horizon=8, value=value, unit="1", trajectories=4, low=low, high=high
    )


@pytest.mark.parametrize(
    ("other", "saved", "said"),
    [
        ((0.5, 0.4, 0.6), (0.3, 0.2, 0.4), "better than LSTM 0.5, intervals apart"),
        ((0.3, 0.2, 0.4), (0.1, 0.05, 0.2), "better than LSTM 0.3, intervals overlap, paired difference clear"),
        ((0.25, 0.2, 0.4), (0.05, -0.1, 0.2), "better than LSTM 0.25, not to be told apart"),
        ((0.1, 0.08, 0.12), (-0.1, -0.2, -0.05), "worse than LSTM 0.1, intervals apart"),
    ],
)
def test_orderings_say_how_clearly_they_hold(other, saved, said):
    rows = [row("VIN", 0.2, 0.15, 0.25), row("LSTM", *other), row("VIN instead of LSTM", *saved, "distance_saved")]
    assert orderings(rows) == [f"d, 8 steps: VIN 0.2 is {said}"]


def test_films_of_predictions_start_where_the_truth_does(made, tmp_path):
    assert set(made.films) == {"truth", "VIN", "LSTM", "state-IN", "static", "constant_velocity"}
    assert all(film.shape == (51, 64, 64, 3) for film in made.films.values())
    assert torch.equal(made.films["static"][0], made.films["truth"][0])
    assert torch.equal(made.films["static"][50], made.films["truth"][0])
    assert not torch.equal(made.films["truth"][50], made.films["truth"][0])
    from PIL import Image

    path = plot_strips(made.films, frames=(0, 20, 50), path=tmp_path / "strip.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 200
    with pytest.raises(ValueError, match="has 51 frames"):
        plot_strips(made.films, frames=(51,), path=path)
    with pytest.raises(ValueError, match="got none"):
        plot_strips({}, frames=(0,), path=path)


def test_checkpoints_are_asked_about_their_own_worlds(tmp_path):
    save_checkpoint(make(), tmp_path / "m.safetensors")
    (found,) = reports(checkpoints=[tmp_path / "m.safetensors"], count=2)
    assert found.dataset == "drift, 3 objects"
    assert not found.films
    with pytest.raises(ValueError, match="None of these checkpoints"):
        reports(["gravity"], checkpoints=[tmp_path / "m.safetensors"], count=2)


def test_wrong_questions_are_told_in_a_sentence():
    with pytest.raises(ValueError, match="leave --data out"):
        vin("x.h5")
    with pytest.raises(ValueError, match="no world 'sea' in this table; the known ones are springs"):
        vin(worlds=["sea"])
    with pytest.raises(ValueError, match="one of VisualInteractionNetworks; 'rope' holds"):
        vin(checkpoints=["rope"])
