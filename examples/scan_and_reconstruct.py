"""A digital brain is scanned, reconstructed, mapped and reported, with coarse voxels.

    python examples/scan_and_reconstruct.py [MATRIX] [FOLDER]

Voxels of a real scan need a matrix of 48 at least, and minutes. The network is a small one,
trained here; with a larger run leave out its two lines.
"""

# %%
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from fisherprint import experiment as stages

MATRIX = int(sys.argv[1]) if len(sys.argv) > 1 else 16
folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())

# %% A data set with its basis of 13 coefficients, and a network
(folder / "small.toml").write_text(f"""\
title = "From a digital scan to maps"

[simulation]
training = {8192 if MATRIX >= 32 else 1024}
validation = 512
test = 512
rank = 13

[training]
epochs = {24 if MATRIX >= 32 else 4}
learning_rate = 4e-3
halve_every = 6
remove_phase = true
""")


def quiet(*_):
    """Report nothing."""


run = stages.start(stages.read(folder / "small.toml"), folder / "run")
if not run.dataset.exists():
    stages.simulate_run(run, progress=quiet)
    stages.train_run(run, resume=False, say=quiet, progress=quiet)

# %% Raw data: 16 cycles of the bundled train, four coils, noise
scan = folder / "scan.h5"
wanted = stages.DigitalScan(MATRIX, cycles=16, coils=4, oversampling=1, noise_std=0.005)
stages.scan_brain(run, scan, wanted, say=print, progress=quiet)

# %% Coefficient images: sensitivities by ESPIRiT, locally low rank
images = folder / "coefficients.nii.gz"
prior = stages.Reconstruction(llr=1e-4, block=6, iterations=60 if MATRIX >= 32 else 10)
stages.reconstruct_run(run, scan, images, prior, say=print, progress=quiet)

# %% Maps of these and of the images without noise
truth = folder / "scan-truth"
for coefficients, name in ((truth / "coefficients.nii.gz", "expected"), (images, "run/maps")):
    section = stages.MapSection(
        coefficients=coefficients, mask=truth / "mask.nii.gz", errors=False
    )
    stages.map_run(run, section, folder / name, overwrite=True, say=quiet, progress=quiet)
print(f"report: {stages.report_run(run)}")


# %% Medians of white matter
def values(path):
    """Of an image."""
    return np.asarray(nibabel.load(path).dataobj)


tissue = truth / "tissues" / "white_matter.nii.gz"
# Large voxels have no pure tissue: all of the brain then.
inside = values(tissue if tissue.exists() else truth / "mask.nii.gz") > 0
for name in run.experiment.training.estimated:
    found, expected = (
        np.nanmedian(values(folder / maps / f"{name}.nii.gz")[inside])
        for maps in ("run/maps", "expected")
    )
    print(
        f"{name}: median {found:.4g}, without noise {expected:.4g} ({found / expected - 1:+.1%})"
    )
