"""`hmar-jax bench train` from the command line to its table, files and refusals."""

import argparse
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from hmar_jax.bench import train
from hmar_jax.bench.measurements import Kernel
from hmar_jax.bench.train import by_part, settings
from hmar_jax.commands import bench
from hmar_jax.commands.main import main
from hmar_jax.config import TokenizerConfig, TokenizerLossConfig, TrainConfig
from hmar_jax.training.state import make_train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)
    folder = tmp_path_factory.mktemp("bench") / "not made yet"
    assert main(["bench", "train", "--batch=2", "--repeats=2", f"--output={folder}"]) == 0
    return folder


def test_a_step_is_timed_and_compared_with_its_bound(folder):
    report = json.loads((folder / "train.json").read_text())
    assert report["device"].startswith("CPU")
    assert {"python", "jax", "jaxlib"} <= report["versions"].keys()
    (row,) = report["rows"]
    assert row["name"] == "128 px, two small blocks, B=2"
    assert 0 < row["low"] <= row["median"] <= row["high"]
    assert row["images_per_second"] == pytest.approx(2 / row["median"])
    assert row["bound"] == pytest.approx(row["model_flops"] / report["matmul_rate"])
    assert row["utilisation"] == pytest.approx(row["bound"] / row["median"])
    parameters = 2 * 12 * 64 * 64  # of the two blocks, with their gradients' moments
    assert row["memory"] > 3 * 4 * parameters
    assert row["parts"] == {}  # a CPU has no kernels to tell apart


def test_the_page_has_a_line_a_setting(folder):
    lines = (folder / "train.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| 128 px, two small blocks, B=2 |")


PROGRAM = """
ENTRY %main {
  %loop_fusion.3 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(train_step)/jvp(jit(step))/add" id=1}
  %loop_fusion.4 = f32[2]{0} fusion(%a), metadata={op_name="jit(train_step)/optimizer/add"}
  %reduce-fusion = f32[2]{0} fusion(%a), metadata={op_name="jit(train_step)/transpose(jvp(head))/reduce_sum"}
  ROOT %gemm_fusion.1 = f32[2]{0} fusion(%a), metadata={op_name="jit(train_step)/jvp(head)/dot_general"}
}
"""


def test_kernels_are_told_apart_by_name_and_origin():
    times = [
        ("loop_fusion_3", 1.0),
        ("loop_fusion_4", 2.0),
        ("reduce_fusion", 3.0),
        ("reduce_fusion", 1.0),
        ("gemm_fusion_1", 8.0),
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", 16.0),
        ("scale_attention_forward_mosaic_gpu_kernel", 32.0),
        ("memcpy32_post", 64.0),
    ]
    parts = by_part([Kernel("command_buffer_1", *kernel) for kernel in times], PROGRAM, steps=2)
    assert parts == {"matrix products": 12.0, "attention": 16.0, "head": 2.0, "optimizer": 1.0, "rest": 32.5}


def test_a_step_says_which_of_its_operations_are_the_heads_and_the_optimizers():
    config = train._tiny(2)
    objective, state, frozen, optimizer = train._fresh(config)
    batch = {
        "tokens": jnp.zeros((2, objective.model_config.ladder.length), jnp.int32),
        "label": jnp.zeros(2, jnp.int32),
    }
    lowered = jax.jit(make_train_step(config, objective, optimizer)).lower(state, frozen, batch)
    origins = lowered.as_text(debug_info=True)
    for origin in ("/optimizer/", "jvp(head)", "transpose(jvp(head))"):
        assert origin in origins


def test_the_published_settings_are_named_or_picked_by_image_and_model():
    def picked(*options):
        parser = argparse.ArgumentParser()
        bench.add_train(parser.add_subparsers())
        args = parser.parse_args(["train", *options])
        return settings(args.config, args.image, args.model, args.batch, on_cpu=False)

    assert list(picked()) == ["256 d16 B=64", "256 d30 B=32", "512 d24 B=16", "1024 d24 B=2"]
    (config,) = picked("--image=512", "--model=d24").values()
    assert (config.batch_size, config.sides[-1], config.transformer.depth, config.dtype) == (16, 32, 24, "bfloat16")
    assert list(picked("--image=256", "--model=d20", "--batch=3")) == ["256 d20 B=3"]


@pytest.fixture
def tokenizer_config(tmp_path, write_config):
    config = TrainConfig(
        stage="tokenizer", sides=(1, 4), batch_size=2, dtype="float32",
        tokenizer=TokenizerConfig(
            channels=4, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=1, norm_groups=2, codebook_size=16,
            latent_channels=4, downsampling=2, phis=1,
        ),
        tokenizer_loss=TokenizerLossConfig(adversarial=0.0),
    )  # fmt: skip
    return write_config(tmp_path / "tokenizer.py", config)


def test_a_tokenizer_is_timed_on_random_pictures_and_what_it_replaces_is_named(tokenizer_config, tmp_path, caplog):
    (before := tmp_path / "out" / "train.json").parent.mkdir()
    before.write_text('{"device": "", "versions": {}}')
    with caplog.at_level(logging.INFO, "hmar_jax"):
        assert (
            main(["bench", "train", f"--config={tokenizer_config}", "--repeats=1", f"--output={tmp_path / 'out'}"]) == 0
        )
    assert f"Replacing {before}." in caplog.messages
    (row,) = json.loads((tmp_path / "out" / "train.json").read_text())["rows"]
    images, widest = 2 * 8 * 8, 2 * 9 * 4 * 4  # one 3x3 convolution at full size; there are more than five
    assert row["model_flops"] > 3 * 5 * images * widest
    assert row["images_per_second"] == pytest.approx(2 / row["median"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch=0"], "--batch is 0; expected a whole number, 1 to 65536."),
        (["--image=256"], "--image and --model go together, such as --image=256 --model=d16."),
        (["--config={config}", "--model=d16"], "--config says what to measure; leave --image and --model out."),
        (["--image=256", "--model=d99"], "d99"),
        (["--image=255", "--model=d16"], "255"),
    ],
)
def test_bad_input_gets_one_sentence(tokenizer_config, tmp_path, capsys, options, said):
    options = [option.format(config=tokenizer_config) for option in options]
    assert main(["bench", "train", *options, f"--output={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
