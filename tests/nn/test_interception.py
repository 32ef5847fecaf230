"""Functions that a compressed model calls, in every spelling: gradients, sharing, what is left alone."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_close, projected
from iexact_runner.compression.seeds import mix
from iexact_runner.errors import ConfigError
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import compress, compressed_pass
from iexact_runner.schemes import Projected

N, D = 50, 8
INT2 = projected(bits=2, kept_frac=0.5)


class Calls(nn.Module):
    """A model that calls one function of a map and a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def gradients(model, x):
    output = model(x)
    return output, torch.autograd.grad((output * torch.linspace(-1, 1, D)).sum(), (x, model.weight))


PRODUCTS = {
    "F.linear": lambda x, w: F.linear(x, w),
    "keywords": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "mm": lambda x, w: torch.mm(x, w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "method": lambda x, w: x.matmul(w),
    "operator": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(x, x, w, beta=0.3, alpha=0.7),
    "addmm of a bias": lambda x, w: torch.addmm(w[0], x, w),
}
ACTIVATIONS = {
    "relu": {
        "F.relu": F.relu,
        "torch.relu": torch.relu,
        "method": lambda h: h.relu(),
        "in place": lambda h: F.relu(h, inplace=True),
        "torch.relu_": torch.relu_,
        "method_": lambda h: h.relu_(),
        "method_ of a view": lambda h: h.view(-1).relu_().view_as(h),
        "method_ of a part": lambda h: (h[: N // 2].relu_(), h)[1],
        "module": nn.ReLU(),
        "module in place": nn.ReLU(inplace=True),
    },
    "leaky_relu": {
        "F.leaky_relu": lambda h: F.leaky_relu(h, 0.2),
        "F.leaky_relu_": lambda h: F.leaky_relu_(h, 0.2),
        "in place": lambda h: F.leaky_relu(h, inplace=True),
        "module": nn.LeakyReLU(0.3),
    },
    "elu": {"F.elu": lambda h: F.elu(h, 0.5), "module": nn.ELU()},
    "batch_norm": {"module": nn.BatchNorm1d(D), "no statistics": lambda h: F.batch_norm(h, None, None, training=True)},
}
CASES = [(kind, name) for kind, spellings in ACTIVATIONS.items() for name in spellings]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_equal_torchs_and_keep_their_map_compressed(name):
    model, x = Calls(PRODUCTS[name]), torch.randn(N, D, requires_grad=True)
    expected, exact = gradients(model, x)
    compress(model, projected())
    output, grads = gradients(model, x)
    assert_close(output, expected)
    for grad, other in zip(grads, exact, strict=True):
        assert_close(grad, other)

    model = Calls(PRODUCTS[name])
    report = compress(model, INT2)
    with SavedTensors(model, excluded=[]) as saved:
        records = saved.kept(model(x))
    assert [record.dtype for record in records] == ["int2"]
    assert sum(report.functions.values()) == 1 and not report.left


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
def test_functions_equal_torchs_and_keep_their_map_compressed(kind, name):
    function = ACTIVATIONS[kind][name]
    model, x = Calls(lambda x, w: function(F.linear(x, w))), torch.randn(N, D, requires_grad=True)
    expected, exact = gradients(model, x)
    report = compress(model, projected())
    output, grads = gradients(model, x)
    assert_close(output, expected)
    for grad, other in zip(grads, exact, strict=True):
        assert_close(grad, other)
    assert report.functions == {"linear": 1, kind: 1}

    model = Calls(lambda x, w: function(F.linear(x, w)))
    compress(model, INT2)
    with SavedTensors(model, excluded=[]) as saved:
        records = saved.kept(model(x))
    assert all(record.dtype in ("int2", "mask") for record in records if record.shape == (N, D))


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_drops_by_the_seed_of_the_pass(inplace):
    def function(x, w):
        return F.dropout(F.linear(x, w), 0.4, inplace=inplace)

    model, x = Calls(function), torch.randn(N, D)
    compress(model, projected(), seed=7)
    state = torch.get_rng_state()
    first, second = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), state)
    for number, output in enumerate((first, second), start=1):
        expected = Projected(projected(), seed=mix(7, number)).dropout(F.linear(x, model.weight), 0.4)
        assert torch.equal(output, expected)
    assert not torch.equal(first, second)


def test_consumers_of_one_tensor_share_its_map():
    def shared(x, w):
        h = F.relu(x @ w)
        return h @ w + F.linear(h, w) + torch.mm(h, w)

    def changed(x, w):
        h = F.relu(x @ w)
        return h @ w + F.linear(h.mul_(2), w)

    for function, maps in ((shared, 2), (changed, 3)):
        model, x = Calls(function), torch.randn(N, D, requires_grad=True)
        compress(model, INT2)
        with SavedTensors(model, excluded=[]) as saved:
            records = saved.kept(model(x))
        assert [record.dtype for record in records].count("int2") == maps

    # Each product has the gradient of its own values, where plain torch refuses to go backward.
    model = Calls(lambda x, w: F.relu(x @ w) @ w + F.linear(2 * F.relu(x @ w), w))
    expected, exact = gradients(model, x)
    model.function = changed
    compress(model, projected(bits=8))
    output, grads = gradients(model, x)
    assert_close(output, expected)
    for grad, other in zip(grads, exact, strict=True):
        assert_close(grad, other, tolerance=0.02)


def test_what_needs_no_gradient_keeps_nothing():
    model, x = Calls(lambda x, w: F.relu(F.linear(x, w))), torch.randn(N, D)
    model.weight.requires_grad_(False)
    report = compress(model, INT2)
    assert model(x).grad_fn is None
    model.weight.requires_grad_()
    with torch.no_grad():
        assert model(x).grad_fn is None
    assert not report.functions


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(4, N, D), "3 dimensions instead of 2"),
        (torch.randn(N, D).double(), "input is float64"),
        (torch.randn(0, D), "input is empty"),
    ],
    ids=["rank", "float64", "empty"],
)
def test_what_has_no_twin_is_left_and_noted(x, reason):
    model = Calls(lambda x, w: F.linear(x, w.to(x.dtype)))
    expected = model(x)
    report = compress(model, INT2)
    assert torch.equal(model(x), expected)
    assert not report.functions and len(report.left) == 1 and reason in report.left.pop()


def test_usual_functions_without_a_twin_are_noted():
    model = Calls(lambda x, w: F.gelu(torch.tanh(x @ w)).log_softmax(-1))
    report = compress(model, INT2, fallback=None)
    model(torch.randn(N, D))
    assert {note.partition(":")[0] for note in report.left} == {"gelu", "tanh", "log_softmax"}
    model.function = lambda x, w: F.silu(x)
    with torch.no_grad():
        model(torch.randn(N, D))
    assert len(report.left) == 3


def test_half_types_and_autocast():
    x = torch.randn(N, D)
    for dtype in (torch.bfloat16, torch.float16):
        model = Calls(lambda x, w: F.elu(F.relu(F.linear(x, w)))).to(dtype)
        half = x.to(dtype).requires_grad_()
        expected, exact = gradients(model, half)
        compress(model, projected(bits=8))
        output, grads = gradients(model, half)
        assert output.dtype == dtype and torch.equal(output, expected)
        for grad, other in zip(grads, exact, strict=True):
            assert_close(grad, other, tolerance=0.05)

    model = Calls(lambda x, w: F.relu(F.linear(x, w)) @ w)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, exact = gradients(model, x)
        compress(model, projected(bits=8))
        output, grads = gradients(model, x)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    for grad, other in zip(grads, exact, strict=True):
        assert_close(grad, other, tolerance=0.05)


def test_batch_norm_of_one_row_is_refused_as_torch_refuses_it():
    norm = nn.BatchNorm1d(D)
    compress(norm, INT2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, D, requires_grad=True))


def test_features_made_under_inference_mode_train():
    with torch.inference_mode():
        x = torch.randn(N, D)
    model = Calls(F.linear)
    compress(model, projected(bits=8))
    model(x).sum().backward()
    assert_close(model.weight.grad, x.clone().sum(0).expand(D, D), tolerance=0.02)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_no_mode_behind(error):
    def fail(x, w):
        raise error

    model = Calls(fail)
    report = compress(model, INT2)
    with pytest.raises(error):
        model(torch.randn(N, D))
    F.relu(torch.randn(N, D, requires_grad=True))
    assert torch.overrides._get_current_function_mode_stack() == [] and not report.functions
    model.function = lambda x, w: F.linear(x, w)
    model(torch.randn(N, D))
    assert report.functions == {"linear": 1}


def test_two_models_at_once_keep_to_themselves():
    inner = Calls(lambda x, w: F.relu(F.linear(x, w)))
    outer = Calls(lambda x, w: F.linear(inner(F.linear(x, w)), w))
    inner_report, outer_report = compress(inner, projected(bits=8)), compress(outer, INT2)
    x = torch.randn(N, D)
    with SavedTensors(outer, excluded=[inner.weight]) as saved:
        kept = [record.dtype for record in saved.kept(outer(x))]
    assert kept == ["int2", "int8", "mask", "int2"]
    assert inner_report.functions == {"linear": 1, "relu": 1} and outer_report.functions == {"linear": 2}


def test_another_thread_has_no_part_in_a_pass():
    seen = []

    def other():
        h = F.relu(torch.randn(N, D, requires_grad=True))
        seen.append(type(h.grad_fn).__name__)

    def function(x, w):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return F.linear(x, w)

    model = Calls(function)
    report = compress(model, INT2)
    model(torch.randn(N, D))
    assert seen == ["ReluBackward0"] and report.functions == {"linear": 1}


def test_a_part_called_by_itself_runs_a_pass_of_its_own_and_several_can_share_one():
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    report = compress(model, INT2)
    x = torch.randn(N, D)

    def encode():
        h = torch.relu(model[0](x))
        return model[2](h) + model[2](h)

    with SavedTensors(model, excluded=[]) as saved:
        dtypes = [record.dtype for record in saved.kept(encode())]
    assert dtypes == ["int2", "float32", "int2", "int2"] and "relu" not in report.functions
    with SavedTensors(model, excluded=[]) as saved, compressed_pass(model):
        dtypes = [record.dtype for record in saved.kept(encode())]
    assert dtypes == ["int2", "mask", "int2"] and report.functions["relu"] == 1
    with pytest.raises(ConfigError, match="model=Linear: is not compressed"):
        compressed_pass(nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(5, 7, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("name", ["lowrank", "int8"])
def test_activations_of_more_dimensions_keep_their_signs(name, shape):
    """As those between the layers of a transformer, of which ``lowrank`` has no sketch."""

    def gradient(compressed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).train()
        if compressed:
            compress(model, name, fallback=None)
        model(torch.randn(shape, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert_close(gradient(True), gradient(False), tolerance=1e-6)
