"""Gates close over the training forwards and over no others."""

from contextlib import contextmanager

import torch
from toys import toy_model

from taylor_pruning.training.squeezing import SqueezedNetwork


def test_gates_fall_to_zero_within_four_fifths_of_the_training_forwards():
    seen, x = [], torch.randn(4, 3, 6, 6)

    @contextmanager
    def gated(gates):
        seen.append(gates.tolist())
        yield

    network = SqueezedNetwork(toy_model(), gated, torch.tensor([True, False]), 10).train()
    for _ in range(10):
        network(x)
        with torch.no_grad():
            network(x)  # neither these
        network.eval()(x)  # nor these count
        network.train()
    falling = [gates[0] for gates in seen[::3]]
    torch.testing.assert_close(falling, [1 - min(1.0, n / 8) for n in range(10)])
    assert all(gates[1] == 1 for gates in seen) and seen[1][0] == seen[2][0] == falling[1]
