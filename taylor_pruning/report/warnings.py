"""What must be known before the numbers: networks that lost less than was asked for, or by a poorer rule, or unrepaired.

experiment_warnings(results)     # results: the content of results.json
sweep_warnings(sweep)            # the same of a sweep's cells, which are named; see report.sweep_numbers
"""

from taylor_pruning.report.figures import METHODS
from taylor_pruning.report.sweep_numbers import finished_cells

UNCHANGED = 1e-6  # nats of divergence below which a network answers as before


def experiment_warnings(results: dict) -> list[str]:
    """A paragraph for every warning about one network."""
    return [*_stopped(results.get("stopped")), *_of_its_choice(results)]


def sweep_warnings(sweep: dict) -> list[str]:
    """A paragraph for every warning, with the finished cells that it is about."""
    stopped, found = [], {}
    for cell in finished_cells(sweep):
        if cell.get("stopped"):
            stopped.append(f"{_name(cell)} after {cell['stopped']['reached']:.3g} %")
        for text in _of_its_choice(cell):
            found.setdefault(text, []).append(_name(cell))
    first = (
        "stopped before a round that would have destroyed the network, and compared with others that lost more: "
        f"{'; '.join(stopped)}. Give more calibration images or rounds, or --no-guard."
    )
    return [*([first] if stopped else []), *(f"{'; '.join(names)}: {text}" for text, names in found.items())]


def _name(cell: dict) -> str:
    return f"{METHODS[cell['method']].label} at {cell['percentage']:g} % with seed {cell['seed']}"


def _stopped(stopped: dict | None) -> list[str]:
    """Why less was removed than was asked for."""
    if not stopped:
        return []
    found = stopped["held_out"]
    return [
        f"stopped at {stopped['reached']:.3g} % instead of {stopped['asked']:.3g} % of the budget: at "
        f"{stopped['tried']:.3g} % the network would agree with the dense one on {found['agreement']:.0f} % of "
        f"{found['images']} held-out images (divergence {found['divergence']:.2f} nats, of a constant answer "
        f"{found['constant_divergence']:.2f}); give more calibration images or rounds, remove less, or pass --no-guard"
    ]


def _of_its_choice(results: dict) -> list[str]:
    """What is to be said of the widths and the repair, in words that do not depend on the network."""
    rounds = results.get("rounds", [])
    return [*_uniform(rounds, results.get("method", "")), *_unrepaired(rounds)]


def _uniform(rounds: list, method: str) -> list[str]:
    """Whether the images were too poor to choose widths, where a criterion was not to have uniform ones."""
    if "uniform" in method.split() or not any(record.get("uniform_widths") for record in rounds):
        return []
    return [
        "the dense network answers nearly the same on all calibration images, or is so sure of all that no score is above "
        "zero, so that costs do not compare between layers: every layer lost the same share. Calibrate on images of the kind "
        "that the network is for."
    ]


def _unrepaired(rounds: list) -> list[str]:
    """Why the network is as the cut left it, although it was to be repaired."""
    last = rounds[-1] if rounds else {}
    repair, change = last.get("compensation"), last.get("measured_loss_change")
    if not repair or repair["layers"] or (change is not None and change < UNCHANGED):
        return []
    reasons = "; ".join(dict.fromkeys(repair["left_alone"].values()))
    return [f"no layer could be repaired ({reasons}): the network is as the cut left it. Fine-tune it."]
