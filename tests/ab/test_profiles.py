"""Profiles: kernels by class, N steps after the timed ones, the difference in every format."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import flashbias_patch
from flashbias_patch.ab import kernel_classes, profiles, report
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.kernel_classes import ATTENTION, CLASSES, OURS, class_of

from . import synthetic
from .test_probe import python

NAMES = {
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllGather_RING_LL_Sum_int8_t",
        "c10d::allreduce_",
        "gloo:all_reduce",
    ],
    OURS: [
        "forward_kernel",
        "rows_kernel",
        "window_keys_kernel",
        "_join_kernel",
        "forward_kernel_0d1d2d3de",
        "_bwd_kernel",
        "_FusedAttentionBackward",
    ],
    ATTENTION: [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<32>>",
        "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64_4x1x1",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
        "namespace)::FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW, false>>",
        "Optimizer.step#AdamW.step",
        "aten::_fused_adamw_",
    ],
    "convolution": [
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_stage3",
        "sm90_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s16816dgrad_optimized_f16>",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>",
        "aten::mkldnn_convolution",
        "ConvolutionBackward0",
    ],
    "softmax": [
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "aten::_softmax",
        "triton_per_fused__softmax_0",
    ],
    "matmul": [
        "ampere_sgemm_128x64_tn",
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_64x64_16x6_tn_align4>",
        "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "triton_tem_fused_addmm_3",
        "aten::addmm",
        "aten::bmm",
    ],
    "copies": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
        "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<float, 4>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "aten::copy_",
        "aten::cat",
        "triton_poi_fused_clone_2",
    ],
    "reductions and norms": [
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        "triton_red_fused_native_layer_norm_7",
        "aten::native_batch_norm",
        "aten::sum",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::unrolled_elementwise_kernel<at::native::GeluCUDAKernelImpl>",
        "void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float, float>",
        "triton_poi_fused_add_mul_3",
        "aten::mul_",
        "aten::addcmul_",
        "aten::threshold_backward",
    ],
    "other": [
        "void at::native::index_elementwise"[:24],
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>",
        "void some_plugin::nms_bev<float>",
        "aten::item",
    ],
}


@pytest.mark.parametrize("kind, name", [(k, n) for k, names in NAMES.items() for n in names])
def test_class_of(kind, name):
    assert class_of(name) == kind


def test_every_class_has_names_here():
    assert set(NAMES) == set(CLASSES)


def test_every_triton_kernel_of_this_package_is_known():
    """Kernels are launched from Python by their names: those that end in _kernel."""
    found = set()
    for path in (Path(flashbias_patch.__file__).parent / "attention" / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name)
    assert len(found) > 12
    assert {name for name in found if class_of(name) != OURS} == set()
    assert found >= set(re.findall(r"\w+", kernel_classes.KERNELS))


def test_steps_are_profiled_after_the_timed_ones(tmp_path):
    process, output, (found,) = python(
        tmp_path,
        """
        for i in range(1000): print(step(torch.ones(2, 4)))
    """,
        FLASHBIAS_PROBE_STEPS="3",
        FLASHBIAS_PROBE_PROFILE="2",
    )
    assert process.returncode == 0 and len([x for x in output.split() if "." in x]) >= 4, output
    assert len(found.steps) == 3 and found.stopped and found.ended and not found.notes
    kept = found.profile
    assert (kept["steps"], kept["device"], kept["rest_s"]) == (2, "cpu", 0)
    names = {name: calls for name, _, calls in kept["kernels"]}
    assert names["aten::addmm"] == 2 and names["Optimizer.step#SGD.step"] == 2
    assert all(seconds > 0 for _, seconds, _ in kept["kernels"])


def test_a_command_that_ends_while_profiled_keeps_what_there_is(tmp_path):
    _, output, (found,) = python(
        tmp_path,
        "for i in range(4): step(torch.ones(2, 4))",
        FLASHBIAS_PROBE_STEPS="3",
        FLASHBIAS_PROBE_PROFILE="9",
    )
    assert len(found.steps) == 3 and found.profile["steps"] == 1 and found.ended, output


def profiled(seconds, steps=2):
    """An A B B A experiment with {kernel: seconds} by side, over so many steps."""
    found = synthetic.trial(0, repeats=2)
    for run in found.runs[:2]:
        run.processes[0].profile = {
            "event": "profile",
            "steps": steps,
            "device": "cuda",
            "kernels": [[name, s, 4] for name, s in seconds[run.label].items()],
            "rest_s": 0.001,
        }
    return found


def test_the_difference_by_class_is_in_every_format():
    a = {"ampere_sgemm_128x64_tn": 0.080, "softmax_warp_forward": 0.060}
    b = {"ampere_sgemm_128x64_tn": 0.078, "forward_kernel": 0.020}
    found = profiled({"A": a, "B": b})
    verdict = judge(found)
    rows = {row.name: row for row in profiles.rows(found, verdict)}
    assert list(rows) == ["softmax", OURS, "matmul", "other", "all"]  # the largest difference first
    assert rows["softmax"].difference == pytest.approx(-0.030)
    assert rows["all"].difference == pytest.approx(-0.021)
    for text in (report.text(found, verdict), report.markdown(found, verdict)):
        assert "Time of GPU kernels a step, by class (2 steps under torch.profiler" in text
        assert "-30.000\u00a0ms" in text and "+10.000\u00a0ms" in text
    kept = report.summary(found, verdict)["profile"]
    assert kept["classes"][0]["name"] == "softmax" and kept["kernels"]["B"][1]["class"] == OURS
    pytest.importorskip("jinja2")
    assert "Where the difference comes from" in report.html(found, verdict)


def test_without_a_profile_of_both_sides_there_is_no_table():
    found = profiled({"A": {"aten::mm": 1.0}, "B": {"aten::mm": 1.0}})
    found.runs[1].processes[0].profile = {}
    verdict = judge(found)
    assert profiles.rows(found, verdict) == [] and "torch.profiler" not in report.text(
        found, verdict
    )
    assert report.summary(found, verdict)["profile"] is None
