"""Every channel estimated from the other channels of its layer: the part of it that compensation can repair.

Behind removed channels the layers that read them are refitted (repair.compensation). What a removal then costs is not the
channel x_u but what least squares on the channels beside it, over calibration images and positions, leave of it:

    x_u - e_u = [P (x - mean)]_u / P_uu,        P = (C + ridge mean(diag C) I)^-1,   C = Cov(x)

(the inverse of Optimal Brain Surgeon, Hassibi & Stork 1993, on activations; of a unit that has several channels in one
layer, the block of P takes the place of P_uu). `ChannelGraph.gated(..., estimates=...)` puts e_u where a gate closes.
"""

from collections import Counter

import torch

from taylor_pruning.modes import frozen

RIDGE = 1e-2  # relative to the mean variance; the ratio of channels to rows comes on top


class ChannelEstimate:
    """Estimates of a reader's input channels from each other; a grouped conv's from those of the same group.

    Args:
        reader: surgery.graph.Reader.
        rows: number of (image, position) pairs. total: [groups, channels] and products: [groups, channels, channels]
            sums over them of the inputs and of their products.
    """

    def __init__(self, reader, rows, total, products):
        mean = (total / rows)[:, :, None]
        covariance = products / rows - mean @ mean.mT
        channels = covariance.shape[1]
        ridge = (RIDGE + channels / rows) * covariance.diagonal(dim1=1, dim2=2).mean(1)
        identity = torch.eye(channels).to(covariance)
        ridge = ridge.clamp_min(torch.finfo(covariance.dtype).tiny)[:, None, None]
        precision = torch.linalg.inv(covariance + ridge * identity)
        left = precision / precision.diagonal(dim1=1, dim2=2)[:, :, None]
        for group, units in enumerate(reader.units[:: reader.positions].view(len(left), -1)):
            for unit, count in Counter(units.tolist()).items():
                if unit >= 0 and count > 1:  # twins go together: neither can stand for the other
                    twins = (units == unit).nonzero()[:, 0].to(left.device)
                    left[group, twins] = torch.linalg.solve(precision[group, twins][:, twins], precision[group, twins])
        self.reader, self.matrix, self.offset = reader, identity - left, left @ mean

    def __call__(self, x):
        """The estimates, in the shape of the reader's input x."""
        return self.reader.from_rows(self.matrix.to(x) @ self.reader.to_rows(x) + self.offset.to(x), x.shape)


def channel_estimates(model, graph, batches):
    """{layer name: ChannelEstimate} of the layers that compensation refits, from one forward of the batches.

    Layers that are called more than once are not refitted (repair.compensation) and have no entry.
    """
    sums, calls = {}, Counter()

    def record(reader):
        def read(args):
            rows = reader.to_rows(args[0]).movedim(0, 2).flatten(2)  # [groups, channels, images x positions]
            calls[reader.layer] += 1
            part = rows.shape[2], rows.double().sum(2), (rows @ rows.mT).double()
            held = sums.get(reader.layer, (0, 0.0, 0.0))
            sums[reader.layer] = tuple(a + b for a, b in zip(held, part, strict=True))
            return args

        return read

    readers = {reader.layer: reader for reader in graph.readers}
    reads = {node: record(reader) for reader in readers.values() for node in reader.nodes}
    with frozen(model), torch.no_grad(), graph.executed(read=reads):
        for images, _ in batches:
            model(images)
    return {name: ChannelEstimate(readers[name], *s) for name, s in sums.items() if calls[name] == len(batches)}
