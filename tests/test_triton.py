"""The Triton kernel of message passing where there is no GPU: in Triton's interpreter, and through its compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_graph_network import GRAPHS, weights

from simworld.kernels import graph_block as module
from simworld.kernels.graph_block import graph_block

INSTALLED = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FILES = ("triton_interpreted.py", "test_graph_network.py", "test_gns.py")


@INSTALLED
def test_it_agrees_with_the_definition_in_the_interpreter():
    """Runs what is marked in other files in a process whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "triton", *FILES]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@INSTALLED
@pytest.mark.parametrize("products", ["split", "tf32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(products, capability, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does; this is a small network, in the types that models have."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simworld.kernels.graph_block_triton import _edge_update

    numbers = dict.fromkeys(("latents", "terms", "matrices", "vectors", "updated", "sums"), "*fp32")
    if products == "bf16":
        numbers |= {"matrices": "*bf16"}
    given = numbers | dict.fromkeys(("senders", "receivers", "starts"), "*i64") | {"count": "i32", "num_edges": "i32"}
    sizes = {"LATENT": 12, "HIDDEN": 16, "WIDTH": 16, "LAYERS": 3, "OWNED": 8, "HELD": 16, "EDGES": 64}
    fixed = sizes | {"PRODUCTS": products, "KEPT": products == "bf16", "EPS": 1e-5}
    kinds = {name: given.get(name, "constexpr") for name in _edge_update.arg_names}
    made = triton.compile(
        ASTSource(_edge_update, kinds, fixed),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    assert len(made.asm["cubin"]) > 1000
    kinds_of_products = set(re.findall(r"mma\S*\.(bf16|tf32)\.", made.asm["ptx"]))
    assert kinds_of_products == ({"bf16", "tf32"} if products == "bf16" else {"tf32"})


def example(latent: int = 4):
    nodes, latents = torch.randn(12, latent), torch.randn(50, latent)
    networks = [weights(3 * latent, latent, latent), weights(2 * latent, latent, latent)]
    edge, node = (
        type(n)(*([t.float() for t in part] for part in n[:2]), *(t.float() for t in n[2:])) for n in networks
    )
    return nodes, [latents], [GRAPHS["random"]], [edge], node


@INSTALLED
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="of Triton compiled")
def test_elsewhere_it_says_what_it_is_for(monkeypatch):
    with pytest.raises(ValueError, match="computes on CUDA; got tensors on cpu; leave backend out, or choose 'warp'"):
        graph_block(*example(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="up to 128 outputs, which fit on a chip; got 130"):
        graph_block(*example(130), backend="triton")


def test_without_triton_it_says_so_and_others_are_chosen(monkeypatch):
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    with pytest.raises(ImportError, match="needs triton 3.4 or newer.*pip install triton"):
        graph_block(*example(), backend="triton")
    assert torch.isfinite(graph_block(*example())[0]).all()


@pytest.mark.parametrize(
    ("found", "capability", "dtype", "precision", "latent", "chosen"),
    [
        (True, (9, 0), torch.float32, "high", 16, "triton"),
        (True, (9, 0), torch.float32, "highest", 16, "warp"),
        (True, (8, 0), torch.bfloat16, "highest", 128, "triton"),
        (False, (9, 0), torch.float32, "medium", 16, "warp"),
        (True, (7, 5), torch.float32, "medium", 16, "warp"),
        (True, (9, 0), torch.float64, "medium", 16, "warp"),
        (True, (9, 0), torch.float32, "medium", 130, "warp"),
    ],
)
def test_on_cuda_it_is_chosen_for_what_it_can_do(monkeypatch, found, capability, dtype, precision, latent, chosen):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "_has_triton", lambda: found)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    nodes = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda")
    assert module._chosen(None, nodes, example(latent)[3]) == chosen
