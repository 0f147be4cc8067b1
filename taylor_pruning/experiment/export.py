"""Exports a network to files that run without this toolkit.

export_model(smaller, images[:2], "pruned_model.onnx", "onnx")
"""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from taylor_pruning.errors import InputError
from taylor_pruning.files import atomic_file, atomic_path
from taylor_pruning.surgery.copying import copy_of


def check_exporter(format: str) -> None:
    """Raises InputError for another format, or for "onnx" where the packages onnx and onnxscript are missing."""
    if format not in ("pt2", "onnx"):
        raise InputError(f"unknown export format {format!r}; use pt2 or onnx")
    if format == "pt2":
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX export needs more packages ({error}); pip install onnx onnxscript") from error


def export_model(model: nn.Module, example_input: Tensor, path: str | Path, format: str):
    """Export `model` in eval mode with a dynamic batch dimension, as "pt2" (torch.export) or "onnx" (one file).

    example_input: [B, C, H, W] on the model's device; C, H and W become fixed. The model is left as it was.
    Raises InputError as `check_exporter` does; what the exporters cannot express raises their own errors.
    """
    check_exporter(format)
    model = copy_of(model).eval()
    if len(example_input) == 1:  # torch.export takes a dimension of 1 for a constant
        example_input = torch.cat([example_input, example_input])
    if format == "pt2":
        program = torch.export.export(model, (example_input,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        buffer = io.BytesIO()  # on a full disk, torch.export's own writer ends the process
        torch.export.save(program, buffer)
        with atomic_file(path) as file:
            file.write(buffer.getbuffer())
        return
    with atomic_path(path) as temporary:
        torch.onnx.export(
            model,
            (example_input,),
            temporary,
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
