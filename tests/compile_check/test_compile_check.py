"""What compile-check makes of topologies and compiled programs: model FLOPs, bounds, reports and remedies."""

import importlib.util
import os
import re
import types

import jax
import pytest
from hlo_texts import TPU

from hmar_jax.compile_check import costs, programs, report, topology
from hmar_jax.compile_check.hlo import Program
from hmar_jax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.flops import model_flops
from hmar_jax.scales import ScaleLadder
from pallas_kernels import devices


@pytest.mark.parametrize(
    ("refusal", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.97G) "
            "exceeds available HBM (15.75G). HLO module: jit_f.",
            17.97 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.10G:",
            20.1 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.10M of 16.00M vmem.", 0),
        ("INTERNAL: Mosaic failed to compile", 0),
    ],
)
def test_a_refusal_for_lack_of_memory_tells_how_much_is_needed(refusal, needed):
    assert programs.memory_needed(refusal) == pytest.approx(needed)


class TestTopologies:
    @pytest.mark.parametrize(
        "name", ["v9:2x2", "v5e", "v5e:16", "v5e:2x2*", "h200:0", "h100", "", "h200:999999999", "v5e:²x2", "A" * 5000]
    )
    def test_other_names_are_refused(self, name):
        with pytest.raises(InputError, match="No topology is named"):
            topology.open_topology(name)

    @pytest.mark.parametrize("name", ["v5e:9999x9999", "v5e:16x16*9999", "h200:999", "v5p:0x2x2"])
    def test_devices_are_bounded_before_they_are_made(self, name):
        with pytest.raises(InputError, match=r"has \d+ devices; expected 1 to "):
            topology.open_topology(name)

    @pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h200", "cuda")])
    def test_a_compiler_that_is_not_installed_is_named(self, name, extra, monkeypatch):
        monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(InputError, match=rf"not installed; `pip install .*\[{extra}\]"):
            topology.open_topology(name)


def config(**changes):
    base = {
        "stage": "next_scale", "init_from": "/nowhere", "sides": (1, 4), "batch_size": 8, "dtype": "float32",
        "tokenizer": TokenizerConfig(
            channels=8, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=1, norm_groups=4, latent_channels=4,
            codebook_size=16, downsampling=2, phis=2,
        ),
        "transformer": TransformerConfig(depth=3, width=32, heads=2, branch_depth=1, num_classes=3),
        "data": DataConfig("tokens", path="/nowhere"),
    }  # fmt: skip
    return TrainConfig(**(base | changes))


@pytest.mark.parametrize("kind", ["file", "pipe", "loop", "folder"])
def test_a_start_that_is_here_but_is_no_model_is_refused(tmp_path, kind):
    path = tmp_path / "start"
    {"file": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}[
        kind
    ]()
    with pytest.raises(InputError, match=f"{path} (is not a model directory|could not be read .* leads to itself)"):
        programs.start_model(config(init_from=str(path)))


class TestModelFlops:
    def test_blocks_of_d16_count_as_published_formulas_do(self):
        model = ModelConfig(ScaleLadder.preset(256), TokenizerConfig(), TransformerConfig.preset("d16", masked=False))
        flops = model_flops(config(batch_size=64), model)
        tokens = 64 * 680
        assert flops["blocks"] == 6 * 12 * 1024**2 * 16 * tokens
        assert flops["head"] == 6 * 1024 * 4096 * tokens
        assert flops["attention"] == pytest.approx(3 * 16 * 29.0e9, rel=2e-3)  # 29.0 GF forward, B=64, H=16

    def test_a_frozen_trunk_has_no_backward_pass(self):
        model = ModelConfig(ScaleLadder((1, 2)), TokenizerConfig(), TransformerConfig(12, 64, 4, branch_depth=4))
        whole, masked = (model_flops(config(stage=stage), model) for stage in ("next_scale", "masked"))
        assert masked["blocks"] / whole["blocks"] == masked["attention"] / whole["attention"] == (12 + 2 * 4) / 36
        assert masked["head"] == whole["head"]


CHIP = topology.Chip("a chip", 2e9, 1e9, flops=1e6, bandwidth=1e5, network=1e4)


def stub(text, **sizes):
    """An executable with that text and these sizes."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    stats = types.SimpleNamespace(**{f"{name}_size_in_bytes": sizes.get(name, 0) for name in names})
    return programs.Compiled(types.SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: stats), 1.0)


@pytest.fixture(scope="module")
def here():
    return topology.Topology("here", CHIP, tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def prepared(here):
    return programs.prepare(config(mesh=MeshConfig(data=1)), here)


class TestReport:
    def test_the_bound_is_the_longest_of_three_times(self, prepared, here):
        found = report.report(prepared, here, stub(TPU, argument=30, output=30, alias=20, temp=25, generated_code=5))
        program = Program(TPU)
        sent = sum(kind.sent for kind in costs.collectives(program).values())
        assert found.bound.products == costs.products(program) / 1e6
        assert found.bound.memory == costs.traffic(program) / 1e5
        assert found.bound.network == sent / 1e4
        assert (found.bound.seconds, found.bound.reason) == (found.bound.network, "network")
        assert found.mfu == sum(found.model_flops.values()) / (1e6 * found.bound.seconds)
        resident = sum(size for size, _ in report.state_arrays(prepared)) + 12  # the step, and a key of two words
        assert found.memory.total == 70 + found.memory.idle == 70 + resident - 30
        assert found.attention == "xla"

    @pytest.mark.parametrize(("temporaries", "fits"), [(1000, True), (1001, False)])
    def test_it_fits_up_to_the_usable_memory(self, prepared, here, temporaries, fits):
        assert report.report(prepared, here, stub(TPU, argument=CHIP.usable - 1000, temp=temporaries)).fits is fits

    def test_a_refusal_is_what_does_not_fit(self, prepared, here):
        found = report.report(prepared, here, programs.Compiled(None, 1.0, 200.0))
        assert (found.fits, found.memory.total, found.bound) == (False, 200.0, None)

    @pytest.mark.parametrize(
        ("capability", "installed", "expected"),
        [
            ("", True, ""),
            ("7.5", True, ""),
            ("9.0", True, "2 calls"),
            ("9.0", False, r"none, for jax_triton is not installed here; .*`pip install .*\[triton\]'`"),
        ],
    )
    def test_it_says_which_triton_kernels_the_program_has(
        self, prepared, here, monkeypatch, capability, installed, expected
    ):
        call = '  %t{} = f32[2] custom-call(%p), custom_call_target="triton_kernel_call"'
        lines = [call.format(i) for i in range(2)] if expected == "2 calls" else ["  ROOT %a = f32[2] negate(%p)"]
        text = "\n".join(["HloModule m", "", "ENTRY %main (p: f32[2]) -> f32[2] {", *lines, "}"])
        monkeypatch.setattr(devices, "compute_capability", lambda: capability)
        monkeypatch.setattr(devices, "is_installed", lambda _: installed)
        found = report.report(prepared, here, stub(text))
        assert re.fullmatch(expected, found.triton)
        shown = [line for line in report.text(prepared, here, [found], []).splitlines() if "Triton" in line]
        assert shown == ([f"  Triton kernels: {found.triton}"] if expected else [])


@pytest.mark.skipif(
    not (importlib.util.find_spec("jax_triton") and importlib.util.find_spec("jax_plugins")),
    reason="needs the extras cuda and triton, no GPU",
)
def test_the_step_for_an_h200_has_the_triton_kernels_whatever_device_is_here():
    at = topology.open_topology("h200:2")
    text = programs.lower_train_step(programs.prepare(config(dtype="bfloat16"), at)).as_text()
    assert text.count("custom_call @triton_kernel_call") >= 4  # gradients of norms and GELU, of a trunk and a branch


def tight(usable, **changes):
    """A stage on one device with so much memory."""
    chip = topology.Chip("a chip", usable, usable, 1.0, 1.0, 1.0)
    at = topology.Topology("here", chip, tuple(jax.devices()[:1]))
    return programs.prepare(config(mesh=MeshConfig(data=1), **changes), at), at


class TestRemedies:
    def test_remat_comes_first_and_is_enough_where_layers_keep_most(self):
        setup, at = tight(1e6, batch_size=1024, remat="dots")
        state = sum(size for size, _ in report.state_arrays(setup))
        kept = report.kept_bytes(setup, "dots")
        setup, at = tight(state + 0.5 * kept, batch_size=1024, remat="dots")
        (only,) = report.remedies(setup, at, state + 1.2 * kept)
        assert only.enough
        assert only.change.startswith("--config.remat=all")
        assert only.estimate == pytest.approx(state + 0.2 * kept + report.kept_bytes(setup, "all"))

    @pytest.mark.parametrize(("now", "ways", "wider"), [(1, 12, [2, 4]), (3, 12, [6, 12]), (2, 6, [])])
    def test_only_ways_that_divide_the_devices_are_proposed_for_fsdp(self, now, ways, wider):
        setup = types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"fsdp": now}), ways=ways)
        proposed = report._wider_fsdp(setup, report._Load(96.0, 0.0, 0.0))
        assert [change.split(",")[0] for change, _ in proposed] == [f"--config.mesh.fsdp={n}" for n in wider]
        assert [load.split for _, load in proposed] == [96 * now / n for n in wider]

    def test_a_batch_is_then_worked_off_in_parts(self):
        setup, at = tight(1e6, batch_size=1024, remat="all")
        state = sum(size for size, _ in report.state_arrays(setup))
        gradients = next(size for size, name in report.state_arrays(setup) if name == "trained parameters")
        setup, at = tight(state + gradients + 260e3, batch_size=1024, remat="all")
        (only,) = report.remedies(setup, at, state + 1e6)
        assert only.change.startswith("--config.accumulate=4")
        assert only.estimate == pytest.approx(state + gradients + 250e3, rel=1e-4)

    def test_more_chips_come_last(self):
        setup, at = tight(1000.0, batch_size=1, remat="all")
        *_, last = report.remedies(setup, at, 1e6)
        assert "such chips" in last.change

    def test_nothing_is_promised_where_nothing_helps(self):
        setup, at = tight(1.0, batch_size=1, remat="all")
        assert not any(remedy.enough for remedy in report.remedies(setup, at, 1e6))
