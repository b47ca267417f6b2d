"""A digital brain is scanned, reconstructed, mapped with the bundled network and reported.

    python examples/scan_and_reconstruct.py [MATRIX] [FOLDER]

The default is coarse, for a quick look. Tissues and the deep nuclei need a matrix of 48, and
minutes.
"""

# %%
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from fisherprint import experiment as stages

MATRIX = int(sys.argv[1]) if len(sys.argv) > 1 else 16
FINE = MATRIX >= 32
folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
network = stages.shipped.load()


def quiet(*_):
    """Report nothing."""


# %% Raw data: 64 cycles of the bundled train, four coils (docs/decisions/043-example-scan.md)
scan = folder / "scan.h5"
cycles = 64 if FINE else 8
wanted = stages.DigitalScan(MATRIX, cycles=cycles, coils=4, oversampling=1, noise_std=0.002)
stages.scan_phantom(network, scan, wanted, say=print, progress=quiet)

# %% Images of the network's 20 coefficients: sensitivities by ESPIRiT, locally low rank
images = folder / "coefficients.nii.gz"
prior = stages.Reconstruction(llr=5e-5, block=6, iterations=60 if FINE else 10)
stages.reconstruct_run(network, scan, images, prior, say=print, progress=quiet)

# %% Maps of these and of the images without noise
truth = folder / "scan-truth"
for coefficients, name in ((truth / "coefficients.nii.gz", "expected"), (images, "maps")):
    section = stages.MapSection(
        coefficients=coefficients, mask=truth / "mask.nii.gz", errors=False
    )
    stages.map_run(network, section, folder / name, overwrite=True, say=quiet, progress=quiet)
page = stages.shipped.write_page(
    network, stages.Run(folder, stages.Experiment(title="From a digital scan to maps"))
)
print(f"report: {page}")


# %% Medians of tissues beside those without noise
def values(path):
    """Of an image."""
    return np.asarray(nibabel.load(path).dataobj)


maps = {
    (which, name): values(folder / which / f"{name}.nii.gz")
    for which in ("maps", "expected")
    for name in network.card["estimated"]
}
inside = {"brain": values(truth / "mask.nii.gz") > 0}
# Large voxels have no pure tissue.
inside |= {
    path.name.split(".")[0]: values(path) > 0
    for path in sorted((truth / "tissues").glob("*.nii.gz"))
}
for tissue, voxels in inside.items():
    print(f"{tissue}: {voxels.sum()} voxels")
    for name in network.card["estimated"]:
        found, expected = (
            np.nanmedian(maps[which, name][voxels]) for which in ("maps", "expected")
        )
        print(f"  {name}: {found:.4g}, without noise {expected:.4g} ({found / expected - 1:+.1%})")
