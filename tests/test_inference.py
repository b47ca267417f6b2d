from __future__ import annotations

import numpy as np
import pytest
import torch

from fisherprint import inference
from fisherprint.network import Network, as_estimator

RANK = 5
MEAN, SPREAD = np.array([0.12, 1.6, 0.1]), np.array([0.08, 0.8, 0.1])
OPTIONS = {
    "plain": {},
    "bounded": {"output_range": [[0.0, 0.1, 0.002], [0.6, 10.0, 1.0]]},
    "extra inputs": {"extra_inputs": [[0.0, 1.0], [500.0, 0.2]]},
    "batch": {"normalization": "batch"},
    "batch, extra": {"normalization": "batch", "extra_inputs": [[0.0, 1.0], [500.0, 0.2]]},
    "without phase": {"remove_phase": True},
}


def network(**options: object) -> Network:
    """A network whose every weight and statistic matters."""
    generator = torch.Generator().manual_seed(3)
    made = Network(RANK, MEAN, SPREAD, **options, generator=generator).eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if ("norm" in name or "bias" in name) and tensor.is_floating_point():
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
    return made


def voxels(n: int, n_extra: int = 0) -> np.ndarray:
    rng = np.random.default_rng(4)
    c = rng.standard_normal((n, RANK)) + 1j * rng.standard_normal((n, RANK))
    extra = [0, 1] + rng.standard_normal((n, 2)) * [500, 0.2]
    return np.hstack([c, extra[:, :n_extra]])


def forward(network: Network, given: np.ndarray) -> np.ndarray:
    """The network itself, in another order of its sums."""
    tensor = torch.from_numpy(given)
    with torch.inference_mode():
        return network(tensor[:, :RANK], tensor[:, RANK:].real).numpy()


@pytest.mark.parametrize("name", OPTIONS)
def test_estimates_are_those_of_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(**OPTIONS[name])
    # Several parts, the last one smaller.
    monkeypatch.setattr(inference, "_CHUNK", 16)
    given = voxels(70, made.n_extra)
    given[3, :RANK], given[40, 1], given[69, 2] = 0, np.nan, np.inf
    expected = forward(made, given)
    assert np.isnan(expected).any(axis=1).sum() == 3
    found = as_estimator(made)(given)
    # Single precision, 1e-7, through 14 layers.
    np.testing.assert_allclose(found / SPREAD, expected / SPREAD, rtol=0, atol=2e-5)


def test_bfloat16_rounds_the_widest_layers_alone() -> None:
    made = network()
    rounded = inference.layers(made.linear[:-1], made.norm, "bfloat16")
    kinds = [isinstance(layer.weight, torch.Tensor) for layer in rounded]
    # 512-1024-768-640-512.
    assert [number for number, kind in enumerate(kinds, start=1) if kind] == [4, 5, 6, 7]
    given = voxels(200)
    error = (as_estimator(made, precision="bfloat16")(given) - forward(made, given)) / SPREAD
    # Four layers round inputs, weights and products to 8 bits, relative error at most 2^-9 each.
    assert 0 < np.sqrt((error**2).mean()) < np.sqrt(4 * 3) * 2**-9


def test_numbers_become_bfloat16_and_back_as_in_torch() -> None:
    rng = np.random.default_rng(5)
    y = np.exp(rng.uniform(-80, 80, (64, 96))).astype(np.float32)
    bits = y.view(np.uint32)
    bits[0] = bits[0] & 0xFFFF0000 | 0x8000  # in the middle between two
    bits[1] = bits[1] & 0xFFFF0000 | 0x8001
    bits[2], y[3] = 0x7F7FFFFF, np.inf  # rounds up to infinity
    # Values that rounding could turn into numbers.
    bits[4, ::2], bits[4, 1::2], bits[5] = 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001
    zeros, ones = np.zeros(96, np.float32), np.ones(96, np.float32)
    halves, back = np.empty(y.shape, np.uint16), np.empty_like(y)
    # y >= 0 without normalization is y.
    inference._normalize(y, zeros, None, 0, 0.0, ones, zeros, None, halves)
    inference._normalize(halves, zeros, None, 0, 0.0, ones, zeros, None, back)
    expected = torch.from_numpy(y).bfloat16()
    np.testing.assert_array_equal(back, expected.float().numpy())
    number = ~np.isnan(y)
    assert (halves[number] == expected.view(torch.uint16).numpy()[number]).all()
    assert number.sum() == 62 * 96


def test_bfloat16_yields_nan_where_float32_does() -> None:
    made, given = network(), voxels(70)
    given[3], given[40, 1], given[69, 2] = 0, np.nan, np.inf
    found = as_estimator(made, precision="bfloat16")(given)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(forward(made, given)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_bfloat16_is_fastest_with_instructions_for_it_alone(
    flags: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert inference.fastest() == expected


def test_an_early_torch_that_tells_nothing_multiplies_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert inference.fastest() == "float32"


def test_the_weights_are_those_of_the_time_the_estimator_was_made() -> None:
    made = network()
    estimate, given = as_estimator(made), voxels(3)
    before = estimate(given)
    with torch.no_grad():
        made.linear[13].bias += 1
    np.testing.assert_array_equal(estimate(given), before)
    assert np.abs(as_estimator(made)(given) - before).min() > 0.5 * SPREAD.min()


def test_threads_have_one_core_each_and_an_error_in_one_is_raised() -> None:
    before, seen = torch.get_num_threads(), []

    def function(rows: np.ndarray) -> np.ndarray:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        if np.isnan(rows).any():
            raise ArithmeticError("here")
        return 2 * rows

    rows = np.arange(4 * inference._CHUNK + 3.0)[:, None]
    result = np.empty_like(rows)
    inference.in_parts(function, rows, result)
    np.testing.assert_array_equal(result, 2 * rows)
    assert seen == [(1, True)] * 5
    assert torch.get_num_threads() == before
    rows[-1] = np.nan
    with pytest.raises(ArithmeticError, match="here"):
        inference.in_parts(function, rows, result)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'float16' on cpu"):
        as_estimator(network(), precision="float16")
