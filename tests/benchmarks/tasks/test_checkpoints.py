"""One reader of checkpoints: the same weights out of every wrapping, and no choice without a word."""

from __future__ import annotations

import argparse
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from benchmarks.tasks.checkpoints import CONTAINERS, WRAPPERS, check_present, load_weights, read_weights
from benchmarks.tasks.classification.models import _conversion
from benchmarks.tasks.detection.models import convert_layout as convert_detector
from benchmarks.tasks.segmentation.models import convert_layout as convert_sam

State = dict[str, Tensor]
Make = Callable[..., nn.Module]
Convert = Callable[[State], Mapping[str, Tensor]] | None

#: Names as in each task's models; values are drawn.
NAMES = {
    "detection": (
        "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
        "neck.fpn_convs.0.conv.bias",
        "rpn_head.rpn_cls.bias",
    ),
    "segmentation": ("image_encoder.blocks.0.attn.qkv.weight", "prompt_encoder.pe", "mask_decoder.iou_token.weight"),
}


def as_model(state: State) -> nn.Module:
    """A module with parameters of these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))
    return root


@pytest.fixture(params=["classification", "detection", "segmentation"])
def subject(request: pytest.FixtureRequest, make_vit: Make) -> tuple[nn.Module, State, Convert]:
    """A model of each task, other weights for it, and the task's conversion."""
    if request.param == "classification":
        model = make_vit(embed_dim=8, num_heads=2, depth=1)
        state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        return model, state, _conversion(model, "file")
    state = {name: torch.randn(2, 3) for name in NAMES[request.param]}
    return as_model(state), state, {"detection": convert_detector, "segmentation": convert_sam}[request.param]


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def bare(content: State) -> State:
    return content


def in_entry(key: str, **beside: Any) -> Callable[[State], dict[str, Any]]:
    return lambda content: {"epoch": 3, key: content, **beside}


OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "bare": bare,
    "ordered": OrderedDict,
    **{key: in_entry(key, optimizer=OPTIMIZER) for key in CONTAINERS},
    "an own name": in_entry("my_classifier", optimizer=OPTIMIZER),
    "nested": lambda content: {"state": 1, "model": {"state_dict": content}},
    "arguments": in_entry("model", args=argparse.Namespace(lr=0.1, folder=Path.cwd()), best=np.float64(0.5)),
    "numbers among weights": lambda content: {**content, "epoch": 7, "_metadata": {"": {"version": 1}}},
    "random state": in_entry("model", rng=torch.zeros(3, dtype=torch.uint8)),
}
PREFIXES = ("", *WRAPPERS, *map("".join, itertools.permutations(("module.", "model.", "_orig_mod."), 2)))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_same_weights(
    wrapping: str, subject: tuple[nn.Module, State, Convert], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, state, convert = subject
    file = str(tmp_path / "weights.pth")
    for prefix in PREFIXES:
        torch.save(WRAPPINGS[wrapping](prefixed(state, prefix)), file)
        found = read_weights(file)
        assert list(found) == list(state)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    load_weights(model, file, "it", convert)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_by_any_name(suffix: str, prefix: str, tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(2, 2), "b": torch.tensor(3)}
    save_file(prefixed(state, prefix), tmp_path / f"weights{suffix}", {"format": "pt"})
    found = read_weights(str(tmp_path / f"weights{suffix}"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@given(
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=4),
    containers=st.lists(st.sampled_from(CONTAINERS), max_size=3),
    inner=st.sampled_from(["", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrappings_in_wrappings(wrappers: list[str], containers: list[str], inner: str, tmp_path: Path) -> None:
    tensor = torch.randn(2, 3)
    content: Any = {f"{''.join(wrappers)}backbone.{inner}stages.0.weight": tensor}
    for container in containers:
        content = {container: content, "optimizer": OPTIMIZER}
    torch.save(content, tmp_path / "weights.pth")
    found = read_weights(str(tmp_path / "weights.pth"))
    assert list(found) == ["backbone.stages.0.weight"]
    assert torch.equal(found["backbone.stages.0.weight"], tensor)


def averaged(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("make", "shift", "message"),
    [
        *(
            (lambda s, a, key=key, other=other: {other: s, key: a}, 1, rf"averaged weights in '{key}' .* in '{other}'")
            for key, other in (
                ("state_dict_ema", "state_dict"),  # timm's
                ("model_ema", "model"),
                ("ema_state_dict", "state_dict"),
                ("ema", "net"),
            )
        ),
        (
            lambda s, a: {"model": s, "model_ema": {"n_averaged": torch.tensor(4), **prefixed(a, "module.")}},
            1,
            "model_ema",
        ),
        (lambda s, a: {"model": s, "model_ema": None}, 0, ""),
        (lambda s, a: {"ema": {"model": prefixed(a, "model.")}}, 1, ""),
        # mmengine's names: its hook exchanges the two
        (
            lambda s, a: {"state_dict": a, "ema_state_dict": {"steps": torch.tensor(9), **prefixed(s, "module.")}},
            1,
            "averaged weights are taken, which mmengine keeps in 'state_dict'",
        ),
        (lambda s, a: {"model": a, "state_dict": s}, 0, "weights in 'state_dict' are taken, not those in 'model'"),
        (lambda s, a: {**s, "ema_state_dict": a}, 1, ""),
    ],
)
def test_which_of_two_sets_is_taken_is_said(
    make: Callable[[State, State], Any],
    shift: int,
    message: str,
    subject: tuple[nn.Module, State, Convert],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, state, convert = subject
    file = tmp_path / "weights.pth"
    torch.save(make(state, averaged(state)), file)
    load_weights(model, str(file), "it", convert)
    assert all(torch.equal(tensor, state[name] + shift) for name, tensor in model.state_dict().items())
    said = capsys.readouterr().err
    assert said.count("\n") == bool(message)
    assert re.search(message, said), said


def extended(state: State, prefix: str) -> State:
    """The weights, and the same number of others under `prefix`."""
    return {**prefixed(averaged(state), prefix), **state}


@pytest.mark.parametrize("prefix", ["ema_", "ema_model.", "ema_model.module.", "teacher.", "criterion."])
def test_more_weights_are_left_out_and_counted(
    prefix: str, subject: tuple[nn.Module, State, Convert], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, state, convert = subject
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": prefixed(extended(state, prefix), "")}, file)
    load_weights(model, str(file), "it", convert)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    said = capsys.readouterr().err
    assert f"it has no place for {len(state)} of the weights in {file} ({prefix}{next(iter(state))} for one)" in said
    assert said.count("\n") == 1


def test_averages_beside_lightnings_weights(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(1)}
    torch.save({"state_dict": {**prefixed(state, "model."), **prefixed(averaged(state), "ema_model.")}}, tmp_path / "x")
    model = as_model(state)
    load_weights(model, str(tmp_path / "x"), "it")
    assert torch.equal(model.get_parameter("a"), state["a"])


def double(name: str) -> Callable[[State], Any]:
    return lambda state: {**state, f"module.{name}": state[name] + 1}


def without(name: str) -> Callable[[State], Any]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], Any]:
    return lambda state: {**state, name: change(state[name])}


def own(content: State, *keys: str) -> dict[str, Any]:
    """Return a dictionary with weights that holds itself under one key after the other."""
    outer: dict[str, Any] = dict(content)
    inner = outer
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = outer
    return outer


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double("a.w"), r"holds a\.w twice, with other values under module\.a\.w"),
        (lambda s: {"student": s, "teacher": s}, r"several sets of weights \(student, teacher\); keep one"),
        (lambda s: {"model": s, "ema_a": s, "ema_b": s}, r"several averages of weights \(ema_a, ema_b\); keep one"),
        (without("a.w"), r"does not fit it: 1 weights are missing \(a\.w for one\)$"),
        (
            lambda s: {"c": s["a.w"], "a.b": s["a.b"]},
            r"1 weights are missing \(a\.w for one\), 1 are not the model's \(c for one\)",
        ),
        (changed("a.w", lambda t: t[:1]), r"1 have other shapes \(a\.w is 1×3 and should be 2×3\)"),
        (changed("a.w", lambda t: t * torch.nan), r"a\.w is not finite"),
        (changed("a.w", lambda t: t.double() * 1e300), r"a\.w is not finite"),
        (changed("a.w", lambda t: t.to(torch.int8)), r"a\.w is of torch\.int8, whose values need a scale"),
        (changed("a.w", lambda t: t.to(torch.float8_e4m3fn)), r"a\.w is of torch\.float8_e4m3fn"),
        (changed("a.w", Tensor.to_sparse), r": a\.w is a sparse tensor; only dense ones are read$"),
        (changed("a.w", Tensor.to_sparse_csr), r": a\.w is a sparse tensor; only dense ones are read$"),
        (changed("a.w", lambda t: t.to("meta")), r": a\.w is a meta tensor; only dense ones are read$"),
        (
            changed("a.w", lambda t: torch.nested.nested_tensor(list(t))),
            r": a\.w is a nested tensor; only dense ones are read$",
        ),
        (lambda s: {**s, "module.a.w": (2 * s["a.w"]).to(torch.float8_e4m3fn)}, r"holds a\.w twice"),
        (lambda s: {**s, "module.a.w": s["a.w"].to_sparse()}, r": module\.a\.w is a sparse tensor"),
        (lambda s: own(s, "model"), "holds itself under 'model'$"),
        (lambda s: own(s, "model", "state_dict"), "holds itself under 'state_dict'$"),
        (lambda s: own({}, "model"), "holds no weights of a model"),
        (lambda s: own({}, "ema", "state_dict", "model"), "holds no weights of a model"),
        (lambda s: {}, "holds no weights of a model"),
        (lambda s: [s], "holds no weights of a model"),
        (lambda s: list(s.values()), "holds no weights of a model"),
        (lambda s: s["a.w"], "holds no weights of a model"),
        (lambda s: {"state_dict": {"x": 1}, "epoch": 3}, "holds no weights of a model"),
        (lambda s: {"model": {}, "optimizer": OPTIMIZER}, "holds no weights of a model"),
        (lambda s: {"model": s, "hook": _Code()}, "is not a file of weights alone, and code in it is never run"),
        (lambda s: nn.Linear(2, 2), "is not a file of weights alone, and code in it is never run"),
    ],
)
def test_what_does_not_fit_is_one_line(
    change: Callable[[State], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"a.w": torch.ones(2, 3), "a.b": torch.ones(2)}
    file = str(tmp_path / "weights.pth")
    torch.save(change(state), file)
    model = as_model(state)
    with pytest.raises(AdfqError, match=message) as caught:
        load_weights(model, file, "it")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_of_floats_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a": torch.randn(3).to(dtype)}
    torch.save(state, tmp_path / "x")
    model = as_model({"a": torch.zeros(3)})
    load_weights(model, str(tmp_path / "x"), "it")
    assert torch.equal(model.get_parameter("a"), state["a"].float())


@pytest.mark.parametrize("name", ["relative_position_index", "attention_bias_idxs", "num_batches_tracked"])
def test_buffers_of_integers(name: str, tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer(name, torch.arange(3))
    model.register_parameter("a", nn.Parameter(torch.zeros(1)))
    torch.save({"a": torch.ones(1)}, tmp_path / "without")
    load_weights(model, str(tmp_path / "without"), "it")
    torch.save({"a": torch.ones(1), name: torch.arange(3).flip(0)}, tmp_path / "another")
    if name == "num_batches_tracked":
        load_weights(model, str(tmp_path / "another"), "it")
    else:
        with pytest.raises(AdfqError, match=f"does not fit it: {name} is another"):
            load_weights(model, str(tmp_path / "another"), "it")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda t: t.to(torch.uint16), True),
        (lambda t: t + 0.5, False),
        (lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint8), False),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_buffers_of_other_dtypes(change: Callable[[Tensor], Tensor], same: bool, tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("relative_position_index", torch.arange(3))
    torch.save({"relative_position_index": change(torch.arange(3))}, tmp_path / "x")
    with nullcontext() if same else pytest.raises(AdfqError, match=r"relative_position_index is another$"):
        load_weights(model, str(tmp_path / "x"), "it")


def test_an_empty_text_is_no_checkpoint() -> None:
    check_present(None)
    with pytest.raises(AdfqError, match=r"^--checkpoint is empty$"):
        check_present("")


def test_a_quantized_model_is_no_checkpoint(make_vit: Make, tmp_path: Path) -> None:
    model = make_vit(embed_dim=8, num_heads=2, depth=1)
    adfq.save(adfq.quantize(model, "base_ptq", calibration=torch.randn(2, 3, 32, 32)), tmp_path / "q.safetensors")
    with pytest.raises(AdfqError, match=r"q\.safetensors is a quantized model and no checkpoint: .*--quantized"):
        read_weights(str(tmp_path / "q.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("text", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:1", "PK\x03\x04 cut off"])
def test_files_that_are_no_checkpoints(text: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_text(text)
    with pytest.raises(AdfqError, match=rf"^cannot read checkpoint {file}: [^\n]+$") as caught:
        read_weights(str(file))
    assert ("neither safetensors nor a PyTorch file" in str(caught.value)) == (
        "git" in text and suffix != ".safetensors"
    )
