"""Two gloo processes that see other draws end with one plan and one network; those that cannot are refused."""

import copy
import functools
import json

import pytest
import torch
from conftest import plain, randomise
from image_files import write_folder
from torch import nn
from two_processes import in_two_processes
from watching import interrupted_at

import run_single_experiment
from EnhancedFilterPruner import ChannelGraph, EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, InputError, PruningSettings
from taylor_pruning.distributed import check_equal_shapes, end_distributed, rank
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.models import network
from taylor_pruning.repair.network import repair_network
from taylor_pruning.scoring import probes
from taylor_pruning.scoring.passes import _of_all_processes
from taylor_pruning.tasks.classification import kl_divergence

QUICK = ["--model", "vgg7_bn", "--fine-tune-epochs", "1", "--rounds", "1", "--batch-size", "8", "--workers", "0",
         "--device", "cpu", "--quiet"]  # fmt: skip


def command(folder, output):
    """The runner on the images and weights in the folder."""
    paths = {"--data-path": "images", "--weights": "weights.pt", "--output-dir": output}
    places = [part for name, path in paths.items() for part in (name, f"{folder}/{path}")]
    assert run_single_experiment.main([*places, *QUICK]) == 0


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a process's own device."""

    def cpu(self):
        return torch.zeros(1)


def one_experiment(folder):
    """Every process has scores and compensation images of its own: the rankings differ, as by rounding on other GPUs."""
    found, rank_by_images = {}, EnhancedFilterPruner.rank

    def ranked(pruner, *arguments):
        collected = rank_by_images(pruner, *arguments).collected
        if rank() and collected.probed:
            collected.probed.h = collected.probed.h.flip(0)
        return pruner

    EnhancedFilterPruner.rank = ranked  # in this process, which ends with the test
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 8, 8, dtype=torch.float64), torch.arange(24) % 4
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    more = [
        (torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank())), labels[:12])
    ]
    for compensated in (False, True):
        repair = "network" if compensated else "none"
        settings = PruningSettings(rounds=2, repair=repair, curvature="hvp", seed=rank())
        torch.manual_seed(0)
        network = randomise(plain(nn.SiLU))
        pruning = EnhancedPruning(network, loader, loader, calibration=list(loader), compensation=more, settings=settings,
                                  progress=False)  # fmt: skip
        result = pruning.prune(50, 2)
        found[compensated] = {
            "plan": result.plan,
            "state": {name: tensor.tolist() for name, tensor in result.model.state_dict().items()},
            "scores": result.scores,
        }
    results = _of_all_processes([(rank(), [torch.ones(1).as_subclass(Elsewhere)])])
    found["sent"] = [type(result).__name__ for result in results]
    with pytest.raises(InputError, match=r"bias has the shape \(4,\) in process 0 and \(5,\) in process 1"):
        check_equal_shapes(nn.Linear(3, 4 + rank()))
    end_distributed()
    command(folder, "double")  # as torchrun starts it
    return found


def test_two_processes_cut_and_repair_as_one(tmp_path):
    write_folder(tmp_path / "images", per_class=8)
    torch.manual_seed(0)
    torch.save(network("vgg7_bn", 2, 32).state_dict(), tmp_path / "weights.pt")
    first, second = in_two_processes(one_experiment, tmp_path)
    assert first[False]["scores"] != second[False]["scores"], "or equal plans would say nothing"
    for compensated in (False, True):
        assert first[compensated]["plan"] == second[compensated]["plan"]
        assert first[compensated]["state"] == second[compensated]["state"]
    assert first["sent"] == second["sent"] == ["Tensor", "Tensor"], "a tensor that travels must not keep its device"
    command(tmp_path, "single")
    double, single = (json.loads((tmp_path / f / "results.json").read_text()) for f in ("double", "single"))
    assert double["plan"] == single["plan"] and double["environment"]["processes"] == 2
    assert double["stages"][-1]["images"] == single["stages"][-1]["images"] == 16


def one_probing(_=None):
    """Derivatives along random probes, and the images that this process has scored for it, of three batches."""
    torch.manual_seed(0)
    model, images = randomise(plain(nn.SiLU)), torch.randn(10, 3, 8, 8, dtype=torch.float64)
    batches = [(x, torch.arange(len(x)) % 4) for x in images.split(4)]
    graph = ChannelGraph(model, images)
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupted_at(patch, probes, "open_gates", None)
        found = probes.probe_derivatives(model, graph, batches, order=3, progress=False)
    return {"derivatives": vars(found), "images": sum(len(x) for _, (x, _) in calls)}


def test_two_processes_share_the_probes_and_find_what_one_does(tmp_path):
    first, second = in_two_processes(one_probing, tmp_path)
    alone = one_probing()
    assert (first["images"], second["images"], alone["images"]) == (6, 4, 10)
    for both in (first, second):
        torch.testing.assert_close(both["derivatives"], alone["derivatives"])


def one_repair(_=None):
    """Each process takes half of the images of every step."""
    torch.manual_seed(0)
    dense = randomise(plain(nn.ReLU))
    smaller = copy.deepcopy(dense)
    smaller[0].weight.data.mul_(0.7)
    images = torch.randn(80, 3, 8, 8, dtype=torch.float64)
    losses = functools.partial(kl_divergence, temperature=4.0)
    report = repair_network(
        dense, smaller, [(images[:64], None)], [(images[64:], None)], losses, passes=2, progress=False
    )
    return {"losses": (report.loss_before, report.loss_after), "steps": report.steps, "state": smaller.state_dict()}


def test_two_processes_repair_the_network_as_one_does(tmp_path):
    first, second = in_two_processes(one_repair, tmp_path)
    alone = one_repair()
    for both in (first, second):
        assert both["steps"] == alone["steps"] > 0 and both["losses"] == pytest.approx(alone["losses"])
        torch.testing.assert_close(both["state"], alone["state"])
