from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from simworld import (
    ObjectState,
    SlotState,
    Trajectory,
    counterfactual,
    do,
    hold,
    load_checkpoint,
    remove,
    replace_slots,
    rollout,
    save_checkpoint,
    write_trajectories,
)
from simworld.losses import masked_objects, masked_slots
from simworld.models import CausalJEPA, TrueSlots
from simworld.models.slot_tokens import allowed_pairs
from simworld.runs import read_run, start
from simworld.testing import check_simulator

SIZES = {
    "latent_size": 12,
    "num_layers": 2,
    "num_heads": 2,
    "head_size": 5,
    "feedforward_size": 16,
    "dropout": 0.0,
}
COUNTS = (4, 3)  # slots of two scenes


def recorded(*, actions=False, proprioception=False, frames=12, history=3, counts=COUNTS, seed=0):
    """Return a trajectory of random slots of 5 numbers."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    slots = torch.randn(frames, len(batch), 5, generator=generator)
    acted = torch.randn(frames, len(counts), 2, generator=generator)
    known = torch.randn(frames, len(counts), 3, generator=generator)
    past = {}
    if actions:
        past["past_actions"] = torch.stack([acted[t : t + history].transpose(0, 1) for t in range(frames - history)])
    if proprioception:
        past["proprioception"] = known[history:]
        past["past_proprioception"] = torch.stack(
            [known[t : t + history].transpose(0, 1) for t in range(frames - history)]
        )
    initial = SlotState(
        slots=slots[history],
        history=slots[:history].transpose(0, 1),
        batch=batch,
        **{name: values[0] for name, values in past.items()},
    )
    return Trajectory(
        initial=initial,
        frames={"slots": slots[history:], **past},
        active=torch.ones(frames - history, len(batch), dtype=torch.bool),
        dt=0.1,
        actions=acted[history:-1] if actions else None,
    )


def made(path, *, trained=True, **arguments):
    """Return a small model of a trajectory's slots, with weights as large as those of a trained one."""
    arguments = {"history_length": 4, "num_future": 2, **SIZES, **arguments}
    statistics = CausalJEPA.measure([path], actions=arguments.get("actions", "none"))
    torch.manual_seed(0)
    model = CausalJEPA(dt=0.1, statistics=statistics, **arguments).eval()
    for weight in model.parameters() if trained else ():
        torch.nn.init.normal_(weight, 0, 0.3)
    return model


@pytest.mark.parametrize("readout", ["slots", "change", "motion"])
@pytest.mark.parametrize("interactions", [True, False])
def test_it_keeps_the_contract(readout, interactions):
    path = recorded()
    check_simulator(made(path, readout=readout, interactions=interactions), path.initial)


@pytest.mark.parametrize("proprioception", [True, False])
def test_it_keeps_the_contract_under_actions(proprioception):
    path = recorded(actions=True, proprioception=proprioception)
    model = made(path, actions="input", num_future=1)
    check_simulator(model, path.initial, path.actions)
    state, after, action = path.frame(0), path.frame(1), path.actions[0]
    back = model.integrate(state, model.target(state, after, action), action)
    for name in after:
        assert torch.allclose(back[name], after[name], atol=1e-5), name


def test_integrate_is_the_inverse_of_target_and_step_takes_the_first_predicted_frame():
    path = recorded()
    model = made(path)
    state = path.frame(0)
    assert torch.allclose(model.integrate(state, model.target(state, path.frame(1))).slots, path.frame(1).slots)
    ahead = model.predict(state)
    assert ahead.shape == (2, 7, 5)
    assert torch.allclose(ahead[0], model.step(state).slots, atol=1e-5)


def test_permutation_of_slots_permutes_what_is_predicted():
    path = recorded(counts=(6,))
    model = made(path).double()
    state = path.initial.to(torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = SlotState(slots=state.slots[order], history=state.history[order])
    assert torch.allclose(model.predict(shuffled), model.predict(state)[:, order], atol=1e-13)
    whom = model.attention(state)
    assert torch.allclose(model.attention(shuffled), whom[order][:, order], atol=1e-13)


def test_what_is_masked_does_not_leak_but_its_anchor_does():
    """A masked slot's input after the first frame changes nothing; that at its first frame says who it is."""
    path = recorded()
    for readout in ("slots", "change", "motion"):
        model = made(path, readout=readout)
        state = path.initial
        hidden = torch.tensor([True, False, False, False, False, True, False])
        plain, _ = model.predicted(state, hidden=hidden)
        history = state.history.clone()
        history[hidden, 1:] += 7.0
        changed, _ = model.predicted(
            state.replace(history=history, slots=state.slots + 7.0 * hidden[:, None]), hidden=hidden
        )
        assert torch.equal(plain, changed)
        history = state.history.clone()
        history[0, 0] += 1.0
        anchored, _ = model.predicted(state.replace(history=history), hidden=hidden)
        assert not torch.allclose(plain[0], anchored[0])
        assert torch.allclose(plain[1], anchored[1], atol=1e-6), "another scene"
        unmasked, _ = model.predicted(state)
        assert not torch.allclose(plain[0], unmasked[0])


def test_the_future_is_never_seen():
    path = recorded()
    model, loss = made(path), masked_slots(2, max_masked=1)
    slots = path["slots"].clone()
    slots[1:] += 5.0
    other = Trajectory(initial=path.initial, frames={"slots": slots}, active=path.active, dt=path.dt)
    assert torch.equal(model.predict(path.frame(0)), model.predict(other.frame(0)))
    values = [loss.measure(model, one, torch.Generator().manual_seed(1)) for one in (path, other)]
    assert values[0] != values[1], "but it is what predictions are compared with"


def test_a_masked_token_is_its_anchor_and_a_code_of_time():
    path = recorded()
    model = made(path)
    slots = torch.randn(2, 4, 4, 5)
    masked = torch.tensor([[True, False, False, False]] * 2)
    tokens, _ = model._masked_tokens(slots, masked, model.embed, model.anchor)
    assert tokens.shape == (2, 4, 6, 12)
    wanted = model.anchor(slots[:, :, 0])[:, :, None] + model.mask + model.time
    assert torch.allclose(tokens[:, 0, 1:], wanted[:, 0, 1:])
    assert torch.allclose(tokens[:, 1:, 4:], wanted[:, 1:, 4:])
    assert torch.allclose(tokens[:, 0, 0], model.embed(slots[:, 0, 0]) + model.time[0]), "t0 is always visible"
    assert torch.allclose(tokens[:, 1, 2], model.embed(slots[:, 1, 2]) + model.time[2])


def test_slots_have_no_code_of_their_own():
    path = recorded(counts=(3,))
    model = made(path)
    alike = SlotState(slots=torch.ones(3, 5), history=torch.ones(3, 3, 5))
    ahead = model.predict(alike)
    assert torch.allclose(ahead[:, 0], ahead[:, 2], atol=1e-6)


def test_as_many_are_masked_as_said():
    state = recorded(counts=(6,) * 300).initial
    generator = torch.Generator().manual_seed(0)
    counts = masked_objects(state, 3, generator).reshape(300, 6).sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 3}, "drawn anew for each scene"
    assert all(50 < int((counts == k).sum()) < 100 for k in range(4))
    exactly = masked_objects(state, 3, generator, exactly=True).reshape(300, 6)
    assert bool((exactly.sum(1) == 3).all())
    assert bool((exactly.float().mean(0) > 0.3).all()), "any of them"
    alike = masked_objects(state, 3, torch.Generator().manual_seed(0), exactly=True, alike=True).reshape(300, 6)
    assert bool((alike == alike[0]).all())
    assert not bool(masked_objects(state, 0, generator).any())


def test_one_slot_stays_visible_and_what_is_not_there_is_not_masked():
    state = recorded(counts=(6, 3, 4)).initial
    gone = state.replace(active=torch.arange(13) != 10)
    for seed in range(20):
        hidden = masked_objects(gone, 5, torch.Generator().manual_seed(seed), exactly=True)
        assert [int(part.sum()) for part in hidden.split([6, 3, 4])] == [5, 2, 2]
        assert not hidden[10]


def test_the_loss_is_that_of_masked_history_and_of_the_future():
    path = recorded()
    model = made(path)
    for maximum, options in ((0, {}), (2, {}), (2, {"loss_on_anchor": True}), (2, {"exactly": True})):
        loss = masked_slots(2, max_masked=maximum, **options)
        value = loss.measure(model, path.window(0, 3), torch.Generator().manual_seed(3))
        hidden = masked_objects(
            path.initial, maximum, torch.Generator().manual_seed(3), exactly=options.get("exactly", False)
        )
        made_slots, _ = model.predicted(path.initial, hidden=hidden)
        rows = made_slots[path.initial.batch, torch.tensor([0, 1, 2, 3, 0, 1, 2])]
        wanted = torch.cat([path.initial.history, path["slots"][:3].transpose(0, 1)], 1)
        mean, std = (torch.tensor(model.arguments["statistics"][f"slots_{k}"]) for k in ("mean", "std"))
        errors = (rows - (wanted - mean) / std).square()
        first = 0 if options.get("loss_on_anchor") else 1
        history = errors[hidden, first:4].mean() if bool(hidden.any()) else 0.0
        assert float(value.detach()) == pytest.approx(float((history + errors[:, 4:].mean()).detach()), rel=1e-5)


def test_a_tolerance_bounds_what_a_token_counts():
    path = recorded()
    model = made(path)
    past, future, own = model.errors(path)
    value = masked_slots(2, tolerance=0.1).measure(model, path, torch.Generator().manual_seed(0))
    assert torch.allclose(value, (future / 0.1).log1p().mean())
    assert (past.shape, len(future), len(own)) == ((7, 4), 14, 0)


def test_proprioception_is_predicted_and_counts():
    path = recorded(actions=True, proprioception=True)
    model = made(path, actions="input", num_future=1)
    _, future, own = model.errors(path, path.actions[0])
    assert len(own) == 2
    value = masked_slots(1).measure(model, path, torch.Generator().manual_seed(0))
    assert torch.allclose(value, future.mean() + own.mean())
    after = model.step(path.initial, path.actions[0])
    assert torch.equal(after.past_proprioception[:, -1], path.initial.proprioception)
    assert torch.equal(after.past_actions[:, -1], path.actions[0])
    assert not torch.equal(after.proprioception, path.initial.proprioception)


def test_the_loss_is_a_function_of_the_generator_even_with_dropout():
    path = recorded()
    model = made(path, dropout=0.3).train()
    loss = masked_slots(2, max_masked=2)
    values = [float(loss.measure(model, path, torch.Generator().manual_seed(k)).detach()) for k in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    loss.measure(model, path, torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), before), "torch's own generator is left alone"


def test_the_same_mask_in_every_batch_and_its_name():
    path = recorded(counts=(6, 6))
    model = made(path)
    same = masked_slots(2, max_masked=3, exactly=True, same_mask_every_batch=True)
    values = [float(same.measure(model, path, torch.Generator().manual_seed(k)).detach()) for k in range(3)]
    assert len(set(values)) == 1
    anew = masked_slots(2, max_masked=3, exactly=True)
    assert len({float(anew.measure(model, path, torch.Generator().manual_seed(k)).detach()) for k in range(3)}) == 3
    assert same.name != anew.name != masked_slots(2, max_masked=2).name, "a run is known by its loss"


def test_options_change_what_is_computed():
    path = recorded()
    plain = made(path)
    state = path.initial
    for option in ({"norm_before_attention": False}, {"interactions": False}, {"readout": "change"}):
        assert not torch.allclose(plain.predict(state), made(path, **option).predict(state)), option
    assert made(path, norm_before_attention=False).num_parameters == plain.num_parameters - 2 * 2 * 12


@pytest.mark.parametrize("readout", ["change", "motion"])
def test_an_untrained_model_of_changes_does_not_change(readout):
    path = recorded()
    state = path.initial
    ahead = made(path, readout=readout, trained=False).predict(state)
    speed = state.slots - state.history[:, -1] if readout == "motion" else torch.zeros_like(state.slots)
    for step in (1, 2):
        assert torch.allclose(ahead[step - 1], state.slots + step * speed, atol=1e-5)


def test_without_interactions_slots_do_not_matter_to_each_other():
    path = recorded(actions=True)
    model = made(path, interactions=False, actions="input", num_future=1)
    state, action = path.initial, path.actions[0]
    other = state.replace(slots=state.slots + torch.tensor([1.0, 0, 0, 0, 0, 0, 0])[:, None])
    plain, changed = (model.step(one, action).slots for one in (state, other))
    assert torch.equal(plain[1:], changed[1:])
    assert not torch.equal(model.step(state, action + 1).slots[1:], plain[1:]), "actions matter"
    off = model.attention(state, action)[:4] * (1 - torch.eye(4))
    assert not bool(off.any())


def test_who_may_attend_to_whom():
    there = torch.tensor([[True, True, False]])
    pairs = allowed_pairs(there, 2, 1, interactions=True)[0, 0]
    assert pairs[0].tolist() == [True] * 4 + [False] * 2 + [True]
    assert pairs[4].tolist() == [True] * 5 + [False, True], "what is not there sees itself, so that it has a number"
    alone = allowed_pairs(there, 2, 1, interactions=False)[0, 0]
    assert alone[0].tolist() == [True, True, False, False, False, False, True]
    assert alone[6].tolist() == [False] * 6 + [True]


def test_attention_looks_at_slots_of_its_scene():
    path = recorded()
    whom = made(path).attention(path.initial)
    assert whom.shape == (7, 4)
    assert torch.allclose(whom.sum(1), torch.ones(7))
    assert not bool(whom[4:, 3].any()), "the second scene has three"


def test_a_checkpoint_gives_back_the_model(tmp_path):
    path = recorded()
    model = made(path, readout="motion")
    save_checkpoint(model, tmp_path / "model.safetensors")
    back = load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(back.predict(path.initial), model.predict(path.initial))


def test_a_rollout_begins_and_goes_on_with_history():
    path = recorded()
    model = made(path)
    out = rollout(path.initial, simulator=model, num_steps=5)
    assert torch.equal(out.frame(3).history[:, -1], out["slots"][2])
    assert torch.equal(model.step(out.frame(3)).slots, out["slots"][4])


def test_slots_are_removed_and_replaced():
    path = recorded()
    model = made(path)
    plain = rollout(path.initial, simulator=model, num_steps=4)
    gone = rollout(path.initial, simulator=model, num_steps=4, interventions=[remove([0], at=1)])
    assert torch.equal(gone["slots"][:2], plain["slots"][:2])
    assert torch.equal(gone["slots"][4, 0], plain["slots"][1, 0]), "it stays"
    assert not torch.allclose(gone["slots"][2, 1], plain["slots"][2, 1]), "others miss it"
    assert torch.allclose(gone["slots"][4, 4:], plain["slots"][4, 4:], atol=1e-5), "in its scene"
    twin = rollout(
        path.initial,
        simulator=model,
        num_steps=2,
        interventions=[do(at=0, entities=[0], slots=path.initial.slots[1:2])],
    )
    assert torch.equal(twin["slots"][0, 0], path.initial.slots[1])
    assert not torch.allclose(twin["slots"][1, 2], plain["slots"][1, 2])


def speeds(state):
    known = torch.cat([state.history, state.slots[:, None]], 1)
    return known.diff(dim=1)


def test_slots_that_are_put_elsewhere_go_on_as_fast():
    state = recorded().initial
    moved = do(entities=[0], slots=state.slots[1:2])(state, 0)
    assert torch.equal(moved.slots[0], state.slots[1])
    assert torch.allclose(speeds(moved), speeds(state), atol=1e-5), "no jump that looks like speed"
    assert torch.equal(moved.history[1:], state.history[1:])
    pushed = do(at=range(2, 5), entities=[0], slots=lambda rows: rows + 1)
    assert torch.allclose(speeds(pushed(state, 2)), speeds(state), atol=1e-5)
    assert torch.equal(pushed(state, 3).history, state.history), "what was made a step before is history"
    held = rollout(
        state, simulator=made(recorded()), num_steps=4, interventions=[do(at=range(9), entities=[0], slots=hold())]
    )
    assert torch.allclose(speeds(held.frame(4))[0], torch.zeros(3, 5)), "what is held comes to rest"


@pytest.mark.parametrize("at", [0, 2])
def test_slots_replaced_by_others_move_as_they_do(at):
    path = recorded()
    model, replaced = made(path, interactions=False), replace_slots([0, 4], by=[1, 5], at=at)
    plain = rollout(path.initial, simulator=model, num_steps=5)
    twins = rollout(path.initial, simulator=model, num_steps=5, interventions=replaced)
    assert torch.equal(twins["slots"][:at], plain["slots"][:at])
    for name in ("slots", "history"):
        assert torch.allclose(twins[name][at:, [0, 4]], plain[name][at:, [1, 5]], atol=1e-5), name
    assert torch.equal(twins["slots"][:, [1, 2, 3]], plain["slots"][:, [1, 2, 3]])
    assert torch.equal(twins.frame(5).slots, model.step(twins.frame(4)).slots)
    assert twins.interventions == ({"replace_slots": [0, 4], "by": [1, 5], "at": at},)


def test_slots_are_replaced_by_those_of_another_state():
    path, other = recorded(), recorded(seed=1).initial
    changed = replace_slots(0, by=3, of=other)(path.initial, 0)
    assert torch.equal(changed.slots[0], other.slots[3])
    assert torch.equal(changed.history[0], other.history[3])
    assert replace_slots(0, by=3, of=other).to_json()["of"] == "another state"
    with said("replace_slots() takes rows of history [3, 5]; got [2, 5]."):
        replace_slots(0, by=3, of=other.replace(history=other.history[:, 1:]))(path.initial, 0)
    with said("takes slots 0 to 6; got [7]"):
        replace_slots(7, by=3)(path.initial, 0)
    with said("takes one slot for each; got [0, 1] by [3]"):
        replace_slots([0, 1], by=3)
    with said("replaces different slots; got [1, 1]"):
        replace_slots([1, 1], by=[2, 3])
    with said("takes slots by number"):
        replace_slots("slots > 0", by=3)
    with said("acts at one step"):
        replace_slots(0, by=3, at=range(3))
    with said("or take both from others by replace_slots"):
        do(history=0.0)(path.initial, 0)


def test_counterfactuals_keep_what_was_observed():
    path = recorded(frames=14)
    asked = counterfactual(path, [remove([1], at=4)], simulator=made(path))
    assert torch.equal(asked.counterfactual["slots"][:5], path["slots"][:5])
    other = [0, 2, 3]
    assert not torch.allclose(asked.counterfactual["slots"][5, other], asked.factual["slots"][5, other])
    assert torch.equal(asked.effect(), asked.effect("slots"))
    assert asked.affected(eps=0.0)[other].all()
    assert torch.equal(asked.corrected()[:5], path["slots"][:5])


RUN = """
model = "CausalJEPA"
data = "{data}"
out = "{out}"

[slots]
fields = ["positions", "colors"]
history_length = 3

[arguments]
history_length = 3
num_future = 2
latent_size = 8
num_layers = 1
num_heads = 2
head_size = 4
feedforward_size = 8

[loss]
name = "masked_slots"
num_steps = 2
max_masked = 1

[fit]
num_steps = 3
batch_size = 4
accelerator = "cpu"
"""


def test_a_run_encodes_bodies_on_reading(tmp_path):
    for name in ("train", "valid"):
        write_trajectories(tmp_path / f"{name}.h5", [discs(frames=8, seed=k) for k in range(4)], dataset="discs")
    text = RUN.format(data=tmp_path, out=tmp_path / "run")
    (tmp_path / "run.toml").write_text(text)
    model = start(read_run(tmp_path / "run.toml"))
    encoder = TrueSlots.from_json(load_checkpoint(tmp_path / "run/model.safetensors").provenance["slots"])
    assert (encoder.fields, encoder.history_length, model.slot_size) == (("positions", "colors"), 3, 5)
    model.step(encoder.encode(discs(seed=9)).initial)
    (tmp_path / "wrong.toml").write_text(text.replace('model = "CausalJEPA"', 'model = "InteractionNetwork"'))
    with said("[slots] makes slots for a CausalJEPA; leave it out for a InteractionNetwork"):
        read_run(tmp_path / "wrong.toml")
    for wrong in ("colours = 1", 'fields = "positions"'):
        (tmp_path / "wrong.toml").write_text(text.replace('fields = ["positions", "colors"]', wrong))
        with said("[slots]"):
            read_run(tmp_path / "wrong.toml")


def test_it_learns_who_follows_whom(tmp_path):
    """Half of the slots copy what another did a frame before, which history alone tells: no copy is near that."""
    from simworld import Fit, fit

    generator = torch.Generator().manual_seed(0)
    paths = []
    for _ in range(60):
        leads = torch.randn(8, 1, generator=generator)
        slots = torch.zeros(8, 2, 2)
        slots[:, 0] = torch.cat([leads, torch.ones(8, 1)], 1)
        slots[1:, 1, :1] = leads[:-1]
        slots[:, 1, 1] = -1.0
        initial = SlotState(slots=slots[1], history=slots[:1].transpose(0, 1))
        paths.append(
            Trajectory(initial=initial, frames={"slots": slots[1:]}, active=torch.ones(7, 2, dtype=torch.bool), dt=1.0)
        )
    model = CausalJEPA(
        dt=1.0, statistics=CausalJEPA.measure(paths), history_length=2, num_future=1, **{**SIZES, "latent_size": 16}
    )
    how = Fit(num_steps=250, batch_size=32, learning_rate=5e-3, warm_up=20, ema_decay=0.9, accelerator="cpu")
    model = fit(model.train(), paths[:50], masked_slots(1), how, out=tmp_path)
    test = Trajectory.cat(paths[50:])
    with torch.no_grad():
        ahead = model.predict(test.frame(2))[0]
    followers = torch.arange(20) % 2 == 1
    missed = (ahead - test["slots"][3])[followers, 0].square().mean()
    copied = (test["slots"][2] - test["slots"][3])[followers, 0].square().mean()
    assert float(missed) < 0.1 * float(copied)


def said(pattern):
    return pytest.raises(ValueError, match=re.escape(pattern))


def test_bad_input_gets_one_sentence():
    path = recorded()
    model, state = made(path), path.initial
    with said("This model needs history of 3 frames before the present one; the state has none."):
        model.step(SlotState(slots=state.slots))
    with said("the state has 2."):
        model.step(SlotState(slots=state.slots, history=state.history[:, 1:]))
    with said("trained on slots of 5 numbers; got 6"):
        model.step(SlotState(slots=torch.zeros(2, 6), history=torch.zeros(2, 3, 6)))
    with said("trained without actions"):
        model.step(state, torch.zeros(2, 2))
    with said("steps a SlotState; got a ObjectState"):
        model.step(ObjectState(positions=torch.zeros(1, 2), velocities=torch.zeros(1, 2)))
    with said("computes in torch.float32; got a state in torch.float64"):
        model.step(state.to(torch.float64))
    with said("slots must be finite; row 1"):
        SlotState(slots=torch.tensor([[0.0], [float("nan")]]))
    with said("say num_future=1; got 2"):
        made(recorded(actions=True), actions="input", num_future=2)
    with said("takes an action [2, 2] of torch.float32 per step, a row per scene; got none"):
        acting = recorded(actions=True)
        made(acting, actions="input", num_future=1).step(acting.initial)
    with said("needs trajectories with actions to measure"):
        made(path, actions="input", num_future=1)
    with said("max_masked=4 leaves nothing visible: scenes have 4 slots or fewer; ask for 3."):
        masked_slots(2, max_masked=4).measure(model, path, torch.Generator())
    with said("masked_slots with num_steps=3 trains a CausalJEPA of as many; got num_future=2"):
        masked_slots(3).measure(model, path, torch.Generator())
    with said("masked_slots needs num_steps of 1 or more"):
        masked_slots(0)
    for name, value in (("num_heads", 0), ("dropout", 1.0), ("readout", "speed"), ("history_length", 2.5)):
        with said(name):
            made(path, **{name: value})
    with said("A CausalJEPA is trained on slots; got a ObjectState"):
        CausalJEPA.measure([discs()])
    with said("statistics lack slots_mean"):
        CausalJEPA(dt=0.1, statistics={})


def discs(frames=6, count=3, seed=0):
    """Return bodies that fly straight."""
    generator = torch.Generator().manual_seed(seed)
    velocities = torch.randn(count, 2, generator=generator)
    positions = torch.rand(count, 2, generator=generator) + 0.1 * torch.arange(frames)[:, None, None] * velocities
    state = ObjectState(
        positions=positions[0],
        velocities=velocities,
        radii=torch.rand(count, generator=generator),
        colors=torch.rand(count, 3, generator=generator),
    )
    frames_of = {"positions": positions, "velocities": velocities.expand(frames, -1, -1)}
    return Trajectory(initial=state, frames=frames_of, active=torch.ones(frames, count, dtype=torch.bool), dt=0.1)


def test_true_slots_hold_what_single_frames_show_and_give_it_back():
    path = discs()
    encoder = TrueSlots.measure([path, discs(seed=1)], history_length=3)
    assert (encoder.fields, encoder.slot_size) == (("positions", "radii", "colors"), 6)
    slots = encoder.encode(path)
    assert len(slots) == 4
    assert slots.initial.history.shape == (3, 2, 6)
    back = encoder.decode(slots["slots"])
    assert torch.allclose(back["positions"], path["positions"][2:], atol=1e-6), "frame 0 is the third recorded"
    assert torch.allclose(back["colors"][1], path.initial.colors, atol=1e-6)
    assert torch.allclose(encoder.decode(slots.initial.history[:, 0])["positions"], path["positions"][0], atol=1e-6)
    state = encoder.encode_state(path.frame(2), [path.frame(0), path.frame(1)])
    assert state.identical(slots.initial)
    assert TrueSlots.from_json(encoder.to_json()) == encoder


def test_true_slots_keep_actions_and_who_is_there():
    path = discs()
    acted = torch.arange(5.0)[:, None, None].expand(5, 1, 2)
    active = path.active.clone()
    active[4:, 1] = False
    path = Trajectory(initial=path.initial, frames=path.frames, active=active, dt=0.1, actions=acted)
    slots = TrueSlots.measure([path], history_length=3).encode(path)
    assert slots.initial.past_actions[0, :, 0].tolist() == [0.0, 1.0]
    assert slots.frame(1).past_actions[0, :, 0].tolist() == [1.0, 2.0]
    assert slots.actions[0, 0, 0] == 2.0
    assert slots.active[:, 1].tolist() == [True, True, False, False]


def test_an_actor_knows_its_own_place_and_velocity():
    path = discs()
    encoder = TrueSlots.measure([path], history_length=3, actor=1)
    assert TrueSlots.from_json(encoder.to_json()) == encoder
    known = torch.cat([path["positions"][:, 1], path["velocities"][:, 1]], 1)
    slots = encoder.encode(path)
    assert torch.equal(slots["proprioception"][:, 0], known[2:])
    assert torch.equal(slots.frame(1).past_proprioception[0], known[1:3])
    two = encoder.encode(Trajectory.cat([path, discs(seed=1)]))
    assert torch.equal(two.initial.proprioception[0], known[2])
    assert two.initial.past_proprioception.shape == (2, 2, 4)
    with said("got actor=3 and a recording of 3 bodies in 1 scenes"):
        replace(encoder, actor=3).encode(path)


def test_true_slots_refuse_what_does_not_fit():
    path = discs()
    encoder = TrueSlots.measure([path], history_length=3)
    with said("a history of 3 frames need a recording of as many; got 2"):
        encoder.encode(path.window(0, 2))
    with said("Slots cannot hold 'masses'"):
        TrueSlots.measure([path], fields=["masses"])
    with said("These slots have 6 columns; got [2, 5]"):
        encoder.decode(torch.zeros(2, 5))
    with said("not slots of true states, but of the encoder 'video'"):
        TrueSlots.from_json({"encoder": "video"})
    broken = {**path.frames, "positions": path["positions"].clone()}
    broken["positions"][3] = float("nan")
    with said("slots must be finite; frame 1"):
        encoder.encode(Trajectory(initial=path.initial, frames=broken, active=path.active, dt=0.1))
