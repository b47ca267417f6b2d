"""Run folders: TOML, JSON and logs, data sets, networks, checkpoints, audits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.torch
import tomli_w
import torch
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint._storage import UnreadableFileError
from fisherprint.design import Round
from fisherprint.evaluate import Audit, Score
from fisherprint.fisher import PriorBounds
from fisherprint.sequence import PulseTrain
from fisherprint.simulate import SPLITS, DataSet, Finished, Reduced, Shard
from fisherprint.subspace import Basis

# Version of the layout of data sets and audits; readers refuse another.
_FORMAT = 1
# Arrays of each sample; data sets of early versions have no information.
_SAMPLE_ARRAYS = tuple(field.name for field in fields(Reduced))
_PRIOR_ARRAYS = ("snr", "spread", "overall", "local")
_AUDIT_ARRAYS = ("snr", "truth", "crb", "bias", "variance")
_SCORE_ARRAYS = ("loss_by_parameter", "standard_error_by_parameter")
_ROUND_NUMBERS = (
    "number",
    "best_cost",
    "cost",
    "excess",
    "penalty",
    "evaluations",
    "converged",
)
_SCORE_NUMBERS = ("loss", "standard_error", "n_used", "n_unbounded", "n_failed")


class OutputExistsError(ValueError):
    """The output folder already holds a finished run."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        UnreadableFileError: no such file, or not TOML.
    """
    return _storage.read_toml(Path(path))


def write_toml(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write TOML; an existing file is replaced whole or not at all."""
    write_text(path, to_toml(content))


def to_toml(content: Mapping[str, Any]) -> str:
    """The TOML text of nested tables."""
    return tomli_w.dumps(content)


def write_search(path: str | Path, state: Round, design: str) -> None:
    """Store where the search for a train stands, and the design that it belongs to."""
    with _storage.new_hdf5(Path(path)) as file:
        file.attrs["format"] = _FORMAT
        file.attrs["design"] = design
        for name in ("train", "best"):
            getattr(state, name).write_to(file.create_group(name))
        for name in _ROUND_NUMBERS:
            file.attrs[name] = getattr(state, name)
        file.attrs["relative"] = json.dumps(dict(state.relative))
        file["multipliers"] = state.multipliers


def read_search(path: str | Path) -> tuple[Round, str]:
    """What `write_search` stored.

    Raises:
        UnreadableFileError: no such file, damaged, or of another kind or version.
    """
    path = Path(path)
    with _storage.open_hdf5(path) as file:
        if file.attrs.get("format") != _FORMAT or "design" not in file.attrs:
            raise UnreadableFileError(
                f"expected the search for a train in {path}; got another file, or one of another "
                "version. Begin anew with --force."
            )
        trains = {name: PulseTrain.read_from(file[name]) for name in ("train", "best")}
        numbers = {name: file.attrs[name].item() for name in _ROUND_NUMBERS}
        relative = json.loads(file.attrs["relative"])
        return (
            Round(
                train=trains["train"],
                best=trains["best"],
                relative=relative,
                multipliers=file["multipliers"][()],
                **numbers,
            ),
            str(file.attrs["design"]),
        )


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text; an existing file is replaced whole or not at all."""
    with _storage.replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes; an existing file is replaced whole or not at all."""
    with _storage.replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON; an existing file is replaced whole or not at all.

    Raises:
        ValueError: NaN or Inf, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UnreadableFileError: no such file, or not a JSON object.
    """
    path = Path(path)
    _storage.require_file(path)
    return _parsed_object(path.read_text(encoding="utf-8", errors="replace"), path)


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one line to a file of JSON lines.

    A last line that an interrupted run left unfinished is removed first.

    Raises:
        ValueError: NaN or Inf, which JSON does not know.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(line.encode())


def write_jsonl(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew, whole or not at all."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The finished lines of a file of JSON lines.

    Raises:
        UnreadableFileError: no such file, or a finished line that is no JSON object.
    """
    path = Path(path)
    _storage.require_file(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    return [_parsed_object(line, path) for line in text.split("\n")[:-1]]


def write_dataset(
    path: str | Path,
    data: DataSet,
    train: PulseTrain,
    *,
    seed: int,
    versions: Mapping[str, str],
) -> None:
    """Write a data set as HDF5 with its basis, train, seed and versions.

    Groups `training`, `validation` and `test` hold `theta` (S, P), `coefficients` (S, K), the
    bounds `crb_signal` and `crb_coefficients` (S, P) for σ = |M0| = 1, and `information`, the
    lower triangle of the coefficients' Fisher information, row by row, of the P parameters and
    of Re M0 and Im M0; `basis` is (T, K). The attributes of a CRB-SVD basis say so.
    """
    with _storage.new_hdf5(Path(path)) as file:
        _write_head(file, data, train, seed, versions)
        for split, reduced in data.samples.items():
            for name, array in vars(reduced).items():
                if array is not None:
                    file[f"{split}/{name}"] = array


def assemble_dataset(
    path: str | Path,
    shards: Mapping[str, Sequence[Path]],
    head: DataSet,
    train: PulseTrain,
    *,
    seed: int,
    versions: Mapping[str, str],
) -> None:
    """Write a data set out of shards, one after the other: it need not fit into memory.

    Args:
        path: of the data set, as `write_dataset` writes it.
        shards: files of each split, in order.
        head: all but the samples, which are not looked at.
        train: the pulse train.
        seed: of all draws.
        versions: what the numbers depend on.

    Raises:
        OSError: the disk has not enough room.
    """
    size = sum(shard.stat().st_size for files in shards.values() for shard in files)
    with _storage.large_hdf5(Path(path), size + head.basis.vectors.nbytes) as file:
        _write_head(file, head, train, seed, versions)
        for split, paths in shards.items():
            first = 0
            for number, shard in enumerate(paths):
                reduced = read_shard(shard).reduced
                for name in _SAMPLE_ARRAYS:
                    part = getattr(reduced, name)
                    if number == 0:
                        total = _samples(paths)
                        file.create_dataset(f"{split}/{name}", (total, part.shape[1]), part.dtype)
                    file[f"{split}/{name}"][first : first + len(part)] = part
                first += len(reduced.theta)


def _samples(shards: Sequence[Path]) -> int:
    """Fingerprints in the shards of a split: all but the last have the size of the first."""
    ends = [len(read_shard(path).reduced.theta) for path in (shards[0], shards[-1])]
    return ends[0] * (len(shards) - 1) + ends[1]


def _write_head(
    file: h5py.File, data: DataSet, train: PulseTrain, seed: int, versions: Mapping[str, str]
) -> None:
    file.attrs.update(
        format=_FORMAT,
        names=list(data.names),
        energy=data.energy,
        seed=seed,
        versions=json.dumps(dict(versions)),
        basis_sha256=data.basis.digest,
        train_sha256=train.digest,
    )
    if data.crb_weight is not None:
        file.attrs.update(basis_method="crb-svd", basis_weight=data.crb_weight)
    file["basis"] = data.basis.vectors
    train.write_to(file.create_group("train"))


def write_shard(path: str | Path, finished: Finished) -> None:
    """Write a shard of a data set as HDF5."""
    with _storage.new_hdf5(Path(path)) as file:
        file.attrs.update(format=_FORMAT, energy=finished.energy, **vars(finished.shard))
        for name in _SAMPLE_ARRAYS:
            file[name] = getattr(finished.reduced, name)


def read_shard(path: str | Path) -> Finished:
    """The shard that `write_shard` was given.

    Raises:
        UnreadableFileError: no such file, truncated, foreign, or of another version.
    """
    path = Path(path)
    with _storage.open_hdf5(path) as file:
        _require_format(file, path, "shard", _SAMPLE_ARRAYS)
        reduced = Reduced(**{name: file[name][()] for name in _SAMPLE_ARRAYS})
        attributes = file.attrs
        shard = Shard(str(attributes["split"]), int(attributes["number"]), int(attributes["size"]))
        return Finished(shard, reduced, float(attributes["energy"]))


def write_arrays(path: str | Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write named arrays as HDF5, for `read_arrays`."""
    with _storage.new_hdf5(Path(path)) as file:
        for name, array in arrays.items():
            file[name] = array


def read_arrays(path: str | Path, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Named arrays of an HDF5 file.

    Raises:
        UnreadableFileError: no such file, truncated, foreign, or without one of them.
    """
    return _storage.read_arrays(Path(path), names)


def write_basis(path: str | Path, basis: Basis) -> None:
    """Write a basis as HDF5, its vectors (T, K) under the key `basis`."""
    with _storage.new_hdf5(Path(path)) as file:
        file["basis"] = basis.vectors


def read_dataset(path: str | Path) -> tuple[DataSet, PulseTrain]:
    """The data set and the train that `write_dataset` was given.

    Raises:
        UnreadableFileError: no such file, truncated, foreign, or of another version.
    """
    path = Path(path)
    with _storage.open_hdf5(path) as file:
        _require_format(file, path, "data set", ("train", "basis", *SPLITS))
        samples = {}
        for split in SPLITS:
            early = "information" not in file[split]
            there = [name for name in _SAMPLE_ARRAYS if not (early and name == "information")]
            samples[split] = Reduced(**{name: file[split][name][()] for name in there})
        names = tuple(str(name) for name in file.attrs["names"])
        basis = Basis(file["basis"][()])
        weight = file.attrs.get("basis_weight")
        crb_weight = None if weight is None else float(weight)
        data = DataSet(names, basis, samples, float(file.attrs["energy"]), crb_weight)
        return data, PulseTrain.read_from(file["train"])


def write_audit(path: str | Path, audit: Audit, score: Score) -> None:
    """Write bias and variance of each fingerprint, and the loss over M0, as HDF5."""
    with _storage.new_hdf5(Path(path)) as file:
        file.attrs.update(format=_FORMAT, names=list(audit.names), n_noise=audit.n_noise)
        for name in _AUDIT_ARRAYS:
            file[f"audit/{name}"] = getattr(audit, name)
        if audit.prior is not None:
            for name in _PRIOR_ARRAYS:
                file[f"prior/{name}"] = getattr(audit.prior, name)
        for name in _SCORE_ARRAYS:
            file[f"score/{name}"] = getattr(score, name)
        file["score"].attrs.update({name: getattr(score, name) for name in _SCORE_NUMBERS})


def read_audit(path: str | Path) -> tuple[Audit, Score]:
    """The audit and the score that `write_audit` was given.

    Raises:
        UnreadableFileError: no such file, truncated, foreign, or of another version.
    """
    path = Path(path)
    with _storage.open_hdf5(path) as file:
        _require_format(file, path, "evaluation", ("audit", "score"))
        names = tuple(str(name) for name in file.attrs["names"])
        moments = {name: file["audit"][name][()] for name in _AUDIT_ARRAYS}
        prior = None  # of early versions
        if "prior" in file:
            prior = PriorBounds(names, **{name: file["prior"][name][()] for name in _PRIOR_ARRAYS})
        n_noise = int(file.attrs["n_noise"])
        audit = Audit(names=names, n_noise=n_noise, prior=prior, **moments)
        numbers = {name: file["score"].attrs[name].item() for name in _SCORE_NUMBERS}
        arrays = {name: file["score"][name][()] for name in _SCORE_ARRAYS}
        return audit, Score(names=names, **numbers, **arrays)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_format(file: h5py.File, path: Path, what: str, groups: Sequence[str]) -> None:
    if file.attrs.get("format") != _FORMAT or not all(group in file for group in groups):
        raise UnreadableFileError(
            f"expected a fisherprint {what} of format {_FORMAT} with "
            f"{_checks.listing(groups)}; {path} has format {file.attrs.get('format')} and "
            f"{_checks.listing(file)}. Was it written by another version or tool?"
        )


def save_network(
    folder: str | Path, state: Mapping[str, torch.Tensor], card: Mapping[str, Any]
) -> None:
    """Write `weights.safetensors` and `card.json`, which gets the weights' `weights_sha256`.

    Args:
        folder: made if absent; a network in it is replaced.
        state: the network's state dict.
        card: what the network is and how it came about.

    Raises:
        ValueError: NaN or Inf in the card.
    """
    folder = Path(folder)
    data = safetensors.torch.save(_storable(state))
    with _storage.replacing(folder / "weights.safetensors") as temporary:
        temporary.write_bytes(data)
    write_json(folder / "card.json", {**card, "weights_sha256": hashlib.sha256(data).hexdigest()})


def load_network_files(
    folder: str | Path, *, required: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and card of a network; the weights must be those the card was written with.

    Args:
        folder: where `save_network` put them.
        required: keys that the card must have.

    Raises:
        UnreadableFileError: a file that is missing, truncated or foreign, a card without a
            required key, or weights that belong to another card.
    """
    folder = Path(folder)
    card = read_json(folder / "card.json")
    missing = [key for key in (*required, "weights_sha256") if key not in card]
    if missing:
        raise UnreadableFileError(
            f"expected the keys {_checks.listing(missing)} in {folder / 'card.json'}; it has "
            f"{_checks.listing(card)}. Was it written by another version?"
        )
    path = folder / "weights.safetensors"
    _storage.require_file(path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != card["weights_sha256"]:
        raise UnreadableFileError(
            f"expected the weights that {folder / 'card.json'} describes; {path} "
            f"({len(data)} bytes) differs from them. It is truncated or from another run."
        )
    return safetensors.torch.load(data), card


def write_checkpoint(
    path: str | Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]
) -> None:
    """Write a training state as one safetensors file, the content as JSON in its metadata.

    Raises:
        ValueError: NaN or Inf in the content.
    """
    metadata = {"json": json.dumps(content, ensure_ascii=False, allow_nan=False)}
    with _storage.replacing(Path(path)) as temporary:
        temporary.write_bytes(safetensors.torch.save(_storable(tensors), metadata))


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the content that `write_checkpoint` was given.

    Raises:
        UnreadableFileError: no such file, truncated, foreign, or without the content.
    """
    path = Path(path)
    _storage.require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UnreadableFileError(
            f"expected a checkpoint; {path} ({path.stat().st_size} bytes) is none or is "
            f"truncated: {error}. Start again or take an older one."
        ) from error
    if "json" not in metadata:
        raise UnreadableFileError(
            f"expected a checkpoint; {path} holds tensors alone. Is it a network's weights?"
        )
    return tensors, _parsed_object(metadata["json"], path)


def _parsed_object(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableFileError(
            f"expected JSON; {path} cannot be parsed: {error}. Is it truncated?"
        ) from error
    if not isinstance(content, dict):
        raise UnreadableFileError(
            f"expected a JSON object in {path}; got a {type(content).__name__}. "
            "Is it a file of another kind?"
        )
    return content


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
