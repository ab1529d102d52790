"""Quantized models on disk: one safetensors file with packed integer weights and a header that rebuilds the model."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from adfq.adapters import Architecture, adapt, create, qualified_name
from adfq.api import Quantization, ordinary_modes
from adfq.bits import Bits
from adfq.differences import first_difference
from adfq.errors import AdfqError
from adfq.files import as_path, replacing
from adfq.layers import QuantWeightLayer
from adfq.packing import pack, unpack
from adfq.quantizers import Quantizer
from adfq.registry import find_method
from adfq.sites import Network, check_weights, sites_of
from adfq.transforms.activations import scale_activation, scaled_activations
from adfq.transforms.relu import substitute_relu, substituted
from adfq.transforms.streams import map_norm, mapped_norms

FORMAT = 1

# Fields with names of modules that a method has exchanged. Each has a format, since earlier versions would overlook it.
_CHANGES = {
    "relu": (2, substituted, substitute_relu),
    "maps": (3, mapped_norms, map_norm),
    "scaled": (4, scaled_activations, scale_activation),
}
_FORMATS = (FORMAT, *(number for number, _, _ in _CHANGES.values()))

# The file's metadata has one entry, the header as JSON; its first field is SHA-256 over the whole file with zeros in
# the digest's place. More entries would come in any order, so that the same model would give different files.
_HEADER = "adfq"
_NO_DIGEST = "0" * 64

_FIELDS = {
    "method": str,
    "bits": str,
    "options": dict,
    "seed": int,
    "calibration_size": int,
    "notes": dict,
    "architecture": dict,
    "dtype": str,
    "quantizers": dict,
    "versions": dict,
}
# Entries of `pretrained_cfg`: lists are told from tuples, and types that JSON does not have are left out.
_TUPLE, _OTHER = "tuple", object()

_ANY_SIDE = 256  # height and width in pixels of the image that a model of any size is checked with

_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def save(model: nn.Module, file: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
    """Write a quantized model to one safetensors file, which is all that `load` needs.

    A weight with integer codes takes as many bits a value as it is quantized to; other tensors keep their dtype. The
    written file is read back and must give the same logits before it takes its name, so that a file is whole and usable
    or not there.

    Args:
        model: model from `adfq.quantize`; it may have been moved or cast since.
        file: path to write, or to replace.
        notes: the caller's own data, of JSON's types; `load` returns it as `quantization.notes`. None, the default,
            keeps the model's present notes.

    Raises:
        AdfqError: for a model that is not from `adfq.quantize`, one whose architecture cannot be told from itself,
            notes of other types, weights that were trained after quantization (`adfq.requantize`), and a file that
            cannot be written.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise AdfqError("only a model that adfq.quantize has quantized can be saved")
    check_weights(model)
    with ordinary_modes(), replacing(file) as temporary:
        content = _write(model, quantization, quantization.notes if notes is None else notes)
        temporary.write_bytes(content)
        _check_rebuilds(model, quantization.architecture, temporary.read_bytes())


def load(file: str | os.PathLike[str]) -> nn.Module:
    """Load a model that `save` has written; its logits are those of the saved model, bit for bit.

    Nothing in the file is run or downloaded. Its quantizers are classes of adfq and of the file's method, if that is
    installed.

    Args:
        file: path to read.

    Returns:
        The model on the CPU, in evaluation mode and its own dtype, with its `Quantization` as attribute `quantization`.

    Raises:
        AdfqError: if the file cannot be read, was not written by `save`, is damaged or altered, or needs something that
            this installation does not have; the message names the file.
    """
    try:
        with ordinary_modes():
            return _rebuild(as_path(file).read_bytes()).model
    except OSError as error:
        raise AdfqError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise AdfqError(f"{file}: its header is nested too deeply") from None
    except AdfqError as error:
        raise AdfqError(f"{file}: {error}") from None


def packed_size(model: nn.Module) -> int:
    """Return the size of a model's state in bytes, with integer codes packed and scales included.

    Args:
        model: model from `adfq.quantize` or `load`.

    Raises:
        AdfqError: for a model of a dtype that `save` does not take, and weights that were trained after quantization.
    """
    check_weights(model)
    size = 0
    dtype = _dtype(model)
    codes = {f"{name}.weight": _codes(layer, dtype) for name, layer in Network(model).weight_layers()}
    for name, tensor in model.state_dict().items():
        packed = codes.get(name)
        size += (tensor if packed is None else packed).nbytes
    return size


def _write(model: nn.Module, quantization: Quantization, notes: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save as to_bytes

    dtype = _dtype(model)
    tensors: dict[str, Tensor] = model.state_dict()
    for name, layer in Network(model).weight_layers():
        codes = _codes(layer, dtype)
        if codes is not None:
            del tensors[f"{name}.weight"]
            tensors[f"{name}.codes"] = codes
    changes = {field: names for field, (_, find, _) in _CHANGES.items() if (names := find(model))}
    header = {
        "sha256": _NO_DIGEST,
        "format": max((_CHANGES[field][0] for field in changes), default=FORMAT),
        "method": quantization.method,
        "bits": str(quantization.bits),
        "options": quantization.options,
        "seed": quantization.seed,
        "calibration_size": quantization.calibration_size,
        "notes": notes,
        "architecture": asdict(quantization.architecture),
        "pretrained_cfg": _plain(getattr(model, "pretrained_cfg", None)),
        "dtype": str(dtype),
        "quantizers": {
            site.name: _specify(site.name, quantizer)
            for site in sites_of(model)
            if not isinstance(quantizer := getattr(site.operator, site.attribute), nn.Identity)
        },
        "versions": {package: version(package) for package in ("adfq", "torch", "timm")},
    }
    header |= changes
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise AdfqError(f"options and notes must be of JSON's types to be saved: {error}") from None
    # safetensors takes no tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = to_bytes(copies, {_HEADER: text})
    digest = hashlib.sha256(content).hexdigest()
    return _exchange_digest(content, _NO_DIGEST, digest)


def _plain(value: Any) -> Any:
    """Return the part of timm's description of weights and preprocessing that JSON can hold; its tuples are marked."""
    if isinstance(value, Mapping):
        return {str(key): found for key, entry in value.items() if (found := _plain(entry)) is not _OTHER}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry) for entry in value]
        if _OTHER in entries:
            return _OTHER
        return {_TUPLE: entries} if isinstance(value, tuple) else entries
    if isinstance(value, Real) and not isinstance(value, (bool, int)):
        return float(value)  # numpy's too
    return value if value is None or isinstance(value, (bool, int, str)) else _OTHER


def _unmark(value: Any) -> Any:
    """Return a value as it was before `_plain`."""
    if isinstance(value, list):
        return [_unmark(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list):
        return tuple(map(_unmark, value[_TUPLE]))
    return {key: _unmark(entry) for key, entry in value.items()}


def _exchange_digest(content: bytes, old: str, new: str) -> bytes:
    start = rf'"{_HEADER}":"{{\"sha256\": \"'
    return content.replace(f"{start}{old}".encode(), f"{start}{new}".encode(), 1)


def _codes(layer: QuantWeightLayer, dtype: torch.dtype) -> Tensor | None:
    """Return the packed codes that give the layer's weight bit for bit, or None for a weight without such codes."""
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    if not isinstance(quantizer, Quantizer) or weight.dtype != dtype:
        return None
    try:
        codes = quantizer.encode(weight)
        if not _identical(quantizer.decode(codes).to(dtype), weight):
            return None
    except NotImplementedError:
        return None
    return pack(codes, quantizer.bits)


def _specify(site: str, quantizer: nn.Module) -> dict[str, Any]:
    """Return a quantizer's class and arguments, without its buffers."""
    if not isinstance(quantizer, Quantizer):
        raise AdfqError(f"{site}: a {type(quantizer).__name__} is not a Quantizer and cannot be saved")
    names = inspect.signature(type(quantizer)).parameters
    missing = [name for name in names if not hasattr(quantizer, name)]
    if missing:
        raise AdfqError(f"{site}: {type(quantizer).__name__} does not keep its argument {missing[0]!r}; cannot save it")
    return {"class": qualified_name(type(quantizer)), "arguments": {name: getattr(quantizer, name) for name in names}}


def _check_rebuilds(model: nn.Module, architecture: Architecture, content: bytes) -> None:
    """Raise AdfqError, with the difference, unless the written model is the one at hand and gives its logits."""
    problem = "this model's architecture cannot be rebuilt from its description"
    try:
        rebuilt = _rebuild(content)
    except AdfqError as error:
        raise AdfqError(f"{problem}: {error}") from None
    original = replace(rebuilt, model=copy.deepcopy(model).eval())
    # Modules first: quantization hides many a difference from the logits of one image.
    if difference := first_difference(original.model, rebuilt.model):
        raise AdfqError(f"{problem}: {difference}")
    size = (side or _ANY_SIDE for side in architecture.input_size)
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    rebuilt.model.to(next(model.parameters()).device)
    with torch.no_grad():
        outputs = original.run(image), rebuilt.run(image)
    if not all(map(_identical, *(output if isinstance(output, list) else [output] for output in outputs))):
        raise AdfqError(f"{problem}: the outputs differ")


def _rebuild(content: bytes) -> Network:
    header, tensors = _read(content)
    architecture = _read_architecture(header["architecture"])
    method, bits = header["method"], Bits.parse(header["bits"])
    if header["dtype"] not in _DTYPES:
        raise AdfqError(f"its header names the dtype {header['dtype']!r}; there are {', '.join(_DTYPES)}")
    with torch.random.fork_rng():
        network = adapt(create(architecture).eval())
    model = network.model
    for field, (_, _, exchange) in _CHANGES.items():
        for name in header.get(field, ()):
            exchange(model, name)
    model.to(_DTYPES[header["dtype"]])  # masks and other tensors that are not in the file too
    _attach(model, header["quantizers"], method)
    _load_tensors(model, tensors)
    if isinstance(header.get("pretrained_cfg"), dict):  # files of version 0.1 have none
        restored: Any = model
        restored.pretrained_cfg = restored.default_cfg = _unmark(header["pretrained_cfg"])  # timm's two names of it
    numbers = header["seed"], header["calibration_size"]
    cast(Any, model).quantization = Quantization(
        method, bits, header["options"], *numbers, architecture, header["notes"]
    )
    return network


def _read(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors of a file that `_write` has written, and check the header's types."""
    from safetensors.torch import load as from_bytes

    try:
        tensors = from_bytes(content)
        length = int.from_bytes(content[:8], "little")
        text = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get(_HEADER)
    except Exception:  # its own error, or one from tensors of damaged sizes and types
        raise AdfqError("not a safetensors file, or a damaged one") from None
    try:
        header = json.loads(text)
        digest = header["sha256"]
    except (TypeError, ValueError, KeyError, RecursionError):
        raise AdfqError("not written by adfq.save") from None
    if hashlib.sha256(_exchange_digest(content, str(digest), _NO_DIGEST)).hexdigest() != digest:
        raise AdfqError("damaged or altered: its content does not have the digest in its header")
    if header.get("format") not in _FORMATS:
        known = ", ".join(map(str, _FORMATS))
        raise AdfqError(f"written in format {header.get('format')!r}; this version of adfq reads formats {known}")
    _check_types(header, _FIELDS | {field: list for field in _CHANGES if field in header}, "header")
    if not all(isinstance(name, str) for field in _CHANGES for name in header.get(field, ())):
        raise AdfqError("its header names no modules where it should")
    return header, tensors


def _check_types(values: Mapping[str, Any], kinds: Mapping[str, Any], what: str) -> None:
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise AdfqError(f"its {what} has no usable {name!r}")


def _read_architecture(values: dict[str, Any]) -> Architecture:
    kinds = {"family": str, "cls": str, "name": (str, type(None)), "arguments": dict, "input_size": list}
    _check_types(values, kinds, "architecture")
    size = values["input_size"]
    if len(size) != 3 or not all(isinstance(number, int) for number in size):
        raise AdfqError("its architecture has no usable 'input_size'")
    arguments = {name: _to_tuple(value) for name, value in values["arguments"].items()}
    return Architecture(values["family"], values["cls"], values["name"], arguments, (size[0], size[1], size[2]))


def _to_tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tuple(entry) for key, entry in value.items()}
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def _attach(model: nn.Module, specified: Mapping[str, Any], method: str) -> None:
    with suppress(AdfqError):  # one that is not installed may have used nothing but adfq's quantizers
        find_method(method)  # its module may define others
    classes = {qualified_name(cls): cls for cls in _subclasses(Quantizer)}
    sites = {site.name: site for site in sites_of(model)}
    for site, spec in specified.items():
        if site not in sites:
            raise AdfqError(f"its model has no place {site!r} for a quantizer")
        if not isinstance(spec, dict):
            raise AdfqError(f"{site}: its quantizer is not described")
        _check_types(spec, {"class": str, "arguments": dict}, f"quantizer {site}")
        if spec["class"] not in classes:
            raise AdfqError(
                f"{site}: unknown quantizer {spec['class']!r}; is all that method {method!r} needs installed?"
            )
        try:
            sites[site].attach(classes[spec["class"]](**spec["arguments"]))
        except (TypeError, ValueError) as error:
            raise AdfqError(f"{site}: cannot make its quantizer: {error}") from None


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    layers = dict(Network(model).weight_layers())
    codes = {name: tensors.pop(f"{name}.codes") for name in layers if f"{name}.codes" in tensors}
    for name, layer in layers.items():
        if layer.bias is None and f"{name}.bias" in tensors:  # a method has given it one
            layer.bias = nn.Parameter(layer.weight.new_empty(len(layer.weight)))
    expected = model.state_dict()
    for name in codes:
        tensors[f"{name}.weight"] = expected[f"{name}.weight"]
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has an unexpected tensor", tensors.keys() - expected.keys()),
    ):
        if names:
            raise AdfqError(f"{problem} {min(names)}")
    ours = {name for name, module in model.named_modules() if isinstance(module, Quantizer)}
    for name, tensor in tensors.items():
        of_quantizer = name.rpartition(".")[0] in ours
        if not of_quantizer and tensor.shape != expected[name].shape:
            raise AdfqError(f"{name} has shape {tuple(tensor.shape)}, the model {tuple(expected[name].shape)}")
        if of_quantizer and not tensor.numel():
            raise AdfqError(f"{name} is empty")
        # A quantizer's tensors stay float32 in a model of another dtype; the rest has been cast as it was.
        castable = not of_quantizer and tensor.is_floating_point() and expected[name].is_floating_point()
        if tensor.dtype != expected[name].dtype and not castable:
            raise AdfqError(f"{name} has dtype {tensor.dtype}, the model {expected[name].dtype}")
    model.load_state_dict(tensors, assign=True)
    for layer in layers.values():
        layer.weight.requires_grad_(
            isinstance(layer.weight_quantizer, nn.Identity)
        )  # as QuantWeightLayer.freeze has it
        layer.frozen = True
    for name, packed in codes.items():
        _set_weight(name, layers[name], packed)


def _set_weight(name: str, layer: QuantWeightLayer, packed: Tensor) -> None:
    quantizer, shape = layer.weight_quantizer, layer.weight.shape
    if not isinstance(quantizer, Quantizer):
        raise AdfqError(f"has codes for {name}, which has no weight quantizer")
    if packed.dtype != torch.uint8 or packed.shape != (-(-shape.numel() * quantizer.bits // 8),):
        raise AdfqError(f"{name}.codes does not fit a weight of shape {tuple(shape)} at {quantizer.bits} bits")
    try:
        weight = quantizer.decode(unpack(packed, quantizer.bits, shape.numel()).view(shape))
    except (RuntimeError, NotImplementedError):
        weight = None
    if weight is None or weight.shape != shape:
        raise AdfqError(f"{name}.codes cannot be decoded by its quantizer")
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = next(model.parameters()).dtype
    if str(dtype) not in _DTYPES:
        raise AdfqError(f"cannot save a model of dtype {dtype}")
    return dtype


def _identical(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit, so that NaN is like NaN and -0 not like 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))
