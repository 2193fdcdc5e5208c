"""Train the models of `simworld bench slots`: Causal-JEPA for several |M|, without interactions, and on true states.

    python benchmarks/train_slots.py --worlds billiards springs --seeds 0 1 2 --masked 0 1 2 3 4

Runs one training after the other, from the run files in datasets/video_*; what is done is skipped, what was
interrupted goes on. Data must be in data/video_billiards and data/video_springs (`simworld generate`). Checkpoints
are copied to --ship under the names by which the benchmark finds them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path

from simworld.runs import read_run, start

NAMES = {
    "masked": "jepa_{world}_m{masked}_{seed}",
    "long": "jepa_{world}_long_m{masked}_{seed}",
    "alone": "jepa_{world}_alone_{seed}",
    "states": "in_{world}_{seed}",
}
LONGER = 4  # times as many steps as the run file says


def jobs(worlds: list[str], seeds: list[int], masked: list[int], kinds: list[str]) -> list[tuple[str, str, int, int]]:
    """Return (kind, world, |M|, seed), all of one seed first, so that an early end has whole seeds."""
    found = []
    for seed in seeds:
        for world in worlds:
            for kind in kinds:
                found += [(kind, world, count, seed) for count in (masked if kind in ("masked", "long") else [0])]
    return found


def run_text(kind: str, world: str, masked: int) -> str:
    """Return the run file of a job: that of the world, with another |M| or without interactions."""
    name = "train_states.toml" if kind == "states" else "train_jepa.toml"
    text = (Path("datasets") / f"video_{world}" / name).read_text(encoding="utf-8")
    if kind != "states":
        text, count = re.subn(r"^max_masked = \d+", f"max_masked = {masked}", text, flags=re.MULTILINE)
        assert count == 1, "the run file says max_masked once"
    if kind == "long":
        text = re.sub(r"(\[fit\]\nnum_steps = )(\d+)", lambda found: f"{found[1]}{LONGER * int(found[2])}", text)
    if kind == "alone":
        text = text.replace("[arguments]\n", "[arguments]\ninteractions = false\n")
    return text


def train(kind: str, world: str, masked: int, seed: int, ship: Path) -> None:
    """Train one model, unless it is there, and copy its checkpoint to where it is looked for."""
    name = NAMES[kind].format(world=world, masked=masked, seed=seed)
    target = ship / f"{name}.safetensors"
    if target.is_file():
        print(f"{name}: is there", flush=True)
        return
    out = Path("runs/slots") / name
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.toml"
    path.write_text(run_text(kind, world, masked), encoding="utf-8")
    began, cpu = time.time(), time.process_time()
    run = read_run(path, seed=seed, out=out)
    model = start(run, watch=lambda told: print(f"{name}: step {told.step}, loss {told.loss:.4g}", flush=True))
    shutil.copyfile(out / "model.safetensors", partial := target.with_suffix(".partial"))
    partial.rename(target)
    spent = f"{time.time() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    print(f"{name}: {model.num_parameters} parameters, {spent}", flush=True)


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
