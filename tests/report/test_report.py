"""Reports on made-up but realistic experiments and sweeps."""

import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from quick import careful_plots, drawn_plots

from run_enhanced_pruning import Sweep, baseline_methods
from taylor_pruning.experiment.command import SweepTask
from taylor_pruning.report import experiment_plots as ExperimentPlots
from taylor_pruning.report import sweep as SweepReport
from taylor_pruning.report import sweep_plots as SweepPlots
from taylor_pruning.report.figures import CRITERIA, METHODS, ORDERS, layer_axis, saved_figure, short_layer_names
from taylor_pruning.report.json_files import write_json
from taylor_pruning.report.tables import rounds_table, signed, summary_table
from taylor_pruning.selection.baselines import BASELINES

STAGES = ("dense", "pruned", "compensated", "fine-tuned")


@pytest.fixture(scope="module", autouse=True)
def plots_are_drawn():
    with drawn_plots():
        yield


def vgg_layers():
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    return {f"features.{place}": width for place, width in zip(places, widths, strict=True)}


def resnet_layers(blocks):
    names = {"conv1": 64}
    for layer, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        for block in range(count):
            for conv, factor in ((1, 1), (2, 1), (3, 4)):
                names[f"layer{layer}.{block}.conv{conv}"] = width * factor
    return names


def stage(name, top1, keep=1.0, images=10_000, **changes):
    made = {"stage": name, "top1": top1, "top5": min(99.9, 80 + top1 / 5), "loss": 4 - top1 / 28, "images": images,
            "parameters": int(14_720_000 * keep), "macs": int(313_000_000 * keep), "file_bytes": int(58_900_000 * keep),
            "latency_ms": 12.5 * keep**0.7, "seconds": 31.5}  # fmt: skip
    return made | changes


def make_results(widths=None, rounds=5, epochs=10, seed=0):
    random = np.random.default_rng(seed)
    widths = widths or vgg_layers()
    protected = {name for name in widths if name.startswith("conv1")}
    scores, plan, layers = {}, {}, {}
    for depth, (name, width) in enumerate(widths.items()):
        values = random.standard_normal(width) * random.gamma(1, 1, width) * 3e-3 * 0.9**depth + 1e-3 * 0.85**depth
        scores[name] = [None] * width if name in protected else values.tolist()
        gone = [] if name in protected else sorted(np.argsort(values)[: int(width * random.uniform(0.1, 0.6))].tolist())
        plan[name] = gone
        reason = "feeds a sum" if name in protected else None
        layers[name] = {"filters": width, "kept": width - len(gone), "reason": reason}
    final = [93.1, 62.4, 85.7, 92.2]
    curve = final[3] - (final[3] - final[2]) * np.exp(-np.arange(1, epochs + 1) / 3) + random.normal(0, 0.2, epochs)
    true = random.standard_t(2, 150) * 0.01 + 0.01
    flow = random.gamma(1, 1e-4, 400)
    flow[:5] = 0
    unit_scores = flow * random.normal(1, 2, 400) * 10
    return {
        "arguments": {"model": "vgg16", "taylor_order": 3}, "environment": {}, "model": {"name": "vgg16"},
        "stages": [stage(*made, 1.0 if made[0] == "dense" else 0.52) for made in zip(STAGES, final, strict=True)],
        "rounds": [{"trade": {name: {"filters": np.linspace(width * (1 - 0.12 * i), width * (0.88 - 0.12 * i), 25).tolist(),
                                     "cost": (0.003 * (i + 1) * (place % 4 + 1) * np.linspace(0, 1, 25) ** 2).tolist()}
                              for place, (name, width) in enumerate(list(widths.items())[:-1])},
                    "round": i + 1, "filters_removed": 400, "loss": "divergence", "predicted_loss_change": 0.1,
                    "measured_loss_change": 0.2, "label_loss_change": 0.3,
                    "after_selection": {"top1": 92 - 3 * i - 2 * i**0.5, "loss": 0.3 + 0.2 * i},
                    "after_compensation": {"top1": 93 - 1.5 * i, "loss": 0.3 + 0.07 * i}} for i in range(rounds)],
        "layers": layers, "scores": scores, "plan": plan,
        "fine_tuning": [{"epoch": i + 1, "lr": 0.01, "train_loss": 0.5 * 0.9**i, "top1": float(top1), "top5": 99.0,
                         "loss": 4 - float(top1) / 28, "seconds": 20.0} for i, top1 in enumerate(curve)],
        "oracle": {"true": true.tolist(), "spearman": {"1": 0.853, "2": 0.945, "3": 0.954},
                   "predicted": {order: (true * bias + random.normal(0, noise, 150)).tolist()
                                 for order, bias, noise in (("1", 0.3, 0.01), ("2", 0.7, 0.005), ("3", 0.95, 0.004))}},
        "gradient_flow": {
            "layers": {name: {"dense": 1e-2 * 0.9**i, "pruned": None if i == 3 else 3e-3 * 0.7**i if i != 5 else 0.0,
                              "fine-tuned": 8e-3 * 0.9**i} for i, name in enumerate(widths)},
            "units": {"flow": flow.tolist(), "score": [*unit_scores[:-1].tolist(), None],
                      "kept": (unit_scores > np.quantile(unit_scores, 0.3)).tolist()}},
        "seconds": {"rank": 12.0},
    }  # fmt: skip


def make_sweep(percentages=(10, 30, 50, 70), methods=(*ORDERS, *CRITERIA), seeds=(0, 1, 2), epochs=6,
               failed=(), widths=None):  # fmt: skip
    """Cells whose top-1 is a known smooth function of the percentage and the method, plus noise of the seed."""
    widths = widths or vgg_layers()
    weakest = (1.0, 0.75, 0.65, 1.5, 1.4, 1.2, 1.3, 1.25, 2.2)
    strength = dict.fromkeys(METHODS, 1.1) | dict(zip((*ORDERS, *CRITERIA), weakest, strict=True))
    cells = []
    for percentage in percentages:
        for method in methods:
            for seed in seeds:
                random = np.random.default_rng([int(percentage), list(strength).index(method), seed])
                cell = {"percentage": float(percentage), "method": method, "seed": seed, "status": "done"}
                cell["error"] = None
                if (percentage, method, seed) in failed:
                    cells.append(
                        cell
                        | {
                            "status": "failed",
                            "error": "RuntimeError: out of memory\nin layer, 3",
                            "stages": [],
                            "layers": {},
                            "fine_tuning": [],
                        }
                    )
                    continue
                keep = (1 - percentage / 100) ** (1 + 0.1 * strength[method])
                loss = strength[method] * (percentage / 30) ** 1.6
                before, after = 93 - 9 * loss + random.normal(0, 0.8), 93 - loss + random.normal(0, 0.25)
                curve = after - (after - before) * np.exp(-np.arange(1, epochs + 1))
                stages = [stage("dense", 93.1), stage("pruned", before - 5, keep), stage("compensated", before, keep)]
                if epochs:
                    stages.append(stage("fine-tuned", after, keep))
                cells.append(
                    cell
                    | {
                        "stages": stages,
                        "layers": {
                            name: {
                                "filters": width,
                                "reason": "output" if i == len(widths) - 1 else None,
                                "kept": width
                                if i == len(widths) - 1
                                else max(1, int(width * keep ** random.uniform(0.3, 1.7))),
                            }
                            for i, (name, width) in enumerate(widths.items())
                        },
                        "fine_tuning": [{"epoch": i + 1, "top1": float(top1)} for i, top1 in enumerate(curve)],
                        "accuracy_at_steps": [
                            {"step": step, "top1": float(top1)} for step, top1 in zip((0, 10, 30), curve, strict=False)
                        ],
                    }
                )
    return {"dense": stage("dense", 93.1), "cells": cells, "arguments": {"model": "vgg16", "data_path": Path("images")},
            "environment": {"torch": "2.14.1"}}  # fmt: skip


def top1_sweep(table, images=10_000):
    """A sweep of one percentage (50 %) whose fine-tuned top-1 is exactly {method: [a value a seed]}."""
    cells = []
    for method, values in table.items():
        for seed, top1 in enumerate(values):
            stages = [stage("pruned", top1 - 9, 0.5), stage("fine-tuned", top1, 0.5, images=images)]
            cells.append({"percentage": 50.0, "method": method, "seed": seed, "status": "done", "error": None,
                          "stages": stages, "layers": {}, "fine_tuning": []})  # fmt: skip
    return {"dense": stage("dense", 93.1), "cells": cells, "arguments": {}, "environment": {}}


def reject_constant(name):
    raise AssertionError(f"{name} is not JSON")


def assert_png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")


def markdown_tables(text):
    """Every table of a Markdown page as rows of stripped cells, header first, without the rule."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in blocks]
    return [[table[0], *table[2:]] for table in tables]


def test_neither_torch_nor_pyplot_is_imported():
    code = "import sys, taylor_pruning.report.sweep; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    folder = Path(SweepReport.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_criterion_has_a_style():
    """Those of a sweep, in every variant: own and uniform widths, as published and repaired."""
    task = SweepTask(
        baselines=tuple(BASELINES), baseline_widths=("own", "uniform"), compensate_baselines=True, compare_baseline=True
    )
    methods = baseline_methods(task)
    assert len(set(methods)) == 4 * len(BASELINES) and set(methods) <= METHODS.keys()
    sweep, seen = object.__new__(Sweep), set()
    sweep.pruning = SimpleNamespace(prune_by_baseline=lambda *name, **how: seen.add((name, *how.values())))
    for method in methods:
        sweep.pruned(method, 30)
    assert seen == {((n, 30), w, c) for n in BASELINES for w in ("own", "uniform") for c in (False, True)}


def test_json_is_strict_and_ordered(tmp_path):
    value = {"z": np.float32(0.5), "a": [math.nan, math.inf, -np.inf], "n": np.int64(3), "flag": np.bool_(True),
             "array": np.array([[1.0, np.nan]]), "path": Path("a") / "b", 7: (None, "ü")}  # fmt: skip
    write_json(tmp_path / "results.json", value)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    loaded = json.loads(text, parse_constant=reject_constant)
    assert loaded == {"z": 0.5, "a": [None, None, None], "n": 3, "flag": True, "array": [[1.0, None]],
                      "path": os.path.join("a", "b"), "7": [None, "ü"]}  # fmt: skip
    assert list(loaded)[:2] == ["z", "a"] and text.endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        write_json(path, {"a": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_experiment_plots_are_whole(tmp_path):
    with careful_plots():
        paths = ExperimentPlots.write_experiment_plots(make_results(), tmp_path / "new" / "run")
    names = ("accuracy", "filters_per_layer", "score_distribution", "cost_against_width", "oracle", "gradient_flow",
             "flow_vs_score")  # fmt: skip
    assert {path.name for path in paths} == {f"{name}.png" for name in names}
    assert set(paths) == set((tmp_path / "new" / "run").iterdir())
    for path in paths:
        assert_png(path)


def test_the_oracle_is_drawn_with_the_orders_that_it_has(tmp_path, monkeypatch):
    oracle = make_results()["oracle"] | {"left_out": {"3": "PyTorch has no right third derivative of layer_norm"}}
    oracle["predicted"].pop("3"), oracle["spearman"].pop("3")
    saved, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (saved.append(figure), write(figure, path)))
    ExperimentPlots._plot_oracle({"oracle": oracle}, tmp_path / "oracle.png")
    assert [axes.get_title().split(":")[0] for axes in saved[0].axes] == [METHODS[f"order {o}"].label for o in (1, 2)]
    assert saved[0].get_supxlabel() == "without order 3: PyTorch has no right third derivative of layer_norm"


def test_the_trade_goes_on_from_round_to_round():
    """Widths in per cent of the dense ones, costs summed over the rounds; a round that spared the layer changes nothing."""
    rounds = [{"trade": {"a": {"filters": [8, 7, 6], "cost": [0.0, 0.1, 0.3]}}}, {"trade": {}},
              {"trade": {"a": {"filters": [6, 4], "cost": [0.0, 0.5]}}}, {"trade": None}]  # fmt: skip
    width, cost = ExperimentPlots.trade_lines({"rounds": rounds, "layers": {"a": {"filters": 8}}})["a"]
    np.testing.assert_allclose(width, [100, 87.5, 75, 50])
    np.testing.assert_allclose(cost, [0, 0.1, 0.3, 0.8])


def test_experiment_plots_of_a_bare_run(tmp_path):
    """No rounds, no epochs, no oracle, nothing pruned, values missing: still three plots."""
    results = make_results({"conv1": 4, "fc": 3}, rounds=0, epochs=0) | {"oracle": None, "gradient_flow": None}
    results["scores"] = {name: [None] * len(values) for name, values in results["scores"].items()}
    results["stages"] = [stage("dense", 90.0, top5=None, latency_ms=None), stage("pruned", math.nan)]
    assert len(ExperimentPlots.write_experiment_plots(results, tmp_path)) == 3


def test_the_training_loss_of_a_single_epoch_is_seen(tmp_path, monkeypatch):
    """A line needs two points."""
    saved, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (saved.append(figure), write(figure, path)))
    for epochs in (1, 2):
        ExperimentPlots._plot_accuracy(make_results(epochs=epochs), tmp_path / "accuracy.png")
    found = [next(line for line in figure.axes[1].lines if line.get_label() == "training") for figure in saved]
    assert [line.get_marker() for line in found] == [".", "None"]


def test_training_between_rounds_lies_on_the_line():
    results = make_results({"conv1": 4, "fc": 3}, rounds=3, epochs=0)
    results["rounds"][0]["after_training"] = {"top1": 55.5, "loss": 1.5}
    axes = Figure().subplots()
    places, at_rounds, at_epochs = ExperimentPlots._timeline(results)
    ExperimentPlots._trajectory(axes, results, "top1", places, at_rounds, at_epochs, "blue", "top-1")
    (line,) = (line for line in axes.lines if line.get_label() == "top-1")
    ((x, _),) = (point for point in line.get_xydata() if point[1] == 55.5)
    assert at_rounds[0] < x < at_rounds[1]


def test_a_hundred_and_fifty_layers_keep_apart_labels():
    names = list(resnet_layers([3, 8, 36, 3]))
    figure = Figure(figsize=(7.16, 3))
    axes = figure.subplots()
    axes.set_xlim(-0.7, len(names) - 0.3)
    layer_axis(axes.xaxis, names, 6.5)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 20
    assert all(left.x1 < right.x0 for left, right in zip(boxes[:-1], boxes[1:], strict=True))


@pytest.mark.parametrize(
    ("names", "labels", "prefix"),
    [
        (["features.0", "features.12"], ["0", "12"], "features"),
        (["conv1", "layer1.0.conv1", "layer1.10.conv2"], ["c1", "l1.0.c1", "l1.10.c2"], ""),
        (["blocks.0.conv_pw_linear", "blocks.0.conv_dw_linear"], ["c_p_l", "c_d_l"], "blocks.0"),
        (["a.pointwise.weight", "a.pointless.weight"], ["pointw.weight", "pointl.weight"], "a"),
    ],
)
def test_layer_labels_are_short_and_distinct(names, labels, prefix):
    assert short_layer_names(names) == (labels, prefix)


def test_summary_table_has_values_and_changes():
    results = {"stages": [stage("dense", 90.0, latency_ms=None), stage("pruned", 81.5, 0.5, top5=math.nan)]}
    header, rule, dense, pruned, change = summary_table(results).splitlines()
    assert "MACs M" in header and set(rule) == {"-", " "}
    assert dense.split() == ["dense", "90.00", "98.00", "0.786", "14.720", "313.000", "58.90", "-"]
    assert pruned.split()[:3] == ["pruned", "81.50", "-"]
    assert change.split()[2:4] == ["-8.50", "pt"] and change.split().count("-50.0") == 3 and change.endswith("-")
    assert max(map(len, (header, dense, pruned, change))) <= 100


def test_rounds_table_sets_the_prediction_beside_the_measurement():
    rounds = [
        {"round": 1, "percentage": 10.0, "loss": "divergence", "predicted_loss_change": 0.01234,
         "measured_loss_change": -0.02, "label_loss_change": 0.1,
         "after_selection": {"top1": 70.0}, "after_compensation": {"top1": 80.0}, "after_training": None},
        {"round": 2, "percentage": 20.0, "loss": "divergence", "predicted_loss_change": None, "measured_loss_change": 0.5,
         "label_loss_change": 0.00001,
         "after_selection": {"top1": 60.0}, "after_compensation": None},
    ]  # fmt: skip
    header, _, *rows = rounds_table(rounds).splitlines()
    assert "divergence: predicted" in header and "trained" not in header
    assert [row.split() for row in rows] == [
        ["1", "10", "+0.0123", "-0.0200", "+0.1000", "70.0", "80.0"], ["2", "20", "-", "+0.5000", "+1e-05", "60.0", "-"]
    ]  # fmt: skip


def test_what_rounds_to_zero_has_no_minus():
    assert [signed(value, 1) for value in (-0.04, 0.0, -0.06, 2)] == ["+0.0", "+0.0", "-0.1", "+2.0"]
    assert signed(-0.4, 0) == "+0" and signed(float("nan"), 2) == "+nan"


def test_a_page_names_the_networks_that_lost_less_than_their_row_says(tmp_path):
    sweep = make_sweep((10, 30), ("order 2", "magnitude"), (0,))
    sweep["cells"][2] |= {"stopped": {"asked": 30.0, "reached": 12.0}, "rounds": [{"uniform_widths": True}]}
    SweepReport.write_sweep(sweep, tmp_path)
    page = (tmp_path / "results.md").read_text("utf-8")
    assert (
        page.index("| 30 % |") < page.index("lost more: order 2 at 30 % with seed 0 after 12 %.") < page.index("Mean ±")
    )
    assert page.count("**Warning:**") == 2 and "order 2 at 30 % with seed 0: the dense network answers nearly" in page
    assert page.index("## Training steps") < page.index("## All numbers")


def test_a_network_that_lost_less_is_drawn_at_what_it_lost(tmp_path, monkeypatch):
    """One of two seeds stopped at 12 % instead of 30 %."""
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep((10, 30), ("order 2",), (0, 1))
    sweep["cells"][-1]["stopped"] = {"asked": 30.0, "reached": 12.0}
    axes = drawn_axes(monkeypatch, SweepPlots._plot_accuracy, sweep)
    assert [10, 21] in [list(line.get_xdata()) for line in axes[0].lines]


def test_settings_of_matplotlib_come_back(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with pytest.raises(RuntimeError), saved_figure(tmp_path / "a.png"):
        raise RuntimeError
    assert dict(matplotlib.rcParams) == before and not list(tmp_path.iterdir())


def test_settings_of_the_user_change_no_plot(tmp_path):
    """LaTeX may be missing, and takes the sign of per cent for a comment; black lines would be lost on a dark ground."""
    import matplotlib

    others = {"text.usetex": True, "axes.facecolor": "black", "font.size": 30, "axes.formatter.use_locale": True}
    for name, settings in {"plain.png": {}, "other.png": others}.items():
        with drawn_plots(), matplotlib.rc_context(settings), saved_figure(tmp_path / name) as figure:
            figure.subplots().set_title("top-1 %")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_labels_lie_inside_of_the_picture(tmp_path):
    with careful_plots(), saved_figure(tmp_path / "a.png") as figure:
        axes = figure.subplots()
        axes.plot([-1e6, 1e6])
        axes.ticklabel_format(style="plain")
        axes.set_ylabel("loss")
        figure.draw_without_rendering()
        assert axes.yaxis.label.get_window_extent().x0 >= 0


@pytest.mark.parametrize("name", ["estimated loss change (nats)", "mean squared first-order term (nats²)"])
def test_names_of_scores_lie_inside_of_their_pictures(tmp_path, monkeypatch, name):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [figures.append(figure), Path(path).touch()])
    results = make_results() | {"criterion": f"{name}, weighed by gradient flow"}
    with careful_plots():
        ExperimentPlots._plot_scores(results, tmp_path / "a.png")
        ExperimentPlots._plot_flow_and_score(results, tmp_path / "b.png")
        for figure, axis in zip(figures, ("yaxis", "xaxis"), strict=True):
            figure.draw_without_rendering()
            label = getattr(figure.axes[0], axis).label.get_window_extent()
            whole = figure.bbox
            assert whole.x0 <= label.x0 < label.x1 <= whole.x1 and whole.y0 <= label.y0 < label.y1 <= whole.y1


def test_many_methods_fit_into_their_picture_beside_their_percentage(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [figures.append(figure), Path(path).touch()])
    with careful_plots():
        SweepPlots._plot_accuracy(make_sweep((0.5, 90, 97), tuple(METHODS)), [tmp_path / "a.png"])
        (figure,) = figures
        figure.draw_without_rendering()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1 and whole.y0 <= legend.y0 < legend.y1 <= whole.y1
        places = np.concatenate([line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 3])
        assert all(min(abs(x - p) for p in (0.5, 90, 97)) < 3.5 for x in places)


def test_the_legend_of_many_methods_is_no_taller_than_the_plot(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [figures.append(figure), Path(path).touch()])
    with careful_plots():
        SweepPlots._plot_size(make_sweep((30, 50), tuple(METHODS)), [tmp_path / "a.png"])
        (figure,) = figures
        figure.draw_without_rendering()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert legend.height < whole.height / 2 and whole.x0 <= legend.x0 < legend.x1 <= whole.x1


def test_a_plot_that_fails_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(self, path, **options):
        Path(path).write_bytes(b"\x89PNG")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        ExperimentPlots.write_experiment_plots(make_results(), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        SweepReport.write_sweep(make_sweep(seeds=(0,)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = make_sweep((10, 30, 50), failed=[(50, "order 3", 1), *((30, "random", seed) for seed in range(3))])
    with careful_plots():
        return sweep, folder, SweepReport.write_sweep(sweep, folder)


def test_sweep_files_are_whole(written):
    sweep, folder, paths = written
    names = (
        "accuracy",
        "accuracy_against_cost",
        "size_reduction",
        "filters_kept",
        "fine_tuning",
        "accuracy_against_steps",
    )
    plots = {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert {path.name for path in paths} == {"results.json", "results.csv", "results.md"} | plots
    assert set(paths) == set(folder.iterdir())
    for path in paths:
        if path.suffix == ".png":
            assert_png(path)
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF") and path.read_bytes().rstrip().endswith(b"%%EOF")
    loaded = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=reject_constant)
    assert loaded["cells"] == sweep["cells"] and loaded["dense"] == sweep["dense"]


def test_csv_has_a_row_a_cell_and_stage(written):
    sweep, folder, _ = written
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = "percentage method taylor_order seed stage top1 top5 loss parameters macs file_bytes latency_ms seconds"
    assert list(rows[0]) == [*columns.split(), "status", "error"]
    expected = {("0.0", "dense", "", "dense")}
    for cell in sweep["cells"]:
        names = [made["stage"] for made in cell["stages"]] or [""]
        expected |= {(str(cell["percentage"]), cell["method"], str(cell["seed"]), name) for name in names}
    assert {(row["percentage"], row["method"], row["seed"], row["stage"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert {(row["method"], row["taylor_order"]) for row in rows} >= {("order 2", "2"), ("random", ""), ("dense", "")}
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 4 and all(row["error"] == "RuntimeError: out of memory\nin layer, 3" for row in failed)
    last = sweep["cells"][0]["stages"][-1]
    (row,) = [r for r in rows if (r["percentage"], r["method"], r["seed"], r["stage"]) ==
              ("10.0", "order 1", "0", "fine-tuned")]  # fmt: skip
    assert float(row["top1"]) == last["top1"] and int(row["macs"]) == last["macs"]


@pytest.mark.parametrize(("budget", "counted"), [("filters", "filters"), ("params", "parameters")])
def test_labels_say_what_the_percentages_count(budget, counted, tmp_path, monkeypatch):
    sweep, shown = make_sweep((10, 30), ("order 2", "magnitude"), (0,)), []
    sweep["arguments"]["budget"] = budget
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda figure, *a: shown.extend(figure.findobj(Text)) or draw(figure, *a))
    SweepReport.write_sweep(sweep, tmp_path)
    labels = [text.get_text() for text in shown] + (tmp_path / "results.md").read_text("utf-8").splitlines()
    labels = {label for label in [*labels, SweepReport.sweep_table(sweep)] if "removed" in label}
    assert len(labels) >= 8 and all(f"{counted} removed" in label for label in labels), labels


def test_markdown_numbers_are_means_and_sample_deviations(written):
    sweep, folder, _ = written
    text = (folder / "results.md").read_text(encoding="utf-8")
    places = [
        text.index(part)
        for part in ("Dense network: ", "## Training steps until", "Means over seeds", "## All numbers")
    ]
    assert places == sorted(places)
    reference, _, full = markdown_tables(text)
    assert reference[0][:4] == ["filters removed", "order 1", "order 2", "order 3"]
    assert reference[0][-1] == "size reduction" and [row[0] for row in reference[1:]] == ["10 %", "30 %", "50 %"]

    def expected(percentage, method, place, key):
        cells = [cell for cell in sweep["cells"] if (cell["percentage"], cell["method"]) == (percentage, method)]
        values = [cell["stages"][place][key] for cell in cells if cell["status"] == "done"]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    assert reference[1][1].strip("*") == expected(10, "order 1", -1, "top1")
    assert reference[3][3].strip("*") == expected(50, "order 3", -1, "top1")
    assert reference[2][9] == "-"  # every seed failed
    (row,) = [row for row in full if row[:2] == ["50 %", "order 3"]]
    keep = 0.5 ** (1 + 0.1 * 0.65)
    assert row[2:6] == [expected(50, "order 3", place, key) for key in ("top1", "top5") for place in (-2, -1)]
    assert row[6:9] == [f"{100 * (1 - keep):.1f} ± 0.0"] * 3 and row[10] == "2"
    assert "- 50 %, order 3, seed 1: RuntimeError: out of memory in layer, 3" in text
    assert text.count("RuntimeError") == 4


@pytest.mark.parametrize(
    "options",
    [
        {"percentages": (30,), "methods": ("order 2",), "seeds": (0,)},
        {"percentages": (30,), "methods": ("magnitude", "random"), "seeds": (0,), "epochs": 0},
        {"percentages": (30, 50), "methods": ("order 1",), "seeds": (0,), "failed": [(50, "order 1", 0)]},
    ],
    ids=["one cell", "no order, no fine-tuning", "a percentage failed"],
)
def test_small_sweeps_are_reported(options, tmp_path):
    sweep = make_sweep(**options)
    paths = SweepReport.write_sweep(sweep, tmp_path)
    assert all(path.stat().st_size for path in paths)
    assert (tmp_path / "fine_tuning.png").exists() == (options.get("epochs") != 0)
    assert "nan" not in SweepReport.sweep_table(sweep) + (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_sweep_without_a_finished_cell_keeps_its_tables(tmp_path):
    sweep = make_sweep((30,), ("order 2",), (0,), failed=[(30, "order 2", 0)])
    for cell in sweep["cells"]:
        for key in ("stages", "layers", "fine_tuning"):
            del cell[key]
    paths = SweepReport.write_sweep(sweep, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv", "results.md"]
    assert "1 of 1 cells failed" in SweepReport.sweep_table(sweep)


@pytest.mark.parametrize(
    ("random", "aim", "steps"),
    [
        ((20.0, 50.0, 65.9), "66.0 (order 2)", ["10", "0", "more than 30"]),
        ((67.0, 68.0, 65.9), "66.0 (order 2)", ["10", "0", "0"]),  # the aim is what an order has
    ],
)
def test_steps_until_a_method_has_what_the_best_order_has_before_training(random, aim, steps):
    sweep = top1_sweep({"order 1": [70.0, 70.0], "order 2": [70.0, 70.0], "random": [60.0, 60.0]})
    curves = {"order 1": (60.0, 66.0, 72.0), "order 2": (66.0, 70.0, 73.0), "random": random}
    for cell in sweep["cells"]:
        off = 2 * cell["seed"] - 1  # means are those above
        cell["accuracy_at_steps"] = [{"step": s, "top1": top1 + off}
                                     for s, top1 in zip((0, 10, 30), curves[cell["method"]], strict=True)]  # fmt: skip
    header, row = markdown_tables(SweepReport._markdown(sweep))[1]
    assert header[1:] == ["top-1 to reach", "order 1", "order 2", "random"]
    assert row == ["50 %", aim, *steps]


def test_an_unknown_method_is_named():
    sweep = make_sweep((30,), ("order 2",), (0,))
    sweep["cells"][0]["method"] = "order 4"
    with pytest.raises(ValueError, match="order 4"):
        SweepReport.sweep_table(sweep)


def test_sweep_table_shows_both_moments(written):
    table = SweepReport.sweep_table(written[0])
    before, after, note = table.split("\n\n")
    assert before.startswith("Top-1 (%) before") and after.startswith("Top-1 (%) after")
    assert len({len(line) for line in after.splitlines()[1:]}) == 1 and "4 of 81 cells failed" in note


def test_the_highest_mean_of_a_row_stands_out(tmp_path):
    sweep = top1_sweep({"order 1": [70.0, 71.0, 72.0], "order 3": [74.0, 75.0, 76.0], "random": [75.0, 75.0, 75.0]})
    SweepReport.write_sweep(sweep, tmp_path)
    reference, _ = markdown_tables((tmp_path / "results.md").read_text(encoding="utf-8"))
    assert reference[1][1:4] == ["71.0 ± 1.0", "**75.0 ± 1.0**", "**75.0 ± 0.0**"]  # equal figures, both
    assert "75.0 +- 1.0*" in SweepReport.sweep_table(sweep) and "71.0 +- 1.0*" not in SweepReport.sweep_table(sweep)


def test_tables_say_what_the_test_images_leave_open():
    sweep = top1_sweep({"order 2": [50.0], "order 3": [54.0]}, images=400)
    sweep["dense"] |= {"top1": 50.0, "images": 400}
    assert "one standard error of 400 test images: 2.5 points" in SweepReport.sweep_table(sweep)
    sweep["dense"] |= {"top1": 100.0, "images": 24}
    assert "24 test images are too few to tell a standard error" in SweepReport.sweep_table(sweep)
    sweep["dense"]["images"] = None
    assert "nan" not in SweepReport.sweep_table(sweep)


def test_a_diverged_run_enters_no_mean():
    sweep = top1_sweep({"order 2": [70.0, math.nan, 72.0]})
    assert "71.0 +- 1.4" in SweepReport.sweep_table(sweep)


def drawn_axes(monkeypatch, plot, sweep):
    """The figure's axes after `plot`, laid out as users get them."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: [figures.append(figure), Path(path).touch()])
    with careful_plots():
        plot(sweep, ["unused.png"])
        figures[0].draw_without_rendering()
    return figures[0].axes


def test_no_axis_of_accuracies_goes_beyond_100(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep((30, 50), ("order 1", "order 2"), seeds=(0,))
    for holder in (*sweep["cells"], {"stages": [sweep["dense"]], "fine_tuning": [], "accuracy_at_steps": []}):
        for point in (*holder["stages"], *holder["fine_tuning"], *holder["accuracy_at_steps"]):
            point["top1"] = 100.0
    for name in ("accuracy", "cost", "fine_tuning", "steps"):
        axes = drawn_axes(monkeypatch, getattr(SweepPlots, f"_plot_{name}"), sweep)
        accuracies = [panel for panel in axes if "against" not in panel.get_ylabel() and panel.get_ylim()[0] > 1]
        assert accuracies and all(100 <= panel.get_ylim()[1] <= 101 for panel in accuracies), name


@pytest.mark.parametrize("percentages", [(5, 10.5, 20, 95), tuple(range(1, 40)), (30,), (0.5, 0.6, 99)])
def test_percentages_under_an_axis_keep_apart(percentages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowest = drawn_axes(monkeypatch, SweepPlots._plot_accuracy, make_sweep(percentages, ("order 1",), seeds=(0,)))[-1]
    boxes = [label.get_window_extent() for label in lowest.get_xticklabels() if label.get_text()]
    assert boxes and all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
