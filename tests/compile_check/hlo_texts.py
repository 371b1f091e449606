"""Programs in HLO's text: one as a TPU's compiler writes it, and any single lines."""

from hmar_jax.compile_check.hlo import Program

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
