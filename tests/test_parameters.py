import pickle

import numpy as np
import pytest
from scipy import stats

from fisherprint.models.two_pool import PARAMETERS
from fisherprint.parameters import (
    Parameter,
    Prior,
    TruncatedNormal,
    Uniform,
    convert,
    paper_prior,
)

TR = 3.5e-3
N = 20_000
# The Kolmogorov-Smirnov statistic of N draws exceeds 2.23/√N with probability 1e-4 by chance; it
# sees a shift of the whole distribution by 0.04 standard deviations.
LEVEL = 2.23 / np.sqrt(N)


def scipy_truncnorm(mean, std, low, high):
    return stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [
        (0.12, 0.08, 0.0, 0.6),
        (0.1, 0.2, 2e-3, 10.0),
        (12e-6, 3e-6, 6e-6, 20e-6),
        (1.0, 0.3, -np.inf, np.inf),
        # Limits far on either side of the mean, where the cumulative distribution is near 0 or 1.
        (0.0, 1.0, -11.0, -10.0),
        (0.0, 1.0, 10.0, 11.0),
        (0.0, 1.0, 10.0, np.inf),
    ],
)
def test_truncated_normal_is_that_of_scipy(mean, std, low, high):
    draws = TruncatedNormal(mean, std, low, high).sample(N, rng=np.random.default_rng(1))
    expected = scipy_truncnorm(mean, std, low, high)
    assert draws.min() >= low
    assert draws.max() <= high
    assert stats.kstest(draws, expected.cdf).statistic < LEVEL
    # Four standard errors of a mean.
    assert abs(draws.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(N)


def test_truncation_costs_no_draws():
    # Inversion maps one uniform number to one draw: the quantile function of scipy.
    u = np.random.default_rng(2).uniform(size=N)
    draws = TruncatedNormal(0.1, 0.2, 2e-3, 0.3).sample(N, rng=np.random.default_rng(2))
    # Rounding of two implementations of the normal quantile: some 1e-15 of the width.
    np.testing.assert_allclose(draws, scipy_truncnorm(0.1, 0.2, 2e-3, 0.3).ppf(u), atol=1e-13)


def test_uniform_is_that_of_scipy():
    draws = Uniform(-2.0, 5.0).sample(N, rng=np.random.default_rng(3))
    assert draws.min() >= -2
    assert draws.max() <= 5
    assert stats.kstest(draws, stats.uniform(-2, 7).cdf).statistic < LEVEL


@pytest.mark.paper("§2.4")
def test_order_is_kept_by_rejection_of_whole_draws():
    prior = paper_prior(("T1", "T2f"), repetition_time=TR)
    T1, T2f = prior.sample(N, rng=np.random.default_rng(4)).T
    assert (T2f <= T1).all()

    rng = np.random.default_rng(5)
    T1_all = scipy_truncnorm(1.6, 0.8, 0.1, 10).rvs(2 * N, random_state=rng)
    T2f_all = scipy_truncnorm(0.1, 0.2, 2e-3, 10).rvs(2 * N, random_state=rng)
    kept = T2f_all <= T1_all
    assert N < kept.sum() < 2 * N  # the rejection does something
    # Two samples: p below 1e-4 is as rare by chance as above.
    for got, expected in (
        (T1, T1_all[kept]),
        (T2f, T2f_all[kept]),
        (T2f / T1, T2f_all[kept] / T1_all[kept]),
    ):
        assert stats.ks_2samp(got, expected).pvalue > 1e-4


def test_rejection_shapes_the_distribution_where_it_matters():
    # a, b uniform on [0, 1] with a ≤ b: the density of a is 2(1-a), that of b is 2b.
    prior = Prior({"a": Uniform(0, 1), "b": Uniform(0, 1)}, [("a", "b")])
    a, b = prior.sample(N, rng=np.random.default_rng(6)).T
    assert stats.kstest(a, lambda x: 1 - (1 - x) ** 2).statistic < LEVEL
    assert stats.kstest(b, lambda x: x**2).statistic < LEVEL


def test_several_orders_hold_at_once():
    prior = Prior({n: Uniform(0, 1) for n in "abc"}, [("a", "b"), ("b", "c")])
    draws = prior.sample(1000, rng=np.random.default_rng(7))
    assert draws.shape == (1000, 3)
    assert (np.diff(draws, axis=1) >= 0).all()


@pytest.mark.paper("§2.4")
def test_paper_prior_has_the_decided_numbers():
    # The paper, and docs/decisions/002-priors.md where it is silent.
    names = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
    prior = paper_prior(names, repetition_time=TR)
    assert prior.names == names
    assert dict(prior.distributions) == {
        "m0s": TruncatedNormal(0.12, 0.08, 0, 0.6),
        "T1": TruncatedNormal(1.6, 0.8, 0.1, 10),
        "T2f": TruncatedNormal(0.1, 0.2, 2e-3, 10),
        "Rx": TruncatedNormal(44, 20, 0, 200),
        "T2s": TruncatedNormal(12e-6, 3e-6, 6e-6, 20e-6),
        "B0": Uniform(-np.pi / TR, np.pi / TR),
        "B1": TruncatedNormal(1, 0.3, 0.3, 1.4),
    }
    assert prior.ordered == (("T2f", "T1"),)


def test_paper_prior_with_separate_longitudinal_relaxation():
    prior = paper_prior(("T1s", "T2f", "T1f"), repetition_time=TR)
    assert prior.names == ("T1s", "T2f", "T1f")
    assert prior.distributions["T1f"] == Uniform(0.5, 5.0)
    assert prior.distributions["T1s"] == Uniform(0.1, 1.0)
    assert prior.ordered == (("T2f", "T1f"),)


def test_order_only_between_parameters_that_are_there():
    assert paper_prior(("T2f",), repetition_time=TR).ordered == ()


def test_columns_stand_in_the_order_of_the_names():
    prior = Prior({"high": Uniform(10, 11), "low": Uniform(0, 1)})
    draws = prior.sample(50, rng=np.random.default_rng(8))
    assert (draws[:, 0] >= 10).all()
    assert (draws[:, 1] <= 1).all()


def test_same_seed_same_draws():
    prior = paper_prior(("m0s", "T1", "T2f"), repetition_time=TR)
    first, again, other = (prior.sample(100, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first, other).any()


def test_t2_of_a_single_pool_is_drawn_like_t2f():
    two, one = (
        paper_prior(("T1", name), repetition_time=TR).sample(100, rng=np.random.default_rng(1))
        for name in ("T2f", "T2")
    )
    np.testing.assert_array_equal(one, two)
    assert (one[:, 1] <= one[:, 0]).all()


def test_no_draws():
    prior = paper_prior(("m0s", "T1"), repetition_time=TR)
    assert prior.sample(0, rng=np.random.default_rng(0)).shape == (0, 2)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="unknown parameter 'T3'; known are m0s, T1, T1f, T1s, T2f"):
        paper_prior(("m0s", "T3"), repetition_time=TR)
    with pytest.raises(KeyError, match="unknown parameter 'c'; known are a, b"):
        Prior({"a": Uniform(0, 1), "b": Uniform(0, 1)}, [("a", "c")])


@pytest.mark.parametrize("std", [0, -1, np.nan, np.inf])
def test_std_must_be_positive(std):
    with pytest.raises(ValueError, match="std of a truncated normal must be a positive finite"):
        TruncatedNormal(0, std)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 2, 1), (0, 1, 1, 1), (np.nan, 1, 0, 1), (0, 1, np.nan, 1)]
)
def test_limits_of_a_normal_must_be_in_order(arguments):
    with pytest.raises(ValueError, match="finite mean and low < high; got"):
        TruncatedNormal(*arguments)


@pytest.mark.parametrize(("low", "high"), [(40, 50), (-50, -40)])
def test_a_normal_without_probability_between_its_limits_is_refused(low, high):
    # Φ(-40) is below the smallest double.
    with pytest.raises(ValueError, match=r"no probability\. Move the mean"):
        TruncatedNormal(0, 1, low, high)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_limits_of_a_uniform_must_be_finite_and_in_order(low, high):
    with pytest.raises(ValueError, match="finite low < high; got"):
        Uniform(low, high)


def test_an_impossible_order_is_refused():
    prior = Prior({"a": Uniform(2, 3), "b": Uniform(0, 1)}, [("a", "b")])
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*0 of .* draws did\. Shift their limits"):
        prior.sample(10, rng=np.random.default_rng(0))


def test_frozen():
    prior = Prior({"a": Uniform(0, 1)})
    with pytest.raises(TypeError):
        prior.distributions["a"] = Uniform(1, 2)


def test_label_has_the_displayed_unit():
    assert Parameter("T2f", "$T_2^f$", "s", (0, 1), "ms", 1e3).label == "$T_2^f$ (ms)"
    assert Parameter("m0s", "$m_0^s$", "", (0, 1)).label == "$m_0^s$"


def test_a_prior_survives_the_way_to_another_process():
    prior = paper_prior(("m0s", "T1", "T2f"), repetition_time=TR)
    again = pickle.loads(pickle.dumps(prior))
    assert again == prior
    draws = [p.sample(5, rng=np.random.default_rng(0)) for p in (prior, again)]
    np.testing.assert_array_equal(*draws)
    with pytest.raises(TypeError):
        again.distributions["m0s"] = None


@pytest.mark.parametrize(
    ("name", "to", "inside", "stated"),
    [
        # 0.2 of all spins in one pool is a quarter of those in the other.
        ("m0s", "F", 0.2, 0.25),
        ("m0s", "%", 0.2, 20.0),
        ("T1", "ms", 1.6, 1600.0),
        ("T2s", "µs", 12e-6, 12.0),
        ("B0", "Hz", 2 * np.pi, 1.0),
        ("B1", "%", 0.9, 90.0),
    ],
)
def test_a_parameter_stated_otherwise(name, to, inside, stated):
    parameter = PARAMETERS[name]
    conversion = convert(parameter, to)
    values = np.linspace(0.5, 1.5, 5) * inside
    there = conversion.forward(values)
    # Double precision.
    assert conversion.forward(np.array([inside])) == pytest.approx([stated], rel=1e-14)
    assert conversion.backward(there) == pytest.approx(values, rel=1e-14)
    # Differences of step h are off by h² of the third derivative, 1e-10 here, and by rounding.
    h = 1e-5 * values
    slope = (conversion.forward(values + h) - conversion.forward(values - h)) / (2 * h)
    assert conversion.slope(values) == pytest.approx(slope, rel=1e-8)
    assert conversion.parameter.display_unit == ("" if to == "F" else to)
    assert conversion.parameter.name == ("F" if to == "F" else name)
    low, _ = conversion.parameter.bounds
    assert low == pytest.approx(float(conversion.forward(np.array(parameter.bounds[0]))))
    assert to in conversion.formula


@pytest.mark.parametrize(
    ("name", "to", "known"),
    [("T1", "F", "ms, µs"), ("m0s", "ms", "%, F"), ("Rx", "Hz", r"\(none\)"), ("B0", "rad", "Hz")],
)
def test_no_such_way_to_state_a_parameter(name, to, known):
    with pytest.raises(ValueError, match=f"way to state {name} .*: {known}; got '{to}'"):
        convert(PARAMETERS[name], to)
