"""Description of MMDetection's detectors by their configs, and construction from these.

A config is a program even as data: the registry imports a dotted name, mmcv evaluates the name of a non-maximum
suppression, and some settings are names of files to read. So a description holds data alone, and whatever it names is
looked up in lists of what MMDetection and mmcv build layers of.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from adfq.adapters import Architecture, build_error, qualified_name
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.errors import AdfqError

provide_mmcv_ops()

from mmdet import models as _models  # noqa: E402, F401 - fills the registries
from mmdet.registry import MODELS, TASK_UTILS  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS as COMMON_MODELS  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402

# Packages and modules whose registered classes a description may name. Backbones but Swin have no adapter.
_PACKAGES = (
    "mmcv.cnn.bricks",
    "mmcv.ops",
    "mmdet.models.backbones.swin",
    "mmdet.models.data_preprocessors",
    "mmdet.models.dense_heads",
    "mmdet.models.detectors",
    "mmdet.models.layers",
    "mmdet.models.losses",
    "mmdet.models.necks",
    "mmdet.models.roi_heads",
    "mmdet.models.seg_heads",
    "mmdet.models.task_modules.assigners",
    "mmdet.models.task_modules.coders",
    "mmdet.models.task_modules.prior_generators",
    "mmdet.models.task_modules.samplers",
    "mmengine.utils.dl_utils.parrots_wrapper",
    "torch.nn.modules",
)
# Modules among these that read files or download something when a model is built.
_READING = (
    "mmdet.models.dense_heads.atss_vlfusion_head",
    "mmdet.models.detectors.d2_wrapper",
    "mmdet.models.detectors.glip",
    "mmdet.models.detectors.grounding_dino",
    "mmdet.models.detectors.kd_one_stage",
    "mmdet.models.detectors.lad",
    "mmdet.models.detectors.semi_base",
    "mmdet.models.detectors.soft_teacher",
)
_OPERATORS = frozenset({"RoIAlign", "RoIPool", "nms", "soft_nms"})  # mmcv.ops has them, in no registry

#: Steps of a test pipeline that a description may hold.
STEPS = frozenset(
    {
        "FixScaleResize",
        "FixShapeResize",
        "LoadAnnotations",
        "LoadImageFromFile",
        "LoadImageFromNDArray",
        "PackDetInputs",
        "Pad",
        "Resize",
    }
)

_DATASET = "CocoDataset"  # whose test pipeline and classes are kept
_DATA = {"type", "metainfo", "pipeline"}

# Settings that name files to read; without effect on a model whose weights are given.
_PLACES = frozenset({"init_cfg", "pretrained", "backend_args", "file_client_args"})
_SCOPE = "_scope_"  # a package, imported by the registry; names of other packages than MMDetection's are refused
_TUPLE, _FOREIGN = "tuple", "foreign"  # marks of a tuple, and of a value that is no data


def describe(model: Any, family: str) -> Architecture:
    """Describe a detector by its config, see `adfq.adapters.describe`.

    Args:
        model: a detector; one without its config as attribute ``cfg``, where MMDetection's ``init_detector`` puts it,
            gets no arguments and cannot be created again, as a backbone alone.
        family: qualified name of the supported class.
    """
    config = getattr(model, "cfg", None)
    arguments: dict[str, Any] = {}
    if isinstance(config, Mapping | Config) and isinstance(config.get("model"), Mapping):
        arguments["model"] = _freeze(config.get("model"))
        dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
        if _short("type", dataset.get("type")) == _DATASET and "pipeline" in dataset:
            kept = {"type": _DATASET, "pipeline": dataset["pipeline"]}
            if "classes" in (dataset.get("metainfo") or {}):
                kept["metainfo"] = {"classes": dataset["metainfo"]["classes"]}
            arguments["dataset"] = _freeze(kept)
    return Architecture(family, qualified_name(type(model)), None, arguments, (3, 0, 0))


def create(architecture: Architecture) -> nn.Module:
    """Build a detector from its description, see `adfq.adapters.create`.

    Its attribute ``cfg`` has the config of the model, and the test pipeline and the classes of the data.

    Args:
        architecture: from `describe`, or read from a file.

    Raises:
        AdfqError: for a model that was described without its config, and for names and settings that a description may
            not hold or that MMDetection does not take.
    """
    if "model" not in architecture.arguments:
        raise AdfqError(
            f"a {architecture.cls} cannot be built from its description: only a detector with its config as attribute "
            "cfg can, as from MMDetection's init_detector"
        )
    config: dict[str, Any] = {"model": _thaw(architecture.arguments["model"], "model", _layers())}
    if dataset := architecture.arguments.get("dataset"):
        config["test_dataloader"] = {"dataset": _thaw_dataset(dataset)}
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            # MMDetection writes into the settings that it builds from.
            built = MODELS.build(ConfigDict(copy.deepcopy(config["model"])))
        except Exception as error:  # whatever a constructor makes of its arguments
            raise build_error(architecture.cls, error) from None
    if qualified_name(type(built)) != architecture.cls:
        raise AdfqError(f"its config is that of a {qualified_name(type(built))}, not of a {architecture.cls}")
    model: Any = revert_sync_batchnorm(built)
    model.cfg = Config(config)
    restored: nn.Module = model
    return restored


@cache
def _layers() -> frozenset[str]:
    """Return the names that may be a ``type`` in the config of a model."""
    found = {**COMMON_MODELS.module_dict, **TASK_UTILS.module_dict, **MODELS.module_dict}
    named = {name for name, cls in found.items() if _is_in(cls, _PACKAGES) and not _is_in(cls, _READING)}
    return frozenset(named | _OPERATORS)


def _is_in(cls: Any, packages: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{package}.") for package in packages)


def _freeze(value: Any) -> Any:
    """Return settings without names of places, in JSON's types and tuples.

    Lists become tuples, as in every description, and tuples are marked. A class becomes its name, and one in a package
    the name alone: a file names no packages.
    """
    if isinstance(value, Mapping):
        kept = {str(key): entry for key, entry in value.items() if key not in (*_PLACES, _SCOPE)}
        return {key: _freeze(_short(key, entry)) for key, entry in kept.items()}
    if isinstance(value, tuple):
        return {_TUPLE: tuple(map(_freeze, value))}
    if isinstance(value, list):
        return tuple(map(_freeze, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {_FOREIGN: type(value).__name__}


def _short(key: Any, value: Any) -> Any:
    if key != "type":
        return value
    name = value.__name__ if isinstance(value, type) else value
    return name.rpartition(".")[2] if isinstance(name, str) else name


def _thaw(value: Any, place: str, names: frozenset[str]) -> Any:
    """Return settings as they were before `_freeze`.

    Args:
        value: settings, which may be anybody's.
        place: their place in the config, for messages.
        names: names that may be a ``type``.

    Raises:
        AdfqError: for a name of another class or function, a setting that names a place to read from, one for the
            registry itself, and a value that is no data.
    """
    if isinstance(value, tuple):
        return [_thaw(entry, f"{place}[{index}]", names) for index, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], tuple):
        return tuple(_thaw(value[_TUPLE], place, names))
    if value.keys() == {_FOREIGN}:
        raise AdfqError(f"its config has a {value[_FOREIGN]} at {place}, which no file keeps")
    for key in value:
        if key in _PLACES or key.startswith("_"):
            raise AdfqError(f"its config has a setting {place}.{key}, which no file may have")
    kind = value.get("type")
    if kind is not None and not (isinstance(kind, str) and kind in names):
        raise AdfqError(
            f"its config names {kind!r} at {place}.type, which is no layer, loss or step that a file may name"
        )
    return {key: _thaw(entry, f"{place}.{key}", names) for key, entry in value.items()}


def _thaw_dataset(dataset: Any) -> dict[str, Any]:
    """Return class, classes and test pipeline of a data set as they are in a config."""
    place = "test_dataloader.dataset"
    if not isinstance(dataset, Mapping) or not {"type", "pipeline"} <= dataset.keys() <= _DATA:
        raise AdfqError(f"its config has no usable {place}")
    found: dict[str, Any] = _thaw({**dataset, "pipeline": None}, place, frozenset({_DATASET}))
    if "metainfo" in found:
        information = found["metainfo"]
        classes = information.get("classes") if isinstance(information, Mapping) else None
        # MMDetection takes a text for the name of a file that has the classes.
        if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
            raise AdfqError(f"its config has no usable {place}.metainfo.classes")
    return {**found, "pipeline": _thaw(dataset["pipeline"], f"{place}.pipeline", STEPS)}
