from __future__ import annotations

import itertools
import math

import pytest
import torch

from simworld.slot_metrics import adjusted_rand_index, best_matching, clip_ari, collapse, foreground_ari, overlaps


def rand_by_pairs(truth, found):
    """The index by its meaning: agreements on pairs, less what shuffled labels agree on, told by all pairs."""
    pairs = list(itertools.combinations(range(len(truth)), 2))
    one = [bool(truth[i] == truth[j]) for i, j in pairs]
    other = [bool(found[i] == found[j]) for i, j in pairs]
    both = sum(a and b for a, b in zip(one, other, strict=True))
    chance = sum(one) * sum(other) / len(pairs)
    most = (sum(one) + sum(other)) / 2
    return (both - chance) / (most - chance)


def test_the_index_is_that_of_pairs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        truth, found = (torch.randint(0, 4, (25,), generator=generator) for _ in range(2))
        assert adjusted_rand_index(truth, found) == pytest.approx(rand_by_pairs(truth, found), abs=1e-12)


def test_hand_made_indices():
    truth = torch.tensor([0, 0, 1, 1])
    assert adjusted_rand_index(truth, torch.tensor([5, 5, 2, 2])) == 1
    # One pair is kept of two and two: E = 2 * 1 / 6, most = 1.5, so (1 - 1/3) / (1.5 - 1/3).
    assert adjusted_rand_index(truth, torch.tensor([0, 0, 1, 2])) == pytest.approx(4 / 7)
    assert adjusted_rand_index(truth, torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert adjusted_rand_index(truth, torch.zeros(4).long()) == 0
    assert adjusted_rand_index(torch.zeros(3).long(), torch.zeros(3).long()) == 1


def test_random_labels_score_nothing_on_average():
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(60) % 3
    scores = [adjusted_rand_index(truth, truth[torch.randperm(60, generator=generator)]) for _ in range(300)]
    assert abs(sum(scores) / len(scores)) < 0.005


def test_the_background_counts_for_nothing_but_bodies_given_to_it_do():
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[:, 0, :2], masks[:, 3, :2] = 1, 2
    found = torch.where(masks == 0, torch.arange(16).view(4, 4) % 3 + 4, masks * 2)
    assert foreground_ari(masks, found).tolist() == [1, 1]
    merged = torch.where(masks == 2, masks.new_tensor(2), found)  # both bodies are of slot 2
    assert foreground_ari(masks, merged).tolist() == [0, 0]
    swapped = torch.stack([found[0], torch.where(masks[1] > 0, 6 - found[1], found[1])])
    assert foreground_ari(masks, swapped).tolist() == [1, 1]
    assert clip_ari(masks, found) == 1
    assert clip_ari(masks, swapped) < 0.5


def test_a_frame_without_bodies_has_no_index():
    masks = torch.zeros(1, 3, 3, dtype=torch.uint8)
    assert math.isnan(float(foreground_ari(masks, masks)))
    with pytest.raises(ValueError, match="two or more"):
        clip_ari(masks, masks)
    with pytest.raises(ValueError, match="Masks to compare"):
        foreground_ari(masks, masks[:, :2])


def test_the_matching_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 4), (3, 3), (4, 6), (5, 5)):
        scores = torch.rand(rows, columns, generator=generator)
        found = best_matching(scores)
        assert len(set(found.tolist())) == rows
        best = max(
            sum(float(scores[i, j]) for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(columns), rows)
        )
        assert float(scores[torch.arange(rows), found].sum()) == pytest.approx(best)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (torch.zeros(3, 2), "more bodies than slots"),
        (torch.full((1, 2), torch.nan), "finite"),
        (torch.zeros(1, 20), "at most 12"),
    ],
)
def test_matchings_that_cannot_be(scores, said):
    with pytest.raises(ValueError, match=said):
        best_matching(scores)


def test_overlaps_are_shares_of_joint_pixels():
    masks = torch.tensor([[[1, 1, 0, 2]]], dtype=torch.uint8)
    found = torch.tensor([[[0, 2, 2, 1]]], dtype=torch.uint8)
    assert torch.allclose(overlaps(masks, found, 2, 3), torch.tensor([[[1 / 2, 0, 1 / 3], [0, 1, 0]]]))


def test_what_fills_its_space_has_not_collapsed():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    found = collapse(x)
    assert found.effective_rank == pytest.approx(8, rel=0.01)
    assert abs(found.mean_cosine) < 0.01
    assert found.variances == pytest.approx([1.0] * 8, rel=0.1)
    assert not found.collapsed
    shifted = collapse(x + 2)
    assert shifted.effective_rank == pytest.approx(found.effective_rank)
    assert shifted.mean_cosine > 0.7


def test_effective_rank_by_hand():
    """Singular values 2 and 1: entropy of (2/3, 1/3)."""
    x = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert collapse(x).effective_rank == pytest.approx(math.exp(entropy))
    assert collapse(x).mean_cosine == pytest.approx(-2 / 6)  # two opposite pairs of six


def test_collapsed_ones_are_known():
    generator = torch.Generator().manual_seed(0)
    same = torch.ones(50, 6) + 1e-5 * torch.randn(50, 6, generator=generator)
    line = torch.randn(50, 1, generator=generator) * torch.ones(1, 6)
    assert collapse(same).collapsed
    assert collapse(line).collapsed
    assert collapse(torch.ones(50, 6)).effective_rank == 0
    assert collapse(torch.ones(50, 6)).collapsed
    with pytest.raises(ValueError, match="finite"):
        collapse(torch.full((3, 2), torch.inf))
    with pytest.raises(ValueError, match="two or more"):
        collapse(torch.zeros(1, 2))
