"""The command line: a method's Config from flags and a preset, or the run that is resumed; and one line for what cannot be met."""

import contextlib
import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Any

import tyro

from common.runs.config import UsageError, as_tuple, numbered, require
from common.runs.folder import read_settings

OF_THE_COMMAND = ("out", "dry_run", "resume", "profile")  # settings that a resumed run does not take over


def method_name() -> str:
    """The name of the file being run, such as `accel`."""
    return Path(sys.argv[0]).stem


def die(message: str, code: int = 2) -> None:
    """Prints one line to stderr and exits with `code`: 2 for a request that cannot be met, 1 for a run that failed."""
    print(f"{method_name()}: error: {message}", file=sys.stderr)
    sys.exit(code)


def cli(config_type: type, doc: str, presets: dict[str, Any] | None = None, args: list[str] | None = None):
    """Parses the command line into a `config_type`, beginning from `presets[--preset]`, with --resume from the run's own settings.

    What cannot be parsed or does not fit together ends the program with one line on stderr and code 2.
    """
    print_anything()
    args = sys.argv[1:] if args is None else args
    presets = presets or {"cpu": config_type()}
    errors = io.StringIO()
    try:
        start = where_to_start(config_type, presets, args)
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config_type, description=doc, default=start, args=args)
    except UsageError as error:
        die(str(error))
    except SystemExit as stop:
        if stop.code:  # tyro draws a box of several lines: keep its words
            words = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", errors.getvalue()).split())
            words = re.sub(rf"^Value error |Error parsing {config_type.__name__}: | For full helptext.*", "", words)
            die(words)
        raise


def print_anything() -> None:
    """Where the terminal or file that is printed to cannot hold a character, another stands for it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def given(args: list[str], flag: str) -> str | None:
    """The value of a flag on the command line, the last one; None where it is not there."""
    value = None
    for place, word in enumerate(args):
        if word == flag:
            value = next(iter(args[place + 1 :]), None)
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def where_to_start(config_type: type, presets: dict[str, Any], args: list[str]):
    """What the flags are changes of: a preset; or the settings of the run that is to be resumed, which are in its folder."""
    preset = presets.get(given(args, "--preset") or "cpu", presets["cpu"])
    if "--resume" not in args or {"--help", "-h"} & set(args):
        return preset
    out, runs = given(args, "--out"), Path("runs") / method_name()
    folder = Path(out).expanduser() if out else max(numbered(runs), default=(0, runs))[1]
    if out == "" or not (folder / "config.json").is_file():  # refused later; or it is another host's, whose settings will hold
        return preset
    settings = read_settings(folder)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    unknown = sorted(settings.keys() - fields.keys())
    require(not unknown, f"--resume: {folder} holds a run of another method or version: it has the setting {', '.join(unknown)}")
    settings = {name: as_tuple(value) for name, value in settings.items() if name not in OF_THE_COMMAND}
    try:
        return dataclasses.replace(presets.get(settings.get("preset"), preset), **settings, out=out or str(folder))
    except (TypeError, AttributeError) as error:  # a setting of another type than ours
        raise UsageError(f"--resume: {folder} holds a run of another version: {error}") from error
