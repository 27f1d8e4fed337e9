"""Run any program with MonoLoRA registered: `python -m mono_peft.run PROGRAM [ARGUMENTS ...]`.

PEFT finds a method only after its package was imported. Programs that load adapters and do not import mono_peft end
in `KeyError: 'MONOLORA'`; started this way they do not:

    python -m mono_peft.run lm_eval run --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks sst2
    python -m mono_peft.run my_script.py --my_option
    accelerate launch -m mono_peft.run my_script.py --my_option

PROGRAM is a Python file, an installed command (console script), or a module, looked for in this order.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path

import mono_peft  # noqa: F401  (registers the tuner)


def main(arguments: list[str]) -> None:
    """Run the program named by the first of `arguments` with the others as its own, in this process.

    Raises:
        SystemExit: no program is given or none of that name is found; else whatever the program raises.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    program = arguments[0]
    sys.argv = list(arguments)
    if Path(program).is_file():
        sys.path[0] = str(Path(program).resolve().parent)  # as `python FILE` does
        runpy.run_path(program, run_name="__main__")
        return
    commands = tuple(entry_points(group="console_scripts", name=program))
    if commands:
        sys.exit(commands[0].load()())  # as the installed command does
    if _is_module(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    raise SystemExit(f"mono_peft.run: {program!r} is no file, no installed command and no module.")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
