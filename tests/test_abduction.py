import dataclasses

import pytest
import torch

from simworld import ConstantVelocity, ObjectState, ParticleState, Trajectory, rollout
from simworld.abduction import abduct
from simworld.physics import PlanarEngine
from simworld.physics.force_worlds import charged_nri
from simworld.physics.forces import ForceEngine, charges, gravity, springs
from simworld.physics.planar import run

MASSES = torch.tensor([1.0, 0.02, 0.1], dtype=torch.float64)


def triple(num_steps: int = 40) -> tuple[Trajectory, ForceEngine]:
    """Return three bodies under gravity, recorded by the engine that is returned with them."""
    start = ObjectState(
        positions=torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2.5, 0.1]], dtype=torch.float64),
        velocities=torch.tensor([[0.0, -0.05, 0], [0, 1, 0], [-0.65, 0, 0]], dtype=torch.float64),
        masses=MASSES,
    )
    engine = ForceEngine(dt=0.1, law=gravity(constant=1.0), num_sub_steps=4, rule="velocity_verlet")
    return rollout(start, simulator=engine, num_steps=num_steps), engine


def believing(path: Trajectory, **values: torch.Tensor) -> Trajectory:
    return dataclasses.replace(path, initial=path.initial.replace(**values))


def noisy(path: Trajectory, std: float) -> Trajectory:
    drawn = torch.Generator().manual_seed(3)
    frames = {
        name: value + std * torch.randn(value.shape, dtype=value.dtype, generator=drawn)
        for name, value in path.frames.items()
    }
    return dataclasses.replace(
        path, initial=path.initial.replace(**{k: v[0] for k, v in frames.items()}), frames=frames
    )


def test_masses_that_attract_are_found():
    path, engine = triple()
    found = abduct(believing(path, masses=torch.full_like(MASSES, 0.3)), "masses", simulator=engine, num_starts=2)
    assert torch.allclose(found.values["masses"], MASSES, rtol=1e-8)
    assert bool((found.stds["masses"] < 1e-8).all())
    assert torch.equal(found.state.masses, found.values["masses"])
    assert torch.equal(found.state.positions, path.initial.positions)
    assert torch.allclose(found.starts["masses"], MASSES.expand(2, 3), rtol=1e-6)
    assert found.error < 1e-10
    assert found.error_at_start > 0.01


def test_deviations_are_those_of_the_noise():
    path, engine = triple(400)
    given = believing(noisy(path, 1e-4), masses=torch.full_like(MASSES, 0.3))
    found = abduct(given, "masses", simulator=engine, num_starts=1)
    off = (found.values["masses"] - MASSES).abs() / found.stds["masses"]
    assert bool((found.stds["masses"] > 1e-6).all())
    assert float(off.max()) < 4
    less = abduct(given.window(0, 101), "masses", simulator=engine, num_starts=1)
    ratio = less.stds["masses"] / found.stds["masses"]
    assert bool(((ratio > 1.2) & (ratio < 4)).all())  # a quarter of the windows: about twice the deviation


def test_what_the_data_says_nothing_of_keeps_the_prior():
    path, engine = triple()
    far = torch.tensor([[1e9, 0, 0]], dtype=torch.float64)
    start = type(path.initial)(
        positions=torch.cat([path.initial.positions, far]),
        velocities=torch.cat([path.initial.velocities, 0 * far]),
        masses=torch.cat([MASSES, MASSES.new_tensor([0.5])]),
    )
    lone = rollout(start, simulator=engine, num_steps=40)
    found = abduct(lone, "masses", simulator=engine, num_starts=1, prior_std=2.0)
    assert float(found.values["masses"][3]) == pytest.approx(0.5, rel=1e-3)
    assert float(found.stds["masses"][3]) == pytest.approx(2 * 0.5, rel=1e-2)


def test_given_rows_stay_and_are_known():
    path, engine = triple()
    start = {"masses": torch.tensor([1.0, 0.3, 0.3], dtype=torch.float64)}
    bare = {name: path.initial[name] for name in ("positions", "velocities")}
    unknown = dataclasses.replace(path, initial=ObjectState(**bare))
    found = abduct(unknown, "masses", simulator=engine, entities=[1, 2], start=start, num_starts=1)
    assert torch.allclose(found.values["masses"], MASSES, rtol=1e-8)
    assert found.values["masses"][0] == 1
    assert found.stds["masses"][0] == 0


def test_samples_have_the_deviations_and_stay_positive():
    path, engine = triple(100)
    found = abduct(noisy(path, 1e-2), "masses", simulator=engine, num_starts=1)
    scenes = found.sample(4000, seed=1)
    assert scenes.num_scenes == 4000
    drawn = scenes.masses.view(4000, 3)
    assert bool((drawn > 0).all())
    spread = (drawn.log() - found.values["masses"].log()).square().mean(0).sqrt()
    assert torch.allclose(spread, found.stds["masses"] / found.values["masses"], rtol=0.05)
    assert found.sample(3).identical(found.sample(3))
    assert not torch.equal(found.sample(3, seed=1).masses, found.sample(3, seed=2).masses)


def test_springs_that_are_not_there_come_out_as_zero():
    ends = torch.tensor([[0, 1], [0, 2], [1, 2]])
    truth = torch.tensor([0.5, 0.0, 0.2], dtype=torch.float64)
    start = ObjectState(
        positions=torch.tensor([[0.0, 0], [1, 0], [0.3, 1]], dtype=torch.float64),
        velocities=torch.tensor([[0.0, 0.1], [0.2, 0], [-0.1, 0]], dtype=torch.float64),
        springs=ends,
        spring_stiffnesses=truth,
    )
    engine = ForceEngine(dt=0.2, law=springs, graph="springs", num_sub_steps=2)
    path = believing(rollout(start, simulator=engine, num_steps=20), spring_stiffnesses=torch.full_like(truth, 0.2))
    found = abduct(path, "spring_stiffnesses", simulator=engine, window=5, num_starts=1)
    assert torch.allclose(found.values["spring_stiffnesses"], truth, atol=1e-9)


def test_charges_are_known_up_to_the_sign_of_all():
    (path,) = charged_nri([[42, 2, 0]], num_frames=10)
    engine = ForceEngine(dt=0.1, law=charges(), num_sub_steps=5, max_force=100.0)
    truth = path.initial.charges
    path = rollout(path.initial, simulator=engine, num_steps=9)
    found = abduct(
        believing(path, charges=torch.ones_like(truth)),
        "charges",
        simulator=engine,
        window=3,
        num_starts=2,
        max_iterations=8,
    )
    assert torch.allclose(found.values["charges"] * found.values["charges"][0] * truth[0], truth, atol=1e-6)


def test_gravity_of_a_scene_is_found_through_an_engine_without_gradients():
    pytest.importorskip("pymunk")
    start = ObjectState(
        positions=torch.tensor([[0.5, 1.5], [1.5, 1.0]], dtype=torch.float64),
        velocities=torch.tensor([[1.0, 0.0], [-1.0, 0.6]], dtype=torch.float64),
        masses=torch.tensor([1.0, 3.0], dtype=torch.float64),
        radii=torch.tensor([0.2, 0.2], dtype=torch.float64),
        restitutions=torch.ones(2, dtype=torch.float64),
        gravity=torch.tensor([[0.5, -2.0]], dtype=torch.float64),
    )
    engine = PlanarEngine(dt=0.02, collision_slop=1e-3)
    path = believing(run(start, engine, num_steps=24), gravity=torch.tensor([[0.0, -1.0]], dtype=torch.float64))
    found = abduct(path, "gravity", simulator=engine, window=12, num_starts=1, max_iterations=2)
    assert torch.allclose(found.values["gravity"], start.gravity, atol=1e-3)
    heavy = believing(path, gravity=start.gravity, masses=torch.tensor([1.0, 1.0], dtype=torch.float64))
    ratio = abduct(
        heavy, "masses", entities=[1], simulator=engine, window=24, num_windows=1, num_starts=1, max_iterations=4
    )
    assert float(ratio.values["masses"][1]) == pytest.approx(3.0, rel=1e-3)


class Drag:
    """A simulator in which the materials of particles slow them down, and kinematic ones are left alone."""

    dt = 0.1

    def step(self, state, action=None):
        pulled = state.velocities * (1 - self.dt * state.materials) + (0 if action is None else self.dt * action)
        velocities = torch.where(state.kinematic[:, None], state.velocities, pulled)
        return state.advanced(positions=state.positions + self.dt * velocities, velocities=velocities)


def test_actions_and_scripts_of_the_recording_act_in_every_window():
    drawn = torch.Generator().manual_seed(0)
    start = ParticleState(
        positions=torch.rand(4, 2, generator=drawn),
        velocities=torch.ones(4, 2),
        history=torch.ones(4, 2, 2),
        materials=torch.full((4, 1), 0.7),
        kinematic=torch.tensor([False, False, False, True]),
    )
    actions = torch.randn(12, 4, 2, generator=drawn)

    def shaken(state, step):
        shaking = torch.where(
            state.kinematic[:, None], torch.full_like(state.velocities, float(step % 3)), state.velocities
        )
        return state.replace(velocities=shaking)

    path = rollout(start, actions, simulator=Drag(), interventions=[shaken])
    path = believing(path, materials=torch.full((4, 1), 0.1))
    found = abduct(path, "materials", entities=[0, 1, 2], simulator=Drag(), window=4, num_starts=2)
    assert torch.allclose(found.values["materials"][:3], torch.tensor(0.7), atol=1e-4)
    assert found.error < 1e-4
    assert found.values["materials"].dtype == torch.float32


def test_the_same_seed_gives_the_same_answer_in_pieces(monkeypatch):
    path, engine = triple()
    given = believing(noisy(path, 1e-3), masses=torch.full_like(MASSES, 0.3))
    whole = abduct(given, "masses", simulator=engine, num_starts=2, seed=5, max_iterations=3)
    again = abduct(given, "masses", simulator=engine, num_starts=2, seed=5, max_iterations=3)
    assert torch.equal(whole.starts["masses"], again.starts["masses"])
    monkeypatch.setattr("simworld.abduction.ENTITIES_AT_ONCE", 50)
    pieces = abduct(given, "masses", simulator=engine, num_starts=2, seed=5, max_iterations=3)
    assert torch.allclose(whole.values["masses"], pieces.values["masses"], rtol=1e-6)
    assert torch.allclose(whole.stds["masses"], pieces.stds["masses"], rtol=1e-4)


def test_windows_that_overlap_say_no_more_than_those_side_by_side():
    path, engine = triple(200)
    given = noisy(path, 1e-3)
    beside = abduct(given, "masses", simulator=engine, num_starts=1)
    over = abduct(given, "masses", simulator=engine, num_starts=1, num_windows=100)
    assert torch.allclose(over.stds["masses"], beside.stds["masses"], rtol=0.5)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ((), {}, "each named once"),
        (("masses", "masses"), {}, "each named once"),
        (("velocities",), {}, "infers static fields of numbers.* got 'velocities'"),
        (("weight",), {}, "got 'weight'"),
        (("fixed",), {}, "got 'fixed'"),
        (("charges",), {}, "carry no charges; say where to start"),
        (("masses",), {"start": {"charges": MASSES}}, "got 'charges'"),
        (("masses",), {"start": {"masses": -MASSES}}, "masses must be positive"),
        (("masses",), {"window": 41}, "window must be from 1 to the 40 steps"),
        (("masses",), {"window": 0}, "window must be from 1"),
        (("masses",), {"num_starts": 0}, "1 or more num_windows and num_starts"),
        (("masses",), {"num_windows": 0}, "1 or more num_windows"),
        (("masses",), {"prior_std": 0.0}, "a positive prior_std"),
        (("masses",), {"entities": [3]}, r"rows 0 to 2 of 'masses'"),
        (("masses",), {"entities": []}, "one or more"),
        (("masses",), {"entities": torch.tensor([True, False])}, "a mask of 2 entities; 'masses' has 3"),
        (("masses",), {"entities": torch.tensor([0.5])}, "entity numbers or a mask"),
        (("masses",), {"simulator": None}, "tied to no simulator"),
        (("masses",), {"simulator": ConstantVelocity(dt=0.2)}, "steps of 0.2"),
    ],
)
def test_what_cannot_be_inferred(names, changes, message):
    path, engine = triple()
    with pytest.raises(ValueError, match=message):
        abduct(path, *names, **{"simulator": engine, **changes})


def test_recordings_that_cannot_be_explained():
    path, engine = triple()
    with pytest.raises(ValueError, match=r"one scene; got 2.*observed\.scenes"):
        abduct(Trajectory.cat([path, path]), "masses", simulator=engine)
    with pytest.raises(ValueError, match="lack velocities"):
        abduct(dataclasses.replace(path, frames={"positions": path["positions"]}), "masses", simulator=engine)
    broken = dataclasses.replace(path, frames={**path.frames, "positions": path["positions"].clone()})
    broken.frames["positions"][3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="positions must be finite; frame 3"):
        abduct(broken, "masses", simulator=engine)
    with pytest.raises(ValueError, match="1 scene or more"):
        abduct(path, "masses", simulator=engine, num_starts=1).sample(0)
