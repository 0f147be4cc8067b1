"""Scores of all orders from what one pass over the calibration images has collected: directions, probes, or both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from taylor_pruning.errors import InputError
from taylor_pruning.scoring.probes import ProbedDerivatives, mean_and_error
from taylor_pruning.scoring.shrinkage import shrunk
from taylor_pruning.scoring.taylor import Directions, loss_change
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.units import by_layers

LEAST_INFORMATION = 0.05  # of the largest possible one, see Collected.predictions_are_uninformative


@dataclass
class Collected:
    """What a pass has collected.

    Attributes:
        directions: of the cross-entropy (scoring.taylor); None for another task.
        probed: derivatives from random probes (scoring.probes) or, behind repair, from random directions of a task's outputs
            (scoring.output_curvature); or None.
        behind_repair: directions describe what compensation cannot repair, and orders 2 and 3 estimate the divergence from
            the network's own predictions; probes are not needed then.
        orders: those that the directions serve.
        by_probes: second and third derivatives are those of the probes, which include the curvature of the network.
    """

    directions: Directions | None
    probed: ProbedDerivatives | None
    behind_repair: bool
    by_probes: bool
    orders: tuple = (1, 2, 3)
    # {order: levels and their errors}
    _found: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def checked(self, graph: ChannelGraph) -> "Collected":
        """These derivatives. Raises InputError, which names layers of the graph, where some are NaN or infinite."""
        found = []  # of all units along the last dimension
        if self.probed is not None:
            found += [self.probed.phi, self.probed.h, self.probed.t]
        if self.directions is not None:
            found += [self.directions.coordinates.mT, self.directions.flow]
        known = [torch.atleast_2d(x) for x in found if x is not None]
        bad = ~torch.stack([x.isfinite().all(tuple(range(x.dim() - 1))).cpu() for x in known]).all(0)
        if bad.any():
            units = [unit for unit in graph.units if bad[unit.index]]
            layers = list(dict.fromkeys(layer for unit in units for layer, _ in unit.filters))
            raise InputError(
                f"derivatives along the gates of {len(units)} units are NaN or infinite ({', '.join(layers[:5])}), as those of "
                "a root, a norm or a quotient at zero are; add a small number there, or take curvature exact or order 1"
            )
        return self

    def provides(self, order: int, flow: bool = False) -> bool:
        """Whether the scores of that order, and the gradient flow if asked for, can be computed."""
        if flow and (self.directions is None or self.directions.flow is None):
            return False
        if self.directions is not None and not self._needs_probes(order):
            return order in self.orders
        derivatives = self.probed and (self.probed.phi, self.probed.h, self.probed.t)[order - 1]
        return order in self.orders and derivatives is not None

    def require(self, order: int, flow: bool = False) -> None:
        """Raises InputError that says what to collect where `provides` is False."""
        if not self.provides(order):
            raise InputError(f"order {order} was not collected; rank with taylor_order={order}")
        if flow:
            self.flow()

    def flow(self) -> Tensor:
        """[N, units] gradient flow, on the CPU. Raises InputError if it was not collected."""
        if self.directions is None or self.directions.flow is None:
            raise InputError("the gradient flow was not collected; rank with use_gradient_flow=True")
        return self.directions.flow.cpu()

    def _needs_probes(self, order):
        return self.directions is None or (self.by_probes and order > 1)

    def of_order(self, order: int) -> Directions:
        """The directions, with the loss that this order estimates."""
        return replace(self.directions, own_targets=self.behind_repair and order > 1)

    def costs_compare(self, order: int) -> bool:
        """Whether costs behind compensation compare between layers.

        They do not where predictions hardly depend on the image, nor where all are so sure that every level is zero.
        """
        return not self.predictions_are_uninformative() and bool(self.levels(order).any())

    def predictions_are_uninformative(self) -> bool:
        """Whether predictions hardly depend on the image, as on noise.

        That is where the mean divergence of the predictions from their mean is below 5 % of what it can be, log(classes), or
        log(images) where these are fewer. On noise it is 2 to 3 %, on 30 images of the embedded task 94 %. Another task than
        classification has no such measure.
        """
        if self.directions is None:
            return False
        p = self.directions.logits.softmax(1).double()
        information = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().item()
        return information <= LEAST_INFORMATION * math.log(min(p.shape))

    def scores(self, order: int) -> Tensor:
        """[units] estimated signed loss change (nats) of removing each unit alone, float64 on the CPU."""
        if self.directions is None:
            return self._probed_scores(order)
        scores, correction = self.of_order(order).scores(order).double().cpu(), self.correction(order)
        return scores if correction is None else scores + correction

    def _probed_scores(self, order):
        if self.behind_repair and order > 1:  # the divergence has no slope at the network's own outputs
            return loss_change(order, torch.zeros_like(self.probed.h), self.probed.h, self.probed.t).cpu()
        score = -self.probed.phi
        if order >= 2:
            score = score + self.probed.h / 2
        if order == 3:
            score = score - self.probed.t / 6
        return score.cpu()

    def correction(self, order: int) -> Tensor | None:
        """[units] nats that the curvature of the network itself adds to scores from directions, by the probes; None without."""
        if self.directions is None or not self._needs_probes(order):
            return None
        _, h, t = self.directions.moments(order=order)
        correction = (self.probed.h - h.double().mean(0).cpu()) / 2
        if order == 3:
            correction = correction - (self.probed.t - t.double().mean(0).cpu()) / 6
        return correction

    def squared_first_order(self) -> Tensor:
        """[units] mean squared per-sample first-order term (nats^2)."""
        if self.directions is None:
            return self.probed.phi_squared.cpu()
        return self.directions.moments(order=1)[0].double().square().mean(0).cpu()

    def levels(self, order: int) -> Tensor:
        """What removing each unit alone costs behind compensation, from which the closed form grows.

        Order 2: h / 2. Order 3: the saturating estimate from h and t (scoring.taylor.closed_third_order), which stays
        small for units whose quadratic is large. Order 1: half the mean squared first-order term, which is h / 2 in
        expectation where labels are drawn from the network's own predictions, and noisier on few images.

        Returns:
            [units] nats, never negative.

        Raises:
            InputError: they are all zero under a task, so that they order nothing; nothing was collected behind compensation.
        """
        return self._levels(order)[0]

    def level_errors(self, order: int) -> Tensor:
        """[units] standard errors of `levels`, float64 on the CPU; those of another task at order 3 are those of order 2."""
        return self._levels(order)[1]

    def _levels(self, order):
        """(levels, their standard errors), computed once for every order: a choice asks for them several times."""
        if not self.behind_repair:
            raise InputError("levels are of removals that are repaired; rank with images for compensation")
        if order not in self._found:
            self._found[order] = (
                self._levels_of_task(order) if self.directions is None else self._levels_of_logits(order)
            )
        return self._found[order]

    def _levels_of_logits(self, order):
        changes = torch.cat([part.double() for part in self.of_order(order).loss_changes(order)])
        levels, errors = (x.cpu() for x in mean_and_error(changes.square() / 2 if order == 1 else changes))
        correction = self.correction(order)
        return levels if correction is None else levels + correction, errors

    def _levels_of_task(self, order):
        probed = self.probed
        levels = probed.phi_squared / 2 if order == 1 else self._probed_scores(order)
        if not (levels > 0).any():
            reason = "loss has no slope along any gate; check it, or take order 2"
            if order > 1:
                reason = "divergence does not change along any gate; check that it compares the outputs"
            raise InputError(f"order {order} cannot choose: the task's {reason}")
        return levels.cpu(), (probed.phi_squared_error if order == 1 else probed.h_error).cpu() / 2

    def shrunk_levels(self, order: int, units: Sequence, closed_form: Tensor) -> Tensor:
        """[units] `levels`, shrunk towards the closed form within each group of coupled layers (scoring.shrinkage).

        Args:
            units: of the graph. closed_form: [units] what it says of removing each alone.
        """
        levels = self.levels(order)
        errors, expected = (part.to(levels) for part in (self.level_errors(order), closed_form.clamp_min(0)))
        return shrunk(levels, errors, expected, by_layers(units).values())

    def predicted_loss_change(self, chosen: list[int], order: int) -> float | None:
        """Loss change (nats) of removing the units together, to first order in the network; None for order 1.

        The loss is the cross-entropy with the labels or, behind repair, the divergence from the network's own predictions.
        """
        if order == 1 or self.directions is None:
            return None
        shift, correction = self.directions.coordinates[:, chosen].sum(1), self.correction(order)
        change = self.of_order(order).loss_change_at(shift)
        return change if correction is None else change + correction[chosen].sum().item()
