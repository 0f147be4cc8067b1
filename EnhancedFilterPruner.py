"""Ranks conv filters by Taylor estimates of orders 1 to 3 and makes the plan of those that go.

    pruner = EnhancedFilterPruner(model, example_input, taylor_order=2)
    pruner.rank(batches)
    smaller = pruner.graph.remove(pruner.get_pruning_plan(30))
"""

import copy
import dataclasses

import torch

from GradientFlowAnalyzer import GradientFlowReport
from taylor_pruning.errors import InputError, one_of
from taylor_pruning.scoring.estimates import channel_estimates
from taylor_pruning.scoring.flow import relative_flow, weigh
from taylor_pruning.scoring.probes import cross_entropy, probe_derivatives
from taylor_pruning.scoring.taylor import collect_directions
from taylor_pruning.selection.greedy import Constraints, Selection, select_by_score, select_jointly
from taylor_pruning.surgery.graph import ChannelGraph

TAYLOR_ORDERS = (1, 2, 3)
SELECTIONS = ("auto", "joint", "independent")
CURVATURES = ("exact", "hvp", "auto")
CLASS_PROBES = 12


class EnhancedFilterPruner:
    """Scores every removable filter of `model` and selects which to remove.

    Args:
        model: an `nn.Module` that `torch.fx` can trace and that maps images to class logits. It is left as it was.
        example_input: [N, C, H, W] tensor like the images.
        taylor_order: 1, 2 or 3.
        use_gradient_flow: weigh the scores by gradient flow (GradientFlowAnalyzer).
        selection: "joint" (greedy on marginal loss changes, selection.greedy), "independent" (every unit alone) or "auto":
            joint, but independent where the layers behind will be refitted (see `rank`).
        curvature: "exact" (class directions; along residual streams the Gauss-Newton part), "hvp" (random probes,
            scoring.probes) or "auto": exact where the traced network is piecewise linear. `curvature_path` and
            `curvature_reason` say what was taken and why.
        class_probes: class directions a sample, at most classes - 1 are used.
        constraints: selection.greedy.Constraints.
        loss: per-sample loss (logits [B, K], labels [B]) -> [B]; another one than cross-entropy needs
            selection="independent" and curvature "hvp" or "auto".
        exclude, prune_linear, graph: see ChannelGraph; a graph of `model` that exists already may be passed.
        hessian_probes: probes a sample on the "hvp" path.

    Raises:
        InputError: an argument outside its range, a network that cannot be traced or has no removable filter.
    """

    def __init__(
        self,
        model,
        example_input,
        taylor_order=2,
        use_gradient_flow=False,
        *,
        selection="auto",
        curvature="auto",
        class_probes=CLASS_PROBES,
        constraints=None,
        loss=cross_entropy,
        exclude=(),
        prune_linear=False,
        graph=None,
        hessian_probes=8,
        seed=0,
        progress=True,
    ):
        one_of("taylor_order", taylor_order, TAYLOR_ORDERS)
        one_of("selection", selection, SELECTIONS)
        one_of("curvature", curvature, CURVATURES)
        if class_probes < 2:
            raise InputError(f"class_probes must be at least 2, not {class_probes}")
        if hessian_probes < 1:
            raise InputError(f"hessian_probes must be at least 1, not {hessian_probes}")
        self.model, self.taylor_order, self.use_gradient_flow = model, taylor_order, use_gradient_flow
        self.selection, self.class_probes, self.hessian_probes = selection, class_probes, hessian_probes
        self.constraints, self.loss, self.seed, self.progress = constraints or Constraints(), loss, seed, progress
        self._check_finite(model)
        self.graph = graph or ChannelGraph(model, example_input, exclude, prune_linear)
        if not self.graph.units:
            raise InputError("no filter of this network may be removed: " + self._reasons())
        self.curvature_path, self.curvature_reason = self._choose_curvature(curvature)
        if loss is not cross_entropy and (selection != "independent" or self.curvature_path == "exact"):
            raise InputError("a loss other than cross-entropy needs selection='independent' and curvature='hvp'")
        self.directions = self.probed = self.predicted_loss_change = None
        self.repairs = False

    @staticmethod
    def _check_finite(model):
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"the weights hold NaN or infinite values in {name}; load other weights")

    def _reasons(self):
        return "; ".join(f"{name}: {info.reason}" for name, info in list(self.graph.layers.items())[:3])

    def _choose_curvature(self, curvature):
        smooth = ", ".join(self.graph.smooth_operations)
        if curvature != "auto":
            return curvature, "as asked"
        if self.loss is not cross_entropy:
            return "hvp", "the loss is not cross-entropy"
        return ("hvp", f"the network has {smooth}") if smooth else ("exact", "the network is piecewise linear")

    def rank(self, batches, compensation=None):
        """One pass over the calibration images collects what all orders need.

        Args:
            batches: iterable of (images, labels) on the model's device.
            compensation: such batches on which the layers behind will be refitted after the cut (repair.compensation). Then
                all scores are of what the other channels of a layer cannot repair (scoring.estimates), and those of
                orders 2 and 3 are against the network's own predictions, which is what compensation aims at: their
                second derivatives are complete in any network, without probes.

        Returns:
            self.

        Raises:
            InputError: no images, NaN images or logits, labels outside the logits' range; `compensation` with another
                loss than cross-entropy.
        """
        if compensation and self.loss is not cross_entropy:
            raise InputError("scores behind compensation need the cross-entropy; rank without compensation batches")
        batches = list(batches)
        self.repairs, self.directions, self.probed = bool(compensation), None, None
        if self.loss is cross_entropy:
            self.directions = collect_directions(
                self.model,
                self.graph,
                batches,
                self.class_probes,
                progress=self.progress,
                want_flow=self.use_gradient_flow,
                estimates=channel_estimates(self.model, self.graph, compensation) if self.repairs else None,
            )
        if self.curvature_path == "hvp" and not self.repairs:
            self.probed = probe_derivatives(
                self.model,
                self.graph,
                batches,
                order=max(2, self.taylor_order),
                probes=self.hessian_probes,
                loss=self.loss,
                seed=self.seed,
                progress=self.progress,
            )
        return self

    def with_order(self, taylor_order, use_gradient_flow):
        """A pruner of another order that shares what this one has collected."""
        one_of("taylor_order", taylor_order, TAYLOR_ORDERS)
        other = copy.copy(self)
        other.taylor_order, other.use_gradient_flow = taylor_order, use_gradient_flow
        return other

    def scores(self, order=None):
        """[units] estimated signed loss change (nats) of removing each unit alone; `order` defaults to `taylor_order`."""
        order = order or self.taylor_order
        one_of("order", order, TAYLOR_ORDERS)
        self._check_ranked()
        if self.directions is None:
            return self._probed_scores(order)
        scores, correction = self._directions(order).scores(order).double().cpu(), self._correction(order)
        return scores if correction is None else scores + correction

    def _directions(self, order):
        return dataclasses.replace(self.directions, own_targets=self.repairs and order > 1)

    def _check_ranked(self):
        if self.directions is None and self.probed is None:
            raise InputError("call rank(batches) first")

    def _probed_scores(self, order):
        score = -self.probed.phi
        if order >= 2:
            score = score + self.probed.h / 2
        if order == 3:
            score = score - self.probed.t / 6
        return score.cpu()

    def _correction(self, order):
        """[units] or None: what the probes add to the directions' h and t, the curvature of the network itself."""
        if self.probed is None or order == 1:
            return None
        _, h, t = self.directions.moments(order=order)
        correction = (self.probed.h - h.double().mean(0)) / 2
        if order == 3:
            if self.probed.t is None:
                raise InputError("the third order was not probed; rank with taylor_order=3")
            correction = correction - (self.probed.t - t.double().mean(0)) / 6
        return correction.cpu()

    @property
    def filter_ranks(self):
        """{layer: [filters] estimated signed loss change (nats) of removing that filter alone, nan where protected}.

        A filter that must go together with others has the value of its unit.
        """
        padded = torch.cat([self.scores(), torch.tensor([torch.nan], dtype=torch.float64)])
        return {name: padded[info.unit_of] for name, info in self.graph.layers.items()}

    def flow_weights(self):
        """[units] weights by which scores are multiplied, or None without gradient flow."""
        return relative_flow(self.graph, self.directions.flow.cpu()) if self.use_gradient_flow else None

    def flow_report(self):
        """GradientFlowReport of the images that `rank` saw."""
        return GradientFlowReport.from_flow(self.graph, self.directions.flow.cpu())

    def curvature_report(self):
        """What was taken for h and t: {"path", "reason", "sampled", "h_error"}.

        sampled: share of the curvature for which random directions stand (scoring.taylor.class_basis).
        h_error: mean standard error of probed h.
        """
        return {
            "path": self.curvature_path,
            "reason": self.curvature_reason,
            "sampled": self.directions.sampled_curvature if self.directions else None,
            "h_error": self.probed.h_error.mean().item() if self.probed else None,
        }

    def get_pruning_plan(self, percentage, ledger=None):
        """The filters that go.

        Order 1 selects by the mean squared per-sample first-order term (Molchanov et al. 2019, eq. 8), orders 2 and 3
        by the signed loss change, marginal to what is chosen already if the selection is joint.
        `predicted_loss_change` (nats) is what the directions predict for the whole plan, None for order 1.

        Args:
            percentage: of the budget in `constraints` (default: of the filters that may be removed), in (0, 100),
                counted from the beginning of `ledger`.
            ledger: selection.greedy.Ledger of earlier rounds; None: this is the first.

        Returns:
            {layer: sorted filter indices}.

        Raises:
            InputError: percentage outside (0, 100) or out of reach for the constraints.
        """
        return self.graph.plan_of(self.select(percentage, ledger))

    def select(self, percentage, ledger=None):
        """Like `get_pruning_plan`; returns the indices of the chosen units."""
        self._check_ranked()
        selection = Selection(self.graph, percentage, self.constraints, ledger)
        weights, order = self.flow_weights(), self.taylor_order
        joint = self.selection == "joint" or (self.selection == "auto" and not self.repairs)
        if joint and order > 1:
            chosen = select_jointly(selection, self._directions(order), order, self._correction(order), weights)
        else:
            scores = self._squared_first_order() if order == 1 else self.scores()
            chosen = select_by_score(selection, scores if weights is None else weigh(scores, weights))
        self.predicted_loss_change = self._predicted(chosen) if order > 1 and self.directions else None
        return chosen

    def _predicted(self, chosen):
        """Mean loss change (nats) of removing the chosen units together, to first order in the network."""
        shift, correction = self.directions.coordinates[:, chosen].sum(1), self._correction(self.taylor_order)
        change = self._directions(self.taylor_order).loss_change_at(shift)
        return change if correction is None else change + correction[chosen].sum().item()

    def _squared_first_order(self):
        if self.directions is None:
            raise InputError("order 1 selects by per-sample terms, which need the cross-entropy; use order 2")
        return self.directions.moments(order=1)[0].double().square().mean(0).cpu()
