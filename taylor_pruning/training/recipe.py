"""What training is told: the recipe with its ranges, and the learning rate of every step."""

import math
from dataclasses import dataclass, replace

import torch

from taylor_pruning.errors import InputError

AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises InputError on a value outside its range.

    epochs: passes over the training images, 0 for evaluation only.
    lr, momentum, weight_decay: of SGD, Nesterov where there is momentum; the decay acts on all parameters.
    warmup_epochs: epochs, or a fraction of one, of linear warm-up before the cosine decay to zero; less than `epochs`.
    label_smoothing, distillation_weight w, temperature T: loss = (1 - w) CE + w T^2 KL(teacher || model), the KL at
        logits / T.
    ema_decay: per optimiser step, 0 for off; weights older than about 1 / (1 - decay) steps are forgotten, so a decay
        that outlasts the run hardly leaves the start.
    amp: mixed precision: "bf16", "fp16" (with gradient scaling), None for none, "auto": see `resolved`.
    amp_validation: validate in that precision too; otherwise in the precision of the weights.
    accumulate: batches of the loader per optimiser step, weighted by their images, so that one step equals the step of
        one big batch (BatchNorm apart, which sees the batches one by one).
    clip_norm: largest gradient norm, None for no clipping.
    channels_last: memory layout of weights and images while training; None: see `resolved`.
    compile: torch.compile the network.
    cuda_graphs: replay forward and backward as CUDA graphs where that is safe, see training.cuda_graphs.
    sync_batchnorm: BatchNorm over the batches of all processes (CUDA only); no effect in one process.
    """

    epochs: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    distillation_weight: float = 0.0
    temperature: float = 4.0
    ema_decay: float = 0.0
    amp: str | None = "auto"
    amp_validation: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    channels_last: bool | None = None
    compile: bool = False
    cuda_graphs: bool = True
    sync_batchnorm: bool = False

    def __post_init__(self):
        ranges = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_epochs": (0 <= self.warmup_epochs < max(self.epochs, 1), "0 or more and less than epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "distillation_weight": (0 <= self.distillation_weight <= 1, "in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "positive"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "amp": (self.amp in ("auto", *AMP_DTYPES), "'auto', None, 'bf16' or 'fp16'"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "None or positive"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid:
                raise InputError(f"fine-tuning: {name} is {getattr(self, name)!r}; it must be {wanted}")

    def resolved(self, device: torch.device) -> "Recipe":
        """The recipe with what is automatic decided for `device`.

        amp "auto": bf16 on a GPU that computes in it (compute capability 8 and above), fp16 on other GPUs with tensor
        cores (7 and above), none elsewhere. channels_last None: on CUDA with mixed precision, where tensor cores want
        it; contiguous elsewhere, as a CPU is not faster with it in float32.
        """
        amp, channels_last = self.amp, self.channels_last
        if amp == "auto":
            major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
            amp = "bf16" if major >= 8 else "fp16" if major == 7 else None
        if channels_last is None:
            channels_last = device.type == "cuda" and amp is not None
        return replace(self, amp=amp, channels_last=channels_last)


def lr_factor(step: int, warmup_steps: float, total_steps: int) -> float:
    """Linear warm-up to 1 at `warmup_steps`, then half a cosine to 0 at `total_steps`; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1))
