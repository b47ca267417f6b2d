"""Six tubes whose parameters are known, by two networks and by least squares (Fig. 9).

    python examples/tube_phantom.py [--crb RUN --mse RUN] [-o FOLDER]

A digital phantom after §2.8: 10, 15 and 20 % of cross-linked protein, half of the tubes doped. The
paper prints the values of the undoped 15 % mixture; the others are scaled from it, as assumed in
docs/decisions/035-digital-tubes.md. Without runs the networks are the shipped one and the same one
trained on a little with the MSE loss, and a few voxels are fitted.
"""

# %%
import argparse
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from fisherprint import experiment as stages
from fisherprint import files, maps, report, train
from fisherprint.reconstruct.tubes import digital_tubes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--crb", type=Path, metavar="RUN", help="run of the CRB loss")
parser.add_argument("--mse", type=Path, metavar="RUN", help="the same of the MSE loss")
parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for all files")
parser.add_argument("--snr", type=float, default=50, help="|M0|/σ of a coefficient; else 50")
parser.add_argument("--voxels", type=int, metavar="N", help="of a tube; else all, without runs 8")
parser.add_argument("--voxel-size", type=float, default=1.0, metavar="MM")
parser.add_argument("--starts", type=int, default=4, metavar="N", help="of a fit; else 4")
asked = parser.parse_args()
if (asked.crb is None) != (asked.mse is None):
    parser.error("--crb and --mse belong together")
folder = asked.output or Path(tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
n_voxels = asked.voxels or (8 if asked.crb is None else 10**9)
if asked.starts < 1 or n_voxels < 1 or not asked.snr > 0:
    parser.error("--starts, --voxels and --snr must be positive")


def quiet(*_):
    """Report nothing."""


def briefly(line):
    """Report what a fit says, but for its medians over all tubes."""
    if not line.startswith(("all:", "white matter", "no white matter", "CSF")):
        print(line, flush=True)


# %% Two networks of one basis, and a run whose data set says model, prior and where fits start
if asked.crb is None:
    shipped = stages.shipped.folders()["bundled"]
    (folder / "mse.toml").write_text(f"""\
title = "The shipped network, trained on with the MSE loss"

[simulation]
training = 2048
validation = 256
test = 64
basis = "{shipped / "basis.h5"}"
basis_key = "basis"

[training]
loss = "mse"
start = "{shipped}"
remove_phase = true
epochs = 6
batch_size = 256
learning_rate = 1e-3
halve_every = 2
""")
    run = stages.start(stages.read(folder / "mse.toml"), folder / "mse-run")
    if not run.dataset.exists():
        stages.simulate_run(run, progress=quiet)
    stages.train_run(run, resume=run.checkpoint.exists(), say=print, progress=quiet)
    networks = {"network, CRB": stages.shipped.load("bundled"), "network, MSE": run}
else:
    run = stages.open_run(asked.crb)
    networks = {"network, CRB": run, "network, MSE": stages.open_run(asked.mse)}
networks = {
    name: stages.open_trained(network) if isinstance(network, stages.Run) else network
    for name, network in networks.items()
}
first = networks["network, CRB"]
model, basis = first.model, first.basis

# %% Coefficient images of eroded tubes, with noise; all else stays zero
phantom = digital_tubes(model.names, voxel_size=asked.voxel_size)
used = np.zeros(phantom.labels.shape, dtype=bool)
for label in range(1, len(phantom.tubes) + 1):
    inside = np.flatnonzero(phantom.eroded == label)
    number = min(n_voxels, len(inside))
    used.flat[inside[np.linspace(0, len(inside) - 1, number).astype(int)]] = True
rng = np.random.default_rng(0)
clean = phantom.m0[used][:, None] * basis.compress(model.signal(phantom.theta[used]))
noise = rng.standard_normal((*clean.shape, 2)) @ [1, 1j] / asked.snr
images = np.zeros((*used.shape, basis.rank), dtype=np.complex64)
images[used] = clean + noise
volume = files.Volume(images, phantom.affine)
files.write_coefficients(folder / "coefficients.nii.gz", volume, basis_sha256=basis.digest)
files.write_mask(folder / "mask.nii.gz", used, volume=volume)
nibabel.save(nibabel.Nifti1Image(phantom.eroded, phantom.affine), folder / "labels.nii.gz")
files.write_maps(
    maps.Maps(model.names, phantom.theta, used, 0),
    folder / "truth",
    volume=volume,
    parameters=model.parameters,
    provenance={"kind": "digital tubes, truth"},
)

# %% Maps by each estimator
print(f"{used.sum()} voxels of six tubes at SNR {asked.snr:g}")
estimates, columns = {}, [model.index(name) for name in first.card["estimated"]]
names = [model.names[column] for column in columns]


def section(config):
    """The images, with what a network is told."""
    return stages.MapSection(
        coefficients=folder / "coefficients.nii.gz",
        mask=folder / "mask.nii.gz",
        noise_std=1 / asked.snr if config.snr_input else None,
        known={name: folder / "truth" / f"{name}.nii.gz" for name in config.inputs},
        errors=False,
    )


for name, network in networks.items():
    config = train.TrainingConfig.model_validate(network.card["config"])
    out = folder / name.split()[-1].lower()
    stages.map_run(network, section(config), out, overwrite=True, say=quiet, progress=quiet)
    estimates[name] = files.read_maps(out, names).maps.values[used]
config = train.TrainingConfig.model_validate(first.card["config"])
told = section(config)
stages.fit_run(
    run,
    told.model_copy(update={"known": {}, "noise_std": 1 / asked.snr}),
    folder / "nlls",
    known=told.known,
    start=asked.starts,
    overwrite=True,
    say=briefly,
    progress=lambda _, done, total: print(f"{done} of {total} voxels fitted", flush=True),
)
estimates = {
    "least squares": files.read_maps(folder / "nlls", names).maps.values[used]
} | estimates

# %% Boxes, their numbers, and how far the networks are from least squares
labels = phantom.eroded[used]
found = report.TubeEstimates(
    tuple(model.parameters[column] for column in columns),
    phantom.tubes,
    labels,
    np.array(
        [phantom.theta[used][labels == i + 1][0, columns] for i in range(len(phantom.tubes))]
    ),
    estimates,
)
report.tube_boxes(found).savefig(folder / "tubes.png", dpi=120)
files.write_table(folder / "tubes.csv", report.TUBE_COLUMNS, report.tube_numbers(found))
for name, distances in report.agreement(found, "least squares").items():
    text = ", ".join(f"{parameter} {value:.2f}" for parameter, value in distances.items())
    print(f"{name}: medians away from those of least squares by {text} of its quartile range")
print(f"picture: {folder / 'tubes.png'}")
print(f"numbers: {folder / 'tubes.csv'}")
