"""Aggregation and attention against their exact twins: every gradient, what is unbiased, and what is kept."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch_geometric import nn as pyg

from conftest import assert_close, bin_widths, projected, relative_error, tiny_dataset
from iexact_runner.compression.seeds import mix
from iexact_runner.data.graph import attention_edges, edges_of, mean_adjacency, sum_adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.measure import SavedTensors
from iexact_runner.schemes import Activation, Plain, Projected
from iexact_runner.schemes.activation import Kept
from iexact_runner.schemes.aggregation import SpMM
from iexact_runner.schemes.evaluation import Evaluation

EXACT = projected()
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])


@pytest.fixture(params=[1, 1 << 22], ids=["row-chunks", "whole"])
def chunked(request, monkeypatch):
    """Row by row, and all rows at once."""
    monkeypatch.setattr("iexact_runner.schemes.aggregation.CHUNK_ELEMENTS", request.param)


def problem(*, symmetric=True, nodes=61):
    data = tiny_dataset(symmetric=symmetric, nodes=nodes)
    edges = edges_of(data.edge_index, data.num_nodes)
    x = data.x.clone().requires_grad_()
    weight = (0.5 + torch.rand(edges.columns.numel())).requires_grad_()
    return edges, x, weight


def dense(edges, values):
    nodes = edges.offsets.numel() - 1
    matrix = torch.zeros(nodes, nodes)
    return matrix.index_put((edges.rows(), edges.columns.long()), values)


def dense_messages(edges, x, weight):
    """Weighted messages (N, N, D) and which of them exist (N, N, 1)."""
    exists = dense(edges, torch.ones(edges.columns.numel())).bool()
    values = exists.float() if weight is None else dense(edges, weight)
    return values.unsqueeze(-1) * x.unsqueeze(0), exists.unsqueeze(-1)


def dense_extremum(edges, x, weight, maximum):
    messages, exists = dense_messages(edges, x, weight)
    empty = messages.masked_fill(~exists, -math.inf if maximum else math.inf)
    extreme = empty.max(1).values if maximum else empty.min(1).values
    return torch.where(exists.any(1), extreme, 0.0)


def dense_softmax(edges, x, t, semi_grad):
    messages, exists = dense_messages(edges, x, None)
    share = (messages * t).masked_fill(~exists, -math.inf).softmax(1).nan_to_num(0.0)
    return ((share.detach() if semi_grad else share) * messages).sum(1)


def dense_attention(edges, h, att_source, att_target, dropped):
    target = att_source if att_target is None else att_target
    scores = (h * target).sum(-1).unsqueeze(1) + (h * att_source).sum(-1).unsqueeze(0)  # [N, N, H]
    exists = dense(edges, torch.ones(edges.columns.numel())).bool().unsqueeze(-1)
    alpha = F.leaky_relu(scores, 0.2).masked_fill(~exists, -math.inf).softmax(1)
    mask = torch.stack([dense(edges, dropped[:, head]) for head in range(h.size(1))], dim=-1)
    return torch.einsum("ijh,jhc->ihc", alpha * mask, h)


def check(actual, expected, inputs, *, output=1e-5, gradient=1e-5):
    """Outputs and the gradients of all inputs agree."""
    assert_close(actual, expected, tolerance=output)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(ours, theirs, tolerance=gradient)


@SYMMETRIC
def test_mean(symmetric):
    data = tiny_dataset(symmetric=symmetric)
    adjacency = mean_adjacency(data.edge_index, data.num_nodes)
    x = data.x.clone().requires_grad_()
    matrix = adjacency.matrix.tensor().to_dense() * adjacency.row_scale
    check(SpMM.apply(x, adjacency), matrix @ x, (x,))


@SYMMETRIC
@pytest.mark.parametrize(("config", "gradient"), [(EXACT, 1e-5), (projected(bits=8), 0.02)], ids=["fp32", "int8"])
def test_weighted_sum(symmetric, config, gradient):
    edges, x, weight = problem(symmetric=symmetric)
    actual = Projected(config, seed=1).aggregate_weighted(Activation(x, Kept()), weight, edges)
    check(actual, dense(edges, weight) @ x, (x, weight), gradient=gradient)


def test_eight_bits_move_the_gradient_of_a_weight_by_at_most_a_bin_of_its_source():
    edges, x, weight = problem()
    grad = torch.randn(61, 13)
    exact = (grad[edges.rows()] * x[edges.columns]).sum(1)
    out = Projected(projected(bits=8), seed=1).aggregate_weighted(Activation(x, Kept()), weight, edges)
    bound = grad.abs().sum(1)[edges.rows()] * bin_widths(x)[edges.columns, 0]
    assert ((torch.autograd.grad(out, weight, grad)[0] - exact).abs() <= bound + 1e-5).all()


def test_weights_without_gradient_keep_no_map():
    edges, x, weight = problem()
    ops = Projected(projected(bits=2), seed=1)
    fixed = weight.detach()
    with SavedTensors(torch.nn.Identity(), excluded=[fixed]) as saved:
        actual = ops.aggregate_weighted(Activation(x, Kept()), fixed, edges)
        assert saved.kept(actual) == []
    check(actual, dense(edges, fixed) @ x, (x,))


@SYMMETRIC
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("maximum", [True, False], ids=["max", "min"])
def test_extremum(symmetric, weighted, maximum, chunked):
    edges, x, weight = problem(symmetric=symmetric)
    inputs = (x, weight) if weighted else (x,)
    for config, gradient in ((EXACT, 1e-5), (projected(bits=8), 0.02)):
        ops = Projected(config, seed=1)
        actual = ops.aggregate_extremum(x, weight if weighted else None, edges, maximum=maximum)
        expected = dense_extremum(edges, x, weight if weighted else None, maximum)
        check(actual, expected, inputs, gradient=gradient)


@pytest.mark.parametrize("config", [EXACT, projected(bits=1)], ids=["fp32", "int1"])
def test_extremum_is_exact_without_weights_that_need_a_gradient(config):
    edges, x, weight = problem()
    actual = Projected(config, seed=1).aggregate_extremum(x, weight.detach(), edges, maximum=True)
    check(actual, dense_extremum(edges, x, weight.detach(), True), (x,))


@pytest.mark.parametrize(("degree", "bytes_each"), [(256, 1), (257, 2), (32769, 4)])
def test_the_chosen_neighbour_is_kept_in_the_smallest_type(degree, bytes_each):
    matrix = CSR(torch.tensor([0, degree, degree]), torch.arange(degree) % 2)
    x = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)
    with SavedTensors(torch.nn.Identity(), excluded=[]) as saved:
        out = Projected(EXACT, seed=0).aggregate_extremum(x, None, matrix, maximum=True)
        assert [record.bytes for record in saved.kept(out)] == [4 * bytes_each]
    out.sum().backward()
    # The second row is empty; of the equals of the first, one counts.
    assert torch.equal(out, torch.tensor([[2.0, 5.0], [0.0, 0.0]]))
    assert torch.equal(x.grad, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_extremum_of_a_row_with_nan_is_nan():
    matrix = CSR(torch.tensor([0, 2]), torch.tensor([0, 0]))
    x = torch.tensor([[math.nan]], requires_grad=True)
    out = Projected(EXACT, seed=0).aggregate_extremum(x, None, matrix, maximum=True)
    out.sum().backward()
    assert out.isnan().all() and x.grad.isfinite().all()


def aggregate_softmax(config, x, t, adjacency, *, semi_grad, seed=1):
    return Projected(config, seed=seed).aggregate_softmax(Activation(x, Kept()), t, adjacency, semi_grad=semi_grad)


@pytest.fixture(params=["products", "by edges"])
def way(request, monkeypatch):
    """With products of the whole adjacency, and edge by edge, all rows at once and row by row."""
    if request.param == "by edges":
        monkeypatch.setattr("iexact_runner.schemes.softmax.LARGEST_SPREAD", -1.0)
        monkeypatch.setattr("iexact_runner.schemes.softmax.CHUNK_ELEMENTS", 500)
    else:
        monkeypatch.setattr("iexact_runner.schemes.softmax.COLUMNS", 4)


@SYMMETRIC
@pytest.mark.parametrize("semi_grad", [False, True], ids=["full", "semi"])
def test_softmax(symmetric, semi_grad, way):
    edges, x, _ = problem(symmetric=symmetric)
    data = tiny_dataset(symmetric=symmetric, nodes=61)
    adjacency = sum_adjacency(data.edge_index, data.num_nodes)
    for t in (torch.tensor([0.7], requires_grad=True), torch.rand(13, requires_grad=True)):
        inputs = (x,) if semi_grad else (x, t)
        for config, gradient in ((EXACT, 1e-5), (projected(bits=8), 0.02)):
            actual = aggregate_softmax(config, x, t, adjacency, semi_grad=semi_grad)
            check(actual, dense_softmax(edges, x, t, semi_grad), inputs, gradient=gradient)
        plain = Plain(training=True, seed=1).aggregate_softmax(Activation(x, Kept()), t, adjacency, semi_grad=semi_grad)
        check(plain, dense_softmax(edges, x, t, semi_grad), inputs)


@pytest.mark.parametrize("spread", [50.0, 61.0, 1e6])
def test_softmax_of_weights_that_float32_does_not_hold_beside_each_other(spread):
    """A row whose neighbours all lie far below the column's largest entry gathers them all the same."""
    adjacency = sum_adjacency(torch.tensor([[1, 2, 3, 3], [0, 0, 1, 2]]), 4)
    x = torch.tensor([[0.0], [1.0], [2.0], [spread]], requires_grad=True)
    t = torch.ones(1)
    expected = (torch.tensor([1.0, 2.0]).softmax(0) * torch.tensor([1.0, 2.0])).sum()
    for out in (
        aggregate_softmax(EXACT, x, t, adjacency, semi_grad=False),
        Evaluation().aggregate_softmax(Activation(x.detach(), Kept()), t, adjacency, semi_grad=False),
    ):
        assert_close(out.detach(), torch.tensor([[expected], [spread], [spread], [0.0]]))
    (grad,) = torch.autograd.grad(aggregate_softmax(EXACT, x, t, adjacency, semi_grad=True).sum(), x)
    share = torch.tensor([1.0, 2.0]).softmax(0)
    assert_close(grad, torch.tensor([[0.0], [share[0]], [share[1]], [2.0]]))


def attention(ops, h, source, target, edges, **options):
    """Of h (N, H, C)."""
    return ops.attention(h.flatten(1), source, target, edges, negative_slope=0.2, **options).view(h.shape)


@SYMMETRIC
@pytest.mark.parametrize("shared", [False, True], ids=["two-vectors", "one-vector"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention(symmetric, shared, dropout):
    data = tiny_dataset(symmetric=symmetric, nodes=41)
    edges = attention_edges(data.edge_index, data.num_nodes)
    h = torch.randn(41, 3, 7, requires_grad=True)
    vectors = [torch.randn(1, 3, 7, requires_grad=True) for _ in range(1 if shared else 2)]
    for config, gradient in ((EXACT, 2e-5), (projected(bits=8), 0.03)):
        ops = Projected(config, seed=5)
        actual = attention(ops, h, vectors[0], None if shared else vectors[1], edges, dropout=dropout)
        # Dropout draws from the pass's own seed: the same mask on ones.
        ones = torch.ones(edges.columns.numel(), 3)
        dropped = Projected(config, seed=5).dropout(ones, dropout)
        expected = dense_attention(edges, h, vectors[0], None if shared else vectors[1], dropped)
        check(actual, expected, (h, *vectors), gradient=gradient)


def test_eight_bits_move_the_gradient_of_attention_within_its_bound():
    """Off by at most: a score's gradient, alpha (e_j + sum alpha e), with e_j = |g_i| times the bin of node j."""
    data = tiny_dataset(nodes=41)
    edges = attention_edges(data.edge_index, data.num_nodes)
    h = torch.randn(41, 1, 7, requires_grad=True)
    source, target = (torch.randn(1, 1, 7) for _ in range(2))
    grad = torch.randn(41, 1, 7)

    def gradient(config):
        out = attention(Projected(config, seed=5), h, source, target, edges)
        return torch.autograd.grad(out, h, grad)[0]

    with torch.no_grad():
        scores = (h * target).sum(-1)[edges.rows()] + (h * source).sum(-1)[edges.columns]
        alpha = edges.softmax_rows_(F.leaky_relu(scores, 0.2))
        off = grad.abs().sum((1, 2))[edges.rows()] * bin_widths(h.flatten(1))[edges.columns, 0]
        mean = edges.reduce_rows(alpha * off[:, None], "sum")[edges.rows()]
        score_off = alpha * (off[:, None] + mean)
        to_source, order = edges.transposed()
        bound = to_source.reduce_rows(score_off[order], "sum").unsqueeze(-1) * source.abs()
        bound += edges.reduce_rows(score_off, "sum").unsqueeze(-1) * target.abs()
    assert ((gradient(projected(bits=8)) - gradient(EXACT)).abs() <= bound + 1e-5).all()


def test_attention_equals_plain_and_pyg(dataset):
    edges = attention_edges(dataset.edge_index, dataset.num_nodes)
    conv = pyg.GATConv(13, 5, heads=2, add_self_loops=False, bias=False)
    h = conv.lin(dataset.x).view(-1, 2, 5).detach().requires_grad_()
    plain = attention(Plain(training=True, seed=0), h, conv.att_src, conv.att_dst, edges)
    ours = attention(Projected(EXACT, seed=0), h, conv.att_src, conv.att_dst, edges)
    edge_index = torch.stack([edges.columns.long(), edges.rows()])
    assert_close(plain.flatten(1), conv(dataset.x, edge_index))
    check(ours, plain, (h, conv.att_src, conv.att_dst))


def test_attention_keeps_h_and_the_scores_and_nothing_as_long_as_the_edges(dataset):
    edges = attention_edges(dataset.edge_index, dataset.num_nodes)
    nodes = dataset.num_nodes
    h = torch.randn(nodes, 2, 8, requires_grad=True)
    vector = torch.nn.Parameter(torch.randn(1, 2, 8))
    with SavedTensors(torch.nn.Identity(), excluded=[*edges.tensors(), vector]) as saved:
        out = attention(Projected(projected(bits=2), seed=0), h, vector, None, edges, dropout=0.3)
        kept = saved.kept(out)
    assert [record.bytes for record in kept] == [nodes * (16 * 2 // 8 + 4), 4 * nodes * 2]
    assert (kept[0].dtype, kept[0].shape) == ("int2", (nodes, 2, 8))


def functional_errors(gradient, exact, draws):
    """Mean error of 20 fixed random functionals of a gradient, in standard errors, and the mean size of an error."""
    functionals = torch.randn(20, exact.numel(), generator=torch.Generator().manual_seed(0))
    errors = torch.stack([functionals @ (gradient(mix(draw)) - exact).flatten() for draw in range(draws)])
    standard_error = errors.std(0) / math.sqrt(draws)
    return (errors.mean(0).abs() / standard_error).max().item(), errors.abs().mean().item()


@pytest.mark.parametrize(("bits", "kept_frac"), [(1, 1.0), (2, 1.0), (4, 1.0), (None, 0.25), (2, 0.25)], ids=str)
def test_gradient_of_edge_weights_is_unbiased(bits, kept_frac):
    edges, x, weight = problem(nodes=31)
    grad = torch.randn(31, 13)

    def gradient(config, seed):
        out = Projected(config, seed=seed).aggregate_weighted(Activation(x, Kept()), weight, edges)
        return torch.autograd.grad(out, weight, grad)[0]

    config = projected(bits=bits, kept_frac=kept_frac)
    off, size = functional_errors(lambda seed: gradient(config, seed), gradient(EXACT, 0), 400)
    assert off < 4 and size > 0.01


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradient_of_extremum_weights_is_unbiased(bits):
    edges, x, weight = problem(nodes=31)
    grad = torch.randn(31, 13)

    def gradient(config, seed):
        out = Projected(config, seed=seed).aggregate_extremum(x, weight, edges, maximum=True)
        return torch.autograd.grad(out, weight, grad)[0]

    off, size = functional_errors(lambda seed: gradient(projected(bits=bits), seed), gradient(EXACT, 0), 400)
    assert off < 4 and size > 0.01


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_attention_gradient_of_h_is_unbiased_and_that_of_the_vectors_is_not(bits):
    """Scores are exact, so the recomputed softmax is; a vector's gradient multiplies two decoded entries."""
    data = tiny_dataset(nodes=24)
    edges = attention_edges(data.edge_index, data.num_nodes)
    h = torch.randn(24, 2, 6, requires_grad=True)
    source, target = (torch.randn(1, 2, 6, requires_grad=True) for _ in range(2))
    # A gradient along h makes the quadratic terms as large as they can be.
    grad = torch.randn(24, 2, 6) + 2 * h.detach()

    def gradients(config, seed):
        out = attention(Projected(config, seed=seed), h, source, target, edges)
        return torch.autograd.grad(out, (h, source, target), grad)

    exact = gradients(EXACT, 0)
    off, size = functional_errors(lambda seed: gradients(projected(bits=bits), seed)[0], exact[0], 500)
    assert off < 4 and size > 0.01
    if bits == 1:
        off, _ = functional_errors(lambda seed: gradients(projected(bits=1), seed)[1], exact[1], 1500)
        assert off > 4


def test_recomputed_softmax_is_biased_and_less_so_with_more_bits():
    _, x, _ = problem(nodes=31)
    adjacency = sum_adjacency(tiny_dataset(nodes=31).edge_index, 31)
    t = torch.tensor([2.0], requires_grad=True)
    grad = torch.randn(31, 13)

    def gradient(config, seed):
        out = aggregate_softmax(config, x, t, adjacency, semi_grad=False, seed=seed)
        return torch.autograd.grad(out, x, grad)[0]

    exact = gradient(EXACT, 0)
    biases = []
    for bits in (1, 2, 4):
        mean = torch.stack([gradient(projected(bits=bits), mix(draw)) for draw in range(300)]).mean(0)
        biases.append(relative_error(mean, exact))
    assert biases == sorted(biases, reverse=True) and biases[0] > 0.2 and biases[2] < 0.05


def test_slope_of_elu_is_biased_and_less_so_with_more_bits():
    x = torch.randn(64, 16, requires_grad=True)
    grad = torch.ones(64, 16)
    exact = torch.autograd.grad(F.elu(x), x, grad)[0]
    biases = []
    for bits in (1, 2, 4):
        draws = [
            torch.autograd.grad(Projected(projected(bits=bits), seed=mix(i)).elu(x, 1.0), x, grad)[0]
            for i in range(300)
        ]
        biases.append(relative_error(torch.stack(draws).mean(0), exact))
    assert biases == sorted(biases, reverse=True) and biases[0] > 0.1 and biases[2] < 0.05
