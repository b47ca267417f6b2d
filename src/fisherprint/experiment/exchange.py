"""The trained network of a run for programs other than this one."""

from __future__ import annotations

import json
from pathlib import Path

from fisherprint import files
from fisherprint.experiment.folder import Run, versions
from fisherprint.experiment.mapping import load_network
from fisherprint.onnx_graph import as_onnx

# Of the card, what a user of the network must know, and what it was made from.
_TOLD = ("estimated", "rank", "ranges", "snr_range", "basis_sha256", "train_sha256")
_ORIGIN = ("weights_sha256", "dataset_sha256")


def write_onnx(run: Run, path: Path, *, force: bool = False) -> None:
    """Write a run's network as ONNX, what its card says in the model's metadata, as JSON.

    Args:
        run: with a trained network.
        path: of the file.
        force: replace a file that is there.

    Raises:
        OutputExistsError: the file is there.
        ExperimentError: there is no network yet.
        ModuleNotFoundError: onnx is not installed.
    """
    if path.exists() and not force:
        raise files.OutputExistsError(
            f"{path} is already there. Choose another name, or replace it with --force."
        )
    network, card = load_network(run)
    told = {key: card[key] for key in (*_TOLD, *_ORIGIN) if key in card}
    told["units"] = [card["units"][name] for name in card["estimated"]]
    config = card["config"]
    told["extra"] = [*config.get("inputs", ()), *["log(|x|/sigma)"] * config["snr_input"]]
    told["fisherprint"] = versions()["fisherprint"]
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in told.items()}
    files.write_bytes(path, as_onnx(network, metadata))
