import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fisherprint as fp
from fisherprint import _checks, fisher, simulate, subspace
from fisherprint.models import Fingerprints
from fisherprint.parameters import Parameter, Prior, Uniform, paper_prior
from fisherprint.simulate import SPLITS, dataset

SIZES = {"training": 150, "validation": 20, "test": 10}


class Decay:
    """A model of somebody else: s = exp(-R t), with ω among the names s = exp(-R t + iω t).

    It notes the largest batch that it was asked for.
    """

    def __init__(self, names=("R",), *, n_samples=32):
        self.parameters = tuple(Parameter(name, name, "1/s", (-np.inf, np.inf)) for name in names)
        self.names, self.n_samples = tuple(names), n_samples
        self.time = 0.01 * np.arange(n_samples)
        self.largest = {"simulate": 0, "signal": 0}

    def index(self, name):
        return _checks.index(name, self.names)

    def signal(self, theta):
        self.largest["signal"] = max(self.largest["signal"], len(theta))
        return self._signal(theta)

    def simulate(self, theta):
        self.largest["simulate"] = max(self.largest["simulate"], len(theta))
        signal = self._signal(theta)
        by_name = {"R": -self.time, "ω": 1j * self.time, "idle": 0 * self.time}
        return Fingerprints(
            theta, signal, np.stack([signal * by_name[name] for name in self.names], axis=-1)
        )

    def _signal(self, theta):
        θ = dict(zip(self.names, theta.T, strict=True))
        exponent = -θ["R"] + 1j * θ.get("ω", 0)
        return np.exp(exponent[:, None] * self.time)


DECAY_PRIOR = Prior({"R": Uniform(1, 20)})


@pytest.fixture(scope="module")
def model(short_train):
    return fp.TwoPool(short_train)


@pytest.fixture(scope="module")
def prior(model):
    return paper_prior(model.names, repetition_time=model.train.repetition_time)


@pytest.fixture(scope="module")
def result(model, prior):
    """A small data set in 10 coefficients, simulated in several batches."""
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch, model, length=64)
        return dataset(model, prior, SIZES, basis=10, seed=1)


def small_batches(patch, model, *, length):
    jacobian_bytes = 16 * model.n_samples * len(model.parameters)
    patch.setattr(simulate, "_BATCH_MULTIPLE", length)
    patch.setattr(simulate, "_BATCH_BYTES", 1.5 * length * jacobian_bytes)


@pytest.mark.paper("§2.4")
def test_coefficients_are_those_of_the_signals(model, result):
    for samples in result.samples.values():
        expected = result.basis.compress(model.signal(samples.theta))
        # Neighbours in a group of lanes share the number of squarings: 1e-10 of the signal.
        np.testing.assert_allclose(samples.coefficients, expected, atol=1e-9)


@pytest.mark.paper("§2.1")
def test_both_bounds_are_those_of_the_whole_at_once(model, result):
    for samples in result.samples.values():
        out = model.simulate(samples.theta)
        whole = fp.crb(out.signal, out.jacobian)
        compressed = fp.crb(result.basis.compress(out.signal), result.basis.compress(out.jacobian))
        # Products of other sizes round in another order, 1e-16, over the smallest eigenvalue of
        # the information: 2e-11 for the worst sample and its signal, less for coefficients.
        for got, expected in (
            (samples.crb_signal, whole),
            (samples.crb_coefficients, compressed),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-3)
            assert np.median(np.abs(got / expected - 1)) < 1e-6


def test_compression_never_lowers_a_bound(result):
    for samples in result.samples.values():
        # Up to the rounding of both inverses.
        assert (samples.crb_coefficients >= samples.crb_signal * (1 - 1e-6)).all()


def test_the_basis_is_the_svd_of_the_training_signals(model, result):
    signal = model.signal(result.samples["training"].theta)
    vectors = np.linalg.svd(signal, full_matrices=False)[2][:10].T
    # Largest sine of an angle between both; singular values down to 1e-3 are squared.
    apart = vectors - result.basis.vectors @ (result.basis.vectors.conj().T @ vectors)
    assert np.linalg.norm(apart, 2) < 1e-6
    assert result.energy == pytest.approx(result.basis.energy(signal), abs=1e-9)
    assert result.names == model.names


def test_a_crb_svd_is_that_of_the_training_fingerprints(model, prior, monkeypatch):
    wanted = subspace.CrbSvd(10, weight=0.4)
    small_batches(monkeypatch, model, length=64)
    got = dataset(model, prior, SIZES, basis=wanted, seed=1)
    whole = model.simulate(got.samples["training"].theta)
    expected = subspace.fit(whole, rank=10, method="crb-svd", weight=0.4)
    apart = expected.vectors - got.basis.vectors @ got.basis.compress(expected.vectors.T).T
    # Directions of the worst sample have an error of 1e-16 over its smallest eigenvalue, 2e-11.
    assert np.linalg.norm(apart, 2) < 1e-5
    assert got.crb_weight == 0.4
    assert got.energy == pytest.approx(got.basis.energy(whole.signal), abs=1e-9)
    assert dataset(model, prior, SIZES, basis=10, seed=1).crb_weight is None


def test_a_crb_svd_by_any_number_of_workers_is_the_same(model, prior, monkeypatch):
    small_batches(monkeypatch, model, length=64)
    vectors = []
    for n_workers in (1, 3):
        with ThreadPoolExecutor(n_workers) as executor:
            simulation = simulate.Simulation(model, prior, SIZES, 1)
            wanted = subspace.CrbSvd(6)
            vectors.append(simulate.fit_basis(simulation, wanted, executor=executor).vectors)
    np.testing.assert_array_equal(*vectors)


def test_a_crb_svd_holds_few_jacobians_and_takes_no_more_columns_than_it_needs(monkeypatch):
    model, calls = Decay(("R", "ω", "idle")), []
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50), "idle": Uniform(0, 1)})
    small_batches(monkeypatch, model, length=8)
    monkeypatch.setattr(simulate, "SHARD", 32)
    monkeypatch.setattr(simulate, "MOST_FOR_BASIS", 300)
    with ThreadPoolExecutor(1) as executor:
        simulate.fit_basis(
            simulate.Simulation(model, prior, SIZES, 1),
            subspace.CrbSvd(3),
            executor=executor,
            progress=lambda *call: calls.append(call),
        )
    assert model.largest == {"simulate": 8, "signal": 0}
    # Four columns each: two shards have 256 of them, three would have more than 300.
    assert calls[-1] == ("signals for the basis", 64, 64)


def test_sizes_and_prior(result, prior, model):
    assert {split: len(s.theta) for split, s in result.samples.items()} == SIZES
    theta = np.vstack([samples.theta for samples in result.samples.values()])
    for column, name in enumerate(model.names):
        distribution = prior.distributions[name]
        assert distribution.low <= theta[:, column].min()
        assert theta[:, column].max() <= distribution.high
    assert (theta[:, model.index("T2f")] <= theta[:, model.index("T1")]).all()


def test_same_seed_same_numbers_and_another_seed_others():
    first, again, other = (
        dataset(Decay(), DECAY_PRIOR, SIZES, basis=3, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.basis.vectors, again.basis.vectors)
    for split in SPLITS:
        for field in (field.name for field in dataclasses.fields(simulate.Reduced)):
            np.testing.assert_array_equal(
                getattr(first.samples[split], field), getattr(again.samples[split], field)
            )
        assert not np.isin(first.samples[split].theta, other.samples[split].theta).any()


def test_splits_are_different_draws_that_do_not_depend_on_each_others_size():
    first = dataset(Decay(), DECAY_PRIOR, SIZES, basis=3, seed=1)
    drawn = np.concatenate([samples.theta.ravel() for samples in first.samples.values()])
    assert len(np.unique(drawn)) == sum(SIZES.values())
    longer = dataset(Decay(), DECAY_PRIOR, SIZES | {"training": 300}, basis=3, seed=1)
    np.testing.assert_array_equal(longer.samples["test"].theta, first.samples["test"].theta)


def test_batches_do_not_matter(monkeypatch):
    whole = dataset(Decay(), DECAY_PRIOR, SIZES, basis=4, seed=3)
    small_batches(monkeypatch, Decay(), length=8)
    parts = dataset(Decay(), DECAY_PRIOR, SIZES, basis=whole.basis, seed=3)
    for split in SPLITS:
        one, other = whole.samples[split], parts.samples[split]
        np.testing.assert_array_equal(one.theta, other.theta)
        # Matrix products of another size round in another order.
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-14)
        np.testing.assert_allclose(one.crb_signal, other.crb_signal, rtol=1e-10)
        np.testing.assert_allclose(one.crb_coefficients, other.crb_coefficients, rtol=1e-10)
    assert whole.energy == pytest.approx(parts.energy, rel=1e-13)


def test_never_all_jacobians_at_once(monkeypatch):
    model = Decay()
    small_batches(monkeypatch, model, length=8)
    dataset(model, DECAY_PRIOR, SIZES, basis=3, seed=0)
    assert model.largest == {"simulate": 8, "signal": 8}


def test_batches_of_a_long_train_stay_below_the_limit_in_memory():
    model, basis = Decay(n_samples=4000), fp.Basis(np.eye(4000, 3))
    sizes = {"training": 1200, "validation": 1, "test": 1}
    dataset(model, DECAY_PRIOR, sizes, basis=basis, seed=0)
    assert model.largest["simulate"] * 16 * 4000 <= 64e6
    assert model.largest["simulate"] < 1200


def test_another_model_in_closed_form():
    model = Decay(n_samples=400)
    result = dataset(model, DECAY_PRIOR, SIZES, basis=8, seed=5)
    samples = result.samples["test"]
    q = np.exp(-2 * samples.theta * 0.01)
    expected = (1 - q) ** 3 / (q * 0.01**2)
    # These are sums to infinity (test_fisher.py); ours end at q^400 = exp(-8 R), 1e-14 at R = 4.
    well = samples.theta > 4
    assert well.any()
    np.testing.assert_allclose(samples.crb_signal[well], expected[well], rtol=1e-8)
    # Eight coefficients hold decays and derivatives all but completely.
    np.testing.assert_allclose(samples.crb_coefficients, samples.crb_signal, rtol=1e-3)


def test_a_given_basis_is_used_as_it_is():
    model = Decay(("R", "ω"))
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50)})
    basis = subspace.fit(model.signal(prior.sample(50, rng=np.random.default_rng(0))), rank=6)
    model.largest["signal"] = 0
    result = dataset(model, prior, SIZES, basis=basis, seed=0)
    assert result.basis is basis
    assert model.largest["signal"] == 0  # nothing is simulated for an SVD
    # A frequency and a rate: as well to be told, whatever the signal (in closed form, one bound).
    crb = result.samples["test"].crb_signal
    np.testing.assert_allclose(crb[:, 0], crb[:, 1], rtol=1e-10)


def test_progress_ends_at_the_total_of_each_stage(monkeypatch):
    model, calls = Decay(), []
    monkeypatch.setattr(simulate, "SHARD", 32)
    with ThreadPoolExecutor(1) as executor:
        dataset(
            model,
            DECAY_PRIOR,
            SIZES,
            basis=3,
            seed=0,
            executor=executor,
            progress=lambda *call: calls.append(call),
        )
    stages = {"signals for the basis": 150}
    stages |= {f"fingerprints for {split}": size for split, size in SIZES.items()}
    assert {what for what, _, _ in calls} == set(stages)
    for stage, size in stages.items():
        done = [done for what, done, total in calls if what == stage and total == size]
        # Shards of 32, but for the last of a split; with them the order is that of completion.
        sizes = np.diff([0, *done])
        assert done[-1] == size
        assert sorted(sizes) == sorted([32] * (size // 32) + [size % 32] * (size % 32 > 0))


class SometimesIdle(Decay):
    """ω has no effect where it is below 0."""

    def simulate(self, theta):
        out = super().simulate(theta)
        out.jacobian[theta[:, 1] < 0, :, 1] = 0
        return out


def test_an_infinite_bound_of_some_samples_is_kept():
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50)})
    result = dataset(SometimesIdle(("R", "ω")), prior, SIZES, basis=6, seed=0)
    for samples in result.samples.values():
        idle = samples.theta[:, 1] < 0
        assert 0 < idle.sum() < len(idle)
        for bound in (samples.crb_signal, samples.crb_coefficients):
            np.testing.assert_array_equal(np.isinf(bound), np.c_[np.zeros_like(idle), idle])


def test_a_parameter_without_effect_raises():
    model = Decay(("R", "idle"))
    prior = Prior({"R": Uniform(1, 20), "idle": Uniform(0, 1)})
    with pytest.raises(fisher.SingularInformationError, match="bound of idle in every") as caught:
        dataset(model, prior, SIZES, basis=3, seed=0)
    assert caught.value.names == ("idle",)
    np.testing.assert_array_equal(caught.value.information[:, 1], 0)


class PhaseAlone(Decay):
    """The first parameter turns the signal as M0 does: no sample tells them apart."""

    def simulate(self, theta):
        out = super().simulate(theta)
        out.jacobian[..., 0] = 1j * out.signal
        return out


@pytest.mark.parametrize("rank", [1, 3])
def test_a_singular_sample_set_comes_with_its_own_information(rank):
    # The bound of the signal fails first, whatever becomes of the coefficients.
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50)})
    with pytest.raises(fisher.SingularInformationError) as caught:
        dataset(PhaseAlone(("R", "ω")), prior, SIZES, basis=rank, seed=0)
    assert caught.value.names == ("R",)
    bounds = fisher.bounds(caught.value.information)
    np.testing.assert_array_equal(np.isinf(bounds[:, :2]), [[True, False]] * len(bounds))


def test_too_few_coefficients_lose_the_parameters_by_name():
    # One complex coefficient holds two real numbers, as many as M0 has.
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50)})
    with pytest.raises(fisher.SingularInformationError, match="keep more coefficients") as caught:
        dataset(Decay(("R", "ω")), prior, SIZES, basis=1, seed=0)
    assert caught.value.names == ("R", "ω")
    assert np.isinf(fisher.bounds(caught.value.information)[:, :2]).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SIZES | {"validation": 0}, "at least 1 validation sample; got 0"),
        (SIZES | {"test": -3}, "at least 1 test sample; got -3"),
        ({"training": 10, "test": 10}, "at least 1 validation sample; got None"),
    ],
)
def test_each_split_needs_samples(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataset(Decay(), DECAY_PRIOR, sizes, basis=3, seed=0)


def test_unknown_splits_are_refused():
    with pytest.raises(KeyError, match="unknown split 'train'; known are training, validation"):
        dataset(Decay(), DECAY_PRIOR, SIZES | {"train": 10}, basis=3, seed=0)


def test_the_prior_must_name_the_parameters_in_order(model, prior):
    swapped = Prior(dict(reversed(prior.distributions.items())))
    with pytest.raises(ValueError, match=r"a prior for \('m0s', 'T1', .* got \('B1', 'B0', "):
        dataset(model, swapped, SIZES, basis=3, seed=0)


def test_the_basis_must_belong_to_the_train():
    other = fp.Basis(np.eye(31, 3))
    with pytest.raises(ValueError, match="a basis of 32 time points, as the train has; got 31"):
        dataset(Decay(), DECAY_PRIOR, SIZES, basis=other, seed=0)


@pytest.mark.parametrize("rank", [0, 33])
def test_impossible_ranks(rank):
    with pytest.raises(ValueError, match=f"rank must lie between 1 and 32, .* got {rank}"):
        dataset(Decay(), DECAY_PRIOR, SIZES, basis=rank, seed=0)


# The information, and what is known.


class Leaning:
    """s = (10⁶, a x + b y, y): the first sample tells M0, and y hides x by as much as b says.

    The bound of x is (1 + b²)/a² with y unknown and 1/a² with y known, that of y is 1; but for
    what M0 takes, (a x + b y)²/10¹² of it: 2.5e-11 at most. Without the last sample x and y
    cannot be told apart.
    """

    a, b = 2.0, 3.0

    def __init__(self, *, n_samples=3):
        self.parameters = tuple(Parameter(name, name, "", (-1, 1)) for name in "xy")
        self.names, self.n_samples = ("x", "y"), n_samples

    def index(self, name):
        return _checks.index(name, self.names)

    def signal(self, theta):
        x, y = theta.T
        every = np.stack([np.full(len(x), 1e6), self.a * x + self.b * y, y], axis=-1)
        return every[:, : self.n_samples].astype(complex)

    def simulate(self, theta):
        jacobian = np.array([[0, 0], [self.a, self.b], [0, 1]])[: self.n_samples]
        repeated = np.tile(jacobian.astype(complex), (len(theta), 1, 1))
        return Fingerprints(theta, self.signal(theta), repeated)


LEANING_PRIOR = Prior({"x": Uniform(0, 1), "y": Uniform(0, 1)})


def test_a_known_parameter_lowers_the_bound_as_in_closed_form():
    basis = fp.Basis(np.eye(3))
    data = dataset(Leaning(), LEANING_PRIOR, SIZES, basis=basis, seed=0)
    for split, size in SIZES.items():
        np.testing.assert_allclose(data.crb(split), [[2.5, 1.0]] * size, rtol=1e-10)
        told = data.crb(split, known=["y"])
        np.testing.assert_allclose(told, [[0.25, np.inf]] * size, rtol=1e-10)


def test_bounds_from_the_stored_information_are_those_of_a_smaller_model(model, result):
    for split, samples in result.samples.items():
        F = result.information(split)
        assert F.shape == (SIZES[split], 9, 9)
        # Those with everything unknown are what is stored beside it, bit for bit.
        np.testing.assert_array_equal(fisher.bounds(F)[:, :7], samples.crb_coefficients)
        assert result.crb(split) is samples.crb_coefficients
        for known in (["B1"], ["B1", "B0"]):
            told = result.crb(split, known=known)
            by_hand = fp.bounds.of(model, samples.theta, known=known, basis=result.basis)
            unknown = [model.index(name) for name in by_hand.names]
            # As in `test_both_bounds_are_those_of_the_whole_at_once`.
            np.testing.assert_allclose(told[:, unknown], by_hand.root**2, rtol=1e-3)
            assert np.median(np.abs(told[:, unknown] / by_hand.root**2 - 1)) < 1e-6
            # Fewer unknowns never raise a bound, up to rounding.
            assert (told[:, unknown] <= samples.crb_coefficients[:, unknown] * (1 + 1e-6)).all()
            assert np.isinf(told[:, [model.index(name) for name in known]]).all()
    with pytest.raises(KeyError, match="unknown parameter 'B2'"):
        result.crb("test", known=["B2"])


def test_a_data_set_of_an_early_version_has_bounds_with_everything_unknown(result):
    samples = {
        split: dataclasses.replace(reduced, information=None)
        for split, reduced in result.samples.items()
    }
    early = dataclasses.replace(result, samples=samples)
    assert result.has_information and not early.has_information
    np.testing.assert_array_equal(early.crb("test"), result.crb("test"))
    with pytest.raises(ValueError, match=r"early version.*Simulate it again: fisherprint sim"):
        early.crb("test", known=["B1"])


def test_what_is_told_apart_only_where_one_is_known():
    simulation = simulate.Simulation(Leaning(n_samples=2), LEANING_PRIOR, SIZES, 0)
    basis, shards = fp.Basis(np.eye(2)), simulation.shards("test")
    with ThreadPoolExecutor(1) as executor:
        (part,) = simulate.reduce(simulation, basis, shards, executor)
    # Known to begin with, as when an experiment's network is told y.
    found = [simulate.finite(part.reduced, [1])]
    simulate.require_determined(simulation, basis, "test", found, known=["y"])
    with pytest.raises(fisher.SingularInformationError, match="x and y cannot be told apart"):
        simulate.require_determined(simulation, basis, "test", [simulate.finite(part.reduced)])
    # Known or not when it is used.
    data = simulate.DataSet(("x", "y"), basis, {"test": part.reduced}, 1.0)
    np.testing.assert_allclose(data.crb("test", known=["y"])[:, 0], 0.25, rtol=1e-10)
    with pytest.raises(fisher.SingularInformationError, match="x and y cannot be told apart"):
        data.crb("test")


def test_what_is_not_determined_although_something_is_known_is_named():
    model = Decay(("R", "ω", "idle"))
    prior = Prior({"R": Uniform(1, 20), "ω": Uniform(-50, 50), "idle": Uniform(0, 1)})
    simulation = simulate.Simulation(model, prior, SIZES, 0)
    basis, shards = fp.Basis(np.eye(32, 4)), simulation.shards("test")
    with ThreadPoolExecutor(1) as executor:
        (part,) = simulate.reduce(simulation, basis, shards, executor)
    found = simulate.finite(part.reduced, [1])
    np.testing.assert_array_equal(found, [[True, True, False]])
    with pytest.raises(fisher.SingularInformationError, match="idle has no effect") as caught:
        simulate.require_determined(simulation, basis, "test", [found], known=["ω"])
    assert caught.value.names == ("idle",)
    assert caught.value.information.shape[1:] == (4, 4)
