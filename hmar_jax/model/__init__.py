"""config + parameters → Model, which draws and edits pictures: what users hold."""

from hmar_jax.model.model import DrawRecord, Model, Sample, from_pretrained

__all__ = ["DrawRecord", "Model", "Sample", "from_pretrained"]
