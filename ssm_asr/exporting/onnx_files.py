"""Writes parts as ONNX files, converts these to half precision or 8-bit weights, validates them, and runs them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from ssm_asr.exporting.check import listed
from ssm_asr.exporting.parts import Part

OPSET = 17
PRECISIONS = ("fp32", "fp16", "int8")


def file_name(part: str, precision: str) -> str:
    """Returns the name of a part's file, such as encoder.onnx, encoder.fp16.onnx or encoder.int8.onnx."""
    return f"{part}.onnx" if precision == "fp32" else f"{part}.{precision}.onnx"


def write_onnx(part: Part, path: Path) -> None:
    """Writes a part in float32.

    Raises:
        ValueError: as in `validate`.
    """
    with warnings.catch_warnings():
        # The warnings are about shapes that become constants, as they should, and about the age of the exporter.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.module,
            part.draw(2),
            str(path),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes=part.inputs | part.outputs,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: str(value) for key, value in part.metadata.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    validate(part, path)


def convert(path: Path, precision: str, out: Path) -> None:
    """Converts a float32 file to a smaller one with equal inputs, outputs and metadata.

    Args:
        path: the file in float32.
        precision: "fp16" stores the weights in half precision and computes in float32, so that it runs on any
            processor; "int8" stores the weights of linear layers in 8 bits and quantises their inputs dynamically.
        out: the file to write.
    """
    if precision == "fp16":
        onnx.save(_with_half_weights(onnx.load(path)), out)
    else:
        folded = out.with_suffix(".folded")
        quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
        quantize_dynamic(folded, out, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        folded.unlink()


def _with_half_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stores every constant matrix in half precision, and casts it back to float32 in the graph.

    Vectors stay in float32, because they are small.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=tensor.data_type))
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{tensor.name}.half"))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def open_onnx(path: Path) -> onnxruntime.InferenceSession:
    """Opens a file on one CPU thread, which is enough for small chunks."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path) -> Callable[..., list[Tensor]]:
    """Returns the file as a function of tensors, which are bound to its inputs by position, as runtimes do."""
    session = open_onnx(path)
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def validate(part: Part, path: Path) -> None:
    """Checks what a runtime takes for granted: where it is wrong, a runtime may end its process without an exception.

    Raises:
        ValueError: if names, order, types or sizes of inputs or outputs, or the metadata, differ from the part's.
    """
    session = open_onnx(path)
    inputs = part.draw(2)
    with torch.inference_mode():
        outputs = listed(part.module(*inputs))
    for what, nodes, axes, tensors in (
        ("input", session.get_inputs(), part.inputs, inputs),
        ("output", session.get_outputs(), part.outputs, outputs),
    ):
        if [node.name for node in nodes] != list(axes):
            raise ValueError(f"{path}: {what}s are {[node.name for node in nodes]}, not {list(axes)}")
        for node, tensor in zip(nodes, tensors, strict=True):
            kind = "tensor(float)" if tensor.dtype == torch.float32 else "tensor(int64)"
            if node.type != kind:
                raise ValueError(f"{path}: {what} {node.name} is {node.type}, not {kind}")
            for axis, size in enumerate(tensor.shape):
                if axis not in axes[node.name] and isinstance(node.shape[axis], int) and node.shape[axis] != size:
                    raise ValueError(f"{path}: {what} {node.name} has shape {node.shape}, not {list(tensor.shape)}")
    found = session.get_modelmeta().custom_metadata_map
    for key, value in part.metadata.items():
        if found.get(key) != str(value):
            raise ValueError(f"{path}: metadata {key} is {found.get(key)!r}, not {str(value)!r}")
