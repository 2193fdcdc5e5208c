from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from simworld.bench.slot_exam import ACTING, ASKED, BRANCH, HORIZONS, answer_seen, answer_slots, set_exam
from simworld.bench.slot_films import HISTORY, film_exam, see_films
from simworld.bench.slots import CODE, FILMS, encoder_of, judged, models_of_world
from simworld.data import open_trajectories
from simworld.data.store import write_trajectories
from simworld.encode import encode_file, encoder_said
from simworld.metrics import Static
from simworld.models import CausalJEPA, LatentWorld, load_encoder, save_checkpoint
from simworld.runs import read_run, start
from simworld.view_slots import draw_rollouts

NAME = "slots_billiards_0"
SIZES = {"latent_size": 8, "num_layers": 1, "num_heads": 2, "head_size": 4, "feedforward_size": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def exam():
    return set_exam("billiards", count=2)


@pytest.fixture(scope="module")
def films(exam):
    return film_exam(exam, size=64, count=4)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(NAME)


@pytest.fixture(scope="module")
def seen(exam, films, encoder):
    return see_films(exam, films, NAME, encoder)


@pytest.fixture(scope="module")
def model(films, encoder):
    statistics = CausalJEPA.measure([encoder.encode(view.rgb, history=HISTORY) for view in films.factual])
    torch.manual_seed(0)
    made = CausalJEPA(dt=0.1, statistics=statistics, history_length=4, num_future=2, readout="change", **SIZES).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    made.provenance = {"slots": {"encoder": NAME, "history": HISTORY}}
    return made


def said(pattern):
    return pytest.raises(ValueError, match=re.escape(pattern))


def embedding(**arguments):
    torch.manual_seed(0)
    return LatentWorld(slot_size=4, num_channels=2, hidden_size=8, **arguments).eval()


def test_each_body_has_the_slot_that_lies_where_it_is(exam, films, seen):
    assert len(films.training) == 4
    assert [len(view) for view in films.factual] == [len(path) for path in exam.factual]
    for e, (path, first, branch) in enumerate(zip(exam.factual, seen.firsts(exam), exam.branches, strict=True)):
        count = path.initial.num_entities
        assert seen.rows(e) == list(range(count))
        assert first == branch - HISTORY
        lies = seen.encoded[e]["slots"][first, :count, -2:].double()
        told = torch.stack([(lies[:, 0] + 1) / 2, (1 - lies[:, 1]) / 2], 1)  # rows of pictures go downwards
        assert float((told - path["positions"][branch]).norm(dim=1).max()) < 0.08
    assert torch.equal(seen.encoded[0].frame(2).history[:, -1], seen.encoded[0]["slots"][1]), (
        "slots keep their history when rows are put in the order of bodies"
    )


def test_slots_shown_are_told_of_better_than_slots_that_stay(exam, seen):
    shown, still = answer_seen(exam, seen), answer_slots(exam, Static(dt=0.1), seen)
    assert shown.errors["positions"][:, -1].mean() < 0.3 * still.errors["positions"][:, -1].mean()
    first = answer_seen(exam, seen).errors["positions"][:, 0]
    assert (first < 0.1).all()
    assert len(still.missed) == len(exam.cases())
    assert not still.effects[ACTING[0]].any()
    assert not still.probed_effects[ACTING[0]].any()
    assert len(shown.missed) == 0
    bodies = sum(path.initial.num_entities for path in exam.factual)
    assert shown.embeddings.shape == (bodies * max(HORIZONS), 50)
    assert still.embeddings.shape == shown.embeddings.shape


def test_models_of_slots_and_of_embeddings_have_rows(exam, films, model):
    with said("No training film has a body of the color"):
        judged(exam, {"whole": [embedding()]}, films)
    films = replace(films, training=[*films.training, *zip(exam.factual, films.factual, strict=True)])
    rows = judged(exam, {"mine": [model], "whole": [embedding()]}, films)
    found = {(row.model, row.metric) for row in rows}
    for metric in ("ablation_auroc", "probed_ablation_auroc", "attention_auroc", "cf_gain", "position_error"):
        assert ("mine", metric) in found
    for metric in ("cf_gain", "ablation_auroc", "attention_auroc"):
        assert ("whole", metric) not in found, "one slot for all bodies: none can be removed"
    for metric in ("slot_rmse", "velocity_error", "effective_rank", "mean_cosine", "mean_variance", "least_variance"):
        assert {("mine", metric), ("whole", metric), (f"static, {NAME}", metric), ("static, whole", metric)} <= found
    assert {f"shown the frames, {NAME}", "shown the frames, whole", "engine"} <= {name for name, _ in found}
    still = next(row for row in rows if row.model == f"static, {NAME}" and row.metric == "cf_gain_corrected")
    assert (still.value, still.horizon) == (pytest.approx(0, abs=1e-6), ASKED)


def test_a_collapsed_encoder_is_told_and_not_judged(exam, films, model):
    dull = embedding()
    torch.nn.init.zeros_(dull.trunk[-1].weight)
    with said("The encoder whole has collapsed"):
        judged(exam, {"whole": [dull]}, films)
    with said("mine was trained on slots of films; give the films of the exam."):
        judged(exam, {"mine": [model]})


def test_models_say_what_made_their_slots(exam, films, encoder, tmp_path):
    paths = [path.to(torch.float32) for path in exam.factual]
    write_trajectories(tmp_path / "films.h5", paths, dataset="video_billiards", views=lambda n: [films.factual[n]])
    encode_file(NAME, encoder, tmp_path / "films.h5", tmp_path / "slots/train.h5", history=HISTORY)
    with open_trajectories(tmp_path / "films.h5") as data:
        assert encoder_said(data) is None
    (tmp_path / "run.toml").write_text(
        f'model = "CausalJEPA"\ndata = "{tmp_path / "slots"}"\nout = "{tmp_path / "out"}"\n'
        "[arguments]\nhistory_length = 4\nnum_future = 2\n"
        + "".join(f"{k} = {v}\n" for k, v in SIZES.items())
        + '[loss]\nname = "masked_slots"\nnum_steps = 2\nmax_masked = 2\n'
        '[fit]\nnum_steps = 2\nbatch_size = 4\naccelerator = "cpu"\n'
    )
    made = start(read_run(tmp_path / "run.toml"))
    assert made.provenance["slots"] == {"encoder": NAME, "history": HISTORY}
    assert type(encoder_of(made)) is type(encoder)
    save_checkpoint(made, tmp_path / "mine.safetensors")
    save_checkpoint(embedding(), tmp_path / "whole.safetensors")
    groups = models_of_world("billiards", [tmp_path / "mine.safetensors", tmp_path / "whole.safetensors"])
    assert {title: list(models) for title, models in groups.items()} == {FILMS: ["mine", "whole"]}
    with said("'slots_billiards_0' holds a SlotAttention, which predicts nothing; give a model of its slots."):
        models_of_world("billiards", [NAME])


def test_shipped_models_stand_in_groups():
    groups = models_of_world("billiards")
    assert list(groups) == ["", FILMS, CODE]
    assert {"causal_jepa, |M| = 0", "causal_jepa, |M| = 4", "end to end, one embedding"} <= set(groups[FILMS])
    for models in groups[FILMS].values():
        for one in models:
            if isinstance(one, CausalJEPA):
                assert one.provenance["slots"]["encoder"] == NAME
    assert all(len(models) == 1 for models in groups[CODE].values())
    assert list(models_of_world("springs")) == [""]


def test_rollouts_are_drawn_below_their_film(encoder, films, tmp_path):
    image = pytest.importorskip("PIL.Image")
    view = films.factual[0].window(BRANCH, BRANCH + 5)
    slots = encoder.encode(films.factual[0].rgb)["slots"][BRANCH : BRANCH + 5]
    with image.open(draw_rollouts(encoder, view, [slots, slots], tmp_path / "a.png")) as picture:
        assert picture.size == (2 * 5 * 66, 2 * 3 * 66)
    with said("Rollouts are drawn, one or more"):
        draw_rollouts(encoder, view, [], tmp_path / "b.png")


def test_rows_of_films_can_be_written(exam, films, model):
    rows = judged(exam, {"mine": [model]}, films, floors=False)
    assert {row.model for row in rows} == {"mine"}
    assert json.loads(json.dumps([row.to_json() for row in rows]))
