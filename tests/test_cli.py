from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simworld import (
    CausalJEPA,
    MeshState,
    SlotState,
    Trajectory,
    load_checkpoint,
    open_trajectories,
    rollout,
    save_checkpoint,
    write_trajectories,
)
from simworld.cli import main
from simworld.data import from_arrays
from simworld.data.generate import GENERATORS
from simworld.models import TrueSlots

RUN = """
model = "InteractionNetwork"
data = "{folder}"
out = "{folder}/run"
[arguments]
latent_size = 8
num_message_passing_steps = 2
margin = 2.0
[loss]
name = "unrolled"
num_steps = 2
[fit]
num_steps = 2
batch_size = 2
accelerator = "cpu"
"""


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line and return its exit code, standard output and error."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["simworld", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capfd.readouterr()
        return end.value.code or 0, out, " ".join(error.split())

    return run


@pytest.fixture
def folder(tmp_path, episodes):
    write_trajectories(tmp_path / "train.h5", episodes[:3], dataset="rope", seed=1)
    write_trajectories(tmp_path / "valid.h5", episodes[3:], dataset="rope", seed=1)
    return tmp_path


def test_the_whole_path(call, folder):
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    code, _, said = call("train", folder / "run.toml")
    assert code == 0, said
    assert "step 2 of 2: loss" in said
    assert "held out" in said
    assert "constant_velocity" in said
    checkpoint = folder / "run/model.safetensors"
    assert load_checkpoint(checkpoint).provenance["dataset"] == "rope"
    code, out, said = call("evaluate", checkpoint, folder / "valid.h5", "--horizons", "1,5,all", "--json", "-")
    found = json.loads(out)
    assert (code, found["schema"], len(found["rows"])) == (0, 1, 9)
    assert {row["model"] for row in found["rows"]} == {str(checkpoint), "static", "constant_velocity"}
    code, _, said = call("rollout", checkpoint, folder / "valid.h5", "--out", folder / "p.h5")
    assert code == 0
    with open_trajectories(folder / "p.h5") as predicted, open_trajectories(folder / "valid.h5") as recorded:
        assert torch.equal(predicted[0].initial.positions, recorded[0].initial.positions)
        assert len(predicted[0]) == len(recorded[0])
    code, _, said = call("info", checkpoint)
    assert code == 0
    assert '"latent_size": 8' in said
    code, _, said = call("info", folder / "train.h5")
    assert code == 0
    assert "3 episodes of rope" in said
    assert "px/s" in said


def test_running_a_run_again_changes_nothing(call, folder):
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    assert call("train", folder / "run.toml")[0] == 0
    before = (folder / "run/model.safetensors").read_bytes()
    assert call("train", folder / "run.toml")[0] == 0
    assert (folder / "run/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("latent_size", "hidden_size", r"[arguments] has an unknown key 'hidden_size'; the known ones are"),
        (
            '"unrolled"',
            '"mse"',
            "rollout_positions, rollout_relative_l2, film_prediction, masked_slots; got 'mse'",
        ),
        ('"InteractionNetwork"', '"Gnome"', "model must be one of InteractionNetwork, ForceNetwork"),
        ("batch_size", "batchsize", "[fit] has an unknown key 'batchsize'"),
        ("latent_size = 8", "latent_size = 0", "latent_size must be a whole number, 1 or more; got 0"),
        ("out =", "where =", "unknown key 'where'"),
        ("batch_size = 2", 'batch_size = "2"', "[fit]: batch_size must be a whole number; got '2'"),
        ("batch_size = 2", "learning_rate = inf", "learning_rate must be a finite number"),
        ("batch_size = 2", "ema_decay = 2.0", "ema_decay from 0 to below 1"),
        ('"cpu"', '"tpu"', "accelerator='tpu' with devices=1 is not to be had here"),
        ("margin = 2.0", "margin = 0.0", "margin must be a positive distance"),
        ("[loss]", "[[loss]]", "must be a table of keys"),
        ("\nnum_steps = 2\n[fit]", "\n[fit]", "lacks the key 'num_steps'"),
        ("[fit]", "[fit", "not valid TOML"),
        ('data = "{folder}"', 'data = "{folder}/none"', "no trajectory file"),
        ("\nnum_steps = 2\n[fit]", "\nnum_steps = 20\n[fit]", "trajectories of 20 steps or more"),
    ],
)
def test_run_files_that_say_something_else(call, folder, old, new, says):
    (folder / "run.toml").write_text(RUN.replace(old, new).format(folder=folder))
    code, _, said = call("train", folder / "run.toml")
    assert code == 2
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "ropes"], "no benchmark 'ropes'; the known ones are rope"),
        (["bench", "rope", "--data", "none.npz"], "no data file 'none.npz'"),
        (["bench", "rope", "--checkpoint", "none"], "no checkpoint file 'none'"),
        (["info", "none.h5"], "no trajectory file 'none.h5'"),
        (["info", "slots_spring"], "no checkpoint file 'slots_spring'; near it among those that are shipped:"),
        (["generate", "none.toml", "--out", "x"], "none.toml"),
        (["generate", "none.toml"], "Missing option"),
        (["train"], "Missing argument"),
        (["fly"], "No such command"),
        (["evaluate", "rope", "none.h5"], "no trajectory file"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(call, words, says):
    code, out, said = call(*words)
    assert code == 2
    assert says in said
    assert out == ""
    assert "Traceback" not in said


def test_odd_names_and_places(call, folder):
    odd = folder / "a[_[b].h5"
    odd.write_bytes((folder / "valid.h5").read_bytes())
    code, _, said = call("info", odd)
    assert code == 0, said
    assert "a[_[b].h5" in said
    before = odd.read_bytes()
    code, _, said = call("rollout", "rope", odd, "--out", odd)
    assert (code, odd.read_bytes()) == (2, before)
    assert "must be a new file" in said
    code, _, said = call("evaluate", "rope", odd, "--horizons", "1", "--json", folder)
    assert code == 2
    assert not list(folder.glob("*.partial"))
    assert not list(folder.parent.glob("*.partial"))
    code, _, said = call("generate", folder, "--out", folder / "x")
    assert (code, "no file" in said) == (2, True)
    code, _, said = call("info", folder / "p.npz")
    assert (code, "a file of data" in said) == (2, True)


def test_help_gives_examples(call):
    for command in ("demo", "generate", "info", "train", "evaluate", "bench", "rollout"):
        code, out, _ = call(command, "--help")
        assert code == 0
        assert f"Example: simworld {command}" in " ".join(out.split())


def test_the_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "simworld.cli", "bench", "--list"], capture_output=True, text=True, check=True
    )
    assert "rope:" in done.stderr


def test_seed_and_folder_of_a_run_come_first(call, folder):
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    code, _, said = call("train", folder / "run.toml", "--seed", 7, "--out", folder / "other")
    assert code == 0, said
    assert load_checkpoint(folder / "other/model.safetensors").provenance["seed"] == 7
    assert not (folder / "run").exists()


def test_models_are_measured_as_precisely_as_the_data_is(call, folder, episodes):
    write_trajectories(folder / "fine.h5", [path.to(torch.float64) for path in episodes[:1]], dataset="rope")
    code, _, said = call("evaluate", "rope", folder / "fine.h5", "--horizons", "1,5")
    assert code == 0, said
    code, _, said = call("rollout", "rope", folder / "fine.h5", "--out", folder / "p.h5")
    assert code == 0, said
    with open_trajectories(folder / "p.h5") as file:
        assert file[0]["positions"].dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "says"), [("solar_system_0", "dt 1 d"), ("rope", "dt 0.02 s"), ("springs_nri_0", "dt 0.1 time units")]
)
def test_steps_are_told_in_the_unit_of_the_data(call, name, says):
    code, _, said = call("info", name)
    assert code == 0
    assert f"{says} {{" in said


def test_shipped_checkpoints_are_listed_and_encoders_among_them(call):
    code, _, said = call("info")
    assert code == 0
    assert "rope: InteractionNetwork, trained on rope " in said
    assert "slots_springs_0: SlotAttention, trained on video_springs " in said
    code, _, said = call("info", "slots_springs_0")
    assert code == 0
    assert "SlotAttention" in said
    assert '"num_slots": 7' in said


def test_benchmarks_are_listed(call):
    code, _, said = call("bench", "--list")
    assert code == 0
    for name in ("rope:", "springs:", "solar-system:", "push-3d:", "objects:"):
        assert name in said


WRONG_BENCHES = [
    (["bench"], "Say which benchmark; the known ones are rope"),
    (["bench", "balls"], "no benchmark 'balls'; the known ones are rope"),
    (["bench", "objects", "--data", "a.h5"], "give --data or --checkpoint to one of them"),
    (["bench", "solar-system", "--data", "none.npz"], "no data file 'none.npz'"),
]


@pytest.mark.parametrize(("words", "says"), WRONG_BENCHES)
def test_wrong_benchmarks(call, words, says):
    code, _, said = call(*words)
    assert code == 2
    assert says in said


@pytest.fixture
def slots(tmp_path):
    """Return a model of slots by an encoder, and files of slots by that one and by another."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 3, 4, generator=generator).cumsum(0)
    first = SlotState(slots=values[3], history=values[:3].transpose(0, 1))
    path = Trajectory(initial=first, frames={"slots": values[3:]}, active=torch.ones(6, 3, dtype=torch.bool), dt=0.1)
    sizes = {"latent_size": 8, "num_layers": 1, "num_heads": 1, "head_size": 4, "feedforward_size": 8, "dropout": 0.0}
    model = CausalJEPA(dt=0.1, statistics=CausalJEPA.measure([path]), history_length=4, num_future=1, **sizes)
    save_checkpoint(model, tmp_path / "model.safetensors", slots={"encoder": "mine", "history": 3})
    for name in ("mine", "other"):
        said = json.dumps({"slots_of": "films.h5", "encoder": name, "history": 3, "recipe": ""})
        write_trajectories(tmp_path / f"{name}.h5", [path, path], dataset="video_billiards", recipe=said)
    return tmp_path / "model.safetensors", tmp_path / "mine.h5", tmp_path / "other.h5"


def test_models_of_slots_are_measured_beside_static(call, slots, tmp_path):
    model, mine, _ = slots
    code, _, said = call("evaluate", model, mine, "--horizons", "1,all", "--json", tmp_path / "rows.json")
    assert code == 0, said
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["metric"], row["horizon"]) for row in rows] == [("slot_mse", 1), ("slot_mse", "all")] * 2
    wanted = open_trajectories(mine)[0]["slots"]
    still = next(row for row in rows if row["model"] == "static" and row["horizon"] == "all")
    assert still["value"] == pytest.approx(float((wanted[1:] - wanted[0]).square().mean()), rel=1e-5)


def test_slots_by_another_encoder_are_refused(call, slots, tmp_path):
    model, mine, other = slots
    assert call("rollout", model, mine, "--out", tmp_path / "out.h5")[0] == 0
    for words in (("evaluate", model, other, "--horizons", "1"), ("rollout", model, other, "--out", tmp_path / "o.h5")):
        code, _, said = call(*words)
        assert code == 2
        assert "was trained on slots by the encoder 'mine'" in said
        assert "holds those by 'other'; encode its films with the former." in said
    code, _, said = call("rollout", model, mine, "--out", tmp_path / "p.h5", "--film", tmp_path / "p.gif")
    assert code == 2
    assert "fit a probe to them" in said
    assert not (tmp_path / "p.h5").exists()


def test_models_of_true_slots_take_recorded_bodies(call, tmp_path):
    made = GENERATORS["video_billiards"].make([[1, 0, 0], [1, 0, 1]], num_steps=8)
    write_trajectories(tmp_path / "bodies.h5", made, dataset="video_billiards")
    words = ("jepa_billiards_m0_0", tmp_path / "bodies.h5", "--episodes", "1", "--out", tmp_path / "out.h5")
    code, _, said = call("rollout", *words, "--film", tmp_path / "film.gif")
    assert code == 0, said
    assert (tmp_path / "film.gif").is_file()
    model = load_checkpoint("jepa_billiards_m0_0")
    encoder = TrueSlots.from_json(model.provenance["slots"])
    slots = encoder.encode(made[0].to(torch.float32))
    shown = encoder.bodies(slots, made[0])
    assert torch.allclose(shown["positions"], made[0]["positions"][3:], atol=1e-6)
    assert torch.equal(shown.initial.radii, made[0].initial.radii)
    (predicted,) = open_trajectories(tmp_path / "out.h5")
    with torch.no_grad():
        wanted = rollout(slots.initial, simulator=model, num_steps=slots.num_steps)
    torch.testing.assert_close(predicted["slots"].float(), wanted["slots"], atol=1e-4, rtol=1e-4)
    code, out, said = call("evaluate", *words[:2], "--horizons", "1", "--json", "-")
    assert (code, {row["metric"] for row in json.loads(out)["rows"]}) == (0, {"slot_mse"}), said


def test_a_checkpoint_of_another_kind_is_refused(call, monkeypatch):
    monkeypatch.setattr("simworld.bench.rows.GENERATORS", {})  # nothing is to be generated before it is refused
    code, _, said = call("bench", "springs", "--checkpoint", "rope")
    assert code == 2
    assert "is one of ForceNetworks; 'rope' holds a InteractionNetwork" in said


def test_episodes_too_short_for_a_table_are_refused_before_the_work(call, tmp_path, monkeypatch):
    monkeypatch.setattr("simworld.bench.rows.one_step_velocity_mse", None)  # nothing is to be measured
    made = GENERATORS["balls_in"].make([[1, 0, 0]], num_steps=5)
    write_trajectories(tmp_path / "short.h5", made, dataset="balls_in")
    code, _, said = call("bench", "balls-in", "--data", tmp_path / "short.h5")
    assert code == 2
    assert "needs episodes of 100 steps or more" in said
    assert "has one of 5" in said


PARTICLES = """
model = "GNS"
data = "{folder}"
out = "{folder}/run"

[arguments]
connectivity_radius = 0.3
num_particle_types = 1
num_velocities = 2
latent_size = 8
num_message_passing_steps = 1
further_fields = ["gravity"]

[loss]
name = "one_step"
noise_std = 0.01

[fit]
num_steps = 2
batch_size = 2
evaluate_every = 2
accelerator = "cpu"
"""


def test_particles_from_arrays_to_a_film(call, tmp_path):
    times = np.arange(12, dtype=np.float32)[:, None, None] * 0.05
    start, speed = np.random.default_rng(0).random((2, 1, 10, 2), dtype=np.float32)
    fall = np.array([0.0, -1.0], dtype=np.float32)
    positions = start + 0.1 * speed * times + 0.5 * fall * times**2
    path = from_arrays(positions=positions, dt=0.05, history=2, gravity=fall)
    for split in ("train", "valid"):
        write_trajectories(tmp_path / f"{split}.h5", [path, path], dataset="falling")
    (tmp_path / "run.toml").write_text(PARTICLES.format(folder=tmp_path))
    code, _, said = call("train", tmp_path / "run.toml")
    assert code == 0, said
    checkpoint = tmp_path / "run/model.safetensors"
    assert load_checkpoint(checkpoint).arguments["further_fields"] == ["gravity"]
    predicted = tmp_path / "p.h5"
    code, _, said = call("rollout", checkpoint, tmp_path / "valid.h5", "--out", predicted, "--film", "fall.mp4")
    assert code == 2
    assert "--film writes a .gif into a folder that is there; got 'fall.mp4'" in said
    assert not predicted.exists()
    film = tmp_path / "fall.gif"
    code, _, said = call("rollout", checkpoint, tmp_path / "valid.h5", "--out", tmp_path / "p.h5", "--film", film)
    assert code == 0, said
    with Image.open(film) as frames:
        assert frames.n_frames == 9
    metrics = ("--metrics", "density_error,momentum_error,kinetic_energy_mse", "--horizons", "1,5,all")
    code, _, said = call("evaluate", checkpoint, tmp_path / "valid.h5", *metrics)
    assert code == 0, said
    for kind in ("position mse", "density error", "momentum error", "kinetic energy mse"):
        assert f": {kind}" in said
    assert "…" not in said


HEAT = """
model = "MeshGraphNet"
data = "{folder}"
out = "{folder}/run"
[arguments]
outputs = {{temperatures = 1}}
inputs = ["temperatures"]
num_dimensions = 0
latent_size = 8
num_message_passing_steps = 2
[loss]
name = "rollout_relative_l2"
num_steps = 3
[fit]
num_steps = 2
batch_size = 2
accelerator = "cpu"
"""


def test_a_mesh_that_stays_where_it_is_from_training_to_a_film(call, tmp_path):
    """Nothing here has positions: errors are those of the field."""
    rest = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    cells = torch.tensor([[0, 1, 2], [1, 3, 2], [2, 3, 4], [3, 5, 4]])
    heat = torch.rand(1, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.2, 9)[:, None]
    state = MeshState(rest_positions=rest, cells=cells, temperatures=heat[0])
    there = torch.ones(9, 6, dtype=torch.bool)
    path = Trajectory(initial=state, frames={"temperatures": heat}, active=there, dt=0.1)
    for split in ("train", "valid"):
        write_trajectories(tmp_path / f"{split}.h5", [path, path], dataset="cooling")
    (tmp_path / "run.toml").write_text(HEAT.format(folder=tmp_path))
    code, _, said = call("train", tmp_path / "run.toml")
    assert code == 0, said
    assert "temperatures relative l2" in said
    checkpoint, film = tmp_path / "run/model.safetensors", tmp_path / "cooling.gif"
    code, _, said = call("rollout", checkpoint, tmp_path / "valid.h5", "--out", tmp_path / "p.h5", "--film", film)
    assert code == 0, said
    with Image.open(film) as frames:
        assert frames.n_frames == 9
    code, _, said = call("evaluate", checkpoint, tmp_path / "valid.h5", "--horizons", "1,all")
    assert code == 0, said
    assert "temperatures relative l2" in said
    assert "static" in said
    code, _, parts = call("evaluate", checkpoint, tmp_path / "valid.h5", "--horizons", "1,all", "--nodes-at-once", 3)
    assert (code, parts) == (0, said)
    shipped = Path(__file__).parents[1] / "simworld/assets/rope_test.h5"
    code, _, said = call("evaluate", "rope", shipped, "--nodes-at-once", 3)
    assert code == 2
    assert "networks of particles and meshes; this is a InteractionNetwork" in said


def test_memory_that_runs_out_is_a_sentence(call, monkeypatch, tmp_path):
    def fails(*args, **changes):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("simworld.metrics.evaluate", fails)
    data = Path(__file__).parents[1] / "simworld" / "assets" / "rope_test.h5"
    code, _, said = call("evaluate", "rope", data)
    assert code == 2
    assert "more memory than is free" in said
