"""Regions of a forward under `torch.autocast`: recorded with every operation, and entered again where it runs."""

from contextlib import ExitStack, contextmanager

import torch

from taylor_pruning.surgery.threads import here


class Autocasts:
    """The regions that a forward has entered and not left, while `watched` is open.

    Attributes:
        open: [(device type, dtype, whether it is enabled)], the innermost last.
    """

    def __init__(self):
        self.open = []

    def now(self):
        """What holds for an operation that runs now: a region for each device type, () outside of all."""
        return tuple({region[0]: region for region in self.open}.values())

    @contextmanager
    def watched(self):
        enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

        def entered(region):
            self.open.append((region.device, region.fast_dtype, region._enabled))
            return enter(region)

        def left(region, *error):
            self.open.pop()
            return leave(region, *error)

        try:
            torch.autocast.__enter__, torch.autocast.__exit__ = here(entered, enter), here(left, leave)
            yield
        finally:
            torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave


@contextmanager
def under(regions):
    """Runs the body in the regions that `Autocasts.now` gave."""
    with ExitStack() as stack:
        for device, dtype, enabled in regions:
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield
