"""Entries of official files: numbers that are not finite are refused, what wrappers put into names is dropped."""

import ml_dtypes
import numpy as np
import pytest
from official_files import (
    KINDS,
    LADDER,
    assert_bit_equal,
    file_of,
    file_of_zeros,
    official_shapes,
    random_state,
    refusal,
    stored,
    torch_file_of,
)

from hmar_jax.formats.convert import convert


@pytest.fixture
def refused(tmp_path, small_tokenizer):
    """(kind, file, **options) → what the refused conversion says."""

    def run(kind, file, **options):
        tokenizer = None if kind == "vae" else small_tokenizer
        return refusal(tmp_path, lambda: convert(kind, file, LADDER, tmp_path / "out", tokenizer=tokenizer, **options))

    return run


# --- numbers

BAD_VALUES = {
    "nan": (np.nan, np.float32, "nan; weights must be finite, so train, save or copy the model again."),
    "infinite": (-np.inf, np.float32, "-inf; weights must be finite, so train, save or copy the model again."),
    "nan in float16": (np.nan, np.float16, "nan; weights must be finite, so train, save or copy the model again."),
    "infinite in bfloat16": (np.inf, ml_dtypes.bfloat16, "inf; weights must be finite, so train, save or copy the "),
    "beyond float32": (1e39, np.float64, "1e+39, which is too large for float32; use a wider dtype."),
    "nan in float64": (np.nan, np.float64, "nan; weights must be finite, so train, save or copy the model again."),
}


@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", ["vae", "hmar"])
def test_a_number_that_is_not_finite_is_named(refused, tmp_path, case, ending, kind):
    value, dtype, expected = BAD_VALUES[case]
    entry = {"vae": "decoder.up.1.block.0.conv2.bias", "hmar": "base_blocks.0.attn.mat_qkv.weight"}[kind]
    state = random_state(kind)
    wrong = state[entry].astype(dtype)
    wrong.flat[-1] = value
    state[entry] = wrong
    save = file_of if ending == "safetensors" else torch_file_of
    file = save(tmp_path / f"f.{ending}", state)
    assert refused(kind, file).startswith(f"{entry} of f.{ending} has the value {expected}")


def test_a_number_beyond_bfloat16_is_named(refused, tmp_path):
    state = random_state("vae")
    state["encoder.conv_in.weight"].flat[3] = 3.4e38
    said = refused("vae", file_of(tmp_path / "f.safetensors", state), dtype="bfloat16")
    value = "has the value 3.3999999521443642e+38, which is too large for bfloat16; use a wider dtype."
    assert said == f"tokenizer.encoder.conv_in.kernel {value}"


# --- wrappers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_inside_names_are_dropped(tmp_path, small_tokenizer, kind, wrapper):
    state = random_state(kind)
    rng = np.random.default_rng(0)

    def wrapped(name):
        parts = name.split(".")
        places = rng.integers(0, 3, len(parts))  # before a part: none, one or two
        return ".".join(word for part, many in zip(parts, places, strict=True) for word in [wrapper] * many + [part])

    parts = {} if kind == "vae" else {"tokenizer": small_tokenizer}
    found = [
        stored(convert(kind, file_of(tmp_path / f"{name}.safetensors", arrays), LADDER, tmp_path / name, **parts))
        for name, arrays in {"plain": state, "wrapped": {wrapped(name): x for name, x in state.items()}}.items()
    ]
    assert_bit_equal(*found)


@pytest.mark.parametrize("other", ["_orig_mod.quant_conv.bias", "quant_conv.module.bias"])
def test_two_names_that_are_one_without_wrappers_are_refused(refused, tmp_path, other):
    shapes = official_shapes("vae")
    said = refused("vae", file_of_zeros(tmp_path / "f.safetensors", shapes | {other: shapes["quant_conv.bias"]}))
    names = " and ".join(sorted(["quant_conv.bias", other]))
    assert said.startswith(f"f.safetensors has both {names}, which are one entry without the names of wrappers; "), said


@pytest.mark.parametrize("name", ["encoder.submodule.weight", "module_list.weight", "encoder._orig_mod_1.weight"])
def test_a_name_that_only_resembles_a_wrapper_stays(refused, tmp_path, name):
    assert refused("vae", file_of_zeros(tmp_path / "f.safetensors", official_shapes("vae") | {name: (2,)})).startswith(
        f"f.safetensors has the unexpected {name};"
    )


@pytest.mark.parametrize("key", ["ema", "ema.module", "ema._orig_mod"])
def test_a_key_may_name_wrappers_or_leave_them_out(tmp_path, small_tokenizer, key):
    states = {"model": random_state("vae", seed=1), "ema.module": random_state("vae")}
    arrays = {f"{prefix}.{name}": array for prefix, state in states.items() for name, array in state.items()}
    out = convert("vae", file_of(tmp_path / "f.safetensors", arrays), LADDER, tmp_path / "out", key=key)
    assert_bit_equal(stored(out), stored(small_tokenizer))
