"""Flags of XLA's compilers, in one place, and where compiled programs are kept: to be set before JAX starts.

Of flags, only those are here that let devices exchange and compute at a time, and one that programs bring along. The
rest stays as XLA has it: on GPUs it times cuBLAS's ways for each matrix product, and launches kernels as CUDA graphs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from hmar_jax.errors import HmarError, MachineError, TransientError, reason

# Environment variable → flags. XLA aborts where it does not know one; the tests compile with all of them.
FLAGS = {
    # Sends gradients and parameters while something is computed (JAX's GPU performance tips).
    "XLA_FLAGS": ("--xla_gpu_enable_latency_hiding_scheduler=true",),
    # The same on TPUs: collectives run beside fusions, over several of them, and small all-reduces are joined.
    "LIBTPU_INIT_ARGS": (
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
}

# For `jax.jit` of the sampler and the train step, however JAX was started. Where XLA may write products in Triton, it
# leaves biases and GELU to kernels of their own, which cuBLAS adds on its way out, and compiles for longer.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_disable_hlo_passes": "cublas-pad-for-gemms"}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags to the environment; one that is there already keeps its value."""
    for variable, flags in FLAGS.items():
        present = environment.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in present}
        environment[variable] = " ".join([*(f for f in flags if f.partition("=")[0] not in names), *present])


@contextlib.contextmanager
def naming_absent_platforms(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Makes one sentence of it where JAX, in the block, cannot start on what JAX_PLATFORMS names.

    Raises:
      MachineError: it is not there, or what JAX needs for it is not. TransientError: another process has it.
    """
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        asked, refusal = environment.get("JAX_PLATFORMS"), _refusal(error)
        if not asked or not refusal:
            raise
        kind = TransientError if "in use" in refusal else MachineError
        raise kind(
            f"JAX cannot start on JAX_PLATFORMS={asked} ({refusal}); see that the device and the package for it are "
            "here (`pip install -c constraints.txt -e '.[cuda]'`, or tpu), or unset JAX_PLATFORMS to have JAX choose."
        ) from None


def _refusal(error: Exception) -> str:
    """Why JAX cannot start, if that is what an error says; empty otherwise."""
    if isinstance(error, HmarError) or "jax" not in sys.modules:
        return ""
    if "Unable to initialize backend" in str(error):
        return reason(error)
    if str(error) or not isinstance(error, AssertionError):
        return ""
    try:  # without a plugin for it, JAX 0.11 and 0.12 fail in an assertion that says nothing, again if asked again
        sys.modules["jax"].devices()
    except (AssertionError, RuntimeError):
        return "it has no plugin for that, or one that fails"
    return ""


# JAX's variable for the directory of compiled programs; set but empty, it keeps none.
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def use_compilation_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps compiled programs in $XDG_CACHE_HOME/hmar-jax/xla, by default ~/.cache/hmar-jax/xla.

    Does nothing where JAX has been told of a directory already, by JAX_COMPILATION_CACHE_DIR or its config, or where
    this one cannot be written or is not the user's alone: what is in it runs on this machine. JAX knows which program
    is whose: its keys tell versions, flags and machines apart.
    """
    place = _place(environment)
    if _CACHE in environment or place is None or not _is_ours_alone(place):
        return
    if "jax" not in sys.modules:
        environment[_CACHE] = str(place)
    elif sys.modules["jax"].config.jax_compilation_cache_dir is None:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", str(place))


def _is_ours_alone(place: Path) -> bool:
    """Whether a directory, made if need be, is this user's, and only they may look into it and write it.

    Of one that is theirs already, the permissions are set so. The directory around it must be theirs as well, since
    who may write that can put another in its place.
    """
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (place.parent, place):
            status = os.stat(folder)
            if status.st_uid != os.geteuid():
                return False
            if stat.S_IMODE(status.st_mode) != 0o700:
                os.chmod(folder, 0o700)
    except OSError:
        return False
    return os.access(place, os.W_OK | os.X_OK)


def leave_compilation_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Takes `use_compilation_cache` back, in a job of several processes and before anything is compiled.

    They may not share that directory, and then one would find a program while the others compile it. On GPUs XLA shares
    out the timing of kernels among the processes that compile, so that those would wait for the one that does not.
    """
    import jax

    if jax.config.jax_compilation_cache_dir == str(_place(environment)):
        jax.config.update("jax_compilation_cache_dir", None)


def _place(environment: MutableMapping[str, str]) -> Path | None:
    """The directory, or None where there is no home to have it in."""
    try:
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmar-jax" / "xla"
    except RuntimeError:
        return None
