"""Settings of programs: dataclasses that the command line and a YAML file fill, and in what two of them differ.

@dataclass
class Training:
    output_dir: str = option(help="Folder of the results.", changes_results=False)
    rates: list[float] = option([0.1, 0.2], help="Learning rates.")

(training,) = parse([Training], ["--output_dir", "runs/mine", "--rates", "0.3"])
run = Run(training.output_dir, "my_recipe", recorded(training), defaults=defaults(Training))
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import Any

import yaml

CHANGES_RESULTS, POSITIONAL, ARGUMENT = "changes_results", "positional", "argument"  # in the metadata of a field


def option(
    default: Any = MISSING, *, help: str, changes_results: bool = True, positional: bool = False, **argument: Any
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: also a list, of which each instance gets a copy; without one the option is required.
        help: what `--help` says of it.
        changes_results: False for what says where and how fast the program works; `recorded` leaves it out, so that
            a run may go on with another value.
        positional: whether the command line takes its values without a name; for a list.
        argument: of `argparse.ArgumentParser.add_argument`, such as `metavar`, and `nargs="*"` for a list that may be
            empty.
    """
    metadata = {"help": help, CHANGES_RESULTS: changes_results, POSITIONAL: positional, ARGUMENT: argument}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def recorded(*settings: Any) -> dict[str, Any]:
    """The settings of dataclass instances that change results, by name: what identifies a run."""
    return {
        name: value
        for part in settings
        for name, value in asdict(part).items()
        if part.__dataclass_fields__[name].metadata.get(CHANGES_RESULTS, True)
    }


def defaults(*classes: type[Any]) -> dict[str, Any]:
    """The defaults of the settings of dataclasses that change results, by name, without what is required."""
    values = {}
    for f in (f for settings_class in classes for f in fields(settings_class)):
        if not f.metadata.get(CHANGES_RESULTS, True):
            continue
        if f.default is not MISSING:
            values[f.name] = f.default
        elif f.default_factory is not MISSING:
            values[f.name] = f.default_factory()
    return values


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, nested: bool = False
) -> str:
    """Say how the settings of a folder differ from those of now: 'NAME: X there, Y now; ...', '' if they do not.

    Args:
        before, now: values that JSON can hold; a tuple equals the list that it is read back as.
        defaults: what a setting counts as on the side that lacks it; None if they lack it too. So a folder from
            before an option existed is like one with the option at its default.
        nested: whether settings within settings are compared one by one, under their own names.
    """
    old, new, missing = (_flat(json.loads(json.dumps(side)), nested) for side in (before, now, defaults or {}))
    sides = [(name, old.get(name, missing.get(name)), new.get(name, missing.get(name))) for name in old | new]
    return "; ".join(f"{name}: {x!r} there, {y!r} now" for name, x, y in sorted(sides, key=lambda s: s[0]) if x != y)


def _flat(settings: dict[str, Any], nested: bool) -> dict[str, Any]:
    if not nested:
        return settings
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        leaves |= _flat(value, nested) if isinstance(value, dict) and value else {name: value}
    return leaves


def parse(
    classes: Sequence[type[Any]],
    arguments: list[str] | None = None,
    *,
    shared: Iterable[type[Any]] = (),
    **options: Any,
) -> tuple[Any, ...]:
    """An instance of each of `classes`, from the command line over the YAML file of `--config`.

    A setting that does not exist ends the program with a message, in the file as on the command line.

    Args:
        classes: dataclasses whose fields have different names.
        arguments: of the command line; by default those of this process.
        shared: dataclasses whose settings the file may have too, since other programs take them; they are left out.
        options: of `argparse.ArgumentParser`, such as `prog` and `description`.
    """
    from transformers import HfArgumentParser  # takes a second to import, and is needed by programs alone

    has_positional = any(f.metadata.get(POSITIONAL) for part in classes for f in fields(part))

    class Parser(HfArgumentParser):
        def add_argument(self, *names: str, **named: Any) -> Any:
            """HfArgumentParser gives it the metadata of a field, of which argparse does not know all."""
            named.pop(CHANGES_RESULTS, None)
            named |= named.pop(ARGUMENT, {})
            if named.pop(POSITIONAL, False):
                names, named = (names[0].removeprefix("--"),), named | {"nargs": "*"}
            if has_positional and named.get("const") is True:  # or a switch would take the next of these values
                named = {"action": "store_true", "help": named.get("help")}
            return super().add_argument(*names, **named)

    parser = Parser(classes, **options)
    parser.add_argument("--config", type=Path, help="YAML file of these settings; the command line goes before it.")
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the file may have what is required
    file.add_argument("--config", type=Path)
    config = file.parse_known_args(arguments)[0].config
    if config is not None:
        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config} cannot be read ({error}).")
        if not isinstance(settings, dict):
            parser.error(f"--config {config} has no settings; it takes lines of NAME: VALUE.")
        ours, theirs = ({f.name for part in parts for f in fields(part)} for parts in (classes, shared))
        if unknown := settings.keys() - ours - theirs:
            program = options.get("prog", "this recipe")
            parser.error(f"{config} sets {', '.join(sorted(unknown))}, which {program} does not have.")
        parser.set_defaults(**{name: value for name, value in settings.items() if name in ours})
        for action in parser._actions:
            action.required = action.required and action.dest not in settings
    return tuple(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[: len(classes)])


def run_as_program(main: Callable[[], None], stopped: str = "The same command continues.") -> None:
    """Call `main` on the command line; errors that the user can mend end the program with one line.

    Args:
        stopped: what is said after an interrupt from the keyboard.
    """
    try:
        main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"Stopped. {stopped}")
