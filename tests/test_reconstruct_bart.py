"""The reconstruction beside BART's, on the same files.

BART 0.8 interpolates with a precision of about 1e-3, and FISTA leaves its loop after the gradient
step, before the threshold: where its images are compared with FISTA, the points before the
threshold are.
"""

import shutil
import subprocess
import warnings

import numpy as np
import pytest

from fisherprint import files
from fisherprint.reconstruct import encoding, lowrank, scanning, solve, toeplitz, trajectory

pytestmark = pytest.mark.skipif(
    shutil.which("bart") is None, reason="bart is not installed: apt-get install bart"
)


def _relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


class Case:
    """A smooth object of K coefficients, sampled by spokes, in memory and in BART's files."""

    def __init__(self, folder, *, n=16, rank=3, coils=4, planar=False, weighted=False, cycles=20):
        rng = np.random.default_rng(0)
        T = 16
        self.folder, self.matrix = folder, (n, n, 1 if planar else n)
        spokes = trajectory.radial_scan(T, cycles, trajectory.readout(n, 2), planar=planar)
        # Complex, so that a wrong conjugate shows.
        basis = np.linalg.qr(rng.standard_normal((T, rank)))[0]
        basis = basis * np.exp(2j * np.pi * rng.uniform(size=rank))
        weights = np.linalg.norm(spokes, axis=-1) / n + 0.1 if weighted else None
        self.sampling = encoding.Sampling(spokes, basis, self.matrix, weights)
        self.maps = scanning.coil_sensitivities(self.matrix, coils)
        lines = [(np.arange(m) - m // 2) / (m / 2) for m in self.matrix]
        x = np.stack(np.meshgrid(*lines, indexing="ij"))
        # Gaussians: spokes see all of their spectrum.
        self.truth = np.stack(
            [
                np.exp(-8 * ((x - 0.1 * k) ** 2).sum(0) + 1j * x[k % 2]) / (k + 1)
                for k in range(rank)
            ]
        ).astype(np.complex64)
        kspace = encoding.forward(self.sampling, self.maps, self.truth)
        noise = rng.standard_normal((*kspace.shape, 2)).astype(np.float32).view(np.complex64)
        self.kspace = kspace + 0.02 * np.abs(kspace).std() * noise[..., 0]
        self.right = encoding.adjoint(self.sampling, self.maps, self.kspace)
        kernel = toeplitz.kernel(self.sampling)
        self.normal = lambda images: toeplitz.normal(kernel, self.maps, images)

    def bart(self, *options):
        """Images of `bart pics`."""
        s, folder = self.sampling, self.folder
        files.write_cfl(folder / "traj", s.trajectory.transpose(3, 2, 1, 0)[:, :, :, None, None])
        files.write_cfl(folder / "data", self.kspace.transpose(3, 2, 0, 1)[None, :, :, :, None])
        files.write_cfl(folder / "basis", s.basis[None, None, None, None, None])
        files.write_cfl(folder / "maps", self.maps.transpose(1, 2, 3, 0))
        if s.weights is not None:
            # BART's pattern multiplies the data and the model, and so once more in the square.
            root = np.sqrt(s.weights).transpose(2, 1, 0)[None, :, :, None, None]
            files.write_cfl(folder / "weights", root)
            options = ("-p", "weights", *options)
        command = ["bart", "pics", "-S", "-w", "1", *options, "-t", "traj", "-B", "basis"]
        subprocess.run(
            [*command, "data", "maps", "out"], cwd=folder, check=True, capture_output=True
        )
        images = np.array(files.open_cfl(folder / "out"))
        images = images.reshape(*self.matrix, s.rank, order="F")
        return np.moveaxis(images, -1, 0)


@pytest.fixture(autouse=True)
def _small_problems_are_undersampled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", encoding.UndersampledWarning)
        yield


@pytest.mark.parametrize(
    "options",
    [{}, {"planar": True, "n": 24}, {"coils": 1, "rank": 1}, {"weighted": True}],
    ids=["volume", "slice", "one coil and coefficient", "weights"],
)
def test_conjugate_gradients_give_barts_images(tmp_path, options):
    case = Case(tmp_path, **options)
    expected = case.bart("-l2", "-r", "0.1", "-i", "10")
    states = solve.conjugate_gradients(case.normal, case.right, l2=0.1)
    found = next(state for state in states if state.iteration == 10)
    # BART's own precision.
    assert _relative(found.images, expected) < 3e-3
    assert _relative(found.images, case.truth) < 0.2


def test_locally_low_rank_gives_barts_images(tmp_path):
    case = Case(tmp_path)
    weight, block = 0.01, 4
    expected = case.bart("-e", "-n", "-b", str(block), "-R", f"L:7:7:{weight}", "-i", "30")
    step = solve.STEP / solve.largest_eigenvalue(case.normal, case.right)
    prior = lowrank.LocallyLowRank(weight, block, seed=None)
    before = {}

    def recorded(images, step, iteration):
        before[iteration] = images.copy()
        return prior(images, step, iteration)

    states = solve.fista(case.normal, case.right, recorded, step=step)
    found = next(state for state in states if state.iteration == 31)
    assert _relative(before[31], expected) < 1e-2
    # The prior does something: its shrinkage is many times that.
    assert _relative(found.images, before[31]) > 1e-3


def test_the_scale_of_the_data_is_barts(tmp_path):
    case = Case(tmp_path)
    command = case.bart  # writes the files
    command("-l2", "-r", "0.1", "-i", "1")
    pics = ["bart", "pics", "-d4", "-l2", "-i", "1", "-t", "traj", "-B", "basis"]
    printed = subprocess.run(
        [*pics, "data", "maps", "x"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    lines = (printed.stdout + printed.stderr).splitlines()
    (line,) = [line for line in lines if "Inverse scaling" in line]
    # Printed with six digits; Aᴴ y of BART is good to 1e-3.
    assert float(line.split()[-1]) == pytest.approx(solve.scaling(case.right), rel=5e-3)
