"""アーカイブの列を持つ Parquet(手で書いた難しい行と、大きさを選べる合成データ)。"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from chapter8_samples.cost_tracking import CostTracker, CostTracking
    from chapter8_samples.cost_tracking.archive.sql import ResultTable

START = datetime(2026, 10, 1, tzinfo=timezone.utc)
END = datetime(2026, 11, 20, tzinfo=timezone.utc)


def write_archive(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from chapter8_samples.cost_tracking.archive.parquet import archive_schema

    pq.write_table(pa.Table.from_pylist(list(rows), schema=archive_schema()), path)
    return path


def span(
    span_id: str,
    parent: str | None = None,
    model: str | None = None,
    usd: float | None = None,
    tokens: int | None = None,
    status: str | None = None,
) -> dict[str, Any]:
    attributes = [("mlflow.llm.model", model)] if model else []
    if usd is not None:
        attributes.append(("mlflow.llm.cost", json.dumps({"total_cost": usd})))
    if tokens is not None:
        attributes.append(("mlflow.chat.tokenUsage", json.dumps({"total_tokens": tokens})))
    if status:
        attributes.append(("cost.status", json.dumps(status)))
    return {
        "span_id": span_id,
        "parent_span_id": parent,
        "name": "x",
        "start_time_unix_nano": 0,
        "end_time_unix_nano": 1,
        "attributes": attributes,
    }


def trace_row(
    number: int,
    at: datetime,
    cost: str | None = None,
    usage: str | None = None,
    *,
    state: str = "OK",
    user: str | None = "u1",
    session: str | None = "s1",
    weight: str | None = None,
    status: str | None = None,
    spans: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    metadata = {
        "mlflow.trace.user": user,
        "mlflow.trace.session": session,
        "mlflow.trace.cost": cost,
        "mlflow.trace.tokenUsage": usage,
        "sampling.weight": weight,
    }
    return {
        "trace_id": f"tr-{number:08d}",
        "request_time": at,
        "state": state,
        "trace_metadata": [(k, v) for k, v in metadata.items() if v is not None],
        "tags": [("mlflow.traceName", "chat"), *([("cost.status", status)] if status else [])],
        "spans": list(spans),
    }


def usd(value: float) -> str:
    return json.dumps({"total_cost": value})


def tokens(prompt: int, completion: int, cached: int = 0) -> str:
    usage = {"input_tokens": prompt, "output_tokens": completion}
    usage |= {"total_tokens": prompt + completion}
    return json.dumps({**usage, "cache_read_input_tokens": cached} if cached else usage)


def edge_rows() -> list[dict[str, Any]]:
    """素朴な SQL が間違える行。"""
    november = datetime(2026, 11, 2, tzinfo=timezone.utc)
    nested = [
        span("a", None, '"wrapper"'),
        span("b", "a", '"gpt-4o-mini"', 1.6e-06, 80),
        span("c", "b"),  # 使用量のあるスパンの間に、使用量のないスパンがはさまる
        span("d", "c", '"gpt-4o-mini-2024-07-18"', 1.6e-06, 80),
    ]
    rollup = [
        span("r", None, '"agent"', 0.75, 200, "rollup"),
        *[span(f"m{i}", f"m{i - 1}" if i else "r") for i in range(6)],
        span("leaf", "m5", '"gpt-4o"', 0.75, 200, "priced"),
    ]
    return [
        # 極小の金額は 1.6e-06 と書かれる。日本では 11 月 2 日
        trace_row(1, datetime(2026, 11, 1, 15, 30, tzinfo=timezone.utc), usd(1.6e-06),
                  tokens(80, 0), spans=nested),
        # 日本の 10 月 31 日 23:59:59。11 月の予算ではない。モデル名に引用符がない
        trace_row(2, datetime(2026, 10, 31, 14, 59, 59, tzinfo=timezone.utc), usd(0.5),
                  tokens(80, 0), spans=[span("q", None, "gpt-4o", 0.5, 80)]),
        # 日本の 11 月 1 日 0:00:00
        trace_row(3, datetime(2026, 10, 31, 15, tzinfo=timezone.utc), usd(0.25), tokens(80, 0)),
        trace_row(4, november, "{not json", tokens(80, 0)),
        trace_row(5, november, None, tokens(80, 0), user=None, session=None),
        trace_row(6, november, json.dumps({"total_cost": "abc"}), state="ERROR", weight="-1"),
        trace_row(7, november, usd(12.5), "null", state="ERROR", user="利用者"),
        {**trace_row(8, november), "trace_metadata": None, "tags": None, "spans": None},
        # 10 件に 1 件だけ残した記録と、壊れた重み
        trace_row(9, november, usd(0.01), '{"input_tokens": 1e1, "output_tokens": 5.0}',
                  weight="10"),
        trace_row(10, november, usd(0.01), tokens(10, 5), weight="ten"),
        trace_row(11, november, usd(0.75), tokens(150, 50), status="partial", spans=rollup),
        trace_row(12, november, None, None, status="missing_usage",
                  spans=[span("z", None, '"gpt-4o-mini"', status="missing_usage")]),
        # LLM を呼ばない処理。未計算ではなく、対象外
        trace_row(13, november, None, None),
    ]  # fmt: skip


def synthetic_rows(count: int, seed: int = 8) -> Iterable[dict[str, Any]]:
    """同じ ``seed`` なら同じ、実際らしい分布のトレース。"""
    rng = random.Random(seed)
    models = {"gpt-4o": (2.5, 10.0), "gpt-4o-mini": (0.15, 0.6), "claude-3-5-haiku": (0.8, 4.0)}
    seconds = (END - START).total_seconds()
    for number in range(count):
        model = rng.choice(list(models))
        prompt, completion = int(rng.lognormvariate(7, 1)), int(rng.lognormvariate(5, 1))
        price = models[model]
        cost = (
            None
            if rng.random() < 0.02
            else round((prompt * price[0] + completion * price[1]) / 1e6, 10)
        )
        usage = tokens(prompt, completion, prompt // 2 if rng.random() < 0.3 else 0)
        calls = [span("root"), span("call", "root", json.dumps(model), cost, prompt + completion)]
        if rng.random() < 0.2:
            calls.append(
                span("inner", "call", json.dumps(f"{model}-2024"), cost, prompt + completion)
            )
        yield trace_row(
            number,
            START + timedelta(seconds=rng.random() * seconds),
            usd(cost) if cost is not None else None,
            usage,
            state="ERROR" if rng.random() < 0.03 else "OK",
            user=f"user-{int(rng.paretovariate(1))}",
            session=f"session-{rng.randrange(max(1, count // 4))}",
            weight="10" if rng.random() < 0.3 else None,
            spans=calls,
        )  # fmt: skip


def normal(table: ResultTable) -> list[list[Any]]:
    """エンジンごとの型の違い(Decimal と float、日時の精度)をならす。"""

    def cell(value: Any) -> Any:
        if isinstance(value, (Decimal, float, int)):
            return round(float(value), 6)
        if isinstance(value, datetime):
            return value.replace(tzinfo=None)
        return value

    return [[cell(value) for value in row] for row in table.rows]


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """アーカイブの 1 行を作る関数。"""
    return trace_row


@pytest.fixture
def archive_of(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """行の並びから Parquet を作る関数。"""
    return lambda rows: write_archive(tmp_path / "rows.parquet", rows)


@pytest.fixture(scope="session")
def edge_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("edge") / "edge.parquet", edge_rows())


@pytest.fixture(scope="session")
def empty_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("empty") / "empty.parquet", [])


@pytest.fixture(scope="session")
def synthetic_parquet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``synthetic_parquet(100_000)`` のように、大きさを選んで作る。"""
    made: dict[int, Path] = {}

    def make(count: int) -> Path:
        if count not in made:
            path = tmp_path_factory.mktemp("synthetic") / f"{count}.parquet"
            made[count] = write_archive(path, synthetic_rows(count))
        return made[count]

    return make


@pytest.fixture
def tracker() -> CostTracker:
    from chapter8_samples.cost_tracking import CostTracker

    return CostTracker()


@pytest.fixture
def costs(tracking_uri: str, tracker: CostTracker) -> Iterator[CostTracking]:
    from chapter8_samples.cost_tracking import setup_cost_tracking

    tracking = setup_cost_tracking(tracker=tracker)
    yield tracking
    tracking.uninstall()
