"""Plots of an inspection: a question's graph after 0..k thoughts, and averages over a file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from coconut_ds.analysis.inspection.prosqa_graph import distances
from coconut_ds.analysis.plots.canvas import LIGHT, Theme, new_figure
from coconut_ds.analysis.plots.walks import draw_walk, draw_walk_heat

_DPI = 150
_COLUMNS = 4
_NODE_INCHES, _LAYER_INCHES, _ROOM_INCHES = 0.68, 0.85, 0.8
_TARGET, _DISTRACTOR, _ROOT = LIGHT.series[2], LIGHT.series[1], LIGHT.text
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#ffffff", LIGHT.series[0]])

Place = tuple[float, float]


def draw_question(found: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """The graph of a question once for every k; one with a walk in the colours of `theme`, others in those of LIGHT.

    `found` is what `Inspection.of_question` returns for a question with a graph.
    """
    return draw_walk(found, theme) if "walk" in found["graph"] else draw_graphs(found)


def draw_graphs(found: dict[str, Any]) -> Figure:
    """The graph of a question once for every k, nodes coloured by the share of the next step's mass on nodes.

    `found` is of a ProsQA question.
    """
    graph, steps = found["graph"], found["next_steps"]
    places = layered(graph)
    width = max(x for x, _ in places.values()) + 1
    depth = max(y for _, y in places.values()) + 1
    columns = min(len(steps), _COLUMNS)
    rows = math.ceil(len(steps) / columns)
    panel_width = max(3.0, width * _NODE_INCHES)
    figure = new_figure(columns * panel_width, rows * (depth * _LAYER_INCHES + _ROOM_INCHES) + 0.4, _DPI)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, after in zip(panels, steps):
        _draw_graph(axes, graph, places, after)
    for axes in panels[len(steps) :]:
        axes.set_axis_off()
    figure.legend(
        handles=_marks(), loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=LIGHT.text
    )
    return figure


def _marks() -> list[Patch]:
    kinds = {"root": _ROOT, "target": _TARGET, "distractor": _DISTRACTOR}
    return [Patch(facecolor="white", edgecolor=colour, linewidth=2, label=name) for name, colour in kinds.items()]


def layered(graph: Mapping[str, Any]) -> dict[int, Place]:
    """Column and layer of every node, from 0: reachable nodes by distance from the root, the others next to them.

    The layer of an unreachable node is its distance from the nearest unreachable node without parents.
    """
    n_nodes, edges = len(graph["idx_to_symbol"]), graph["edges"]
    layers = {int(node): layer for node, layer in graph["distances"].items()}
    others = [node for node in range(n_nodes) if node not in layers]
    children = {child for _, child in edges}
    away = distances([node for node in others if node not in children], edges)
    reached = _spread_out(layers, edges)
    beside = _spread_out({node: away.get(node, 0) for node in others}, edges)
    shift = 1 + max(x for x, _ in reached.values())
    return reached | {node: (x + shift, y) for node, (x, y) in beside.items()}


def _spread_out(layer_of: Mapping[int, int], edges: Sequence[Sequence[int]]) -> dict[int, Place]:
    """Each layer centred, its nodes ordered by the mean place of their parents, so that fewer edges cross."""
    layers: dict[int, list[int]] = defaultdict(list)
    for node, layer in layer_of.items():
        layers[layer].append(node)
    width = max(map(len, layers.values()), default=0)
    places: dict[int, Place] = {}
    for layer, nodes in sorted(layers.items()):

        def mean_parent(node: int) -> float:
            above = [places[parent][0] for parent, child in edges if child == node and parent in places]
            return sum(above) / len(above) if above else width / 2

        for rank, node in enumerate(sorted(nodes, key=mean_parent)):
            places[node] = ((width - len(nodes)) / 2 + rank, layer)
    return places


def _draw_graph(axes: Axes, graph: dict[str, Any], places: Mapping[int, Place], after: dict[str, Any]) -> None:
    probabilities, total = after["step"], sum(after["step"])
    for parent, child in graph["edges"]:
        (x, y), (to_x, to_y) = places[parent], places[child]
        line = {"arrowstyle": "-|>", "color": "#9aa4af", "linewidth": 0.8, "shrinkA": 12, "shrinkB": 12}
        bend = "arc3,rad=0.12" if abs(to_y - y) != 1 else "arc3,rad=0"
        axes.annotate("", (to_x, -to_y), (x, -y), arrowprops={**line, "connectionstyle": bend}, zorder=1)
    edge_colours = {graph["neg_target"]: _DISTRACTOR, graph["target"]: _TARGET, graph["root"]: _ROOT}
    for node, (x, y) in places.items():
        share = probabilities[node] / total if total else 0.0
        colour = _WEIGHTS(share)
        marked = edge_colours.get(node)
        axes.scatter(
            x, -y, s=600, color=[colour], edgecolors=marked or "#9aa4af", linewidths=2 if marked else 0.8, zorder=2
        )
        text = "white" if sum(to_rgb(colour)) < 1.6 else LIGHT.text
        name = graph["idx_to_symbol"][node]
        size = 8 if len(name) < 5 else 5.5
        axes.text(x, -y, name, ha="center", va="center", fontsize=size, color=text, zorder=3)
        if share >= 0.01:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(x, -y - 0.31, f"{share:.0%}", ha="center", va="center", fontsize=7, bbox=box, zorder=3)
    axes.set_xlim(-0.6, max(x for x, _ in places.values()) + 0.6)
    axes.set_ylim(-max(y for _, y in places.values()) - 0.65, 0.5)
    axes.set_axis_off()
    answer = after["answer_masses"]
    axes.set_title(
        f"{_thoughts(after['n_thoughts'])}: starts a step {total:.0%}\n"
        f"answer: target {answer['target']:.0%}, distractor {answer['distractor']:.0%}",
        fontsize=8,
        color=LIGHT.text,
    )


def _thoughts(count: int) -> str:
    return f"{count} thought" + "s" * (count != 1)


def draw_averages(found: dict[str, Any]) -> Figure:
    """Averages over a file with their intervals: norms and entropies by thought, masses by k, interventions."""
    parts = [_draw_norms, _draw_entropies, _draw_windows]
    if steps := found.get("next_steps"):
        is_walk = "after_0" in steps[0]["step_masses"]
        parts += [_draw_walk] if is_walk else [_draw_step_masses, _draw_answer_masses]
    if found.get("interventions"):
        parts.append(_draw_interventions)
    columns = 3
    rows = math.ceil(len(parts) / columns)
    figure = new_figure(4.4 * columns, 3.2 * rows, _DPI)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, part in zip(panels, parts):
        axes.grid(axis="y", color=LIGHT.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        part(axes, found)
        axes.title.set_fontsize(9)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(8)
    for axes in panels[len(parts) :]:
        axes.set_axis_off()
    return figure


def _line(
    axes: Axes, places: Sequence[int], averages: Sequence[dict[str, float]], look: int, label: str, scale: float = 1
) -> None:
    colour, marker = LIGHT.look(look)
    means = [scale * each["mean"] for each in averages]
    lows, highs = ([scale * each[end] for each in averages] for end in ("low", "high"))
    spread = [
        [max(0.0, mean - low) for mean, low in zip(means, lows)],
        [max(0.0, high - mean) for mean, high in zip(means, highs)],
    ]
    axes.errorbar(
        places, means, yerr=spread, color=colour, marker=marker, markersize=5, linewidth=1.3, capsize=3, label=label
    )


def _set_ticks(axes: Axes, places: Sequence[int], names: Sequence[Any], counts: Sequence[int]) -> None:
    """Label the places, with their numbers of questions if these differ."""
    differ = len(set(counts)) > 1
    axes.set_xticks(places, [f"{name}\nn={count}" if differ else str(name) for name, count in zip(names, counts)])


def _thought_places(axes: Axes, found: dict[str, Any]) -> list[int]:
    places = [each["thought"] for each in found["thoughts"]]
    _set_ticks(axes, places, places, [each["n_questions"] for each in found["thoughts"]])
    axes.set_xlim(0.5, len(places) + 0.5)
    axes.set_xlabel("thought")
    return places


def _draw_norms(axes: Axes, found: dict[str, Any]) -> None:
    places = _thought_places(axes, found)
    _line(axes, places, [each["norm"] for each in found["thoughts"]], 0, "fed as a thought")
    axes.axhline(found["embedding_norm"]["mean"], color=LIGHT.series[1], linestyle="--", label="token embeddings")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set_title("Norms")
    axes.set_ylabel("L2 norm")
    _legend(axes)


def _draw_entropies(axes: Axes, found: dict[str, Any]) -> None:
    places = _thought_places(axes, found)
    _line(axes, places, [each["entropy_bits"] for each in found["thoughts"]], 0, "entropy")
    axes.set_ylim(0, max(1.0, 1.15 * axes.get_ylim()[1]))
    axes.set_title("What the LM head reads in a thought")
    axes.set_ylabel("entropy (bits)")


def _draw_windows(axes: Axes, found: dict[str, Any]) -> None:
    places = _thought_places(axes, found)
    reach = max(len(each["window"]) for each in found["thoughts"])
    for back in range(reach):
        these = [
            (place, each["window"][back])
            for place, each in zip(places, found["thoughts"])
            if back < len(each["window"])
        ]
        at, shares = zip(*these)
        _line(axes, at, shares, back, "state before" if back == 0 else f"{back + 1} before", 100)
    axes.set_ylim(0, 130)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("Share of the window")
    axes.set_ylabel("share (%)")
    _legend(axes, ncols=3)


_STEP_LINES = {
    "reachable": "reachable from the root",
    "frontier": "at distance k",
    "leading": "of these, leading to the target",
    "unreachable": "unreachable",
}


def _draw_step_masses(axes: Axes, found: dict[str, Any]) -> None:
    places = _k_places(axes, found)
    for look, (name, label) in enumerate(_STEP_LINES.items()):
        _line(axes, places, [each["step_among_nodes_masses"][name] for each in found["next_steps"]], look, label, 100)
        if name in ("reachable", "frontier", "leading"):
            chance = [100 * each["node_shares"][name]["mean"] for each in found["next_steps"]]
            axes.plot(places, chance, color=LIGHT.look(look)[0], linestyle="--", linewidth=1, alpha=0.7)
    axes.plot([], [], color=LIGHT.text, linestyle="--", linewidth=1, label="share of the nodes")
    begun = [100 * (1 - each["step_masses"]["no_node"]["mean"]) for each in found["next_steps"]]
    axes.plot(places, begun, color="#6e7781", linestyle=":", marker="x", markersize=5, label="starts a step at all")
    axes.set_title("Node the next step starts from, made to start one")
    axes.set_ylabel("probability (%)")
    _legend(axes, ncols=2)


def _draw_answer_masses(axes: Axes, found: dict[str, Any]) -> None:
    places = _k_places(axes, found)
    for look, name in enumerate(("target", "distractor")):
        _line(axes, places, [each["answer_masses"][name] for each in found["next_steps"]], look, name, 100)
    axes.set_title("Answer, made to give one")
    axes.set_ylabel("probability (%)")
    _legend(axes)


def _draw_walk(axes: Axes, found: dict[str, Any]) -> None:
    draw_walk_heat(axes, found)
    axes.set_title("Node after each edge, among all nodes")


def _k_places(axes: Axes, found: dict[str, Any]) -> list[int]:
    places = [each["n_replaced"] for each in found["next_steps"]]
    _set_ticks(axes, places, places, [each["n_questions"] for each in found["next_steps"]])
    axes.set_xlim(-0.3, max(places) + 0.3)
    axes.set_ylim(-3, 140)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("k, steps' worth of thoughts before")
    return places


def _draw_interventions(axes: Axes, found: dict[str, Any]) -> None:
    names = {"zero": "zero", "mean": "mean thought", "other": "another question's"}
    counts = {each["thought"]: each["n_replaced"] for each in found["interventions"]}
    thoughts = list(counts)
    for look, (by, label) in enumerate(names.items()):
        these = [each for each in found["interventions"] if each["by"] == by]
        places = [thoughts.index(each["thought"]) + 0.16 * (look - 1) for each in these]
        colour, marker = LIGHT.look(look)
        changes = [100 * each["change"] for each in these]
        spread = [
            [max(0.0, change - 100 * each["interval"][0]) for change, each in zip(changes, these)],
            [max(0.0, 100 * each["interval"][1] - change) for change, each in zip(changes, these)],
        ]
        axes.errorbar(places, changes, yerr=spread, color=colour, fmt=marker, markersize=5, capsize=3, label=label)
    axes.axhline(0, color=LIGHT.text, linewidth=0.7)
    labels = ["all" if each is None else each for each in thoughts]
    _set_ticks(axes, range(len(thoughts)), labels, list(counts.values()))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -5), max(high, 5) + 0.25 * (max(high, 5) - min(low, -5)))
    axes.set_title("Accuracy with a thought replaced")
    axes.set_xlabel("thought")
    axes.set_ylabel("change (points)")
    _legend(axes)


def _legend(axes: Axes, ncols: int = 1) -> None:
    axes.legend(frameon=False, fontsize=6.5, ncols=ncols, loc="upper center", columnspacing=1.0)
