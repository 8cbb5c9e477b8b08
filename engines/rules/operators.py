"""What TensorRT's ONNX parser takes, by version: data, each table with the document that it comes from.

Types are those of an operator's first input. Versions are (major, minor) of the first that has it.
"""

from __future__ import annotations

Version = tuple[int, int]

DOC_10_1 = "onnx-tensorrt, docs/operators.md, branch 10.1-GA"
DOC_10_15 = "onnx-tensorrt, docs/operators.md of TensorRT 10.15"
CHANGES = "onnx-tensorrt, docs/Changelog.md; NVIDIA/TensorRT, CHANGELOG.md"
HEADER = "NVIDIA/TensorRT, include/NvInfer.h"
IMPORTER = "onnx-tensorrt, onnxOpImporters.cpp"

# Highest opset of the default domain; the lowest is 9 throughout. Versions between keep the last documented value.
LOWEST_OPSET = 9
HIGHEST_OPSET: dict[Version, tuple[int, str]] = {(10, 0): (20, DOC_10_1), (10, 15): (24, DOC_10_15)}

_FLOATS = "FLOAT FLOAT16 BFLOAT16"
_NUMBERS = f"{_FLOATS} INT32 INT64"
_ALL = f"{_NUMBERS} BOOL"

# (since, source, types, operators)
TABLE: tuple[tuple[Version, str, str, str], ...] = (
    (
        (10, 0),
        DOC_10_1,
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul "
        "Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK "
        "Gelu Mean",
    ),
    (
        (10, 0),
        DOC_10_1,
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
        "GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log "
        "LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus Pow "
        "PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RNN "
        "Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    # The table says floats; the importer makes integers into Max and Min.
    ((10, 0), f"{IMPORTER}, Clip", _NUMBERS, "Clip"),
    ((10, 0), DOC_10_1, "BOOL", "And Not Or Xor"),
    ((10, 0), DOC_10_1, f"{_ALL} UINT8", "Cast CastLike"),
    (
        (10, 0),
        DOC_10_1,
        _ALL,
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    ((10, 0), DOC_10_1, "FLOAT FLOAT16", "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    ((10, 0), DOC_10_1, "INT8 INT4 FLOAT8E4M3FN", "DequantizeLinear"),
    ((10, 4), CHANGES, "INT32 INT64", "BlackmanWindow HammingWindow HannWindow"),
    ((10, 5), CHANGES, "FLOAT", "STFT"),
    ((10, 14), CHANGES, _FLOATS, "Attention"),
    ((10, 15), CHANGES, _FLOATS, "RotaryEmbedding RMSNormalization"),
    ((10, 15), DOC_10_15, f"{_FLOATS} INT32", "TensorScatter"),
    ((11, 0), CHANGES, _FLOATS, "Swish"),
)

# Operator -> (since, types, source).
OPERATORS: dict[str, tuple[Version, frozenset[str], str]] = {
    name: (since, frozenset(types.split()), source) for since, source, types, names in TABLE for name in names.split()
}

# Types that no tensor of a network may have. (UINT8 may only enter or leave; this project has none.)
FOREIGN_TYPES = frozenset(("DOUBLE", "STRING", "COMPLEX64", "COMPLEX128", "INT16", "UINT16", "UINT32", "UINT64"))

# Operator -> inputs that must be resolvable to constants, by position.
CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "CumSum", "OneHot"), (1,)),
    **{name: (1,) for name in OPERATORS if name.startswith("Reduce")},
}

# Output shapes that depend on values: legal for TensorRT, but they force a synchronisation in the middle of a step and
# cannot be captured in a CUDA graph.
DATA_DEPENDENT = frozenset(("NonZero", "NonMaxSuppression"))

MAX_RANK = 8  # nvinfer1::Dims::MAX_DIMS
TOP_K_BELOW = 3840
