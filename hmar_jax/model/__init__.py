"""config + parameters → Model, which draws and edits pictures: what users hold."""

from hmar_jax.model.drawing import Event
from hmar_jax.model.loading import from_pretrained
from hmar_jax.model.model import Model
from hmar_jax.model.sample import DrawRecord, Sample

__all__ = ["DrawRecord", "Event", "Model", "Sample", "from_pretrained"]
