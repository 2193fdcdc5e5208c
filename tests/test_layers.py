"""The order of imports that keeps the library a stack of layers, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "simworld"
ORDER = [
    "quaternions",
    "kernels",
    "extras",
    "saving",
    "fields",
    "state",
    "kinds",
    "space",
    "trajectory",
    "graph",
    "simulate",
    "expressions",
    "intervene",
    "replacements",
    "prescriptions",
    "intervention_tables",
    "abduction",
    "physics",
    "models",
    "worlds",
    "render",
    "data",
    "metrics",
    "particle_metrics",
    "picture_metrics",
    "events",
    "causal_metrics",
    "slot_metrics",
    "encode",
    "scene",
    "losses",
    "train",
    "train_encoder",
    "runs",
    "scene_fits",
    "questions",
    "tellers",
    "query",
    "planning",
    "bench",
    "view_meshes",
    "view",
    "view_scene",
    "view_films",
    "view_slots",
    "demo",
    "testing",
    "screen",
    "cli_scenes",
    "cli_queries",
    "cli_causes",
    "cli_films",
    "cli_encoders",
    "cli",
]


def layer(module: str) -> int | None:
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[0] == "simworld" else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_modules_import_only_higher_ones(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            names = [node.module or ""] if node.module != "simworld" else [f"simworld.{a.name}" for a in node.names]
            for name in names:
                other = layer(name)
                assert other is None or other <= ORDER.index(own), f"{path.name} imports {name}, which lies below it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 50, f"{node.name} is {node.end_lineno - first.lineno} lines long"


def test_importing_is_light():
    heavy = "h5py trimesh warp gsplat open3d pymunk mujoco viser matplotlib PIL lightning_fabric typer torch_geometric"
    code = f"import sys, simworld; print([m for m in {[*heavy.split(), 'triton']} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
