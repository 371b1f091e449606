"""Configs survive ConfigDict and JSON, refuse what they are not, and describe models of the published sizes."""

import dataclasses
import json
import math
import re
import string

import jax
import numpy as np
import pytest

from hmar_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    TransformerConfig,
    from_config_dict,
    from_plain,
    to_config_dict,
    to_plain,
)
from hmar_jax.errors import InputError
from hmar_jax.networks import structure
from hmar_jax.scales import ScaleLadder

TRAIN = TrainConfig(
    stage="masked",
    init_from="runs/next",
    sides=(1, 2, 5),
    batch_size=12,
    accumulate=3,
    data=DataConfig(source="tokens", path="cache", classes="xyz", flip=True),
    optimizer=OptimizerConfig(base_lr=3e-4, ema=0.999),
    tokenizer_loss=TokenizerLossConfig(adversarial=0.0),
    objective=ObjectiveConfig(scale_weights="equal", leak_free=True),
    mesh=MeshConfig(fsdp=2),
    dtype="float32",
    sample_labels=(),
)
CONFIGS = {
    "train": TRAIN,
    "tokenizer stage": TrainConfig(stage="tokenizer"),
    "model": ModelConfig(
        ScaleLadder((1, 3)), TokenizerConfig(), TransformerConfig.preset("d16", num_classes=10), tuple(string.digits)
    ),
    "tokenizer alone": ModelConfig(ScaleLadder((2,)), TokenizerConfig(multipliers=(1, 1), downsampling=2)),
    "var": TransformerConfig.preset("var-d20", num_classes=7),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestRoundTrips:
    def test_through_json(self, config):
        assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config

    def test_through_a_config_dict(self, config):
        assert from_config_dict(type(config), to_config_dict(config)) == config

    def test_and_back_hashable(self, config):
        back = from_plain(type(config), json.loads(json.dumps(to_plain(config))))
        assert hash(back) == hash(config)


def test_a_change_in_a_config_dict_arrives():
    changed = to_config_dict(TRAIN)
    changed.optimizer.base_lr = 1
    changed.sides = [1, 4]
    back = from_config_dict(TrainConfig, changed)
    assert back == dataclasses.replace(TRAIN, sides=(1, 4), optimizer=dataclasses.replace(TRAIN.optimizer, base_lr=1.0))
    assert isinstance(back.optimizer.base_lr, float)


def changed(path, value):
    """`TRAIN` as plain data with one field set."""
    plain = json.loads(json.dumps(to_plain(TRAIN)))
    *parents, name = path.split(".")
    inner = plain
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("step", 3, r"Config field 'step' does not exist; TrainConfig has stage, seed, steps, .*\."),
        ("optimizer.lr", 3, r"Config field 'optimizer\.lr' does not exist; OptimizerConfig has base_lr, .*\."),
        ("steps", "many", r"Config field 'steps' is 'many'; expected int\."),
        ("steps", 1.5, r"Config field 'steps' is 1\.5; expected int\."),
        ("steps", True, r"Config field 'steps' is True; expected int\."),
        ("steps", None, r"Config field 'steps' is None; expected int\."),
        ("data.flip", 1, r"Config field 'data\.flip' is 1; expected bool\."),
        ("data.path", 7, r"Config field 'data\.path' is 7; expected str\."),
        ("optimizer.base_lr", "fast", r"Config field 'optimizer\.base_lr' is 'fast'; expected float\."),
        ("optimizer.base_lr", False, r"Config field 'optimizer\.base_lr' is False; expected float\."),
        ("sides", 4, r"Config field 'sides' is 4; expected tuple\[int, \.\.\.\]\."),
        ("sides", [1, "2"], r"Config field 'sides' is '2'; expected int\."),
        ("data", 5, r"Config field 'data' is 5; expected DataConfig\."),
        ("stage", "third", r"Config field 'stage' is 'third'; expected 'tokenizer' or 'next_scale' or 'masked'\."),
        ("data.crop", "left", r"Config field 'data\.crop' is 'left'; expected 'random' or 'center'\."),
    ],
)
def test_a_wrong_field_is_named_with_its_value(path, value, sentence):
    with pytest.raises(InputError) as error:
        from_plain(TrainConfig, changed(path, value))
    assert_matches(error, sentence)


def assert_matches(error, sentence):
    assert re.fullmatch(sentence, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TokenizerConfig(channels="x"), "'tokenizer.channels' is 'x'; expected int."),
        (lambda: TokenizerConfig(channels=None), "'tokenizer.channels' is None; expected int."),
        (lambda: TokenizerConfig(phis=2.5), "'tokenizer.phis' is 2.5; expected int."),
        (lambda: TokenizerConfig(multipliers=(1, 2.5)), "'tokenizer.multipliers' is 2.5; expected int."),
        (lambda: TokenizerConfig(multipliers=(True,)), "'tokenizer.multipliers' is True; expected int."),
        (lambda: TokenizerLossConfig(adversarial_start=math.inf), "'tokenizer_loss.adversarial_start' is inf; "),
        (lambda: TokenizerConfig(phis=True), "'tokenizer.phis' is True; expected int."),
        (lambda: TokenizerConfig(multipliers=4), "'tokenizer.multipliers' is 4; expected tuple[int, ...]."),
        (lambda: TokenizerConfig(multipliers=("1",)), "'tokenizer.multipliers' is '1'; expected int."),
        (lambda: TransformerConfig("d16", 64, 4), "'transformer.depth' is 'd16'; expected int."),
        (lambda: TransformerConfig(8, 64, 4, masked=1), "'transformer.masked' is 1; expected bool."),
        (
            lambda: TransformerConfig(8, 64, 4, pattern=["block_causal"]),
            "'transformer.pattern' is ['block_causal']; expected 'block_diagonal' or 'block_causal'.",
        ),
        (lambda: ModelConfig((1, 2), TokenizerConfig()), "'ladder' is (1, 2); expected ScaleLadder."),
        (lambda: ModelConfig(ScaleLadder((1,)), None), "'tokenizer' is None; expected TokenizerConfig."),
        (lambda: OptimizerConfig(base_lr="1e-4"), "'optimizer.base_lr' is '1e-4'; expected float."),
        (lambda: OptimizerConfig(clip=10**400), "; expected float."),
        (lambda: TokenizerLossConfig(l1=[]), "'tokenizer_loss.l1' is []; expected float."),
        (lambda: DataConfig(path=None), "'data.path' is None; expected str."),
        (lambda: MeshConfig(data=None), "'mesh.data' is None; expected int."),
        (lambda: TrainConfig(stage="tokenizer", steps="many"), "'steps' is 'many'; expected int."),
        (lambda: TrainConfig(stage=None), "'stage' is None; expected 'tokenizer' or 'next_scale' or "),
        (lambda: TrainConfig(stage="tokenizer", mesh=2), "'mesh' is 2; expected MeshConfig."),
    ],
)
def test_a_constructor_checks_types_too(make, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        make()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_numbers_of_numpy_and_lists_become_the_types_of_the_fields():
    config = TokenizerConfig(channels=np.int64(64), multipliers=[1, np.int32(1), 2, 2, 4])
    assert config == TokenizerConfig(channels=64, multipliers=(1, 1, 2, 2, 4))
    assert json.loads(json.dumps(to_plain(config)))["channels"] == 64
    assert type(OptimizerConfig(base_lr=np.float32(0.5)).base_lr) is float


@pytest.mark.parametrize("name", [None, 3, ["d16"], "d17", 10**5000, "x" * 9999], ids=lambda name: str(type(name)))
def test_other_presets_are_refused(name):
    with pytest.raises(InputError, match="No transformer is named"):
        TransformerConfig.preset(name)


@pytest.mark.parametrize("values", [None, [], ["ladder"], 7, "ladder"], ids=repr)
def test_what_has_no_fields_is_no_config(values):
    with pytest.raises(InputError, match=r"^ModelConfig is .*; expected its fields by name\.$"):
        from_plain(ModelConfig, values)


def test_a_missing_field_is_named():
    with pytest.raises(InputError) as error:
        from_plain(ModelConfig, {"ladder": {"sides": [1]}})
    assert str(error.value) == "Config field 'tokenizer' is missing."


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: TokenizerConfig(channels=33), ("tokenizer.channels is 33", "norm_groups=32")),
        (lambda: TokenizerConfig(downsampling=3), ("tokenizer.downsampling is 3", "power of two", "16")),
        (lambda: TokenizerConfig(downsampling=32), ("tokenizer.downsampling is 32",)),
        (lambda: TransformerConfig(4, 30, 4), ("transformer.width is 30", "transformer.heads=4")),
        (lambda: TransformerConfig(4, 32, 4), ("branch_depth is 8", "transformer.depth=4")),
        (lambda: TransformerConfig.preset("d16", pattern="block_causal"), ("block_causal", "mask branch")),
        (lambda: TransformerConfig.preset("d16", masked=False, pattern="causal"), ("'causal'", "block_diagonal")),
        (lambda: TransformerConfig.preset("d17"), ("'d17'", "d16", "var-d30", "d36-s")),
        (lambda: TrainConfig(stage="tokenizer", batch_size=5, accumulate=2), ("batch_size=5", "accumulate=2")),
        (lambda: TrainConfig(stage="next_scale"), ("'next_scale'", "init_from")),
        (lambda: TrainConfig(stage="masked", init_from="x"), ("'masked'", "export tokens", "'glyphs'")),
        (lambda: TrainConfig(stage="tokenizer", data=DataConfig("tokens")), ("'tokenizer'", "'tokens'", "'folder'")),
    ],
)
def test_values_that_do_not_fit_together_are_named(make, names):
    with pytest.raises(InputError) as error:
        make()
    for name in names:
        assert name in str(error.value)


LADDER = ScaleLadder((1, 2))
TRANSFORMER = TransformerConfig(8, 64, 4, num_classes=3)
LARGE = {
    "tokenizer.channels": lambda value: TokenizerConfig(channels=value),
    "tokenizer.norm_groups": lambda value: TokenizerConfig(norm_groups=value),
    "tokenizer.latent_channels": lambda value: TokenizerConfig(latent_channels=value),
    "tokenizer.codebook_size": lambda value: TokenizerConfig(codebook_size=value),
    "tokenizer.encoder_blocks": lambda value: TokenizerConfig(encoder_blocks=value),
    "tokenizer.decoder_blocks": lambda value: TokenizerConfig(decoder_blocks=value),
    "tokenizer.phis": lambda value: TokenizerConfig(phis=value),
    "tokenizer.downsampling": lambda value: TokenizerConfig(downsampling=value),
    "tokenizer.multipliers": lambda value: TokenizerConfig(multipliers=(1, value)),
    "transformer.depth": lambda value: TransformerConfig(value, 64, 4),
    "transformer.width": lambda value: TransformerConfig(8, value, 4),
    "transformer.heads": lambda value: TransformerConfig(8, 64, value),
    "transformer.num_classes": lambda value: TransformerConfig(8, 64, 4, num_classes=value),
    "transformer.mlp_ratio": lambda value: TransformerConfig(8, 64, 4, mlp_ratio=value),
    "transformer.branch_depth": lambda value: TransformerConfig(8, 64, 4, branch_depth=value),
    "data.workers": lambda value: DataConfig(workers=value),
    "tokenizer_loss.discriminator_layers": lambda value: TokenizerLossConfig(discriminator_layers=value),
    "tokenizer_loss.discriminator_channels": lambda value: TokenizerLossConfig(discriminator_channels=value),
    "steps": lambda value: TrainConfig(stage="tokenizer", steps=value),
}


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63, 10**400], ids=lambda value: f"{value.bit_length()} bits")
@pytest.mark.parametrize("field", LARGE)
def test_a_size_beyond_all_use_is_refused_before_anything_is_built(field, value):
    with pytest.raises(InputError) as error:
        LARGE[field](value)
    assert str(error.value).startswith(f"{field} is ")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TokenizerConfig(multipliers=(1,) * 60, downsampling=1), "has 300 residual blocks; choose"),
        (lambda: TokenizerConfig(multipliers=(1,) * 10**6), "has 5000000 residual blocks; choose"),
        (lambda: TransformerConfig(8, 64, 4, gate_init=math.nan), "transformer.gate_init is nan; expected a finite"),
        (
            lambda: ModelConfig(LADDER, TokenizerConfig(multipliers=(1,) * 20, encoder_blocks=1, downsampling=2**19)),
            "Pictures have 1048576 pixels a side, the last of the sides times tokenizer.downsampling; expected 16384",
        ),
        (lambda: ModelConfig(LADDER, TokenizerConfig(phi_of_scale=(0,) * 10**5)), "expected one number for each of 2"),
    ],
)
def test_sizes_that_are_too_much_together_are_refused(make, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        make()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("a", "b"), "There are 2 class names for 3 classes of the transformer; expected one for each, or none."),
        (
            ("a", "b", "c", "d"),
            "There are 4 class names for 3 classes of the transformer; expected one for each, or none.",
        ),
        (("a", "b", "a"), "Two classes are called 'a'; give one of them another name."),
        (("a", "", "c"), "The name of class 1 is '', which is blank; give it a name."),
        (("a", "b", " \u3000"), "The name of class 2 is ' \\u3000', which is blank; give it a name."),
        *(
            (
                (f"x{character}y", "b", "c"),
                f"The name of class 0 is {f'x{character}y'!r}, which has a control character",
            )
            for character in "\0\n\r\t\x1b\x7f\x9b\u2028\ud800"
        ),
        (("x" * 10**6,) * 3, f"Two classes are called '{'x' * 76}…; give one of them another name."),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_class_names_that_cannot_tell_classes_apart_are_refused(names, sentence):
    with pytest.raises(InputError) as error:
        ModelConfig(LADDER, TokenizerConfig(), TRANSFORMER, names)
    assert str(error.value).startswith(sentence)
    if "There are" not in sentence:
        with pytest.raises(InputError, match=re.escape(sentence)):
            ModelConfig(LADDER, TokenizerConfig(), None, names)


@pytest.mark.parametrize(
    "names", [(), ("Füchse", "犬 と 猫", "👩‍🚀"), ("a", "A", " a"), ("1", "01", "a,b"), ("é", "e\u0301", "\xa0x")]
)
def test_names_that_tell_classes_apart_are_taken(names):
    assert ModelConfig(LADDER, TokenizerConfig(), TRANSFORMER, names).class_names == names


def positive(name, value=0):
    return rf"(\w+\.)?{name} is {value}; expected 1 or more\."


STAGE = {"stage": "tokenizer"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        *[
            (lambda n=name, v=value: OptimizerConfig(**{n: v}), rf"optimizer\.{name} is {value}; expected 0 or more\.")
            for name, value in [
                ("base_lr", -1e-4), ("warmup", -0.5), ("warmup_from", -0.5), ("flat", -0.5), ("final_lr", -0.5),
                ("weight_decay", -0.5), ("final_weight_decay", -0.5), ("clip", -2.0), ("base_lr", math.inf),
                ("clip", math.nan),
            ]
        ],
        (lambda: OptimizerConfig(base_lr=1e10), r"optimizer\.base_lr is 10000000000.0; expected 1e\+09 at most\."),
        *[
            (lambda n=name, v=value: OptimizerConfig(**{n: v}), rf"optimizer\.{name} is {value}; expected a share .*\.")
            for name, value in [("b1", 1.0), ("b2", -0.5), ("b2", math.nan), ("ema", 1.0), ("ema", -0.5)]
        ],
        *[
            (lambda n=name: TokenizerLossConfig(**{n: 0}), positive(name))
            for name in ("revive_every", "discriminator_channels", "discriminator_layers")
        ],
        *[
            (lambda n=name, v=value: TokenizerLossConfig(**{n: v}), rf"tokenizer_loss\.{name} is {value}; expected .*")
            for value in (-1, math.nan, math.inf)
            for name in ("l1", "l2", "vq", "commitment", "perceptual", "adversarial", "dead_below")
        ],
        *[
            (lambda v=value: TokenizerConfig(multipliers=v), r"tokenizer\.multipliers is .*; expected whole .*")
            for value in [(), (0,), (1, 2, -2, 2, 4)]
        ],
        *[
            (lambda n=name, v=value: TokenizerLossConfig(**{n: v}), rf"tokenizer_loss has .*{name}={value}.*\.")
            for name, value in [
                ("scale_dropout", 1.5), ("scale_dropout", -0.1), ("usage_decay", 1.0), ("usage_decay", -0.1),
            ]
        ],
        (lambda: TokenizerLossConfig(kmeans_batches=-1), r"tokenizer_loss\.kmeans_batches is -1; expected 0 or more\."),
        *[
            (lambda n=name: TrainConfig(**STAGE, **{n: 0}), positive(name))
            for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep")
        ],
        (lambda: TrainConfig(**STAGE, steps=-3), positive("steps", -3)),
        (lambda: TrainConfig(**STAGE, seed=-1), r"seed is -1; expected 0 to 2147483647\."),
        (lambda: TrainConfig(**STAGE, seed=2**31), r"seed is 2147483648; expected 0 to 2147483647\."),
        (lambda: TrainConfig(**STAGE, sample_every=-1), r"sample_every is -1; expected steps, or 0 for no samples\."),
        (lambda: TrainConfig(**STAGE, transformer=TransformerConfig.preset("d16")), r"transformer\.masked and .*\."),
        (
            lambda: TrainConfig(**STAGE, transformer=TransformerConfig.preset("d16", masked=False, leak_free=True)),
            r"transformer\.masked and transformer\.leak_free .* objective\.leak_free\.",
        ),
        *[
            (lambda n=name: TransformerConfig(**({"depth": 8, "width": 8, "heads": 2} | {n: 0})), positive(name))
            for name in ("depth", "width", "heads", "num_classes", "mlp_ratio")
        ],
        *[
            (lambda n=name: TokenizerConfig(**{n: 0}), positive(name))
            for name in (
                "channels", "norm_groups", "encoder_blocks", "decoder_blocks", "latent_channels", "codebook_size",
                "phis",
            )
        ],
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_is_named_with_the_range(make, sentence):
    with pytest.raises(InputError) as error:
        make()
    assert_matches(error, sentence)


def test_the_ends_of_the_ranges_are_inside():
    zeros = ("base_lr", "warmup", "warmup_from", "flat", "final_lr", "weight_decay", "final_weight_decay", "clip")
    OptimizerConfig(**dict.fromkeys((*zeros, "b1", "b2", "ema"), 0.0))
    TokenizerLossConfig(scale_dropout=1.0, usage_decay=0.0, kmeans_batches=0, revive_every=1)
    TrainConfig(**STAGE, steps=1, batch_size=1, sample_every=0, log_every=1, checkpoint_every=1, keep=1, seed=2**31 - 1)
    TransformerConfig(1, 1, 1, num_classes=1, mlp_ratio=1, branch_depth=1)
    TokenizerConfig(1, (1,), 1, 1, 1, 1, 1, 1, 1)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def transformer_parameters(name, resolution="256"):
    config = ModelConfig(ScaleLadder.preset(resolution), TokenizerConfig(), TransformerConfig.preset(name))
    return count(structure(config)[1]["transformer"])


# Published, in millions; half of the last printed digit is the tolerance.
@pytest.mark.parametrize(
    ("name", "millions", "half_digit"),
    [
        ("d16", 467.7, 0.05),
        ("d20", 845.5, 0.05),
        ("d24", 1384, 0.5),
        ("d30", 2556, 0.5),
        ("var-d16", 310.3, 0.05),
        ("var-d20", 600.9, 0.05),
        ("var-d24", 1033, 0.5),
        ("var-d30", 2010, 0.5),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, millions, half_digit):
    assert transformer_parameters(name) / 1e6 == pytest.approx(millions, abs=half_digit)


def test_d36_s_has_the_published_number_of_parameters_at_512():
    assert transformer_parameters("d36-s", "512") / 1e6 == pytest.approx(2354, abs=0.5)


def test_the_default_tokenizer_has_the_published_number_of_parameters():
    abstract = structure(ModelConfig(ScaleLadder.preset("256"), TokenizerConfig()))[1]
    assert count(abstract) / 1e6 == pytest.approx(108.95, abs=0.005)


@pytest.mark.parametrize(
    ("name", "depth", "branch", "gate", "var", "shared"),
    [
        ("d16", 16, 8, 1e-3, False, False),
        ("d24", 24, 8, 1e-4, False, False),
        ("d30", 30, 8, 1e-5, False, False),
        ("var-d20", 20, 0, 1e-3, True, False),
        ("d36-s", 36, 0, 1e-5, True, True),
    ],
)
def test_presets_follow_the_published_rules(name, depth, branch, gate, var, shared):
    preset = TransformerConfig.preset(name)
    assert (preset.depth, preset.width, preset.heads) == (depth, 64 * depth, depth)
    assert (preset.branch_depth, preset.trunk_depth) == (branch, depth - branch)
    assert (preset.masked, preset.pattern) == (not var, "block_causal" if var else "block_diagonal")
    assert preset.is_var == var
    assert (preset.gate_init, preset.shared_adaln, preset.num_classes) == (gate, shared, 1000)
    assert preset.drop_path == pytest.approx(0.1 * depth / 24)


def test_image_size_and_classes_follow_the_parts():
    config = CONFIGS["model"]
    assert (config.image_size, config.num_classes) == (3 * 16, 10)
    assert CONFIGS["tokenizer alone"].image_size == 4
    assert CONFIGS["tokenizer alone"].num_classes == 0
