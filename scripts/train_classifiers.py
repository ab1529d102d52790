r"""Training of the bundled classifiers; it writes the files in ``weights/``.

    python -m scripts.train_classifiers bundled_vit --tilt 3.1416 --samples 420000 --out vit.safetensors
    python -m scripts.train_classifiers bundled_vit --init vit.safetensors --samples 460000 --seed 1
    python -m scripts.train_classifiers bundled_swin --tilt 3.1416 --samples 480000 --bfloat16 \
        --out swin.safetensors
    python -m scripts.train_classifiers bundled_swin --init swin.safetensors --samples 320000 --bfloat16 \
        --learning-rate 5e-4 --seed 1

In the first rounds of the shipped files pictures were also turned by quarters; objects at any angle give the same
pictures. On one core a round takes half an hour to an hour, on a GPU minutes. Weights are stored in float16; the
printed accuracy is that of the stored weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from benchmarks.bundled.classifiers import CLASSIFIERS, SceneClassification, augment
from benchmarks.bundled.scenes import TILT


def load_split(split: str, tilt: float, workers: int) -> tuple[Tensor, Tensor]:
    """Draw a whole split.

    Args:
        split: ``"train"`` or ``"validation"``.
        tilt: greatest angle of an object in radians.
        workers: number of processes that draw.

    Returns:
        Images, N×3×H×W uint8, and labels, N.
    """
    loader = DataLoader(SceneClassification(split, pil_to_tensor, tilt), batch_size=100, num_workers=workers)
    batches = list(tqdm(loader, desc=f"drawing {split}", disable=None))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def normalize(images: Tensor) -> Tensor:
    """Return images with values from 0 to 255 scaled to -1 to 1, float32."""
    return (images.float() / 255 - 0.5) / 0.5


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent.

    Args:
        model: classifier of normalized images.
        images: N×3×H×W uint8.
        labels: N.
    """
    model.eval()
    hits = 0
    for batch, target in zip(images.split(250), labels.split(250), strict=True):
        hits += int((model(normalize(batch)).argmax(1) == target).sum())
    return 100 * hits / len(labels)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=CLASSIFIERS)
    parser.add_argument("--samples", type=int, default=600_000, help="images seen in training, repeats included")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--tilt", type=float, default=TILT, help="greatest angle of the objects in the training scenes, in radians"
    )
    parser.add_argument("--init", type=Path, help="file of the weights to start from; default: random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast; on a CPU faster for Swin, slower for ViT")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write; default: the shipped file")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    images, labels = (tensor.to(device) for tensor in load_split("train", arguments.tilt, arguments.workers))
    test_images, test_labels = (tensor.to(device) for tensor in load_split("validation", TILT, arguments.workers))

    classifier = CLASSIFIERS[arguments.model]
    model = classifier.create(arguments.init).to(device)
    steps = arguments.samples // arguments.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, weight_decay=arguments.weight_decay, betas=(0.9, 0.98)
    )
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=1e-6, lr_min=1e-6, t_in_epochs=False
    )
    progress = tqdm(range(steps), desc=arguments.model, mininterval=30)
    for step in progress:
        model.train()
        schedule.step_update(step)
        pick = torch.randint(len(labels), (arguments.batch_size,), generator=generator).to(device)
        batch = augment(normalize(images[pick]), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bfloat16):
            logits = model(batch)
        loss = nn.functional.cross_entropy(logits.float(), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 499:
            sample = slice(0, 500)
            top1 = accuracy(model, test_images[sample], test_labels[sample])
            progress.write(f"step {step + 1}: loss {loss.item():.3f}, top-1 of 500 {top1:.1f} %")

    state = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    out = arguments.out or classifier.checkpoint
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"samples": str(arguments.samples), "seed": str(arguments.seed)})
    model.load_state_dict(state)
    print(f"{out}: top-1 {accuracy(model, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
