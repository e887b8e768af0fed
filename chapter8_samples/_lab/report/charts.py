"""レポート用のグラフ(インライン SVG)。外部のフォントもスクリプトも使わない。

横の位置はすべて % で書くので、携帯の画面でも紙でも、文字の大きさは変わらない。
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from markupsafe import Markup

from ..console import shortened

HEIGHT, TOP, BOTTOM = 258, 68, 24
LEFT = 7.0  # 目盛りの文字の分(%)
BAR_HEIGHT = 40
KINDS = {
    "release": "リリース",
    "alert": "アラート",
    "rollback": "ロールバック",
    "resolved": "解消",
}
MAX_LABELS, LABEL_COLUMNS = 4, 24
"""名前を書く印の数(1 つに 1 段)と、名前の長さ(半角の文字数)。"""
LEFTWARD = 55
"""これより右(%)の印の名前は、左へ書く。"""
MAX_TIME_TICKS = 5
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_STEPS = (
    *(1, 2, 5, 10, 20, 30),
    *(minutes * _MINUTE for minutes in (1, 2, 5, 10, 15, 30)),
    *(hours * _HOUR for hours in (1, 2, 3, 6, 12)),
    *(days * _DAY for days in (1, 2, 7, 14, 30, 60, 180, 365)),
)
"""時刻の目盛りの間隔(秒)。"""


@dataclass(frozen=True)
class Marker:
    """時間軸に立てる印。``at`` は開始からの秒、``kind`` は ``KINDS`` のどれか。"""

    at: float
    label: str
    kind: str


@dataclass(frozen=True)
class Series:
    """折れ線 1 本。値のない点は ``None`` で、線はそこで切れる。"""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class LineChart:
    """時間軸の折れ線グラフ。

    Attributes:
        started: 開始の時刻。2 分を超える図では、目盛りを時計の時刻にする。
        times: 開始からの秒。
        unit: ``"{:,.0f} ms"`` のような、値の書式。
    """

    started: datetime
    times: Sequence[float]
    series: Sequence[Series]
    unit: str = "{:g}"
    threshold: float | None = None
    markers: Sequence[Marker] = ()

    def svg(self) -> Markup:
        """図と凡例の HTML。"""
        parts = [*self._grid(), *self._threshold(), *self._markers()]
        for number, line in enumerate(self.series, 1):
            parts += self._line(line, number)
        parts += [*self._values(), *self._time_axis()]  # 文字は線より手前に
        label = "、".join(line.name for line in self.series)
        figure = Markup('<svg width="100%" height="{}" role="img" aria-label="{}">{}</svg>')
        return figure.format(HEIGHT, label, Markup("").join(parts)) + self._legend()

    def _end(self) -> float:
        return max([*self.times, *(marker.at for marker in self.markers)], default=0.0) or 1.0

    def _x(self, time: float) -> float:
        return LEFT + (100 - LEFT) * min(max(time / self._end(), 0.0), 1.0)

    def _ticks(self) -> list[float]:
        known = [value for line in self.series for value in line.values if value is not None]
        return axis_ticks(max([*known, self.threshold or 0.0]))

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self._ticks()[-1]

    def _grid(self) -> Iterator[Markup]:
        line = Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>')
        return (line.format(self._y(value)) for value in self._ticks())

    def _values(self) -> Iterator[Markup]:
        text = Markup('<text class="tick" x="0" y="{:.1f}">{}</text>')
        for value in self._ticks():
            yield text.format(self._y(value) - 3, self.unit.format(value))

    def _time_axis(self) -> Iterator[Markup]:
        text = Markup('<text class="tick" x="{:.2f}%" y="{}" text-anchor="{}">{}</text>')
        for time, label in time_ticks(self._end(), self.started):
            x = self._x(time)
            anchor = "start" if x <= LEFT else "end" if x > 96 else "middle"
            yield text.format(x, HEIGHT - 7, anchor, label)

    def _threshold(self) -> list[Markup]:
        if self.threshold is None:
            return []
        line = Markup('<line class="limit" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>')
        return [line.format(self._y(self.threshold))]

    def _is_crowded(self) -> bool:
        return len(self.markers) > MAX_LABELS

    def _markers(self) -> Iterator[Markup]:
        """印。多いときは上の端の短い線だけにし、内容は 8.4 の表に任せる。"""
        line = Markup(
            '<line class="mark {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}">'
            "<title>{}</title></line>"
        )
        text = Markup('<text class="mark {}" x="{:.2f}%" y="{}" dx="{}" text-anchor="{}">{}</text>')
        bottom = TOP - 2 if self._is_crowded() else HEIGHT - BOTTOM
        for row, marker in enumerate(self.markers):
            x = self._x(marker.at)
            yield line.format(marker.kind, x, x, TOP - 10, bottom, marker.label)
            if not self._is_crowded():
                dx, anchor = (-4, "end") if x > LEFTWARD else (4, "start")
                label = shortened(marker.label, LABEL_COLUMNS)
                yield text.format(marker.kind, x, 12 + 14 * row, dx, anchor, label)

    def _line(self, line: Series, number: int) -> Iterator[Markup]:
        """折れ線は伸縮する内側の SVG に、点は外側に置く(円がつぶれないように)。"""
        frame = Markup('<svg viewBox="0 0 100 {}" preserveAspectRatio="none">{}</svg>')
        path = Markup('<polyline class="line{}" points="{}"/>')
        dot = Markup(
            '<circle class="fill{}" cx="{:.2f}%" cy="{:.1f}" r="2.5">'
            "<title>{} {}: {}</title></circle>"
        )
        runs = unbroken(self.times, line.values)
        paths = Markup("")
        for run in runs:
            points = " ".join(f"{self._x(time):.2f},{self._y(value):.1f}" for time, value in run)
            paths += path.format(number, points)
        yield frame.format(HEIGHT, paths)
        for time, value in (point for run in runs for point in run):
            words = self._moment(time), line.name, self.unit.format(value)
            yield dot.format(number, self._x(time), self._y(value), *words)

    def _moment(self, time: float) -> str:
        if self._end() <= 2 * _MINUTE:
            return f"{time:.0f} 秒"
        return f"{self.started + timedelta(seconds=time):%m/%d %H:%M}"

    def _legend(self) -> Markup:
        item = Markup('<span><i class="key{}"></i>{}</span>')
        items = [item.format(number, line.name) for number, line in enumerate(self.series, 1)]
        if self.threshold is not None:
            items.append(item.format("-limit", f"しきい値 {self.unit.format(self.threshold)}"))
        if self._is_crowded():
            mark = Markup('<span><i class="mark {}"></i>{}</span>')
            kinds = {marker.kind for marker in self.markers}
            items += [mark.format(kind, KINDS[kind]) for kind in KINDS if kind in kinds]
        return Markup('<div class="legend">{}</div>').format(Markup("").join(items))


def unbroken(
    times: Sequence[float], values: Sequence[float | None]
) -> list[list[tuple[float, float]]]:
    """値のないところで切った、(時刻, 値) の列。"""
    runs: list[list[tuple[float, float]]] = [[]]
    for time, value in zip(times, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((time, value))
    return [run for run in runs if run]


def bars(rows: Sequence[tuple[str, float]], unit: str) -> Markup:
    """横棒グラフ。名前と値を棒の上に書く。"""
    top = max((value for _, value in rows), default=0.0) or 1.0
    bar = Markup(
        '<text x="0" y="{0}">{3}</text><text class="tick" x="100%" y="{0}" text-anchor="end">'
        '{4}</text><rect class="fill1" x="0" y="{1}" width="{2:.2f}%" height="12" rx="3"/>'
    )
    parts: list[Markup] = []
    for number, (name, value) in enumerate(rows):
        y = BAR_HEIGHT * number
        parts.append(bar.format(y + 18, y + 24, 100 * value / top, name, unit.format(value)))
    label = "、".join(name for name, _ in rows)
    figure = Markup(
        '<svg class="bars" width="100%" height="{}" role="img" aria-label="{}">{}</svg>'
    )
    return figure.format(BAR_HEIGHT * len(rows) + 4, label, Markup("").join(parts))


def axis_ticks(peak: float) -> list[float]:
    """0 から ``peak`` を覆う、切りのよい 2 から 6 個の目盛り。すべて 0 なら 1 まで。

    >>> axis_ticks(3.1)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    peak = peak if peak > 1e-9 else 1.0
    power = 10.0 ** math.floor(math.log10(peak))
    step = next(m * power for m in (0.2, 0.5, 1, 2, 5) if peak / (m * power) <= 5)
    return [round(i * step, 12) for i in range(math.ceil(peak / step - 1e-9) + 1)]


def time_ticks(seconds: float, started: datetime) -> list[tuple[float, str]]:
    """時間軸の目盛り(開始からの秒, 文字)。

    >>> time_ticks(6 * 3600, datetime(2026, 1, 31, 8, 30))[:2]
    [(0, '08:30'), (7200, '10:30')]
    """
    step = next((step for step in _STEPS if seconds / step <= MAX_TIME_TICKS), _STEPS[-1])
    times = range(0, math.floor(seconds) + 1, step)
    if seconds <= 2 * _MINUTE:
        return [(time, f"{time} 秒") for time in times]
    form = "%H:%M:%S" if step < _MINUTE else "%H:%M"
    if seconds >= _DAY:
        form = "%m/%d %H:%M" if step < _DAY else "%Y-%m-%d"
    return [(time, f"{started + timedelta(seconds=time):{form}}") for time in times]
