"""Every channel estimated from the other channels of its layer: the part of it that compensation can repair.

The layers that read removed channels are refitted (repair.compensation). A removal then costs not the channel x_u but its
residual after least squares on the other channels, over calibration images and positions:

    x_u - e_u = [P (x - mean)]_u / P_uu,        P = (C + ridge mean(diag C) I)^-1,   C = Cov(x)

(the inverse of Optimal Brain Surgeon, Hassibi & Stork 1993, on activations; of a unit that has several channels in one
layer, the block of P takes the place of P_uu). `ChannelGraph.gated(..., estimates=...)` puts e_u where a gate closes.

Estimates are cross-fitted: images fall into `FOLDS` folds by their pixels, and an image is scored with estimates that were
fitted on the other folds. A layer with few rows a channel (a classifier after pooling has one row an image) explains
almost everything on the images that fitted it, and would be emptied.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from taylor_pruning.modes import frozen

RIDGE = 1e-2  # relative to the mean variance; the ratio of channels to rows is added
FOLDS = 4
PRIME = 2**31 - 1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a pixel


class ChannelEstimate:
    """Estimates of a reader's input channels from each other; a grouped conv's from those of the same group.

    Args:
        reader: surgery.graph.Reader.
        precision: [groups, channels, channels] P. mean: [groups, channels, 1] of the inputs.
    """

    def __init__(self, reader, precision, mean):
        left = precision / precision.diagonal(dim1=1, dim2=2)[:, :, None]
        for group, units in enumerate(reader.units[:: reader.positions].view(len(left), -1)):
            for unit, count in Counter(units.tolist()).items():
                if unit >= 0 and count > 1:  # channels of one unit are removed together
                    block = (units == unit).nonzero()[:, 0].to(left.device)
                    left[group, block] = torch.linalg.solve(precision[group, block][:, block], precision[group, block])
        identity = torch.eye(left.shape[1]).to(left)
        self.reader, self.matrix, self.offset = reader, identity - left, left @ mean

    def __call__(self, x):
        """The estimates, in the shape of the reader's input x."""
        return self.reader.from_rows(self.matrix.to(x) @ self.reader.to_rows(x) + self.offset.to(x), x.shape)


@dataclass
class InputMoments:
    """Moments of a reader's inputs over (image, position) pairs, one set a fold.

    Attributes:
        reader: surgery.graph.Reader.
        rows: [folds] number of pairs. total: [folds, groups, channels] and products: [folds, groups, channels, channels]
            sums over them of the inputs and of their products, float64.
    """

    reader: object
    rows: torch.Tensor
    total: torch.Tensor
    products: torch.Tensor

    def precision(self, without=None):
        """(P [groups, channels, channels], mean [groups, channels, 1]) of all folds, or of all but one; None without rows."""
        kept = [fold for fold in range(FOLDS) if fold != without]
        rows = self.rows[kept].sum().item()
        if not rows:
            return None
        mean = (self.total[kept].sum(0) / rows)[:, :, None]
        covariance = self.products[kept].sum(0) / rows - mean @ mean.mT
        channels = covariance.shape[1]
        ridge = (RIDGE + channels / rows) * covariance.diagonal(dim1=1, dim2=2).mean(1)
        ridge = ridge.clamp_min(torch.finfo(covariance.dtype).tiny)[:, None, None]
        return torch.linalg.inv(covariance + ridge * torch.eye(channels).to(covariance)), mean


def fold_of(images):
    """[B] fold of every image: a function of its pixels alone, so that an image has one fold in every pass and batch."""
    numbers = images.detach().flatten(1).contiguous().view(_INTEGERS[images.element_size()]).long()
    weights = torch.arange(1, numbers.shape[1] + 1, device=numbers.device) * 2654435761 + 40503  # wraps around: a hash
    return (numbers * weights).sum(1) % PRIME % FOLDS  # the prime mixes all bits: those of rounded pixels end in zeros


def by_fold(batches):
    """Yields (fold, batches of the images that fall into it); batches are no larger than the largest one given."""
    folds, size = [fold_of(images) for images, _ in batches], max(len(images) for images, _ in batches)
    for fold in range(FOLDS):
        chosen = [(fold == f).nonzero().flatten() for f in folds]
        picked = [(x[i], None if y is None else y[i]) for (x, y), i in zip(batches, chosen, strict=True) if len(i)]
        if not picked:
            continue
        images = torch.cat([x for x, _ in picked])
        labels = None if picked[0][1] is None else torch.cat([y for _, y in picked])
        starts = range(0, len(images), size)
        yield fold, [(images[i : i + size], None if labels is None else labels[i : i + size]) for i in starts]


def input_moments(model, graph, batches):
    """{layer name: InputMoments} of the layers that compensation refits, from one forward of the batches.

    Layers that are called more than once are not refitted (repair.compensation) and have no entry.
    """
    found, calls, forwards = {}, Counter(), 0

    def record(reader, fold):
        def read(args):
            rows = reader.to_rows(args[0]).movedim(0, 2).flatten(2)  # [groups, channels, images x positions]
            calls[reader.layer] += 1
            if reader.layer not in found:
                shape = FOLDS, *rows.shape[:2], rows.shape[1]
                zeros = torch.zeros(shape, dtype=torch.float64, device=rows.device)
                found[reader.layer] = InputMoments(reader, zeros[:, 0, 0, 0].clone(), zeros[..., 0].clone(), zeros)
            moments = found[reader.layer]
            moments.rows[fold] += rows.shape[2]
            moments.total[fold] += rows.double().sum(2)
            moments.products[fold] += (rows @ rows.mT).double()
            return args

        return read

    with frozen(model), torch.no_grad():
        for fold, part in by_fold(batches):
            reads = {node: record(reader, fold) for reader in graph.readers for node in reader.nodes}
            with graph.executed(read=reads):
                for images, _ in part:
                    model(images)
                    forwards += 1
    return {name: moments for name, moments in found.items() if calls[name] == forwards}


def channel_estimates(moments, without=None):
    """{layer name: ChannelEstimate} fitted on all folds of `input_moments`, or on all but one.

    Where no other fold has images there is no estimate: a closed channel is then zero.
    """
    fits = {name: (m.reader, m.precision(without)) for name, m in moments.items()}
    return {name: ChannelEstimate(reader, *fit) for name, (reader, fit) in fits.items() if fit}
