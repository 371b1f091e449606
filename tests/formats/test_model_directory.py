"""Model directories: back bit for bit, whole or not at all, one sentence for every kind of damage."""

import hashlib
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from official_files import listing, rewrite
from tiny_models import TINY, fingerprint, lively_model, tiny

from hmar_jax import InputError, from_pretrained
from hmar_jax import params as trees
from hmar_jax.formats.model_directory import open_model, read_config, write_model
from hmar_jax.formats.safetensors_files import Tensor
from hmar_jax.model import Model

FILES = ["README.md", "config.json", "model.safetensors"]


def in_half_precision(model):
    """The model with its matrices in bfloat16, the rest in float32."""
    flat = trees.flatten(model.params)
    halved = {name: leaf.astype(jnp.bfloat16) if name.endswith("kernel") else leaf for name, leaf in flat.items()}
    return Model(model.config, trees.unflatten(halved))


@pytest.mark.parametrize(
    "make",
    [
        lambda model, stage1: model,
        lambda model, stage1: stage1,
        lambda model, stage1: lively_model(tiny(shared_adaln=True, masked=False, pattern="block_causal")),
        lambda model, stage1: Model(
            TINY.__class__(TINY.ladder, TINY.tokenizer), {"tokenizer": model.params["tokenizer"]}
        ),
        lambda model, stage1: in_half_precision(model),
    ],
    ids=["hmar", "stage 1", "var shared adaln", "tokenizer alone", "hmar of two types"],
)
def test_a_saved_model_comes_back_bit_for_bit(model, stage1_model, tmp_path, make):
    original = make(model, stage1_model)
    loaded = from_pretrained(original.save(tmp_path / "deep" / "model", source="x"))
    assert loaded.config == original.config
    before, after = trees.flatten(original.params), trees.flatten(loaded.params)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype
        np.testing.assert_array_equal(leaf, after[name])
    assert listing(tmp_path / "deep") == ["model", *(f"model/{name}" for name in FILES)]


def test_the_config_file_says_where_the_weights_come_from(saved, model):
    config, meta = read_config(saved)
    assert config == model.config
    assert (meta["source"], meta["licences"], meta["layout"]) == ("made by a test", [], "")
    assert meta["sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert meta["tokenizer_sha256"] == fingerprint(model)


def test_the_config_file_says_what_binds_the_weights(model, tmp_path):
    flat = {
        name: Tensor(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: [np.asarray(leaf)])
        for name, leaf in trees.flatten(model.params).items()
    }
    licences = ["Not for sale.", "Nor for „Füchse“."]
    path = write_model(tmp_path / "model", TINY, flat, source="elsewhere", licences=licences, layout="hmar")
    meta = read_config(path)[1]
    assert (meta["source"], meta["licences"], meta["layout"]) == ("elsewhere", licences, "hmar")
    loaded = from_pretrained(path)
    assert read_config(loaded.save(tmp_path / "again"))[1] == meta
    assert read_config(pickle.loads(pickle.dumps(loaded)).save(tmp_path / "pickled"))[1] == meta
    other = read_config(loaded.save(tmp_path / "other", source="here", licences=()))[1]
    assert other == meta | {"source": "here", "licences": [], "digest": other["digest"]}


def test_a_directory_without_its_card_is_a_model(saved):
    (saved / "README.md").unlink()
    assert from_pretrained(saved).config == TINY


def test_the_tokenizers_fingerprint_is_of_its_values_alone(model, stage1_model):
    assert fingerprint(model) == fingerprint(stage1_model)
    assert fingerprint(model) != fingerprint(lively_model(TINY, seed=1))


# --- numbers and dtypes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_number_that_is_not_finite_is_named(saved, value, dtype):
    def spoil(flat):
        flat["transformer.pos"] = flat["transformer.pos"].astype(dtype)
        flat["transformer.pos"][3, 5] = value

    rewrite(saved, spoil)
    expected = rf"transformer\.pos of {saved}/model\.safetensors has the value {value}; weights must be finite"
    with pytest.raises(InputError, match=expected):
        from_pretrained(saved)


def test_a_model_that_is_not_finite_is_not_saved(model, tmp_path):
    pos = model.params["transformer"]["pos"].at[3, 5].set(jnp.nan)
    wrong = Model(TINY, model.params | {"transformer": model.params["transformer"] | {"pos": pos}})
    with pytest.raises(InputError, match=r"^transformer\.pos has the value nan; weights must be finite"):
        wrong.save(tmp_path / "model", source="a test")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "float64", "int64"])
def test_weights_of_another_dtype_are_refused(saved, dtype):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(dtype)}))
    expected = rf"has transformer\.pos as {dtype}; expected float32, bfloat16 or float16, so"
    with pytest.raises(InputError, match=expected):
        from_pretrained(saved)


def test_float16_weights_are_loaded_and_saved(saved, tmp_path):
    rewrite(saved, lambda flat: flat.update({"transformer.pos": flat["transformer.pos"].astype(np.float16)}))
    again = from_pretrained(saved).save(tmp_path / "again", source="a test")
    found = [safetensors.numpy.load_file(path / "model.safetensors")["transformer.pos"] for path in (saved, again)]
    assert found[1].dtype == np.float16
    np.testing.assert_array_equal(*found)


def test_the_compute_type_is_chosen_when_loading(saved):
    loaded = from_pretrained(str(saved), dtype="bfloat16")
    assert (loaded.dtype, loaded.params["transformer"]["word"]["kernel"].dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(InputError, match="dtype is 'int8'; expected 'float32' or 'bfloat16'"):
        from_pretrained(saved, dtype="int8")
    with pytest.raises(
        InputError, match=r"dtype is array\(\['float32', 'bfloat16'\].*; expected 'float32' or 'bfloat16'"
    ):
        from_pretrained(saved, dtype=np.array(["float32", "bfloat16"]))


def test_an_existing_output_is_refused_and_untouched(saved, model):
    before = {name: (saved / name).read_bytes() for name in listing(saved)}
    with pytest.raises(InputError, match=r"model exists already; remove it, or choose another"):
        model.save(saved, source="again")
    assert {name: (saved / name).read_bytes() for name in listing(saved)} == before


# --- the digest of the description


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["model"]["class_names"].reverse(),
        lambda meta: meta["model"]["tokenizer"].update(phi_of_scale=[0, 1, 2]),
        lambda meta: meta["model"]["tokenizer"].update(norm_groups=2),
        lambda meta: meta["model"]["transformer"].update(leak_free=True),
        lambda meta: meta["model"]["transformer"].update(class_dropout=0.2),
        lambda meta: meta.update(licences=[]),
        lambda meta: meta.update(tokenizer_sha256=meta["sha256"]),
        lambda meta: meta.update(digest=meta["digest"][::-1]),
    ],
)
def test_a_description_that_fits_the_weights_but_is_not_what_was_written_is_told(saved, change, caplog):
    """Until somebody says, by deleting the digest, that it was changed on purpose."""
    file = saved / "config.json"
    rewrite(saved, change_config=lambda meta: meta.update(licences=["Not for sale."]))
    from_pretrained(saved).save(saved, source="made by a test", licences=["Not for sale."], replace=True)
    meta = json.loads(file.read_text())
    open_model(saved)
    assert not caplog.records
    change(meta)
    file.write_text(json.dumps(meta, indent=2))
    assert open_model(saved).meta == meta
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{file} is not as it was written, since its digest is of other fields. If you have changed it, delete the "
        "line with its digest; if not, copy or export it again."
    )
    caplog.clear()
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"digest"' not in line))
    assert open_model(saved).meta == {name: value for name, value in meta.items() if name != "digest"}
    assert not caplog.records


def test_a_description_may_be_laid_out_anew(saved):
    file = saved / "config.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(meta.items()))))
    assert read_config(saved) == (TINY, meta)


def test_directories_from_before_the_digest_are_read(saved):
    rewrite(saved)
    assert "digest" not in json.loads((saved / "config.json").read_text())
    assert from_pretrained(saved).config == TINY
