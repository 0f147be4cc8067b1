"""Proves a cut: the cut network must give the outputs of the network whose gates are closed.

Both run on random inputs, in copies whose norms, biases and other trivially initialised parameters are drawn at random: with
their initial zeros and ones a wrong bias or scale would not show. Where a trial cut differs or raises, the units at fault
are found by bisection. Nothing here knows how channels are found, gated or cut.
"""

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.memory import raise_out_of_memory
from taylor_pruning.modes import set_mode
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.draws import equal_draws
from taylor_pruning.surgery.lines import place_of
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.surgery.recording import call, typical_tensor
from taylor_pruning.surgery.trial_inputs import FORWARD_ERRORS, random_inputs

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}  # largest relative difference that counts as none
# Above this in float32, float64 decides where the network runs in it: deep random ones amplify rounding.
DOUBTFUL = 1e-5
SCALES = (1, 10, 0.1, 100, 0.01, 1e4, 1e6)  # of random inputs, until the outputs vary
IN_SLICES = 0.1  # what a difference in a slice of an output counts: rounding shows more in a few numbers than in all
SMALL_SLICES = 0.1  # share of an output's slices that are compared by the size of the next larger one


class CutProof:
    """Compares a network with closed gates to the network that is cut.

    Args:
        model: the network. It is not changed.
        examples: list of what the network is tried on, the cheapest first; where one shows a difference, the next one is
            asked, and one on which the network does not run is taken off. Each is a [N, ...] tensor, a tuple of several, or a
            dict of named ones.
        run_gated: run_gated(copy, units, x) gives the outputs of a copy of the model on x with the units' gates closed.
        cut: cut(copy, units) gives a new network without the units.
        modes: the values of `training` in which both are compared; (False, True) if the forward differs in training.

    A unit is anything with `filters`, ((layer name, filter index), ...).
    """

    def __init__(
        self,
        model: nn.Module,
        examples: list,
        run_gated: Callable,
        cut: Callable,
        modes: Sequence[bool] = (False,),
    ):
        self.model, self.run_gated, self.cut, self.modes = model, run_gated, cut, modes
        self.examples, self.scales = examples, {}
        tensor = typical_tensor(model, next(tensors_of(self.examples[-1])))
        self.dtype, self.device = tensor.dtype, tensor.device
        sizes = [t.abs().amax().item() for t in tensors_of(examples[-1]) if t.is_floating_point() and t.numel()]
        self.largest = tuple(size for size in sizes if SCALES[-1] < size < math.inf)  # the last scales to be tried

    def failure(self, units: Sequence) -> str | None:
        """Why removing the units is wrong; None if it is right. Half precision is compared in float32.

        Raises InputError if the network does not run on random inputs, or its outputs say nothing.
        """
        while len(self.examples) > 1:
            try:
                if self._failure(units, self.examples[0]) is None:
                    return None
                break
            except InputError:  # the network does not run on that size
                del self.examples[0]
        return self._failure(units, self.examples[-1])

    def _failure(self, units, example):
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        found = self._compare(units, dtype, example)
        if dtype == torch.float32 and isinstance(found, float) and in_doubt(found):
            with suppress(InputError):  # it may not run in float64
                found, dtype = self._compare(units, torch.float64, example), torch.float64
        if isinstance(found, str):
            return found
        if math.isnan(found):
            raise InputError(
                f"{type(self.model).__name__} gives no finite number that depends on its random inputs or filters, so that its "
                "cuts cannot be verified (classes are no such numbers: let it return what they are chosen by); pass "
                "verify=False to leave this out"
            )
        if found <= TOLERANCES[dtype]:
            return None
        why = " of shapes, whole numbers or infinite values, as a division by zero behind them gives; an epsilon helps there"
        why = why if math.isinf(found) else ""
        return f"removing them gives other outputs than closing their gates (relative difference {found:.1g}{why})"

    def faults(self, units: Sequence, share: float = 1.0, filters: Mapping[str, int] | None = None) -> dict:
        """{unit: reason} of units whose removal is wrong; all others can be removed at once.

        Units with filters in the same layers are judged as one class.

        Args:
            share: share of every class that is cut on trial, drawn from a fixed seed.
            filters: {layer name: how many filters it has}; by default those of the units.
        """
        trials, faults = self._classes(units, share, filters or {}), {}

        def admit(classes, accepted):
            """The accepted classes with those of `classes` that can be removed with them."""
            trial = [unit for name in accepted + classes for unit in trials[name][1]]
            reason = self.failure(trial) if trial else None
            if reason is None:
                return accepted + classes
            if len(classes) == 1:
                faults.update(dict.fromkeys(trials[classes[0]][0], reason))
                return accepted
            half = len(classes) // 2
            return admit(classes[half:], admit(classes[:half], accepted))

        admit(list(trials), [])
        return faults

    @staticmethod
    def _classes(units, share, filters):
        """{layers: (units of the class, those cut on trial)}; with a share below 1 no layer loses all its filters."""
        classes, counts, left = defaultdict(list), {}, Counter()
        for unit in units:
            names = tuple(name for name, _ in unit.filters)
            if names not in counts:
                counts[names] = Counter(names)
            classes[frozenset(counts[names])].append((unit, counts[names]))
            for name, count in counts[names].items():
                left[name] += count
        left |= filters
        draw, trials = random.Random(0), {}
        for layers, members in classes.items():
            chosen = []
            for unit, own in draw.sample(members, len(members)) if share < 1 else members:
                if share == 1 or all(left[name] > count for name, count in own.items()):
                    chosen.append(unit)
                    for name, count in own.items():
                        left[name] -= count
                if len(chosen) >= share * len(members):
                    break
            trials[layers] = [unit for unit, _ in members], chosen
        return trials

    def _compare(self, units, dtype, example):
        """Largest relative difference of the outputs, nan if there is none; or why the cut network fails."""
        differences = []
        with torch.no_grad():
            dense = self._copy(dtype)
            try:
                smaller = self.cut(dense, units)
            except InputError as error:
                return str(error)
            for training in self.modes:
                for network in (dense, smaller):
                    set_mode(network, training)
                # In training mode three: batch statistics would leave nothing but signs of two.
                samples = 1 + len(self.modes)
                x = random_inputs(example, samples, dtype, self.device)
                x, expected, says = self._expected(dense, units, x, training)
                try:
                    with equal_draws(self.device):
                        got = list(tensors_of(call(smaller, x)))
                except FORWARD_ERRORS as error:
                    return f"removing them makes the network fail ({_cause(error)})"
                found = difference(expected, got)
                differences.append(found if says or found > TOLERANCES[dtype] else math.nan)
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def _not_run(self, dense, x, error):
        """The InputError on gated outputs that cannot be computed, of a network that may compute its own."""
        mode = " in training mode" if dense.training else ""
        shapes = ", ".join(str(tuple(t.shape[1:])) for t in tensors_of(x))
        try:
            call(copy_of(dense), x)
        except FORWARD_ERRORS:
            return InputError(
                f"{type(self.model).__name__} cannot be run{mode} on random inputs of shape {shapes} ({_cause(error)}); pass "
                "verify=False if it needs others"
            )
        return InputError(
            f"the graph of {type(self.model).__name__} cannot be run{mode} on inputs of shape {shapes} on which the network "
            f"itself runs, {place_of(error)}: make its forward take all sizes, that of the batch too, from the shapes of "
            "tensors, and tensors of such sizes by torch.zeros or x.new_zeros: torch.FloatTensor(size) and NumPy are not seen"
        )

    def _expected(self, dense, units, x, training):
        """(inputs, outputs with closed gates, whether they say anything), the inputs scaled until all outputs vary, if they can
        be: what is always the same, behind a ReLU that is dead there or a clamp, would be the same of a wrong cut."""
        first, best = next(tensors_of(x)), (-1,)
        kind = training, first.dtype, first.shape
        scales = SCALES if any(t.is_floating_point() for t in tensors_of(x)) else SCALES[:1]
        scales += self.largest
        for scale in self.scales.get(kind, scales):
            scaled = map_tensors(x, lambda t, scale=scale: t * scale if t.is_floating_point() else t)
            try:
                outputs = self._gated(dense, units, scaled, training)
            except InputError:
                if best[0] < 0:
                    raise
                continue  # of such a scale alone
            vary = sum(varies(t, len(first)) for t in outputs)
            if vary > best[0]:
                best = vary, scale, scaled, outputs
            if vary == len(outputs):
                break
        says, (scale, x, outputs) = best[0] > 0 or training, best[1:]  # a BatchNorm in training undoes every scale
        if not says:  # what no input changes may still depend on the filters
            says = difference(self._gated(dense, [], x, training), outputs) > 0
        self.scales[kind] = (scale,)
        return x, outputs, says

    def _gated(self, dense, units, x, training):
        try:
            with equal_draws(self.device):
                return list(tensors_of(self.run_gated(dense, units, map_tensors(x, torch.Tensor.clone))))
        except InputError:
            raise
        except FORWARD_ERRORS as error:
            raise self._not_run(dense, x, error) from error

    def _copy(self, dtype):
        """A copy with drawn parameters. Its large weights are the model's own where they have the right type already."""
        own = {}
        if self.dtype == dtype:
            own = {id(p): p for p in self.model.parameters() if not is_trivial(p)}
        model = copy_of(self.model, own)
        draw_anew(model, own)
        return model if self.dtype == dtype else model.to(dtype)


def in_doubt(difference: float) -> bool:
    """Whether rounding or overflow in float32 may be all there is to a difference."""
    return not difference <= DOUBTFUL


def is_trivial(tensor: torch.Tensor) -> bool:
    """Whether it is a vector (a bias, a norm's scale) or has one value everywhere, as initialisation leaves it."""
    if not tensor.numel() or sum(size > 1 for size in tensor.shape) < 2:
        return True
    first, last = tensor[(0,) * tensor.dim()], tensor[(-1,) * tensor.dim()]
    return first.item() == last.item() and bool((tensor == first).all())


@torch.no_grad()
def draw_anew(model: nn.Module, spared=()):
    """Random values for every trivial parameter and vector buffer: none keeps zero or one, none that is positive as a
    whole, like a variance (which is zero behind a constant), loses that. Parameters whose ids are in `spared` keep theirs."""
    generator = torch.Generator().manual_seed(1)
    buffers = [b for b in model.buffers() if b.numel() > 1 and sum(size > 1 for size in b.shape) == 1]
    trivial = [p for p in model.parameters() if id(p) not in spared and is_trivial(p)]
    for tensor, may_be_variance in (*((p, False) for p in trivial), *((b, True) for b in buffers)):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        uniform, normal = torch.rand(tensor.shape, generator=generator), torch.randn(tensor.shape, generator=generator)
        scale = tensor.float().square().mean().sqrt().item()
        if not scale > 0 or not math.isfinite(scale):
            scale = 1 / math.sqrt(max(1, tensor[0].numel())) if tensor.dim() > 1 else 1.0
        positive = bool((tensor >= 0).all()) and (may_be_variance or bool((tensor > 0).any()))
        shift = 0.1 * scale * normal.abs() if positive else 0.3 * scale * normal
        tensor.copy_(tensor * (0.5 + uniform).to(tensor) + shift.to(tensor))


def tensors_of(outputs) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses, in order; a number counts as one."""
    if torch.is_tensor(outputs):
        yield outputs
    elif isinstance(outputs, (bool, int, float)):
        yield torch.tensor(outputs)
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors_of(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(outputs):
        for field in dataclasses.fields(outputs):
            yield from tensors_of(getattr(outputs, field.name))


def difference(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Largest relative difference |a - b| / |a| of corresponding tensors and of their slices along one dimension (Euclidean
    norms), where it counts a tenth: in one norm, boxes in pixels would hide scores.

    Values that are alike in both and occur again, as the -1e9 of a mask, are in no norm. inf where shapes, places of infinite
    values, or integers differ; nan where there is no finite number to compare.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return math.inf
    worst, compared = 0.0, False
    for a, b in zip(expected, got, strict=True):
        if not a.is_floating_point() and not a.is_complex():
            worst = max(worst, 0.0 if torch.equal(a, b.to(a.dtype)) else math.inf)
            continue
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            worst = math.inf
        elif finite.any():
            compared = True
            worst = max(worst, _relative(a.where(finite, 0), b.to(a.dtype).where(finite, 0)))
    return worst if compared or worst else math.nan


def alike(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether the outputs of a network of this type differ by no more than rounding; also where there is no number."""
    return not difference(expected, got) > TOLERANCES.get(dtype, max(TOLERANCES.values()))


def varies(output: torch.Tensor, samples: int) -> bool:
    """Whether finite values of an output are others for other samples."""
    if not output.dim() or len(output) != samples:
        return False
    finite = torch.isfinite(output) & torch.isfinite(output[:1])
    return bool((finite & (output != output[:1])).any())


def _relative(a, b):
    wide = torch.complex128 if a.is_complex() else torch.float64
    errors, sizes = ((t.to(wide).abs() ** 2) for t in (a - b, a.where(~_repeated(a, b), 0)))
    found = [errors.sum() / sizes.sum()]
    for dim in [d for d in range(1, a.dim()) if a.shape[d] > 1]:
        error, size = (t.sum([d for d in range(a.dim()) if d != dim]) for t in (errors, sizes))
        if (own := size[size > 0]).numel():  # of the smallest slices some are little more than rounding
            least = own.kthvalue(math.ceil(SMALL_SLICES * len(own)))[0]
            found.append((error / size.clamp(min=least)).max() * IN_SLICES**2)
    return math.sqrt(torch.stack(found).nan_to_num(0.0, math.inf).max().item())


def _repeated(a, b):
    """Where the values of two tensors are alike and occur again in other places of the first."""
    alike = (a == b) & (a != 0)
    _, place, count = a[alike].abs().unique(return_inverse=True, return_counts=True)
    return alike.masked_scatter(alike, count[place] > 1)


def _cause(error):
    """First line of an error of the network. Running out of memory is no fault of the network, so it is raised again."""
    raise_out_of_memory(error)
    return str(error).strip().split("\n")[0] or type(error).__name__
