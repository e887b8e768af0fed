"""レポート用のグラフ(インライン SVG)。外部のフォントもスクリプトも使わない。

横の位置はすべて % で書くので、携帯の画面でも紙でも、文字の大きさは変わらない。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from markupsafe import Markup

from ..console import shortened, width

HEIGHT, TOP, BOTTOM = 244, 54, 24
KINDS = {
    "release": "リリース",
    "alert": "アラート",
    "rollback": "ロールバック",
    "resolved": "解消",
}
LEFT = 7.0  # 目盛りの文字の分(%)
BAR_HEIGHT = 40
MARKER_ROWS, MAX_LABELS, LABEL_COLUMNS = 3, 6, 24
COLUMN_PERCENT = 1.75  # 幅 360 px の画面での、半角 1 文字の幅(%)
MAX_TIME_TICKS = 5
# 時刻の目盛りの間隔(秒)。短い順
_MINUTES = tuple(60 * m for m in (1, 2, 5, 10, 15, 30))
_HOURS = tuple(3600 * h for h in (1, 2, 3, 6, 12, 24, 48, 168, 336, 720, 1440, 4320, 8760))
_STEPS = (1, 2, 5, 10, 20, 30, *_MINUTES, *_HOURS)


@dataclass(frozen=True)
class Marker:
    """時間軸に立てる印(リリース、アラート、ロールバック)。``at`` は開始からの秒。"""

    at: float
    label: str
    kind: str  # "release" | "alert" | "rollback" | "resolved"


@dataclass(frozen=True)
class Series:
    """折れ線 1 本。値のない点は ``None`` で、線はそこで切れる。"""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class LineChart:
    """時間軸の折れ線グラフ。

    Attributes:
        times: 開始からの秒。
        unit: ``"{:,.0f} ms"`` のような、値の書式。
        started: 開始の時刻。2 分を超える図では、目盛りを時計の時刻にする。
    """

    times: Sequence[float]
    series: Sequence[Series]
    unit: str = "{:g}"
    threshold: float | None = None
    markers: Sequence[Marker] = field(default=())
    started: datetime | None = None

    def svg(self) -> Markup:
        """図と凡例の HTML。"""
        parts = [*self._grid(), *self._threshold(), *self._markers()]
        for number, line in enumerate(self.series, 1):
            parts += self._line(line, number)
        parts += [*self._values(), *self._time_axis()]  # 文字は線より手前に
        label = "、".join(line.name for line in self.series)
        figure = Markup('<svg width="100%" height="{}" role="img" aria-label="{}">{}</svg>')
        return figure.format(HEIGHT, label, Markup("").join(parts)) + self._legend()

    def text(self, value: float) -> str:
        """単位を付けた値。"""
        return self.unit.format(value)

    def _end(self) -> float:
        return max([*self.times, *(marker.at for marker in self.markers)], default=0.0) or 1.0

    def _x(self, time: float) -> float:
        return LEFT + (100 - LEFT) * min(max(time / self._end(), 0.0), 1.0)

    def _ticks(self) -> list[float]:
        known = [value for line in self.series for value in line.values if value is not None]
        return axis_ticks(max([*known, self.threshold or 0.0]))

    def _y(self) -> Callable[[float], float]:
        top = self._ticks()[-1]
        return lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    def _grid(self) -> Iterator[Markup]:
        line = Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>')
        return (line.format(self._y()(value)) for value in self._ticks())

    def _values(self) -> Iterator[Markup]:
        text = Markup('<text class="tick" x="0" y="{:.1f}">{}</text>')
        return (text.format(self._y()(value) - 3, self.text(value)) for value in self._ticks())

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
        return [line.format(self._y()(self.threshold))]

    def _markers(self) -> Iterator[Markup]:
        """印。多いときは上の端の短い線だけにし、内容は 8.4 の表に任せる。"""
        crowded = len(self.markers) > MAX_LABELS
        line = Markup(
            '<line class="mark {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}">'
            "<title>{}</title></line>"
        )
        for marker in self.markers:
            x, bottom = self._x(marker.at), TOP - 2 if crowded else HEIGHT - BOTTOM
            yield line.format(marker.kind, x, x, TOP - 10, bottom, marker.label)
        if not crowded:
            yield from self._labels()

    def _labels(self) -> Iterator[Markup]:
        """印の名前。重ならない段に置き、どの段も埋まっていれば省く(8.4 の表にはある)。"""
        text = Markup('<text class="mark {}" x="{:.2f}%" y="{}" dx="{}" text-anchor="{}">{}</text>')
        rows: list[list[tuple[float, float]]] = [[] for _ in range(MARKER_ROWS)]
        for marker in self.markers:
            label = shortened(marker.label, LABEL_COLUMNS)
            x, size = self._x(marker.at), COLUMN_PERCENT * (width(label) + 1)
            leftward = x + size > 100
            left, right = (x - size, x) if leftward else (x, x + size)
            for number, row in enumerate(rows):
                if all(end <= left or right <= start for start, end in row):
                    row.append((left, right))
                    place = (-4, "end") if leftward else (4, "start")
                    yield text.format(marker.kind, x, 12 + 14 * number, *place, label)
                    break

    def _line(self, line: Series, number: int) -> list[Markup]:
        """折れ線は伸縮する内側の SVG に、点は外側に置く(円がつぶれないように)。"""
        y, runs = self._y(), unbroken(self.times, line.values)
        path = Markup('<polyline class="line{}" points="{}"/>')
        dot = Markup(
            '<circle class="fill{}" cx="{:.2f}%" cy="{:.1f}" r="{}">'
            "<title>{} {}: {}</title></circle>"
        )
        paths = [
            path.format(number, " ".join(f"{self._x(t):.2f},{y(v):.1f}" for t, v in run))
            for run in runs
        ]
        frame = Markup('<svg viewBox="0 0 100 {}" preserveAspectRatio="none">{}</svg>')
        radius = 3 if len(self.times) <= 30 else 2
        return [
            frame.format(HEIGHT, Markup("").join(paths)),
            *(
                dot.format(
                    number, self._x(t), y(v), radius, self._moment(t), line.name, self.text(v)
                )
                for run in runs
                for t, v in run
            ),
        ]

    def _moment(self, time: float) -> str:
        if self.started is None or self._end() <= 120:
            return f"{time:.0f} 秒"
        return f"{self.started + timedelta(seconds=time):%m/%d %H:%M}"

    def _legend(self) -> Markup:
        item = Markup('<span><i class="key{}"></i>{}</span>')
        items = [item.format(number, line.name) for number, line in enumerate(self.series, 1)]
        if self.threshold is not None:
            items.append(item.format("-limit", f"しきい値 {self.text(self.threshold)}"))
        if len(self.markers) > MAX_LABELS:
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


def bars(rows: Sequence[tuple[str, float]], unit: str = "{:g}") -> Markup:
    """横棒グラフ。名前と値を棒の上に書く。"""
    top = max((value for _, value in rows), default=0.0) or 1.0
    bar = Markup(
        '<text x="0" y="{0}">{3}</text><text class="tick" x="100%" y="{0}" text-anchor="end">'
        '{4}</text><rect class="fill1" x="0" y="{1}" width="{2:.2f}%" height="12" rx="3"/>'
    )
    parts = [
        bar.format(
            BAR_HEIGHT * i + 18, BAR_HEIGHT * i + 24, 100 * value / top, name, unit.format(value)
        )
        for i, (name, value) in enumerate(rows)
    ]
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


def time_ticks(seconds: float, started: datetime | None = None) -> list[tuple[float, str]]:
    """時間軸の目盛り(開始からの秒, 文字)。長い図では、時計の切りのよい時刻に置く。

    >>> time_ticks(6 * 3600, datetime(2026, 1, 31, 8, 30))[:2]
    [(5400.0, '10:00'), (12600.0, '12:00')]
    """
    step = next((s for s in _STEPS if seconds / s <= MAX_TIME_TICKS), 365 * 86400)
    if started is None or seconds <= 120:
        return [(t, f"{t:.0f} 秒") for t in range(0, math.floor(seconds) + 1, step)]
    midnight = started.replace(hour=0, minute=0, second=0, microsecond=0)
    first = -(started - midnight).total_seconds() % step
    labels = {60: "%H:%M:%S", 86400: "%H:%M", 90 * 86400: "%m/%d"}
    label = next((text for limit, text in labels.items() if step < limit), "%Y-%m")
    if step < 86400 < seconds:  # 1 日を超える図では、同じ時刻が 2 度出る
        label = "%m/%d %H:%M"
    times = [first + step * i for i in range(MAX_TIME_TICKS + 1)]
    return [(t, f"{started + timedelta(seconds=t):{label}}") for t in times if t <= seconds]
