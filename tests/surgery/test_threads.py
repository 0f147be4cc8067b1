"""A network may run in one thread, or be traced there, while another is traced."""

import threading

import numpy as np
import torch
from conftest import plain, randomise
from torch import nn

from taylor_pruning.surgery.analysis import steps
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.recording import record


def shared():
    return nn.Module.__call__, nn.Module.__getattr__, torch.autocast.__enter__, np.prod


SHARED = shared()


class Begins(nn.Module):
    """Gives its input, and lets another thread enter a region of autocast and stay there."""

    open, end = threading.Event(), threading.Event()

    def forward(self, x):
        threading.Thread(target=self.region, daemon=True).start()
        self.open.wait()
        return x

    @classmethod
    def region(cls):
        with torch.autocast("cpu", torch.bfloat16):
            cls.open.set()
            cls.end.wait()


def test_what_another_thread_runs_is_not_recorded(plain_network, images):
    recorded = [
        steps(record(nn.Sequential(*plain_network[:4], module, *plain_network[4:]), images))
        for module in (nn.Identity(), Begins())
    ]
    Begins.end.set()
    assert Begins.open.is_set() and recorded[0] == recorded[1]


def test_traces_in_several_threads_leave_torch_as_it_was(images):
    units, network = [], randomise(plain())
    together = threading.Barrier(4)

    def work():
        together.wait()
        for _ in range(3):
            units.append(len(ChannelGraph(network, images).units))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert units == [11] * 12
    assert shared() == SHARED
