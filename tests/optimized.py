"""What onnxruntime makes of a file."""

import math

import onnx
from lightning_prune.export.runtime import load_onnxruntime


def optimized_numbers(path, loaded):
    """Floats that onnxruntime holds after it has optimized a file and folded its constants."""
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(loaded)
    options.log_severity_level = 3
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = onnx.load(loaded).graph.initializer
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT)
