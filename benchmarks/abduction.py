"""Hidden parameters inferred from observed motion, through known laws and through learned models.

    python benchmarks/abduction.py --json benchmarks/results/abduction.json

solar_system: the masses of ten bodies, the Sun's given, from 30 years of DE421 (1980 to 2009) by Newton's law; the
search starts from 1e-6 solar masses for each. Then a world in which Jupiter is twice as heavy from 2010-01-01 on, for
ten years, with masses inferred, with those that were learned with the law by the shipped model, and with DE421's: how
far the answers are from the last one, beside how far that is from what happens without (the row "nothing changed").
springs_nri, charged_nri: stiffnesses of the springs of all pairs (started from half of the true ones' value) and
charges (from 1 each), 49 frames of the published test simulations (seed 42); balls_in: masses (from 1; the first ball's
given), episodes of seed 0. Rows "start" are what the search starts from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

import simworld
from simworld.abduction import abduct
from simworld.bench.rows import episodes_of, result
from simworld.bench.solar import GM
from simworld.data.ephemeris import BODIES, FIRST_DAY, read_ephemeris, solar_trajectory
from simworld.metrics import Row
from simworld.physics.force_worlds import CHARGE_ENGINE, SPRING_ENGINE
from simworld.physics.forces import ForceEngine, gravity, pairs

DAYS_OBSERVED, DAYS_AHEAD, RULE, SUB_STEPS = 10958, 3652, "fourth_order", 6
JUPITER = BODIES.index("jupiter")


def timed(job, *given, **said):
    start = time.perf_counter()
    found = job(*given, **said)
    print(f"  {time.perf_counter() - start:.0f} s, error {found.error:.3g} (at the start {found.error_at_start:.3g})")
    return found


def believing(path, **values):
    return dataclasses.replace(path, initial=path.initial.replace(**values))


def row(model, dataset, metric, value, unit, count=1, horizon="whole"):
    print(f"{dataset:24s} {model:28s} {metric:24s} {value:.4g} {unit}", flush=True)
    return Row(
        model=model,
        dataset=dataset,
        metric=metric,
        horizon=horizon,
        value=float(value),
        unit=unit,
        trajectories=count,
    )


def solar(windows):
    true = torch.tensor(GM, dtype=torch.float64) / GM[0]
    days = FIRST_DAY + np.arange(DAYS_OBSERVED + 1, dtype=np.float64)
    path = solar_trajectory(*read_ephemeris(days))
    newton = ForceEngine(dt=1.0, law=gravity(constant=GM[0]), num_sub_steps=SUB_STEPS, rule=RULE)
    model = simworld.load_checkpoint("solar_system_0").double().requires_grad_(False)
    learned = model.with_masses_given().at_rate(SUB_STEPS, RULE).requires_grad_(False)
    start = torch.full_like(true, 1e-6)
    start[0] = 1
    name, rows = "abduct, Newton's law", []
    found = timed(
        abduct,
        path.window(0, DAYS_OBSERVED),
        "masses",
        simulator=newton,
        entities=list(range(1, len(BODIES))),
        window=30,
        num_windows=windows,
        num_starts=1,
        start={"masses": start},
        prior_std=10.0,
    )
    masses, stds = found.values["masses"], found.stds["masses"]
    for body, mass, std, truth in list(zip(BODIES, masses, stds, true, strict=True))[1:]:
        dataset = f"DE421, {body}"
        rows.append(row(name, dataset, "mass_error", 100 * abs(float(mass / truth) - 1), "%"))
        rows.append(row(name, dataset, "mass_std", 100 * float(std / truth), "%"))
        rows.append(row(name, dataset, "mass_error_over_std", float((mass - truth).abs() / std), "1"))
    worlds = {name: (newton, masses)}
    worlds["learned in training, simworld"] = (learned, model.masses_found)
    return rows + heavier(path.frame(DAYS_OBSERVED), newton, true, worlds)


def heavier(state, newton, true, worlds):
    """Return the rows of the world in which Jupiter is twice as heavy."""
    factor = torch.ones_like(true)
    factor[JUPITER] = 2

    @torch.no_grad()
    def end(simulator, masses):
        both = state.repeat(2).replace(masses=torch.cat([masses, masses * factor]))
        path = simworld.rollout(both, simulator=simulator, num_steps=DAYS_AHEAD, every=DAYS_AHEAD)
        return path["positions"][-1].view(2, len(true), -1)

    factual, wanted = end(newton, true)
    answers = {"nothing changed": factual, **{name: end(*world)[1] for name, world in worlds.items()}}
    return [
        row(name, f"Jupiter doubled, {body}", "distance", float(distance), "au", horizon=DAYS_AHEAD)
        for name, places in answers.items()
        for body, distance in zip(BODIES, (places - wanted).norm(dim=1), strict=True)
    ]


def springs(count):
    rows, model = [], simworld.load_checkpoint("springs_nri_0").double().requires_grad_(False)
    hits = {name: [] for name in ("start", "abduct, engine", "abduct, simworld")}
    misses = {name: [] for name in hits}
    for path in episodes_of("springs_nri", 42, count, num_frames=49):
        among = pairs(path.initial)
        ends = torch.stack([among.first, among.second], 1)
        joined = {tuple(sorted(spring)) for spring in path.initial.springs.tolist()}
        truth = torch.tensor([0.1 * (tuple(sorted(pair)) in joined) for pair in ends.tolist()], dtype=torch.float64)
        given = believing(path, springs=ends, spring_stiffnesses=torch.full_like(truth, 0.05))
        found = {"start": given.initial.spring_stiffnesses}
        for name, simulator in (("abduct, engine", SPRING_ENGINE), ("abduct, simworld", model)):
            made = timed(abduct, given, "spring_stiffnesses", simulator=simulator, window=8, num_starts=1)
            found[name] = made.values["spring_stiffnesses"]
        for name, value in found.items():
            hits[name].append(((value > 0.05) == (truth > 0.05)).double().mean())
            misses[name].append((value - truth).square().mean())
    for name, of_episodes in hits.items():
        rows.append(row(name, "springs_nri", "edge_accuracy", 100 * torch.stack(of_episodes).mean(), "%", count, 48))
        rows.append(row(name, "springs_nri", "stiffness_rmse", torch.stack(misses[name]).mean().sqrt(), "1", count, 48))
    return rows


def charged(count):
    rows, model = [], simworld.load_checkpoint("charged_nri_0").double().requires_grad_(False)
    shared = {"count": count, "horizon": 48}
    for name, simulator in (("abduct, simworld", model), ("abduct, engine", CHARGE_ENGINE)):
        right, misses, within = [], [], []
        for path in episodes_of("charged_nri", 42, count, num_frames=49):
            truth = path.initial.charges
            given = believing(path, charges=torch.ones_like(truth))
            found = timed(abduct, given, "charges", simulator=simulator, window=4, num_starts=2, max_iterations=15)
            values = found.values["charges"]
            values = values * torch.sign((values * truth).sum())
            right.append(bool((values.sign() == truth).all()))
            misses.append((values - truth).square().mean())
            # Products of charges do not depend on the sign of all.
            drawn = found.sample(1000).charges.view(-1, len(truth))
            products, wanted = drawn[:, :, None] * drawn[:, None], truth[:, None] * truth
            off = (products.mean(0) - wanted).abs() / products.std(0)
            upper = torch.triu_indices(len(truth), len(truth), 1)
            within.append((off[upper[0], upper[1]] < 2).double().mean())
            print(" ", values.tolist(), truth.tolist(), float(within[-1]), flush=True)
        rows.append(row(name, "charged_nri", "all_signs_right", 100 * sum(right) / count, "%", **shared))
        rows.append(row(name, "charged_nri", "charge_rmse", torch.stack(misses).mean().sqrt(), "1", **shared))
        rows.append(row(name, "charged_nri", "products_within_2_stds", 100 * torch.stack(within).mean(), "%", **shared))
    return rows


def balls(count):
    model = simworld.load_checkpoint("balls_in_0").double().requires_grad_(False)
    misses, starts, within = [], [], []
    for path in episodes_of("balls_in", 0, count):
        truth = path.initial.masses
        start = torch.ones_like(truth)
        start[0] = truth[0]
        others = list(range(1, len(truth)))
        given = believing(path, masses=start)
        found = timed(abduct, given, "masses", simulator=model, entities=others, num_starts=1, prior_std=0.3)
        values, stds = found.values["masses"][1:], found.stds["masses"][1:]
        misses.append((values - truth[1:]).square().mean())
        starts.append((start - truth)[1:].square().mean())
        within.append(((values - truth[1:]).abs() < 2 * stds).double().mean())
    return [
        row(name, "balls_in", metric, value, unit, count, 199)
        for name, metric, value, unit in (
            ("start", "mass_rmse", torch.stack(starts).mean().sqrt(), "kg"),
            ("abduct, simworld", "mass_rmse", torch.stack(misses).mean().sqrt(), "kg"),
            ("abduct, simworld", "masses_within_2_stds", 100 * torch.stack(within).mean(), "%"),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=["springs_nri", "charged_nri", "balls_in", "solar_system"])
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    jobs = {
        "springs_nri": lambda: springs(given.episodes),
        "charged_nri": lambda: charged(given.episodes),
        "balls_in": lambda: balls(given.episodes),
        "solar_system": lambda: solar(given.windows),
    }
    rows = [row for world in given.worlds for row in jobs[world]()]
    if given.json:
        given.json.write_text(json.dumps(result(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
