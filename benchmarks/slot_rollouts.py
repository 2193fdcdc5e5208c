"""Draw what slots show that were rolled out from films, beside the films: benchmarks/slots/rollouts_*.png.

    python benchmarks/slot_rollouts.py --world billiards --episodes 0 1

Of each of these test episodes a picture: the film from the branch frame on, what the encoder's slots of the same frames
show, and what slots show that Causal-JEPA of each |M| rolled out from the branch frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from simworld.bench.rows import episodes_of
from simworld.bench.slot_exam import BRANCH, HORIZONS, SEEDS, dataset_of
from simworld.bench.slot_films import HISTORY
from simworld.bench.slots import FILMS, encoder_of, models_of_world
from simworld.data.generate import GENERATORS, Film
from simworld.models import CausalJEPA, SlotAttention
from simworld.simulate import rollout
from simworld.view_slots import draw_rollouts


def main() -> None:
    """Draw the pictures and say of whom their rows are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="billiards", choices=list(SEEDS))
    parser.add_argument("--episodes", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/slots"))
    said = parser.parse_args()
    found = models_of_world(said.world)[FILMS]
    models = {title: several[0] for title, several in found.items() if isinstance(several[0], CausalJEPA)}
    encoder = encoder_of(next(iter(models.values())))
    assert isinstance(encoder, SlotAttention)
    stage = GENERATORS[dataset_of(said.world)].stage
    assert stage is not None
    episodes = episodes_of(dataset_of(said.world), SEEDS[said.world], max(said.episodes) + 1)
    length = max(HORIZONS) + 1
    for number in said.episodes:
        view = Film(size=encoder.image_size).take(stage, episodes[number], [])
        seen = encoder.encode(view.rgb, history=HISTORY)
        start = seen.frame(BRANCH - HISTORY)
        rows = [seen["slots"][BRANCH - HISTORY :][:length]]
        with torch.no_grad():
            for model in models.values():
                rows.append(rollout(start, simulator=model, num_steps=length - 1)["slots"])
        path = said.out / f"rollouts_{said.world}_{number}.png"
        draw_rollouts(encoder, view.window(BRANCH, BRANCH + length), rows, path)
        print(f"{path}: the film; its slots; {'; '.join(models)}")


if __name__ == "__main__":
    main()
