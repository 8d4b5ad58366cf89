"""Small inline SVG charts for a report: drawn by matplotlib, coloured by the page's style sheet.

Lines take the CSS variables ``--c1`` to ``--c4`` and everything else the text colour, so one
drawing serves light, dark and paper. Titles and labels are
ours, but for names of reward sources, which come with control characters made visible.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learner.evaluation.lines import MOST_POINTS, Line, smooth, thin, window

SERIES = ("#010101", "#020202", "#030303", "#040404")  # stand-ins, replaced by the CSS variables
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "accord",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "text.parse_math": False,
}
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_URL = re.compile(r"url\(#([^)]+)\)")
_LONG = re.compile(r"(\.\d\d)\d+")


def line_chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    x_label: str,
    alt: str,
    marks: Sequence[float] = (),
) -> Markup:
    """``name`` makes the ids of this chart unique in the page; ``alt`` says what it shows.
    ``marks``: places on the x axis, each a dashed line.

    A long line is drawn thin, with the mean over ``window`` points around each of its points over
    it.
    """
    figure, axes = _figure(title, x_label, "")
    for colour, line in zip(SERIES, lines, strict=False):
        x, y = thin(line.x, line.y)
        width = window(len(line.y))
        marker = "o" if len(x) < 3 else ""
        if width > 1:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
            x, y = thin(line.x, smooth(line.y, width))
        axes.plot(x, y, color=colour, linewidth=1.5, label=line.label, marker=marker, markersize=3)
    for place in marks:
        axes.axvline(place, color=SERIES[3], linewidth=0.8, linestyle="--")
    if len(lines) > 1:  # under the axes, where it hides no line
        figure.legend(loc="outside lower left", ncols=len(lines), frameon=False, fontsize=8)
    return _inline(figure, name, title, alt)


def round_chart(
    name: str,
    title: str,
    series: Sequence[tuple[str, Sequence[int], Sequence[float], Sequence[tuple[float, float]]]],
    labels: tuple[str, str],
    alt: str,
    level: float,
) -> Markup:
    """Values with their intervals at whole numbers. ``series``: label, x, y, (low, high) of each.
    ``labels`` of the x and y axis. ``level``: a dashed line, such as that of equal policies."""
    figure, axes = _figure(title, *labels)
    axes.axhline(level, color=SERIES[2], linewidth=0.8, linestyle="--")
    for at, (colour, (label, x, y, ends)) in enumerate(zip(SERIES, series, strict=False)):
        aside = [value + 0.06 * (at - (len(series) - 1) / 2) for value in x]
        away = [[v - e[0] for v, e in zip(y, ends, strict=True)],
                [e[1] - v for v, e in zip(y, ends, strict=True)]]  # fmt: skip
        axes.errorbar(
            aside, y, yerr=[[max(0.0, v) for v in side] for side in away], color=colour,
            label=label, marker="o", markersize=4, linewidth=1.2, capsize=3,
        )  # fmt: skip
    axes.set_xticks(sorted({value for _, x, _, _ in series for value in x}))
    figure.legend(loc="outside lower left", ncols=len(series), frameon=False, fontsize=8)
    return _inline(figure, name, title, alt)


def scatter_chart(
    name: str, title: str, x: Sequence[float], y: Sequence[float], labels: tuple[str, str], alt: str
) -> Markup:
    """Points in the order of training, joined by a thin line; ``labels`` of the x and y axis."""
    figure, axes = _figure(title, *labels)
    keep = sorted({round(i * (len(x) - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})
    xs, ys = [x[i] for i in keep], [y[i] for i in keep]
    axes.plot(xs, ys, color=SERIES[0], linewidth=0.5, marker="o", markersize=2.5)
    axes.plot(xs[-1:], ys[-1:], color=SERIES[1], marker="o", markersize=5)
    return _inline(figure, name, title, alt)


def reliability_chart(
    name: str, title: str, bins: Sequence[tuple[float, float, int]], alt: str
) -> Markup:
    """``bins``: (mean probability, frequency, count); the diagonal is perfect calibration."""
    figure, axes = _figure(title, "predicted probability", "how often true")
    low = 0.5 if all(b[0] >= 0.5 for b in bins) else 0.0
    axes.plot([low, 1], [low, 1], color=SERIES[2], linewidth=0.8, linestyle="--")
    most = max(b[2] for b in bins)
    for probability, frequency, count in bins:
        size = 3 + 5 * (count / most) ** 0.5
        axes.plot([probability], [frequency], color=SERIES[0], marker="o", markersize=size)
    return _inline(figure, name, title, alt)


def interval_chart(
    name: str,
    title: str,
    rows: Sequence[tuple[str, float, float, float]],
    x_label: str,
    alt: str,
) -> Markup:
    """``rows``: (label, value, low, high), from the top to the bottom."""
    figure, axes = _figure(title, x_label, "")
    figure.set_size_inches(4.2, 1.1 + 0.28 * len(rows))
    for place, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color=SERIES[0], linewidth=1.5)
        axes.plot([value], [place], color=SERIES[0], marker="o", markersize=5)
    axes.set_yticks(range(len(rows)), [_short(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return _inline(figure, name, title, alt)


def _short(label: str, most: int = 28) -> str:
    return label if len(label) <= most else f"{label[: most - 3]}..."


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.locator_params(nbins=5)
    return figure, axes


def _inline(figure: Figure, name: str, title: str, alt: str) -> Markup:
    """matplotlib's SVG document -> an element that can stand in a page beside others."""
    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(out, format="svg", metadata=_METADATA)
    root = ElementTree.fromstring(out.getvalue())
    _strip(root)
    _localise(root, name)
    for element in root.iter():
        _restyle(element)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "class": "chart",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for at, (tag, text) in enumerate((("title", title), ("desc", alt))):
        node = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        node.text = text
        root.insert(at, node)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(root: ElementTree.Element) -> None:
    """Plain names, and no global style rules, which would reach the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: v for key, v in element.attrib.items()}
        element.tail = None
        if element.tag != "text":
            element.text = None


def _localise(root: ElementTree.Element, name: str) -> None:
    """Ids that are used get the chart's name in front; the others go."""
    used = set(_references(root))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, _URL.sub(rf"url(#{name}-\1)", value))


def _references(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href":
                yield value[1:]
            yield from _URL.findall(value)


def _restyle(element: ElementTree.Element) -> None:
    style = element.get("style")
    if style is not None:
        # The page chooses the font. Older matplotlib writes size and family as one `font:`.
        style = re.sub(r"font-family:[^;]*;?\s*", "", style)
        style = re.sub(r"font:[^;]*?([\d.]+px)[^;]*", r"font-size: \1", style)
        for at, colour in enumerate(SERIES, start=1):
            style = style.replace(colour, f"var(--c{at})")
        style = style.replace("#000000", "currentColor")
        element.set("style", style.strip("; "))
    if element.tag == "text":
        element.set("fill", "currentColor")
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            element.set(key, _LONG.sub(r"\1", " ".join(element.attrib[key].split())))
