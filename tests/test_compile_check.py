"""What compile-check reads out of a compiled program, and what it makes of it, on small programs with known answers.

(Over 400 lines, a quarter of them the text of one program.)
"""

import importlib.util
import os
import re
import types

import jax
import jax.numpy as jnp
import pytest

from hmar_jax.compile_check import costs, programs, report, topology
from hmar_jax.compile_check.hlo import Program
from hmar_jax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig, TransformerConfig
from hmar_jax.errors import InputError
from hmar_jax.flops import model_flops
from hmar_jax.scales import ScaleLadder
from pallas_kernels import devices

# As libtpu 0.0.48 writes it, shortened: a scan of 5 layers that gathers a weight and keeps the layer's output.
TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/hmar_jax/transformer/blocks.py"
2 "/somewhere/flax/nnx/nn/linear.py"

FunctionNames
1 "Block.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=119 end_line=119 column=1 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%sliced (p.0: f32[5,256,64], p.1: s32[]) -> f32[1,256,64] {
  %p.0 = f32[5,256,64]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = f32[1,256,64]{2,1,0:T(8,128)S(1)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,256,64}
}

%started (p.2: f32[1,256,64]) -> (f32[1,256,64], f32[1,256,256]) {
  %p.2 = f32[1,256,64]{2,1,0:T(8,128)S(1)} parameter(0)
  %all-gather.1 = f32[1,256,256]{2,1,0:T(8,128)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={2}
  ROOT %custom-call.1 = (f32[1,256,64]{2,1,0:T(8,128)S(1)}, f32[1,256,256]{2,1,0:T(8,128)S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ended (p.3: f32[1,256,64]) -> f32[1,256,256] {
  %p.3 = f32[1,256,64]{2,1,0:T(8,128)S(1)} parameter(0)
  %all-gather.2 = f32[1,256,256]{2,1,0:T(8,128)S(1)} all-gather(%p.3), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={2}
  ROOT %custom-call.2 = f32[1,256,256]{2,1,0:T(8,128)S(1)} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%kept (p.4: bf16[5,16,256], p.5: f32[16,256], p.6: f32[1,256,256], p.7: s32[]) -> bf16[5,16,256] {
  %p.4 = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.5 = f32[16,256]{1,0:T(8,128)S(1)} parameter(1)
  %p.6 = f32[1,256,256]{2,1,0:T(8,128)S(1)} parameter(2)
  %p.7 = s32[]{:T(128)} parameter(3)
  %zero.1 = s32[]{:T(128)} constant(0)
  %square = f32[256,256]{1,0:T(8,128)S(1)} bitcast(%p.6)
  %convolution.1 = f32[16,256]{1,0:T(8,128)} convolution(%p.5, %square), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp()/while/body/checkpoint/dot_general" stack_frame_id=2}
  %convert.1 = bf16[16,256]{1,0:T(8,128)(2,1)} convert(%convolution.1)
  %row = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} bitcast(%convert.1)
  ROOT %update.1 = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p.4, %row, %p.7, %zero.1, %zero.1), metadata={op_name="jit(step)/jvp()/while/body/dynamic_update_slice" stack_frame_id=1}
}

%all-reduce-scatter.1 (p.8: f32[64,256]) -> f32[16,256] {
  %p.8 = f32[64,256]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,256]{1,0:T(8,128)} all-reduce(%p.8), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %at = u32[]{:T(128)} constant(0)
  ROOT %slice.2 = f32[16,256]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %at, %at), dynamic_slice_sizes={16,256}
}

%body (carry: (s32[], bf16[5,16,256], f32[5,256,64], f32[16,256])) -> (s32[], bf16[5,16,256], f32[5,256,64], f32[16,256]) {
  %carry = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, f32[5,256,64]{2,1,0:T(8,128)}, /*index=3*/f32[16,256]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %outputs = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %weights = f32[5,256,64]{2,1,0:T(8,128)} get-tuple-element(%carry), index=2
  %x = f32[16,256]{1,0:T(8,128)S(1)} get-tuple-element(%carry), index=3
  %weight = f32[1,256,64]{2,1,0:T(8,128)S(1)} fusion(%weights, %i), kind=kLoop, calls=%sliced
  %fusion.1 = (f32[1,256,64]{2,1,0:T(8,128)S(1)}, f32[1,256,256]{2,1,0:T(8,128)S(1)}) fusion(%weight), kind=kCustom, calls=%started
  %fusion.2 = f32[1,256,256]{2,1,0:T(8,128)S(1)} fusion(%weight), kind=kCustom, calls=%ended
  %fusion.3 = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} fusion(%outputs, %x, %fusion.2, %i), kind=kOutput, calls=%kept
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, f32[5,256,64]{2,1,0:T(8,128)}, f32[16,256]{1,0:T(8,128)S(1)}) tuple(%next, %fusion.3, %weights, %x)
}

%condition (carry.1: (s32[], bf16[5,16,256], f32[5,256,64], f32[16,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry.1 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, f32[5,256,64]{2,1,0:T(8,128)}, f32[16,256]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[5,256,64], g: f32[64,256]) -> f32[16,256] {
  %a = f32[5,256,64]{2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params['w']"}
  %g = f32[64,256]{1,0:T(8,128)} parameter(1)
  %room = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %zero.2 = s32[]{:T(128)} constant(0)
  %x.1 = f32[16,256]{1,0:T(8,128)S(1)} copy(%g)
  %start = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, f32[5,256,64]{2,1,0:T(8,128)}, f32[16,256]{1,0:T(8,128)S(1)}) tuple(%zero.2, %room, %a, %x.1)
  %loop = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, f32[5,256,64]{2,1,0:T(8,128)}, f32[16,256]{1,0:T(8,128)S(1)}) while(%start), condition=%condition, body=%body
  ROOT %scattered = f32[16,256]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def entry(*lines):
    return Program("\n".join(["HloModule m", "", "ENTRY %main (p: f32[]) -> f32[] {", *(f"  {x}" for x in lines), "}"]))


def compiled_here(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


class TestArrays:
    @pytest.mark.parametrize(
        ("text", "size", "padded", "in_hbm"),
        [
            ("f32[]", 4, 4, True),
            ("bf16[3,5]{1,0}", 30, 30, True),
            ("pred[7]{0}", 7, 7, True),
            ("f8e4m3fn[4,4]{1,0}", 16, 16, True),
            ("bf16[2,16,680,1024]{3,2,1,0:T(8,128)(2,1)}", 44564480, 44564480, True),
            ("f32[5,1]{1,0:T(8,128)}", 20, 8 * 128 * 4, True),
            ("f32[5,1]{0,1:T(1,128)}", 20, 128 * 4, True),
            ("f32[3,130,9]{2,1,0:T(8,128)S(1)}", 14040, 3 * 136 * 128 * 4, False),
            ("s32[]{:T(128)}", 4, 512, True),
        ],
    )
    def test_sizes_are_those_of_elements_and_of_whole_tiles(self, text, size, padded, in_hbm):
        array = entry(f"ROOT %a = {text} iota()").runs[0].instruction.arrays[0]
        assert (array.bytes, array.padded, array.in_hbm) == (size, padded, in_hbm)


class TestLoops:
    def test_a_condition_tells_how_often_a_tpu_runs_a_body(self):
        times = {run.instruction.name: run.times for run in Program(TPU).runs}
        assert (times["loop"], times["weight"], times["convolution.1"], times["scattered"]) == (1, 5, 5, 1)

    def test_nested_scans_multiply(self):
        def inner(x, _):
            return jnp.sin(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None

        text = compiled_here(lambda x: jax.lax.scan(outer, x, None, length=5)[0], (8, 8)).as_text()
        assert costs.products(Program(text)) == 5 * 3 * 2 * 8**3

    def test_a_loop_of_unknown_length_counts_once_and_is_reported(self):
        text = compiled_here(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x), (8, 8)).as_text()
        program = Program(text)
        assert costs.products(program) == 2 * 8**3
        assert len(program.unknown_loops) == 1


class TestCollectives:
    def test_one_that_starts_and_ends_in_two_fusions_counts_once_each_time_the_loop_runs(self):
        size = 256 * 256 * 4
        assert costs.collectives(Program(TPU))["all-gather"] == costs.Collective(5, 5 * size, 5 * size * 3 / 4)

    def test_an_all_reduce_of_which_each_keeps_a_part_is_a_reduce_scatter(self):
        size = 64 * 256 * 4
        found = costs.collectives(Program(TPU))
        assert found["reduce-scatter"] == costs.Collective(1, size, size * 3 / 4)
        assert "all-reduce" not in found

    @pytest.mark.parametrize(
        ("groups", "size"),
        [
            ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
            ("replica_groups=[2,4]<=[8]", 4),
            ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
            ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=3] {'data','tensor'}", 6),
        ],
    )
    def test_groups_are_read_in_all_notations(self, groups, size):
        program = entry(
            "%a = f32[10]{0} parameter(0)",
            "%b = bf16[4]{0} parameter(1)",
            f"ROOT %r = (f32[10]{{0}}, bf16[4]{{0}}) all-reduce(%a, %b), channel_id=1, {groups}, to_apply=%add",
        )
        assert costs.collectives(program) == {"all-reduce": costs.Collective(1, 48, 48 * 2 * (size - 1) / size)}

    def test_asynchronous_forms_count_at_their_start(self):
        program = entry(
            "%a = f32[10]{0} parameter(0)",
            "%s = ((f32[10]{0}), f32[40]{0}) all-gather-start(%a), channel_id=1, replica_groups=[1,4]<=[4]",
            "%d = f32[40]{0} all-gather-done(%s)",
            "%t = (f32[40]{0}, f32[40]{0}) collective-permute-start(%d), channel_id=2, source_target_pairs={{0,1}}",
            "ROOT %e = f32[40]{0} collective-permute-done(%t)",
        )
        assert {kind: (c.count, c.payload, c.sent) for kind, c in costs.collectives(program).items()} == {
            "all-gather": (1, 160, 120.0),
            "collective-permute": (1, 160, 160.0),
        }


class TestTraffic:
    def test_slices_and_updates_in_place_move_their_part_and_fast_memory_is_free(self):
        weight, output = 256 * 128 * 4, 16 * 256 * 2  # 64 columns fill a tile of 128
        gradient = 64 * 256 * 4 + 16 * 256 * 4
        copied, count = 64 * 256 * 4, 512  # into fast memory; the loop's own counter and limits, a tile each
        moved = costs.traffic(Program(TPU)) - (5 * (weight + output) + gradient + copied)
        assert 0 <= moved <= 5 * 8 * count

    def test_fusions_are_not_charged_for_a_collective_that_runs_beside_them(self):
        beside = """HloModule m

%beside (p.0: f32[10], p.1: f32[40], p.2: f32[5]) -> (f32[5], f32[10], f32[40]) {
  %p.0 = f32[10]{0} parameter(0)
  %p.1 = f32[40]{0} parameter(1)
  %p.2 = f32[5]{0} parameter(2)
  %all-gather.1 = f32[40]{0} all-gather(%p.0), channel_id=3, replica_groups=[1,4]<=[4]
  %sine = f32[5]{0} sine(%p.2)
  ROOT %tuple.1 = (f32[5]{0}, f32[10]{0}, f32[40]{0}) tuple(%sine, %p.0, %all-gather.1)
}

ENTRY %main (a: f32[10], b: f32[40], c: f32[5]) -> f32[5] {
  %a = f32[10]{0} parameter(0)
  %b = f32[40]{0} parameter(1)
  %c = f32[5]{0} parameter(2)
  %fusion.1 = (f32[5]{0}, f32[10]{0}, f32[40]{0}) fusion(%a, %b, %c), kind=kCustom, calls=%beside
  %fusion.2 = (f32[5]{0}, f32[10]{0}, f32[40]{0}) fusion(%a, %b, %c), kind=kCustom, calls=%beside
}
"""
        assert costs.traffic(Program(beside)) == 2 * (20 + 20) + 40 + 160

    @pytest.mark.parametrize(
        ("line", "moved"),
        [
            ("%r = f32[10]{0} add(%a, %a)", 80),
            ("%r = f32[10]{0:S(1)} add(%a, %a)", 40),
            ("%r = f32[2]{0} slice(%a), slice={[0:2]}", 16),
            ("%r = f32[10]{0} bitcast(%a)", 0),
            ("%r = (f32[10]{0:S(1)}, f32[10]{0}, u32[]{:S(2)}) copy-start(%a)", 40),
            ("%r = ((f32[10]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2]}", 8),
            ("%r = f32[10]{0} copy-done(%a)", 0),
        ],
    )
    def test_each_instruction_reads_operands_and_writes_results_in_hbm(self, line, moved):
        assert costs.traffic(entry("%a = f32[10]{0} parameter(0)", line)) == moved


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": "SAME"},
    {"window_strides": (2, 2), "padding": ((0, 1), (0, 1))},
    {"window_strides": (1, 1), "padding": ((2, 2), (3, 1)), "lhs_dilation": (2, 1)},
    {"window_strides": (2, 1), "padding": "VALID", "rhs_dilation": (1, 2)},
]


class TestProducts:
    @pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
    def test_convolutions_count_as_xla_counts_them(self, options):
        def convolve(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

        made = compiled_here(convolve, (2, 9, 8, 3), (3, 3, 3, 5))
        assert costs.products(Program(made.as_text())) == made.cost_analysis()["flops"] > 0

    @pytest.mark.parametrize(
        ("formula", "left", "right", "flops"),
        [("bij,bjk->bik", (3, 4, 5), (3, 5, 6), 720), ("ij,kj->ik", (4, 5), (6, 5), 240)],
    )
    def test_matrix_products_count_two_for_each_multiplication(self, formula, left, right, flops):
        text = compiled_here(lambda a, b: jnp.einsum(formula, a, b), left, right).as_text()
        assert costs.products(Program(text)) == flops

    @pytest.mark.parametrize(
        ("target", "operands", "made", "flops"),
        [
            ("cublas$lt$matmul", "%a, %b", "f32[4,6]", 2 * 4 * 5 * 6),
            ("cudnn$convBiasActivationForward", "%x, %w, %bias", "f32[2,8,7,5]", 2 * 2 * 3 * 5 * 22 * 19),
            ("cudnn$convBackwardInput", "%y, %w", "f32[2,8,7,3]", 2 * 2 * 3 * 5 * 22 * 19),
            ("cudnn$convBackwardFilter", "%x, %y", "f32[5,3,3,3]", 2 * 2 * 3 * 5 * 22 * 19),
        ],
    )
    def test_products_of_a_gpus_libraries_count_as_much(self, target, operands, made, flops):
        window = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, " if "conv" in target else ""
        contracted = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
        shapes = {"a": "4,5", "b": "5,6", "x": "2,8,7,3", "w": "5,3,3,3", "y": "2,8,7,5", "bias": "5"}
        program = entry(
            *[f"%{name} = f32[{shape}] parameter({i})" for i, (name, shape) in enumerate(shapes.items())],
            f'%r = ({made}, u8[0]) custom-call({operands}), {window}custom_call_target="__{target}", '
            f"backend_config={{{contracted}}}",
        )
        assert costs.products(program) == flops

    def test_a_product_that_a_tpu_writes_as_a_convolution(self):
        assert costs.products(Program(TPU)) == 5 * 2 * 16 * 256 * 256


class TestLargestArrays:
    def test_they_are_named_by_what_computes_them_not_by_what_keeps_them(self):
        first = costs.largest(Program(TPU), 1)[0]
        shape, name = "bf16[5,16,256]", "forward, layer: dot_general"
        assert first == costs.LargeArray(5 * 16 * 256 * 2, shape, name, "hmar_jax/transformer/blocks.py:119")

    def test_arrays_outside_hbm_are_left_out(self):
        shapes = {array.shape for array in costs.largest(Program(TPU), 100)}
        assert "f32[16,256]" in shapes
        assert "f32[1,256,256]" not in shapes


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
