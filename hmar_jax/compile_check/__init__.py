"""train config, device topology → whether it fits there, and how fast it could be: compiled for devices not here."""

# To be set before JAX is imported. Whatever devices this machine has are left alone: libtpu neither looks for TPUs nor
# minds that another process uses them, and JAX's CUDA plugin does not look for a driver.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
