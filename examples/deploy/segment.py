"""Cut an object out by its box: ``python segment.py sam.onnx sam_decoder.onnx picture.jpg x0 y0 x1 y1 mask.png``."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(file, kind):
    """Return a session, and the preprocessing from the file's metadata."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # right sums on processors without VNNI
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map.get("adfq", "{}"))
    if described.get("kind") != kind or "mean" not in described["preprocessing"]:
        raise ValueError(f"{file} is no {kind} of a whole Segment Anything model")
    return session, described["preprocessing"]


def main(encoder, decoder, picture, x0, y0, x1, y1, out):
    """Write the mask in the picture's size, and print the IoU that the model predicts."""
    encoder, preprocessing = load(encoder, "image_encoder")
    decoder, _ = load(decoder, "mask_decoder")
    with Image.open(picture) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{picture} has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGB")
    box = np.array([[x0, y0], [x1, y1]], np.float64)
    if not (box[0] >= 0).all() or not (box[0] < box[1]).all() or not (box[1] <= image.size).all():
        raise ValueError(f"a box is 0 <= x0 < x1 <= {image.width} and 0 <= y0 < y1 <= {image.height} in pixels")

    side = preprocessing["size"]  # the longer one becomes this long, and zeros fill up the shorter one
    width, height = (int(length * side / max(image.size) + 0.5) for length in image.size)
    values = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    images = np.zeros((1, 3, side, side), np.float32)
    normalized = (values - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    images[0, :, :height, :width] = normalized.transpose(2, 0, 1)
    (embeddings,) = encoder.run(["embeddings"], {"images": images})

    corners = box * (width / image.width, height / image.height)
    prompts = {"point_coords": corners[None].astype(np.float32), "point_labels": np.array([[2, 3]], np.float32)}
    masks, iou = decoder.run(["masks", "iou"], {"embeddings": embeddings, **prompts})
    logits = Image.fromarray(masks[0, 0]).resize((side, side), Image.Resampling.BILINEAR)  # the first is a box's
    logits = logits.crop((0, 0, width, height)).resize(image.size, Image.Resampling.BILINEAR)
    Image.fromarray((np.asarray(logits) > 0).astype(np.uint8) * 255).save(out, "PNG")
    print(f"predicted IoU {iou[0, 0]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 9:
        sys.exit("usage: segment.py ENCODER.onnx DECODER.onnx PICTURE X0 Y0 X1 Y1 MASK.png")
    try:
        main(*sys.argv[1:])
    except Exception as error:  # onnxruntime's, Pillow's, or a file's of another origin
        sys.exit(f"error: {' '.join(str(error).split())}")
