"""Classify an image with a vision transformer, untouched and optimized.

python examples/images.py photo.jpg [MODEL]
"""

import sys
import time

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import llmkern

name = sys.argv[2] if len(sys.argv) > 2 else "google/vit-base-patch16-224"
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForImageClassification.from_pretrained(name).eval()
pixels = processor([Image.open(sys.argv[1]).convert("RGB")] * 8, return_tensors="pt").pixel_values


@torch.no_grad()
def classify() -> tuple[str, float]:
    """The most likely label, and how many images were classified in a second; the first call only warms up."""
    for _ in range(2):
        start = time.perf_counter()
        logits = model(pixels).logits
        seconds = time.perf_counter() - start
    return model.config.id2label[int(logits[0].argmax())], len(pixels) / seconds


label, untouched = classify()
llmkern.optimize_(model, on_unsupported="ignore")
print(llmkern.report(model))
label, optimized = classify()
print(label)
print(f"untouched {untouched:.1f} images/s, optimized {optimized:.1f} images/s")
