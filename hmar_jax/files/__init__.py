"""Paths as users write them → paths of this machine; bytes → files that appear whole or not at all.

paths         `~`, URLs, regular files
outputs       what may be written, checked before the work
whole_files   writing and replacing
refusals      what the disk refuses, as a sentence
json_files    JSON from anywhere
lock          who works in a folder
"""

from hmar_jax.files.outputs import check_files, check_folder, check_kind, check_outputs, check_pictures, note_replaced
from hmar_jax.files.paths import (
    check_readable,
    check_regular,
    is_there,
    local_path,
    open_regular,
    read_bytes,
    same_file,
)
from hmar_jax.files.refusals import (
    check_refusal,
    reading,
    refusal,
    refused_by_disk,
    writing,
)
from hmar_jax.files.whole_files import put_back, put_in_place, remove, swap_in, write_whole, written_whole

__all__ = [
    "check_files", "check_folder", "check_kind", "check_outputs", "check_pictures", "check_readable",
    "check_refusal", "check_regular", "is_there", "local_path", "note_replaced", "open_regular", "put_back",
    "put_in_place", "read_bytes", "reading", "refusal", "refused_by_disk", "remove", "same_file",
    "swap_in", "write_whole", "writing", "written_whole",
]  # fmt: skip
