import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fisherprint as fp

# A shell ignores Ctrl-C for what it runs in the background, and so would the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the reference data, which are not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FISHERPRINT_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set FISHERPRINT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def paper_train(data: Path) -> fp.PulseTrain:
    """The paper's pulse train."""
    path = data / "qmt-train" / "control_MT_v3p2_TR3p5ms_discretized.mat"
    return fp.PulseTrain.read(path, repetition_time=3.5e-3)


@pytest.fixture(scope="session")
def short_train() -> fp.PulseTrain:
    """A train of 40 pulses, fast enough for slow oracles."""
    i = np.arange(1, 40)
    angle = np.r_[np.pi, 0.1 + np.sin(np.pi * i / 40) ** 2]
    duration = np.r_[500e-6, 1e-6 * (150 + 8 * i)]
    return fp.PulseTrain(angle, duration, 3.5e-3)


@pytest.fixture(scope="session")
def white_matter() -> np.ndarray:
    """m0s, T1, T2f, Rx, T2s, B0, B1."""
    return np.array([0.2, 1.1, 0.07, 20.0, 12e-6, 100.0, 0.95])


@pytest.fixture(autouse=True)
def _torch_stays_as_it_is() -> Iterator[None]:
    """Fail a test that changes torch's default dtype, threads or global generator."""

    def settings() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.random.get_rng_state().numpy().tobytes(),
        )

    before = settings()
    yield
    assert settings() == before, "the test changed torch's dtype, threads or global generator"
