from __future__ import annotations

import itertools
import math

import pytest
import torch

from simworld.kernels import NeighborSearch, neighbor_pairs, neighbor_pairs_reference, neighbors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def equal(found, wanted) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) and a.dtype == torch.int64 for a, b in zip(found, wanted, strict=True))


def random_case(seed: int):
    """Particles in and around boxes of several scenes, on their faces, on each other, some far away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    d, scenes = 2 + seed % 2, 1 + int(draw(1) * 3)
    batch = torch.repeat_interleave(torch.arange(scenes), (draw(scenes) * (300 if seed % 5 == 0 else 60)).long())
    lower, box, n = -draw(scenes, d), 0.3 + 2 * draw(scenes, d), len(batch)
    boundaries, periodic = torch.stack([lower, lower + box], 1), draw(scenes, d) < 0.5
    positions = lower[batch] + box[batch] * (1.4 * draw(n, d) - 0.2)
    radius = float(box.min()) / 2 if seed % 7 == 0 else float(0.02 + 0.13 * draw(1))
    if n > 4 and seed % 3 == 0:
        positions[1], positions[2], positions[3] = positions[0], boundaries[batch[2], 1], boundaries[batch[3], 0]
    if n and seed % 4 == 0:
        positions[-1] = 1e6 * (draw(d) - 0.5)
    if n and seed % 11 == 0:
        positions[0], periodic = 1e200 * (draw(d) - 0.5), torch.zeros_like(periodic)
    dtype = torch.float32 if seed % 2 and seed % 11 else torch.float64
    given = {"batch": batch, "boundaries": boundaries, "periodic": periodic, "loops": seed % 6 == 0}
    return positions.to(dtype), radius, {**given, "active": draw(n) < 0.9, "receives": draw(n) < 0.8}


def by_images(positions, radius, batch, boundaries, periodic):
    """Every pair by its images in the 3^d boxes around, one at a time in Python."""
    found = []
    for r, s in itertools.permutations(range(len(positions)), 2):
        scene = int(batch[r])
        if scene != int(batch[s]):
            continue
        box = (boundaries[scene, 1] - boundaries[scene, 0]).tolist()
        turns = [(-1, 0, 1) if on else (0,) for on in periodic[scene].tolist()]
        way = (positions[r] - positions[s]).tolist()
        shifts = itertools.product(*turns)
        if min(math.hypot(*(w + k * b for w, k, b in zip(way, shift, box, strict=True))) for shift in shifts) <= radius:
            found.append((s, r))
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_are_those_of_the_definition(device):
    kept = 0
    for seed in range(120):
        positions, radius, given = random_case(seed)
        wanted = neighbor_pairs_reference(positions, radius, **given)
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
        assert equal(neighbor_pairs(positions.to(device), radius, **moved), wanted), seed
        kept += len(wanted.senders)
    assert kept > 10000


@pytest.mark.parametrize("seed", range(6))
def test_the_definition_is_the_nearest_image(seed):
    generator = torch.Generator().manual_seed(seed)
    d = 2 + seed % 2
    batch = torch.tensor([0] * 14 + [1] * 9)
    boundaries = torch.tensor([[[-1.0] * d, [0.5] * d], [[2.0] * d, [3.0] * d]]).double()
    periodic = torch.rand(2, d, generator=generator) < 0.6
    inside = torch.rand(23, d, generator=generator, dtype=torch.float64)
    positions = boundaries[batch, 0] + inside * (boundaries[:, 1] - boundaries[:, 0])[batch]
    wanted = by_images(positions, 0.4, batch, boundaries, periodic)
    found = neighbor_pairs_reference(positions, 0.4, batch=batch, boundaries=boundaries, periodic=periodic)
    assert list(zip(found.senders.tolist(), found.receivers.tolist(), strict=True)) == wanted
    outside = positions + 3 * (boundaries[:, 1] - boundaries[:, 0])[batch] * periodic[batch]
    again = neighbor_pairs(outside, 0.4, batch=batch, boundaries=boundaries, periodic=periodic)
    assert equal(again, found)


def test_the_radius_itself_is_near_and_places_that_coincide_are():
    positions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.5, 0.0]])
    senders, receivers, starts = neighbor_pairs(positions, 1.0)
    assert senders.tolist() == [1, 2, 0, 2, 0, 1]
    assert receivers.tolist() == [0, 0, 1, 1, 2, 2]
    assert starts.tolist() == [0, 2, 4, 6]
    assert len(neighbor_pairs(positions, 1 - 1e-9).senders) == 2
    assert neighbor_pairs(positions, 0.1, loops=True).senders.tolist() == [0, 2, 1, 0, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_and_lonely_particles(count):
    positions = 10 * torch.arange(count)[:, None].expand(-1, 3).float()
    found = neighbor_pairs(positions, 1.0)
    assert equal(found, (torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(count).long()))
    gone = neighbor_pairs(positions, 100.0, active=torch.zeros(count, dtype=torch.bool))
    assert len(gone.senders) == 0
    assert equal(NeighborSearch(1.0, skin=0.5)(positions), found)


@pytest.mark.parametrize("length", [1.0, 0.3, 0.1])
def test_periodic_axes_of_few_cells(length):
    """One, two and three cells round an axis: nobody is met twice."""
    positions = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).double()
    for cells in (2.0, 2.2, 3.0, 3.3, 4.0, 4.1):
        given = {
            "boundaries": torch.tensor([[[0.0, 0.0], [length, 1.0]]]).double(),
            "periodic": torch.tensor([[True, True]]),
        }
        found = neighbor_pairs(positions * torch.tensor([length, 1.0]), length / cells, **given)
        assert equal(found, neighbor_pairs_reference(positions * torch.tensor([length, 1.0]), length / cells, **given))
        assert len(found.senders) == len(set(zip(found.senders.tolist(), found.receivers.tolist(), strict=True)))


def test_particles_strewn_over_more_cells_than_keys_can_number():
    generator = torch.Generator().manual_seed(0)
    positions = 10.0 ** (12 * torch.rand(3000, 3, generator=generator, dtype=torch.float64))
    positions[1000:2000] = positions[:1000] + 1e-4 * torch.rand(1000, 3, generator=generator, dtype=torch.float64)
    found = neighbor_pairs(positions, 1e-4)
    assert len(found.senders) > 500
    assert equal(found, neighbor_pairs_reference(positions, 1e-4))
    batch = torch.arange(3000) % 1000 // 100
    batch, order = batch.sort(stable=True)
    found = neighbor_pairs(positions[order], 1e-4, batch=batch)
    assert equal(found, neighbor_pairs_reference(positions[order], 1e-4, batch=batch))


def test_keys_that_do_not_fit_are_made_shorter(monkeypatch):
    monkeypatch.setattr(neighbors, "LARGEST_KEY", 500)
    for seed in range(24):
        positions, radius, given = random_case(seed)
        assert equal(neighbor_pairs(positions, radius, **given), neighbor_pairs_reference(positions, radius, **given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 7])
def test_a_skin_changes_the_work_and_not_the_pairs(seed, device):
    """Walks, with steps small and sometimes large: each answer is that of a fresh search, and most are kept."""
    positions, radius, given = random_case(seed)
    given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
    positions = positions.to(device)
    generator = torch.Generator().manual_seed(seed)
    search = NeighborSearch(radius, skin=0.3 * radius)
    for step in range(30):
        assert equal(search(positions, **given), neighbor_pairs(positions, radius, **given)), step
        size = 0.5 if step % 10 == 9 else 0.01
        walk = torch.randn(positions.shape, generator=generator).clamp(-2, 2).to(positions)
        positions = positions + size * radius * walk
    assert 3 <= search.builds <= (30 if seed == 7 else 12)


def test_a_skin_holds_until_half_of_it_is_walked():
    positions = torch.tensor([[0.0, 0.0], [1.35, 0.0]]).double()
    search = NeighborSearch(1.0, skin=0.4)
    assert len(search(positions).senders) == 0
    positions[1, 0] -= 0.19
    assert len(search(positions).senders) == 0
    assert search.builds == 1
    positions[0, 0] += 0.17
    assert len(search(positions).senders) == 2
    assert search.builds == 1
    positions[1, 0] -= 0.02
    assert len(search(positions).senders) == 2
    assert search.builds == 2


def test_a_skin_notices_all_that_changes():
    positions, radius, given = random_case(5)
    search = NeighborSearch(radius, skin=0.2 * radius)
    given = {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}
    search(positions, **given)
    given["active"][0] ^= True  # also where a tensor is written into
    changes = [{}, {"receives": None}, {"batch": given["batch"].clamp(max=0)}, {"periodic": ~given["periodic"]}]
    changes += [{"boundaries": given["boundaries"] * 1.5}, {"loops": True}]
    for number, change in enumerate(changes):
        changed = {**given, **change}
        assert equal(search(positions, **changed), neighbor_pairs(positions, radius, **changed)), change
        assert search.builds == number + 2
    fewer = {name: value[:-1] if name in ("batch", "active", "receives") else value for name, value in given.items()}
    assert equal(search(positions[:-1], **fewer), neighbor_pairs(positions[:-1], radius, **fewer))


def test_too_many_pairs_are_refused_before_they_are_made(monkeypatch):
    positions = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    total = len(neighbor_pairs(positions, 0.3).senders)
    assert len(neighbor_pairs(positions, 0.3, max_edges=total).senders) == total
    with pytest.raises(ValueError, match=f"makes {total} edges .* of 2000 particles, and {total - 1} are allowed"):
        neighbor_pairs(positions, 0.3, max_edges=total - 1)
    search = NeighborSearch(0.3, skin=0.1)
    with pytest.raises(ValueError, match=r"a radius of 0.3 with a skin of 0.1 makes \d+ edges"):
        search(positions, max_edges=total)
    monkeypatch.setattr(neighbors, "SAMPLED_DISTANCES", 100000)
    with pytest.raises(ValueError, match=r"makes about 3998000 edges \(0.064 GB\)"):
        neighbor_pairs(positions, 5.0, max_edges=1000)
    monkeypatch.setattr(neighbors, "UNCHECKED_EDGES", 1000)
    monkeypatch.setattr(neighbors, "room", lambda device: 5000)
    with pytest.raises(ValueError, match="5000 are allowed or fit in memory; lower the radius"):
        neighbor_pairs(positions, 0.3)


def test_everyone_near_everyone_is_refused_at_once():
    """A million particles in one place: 10^12 pairs, told from a sample."""
    with pytest.raises(ValueError, match=r"makes about 999999000000 edges \(1.6e\+04 GB\) of 1000000 particles"):
        neighbor_pairs(torch.rand(1000000, 2), 2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_positions_that_are_no_numbers(bad):
    positions = torch.rand(6, 3)
    positions[4, 1] = positions[5, 0] = bad
    with pytest.raises(ValueError, match="finite, but those of particle 4 are"):
        neighbor_pairs(positions, 0.1)
    with pytest.raises(ValueError, match="finite, but those of particle 4 are"):
        NeighborSearch(0.1, skin=0.1)(positions)
    assert len(neighbor_pairs(positions, 5.0, active=torch.arange(6) < 4).senders) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "finite length over 0"),
        ({"radius": math.nan}, "finite length over 0"),
        ({"radius": 0.51}, "at most half of a periodic box"),
        ({"positions": torch.zeros(4, 4)}, "positions are real"),
        ({"positions": torch.zeros(4, 2).long()}, "positions are real"),
        ({"batch": torch.tensor([0, 1, 0, 1])}, "batch ascends"),
        ({"batch": torch.tensor([0, 0, 0, 2])}, "batch ascends"),
        ({"batch": torch.zeros(3).long()}, "batch is int64"),
        ({"boundaries": None}, "need boundaries"),
        ({"boundaries": torch.zeros(1, 2, 2)}, r"boundaries are \[2, 2, 2\]"),
        ({"boundaries": torch.zeros(2, 2, 2)}, "at most half of a periodic box"),
        ({"periodic": torch.ones(2, 3, dtype=torch.bool)}, "periodic is bool"),
        ({"active": torch.ones(4)}, "active is bool"),
        ({"receives": torch.ones(3, dtype=torch.bool)}, "receives is bool"),
    ],
)
def test_what_does_not_fit_together(change, message):
    given = {
        "positions": torch.rand(4, 2),
        "radius": 0.1,
        "batch": torch.tensor([0, 0, 1, 1]),
        "boundaries": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]).expand(2, 2, 2),
        "periodic": torch.ones(2, 2, dtype=torch.bool),
    }
    neighbor_pairs(**given)
    with pytest.raises(ValueError, match=message):
        neighbor_pairs(**{**given, **change})


def test_no_gradient_and_no_graph():
    positions = torch.rand(10, 2, requires_grad=True)
    assert all(not value.requires_grad for value in neighbor_pairs(positions, 0.5))
    with torch.inference_mode():
        inside = neighbor_pairs(positions.detach().clone(), 0.5)
    assert equal(inside, neighbor_pairs(positions, 0.5))


def test_a_skin_has_a_length():
    with pytest.raises(ValueError, match="a skin is a finite length"):
        NeighborSearch(0.1, skin=-0.1)
    with pytest.raises(ValueError, match="a radius is a finite length"):
        NeighborSearch(-1.0, skin=0.1)
