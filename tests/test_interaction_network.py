from __future__ import annotations

import math

import pytest
import torch

from simworld import ConstantVelocity, InteractionNetwork, ObjectState, rollout
from simworld.physics import balls_episode, cradle_episode, string_episode
from simworld.testing import check_locality, check_simulator

FORMS = [(m, margin, types) for m in ("vector", "response", "scalar") for margin, types in ((2.0, 1), (None, 2))]


@pytest.fixture
def balls():
    """Makes small networks for the box of balls, in double precision."""
    path = balls_episode([8, 0, 0], num_steps=30)

    def make(**arguments) -> InteractionNetwork:
        torch.manual_seed(0)
        given = {"margin": 0.2, "latent_size": 16, "num_message_passing_steps": 3, "walls": True, "actions": "none"}
        given |= {"node_fields": ("restitutions",), **arguments}
        statistics = InteractionNetwork.measure([path], actions="none")
        return InteractionNetwork(dt=path.dt, statistics=statistics, **given).double()

    return make


@pytest.mark.parametrize(("messages", "margin", "types"), FORMS)
def test_the_contract(make_model, episode, messages, margin, types):
    model = make_model(messages=messages, margin=margin, num_object_types=types).double()
    check_simulator(model, episode.initial, episode.actions, tolerance=1e-9)


@pytest.mark.parametrize("actions", ["impulse", "input", "none"])
@pytest.mark.parametrize("messages", ["vector", "response", "scalar"])
def test_target_is_the_inverse_of_integrate(make_model, episode, actions, messages):
    model = make_model(actions=actions, messages=messages).double()
    for t in (0, 11, 29):
        state, after, action = episode.frame(t), episode.frame(t + 1), episode.actions[t]
        again = model.integrate(state, model.target(state, after, action), action)
        assert torch.allclose(again.positions, after.positions, atol=1e-9)
        assert torch.allclose(again.velocities, after.velocities, atol=1e-7)
        change = torch.where(model.free(state)[:, None], torch.randn_like(state.positions), 0.0)
        assert torch.allclose(model.target(state, model.integrate(state, change, action), action), change, atol=1e-9)


def test_a_model_that_knows_the_target_reproduces_the_data(make_model, episode):
    """The cheating model: whatever error remains would be the loop's or the rule's."""
    model = make_model().double()

    class Cheat:
        dt = model.dt
        t = 0

        def step(self, state, action=None):
            change = model.target(state, episode.frame(self.t + 1), action)
            self.t += 1
            return model.integrate(state, change, action)

    path = rollout(episode.initial, episode.actions, simulator=Cheat())
    assert torch.allclose(path["positions"], episode["positions"], atol=1e-9)


@pytest.mark.parametrize("messages", ["vector", "response"])
@pytest.mark.parametrize("reflect", [False, True])
def test_vector_messages_are_equivariant(make_model, episode, reflect, messages):
    model = make_model(messages=messages).double()
    angle = 0.7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    if reflect:
        turn[:, 0] *= -1
    state, action = episode.frame(9), episode.actions[9]
    turned = state.replace(positions=state.positions @ turn + 5.0, velocities=state.velocities @ turn)
    wanted = model(state, action) @ turn
    assert torch.allclose(model(turned, action @ turn), wanted, atol=1e-9)
    assert wanted.abs().max() > 1e-3


def test_scalar_messages_are_not(make_model, episode):
    model = make_model(messages="scalar").double()
    state = episode.frame(9)
    turned = state.replace(positions=state.positions.flip(1), velocities=state.velocities.flip(1))
    assert not torch.allclose(model(turned), model(state).flip(1), atol=1e-6)


def test_effects_travel_one_edge_per_step(make_model):
    """A chain of discs that overlap a little: three rounds of messages reach three discs, and no further."""
    chain = ObjectState(
        positions=torch.stack([9.9 * torch.arange(9), torch.zeros(9)], 1).double(),
        velocities=torch.zeros(9, 2).double(),
        radii=torch.full((9,), 5.0).double(),
    )
    for messages in ("vector", "response", "scalar"):
        for rounds in (1, 3):
            model = make_model(messages=messages, num_message_passing_steps=rounds).double()
            check_locality(model, chain, entity=0, reach=10.0 * rounds + 1)
            with pytest.raises(AssertionError, match="travelled farther"):
                check_locality(model, chain, entity=0, reach=10.0 * rounds - 1)


def test_fixed_bodies_stay_and_free_ones_move(make_model, episode):
    path = rollout(episode.initial.using(make_model().double()), episode.actions)
    fixed = episode.initial.fixed
    assert torch.equal(path["positions"][-1, fixed], path["positions"][0, fixed])
    assert (path["positions"][-1, ~fixed] != path["positions"][0, ~fixed]).all()


def test_three_dimensions_bare_bodies_and_no_edges(make_model):
    model = make_model(num_dimensions=3, actions="none")
    lone = ObjectState(positions=torch.zeros(1, 3), velocities=torch.ones(1, 3))
    assert rollout(lone, simulator=model, num_steps=3)["positions"].shape == (4, 1, 3)
    assert torch.isfinite(model(lone)).all()
    with pytest.raises(ValueError, match="without actions"):
        model.step(lone, torch.zeros(1, 3))


@pytest.mark.parametrize("messages", ["vector", "response"])
def test_coinciding_bodies_give_finite_gradients(make_model, messages):
    model = make_model(messages=messages)
    state = ObjectState(
        positions=torch.zeros(2, 2, requires_grad=True), velocities=torch.ones(2, 2), radii=torch.ones(2)
    )
    model(state).sum().backward()
    assert torch.isfinite(state.positions.grad).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"messages": "tensor"}, "messages must be one of 'vector', 'response', 'scalar'; got 'tensor'"),
        ({"actions": "force"}, "actions must be one of"),
        ({"num_dimensions": 4}, "num_dimensions must be one of 2, 3"),
        ({"margin": 0.0}, "margin must be a positive distance, or None"),
        ({"latent_size": 0}, "latent_size must be a whole number"),
        ({"num_message_passing_steps": 1.5}, "num_message_passing_steps must be a whole number"),
    ],
)
def test_bad_arguments(make_model, arguments, says):
    with pytest.raises(ValueError, match=says):
        make_model(**arguments)


def test_bad_statistics_dt_states_and_actions(make_model, state):
    with pytest.raises(ValueError, match="statistics lack velocity"):
        InteractionNetwork(dt=0.1, statistics={})
    with pytest.raises(ValueError, match="dt must be a positive"):
        InteractionNetwork(dt=0, statistics={})
    with pytest.raises(ValueError, match=r"computes in torch.float32; got a state in torch.float64"):
        make_model().step(state)
    model, state = make_model(), state.to(torch.float32)
    with pytest.raises(ValueError, match="masses must be positive"):
        model.step(state.replace(masses=torch.zeros(17)))
    with pytest.raises(ValueError, match="give the state object_types"):
        make_model(num_object_types=2).step(ObjectState(positions=torch.zeros(1, 2), velocities=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"action \[17, 2\] per step.*got \[3, 2\]"):
        model.step(state, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"positions \[n, 2\]; got \[1, 3\]"):
        model.step(ObjectState(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3)))


def test_statistics_come_from_the_data(episode):
    found = InteractionNetwork.measure([episode])
    noisy = InteractionNetwork.measure([episode], noise_std=3.0)
    moving = ~episode.initial.fixed
    assert found["velocity"] == pytest.approx(float(episode["velocities"][:, moving].square().mean().sqrt()))
    change = episode["velocities"].diff(dim=0)[:, moving] - episode.actions[:, moving]
    assert found["change"] == pytest.approx(float(change.square().mean().sqrt()))
    assert noisy["change"] == pytest.approx((found["change"] ** 2 + 9) ** 0.5)
    with pytest.raises(ValueError, match="at least one trajectory"):
        InteractionNetwork.measure([])


def test_only_known_effects_are_taken_out_of_the_change(episode):
    moving = ~episode.initial.fixed
    whole = episode["velocities"].diff(dim=0)[:, moving].square().mean().sqrt()
    assert InteractionNetwork.measure([episode], actions="input")["change"] == pytest.approx(float(whole))
    assert InteractionNetwork.measure([episode])["change"] < 0.9 * float(whole)


def test_impulses_on_fixed_bodies_do_nothing(make_model, episode):
    model, state = make_model().double(), episode.initial
    pushed = torch.where(state.fixed[:, None], 30.0, 0.0).expand(17, 2).double()
    assert torch.equal(model.step(state, pushed).positions, model.step(state, 0 * pushed).positions)


def test_gradients_reach_static_fields_even_after_a_step_without(make_model, episode):
    model = make_model().double()
    masses = episode.initial.masses.clone().requires_grad_()
    state = episode.initial.replace(masses=masses)
    for _ in range(2):
        with torch.no_grad():
            model.step(state)
        model.step(state).positions.sum().backward()
    assert masses.grad.abs().sum() > 0


def test_velocities_of_another_meaning_are_refused(episode):
    window = episode.window(0, 10)
    shifted = {**window.frames, "velocities": window.frames["velocities"] * 1.5}
    wrong = type(window)(initial=window.initial, frames=shifted, active=window.active, dt=window.dt)
    with pytest.raises(ValueError, match="position differences over dt"):
        InteractionNetwork.measure([wrong])


def test_an_untrained_model_is_not_constant_velocity(make_model, episode):
    """Guards the tests above against a network whose output is nothing."""
    a = rollout(episode.initial, episode.actions, simulator=make_model().double())
    b = rollout(episode.initial, episode.actions, simulator=ConstantVelocity(dt=1 / 50))
    assert (a["positions"] - b["positions"]).abs().max() > 1


def test_many_scenes_in_portions_are_the_same_as_together(make_model, episode, monkeypatch):
    model = make_model().double()
    state, actions = episode.as_scenes(30), episode.actions.flatten(0, 1)
    with torch.no_grad():
        together = model(state, actions)
        monkeypatch.setattr("simworld.models.message_passing.EDGES_AT_ONCE", 130)
        portions = model(state, actions)
    assert torch.allclose(together, portions, atol=1e-12)
    assert torch.equal(together.abs() > 0, portions.abs() > 0)


def test_a_wall_is_an_equal_ball_that_comes_from_behind_it(balls):
    """A lone ball before a wall, and two mirrored equal balls: but for the flag, the same function."""
    ball = ObjectState(
        positions=torch.tensor([[0.25, 1.0]]).double(),
        velocities=torch.tensor([[-3.0, 0.7]]).double(),
        radii=torch.tensor([0.3]).double(),
        masses=torch.tensor([1.2]).double(),
        restitutions=torch.tensor([0.8]).double(),
        boundaries=torch.tensor([[[0.0, 0.0], [4.0, 4.0]]]).double(),
    )
    for messages in ("vector", "response"):
        model = balls(messages=messages)
        with torch.no_grad():
            model.edge_encoder[0].weight[:, -2] = 0
            if messages == "response":
                for responder in model.responders:
                    responder[0].weight[:, -1] = 0
        both = {name: torch.cat([ball[name]] * 2) for name in ("radii", "masses", "restitutions")}
        mirror = torch.tensor([-1.0, 1.0]).double()
        pair = ObjectState(
            positions=torch.cat([ball.positions, ball.positions * mirror]),
            velocities=torch.cat([ball.velocities, ball.velocities * mirror]),
            boundaries=torch.tensor([[[-9.0, -9.0], [9.0, 9.0]]]).double(),
            **both,
        )
        change = model(ball)
        assert torch.allclose(change[0], model(pair)[0], atol=1e-12), messages
        assert change.abs().max() > 1e-3


def test_walls_know_nothing_of_which_way_they_face(balls):
    """Turned by a right angle or reflected, a box of balls moves so: in the vector forms."""
    path = balls_episode([8, 0, 0], num_steps=30)
    for messages in ("vector", "response"):
        model = balls(messages=messages)
        for frame in (0, 12, 30):
            state = path.frame(frame)
            turned = state.replace(**{k: state[k].flip(-1) for k in ("positions", "velocities", "boundaries")})
            wanted = model(state).flip(1)
            assert torch.allclose(model(turned), wanted, atol=1e-9)
            sides = state.boundaries[0, 1]
            across = torch.tensor([-1.0, 1.0]).double()
            reflected = state.replace(
                positions=torch.stack([sides[0] - state.positions[:, 0], state.positions[:, 1]], 1),
                velocities=state.velocities * across,
            )
            assert torch.allclose(model(reflected), model(state) * across, atol=1e-9)


@pytest.mark.parametrize("messages", ["vector", "response", "scalar"])
def test_the_contract_with_walls_gravity_rods_and_fields(balls, messages):
    state = balls_episode([8, 0, 1], num_steps=0).initial
    check_simulator(balls(messages=messages), state, tolerance=1e-9)
    path = string_episode([8, 0, 1], num_steps=20)
    model = InteractionNetwork(
        dt=path.dt,
        statistics=InteractionNetwork.measure([path], actions="none"),
        actions="none",
        messages=messages,
        margin=0.3,
        latent_size=16,
        num_message_passing_steps=3,
        edge_fields=("spring_stiffnesses",),
    ).double()
    check_simulator(model, path.frame(20), tolerance=1e-9)
    rods = cradle_episode([8, 0, 2], num_steps=5)
    model = InteractionNetwork(
        dt=rods.dt, statistics=InteractionNetwork.measure([rods], actions="none"), actions="none", messages=messages
    ).double()
    check_simulator(model, rods.frame(5), tolerance=1e-9)


def test_gravity_is_known_and_not_learned(balls):
    """Without edges a body falls as it must, whatever the weights; the target of free fall is nothing."""
    path = cradle_episode([8, 0, 2], num_steps=5)
    state = path.frame(0)
    model = InteractionNetwork(
        dt=path.dt,
        statistics=InteractionNetwork.measure([path], actions="none"),
        actions="none",
        messages="response",
        margin=1.0,
    ).double()
    lone = ObjectState(
        positions=torch.zeros(1, 2).double(), velocities=torch.zeros(1, 2).double(), gravity=state.gravity
    )
    after = model.step(lone)
    assert torch.allclose(after.velocities, state.gravity * path.dt, atol=1e-12)
    assert torch.allclose(model.target(lone, after), torch.zeros(1, 2).double(), atol=1e-12)
    again = model.integrate(state, model.target(state, path.frame(1)))
    assert torch.allclose(again.positions, path["positions"][1], atol=1e-9)
    with_gravity = InteractionNetwork.measure([path], actions="none")["change"]
    free = path["velocities"][:, :5].diff(dim=0) - path.dt * state.gravity
    assert with_gravity == pytest.approx(float(free.square().mean().sqrt()))


def test_without_messages_a_response_calls_for_nothing(balls):
    """What is not called for is at first nothing: a fresh model lets free balls fly."""
    state = balls_episode([8, 0, 3], num_steps=0).initial
    far = state.replace(boundaries=torch.tensor([[[-90.0, -90.0], [90.0, 90.0]]]).double())
    far = far.replace(positions=far.positions * 20)
    assert torch.equal(balls(messages="response")(far), torch.zeros(6, 2).double())


def test_restitutions_reach_the_model(balls):
    state = balls_episode([8, 0, 0], num_steps=0).initial
    model = balls(messages="vector", margin=None)
    other = state.replace(restitutions=state.restitutions * 0.5)
    assert (model(state) - model(other)).abs().max() > 1e-4


def test_what_the_options_need_is_said(balls, episode):
    state = balls_episode([8, 0, 0], num_steps=0).initial
    bare = ObjectState(positions=state.positions, velocities=state.velocities)
    with pytest.raises(ValueError, match="trained on states with restitutions"):
        balls().step(bare)
    with pytest.raises(ValueError, match="trained on states with boundaries"):
        balls(node_fields=()).step(bare)
    with pytest.raises(ValueError, match="node_fields must be names among .*restitutions.*; got \\['colours'\\]"):
        balls(node_fields=("colours",))
    statistics = InteractionNetwork.measure([episode])
    with pytest.raises(ValueError, match="statistics lack charges"):
        InteractionNetwork(dt=0.1, statistics=statistics, node_fields=("charges",))


def test_a_plain_network_has_the_weights_it_always_had(make_model):
    """Checkpoints made before walls, fields and responses must still load."""
    shapes = {k: list(v.shape) for k, v in make_model().state_dict().items()}
    assert shapes["edge_encoder.0.weight"] == [16, 8]
    assert shapes["node_encoder.weight"] == [16, 5]
    assert {k.split(".")[2] for k in shapes if k.startswith("blocks.0")} == {
        "nodes",
        "bias",
        "inputs",
        "impulse",
        "heard",
        "update",
    }


def test_gravity_does_not_pull_at_what_is_fixed(balls):
    """A ball that hangs at rest from an anchor: the rod must see it fall away from the anchor, not both fall."""
    path = cradle_episode([8, 0, 2], num_steps=5)
    state = path.frame(0)
    statistics = InteractionNetwork.measure([path], actions="none")
    torch.manual_seed(0)
    model = InteractionNetwork(dt=path.dt, statistics=statistics, actions="none", messages="response", margin=1.0)
    held = model.double()(state)[1] * statistics["change"]
    assert held[1] > 2  # of the 4 px/s that gravity adds: even a fresh rod holds most of them
    assert torch.equal(model(state)[5:], torch.zeros(5, 2).double())
