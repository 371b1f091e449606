"""Which phi convolution each scale uses: recorded, inherited, converted from every official layout and back."""

import dataclasses
import hashlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from official_files import LADDER, TOKENIZER, assert_bit_equal, file_of, random_model, random_state, rewrite, stored
from tiny_models import TINY, fingerprint, lively_params, random_tokens

from hmar_jax import InputError, from_pretrained
from hmar_jax.config import DataConfig, ModelConfig, TrainConfig
from hmar_jax.formats.convert import convert, export_torch
from hmar_jax.formats.model_directory import read_config
from hmar_jax.model import Model
from hmar_jax.networks import networks
from hmar_jax.scales import ScaleLadder
from hmar_jax.training import checkpoint
from hmar_jax.training.objectives import make_objective
from hmar_jax.training.state import TrainState

# Of three phis and four scales: by VAR's rule, and as it was before it was recorded.
BY_RULE, UNRECORDED = (0, 0, 1, 2), (0, 1, 1, 2)


def with_phis(config, **changes):
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, **changes))


def phis_of(model):
    return networks(model.config, model.params).tokenizer.quantizer.phi_of_scale


def fingerprint_values(directory):
    """The `tokenizer_sha256` of a directory from before."""
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in stored(directory).items()}
    of_tokenizer = sorted(item for item in digests.items() if item[0].startswith("tokenizer."))
    return hashlib.sha256(json.dumps(of_tokenizer).encode()).hexdigest()


@pytest.fixture(scope="module")
def three_phis(tmp_path_factory):
    """(a model with three phis, its directory, that directory as it was before the phi of each scale was recorded)"""
    config = with_phis(dataclasses.replace(TINY, ladder=LADDER), phis=3)
    model = Model(config, lively_params(config))
    folder = tmp_path_factory.mktemp("three_phis")
    new, old = (model.save(folder / name, source="a test") for name in ("new", "old"))

    def forget(meta):
        del meta["model"]["tokenizer"]["phi_of_scale"], meta["model"]["phi_layout"]
        meta["tokenizer_sha256"] = fingerprint_values(old)

    rewrite(old, change_config=forget)
    return model, new, old


# --- model directories


def test_a_directory_records_the_phi_of_each_scale(three_phis):
    model, new, _ = three_phis
    meta = json.loads((new / "config.json").read_text())
    assert meta["model"]["tokenizer"]["phi_of_scale"] == list(BY_RULE)
    assert from_pretrained(new).config == model.config
    assert phis_of(model) == phis_of(from_pretrained(new)) == BY_RULE


def test_an_older_directory_decodes_as_it_was_trained(three_phis, tmp_path):
    model, new, old = three_phis
    again = from_pretrained(old).save(tmp_path / "again", source="a test")
    assert phis_of(from_pretrained(old)) == phis_of(from_pretrained(again)) == UNRECORDED
    tokens = random_tokens(model.config, 2)
    before = Model(with_phis(model.config, phi_of_scale=UNRECORDED), model.params).tokenizer.decode(tokens)
    np.testing.assert_array_equal(from_pretrained(old).tokenizer.decode(tokens), before)
    assert np.abs(from_pretrained(new).tokenizer.decode(tokens) - before).max() > 1e-3


@pytest.mark.parametrize("phis", [1, 2, 4])
def test_an_older_directory_whose_rule_was_right_is_as_any_other(tmp_path, phis):
    config = with_phis(ModelConfig(LADDER, TOKENIZER), phis=phis)
    path = random_model(config).save(tmp_path / "model", source="a test")
    meta = read_config(path)[1]
    assert meta["tokenizer_sha256"] == fingerprint_values(path)
    rewrite(path, change_config=lambda meta: meta["model"]["tokenizer"].pop("phi_of_scale"))
    assert read_config(path)[0] == config


def test_token_caches_of_another_phi_of_a_scale_are_told_apart(three_phis, tmp_path):
    _, new, old = three_phis
    fingerprints = [read_config(path)[1]["tokenizer_sha256"] for path in (new, old)]
    assert fingerprints[0] != fingerprints[1]
    assert [fingerprint(from_pretrained(path)) for path in (new, old)] == fingerprints
    again = from_pretrained(old).save(tmp_path / "again", source="a test")
    assert read_config(again)[1]["tokenizer_sha256"] == fingerprints[1]


@pytest.mark.parametrize("phis", [[0], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, -1]], ids=str)
def test_a_phi_of_each_scale_that_cannot_be_is_refused(three_phis, tmp_path, phis):
    path = shutil.copytree(three_phis[1], tmp_path / "model")
    rewrite(path, change_config=lambda meta: meta["model"]["tokenizer"].update(phi_of_scale=phis))
    with pytest.raises(InputError, match=r"describes no model: tokenizer\.phi_of_scale is \("):
        from_pretrained(path)


# --- training


@pytest.mark.parametrize("stage", ["tokenizer", "next_scale", "masked"])
def test_a_stage_inherits_the_phi_of_each_scale(three_phis, stage):
    model, new, old = three_phis
    data = DataConfig() if stage == "tokenizer" else DataConfig("tokens", path="unused")
    sizes = {"sides": LADDER.sides, "tokenizer": dataclasses.replace(model.config.tokenizer)}
    for directory, expected in ((new, ()), (old, UNRECORDED)):
        config = TrainConfig(stage=stage, init_from=str(directory), data=data, **sizes)
        assert make_objective(config, ()).model_config.tokenizer.phi_of_scale == expected


def test_a_tokenizer_for_another_number_of_scales_uses_the_rule(three_phis):
    model, _, old = three_phis
    config = TrainConfig(stage="tokenizer", init_from=str(old), sides=(1, 2, 4), tokenizer=model.config.tokenizer)
    assert make_objective(config, ()).model_config.tokenizer.phi_of_scale == ()


@pytest.mark.parametrize(("recorded", "expected"), [(True, ()), (False, UNRECORDED)])
def test_a_run_from_before_is_known_to_use_other_phis(three_phis, tmp_path, monkeypatch, recorded, expected):
    config = TrainConfig(stage="tokenizer", sides=LADDER.sides, tokenizer=three_phis[0].config.tokenizer)
    values = checkpoint.to_plain(config)
    if not recorded:
        del values["tokenizer"]["phi_of_scale"]
    monkeypatch.setattr(checkpoint, "to_plain", lambda config: values)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    state = TrainState(jnp.int32(2), jax.random.key_data(jax.random.key(0)), {}, {}, {}, {})
    checkpoints.save(2, state, {"examples": 16, "class_names": [], "start": ""}, config)
    checkpoints.wait()
    before = checkpoints.config()
    checkpoints.close()
    assert before.tokenizer.phi_of_scale == expected


# --- official layouts: one that all scales share, several, and one for each scale

LAYOUTS = {
    "qresi": (1, "quantize.quant_resi.qresi."),
    "one qresi_ls": (1, "quantize.quant_resi.qresi_ls.#."),
    "two qresi_ls": (2, "quantize.quant_resi.qresi_ls.#."),
    "three qresi_ls": (3, "quantize.quant_resi.qresi_ls.#."),
    "four qresi_ls": (4, "quantize.quant_resi.qresi_ls.#."),
    "one for each scale": (4, "quantize.quant_resi.#."),
}
PHI = re.compile(r"quantize\.quant_resi\.(?:qresi_ls\.(\d+)|qresi)\.")


def laid_out(number, name):
    """A tokenizer's state dict with so many phis in a layout."""
    state = random_state("vae", tokenizer=dataclasses.replace(TOKENIZER, phis=number))
    return {PHI.sub(lambda match: name.replace("#", match[1] or "0"), entry): x for entry, x in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_phis_comes_back_bit_for_bit(tmp_path, layout):
    state = laid_out(*LAYOUTS[layout])
    vae = convert("vae", file_of(tmp_path / "vae.safetensors", state), LADDER, tmp_path / "vae")
    assert read_config(vae)[0].tokenizer.phis == LAYOUTS[layout][0]
    var = file_of(tmp_path / "var.safetensors", random_state("var"))
    with_transformer = convert("var", var, LADDER, tmp_path / "var", tokenizer=vae)
    saved_again = from_pretrained(with_transformer).save(tmp_path / "again", source="a test")
    for number, directory in enumerate((vae, with_transformer, saved_again)):
        export_torch(directory, tmp_path / f"{number}.safetensors", "vae")
        assert_bit_equal(safetensors.numpy.load_file(tmp_path / f"{number}.safetensors"), state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_scale_of_a_converted_tokenizer_uses_its_phi(tmp_path, layout):
    file = file_of(tmp_path / "vae.safetensors", laid_out(*LAYOUTS[layout]))
    directory = convert("vae", file, LADDER, tmp_path / "vae")
    expected = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: BY_RULE, 4: (0, 1, 2, 3)}[LAYOUTS[layout][0]]
    recorded = json.loads((directory / "config.json").read_text())["model"]["tokenizer"]["phi_of_scale"]
    assert tuple(recorded) == phis_of(from_pretrained(directory)) == expected


def test_one_phi_for_each_scale_goes_with_as_many_sides(tmp_path):
    file = file_of(tmp_path / "vae.safetensors", laid_out(*LAYOUTS["one for each scale"]))
    said = "The tokenizer has one phi convolution for each of 4 scales, but there are 3 sides; give the sides that it"
    with pytest.raises(InputError, match=rf"^{file}: {said}"):
        convert("vae", file, ScaleLadder((1, 2, 4)), tmp_path / "vae")


def test_phis_of_two_layouts_in_one_file_are_refused(tmp_path):
    state = laid_out(*LAYOUTS["two qresi_ls"]) | laid_out(*LAYOUTS["qresi"])
    file = file_of(tmp_path / "vae.safetensors", state)
    with pytest.raises(InputError, match=r"has the unexpected quantize\.quant_resi\.qresi_ls\.0\.bias, "):
        convert("vae", file, LADDER, tmp_path / "vae")


def test_a_phi_that_is_missing_between_others_is_named(tmp_path):
    state = {name: x for name, x in laid_out(*LAYOUTS["three qresi_ls"]).items() if ".qresi_ls.1." not in name}
    with pytest.raises(InputError, match=r"lacks quantize\.quant_resi\.qresi_ls\.1\.\*; it is not a whole state dict"):
        convert("vae", file_of(tmp_path / "vae.safetensors", state), LADDER, tmp_path / "vae")


def test_a_tokenizer_that_the_official_code_would_decode_otherwise_is_not_exported(tmp_path):
    config = with_phis(ModelConfig(LADDER, TOKENIZER), phis=3, phi_of_scale=UNRECORDED)
    path = random_model(config).save(tmp_path / "old", source="a test")
    with pytest.raises(InputError, match="uses other phi convolutions in its scales than the official code"):
        export_torch(path, tmp_path / "vae.safetensors")
