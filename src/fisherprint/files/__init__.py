"""All files of the stages: images in, maps out, records, networks.

The only stage module that opens files. What it writes is there whole or not at all; what it cannot
read is an `UnreadableFileError` that says what was expected.
"""

from fisherprint._storage import UnreadableFileError
from fisherprint.files.records import (
    OutputExistsError,
    append_jsonl,
    file_digest,
    load_network_files,
    read_audit,
    read_checkpoint,
    read_dataset,
    read_json,
    read_jsonl,
    read_toml,
    save_network,
    to_toml,
    write_audit,
    write_checkpoint,
    write_dataset,
    write_json,
    write_jsonl,
    write_text,
    write_toml,
)
from fisherprint.files.volumes import (
    Volume,
    read_basis,
    read_coefficients,
    read_maps,
    read_mask,
    read_tissue_maps,
    recorded_basis,
    write_coefficients,
    write_maps,
    write_mask,
)

__all__ = [
    "OutputExistsError",
    "UnreadableFileError",
    "Volume",
    "append_jsonl",
    "file_digest",
    "load_network_files",
    "read_audit",
    "read_basis",
    "read_checkpoint",
    "read_coefficients",
    "read_dataset",
    "read_json",
    "read_jsonl",
    "read_maps",
    "read_mask",
    "read_tissue_maps",
    "read_toml",
    "recorded_basis",
    "save_network",
    "to_toml",
    "write_audit",
    "write_checkpoint",
    "write_coefficients",
    "write_dataset",
    "write_json",
    "write_jsonl",
    "write_maps",
    "write_mask",
    "write_text",
    "write_toml",
]
