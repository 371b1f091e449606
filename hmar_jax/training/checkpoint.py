"""state ⇄ work directory: asynchronous Orbax checkpoints, the newest few kept, the newest whole one restored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hmar_jax.config import TrainConfig, from_plain, to_plain
from hmar_jax.errors import InputError, reason
from hmar_jax.failures import explain, explained
from hmar_jax.files import check_refusal, local_path, writing
from hmar_jax.tokenizer.quantizer import recorded_phis
from hmar_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a work directory, under `checkpoints/<steps done>`.

    One holds the `TrainState`, the data iterator's state and the train config. Orbax writes under a temporary name and
    renames, so that a run that is killed leaves whole checkpoints only.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        """Opens them.

        Args:
          keep: how many of the newest to keep, and that this is the run that writes them: what a killed one left half
            is removed. None only reads, perhaps while another process writes.
        """
        self.folder = local_path(workdir, "workdir").absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=keep is not None
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saving: int | None = None

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: TrainConfig) -> None:
        """Starts to save; returns while the files are still being written. No-op where `step` is saved already."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(to_plain(config))
        )
        self.wait()  # for the save before this one, so that its failure is known for its own
        self._saving = step
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when all that was started is on disk."""
        self._guard(self._manager.wait_until_finished)

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint: the state, laid out like the tree of shapes and shardings `like`; the data state."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        restored = self._read(items)
        return restored["state"], restored["data"]

    def config(self) -> TrainConfig:
        """The train config of the newest checkpoint."""
        values = self._read(ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        config = from_plain(TrainConfig, values)
        if config.stage != "tokenizer":
            return config
        recorded = "phi_of_scale" in values["tokenizer"]
        tokenizer = recorded_phis(config.tokenizer, len(config.sides), recorded=recorded)
        return dataclasses.replace(config, tokenizer=tokenizer)

    def position(self) -> dict[str, Any]:
        """What `data` was at the newest checkpoint."""
        return self._read(ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def close(self) -> None:
        """Waits, and releases the manager's threads."""
        self._guard(self._manager.close)

    def _read(self, items: ocp.args.Composite) -> Any:
        step = self.latest()
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise whatever the damage brings about
            if "structures do not match" in str(error) or "stored shape" in str(error):
                raise InputError(
                    f"Checkpoint {self.folder / str(step)} was saved under a config with other parameters or another "
                    "optimizer; go on with that config, or choose another --workdir."
                ) from error
            what = f"Checkpoint {self.folder / str(step)}"
            check_refusal(what, error)
            if known := explain(error, f"{what} could not be read"):
                raise known from error
            others = [s for s in self._manager.all_steps() if s != step]
            after = f"resume from step {max(others)}" if others else "start anew"
            raise InputError(
                f"Checkpoint {self.folder / str(step)} cannot be read ({reason(error)}); remove that folder to {after}."
            ) from error

    def _guard(self, write: Callable[[], Any]) -> None:
        """Calls `write`; what the disk, the memory or another process does to it becomes a sentence."""
        path, after = self.folder / str(self._saving), "Training resumes from the newest whole checkpoint."
        with writing(path), explained(f"Could not save checkpoint {path}", after=after):
            write()


def describe(state: TrainState) -> Any:
    """Shapes, dtypes and shardings of a state, as `restore` wants them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


__all__ = ["Checkpoints", "describe"]
