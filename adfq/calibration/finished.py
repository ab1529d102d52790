"""Finished parts of a long run, in a folder that the next run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adfq.calibration.images import CalibrationImages
from adfq.errors import AdfqError
from adfq.quantizers import Quantizer
from adfq.sites import Network


class Finished:
    """Parts that an earlier run of the same network, images and options has finished.

    Args:
        folder: folder of the parts' files, which is made where there is none; None keeps nothing.
        network: network with its quantizers, before the run.
        images: calibration images.
        options: everything else that decides the result.

    Raises:
        AdfqError: for a folder that cannot be written.
    """

    def __init__(self, folder: Path | None, network: Network, images: CalibrationImages, options: str = "") -> None:
        self.folder, self.device = folder, next(network.model.parameters()).device
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdfqError(f"cannot write to {self.folder}: {error.strerror}") from None
        digest = hashlib.sha256(f"{torch.__version__} {options} {images.sizes} {network.model}".encode())
        for tensor in (*network.model.state_dict().values(), *images):
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.fingerprint = digest.hexdigest()

    def restore(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and findings of a finished part; None for an unfinished one.

        Args:
            name: name of the part.
        """
        if self.folder is None:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                found = json.loads(file.metadata()["adfq"])
                if found.pop("fingerprint") != self.fingerprint:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}, found  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or a damaged one
            return None

    def keep(self, name: str, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        """Save a finished part.

        Args:
            name: name of the part.
            tensors: its state.
            found: further findings, in JSON's types.

        Raises:
            AdfqError: if the file cannot be written.
        """
        if self.folder is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        header = json.dumps({"fingerprint": self.fingerprint, **found})
        try:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                path.with_suffix(".part"),
                {"adfq": header},
            )
            os.replace(path.with_suffix(".part"), path)
        except (OSError, SafetensorError) as error:
            raise AdfqError(f"cannot write {path}: {error}") from None

    def restore_ranges(self, name: str, quantizers: Mapping[str, Quantizer]) -> bool:
        """Calibrate quantizers as an earlier run did, and return True; False for an unfinished part.

        Args:
            name: name of the part.
            quantizers: quantizers by the name of their site.
        """
        found = self.restore(f"ranges.{name}")
        if found is None:
            return False
        for key, tensor in found[0].items():
            site, _, buffer = key.rpartition("/")
            setattr(quantizers[site], buffer, tensor.to(self.device))
        return True

    def keep_ranges(self, name: str, quantizers: Mapping[str, Quantizer]) -> None:
        """Save the ranges of calibrated quantizers.

        Args:
            name: name of the part.
            quantizers: quantizers by the name of their site.

        Raises:
            AdfqError: if the file cannot be written.
        """
        buffers = {
            f"{site}/{key}": tensor for site, found in quantizers.items() for key, tensor in found.named_buffers()
        }
        self.keep(f"ranges.{name}", buffers, {})
