"""Train the models of `simworld bench slots`: Causal-JEPA for several |M|, without interactions, and what it is beside.

    python benchmarks/train_slots.py --worlds billiards springs --seeds 0 1 2 --masked 0 1 2 3 4
    python benchmarks/train_slots.py --worlds push_t --seeds 0 1 2 --masked 0 1 --kinds masked
    python benchmarks/train_slots.py --worlds push_t --seeds 0 --kinds alone own
    python benchmarks/train_slots.py --worlds billiards --seeds 0 --masked 0 2 4 --kinds films films_alone latent code

Runs one training after the other, from the run files in datasets/; what is done is skipped, what was interrupted goes
on. Data must be in data/video_billiards, data/video_springs and data/push_t (`simworld generate`), slots of films in
data/slots_billiards (`simworld encode`). Checkpoints are copied to --ship under the names by which the benchmark finds
them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path

from simworld.bench.slot_exam import dataset_of
from simworld.runs import read_run, start
from simworld.train_encoder import is_encoder_run, read_encoder_run, start_encoder

NAMES = {
    "masked": "jepa_{world}_m{masked}_{seed}",
    "long": "jepa_{world}_long_m{masked}_{seed}",
    "alone": "jepa_{world}_alone_{seed}",
    "own": "jepa_{world}_own_{seed}",
    "states": "in_{world}_{seed}",
    "films": "jepa_{world}_films_m{masked}_{seed}",
    "films_alone": "jepa_{world}_films_alone_{seed}",
    "latent": "latent_{world}_{seed}",
    "code": "jepa_{world}_code_{code}_{seed}",
}
FILES = {
    "states": "train_states.toml",
    "films": "train_jepa_films.toml",
    "films_alone": "train_jepa_films.toml",
    "latent": "train_latent.toml",
}
SWEPT = ("masked", "long", "films")  # kinds of which there is one for each |M|
LONGER = 4  # times as many steps as the run file says
CODE = {
    "same_masks": [("[loss]", "same_mask_every_batch = true")],
    "anchor": [("[loss]", "loss_on_anchor = true")],
    "exactly": [("[loss]", "exactly = true")],
    "unnormed": [("[arguments]", "norm_before_attention = false")],
    "wide": [("head_size = 12", "head_size = 96")],
    "slots": [('readout = "motion"', 'readout = "slots"')],
}
"""What is changed in the run file: a line below a table's head, or one in the place of another."""
CODE["all"] = [edit for name in ("same_masks", "anchor", "exactly", "unnormed") for edit in CODE[name]]
Job = tuple[str, str, int, int, str]


def jobs(worlds: list[str], seeds: list[int], masked: list[int], kinds: list[str]) -> list[Job]:
    """Return (kind, world, |M|, seed, variant), all of one seed first, so that an early end has whole seeds."""
    found = []
    for seed in seeds:
        for world in worlds:
            for kind in kinds:
                counts = masked if kind in SWEPT else [2 if kind == "code" else 0]
                found += [(kind, world, count, seed, code) for count in counts for code in _codes(kind)]
    return found


def _codes(kind: str) -> list[str]:
    return list(CODE) if kind == "code" else [""]


def run_text(kind: str, world: str, masked: int, code: str = "") -> str:
    """Return the run file of a job: that of the world, with another |M|, without interactions, or a variant."""
    name = FILES.get(kind, "train_jepa.toml")
    text = (Path("datasets") / dataset_of(world) / name).read_text(encoding="utf-8")
    if kind not in ("states", "latent"):
        text, count = re.subn(r"^max_masked = \d+", f"max_masked = {masked}", text, flags=re.MULTILINE)
        assert count == 1, "the run file says max_masked once"
    if kind == "long":
        text = re.sub(r"(\[fit\]\nnum_steps = )(\d+)", lambda found: f"{found[1]}{LONGER * int(found[2])}", text)
    if kind in ("alone", "films_alone"):
        text = text.replace("[arguments]\n", "[arguments]\ninteractions = false\n")
    if kind == "own":  # body 0 acts, and what it knows of itself is told beside slots
        text, count = re.subn(r"^(\[slots\].*\n)", r"\1actor = 0\n", text, flags=re.MULTILINE)
        assert count == 1, "the run file has a table [slots]"
    for place, line in CODE.get(code, []):
        assert text.count(place) == 1, f"the run file says {place} once"
        text = text.replace(place, f"{place}\n{line}" if place.startswith("[") else line)
    return text


def train(kind: str, world: str, masked: int, seed: int, code: str, ship: Path) -> None:
    """Train one model, unless it is there, and copy its checkpoint to where it is looked for."""
    name = NAMES[kind].format(world=world, masked=masked, seed=seed, code=code)
    target = ship / f"{name}.safetensors"
    if target.is_file():
        print(f"{name}: is there", flush=True)
        return
    out = Path("runs/slots") / name
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.toml"
    path.write_text(run_text(kind, world, masked, code), encoding="utf-8")
    began, cpu = time.time(), time.process_time()

    def watch(told: object) -> None:
        print(f"{name}: {told}", flush=True)

    if is_encoder_run(path):
        start_encoder(read_encoder_run(path, seed=seed, out=out), watch=watch)
    else:
        start(read_run(path, seed=seed, out=out), watch=lambda told: watch(f"step {told.step}, loss {told.loss:.4g}"))
    shutil.copyfile(out / "model.safetensors", partial := target.with_suffix(".partial"))
    partial.rename(target)
    print(f"{name}: {time.time() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU", flush=True)


def main() -> None:
    """Train what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=["billiards", "springs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--masked", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=list(NAMES), default=["masked", "alone", "states"])
    parser.add_argument("--ship", type=Path, default=Path("simworld/assets"))
    said = parser.parse_args()
    for job in jobs(said.worlds, said.seeds, said.masked, said.kinds):
        train(*job, said.ship)


if __name__ == "__main__":
    main()
