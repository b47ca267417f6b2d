"""The encoding, its normal operator by Toeplitz embedding, and the solvers."""

import itertools
import multiprocessing
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fisherprint import _storage
from fisherprint.reconstruct import encoding, lowrank, solve, toeplitz
from fisherprint.reconstruct.encoding import Sampling

# A volume, odd and unequal sizes, and a slice; each with real and complex bases.
MATRICES = [(8, 8, 8), (7, 9, 6), (9, 12, 1)]


@pytest.fixture(autouse=True)
def _small_problems_are_undersampled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", encoding.UndersampledWarning)
        yield


def _gaussian(rng, *shape):
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def _problem(matrix=(8, 8, 8), *, real=False, weighted=True, rank=3, coils=2, seed=0):
    """A sampling, sensitivities and images, all random."""
    rng = np.random.default_rng(seed)
    T, S, R = 12, 3, 11
    trajectory = rng.uniform(-0.5, 0.5, (T, S, R, 3)) * np.array(matrix) * (np.array(matrix) > 1)
    basis = np.linalg.qr(
        _gaussian(rng, T, rank).real + (0 if real else 1j) * _gaussian(rng, T, rank).real
    )[0]
    weights = rng.uniform(0, 2, (T, S, R)) if weighted else None
    sampling = Sampling(trajectory, basis, matrix, weights)
    return sampling, _gaussian(rng, coils, *matrix), _gaussian(rng, rank, *matrix)


def _relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _dense(sampling):
    """exp(-2πi k·(r - N//2)/N)/√(N0 N1 N2), shape (T, S, R, N0, N1, N2), as it is written."""
    lines = [(np.arange(n) - n // 2) / n for n in sampling.matrix]
    place = np.stack(np.meshgrid(*lines, indexing="ij"), -1)
    angle = np.einsum("tsra,xyza->tsrxyz", sampling.trajectory.astype(float), place)
    return np.exp(-2j * np.pi * angle) / np.sqrt(np.prod(sampling.matrix))


@pytest.mark.paper("§2.8")
@pytest.mark.parametrize("matrix", MATRICES)
def test_forward_is_the_sum_over_voxels_and_coefficients(matrix):
    sampling, maps, images = _problem(matrix)
    expected = np.einsum(
        "tsrxyz,cxyz,tk,kxyz->ctsr", _dense(sampling), maps, sampling.basis, images,
        optimize=True,
    )  # fmt: skip
    # finufft was asked for 1e-6, in single precision.
    assert _relative(encoding.forward(sampling, maps, images), expected) < 1e-5


@pytest.mark.parametrize(
    ("matrix", "real", "weighted", "rank", "coils"),
    [
        *itertools.product(MATRICES, (True, False), (True, False), (3,), (2,)),
        ((7, 8, 5), False, True, 1, 2),
        ((7, 8, 5), True, True, 4, 1),
    ],
)
def test_adjoint_and_normal_operator(matrix, real, weighted, rank, coils):
    sampling, maps, images = _problem(matrix, real=real, weighted=weighted, rank=rank, coils=coils)
    y = encoding.forward(sampling, maps, images)
    z = _gaussian(np.random.default_rng(1), *y.shape)
    weights = 1 if sampling.weights is None else sampling.weights
    back = encoding.adjoint(sampling, maps, z)
    # ⟨W z, A x⟩ = ⟨Aᴴ W z, x⟩; of the norms, since the product itself may be small by chance.
    gap = abs(np.vdot(weights * z, y) - np.vdot(back, images))
    assert gap < 1e-5 * np.linalg.norm(back) * np.linalg.norm(images)
    kernel = toeplitz.kernel(sampling)
    assert kernel.values.shape[1] == (rank * (rank + 1) // 2 if real else rank**2)
    expected = encoding.adjoint(sampling, maps, y)
    # The kernel's transform is good to about 1e-5.
    assert _relative(toeplitz.normal(kernel, maps, images), expected) < 5e-5


def test_normal_operator_is_hermitian_and_positive():
    sampling, maps, images = _problem()
    kernel = toeplitz.kernel(sampling)
    other = _gaussian(np.random.default_rng(2), *images.shape)
    a = np.vdot(other, toeplitz.normal(kernel, maps, images))
    b = np.vdot(toeplitz.normal(kernel, maps, other), images)
    norms = np.linalg.norm(other) * np.linalg.norm(toeplitz.normal(kernel, maps, images))
    # By construction, whatever the error of the kernel: only rounding is left.
    assert abs(a - b) < 1e-6 * norms
    assert np.vdot(images, toeplitz.normal(kernel, maps, images)).real > 0


def test_kernel_on_the_disk_is_the_same_and_is_taken_again(tmp_path, monkeypatch):
    sampling, maps, images = _problem((7, 9, 6))
    expected = toeplitz.normal(toeplitz.kernel(sampling), maps, images)
    path = tmp_path / "kernel.h5"
    written = toeplitz.normal(toeplitz.kernel(sampling, path=path), maps, images)
    # Several threads of finufft add in any order.
    assert _relative(written, expected) < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(toeplitz, "_fields", None)  # nothing can be computed
        again = toeplitz.kernel(sampling, path=path)
    np.testing.assert_array_equal(toeplitz.normal(again, maps, images), written)
    # Workers of other processes get its path.
    assert len(pickle.dumps(again)) < 1000
    other = replace(sampling, weights=None)
    new = toeplitz.normal(toeplitz.kernel(other, path=path), maps, images)
    assert _relative(new, toeplitz.normal(toeplitz.kernel(other), maps, images)) < 1e-5
    assert _relative(new, written) > 1e-2


def test_a_file_that_is_no_kernel_is_not_replaced(tmp_path):
    path = tmp_path / "scan.h5"
    with _storage.new_hdf5(path) as file:
        file["trajectory"] = np.zeros(3)
    before = path.read_bytes()
    with pytest.raises(_storage.UnreadableFileError, match=r"expected the kernel .* trajectory"):
        toeplitz.kernel(_problem()[0], path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("weighted", [True, False])
def test_noise_gain_is_the_standard_deviation_of_back_projected_noise(weighted):
    sampling, maps, _ = _problem((8, 8, 8), weighted=weighted)
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    noise = _gaussian(np.random.default_rng(1), 400, 2, *sampling.samples) / np.sqrt(2)
    back = np.stack([encoding.adjoint(sampling, maps, one) for one in noise])
    # Voxels are correlated (99 samples a coil and draw); as many independent numbers as samples
    # bound the relative standard error by 1/√(2·400·2·396) = 0.0013; allow four.
    assert np.sqrt((np.abs(back) ** 2).mean()) == pytest.approx(sampling.noise_gain, rel=6e-3)


@pytest.mark.parametrize("coils", [1, 9])
def test_pieces_and_coils_on_two_workers(coils):
    sampling, maps, images = _problem(coils=coils)
    kernel = toeplitz.kernel(sampling)
    with ThreadPoolExecutor(2) as pool:
        result = toeplitz.normal(kernel, maps, images, executor=pool)
    # Another order of the sum over coils.
    assert _relative(result, toeplitz.normal(kernel, maps, images)) < 1e-6


def test_workers_in_other_processes_map_the_kernel_from_its_file(tmp_path):
    sampling, maps, images = _problem()
    kernel = toeplitz.kernel(sampling, path=tmp_path / "kernel.h5")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = toeplitz.normal(kernel, maps, images, executor=pool)
    np.testing.assert_array_equal(result, toeplitz.normal(kernel, maps, images))


def test_threads_do_not_change_the_result():
    sampling, maps, images = _problem((16, 8, 8), rank=5)
    kernel = toeplitz.kernel(sampling, threads=1)
    one, three = (toeplitz.normal(kernel, maps, images, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


def _operator(**kwargs):
    sampling, maps, images = _problem(**kwargs)
    kernel = toeplitz.kernel(sampling)
    return sampling, maps, images, lambda x: toeplitz.normal(kernel, maps, x)


def _matrix(sampling, maps):
    """√W A as a dense matrix."""
    A = np.einsum(
        "tsrxyz,cxyz,tk->ctsrkxyz", _dense(sampling), maps, sampling.basis, optimize=True
    )
    A *= np.sqrt(sampling.weights)[None, ..., None, None, None, None]
    return A.reshape(-1, sampling.rank * np.prod(sampling.matrix))


def test_conjugate_gradients_solve_the_regularized_least_squares():
    sampling, maps, images, normal = _operator(matrix=(5, 6, 4), rank=2)
    y = encoding.forward(sampling, maps, images)
    A = _matrix(sampling, maps)
    right = A.conj().T @ (y * np.sqrt(sampling.weights)).reshape(-1)
    l2 = 0.3
    expected = np.linalg.solve(A.conj().T @ A + l2 * np.eye(A.shape[1]), right)
    iterations = solve.conjugate_gradients(normal, encoding.adjoint(sampling, maps, y), l2=l2)
    state = next(s for s in iterations if s.residual < 1e-5)
    # The condition number is about 30, the kernel is good to 1e-5.
    assert _relative(state.images.reshape(-1), expected) < 1e-3


def test_fista_with_a_ridge_as_its_prior_gives_the_same_as_conjugate_gradients():
    sampling, maps, images, normal = _operator(rank=2)
    right = encoding.adjoint(sampling, maps, encoding.forward(sampling, maps, images))
    step = solve.STEP / solve.largest_eigenvalue(normal, right)
    l2 = 0.3

    def ridge(x, step, _iteration):  # of λ/2 ‖x‖², as conjugate gradients minimize twice that
        return x / np.float32(1 + step * l2)

    fista = next(s for s in solve.fista(normal, right, ridge, step=step) if s.iteration == 150)
    cg = next(s for s in solve.conjugate_gradients(normal, right, l2=l2) if s.residual < 1e-5)
    # FISTA is within O(1/n²) of the minimum, of a function whose curvature is at least l2.
    assert _relative(fista.images, cg.images) < 1e-3


def test_largest_eigenvalue():
    sampling, maps, images, normal = _operator(matrix=(5, 6, 4), rank=2)
    right = encoding.adjoint(sampling, maps, encoding.forward(sampling, maps, images))
    expected = np.linalg.norm(_matrix(sampling, maps), 2) ** 2
    value = solve.largest_eigenvalue(normal, right)
    # From below, and near enough for the step.
    assert solve.STEP < value / expected < 1 + 1e-4


@pytest.mark.parametrize("method", ["cg", "fista"])
def test_iterations_go_on_from_a_state_as_if_never_stopped(method):
    sampling, maps, images, normal = _operator()
    right = encoding.adjoint(sampling, maps, encoding.forward(sampling, maps, images))

    def run(start=None):
        if method == "cg":
            return solve.conjugate_gradients(normal, right, l2=0.1, start=start)
        step = solve.STEP / solve.largest_eigenvalue(normal, right)
        prior = lowrank.LocallyLowRank(0.05, block=3)
        return solve.fista(normal, right, prior, step=step, start=start)

    whole = next(s for s in run() if s.iteration == 6)
    stopped = next(s for s in run() if s.iteration == 3)
    on = next(s for s in run(stopped) if s.iteration == 6)
    np.testing.assert_array_equal(on.images, whole.images)
    assert on.residual == whole.residual


def test_too_long_a_step_is_an_error_that_carries_the_last_good_state():
    sampling, maps, images, normal = _operator()
    right = encoding.adjoint(sampling, maps, encoding.forward(sampling, maps, images))
    step = 4 / solve.largest_eigenvalue(normal, right)
    with pytest.raises(solve.DivergenceError, match=r"diverges\. The step .* too long") as caught:
        for state in solve.fista(normal, right, lambda x, *_: x, step=step):
            assert state.iteration < 50
    assert np.isfinite(caught.value.state.images).all()


def test_fista_is_its_recursion_with_the_momenta_of_beck_and_teboulle():
    # A diagonal operator and no prior: every number for itself. t = 1, (1+√5)/2, 2.194, 2.750.
    eigenvalues = np.linspace(0.1, 1.0, 8).reshape(1, 2, 2, 2)
    right, step = np.ones((1, 2, 2, 2), np.complex64), 0.9
    states = solve.fista(lambda x: eigenvalues * x, right, lambda x, *_: x, step=step)
    before = z = np.zeros((1, 2, 2, 2))
    for share in (0.0, (1.6180340 - 1) / 2.1935268, (2.1935268 - 1) / 2.7497902):
        x = z + step * (1 - eigenvalues * z)
        # Single precision.
        np.testing.assert_allclose(next(states).images, x, rtol=1e-6)
        before, z = x, x + share * (x - before)


def test_conjugate_gradients_whose_residual_grows_tenfold_end():
    right = np.ones((1, 2, 2, 2), np.complex64)
    right[0, 0, 0] = 2
    # Positive, and far from symmetric: directions that are no longer conjugate.
    signs = np.array([1, -1], np.float32).reshape(1, 2, 1, 1)

    def skew(x):
        return x + 40 * signs * np.roll(x, 1, axis=1)

    with pytest.raises(solve.DivergenceError, match="Stop earlier, or regularize") as caught:
        for state in solve.conjugate_gradients(skew, right):
            assert state.iteration < 50
    assert caught.value.state.residual < 10


def test_an_operator_that_is_not_positive_stops_conjugate_gradients():
    right = np.ones((1, 2, 2, 2), np.complex64)
    with pytest.raises(solve.DivergenceError, match="positive operator; got the curvature -8"):
        next(solve.conjugate_gradients(lambda x: -x, right))


def test_zeros_and_nan_are_refused():
    zero = np.zeros((1, 2, 2, 2), np.complex64)
    for wrong in (zero, zero + np.nan):
        with pytest.raises(ValueError, match="finite images that are not zero"):
            next(solve.conjugate_gradients(lambda x: x, wrong))


@pytest.mark.paper("§2.8")
@pytest.mark.parametrize("matrix", [(8, 8, 8), (7, 10, 5), (9, 12, 1)])
@pytest.mark.parametrize("seed", [None, 0])
def test_locally_low_rank_is_a_soft_threshold_of_singular_values(matrix, seed):
    K, b, step, weight = 3, 4, 0.5, 0.1
    images = _gaussian(np.random.default_rng(0), K, *matrix)
    result = lowrank.LocallyLowRank(weight, b, seed)(images, step, 5)
    edges = [min(b, n) for n in matrix]
    counts = [-(-n // e) for n, e in zip(matrix, edges, strict=True)]
    M, B = np.prod(edges), np.prod(counts)
    threshold = step * weight * (np.sqrt(M) + np.sqrt(K) + np.sqrt(np.log(B * min(M, K))))
    shift = (0, 0, 0) if seed is None else np.random.default_rng((seed, 5)).integers(0, edges)
    padded = np.zeros((K, *np.multiply(edges, counts)), complex)
    padded[:, : matrix[0], : matrix[1], : matrix[2]] = images
    padded = np.roll(padded, [-s for s in shift], (1, 2, 3))
    for corner in itertools.product(*map(range, counts)):
        place = tuple(slice(c * e, (c + 1) * e) for c, e in zip(corner, edges, strict=True))
        U, s, Vh = np.linalg.svd(padded[:, *place].reshape(K, -1), full_matrices=False)
        padded[:, *place] = ((U * np.maximum(s - threshold, 0)) @ Vh).reshape(K, *edges)
    expected = np.roll(padded, shift, (1, 2, 3))[:, : matrix[0], : matrix[1], : matrix[2]]
    # Single precision in and out.
    assert _relative(result, expected) < 1e-6
    # Something was shrunk.
    assert _relative(result, images) > 0.05


def test_blocks_move_from_iteration_to_iteration():
    images = _gaussian(np.random.default_rng(0), 3, 8, 8, 8)
    prior = lowrank.LocallyLowRank(0.1, 4)
    np.testing.assert_array_equal(prior(images, 1.0, 1), prior(images, 1.0, 1))
    assert _relative(prior(images, 1.0, 1), prior(images, 1.0, 2)) > 1e-2
    other = lowrank.LocallyLowRank(0.1, 4, seed=1)
    assert _relative(prior(images, 1.0, 1), other(images, 1.0, 1)) > 1e-2


def test_scaling_is_the_percentile_or_the_maximum():
    ramp = np.arange(1000).astype(np.complex64)
    # max - p90 = 99 < 2 (p90 - median) = 800
    assert solve.scaling(ramp) == 900
    peaked = np.r_[ramp, 1e4].astype(np.complex64)
    assert solve.scaling(peaked) == 1e4
    # On both sides of max = p90 + 2 (p90 - median) = 1700.
    for highest, expected in ((1690.0, 900.0), (1710.0, 1710.0)):
        assert solve.scaling(np.r_[ramp[:-1], highest].astype(np.complex64)) == expected


def _koosh(n=16, T=12, S=4):
    from fisherprint.reconstruct import trajectory

    direction = trajectory.koosh_ball(T * S).reshape(S, T, 3).swapaxes(0, 1)
    return trajectory.spokes(direction, trajectory.readout(n)), np.eye(T)[:, :2]


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1 / 16, "looks like cycles per voxel. Multiply it by N = 16"),
        (2 * np.pi / 16, "looks like radians per voxel. Multiply it by N/2π"),
        (2.0, r"beyond|within ±N/2 = ±8 .* axis 0.* looks like a readout with oversampling"),
        (2 * np.pi, "looks like radians per field of view .divide by 2π."),
        (1 / 0.22, "radians per field of view|1/m or rad/m"),
        (1000.0, "looks like 1/m or rad/m"),
    ],
)
def test_a_trajectory_in_other_units_is_refused(factor, message):
    trajectory, basis = _koosh()
    with pytest.raises(ValueError, match=message):
        Sampling(trajectory * factor, basis, (16, 16, 16))


def test_what_disagrees_is_named():
    trajectory, basis = _koosh()
    matrix = (16, 16, 16)
    bad = trajectory.copy()
    bad[0, 0, 0, 0] = np.nan
    for message, arguments in {
        "the trajectory must have the axes .T=11": (trajectory, basis[:11], matrix),
        "orthonormal columns": (trajectory, 2 * basis, matrix),
        "the trajectory must be finite; got 1 NaN": (bad, basis, matrix),
        "one voxel along axis 2 needs a trajectory of zeros": (trajectory, basis, (16, 16, 1)),
        "the matrix must be three numbers": (trajectory, basis, (16, 16)),
        "the weights must have the axes .T=12, S=4, R=16": (
            trajectory, basis, matrix, np.ones((12, 4, 15)),
        ),
        "the weights must be zero or above": (
            trajectory, basis, matrix, -np.ones((12, 4, 16)),
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Sampling(*arguments)
    sampling, maps, images = _problem()
    y = encoding.forward(sampling, maps, images)
    with pytest.raises(ValueError, match=r"sensitivities must have the axes .*N0=8"):
        encoding.adjoint(sampling, maps[:, :7], y)
    with pytest.raises(ValueError, match=r"k-space must have the axes .C=2, T=12, S=3, R=11"):
        encoding.adjoint(sampling, maps, y[:, :, :2])
    y[1, 2, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"coil 1 must be finite; got 1 NaN.*\(2, 0, 3\)"):
        encoding.adjoint(sampling, maps, y)


def test_too_few_cycles_are_told_with_the_number_that_would_do():
    trajectory, basis = _koosh()
    with pytest.warns(encoding.UndersampledWarning, match="4 cycles give 768 samples .* About 23"):
        Sampling(trajectory, basis, (16, 16, 16))
