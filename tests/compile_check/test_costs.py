"""What compile-check reads out of a compiled program, on small programs with known answers."""

import jax
import jax.numpy as jnp
import pytest
from hlo_texts import TPU, entry

from hmar_jax.compile_check import costs
from hmar_jax.compile_check.hlo import Program


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
