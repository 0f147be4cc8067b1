"""The images of one pruning: those that score, those that repair, and those that judge."""

from dataclasses import dataclass

from torch import nn

from taylor_pruning.first_batch import Batches, checked_batches
from taylor_pruning.options import check_argument
from taylor_pruning.training.sampling import HELD_OUT, first_images, split_images


@dataclass(frozen=True)
class PruningImages:
    """Lists of batches on the network's device.

    Attributes:
        calibration: images that score.
        compensation: images to which layers are fitted.
        held_out: images on which a round's choice is tried and the round is judged; None: no choice is tried, and
            `calibration` judges.
    """

    calibration: list
    compensation: list
    held_out: list | None = None

    @classmethod
    def gathered(
        cls,
        model: nn.Module,
        train_loader: Batches,
        samples: int,
        calibration: list | None,
        compensation: list | None,
        held_out: list | None,
    ) -> "PruningImages":
        """The given lists, or in their place what EnhancedPruning documents: images that `train_loader` gives.

        Args:
            samples: images that score, where `calibration` is None.

        Raises:
            InputError: see first_batch.checked_batches.
        """

        def checked(batches, name):
            return checked_batches(model, Batches(batches, name, train_loader.device, train_loader.task))

        if calibration is not None:
            calibration = checked(calibration, "the calibration images")
        else:
            check_argument("calibration_samples", samples, int, low=1)
            calibration, rest = split_images(first_images(train_loader, samples + HELD_OUT), samples)
            held_out = rest if held_out is None else held_out
        compensation = calibration if compensation is None else checked(compensation, "the compensation images")
        none = held_out is None or held_out == []
        return cls(calibration, compensation, None if none else checked(held_out, "the held-out images"))

    def by_name(self) -> dict:
        """{what error messages call them: batches}, without those that there are not."""
        named = {"calibration": self.calibration, "compensation": self.compensation, "held-out": self.held_out}
        return {name: batches for name, batches in named.items() if batches}
