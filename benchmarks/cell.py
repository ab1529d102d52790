"""One experiment as a value."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.registry import create_method

#: The ``bits`` of a full-precision cell.
FULL_PRECISION_BITS = "W32/A32"

Arguments = tuple[tuple[str, Any], ...]

_CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Location:
    """Places on this machine of the files that a cell names.

    Attributes:
        data: data set specification in the task's terms, such as ``bundled``, ``folder:ROOT`` or a folder.
        checkpoint: path of the weights file; None where the cell has none.
        files: paths of other files, by the name of the field or task argument, sorted: ``model`` (a config file),
            ``prompts``, ``class_map``.
    """

    data: str
    checkpoint: str | None = None
    files: tuple[tuple[str, str], ...] = ()

    def file(self, name: str, default: str) -> str:
        """Return the path of the file that a field or task argument names, or `default` where it names no file."""
        return dict(self.files).get(name, default)


@dataclass(frozen=True)
class Cell:
    """Everything that decides a result, except code, data and weights, which the cell only names.

    Attributes:
        task: one of `benchmarks.tasks.task_names()`.
        model: name that the task knows, or file name of a config.
        data: name of the data set (`data_set_name`).
        method: one of `adfq.methods()`.
        bits: ``"W4/A4"``; ``"W32/A32"`` for full precision.
        model_arguments: keyword arguments of the model's factory, sorted.
        checkpoint: name of the weights file, without folder and suffix; None for the task's own weights.
        pretrained: download the weights where there is no checkpoint.
        method_arguments: options of the method, sorted.
        preprocessing: overrides of the model's own preprocessing, sorted.
        task_arguments: options of this task alone that differ from its defaults, sorted; files by their names.
        calibration_size: number of calibration images.
        calibration_batch_size: images in one pass of calibration; None for all at once.
        seed: seed of the choice of calibration images and of the method.
        limit: largest number of evaluation images; None for all.
        batch_size: images per evaluation batch; quantizers with run-time ranges can depend on it.
        location: paths of what the cell names; no part of its equality, hash and id.
    """

    task: str
    model: str
    data: str
    method: str
    bits: str = "W4/A4"
    model_arguments: Arguments = ()
    checkpoint: str | None = None
    pretrained: bool = False
    method_arguments: Arguments = ()
    preprocessing: Arguments = ()
    task_arguments: Arguments = ()
    calibration_size: int = 32
    calibration_batch_size: int | None = None
    seed: int = 0
    limit: int | None = None
    batch_size: int = 100
    location: Location = field(kw_only=True, compare=False)

    @classmethod
    def create(
        cls,
        *,
        model: str,
        data: str,
        checkpoint: str | None = None,
        task_arguments: Arguments = (),
        data_name: str | None = None,
        **more: Any,
    ) -> Cell:
        """Return a checked cell in its normal form: equal experiments are equal cells, wherever their files lie.

        Args:
            model: name of a model, or path of a config file.
            data: data set specification in the task's terms.
            checkpoint: path of the weights file; None for the task's own weights.
            task_arguments: options of this task alone, sorted; files by their paths.
            data_name: name of the data set; None for `data_set_name` of `data`.
            **more: other fields of the cell.

        Raises:
            AdfqError: for an unknown method, an unknown option of the method, unreadable bits, a calibration batch that
                is not a whole number of images from 1, a seed of more than 64 bits, and an argument that is neither a
                number, a text nor a list of these.
        """
        for name in ("model_arguments", "method_arguments", "preprocessing"):
            if name in more:
                more[name] = _freeze(more[name])
        task_arguments = _freeze(task_arguments)
        files = {name: value for name, value in task_arguments if is_path(value)}
        if is_config_file(model):
            files["model"] = model
        cell = cls(
            model=file_name(model) if "model" in files else model,
            data=data_name or data_set_name(data),
            checkpoint=None if checkpoint is None else checkpoint_name(checkpoint),
            task_arguments=tuple(
                (name, file_name(value) if name in files else value) for name, value in task_arguments
            ),
            location=Location(data, checkpoint, tuple(sorted(files.items()))),
            **more,
        )
        create_method(cell.method, dict(cell.method_arguments))
        if not -(2**63) <= cell.seed < 2**63:
            raise AdfqError(f"seed must have at most 64 bits, got {cell.seed}")
        if cell.bits != FULL_PRECISION_BITS:
            Bits.parse(cell.bits)
        if cell.method == FULL_PRECISION:
            return cell.in_full_precision
        batch_size = _check_batch_size(cell.calibration_batch_size)
        if batch_size is not None and batch_size >= cell.calibration_size:
            batch_size = None
        return replace(cell, bits=str(Bits.parse(cell.bits)), calibration_batch_size=batch_size)

    @property
    def in_full_precision(self) -> Cell:
        """Cell of the same model and data in full precision."""
        return replace(
            self,
            method=FULL_PRECISION,
            bits=FULL_PRECISION_BITS,
            method_arguments=(),
            calibration_size=0,
            calibration_batch_size=None,
            seed=0,
        )

    @property
    def config(self) -> dict[str, Any]:
        """Fields that identify the cell, in JSON's types."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
        config: dict[str, Any] = json.loads(json.dumps(named))
        for name in ("task_arguments", "calibration_batch_size"):  # most cells have none, and records are older
            if not config[name]:
                del config[name]
        return config

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that stay the same as long as the configuration does."""
        return identify(self.config)


def _freeze(arguments: Arguments) -> Arguments:
    """Return arguments with tuples in place of the lists that TOML and command lines have."""

    def freeze(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(freeze(name, part) for part in value)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise AdfqError(f"{name} must be a number, a text or a list of these, got {value!r}")
        return value

    return tuple((name, freeze(name, value)) for name, value in arguments)


def identify(config: dict[str, Any]) -> str:
    """Return the id of the cell with this `Cell.config`."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _check_batch_size(size: Any) -> int | None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise AdfqError(f"calibration_batch_size must be a whole number of at least 1, got {size!r}")
    return size


def data_set_name(spec: str) -> str:
    """Return the name of a data set: that of its folder, or of the library's data set where the library has several.

    ``bundled`` → ``bundled``, ``folder:/x/imagenet`` → ``imagenet``, ``/path/to/coco`` → ``coco``,
    ``torch/fashion_mnist:ROOT`` → ``fashion_mnist``.
    """
    kind, colon, root = spec.partition(":")
    if not colon or os.path.isabs(spec):
        return file_name(spec)
    return file_name(root if kind == "folder" else kind) or spec


def checkpoint_name(path: str) -> str:
    """Return the name of a checkpoint: its file name without folder and suffix."""
    return Path(path).stem or path


def file_name(path: str) -> str:
    """Return the last part of a path; of ``.`` and ``..``, the name of the folder that they stand for."""
    return os.path.basename(os.path.abspath(path)) or path


def is_config_file(model: str) -> bool:
    """Return whether a model is given by a config file; ``mmdet::PATH`` names a config of a package."""
    return model.endswith(_CONFIG_SUFFIXES) and "::" not in model


def is_path(value: Any) -> bool:
    """Return whether the value of a task argument is the path of a file."""
    return isinstance(value, str) and (os.path.basename(value) != value or bool(Path(value).suffix))
