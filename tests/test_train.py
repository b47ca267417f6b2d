from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fisherprint import inference
from fisherprint.network import Network
from fisherprint.train import (
    RELATIVE_FLOOR,
    DivergedError,
    Epoch,
    Samples,
    State,
    TrainingConfig,
    augment,
    bayesian_loss,
    bias_reduced_loss,
    crb_loss,
    extra_inputs,
    mse_loss,
    relative_loss,
    train,
)


def decay(size: int, *, seed: int) -> Samples:
    """Exponential decays of rate R and frequency w at 8 times, with their exact bounds."""
    rng = np.random.default_rng(seed)
    R, w = rng.uniform(0.2, 2, (size, 1)), rng.uniform(-0.5, 0.5, (size, 1))
    t = np.linspace(0, 1.5, 8)
    s = np.exp((-R + 1j * w) * t)
    # Columns: Re M0, Im M0, R, w.
    G = np.stack([s, 1j * s, -t * s, 1j * t * s], axis=-1)
    F = np.einsum("stp,stq->spq", G.conj(), G).real
    crb = np.diagonal(np.linalg.inv(F), axis1=1, axis2=2)[:, 2:]
    return Samples(("R", "w"), s, np.hstack([R, w]), crb)


TINY, HELD_OUT = decay(48, seed=0), decay(40, seed=1)
CONFIG = TrainingConfig(
    estimated=("R",), epochs=2, batch_size=16, halve_every=1, warmup_steps=2, noise_std=0.05
)


def run(config: TrainingConfig, *, state: State | None = None) -> list[tuple[Epoch, State]]:
    return list(train(TINY, HELD_OUT, config, state=state))


@pytest.fixture(scope="module")
def tiny_run() -> list[tuple[Epoch, State]]:
    return run(CONFIG)


def outcome(steps: list[tuple[Epoch, State]]) -> list[object]:
    """All of the epochs but their time, and the final weights."""
    epochs = [dataclasses.replace(epoch, seconds=0) for epoch, _ in steps]
    return [epochs, {name: w.tolist() for name, w in steps[-1][1].weights.items() if w.ndim == 1}]


@pytest.mark.paper("Eq. 1")
def test_an_efficient_unbiased_estimator_scores_1() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand((20000, 3), generator=generator)
    crb = 10 ** (6 * torch.rand((20000, 3), generator=generator) - 6)
    estimate = truth + crb.sqrt() * torch.randn(crb.shape, generator=generator)
    # The square of a normal deviate has variance 2; allow four standard errors.
    assert abs(float(crb_loss(estimate, truth, crb)) - 1) < 4 * np.sqrt(2 / crb.numel())


@pytest.mark.paper("Eq. 1")
def test_crb_loss_written_out() -> None:
    estimate, truth = (
        torch.tensor([[1.0, 5.0], [2.0, 7.0]]),
        torch.tensor([[0.0, 2.0], [2.0, 3.0]]),
    )
    crb = torch.tensor([[2.0, 9.0], [1.0, 4.0]])
    assert float(crb_loss(estimate, truth, crb)) == (1 / 2 + 9 / 9 + 0 + 16 / 4) / 4


def test_an_infinite_bound_weighs_nothing() -> None:
    truth, crb = torch.zeros(3, 2), torch.full((3, 2), 4.0)
    crb[1] = torch.inf
    estimate = torch.full((3, 2), 2.0, requires_grad=True)
    loss = crb_loss(estimate, truth, crb)
    (gradient,) = torch.autograd.grad(loss, estimate)
    assert loss.tolist() == 1
    # d/dx of x²/4 over 4 bounded terms, at 2.
    assert gradient.tolist() == [[0.25, 0.25], [0, 0], [0.25, 0.25]]
    assert crb_loss(estimate[1:2], truth[1:2], crb[1:2]).tolist() == 0


def test_bayesian_loss_is_the_crb_loss_where_data_tell_and_mse_where_they_do_not() -> None:
    estimate, truth = torch.tensor([[1.0, 5.0], [2.0, 7.0]]), torch.zeros(2, 2)
    crb, spread = torch.tensor([[2.0, torch.inf], [4.0, 9.0]]), torch.tensor([2.0, 5.0])
    expected = (1 * (1 / 2 + 1 / 4) + 25 / 25 + 4 * (1 / 4 + 1 / 4) + 49 * (1 / 9 + 1 / 25)) / 4
    assert float(bayesian_loss(estimate, truth, crb, spread)) == pytest.approx(expected, rel=1e-6)


def test_bayesian_loss_of_who_knows_a_normal_prior_is_one() -> None:
    """θ from N(0, spread²), seen with variance CRB: the mean given the data scores 1."""
    generator = torch.Generator().manual_seed(3)
    crb, spread = torch.tensor([0.5, 4.0]).expand(20000, 2), torch.tensor([3.0, 1.0])
    truth = spread * torch.randn(crb.shape, generator=generator)
    seen = truth + crb.sqrt() * torch.randn(crb.shape, generator=generator)
    estimate = seen * spread.square() / (spread.square() + crb)
    # Four standard errors of a mean of squared normal numbers.
    loss = float(bayesian_loss(estimate, truth, crb, spread))
    assert abs(loss - 1) < 4 * np.sqrt(2 / crb.numel())


def test_training_with_the_bayesian_loss_is_validated_by_it() -> None:
    config = CONFIG.model_copy(update={"loss": "bayesian", "epochs": 1})
    epoch, _ = next(train(TINY, HELD_OUT, config))
    assert set(epoch.validation_losses) == {"crb", "mse", "relative", "bayesian"}
    assert epoch.validation_loss == epoch.validation_losses["bayesian"]
    # Above the loss of Eq. 1, by the error in units of the prior.
    spread = TINY.theta[:, 0].std()
    expected = epoch.validation_losses["crb"] + epoch.validation_losses["mse"] / spread**2
    assert epoch.validation_loss == pytest.approx(expected, rel=1e-4)


def test_mse_and_relative_loss_written_out() -> None:
    estimate, truth = torch.tensor([[1.0, -5.0], [2.0, 7.0]]), torch.tensor([[0.0, -4], [2.0, 3]])
    assert float(mse_loss(estimate, truth)) == (1 + 1 + 0 + 16) / 4
    floor = torch.tensor([0.25, 0.25])
    # θ = 0 is divided by the floor.
    expected = (1 / 0.25 + 1 / 4 + 0 + 4 / 3) / 4
    assert float(relative_loss(estimate, truth, floor)) == pytest.approx(expected, rel=1e-6)


def drawn(relative_bias: float, relative_variance: float, *, size: int, n_noise: int) -> tuple:
    """Estimates of a linear estimator: bias and noise in units of √CRB and CRB; truth; bound."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand((size, 2), generator=generator, dtype=torch.float64)
    crb = 10 ** (4 * torch.rand((size, 2), generator=generator, dtype=torch.float64) - 6)
    noise = torch.randn((size, n_noise, 2), generator=generator, dtype=torch.float64)
    mean = truth + relative_bias * crb.sqrt()
    return mean[:, None] + (relative_variance * crb[:, None]).sqrt() * noise, truth, crb


@pytest.mark.parametrize(
    ("b", "c", "options"),
    [
        (0.0, 3.0, {}),
        (0.7, 3.0, {"variance_weight": 0.5}),
        (0.7, 0.2, {}),
        (2.0, 3.0, {"variance_limit": 1.5, "variance_weight": 2.0}),
    ],
)
def test_bias_reduced_loss_of_a_linear_estimator(
    b: float, c: float, options: dict[str, float]
) -> None:
    """Bias b √CRB and variance c CRB: L = b² + λ max(c - δ, 0), at any N far from c = δ."""
    size, N = 4000, 50
    found = float(bias_reduced_loss(*drawn(b, c, size=size, n_noise=N), **options))
    λ, δ = options.get("variance_weight", 1.0), options.get("variance_limit", 1.0)
    # Of a term: variance of the squared mean less v/N, and of λ v; the two are independent.
    spread = 2 * (c / N) ** 2 + 4 * b**2 * c / N + 2 * (c / N) ** 2 / (N - 1)
    spread += (λ**2 * 2 * c**2 / (N - 1)) if c > δ else 0
    assert abs(found - b**2 - λ * max(c - δ, 0)) < 4 * np.sqrt(spread / (2 * size))


def test_an_efficient_unbiased_estimator_has_no_bias_to_reduce() -> None:
    size, N = 4000, 200
    found = float(bias_reduced_loss(*drawn(0.0, 1.0, size=size, n_noise=N)))
    # v scatters by s = √(2/(N-1)) around the limit, and the mean of max(s z, 0) is s/√(2π):
    # √(1/π(N-1)) = 0.04 is all that N_r realizations leave. The scatter of a term is below 2 s.
    s = np.sqrt(2 / (N - 1))
    assert abs(found - s / np.sqrt(2 * np.pi)) < 4 * 2 * s / np.sqrt(2 * size)


def test_bias_reduced_loss_has_the_slopes_of_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    estimates, truth, crb = drawn(0.5, 1.1, size=3, n_noise=4)
    crb[1, 0] = torch.inf
    estimates.requires_grad_()
    options = {"variance_weight": 0.7, "variance_limit": 0.9}
    (slope,) = torch.autograd.grad(bias_reduced_loss(estimates, truth, crb, **options), estimates)
    assert slope[1, :, 0].tolist() == [0] * 4
    for _ in range(5):
        step = torch.randn(estimates.shape, generator=generator, dtype=torch.float64)
        step *= 1e-5 * crb.where(crb.isfinite(), 1e-6).sqrt()[:, None]
        with torch.no_grad():
            up, down = (
                float(bias_reduced_loss(estimates + sign * step, truth, crb, **options))
                for sign in (1, -1)
            )
        # The loss is a parabola between its corners: what is left is rounding, 1e-16/1e-5.
        assert (up - down) / 2 == pytest.approx(float((slope * step).sum()), rel=1e-9)


def test_noises_of_one_fingerprint_share_their_m0_and_its_bound() -> None:
    config = TrainingConfig(noise_std=0.05, scale_range=(0.1, 1.0))
    c, crb = torch.zeros((3000, 2), dtype=torch.complex64), torch.ones(3000, 1)
    c[:, 0] = 1
    noisy, scaled = augment(c, crb, config, torch.Generator().manual_seed(0), noises=(9,))
    assert noisy.shape == (3000, 9, 2)
    np.testing.assert_allclose(
        torch.view_as_real(noisy - noisy.mean(dim=1, keepdim=True)).square().sum(dim=1).mean() / 8,
        0.05**2,
        # Relative standard error √(2/n) of a variance of n draws; allow four.
        rtol=4 * np.sqrt(2 / (3000 * 8 * 4)),
    )
    M0 = noisy[:, :, 0].mean(dim=1).abs()
    # The mean of 9 noises errs by 0.05/3 in each part; squares by that in relative terms.
    away = (scaled[:, 0].rsqrt() * 0.05 - M0).abs()
    assert float(away.mean()) < 0.05 / 3


def test_the_bias_reduced_loss_brings_the_bias_down() -> None:
    """Started from a network of the CRB loss, at a noise where that shrinks."""
    training, validation = decay(1024, seed=0), decay(256, seed=1)
    common = {"estimated": ("R",), "noise_std": 0.2, "scale_range": (0.5, 1.0)}
    first = TrainingConfig(
        epochs=6, batch_size=64, halve_every=2, warmup_steps=30, learning_rate=3e-3, **common
    )
    *_, (_, state) = train(training, validation, first)
    config = TrainingConfig(
        loss="bias-reduced", realizations=8, batch_size=512, epochs=4, halve_every=2,
        warmup_steps=5, learning_rate=1e-3, **common,
    )  # fmt: skip
    epochs = [e for e, _ in train(training, validation, config, start=state.weights)]
    still = config.model_copy(update={"learning_rate": 1e-12, "learning_rate_floor": 0.0})
    before, _ = next(train(TINY, validation, still, start=state.weights))
    assert epochs[-1].steps == 16
    assert epochs[-1].validation_loss == epochs[-1].validation_losses["bias-reduced"]
    # As much of a fall as another half of the first training brings the CRB loss is no chance.
    assert epochs[-1].validation_loss < 0.75 * before.validation_loss


def test_validation_losses_are_those_of_the_network_on_noise_of_their_own(
    tiny_run: list[tuple[Epoch, State]],
) -> None:
    epoch, state = tiny_run[-1]
    assert set(epoch.validation_losses) == {"crb", "mse", "relative"}
    assert epoch.validation_loss == epoch.validation_losses["crb"]
    # A fresh draw of noise, many times over: the same losses within their scatter.
    network, floor = Network.from_weights(state.weights), RELATIVE_FLOOR * TINY.theta[:, 0].std()
    c = torch.tensor(HELD_OUT.coefficients, dtype=torch.complex64)
    truth, bound = (
        torch.tensor(a[:, :1], dtype=torch.float32) for a in (HELD_OUT.theta, HELD_OUT.crb)
    )
    draws = []
    for seed in range(50):
        noisy, crb = augment(c, bound, CONFIG, torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            estimate = network(noisy)
        draws.append(
            [
                float(crb_loss(estimate, truth, crb)),
                float(mse_loss(estimate, truth)),
                float(relative_loss(estimate, truth, torch.tensor([floor]))),
            ]
        )
    found = [epoch.validation_losses[name] for name in ("crb", "mse", "relative")]
    # One draw against the mean of 50; allow four of the standard deviation of a draw.
    assert (np.abs(found - np.mean(draws, 0)) < 4 * np.std(draws, 0)).all()


@pytest.mark.paper("§2.4")
def test_augmentation_draws_what_the_paper_says() -> None:
    config = TrainingConfig(noise_std=0.02, scale_range=(0.1, 1.0))
    size = 20000
    c = torch.zeros((size, 3), dtype=torch.complex64)
    c[:, 0] = 1000
    noisy, crb = augment(c, torch.ones(size, 1), config, torch.Generator().manual_seed(0))
    noise = torch.view_as_real(noisy[:, 1:]).flatten()
    # Relative standard error of a standard deviation of n draws is √(1/2n); allow four.
    assert abs(float(noise.std()) / 0.02 - 1) < 4 * np.sqrt(1 / (2 * len(noise)))
    M0 = noisy[:, 0].numpy() / 1000
    # The noise adds at most 1e-4 to M0.
    for drawn, low, high in (
        (np.abs(M0), 0.1, 1.0),
        (np.mod(np.angle(M0), 2 * np.pi), 0.0, 2 * np.pi),
    ):
        ordered = (np.sort(drawn) - low) / (high - low)
        # Kolmogorov-Smirnov: the distance exceeds 2/√n once in 1500 times.
        assert np.abs(ordered - np.arange(size) / size).max() < 2 / np.sqrt(size)
    # (σ/|M0|)², where |M0| is known to 2e-5, at 0.1 relatively to 2e-4; squared, five of these.
    np.testing.assert_allclose(crb[:, 0], (0.02 / np.abs(M0)) ** 2, rtol=2e-3)


def test_infinite_bounds_stay_infinite_and_the_clean_signal_stays_clean() -> None:
    c, crb = torch.ones((4, 2), dtype=torch.complex64), torch.full((4, 1), torch.inf)
    _, scaled = augment(c, crb, TrainingConfig(), torch.Generator())
    assert scaled.isinf().all()
    assert (c == 1).all()


def test_training_approaches_the_bound() -> None:
    config = TrainingConfig(
        estimated=("R",), epochs=6, batch_size=128, halve_every=2, warmup_steps=30,
        scale_range=(0.5, 1.0), noise_std=0.08,
    )  # fmt: skip
    training, validation = decay(2048, seed=0), decay(1000, seed=1)
    losses = [epoch.validation_loss for epoch, _ in train(training, validation, config)]
    # The best constant c minimizes Σ (c-θ)²/CRB; for |M0| ~ U(1/2, 1), E|M0|² = 7/12.
    weight, theta = 1 / validation.crb[:, 0], validation.theta[:, 0]
    constant = (weight * theta).sum() / weight.sum()
    worst = (weight * (constant - theta) ** 2).mean() * (7 / 12) / 0.08**2
    # A long training ends at 0.78: at this noise it pays to shrink towards the prior.
    assert 0.7 < losses[-1] < 2 < worst / 3


REDUCED = CONFIG.model_copy(
    update={
        "loss": "bias-reduced",
        "realizations": 4,
        "variance_limit": 0.0,
        "batch_size": 64,
        "snr_input": True,
    }
)


@pytest.mark.parametrize("normalization", ["group", "batch"])
def test_resuming_repeats_a_run_with_options(normalization: str) -> None:
    config = REDUCED.model_copy(update={"normalization": normalization})
    whole = run(config)
    first = run(config.model_copy(update={"epochs": 1}))
    rest = run(config, state=first[-1][1])
    assert outcome(first + rest) == outcome(whole)
    for name, weight in whole[-1][1].weights.items():
        assert torch.equal(rest[-1][1].weights[name], weight)


# torch's compiler uses what torch has deprecated.
COMPILER = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.mark.slow
@COMPILER
def test_compiled_steps_are_those_of_the_plain_loop() -> None:
    # 48 samples in batches of 20: the last one is not compiled.
    config = CONFIG.model_copy(update={"compiled": True, "batch_size": 20})
    whole = run(config)
    assert whole[-1][1].config.compiled
    plain = run(config.model_copy(update={"compiled": False}))
    # Other sums in single precision, 1e-7 each, through three steps of Adam.
    assert whole[0][0].train_loss == pytest.approx(plain[0][0].train_loss, rel=1e-3)
    first = run(config.model_copy(update={"epochs": 1}))
    rest = run(config, state=first[-1][1])
    assert outcome(first + rest) == outcome(whole)
    with pytest.raises(ValueError, match="another compiled"):
        run(config.model_copy(update={"compiled": False}), state=first[-1][1])


def test_without_a_compiler_the_loop_is_the_plain_one(
    tiny_run: list[tuple[Epoch, State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no C++\ncompiler\n\nand a long story")

    monkeypatch.setattr(torch, "compile", missing)
    config = CONFIG.model_copy(update={"compiled": True})
    with pytest.warns(UserWarning, match=r"without compiled steps, .*: no C\+\+ compiler\."):
        steps = run(config)
    assert outcome(steps) == outcome(tiny_run)
    # What was done is what is resumed, with or without a compiler.
    assert not steps[0][1].config.compiled
    assert outcome([steps[0], *run(config, state=steps[0][1])]) == outcome(tiny_run)
    compiled = dataclasses.replace(steps[0][1], config=config)
    with pytest.raises(RuntimeError, match="as the run that is resumed did; got: no C"):
        run(config, state=compiled)


def test_without_instructions_for_bfloat16_products_are_in_float32(
    tiny_run: list[tuple[Epoch, State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"precision": "bfloat16"})
    monkeypatch.setattr(inference, "fastest", lambda: "bfloat16")
    rounded = run(config)
    assert outcome(rounded) != outcome(tiny_run)
    monkeypatch.setattr(inference, "fastest", lambda: "float32")
    with pytest.warns(UserWarning, match=r"instructions for bfloat16 .*in float32 instead\."):
        steps = run(config)
    assert outcome(steps) == outcome(tiny_run)
    # What was done is what is resumed, here and there.
    assert steps[0][1].config.precision == "float32"
    assert outcome([steps[0], *run(config, state=steps[0][1])]) == outcome(tiny_run)
    with pytest.warns(UserWarning, match=r"on slowly, as the run began\."):
        rest = run(config, state=rounded[0][1])
    assert outcome([rounded[0], *rest]) == outcome(rounded)


def test_a_start_is_trained_on(tiny_run: list[tuple[Epoch, State]]) -> None:
    weights = tiny_run[-1][1].weights
    still = CONFIG.model_copy(update={"learning_rate": 1e-12, "learning_rate_floor": 0.0})
    steps = list(train(TINY, HELD_OUT, still, start=weights))
    # Steps of 1e-12 do not change single precision; the validation noise is the same.
    assert steps[0][0].validation_losses == tiny_run[-1][0].validation_losses
    # It knows every phase: that of which the first coefficient is real, too.
    removed = still.model_copy(update={"remove_phase": True})
    epoch, state = next(train(TINY, HELD_OUT, removed, start=weights))
    turned = epoch.validation_losses["mse"]
    assert turned != tiny_run[-1][0].validation_losses["mse"]
    # The mean over as many other phases, of a network that has hardly learned any.
    assert turned == pytest.approx(tiny_run[-1][0].validation_losses["mse"], rel=0.2)
    with pytest.raises(ValueError, match="got other without_phase"):
        next(train(TINY, HELD_OUT, still, start=state.weights))
    for other, message in (
        ({"estimated": ("R", "w")}, r"got other linear\.13\.bias.* output_mean"),
        ({"bounded": True}, "got other output_range"),
        ({"snr_input": True}, "got other extra_inputs, linear.0.weight"),
    ):
        config = TrainingConfig(**{**CONFIG.model_dump(), **other})
        with pytest.raises(ValueError, match=message):
            next(train(TINY, HELD_OUT, config, start=weights))
    with pytest.raises(ValueError, match="both"):
        next(train(TINY, HELD_OUT, CONFIG, start=weights, state=tiny_run[0][1]))


def test_extra_inputs_are_known_parameters_and_the_signal_to_noise_ratio() -> None:
    config = CONFIG.model_copy(update={"inputs": ("w",), "snr_input": True})
    x = np.array([[3.0, 4j], [0, 0]]) * np.ones((2, 2, 2))
    known = np.array([[[0.3]], [[0.4]]])
    found = extra_inputs(config, x, known, noise_std=0.05)
    expected = [[[w, np.log(100)], [w, -np.inf]] for w in (0.3, 0.4)]
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert extra_inputs(CONFIG, x, np.empty(0), noise_std=0.05).shape == (2, 2, 0)


def test_the_network_is_given_what_the_config_says() -> None:
    """Validation with inputs by hand, for a network of all options."""
    config = TrainingConfig(
        **{**CONFIG.model_dump(), "inputs": ("w",), "snr_input": True, "bounded": True}
    )
    epoch, state = run(config)[-1]
    network = Network.from_weights(state.weights)
    low, high = network.output_range[:, 0].tolist()
    assert (low, high) == pytest.approx((TINY.theta[:, 0].min(), TINY.theta[:, 0].max()))
    c, bound, truth, w = (
        torch.tensor(a, dtype=kind)
        for a, kind in (
            (HELD_OUT.coefficients, torch.complex64),
            (HELD_OUT.crb[:, :1], torch.float32),
            (HELD_OUT.theta[:, :1], torch.float32),
            (HELD_OUT.theta[:, 1:], torch.float64),
        )
    )
    losses = []
    for seed in range(50):
        noisy, crb = augment(c, bound, config, torch.Generator().manual_seed(seed))
        x = noisy.numpy().astype(np.complex128)
        extra = torch.from_numpy(extra_inputs(config, x, w.numpy(), noise_std=config.noise_std))
        with torch.inference_mode():
            estimate = network(noisy, extra)
        assert (low <= estimate).all() and (estimate <= high).all()
        losses.append(float(crb_loss(estimate, truth, crb)))
    # One draw against the mean of 50; allow four of the standard deviation of a draw.
    assert abs(epoch.validation_loss - np.mean(losses)) < 4 * np.std(losses)


def test_batch_normalization_needs_more_than_one_sample() -> None:
    config = CONFIG.model_copy(update={"normalization": "batch", "batch_size": 47})
    with pytest.raises(ValueError, match="got 48 in batches of 47: the last has no spread"):
        run(config)


def test_resuming_repeats_the_uninterrupted_run(tiny_run: list[tuple[Epoch, State]]) -> None:
    first = run(CONFIG.model_copy(update={"epochs": 1}))
    kept = {name: moment.clone() for name, moment in first[-1][1].moments.items()}
    rest = run(CONFIG, state=first[-1][1])
    assert outcome(first + rest) == outcome(tiny_run)
    for name, weight in tiny_run[-1][1].weights.items():
        assert torch.equal(rest[-1][1].weights[name], weight)
    for name, moment in tiny_run[-1][1].moments.items():
        assert torch.equal(rest[-1][1].moments[name], moment)
    # The state that was resumed is a value: training on left it alone.
    assert all(torch.equal(first[-1][1].moments[name], kept[name]) for name in kept)
    assert run(CONFIG, state=rest[-1][1]) == []


@pytest.mark.parametrize("normalization", ["group", "batch"])
def test_the_network_may_be_an_average_of_the_last_steps(normalization: str) -> None:
    # An epoch is one step.
    config = CONFIG.model_copy(
        update={"batch_size": 48, "epochs": 5, "normalization": normalization}
    )
    plain = run(config)
    config = config.model_copy(update={"average_steps": 3})
    whole = run(config)
    for (_, state), (_, other) in zip(whole, plain, strict=True):
        assert all(torch.equal(state.last[name], w) for name, w in other.weights.items())
    for name, weight in whole[-1][1].weights.items():
        steps = [state.weights[name] for _, state in plain]
        if not weight.is_floating_point():
            assert torch.equal(weight, steps[-1])
            continue
        expected = torch.stack(steps[:3]).mean(dim=0)
        for step in steps[3:]:
            expected = expected + (step - expected) / 3
        # Sums in single precision.
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    # The average is validated.
    assert whole[0][0].validation_loss == plain[0][0].validation_loss
    assert whole[-1][0].train_loss == plain[-1][0].train_loss
    assert whole[-1][0].validation_loss != plain[-1][0].validation_loss
    head = run(config.model_copy(update={"epochs": 2}))
    rest = run(config, state=head[-1][1])
    assert outcome(head + rest) == outcome(whole)
    for name, weight in whole[-1][1].weights.items():
        assert torch.equal(rest[-1][1].weights[name], weight)


CHANGES = {
    "estimated": ("w",),
    "inputs": ("w",),
    "snr_input": True,
    "bounded": True,
    "normalization": "batch",
    "loss": "mse",
    "realizations": 8,
    "variance_weight": 0.5,
    "variance_limit": 0.5,
    "epochs": 1,
    "batch_size": 24,
    "learning_rate": 0.02,
    "warmup_steps": 0,
    "halve_every": 2,
    "learning_rate_floor": 0.008,
    "average_steps": 4,
    "scale_range": (0.5, 1.0),
    "noise_std": 0.02,
    "precision": "bfloat16",
    "remove_phase": True,
    "compiled": True,
    "seed": 1,
}


# Compilation takes a minute.
FIELDS = [
    pytest.param(name, marks=[pytest.mark.slow, COMPILER]) if name == "compiled" else name
    for name in TrainingConfig.model_fields
]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_config_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On any processor.
    monkeypatch.setattr(inference, "fastest", lambda: "bfloat16")
    base = REDUCED if name in ("realizations", "variance_weight", "variance_limit") else CONFIG
    config = TrainingConfig(**{**base.model_dump(), name: CHANGES[name]})
    assert outcome(run(config)) != outcome(run(base))


@pytest.mark.paper("§2.6")
def test_learning_rate_halves_down_to_the_floor_after_the_warm_up() -> None:
    config = TrainingConfig(halve_every=40, warmup_steps=200, learning_rate_floor=1e-5)
    for epoch, expected in ((2, 0.01), (40, 0.01), (41, 0.005), (81, 0.0025), (1000, 1e-5)):
        assert config.learning_rate_at(epoch, 180 * epoch) == expected
    assert config.learning_rate_at(1, 50) == 0.01 / 4


def test_steps_and_epochs_are_counted(tiny_run: list[tuple[Epoch, State]]) -> None:
    assert [(e.number, e.steps, s.epochs) for e, s in tiny_run] == [(1, 3, 1), (2, 3, 2)]
    assert [e.learning_rate for e, _ in tiny_run] == [0.01, 0.005]
    # 48 samples in batches of 20: the last one is smaller.
    assert run(CONFIG.model_copy(update={"batch_size": 20, "epochs": 1}))[0][0].steps == 3


def test_outputs_start_at_the_prior(tiny_run: list[tuple[Epoch, State]]) -> None:
    weights = tiny_run[0][1].weights
    # Stored in single precision.
    assert float(weights["output_mean"]) == pytest.approx(TINY.theta[:, 0].mean(), rel=1e-6)
    assert float(weights["output_spread"]) == pytest.approx(TINY.theta[:, 0].std(), rel=1e-6)


def test_samples_without_a_bound_do_not_poison_the_weights() -> None:
    crb = TINY.crb.copy()
    crb[::5] = np.inf
    config = CONFIG.model_copy(update={"epochs": 1})
    holed = dataclasses.replace(TINY, crb=crb)
    ((epoch, state),) = train(holed, HELD_OUT, config)
    assert np.isfinite(epoch.train_loss)
    assert all(weight.isfinite().all() for weight in state.weights.values())
    # Only their bounds differ, so what they weigh must show.
    assert epoch.train_loss != run(config)[0][0].train_loss


def test_divergence_carries_the_last_good_state() -> None:
    steps = train(TINY, HELD_OUT, CONFIG.model_copy(update={"learning_rate": 1e25}))
    with pytest.raises(
        DivergedError, match=r"in epoch 1, after 0 good ones\. Lower learning_rate"
    ) as caught:
        list(itertools.islice(steps, 2))
    state = caught.value.state
    assert state.epochs == 0
    assert all(weight.isfinite().all() for weight in state.weights.values())


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIG, REDUCED], ids=["crb", "bias-reduced"])
def test_the_gpu_trains_alike(config: TrainingConfig) -> None:
    # Weights stay the initial ones: their steps are below single precision.
    still = {"learning_rate": 1e-12, "learning_rate_floor": 0.0, "epochs": 40}
    config = config.model_copy(update=still)
    (here, _), (there, state) = (
        list(train(TINY, HELD_OUT, config, device=device))[-1] for device in ("cpu", "cuda")
    )
    # The same validation noise, in sums of another order.
    for name, loss in here.validation_losses.items():
        assert there.validation_losses[name] == pytest.approx(loss, rel=1e-4)
    assert all(weight.device.type == "cpu" for weight in state.weights.values())
    # Training noise is drawn on each device: equal in distribution.
    losses = np.array(
        [
            [epoch.train_loss for epoch, _ in train(TINY, HELD_OUT, config, device=device)]
            for device in ("cpu", "cuda")
        ]
    )
    scatter = np.hypot(*losses.std(axis=1)) / np.sqrt(config.epochs)
    assert abs(np.diff(losses.mean(axis=1))[0]) < 4 * scatter
    # Other epochs see other noise, and each repeats itself.
    assert len(set(losses[1])) == config.epochs
    again, _ = next(train(TINY, HELD_OUT, config, device="cuda"))
    assert again.train_loss == pytest.approx(losses[1, 0], rel=1e-5)


ON_GPU = {
    "float32": CONFIG,
    "bias-reduced": REDUCED,
    "batch": CONFIG.model_copy(update={"normalization": "batch"}),
    "compiled bfloat16": CONFIG.model_copy(update={"compiled": True, "precision": "bfloat16"}),
}


@pytest.mark.gpu
@COMPILER
@pytest.mark.parametrize("base", ON_GPU.values(), ids=ON_GPU.keys())
def test_the_gpu_repeats_the_steps_it_recorded(
    base: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 48 samples in batches of 20, the last one smaller: recorded from the fifth step on.
    change = {"epochs": 6, "batch_size": 20, "average_steps": 4, "snr_input": True}
    config = base.model_copy(update=change)
    whole = list(train(TINY, HELD_OUT, config, device="cuda"))
    rest = list(train(TINY, HELD_OUT, config, state=whole[2][1], device="cuda"))
    monkeypatch.setattr("fisherprint.train.loop.Recorded", lambda step: step)
    plain = list(train(TINY, HELD_OUT, config, device="cuda"))
    # The same kernels; sums on the device have no fixed order, and Adam magnifies rounding.
    for (epoch, _), (other, _) in zip(whole, plain, strict=True):
        assert epoch.train_loss == pytest.approx(other.train_loss, rel=1e-2)
        assert epoch.validation_loss == pytest.approx(other.validation_loss, rel=1e-2)
    assert rest[-1][0].validation_loss == pytest.approx(whole[-1][0].validation_loss, rel=1e-2)
    # It is training that is compared.
    assert whole[-1][0].train_loss < 0.95 * whole[0][0].train_loss


@pytest.mark.gpu
def test_the_gpu_resumes_where_it_was(tiny_run: list[tuple[Epoch, State]]) -> None:
    first, second = list(train(TINY, HELD_OUT, CONFIG, device="cuda"))
    ((epoch, _),) = train(TINY, HELD_OUT, CONFIG, state=first[1], device="cuda")
    # Sums on the device have no fixed order.
    assert epoch.train_loss == pytest.approx(second[0].train_loss, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimated": ("T1", "T1")}, "Name each once"),
        ({"estimated": ()}, "at least 1 item"),
        ({"scale_range": (0.0, 1.0)}, "expected 0 < low ≤ high"),
        ({"learning_rate_floor": 0.1}, "Lower the floor"),
        ({"noise_std": 0.0}, "greater than 0"),
        ({"loss": "mae"}, "'crb', 'mse', 'relative', 'bayesian' or 'bias-reduced'"),
        ({"loss": "bias-reduced"}, "multiple of realizations = 200; got 512.*6400 are 32 finger"),
        (
            {"realizations": 5},
            "expected realizations with loss = .bias-reduced.; got it with 'crb'",
        ),
        ({"variance_limit": 2.0}, "expected variance_limit with loss"),
        ({"inputs": ("T1", "B1")}, "expected inputs that are not estimated; got T1 in both"),
        ({"inputs": ("B1", "B1")}, "Name each once"),
        ({"epoch": 3}, "Extra inputs are not permitted"),
        ({"learning_rate": np.inf}, "finite number"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crb": -TINY.crb}, "crb must be positive or infinite"),
        ({"crb": np.nan * TINY.crb}, "crb must be positive or infinite; got nan"),
        ({"theta": np.nan * TINY.theta}, "theta must be finite"),
        ({"coefficients": np.inf * TINY.coefficients.real}, "coefficients must be finite"),
        ({"theta": TINY.theta[1:]}, r"axes \(S=48, E=2\); got the shape \(47, 2\)"),
        ({"names": ("R",)}, r"axes \(S=48, E=1\)"),
    ],
)
def test_samples_refuse(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_unknown_parameters_are_listed() -> None:
    with pytest.raises(KeyError, match="'T1'; known are R, w"):
        next(train(TINY, HELD_OUT, CONFIG.model_copy(update={"estimated": ("T1",)})))


def test_a_state_of_another_run_is_refused(tiny_run: list[tuple[Epoch, State]]) -> None:
    state = tiny_run[0][1]
    with pytest.raises(ValueError, match="got another batch_size, seed"):
        run(CONFIG.model_copy(update={"seed": 3, "batch_size": 5}), state=state)
    narrow = dataclasses.replace(TINY, coefficients=TINY.coefficients[:, :4])
    held_out = dataclasses.replace(HELD_OUT, coefficients=HELD_OUT.coefficients[:, :4])
    with pytest.raises(ValueError, match="rank 8, which the resumed network takes; got rank 4"):
        next(train(narrow, held_out, CONFIG, state=state))
    with pytest.raises(ValueError, match="validation coefficients must have the axes"):
        next(train(TINY, held_out, CONFIG))
