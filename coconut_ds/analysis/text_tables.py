"""Rows of cells as an aligned table for a terminal, or as GitHub markdown."""

from __future__ import annotations

Rows = list[list[str]]


def aligned(rows: Rows, markdown: bool = False) -> str:
    """Rows under a header, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
