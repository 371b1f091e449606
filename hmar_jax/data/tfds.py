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
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from hmar_jax.data.picture_files import decode
from hmar_jax.errors import InputError, reason
from hmar_jax.files import check_refusal, local_path


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
        builder = _builder(name, path)
        features = builder.info.features
        features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
        image, label = features.get("image"), features.get("label")
        if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
            raise InputError(
                f"TFDS dataset {name!r} has {', '.join(features) or 'one feature'}, not an 'image' and a class "
                "'label'; use another."
            )
        if image.np_dtype != np.uint8:
            raise InputError(
                f"TFDS dataset {name!r} has {image.np_dtype.__name__} images; only uint8 ones can be used."
            )
        try:
            # The encoded bytes: `decode` treats grey, transparent and broken pictures as it does those in folders.
            self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise InputError(
                f"TFDS dataset {name!r} is prepared as {builder.info.file_format.value}, which only TensorFlow reads; "
                f"run `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record`."
            ) from None
        except Exception as error:  # a bad split, a missing shard: TFDS has no exceptions of its own for them
            check_refusal(f"TFDS dataset {name!r}", error)
            raise InputError(
                f"Split {split!r} of TFDS dataset {name!r} cannot be read ({reason(error)}); "
                f"it has {', '.join(builder.info.splits)}, each also in part, such as 'train[:95%]'."
            ) from error
        self.class_names: tuple[str, ...] = tuple(label.names or map(str, range(label.num_classes)))

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
            record = self._records[index]
        except Exception as error:
            check_refusal(where, error)
            raise InputError(f"{where} cannot be read ({reason(error)}); prepare the dataset again.") from error
        if record["label"] < 0:
            raise InputError(
                f"{where} has label {record['label']}, that is none; use a split with labels, such as 'train'."
            )
        return {"image": decode(io.BytesIO(record["image"]), where), "label": np.int32(record["label"])}

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, self._arguments  # a worker process opens its own


def _builder(name: str, path: str) -> Any:
    try:
        builder = tfds.builder(name, data_dir=path or None)
    except tfds.core.DatasetNotFoundError:
        raise InputError(
            f"TFDS has no dataset {name!r}, nor is one in {path or 'its data directory'!r}; check data.name."
        ) from None
    except Exception as error:
        check_refusal(f"TFDS dataset {name!r}", error)
        raise InputError(
            f"TFDS cannot open dataset {name!r} ({reason(error)}); check data.name and data.path."
        ) from error
    if not builder.info.initialized:
        manual = " --manual_dir=FOLDER_OF_THE_DOWNLOADED_FILES" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise InputError(
            f"TFDS dataset {name!r} is not prepared in {str(builder.data_dir)!r}; with TensorFlow installed, run "
            f"`tfds build {name} --file_format=array_record{manual}{f' --data_dir={path}' if path else ''}`."
        )
    return builder
