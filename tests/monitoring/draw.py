"""Draws a Grafana dashboard as SVG, roughly as Grafana does, so that one can look at it without Grafana."""

import re
from html import escape

COLUMN, LINE, MARGIN = 52, 30, 6
# How many values a line has.
STEPS = 30
COLOURS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9", "#f2495c", "#8ab8ff", "#ffa6b0", "#96d98d", "#ffcb7d"]
NAMED = {"green": "#299c46", "red": "#c4162a", "orange": "#e0752d", "blue": "#3274d9"}


def text(x, y, words, size=11, fill="#ccccdc", anchor="start", weight="normal"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(str(words))}</text>')


def box(x, y, w, h, fill, stroke="none"):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" stroke="{stroke}"/>'


def shown(value, unit):
    if unit == "s":
        return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
    if unit == "bytes":
        return f"{value / 1048576:.1f} MiB"
    return f"{value:,.1f}".removesuffix(".0") + (" ops/s" if unit == "ops" else "")


def legend(pattern, labels):
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), pattern)


def mapping(defaults, value):
    for one in defaults["mappings"]:
        found = one["options"].get(f"{value:g}")
        if found:
            return found["text"], NAMED.get(found["color"], found["color"])
    colour = "green"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return None, NAMED.get(colour, colour)


def stat(panel, series, x, y, w, h, _start, _end):
    defaults = panel["fieldConfig"]["defaults"]
    value = series[0][1][0][1][-1][1]
    words, colour = mapping(defaults, value)
    yield box(x, y + 22, w, h - 22, colour)
    yield text(x + w / 2, y + h / 2 + 24, words or shown(value, defaults["unit"]), 28, "#ffffff", "middle", "bold")


def table(panel, series, x, y, w, h, _start, _end):
    defaults = panel["fieldConfig"]["defaults"]
    rows = [(labels, values[-1][1]) for _, answers in series for labels, values in answers]
    columns = sorted({name for labels, _ in rows for name in labels})
    for column, name in enumerate(["Value", *columns]):
        yield text(x + 8 + column * w / (len(columns) + 1), y + 40, name, 11, "#6e9fff", weight="bold")
    for number, (labels, value) in enumerate(sorted(rows, key=lambda row: -row[1])[: int((h - 50) / 18)]):
        words, colour = mapping(defaults, value)
        for column, cell in enumerate([words or value, *(labels.get(name, "") for name in columns)]):
            yield text(x + 8 + column * w / (len(columns) + 1), y + 60 + number * 18, cell, 11,
                       colour if column == 0 else "#ccccdc")


def timeline(panel, series, x, y, w, h, start, end):
    rows = [(legend(target["legendFormat"], labels), values) for target, answers in series for labels, values in answers]
    height = (h - 40) / max(len(rows), 1)
    left = 200
    for number, (name, values) in enumerate(sorted(rows)):
        top = y + 30 + number * height
        yield text(x + left - 6, top + height / 2 + 4, name, 10, anchor="end")
        for time, _ in values:
            at = x + left + (time - start) / (end - start) * (w - left - 10)
            yield box(at, top + 2, min((w - left - 10) / STEPS + 0.6, x + w - 4 - at), height - 4, NAMED["blue"])


def timeseries(panel, series, x, y, w, h, start, end):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    lines = [(legend(target["legendFormat"], labels), values) for target, answers in series for labels, values in answers]
    left, bottom, top = x + 76, y + h - 36, y + 34
    high = max([value for _, values in lines for _, value in values] + [0]) * 1.1 or 1
    for part in range(5):
        level = bottom - (bottom - top) * part / 4
        yield box(left, level, x + w - 10 - left, 0.5, "#3a3d44")
        yield text(left - 5, level + 4, shown(high * part / 4, unit), 10, anchor="end")
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is not None and step["value"] <= high:
            level = bottom - step["value"] / high * (bottom - top)
            yield (f'<line x1="{left}" x2="{x + w - 10}" y1="{level:.1f}" y2="{level:.1f}" stroke="{NAMED[step["color"]]}" '
                   'stroke-dasharray="6 4"/>')
    place = left
    for number, (name, values) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{left + (t - start) / (end - start) * (x + w - 10 - left):.1f},{bottom - v / high * (bottom - top):.1f}"
                          for t, v in values)
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield box(place, y + h - 17, 9, 3, colour)
        yield text(place + 12, y + h - 12, name, 10)
        place += 24 + len(name) * 5.4


KINDS = {"stat": stat, "table": table, "state-timeline": timeline, "timeseries": timeseries}


def dashboard(json, answer, start, end):
    """`answer` returns the series of a panel's target: (labels, [(time, value)])."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in json["panels"])
    width, height = 24 * COLUMN + MARGIN, rows * LINE + MARGIN
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
           box(0, 0, width, height, "#111217")]
    for panel in json["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + MARGIN, place["y"] * LINE + MARGIN
        w, h = place["w"] * COLUMN - MARGIN, place["h"] * LINE - MARGIN
        if panel["type"] == "row":
            out.append(text(x, y + 17, panel["title"], 15, "#ffffff", weight="bold"))
            continue
        out += [box(x, y, w, h, "#181b1f", "#2c2f36"), text(x + 8, y + 16, panel["title"], 12, weight="bold")]
        series = [(target, answer(target)) for target in panel["targets"]]
        out += KINDS[panel["type"]](panel, series, x, y, w, h, start, end)
    return "\n".join([*out, "</svg>", ""])
