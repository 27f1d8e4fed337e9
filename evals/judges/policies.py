"""ShieldGemma's safety policies, the text of each by its name, as its model card gives them."""

from __future__ import annotations

import json
from pathlib import Path

POLICIES: dict[str, str] = json.loads(Path(__file__).with_name("shieldgemma.json").read_text(encoding="utf-8"))[
    "policies"
]
