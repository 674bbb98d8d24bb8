"""The graph of a record, of whichever task that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coconut_ds.analysis.inspection.hops_walk import HopsWalk, hops_walk_of, is_hops_question
from coconut_ds.analysis.inspection.prosqa_graph import ProsqaGraph, prosqa_graph_of

QuestionGraph = ProsqaGraph | HopsWalk


def graph_of(record: Mapping[str, Any]) -> QuestionGraph | str:
    """The graph of a record, or why it has none.

    ProsQA records carry their graph in keys of their own; the walk of a hops record is in its question and steps.
    """
    is_hops = "idx_to_symbol" not in record and is_hops_question(str(record.get("question", "")))
    return hops_walk_of(record) if is_hops else prosqa_graph_of(record)
