r"""Training of the bundled detectors; it writes the files in ``weights/``.

    python -m benchmarks.bundled.coco scenes --train 16000 --val 200
    python -m scripts.train_detectors bundled_mask_rcnn --scenes scenes --bfloat16
    python -m scripts.train_detectors bundled_cascade_mask_rcnn --scenes scenes --bfloat16 \
        --samples 24000 --batch-size 8 --learning-rate 5e-4

The backbone starts as the bundled Swin classifier. Cascade Mask R-CNN starts from the parts that it shares with the
trained Mask R-CNN. Weights are stored in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.bundled.detectors import DETECTORS
from benchmarks.tasks.detection.models import build_detector, convert_backbone, open_config

_WORKERS = 1


def swin_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of timm's Swin under the names of MMDetection's backbone.

    In the Swin authors' layout, which MMDetection converts from, patch merging ends a stage; in timm's it begins one.

    Args:
        state: state dict of timm's model.
    """
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        if parts[0] not in ("head", "norm"):
            renamed[".".join(parts)] = tensor
    return convert_backbone(renamed)


def initialize(name: str, model: nn.Module) -> None:
    """Load the weights that training starts from.

    Args:
        name: a name of `DETECTORS`.
        model: detector with random weights.
    """
    if name == "bundled_mask_rcnn":
        classifier = CLASSIFIERS["bundled_swin"].create(CLASSIFIERS["bundled_swin"].checkpoint)
        start = {f"backbone.{key}": value for key, value in swin_backbone(classifier.state_dict()).items()}
    else:
        start = load_file(DETECTORS["bundled_mask_rcnn"].checkpoint)
        # The cascade has a mask head for each of its three stages.
        for key in [key for key in start if key.startswith("roi_head.mask_head.")]:
            tensor = start.pop(key)
            for stage in range(3):
                start[key.replace("mask_head.", f"mask_head.{stage}.")] = tensor
        start = {key: tensor for key, tensor in start.items() if "bbox_head" not in key}
    model.load_state_dict({key: tensor.float() for key, tensor in start.items()}, strict=False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=DETECTORS)
    parser.add_argument("--scenes", type=Path, required=True, help="folder that benchmarks.bundled.coco has written")
    parser.add_argument("--samples", type=int, default=48_000, help="images seen in training, repeats included")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--init", type=Path, help="weights to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: the shipped file")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    detector = DETECTORS[arguments.model]
    config = open_config(str(detector.config))
    model: Any = build_detector(config).to(arguments.device)
    if arguments.init:
        model.load_state_dict({key: tensor.float() for key, tensor in load_file(arguments.init).items()})
    else:
        initialize(arguments.model, model)
    loader = _training_images(config, arguments.scenes, arguments.batch_size)
    steps = arguments.samples // arguments.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, weight_decay=arguments.weight_decay, betas=(0.9, 0.98)
    )
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=1e-6, lr_min=1e-6, t_in_epochs=False
    )
    out = arguments.out or detector.checkpoint
    progress = tqdm(range(steps), desc=arguments.model, mininterval=30)
    batches = iter(loader)
    model.train()
    for step in progress:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        schedule.step_update(step)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bfloat16):
            losses = model(**model.data_preprocessor(batch, True), mode="loss")
        loss, parts = model.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 100 == 99:
            progress.write(
                f"step {step + 1}: " + ", ".join(f"{key} {float(value):.3f}" for key, value in parts.items())
            )
        if step % 1000 == 999 or step == steps - 1:
            out.parent.mkdir(parents=True, exist_ok=True)
            state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
            halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
            save_file(halves, out, metadata={"samples": str(arguments.samples), "seed": str(arguments.seed)})
    print(f"{out} is written; measure it with 'adfq run detection'")


def _training_images(config: Any, scenes: Path, batch_size: int) -> DataLoader[Any]:
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    settings = config.train_dataloader.dataset
    settings.update(data_root=str(scenes), metainfo=config.test_dataloader.dataset.metainfo, filter_cfg=None)
    settings.pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]
    return DataLoader(
        DATASETS.build(settings),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=_WORKERS,
        collate_fn=pseudo_collate,
    )


if __name__ == "__main__":
    main()
