"""Schedules, KL balancing and bit reduction against tables of the public reference."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from nvae_fast import InputError, NVAEConfig, TrainConfig
from nvae_fast.objective import balance_kl, kl_alpha, kl_coefficient, learning_rate, norm_coefficient


def test_groups_per_scale(schedules):
    for key, expected in schedules.meta["groups_per_scale"].items():
        scales, groups, ada, minimum = json.loads(key.lower().replace("(", "[").replace(")", "]"))
        config = NVAEConfig(num_latent_scales=scales, num_groups_per_scale=groups, ada_groups=ada,
                            min_groups_per_scale=minimum, image_size=64)  # fmt: skip
        assert config.groups_per_scale == expected
        assert len(config.latent_shapes) == sum(expected)


def test_kl_alpha(schedules):
    for groups, table in schedules.meta["kl_alpha"].items():
        for schedule, expected in table.items():
            assert kl_alpha(json.loads(groups), schedule) == pytest.approx(expected, rel=1e-6)


def test_kl_balancer(schedules):
    kl_all, alpha = schedules["kl_balancer/kl_all"], schedules["kl_balancer/alpha"]
    cases = schedules.under("kl_balancer/kl_coeff_")
    assert cases
    for name, expected in cases.items():
        balanced, gamma = balance_kl(kl_all, float(name), alpha.tolist())
        torch.testing.assert_close(balanced, expected)
        torch.testing.assert_close(gamma, schedules[f"kl_balancer/coeffs_{name}"])


def test_kl_balancing_weights_carry_no_gradient():
    kl_all = torch.rand(3, 4, requires_grad=True)
    balanced, gamma = balance_kl(kl_all, 0.5, [1.0, 2.0, 4.0])
    balanced.sum().backward()
    torch.testing.assert_close(kl_all.grad, 0.5 * gamma[:, None].expand(3, 4))


def test_kl_coefficient(schedules):
    for row in schedules.meta["kl_coeff"]:
        config = TrainConfig(kl_anneal_portion=row["total"] / 1000, kl_const_portion=row["const"] / 1000,
                             kl_const_coeff=row["min"])  # fmt: skip
        assert kl_coefficient(row["step"], 1000, config) == pytest.approx(row["value"], rel=1e-9)


def test_kl_coefficient_without_a_ramp():
    config = TrainConfig(kl_anneal_portion=0.0, kl_const_portion=0.5, kl_const_coeff=0.25)
    assert [kl_coefficient(step, 4, config) for step in range(4)] == [0.25, 0.25, 1.0, 1.0]


def test_norm_coefficient(schedules):
    for row in schedules.meta["wdn_anneal"]:
        config = TrainConfig(weight_decay_norm=row["final"], weight_decay_norm_init=row["init"], weight_decay_norm_anneal=True)
        assert norm_coefficient(row["kl_coeff"], config) == pytest.approx(row["value"], rel=1e-9)
    assert norm_coefficient(0.3, TrainConfig(weight_decay_norm=0.02)) == 0.02


def test_learning_rate(schedules):
    for table in schedules.meta["lr_schedule"]:
        fields = {k: v for k, v in table.items() if k in {f.name for f in dataclasses.fields(TrainConfig)}}
        config, steps = TrainConfig(**fields), table["iters_per_epoch"]
        for epoch, first, last in table["rows_epoch_firstlr_lastlr"]:
            assert learning_rate(epoch * steps, steps, config) == pytest.approx(first, rel=1e-9, abs=1e-15)
            assert learning_rate(epoch * steps + steps - 1, steps, config) == pytest.approx(last, rel=1e-9, abs=1e-15)


def test_learning_rate_without_warmup_starts_at_the_peak():
    config = TrainConfig(warmup_epochs=0, epochs=4, learning_rate=0.5, learning_rate_min=0.1)
    assert learning_rate(0, 10, config) == 0.5
    assert learning_rate(39, 10, config) == pytest.approx(0.1)


def test_configurations_that_cannot_be_are_refused_in_one_line():
    for values, words in (
        (dict(epochs=6, warmup_epochs=5), "epochs=6 leaves no cosine decay"),
        (dict(learning_rate=0.0), "learning_rate=0.0 must be above 0"),
        (dict(kl_balance="squared"), "did you mean square"),
        (dict(epochs=3.5), "epochs=3.5 must be a whole number"),
        (dict(batch_size=True), "batch_size=True must be a whole number"),
        (dict(learning_rate="0.1"), "learning_rate='0.1' must be a number"),
        (dict(flip=1), "flip=1 must be true or false"),
        (dict(dataset=[1]), r"dataset=\[1\] must be a word or nothing"),
        (dict(ema_decay=1.0), r"ema_decay=1.0 must be 0 \(no average\) or above, and below 1"),
        (dict(batch_size=10, accumulate=3), "accumulate=3 must divide batch_size=10"),
        (dict(kl_const_portion=1.5), "kl_const_portion=1.5 must be at most 1"),
        (dict(weight_decay_norm_anneal=True), "weight_decay_norm=0.0 must be above 0 when annealed"),
        (
            dict(weight_decay_norm=0.1, weight_decay_norm_init=0.0, weight_decay_norm_anneal=True),
            "weight_decay_norm_init=0.0 must be above 0 when annealed",
        ),
    ):
        with pytest.raises(InputError, match=words) as error:
            TrainConfig(**values)
        assert "\n" not in str(error.value)
    for values, words in (
        (dict(arch_instance="res_mbcon"), "did you mean res_mbconv"),
        (dict(image_size=(30, 30)), "nearest"),
        (dict(image_size=(32,)), r"image_size=\(32,\) must be height and width in pixels"),
        (dict(image_size=(8192, 8192)), "expected at most 4096 pixels a side"),
        (dict(num_nf=1.5), "num_nf=1.5 must be a whole number"),
        (dict(num_groups_per_scale=1, num_channels_dec=16), "must be equal"),
        (dict(num_postprocess_blocks=1), "must be equal"),
        (dict(num_x_bits=9), "num_x_bits=9 must be at most 8"),
    ):
        with pytest.raises(InputError, match=words) as error:
            NVAEConfig(**values)
        assert "\n" not in str(error.value)


def test_configuration_survives_json():
    config = NVAEConfig(image_size=(64, 32), training=TrainConfig(seed=7))
    assert NVAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match="num_latent_scale'.*num_latent_scales"):
        NVAEConfig.from_dict({"num_latent_scale": 2})


def test_likelihood_follows_data_and_mixture():
    for binarize, mixtures in itertools.product((True, False), (1, 10)):
        config = NVAEConfig(num_mixture_dec=mixtures, training=TrainConfig(binarize=binarize))
        expected = "bernoulli" if binarize else "normal" if mixtures == 1 else "dmol"
        assert config.output_likelihood == expected
