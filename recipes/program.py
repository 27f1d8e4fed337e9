"""A recipe as a program: its settings from the command line over a YAML file, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Settings = TypeVar("Settings")


def parse(
    settings_class: type[Settings], arguments: list[str] | None, shared_with: type[Any] | None = None
) -> Settings:
    """`settings_class`, a dataclass, from the command line over the YAML file of `--config`.

    A setting that does not exist ends the program with a message, in the file as on the command line; the file may
    also have those of `shared_with`, another dataclass, which are left out.
    """
    parser = HfArgumentParser(settings_class)
    parser.add_argument("--config", type=Path, help="YAML file of these settings; the command line goes before it.")
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config} cannot be read ({error}).")
        if not isinstance(settings, dict):
            parser.error(f"--config {config} has no settings; it takes lines of NAME: VALUE.")
        ours = {f.name for f in fields(settings_class)}
        unknown = settings.keys() - ours - {f.name for f in fields(shared_with or settings_class)}
        if unknown:
            parser.error(f"{config} sets {', '.join(sorted(unknown))}, which this recipe does not have.")
        parser.set_defaults(**{name: value for name, value in settings.items() if name in ours})
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0]


def run_as_program(main: Callable[[], None]) -> None:
    """Call a recipe's `main` on the command line; errors that the user can mend end the program with one line."""
    try:
        main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues.")
