"""Charts as inline SVG, coloured by the page's style sheet; and text made safe to show.

Nothing here is interactive: a chart says in words what it shows (``role=img`` and a label), and its
points carry their values as titles. Text is drawn at least as large as on the page around it when
the chart is 440 px wide.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
MOST_POINTS = 400
"""Longer lines are thinned: more points than pixels only make the file larger."""


def visible(text: str) -> str:
    """``text`` with everything that hides or reorders text shown by name; newlines and tabs stay.

    Escape sequences, direction overrides, zero-width characters and broken surrogates can make a
    page say something else than what the model said.
    """
    return "".join(map(_visible, text.replace("\r\n", "\n")))


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or 0x20 <= code < 0x7F:
        return char
    if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} or code & 0xFFFE == 0xFFFE:
        return f"⟨U+{code:04X}⟩"
    return char


def element(name: str, *children: str, **attributes: object) -> Markup:
    """One element; text is escaped, ``Markup`` is not; ``_`` in attributes stands for ``-``."""
    words = Markup("").join(
        Markup(' {}="{}"').format(key.strip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
    )
    inside = Markup("").join(
        child if isinstance(child, Markup) else escape(visible(child)) for child in children
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), words, inside)


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else visible(str(value))


@dataclass(frozen=True)
class Series:
    label: str
    style: str
    """A class of the page's style sheet: ``before`` or ``after``."""
    points: Sequence[tuple[float, float]]
    """(x, y), x rising."""
    band: Sequence[tuple[float, float]] = ()
    """(low, high) per point; empty: none."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from below ``low`` to above ``high``."""
    raw = (high - low) / about
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * m for m in (1, 2, 5) if power * m >= raw * 0.999), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    label: str,
    series: Sequence[Series],
    x_label: str,
    show: Callable[[float], str],
    limits: tuple[float, float] = (-math.inf, math.inf),
    least_span: float = 0.0,
) -> Markup:
    """Lines with their bands over whole-numbered x; ``label`` says in words what there is to see.

    Args:
        show: How to write a y value.
        limits: What y cannot exceed (a rate: 0 and 1).
        least_span: The least range of y shown, so that noise is not blown up to fill the chart.
    """
    ys = [y for one in series for _, y in one.points]
    ys += [edge for one in series for pair in one.band for edge in pair]
    xs = [x for one in series for x, _ in one.points]
    rest = max(0.0, least_span - (max(ys) - min(ys))) / 2
    marks = ticks(max(limits[0], min(ys) - rest), min(limits[1], max(ys) + rest), 4)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    x = Scale(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT)
    parts = [_axes(marks, y, sorted(set(xs)), x, x_label, show)]
    parts += [_band(one, x, y) for one in series if one.band]
    parts += [_line(one, x, y, show) for one in series]
    return _svg(label, WIDTH, HEIGHT, *parts)


def whiskers(
    label: str,
    rows: Sequence[tuple[str, float, tuple[float, float], str]],
    show: Callable[[float], str],
    zero: bool = False,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """One line per row of (name, value, interval, style): a dot on its interval.

    ``zero`` marks 0, the place where nothing has changed, and makes sure that it is in sight.
    """
    ends = [end for _, _, interval, _ in rows for end in interval] + ([0.0] if zero else [])
    pad = max(0.01, 0.06 * (max(ends) - min(ends)))
    marks = ticks(max(limits[0], min(ends) - pad), min(limits[1], max(ends) + pad), 4)
    height = 30 * len(rows) + 34
    left = 64
    x = Scale(marks[0], marks[-1], left + 14, WIDTH - 26)
    foot = height - 26
    parts = [element("path", d=f"M{x(mark):.1f} 6V{foot}", class_="grid") for mark in marks] + [
        element("text", show(mark), x=x(mark), y=height - 8, text_anchor="middle", class_="tick")
        for mark in marks
    ]
    if zero:
        parts.append(element("path", d=f"M{x(0):.1f} 2V{foot}", class_="zero"))
    for row, (name, value, (low, high), style) in enumerate(rows):
        at = 22 + 30 * row
        caps = "".join(f"M{x(end):.1f} {at - 6}v12" for end in (low, high))
        parts += [
            element("text", name, x=0, y=at + 5, class_="name"),
            element("path", d=f"M{x(low):.1f} {at}H{x(high):.1f}{caps}", class_=f"bar {style}"),
            _dot(x(value), at, style, f"{name}: {show(value)} ({show(low)} to {show(high)})", 6),
        ]
    return _svg(label, WIDTH, height, *parts)


def sparkline(label: str, values: Sequence[float | None]) -> Markup:
    """A small line over iterations; None is a gap."""
    width, height = 200, 56
    known = [value for value in values if value is not None]
    x = Scale(0, max(1, len(values) - 1), 5, width - 5)
    y = Scale(min(known), max(known), height - 6, 6)
    runs, pen = list[str](), "M"
    stride = max(1, len(values) // MOST_POINTS)
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
        elif i % stride == 0 or i == len(values) - 1:
            runs.append(f"{pen}{x(i):.1f} {y(value):.1f}")
            pen = "L"
    last = max(i for i, value in enumerate(values) if value is not None)
    dot = element("circle", cx=x(last), cy=y(known[-1]), r=3, class_="after dot")
    return _svg(label, width, height, element("path", d="".join(runs), class_="after line"), dot)


def bar(share: float) -> Markup:
    """A bar over ``share`` of its width; the number stands beside it."""
    filled = element("rect", width=100 * share, height=8, class_="fill")
    return element(
        "svg",
        filled,
        class_="share",
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _svg(label: str, width: int, height: int, *parts: Markup) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _axes(
    marks: Sequence[float],
    y: Scale,
    xs: Sequence[float],
    x: Scale,
    x_label: str,
    show: Callable[[float], str],
) -> Markup:
    stride = max(1, math.ceil(len(xs) / 10))
    labelled = xs[::stride]
    foot = HEIGHT - BOTTOM
    parts = [
        element("path", d=f"M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}", class_="grid") for mark in marks
    ]
    parts += [
        element("text", show(m), x=LEFT - 6, y=y(m) + 4, text_anchor="end", class_="tick")
        for m in marks
    ]
    parts += [
        element("text", f"{m:g}", x=x(m), y=foot + 16, text_anchor="middle", class_="tick")
        for m in labelled
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        element("text", x_label, x=middle, y=HEIGHT - 4, text_anchor="middle", class_="axis")
    )
    return Markup("").join(parts)


def _band(series: Series, x: Scale, y: Scale) -> Markup:
    places = [x(at) for at, _ in series.points]
    upper = [f"{p:.1f} {y(high):.1f}" for p, (_, high) in zip(places, series.band, strict=True)]
    lower = [f"{p:.1f} {y(low):.1f}" for p, (low, _) in zip(places, series.band, strict=True)]
    if len(places) == 1:  # a lone point has a whisker instead
        return element("path", d=f"M{upper[0]}L{lower[0]}", class_=f"bar {series.style}")
    outline = "M" + "L".join(upper + lower[::-1]) + "Z"
    return element("path", d=outline, class_=f"band {series.style}")


def _line(series: Series, x: Scale, y: Scale, show: Callable[[float], str]) -> Markup:
    points = series.points[:: max(1, len(series.points) // MOST_POINTS)]
    path = "M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in points)
    parts = [element("path", d=path, class_=f"line {series.style}")]
    if len(points) <= 40:
        parts += [
            _dot(x(at), y(value), series.style, f"{series.label} {at:g}: {show(value)}", 4)
            for at, value in points
        ]
    return Markup("").join(parts)


def _dot(x: float, y: float, style: str, title: str, size: float) -> Markup:
    # Before is a square and after a circle: colour alone must not tell them apart.
    name = element("title", title)
    if style == "before":
        return element(
            "rect",
            name,
            x=x - size,
            y=y - size,
            width=2 * size,
            height=2 * size,
            class_="before dot",
        )
    return element("circle", name, cx=x, cy=y, r=size, class_=f"{style} dot")
