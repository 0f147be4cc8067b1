"""The command line is made from the fields of the settings, and so are config.json and docs/options.md."""

import dataclasses
import errno
import importlib.util
import math
from pathlib import Path

import pytest

import run_enhanced_pruning
import run_single_experiment
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.arguments import new_parser, parse, parts_of, shown_options
from taylor_pruning.experiment.command import DataSettings, ExperimentTask, SweepTask
from taylor_pruning.experiment.settings import PruningSettings
from taylor_pruning.options import flag, options, value_type
from taylor_pruning.report.json_files import write_json
from taylor_pruning.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RUNNERS = {ExperimentTask: run_single_experiment, SweepTask: run_enhanced_pruning}


def test_the_page_of_options_is_the_generated_one():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == module.page(), "run: python docs/make_options.py"
    for task in RUNNERS:
        assert all(f"`{flag(f)}`" in page for _, f in shown_options(task))


@pytest.mark.parametrize("task", RUNNERS)
def test_help_fits_a_terminal_and_opens_with_what_most_runs_need(task, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = new_parser(task, RUNNERS[task].DESCRIPTION).format_help()
    assert max(map(len, text.splitlines())) <= 80
    first = text.split("options that most runs need:\n")[1].split("\n\n")[0]
    shown = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert 6 <= len(shown) <= 8 and {"--model", "--data-path"} <= set(shown)
    assert text.index("--model vgg16") < text.index("options that most runs need")


@pytest.mark.parametrize("task", RUNNERS)
def test_every_option_says_what_it_sets_and_when_it_helps(task):
    for settings in parts_of(task).values():
        for field in options(settings):
            about = field.metadata["option"]
            assert about.help and about.when.endswith("."), field.name
    flags = [flag(field) for _, field in shown_options(task)]
    assert len(flags) == len(set(flags))


def test_defaults_are_those_of_the_settings():
    command = parse(ExperimentTask, "", [])
    assert command.pruning == PruningSettings() and command.recipe == Recipe()
    assert (command.data.model, command.data.compensation_samples) == ("vgg7_bn", 300)
    assert parse(ExperimentTask, "", ["--data-path", "x"]).data.model == "vgg16"


def test_values_reach_the_field_they_name():
    words = "--fine-tune-epochs 0 --lr 0.5 --exclude a b --no-compensate --layer-bound inf --amp none --export pt2"
    command = parse(ExperimentTask, "", [*words.split(), "--clip-ratio", "none"])
    assert (command.recipe.epochs, command.recipe.lr, command.recipe.amp) == (0, 0.5, None)
    assert command.recipe.clip_ratio is None
    assert (command.pruning.exclude, command.pruning.compensate) == (("a", "b"), False)
    assert command.pruning.constraints.bound is None and command.pruning.layer_bound == math.inf
    assert command.task.export == ("pt2",) and command.as_dict()["fine_tune_epochs"] == 0


def test_the_options_of_a_run_come_back_from_its_config(tmp_path):
    words = "--layer-bound inf --exclude a b --clip-ratio none --no-compensate --lr 0.5 --train-epochs 7 --quiet"
    command = parse(ExperimentTask, "", words.split())
    write_json(tmp_path / "config.json", {"arguments": {**command.as_dict(), "of an older version": 1}})
    again = parse(ExperimentTask, "", ["--resume", str(tmp_path)])
    assert dataclasses.replace(again, run=command.run) == command and again.run.resume == str(tmp_path)
    assert parse(ExperimentTask, "", ["--resume", str(tmp_path), "--lr", "0.1"]).recipe.lr == 0.1
    write_json(tmp_path / "config.json", {"arguments": {"rounds": "many"}})
    with pytest.raises(SystemExit):
        parse(ExperimentTask, "", ["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rounds 0", "--rounds: must be at least 1, not 0"),
        ("--rounds x", "--rounds: must be a whole number, not 'x'"),
        ("--pruning-percentage 30%", "must be a number, not '30%'; give the number without a per cent sign"),
        ("--memory-limit much", "--memory-limit must be a number of bytes such as 4GB"),
        ("--target-macs 50", "the target '50' is less than 100 macs; for a share write a per cent sign, as in 50%"),
        ("--target-macs 50% --target-params 50%", "give one target, --target-macs, --target-params or"),
        ("--repair layer --no-compensate", "--repair layer and --no-compensate contradict each other"),
        ("--export onnx,pt2", "must be one of onnx, pt2, not onnx,pt2; separate several by spaces"),
        ("--lr inf", "--lr: must be finite and above 0, not inf"),
        ("--target-macs 50 %", "% belongs to no option; write it behind its number without a space, as 50%"),
        ("--layer-bound nan", "--layer-bound: must be at least 1, not nan"),
        ("--budget flops", "--budget: must be one of filters, params, macs, latency, not flops"),
        ("--export pt2 jit", "--export: must be one of onnx, pt2, not jit"),
        ("--amp fp8", "--amp: must be one of auto, bf16, fp16, not fp8"),
        ("--round 3", "there is no option --round; did you mean --rounds"),
        ("--seed -1", "--seed: must be between 0 and 4294967295 (both included), not -1"),
        (f"--seed {10**400}", "--seed: must be between 0 and 4294967295"),
        ("--resume=", "--resume: is empty"),
        ("--output-dir=", "--output-dir: is empty"),
        ("--weights=", "--weights: is empty"),
        ("--exclude=", "--exclude: is empty"),
        (f"--resume {'a' * 300}", "cannot read aaa"),
        ("--resume ~nobody-of-that-name/run", "no home folder for ~; write ./~nobody-of-that-name/run"),
    ],
)
def test_wrong_values_are_named_with_their_option(words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(ExperimentTask, "", words.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "nested", "locked"])
def test_a_config_that_cannot_be_read_is_named(kind, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    if kind == "folder":
        config.mkdir()
    elif kind == "nested":
        config.write_text("[" * 100_000)
    else:  # as the system does for users without rights; root has them

        def refuse(*arguments, **keywords):
            raise PermissionError(errno.EACCES, "Permission denied", str(config))

        monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SystemExit) as exit:
        parse(ExperimentTask, "", ["--resume", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and str(config) in error and "folder of an interrupted run" in error


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (SweepTask, "--target-macs 50%", "run_single_experiment.py"),
        (SweepTask, "--seeds 1 -1", "--seeds: must be between 0 and 4294967295"),
        (SweepTask, "--pruning-percentage 50", "no option --pruning-percentage; did you mean --pruning-percentages"),
        (SweepTask, "--baselines molchanov2017", "--baselines needs --compare-baseline"),
        (SweepTask, "--compensate-baselines", "--compensate-baselines needs --compare-baseline"),
        (ExperimentTask, "--target-macs 50% --pruning-percentage 30", "contradict"),
        (ExperimentTask, "--target-macs 50% --budget params", "--target-macs and --budget params contradict"),
        (SweepTask, "--pruning-percentages 10,30", "must be a number, not '10,30'; separate several by spaces"),
        (ExperimentTask, "--repair network --compensation-samples 1", "give more --compensation-samples"),
        (SweepTask, "--repair network --calibration-samples 1", "give more --compensation-samples"),
        (ExperimentTask, "photos", "photos belongs to no option"),
    ],
)
def test_options_that_contradict_are_refused(task, words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(task, "", words.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "words", "option", "needed"),
    [
        (ExperimentTask, "--repair-passes 2", "--repair-passes", "--repair network"),
        (ExperimentTask, "--repair layer --repair-passes 5", "--repair-passes", "--repair network"),
        (ExperimentTask, "--latency-table t.json", "--latency-table", "--budget latency or --target-latency"),
        (SweepTask, "--budget macs --latency-batch 4", "--latency-batch", "--budget latency or --target-latency"),
        (ExperimentTask, "--no-compensate --compensation-samples 9", "--compensation-samples", "--compensate"),
        (
            SweepTask,
            "--no-compensate --compensation-samples 9",
            "--compensation-samples",
            "--compensate or --compensate-baselines",
        ),
        (ExperimentTask, "--no-compensate --correct-levels", "--correct-levels", "--compensate"),
        (ExperimentTask, "--correct-levels --selection independent", "--correct-levels", "--selection auto/joint"),
        (ExperimentTask, "--guard --repair none", "--guard", "--compensate"),
        (ExperimentTask, "--compensate --repair none", "--compensate", "--repair auto/layer/network"),
        (ExperimentTask, "--curvature exact", "--curvature", "--no-compensate or --oracle-samples"),
        (
            ExperimentTask,
            "--taylor-order 1 --class-probes 3",
            "--class-probes",
            "--taylor-order 2/3 or --oracle-samples",
        ),
        (SweepTask, "--taylor-orders 1 --class-probes 3", "--class-probes", "--taylor-orders 2/3"),
        (ExperimentTask, "--skip-corrupt", "--skip-corrupt", "--data-path"),
    ],
)
def test_options_that_do_nothing_are_said(task, words, option, needed):
    assert parse(task, "", words.split()).notes == (f"{option} has no effect without {needed}",)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (ExperimentTask, "--repair network --repair-passes 5"),
        (ExperimentTask, "--target-latency 50% --latency-table t.json --latency-batch 4"),
        (SweepTask, "--no-compensate --compare-baseline --compensate-baselines --compensation-samples 9"),
        (ExperimentTask, "--curvature exact --oracle-samples 3"),
        (SweepTask, "--taylor-orders 1 3 --class-probes 3"),
        (ExperimentTask, "--no-compensate --no-guard --curvature hvp"),
        (ExperimentTask, "--curvature auto --oracle-samples 0 --fine-tune-epochs 0 --lr 0.1"),
    ],
)
def test_options_that_have_an_effect_or_ask_for_nothing_pass(task, words, tmp_path):
    """Also when the run goes on, whose config.json names every option."""
    command = parse(task, "", words.split())
    write_json(tmp_path / "config.json", {"arguments": command.as_dict()})
    for more in ([], words.split()):
        resumed = parse(task, "", ["--resume", str(tmp_path), *more])
        assert dataclasses.replace(resumed, run=command.run) == command and not resumed.notes + command.notes


@pytest.mark.parametrize("task", RUNNERS)
def test_what_options_need_are_options(task):
    known = {flag(f).removeprefix("--"): f for kind in RUNNERS for _, f in shown_options(kind)}
    for _, field in shown_options(task):
        for text in " or ".join(field.metadata["option"].needs).split(" or "):
            name, _, values = (text or "--model").partition(" ")
            needed = known[name.removeprefix("--").removeprefix("no-")]
            choices = needed.metadata["option"].choices or ()
            assert not values or set(values.split("/")) <= set(map(str, choices)), field.name


def test_defaults_that_depend_on_other_options_come_back_from_the_config(tmp_path):
    """The seeds of a sweep are that of --seed; a percentage is 30 without a target, and none with one."""
    cases = [
        (SweepTask, "--seed 3", {"seeds": (3,), "baselines": None}),
        (
            SweepTask,
            "--compare-baseline",
            {"seeds": (0,), "baselines": ("molchanov2017",), "baseline_widths": ("own",)},
        ),
        (ExperimentTask, "--target-macs 50%", {"pruning_percentage": None}),
        (ExperimentTask, "", {"pruning_percentage": 30}),
    ]
    for task, words, expected in cases:
        command = parse(task, "", words.split())
        assert {name: getattr(command.task, name) for name in expected} == expected
        write_json(tmp_path / "config.json", {"arguments": command.as_dict()})
        assert parse(task, "", ["--resume", str(tmp_path)]).task == command.task


@pytest.mark.parametrize("settings", [PruningSettings, Recipe, DataSettings, ExperimentTask, SweepTask])
def test_settings_check_all_that_the_command_line_checks(settings):
    for field in options(settings):
        about = field.metadata["option"]
        wrong = [about.low - 1] if about.low is not None else []
        wrong += [about.high + 1] if about.high is not None else []
        wrong += ["?"] if about.choices else []
        for value in wrong:
            value = (value,) if value_type(field)[1] else value
            with pytest.raises(InputError, match=field.name):
                settings(**{field.name: value})


def test_only_options_are_fields():
    for settings in (PruningSettings, Recipe, DataSettings):
        assert {f.name for f in dataclasses.fields(settings)} - {f.name for f in options(settings)} <= {
            "times"
        }  # measured
