"""What a train can see: bounds of tissues, maps of them, and `fisherprint crb`."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from test_cli import call, done, refused, short_train
from test_simulate import Decay

import fisherprint as fp
from fisherprint import bounds, experiment, sequence, subspace
from fisherprint.experiment import Question, bound_pages, tissues
from fisherprint.models import SinglePool, TwoPool
from fisherprint.parameters import paper_prior
from fisherprint.reconstruct import phantom
from fisherprint.report import bound_lines
from fisherprint.sequence import PulseTrain

# Two ways through the same numbers: rounding 1e-16 over the smallest eigenvalue of the
# equilibrated information, 2e-8 for these trains, tissues and coefficients: 5e-9; allow twenty.
EXACT = 1e-7


@pytest.fixture(scope="module")
def model():
    return TwoPool(short_train())


@pytest.fixture(scope="module")
def theta(model):
    return np.array([tissues.tissue(name, model.names) for name in ("white matter", "prior")])


@pytest.fixture(scope="module")
def basis(model):
    prior = paper_prior(model.names, repetition_time=3.5e-3)
    return bounds.fit_basis(model, prior, rank=9, size=300, rng=np.random.default_rng(0))


def longer(train, factor=1.3):
    """Another train: more pulses, other angles."""
    n = int(factor * train.n_samples)
    position = np.linspace(1, train.n_samples - 1, n - 1)
    index = np.arange(train.n_samples)
    angle = 0.8 * np.interp(position, index, train.flip_angle[0])
    duration = np.interp(position, index, train.pulse_duration[0])
    return PulseTrain(np.r_[np.pi, angle], np.r_[500e-6, duration], train.repetition_time)


def test_bounds_are_those_of_fisher(model, theta, basis):
    out = model.simulate(theta)
    found = bounds.of(model, theta, noise_std=0.02)
    expected = fp.crb(out.signal, out.jacobian, noise_std=0.02)
    np.testing.assert_allclose(found.root**2, expected, rtol=EXACT)
    assert found.names == model.names
    np.testing.assert_array_equal(found.theta, theta)
    reduced = fp.crb(basis.compress(out.signal), basis.compress(out.jacobian), noise_std=0.02)
    found = bounds.of(model, theta, basis=basis, noise_std=0.02)
    np.testing.assert_allclose(found.root**2, reduced, rtol=EXACT)


def test_batches_do_not_matter():
    theta = np.linspace(1, 20, 150)[:, None]
    model = Decay()
    whole = bounds.of(model, theta).root
    assert model.largest["simulate"] < len(theta)
    one_by_one = np.concatenate([bounds.of(model, row[None]).root for row in theta])
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-13)


def test_fewer_unknowns_never_raise_a_bound(model, theta, basis):
    for observed in (None, basis):
        every = bounds.of(model, theta, basis=observed)
        for name in model.names:
            fewer = bounds.of(model, theta, known=[name], basis=observed)
            kept = [column for column, other in enumerate(model.names) if other != name]
            assert fewer.names == tuple(model.names[column] for column in kept)
            assert (fewer.root <= every.root[:, kept] * (1 + EXACT)).all()
            np.testing.assert_array_equal(fewer.theta, theta[:, kept])
    # It can help a lot: B1 and T2s saturate the semi-solid pool alike.
    white_matter = bounds.of(model, theta[:1], known=["B1"]).root[0, model.index("T2s")]
    assert white_matter < 0.5 * bounds.of(model, theta).root[0, model.index("T2s")]


def test_a_known_parameter_is_no_column_of_the_information(model, theta):
    out = model.simulate(theta)
    kept = [model.index(name) for name in ("m0s", "T1", "T2f", "T2s", "B0")]
    expected = fp.crb(out.signal, out.jacobian[..., kept])
    found = bounds.of(model, theta, known=("B1", "Rx"))
    np.testing.assert_allclose(found.root**2, expected, rtol=EXACT)


def test_coefficients_never_tell_more_than_the_signal(model, theta, basis):
    whole, reduced = bounds.of(model, theta), bounds.of(model, theta, basis=basis)
    assert (reduced.root >= whole.root * (1 - EXACT)).all()
    assert (reduced.root > 1.01 * whole.root).any()


def test_what_cannot_be_asked_is_refused(model, theta):
    with pytest.raises(KeyError, match="unknown parameter 'T9'; known are m0s, T1"):
        bounds.of(model, theta, known=["T9"])
    with pytest.raises(ValueError, match="at least one unknown parameter; got all of m0s, T1"):
        bounds.of(model, theta, known=model.names)
    with pytest.raises(ValueError, match=r"theta must have the axes \(S, P=7\)"):
        bounds.of(model, theta[0])
    with pytest.raises(ValueError, match="noise_std must be a positive"):
        bounds.of(model, theta, noise_std=0)


def test_the_noise_of_a_scan_falls_with_the_root_of_its_cycles():
    assert bounds.scan_noise(snr=50, scan_time=4, duration=4) == 1 / 50
    assert bounds.scan_noise(snr=50, scan_time=64, duration=4) == 1 / 200
    # A cycle summed up in another order is still one cycle.
    assert bounds.scan_noise(snr=1, scan_time=0.3, duration=0.1 + 0.2) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"at least one cycle, 4 s; got 3\.9 s"):
        bounds.scan_noise(snr=50, scan_time=3.9, duration=4)
    for wrong in ({"snr": 0}, {"scan_time": math.inf}, {"duration": -1}):
        with pytest.raises(ValueError, match="must be a positive finite number"):
            bounds.scan_noise(**({"snr": 50, "scan_time": 4, "duration": 4} | wrong))


def test_a_table_in_closed_form():
    # exp(iω t − R t) at t = 0, d, 2d ...: CRB(R) = CRB(ω) = σ² (1 − q)³ / (q d²), q = exp(−2 R d),
    # with complex M0 unknown (test_fisher).
    models = {"one": Decay(("R", "ω"), n_samples=800), "two": Decay(("R", "ω"), n_samples=900)}
    rates = np.array([3.0, 20.0])
    table = bounds.table(
        models,
        {"slow": (3.0, 0.0), "fast": (20.0, 40.0)},
        durations={"one": 2.0, "two": 6.0},
        snr=40,
        scan_time=18,
    )
    q = np.exp(-2 * rates * 0.01)
    root = np.sqrt((1 - q) ** 3 / q) / 0.01 / 40
    assert table.cycles == (9.0, 3.0)
    expected = np.stack([root / 3, root / np.sqrt(3)])[..., None].repeat(2, axis=-1)
    # The sums end at q^800 = 1e-21; rounding times a condition of about 10.
    np.testing.assert_allclose(table.signal, expected, rtol=1e-12)
    relative = table.relative(table.signal)
    np.testing.assert_allclose(relative[..., 0], expected[..., 0] / rates, rtol=1e-12)
    assert np.isnan(relative[:, 0, 1]).all()  # ω = 0
    np.testing.assert_allclose(table.ratio(table.signal)[1], np.sqrt(3), rtol=1e-12)
    assert table.coefficients is None
    # Without a scan time: that of the longest cycle, for all of them.
    rest = {"durations": {"one": 2.0, "two": 6.0}, "snr": 40}
    assert bounds.table(models, {"slow": (3.0, 0.0)}, **rest).cycles == (3.0, 1.0)


def test_records_are_the_numbers_of_the_table():
    # The first train does not see T1, the second sees both.
    parameters = (fp.Parameter("T1", "", "s", (0, 9)), fp.Parameter("B0", "", "rad/s", (-99, 99)))
    table = bounds.BoundTable(
        trains=("blind", "sharp"),
        tissues=("x",),
        parameters=parameters,
        known=(),
        theta=np.array([[2.0, -4.0]]),
        signal=np.array([[[np.inf, 1.0]], [[0.5, 3.0]]]),
        coefficients=None,
        rank=None,
        basis_method=None,
        confounded={("blind", "x"): (("T1",),), ("sharp", "x"): ()},
        snr=50.0,
        scan_time=18.0,
        durations=(2.0, 6.0),
    )
    columns = ("train", "parameter", "unit", "value", "seen", "root_crb", "relative")
    found = [
        tuple(record[name] for name in (*columns, "ratio_to_first", "scan_time_s"))
        for record in table.records()
    ]
    assert found == [
        ("blind", "T1", "s", 2.0, False, None, None, None, 18.0),
        ("blind", "B0", "rad/s", -4.0, True, 1.0, 0.25, 1.0, 18.0),
        ("sharp", "T1", "s", 2.0, True, 0.5, 0.25, None, 18.0),
        ("sharp", "B0", "rad/s", -4.0, True, 3.0, 0.75, 3.0, 18.0),
    ]


def test_a_table_refuses_what_does_not_fit_together(model, theta, basis):
    one = {"tissues": {"prior": theta[1]}, "durations": {"a": 1.0, "b": 1.0}, "snr": 50}
    with pytest.raises(ValueError, match=r"the same parameters for each train, m0s.* for 'b'"):
        bounds.table({"a": model, "b": SinglePool(short_train())}, **one)
    other = subspace.Basis(basis.vectors[:, :7])
    with pytest.raises(ValueError, match=r"bases of one rank; got \[7, 9\]"):
        bounds.table({"a": model, "b": model}, bases={"a": basis, "b": other}, **one)
    with pytest.raises(ValueError, match="at least one train and one tissue"):
        bounds.table({}, **one)


class Mixed(Decay):
    """R and `idle` together: s = exp(−(R + 2 idle) t), which no train can take apart."""

    def simulate(self, theta):
        out = super().simulate(theta)
        out.jacobian[..., self.index("idle")] = 2 * out.jacobian[..., self.index("R")]
        return out


def test_what_no_train_sees_is_an_error_with_the_reason():
    blind = Mixed(("R", "idle", "ω"))
    rest = {"durations": {"blind": 1.0, "idle": 1.0}, "snr": 1}
    with pytest.raises(fp.SingularInformationError, match="R and idle cannot be") as caught:
        bounds.table({"blind": blind}, {"a": (3, 1, 0)}, **rest)
    assert caught.value.names == ("R", "idle")
    assert caught.value.groups == (("R", "idle"),)
    # Another train sees R, and none `idle`: it may be left out as known.
    both = {"blind": blind, "idle": Decay(("R", "idle", "ω"))}
    with pytest.raises(fp.SingularInformationError, match="infinite bound of idle in every"):
        bounds.table(both, {"a": (3, 1, 0)}, **rest)
    table = bounds.table(both, {"a": (3, 1, 0)}, known=["idle"], **rest)
    assert np.isfinite(table.signal).all()


def test_what_one_tissue_hides_is_not_seen_there(model, theta):
    water = theta[0].copy()
    water[model.index("m0s")] = 0
    table = bounds.table(
        {"a": model}, {"white matter": theta[0], "water": water}, durations={"a": 0.14}, snr=50
    )
    hidden = [model.index("Rx"), model.index("T2s")]
    assert np.isinf(table.signal[0, 1, hidden]).all()
    assert np.isinf(table.signal).sum() == 2
    assert table.confounded == {("a", "white matter"): (), ("a", "water"): (("Rx",), ("T2s",))}
    records = {(r["tissue"], r["parameter"]): r for r in table.records()}
    lost = records["water", "Rx"]
    assert (lost["seen"], lost["root_crb"], lost["relative"]) == (False, None, None)
    assert lost["reason"] == "Rx has no effect on the signal"
    assert records["white matter", "Rx"]["seen"]
    json.dumps(table.records(), allow_nan=False)
    _, rows, notes = bound_lines(table)
    assert [row[3] for row in rows].count("not seen") == 2
    assert notes[-1].startswith("Not seen in water by a: Rx has no effect on the signal; T2s has")


def test_maps_and_sweeps_are_the_bounds_point_by_point(model, theta, basis):
    T1, B1 = np.array([0.8, 1.2, 1.9]), np.array([0.7, 1.1])
    rest = {"known": ["Rx"], "basis": basis, "noise_std": 0.1}
    found = bounds.bound_map(model, theta[1], ("T1", T1), ("B1", B1), **rest)
    assert (found.x.name, found.y.name) == ("T1", "B1")
    assert found.root.shape == (2, 3, 6)
    line = bounds.sweep(model, theta[1], ("T1", T1), **rest)
    for column, longitudinal in enumerate(T1):
        point = theta[1].copy()
        point[model.index("T1")] = longitudinal
        # One at a time or in a batch: the same kernel, sums of other lengths.
        one = bounds.of(model, point[None], **rest).root[0]
        np.testing.assert_allclose(line.root[column], one, rtol=EXACT)
        for row, transmit in enumerate(B1):
            point[model.index("B1")] = transmit
            one = bounds.of(model, point[None], **rest).root[0]
            np.testing.assert_allclose(found.root[row, column], one, rtol=EXACT)
    assert [p.name for p in found.parameters] == [n for n in model.names if n != "Rx"]


def test_maps_need_two_parameters_of_the_model(model, theta):
    with pytest.raises(ValueError, match="two parameters; got 'T1' twice"):
        bounds.bound_map(model, theta[0], ("T1", [1.0]), ("T1", [1.0]))
    with pytest.raises(KeyError, match="unknown parameter 'T9'"):
        bounds.sweep(model, theta[0], ("T9", [1.0]))
    with pytest.raises(ValueError, match=r"the values of T1 must have the axes \(N\)"):
        bounds.sweep(model, theta[0], ("T1", 1.0))


def test_a_basis_is_the_svds_of_the_drawn_fingerprints(model, basis):
    prior = paper_prior(model.names, repetition_time=3.5e-3)
    signal = model.signal(prior.sample(300, rng=np.random.default_rng(0)))
    # Batches add up in another order: rounding, over the distance of the squared singular values.
    expected = subspace.fit(signal, rank=9)
    overlap = np.abs(expected.vectors.conj().T @ basis.vectors)
    np.testing.assert_allclose(overlap, np.eye(9), atol=1e-6)
    with pytest.raises(ValueError, match=r"a prior of m0s, T1, .*; got one of T1, T2"):
        bounds.fit_basis(
            model,
            paper_prior(("T1", "T2", "B0", "B1"), repetition_time=3.5e-3),
            rank=9,
            rng=np.random.default_rng(0),
        )


def test_a_crb_svd_basis_is_that_of_their_derivatives(model, basis):
    prior = paper_prior(model.names, repetition_time=3.5e-3)
    drawn = model.simulate(prior.sample(300, rng=np.random.default_rng(0)))
    expected = subspace.fit(drawn, rank=9, method="crb-svd")
    found = bounds.fit_basis(
        model, prior, rank=9, method="crb-svd", size=300, rng=np.random.default_rng(0)
    )
    overlap = np.abs(expected.vectors.conj().T @ found.vectors)
    np.testing.assert_allclose(overlap, np.eye(9), atol=1e-6)
    assert np.abs(overlap - np.abs(expected.vectors.conj().T @ basis.vectors)).max() > 0.1


@pytest.mark.parametrize("parameters", [("m0s", "T1", "B1"), ("T1s", "T1f", "B0"), ("T2", "T1")])
@pytest.mark.parametrize("name", ["white matter", "CSF"])
def test_tissues_by_name_for_every_model(name, parameters):
    values = dict(zip(parameters, tissues.tissue(name, parameters), strict=True))
    expected = phantom.TISSUES[name]
    for parameter, value in values.items():
        fields = {"B0": 0.0, "B1": 1.0, "T2": expected.T2f}
        wanted = fields[parameter] if parameter in fields else getattr(expected, parameter)
        assert value == wanted


def test_the_centre_of_the_prior_has_the_papers_nominal_values():
    names = TwoPool(short_train()).names
    # §4b of the paper's second data set: all others "at the means".
    np.testing.assert_allclose(
        tissues.tissue("prior", names), [0.12, 1.6, 0.1, 44, 12e-6, 0, 1], rtol=1e-15
    )


def test_unknown_tissues_are_refused_by_name():
    with pytest.raises(KeyError, match=r"unknown tissue 'bone'; known are white matter, .* prior"):
        tissues.tissue("bone", ("T1",))
    with pytest.raises(KeyError, match="unknown parameter 'T9'; known are"):
        tissues.tissue("CSF", ("T9",))


ASKED = {
    "tissues": ("CSF",),
    "parameters": ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1"),
    "known": ("B1",),
    "b0": (100.0,),
    "b1": (0.9,),
    "snr": 20.0,
    "scan_time": 2.0,
    "rank": 9,
    "basis_method": "crb-svd",
    "seed": 1,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Question)])
def test_every_part_of_a_question_changes_the_answer(field):
    trains = {"short": short_train()}
    before = Question(rank=8) if field in ("seed", "basis_method") else Question()
    tables = [
        experiment.bound_table(trains, question)
        for question in (before, dataclasses.replace(before, **{field: ASKED[field]}))
    ]
    assert tables[0].records() != tables[1].records()


def test_tissues_are_looked_at_in_each_field():
    question = Question(tissues=("CSF", "prior"), b0=(0.0, 50.0), b1=(0.9,))
    table = experiment.bound_table({"short": short_train()}, question)
    assert table.tissues == (
        *("CSF, B0 0 rad/s, B1 0.9", "CSF, B0 50 rad/s, B1 0.9"),
        *("prior, B0 0 rad/s, B1 0.9", "prior, B0 50 rad/s, B1 0.9"),
    )
    model = TwoPool(short_train())
    theta = tissues.tissue("prior", model.names)
    theta[[model.index("B0"), model.index("B1")]] = 50, 0.9
    expected = bounds.of(model, theta[None], noise_std=1 / 50).root[0]
    np.testing.assert_allclose(table.signal[0, 3], expected, rtol=EXACT)


# The command line.


@pytest.fixture
def trains(tmp_path):
    """Two files of trains."""
    short_train().write(tmp_path / "short.toml")
    longer(short_train()).write(tmp_path / "longer.h5")
    return tmp_path / "short.toml", tmp_path / "longer.h5"


def columns(line):
    return [cell for cell in line.split("  ") if cell.strip()]


def test_crb_prints_a_table_in_displayed_units(trains):
    out = done("crb", trains[0], "--tissue", "white matter", "--snr", 200)
    table = experiment.bound_table(
        {"short": short_train()}, Question(tissues=("white matter",), snr=200)
    )
    lines = out.splitlines()
    assert [cell.strip() for cell in columns(lines[0])] == [
        *("tissue", "parameter", "value", "short", "/ value")
    ]
    found = next(line for line in lines if "T2f (ms)" in line)
    root = 1e3 * table.signal[0, 0, 2]
    value, bound, share = (cell.strip() for cell in columns(found)[1:])
    assert value == "76.9"
    # Three digits, and two of the percentage.
    assert float(bound) == pytest.approx(root, rel=5e-3)
    assert share.endswith("%")
    assert float(share[:-1]) == pytest.approx(100 * root / 76.9, rel=0.05)
    assert "at SNR 200 (|M0|/σ of one cycle) and a scan of 0.14 s (short 1 x 0.14 s)" in out
    assert "Unknowns: m0s, T1, T2f, Rx, T2s, B0, B1 and complex M0." in out
    # Nothing but text where nobody draws.
    assert not set(out) & set("─│╭\x1b")


def test_crb_compares_trains_with_the_first(trains, tmp_path):
    files = tmp_path / "out.csv", tmp_path / "out.json"
    arguments = ("--rank", 9, "--known", "B1,Rx", "--scan-time", 3, "--tissue", "prior")
    out = done("crb", *trains, *arguments, "--csv", files[0], "--json", files[1])
    both = {"short": short_train(), "longer": longer(short_train())}
    table = experiment.bound_table(
        both, Question(tissues=("prior",), known=("B1", "Rx"), scan_time=3, rank=9)
    )
    content = json.loads(files[1].read_text())
    assert content["bounds"] == table.records()
    assert content["unknown"] == ["m0s", "T1", "T2f", "T2s", "B0", "Re M0", "Im M0"]
    assert content["known"] == ["B1", "Rx"]
    assert list(content["trains"]) == ["short", "longer"]
    for label, train in both.items():
        described = content["trains"][label]
        assert described["sha256"] == train.digest
        assert described["cycles"] == 3 / train.duration
        assert described["rf_power_rad2_per_s2"] == train.rf_power
    with files[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 5  # trains, signal and coefficients, parameters
    for row, record in zip(rows, table.records(), strict=True):
        assert float(row["root_crb"]) == record["root_crb"]
        assert row["train_sha256"] == both[row["train"]].digest
        assert (row["observed"], row["parameter"]) == (record["observed"], record["parameter"])
    assert "9 coefficients" in out
    assert "Known: B1, Rx." in out
    assert "(short 21.4 x 0.14 s, longer 16.5 x 0.182 s)" in out
    assert f"written: {files[1]}" in out
    better = done("crb", *trains, *arguments, "--basis-method", "crb-svd")
    assert "9 CRB-SVD coefficients" in better and "9 coefficients" not in better
    ratio = table.signal[1, 0, 0] / table.signal[0, 0, 0]
    line = next(line for line in out.splitlines() if "m0s" in line and "prior" in line)
    assert float(columns(line)[-4]) == pytest.approx(ratio, rel=5e-3)


def test_crb_of_the_bundled_train_and_of_a_single_pool(trains):
    assert "bundled 1 x 4 s" in done("crb", "--parameters", "T1,T2,B0,B1", "--tissue", "CSF")
    out = done("crb", "bundled", trains[0], "--parameters", "T1, T2, B0, B1")
    assert "bundled" in out
    assert "T2 (ms)" in out
    assert "m0s" not in out


def test_crb_says_which_parameters_cannot_be_told_apart(trains):
    # A complex coefficient is two numbers, as many as M0 has.
    message = refused("crb", trains[0], "--rank", 1)
    assert "m0s, T1, T2f, Rx, T2s, B0, B1, Re M0 and Im M0 cannot be told apart" in message
    assert "keep more coefficients" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tissue", "bone"), "unknown tissue 'bone'; known are white matter"),
        (("--known", "T9"), "unknown parameter 'T9'; known are m0s"),
        (("--parameters", "T1,T9"), "unknown parameter 'T9'"),
        (("--parameters", "T1,T2"), "got ('T1', 'T2')"),
        (("--scan-time", 0.1), "expected a scan time of at least one cycle, 0.14 s; got 0.1 s"),
        (("--snr", -1), "the SNR must be a positive finite number; got -1.0"),
        (("--b1", 2), "4.5"),
        (("--rank", 50), "the rank must lie between 1 and 40"),
        (("--basis-method", "crb-svd"), "expected a rank for the basis method 'crb-svd'"),
        (("--rank", 9, "--basis-method", "pca"), "expected the method svd or crb-svd; got 'pca'"),
        (("--repetition-time", 3.5), "expected a repetition time for .mat files alone"),
    ],
)
def test_crb_refuses_bad_input_by_name(trains, arguments, message):
    assert message in refused("crb", trains[0], *arguments)


def test_crb_refuses_bad_files(trains, tmp_path):
    assert "got one twice" in refused("crb", trains[0], trains[0])
    assert "found nothing" in refused("crb", tmp_path / "nothing.toml")
    (tmp_path / "other.toml").write_text("a = 1\n")
    assert "expected the key 'flip_angle'" in refused("crb", tmp_path / "other.toml")


def test_trains_of_one_name_keep_their_paths(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        short_train().write(tmp_path / folder / "train.toml")
    paths = [tmp_path / folder / "train.toml" for folder in ("a", "b")]
    found = bound_pages.read_trains([*paths, bound_pages.Path("bundled")])
    assert list(found) == [*map(str, paths), "bundled"]
    assert found["bundled"].digest == sequence.bundled().digest


def test_the_help_names_every_option():
    out = done("crb", "--help")
    for word in ("--tissue", "--known", "--scan-time", "--csv", "--json", "Example"):
        assert word in out
    assert " crb " in done("--help")


def test_the_report_of_trains_shows_all_of_it(trains, tmp_path):
    page = tmp_path / "page.html"
    out = done("report", trains[0], "--compare", trains[1], "--snr", 100, "-o", page)
    assert out == f"report: {page}\n"
    text = page.read_text()
    for heading in ("Pulse trains", "Bounds", "Bound maps", "Bounds against B0 and B1"):
        assert f">{heading}</h2>" in text
    assert ">Magnetization</h2>" in text
    # Trains, magnetization of each, two maps, one page of curves.
    assert text.count("<img ") == 6
    assert "at SNR 100" in text
    for train in (short_train(), longer(short_train())):
        assert train.digest in text


def test_the_report_of_a_train_lies_beside_it_unless_told_otherwise(trains):
    done("report", trains[0], "--parameters", "T1,T2,B0,B1")
    text = trains[0].with_suffix(".html").read_text()
    assert "over T1 and T2," in text
    assert text.count("<img ") == 4


def test_the_page_says_why_there_are_no_bounds():
    page = experiment.train_page({"short": short_train()}, Question(rank=1))
    assert "Re M0 and Im M0 cannot be told apart" in page
    assert "Pulse train" in page


def test_options_of_a_train_do_not_go_with_a_run(tmp_path):
    result = call("report", tmp_path, "--snr", 50)
    assert result.code == 2
    assert "got a run folder" in " ".join(result.err.split())


def test_curves_over_b1_end_where_the_model_does():
    angle = np.r_[np.pi, np.full(9, 4.0)]
    high = PulseTrain(angle, np.full(10, 4e-4), 4e-3)
    (_, b0), (_, b1) = bound_pages._fields({"a": high, "b": short_train()})
    assert b0.max() == pytest.approx(np.pi / 3.5e-3)
    assert b1.max() == pytest.approx(4.5 / 4)
    # No error at the end itself.
    assert np.isfinite(TwoPool(high).signal([[0.1, 1, 0.1, 20, 1e-5, 0, b1.max()]])).all()
