"""CIFAR ResNets with parameter-free "option A" shortcuts (He et al. 2016, section 4.2), and their public weights.

The weights are those of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause): a dict whose `state_dict` has "module." names.
"""

import torch
import torch.nn.functional as F
from torch import nn

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


class Block(nn.Module):
    """Two 3x3 convs; the shortcut takes every second pixel and pads the channels with zeros where the width doubles."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - inputs) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6 n + 2 layers: n blocks of width 16, 32 and 64 each."""

    def __init__(self, depth, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(Block(inputs, width, 2 if index == 0 and stage > 1 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(name, weights):
    """The network of a name in CIFAR_RESNETS, with the weights of a file."""
    model = CifarResNet(CIFAR_RESNETS[name])
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return model.eval()
