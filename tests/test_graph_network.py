from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from backends import EVERY, TRITON
from torch import Tensor

from simworld.kernels import captured, neighbor_pairs
from simworld.kernels.graph_block import (
    Connections,
    PerceptronWeights,
    graph_block,
    graph_block_reference,
)
from simworld.models.graph_network import EncodeProcessDecode
from simworld.models.partition import parts_of

FAST = ["blocks", "warp"]
IN_PLACE = [*FAST, TRITON]


def connect(senders: list[int], receivers: list[int], count: int) -> Connections:
    order = sorted(range(len(senders)), key=lambda k: receivers[k])
    ends = torch.tensor([[senders[k], receivers[k]] for k in order], dtype=torch.int64).view(-1, 2)
    starts = torch.searchsorted(ends[:, 1].contiguous(), torch.arange(count))
    return Connections(senders=ends[:, 0].contiguous(), receivers=ends[:, 1].contiguous(), starts=starts)


def random_graph(count: int, edges: int, seed: int = 0) -> Connections:
    ends = torch.randint(count, (2, edges), generator=torch.Generator().manual_seed(seed))
    return connect(*ends.tolist(), count)


GRAPHS = {
    "random": random_graph(12, 50),
    "first and last alone": connect([5, 6, 6, 2], [2, 2, 7, 7], 10),
    "one receives all": connect(list(range(9)) * 3, [4] * 27, 9),
    "no edges": connect([], [], 6),
}


def weights(*sizes: int) -> PerceptronWeights:
    return PerceptronWeights(
        weights=tuple(torch.randn(b, a).double() / a**0.5 for a, b in pairwise(sizes)),
        biases=tuple(torch.randn(b).double() for b in sizes[1:]),
        scale=1 + torch.randn(sizes[-1]).double() / 2,
        shift=torch.randn(sizes[-1]).double(),
    )


def flat(network: PerceptronWeights) -> list[Tensor]:
    return [*network.weights, *network.biases, network.scale, network.shift]


@pytest.fixture
def problem():
    """Makes nodes, edge latents and networks, two sets of edges, all asking for gradients."""

    def make(graph: Connections, *, latent=6, hidden=(5, 7), second: Connections | None = None):
        torch.manual_seed(1)
        graphs = [graph] if second is None else [graph, second]
        nodes = torch.randn(len(graph.starts), latent).double()
        latents = [torch.randn(len(each.senders), latent).double() for each in graphs]
        edge_networks = [weights(3 * latent, *hidden, latent) for _ in graphs]
        node_network = weights((1 + len(graphs)) * latent, *hidden, latent)
        leaves = [nodes, *latents, *(t for each in (*edge_networks, node_network) for t in flat(each))]
        for leaf in leaves:
            leaf.requires_grad_()
        return (nodes, latents, graphs, edge_networks, node_network), leaves

    return make


def compare(arguments, leaves, *, twice: bool = False, **how):
    """Compare values and the gradients of every leaf with the definition's; `twice` uses edges again."""

    def passed(block):
        nodes, latents = block(*arguments)
        return block(nodes, latents, *arguments[2:]) if twice else (nodes, latents)

    wanted_nodes, wanted = passed(graph_block_reference)
    found_nodes, found = passed(lambda *given: graph_block(*given, **how))
    torch.testing.assert_close([found_nodes, *found], [wanted_nodes, *wanted])
    for outputs, references in (([found_nodes], [wanted_nodes]), ([found_nodes, *found], [wanted_nodes, *wanted])):
        sides = []
        for side in (outputs, references):
            loss = sum((torch.linspace(0, 9, t.numel()).view_as(t).sin() * t).sum() for t in side)
            given = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            sides.append(given)
        assert max(t.abs().max() for t in sides[1] if t.numel()) > 0.1
        torch.testing.assert_close(*sides)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("backend", EVERY)
def test_backends_agree_with_the_definition(problem, backend, graph):
    compare(*problem(graph), backend=backend, twice=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 7, 27])
def test_blocks_may_be_cut_anywhere(problem, backend, recompute, size):
    """A receiver with more edges than a block has, and blocks with several receivers."""
    for graph in (GRAPHS["one receives all"], GRAPHS["random"]):
        compare(*problem(graph), backend=backend, recompute=recompute, edges_at_once=size, twice=True)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("hidden", [(4,), (8, 3, 5)])
def test_any_number_of_hidden_layers(problem, backend, hidden):
    compare(*problem(GRAPHS["random"], hidden=hidden), backend=backend)


@pytest.mark.parametrize("backend", EVERY)
def test_edge_sets_have_networks_of_their_own(problem, backend):
    compare(*problem(GRAPHS["random"], second=random_graph(12, 9, seed=5)), backend=backend, twice=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_finite_differences(problem, backend, recompute):
    (nodes, latents, graphs, networks, node_network), _ = problem(random_graph(4, 7), latent=2, hidden=(3,))

    def block(nodes, latents, *parts):
        network = PerceptronWeights(parts[:2], parts[2:4], *parts[4:])
        return graph_block(
            nodes, [latents], graphs, [network], node_network, backend=backend, recompute=recompute, edges_at_once=3
        )[0]

    assert torch.autograd.gradcheck(block, (nodes, latents[0], *flat(networks[0])))


@pytest.mark.parametrize("backend", EVERY)
def test_without_gradients_values_are_the_same_and_inputs_stay(problem, backend):
    arguments, leaves = problem(GRAPHS["random"])
    before = [leaf.detach().clone() for leaf in leaves]
    with_gradients = graph_block(*arguments, backend=backend, edges_at_once=8)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            without = graph_block(*arguments, backend=backend, edges_at_once=8)
            assert torch.equal(without[0], with_gradients[0])
            assert torch.equal(without[1][0], with_gradients[1][0])
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("backend", IN_PLACE)
def test_in_place_writes_over_the_edge_latents(problem, backend):
    arguments, _ = problem(GRAPHS["random"])
    with pytest.raises(ValueError, match="no_grad"):
        graph_block(*arguments, backend=backend, in_place=True)
    with torch.no_grad():
        wanted = graph_block_reference(*arguments)
        found = graph_block(*arguments, backend=backend, in_place=True)
    torch.testing.assert_close(found, wanted)
    assert found[1][0].data_ptr() == arguments[1][0].data_ptr()


def test_unknown_backends_and_missing_norms_are_named(problem):
    arguments, _ = problem(GRAPHS["random"])
    with pytest.raises(ValueError, match="blocks, warp, triton, scatter, torch; got 'cuda'"):
        graph_block(*arguments, backend="cuda")
    with pytest.raises(ValueError, match="cuda"):
        EncodeProcessDecode(3, 2, 2, backend="cuda")
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1; got 0"):
        EncodeProcessDecode(3, 2, 2, num_hidden_layers=0)
    nodes, latents, graphs, networks, node_network = arguments
    plain = [networks[0]._replace(scale=None, shift=None)]
    with pytest.raises(ValueError, match="layer norm"):
        graph_block(nodes, latents, graphs, plain, node_network, backend="blocks")
    found, wanted = (graph_block(nodes, latents, graphs, plain, node_network, backend=b)[0] for b in (None, "torch"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", EVERY)
def test_single_precision_is_close_enough(backend):
    """Blocks longer than the library's own thresholds, in the precision models run in."""
    torch.manual_seed(0)
    graph, model = random_graph(300, 4000), EncodeProcessDecode(4, 3, 2, latent_size=32, num_message_passing_steps=3)
    nodes, edges = torch.randn(300, 4), torch.randn(4000, 3)
    sides = []
    for name in (backend, "torch"):
        model.backend = name
        found = model(nodes, edges, graph)
        sides.append((found, torch.autograd.grad(found.square().mean(), list(model.parameters()))))
    torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-5)


@pytest.fixture
def network():
    def make(edge_inputs=3, **arguments) -> EncodeProcessDecode:
        torch.manual_seed(0)
        given = {"latent_size": 8, "num_message_passing_steps": 3, **arguments}
        return EncodeProcessDecode(4, edge_inputs, 2, **given).double()

    return make


def test_parameters_are_as_many_as_published():
    model = EncodeProcessDecode(30, 3, 2, latent_size=128, num_message_passing_steps=10, num_hidden_layers=2)
    assert sum(p.numel() for p in model.parameters()) == 1_591_682


@pytest.mark.parametrize("backend", EVERY)
def test_one_checkpoint_serves_every_backend(network, backend):
    torch.manual_seed(3)
    graph, nodes, edges = GRAPHS["random"], torch.randn(12, 4).double(), torch.randn(50, 3).double()
    saved = network()
    loaded = network(backend=backend, recompute=True, edges_at_once=9)
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)
    loaded.load_state_dict(saved.state_dict())
    saved.backend = "torch"
    torch.testing.assert_close(loaded(nodes, edges, graph), saved(nodes, edges, graph))


@pytest.mark.parametrize("backend", EVERY)
def test_model_without_gradients_gives_the_same(network, backend):
    """Also where the encoders go through the rows in portions."""
    torch.manual_seed(4)
    graph, nodes, edges = random_graph(20, 9000), torch.randn(20, 4).double(), torch.randn(9000, 3).double()
    model, kept = network(backend=backend), edges.clone()
    wanted = model(nodes, edges, graph)
    with torch.no_grad():
        torch.testing.assert_close(model(nodes, edges, graph), wanted)
    assert torch.equal(edges, kept)


@pytest.mark.parametrize("backend", EVERY)
def test_the_order_of_nodes_and_edges_does_not_matter(network, backend):
    torch.manual_seed(5)
    graph, nodes, edges = GRAPHS["random"], torch.randn(12, 4).double(), torch.randn(50, 3).double()
    model = network(backend=backend, edges_at_once=16)
    order = torch.randperm(12)
    place = order.argsort()  # where each node goes
    shuffle = torch.randperm(50)
    rows = shuffle[torch.sort(place[graph.receivers[shuffle]], stable=True).indices]
    moved = connect(place[graph.senders[rows]].tolist(), place[graph.receivers[rows]].tolist(), 12)
    torch.testing.assert_close(model(nodes[order], edges[rows], moved), model(nodes, edges, graph)[order])


@pytest.mark.parametrize("backend", EVERY)
def test_a_change_reaches_as_far_as_there_are_rounds(network, backend):
    torch.manual_seed(6)
    chain = connect(list(range(9)), list(range(1, 10)), 10)
    nodes, edges, model = torch.randn(10, 4).double(), torch.randn(9, 3).double(), network(backend=backend)
    changed = nodes.clone()
    changed[0] += 1
    differs = (model(changed, edges, chain) != model(nodes, edges, chain)).any(1)
    assert differs.tolist() == [True] * 4 + [False] * 6


def test_messages_are_summed_before_they_are_added_to_edges(network):
    """By hand, from the parameters: two nodes, one edge, one round."""
    model = network(num_message_passing_steps=1, num_hidden_layers=1)
    nodes, edges = torch.randn(2, 4).double(), torch.randn(1, 3).double()

    def run(perceptron, *inputs):
        first, last = perceptron.layers
        hidden = (torch.cat(inputs) @ first.weight.T + first.bias).clamp(min=0)
        outputs = last(hidden)
        return outputs if perceptron.norm is None else perceptron.norm(outputs)

    (block,) = model.blocks
    sender, receiver = (run(model.node_encoder, row) for row in nodes)
    edge = run(model.edge_encoders[0], edges[0])
    message = run(block.edge_networks[0], receiver, sender, edge)
    outputs = [
        run(model.decoder, node + run(block.node_network, node, heard))
        for node, heard in ((sender, torch.zeros_like(message)), (receiver, message))
    ]
    torch.testing.assert_close(model(nodes, edges, connect([0], [1], 2)), torch.stack(outputs))


def test_edge_sets_must_match(network):
    model = network(edge_inputs=[3, 2])
    graph, other = GRAPHS["random"], random_graph(12, 9)
    nodes, features = torch.randn(12, 4).double(), [torch.randn(50, 3).double(), torch.randn(9, 2).double()]
    assert model(nodes, features, [graph, other]).shape == (12, 2)
    with pytest.raises(ValueError, match="has 2 edge sets; got features of 1 and edges of 1"):
        model(nodes, features[0], graph)


def test_found_neighbours_are_one_edge_set(network):
    torch.manual_seed(7)
    found = neighbor_pairs(torch.rand(12, 2), 0.4)
    nodes, edges, model = torch.randn(12, 4).double(), torch.randn(len(found.senders), 3).double(), network()
    assert torch.equal(model(nodes, edges, found), model(nodes, [edges], [found]))


@pytest.mark.parametrize("size", [1, 5, 11, 12])
@pytest.mark.parametrize("backend", ["blocks", "torch"])
def test_parts_with_a_halo_give_what_the_whole_graph_gives(size, backend):
    torch.manual_seed(0)
    network = EncodeProcessDecode(3, [2, 1], 2, 8, 3, backend=backend).double()
    ring = list(range(12))
    sets = [connect(ring + ring, [(k + 1) % 12 for k in ring] + [(k - 1) % 12 for k in ring], 12), random_graph(12, 4)]
    nodes = torch.randn(12, 3).double()
    features = [torch.randn(len(each.senders), k).double() for each, k in zip(sets, (2, 1), strict=True)]
    with torch.no_grad():
        whole = network(nodes, features, sets)
        network.nodes_at_once = size
        assert torch.allclose(network(nodes, features, sets), whole, atol=1e-12)
        assert torch.allclose(network(nodes, features, sets, torch.randperm(12)), whole, atol=1e-12)
    assert torch.allclose(network(nodes, features, sets), whole, atol=1e-12)  # gradients are of the whole


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_parts_of_no_nodes_are_refused(size):
    network, ring = EncodeProcessDecode(3, [2], 2, 8, 1), list(range(12))
    network.nodes_at_once = size
    edges = connect(ring, [(k + 1) % 12 for k in ring], 12)
    with torch.no_grad(), pytest.raises(ValueError, match="nodes_at_once must be a whole number, 1 or more"):
        network(torch.randn(12, 3), [torch.randn(12, 2)], [edges])


def test_a_part_holds_no_more_than_its_halo():
    count = 100
    line = list(range(count - 1))
    chain = connect(line + [k + 1 for k in line], [k + 1 for k in line] + line, count)
    parts = list(parts_of([chain], torch.arange(count), 10, 3))
    assert [len(part.nodes) for part in parts] == [13, *[16] * 8, 13]
    assert torch.equal(torch.cat([part.nodes[part.own] for part in parts]), torch.arange(count))
    for part in parts:
        assert len(part.edges[0]) == 2 * (len(part.nodes) - 1)
        assert (part.connections[0].receivers.diff() >= 0).all()


MANY = [50, 60, 300, 190, 10, 0, 40]


@pytest.mark.parametrize("backend", EVERY)
def test_what_is_recorded_goes_on_as_edges_come_and_go(monkeypatch, backend):
    check_recordings(monkeypatch, backend, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_is_recorded_on_cuda_goes_on_as_edges_come_and_go(monkeypatch):
    for backend in (None, "blocks", "warp", "torch"):
        with monkeypatch.context() as patches:
            check_recordings(patches, backend, "cuda")


def check_recordings(monkeypatch, backend, device):
    made = []
    record = captured._recorded
    monkeypatch.setattr(captured, "_recorded", lambda *given: made.append(given) or record(*given))
    torch.manual_seed(8)
    network = EncodeProcessDecode(3, [2, 1], 2, 8, 3, backend=backend).to(device)
    with torch.no_grad():
        for count in MANY:
            sets = [random_graph(12, count), random_graph(12, 4)]
            sets = [Connections(**{name: end.to(device) for name, end in vars(each).items()}) for each in sets]
            nodes = torch.randn(12, 3, device=device)
            features = [torch.randn(len(e.senders), k, device=device) for e, k in zip(sets, (2, 1), strict=True)]
            network.capture = False
            wanted = network(nodes, features, sets)
            network.capture = True
            found = network(nodes, features, sets)
            torch.testing.assert_close(found, wanted)
            next(network.parameters()).mul_(1.1)  # in place, where the recording reads it
        assert len(made) == 3  # 50, 300 and 10: the others have room enough, and not too much
        torch.testing.assert_close(copy.deepcopy(network)(nodes, features, sets), network(nodes, features, sets))
        network.double()
        doubled = nodes.double(), [each.double() for each in features], sets
        with torch.inference_mode():
            network(*doubled)
        network(*doubled)
    assert len(made) == 6  # that of the copy, of parameters elsewhere, and of what inference mode does not lend


@pytest.mark.parametrize("backend", ["torch", "blocks"])
def test_what_is_recorded_reads_no_value(backend):
    """On CUDA that would wait for the GPU, which a recording cannot; tensors on "meta" have none to be read."""
    graph, network = random_graph(12, 5000), EncodeProcessDecode(3, 2, 2, 8, 3, backend=backend).to("meta")
    ends = {name: end.to("meta") for name, end in vars(graph).items()}
    nodes, edges = (torch.empty(count, size, device="meta") for count, size in ((12, 3), (5000, 2)))
    with torch.no_grad():
        network.edges_at_once = 2**13
        assert network._outputs(nodes, [edges], [Connections(**ends)]).shape == (12, 2)
        network.edges_at_once = 2**12  # several blocks are cut where receivers say
        if backend == "blocks":
            with pytest.raises(NotImplementedError, match="no data"):
                network._outputs(nodes, [edges], [Connections(**ends)])


def test_large_edge_sets_and_contexts_are_not_recorded(monkeypatch):
    monkeypatch.setattr(captured, "_recorded", lambda *given: pytest.fail("it is recorded"))
    graph, nodes, edges = random_graph(12, 50), torch.randn(12, 3), torch.randn(50, 2)
    large = EncodeProcessDecode(3, 2, 2, 8, 3, capture=True, edges_at_once=60)
    told = EncodeProcessDecode(3, 2, 2, 8, 3, capture=True, num_contexts=1)
    assert large(nodes, edges, graph).requires_grad
    with torch.no_grad():
        large(nodes, edges, graph)
        with pytest.raises(ValueError, match="set capture to False"):
            told(nodes, edges, graph)
