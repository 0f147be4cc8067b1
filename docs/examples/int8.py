"""int8 after pruning, by onnxruntime's quantiser or by PyTorch's own tools: files a quarter as large.

    python docs/examples/int8.py results/run/pruned_model.pt --calibration images.pt --output pruned_int8.onnx
    python docs/examples/int8.py results/run/pruned_model.pt --calibration images.pt --output pruned_int8.pt2

`pruned_model.pt` is what a pruning run has saved; `images.pt` a tensor [N, C, H, W] of some hundred training images,
normalised as for the network, from which the ranges of activations are taken. Both tools quantise statically: weights by
channel and symmetric, activations as a whole. Quantise after pruning and fine-tuning, and measure again. The file's ending
says which tool: .onnx onnxruntime's, .pt2 PyTorch's, to be read by `torch.export.load(path).module()`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from EnhancedPruning import InputError, load_pruned
from taylor_pruning.experiment.export import export_model
from taylor_pruning.experiment.weights import read_tensors

BATCH = 32  # calibration images that run at once


def quantise_onnx(model: nn.Module, images: Tensor, path: str | Path) -> None:
    """Writes an int8 ONNX file of `model`, whose activations' ranges are those on `images` (onnx, onnxruntime)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images.split(BATCH))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        export_model(model, images[:2], plain, "onnx")
        quant_pre_process(plain, prepared)  # folds BatchNorm into the convolutions
        quantize_static(prepared, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
                        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)  # fmt: skip


def quantise_torch(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` in int8 by PyTorch 2 export quantisation (torchao), for torch.compile on x86 CPUs or `save_torch`."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model.eval(), (images[:2],), dynamic_shapes=(batch,), strict=True).module()
    quantiser = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantiser)
    with torch.no_grad():
        for part in images.split(BATCH):
            prepared(part)
    quantised = convert_pt2e(prepared)
    read = {node.target for node in quantised.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in quantised.named_parameters() if name not in read]:
        owner, _, attribute = name.rpartition(".")
        delattr(
            quantised.get_submodule(owner), attribute
        )  # a weight in floating point, which the int8 one has replaced
    return quantised


def save_torch(quantised: nn.Module, images: Tensor, path: str | Path) -> None:
    """Writes what `quantise_torch` gives as a .pt2 file."""
    program = torch.export.export(quantised, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="pruned_model.pt of a run")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="a tensor of training images, saved by torch.save"
    )
    parser.add_argument("--output", type=Path, default=Path("pruned_int8.onnx"))
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"{arguments.output} ends in neither .onnx nor .pt2")
    try:
        images, model = read_tensors(arguments.calibration), load_pruned(arguments.model)
    except InputError as error:
        parser.error(str(error))
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        parser.error(f"{arguments.calibration} holds no images [N, C, H, W], normalised as for the network")
    if arguments.output.suffix == ".pt2":
        save_torch(quantise_torch(model, images), images, arguments.output)
    else:
        quantise_onnx(model, images, arguments.output)
    before, after = (path.stat().st_size for path in (arguments.model, arguments.output))
    print(f"{arguments.output}: {after / 1e3:.0f} kB, {100 * after / before:.0f} % of {arguments.model}")


if __name__ == "__main__":
    main()
