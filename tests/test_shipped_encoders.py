"""Shipped encoders part the bodies of unseen films, or tell what their embedding will be."""

from __future__ import annotations

import pytest
import torch

from simworld.data.generate import GENERATORS
from simworld.encode import check_not_collapsed, figures
from simworld.metrics import Static
from simworld.models import LatentWorld, SlotAttention, load_encoder
from simworld.models.checkpoint import holds_encoder, shipped

LEAST = {
    "slots_billiards": 0.85,
    "slots_springs": 0.75,
    "slots_collisions": 0.7,
}  # adjusted Rand index of foregrounds on three episodes that none was chosen by
ENCODERS = {name: load_encoder(name) for name, path in shipped(".safetensors").items() if holds_encoder(path)}
PARTING, WHOLE = ([name for name, one in ENCODERS.items() if isinstance(one, k)] for k in (SlotAttention, LatentWorld))


@pytest.mark.parametrize("name", PARTING)
def test_bodies_of_unseen_films_are_parted(name):
    encoder = ENCODERS[name]
    seeds = [[2032, 2, number] for number in range(3)]
    world = GENERATORS[encoder.provenance["dataset"]]
    episodes = world.make(seeds, num_steps=24)
    films = [world.stage.film(path, encoder.image_size) for path in episodes]
    found = figures(encoder, films)
    assert found["foreground_ari"] > LEAST[name.rpartition("_")[0]]
    torch.manual_seed(0)
    untrained = figures(SlotAttention(**encoder.arguments), films)
    assert found["foreground_ari"] > untrained["foreground_ari"] + 0.05


@pytest.mark.parametrize("name", WHOLE)
def test_embeddings_have_not_collapsed_and_are_foretold(name):
    encoder = ENCODERS[name]
    world = GENERATORS[encoder.provenance["dataset"]]
    films = [
        world.stage.film(path, encoder.image_size)
        for path in world.make([[2032, 2, number] for number in range(3)], num_steps=24)
    ]
    encoded = [encoder.encode(view.rgb, history=encoder.history_length - 1) for view in films]
    check_not_collapsed(name, encoded)

    def missed(simulator):
        with torch.no_grad():
            return sum(
                float(
                    (simulator.step(path.window(0, len(path) - 1).as_scenes()).slots - path["slots"][1:, 0])
                    .square()
                    .mean()
                )
                for path in encoded
            )

    assert missed(encoder) < missed(Static(dt=encoder.dt))
