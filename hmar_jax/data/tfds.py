"""TFDS name and split → (image, label) examples, by random access and without TensorFlow.

Reading needs the dataset prepared as array_record. Preparing is TFDS's own work and wants TensorFlow, which is best put
in an environment of its own (`pip install tensorflow tensorflow-datasets array-record`). For ImageNet, register at
image-net.org, download `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar` into one folder, unpack neither, run

    tfds build imagenet2012 --file_format=array_record --manual_dir=FOLDER --data_dir=DATA

and set `data.source="tfds"`, `data.name="imagenet2012"`, `data.path="DATA"`. Its class names are WordNet ids, such as
n01440764. What is prepared as tfrecord already can be converted:

    tfds convert_format --dataset_version_dir=DATA/imagenet2012/5.1.0 --out_file_format=array_record

Axis letters: H, W height and width of the picture as it is stored.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from hmar_jax.data.picture_files import decode
from hmar_jax.data.tfds_files import REMEDY, check_files, class_names, dataset_folder
from hmar_jax.errors import HmarError, InputError, printable, reason, shown
from hmar_jax.files import check_refusal, check_regular, local_path


class TfdsSource:
    """The examples of a prepared TFDS dataset that has an image and a label.

    Args:
      name: as TFDS spells it, e.g. `imagenet2012`, `cifar10` or `name/config:version`.
      path: TFDS data directory; empty for TFDS's default, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      split: e.g. `train` or `train[:95%]`.

    Raises:
      InputError: no such dataset or split, not prepared, prepared as tfrecord, or without image and label.
    """

    def __init__(self, name: str, path: str = "", split: str = "train") -> None:
        path = str(local_path(path, "data.path")) if path else ""
        self._arguments = name, path, split
        builder = _builder(name, dataset_folder(name, path))
        features = builder.info.features
        features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
        image, label = features.get("image"), features.get("label")
        if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
            named = printable(", ".join(features), 100) or "one feature"
            raise InputError(f"TFDS dataset {name!r} has {named}, not an 'image' and a class 'label'; use another.")
        if image.np_dtype != np.uint8:
            raise InputError(
                f"TFDS dataset {name!r} has {image.np_dtype.__name__} images; only uint8 ones can be used."
            )
        formats = {kept.value for kept in builder.info.available_file_formats()}
        if "array_record" not in formats:
            raise InputError(
                f"TFDS dataset {name!r} is prepared as {' and '.join(sorted(formats))}, which is not read here; "
                f"run `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record`."
            )
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._records = builder.as_data_source(split, file_format="array_record", deserialize_method=raw)
            _check_shards(builder, split)  # no file is opened before an example is asked for
        except HmarError:
            raise
        except Exception as error:  # a bad split, a missing shard: TFDS has no exceptions of its own for them
            check_refusal(f"TFDS dataset {name!r}", error)
            raise InputError(
                f"Split {split!r} of TFDS dataset {name!r} cannot be read ({reason(error)}); "
                f"it has {printable(', '.join(builder.info.splits), 100)}, each also in part, such as 'train[:95%]'."
            ) from error
        # Other features are left alone: TFDS would have Pillow open pictures among them in any format.
        self._features = tfds.features.FeaturesDict({"image": image, "label": label})
        self.class_names = class_names(Path(builder.data_dir), label.num_classes or 0)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """The number of an example in its split."""
        return str(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`: "image" (H,W,3) uint8; "label" int32. Raises InputError if it cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        name, _, split = self._arguments
        where = f"Example {index} of {name!r}, split {split!r},"
        try:
            # The encoded bytes: `decode` treats grey, transparent and broken pictures as it does those in folders.
            skip = {"image": tfds.decode.SkipDecoding()}
            record = self._features.deserialize_example_np(self._records[index], decoders=skip)
        except Exception as error:
            check_refusal(where, error)
            raise InputError(f"{where} cannot be read ({reason(error)}); prepare the dataset again.") from error
        if not 0 <= record["label"] < len(self.class_names):
            raise InputError(
                f"{where} has label {record['label']}, that is none; use a split with labels, such as 'train'."
            )
        return {"image": decode(io.BytesIO(record["image"]), where), "label": np.int32(record["label"])}

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, self._arguments  # a worker process opens its own


def _builder(name: str, folder: Path) -> Any:
    """TFDS's reader of a prepared dataset: never the dataset's own code, and only classes of TFDS itself."""
    check_files(folder)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        check_refusal(f"TFDS dataset {name!r}", error)
        raise InputError(
            f"TFDS cannot open dataset {name!r} ({reason(error)}); check data.name and data.path."
        ) from error


def _check_shards(builder: Any, split: str) -> None:
    """Raises InputError unless the files of a split are in the dataset's folder, with as many examples as it says."""
    for instruction in builder.info.splits[split].file_instructions:
        file = Path(instruction.filename)
        if file.parent != Path(builder.data_dir):
            raise InputError(f"Dataset {builder.name!r} has a file {shown(str(file))} elsewhere; {REMEDY}.")
        check_regular(file, "File")
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        reader.close()
        if count != instruction.examples_in_shard:
            raise InputError(f"File {str(file)!r} has {count} examples, not {instruction.examples_in_shard}; {REMEDY}.")
