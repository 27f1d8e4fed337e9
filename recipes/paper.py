"""The paper's numbers, one constant for each table and figure that prints some; recipes show them beside their own."""

from __future__ import annotations

from evals.paper import TABLE_2, TABLE_2_HEADER

__all__ = ["TABLE_2", "TABLE_2_HEADER"]
