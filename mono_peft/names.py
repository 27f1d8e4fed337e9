"""The name of the tuner, the prefix of its weights, and its member of PEFT's enumeration of methods."""

from __future__ import annotations

import threading

import peft
from packaging.version import Version
from peft.utils.peft_types import PeftType

NAME = "MONOLORA"
PREFIX = "monolora_"  # transformers' `load_adapter` relies on prefix == peft_type.lower() + "_"
TESTED_PEFT = ("0.18", "0.22")  # from, below

lock = threading.Lock()  # of what PEFT knows of MonoLoRA


def peft_type() -> PeftType:
    """The member `PeftType.MONOLORA`; added to PEFT's enumeration at the first call.

    Raises:
        ImportError: PEFT is outside the tested range, or its enumeration took the member but does not find it.
    """
    with lock:
        if NAME not in PeftType.__members__:
            _check_peft_version()
            _add_enum_member()
        return PeftType[NAME]


def _check_peft_version() -> None:
    lowest, below = TESTED_PEFT
    if not Version(lowest) <= Version(Version(peft.__version__).base_version) < Version(below):
        raise ImportError(
            f"mono_peft was tested with peft >= {lowest}, < {below}, and found peft {peft.__version__}. It enters its "
            f'method in private tables of PEFT, so it does not guess: pip install "peft>={lowest},<{below}".'
        )


def _add_enum_member() -> None:
    """Add a member as `enum.EnumType` would have; checked on Python 3.10 to 3.13."""
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # Before the tables below: `EnumType.__setattr__` refuses names that are members already.
    setattr(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(NAME)
    if PeftType(NAME) is not member or PeftType[NAME] is not member or member not in list(PeftType):
        raise ImportError("mono_peft could not add MONOLORA to peft.PeftType on this version of Python.")
