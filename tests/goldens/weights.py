"""Deterministic weights for the reference outputs in this folder.

`hmar_tiny.npz` and `var_tiny.npz` hold what the official PyTorch code gave on small random models, in float32 on a
CPU: sides (1,2,3,4), V=64, Z=8, a tokenizer of 32 channels for 64x64 pictures (NCHW there), transformers of depth 4 and
width 256 with 2 branch blocks, 10 classes, batch 3. None of it is a trained weight. Each `*_manifest` lists parameter
names and shapes; the other keys are the models' outputs: tokens, latents, pictures, logits, greedy generations.

`make_state_dict(manifest)` gives a PyTorch-layout state dict (name -> float32 array) from a `*_manifest` array of a
`.npz` here, whose entries read "name|d0,d1,...". The reference models were filled with exactly these values, so a
converter that reads this state dict must give the recorded outputs.
"""

import math
import zlib

import numpy as np


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter, float32, from its name and shape alone."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("scale_mul_1H11"):
        return np.float32(math.log(4.0)) + np.float32(0.1) * noise
    if name.endswith("quantize.embedding.weight"):
        return noise
    if ".ada_lin." in name or name.startswith("shared_ada_lin"):
        return noise * np.float32(0.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1)
    if name.endswith("norm.weight") or any(n in name for n in ("norm1.weight", "norm2.weight", "norm_out.weight")):
        return 1 + np.float32(0.1) * noise
    if name.endswith("weight") and len(shape) == 4:
        return noise / np.float32(math.sqrt(shape[1] * shape[2] * shape[3]))
    if name.endswith("weight") and len(shape) == 2:
        embedding = ("embed" in name or "class_emb" in name) and "word" not in name
        return noise * np.float32(0.5 if embedding else 1 / math.sqrt(shape[1]))
    if name.endswith("bias"):
        return np.float32(0.1) * noise
    return np.float32(0.5) * noise


def make_state_dict(manifest: np.ndarray) -> dict[str, np.ndarray]:
    """All parameters of a `*_manifest` array."""
    state = {}
    for entry in manifest.tolist():
        name, dims = entry.split("|")
        state[name] = np.asarray(make_weight(name, tuple(int(d) for d in dims.split(","))), np.float32)
    return state


def make_image(batch: int, size: int) -> np.ndarray:
    """The picture the reference encoded: (batch, 3, size, size), float32 in [-1, 1]."""
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    images = [
        np.stack([np.sin((3 + b) * x + 2 * y * c) * np.cos((2 + c) * y - b * x * y) for c in (0, 1, 2)])
        for b in range(batch)
    ]
    return np.stack(images).astype(np.float32)
