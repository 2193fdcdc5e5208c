from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from simworld.bench import slot_exam
from simworld.bench.slot_exam import (
    ACTING,
    ASKED,
    BRANCH,
    HORIZONS,
    Answers,
    Exam,
    Scored,
    answer_slots,
    answer_truth,
    auroc,
    others,
    pairs_of,
    see_states,
    set_exam,
)
from simworld.bench.slots import SlotsAsBefore, encoder_of, judged, models_of_world, slots, tables
from simworld.cli import app
from simworld.metrics import Row, Static
from simworld.models import CausalJEPA, InteractionNetwork, TrueSlots, save_checkpoint
from simworld.models.probes import Probe, probe_errors, set_probed
from simworld.simulate import rollout
from simworld.view import plot_masked, plot_over_horizons


@pytest.fixture(scope="module")
def exam():
    return set_exam("billiards", count=3)


@pytest.fixture(scope="module")
def encoder(exam):
    return TrueSlots.measure(exam.training)


def model_of(exam, encoder, **arguments):
    encoded = [encoder.encode(path) for path in exam.training]
    statistics = CausalJEPA.measure(encoded, actions=arguments.get("actions", "none"))
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "num_layers": 1, "num_heads": 2, "head_size": 4, "feedforward_size": 8, "dropout": 0.0}
    model = CausalJEPA(
        dt=0.1, statistics=statistics, **{"history_length": 4, "num_future": 2, **sizes, **arguments}
    ).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    model.provenance = {"slots": encoder.to_json()}
    return model


def values(rows, metric):
    return {(row.model, row.horizon): row.value for row in rows if row.metric == metric}


def test_episodes_are_unseen_and_removals_begin_at_the_branch(exam):
    firsts = {tuple(path["positions"][0, 0].tolist()) for path in exam.training}
    assert not firsts & {tuple(path["positions"][0, 0].tolist()) for path in exam.factual}
    for path, without, branch in zip(exam.factual, exam.removed, exam.branches, strict=True):
        assert len(without) == path.initial.num_entities
        for body, would in enumerate(without):
            assert torch.equal(would["positions"][: branch + 1], path["positions"][: branch + 1])
            assert not bool(would.active[branch:, body].any())
            assert bool(would.active[branch:][:, others(len(without), body)].all())


def test_whom_nothing_was_done_to_goes_on_as_before_also_after_an_impact(exam):
    """In the third episode two bodies meet on the way to the branch frame; a solver begun there must know it."""
    assert exam.branches[:3] == [BRANCH] * 3
    path = exam.factual[2]
    assert bool(path["influences"][BRANCH].any())
    moved = (exam.removed[2][0]["positions"] - path["positions"])[BRANCH : BRANCH + 4].norm(dim=2)
    apart = ~exam.acting(ACTING[0])[2][:, 0] & others(path.initial.num_entities, 0)
    assert bool(apart.any())
    assert float(moved[:, apart].max()) < 1e-6


def test_the_counted_cases_have_effects(exam):
    sizes = {(e, j): exam.effect(e, j) for e, paths in enumerate(exam.removed) for j in range(len(paths))}
    assert 0 < len(exam.cases()) < len(sizes)
    assert set(exam.cases()) == {case for case, size in sizes.items() if size > 0.02}


def test_who_acts_on_whom_is_the_union_over_the_next_frames(exam):
    for frames in ACTING:
        for path, branch, acting in zip(exam.factual, exam.branches, exam.acting(frames), strict=True):
            count = path.initial.num_entities
            assert acting.shape == (count, count)
            later = path["influences"][branch + 1 : branch + 1 + frames, :, :count].any(0)
            assert torch.equal(acting, later)
            assert torch.equal(acting, acting.T), "contacts are mutual"


def test_the_engine_is_right_about_its_own_exam(exam):
    found = tables(exam, [answer_truth(exam)])
    assert found["cf_gain", ASKED].value() == 1
    assert found["cf_gain_corrected", ASKED].value() == pytest.approx(1, abs=1e-12)
    assert found["ablation_auroc", ACTING[0]].value() > 0.9


def test_a_model_that_knows_a_graph_scores_one_and_its_opposite_zero():
    """Three slots of which 1 acts on 0, and nothing else; scores are whom a hand-made model hears."""
    acting = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    truth, whose = pairs_of([acting, acting])
    assert truth.tolist() == [1, 0, 0, 0, 0, 0] * 2
    assert whose.tolist() == [0] * 6 + [1] * 6
    right = acting.double() + 0.1
    scores = pairs_of([right, -right])[0]
    assert auroc(scores[:6], truth[:6]) == 1
    assert auroc(scores[6:], truth[6:]) == 0
    assert auroc(np.zeros(6), truth[:6]) == 0.5
    turned = pairs_of([right.T])[0]
    assert auroc(turned, truth[:6]) < 0.5, "rows hear, columns act"


def test_the_effect_of_ablation_finds_a_known_graph(exam, encoder):
    """A simulator in which the second slot of a scene acts on its first, and nothing else does."""

    class Pushing:
        dt = 0.1

        def step(self, state, action=None):
            first = torch.searchsorted(state.batch, torch.arange(state.num_scenes))
            push = torch.zeros_like(state.slots)
            push[first, 0] = 0.1 * state.active[first + 1].to(push)
            return state.advanced(slots=state.slots + push)

    told = answer_slots(exam, Pushing(), see_states(exam, encoder))
    acting = [torch.zeros(len(paths), len(paths), dtype=torch.bool) for paths in exam.removed]
    for table in acting:
        table[0, 1] = True
    truth = pairs_of(acting)[0]
    for frames in ACTING:
        assert auroc(told.effects[frames], truth) == 1
        assert set(np.round(told.effects[frames], 6)) == {0.0, round(0.1 * frames, 6)}


def test_errors_of_what_stays_and_of_what_goes_on_are_known(exam, encoder):
    still = answer_slots(exam, Static(dt=0.1), see_states(exam, encoder))
    straight = answer_slots(exam, SlotsAsBefore(dt=0.1), see_states(exam, encoder))
    for e, (path, branch) in enumerate(zip(exam.factual, exam.branches, strict=True)):
        places = path["positions"]
        for column, horizon in enumerate(HORIZONS):
            wanted = (places[branch] - places[branch + horizon]).norm(dim=1).mean()
            assert still.errors["positions"][e, column] == pytest.approx(float(wanted), rel=1e-6)
            ahead = places[branch] + horizon * (places[branch] - places[branch - 1])
            wanted = (ahead - places[branch + horizon]).norm(dim=1).mean()
            assert straight.errors["positions"][e, column] == pytest.approx(float(wanted), rel=1e-6, abs=1e-9)
    assert not still.effects[ACTING[0]].any()


def test_rows_have_floors_ceilings_and_differences(exam, encoder):
    known = [path.with_mean_velocities() for path in exam.training]
    models = {
        "causal_jepa, |M| = 0": [model_of(exam, encoder)],
        "causal_jepa, |M| = 2": [model_of(exam, encoder, readout="change")] * 2,
        "no interactions": [model_of(exam, encoder, interactions=False)],
        "interaction network, true states": [
            InteractionNetwork(
                dt=0.1,
                statistics=InteractionNetwork.measure(known, actions="none"),
                actions="none",
                latent_size=4,
                num_message_passing_steps=1,
            )
        ],
    }
    rows = judged(exam, models)
    assert all(isinstance(row, Row) and row.dataset == "billiards" and row.trajectories == 3 for row in rows)
    ablation = values(rows, "ablation_auroc")
    assert ablation["no interactions", ACTING[0]] == 0.5
    assert ablation["engine", ACTING[0]] > 0.9
    assert ("nearness at the branch", ACTING[1]) in ablation
    attention = values(rows, "attention_auroc")
    assert attention["no interactions", ACTING[0]] == 0.5
    assert {name for name, _ in attention} == set(models) - {"interaction network, true states"}
    assert {h for _, h in values(rows, "position_error")} == set(HORIZONS)
    gains = values(rows, "cf_gain_corrected")
    assert gains["static", ASKED] == pytest.approx(0, abs=1e-9), "no effect, none predicted"
    assert gains["no interactions", ASKED] == pytest.approx(0, abs=1e-5)
    for row in rows:
        if row.metric.endswith("_less_that_of_m0"):
            one, other = (
                next(
                    r.value
                    for r in rows
                    if (r.model, r.metric, r.horizon)
                    == (name, row.metric.removesuffix("_less_that_of_m0"), row.horizon)
                )
                for name in (row.model, "causal_jepa, |M| = 0")
            )
            assert row.value == pytest.approx(one - other)
    assert any(row.metric == "ablation_auroc_less_that_of_m0" for row in rows)
    two = next(r for r in rows if r.model.endswith("2") and r.metric == "position_error")
    assert (two.seeds, two.low <= two.value <= two.high) == (2, True)


def test_intervals_are_over_seeds_and_episodes():
    rng = np.random.default_rng(0)
    episodes = np.repeat(np.arange(40), 3)

    def interval(values):
        made = Scored(
            values=values, beside=np.zeros(120), episodes=episodes, statistic=lambda x, _: float(x.mean())
        ).samples(400, 40)
        return np.quantile(made, 0.975) - np.quantile(made, 0.025)

    alike = np.tile(rng.normal(size=40).repeat(3), (3, 1))
    within = rng.normal(size=(1, 120)).repeat(3, 0)
    assert interval(alike) > 1.15 * interval(within), "cases of an episode are drawn together"
    apart = np.array([-1.0, 0.0, 1.0])[:, None] + 0.01 * rng.normal(size=(3, 120))
    assert interval(apart) > 1, "and seeds"
    assert interval(np.ones((3, 120))) == 0


def test_a_probe_reads_positions_and_velocities(exam, encoder):
    training = [encoder.encode(path) for path in exam.training]
    probe = Probe.fit(training, exam.training)
    unseen = [encoder.encode(path) for path in exam.factual]
    errors = probe_errors(probe, unseen, exam.factual)
    assert errors["positions"] < 1e-6
    alone = Probe.fit(training, exam.training, num_frames=1)
    blind = probe_errors(alone, unseen, exam.factual)
    assert errors["velocities"] < 0.2 * blind["velocities"], "which only the frame before tells"
    assert probe.read_state(unseen[0].frame(3))["positions"].shape == (unseen[0].initial.num_entities, 2)
    assert torch.allclose(probe.read_state(unseen[0].frame(3))["velocities"], probe.read(unseen[0])["velocities"][3])


@pytest.mark.parametrize("name", ["positions", "velocities"])
def test_a_probed_attribute_can_be_set(exam, encoder, name):
    training = [encoder.encode(path) for path in exam.training]
    probe = Probe.fit(training, exam.training)
    state = encoder.encode(exam.factual[0]).frame(4)
    after = set_probed(probe, name, [0.3, 0.6], entities=[1])(state, 0)
    read, before = probe.read_state(after), probe.read_state(state)
    assert torch.allclose(read[name][1], torch.tensor([0.3, 0.6], dtype=torch.float64))
    other = "positions" if name == "velocities" else "velocities"
    assert torch.allclose(read[other][1], before[other][1], atol=1e-6)
    keep = others(len(state), 1)
    assert torch.equal(after.slots[keep], state.slots[keep])
    assert torch.equal(after.history[keep], state.history[keep])
    intervention = set_probed(probe, name, [0.3, 0.6], entities=[1], at=2)
    assert intervention(state, 0) is state
    assert intervention.to_json() == {"set_probed": name, "value": [0.3, 0.6], "entities": [1], "at": 2}


@pytest.mark.parametrize("entities", [1, [1], [1, 2]])
def test_what_is_set_by_one_frame_keeps_its_speed(exam, encoder, entities):
    training = [encoder.encode(path) for path in exam.training]
    state = encoder.encode(exam.factual[0]).frame(4)
    both = Probe.fit(training, exam.training)
    where = Probe.fit(training, exam.training, names=["positions"], num_frames=1)
    rows = [entities] if isinstance(entities, int) else entities
    after = set_probed(where, "positions", [[0.3, 0.6]] * len(rows), entities=entities)(state, 0)
    assert torch.allclose(where.read_state(after)["positions"][rows], torch.tensor([0.3, 0.6], dtype=torch.float64))
    before, now, both_now = (
        torch.cat([one.history, one.slots[:, None]], 1).diff(dim=1)
        for one in (state, after, set_probed(both, "positions", [0.3, 0.6], entities=entities)(state, 0))
    )
    assert torch.allclose(now, before)
    assert torch.allclose(both_now[:, :-1], before[:, :-1]), "in the frames before those that the probe reads, too"


def test_a_probed_attribute_set_later_is_in_the_frames(exam, encoder):
    training = [encoder.encode(path) for path in exam.training]
    probe, model = Probe.fit(training, exam.training), model_of(exam, encoder).double()
    put = set_probed(probe, "positions", [0.3, 0.6], entities=[1], at=2)
    path = rollout(encoder.encode(exam.factual[0]).initial, simulator=model, num_steps=4, interventions=put)
    assert torch.allclose(path.frame(3).slots, model.step(path.frame(2)).slots)


def said(pattern):
    return pytest.raises(ValueError, match=re.escape(pattern))


def test_bad_input_gets_one_sentence(exam, encoder, monkeypatch):
    training = [encoder.encode(path) for path in exam.training]
    probe = Probe.fit(training, exam.training)
    with said("This probe reads positions, velocities; got 'masses'"):
        set_probed(probe, "masses", [1.0], entities=[0])
    with said("positions is set to 2 finite numbers"):
        set_probed(probe, "positions", [1.0], entities=[0])
    with said("positions of 2 slots are set to one row for all or 2; got [3, 2]"):
        set_probed(probe, "positions", [[0.0, 0.0]] * 3, entities=[0, 1])
    with said("takes different slots; got [1, 1]"):
        set_probed(probe, "positions", [0.0, 0.0], entities=[1, 1])
    with said("There are slots 0 to"):
        set_probed(probe, "positions", [0.0, 0.0], entities=[9])(training[0].initial, 0)
    with said("as many encoded as recorded"):
        Probe.fit(training, exam.training[1:])
    with said("give them in the same order"):
        Probe.fit(training, exam.training[::-1])
    with said("This probe reads 6 frames of a slot; the state has 4"):
        Probe.fit(training, exam.training, num_frames=6)
    with said("leave --data out"):
        slots("films.h5")
    with monkeypatch.context() as patches:
        patches.setattr(sys.modules[slots.__module__], "shipped", lambda suffix: [])
        with said("There are no models of slots in springs; train one and give it with --checkpoint."):
            slots(worlds=["springs"])
    with said("There is no exam on slots in 'push'; there is one in billiards, springs, push_t."):
        slots(worlds=["push"])
    strange = model_of(exam, encoder)
    strange.provenance = {}
    with said("does not say what slots it was trained on"):
        encoder_of(strange)
    with said("There are no rows of cf_gain to plot."):
        plot_masked([], "cf_gain", path="x.png")


def test_checkpoints_have_rows_of_their_own_in_their_own_world(exam, encoder, tmp_path):
    model = model_of(exam, encoder)
    for name in ("a", "b", "c/a"):
        save_checkpoint(model, tmp_path / name / "model.safetensors", dataset="video_billiards")
    several = [tmp_path / name / "model.safetensors" for name in ("a", "b", "c/a")]
    assert list(models_of_world("billiards", several[:2])[""]) == ["a", "b"]
    assert len(models_of_world("billiards", several)[""]) == 3, "none takes the place of another"
    with said("is given twice; give each once."):
        models_of_world("billiards", [several[0], several[0]])
    with said("The exam on slots in springs is about video_springs; checkpoint 'a' was trained on video_billiards."):
        slots(worlds=["springs"], checkpoints=several[:1], count=2)
    assert {row.dataset for row in slots(checkpoints=several[:1], count=2)} == {"billiards"}


def test_the_command_writes_rows_and_plots(exam, encoder, tmp_path):
    save_checkpoint(model_of(exam, encoder), tmp_path / "mine.safetensors")
    ran = CliRunner().invoke(
        app,
        ["bench", "slots", "--world", "billiards", "--count", "2", "--checkpoint", str(tmp_path / "mine.safetensors"),
         "--json", str(tmp_path / "rows.json"), "--plots", str(tmp_path / "plots")],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"mine", "static", "constant_velocity", "engine", "nearness at the branch"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "ablation_auroc.png", "attention_auroc.png", "cf_gain.png", "cf_gain_corrected.png", "errors.png"
    }  # fmt: skip


def test_plots_over_masked_objects_have_intervals(tmp_path):
    rows = [
        Row(model=f"causal_jepa, |M| = {k}", dataset="billiards", metric="cf_gain", horizon=10, value=0.1 * k, unit="1",
            trajectories=2, low=0.1 * k - 0.05, high=0.1 * k + 0.1)
        for k in range(3)
    ]  # fmt: skip
    rows.append(
        Row(model="engine", dataset="billiards", metric="cf_gain", horizon=10, value=1, unit="1", trajectories=2)
    )
    assert plot_masked(rows, "cf_gain", path=tmp_path / "a.png").stat().st_size > 1000
    assert plot_over_horizons(rows, "cf_gain", path=tmp_path / "b.png").stat().st_size > 1000


def test_exams_and_answers_are_values():
    with pytest.raises(AttributeError):
        Answers(errors={}, missed=np.zeros(0), missed_effect=np.zeros(0), effects={}, attention={}).missed = None
    with pytest.raises(AttributeError):
        Exam(world="billiards", factual=[], branches=[], removed=[], training=[]).world = "springs"


def test_under_actions_rollouts_are_told_what_is_done_with_every_body_and_without(monkeypatch):
    """A model that puts the disc where it is told is right about it, whoever is taken out."""
    exam = set_exam("push_t", count=2)
    encoder = TrueSlots.measure(exam.training, fields=("positions", "quats"), actor=0)
    model = model_of(exam, encoder, actions="input", num_future=1)
    rows = judged(exam, {"masked": [model]})
    assert {row.dataset for row in rows} == {"push_t"}
    assert {"ablation_auroc", "attention_auroc", "cf_gain"} <= {row.metric for row in rows if row.model == "masked"}

    class Told:
        dt = 0.1

        def step(self, state, action):
            where = (action - torch.tensor(encoder.means[:2])) / encoder.scales[0]
            slots = state.slots.clone()
            slots[0::2, :2] = where
            return state.advanced(slots=slots)

    seen = see_states(exam, encoder)
    told = []
    monkeypatch.setattr(slot_exam, "_effects", lambda paths: told.append(paths) or {})
    answer_slots(exam, Told(), seen)
    for e, (was, without_disc, without_block) in enumerate(told[0]):
        done = exam.factual[e].actions[exam.branches[e] :, 0]
        for made in (was, without_block):
            places = encoder.decode(made)["positions"][1:, 0]
            assert torch.allclose(places, done[: len(places)])
        assert torch.equal(without_disc[:, 0], without_disc[:1, 0].expand(len(without_disc), -1))
