"""The Triton kernel against the definition, for test_triton, which runs this where Triton interprets."""

from __future__ import annotations

import pytest
import torch
from test_graph_network import GRAPHS, flat, random_graph, weights

from simworld.kernels.graph_block import PerceptronWeights, graph_block, graph_block_reference

# Receivers with more edges than a tile has, with none, and at the ends of what a program owns.
BUSY = random_graph(5, 300)
ROUNDED = 2**-8  # what bfloat16 may be off by, relatively


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def cast(network: PerceptronWeights, dtype: torch.dtype) -> PerceptronWeights:
    values = [t.to(dtype) for t in flat(network)]
    count = len(network.weights)
    return PerceptronWeights(tuple(values[:count]), tuple(values[count:-2]), *values[-2:])


def example(graph, latent: int, num_hidden: int = 2, dtype=torch.float32):
    """Return arguments of a block and all of them that can have gradients."""
    torch.manual_seed(2)
    hidden = [latent] * num_hidden
    networks = [cast(weights(k * latent, *hidden, latent), dtype) for k in (3, 2)]
    nodes, latents = (torch.randn(count, latent).to(dtype) for count in (len(graph.starts), len(graph.senders)))
    leaves = [nodes, latents, *flat(networks[0]), *flat(networks[1])]
    for leaf in leaves:
        leaf.requires_grad_()
    return (nodes, [latents], [graph], networks[:1], networks[1]), leaves


def outcome(block, arguments, leaves, **how):
    """Return node latents, edge latents and gradients of a mixture of all of them, in double precision."""
    nodes, (edges,) = block(*arguments, **how)
    loss = sum((torch.linspace(0, 9, t.numel()).view_as(t).sin() * t.double()).sum() for t in (nodes, edges))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach().double() for t in (nodes, edges, *gradients)]


def off_by(found, wanted) -> float:
    """Return the greatest root-mean-square error, relative to what is wanted."""
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.numel() and b.any()]
    assert pairs
    return max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


def exactly(arguments, leaves):
    """Return the definition's outcome in double precision for the same numbers."""
    _, _, graphs, networks, node_network = arguments
    wide = [t.detach().double().requires_grad_() for t in leaves]
    count = len(flat(networks[0]))
    edge, node = (
        PerceptronWeights(tuple(part[:k]), tuple(part[k:-2]), *part[-2:])
        for part in (wide[2 : 2 + count], wide[2 + count :])
        for k in [len(node_network.weights)]
    )
    return outcome(graph_block_reference, (wide[0], [wide[1]], graphs, [edge], node), wide)


@pytest.mark.parametrize(("latent", "num_hidden"), [(16, 1), (24, 2), (64, 3), (128, 2)])
def test_float32_is_near_the_definition(latent, num_hidden):
    arguments, leaves = example(BUSY, latent, num_hidden)
    assert off_by(outcome(graph_block, arguments, leaves, backend="triton"), exactly(arguments, leaves)) < 1e-5


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_receivers_without_edges_and_no_edges_at_all(graph, dtype):
    arguments, leaves = example(graph, 16, dtype=dtype)
    near = 1e-5 if dtype == torch.float32 else 8 * ROUNDED
    assert off_by(outcome(graph_block, arguments, leaves, backend="triton"), exactly(arguments, leaves)) < near


@pytest.mark.parametrize("latent", [16, 128])
def test_bfloat16_is_near_what_its_numbers_give(latent):
    """All that is stored is rounded, gradients of layers too; the definition in bfloat16 is about as near.

    Gradients of the node network are left out. They are PyTorch's own, and of five nodes they jump, with the definition
    too, where rounding carries a unit across zero.
    """
    arguments, leaves = example(BUSY, latent, dtype=torch.bfloat16)
    own = len(leaves) + 2 - len(flat(arguments[-1]))
    wanted = exactly(arguments, leaves)[:own]
    found = off_by(outcome(graph_block, arguments, leaves, backend="triton")[:own], wanted)
    assert found < 8 * ROUNDED
    assert found < 2 * off_by(outcome(graph_block_reference, arguments, leaves)[:own], wanted)


@pytest.mark.parametrize("latent", [16, 128])
def test_products_of_bfloat16_may_be_asked_for(latent):
    """Their factors are rounded, sums, norms and residuals are not; gradients are those of the exact products."""
    arguments, leaves = example(BUSY, latent)
    wanted = exactly(arguments, leaves)
    torch.set_float32_matmul_precision("medium")
    rounded = outcome(graph_block, arguments, leaves, backend="triton")
    assert 0.1 * ROUNDED < off_by(rounded[:2], wanted[:2]) < 4 * ROUNDED
    torch.set_float32_matmul_precision("highest")
    assert off_by(outcome(graph_block, arguments, leaves, backend="triton"), wanted) < 1e-5
