"""Fixtures that all tests share: where data lies, small models, golden vectors."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Side by side, each process has its share of the cores, and so have the commands that it starts.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MakeModel = Callable[..., nn.Module]

#: Modules of the subset that takes less than a minute on one core: pytest -m quick.
QUICK = (
    "adfq/test_layers.py",
    "adfq/test_quantizers.py",
    "adfq/test_sites.py",
    "adfq/test_twin_quantizers.py",
    "benchmarks/run/test_store.py",
    "benchmarks/test_cell.py",
    "test_architecture.py",
    "test_english.py",
    "test_packaging.py",
    "test_results_page.py",
)


def _is_quick(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix() in QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import none but the quick modules where no others are asked for."""
    return (
        True
        if config.option.markexpr == "quick" and collection_path.is_file() and not _is_quick(collection_path)
        else None
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the quick modules."""
    for item in items:
        if _is_quick(item.path) and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of vectors computed by the methods' released code; they are not part of the repository."""
    return _folder("ADFQ_GOLDEN")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of data sets and weights that others published."""
    return _folder("ADFQ_REAL_DATA")


@pytest.fixture(scope="session")
def load_golden(golden: Path) -> Callable[[str], dict[str, Tensor]]:
    """Reads a file of golden vectors as tensors by key; scalars stay 0-dimensional tensors."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(golden / name) as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}

    return load


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same numbers whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def quick() -> Mapping[str, dict[str, Any]]:
    """Options, by method, with which quantizing a small model takes no time.

    Optimizations take minutes; tests/adfq/reconstruction and those of each method are about them, others do without.
    """
    optimizing = {key: {"iterations": 0} for key in ("adfq_vit", "aphq_vit", "fima_q", "iasvit", "qdrop")}
    others = {"ptq4vit": {"rounds": 1}, "adalog": {"rounds": 1}, "glf_q": {"iterations": 0, "range": "percentile"}}
    return defaultdict(dict, optimizing | others)


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Gives a model seeded weights that make every part of it matter.

    Fresh timm models hide mistakes: their weights are tiny, biases 0 and norms 1, so that a dropped bias or a mixed-up
    norm changes next to nothing. Here activations have unit size and channels differ from each other.
    """

    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                draw *= parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.5
            elif name.endswith("weight"):  # a norm's
                draw = (0.5 * draw).exp()
            elif name.endswith("gamma"):  # LayerScale's
                draw = 0.7 + 0.2 * draw
            else:
                draw *= 0.3
            parameter.data.copy_(draw)
        model.eval()
        return model

    return fill


@pytest.fixture(scope="session")
def make_vit(randomize: Callable[[nn.Module], nn.Module]) -> MakeModel:
    """Makes a ViT of two blocks, 17 tokens, 48 channels; keyword arguments are timm's."""

    def make(cls: type[VisionTransformer] = VisionTransformer, **changes: Any) -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
        return randomize(cls(**(shape | changes)))

    return make


@pytest.fixture(scope="session")
def make_swin(randomize: Callable[[nn.Module], nn.Module]) -> MakeModel:
    """Makes a Swin of two stages with two blocks each, the second of each shifted where there is room."""

    def make(**changes: Any) -> nn.Module:
        shape = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
        return randomize(SwinTransformer(**(shape | {"window_size": 4, "num_classes": 10} | changes)))

    return make


@pytest.fixture
def make_images() -> Callable[..., Tensor]:
    """Makes seeded images of shape B×3×H×W (H = W)."""

    def make(count: int = 4, size: int = 32, seed: int = 1) -> Tensor:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))

    return make
