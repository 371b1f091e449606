"""`hmar-jax bench sample` from the command line to its table, files and refusals."""

import argparse
import json
import logging
import re

import jax
import numpy as np
import pytest

from hmar_jax import params
from hmar_jax.bench import sample
from hmar_jax.bench.measurements import Kernel
from hmar_jax.bench.sample import by_part, part_of, settings
from hmar_jax.commands import bench
from hmar_jax.commands.main import main
from hmar_jax.networks import held_dtypes
from hmar_jax.sampling import program
from pallas_kernels.scale_attention.bench.times import Rates


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that a small run wrote to, and the names of the programs that it compiled."""
    logging.getLogger("pallas_kernels").setLevel(logging.WARNING)
    folder, compiled = tmp_path_factory.mktemp("bench") / "not made yet", []

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    assert main(["bench", "sample", "--batch=2", "--repeats=2", f"--output={folder}"]) == 0
    jax.monitoring.unregister_event_duration_listener(listen)
    return folder, compiled


def test_the_sampler_that_is_looked_at_is_the_one_that_runs(run):
    assert run[1].count("jit(sample)") == 1


def test_sampling_is_timed_and_compared_with_its_bound(run):
    report = json.loads((run[0] / "sample.json").read_text())
    assert report["device"].startswith("CPU")
    assert {"python", "jax", "jaxlib"} <= report["versions"].keys()
    (row,) = report["rows"]
    assert row["name"] == "64 px, two small blocks, B=2"
    for times in (row["program"], row["whole"]):
        assert 0 < times["low"] <= times["median"] <= times["high"]
    assert row["images_per_second"] == pytest.approx(2 / row["whole"]["median"])
    assert row["memory"] > 4 * 12 * 64 * 64 * 3  # of the blocks of trunk and branches
    assert row["bound"] > 0
    assert row["compile"] > 0
    assert row["official"] is None
    assert row["parts"] == {}  # a CPU has no kernels to tell apart


def test_the_page_has_a_line_a_setting(run):
    table = [line for line in (run[0] / "sample.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| 64 px, two small blocks, B=2 |")


def picked(*options):
    parser = argparse.ArgumentParser()
    bench.add_sample(parser.add_subparsers())
    args = parser.parse_args(["sample", *options])
    return settings(args.model_dir, args.image, args.model, args.batch, args.var, on_cpu=False)


def test_the_published_settings_stand_beside_official_figures():
    rows = {row.name: (row.batch, row.official) for row in picked()}
    assert rows == {
        "256 d16 B=8": (8, (169, 3.5)),
        "256 d16 B=64": (64, (444, 12.8)),
        "256 d30 B=8": (8, (299, 11.3)),
        "512 d24 B=8": (8, (443, 11.0)),
        "1024 d24 B=4": (4, (848, 16.8)),
    }
    assert [row.official for row in picked("--var")] == [
        (174, 3.5),
        (469, 12.6),
        (301, 13.8),
        (512, 14.1),
        (1042, 23.7),
    ]


@pytest.mark.parametrize(
    ("options", "name", "official"),
    [
        (["--image=1024", "--model=d24"], "1024 d24 B=4", (848, 16.8)),
        (["--image=256", "--model=d16", "--batch=64", "--var"], "VAR 256 d16 B=64", (469, 12.6)),
        (["--image=256", "--model=d20"], "256 d20 B=8", None),
    ],
)
def test_one_setting_is_picked_by_image_and_model(options, name, official):
    (row,) = picked(*options)
    assert (row.name, row.official) == (name, official)


@pytest.mark.parametrize("var", [False, True])
def test_random_weights_are_held_as_a_models_are(var):
    model = sample._tiny(2, var).build()
    held = held_dtypes(model.config, model.dtype)
    leaves = params.flatten(model.params)
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    assert {name: leaf.dtype for name, leaf in leaves.items() if name in held} == held


def test_every_product_of_a_sampler_is_of_a_part_and_so_are_its_filters():
    model = sample._tiny(2, False).build()
    request = program.Request.of(model.config, model.dtype, model.schedule("small"), model.params, np.zeros(2))
    lowered = program.sample.lower(request)
    traced = re.findall(r'loc\("([^"]+)"', lowered.as_text(debug_info=True))
    products = [where for where in traced if where.endswith(("dot_general", "conv_general_dilated"))]
    assert {part_of(where) for where in products} == {"transformer", "quantizer", "decoder"}
    assert "filters" in map(part_of, traced)


def test_the_bound_reads_weights_where_batches_are_small_and_multiplies_where_they_are_large():
    model = sample._tiny(2, False).build()
    plan = model.schedule("small").plan

    def bound(batch, **rates):
        return sample.least_seconds(model, plan, batch, Rates(**rates))

    reading = bound(1, copy=1.0, matmul=1e30)
    assert bound(50, copy=1.0, matmul=1e30) == pytest.approx(reading, rel=1e-3)
    block, passes = 4 * 12 * 64 * 64, 6
    assert reading == pytest.approx(passes * 2 * block, rel=0.5)  # and heads, once AdaLN's projections
    assert bound(50, copy=1e30, matmul=1.0) == pytest.approx(50 * bound(1, copy=1e30, matmul=1.0))


PROGRAM = """
%body (p: f32[2]) -> f32[2] {
  %cudnn-conv.3 = f32[2]{0} custom-call(%a), metadata={op_name="jit(sample)/while/body/decoder/conv_general_dilated"}
}
ENTRY %main {
  %loop_fusion.3 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(sample)/transformer/jit(step)/add" id=1}
  %loop_fusion.4 = f32[2]{0} fusion(%a), metadata={op_name="jit(sample)/filters/add"}
  %reduce-fusion = f32[2]{0} fusion(%a), metadata={op_name="jit(sample)/quantizer/dot_general"}
  ROOT %copy.1 = f32[2]{0} copy(%a), metadata={op_name="jit(sample)/my_decoder_of/add"}
}
"""


def test_kernels_are_told_apart_by_the_scope_they_were_traced_in():
    times = [
        ("memcpy32_post", "memcpy32_post", 64.0),  # before all that is known
        ("command_buffer_7", "loop_fusion_3", 1.0),
        ("command_buffer_7", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", 2.0),
        ("%loop_fusion.4 = f32[2]{0} fusion(%a)", "%loop_fusion.4 = f32[2]{0} fusion(%a)", 4.0),
        ("reduce-fusion", "reduce_fusion", 8.0),
        ("cudnn-conv.3", "sm90_xmma_fprop_implicit_gemm", 16.0),
        ("copy.1", "memcpy", 32.0),
    ]
    parts = {"transformer": 3.0, "filters": 4.0, "quantizer": 8.0, "decoder": 16.0, "rest": 96.0}
    assert by_part([Kernel(*kernel) for kernel in times], PROGRAM) == parts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch=0"], "--batch is 0; expected a whole number, 1 to 65536."),
        (["--image=256"], "--image and --model go together, such as --image=256 --model=d16."),
        (["--model-dir=here", "--var"], "--model-dir says what to measure; leave --image, --model and --var out."),
        (["--model-dir={missing}"], "missing"),
        (["--image=256", "--model=d99"], "d99"),
        (["--image=255", "--model=d16"], "255"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, said):
    options = [option.format(missing=tmp_path / "missing") for option in options]
    assert main(["bench", "sample", *options, f"--output={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
