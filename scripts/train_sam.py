"""Training of the bundled SAM; it writes the file in ``weights/``.

    python -m benchmarks.bundled.coco scenes --train 16000 --val 200
    python -m scripts.train_sam --scenes scenes --bfloat16

The image encoder starts as the bundled ViT classifier. As in SAM's own training, every object has two prompts: a box
that is a little off, and a point on it. A box has one answer; of three answers to a point the best one counts. Weights
are stored in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import load_file, save_file
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from adfq.adapters.sam import decode
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.bundled.coco import MAX_OBJECTS
from benchmarks.bundled.sams import CHECKPOINT, create_bundled_sam

_JITTER = 0.1  # standard deviation of a box's corners in parts of its size
_FOCAL_WEIGHT, _DICE_WEIGHT = 20.0, 1.0


def initialize(sam: Any) -> None:
    """Load the weights of the bundled ViT into the image encoder, as far as the two are alike."""
    state = load_file(CLASSIFIERS["bundled_vit"].checkpoint)
    start = {}
    for name, tensor in state.items():
        if name.startswith(("blocks.", "patch_embed.")):
            start[name.replace("mlp.fc", "mlp.lin")] = tensor.float()
    positions = state["pos_embed"].float()[:, 1:]
    side = int(positions.shape[1] ** 0.5)
    grid = positions.unflatten(1, (side, side)).movedim(-1, 1)
    size = sam.image_encoder.pos_embed.shape[1:3]
    start["pos_embed"] = F.interpolate(grid, size, mode="bicubic").movedim(1, -1)
    sam.image_encoder.load_state_dict(start, strict=False)


def read_scenes(root: Path) -> tuple[Tensor, Tensor]:
    """Read the scenes to train on.

    Args:
        root: folder that `benchmarks.bundled.coco` has written.

    Returns:
        Images, N×3×H×W uint8, and masks, N×objects×H×W bool, all False for missing objects.
    """
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    paths = [root / "train2017" / image["file_name"] for image in content["images"]]
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()).movedim(-1, 0) for path in paths])
    masks = torch.zeros(len(images), MAX_OBJECTS, *images.shape[-2:], dtype=torch.bool)
    counts = [0] * len(images)
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            index = annotation["image_id"]
            masks[index, counts[index]] = torch.from_numpy(rle.decode(annotation["segmentation"]).astype(bool))
            counts[index] += 1
    return images, masks


def make_prompts(sam: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return sparse and dense embeddings of prompts: a box around each mask, and then a point on each.

    Args:
        sam: segment_anything's Sam.
        masks: N×H×W bool.

    Returns:
        Sparse embeddings, 2N×tokens×C, and dense embeddings, 2N×C×h×w.
    """
    boxes, points = [], []
    for mask in masks:
        rows, columns = mask.nonzero(as_tuple=True)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        box += _JITTER * (box[2:] - box[:2]).repeat(2) * torch.randn(4)
        boxes.append(box.clamp(0, masks.shape[-1]))
        chosen = int(torch.randint(len(rows), (1,)))
        points.append(torch.stack([columns[chosen], rows[chosen]]).float()[None])
    labels = torch.ones(len(points), 1)
    by_box = sam.prompt_encoder(None, torch.stack(boxes).to(sam.device), None)
    by_point = sam.prompt_encoder((torch.stack(points).to(sam.device), labels.to(sam.device)), None, None)
    return torch.cat([by_box[0], by_point[0]]), torch.cat([by_box[1], by_point[1]])


def segmentation_loss(sam: Any, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the mean IoU of masks from boxes.

    Args:
        sam: segment_anything's Sam.
        images: N×3×H×W, values 0 to 255.
        masks: N×objects×H×W bool.
    """
    embeddings = sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)
    index, number = masks.flatten(2).any(-1).nonzero(as_tuple=True)
    target = masks[index, number].float()
    sparse, dense = make_prompts(sam, masks[index, number].cpu())
    logits, quality = decode(
        sam.mask_decoder, embeddings[index.repeat(2)], sam.prompt_encoder.get_dense_pe(), sparse, dense
    )
    logits = logits.float()
    target = F.interpolate(target[:, None], logits.shape[-2:], mode="area").repeat(2, 1, 1, 1).expand_as(logits)

    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (cross_entropy * (1 - torch.exp(-cross_entropy)).square()).mean((2, 3))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    errors = _FOCAL_WEIGHT * focal + _DICE_WEIGHT * dice
    boxes = len(index)
    chosen = torch.cat([errors[:boxes, 0], errors[boxes:, 1:].amin(1)])

    with torch.no_grad():
        found, wanted = logits > 0, target > 0.5
        iou = (found & wanted).sum((2, 3)) / (found | wanted).sum((2, 3)).clamp(min=1)
    return chosen.mean() + F.mse_loss(quality.float(), iou), iou[:boxes, 0].mean()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=Path, required=True, help="folder that benchmarks.bundled.coco has written")
    parser.add_argument("--samples", type=int, default=80_000, help="images seen in training, repeats included")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    sam: Any = create_bundled_sam().to(arguments.device)
    initialize(sam)
    images, masks = read_scenes(arguments.scenes)
    steps = arguments.samples // arguments.batch_size
    optimizer = torch.optim.AdamW(
        sam.parameters(), arguments.learning_rate, weight_decay=arguments.weight_decay, betas=(0.9, 0.98)
    )
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=1e-6, lr_min=1e-6, t_in_epochs=False
    )
    progress = tqdm(range(steps), desc="bundled_sam", mininterval=30)
    shown = []
    sam.train()
    for step in progress:
        chosen = torch.randint(len(images), (arguments.batch_size,))
        flips = [dimension for dimension in (-2, -1) if torch.rand(()) < 0.5]
        batch = images[chosen][:, torch.randperm(3)].flip(flips).float().to(arguments.device)
        wanted = masks[chosen].flip(flips).to(arguments.device)
        schedule.step_update(step)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bfloat16):
            loss, iou = segmentation_loss(sam, batch, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        shown.append((float(loss.detach()), float(iou)))
        if step % 200 == 199:
            means = np.mean(shown[-200:], axis=0)
            progress.write(f"step {step + 1}: loss {means[0]:.4f}, IoU by boxes {means[1]:.4f}")
        if step % 1000 == 999 or step == steps - 1:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            halves = {key: tensor.detach().cpu().half() for key, tensor in sam.state_dict().items()}
            save_file(halves, arguments.out, metadata={"samples": str(arguments.samples), "seed": str(arguments.seed)})
    print(f"{arguments.out} is written; measure it with 'adfq run segmentation'")


if __name__ == "__main__":
    main()
