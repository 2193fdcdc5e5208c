"""Visual Interaction Networks: shapes, the contract, who acts on whom, which frames are read, training, bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simworld import ObjectState, Trajectory, do, load_checkpoint, rollout, runs
from simworld.cli import main
from simworld.data import open_trajectories, write_trajectories
from simworld.data.generate import GENERATORS, read_recipe
from simworld.losses import _turned, film_prediction
from simworld.models import VisualInteractionNetwork, save_checkpoint
from simworld.physics.video_worlds import HUES
from simworld.render.filmed import filmed
from simworld.render.filming import film, square_camera
from simworld.testing import check_simulator
from simworld.train import Fit, fit

STATISTICS = {"centre": 0.5, "spread": 0.25, "velocity": 0.2}
SMALL = {"dt": 0.1, "statistics": STATISTICS, "num_channels": 4, "slot_size": 6, "latent_size": 8, "image_size": 16}
KINDS = [("films", "interactions"), ("films", "alone"), ("films", "lstm"), ("films", "mlp"), ("states", "interactions")]


def make(sight="films", dynamics="interactions", seed=0, **said):
    torch.manual_seed(seed)
    return VisualInteractionNetwork(sight=sight, dynamics=dynamics, **{**SMALL, **said})


@pytest.fixture(scope="module")
def episodes():
    """Three episodes of three bodies with their films of 16 x 16 pixels."""
    paths = GENERATORS["video_drift"].make([[3, 0, k] for k in range(3)], num_bodies=3, num_steps=16, fixed_colors=True)
    paths = [path.to(torch.float32) for path in paths]
    return [filmed(path, film(path, square_camera(16))) for path in paths]


def start(model, episodes):
    return model.encode(Trajectory.cat(episodes)).frame(0)


def test_fixed_colours_change_colours_alone():
    one, other = (
        GENERATORS["video_billiards"].make([[1, 0, 0]], num_bodies=4, num_steps=3, fixed_colors=fixed)[0]
        for fixed in (True, False)
    )
    assert torch.equal(one.initial.colors, torch.tensor(HUES[:4], dtype=torch.float64))
    assert not torch.equal(other.initial.colors, one.initial.colors)
    assert all(torch.equal(one[name], other[name]) for name in one.frames)


@pytest.mark.parametrize(("sight", "dynamics"), KINDS)
def test_codes_of_every_frame_and_what_follows(episodes, sight, dynamics):
    model = make(sight, dynamics)
    path = Trajectory.cat(episodes)
    codes = model.encode(path)
    assert len(codes) == len(path) - 5
    first = codes.frame(0)
    assert first.slots.shape == (9, 6)
    assert first.history.shape == (9, 3, 6)
    assert first.simulator is model
    later = model.encode(path.window(4, len(path)))  # the same frames, seen from another first one
    assert torch.allclose(codes["slots"][4:], later["slots"], atol=1e-5)
    assert torch.allclose(codes.frame(4).history, later.frame(0).history, atol=1e-5)
    predicted = rollout(first, num_steps=50)
    positions, velocities = model.decode(predicted)
    assert positions.shape == velocities.shape == (51, 9, 2)
    alone = model.encode(episodes[1])["slots"]
    assert torch.allclose(alone, codes["slots"][:, 3:6], atol=1e-5)


def test_a_view_is_seen_as_a_filmed_trajectory_is(episodes):
    (path,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=3, num_steps=16, fixed_colors=True)
    model = make()
    of_view = model.encode(film(path, square_camera(16)).window(0, 7))["slots"]
    assert torch.allclose(of_view, model.encode(episodes[0].window(0, 7))["slots"], atol=2e-2)


@pytest.mark.parametrize(("sight", "dynamics"), KINDS)
def test_the_contract(episodes, sight, dynamics):
    model = make(sight, dynamics).double()
    state = start(model, episodes).to(torch.float64)
    check_simulator(model, state, tolerance=1e-9, order_matters=dynamics in ("lstm", "mlp"))


@pytest.mark.parametrize(("sight", "dynamics"), KINDS)
def test_integrate_is_the_inverse_of_target(episodes, sight, dynamics):
    model = make(sight, dynamics)
    state = start(model, episodes)
    after = model.step(state)
    again = model.integrate(state, model.target(state, after))
    assert torch.allclose(again.slots, after.slots, atol=1e-6)
    assert torch.equal(again.history, after.history)


@pytest.mark.parametrize(("dynamics", "reached"), [("interactions", True), ("alone", False), ("mlp", True)])
def test_without_relations_nothing_reaches_the_others(episodes, dynamics, reached):
    model = make(dynamics=dynamics)
    state = start(model, episodes)
    plain = rollout(state, num_steps=5)
    changed = rollout(state, num_steps=5, interventions=[do(entities=0, slots=lambda rows: rows + 1.0)])
    assert torch.equal(plain["slots"][:, 3:], changed["slots"][:, 3:])  # other scenes
    assert torch.equal(plain["slots"][-1, 1:3], changed["slots"][-1, 1:3]) != reached


def test_an_lstm_hears_of_a_changed_slot_and_remembers_it(episodes):
    model = make(dynamics="lstm")
    state = start(model, episodes)
    after, other = (rollout(one, num_steps=2) for one in (state, do(slots=lambda rows: rows + 1.0)(state, 0)))
    assert not torch.equal(after["memory"][1], other["memory"][1])


def test_each_offset_reads_its_own_frame(episodes):
    """Frames back: 1 is the present code, 2 the last of the history, 4 the third last; the second last is not read."""
    state = start(make(), episodes)

    def read(model, changed):
        return not torch.equal(model(state), model(changed))

    for offset, row in ((2, -1), (3, -2), (4, -3)):
        history = state.history.clone()
        history[:, row] += 1.0
        assert read(make(), state.replace(history=history)) == (offset in (1, 2, 4)), offset
    only = make(offsets=(4,))
    assert not read(only, state.replace(slots=state.slots + 1.0))


def test_slots_of_states_follow_the_order_of_bodies(episodes):
    model, order = make("states"), torch.tensor([2, 0, 1])
    path = episodes[0]
    frames = {name: value if name == "rgb" else value[:, order] for name, value in path.frames.items()}
    first = path.initial
    swapped = first.replace(
        positions=first.positions[order],
        velocities=first.velocities[order],
        radii=first.radii[order],
        masses=first.masses[order],
    )
    other = rollout(model.encode(replace(path, initial=swapped, frames=frames)).frame(0), num_steps=4)
    wanted = rollout(model.encode(path).frame(0), num_steps=4)["slots"][:, order]
    assert torch.allclose(other["slots"], wanted, atol=1e-5)


def test_turned_scenes_are_the_films_of_turned_motions(episodes):
    """A picture turned along with its states shows them: what is bright in it is where bodies are."""
    path = episodes[0]
    kinds = set()
    for seed in range(12):
        turned = _turned(path, torch.Generator().manual_seed(seed))
        kinds.add(tuple((turned["positions"][0, 0] * 1000).long().tolist()))
        assert _middle(turned) == pytest.approx(_middle_of_states(turned), abs=0.05)
    assert len(kinds) > 4


def _middle(path):
    """Return the mean place of what is brighter than the background in the first picture."""
    bright = (path["rgb"][0, 0].float() - 0.12).abs().sum(-1)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    shares = bright / bright.sum()
    return [float((shares * (columns + 0.5)).sum()) / 16, 1 - float((shares * (rows + 0.5)).sum()) / 16]


def _middle_of_states(path):
    """Return the mean place of bodies, by how bright and large they are."""
    colours = (torch.tensor(HUES[:3]) - 0.12).abs().sum(1)
    weights = colours * path.initial.radii**2
    return ((weights[:, None] * path["positions"][0]).sum(0) / weights.sum()).tolist()


HOW = Fit(num_steps=4, batch_size=2, warm_up=1, evaluate_every=2, accelerator="cpu", seed=3)


def test_training_is_seeded_resumes_to_the_same_bits_and_tells_held_out_errors(tmp_path, episodes):
    loss, told = film_prediction(num_steps=3), []
    whole = fit(make(), episodes, loss, HOW, out=tmp_path / "a", valid=episodes, watch=told.append)
    assert [row.horizon for row in told[-1].errors] == [1, 8]
    assert all(row.metric == "position_distance" and row.value > 0 for row in told[-1].errors)

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(), episodes, loss, HOW, out=tmp_path / "b", watch=interrupt)
    resumed = fit(make(), episodes, loss, HOW, out=tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="other settings"):
        fit(make(), episodes, film_prediction(num_steps=3, discount=0.5), HOW, out=tmp_path / "b")


def test_training_makes_the_loss_smaller(tmp_path, episodes):
    loss, model = film_prediction(num_steps=3, mirrored=False), make("states")
    path = Trajectory.cat(episodes).window(0, loss.num_steps + 1)

    def measured():
        with torch.no_grad():
            return float(loss.measure(model, path, torch.Generator()))

    before = measured()
    how = replace(HOW, num_steps=60, learning_rate=1e-2, evaluate_every=60, ema_decay=0.0)
    fit(model, episodes, loss, how, out=tmp_path)
    assert measured() < before / 2


def test_checkpoints_hold_all_kinds(tmp_path, episodes):
    for sight, dynamics in KINDS:
        model = make(sight, dynamics)
        save_checkpoint(model, tmp_path / "m.safetensors")
        again = load_checkpoint(tmp_path / "m.safetensors")
        assert torch.equal(start(model, episodes).slots, start(again, episodes).slots)


def test_bad_films_are_told_in_a_sentence(episodes):
    model, path = make(), episodes[0]
    with pytest.raises(ValueError, match="16 x 16 pixels in 3 colours"):
        model.encode(_resized(path))
    with pytest.raises(ValueError, match="must see 6 frames before it predicts; got 5"):
        model.encode(path.window(0, 5))
    with pytest.raises(ValueError, match="scenes of 4 objects; got one of 3"):
        make(num_objects=4).encode(path)
    (crowd,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=4, num_steps=8, fixed_colors=True)
    with pytest.raises(ValueError, match="scenes of 3 objects; got one of 4"):
        model.encode(film(crowd, square_camera(16)))
    broken = path["rgb"].clone()
    broken[7, 0, 2, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="film must be finite; frame 7"):
        model.encode(replace(path, frames={**path.frames, "rgb": broken}))
    with pytest.raises(ValueError, match="Floats in a film are from 0 to 1; got"):
        model.encode(replace(path, frames={**path.frames, "rgb": path["rgb"] * 255}))
    (states,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=3, num_steps=8)
    with pytest.raises(ValueError, match="sees films"):
        model.encode(states)
    with pytest.raises(ValueError, match="told true states"):
        make("states").encode(film(states, square_camera(16)))
    with pytest.raises(ValueError, match="of every frame"):
        filmed(states, film(states, square_camera(16)).window(0, 4))


def _resized(path):
    pictures = path["rgb"][:, :, ::2, ::2]
    return replace(path, initial=path.initial.replace(rgb=pictures[0]), frames={**path.frames, "rgb": pictures})


def test_bad_states_arguments_and_losses_are_told_in_a_sentence(tmp_path, episodes):
    model = make()
    state = start(model, episodes)
    with pytest.raises(ValueError, match="takes no actions"):
        model.step(state, torch.zeros(9, 1))
    with pytest.raises(ValueError, match="make them with encode"):
        model.step(episodes[0].initial)
    with pytest.raises(ValueError, match=r"slots are \[n, 6\]"):
        model.step(start(make(slot_size=5), episodes))
    with pytest.raises(ValueError, match="needs the memory"):
        make(dynamics="lstm").step(state)
    for said, message in (
        ({"dynamics": "gru"}, "dynamics must be one of"),
        ({"sight": "sounds"}, "sight must be one of"),
        ({"num_objects": 0}, "num_objects must be a whole number"),
        ({"offsets": ()}, "offsets must be different whole numbers"),
        ({"offsets": (1, 1)}, "offsets must be different whole numbers"),
        ({"statistics": {"centre": 0.5, "spread": 0.0}}, "statistics need spread, velocity"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**said)
    with pytest.raises(ValueError, match="film_prediction needs"):
        film_prediction(0)
    with pytest.raises(ValueError, match="say num_frames = 4"):
        fit(make(offsets=(1, 2)), episodes, film_prediction(3), HOW, out=tmp_path)


RUN = """
model = "VisualInteractionNetwork"
data = "{folder}"
out = "{folder}/run"

[arguments]
image_size = 16
num_channels = 4
slot_size = 6
latent_size = 8
dynamics = "alone"

[loss]
name = "film_prediction"
num_steps = 2

[fit]
num_steps = 2
batch_size = 2
accelerator = "cpu"
"""


def test_run_files_train_on_films_in_files(tmp_path):
    paths = GENERATORS["video_drift"].make([[3, 0, k] for k in range(2)], num_bodies=3, num_steps=9, fixed_colors=True)
    films = [film(path, square_camera(16)) for path in paths]
    for name in ("train", "valid"):
        write_trajectories(tmp_path / f"{name}.h5", paths, dataset="video_drift", views=lambda number: [films[number]])
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    told = []
    model = runs.start(runs.read_run(tmp_path / "run.toml"), watch=told.append)
    assert model.provenance["dataset"] == "video_drift"
    assert [row.horizon for row in told[-1].errors] == [1]
    write_trajectories(tmp_path / "train.h5", paths, dataset="video_drift")
    with pytest.raises(ValueError, match=r"film_prediction is of films, and .* has episodes without"):
        runs.start(runs.read_run(tmp_path / "run.toml"))


def command(monkeypatch, *said):
    monkeypatch.setattr(sys, "argv", ["simworld", *map(str, said)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@pytest.mark.parametrize(("sight", "dynamics"), [("films", "alone"), ("films", "lstm"), ("states", "interactions")])
def test_recorded_films_are_predicted_and_judged_by_the_command_line(tmp_path, monkeypatch, sight, dynamics):
    paths = GENERATORS["video_drift"].make([[3, 0, k] for k in range(2)], num_bodies=3, num_steps=9, fixed_colors=True)
    films = [film(path, square_camera(16)) for path in paths]
    write_trajectories(tmp_path / "x.h5", paths, dataset="video_drift", views=lambda number: [films[number]])
    model = make(sight, dynamics)
    save_checkpoint(model, tmp_path / "m.safetensors", units={"positions": "frame widths"})
    data, out, told = (tmp_path / name for name in ("x.h5", "made.h5", "rows.json"))
    assert command(monkeypatch, "rollout", tmp_path / "m.safetensors", data, "--out", out) == 0
    seen = filmed(paths[1], films[1]).window(0, 6)
    with torch.no_grad():
        ahead = rollout(model.double().encode(seen).frame(0).to(torch.float64), simulator=model, num_steps=4)
    with open_trajectories(out) as file:
        made = file[1]
    assert made.initial.fields["positions"].unit == "frame widths"
    assert torch.equal(made["positions"][0], paths[1]["positions"][5])
    for got, wanted in zip((made["positions"], made["velocities"]), model.decode(ahead), strict=True):
        assert torch.allclose(got[1:], wanted[1:], atol=1e-5)
    said = "evaluate", tmp_path / "m.safetensors", data, "--horizons", "1,all", "--json", told
    assert command(monkeypatch, *said) == 0
    rows = {
        (row["model"].split("/")[-1], row["metric"], row["horizon"]): row
        for row in json.loads(told.read_text())["rows"]
    }
    ours = rows["m.safetensors", "rollout_position_distance", "all"]
    still = rows["static", "rollout_position_distance", 1]
    assert (ours["unit"], ours["trajectories"]) == ("frame widths", 2)
    moved = torch.stack([(path["positions"][6] - path["positions"][5]).norm(dim=1).mean() for path in paths]).mean()
    assert still["value"] == pytest.approx(float(moved))


def test_what_is_only_read_out_of_codes_cannot_be_changed():
    (path,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=3, num_steps=9, fixed_colors=True)
    model = make("states", "interactions").double()
    watched = model.watch(path, path)
    with pytest.raises(ValueError, match=r"to change velocities would change nothing; change slots, with do\(slots"):
        rollout(watched.initial, simulator=model, num_steps=2, interventions=do(at=0, velocities=0.0))
    changed = do(at=1, entities=[0], slots=torch.zeros(model.slot_size, dtype=torch.float64))
    with torch.no_grad():
        plain, moved = (
            rollout(watched.initial, simulator=model, num_steps=3, interventions=edit)["positions"]
            for edit in ((), changed)
        )
    assert not torch.allclose(plain[2:], moved[2:])


def test_statistics_are_of_bodies_in_the_plane_on_which_nothing_acts():
    (path,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=3, num_steps=2, fixed_colors=True)
    with pytest.raises(ValueError, match="takes no actions; train it on recordings without"):
        VisualInteractionNetwork.measure([replace(path, actions=torch.zeros(2, 1, 2))])
    deep = torch.zeros(3, 3, 3)
    state = ObjectState(positions=deep[0], velocities=deep[0])
    path = Trajectory(
        initial=state, frames={"positions": deep, "velocities": deep}, active=torch.ones(3, 3).bool(), dt=0.1
    )
    with pytest.raises(ValueError, match=r"where bodies are in the plane; got \[3, 3, 3\]"):
        VisualInteractionNetwork.measure([path])


def test_data_that_a_visual_interaction_network_cannot_see_is_told(tmp_path, monkeypatch, capfd):
    (path,) = GENERATORS["video_drift"].make([[3, 0, 0]], num_bodies=3, num_steps=9, fixed_colors=True)
    save_checkpoint(make(), tmp_path / "m.safetensors", units={"positions": "frame widths"})
    metres = ObjectState(**{name: path.initial[name] for name in ("positions", "velocities")})
    for name, wrong, size, says in (
        ("none", path, None, "has no film of episode 0"),
        ("large", path, 24, r"sees films of 16 x 16 pixels in 3 colours; got [24, 24, 3]"),
        ("short", path.window(0, 4), 16, "must see 6 frames before it predicts; got 4"),
        (
            "old",
            replace(path, initial=metres, frames={k: path[k] for k in metres}),
            None,
            "the data has m; use data in",
        ),
    ):
        views = (
            (lambda _, wrong=wrong, size=size: [film(wrong, square_camera(size))]) if size and name != "old" else None
        )
        write_trajectories(tmp_path / f"{name}.h5", [wrong], dataset="x", views=views)
        assert command(monkeypatch, "evaluate", tmp_path / "m.safetensors", tmp_path / f"{name}.h5") == 2
        assert says in " ".join(capfd.readouterr().err.split())


FILES = sorted((Path(__file__).parents[1] / "datasets/vin").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_run_is_of_films_that_a_recipe_here_makes(path):
    text = path.read_text()
    if "splits" in text:
        recipe = read_recipe(path)
        assert recipe.episode["fixed_colors"]
        assert recipe.film.size == 32
        return
    run, world = runs.read_run(path), path.stem.rpartition("_")[0]
    assert (path.parent / f"{world}.toml").is_file()
    assert (str(run.data), run.loss.of_films) == (f"data/vin_{world}", True)
    if run.initial is not None:
        before = path.stem.replace(path.stem.split("_")[0], "billiards")
        assert Path(run.initial).parent.name == f"vin_{before}"
