"""Storage of ONNX programs: weights of four bits, and files of more than 2 GB."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adfq.files import replacing

#: Version of ONNX's operators that has tensors of four bits.
OPSET = 21

_LARGEST = 2**31 - 1  # bytes: protobuf's limit, and ONNX files are written in it
_RESERVE = 2**24  # bytes that are left for the graph itself


def store_in_four_bits(program: Any, names: Sequence[str]) -> None:
    """Replace, in place, int8 initializers by INT4 ones that are cast to int8.

    onnxruntime does the cast once, when it reads the file, and has kernels for products of int8 alone.

    Args:
        program: a torch.onnx.ONNXProgram of `OPSET`.
        names: initializers with codes from -8 to 7.
    """
    import ml_dtypes
    import onnx_ir

    graph = program.model.graph
    for name in names:
        value = graph.initializers.pop(name)
        codes = value.const_value.numpy().astype(ml_dtypes.int4)
        tensor = onnx_ir.Tensor(codes, name=f"{name}.int4")
        packed = onnx_ir.Value(
            name=tensor.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(packed)
        cast = onnx_ir.node("Cast", [packed], {"to": onnx_ir.DataType.INT8})
        value.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name = name
        graph.insert_before(graph[0], cast)


@contextmanager
def writing(program: Any, file: str | os.PathLike[str]) -> Iterator[None]:
    """Write a program to a file that appears when the block ends without an error; above 2 GB to two.

    The second one is `data_file` of `file`, and holds the weights (ONNX's external data). That of an earlier program,
    which is of no use any more, is deleted.

    Args:
        program: a torch.onnx.ONNXProgram.
        file: path to write, or to replace.

    Raises:
        AdfqError: for files that cannot be written.
    """
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    data = data_file(file)
    if weights + _RESERVE <= _LARGEST:
        stale = _has_external_data(file)
        with replacing(file) as temporary:
            temporary.write_bytes(program.model_proto.SerializeToString())
            yield
        if stale:
            data.unlink(missing_ok=True)
        return
    # The data is in its place before the file that names it.
    with replacing(file) as temporary, replacing(data) as external:
        _save(program, temporary, external, data.name)
        yield


def data_file(file: str | os.PathLike[str]) -> Path:
    """Return the path of the weights of an ONNX file above 2 GB: ``vit.onnx.data`` for ``vit.onnx``.

    Args:
        file: path of the ONNX file.
    """
    return Path(f"{os.fspath(file)}.data")


def file_size(file: str | os.PathLike[str]) -> int:
    """Return the size of an ONNX file in bytes, with its weights where these are in a file of their own.

    Args:
        file: path of a file from `writing`.
    """
    data = data_file(file)
    return Path(file).stat().st_size + (data.stat().st_size if _has_external_data(file) else 0)


def _has_external_data(file: str | os.PathLike[str]) -> bool:
    """Return True for an ONNX file whose weights are in `data_file`, and not in another program's."""
    import onnx

    data = data_file(file)
    if not data.is_file() or not Path(file).is_file():
        return False
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception:  # no ONNX file
        return False
    return any(entry.value == data.name for tensor in graph.initializer for entry in tensor.external_data)


def _save(program: Any, file: Path, external: Path, name: str) -> None:
    """Write a program, and its weights to a file that will have another name."""
    import onnx
    import onnx_ir

    onnx_ir.save(program.model, file, external_data=external.name)
    proto = onnx.load(file, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    file.write_bytes(proto.SerializeToString())
