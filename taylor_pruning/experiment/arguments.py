"""The command line of both runners, made from the fields of the settings (options.Option)."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.command import Command, DataSettings, ExperimentTask, RunSettings, SweepTask
from taylor_pruning.experiment.settings import PruningSettings
from taylor_pruning.files import user_path
from taylor_pruning.options import NAMES, flag, option_name, options, problem, range_text, value_type
from taylor_pruning.training.recipe import Recipe

UNITS = ("%", "B", "kB", "KB", "MB", "GB", "TB", "k", "K", "M", "G", "us", "ms", "s")  # of targets and of memory
TITLES = {
    "task": "more about the task",
    "data": "images and dense network",
    "pruning": "choice of filters and repair",
    "recipe": "fine-tuning",
    "run": "run",
}


def parts_of(task: type) -> dict[str, type]:
    """{field of Command: settings class} of a command with that task."""
    return {"task": task, "data": DataSettings, "pruning": PruningSettings, "recipe": Recipe, "run": RunSettings}


def shown_options(task: type) -> list[tuple[str, dataclasses.Field]]:
    """(field of Command, option) of the command line, in the order of `--help`."""
    return [
        (part, f)
        for part, settings in parts_of(task).items()
        for f in options(settings)
        if f.metadata["option"].command_line
    ]


def new_parser(task: type[ExperimentTask] | type[SweepTask], description: str) -> argparse.ArgumentParser:
    """The parser of a runner: the options that most runs need first, then the others in groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
        add_help=False,
    )
    common = parser.add_argument_group("options that most runs need")
    groups = {part: parser.add_argument_group(title) for part, title in TITLES.items()}
    for part, f in shown_options(task):
        _add(common if f.metadata["option"].common else groups[part], part, f)
    groups["run"].add_argument("-h", "--help", action="help", help="show this list and exit")
    return parser


def _add(group, part: str, field: dataclasses.Field):
    kind, several, _ = value_type(field)
    # without a default: what is in the namespace was given
    properties = {"dest": f"{part}.{field.name}", "default": argparse.SUPPRESS, "help": _help(field).replace("%", "%%")}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        group.add_argument(flag(field), action=action, **properties)
        return
    properties |= {"nargs": "+"} if several else {}
    group.add_argument(flag(field), type=_reader(field), metavar=_placeholder(field), **properties)


def _placeholder(field: dataclasses.Field) -> str:
    about, (kind, several, _) = field.metadata["option"], value_type(field)
    if about.choices and not several:
        return "{" + ",".join(_choices(field)) + "}"
    return about.metavar or {int: "N", float: "X", str: "NAME"}[kind]


def _choices(field: dataclasses.Field) -> list[str]:
    """The choices as text."""
    return [*map(str, field.metadata["option"].choices), *(["none"] if _takes_none(field) else [])]


def _takes_none(field: dataclasses.Field) -> bool:
    """Whether "none" on the command line is the value None; a number whose default is None is left out instead."""
    _, several, optional = value_type(field)
    return optional and not several and bool(field.metadata["option"].choices or field.default is not None)


def value_text(field: dataclasses.Field) -> str:
    """The values that an option takes, for docs/options.md."""
    about, (kind, several, _) = field.metadata["option"], value_type(field)
    if kind is bool:
        return "on, off"
    number = " ".join(filter(None, (NAMES[kind], range_text(about), "or none" if _takes_none(field) else "")))
    text = ", ".join(_choices(field)) if about.choices else number
    return f"one or more: {text}" if several else text


def default_text(field: dataclasses.Field) -> str:
    """The default as `--help` and docs/options.md show it; "" where there is none to show."""
    about, default = field.metadata["option"], field.default
    if about.default_text:
        return about.default_text
    if isinstance(default, bool):
        return "on" if default else ""
    if isinstance(default, tuple):
        return " ".join(_text(item) for item in default)
    return "" if default is None else _text(default)


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(field: dataclasses.Field) -> str:
    about, default, several = field.metadata["option"], default_text(field), value_type(field)[1]
    choices = f"; any of {', '.join(_choices(field))}" if several and about.choices else ""
    return about.help + choices + (f" (default: {default})" if default else "")


def _reader(field: dataclasses.Field):
    """An argparse type: the value of the text, checked as the settings check it."""
    kind, several, _ = value_type(field)

    def read(text: str):
        if text == "none" and _takes_none(field):
            return None
        try:
            value = kind(text)
            found = problem(field, value, text)
        except ValueError:
            found = f"must be {NAMES[kind]}, not {text!r}"
        if found:
            raise argparse.ArgumentTypeError(found + _hint(text, kind, several))
        return value

    return read


def _hint(text: str, kind: type, several: bool) -> str:
    """What may have been meant by a value that is wrong; "" where nothing comes to mind."""
    if "," in text:
        return "; separate several by spaces" if several else "; it has a comma in it"
    return "; give the number without a per cent sign" if kind is not str and text.endswith("%") else ""


def parse(task: type[ExperimentTask] | type[SweepTask], description: str, argv: list[str] | None = None) -> Command:
    """The settings that a command line asks for. With --resume, options that it does not name are those of that run.

    Exits with code 2 on wrong input.
    """
    parser = new_parser(task, description)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown, task))
    given = wanted = vars(given)
    try:
        if folder := given.get("run.resume"):
            _check_one_folder(folder, given.get("run.output_dir"))
            parser.set_defaults(**_options_of_run(user_path(folder), task))
            wanted = vars(parser.parse_args(argv))
        values = {part: {} for part in parts_of(task)}
        for destination, value in wanted.items():
            part, name = destination.split(".")
            values[part][name] = tuple(value) if isinstance(value, list) else value
        command = Command(**{part: settings(**values[part]) for part, settings in parts_of(task).items()})
        return dataclasses.replace(command, notes=tuple(_without_effect(command, given, task)))
    except InputError as error:
        parser.error(str(error))


def _without_effect(command: Command, given: dict, task: type) -> Iterator[str]:
    """A line on every option of the command line that asks for something and has no effect."""
    values = {flag(f): getattr(getattr(command, part), f.name) for part, f in shown_options(task)}
    for part, f in shown_options(task):
        asked = given.get(f"{part}.{f.name}") not in (None, 0, "auto")  # False is 0: what is off asks for nothing
        for needed in f.metadata["option"].needs if asked else ():
            known = [text for text in needed.split(" or ") if _positive(text.split()[0]) in values]
            if not any(_holds(text, values) for text in known):
                yield f"{flag(f)} has no effect without {' or '.join(known)}"


def _positive(name: str) -> str:
    return name.replace("--no-", "--", 1)


def _holds(text: str, values: dict) -> bool:
    """Whether the options have what `Option.needs` says between two "or"."""
    name, _, allowed = text.partition(" ")
    value = values[_positive(name)]
    if allowed:
        return any(str(item) in allowed.split("/") for item in (value if isinstance(value, tuple) else [value]))
    return bool(value) == (name == _positive(name))


def _check_one_folder(resume: str, output_dir: str | None) -> None:
    """Raises InputError where the run that is continued would not write where the command line says."""
    if output_dir and user_path(output_dir).resolve() != user_path(resume).resolve():
        raise InputError(f"--resume continues the run in {resume}, not in {output_dir}; leave --output-dir out")


def _unknown(words: list[str], task: type) -> str:
    """What is wrong with words that no option takes, and which options may have been meant."""
    names = [word.split("=")[0] for word in words if word.startswith("--")]
    if not names and words[0] in UNITS:
        return f"{words[0]} belongs to no option; write it behind its number without a space, as 50% or 4GB"
    if not names:
        return f"{words[0]} belongs to no option; put the option before it, as --data-path {words[0]}"
    close = difflib.get_close_matches(names[0], [flag(field) for _, field in shown_options(task)], n=3)
    return f"there is no option {names[0]}; " + (f"did you mean {', '.join(close)}?" if close else "--help lists all")


def _options_of_run(folder: Path, task: type) -> dict:
    """{destination: value} of the options in the folder's config.json; {} where there is no such file."""
    config = folder / "config.json"
    try:
        there = json.loads(config.read_text(encoding="utf-8"))["arguments"]
        names = {name: f"{part}.{f.name}" for part, f in shown_options(task) if (name := option_name(f)) != "resume"}
        return {destination: there[name] for name, destination in names.items() if name in there}
    except (FileNotFoundError, NotADirectoryError):  # run.open_folder reports it
        return {}
    except OSError as error:
        raise InputError(
            f"cannot read {config}: {error.strerror}; --resume takes the folder of an interrupted run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{config} is not the config.json of a run ({error}); pass the folder of an interrupted run"
        ) from error
