"""Kinds of options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from hmar_jax.files import local_path


class LocalPath(argparse.Action):
    """An option that is a path of this machine: `add_argument("--output", action=LocalPath)` gives a `Path`.

    An action and not a `type`, because argparse would turn the sentence of a `type`'s error into one of its own.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, local_path(values, option_string or self.dest))
