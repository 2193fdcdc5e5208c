"""Every shipped encoder of films parts the bodies of unseen episodes, over whole films, without losing them."""

from __future__ import annotations

import pytest
import torch

from simworld.data.generate import GENERATORS
from simworld.encode import figures
from simworld.models import SlotAttention, load_encoder
from simworld.models.checkpoint import holds_encoder, shipped

LEAST = {
    "slots_billiards": 0.85,
    "slots_springs": 0.75,
    "slots_collisions": 0.7,
}  # adjusted Rand index of foregrounds on three episodes that none was chosen by
NAMES = [name for name, path in shipped(".safetensors").items() if holds_encoder(path)]


@pytest.mark.parametrize("name", NAMES)
def test_bodies_of_unseen_films_are_parted(name):
    encoder = load_encoder(name)
    assert isinstance(encoder, SlotAttention)
    seeds = [[2032, 2, number] for number in range(3)]
    world = GENERATORS[encoder.provenance["dataset"]]
    episodes = world.make(seeds, num_steps=24)
    films = [world.stage.film(path, encoder.image_size) for path in episodes]
    found = figures(encoder, films)
    assert found["foreground_ari"] > LEAST[name.rpartition("_")[0]]
    torch.manual_seed(0)
    untrained = figures(SlotAttention(**encoder.arguments), films)
    assert found["foreground_ari"] > untrained["foreground_ari"] + 0.05
