"""Print the likeliest classes of a picture: ``python classify.py vit.onnx picture.jpg``."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(picture, size, crop_pct, interpolation, crop_mode, mean, std):
    """Return a picture, 1×C×S×S, as timm's transform for evaluation does: shorter side resized, centre cut out."""
    if size[1] != size[2] or crop_mode != "center":
        raise ValueError(f"pictures of {size[1]}×{size[2]} with crop_mode {crop_mode!r} are not supported")
    with Image.open(picture) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{picture} has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGB").convert({1: "L", 3: "RGB"}[size[0]])
    shorter = int(size[1] / crop_pct)
    wanted = [shorter * side // min(image.size) for side in image.size]
    image = image.resize(wanted, Image.Resampling[interpolation.upper()])
    left, top = (round((side - size[1]) / 2) for side in image.size)
    image = image.crop((left, top, left + size[1], top + size[1]))
    values = np.asarray(image, np.float32).reshape(*size[1:], size[0]) / 255
    return ((values - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]


def main(file, picture):
    """Print five class indices with their probabilities."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # right sums on processors without VNNI
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map.get("adfq", "{}"))
    if described.get("kind") != "classifier" or "preprocessing" not in described:
        raise ValueError(f"{file} is no classifier whose metadata have the preprocessing")
    keys = ("input_size", "crop_pct", "interpolation", "crop_mode", "mean", "std")
    images = prepare(picture, *(described["preprocessing"][key] for key in keys))
    (logits,) = session.run(["logits"], {"images": images})[0].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for index in probabilities.argsort()[::-1][:5]:
        print(f"{index} {probabilities[index]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: classify.py MODEL.onnx PICTURE")
    try:
        main(*sys.argv[1:])
    except Exception as error:  # onnxruntime's, Pillow's, or a file's of another origin
        sys.exit(f"error: {' '.join(str(error).split())}")
