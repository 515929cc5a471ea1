"""Arguments of a kind that no op takes: one clear line each, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from nvae_fast import functional as F
from nvae_fast.functional import Norm

X = torch.ones(2, 4, 6, 6)


def norm(channels, **changes):
    one, zero = torch.ones(channels), torch.zeros(channels)
    return Norm(one, zero, zero, one, training=False)._replace(**changes)


def square(*shape):
    return torch.full(shape, 0.1)


CALLS = {
    "bn_act": {"x": X, "weight": square(4), "bias": None, "running_mean": square(4), "running_var": square(4),
               "training": False},
    "conv2d": {"x": X, "weight": square(5, 4, 3, 3), "bias": square(5), "norm": norm(4), "stride": 1},
    "preact_branch": {"x": X, "weights": [square(5, 4, 3, 3), square(3, 5, 1, 1)], "norms": [norm(4), norm(5)], "act": "elu"},
    "depthwise_conv": {"x": X, "weight": square(4, 1, 3, 3), "dilation": 1},
    "pointwise_conv": {"x": X, "weight": square(5, 4, 1, 1), "norm": norm(4), "act": "swish"},
    "inverted_residual": {
        "x": X, "expand": square(8, 4, 1, 1), "depthwise": square(8, 1, 3, 3), "project": square(4, 8, 1, 1),
        "norms": [norm(4), norm(8), norm(8), norm(4)],
    },
    "se_residual": {"skip": X, "x": X, "w1": square(3, 4), "b1": square(3), "w2": square(4, 3), "b2": square(4),
                    "residual_scale": 0.1},
    "flow_cell": {"z": X, "w_in": square(9, 4, 3, 3), "w_dw": square(9, 1, 5, 5), "w_out": square(4, 9, 1, 1),
                  "bias_out": square(4)},
    "logistic_mixture_log_prob": {"x": square(2, 3, 6, 6), "params": square(2, 20, 6, 6), "num_mixtures": 2, "num_bits": 8},
    "logistic_mixture_sample": {"params": square(2, 20, 6, 6), "channels": 3, "num_mixtures": 2, "temperature": 1.0,
                                "noise": None, "generator": None},
    "logistic_mixture_mean": {"params": square(2, 20, 6, 6), "channels": 3, "num_mixtures": 2},
    "logistic_mixture_channels": {"channels": 3, "num_mixtures": 2},
    "residual_normal": {"mu_q": X, "log_sigma_q": X, "mu_p": X, "log_sigma_p": X, "noise": X, "residual": True},
    "latent_group": {"posterior": X, "prior": X, "noise": square(2, 2, 6, 6), "residual": True},
    "normal_sample": {"mu": X, "log_sigma": X, "noise": X, "temperature": 1.0},
    "normal_log_prob": {"z": X, "mu": X, "log_sigma": X},
    "soft_clamp": {"x": X},
    "normal_params": {"mu": X, "log_sigma": X, "temperature": 1.0},
    "weight_norm": {"weights": [square(4, 3)], "log_norms": [square(4, 1)], "masks": [None], "eps": 1e-5},
    "power_iteration": {"weights": [square(4, 3)], "u": [square(4)], "v": [square(3)], "iterations": 1, "eps": 1e-3},
}  # fmt: skip
WRONG = {
    torch.Tensor: (3, "x", [1.0], X.numpy(), X.to_sparse()),
    bool: ("x", 1, None),
    int: (1.5, "1", True, None, 10**30),
    float: ("1", None, [1.0], True),
    str: (None, 1, "nothing"),
    Norm: ("x", torch.nn.BatchNorm2d(4), norm(4, eps="1"), norm(4, momentum=[1]), norm(4, weight=[1.0]), norm(4, training=2)),
    type(None): ("x", 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_line_names_the_argument(name):
    op, given = getattr(F, name), CALLS[name]
    op(**given)
    for argument, right in given.items():
        many = isinstance(right, list)
        wrong = [None, 3, "x", right[0], [3], iter(right)] if many else WRONG[type(right)]
        for value in wrong:
            if many and value is None and argument == "masks":
                continue
            with pytest.raises((TypeError, ValueError)) as error:
                op(**given | {argument: value})
            assert str(error.value).startswith(argument) and "expected" in str(error.value), (argument, value, error.value)
            assert "\n" not in str(error.value)


def test_positional_arguments_too():
    with pytest.raises(TypeError, match=r"^log_norms\[1\] is float 2.0: expected a tensor$"):
        F.weight_norm([X, X], [X, 2.0])
    with pytest.raises(TypeError, match=r"^norms\[0\] is None: expected a Norm$"):
        F.inverted_residual(*list(CALLS["inverted_residual"].values())[:4], [None] * 4)
    with pytest.raises(TypeError, match=r"^norm.weight is list: expected a tensor or None$"):
        F.pointwise_conv(X, square(5, 4, 1, 1), norm=norm(4, weight=[1.0]))


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_an_epsilon_is_no_negative_number(eps):
    for name in ("weight_norm", "power_iteration"):
        with pytest.raises(ValueError, match=rf"^eps is {eps}: expected a number >= 0$"):
            getattr(F, name)(**CALLS[name] | {"eps": eps})


@pytest.mark.parametrize("name", ["se_residual", "flow_cell", "residual_normal", "weight_norm", "depthwise_conv"])
def test_inside_transforms_of_torch_func_the_reference_runs(name):
    given = {k: v for k, v in CALLS[name].items() if k != "masks"}
    first = next(iter(given))
    many = isinstance(given[first], list)

    def call(x, impl="auto"):
        out = getattr(F, name)(**given | {first: [x] if many else x}, impl=impl)
        return out if isinstance(out, torch.Tensor) else out[0]

    one = given[first][0] if many else given[first]
    x = torch.stack([one, 2 * one])
    expected = torch.stack([call(one, "reference") for one in x])
    assert torch.allclose(torch.vmap(call)(x), expected, atol=1e-6)
    assert torch.func.grad(lambda t: call(t).sum())(x[0]).isfinite().all()
    with pytest.raises(RuntimeError, match=f"^{name}: impl='cpu' cannot run inside vmap, grad or jvp of torch.func; impl='ref"):
        torch.vmap(lambda t: call(t, "cpu"))(x)
