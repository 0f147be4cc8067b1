"""The fit of the layer that gives the logits: to the dense network's predictions, not to its logits.

Least squares weigh the logits of all classes alike, also of those that nothing is taken for. With features x, present
weights W, the dense network's logits z, C the centred Gram matrix of the n rows of x, and T = TEMPERATURE, this fit is

    min over D, b of  T^2 mean KL(softmax(z / T) | softmax((x (W + D) + b) / T)) + ridge / (2 n) * mean(diag C) * |D|^2

(multinomial logistic regression on soft targets; Hinton et al. 2015, arXiv:1503.02531), which is convex. The ridge is the
largest whose divergence on held-out images lies within one standard error of the least (Breiman et al. 1984, Classification
and Regression Trees): the layers before were fitted to these images too, which favours small ridges. Where least squares come
closer than that, as where a removed feature depends linearly on the others, they stay. Where neither comes closer than the
present weights, these stay.
"""

import math

import torch

from taylor_pruning.repair.regression import LayerFit, LayerRegression, relative_error
from taylor_pruning.repair.ridge import centre, size_of
from taylor_pruning.scoring.probes import mean_and_error
from taylor_pruning.tasks.classification import kl_divergence

TEMPERATURE = 2.0  # from few images, even the divergence at temperature 1 gets smaller than by a fit at 1
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
STEPS, ENOUGH = 100, 1e-5  # of L-BFGS at most, and the change (nats) at which it ends


class LogitsRegression(LayerRegression):
    """The rows of a linear layer that gives the logits, and its fit to them."""

    def __init__(self, layer, seed, images):
        super().__init__(layer, seed, images)
        self.fitted = []  # (Rows, wanted logits) of the images that are not held out

    def _keep(self, rows, wanted, is_held_out):
        super()._keep(rows, wanted, is_held_out)
        if not is_held_out:
            self.fitted.append((rows, wanted))

    def solve(self) -> LayerFit:
        """Choose the kind of fit and its ridge on the held-out images, fit to all, change the layer."""
        if not (self.fitted and self.held_out):
            return super().solve()
        held_out = list(zip(self.held_out, self.held_out_targets, strict=True))
        fitted, judged = Logits.of(self.fitted), Logits.of(held_out)
        squares, (before, _) = self._choose_ridge(), judged.divergence()
        trials = []  # (ridge, change, divergence, its standard error)
        for ridge in RIDGES:
            change = fitted.nearest(ridge, trials[-1][1] if trials else None, self.layer.has_intercept)
            divergence, error = judged.divergence(*change)
            if trials and not divergence < trials[-1][2]:  # NaN too
                break
            trials.append((ridge, change, divergence, error))
        _, _, least, error = trials[-1]
        by_squares, its_error = self._reached_by_squares(squares[0], judged)
        if not least < before or by_squares + its_error < least:
            return self._solve_with(*(squares if by_squares < before else (None, squares[1], squares[1])))
        ridge, change, divergence, _ = next(trial for trial in trials if trial[2] <= min(least + error, before))
        everything, spread = Logits.of([*self.fitted, *held_out]), judged.spread()
        weight, bias = everything.nearest(ridge, change, self.layer.has_intercept)
        self._change(weight[None], bias[None, None])
        errors = (relative_error(part, spread) for part in (before, divergence))
        return LayerFit(self.layer.name, *errors, ridge, len(everything.x), self.columns, "predictions")

    def _reached_by_squares(self, ridge, judged):
        """Divergence of the fit by least squares and its standard error; infinite where there is no such fit."""
        if ridge is None or self.solver.factorise(ridge):
            return math.inf, 0.0
        return judged.divergence(*(part[0].to(judged.x) for part in self.solver.solve()))


class Logits:
    """Features x [n, columns], the logits [n, classes] that the layer makes of them, and those of the dense network."""

    def __init__(self, x, present, wanted):
        self.x, self.present, self.wanted = x, present, wanted

    @classmethod
    def of(cls, parts):
        """From [(ridge.Rows, wanted logits)] of a layer of one group, in single precision at least."""
        found = [
            torch.cat(each) for each in zip(*((rows.x[0], (y - rows.r)[0], y[0]) for rows, y in parts), strict=True)
        ]
        precision = torch.promote_types(found[0].dtype, torch.float32)
        return cls(*(each.to(precision) for each in found))

    def divergences(self, weight=None, bias=0.0, x=None):
        """[n] T^2 KL from the dense network's predictions where the weights [columns, classes] and the bias change.

        Rounding makes some of them negative where predictions hardly differ.
        """
        answers = self.present if weight is None else self.present + (self.x if x is None else x) @ weight + bias
        return kl_divergence(answers, self.wanted, TEMPERATURE)

    def divergence(self, *change):
        """(mean of `divergences`, its standard error, 0 of one image)."""
        mean, error = mean_and_error(self.divergences(*change))
        return mean.clamp_min(0).item(), error.nan_to_num().item()

    def spread(self):
        """Mean T^2 KL of the dense network's mean prediction from its predictions."""
        # the mean of probabilities that underflow would have no logarithm
        logs = (self.wanted / TEMPERATURE).log_softmax(1)
        mean = (logs.logsumexp(0, keepdim=True) - math.log(len(logs))) * TEMPERATURE
        return kl_divergence(mean.expand_as(self.wanted), self.wanted, TEMPERATURE).mean().clamp_min(0).item()

    def nearest(self, ridge, start, has_intercept):
        """(change of the weights [columns, classes], of the bias [classes]) that minimise what the module's text says.

        Args:
            start: such a pair from which to begin, or None. has_intercept: whether there is a bias, else it is 0.
        """
        mean = centre(self.x)[0] if has_intercept else torch.zeros_like(self.x[0])
        centred = self.x - mean
        largest = size_of(centred)  # whose square may be beyond the range of single precision
        size = largest * (centred / largest).square().mean().sqrt().clamp_min(torch.finfo(centred.dtype).eps)
        centred /= size  # so that the optimiser's tolerances mean the same for features of any size
        weight, bias = start or (
            self.x.new_zeros(self.x.shape[1], self.wanted.shape[1]),
            torch.zeros_like(self.wanted[0]),
        )
        bias = (bias + mean @ weight).requires_grad_(has_intercept)
        weight = (weight * size).requires_grad_()
        free = [weight, bias] if has_intercept else [weight]
        optimiser = torch.optim.LBFGS(free, max_iter=STEPS, tolerance_change=ENOUGH, line_search_fn="strong_wolfe")

        def loss():
            optimiser.zero_grad()
            value = self.divergences(weight, bias, centred).mean() + ridge / 2 * weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        weight, bias = weight.detach() / size, bias.detach()
        return weight, bias - mean @ weight
