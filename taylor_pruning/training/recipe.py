"""The training recipe with its ranges, and the learning rate of every step."""

import math
from dataclasses import dataclass, replace

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.options import check, option

DISTILLATION = 0.5
AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Raises InputError on a value outside its range.

    epochs: passes over the training images, 0 for evaluation only.
    lr, momentum, weight_decay: of SGD, Nesterov where there is momentum; the decay acts on all parameters.
    warmup_epochs: epochs, or a fraction of one, of linear warm-up before the cosine decay to zero; less than `epochs`.
    label_smoothing, distillation_weight w, temperature T: loss = (1 - w) CE + w T^2 KL(teacher || model), the KL at
        logits / T (Hinton et al. 2015, arXiv:1503.02531). A weight of None is DISTILLATION with a teacher, 0 without.
    ema_decay: per optimiser step, 0 for off; weights older than about 1 / (1 - decay) steps are forgotten, so a decay
        that outlasts the run hardly leaves the start.
    amp: mixed precision: "bf16", "fp16" (with gradient scaling), None for none, "auto": see `resolved`.
    accuracy_at_steps: while fine-tuning, also measure accuracy after 0, 10, 30, 100, 300, ... steps and after the last, on
        a few validation images.
    amp_validation: validate in that precision too; otherwise in the precision of the weights.
    accumulate: batches of the loader per optimiser step, weighted by their images, so that one step equals the step of
        one big batch (BatchNorm apart, which sees the batches one by one).
    clip_ratio: see training.clipping; None for no clipping.
    channels_last: memory layout of weights and images while training; None: see `resolved`.
    compile: torch.compile the network.
    cuda_graphs: replay forward and backward as CUDA graphs where that is safe, see training.cuda_graphs.
    sync_batchnorm: BatchNorm over the batches of all processes (CUDA only); no effect in one process.
    """

    epochs: int = option(
        2,
        "epochs of fine-tuning after pruning, 0 for none",
        "Give more where much is removed.",
        low=0,
        flag="fine_tune_epochs",
        common=True,
    )
    lr: float = option(
        0.01,
        "largest learning rate",
        "Lower it, to 0.003, where fine-tuning on few images loses accuracy.",
        low=0,
        open_low=True,
    )
    momentum: float = option(
        0.9,
        "momentum of SGD",
        "The default is what published recipes use.",
        low=0,
        high=1,
        open_high=True,
        command_line=False,
    )
    weight_decay: float = option(1e-4, "weight decay of SGD", "5e-4 is usual where training is long.", low=0)
    warmup_epochs: float = option(
        0.0,
        "epochs of linear warm-up",
        "It made no difference in fine-tuning.",
        low=0,
        command_line=False,
    )
    label_smoothing: float = option(
        0.0,
        "label smoothing of the cross-entropy",
        "It lost 0.7 to 2.5 points in short fine-tuning.",
        low=0,
        high=1,
        open_high=True,
        command_line=False,
    )
    distillation_weight: float | None = option(
        None,
        "share of the loss that follows the dense network's outputs",
        "0.5 was worth 1.2 to 3.3 points after short fine-tuning. 0 saves the dense network's forward in every step.",
        low=0,
        high=1,
        default_text="0.5 after pruning a classifier, else 0",
    )
    temperature: float = option(
        4.0, "temperature of distillation", "With distillation_weight.", low=0, open_low=True, command_line=False
    )
    ema_decay: float = option(
        0.0,
        "decay of an average of the weights per step, 0 for none",
        "It made no difference in short fine-tuning.",
        low=0,
        high=1,
        open_high=True,
        command_line=False,
    )
    amp: str | None = option(
        "auto",
        "mixed precision; auto: bf16 or fp16 on GPUs with tensor cores, none elsewhere",
        "bf16 is faster on CPUs that have its instructions. fp16 is for GPUs: convolutions on a CPU took 60 times as long.",
        choices=("auto", "bf16", "fp16"),
    )
    amp_validation: bool = option(
        False,
        "validate in the precision of amp too",
        "Where validation on a GPU takes long.",
        command_line=False,
    )
    accuracy_at_steps: bool = option(
        True,
        "measure accuracy after 0, 10, 30, 100, 300, ... steps of fine-tuning on at most 500 validation images",
        "It shows how many steps a method saves. Turn it off where validation takes long.",
    )
    accumulate: int = option(
        1,
        "batches for one optimiser step",
        "To keep the steps of a large batch where memory allows a small one.",
        low=1,
    )
    clip_ratio: float | None = option(
        0.1,
        "largest norm of the gradient of a filter, as a share of the norm of its weights; longer ones are scaled down to it",
        "none, where a short training should change much: a ResNet-32 lost a point to clipping, a MobileNetV2 gained 40.",
        low=0,
        open_low=True,
    )
    channels_last: bool | None = option(
        None,
        "channels-last memory layout while training",
        "With --amp bf16 on a CPU.",
        default_text="on CUDA with mixed precision",
    )
    compile: bool = option(False, "torch.compile the training steps", "On GPUs, where training is long.")
    cuda_graphs: bool = option(
        True,
        "replay training steps as CUDA graphs where that is safe",
        "Turn it off to look for an error on a GPU.",
        command_line=False,
    )
    sync_batchnorm: bool = option(
        False,
        "BatchNorm over all processes under torchrun",
        "Where each GPU has only a few images a step.",
    )

    def __post_init__(self):
        check(self)
        if not self.warmup_epochs < max(self.epochs, 1):
            raise InputError(f"warmup_epochs must be below the {self.epochs} epochs, not {self.warmup_epochs}")

    def resolved(self, device: torch.device, teacher: bool = False) -> "Recipe":
        """The recipe with what is automatic decided for `device`, and for training with or without a teacher.

        amp "auto": bf16 on a GPU that computes in it (compute capability 8 and above), fp16 on other GPUs with tensor
        cores (7 and above), none elsewhere. channels_last None: on CUDA with mixed precision, where tensor cores want
        it; contiguous elsewhere, as a CPU is not faster with it in float32.
        """
        amp, channels_last, weight = self.amp, self.channels_last, self.distillation_weight
        if amp == "auto":
            major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
            amp = "bf16" if major >= 8 else "fp16" if major == 7 else None
        if channels_last is None:
            channels_last = device.type == "cuda" and amp is not None
        if weight is None:
            weight = DISTILLATION if teacher else 0.0
        return replace(self, amp=amp, channels_last=channels_last, distillation_weight=weight)


def lr_factor(step: int, warmup_steps: float, total_steps: int) -> float:
    """Linear warm-up to 1 at `warmup_steps`, then half a cosine to 0 at `total_steps`; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1))
