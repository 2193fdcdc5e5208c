"""Makes the tables of object worlds from shipped checkpoints and records them, one file each.

python benchmarks/objects.py [--only springs solar-system]
python benchmarks/objects.py --only cradle --data Cradle_valid.npz
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simworld.bench import BENCHMARKS, OBJECTS, result

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OBJECTS, default=list(OBJECTS))
    parser.add_argument("--data", type=Path, help="recorded data, for one table")
    given = parser.parse_args()
    for name in given.only:
        rows = BENCHMARKS[name](given.data)
        stem = name.replace("-", "_") + ("_recorded" if given.data else "")
        (RESULTS / f"{stem}.json").write_text(json.dumps(result(rows), indent=1) + "\n")
        for row in rows:
            what = f"{row.model:34} {row.dataset:28} {row.metric:24} {row.horizon!s:9}"
            print(f"{name:14} {what} {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    main()
