from __future__ import annotations

import numpy as np
import pytest
import torch

from fisherprint.network import Network, as_estimator

RANK = 13
MEAN = np.array([0.12, 1.6, 0.1])
SPREAD = np.array([0.08, 0.8, 0.1])


def make(seed: int = 0, rank: int = RANK) -> Network:
    return Network(rank, MEAN, SPREAD, generator=torch.Generator().manual_seed(seed))


def coefficients(*shape: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*shape, RANK)) + 1j * rng.standard_normal((*shape, RANK))


@pytest.fixture(scope="module")
def network() -> Network:
    """A network whose every weight matters: biases and normalization are not at their start."""
    network = make()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name or "bias" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return network


def slow_forward(network: Network, c: np.ndarray) -> np.ndarray:
    """Fig. 2 written out layer by layer for one voxel, in double precision."""
    weights = {name: w.double().numpy() for name, w in network.state_dict().items()}

    def linear(number: int, x: np.ndarray) -> np.ndarray:
        return weights[f"linear.{number - 1}.weight"] @ x + weights[f"linear.{number - 1}.bias"]

    def relu_norm(number: int, y: np.ndarray, groups: int) -> np.ndarray:
        # 1e-5 is the usual constant against division by zero.
        if "norm.0.running_mean" in weights:
            mean, variance = (weights[f"norm.{number - 1}.running_{k}"] for k in ("mean", "var"))
            y = (y - mean) / np.sqrt(variance + 1e-5)
        else:
            y = y.reshape(groups, -1)
            y = y - y.mean(axis=1, keepdims=True)
            y = (y / np.sqrt((y**2).mean(axis=1, keepdims=True) + 1e-5)).ravel()
        y = y * weights[f"norm.{number - 1}.weight"]
        return np.maximum(y + weights[f"norm.{number - 1}.bias"], 0)

    x0 = np.concatenate([c.real, c.imag])
    x0 = x0 / np.sqrt((x0**2).sum())
    y1 = linear(1, x0)
    y2 = linear(2, relu_norm(1, y1, 16))
    y3 = linear(3, relu_norm(2, y2, 16))
    y4 = linear(4, relu_norm(3, y3, 16))
    y5 = linear(5, relu_norm(4, y4, 16))
    y6 = linear(6, relu_norm(5, y5, 16))
    y7 = linear(7, relu_norm(6, y6, 16)) + y3
    y8 = linear(8, relu_norm(7, y7, 16))
    y9 = linear(9, relu_norm(8, y8, 16)) + y2
    y10 = linear(10, relu_norm(9, y9, 16))
    y11 = linear(11, relu_norm(10, y10, 16)) + y1
    y12 = linear(12, relu_norm(11, y11, 16)) + x0
    y13 = linear(13, relu_norm(12, y12, 2))
    y14 = linear(14, relu_norm(13, y13, 2))
    return MEAN.astype(np.float32) + SPREAD.astype(np.float32) * y14


@pytest.mark.paper("Fig. 2", "§2.5")
def test_forward_is_fig_2_written_out(network: Network) -> None:
    c = coefficients(5)
    slow = np.array([slow_forward(network, voxel) for voxel in c])
    fast = as_estimator(network)(c)
    # Single precision, 1e-7, through 14 layers.
    np.testing.assert_allclose((fast - slow) / SPREAD, 0, atol=2e-5)


@pytest.mark.paper("Fig. 2")
@pytest.mark.parametrize("rank", [13, 15, 2])
def test_widths(rank: int) -> None:
    state = make(rank=rank).state_dict()
    widths = [state["linear.0.weight"].shape[1]]
    widths += [state[f"linear.{i}.weight"].shape[0] for i in range(14)]
    wide = [128, 256, 512, 1024, 768, 640, 512, 384, 256, 192, 128]
    assert widths == [2 * rank, *wide, 2 * rank, 10, 3]
    assert "linear.14.weight" not in state


def test_scale_of_the_coefficients_does_not_matter(network: Network) -> None:
    estimate = as_estimator(network)
    c = coefficients(4)
    for scale in (1e-30, 1e-3, 1e30):
        # The norm is taken in double precision; what is left is the rounding of the input.
        np.testing.assert_allclose(estimate(scale * c), estimate(c), rtol=1e-4)


def test_voxels_without_signal_are_nan_and_leave_the_others_alone(network: Network) -> None:
    estimate = as_estimator(network)
    c = coefficients(6)
    clean = estimate(c)
    c[1], c[2, 3], c[3, 0], c[4, 5] = 0, np.nan, np.inf, 1j * np.nan
    estimates = estimate(c)
    assert np.isnan(estimates[1:5]).all()
    np.testing.assert_array_equal(estimates[[0, 5]], clean[[0, 5]])


def test_estimator_keeps_axes_and_does_not_depend_on_chunks(network: Network) -> None:
    c = coefficients(3, 4)
    whole = as_estimator(network)(c)
    assert whole.shape == (3, 4, 3)
    assert whole.dtype == np.float64
    # Products of other sizes are summed in another order, in single precision.
    rows = np.stack([as_estimator(network)(row) for row in c])
    np.testing.assert_allclose(rows, whole, rtol=0, atol=2e-5)
    assert as_estimator(network)(c[:0]).shape == (0, 4, 3)


def test_estimator_refuses_another_rank(network: Network) -> None:
    with pytest.raises(ValueError, match=r"axes \(..., K=13\); got the shape \(13, 5\)"):
        as_estimator(network)(coefficients(5).T)


def test_initial_weights_follow_their_generator_and_no_other() -> None:
    before = torch.get_rng_state()
    one, same, other = (make(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["linear.5.weight"], other["linear.5.weight"])


def test_initial_weights_keep_the_variance_through_relu() -> None:
    for name, weight in make().state_dict().items():
        if "linear" in name and "weight" in name and weight.numel() > 1000:
            # He et al.: variance 2/fan_in. Its relative standard error is √(2/n); allow five.
            ratio = float(weight.var()) * weight.shape[1] / 2
            assert abs(ratio - 1) < 5 * np.sqrt(2 / weight.numel())


def test_weights_make_the_same_network(network: Network) -> None:
    again = Network.from_weights(network.state_dict())
    assert again.rank == RANK
    c = coefficients(3)
    np.testing.assert_array_equal(as_estimator(again)(c), as_estimator(network)(c))


OPTIONS = {
    "output_range": np.array([[0.0, 0.1, 0.002], [0.6, 10.0, 1.0]]),
    "extra_inputs": np.array([[0.0, 1.0, 3.0], [500.0, 0.2, 0.6]]),
    "normalization": "batch",
}


def with_options(**options: object) -> Network:
    generator = torch.Generator().manual_seed(0)
    return Network(RANK, MEAN, SPREAD, **options, generator=generator).eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_tell_the_options(name: str) -> None:
    network = with_options(**{name: OPTIONS[name]})
    again = Network.from_weights(network.state_dict())
    assert again.rank == RANK and again.n_extra == (3 if name == "extra_inputs" else 0)
    c = coefficients(3)
    channels = np.concatenate([c, [[300.0, 1.1, 2.0]] * 3], axis=1) if again.n_extra else c
    found = as_estimator(again)(channels)
    np.testing.assert_array_equal(found, as_estimator(network)(channels))
    # Each option does something.
    assert (found != as_estimator(with_options())(c)).all()


def test_extra_inputs_stand_behind_the_coefficients_in_their_own_scale() -> None:
    network = with_options(extra_inputs=OPTIONS["extra_inputs"])
    c, extra = coefficients(4), np.array([[500.0, 1.2, 3.6]])
    x = network.features(torch.from_numpy(c), torch.from_numpy(np.repeat(extra, 4, axis=0)))
    norm = np.sqrt((np.abs(c) ** 2).sum(axis=1, keepdims=True))
    expected = np.hstack([c.real / norm, c.imag / norm, np.ones((4, 3))])
    # Single precision, as the constants.
    np.testing.assert_allclose(x, expected, atol=1e-6)
    # The weights behind them are as many as the inputs; all others are those without.
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    plain = {k: tuple(v.shape) for k, v in with_options().state_dict().items()}
    assert shapes.pop("linear.0.weight") == (128, 2 * RANK + 3)
    assert shapes.pop("extra_inputs") == (2, 3)
    assert plain.pop("linear.0.weight") == (128, 2 * RANK)
    assert shapes == plain
    with pytest.raises(ValueError, match=r"axes \(B=4, n=3\); got \(4, 1\)"):
        network.features(torch.from_numpy(coefficients(4)), torch.ones(4, 1))
    with pytest.raises(ValueError, match="expected the network's 3 extra inputs"):
        network(torch.from_numpy(c))
    with pytest.raises(ValueError, match=r"axes \(..., K=13 \+ n=3\); got the shape \(4, 13\)"):
        as_estimator(network)(c)


def test_bounded_outputs_keep_value_and_slope_and_stay_inside() -> None:
    limits = OPTIONS["output_range"]
    bounded, free = with_options(output_range=limits), with_options()
    y = torch.linspace(-1e-3, 1e-3, 3)[:, None].expand(3, 3)
    near, tangent = bounded._in_units(y), free._in_units(y)
    # The logistic function departs from its tangent by the square of y; 1e-6 of the value is
    # single precision.
    np.testing.assert_allclose(near, tangent, rtol=1e-5)
    far = bounded._in_units(torch.tensor([[-1e3], [1e3]]).expand(2, 3))
    np.testing.assert_allclose(far, limits, rtol=1e-6, atol=1e-7)


def test_batch_normalization_goes_by_the_statistics_of_the_training() -> None:
    network = with_options(normalization="batch").train()
    c = coefficients(64)
    with torch.no_grad():
        for _ in range(3):
            network(torch.from_numpy(c))
    network.eval()
    x = network.features(torch.from_numpy(c)).double().numpy()
    first = x @ network.linear[0].weight.detach().double().numpy().T
    # Running values take a tenth of the batch each time, starting from mean 0 and variance 1.
    kept = 0.9**3
    found = network.norm[0]
    expected = (1 - kept) * first.mean(axis=0), kept + (1 - kept) * first.var(axis=0, ddof=1)
    np.testing.assert_allclose(found.running_mean, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.running_var, expected[1], rtol=1e-5)
    slow = np.array([slow_forward(network, voxel) for voxel in c[:5]])
    # Single precision, 1e-7, through 14 layers.
    np.testing.assert_allclose((as_estimator(network)(c[:5]) - slow) / SPREAD, 0, atol=2e-5)


def test_weights_of_another_network_are_refused(network: Network) -> None:
    state = network.state_dict()
    with pytest.raises(ValueError, match="weights of a fisherprint network"):
        Network.from_weights({"fc.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"linear\.3\.bias"):
        Network.from_weights({k: v for k, v in state.items() if k != "linear.3.bias"})


def test_bfloat16_rounds_the_wide_products_alone(network: Network) -> None:
    c = torch.from_numpy(coefficients(200))
    with torch.inference_mode():
        exact = network(c)
        rounded = network(c, products=torch.bfloat16)
        # Far less than the 8 bits of bfloat16 resolve: seen only if the input stays exact.
        moved = network(c * (1 + 1e-4 * torch.arange(RANK)), products=torch.bfloat16)
    error = ((rounded - exact) / torch.tensor(SPREAD)).square().mean().sqrt()
    # Each of 10 layers rounds x and the product to 8 bits, relative error at most 2^-9 each.
    assert 0 < error < 20 * 2**-9
    assert (moved != rounded).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, MEAN, SPREAD), "rank must be at least 2; got 1"),
        ((13, MEAN, SPREAD[:2]), r"shape \(E,\); got \(3,\) and \(2,\)"),
        ((13, MEAN, 0 * SPREAD), "spreads finite and positive"),
        ((13, np.nan * MEAN, SPREAD), "means must be finite"),
    ],
)
def test_impossible_networks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(*arguments, generator=torch.Generator())


def test_a_network_without_the_phase_sees_only_what_is_beside_it(network: Network) -> None:
    turned = Network(
        RANK, MEAN, SPREAD, remove_phase=True, generator=torch.Generator().manual_seed(0)
    )
    turned.load_state_dict({**network.state_dict(), "without_phase": torch.tensor(True)})
    c = coefficients(20)
    c[3, 0] = 0  # has no phase to turn by: it stays as it is
    phase = np.exp(1j * np.linspace(0, 6, 20))[:, None]
    phase[3] = 1
    # Single precision: rounding of 1e-7 of the input comes out a few times larger.
    np.testing.assert_allclose(
        as_estimator(turned)(c * phase), as_estimator(turned)(c), rtol=0, atol=1e-4 * SPREAD.min()
    )
    first = c[:, :1].copy()
    first[3] = 1
    np.testing.assert_allclose(
        as_estimator(turned)(c),
        as_estimator(network)(c * first.conj() / abs(first)),
        rtol=0,
        atol=1e-4 * SPREAD.min(),
    )
    assert np.abs(as_estimator(network)(c * phase) - as_estimator(network)(c)).max() > 1e-2
    again = Network.from_weights(turned.state_dict())
    np.testing.assert_array_equal(as_estimator(again)(c), as_estimator(turned)(c))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_range": [[0.0] * 3, [0.1, 9.0, 1.0]]}, "low < mean < high"),
        ({"output_range": [[0.0] * 3, [np.inf] * 3]}, "finite low < mean < high"),
        ({"output_range": [0.0, 1.0]}, r"axes \(2, E=3\)"),
        ({"extra_inputs": [[1.0], [0.0]]}, "positive spreads"),
        ({"extra_inputs": [1.0, 2.0]}, r"axes \(2, n\)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_options(**options)
