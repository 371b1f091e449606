"""How the files beside this were made, by PyTorch 2.13.0: every kind of tensor that a checkpoint may hold."""

import sys
import warnings

import numpy as np
import torch

warnings.simplefilter("ignore")  # of quantised tensors, which PyTorch is to drop
t, count = torch, torch.arange(24, dtype=torch.float32)
tagged = t.nn.Parameter(count[:2].clone())
tagged.tag = "kept beside a tensor"
MORE = {
    "complex": t.ones(2, dtype=t.complex64),
    "quantised": t.quantize_per_tensor(t.ones(3), 0.1, 0, t.qint8),
    "sparse": t.eye(3).to_sparse(),
    "meta": t.ones(3, device="meta"),
}
CONTENT = {
    "float32": count[:6].clone().view(2, 3),
    "float64": count[:2].double(),
    "float16": count[:3].half(),
    "bfloat16": count[:3].bfloat16(),
    "int64": t.arange(3),
    "bool": t.tensor([True, False]),
    "parameter": t.nn.Parameter(count[:2].clone()),
    "tagged": tagged,
    "buffer": t.nn.Buffer(count[:3].clone()),
    "first": count[:12].view(3, 4),
    "transposed": count[12:].view(3, 4).t(),
    "strided": count[1::2],
    "scalar": t.tensor(1.5),
    "empty": t.zeros(0, 3),
    "expanded": t.ones(1).expand(4),
    "nested": {"model": t.nn.Linear(2, 3).state_dict(), 7: count[:1].clone()},
    "array": np.arange(6.0).reshape(2, 3),
    "beside": [np.float32(2), t.Size([1, 2]), t.float32, t.device("cpu"), t.strided, {1, 2}, 10**30, -1, None, b"x"],
} | MORE
CONTENT["nested"]["model"]["weight"].copy_(count[:6].view(3, 2))
CONTENT["nested"]["model"]["bias"].copy_(count[:3])

folder = sys.argv[1]
old = dict(CONTENT)
CONTENT |= {"float8": t.ones(2).to(t.float8_e4m3fn), "uint16": t.ones(2, dtype=t.uint16)}  # which the old format lacks
t.save(CONTENT, f"{folder}/zip.pth")
t.save(CONTENT, f"{folder}/protocol4.pth", pickle_protocol=4)
t.save(old, f"{folder}/old.pth", _use_new_zipfile_serialization=False)
