from __future__ import annotations

import pytest
import torch

from simworld import ForceNetwork, Trajectory, load_checkpoint, rollout, save_checkpoint
from simworld.data.generate import GENERATORS
from simworld.losses import one_step, rollout_positions
from simworld.models.force_network import EAGERNESS, infer_springs
from simworld.testing import check_simulator
from tests.test_forces import crowd


def springs_path(numbers=(0, 1, 2), frames=12) -> Trajectory:
    made = GENERATORS["springs_nri"].make([[42, 0, k] for k in numbers], num_frames=frames)
    return Trajectory.cat(made)


def make(path: Trajectory, **arguments) -> ForceNetwork:
    torch.manual_seed(0)
    statistics = ForceNetwork.measure([path])
    given = {"num_sub_steps": 4, "latent_size": 8, **arguments}
    return ForceNetwork(dt=path.dt, statistics=statistics, **given).double()


def set_law(model: ForceNetwork, powers: list[float], strength: float) -> None:
    """Give the model a law of powers alone, of distance and of masses; its perceptron says nothing."""
    with torch.no_grad():
        model.law[-1].weight.zero_()
        model.law[-1].bias.zero_()
        model.powers.copy_(torch.tensor(powers) / EAGERNESS)
        model.constants.fill_(strength / model._unit_force / EAGERNESS)


def true_springs(path: Trajectory) -> ForceNetwork:
    model = make(path, graph="springs")
    set_law(model, [1.0, 0.0], model.arguments["statistics"]["stiffness"])
    return model


def crowd_path() -> Trajectory:
    from simworld.physics.forces import ForceEngine, gravity

    return rollout(crowd(), simulator=ForceEngine(dt=0.1, law=gravity(constant=0.1)), num_steps=4)


KINDS = [
    {"masses": "equal"},
    {"masses": "given"},
    {"masses": "given", "charges": True, "rule": "symplectic_euler"},
    {"masses": "given", "actions": "force"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_contract(kind):
    model = make(crowd_path(), num_dimensions=3, **kind)
    actions = torch.randn(6, 5, 3, dtype=torch.float64) if "actions" in kind else None
    check_simulator(model, crowd(5, 1), actions, tolerance=1e-6)


def test_it_keeps_the_contract_along_springs():
    path = springs_path((0,))
    check_simulator(make(path, graph="springs"), path.initial, tolerance=1e-6)


def test_integrate_undoes_target():
    path = crowd_path()
    model = make(path, num_dimensions=3)
    state, after = path.frame(0), path.frame(1)
    made = model.integrate(state, model.target(state, after))
    assert torch.allclose(made.positions, after.positions, atol=1e-14)
    assert torch.allclose(made.velocities, after.velocities, atol=1e-14)


def test_turning_and_mirroring_commute_with_a_step():
    model = make(crowd_path(), num_dimensions=3, masses="given", charges=True)
    state = crowd()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    shift = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    turned = state.replace(positions=state.positions @ turn + shift, velocities=state.velocities @ turn)
    after, wanted = model.step(turned), model.step(state)
    assert torch.allclose(after.positions, wanted.positions @ turn + shift, atol=1e-11)
    assert torch.allclose(after.velocities, wanted.velocities @ turn, atol=1e-11)
    assert not torch.allclose(wanted.velocities, state.velocities, atol=1e-4)


def test_momentum_is_kept_whatever_the_weights():
    model = make(crowd_path(), num_dimensions=3, masses="given", charges=True)
    torch.nn.init.normal_(model.law[-1].weight)
    state = crowd()
    after = model.step(state)

    def momentum(s):
        return (s.masses[:, None] * s.velocities).view(2, 6, 3).sum(1)

    assert torch.allclose(momentum(after), momentum(state), atol=1e-12)


def test_with_newtons_law_for_weights_it_is_the_engine():
    """The form holds the truth: a = -2, b = 1 and a perceptron that says nothing."""
    from simworld.physics.forces import ForceEngine, gravity

    path = crowd_path()
    model = make(path, num_dimensions=3, masses="given")
    said = model.arguments["statistics"]
    set_law(model, [-2.0, 1.0], 0.1 * said["mass"] ** 2 / said["distance"] ** 3)
    engine = ForceEngine(dt=0.1, law=gravity(constant=0.1), num_sub_steps=4, rule="velocity_verlet")
    wanted, made = engine.step(crowd()), model.step(crowd())
    assert torch.allclose(made.velocities, wanted.velocities, atol=1e-10)
    assert torch.allclose(made.positions, wanted.positions, atol=1e-10)


def test_springs_are_found_from_what_they_do():
    """With the true law, the stiffnesses that explain the frames are those that made them."""
    path = springs_path((3, 4, 5), 20)
    model = true_springs(path)
    found = infer_springs(model, path)
    truth = {tuple(sorted(pair)) for pair in path.initial.springs.tolist()}
    for pair, stiffness in zip(found.springs.tolist(), found.spring_stiffnesses.tolist(), strict=True):
        assert stiffness == pytest.approx(0.1 if tuple(sorted(pair)) in truth else 0.0, abs=2e-3)
    assert len(found.springs) == 30


def test_springs_of_fixed_and_removed_bodies_are_found_too():
    path = springs_path((0, 1), 20)
    model = true_springs(path)
    given = {name: path.initial[name] for name in path.initial}
    start = type(path.initial)(**given, batch=path.initial.batch, fixed=torch.arange(10) == 0)
    start = start.replace(active=torch.arange(10) != 9)
    seen = rollout(start, simulator=model, num_steps=20)
    found = infer_springs(model, seen)
    assert torch.equal(found.active, start.active)
    truth = {tuple(sorted(pair)) for pair in start.springs.tolist() if 9 not in pair}
    for pair, stiffness in zip(found.springs.tolist(), found.spring_stiffnesses.tolist(), strict=True):
        assert stiffness == pytest.approx(0.1 if tuple(sorted(pair)) in truth else 0.0, abs=5e-3)


def test_springs_are_found_by_models_of_springs_alone():
    path = springs_path((0,), 5)
    with pytest.raises(ValueError, match="needs a model of springs"):
        infer_springs(make(path), path)
    model = make(path, graph="springs")
    with pytest.raises(ValueError, match="two frames or more"):
        infer_springs(model, path.window(0, 1))
    with pytest.raises(ValueError, match="computes in torch.float64"):
        infer_springs(model, path.to(torch.float32))


def test_two_models_know_their_own_bodies():
    path = crowd_path()
    state = path.initial.scene(0)
    typed = type(state)(positions=state.positions, velocities=state.velocities, object_types=torch.arange(6))
    statistics = {**ForceNetwork.measure([path]), "velocity_change": [1.0] * 6, "position_change": [1.0] * 6}
    large, small = (
        ForceNetwork(dt=0.1, statistics=statistics, num_dimensions=3, masses="learned", num_bodies=n).double()
        for n in (6, 3)
    )
    large.step(typed)
    with pytest.raises(ValueError, match="object_types 0 to 2"):
        small.step(typed)
    large.step(typed)


def test_a_body_outside_its_walls_is_refused():
    path = springs_path((0,), 3)
    state = path.initial.replace(positions=path.initial.positions + 20)
    with pytest.raises(ValueError, match="inside the walls"):
        make(path, graph="springs").step(state)


def test_scenes_of_one_body_are_not_taken_for_bodies_of_their_own():
    one = [path.initial.scene(0) for path in [crowd_path()]]
    paths = []
    for k in range(3):
        state = type(one[0])(positions=one[0].positions[k : k + 1], velocities=one[0].velocities[k : k + 1])
        frames = {"positions": torch.stack([state.positions] * 3), "velocities": torch.stack([state.velocities] * 3)}
        paths.append(Trajectory(initial=state, frames=frames, active=torch.ones(3, 1, dtype=torch.bool), dt=0.1))
    assert isinstance(ForceNetwork.measure([Trajectory.cat(paths)])["velocity_change"], float)


def test_losses_that_make_no_sense():
    for wrong in ({"tolerance": 0.0}, {"tolerance": -1.0}, {"noise_std": -1.0}, {"robust": "foo", "tolerance": 1.0}):
        with pytest.raises(ValueError, match="tolerance positive|robust must be one of"):
            one_step(**wrong)


def test_masses_are_found_up_to_the_first():
    path = crowd_path()
    state = path.initial.scene(0)
    initial = type(state)(positions=state.positions, velocities=state.velocities, object_types=torch.arange(6))
    frames = {name: path.frames[name][:, :6] for name in ("positions", "velocities")}
    known = Trajectory(initial=initial, frames=frames, active=path.active[:, :6], dt=path.dt)
    model = make(known, num_dimensions=3, masses="learned", num_bodies=6)
    assert len(model.arguments["statistics"]["velocity_change"]) == 6
    with torch.no_grad():
        model.log_masses.copy_(state.masses.log() / EAGERNESS)
    assert torch.allclose(model.masses_found, state.masses / state.masses[0])
    set_law(model, [-1.7, 0.0], 0.8)
    given = model.with_masses_given()
    change = known.window(0, 1).initial.replace(masses=model.masses_found)
    assert torch.allclose(given.step(change).velocities, model.step(known.initial).velocities, rtol=1e-5, atol=1e-7)
    others = known.initial.replace(masses=2 * model.masses_found)
    pulls = [given.step(s).velocities - s.velocities for s in (change, others)]
    assert not torch.allclose(*pulls, rtol=0.3)
    with pytest.raises(ValueError, match="this model's are 'given'"):
        given.with_masses_given()
    loss = one_step().measure(model, known.window(0, 2), torch.Generator())
    (slope,) = torch.autograd.grad(loss, model.log_masses)
    assert (slope != 0).all()
    with pytest.raises(ValueError, match="knows the masses of object_types 0 to 5"):
        model.step(initial.replace(object_types=torch.arange(6) + 1))


def test_checkpoints_keep_precision_and_lists(tmp_path):
    path = crowd_path()
    model = make(path, num_dimensions=3)
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert again.powers.dtype == torch.float64
    assert torch.equal(again.step(crowd()).positions, model.step(crowd()).positions)


def test_positions_alone_are_enough_to_learn_from():
    path = crowd_path()
    model = make(path, num_dimensions=3, masses="given")
    loss = rollout_positions(2)
    other = Trajectory(
        initial=path.initial,
        frames={**path.frames, "velocities": torch.cat([path["velocities"][:1], 0 * path["velocities"][1:]])},
        active=path.active,
        dt=path.dt,
    )
    values = [loss.measure(model, p.window(0, 3), torch.Generator()) for p in (path, other)]
    assert torch.equal(values[0], values[1])
    assert torch.isfinite(torch.autograd.grad(values[0], model.constants)[0]).all()


def test_errors_beyond_the_tolerance_count_by_their_logarithm():
    path = crowd_path()
    model = make(path, num_dimensions=3, num_sub_steps=1, rule="symplectic_euler")  # linear in the force
    losses = []
    for size in (1e2, 1e3):
        with torch.no_grad():
            model.constants.fill_(size)
        losses.append(
            [one_step(tolerance=t).measure(model, path.window(0, 2), torch.Generator()) for t in (None, 1e-2)]
        )
    assert losses[1][0].item() / losses[0][0].item() == pytest.approx(100, rel=0.1)
    assert losses[1][1].item() - losses[0][1].item() == pytest.approx(2 * 2.3026, rel=0.05)


WRONG = [
    ({"masses": "heavy"}, "masses must be one of"),
    ({"rule": "rk4"}, "rule must be one of"),
    ({"num_sub_steps": 0}, "num_sub_steps must be a whole number"),
    ({"statistics": {}}, "statistics lack distance, mass"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        ForceNetwork(**{"dt": 0.1, "statistics": ForceNetwork.measure([crowd_path()]), **changes})


def test_what_a_state_lacks():
    path = crowd_path()
    bare = type(path.initial)(positions=path.initial.positions, velocities=path.initial.velocities)
    for kind, message in (
        ({"masses": "given"}, "needs masses"),
        ({"charges": True}, "needs charges"),
        ({"graph": "springs"}, "acts along springs"),
        ({"num_dimensions": 2}, r"positions \[n, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(path, **{"num_dimensions": 3, **kind}).step(bare)
    with pytest.raises(ValueError, match="computes in torch.float64"):
        make(path, num_dimensions=3).step(bare.to(torch.float32))
    with pytest.raises(ValueError, match="without actions"):
        make(path, num_dimensions=3).step(bare, torch.zeros(12, 3, dtype=torch.float64))
