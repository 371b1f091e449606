"""state ⇄ work directory: asynchronous Orbax checkpoints, the newest few kept, the newest whole one restored."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from hmar_jax.config import TrainConfig
from hmar_jax.config.plain import from_plain, to_plain
from hmar_jax.errors import HmarError, InputError, reason, shown
from hmar_jax.failures import explain, explained
from hmar_jax.files import check_refusal, check_regular, json_files, local_path, writing
from hmar_jax.tokenizer.quantizer import recorded_phis
from hmar_jax.training import digests
from hmar_jax.training.state import TrainState

logger = logging.getLogger(__name__)


_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, of a checkpoint
_MOST_METADATA = 2**26  # bytes of a file that has no values of arrays, and that Orbax reads into memory
_POSITION = {"examples": int, "class_names": list, "start": str}  # what `data` of a checkpoint has


class Checkpoints:
    """The checkpoints of a work directory, under `checkpoints/<steps done>`.

    One holds the `TrainState`, the data iterator's state, the train config and, since they are recorded, the digests of
    these three. Orbax writes under a temporary name and renames, so that a run that is killed leaves whole checkpoints
    only.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        """Opens them.

        Args:
          keep: how many of the newest to keep, and that this is the run that writes them: what a killed one left half
            is removed. None only reads, perhaps while another process writes.

        Raises:
          InputError: what Orbax recorded of one of them is damaged.
        """
        self.folder = local_path(workdir, "workdir").absolute() / "checkpoints"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder; remove it, or choose another --workdir.")
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=keep is not None
        )
        for step in self._folders():
            with self._naming(step):
                self._check_metadata(step)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # it reads the metadata of all
            if known := explain(error, f"{self.folder} could not be opened"):
                raise known from error
            raise InputError(
                f"The checkpoints in {self.folder} cannot be read, as {_METADATA} of one of them is damaged "
                f"({reason(error)}); remove that checkpoint."
            ) from error

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: TrainConfig) -> None:
        """Starts to save; returns while the files are still being written. No-op where `step` is saved already."""
        if step in self._manager.all_steps():
            return
        plain = to_plain(config)
        recorded = {
            "state": digests.of_arrays(state), "data": digests.of_value(data), "config": digests.of_value(plain)
        }  # fmt: skip
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(plain),
            digests=ocp.args.JsonSave(recorded),
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
        """The newest checkpoint: the state, laid out like the tree of shapes and shardings `like`; the data state.

        Raises:
          InputError: it is of another config, is damaged, or gives back other values than were saved.
        """
        with self._reading() as step:
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
            digest = self._digest("state")
            if digest is not None and digest != digests.of_arrays(state):
                raise ValueError("an array is not what was saved")
            if int(state.step) != step:
                raise ValueError(f"it is the checkpoint of step {int(state.step)}")
            return state, self._json("data")

    def config(self) -> TrainConfig:
        """The train config of the newest checkpoint."""
        with self._reading():
            values = self._json("config")
            config = from_plain(TrainConfig, values)
            if config.stage != "tokenizer":
                return config
            recorded = "phi_of_scale" in values["tokenizer"]
            tokenizer = recorded_phis(config.tokenizer, len(config.sides), recorded=recorded)
            return dataclasses.replace(config, tokenizer=tokenizer)

    def position(self) -> dict[str, Any]:
        """What `data` was at the newest checkpoint."""
        with self._reading():
            data = self._json("data")
            for name, kind in _POSITION.items():
                if type(data.get(name)) is not kind or (kind is int and data[name] < 0):
                    raise ValueError(f"its data has {name}={shown(data.get(name))}")
            if not all(isinstance(name, str) for name in data["class_names"]):
                raise ValueError(f"its data has class_names={shown(data['class_names'])}")
            return data

    def close(self) -> None:
        """Waits, and releases the manager's threads."""
        self._guard(self._manager.close)

    def _json(self, item: str) -> dict[str, Any]:
        """An item of the newest checkpoint that is a JSON object. Raises ValueError where it is not what was saved."""
        value = self._manager.restore(self.latest(), args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        if not isinstance(value, dict):
            raise ValueError(f"its {item} is {shown(value)}")
        if item != "digests" and (digest := self._digest(item)) is not None and digest != digests.of_value(value):
            raise ValueError(f"its {item} is not what was saved")
        return value

    def _digest(self, item: str) -> Any:
        """What is recorded of an item of the newest checkpoint; None in one from before digests were."""
        if not (self.folder / str(self.latest()) / "digests").is_dir():
            return None
        return self._json("digests")[item]

    def _folders(self) -> list[int]:
        """The steps whose checkpoints are there."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [int(name) for name in names if name.isascii() and name.isdigit() and (self.folder / name).is_dir()]

    def _check_metadata(self, step: int) -> None:
        """Raises where Orbax's record of a checkpoint is there and none; it reads it without looking."""
        with contextlib.suppress(FileNotFoundError):
            file = self.folder / str(step) / _METADATA
            if not isinstance(json_files.read(file, "Metadata", "remove it"), dict):
                raise ValueError(f"{_METADATA} is no JSON object")

    def _check_files(self, step: int | None) -> None:
        """Raises where a checkpoint has something else than files, which might be waited for, or far too large ones."""
        seen = set()  # links may go in circles
        for folder, inner, names in os.walk(self.folder / str(step), followlinks=True):
            seen.add(os.path.realpath(folder))
            inner[:] = [name for name in inner if os.path.realpath(Path(folder, name)) not in seen]
            for file in (Path(folder, name) for name in names):
                check_regular(file, f"Checkpoint {self.folder / str(step)} could not be read: file")
                if not folder.endswith("/d") and file.stat().st_size > _MOST_METADATA:
                    raise ValueError(f"{file.name} is larger than {_MOST_METADATA // 2**20} MiB")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[int | None]:
        """Checks the files of the newest checkpoint; turns what goes wrong in the block into a sentence."""
        with self._naming(self.latest()) as step:
            self._check_files(step)
            yield step

    @contextlib.contextmanager
    def _naming(self, step: int | None) -> Iterator[int | None]:
        """Turns what goes wrong in the block with a checkpoint into a sentence that names it, and what to do."""
        what = f"Checkpoint {self.folder / str(step)}"
        try:
            yield step
        except Exception as error:  # Orbax and TensorStore raise whatever the damage brings about
            if "structures do not match" in str(error) or "stored shape" in str(error):
                raise InputError(
                    f"{what} was saved under a config with other parameters or another optimizer; go on with that "
                    "config, or choose another --workdir."
                ) from error
            if isinstance(error, HmarError) and str(error).startswith(what):
                raise
            check_refusal(what, error)
            if known := explain(error, f"{what} could not be read"):
                raise known from error
            others = [s for s in self._folders() if s != step]
            after = f"resume from step {max(others)}" if others else "start anew"
            why = reason(error).partition(". See full TensorStore")[0]  # Orbax adds a method's repr
            raise InputError(f"{what} cannot be read ({why}); remove that folder to {after}.") from error

    def _guard(self, write: Callable[[], Any]) -> None:
        """Calls `write`; what the disk, the memory or another process does to it becomes a sentence."""
        path, after = self.folder / str(self._saving), "Training resumes from the newest whole checkpoint."
        with writing(path), explained(f"Could not save checkpoint {path}", after=after):
            write()
