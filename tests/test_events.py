from __future__ import annotations

import math

import pytest
import torch

from simworld import events
from simworld.events import EventScores, contact_events, event_changes, event_f1


def crossing() -> tuple[torch.Tensor, torch.Tensor]:
    """Two balls meet in frame 3, part, and meet again in frame 7; a third stands far away, a fourth is on it."""
    gaps = torch.tensor([3.0, 2.0, 1.0, 0.0, -0.1, 0.5, 1.0, 0.0, 0.0, 1.0])
    positions = torch.zeros(10, 4, 2)
    positions[:, 1, 0] = 1.5 + gaps
    positions[:, 2:, 1] = 50.0
    return positions, torch.tensor([1.0, 0.5, 1.0, 1.0])


def test_contacts_begin_where_a_gap_closes():
    positions, radii = crossing()
    everyone = torch.ones(4, dtype=torch.bool)
    assert contact_events(positions, radii, everyone).tolist() == [[0, 1, 3], [0, 1, 7]]
    assert contact_events(positions, radii, everyone, 1.0).tolist() == [[0, 1, 2]]
    assert contact_events(positions, radii, torch.arange(4) > 0).tolist() == []
    assert contact_events(positions[:1], radii, everyone).shape == (0, 3)
    assert contact_events(positions[:, :1], radii[:1], everyone[:1]).shape == (0, 3)
    gone = torch.ones(10, 4, dtype=torch.bool)
    gone[5:, 0] = False
    assert contact_events(positions, radii, gone).tolist() == [[0, 1, 3]]


def test_contacts_do_not_depend_on_how_many_frames_are_held_at_once(monkeypatch):
    positions = torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(0))
    radii, everyone = torch.full((6,), 0.4), torch.ones(6, dtype=torch.bool)
    whole = contact_events(positions, radii, everyone)
    gaps = (positions[:, :, None].double() - positions[:, None].double()).norm(dim=3)
    by_hand = [
        [i, j, t]
        for t in range(1, 40)
        for i in range(6)
        for j in range(i + 1, 6)
        if gaps[t, i, j] <= 0.8 < gaps[t - 1, i, j]
    ]
    assert whole.tolist() == by_hand
    assert len(whole) > 20
    for numbers in (1, 100, 700):
        monkeypatch.setattr(events, "DISTANCES_AT_ONCE", numbers)
        assert torch.equal(contact_events(positions, radii, everyone), whole)


def test_the_order_of_entities_does_not_matter():
    positions = torch.randn(30, 5, 2, generator=torch.Generator().manual_seed(1))
    radii, everyone = torch.linspace(0.2, 0.6, 5), torch.ones(5, dtype=torch.bool)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = contact_events(positions[:, order], radii[order], everyone)
    turned = torch.cat([order[turned[:, :2]], turned[:, 2:]], 1)
    whole = contact_events(positions, radii, everyone)
    scores = event_f1(turned, whole, 0)
    assert scores.matched == scores.predicted == scores.true == len(whole) > 10


def test_events_are_matched_one_to_one_within_a_window():
    true = torch.tensor([[0, 1, 10], [0, 1, 13], [1, 2, 40], [2, 3, 5]])
    predicted = torch.tensor([[1, 2, 44], [0, 1, 12], [3, 2, 6], [0, 1, 11], [0, 2, 10]])
    scores = event_f1(predicted, true, 2)
    # Frame 11 goes with 10 and 12 with 13; 44 is too late for 40; pair 0, 2 does not meet.
    assert (scores.matched, scores.predicted, scores.true) == (3, 5, 4)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((0.6, 0.75, 2 / 3))
    assert event_f1(predicted, true, 4).matched == 4
    assert event_f1(predicted, true, 0).matched == 0
    assert event_f1(true[[0, 0]], true[:1], 2).matched == 1


def test_scores_of_no_events():
    nothing, one = torch.empty(0, 3, dtype=torch.long), torch.tensor([[0, 1, 2]])
    neither = event_f1(nothing, nothing, 1)
    assert all(math.isnan(score) for score in (neither.precision, neither.recall, neither.f1))
    missed = event_f1(nothing, one, 1)
    assert math.isnan(missed.precision)
    assert (missed.recall, missed.f1) == (0, 0)
    assert event_f1(one, nothing, 1).f1 == 0
    assert missed + event_f1(one, one, 1) == EventScores(matched=1, predicted=1, true=2)


def test_events_that_an_intervention_created_and_removed():
    factual = torch.tensor([[0, 1, 10], [1, 2, 20], [0, 2, 30]])
    counterfactual = torch.tensor([[0, 1, 11], [1, 2, 25], [0, 3, 8]])
    created, removed = event_changes(counterfactual, factual, 2)
    assert created.tolist() == [[1, 2, 25], [0, 3, 8]]
    assert removed.tolist() == [[1, 2, 20], [0, 2, 30]]
    assert all(not len(part) for part in event_changes(factual, factual, 0))


def test_input_that_does_not_fit():
    with pytest.raises(ValueError, match=r"radii \[n\]; got \[3, 2, 2\] and \[3\]"):
        contact_events(torch.zeros(3, 2, 2), torch.ones(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"active must be bool, \[n\] or \[T, n\]; got \[2\] of torch.float32"):
        contact_events(torch.zeros(3, 2, 2), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="window must be 0 frames or more; got -1"):
        event_f1(torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), -1)
    with pytest.raises(ValueError, match=r"whole numbers \[e, 3\], a pair and a frame; got \[1, 2\]"):
        event_f1(torch.zeros(1, 2).long(), torch.zeros(1, 3).long(), 0)
