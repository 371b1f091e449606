"""Hugging Face hub id → local directory, downloaded once: what the hub and the network refuse → one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hmar_jax.errors import InputError, reason, shown


def is_hub_id(text: str) -> bool:
    """Whether this could be `someone/model`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of a hub repository's files, in the cache that huggingface_hub keeps; what is there stays.

    Args:
      revision: branch, tag or commit. files: to have; all of them must be there.

    Raises:
      InputError: huggingface_hub is not installed, or the files are not to be had.
    """
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise InputError(f"revision is {shown(revision)}; expected a branch, a tag or a commit of {hub_id}.")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise InputError(
            f"{hub_id} is not a directory here; to have it from the Hugging Face hub, `pip install huggingface_hub`."
        ) from None
    # Of HTTPError, the base class of its HTTP client, not all are OSErrors.
    refusals: dict[type[Exception], str] = {
        errors.RevisionNotFoundError: "there is no such revision",
        errors.GatedRepoError: "it is gated: accept its terms there, then `hf auth login`",
        errors.RepositoryNotFoundError: "there is none of this name, or a private one: `hf auth login`",
        errors.LocalEntryNotFoundError: "the hub cannot be asked, and it is not in the cache",
    }
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError, errors.HTTPError) as error:
        known = next((why for kind, why in refusals.items() if isinstance(error, kind)), None)
        at = f" at revision {shown(revision)}" if revision else ""
        raise InputError(
            f"{hub_id} is neither a directory here nor a model to be had from the hub{at} "
            f"({known or reason(error)}); check the name, and the connection."
        ) from None
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise InputError(f"{hub_id} on the hub is no model of HMAR-JAX: it has no {' and no '.join(absent)}.")
    return folder
