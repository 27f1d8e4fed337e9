"""Table 2 of the paper, as printed: what the report's tables and figures show beside what was measured."""

from __future__ import annotations

TABLE_2_HEADER = (
    "dangerous", "harassment", "hate", "sexual", "average", "alignment sparsity", "task sparsity", "Beavertails",
    "task performance",
)  # fmt: skip
_BASE = ("7.66", "2.88", "6.14", "2.64", "4.83", "-", "-", "20.90")
# ShieldGemma's scores (x 100) by policy and their average, sparsities, the share that BeaverDam flags, and the task's
# performance, in percent; by part of the table and method. One run of Llama-2-7b-chat.
TABLE_2: dict[str, dict[str, tuple[str, ...]]] = {
    "SST-2": {
        "base": (*_BASE, "88.65"),
        "lora": ("8.48", "6.91", "9.43", "6.77", "7.90", "0", "0", "20.60", "92.78"),
        "monolora": ("5.37", "2.23", "4.63", "1.88", "3.53", "45.54", "36.71", "20.00", "94.84"),
    },
    "Dolly": {
        "base": (*_BASE, "10.21"),
        "lora": ("10.54", "3.53", "7.53", "2.86", "6.12", "0", "0", "23.80", "14.08"),
        "monolora": ("10.49", "3.56", "7.40", "2.70", "6.04", "38.69", "40.00", "22.60", "14.48"),
    },
}
# By kind of judge, the column of its measure of harm.
PAPER_JUDGES = {"shieldgemma": "average", "beaverdam": "Beavertails"}


def table_2_points(part: str, harm: str) -> list[tuple[str, float, float]]:
    """Method, task performance and a column of harm of each line of a part of the table.

        >>> table_2_points("SST-2", "average")[2]
        ('monolora', 94.84, 3.53)

    Args:
        part: "SST-2" or "Dolly".
        harm: a name of TABLE_2_HEADER.
    """
    columns = [TABLE_2_HEADER.index(name) for name in ("task performance", harm)]
    return [(method, *(float(row[column]) for column in columns)) for method, row in TABLE_2[part].items()]  # type: ignore[misc]
