"""Classes of GPU kernels, and of operators on a CPU, by their names: a table of patterns."""

from __future__ import annotations

import functools
import re
from typing import Tuple

OURS = "attention, this package"
ATTENTION = "attention, others"
OTHER = "other"

# The Triton kernels of this package. The FlashBias checkout's are called _fwd_kernel, _bwd_kernel.
KERNELS = (
    "forward_kernel|combine_kernel|visible_kernel|prepare_kernel|rows_kernel|keys_kernel"
    "|queries_kernel|sum_kernel|_sum_kernel|_join_kernel|window_forward_kernel"
    "|window_rows_kernel|window_keys_kernel|window_queries_kernel|places_kernel|centres_kernel"
    "|lists_kernel|blocks_kernel|cast_kernel|peaks_kernel|divide_kernel"
)

# (class, pattern): the first that is found in a name decides, so the special ones come first.
PATTERNS: Tuple[Tuple[str, str], ...] = (
    ("communication", r"nccl|rccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"),
    (OURS, rf"^({KERNELS})(_\d\w*)?$|^_(fwd|bwd)_kernel|flashbias|_FusedAttention|_Chunked"),
    (
        ATTENTION,
        r"flash_(fwd|bwd)|pytorch_flash|flash_attn|fmha|flash::|sdpa|scaled_dot_product"
        r"|ScaledDotProduct|efficient_attention|MultiheadAttention",
    ),
    ("optimizer", r"multi_tensor_apply|multi_?tensor|Optimizer\.|Adam|_fused_(adam|sgd)|FusedLAMB"),
    (
        "convolution",
        r"conv(?!ert)|fprop|dgrad|wgrad|winograd|implicit_gemm|nchwToNhwc|nhwcToNchw|im2col|col2im|spconv",
    ),
    ("softmax", r"softmax"),
    (
        "matmul",
        r"gemm|gemv|nvjet|cutlass|splitK|dot_kernel|triton_tem_\w*(mm|addmm)"
        r"|aten::(mm|bmm|addmm|baddbmm|addbmm|matmul|linear|dot|mv|addmv|einsum)\b|cublas|mkldnn_linear",
    ),
    (
        "copies",
        r"memcpy|memset|copy|CatArray|transpose|FillFunctor|clone"
        r"|aten::(cat|stack|contiguous|to|_to_copy|fill_|zero_|zeros|zeros_like|pad|constant_pad_nd)\b",
    ),
    (
        "reductions and norms",
        r"reduce_kernel|triton_(red|per)_|layer_?norm|batch_?norm|group_?norm|RowwiseMoments"
        r"|GammaBeta|cuCompute|LayerNorm|BatchNorm|bn_fw|bn_bw|cub::.*Reduce"
        r"|aten::(sum|mean|max|min|amax|amin|norm|linalg_vector_norm|_foreach_norm|var|std|argmax"
        r"|all|any|cumsum|topk|sort)\b",
    ),
    (
        "elementwise",
        r"elementwise|triton_poi_|dropout|gelu|silu|relu|sigmoid|CUDAFunctor|BinaryFunctor"
        r"|aten::(add|sub|mul|div|rsub|pow|sqrt|rsqrt|reciprocal|exp|log|neg|abs|clamp|clamp_min"
        r"|where|masked_fill|lerp|addcmul|addcdiv|tanh|sin|cos|threshold_backward|bernoulli|eq|ne"
        r"|gt|lt|ge|le|sign|maximum|minimum|_foreach_\w+)_?\b",
    ),
)
CLASSES = tuple(name for name, _ in PATTERNS) + (OTHER,)
_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in PATTERNS)


@functools.lru_cache(maxsize=4096)
def class_of(name: str) -> str:
    """One of CLASSES."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)
