"""Triton without a GPU: kernels interpreted on the arrays of JAX, and compiled for cards that are not here.

Triton decides when it is imported whether to interpret, so that a process of its own does that. The interpreter is
wrong for bfloat16, whose bits it multiplies.
"""

import concurrent.futures
import contextlib
import multiprocessing
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import devices


class Tensor:
    """What Triton's interpreter wants of a PyTorch tensor, of a NumPy array; it works on the array itself."""

    def __init__(self, array=None):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return Tensor()

    def set_(self, storage, *_):
        self.array = storage.array

    def copy_(self, _):
        """Both are the same memory."""


def interpreted_call(*arrays, kernel, out_shape, grid, spec, input_output_aliases=None, **_):
    """`jax_triton.triton_call` in Triton's interpreter, whatever is not written not a number."""

    def run(*arrays):
        arrays = [np.array(x) for x in arrays]
        outputs = [np.full(x.shape, np.nan, x.dtype) for x in out_shape]
        for i, o in (input_output_aliases or {}).items():
            outputs[o] = arrays[i]
        kernel[grid](*map(Tensor, arrays), *map(Tensor, outputs), spec=spec)
        return outputs

    return jax.pure_callback(run, out_shape, *arrays)


def interpret(function, *arguments):
    """Calls a function of a test module with the kernels interpreted."""
    from triton.runtime import interpreter

    if devices.triton_call is not interpreted_call:
        devices.triton_call = interpreted_call
        patch = interpreter._patch_lang_tensor

        def patch_with_index(tensor, scope):  # NumPy 2.5 makes no number of an array of one, as Triton 3.6 wants
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_with_index
        for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
            take_masks_of_numbers(interpreter.InterpreterBuilder, name, place)
    return jax.tree.map(np.asarray, function(*arguments))


def take_masks_of_numbers(builder, name, place):
    """Triton 3.9 refuses the int32 masks that its interpreter makes of a comparison of scalars joined to a block."""
    access = getattr(builder, name)

    def with_bool(self, *operands):
        operands[place].data = operands[place].data.astype(bool)
        return access(self, *operands)

    setattr(builder, name, with_bool)


@contextlib.contextmanager
def interpreter():
    """(function of a test module, its arguments) → its result, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the process, which starts with its first call
        yield lambda *call: pool.submit(interpret, *call).result()


SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


def compile_kernel(kernel, capability, dtype, spec, others, **options):
    """What Triton makes of a kernel: its PTX, machine code, needs of shared memory.

    Args:
      capability: such as 80. others: name → dtype of the arrays that are not of `dtype`. options: warps and stages.
    """
    import triton

    dtypes = dict.fromkeys(kernel.arg_names[:-1], dtype) | {k: v for k, v in others.items() if k in kernel.arg_names}
    signature = {name: f"*{SHORT_NAMES[dtype]}" for name, dtype in dtypes.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}  # as jax_triton says of all arrays
    source = triton.compiler.ASTSource(kernel, signature | {"spec": "constexpr"}, {"spec": spec}, aligned)
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
        options["enable_fp_fusion"] = devices.FP_FUSION
        return triton.compile(source, triton.backends.compiler.GPUTarget("cuda", capability, 32), options)


def spilled_bytes(compiled, folder):
    """Of a thread's registers, into memory."""
    import triton

    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
    [spilled] = re.findall(r"STACK:(\d+)", usage)
    return int(spilled)
