"""Every compressed operation against its exact twin: gradients, what is saved, and what is biased."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close, bin_widths, relative_error
from iexact_runner.compression.maps import KeptMap, MapFormat
from iexact_runner.compression.seeds import mix
from iexact_runner.compression.sketch import SketchLayout
from iexact_runner.kernels import reference
from iexact_runner.measure.peak import record_allocations
from iexact_runner.schemes import functions, normalization

SIZES = [(1, 1), (37, 63), (101, 100), (64, 128)]


def keep(x, bits, *, kept_frac=1.0, seed=0, project=True):
    layout = MapFormat(bits, kept_frac, col_size=0, levels=None, max_block_size=None, backend="torch")
    return layout.keep(x.detach(), seed=seed, project=project)


def gradients(output, inputs, grad):
    return torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize(("nodes", "columns"), SIZES, ids=str)
@pytest.mark.parametrize("bits", [None, 8])
def test_linear(nodes, columns, bits):
    x = torch.randn(nodes, columns, requires_grad=True)
    weight, bias = torch.randn(5, columns, requires_grad=True), torch.randn(5, requires_grad=True)
    grad = torch.randn(nodes, 5)
    expected = F.linear(x, weight, bias)
    actual = functions.Linear.apply(x, weight, bias, keep(x, bits), 0)
    assert torch.equal(actual, expected)
    exact = gradients(expected, (x, weight, bias), grad)
    compressed = gradients(actual, (x, weight, bias), grad)
    assert_close(compressed[0], exact[0])
    assert_close(compressed[2], exact[2])
    if bits is None:
        assert_close(compressed[1], exact[1])
    else:  # |decoded - x| is at most one bin of the row
        bound = grad.abs().T @ bin_widths(x)
        assert ((compressed[1] - exact[1]).abs() <= bound + 1e-5).all()


def test_linear_computes_only_the_gradients_that_are_needed():
    x, weight = torch.randn(9, 4), torch.randn(3, 4, requires_grad=True)
    output = functions.Linear.apply(x, weight, None, keep(x, None), 0)
    (grad,) = gradients(output, (weight,), torch.ones(9, 3))
    assert_close(grad, torch.ones(9, 3).T @ x)


@pytest.mark.parametrize("nodes_and_columns", SIZES[1:], ids=str)
def test_batch_norm(nodes_and_columns):
    nodes, columns = nodes_and_columns
    x = torch.randn(nodes, columns, requires_grad=True)
    weight, bias = torch.randn(columns, requires_grad=True), torch.randn(columns, requires_grad=True)
    grad = torch.randn(nodes, columns)
    running = [torch.zeros(columns), torch.ones(columns), torch.zeros(columns), torch.ones(columns)]
    expected = F.batch_norm(x, *running[:2], weight, bias, training=True, momentum=0.3, eps=1e-5)
    exact = gradients(expected, (x, weight, bias), grad)
    for bits in (None, 8):
        statistics = [running[2].clone(), running[3].clone()]
        kept = keep(x, bits, project=False)
        actual = normalization.BatchNorm.apply(x, weight, bias, *statistics, 0.3, 1e-5, lambda *_, kept=kept: kept, 0)
        assert_close(actual, expected)
        assert_close(statistics[0], running[0])
        assert_close(statistics[1], running[1])
        compressed = gradients(actual, (x, weight, bias), grad)
        assert_close(compressed[2], exact[2])
        if bits is None:
            assert_close(compressed[0], exact[0])
            assert_close(compressed[1], exact[1])
            continue
        # The normalised input is off by at most delta; its gradient multiplies it with a mean that holds it too.
        inverse_std = (x.detach().var(0, correction=0) + 1e-5).rsqrt()
        normalised, delta = (x.detach() - x.detach().mean(0)) * inverse_std, bin_widths(x) * inverse_std
        assert ((compressed[1] - exact[1]).abs() <= (grad.abs() * delta).sum(0) + 1e-5).all()
        slack = delta * (grad * normalised).mean(0).abs() + (normalised.abs() + delta) * (grad.abs() * delta).mean(0)
        assert ((compressed[0] - exact[0]).abs() <= (weight.detach() * inverse_std).abs() * slack + 1e-5).all()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_norm_in_chunks_of_rows_is_that_of_torch(affine, monkeypatch):
    monkeypatch.setattr(normalization, "CHUNK_ELEMENTS", 7 * 16)
    x, grad = 3 + 2 * torch.randn(50, 16), torch.randn(50, 16)
    weight = torch.randn(16) if affine else None
    _, mean, inverse_std = torch.native_batch_norm(x, weight, weight, None, None, True, 0.1, 1e-5)
    arguments = (grad, x, weight, None, None, mean, inverse_std, True, 1e-5, [True, affine, affine])
    expected = torch.ops.aten.native_batch_norm_backward(*arguments)
    actual = normalization._batch_norm_backward(grad, x.clone(), weight, mean, inverse_std)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs)


def test_batch_norm_needs_no_third_map(monkeypatch):
    monkeypatch.setattr(normalization, "CHUNK_ELEMENTS", 10 * 64)
    x, grad, vector = torch.randn(1000, 64), torch.randn(1000, 64), torch.ones(64)
    with record_allocations() as changes:
        normalization._batch_norm_backward(grad, x, vector, vector, vector)
    assert 0 < max(changes) <= 4 * 10 * 64


def test_batch_norm_of_16_bit_maps_adds_up_in_float32():
    """1001 ones, which bfloat16 would round to 1000."""
    ones, vector = torch.ones(1001, 2, dtype=torch.bfloat16), torch.ones(2)
    _, weight, bias = normalization._batch_norm_backward(ones, ones.clone(), vector, 0 * vector, vector)
    assert weight.tolist() == bias.tolist() == [1001.0] * 2


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(("p", "seed"), [(0.0, 0), (0.4, 7), (0.4, torch.tensor(7))], ids=str)
@pytest.mark.parametrize("nodes_and_columns", SIZES[1:], ids=str)
def test_batch_norm_relu_dropout(nodes_and_columns, p, seed, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    nodes, columns = nodes_and_columns
    x = (3 + 2 * torch.randn(nodes, columns)).requires_grad_()
    weight, bias = torch.randn(columns, requires_grad=True), torch.randn(columns, requires_grad=True)
    grad, running = torch.randn(nodes, columns), [torch.zeros(columns), torch.ones(columns)]
    ours, kept = [part.clone() for part in running], []

    def keep_all(mean, inverse_std):
        """All directions: coefficients that are the centred map itself."""
        layout, tensors = keep(x.detach() - mean, None)
        kept.append(KeptMap(SketchLayout(layout, tuple(x.shape)), (*tensors, torch.eye(columns), mean)))
        return kept[0]

    def keep_signs(mask):
        layout, tensors = kept[0]
        kept.append(KeptMap(*layout.with_signs(tensors, mask, exact=False, p=p, seed=seed)))
        return kept[1]

    arguments = (x, weight, bias, *ours, 0.3, 0.5, p, seed, backend, keep_all, keep_signs)
    actual = normalization.BatchNormReLUDropout.apply(*arguments)
    normalised = F.batch_norm(x, *running, weight, bias, training=True, momentum=0.3, eps=0.5)
    expected = functions.LeakyReLUDropout.apply(normalised, 0.0, p, seed, False, backend)
    assert_close(actual, expected, tolerance=1e-6)
    assert_close(torch.cat(ours), torch.cat(running))
    mask = kept[1].layout.mask(kept[1].tensors, seed)
    assert torch.equal(reference.unpack(mask, x.numel(), 1).bool(), normalised.flatten() > 0)
    found, exact = (gradients(output, (x, weight, bias), grad) for output in (actual, expected))
    for got, right in zip(found, exact, strict=True):
        assert_close(got, right)


def test_batch_norm_relu_dropout_says_what_it_keeps():
    x, vector = torch.randn(16, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    layout, tensors = keep(x, 4)
    sketch = KeptMap(SketchLayout(layout, (16, 8)), (*tensors, torch.eye(8), vector.detach()))

    def keep_signs(mask):
        return KeptMap(*sketch.layout.with_signs(sketch.tensors, mask, exact=False, p=0.5, seed=1))

    arguments = (x, vector, vector, None, None, 0.1, 1e-5, 0.5, 1, "torch", lambda *_: sketch, keep_signs)
    norm, output, mask = normalization.BatchNormReLUDropout.apply(*arguments).grad_fn.saved_map
    for described in (norm, output):
        assert (described.stored_type, described.fp32_bytes, described.parts) == ("int4", 4 * 16 * 8, 5)
    # The output of ReLU, and a mask of floats.
    assert (mask.stored_type, mask.fp32_bytes, mask.parts) == ("mask", 2 * 4 * 16 * 8, 1)


@pytest.mark.parametrize(
    ("function", "arguments", "maps", "parts"),
    [
        (functions.LeakyReLU, (0.0, "torch"), 1, 1),
        (functions.MaskedDropout, (0.3, 1, "torch"), 1, 1),
        (functions.LeakyReLUDropout, (0.0, 0.3, 1, False, "torch"), 2, 1),
        (functions.LeakyReLUDropout, (0.0, 0.3, 1, True, "torch"), 2, 2),
    ],
    ids=["ReLU", "dropout", "both", "both, mask stored"],
)
def test_masks_say_what_plain_modules_keep_in_their_place(function, arguments, maps, parts):
    """Of ReLU its output, of dropout a mask of floats."""
    node = function.apply(torch.randn(16, 8, requires_grad=True), *arguments).grad_fn
    found = node.saved_map
    assert (found.shape, found.stored_type) == ((16, 8), "mask")
    assert (found.fp32_bytes, found.parts) == (maps * 4 * 16 * 8, parts)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_leaky_relu(shape, slope):
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    actual, expected = functions.LeakyReLU.apply(x, slope, "torch"), F.leaky_relu(x, slope)
    assert torch.equal(actual, expected)
    assert torch.equal(gradients(actual, (x,), grad)[0], gradients(expected, (x,), grad)[0])


@pytest.mark.parametrize("function", [functions.Dropout, functions.MaskedDropout], ids=["regenerated", "stored"])
@pytest.mark.parametrize("seed", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_dropout(function, seed):
    x = torch.randn(37, 63, requires_grad=True)
    grad = torch.randn(37, 63)
    kept = reference.keep_mask(x.numel(), p=0.3, seed=5, device=x.device).view(x.shape)
    actual = function.apply(x, 0.3, seed, "torch")
    factor = reference.dropout_factor(0.3)
    assert_close(actual, x * kept * factor)
    assert_close(gradients(actual, (x,), grad)[0], grad * kept * factor)


def test_relu_in_place_changes_its_input_and_nothing_else():
    x = torch.randn(37, 63, requires_grad=True)
    grad = torch.randn(37, 63)
    fresh = 2 * x
    actual = functions.LeakyReLU.apply(fresh, 0.0, "torch", True)
    assert actual is fresh and torch.equal(actual, F.relu(2 * x))
    assert torch.equal(gradients(actual, (x,), grad)[0], gradients(F.relu(2 * x), (x,), grad)[0])


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_elu(shape):
    """The slope alpha exp(x) below zero is off by at most alpha times the error of x, which is at most one bin."""
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    exact = gradients(F.elu(x, 0.7), (x,), grad)[0]
    unquantized = functions.ELU.apply(x, 0.7, keep(x, None), 0)
    assert torch.equal(unquantized, F.elu(x, 0.7))
    assert torch.equal(gradients(unquantized, (x,), grad)[0], exact)
    compressed = gradients(functions.ELU.apply(x, 0.7, keep(x, 8), 0), (x,), grad)[0]
    # Across zero the slope jumps from alpha to 1.
    across = (x.detach().abs() <= bin_widths(x)) * (1 - 0.7)
    assert ((compressed - exact).abs() <= grad.abs() * (0.71 * bin_widths(x) + across) + 1e-6).all()


@pytest.mark.parametrize("store_mask", [False, True], ids=["regenerated", "stored"])
@pytest.mark.parametrize("seed", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_fused_relu_dropout_is_the_two_in_turn(seed, store_mask):
    x = torch.randn(37, 63, requires_grad=True)
    grad = torch.randn(37, 63)
    fused = functions.LeakyReLUDropout.apply(x, 0.1, 0.3, seed, store_mask, "torch")
    separate = functions.Dropout.apply(functions.LeakyReLU.apply(x, 0.1, "torch"), 0.3, seed, "torch")
    assert torch.equal(fused, separate)
    assert torch.equal(gradients(fused, (x,), grad)[0], gradients(separate, (x,), grad)[0])


@pytest.mark.parametrize(("bits", "kept_frac"), [(1, 1.0), (2, 1.0), (4, 1.0), (None, 0.25), (2, 0.25)], ids=str)
def test_linear_weight_gradient_is_unbiased(bits, kept_frac):
    """20 fixed random functionals of the gradient over many seeds, within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(60, 16, generator=generator), torch.randn(60, 6, generator=generator)
    functionals = torch.randn(20, 6 * 16, generator=generator)
    exact = (grad.T @ x).flatten()
    errors = []
    for draw in range(600):
        layout, tensors = keep(x, bits, kept_frac=kept_frac, seed=mix(draw))
        errors.append(functionals @ (layout.weight_gradient(grad, tensors).flatten() - exact))
    errors = torch.stack(errors)
    standard_error = errors.std(0) / math.sqrt(len(errors))
    assert (errors.mean(0).abs() < 4 * standard_error).all()


def test_batch_norm_gamma_and_beta_gradients_are_unbiased_and_dx_is_not():
    """The specification says which is which: dx is quadratic in the kept map, its bias of order variance / N."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 8, generator=generator)
    # A gradient that is the map itself makes the quadratic term as large as it can be.
    grad = torch.randn(24, 8, generator=generator) + 2 * x
    weight = torch.ones(8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    x.requires_grad_()
    exact = gradients(F.batch_norm(x, None, None, weight, bias, training=True), (x, weight, bias), grad)
    sums = [[], [], []]
    for draw in range(1500):
        kept = keep(x, 1, seed=mix(draw), project=False)
        output = normalization.BatchNorm.apply(x, weight, bias, None, None, 0.1, 1e-5, lambda *_, kept=kept: kept, 0)
        for errors, compressed, full in zip(sums, gradients(output, (x, weight, bias), grad), exact, strict=True):
            errors.append((compressed - full).flatten())
    ratios = []
    for errors in sums:
        functionals = torch.randn(20, errors[0].numel(), generator=generator)
        projected = torch.stack(errors) @ functionals.T
        standard_error = projected.std(0) / math.sqrt(len(projected))
        ratios.append((projected.mean(0).abs() / standard_error.clamp_min(1e-6)).max().item())
    assert ratios[0] > 4 > ratios[1]
    assert torch.stack(sums[2]).abs().max() < 1e-4  # beta's needs nothing of the map


def test_gradients_cannot_be_differentiated_twice():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    output = functions.Linear.apply(x, weight, None, keep(x, 8), 0)
    (grad,) = torch.autograd.grad(output.square().sum(), (x,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_more_bits_are_closer():
    x, grad = torch.randn(200, 32), torch.randn(200, 8)
    errors = []
    for bits in (1, 2, 4, 8):
        layout, tensors = keep(x, bits, seed=1)
        errors.append(relative_error(layout.weight_gradient(grad, tensors), grad.T @ x))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]
