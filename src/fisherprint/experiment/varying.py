"""Another training on a data set that is there."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fisherprint import files
from fisherprint.experiment.folder import Run, read_data
from fisherprint.experiment.schema import Experiment, ExperimentError, absolute, explained
from fisherprint.experiment.training import read_start

# What the data set was made from.
_OF_THE_DATA_SET = ("sequence", "model", "prior", "simulation")


def vary(run: Run, folder: Path, changes: Sequence[str]) -> Run:
    """A run folder with the data set of another, and its experiment with some fields changed.

    The data set is a hard link where the file system allows it, else a copy.

    Args:
        run: with a data set.
        folder: of the new run.
        changes: such as `training.loss=mse`; values are TOML, or words. An empty value
            (`training.start=`) takes a field away. Relative paths are from the working directory.

    Raises:
        OutputExistsError: the folder holds a run.
        ExperimentError: no data set, a change that does not fit the schema, one that asks for
            another data set, or none; no network to start from, or an unfit one.
        ValueError: known inputs for a data set of an early version, which has no Fisher
            information.
        SingularInformationError: a parameter that is not determined with these inputs.
    """
    if (folder / "experiment.toml").exists():
        raise files.OutputExistsError(
            f"expected a new run folder; {folder} holds a run. Choose another name."
        )
    data, _, _ = read_data(run)
    content = run.experiment.model_dump(mode="json", exclude_none=True)
    for change in changes:
        _set(content, change)
    try:
        varied = absolute(Experiment.model_validate(content), Path.cwd())
    except ValidationError as error:
        raise ExperimentError(f"{' '.join(changes)}: {explained(error)}") from error
    if varied == run.experiment:
        raise ExperimentError(
            "expected a change of the experiment; got none. Give one: --set training.loss=mse"
        )
    for name in _OF_THE_DATA_SET:
        if getattr(varied, name) != getattr(run.experiment, name):
            raise ExperimentError(
                f"expected changes that leave the data set as it is; got one of [{name}]. Write "
                "an experiment of its own, and simulate it."
            )
    # Whether this data set has the bounds that the training will need.
    data.crb("training", known=varied.training.inputs)
    if varied.training.start is not None:
        read_start(varied.training.start, varied.training.config, data)
    files.write_toml(folder / "experiment.toml", varied.model_dump(mode="json", exclude_none=True))
    new = Run(folder, varied)
    new.dataset.unlink(missing_ok=True)
    try:
        os.link(run.dataset, new.dataset)
    except OSError:  # another disk, or one without links
        shutil.copy2(run.dataset, new.dataset)
    return new


def _set(content: dict[str, Any], change: str) -> None:
    """Carry out `table.key=value` in nested tables."""
    path, equals, text = change.partition("=")
    if not (equals and path.strip()):
        raise ExperimentError(
            f"expected changes as TABLE.KEY=VALUE; got {change!r}. Such as: training.loss=mse"
        )
    *tables, key = (part.strip() for part in path.split("."))
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise ExperimentError(
                f"expected changes as TABLE.KEY=VALUE; {table!r} of {change!r} is no table. "
                "Such as: training.loss=mse"
            )
    if not text.strip():
        if key not in content:
            raise ExperimentError(
                f"expected a field that is there, to take it away by {change!r}; {path.strip()} "
                "is not set. Correct its name, or leave it as it is."
            )
        del content[key]
        return
    try:
        content[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        content[key] = text.strip()
