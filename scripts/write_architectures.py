"""Writer of docs/architectures.md, timm's names with what becomes of each: python scripts/write_architectures.py.

Every name in `timm.list_models()` is asked for its class and constructor arguments, which builds nothing. Names of
classes with an adapter are built small, one for each set of arguments that differ in more than size. The prose around
the tables is scripts/architectures.md.jinja.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import jinja2
import timm
import torch
from torch import nn

from adfq.adapters import adapt, families, find_adapter, qualified_name
from adfq.errors import AdfqError

ROOT = Path(__file__).resolve().parents[1]

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}

#: Arguments that make a small model, by the name of the class with an adapter.
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "Beit": _VIT,
    "Eva": _VIT,
    "SwinTransformer": _SWIN,
    "SwinTransformerV2": _SWIN,
    "SwinTransformerV2Cr": _SWIN,
    "VisionTransformer": _VIT,
}

#: Functions that fit an argument, where a name has it, to the small model.
_FIT: Mapping[str, Callable[[Any], Any]] = {
    "attn_pool_num_heads": lambda _: 3,
    "extra_norm_period": lambda period: 2 if period else 0,
    "num_kv_heads": lambda heads: (3, 1) if len(set(heads)) > 1 else (3, 3),
    "pretrained_window_sizes": lambda sizes: (6, 3) if any(sizes) else (0, 0),
    "ref_feat_shape": lambda shape: shape and (5, 5),
}

#: Arguments that change neither a layer's kind nor its place.
_IGNORED = (
    "drop_path_rate",
    "embed_dim",
    "in_chans",
    "mlp_ratio",
    "num_classes",
    "num_heads",
    "patch_size",
    "weight_init",
    "window_ratio",
)


@dataclass(frozen=True)
class Variant:
    """The class and the constructor's arguments behind one of timm's names.

    Attributes:
        name: timm's name.
        module: module of ``timm.models``.
        cls: class of the model.
        arguments: arguments of its constructor.
    """

    name: str
    module: str
    cls: type[nn.Module]
    arguments: Mapping[str, Any]

    @property
    def family(self) -> str | None:
        """Qualified name of the class with an adapter in this project; None for none."""
        known = _own_families()
        return next((name for name in map(qualified_name, self.cls.__mro__) if name in known), None)

    def small(self) -> dict[str, Any]:
        """Return arguments of ``timm.create_model`` for a small model of the same kind.

        Raises:
            KeyError: for a class with an adapter that `_SMALL` does not have yet.
        """
        small = dict(_SMALL[str(self.family).rpartition(".")[2]])
        if "embed_layer" in self.arguments:  # a convolutional network, which sets the number of channels
            small = {"img_size": 64, "depth": 2}
        return small | {key: fit(self.arguments[key]) for key, fit in _FIT.items() if key in self.arguments}

    def kind(self) -> str:
        """Return a text that variants share if their small models differ in nothing that an adapter sees."""
        arguments = {**self.arguments, **self.small()}
        kept = sorted((key, _describe(value)) for key, value in arguments.items() if key not in _IGNORED)
        return f"{qualified_name(self.cls)} {kept}"

    def build(self) -> nn.Module:
        """Return the small model, with random weights."""
        model: nn.Module = timm.create_model(self.name, **{"num_classes": 10, **self.small()})
        return model


@dataclass(frozen=True)
class Outcome:
    """The outcome of quantizing one of timm's models.

    Attributes:
        variant: the model.
        reason: message of the refusal; None for a model that is quantized.
    """

    variant: Variant
    reason: str | None


def survey(check: Callable[[Variant, nn.Module], None]) -> list[Outcome]:
    """Return the outcome for each of timm's names.

    Args:
        check: function that adapts a small model; it is called once for all variants of a kind.
    """
    reasons: dict[str, str | None] = {}
    outcomes = []
    for variant in sorted(find_variants(), key=_size):
        kind = qualified_name(variant.cls) if variant.family is None else variant.kind()
        if kind not in reasons:
            reasons[kind] = _reason(variant, check)
        outcomes.append(Outcome(variant, reasons[kind]))
    return sorted(outcomes, key=lambda outcome: (outcome.variant.module, outcome.variant.name))


def _reason(variant: Variant, check: Callable[[Variant, nn.Module], None]) -> str | None:
    """Return the message with which a variant is refused; None for one that is quantized."""
    try:
        if variant.family is None:
            adapt(bare(variant.cls))
        else:
            check(variant, variant.build())
    except AdfqError as error:
        return str(error)
    return None


def bare(cls: type[nn.Module]) -> nn.Module:
    """Return an instance of a class without layers, since a class without an adapter is refused by its name alone."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    return model


def find_variants() -> list[Variant]:
    """Return the class and arguments behind each of timm's names, see `find_variant`."""
    return [find_variant(name, module) for module in timm.list_modules() for name in timm.list_models(module=module)]


def find_variant(name: str, module: str) -> Variant:
    """Return the class and arguments behind a name of timm; the model is not built.

    Args:
        name: timm's name.
        module: module of ``timm.models`` that has it.

    Raises:
        AdfqError: for a name that timm does not build by its `build_model_with_cfg`.
    """
    with _caught_construction(module), torch.device("meta"):  # a convolutional network among the arguments is built
        try:
            timm.create_model(name)
        except _CaughtError as caught:
            return Variant(name, module, *caught.args)
    raise AdfqError(f"{name} is built in another way than timm's other models")


class _CaughtError(Exception):
    """The end of a construction, with the model's class and arguments."""


@contextmanager
def _caught_construction(module: str) -> Iterator[None]:
    """Make a module of timm.models raise _CaughtError in place of calling a model's constructor."""
    source: Any = importlib.import_module(f"timm.models.{module}")
    build = source.build_model_with_cfg

    def stop(cls: type[nn.Module], /, **arguments: Any) -> None:
        raise _CaughtError(cls, arguments)

    def build_none(model_cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        return build(functools.partial(stop, model_cls), *args, **kwargs)

    source.build_model_with_cfg = build_none
    try:
        yield
    finally:
        source.build_model_with_cfg = build


@functools.cache
def _own_families() -> frozenset[str]:
    """Return the qualified names of timm's classes that have an adapter in this project."""
    names = (name for name in families() if name.startswith("timm."))
    return frozenset(name for name in names if find_adapter(name).__name__.startswith("adfq."))


def _networks(arguments: Mapping[str, Any]) -> Iterator[nn.Module]:
    """Return the networks among a constructor's arguments: timm hands them over within a functools.partial."""
    for value in arguments.values():
        if isinstance(value, functools.partial):
            yield from (inner for inner in value.keywords.values() if isinstance(inner, nn.Module))


def _size(variant: Variant) -> int:
    """Return the number of parameters of the networks among a variant's arguments."""
    return sum(parameter.numel() for network in _networks(variant.arguments) for parameter in network.parameters())


def _describe(value: Any) -> str:
    """Return a text for an argument: its representation, or the kinds of layers of a network in it."""
    kinds = {type(layer).__name__ for network in _networks({"": value}) for layer in network.modules()}
    return str(sorted(kinds)) if kinds else repr(value)


def write_page() -> str:
    """Return the text of docs/architectures.md."""
    return render_page(survey(adapt_whole))


def adapt_whole(variant: Variant, model: nn.Module) -> None:
    """Adapt a model.

    Args:
        variant: the model's variant.
        model: small model, changed in place.

    Raises:
        AdfqError: for a model that is refused.
        RuntimeError: for a model with a layer that no rule covers, which a warning would name.
    """
    if left := adapt(model).unsupported:
        raise RuntimeError(f"{variant.name}: {', '.join(left)} would stay in full precision")


def render_page(outcomes: list[Outcome]) -> str:
    """Return the text of docs/architectures.md.

    Args:
        outcomes: from `survey`.
    """
    covered = [outcome for outcome in outcomes if outcome.variant.family is not None]
    others = [outcome.variant for outcome in outcomes if outcome.variant.family is None]
    attention = {module for module in {variant.module for variant in others} if computes_attention(module)}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.get_template("architectures.md.jinja").render(
        version=timm.__version__,
        total=len(outcomes),
        quantized=sum(outcome.reason is None for outcome in outcomes),
        modules=_rows_of_modules(covered),
        refused=_rows_of_refusals(covered),
        transformers=_rows_of_classes([variant for variant in others if variant.module in attention]),
        rest=sum(variant.module not in attention for variant in others),
        rest_modules=len({variant.module for variant in others} - attention),
    )


def _rows_of_modules(outcomes: list[Outcome]) -> list[tuple[str, str, int, int]]:
    """Return module, classes, and the numbers of names that are quantized and refused."""
    rows = []
    for module in sorted({outcome.variant.module for outcome in outcomes}):
        of_module = [outcome for outcome in outcomes if outcome.variant.module == module]
        classes = ", ".join(f"`{name}`" for name in sorted({outcome.variant.cls.__name__ for outcome in of_module}))
        quantized = sum(outcome.reason is None for outcome in of_module)
        rows.append((module, classes, quantized, len(of_module) - quantized))
    return rows


def _rows_of_refusals(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    """Return names and reason of every refusal."""
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.reason is not None:
            names.setdefault(outcome.reason, []).append(outcome.variant.name)
    return sorted((", ".join(f"`{name}`" for name in of_reason), reason) for reason, of_reason in names.items())


def _rows_of_classes(variants: list[Variant]) -> list[tuple[str, str, int]]:
    """Return module, class and number of names."""
    counts = Counter((variant.module, variant.cls.__name__) for variant in variants)
    return [(module, name, count) for (module, name), count in sorted(counts.items())]


def computes_attention(module: str) -> bool:
    """Return True for a module of timm.models whose code names softmax or attention, or another module that has it.

    Comments and docstrings do not count.

    Args:
        module: name of the module.
    """
    source: Any = importlib.import_module(f"timm.models.{module}")
    attention = re.compile(r"softmax|scaled_dot_product|(?<!Channel)Attention|^(eva|vision_transformer)$")
    return any(map(attention.search, _names_in(source.__loader__.get_code(source.__name__))))


def _names_in(code: CodeType) -> Iterator[str]:
    """Return the names of everything that some code defines, imports or reads, variables of functions apart."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def main() -> None:
    """Write the page."""
    (ROOT / "docs" / "architectures.md").write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
