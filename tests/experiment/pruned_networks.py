"""Networks with sliced layers, for tests of files and exports."""

import torch
from torch import nn

from taylor_pruning.experiment.models import build_model

KEEP = torch.tensor([0, 2, 3])


class EveryKind(nn.Module):
    """One of each layer kind that pruning cuts, a raw parameter, a tied weight and a non-persistent buffer."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.prelu = nn.PReLU(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.group_norm = nn.GroupNorm(4, 4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("mask", torch.rand(4, 1, 1), persistent=False)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.layer_norm = nn.LayerNorm(4)
        self.line = nn.Conv1d(4, 5, 1)
        self.tied = nn.Conv1d(4, 5, 1)
        self.tied.weight = self.line.weight
        self.volume = nn.Conv3d(5, 5, 1)
        self.fc = nn.Linear(5, classes)

    def forward(self, x):
        x = self.group_norm(self.depthwise(self.prelu(self.bn(self.conv(x))))) * self.scale * self.mask
        x = self.instance_norm(self.up(x)).mean(3)
        x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.volume((self.line(x) + self.tied(x))[..., None, None]).flatten(2)
        return self.fc(x.mean(2))


def cut(module, keep=KEEP, inputs=None):
    """Slice a layer's output channels (every tensor along dim 0) and, for convolutions, its input channels."""
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None and tensor.dim():
                tensors[key] = nn.Parameter(tensor[keep]) if isinstance(tensor, nn.Parameter) else tensor[keep]
    if inputs is not None:
        module.weight = nn.Parameter(module.weight[:, inputs])
        module.in_channels = len(inputs)
    name = "out_channels" if hasattr(module, "out_channels") else "num_features"
    setattr(module, name, len(keep))


def pruned_every_kind():
    torch.manual_seed(0)
    model = EveryKind()
    model(torch.randn(8, 3, 8, 8))  # statistics that are not the initial ones
    cut(model.conv)
    cut(model.bn)
    model.prelu.weight, model.prelu.num_parameters = nn.Parameter(model.prelu.weight[KEEP]), 3
    cut(model.depthwise)
    model.depthwise.in_channels = model.depthwise.groups = 3
    for key in ("weight", "bias"):
        setattr(model.group_norm, key, nn.Parameter(getattr(model.group_norm, key)[KEEP]))
        setattr(model.layer_norm, key, nn.Parameter(getattr(model.layer_norm, key)[KEEP]))
    model.group_norm.num_channels = model.group_norm.num_groups = 3
    model.layer_norm.normalized_shape = (3,)
    model.scale, model.mask = nn.Parameter(model.scale[KEEP]), model.mask[KEEP]
    model.up.weight, model.up.bias = nn.Parameter(model.up.weight[KEEP][:, KEEP]), nn.Parameter(model.up.bias[KEEP])
    model.up.in_channels = model.up.out_channels = 3
    cut(model.instance_norm)
    model.line.weight = model.tied.weight = nn.Parameter(model.line.weight[:, KEEP])
    model.line.in_channels = model.tied.in_channels = 3
    model.conv.bias = nn.Parameter(torch.randn(3))  # compensation may give a layer a bias that it never had
    return model.eval()


def pruned_network(name):
    """A torchvision network at 32 pixels with a few filters of one or two layers sliced off, and its file's names."""
    torch.manual_seed(0)
    built = build_model(name, 5, image_size=32)
    model = built.model
    if name == "vgg11_bn":
        cut(model.features[0], torch.arange(50))
        cut(model.features[1], torch.arange(50))
        cut(model.features[4], torch.arange(0, 128, 2), inputs=torch.arange(50))
        cut(model.features[5], torch.arange(0, 128, 2))
        cut(model.features[8], torch.arange(256), inputs=torch.arange(0, 128, 2))
    elif name == "resnet18":
        block = model.layer2[0]
        cut(block.conv1, torch.arange(30, 100))
        cut(block.bn1, torch.arange(30, 100))
        cut(block.conv2, torch.arange(128), inputs=torch.arange(30, 100))
    else:  # the expansion of one inverted residual: pointwise, depthwise, projection
        expand, depthwise, project = (model.features[2].conv[i] for i in (0, 1, 2))
        for layer in (expand[0], expand[1], depthwise[0], depthwise[1]):
            cut(layer, torch.arange(60))
        depthwise[0].in_channels = depthwise[0].groups = 60
        cut(project, torch.arange(24), inputs=torch.arange(60))
    return model, {"name": name, "num_classes": 5, "image_size": 32}
