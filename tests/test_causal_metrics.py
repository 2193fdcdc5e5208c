from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from simworld.causal_metrics import (
    Case,
    affected_auroc,
    affected_average_precision,
    average_effect_error,
    bootstrap,
    cf_gain,
    cf_gain_per_frame,
    coverage,
    crps_ensemble,
    direction_cosine,
    distance,
    distance_per_frame,
    dose_response,
    effect_error,
    flips,
    leakage,
    light_cone,
    lyapunov_time,
    sign_agreement,
    spearman,
)

FRAMES, ENTITIES, REMOVED = 7, 5, 4


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(strength: float = 1.0, seed: int = 0, **changes: Tensor | float) -> Case:
    """A case whose predicted effect is so many times the true one, and whose own factual rollout is off.

    Entity 4 is removed: what is in its rows must not count.
    """
    factual, effect = random(seed, FRAMES, ENTITIES, 2), random(seed + 100, FRAMES, ENTITIES, 2)
    effect[0] = 0
    off = 0.1 * random(seed + 200, FRAMES, ENTITIES, 2)
    compared = torch.arange(ENTITIES) != REMOVED
    made = {
        "factual": factual,
        "counterfactual": factual + effect,
        "predicted_factual": factual + off,
        "predicted": factual + off + strength * effect,
        "compared": compared,
        "touched": ~compared,
        "dose": 1.0,
    } | changes
    for name in ("factual", "counterfactual", "predicted_factual", "predicted"):
        made[name] = made[name].clone()
        made[name][:, REMOVED] = torch.nan
    return Case(**made)


def answered(truth: Case, predicted: Tensor) -> Case:
    return dataclasses.replace(truth, predicted=predicted)


def effects(*sizes: float) -> Tensor:
    """Return [3, n, 2]: an effect along the first axis, from frame 1 on, of each entity's size."""
    made = torch.zeros(3, len(sizes), 2, dtype=torch.float64)
    made[1:, :, 0] = torch.tensor(sizes, dtype=torch.float64)
    return made


def simple(true: Tensor, predicted: Tensor, dose: float = 1.0) -> Case:
    still, everyone = torch.zeros_like(true), torch.ones(true.shape[1], dtype=torch.bool)
    return Case(
        factual=still,
        counterfactual=true,
        predicted_factual=still,
        predicted=predicted,
        compared=everyone,
        touched=~everyone,
        dose=dose,
    )


def test_distance_is_a_root_mean_square_over_what_is_compared_and_leaves_out_frame_0():
    a, b = torch.zeros(3, 3, 2), torch.zeros(3, 3, 2)
    b[0], b[1, 0], b[2, 1, 0], b[:, 2] = 100.0, torch.tensor([3.0, 4.0]), 5.0, torch.nan
    compared = torch.tensor([True, True, False])
    assert distance(a, b, compared) == pytest.approx(math.sqrt((25 + 25) / 8))
    assert distance_per_frame(a, b, compared).tolist() == pytest.approx([100.0, 2.5, 2.5])
    assert distance(a, b, torch.tensor([False, False, True])) == math.inf


def test_distance_is_computed_in_double_precision():
    a = torch.full((2, 1, 1), 1.0)
    b = torch.full((2, 1, 1), 1.0 + 2**-23)
    assert distance(a, b, torch.tensor([True])) == 2**-23


def test_gain_of_the_truth_is_1_and_of_a_copy_of_what_was_0():
    question = case()
    perfect, copied = (answered(question, p) for p in (question.counterfactual, question.factual))
    assert cf_gain(perfect) == 1
    assert cf_gain(copied) == 0
    assert cf_gain(answered(question, 2 * question.factual - question.counterfactual)) == pytest.approx(-1)
    assert cf_gain_per_frame(perfect)[1:].tolist() == [1.0] * (FRAMES - 1)
    assert cf_gain_per_frame(copied)[1:].tolist() == [0.0] * (FRAMES - 1)
    assert math.isnan(cf_gain_per_frame(perfect)[0])


def test_gain_is_nan_without_an_effect_and_never_of_a_rollout_that_broke_down():
    question = case()
    assert math.isnan(cf_gain(case(counterfactual=question.factual)))
    assert math.isnan(cf_gain(question, eps=100.0))
    broken = question.predicted.clone()
    broken[3, 1, 0] = torch.nan
    assert cf_gain(answered(question, broken)) == -math.inf
    late = torch.zeros(3, 1, 1)
    late[2] = 1.0
    assert cf_gain_per_frame(simple(late, late)).isnan().tolist() == [True, True, False]


def test_effect_errors_leave_out_what_both_rollouts_share():
    assert effect_error([case(), case(seed=1)]).error == pytest.approx(0, abs=1e-12)
    two = [case(strength=3.0, seed=s) for s in (0, 1)]
    assert effect_error(two).relative == pytest.approx(2)
    sizes = [distance(c.counterfactual, c.factual, c.compared) for c in two]
    assert effect_error(two).error == pytest.approx(2 * math.hypot(*sizes) / math.sqrt(2))
    nothing = simple(effects(0, 0), effects(1, 1))
    assert effect_error([nothing]).error == pytest.approx(math.sqrt(0.5))
    assert math.isnan(effect_error([nothing]).relative)


def test_average_effects_are_of_cases_with_any_number_of_entities():
    # Errors of +1 and -1 along the first axis cancel in the average of cases, and of entities.
    up, down = simple(effects(1, 1), effects(2, 2)), simple(effects(1, 1, 1), effects(0, 0, 0))
    assert average_effect_error([up, down]).error == pytest.approx(0, abs=1e-12)
    assert average_effect_error([simple(effects(1, 1), effects(2, 0))]).error == pytest.approx(0, abs=1e-12)
    found = average_effect_error([up, up, down])
    assert found.error == pytest.approx(math.sqrt(0.5) / 3)
    assert 0 <= found.low <= found.error <= found.high <= math.sqrt(0.5)
    alone = average_effect_error([up, up])
    assert (alone.low, alone.high) == pytest.approx((alone.error, alone.error))
    broken = simple(effects(1), effects(math.inf))
    assert average_effect_error([broken, up]).error == math.inf
    assert effect_error([broken, up]).error == math.inf
    with pytest.raises(ValueError, match=r"as many frames and coordinates; got \(T, d\) \[\(3, 2\), \(7, 2\)\]"):
        average_effect_error([up, case()])


def test_directions():
    assert direction_cosine(case(strength=2.0)) == pytest.approx(1)
    assert sign_agreement(case(strength=2.0)) == 1
    assert direction_cosine(case(strength=-0.5)) == pytest.approx(-1)
    assert sign_agreement(case(strength=-0.5)) == 0
    assert direction_cosine(simple(effects(1, 0), effects(1, 1))) == pytest.approx(math.sqrt(0.5))
    assert direction_cosine(simple(effects(1, 0), effects(0, 0))) == 0
    assert direction_cosine(simple(effects(1, 0), effects(math.nan, 0))) == 0
    assert math.isnan(direction_cosine(simple(effects(0, 0), effects(1, 1))))
    assert sign_agreement(simple(effects(1, -2, 0.1), effects(3, 1, -1)), eps=0.5) == 0.5
    assert math.isnan(sign_agreement(simple(effects(1), effects(1)), eps=1.0))


def test_dose_response_of_effects_that_are_twice_too_strong():
    doses = [0.0, -1.0, 2.0, 4.0]
    cases = [simple(d * effects(1, 2), 2 * d * effects(1, 2), dose=d) for d in doses]
    found = dose_response(cases)
    assert (found.rank, found.true_rank, found.slope) == pytest.approx((1, 1, 2))
    turned = [simple(d * effects(1), (5 - abs(d)) * effects(1), dose=d) for d in doses]
    assert dose_response(turned).rank == pytest.approx(-1)
    assert dose_response(turned).slope == pytest.approx((4 + 2 * 3 + 4) / 21)
    assert math.isnan(dose_response([simple(effects(0), effects(1))]).slope)
    broken = simple(effects(8), effects(math.nan), dose=8.0)
    assert dose_response([*cases, broken]).slope == math.inf
    assert dose_response([*cases, broken]).rank == pytest.approx(1)


def test_affected_entities_are_ranked():
    true = effects(1, 1, 0.01, 0)
    for predicted, auroc, precision in (
        (effects(5, 3, 2, 1), 1, 1),
        (effects(1, 2, 3, 5), 0, (1 / 3 + 2 / 4) / 2),
        (effects(1, 1, 1, 1), 0.5, 0.5),
        (effects(5, 2, 3, 1), 0.75, (1 + 2 / 3) / 2),
        (effects(5, 2, 2, 1), 0.875, (1 + 2 / 3) / 2),
        (effects(math.nan, 2, 3, 1), 0.75, (1 + 2 / 3) / 2),
    ):
        question = simple(true, predicted)
        assert affected_auroc(question, 0.1) == pytest.approx(auroc)
        assert affected_average_precision(question, 0.1) == pytest.approx(precision)
    for eps in (2.0, -1.0):
        assert math.isnan(affected_auroc(simple(true, true), eps))
        assert math.isnan(affected_average_precision(simple(true, true), eps))
    untouched = torch.tensor([False, True, True, True])
    assert affected_auroc(simple(true, effects(0, 3, 2, 1)), 0.1, among=untouched) == 1
    assert affected_auroc(simple(true, effects(0, 3, 2, 1)), 0.1) == 0.5


def test_who_is_affected_is_told_by_the_farthest_frame():
    late = effects(0, 0)
    late[2, 0] = torch.tensor([3.0, 4.0])
    assert affected_auroc(simple(late, late), 4.9) == 1
    assert leakage(simple(late, late), torch.tensor([False, True])) == 5


def test_leakage_counts_compared_entities_out_of_reach():
    question = simple(effects(1, 0, 0), effects(1, -2, 3))
    reach = torch.tensor([True, False, True])
    assert leakage(question, reach) == 2
    assert leakage(question, ~reach) == 3
    assert leakage(question, torch.ones(3, dtype=torch.bool)) == 0
    assert leakage(dataclasses.replace(question, compared=reach), reach) == 0
    for broken in (math.nan, math.inf):
        assert leakage(simple(effects(1, 0), effects(1, broken)), torch.tensor([True, False])) == math.inf


@pytest.mark.parametrize(("steps", "hops"), [(0, 1), (1, 1), (3, 1), (2, 2), (1, 5), (4, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_light_cone_on_a_chain_grows_by_hops_times_steps(steps, hops, turned):
    chain = torch.stack([torch.arange(19), torch.arange(1, 20)])
    touched = torch.arange(20) == 7
    reached = light_cone([chain.flip(0) if turned else chain] * steps, touched, hops)
    assert reached.tolist() == [abs(i - 7) <= steps * hops for i in range(20)]
    assert touched.sum() == 1


def test_a_light_cone_follows_graphs_in_their_order():
    first, then = torch.tensor([[0], [1]]), torch.tensor([[1], [2]])
    touched = torch.tensor([True, False, False])
    assert light_cone([first, then], touched).tolist() == [True, True, True]
    assert light_cone([then, first], touched).tolist() == [True, True, False]
    assert light_cone([torch.empty(2, 0, dtype=torch.long)], touched).tolist() == [True, False, False]


def test_lyapunov_time_of_the_logistic_map():
    x = torch.rand(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.8 + 0.1
    y, apart = x + 1e-6, []
    for _ in range(40):
        apart.append((x - y).abs())
        x, y = 4 * x * (1 - x), 4 * y * (1 - y)
    assert lyapunov_time(torch.stack(apart, 1), 1.0) == pytest.approx(1 / math.log(2), rel=0.05)


def test_lyapunov_time_of_exact_growth():
    t = torch.arange(80).double()
    growing = 1e-6 * (0.25 * t).exp()
    assert lyapunov_time(growing, 0.1) == pytest.approx(0.4)
    assert lyapunov_time(torch.stack([growing, 100 * growing]), 0.1, scale=1.0) == pytest.approx(0.4)
    assert lyapunov_time(growing.clamp(max=1.0), 0.1) == pytest.approx(0.4)
    # What grows to no more than 1e-3 is cut off at 1e-5 if it is the largest, and not if the world is large.
    short = growing.clamp(max=1e-3)[:28]
    assert lyapunov_time(short, 0.1) == math.inf
    assert lyapunov_time(short, 0.1, scale=10.0) == pytest.approx(0.4)


def test_lyapunov_time_is_infinite_where_nothing_grows_exponentially():
    t = torch.arange(4000).double()
    oscillating = 1e-6 * torch.hypot((0.01 * t).cos(), 3 * (0.01 * t).sin())
    assert lyapunov_time(oscillating, 0.01) == math.inf
    assert lyapunov_time(oscillating, 0.01, scale=1.0) == math.inf
    assert lyapunov_time(1e-6 * (1 + t), 0.01) == math.inf
    assert lyapunov_time(1e-6 * (1 + t.square()).sqrt(), 0.01, scale=1.0) == math.inf
    assert lyapunov_time(1e-6 * (-0.1 * t).exp(), 0.01) == math.inf
    assert lyapunov_time(torch.tensor([1e-6]), 0.01) == math.inf


def test_bootstrap_is_deterministic_and_drops_nan():
    values = random(0, 30)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(torch.cat([values, torch.full((5,), torch.nan)])) == bootstrap(values)
    low, high = bootstrap(values, level=0.5)
    assert bootstrap(values)[0] < low < float(values.mean()) < high < bootstrap(values)[1]
    assert bootstrap(torch.tensor([2.5])) == (2.5, 2.5)
    assert all(math.isnan(end) for end in bootstrap(torch.empty(0)))
    assert all(math.isnan(end) for end in bootstrap(torch.tensor([math.nan])))
    assert bootstrap(torch.tensor([-math.inf] * 9 + [1.0])) == (-math.inf, -math.inf)
    assert bootstrap(torch.tensor([-math.inf, 1.0, 2.0]))[0] == -math.inf


def test_bootstrap_intervals_cover_the_mean_about_as_often_as_they_say():
    samples = random(5, 200, 40)
    ends = [bootstrap(sample, num_samples=200, level=0.9) for sample in samples]
    covered = sum(low <= 0 <= high for low, high in ends) / len(ends)
    assert 0.82 <= covered <= 0.96


def test_bootstrap_takes_any_statistic():
    low, high = bootstrap(torch.arange(101), torch.median, level=0.9)
    assert 30 < low < 50 < high < 70


def test_rank_correlation_with_ties():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([10.0, 30.0, 20.0, 40.0])
    assert spearman(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(b, a) == pytest.approx(spearman(a, b))
    assert spearman(a, -a.exp()) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(4)))
    assert math.isnan(spearman(a, torch.tensor([1.0, math.nan, 2.0, 3.0])))
    with pytest.raises(ValueError, match=r"two lists of one length; got \[4\] and \[3\]"):
        spearman(a, b[:3])


def test_crps():
    truth = random(0, 6)
    members = random(1, 5, 6)
    assert torch.allclose(crps_ensemble(members[:1], truth), (members[0] - truth).abs())
    pairs = (members[:, None] - members[None]).abs().mean((0, 1))
    assert torch.allclose(crps_ensemble(members, truth), (members - truth).abs().mean(0) - pairs / 2)
    assert crps_ensemble(truth.expand(4, 6), truth).abs().max() < 1e-15
    # Of a standard normal distribution and its mean: (sqrt(2) - 1) / sqrt(pi).
    assert float(crps_ensemble(random(2, 40_000), torch.tensor(0.0))) == pytest.approx(
        (math.sqrt(2) - 1) / math.sqrt(math.pi), rel=0.02
    )


@pytest.mark.parametrize(("count", "level"), [(19, 0.9), (3, 0.5), (39, 0.5), (39, 0.9)])
def test_intervals_cover_a_truth_drawn_like_the_members(count, level):
    assert coverage(random(3, count, 20_000), random(4, 20_000), level) == pytest.approx(level, abs=0.015)


def test_coverage_by_hand():
    members = torch.tensor([[4.0], [0.0], [1.0], [3.0], [2.0]]).expand(5, 4)
    # Positions 0.25 * 6 = 1.5 from either end: from 0.5 to 3.5.
    assert coverage(members, torch.tensor([0.4, 0.6, 3.4, 3.6]), 0.5) == 0.5
    assert coverage(members, torch.tensor([-0.1, 0.0, 4.0, 4.1]), 0.99) == 0.5
    assert coverage(members[:1], torch.tensor([4.0, 4.0, 4.0, 1.0]), 0.9) == 0.75


def test_the_sieve_drops_answers_that_noise_changes():
    was, would, everyone = effects(0, 0), effects(1, 1), torch.tensor([True, True])
    assert not flips(would, would + effects(0.49, -0.49), was, everyone)
    assert flips(would, would + effects(0.51, -0.51), was, everyone)
    assert not flips(would, would + effects(0, 9), was, torch.tensor([True, False]))
    assert not flips(was, was, was, everyone)
    assert flips(was, would, was, everyone)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_entities_does_not_matter(seed):
    question = case(strength=1.5, seed=seed)
    question = answered(question, question.predicted + 0.3 * random(seed + 300, FRAMES, ENTITIES, 2))
    order = torch.randperm(ENTITIES, generator=torch.Generator().manual_seed(seed))
    turned = Case(
        **{
            f.name: value if f.name == "dose" else value[order] if value.ndim == 1 else value[:, order]
            for f in dataclasses.fields(Case)
            for value in [getattr(question, f.name)]
        }
    )
    eps = float(question.effect[1:, question.compared].norm(dim=2).amax(0).median())
    reach = torch.tensor([True, False, True, False, True])
    edges = torch.tensor([[0, 2, 3], [1, 1, 4]])
    places = order.argsort()
    for measure in (
        cf_gain,
        direction_cosine,
        sign_agreement,
        lambda c: float(cf_gain_per_frame(c)[1:].sum()),
        lambda c: effect_error([c]).error,
        lambda c: average_effect_error([c]).error,
        lambda c: affected_auroc(c, eps),
        lambda c: affected_average_precision(c, eps),
    ):
        assert measure(turned) == pytest.approx(measure(question))
    assert leakage(turned, reach[order]) == leakage(question, reach) > 0
    cone = light_cone([edges], question.touched)
    assert torch.equal(light_cone([places[edges]], turned.touched), cone[order])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": torch.zeros(FRAMES, 5, 3)}, r"one shape, factual \[7, 5, 2\]; got predicted \[7, 5, 3\]"),
        ({"compared": torch.ones(ENTITIES)}, r"compared must be bool, \[5\]; got \[5\] of torch.float32"),
        ({"touched": torch.ones(4, dtype=torch.bool)}, r"touched must be bool, \[5\]; got \[4\]"),
        ({"compared": torch.zeros(ENTITIES, dtype=torch.bool)}, "all of this one's are removed or fixed"),
        ({"counterfactual": torch.full((FRAMES, 5, 2), torch.inf)}, "counterfactual has NaN or infinity"),
        ({"dose": math.nan}, "finite number, 0 for nothing; got nan"),
    ],
)
def test_cases_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        case(**changes)


def test_other_input_that_does_not_fit():
    with pytest.raises(ValueError, match=r"two frames or more; got factual \[1, 1, 2\]"):
        simple(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    for measure in (effect_error, average_effect_error, dose_response):
        with pytest.raises(ValueError, match="no cases to measure"):
            measure([])
    someone = torch.tensor([True, False])
    with pytest.raises(ValueError, match="entities 0 to 1; got 0 to 2"):
        light_cone([torch.tensor([[0], [2]])], someone)
    with pytest.raises(ValueError, match="hops_per_step must be 1 or more; got 0"):
        light_cone([], someone, 0)
    with pytest.raises(ValueError, match=r"numbers \[2, e\]; got \[1, 3\]"):
        light_cone([torch.zeros(1, 3, dtype=torch.long)], someone)
    with pytest.raises(ValueError, match="put the runs apart"):
        lyapunov_time(torch.tensor([0.0, 1.0]), 0.1)
    with pytest.raises(ValueError, match="dt and scale must be above 0; got 0 and None"):
        lyapunov_time(torch.tensor([1e-6, 1.0]), 0)
    with pytest.raises(ValueError, match="level must be between 0 and 1; got 95"):
        bootstrap(torch.zeros(3), level=95)
    with pytest.raises(ValueError, match=r"a truth \[...\]; got \[3, 2\] and \[3\]"):
        crps_ensemble(torch.zeros(3, 2), torch.zeros(3))
