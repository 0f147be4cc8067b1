"""How filters are chosen and the network is repaired: one dataclass, whose fields have the command line's names."""

import dataclasses
from dataclasses import dataclass

from taylor_pruning.errors import InputError, one_of
from taylor_pruning.selection.greedy import Constraints

TAYLOR_ORDERS = (1, 2, 3)
SELECTIONS = ("auto", "joint", "independent")
CURVATURES = ("auto", "exact", "hvp")


@dataclass(frozen=True)
class PruningSettings:
    """How filters are chosen and how the network is repaired.

    Attributes:
        rounds: number of score-and-prune rounds on the way to the percentage.
        selection: "joint": greedy, given the filters already chosen (selection.greedy); "independent": by single scores;
            "auto": independent with `compensate`, else joint.
        curvature: "exact": second and third derivatives from class directions (along residual streams the Gauss-Newton
            part); "hvp": from random probes (scoring.probes); "auto": exact where the network is piecewise linear.
        class_probes: class directions of every sample; at most classes - 1 are used.
        hessian_probes: random probes of every sample where the curvature is "hvp".
        budget, layer_bound, min_filters, round_to: see selection.greedy.Constraints; `layer_bound` None is its
            default, math.inf is no bound.
        exclude: patterns (`fnmatch`) of layers whose filters are never removed.
        prune_linear: also remove outputs of hidden fully connected layers.
        compensate: least squares on the calibration images after every round (repair.compensation), each time from the
            dense network's weights, because fits on top of earlier fits would drift away from them.
        fine_tune_between: training steps after every round but the last (Molchanov et al. 2017), at the recipe's learning
            rate. Compensation then fits to the network before the round's cut, because a fit to the dense network would
            undo the training.
        reestimate_batchnorm: new BatchNorm statistics from the calibration images before fine-tuning.
        seed: of every random draw: probes, positions and images of a fit, random scores, dropout.

    Raises:
        InputError: a value outside its range.
    """

    rounds: int = 5
    selection: str = "auto"
    curvature: str = "auto"
    class_probes: int = 12
    hessian_probes: int = 8
    budget: str = "filters"
    layer_bound: float | None = None
    min_filters: int = 1
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    prune_linear: bool = False
    compensate: bool = True
    fine_tune_between: int = 0
    reestimate_batchnorm: bool = False
    seed: int = 0

    def __post_init__(self):
        one_of("selection", self.selection, SELECTIONS)
        one_of("curvature", self.curvature, CURVATURES)
        least = {"rounds": 1, "class_probes": 2, "hessian_probes": 1, "fine_tune_between": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        self.constraints  # noqa: B018 (checks its fields)

    @property
    def constraints(self) -> Constraints:
        """The fields that a selection must respect."""
        bound = {} if self.layer_bound is None else {"layer_bound": self.layer_bound}
        return Constraints(budget=self.budget, min_filters=self.min_filters, round_to=self.round_to, **bound)

    def as_dict(self) -> dict:
        """Plain values, by field."""
        return dataclasses.asdict(self) | {"exclude": list(self.exclude)}
