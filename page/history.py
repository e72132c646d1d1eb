"""site/history.svg: published minutes of the short track over date, log axis,
readable on light and dark grounds."""

import math
from collections.abc import Callable
from datetime import date
from html import escape

from page.facts import duration, marker

WIDTH, HEIGHT = 860, 330  # pixels
LEFT, RIGHT, TOP, BOTTOM = 62, WIDTH - 40, 18, HEIGHT - 34
TICKS = [(45, "45 min"), (20, "20"), (10, "10"), (5, "5"), (3, "3"), (2, "2"), (1, "1 min"), (2 / 3, "40 s"),
         (1 / 3, "20 s"), (1 / 6, "10 s")]
NAMED = 8  # how many of the largest improvements carry their number
KEY = (("full", "rerun here at full scale"), ("here", "runs here as a delta"), ("absent", "not here yet"))
STYLE = """text{font:12px system-ui,sans-serif;fill:#6e7781}.n{font-weight:600;fill:#2f7ed8}
.g{stroke:#8b949e;stroke-opacity:.28}
path{fill:none;stroke:#2f7ed8;stroke-width:1.6;stroke-opacity:.75}
circle{stroke:#2f7ed8;stroke-width:1.6;fill:#fff}.full{fill:#2f7ed8}.here{fill:#a9cdf5}
@media(prefers-color-scheme:dark){text{fill:#9aa4af}.n{fill:#6cb0ff}path,circle{stroke:#6cb0ff}
circle{fill:#0d1117}.full{fill:#6cb0ff}.here{fill:#2b5687}}"""


def history(site: dict) -> str:
    """The plot as text. Filled dots were rerun here at full scale, tinted ones run here as a delta."""
    points = [
        h for h in site["history"] if h["lineage"] == "short" and h["status"] == "record" and h["minutes"]
    ]
    days = [date.fromisoformat(h["date"]).toordinal() for h in points]
    low, high = min(h["minutes"] for h in points) / 1.15, max(h["minutes"] for h in points) * 1.15

    def x(day):
        return round(LEFT + (RIGHT - LEFT) * (day - days[0]) / (max(days) - days[0]), 1)

    def y(minutes):
        return round(TOP + (BOTTOM - TOP) * math.log(high / minutes) / math.log(high / low), 1)

    at = [(x(day), y(h["minutes"])) for day, h in zip(days, points)]
    path = f"M{at[0][0]} {at[0][1]}" + "".join(f"H{px}V{py}" for px, py in at[1:])
    dots = "".join(
        f'<circle class="{marker(site, h)}" cx="{px}" cy="{py}" r="3.4"><title>{escape(h["ref"])}, '
        f'{h["date"]}: '
        f'{duration(h["minutes"])}, {escape(h["title"])}</title></circle>\n'
        for (px, py), h in zip(at, points)
    )
    steepest = sorted(range(1, len(points)),
                      key=lambda i: points[i]["minutes"] / points[i - 1]["minutes"])[:NAMED]
    names = "".join(f'<text class="n" x="{at[i][0] + 7}" y="{at[i][1] - 6}">{points[i]["id"]}</text>'
                    for i in sorted({0, len(points) - 1, *steepest}))
    rerun = sum(marker(site, h) == "full" for h in points)
    label = (f"Published training time of {len(points)} speedrun records on 8 x H100, from "
             f"{duration(points[0]['minutes'])} to {duration(points[-1]['minutes'])}; {rerun} rerun here at "
             "full scale")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{label}">\n'
            f"<title>{label}</title>\n<style>{STYLE}</style>\n{grid(x, y, days, low, high)}\n<path "
            f"d=\"{path}\"/>\n{dots}{names}\n{key(site, points)}\n</svg>\n")


def grid(
    x: Callable[[int], float], y: Callable[[float], float], days: list[int], low: float, high: float
) -> str:
    """Lines and names of both axes."""
    out = "".join(f'<line class="g" x1="{LEFT}" x2="{RIGHT}" y1="{y(t)}" y2="{y(t)}"/><text x="{LEFT - 8}" '
                  f'y="{y(t) + 4}" '
                  f'text-anchor="end">{label}</text>' for t, label in TICKS if low <= t <= high)
    for year in range(date.fromordinal(days[0]).year, date.fromordinal(max(days)).year + 1):
        for month, label in ((1, year), (7, "July")):
            if days[0] <= (day := date(year, month, 1).toordinal()) <= max(days):
                out += (f'<line class="g" x1="{x(day)}" x2="{x(day)}" y1="{TOP}" y2="{BOTTOM}"/>'
                        f'<text x="{x(day)}" y="{BOTTOM + 20}" text-anchor="middle">{label}</text>')
    return out


def key(site: dict, points: list[dict]) -> str:
    """The legend of the history plot, as SVG."""
    out = (
        f'<text x="{RIGHT}" y="{TOP + 16}" text-anchor="end">published training time on 8 x H100, log '
        'axis</text>'
    )
    for i, (kind, what) in enumerate(KEY):
        n, y = sum(marker(site, h) == kind for h in points), TOP + 36 + 18 * i
        out += (f'<circle class="{kind}" cx="{RIGHT - 180}" cy="{y}" r="3.4"/>'
                f'<text x="{RIGHT - 170}" y="{y + 4}">{what} ({n})</text>')
    return out
