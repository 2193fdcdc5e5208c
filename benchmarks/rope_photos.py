"""A real rope: trained splats of it, four photographs, and how well pictures and poses of it are met.

    python benchmarks/rope_photos.py gs_dynamics_rope --json benchmarks/results/rope_photos.json

The folder holds what robo-alex/gs-dynamics (MIT) publishes of one rope: photographs, masks, cameras and splats, which
were centred and turned when they were exported. Figures are PSNR [dB] within the masks, all before black: of the splats
as they are, of the same bound to 100 particles of a rope at rest and posed, and after a pose was found from the
photographs alone that had been put off by 3 cm and 10 degrees.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from simworld.bench import result
from simworld.kinds import ObjectState
from simworld.metrics import Row
from simworld.picture_metrics import split_errors
from simworld.render import Camera, Photos, bind, moved, pose, read_splats
from simworld.render.recover import recover

UPRIGHT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # undoes the turn of the export
OFF, TURN = torch.tensor([0.02, -0.02, 0.01]), 10.0  # m, degrees
BLACK = (0.0, 0.0, 0.0)


def read(folder: Path):
    """Return the splats in the photographs' frame, and the photographs with their masks as opacities."""
    turns, places, lenses, centre = (
        torch.from_numpy(np.load(folder / f"{name}.npy")).float()
        for name in ("R_list", "t_list", "intr_list", "splat_mean_recovered")
    )
    from PIL import Image

    splats = moved(read_splats(folder / "gs_orig.splat"), UPRIGHT, centre)
    images, cameras = [], []
    for k, (turn, place, lens) in enumerate(zip(turns, places, lenses, strict=True)):
        color, mask = (
            np.array(Image.open(folder / f"{n}_{k}.png").convert(m)) for n, m in (("img", "RGB"), ("mask", "L"))
        )
        images.append(torch.from_numpy(np.concatenate([color, 255 * (mask > 127)[..., None].astype("u1")], 2)))
        viewmat = torch.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = turn.T, -turn.T @ place
        cameras.append(Camera(viewmat=viewmat, K=lens, width=color.shape[1], height=color.shape[0]))
    return splats, Photos(images=tuple(images), cameras=tuple(cameras), names=tuple(f"photo {k}" for k in range(4)))


def particles(splats, count: int) -> ObjectState:
    """Return particles spread over the splats, each as far from those before as can be."""
    chosen = [0]
    away = (splats.means - splats.means[0]).norm(dim=1)
    for _ in range(count - 1):
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (splats.means - splats.means[chosen[-1]]).norm(dim=1))
    places = splats.means[chosen]
    return ObjectState(positions=places, velocities=torch.zeros_like(places))


def body(splats) -> ObjectState:
    """Return the whole as one body."""
    place, still = splats.means.mean(0, keepdim=True), torch.zeros(1, 3)
    upright = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    return ObjectState(positions=place, velocities=still, quats=upright, angular_velocities=still.clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    splats, photos = read(given.folder)
    rope = particles(splats, 100)
    whole, half = body(splats), math.radians(TURN) / 2
    binding = bind(splats, whole, mode="rigid")
    off = torch.tensor([[math.cos(half), 0.0, 0.0, math.sin(half)]])
    guess = whole.replace(positions=whole.positions + OFF, quats=off)
    film = torch.stack([photos.picture(k, torch.zeros(3)) for k in range(len(photos))])[None]
    found = recover(binding, guess, film, photos.cameras, dt=1.0, background=BLACK).initial
    states = {
        "as trained": splats,
        "bound to particles, at rest": pose(bind(splats, rope), rope),
        "put off": pose(binding, guess),
        "found again": pose(binding, found),
    }
    rows = []
    for name, state in states.items():
        errors = split_errors(state, splats, photos, background=BLACK)
        for k, value in enumerate(errors.whole.tolist()):
            print(f"{name}: photo {k}: {value:.2f} dB")
            rows.append(row(name, f"masked_psnr_photo_{k}", value, "dB"))
    for name, state in (("put off", guess), ("found again", found)):
        away = float((state.positions - whole.positions).norm())
        cosine = torch.nn.functional.normalize(state.quats.double(), dim=1)[
            0, 0
        ]  # of half the angle: at rest 1, 0, 0, 0
        angle = 2 * math.degrees(math.acos(min(1.0, abs(float(cosine)))))
        print(f"{name}: {1000 * away:.2f} mm, {angle:.2f} degrees from the published pose")
        rows += [row(name, "position_error", away, "m"), row(name, "angle_error", angle, "degree")]
    if given.json:
        given.json.write_text(json.dumps(result(rows), indent=1) + "\n")


def row(model: str, metric: str, value: float, unit: str) -> Row:
    return Row(
        model=model, dataset="gs_dynamics_rope", metric=metric, horizon=0, value=value, unit=unit, trajectories=1
    )


if __name__ == "__main__":
    main()
