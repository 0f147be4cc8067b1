"""Costs of a network while units are removed from it, and what each further unit would save."""

import torch


class CostModel:
    """Parameters or multiply-accumulates of the network while units go, and what each unit would save now."""

    def __init__(self, graph, kind):
        units, terms = len(graph.units), graph.cost_terms()
        self.scale = torch.tensor([float(getattr(t, {"params": "parameters"}.get(kind, kind))) for t in terms])
        widest = max(len(term.sizes) for term in terms)
        sizes, counts = [1], [torch.zeros(units)]  # entry 0 pads terms of fewer dimensions
        self.rows = torch.zeros(len(terms), widest, dtype=torch.long)
        for row, term in zip(self.rows, terms, strict=True):
            for d, (size, unit_of) in enumerate(zip(term.sizes, term.dims, strict=True)):
                row[d] = len(sizes)
                sizes.append(size)
                counts.append(torch.bincount(unit_of[unit_of >= 0], minlength=units).float())
        self.alive = torch.tensor(sizes, dtype=torch.float64)
        # Units that shrink the same dimensions by equally much save equally much: one column stands for all of them.
        self.counts, self.kind = torch.stack(counts).unique(dim=1, return_inverse=True)

    def total(self):
        """What the network costs now."""
        return (self.scale * self.alive[self.rows].prod(1)).sum().item()

    def savings(self, units=slice(None)):
        """[units] what removing each unit alone would save, to first order in its counts."""
        sizes = self.alive[self.rows]
        others = sizes.prod(1, keepdim=True) / sizes.clamp_min(1)
        slopes = torch.zeros_like(self.alive).index_add_(
            0, self.rows.flatten(), (self.scale[:, None] * others).flatten()
        )
        slopes[0] = 0
        return (slopes.float() @ self.counts)[self.kind[units]]

    def remove(self, unit):
        """Takes a unit out."""
        self.alive -= self.counts[:, self.kind[unit]]
