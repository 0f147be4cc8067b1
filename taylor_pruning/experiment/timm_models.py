"""Networks of timm, by their names with timm/ before them; timm is optional.

network = timm_network("timm/resnet18", num_classes=10, image_size=224)
weights = TimmWeights("timm/resnet18")                                      # in the place of a torchvision WeightsEnum member
"""

import difflib
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from taylor_pruning.errors import InputError

PREFIX = "timm/"


def _timm():
    try:
        import timm
    except ImportError as error:
        raise InputError(f"networks whose names begin with {PREFIX} need timm ({error}); pip install timm") from error
    return timm


def check_timm_name(name: str) -> None:
    """Raises InputError if timm is missing or has no network of that name; a tag of weights may follow (resnet18.a1_in1k)."""
    timm, short = _timm(), name.removeprefix(PREFIX)
    architecture, _, tag = short.partition(".")
    names, group = timm.list_models(), timm.list_models(f"{architecture}.*", pretrained=True) if tag else ()
    if architecture not in names:
        close = difflib.get_close_matches(architecture, names, n=3) or ["resnet18", "efficientnet_b0", "convnext_atto"]
        raise InputError(f"unknown model {name!r}; did you mean {', '.join(PREFIX + n for n in close)}?")
    if tag and short not in group:
        raise InputError(f"timm has no weights {short!r}; there are {', '.join(group) or 'none for ' + architecture}")


def timm_network(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network with random weights; one of a fixed size is built for `image_size`.

    Raises InputError if timm is missing, or the network cannot be built for that size.
    """
    timm, short = _timm(), name.removeprefix(PREFIX)
    about, options = timm.get_pretrained_cfg(short), {}
    if about is not None and about.fixed_input_size and about.input_size[-1] != image_size:
        options = {"img_size": image_size}
    try:
        return timm.create_model(short, pretrained=False, num_classes=num_classes, **options)
    except (TypeError, AssertionError) as error:
        native = about.input_size[-1] if about is not None else 224
        raise InputError(
            f"{name} cannot be built for {image_size} pixels ({error or 'a fixed size'}); pass --image-size {native}"
        ) from error


@dataclass(frozen=True)
class TimmWeights:
    """timm's pretrained weights of a network, with what this toolkit reads of a torchvision `WeightsEnum` member."""

    name: str

    @classmethod
    def of(cls, name: str) -> "TimmWeights | None":
        """The weights of that name, None if timm has none."""
        about = _timm().get_pretrained_cfg(name.removeprefix(PREFIX))
        return None if about is None or not about.has_weights else cls(name)

    @property
    def about(self):
        """timm's record of the weights."""
        return _timm().get_pretrained_cfg(self.name.removeprefix(PREFIX))

    @property
    def url(self) -> str:
        """Where they come from."""
        return self.about.hf_hub_id or self.about.url or self.name

    def __str__(self):
        return f"{PREFIX}{self.about.architecture}.{self.about.tag}"

    def transforms(self) -> SimpleNamespace:
        """Sizes, mean, standard deviation and interpolation that belong to the weights."""
        about = self.about
        size = about.input_size[-1]
        return SimpleNamespace(
            crop_size=[size],
            resize_size=[round(size / about.crop_pct)],
            mean=about.mean,
            std=about.std,
            interpolation=InterpolationMode(about.interpolation),
        )

    def get_state_dict(self, **_) -> dict[str, Tensor]:
        """Downloads them. Raises OSError or RuntimeError where that fails."""
        return _timm().create_model(self.name.removeprefix(PREFIX), pretrained=True).state_dict()
