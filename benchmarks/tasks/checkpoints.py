"""Checkpoints of models in full precision: one reader, with one set of rules, for all tasks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from adfq.errors import AdfqError, one_line
from benchmarks.run.console import warn
from benchmarks.tasks.packages import find_package_file, is_package, read_package

#: Entries of a training checkpoint that hold a model's weights; the first that is there counts.
CONTAINERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "module",
    "net",
    "network",
    "weights",
    "encoder",
)

#: Names that wrappers put before those of a model: DistributedDataParallel, Lightning modules, torch.compile.
WRAPPERS = ("module.", "model.", "net.", "_orig_mod.")

# Compilation, FSDP and activation checkpointing wrap parts of a model too.
_INNER_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Entries with averages of the weights: model_ema, state_dict_ema, ema_state_dict, ema …
_AVERAGES = re.compile(r"(^|_)(ema|swa)(_|$)")

# Buffers that follow from the model or only count: files have them or not.
_HARMLESS = ("num_batches_tracked", "n_averaged", "relative_position_index", "attention_bias_idxs", "attn_mask")
_COUNTERS = ("num_batches_tracked", "n_averaged")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Ignored:
    """Stand-in for the contents of a training checkpoint beside weights; it takes any arguments and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Training scripts save their arguments, with paths, and mmengine the history of its losses, in numpy's arrays. Not even
# numpy's own functions are called for it: each is a class of that name (torch 2.5 takes no names beside the classes).
_BESIDE: list[Any] = [
    type(name, (_Ignored,), {"__module__": module})
    for module, name in (
        ("argparse", "Namespace"),
        *((module, f"{system}Path") for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("builtins", "getattr"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    )
]


def check_present(file: str | None) -> None:
    """Raise AdfqError for a checkpoint that is asked for and not there, and an empty text.

    Args:
        file: path, or ``package:NAME``; None for no checkpoint.
    """
    if file is None:
        return
    if not file:
        raise AdfqError("--checkpoint is empty")
    if is_package(file):
        find_package_file(file)
    elif not os.path.isfile(file):
        raise AdfqError(f"there is no checkpoint {file}")


def read_weights(file: str) -> dict[str, Tensor]:
    """Read a checkpoint's weights, whatever training code has put around them.

    Entries beside the weights, such as an optimizer's state, are left out. Averaged weights go before others, as in
    timm. Each choice between two sets of weights is printed as one line.

    Args:
        file: safetensors or PyTorch file, whose code is not run; ``package:NAME`` for `read_package`.

    Returns:
        Tensors on the CPU by name, in the file's order and dtypes, without the names of wrappers.

    Raises:
        AdfqError: for a file that cannot be read, holds code, itself, no weights, several sets of them, or tensors that
            are not dense, and for a quantized model.
    """
    if is_package(file):
        return read_package(file)
    entry: Any = _read(file)
    above: list[Any] = []
    while isinstance(entry, Mapping) and (key := _choose(entry, file)) is not None:
        above.append(entry)
        entry = entry[key]
        if any(entry is other for other in above):
            raise AdfqError(f"{file} holds itself under {key!r}")
    state: dict[str, Tensor] = {}
    for name, value in entry.items() if isinstance(entry, Mapping) else ():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            continue
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            form = "meta" if value.is_meta else "nested" if value.is_nested else "sparse"
            raise AdfqError(f"{file}: {name} is a {form} tensor; only dense ones are read")
        bare = _unwrap(name)
        if bare in state and not _same(value, state[bare]):
            raise AdfqError(f"{file} holds {bare} twice, with other values under {name}; keep one set of weights")
        state[bare] = value
    if not state:
        raise AdfqError(f"{file} holds no weights of a model")
    return state


def load_weights(
    model: nn.Module,
    file: str,
    name: str,
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> None:
    """Load a checkpoint's weights into a model; those that the model does not have are left out and counted in a line.

    Args:
        model: model to change.
        file: see `read_weights`.
        name: name of the model, for messages.
        convert: turns another layout's weights into the model's; None, the default, for none.

    Raises:
        AdfqError: as `read_weights`, and for a checkpoint that lacks weights or does not fit the model.
    """
    state: Mapping[str, Tensor] = read_weights(file)
    own = model.state_dict()
    if convert is not None:
        try:
            state = convert(dict(state))
        except Exception as error:  # a conversion takes the layout that it is made for for granted
            raise AdfqError(f"checkpoint {file} does not fit {name}: {one_line(error)}") from None
    if problem := misfit(state, own):
        raise AdfqError(f"checkpoint {file} does not fit {name}: {problem}")
    if unknown := _unknown(state, own):
        warn_of_left_out(name, file, unknown)
    model.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def warn_of_left_out(name: str, file: str, keys: Sequence[str]) -> None:
    """Warn of weights of a checkpoint that a model does not have.

    Args:
        name: name of the model.
        file: path of the checkpoint.
        keys: names of the weights.
    """
    warn(f"{name} has no place for {len(keys)} of the weights in {file} ({keys[0]} for one); left out")


def format_shape(tensor: Tensor) -> str:
    """Return a tensor's shape as a text such as 3×4."""
    return "×".join(map(str, tensor.shape)) or "a number"


def misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the reason why weights do not fit a model's own; empty if they do.

    Args:
        state: weights by name; they may be more than the model's.
        own: the model's state dict.
    """
    missing = [key for key in own if key not in state and not key.endswith(_HARMLESS)]
    unknown = _unknown(state, own)
    shared = [key for key in own if key in state]
    others = [key for key in shared if state[key].shape != own[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} weights are missing ({missing[0]} for one)")
    if unknown and (missing or others):
        problems.append(f"{len(unknown)} are not the model's ({unknown[0]} for one)")
    if others:
        key = others[0]
        shapes = f"{key} is {format_shape(state[key])} and should be {format_shape(own[key])}"
        problems.append(f"{len(others)} have other shapes ({shapes})")
    if not problems:
        problems += [problem for key in shared if (problem := _problem_of_values(key, state[key], own[key]))][:1]
    return ", ".join(problems)


def _read(file: str) -> Any:
    try:
        if _is_safetensors(file):
            with safe_open(file, "pt") as stream:
                quantized = "adfq" in (stream.metadata() or {})
            content: Any = None if quantized else load_file(file)
        else:
            with torch.serialization.safe_globals(_BESIDE), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the line on what is refused says all
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        if "Unsupported operand" in str(error):  # torch takes any other file for code
            raise AdfqError(f"cannot read checkpoint {file}: it is neither safetensors nor a PyTorch file") from None
        if "weights_only" in str(error):
            raise AdfqError(f"{file} is not a file of weights alone, and code in it is never run") from None
        raise AdfqError(f"cannot read checkpoint {file}: {one_line(error)}") from None
    if content is None:
        raise AdfqError(f"{file} is a quantized model and no checkpoint: adfq.load and --quantized read it")
    return content


def _is_safetensors(file: str) -> bool:
    with open(file, "rb") as stream:
        head = stream.read(9)
    return file.endswith(".safetensors") or head[8:] == b"{"  # the header, JSON behind its length


def _choose(content: Mapping[Any, Any], file: str) -> Any:
    """Return the key of the entry that holds a checkpoint's weights; None if `content` itself does, or nothing."""
    held = [key for key, value in content.items() if isinstance(key, str) and _holds_weights(value)]
    averages = [key for key in held if _AVERAGES.search(key)]
    plain = [key for key in CONTAINERS if key in held]
    # mmengine's hook exchanges the two when it saves. Its average counts steps.
    if plain and "ema_state_dict" in averages and "steps" in content["ema_state_dict"]:
        averages.remove("ema_state_dict")
        warn(f"{file}: the averaged weights are taken, which mmengine keeps in {plain[0]!r}")
    if len(averages) > 1:
        raise AdfqError(f"{file} holds several averages of weights ({', '.join(averages)}); keep one")
    if averages or plain:
        taken, *others = [*averages, *plain]
        if others:
            kind = "averaged weights" if averages else "weights"
            warn(f"{file}: the {kind} in {taken!r} are taken, not those in {', '.join(map(repr, others))}")
        return taken
    if any(isinstance(value, Tensor) for value in content.values()):
        return None
    if len(held) > 1:
        raise AdfqError(f"{file} holds several sets of weights ({', '.join(held)}); keep one")
    return held[0] if held else None


def _holds_weights(value: Any) -> bool:
    waiting, known = [value], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, Mapping) or id(value) in known:  # a dictionary can hold itself
            continue
        known.add(id(value))
        named = {key: entry for key, entry in value.items() if isinstance(key, str)}
        if any(isinstance(entry, Tensor) for entry in named.values()):
            return True
        waiting += [entry for key, entry in named.items() if key in CONTAINERS or _AVERAGES.search(key)]
    return False


def _unwrap(name: str) -> str:
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    return _INNER_WRAPPERS.sub("", name)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True for tensors with equal values, in whatever dtypes."""
    try:
        return torch.equal(one.to(other), other) and torch.equal(other.to(one), one)
    except RuntimeError:  # not every dtype can be converted
        return False


def _unknown(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [key for key in state if key not in own and not key.endswith(_HARMLESS)]


def _problem_of_values(key: str, given: Tensor, own: Tensor) -> str | None:
    if not own.is_floating_point():
        # With other indices the model would read its tables of position biases in another order than in training.
        return None if key.endswith(_COUNTERS) or _same(given, own) else f"{key} is another"
    if given.dtype not in _FLOATS:
        return f"{key} is of {given.dtype}, whose values need a scale"
    return None if torch.isfinite(given.to(own.dtype)).all() else f"{key} is not finite"
