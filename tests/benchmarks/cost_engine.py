"""料金計算の速さを、ほかの道具と同じ条件で並べて測る。

実行::

    $ python tests/benchmarks/cost_engine.py --calls 20000

相手は入っているものだけ測る: ``pip install litellm genai-prices tokencost``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MLFLOW_MODEL_CATALOG_URI": ""}

from bench_report import Headline, best_seconds, print_table, version_of  # noqa: E402

Call = Callable[[], Any]
OURS = "chapter8_samples.cost_tracking.cost_calculator"


def ours() -> Call:
    calculate = import_module(OURS).CostCalculator().calculate
    return lambda: calculate("gpt-4o", 1200, 300, 1024)


def large_table(rows: int = 4000) -> Any:
    """取り込んだ料金と同じくらいの大きさの表。"""
    book = import_module("chapter8_samples.cost_tracking").PriceTable.default()
    row = book.rows["gpt-4o"]
    return replace(book, rows={**book.rows, **{f"v{i % 40}/model-{i}x": row for i in range(rows)}})


def ours_large() -> Call:
    calculate = import_module(OURS).CostCalculator(large_table()).calculate
    return lambda: calculate("gpt-4o", 1200, 300, 1024)


def ours_breakdown() -> Call:
    price = import_module(OURS).CostCalculator().price
    return lambda: price("gpt-4o", 1200, 300, 1024)


def genai_prices() -> Call:
    module = import_module("genai_prices")
    usage = module.Usage(input_tokens=1200, output_tokens=300, cache_read_tokens=1024)
    return lambda: module.calc_price(usage, model_ref="gpt-4o", provider_id="openai")


def litellm() -> Call:
    price = import_module("litellm").cost_per_token
    return lambda: price("gpt-4o", 1200, 300, cache_read_input_tokens=1024)


def tokencost() -> Call:
    price = import_module("tokencost.costs").calculate_cost_by_tokens
    return lambda: (price(1200, "gpt-4o", "input"), price(300, "gpt-4o", "output"))


def mlflow_builtin() -> Call:
    price = import_module("mlflow.utils.providers").cost_per_token
    return lambda: price("gpt-4o", 1200, 300, cache_read_input_tokens=1024)


PEERS: dict[str, tuple[str, str, Callable[[], Call]]] = {
    "CostCalculator.calculate": ("", f"import {OURS}", ours),
    "CostCalculator.price(内訳)": ("", f"import {OURS}", ours_breakdown),
    "CostCalculator.calculate(4,000 行)": ("", f"import {OURS}", ours_large),
    "MLflow 内蔵": ("mlflow", "import mlflow.utils.providers", mlflow_builtin),
    "genai-prices": ("genai-prices", "import genai_prices", genai_prices),
    "litellm": ("litellm", "import litellm", litellm),
    "tokencost": ("tokencost", "import tokencost", tokencost),
}


def engine_rows(calls: int, imports: int) -> list[list[str]]:
    bare = import_seconds("pass", imports)
    rows: list[list[str]] = []
    base = 0.0
    for name, (package, statement, prepare) in PEERS.items():
        label = f"{name} {version_of(package)}" if package else name
        try:
            call = prepare()
            call()
        except ImportError:
            rows.append([label.strip(), "not installed", "-", "-"])
            continue
        us = best_seconds(lambda call=call: [call() for _ in range(calls)]) / calls * 1e6
        base = base or us
        load = (import_seconds(statement, imports) - bare) * 1000
        rows.append([label, f"{us:.2f}", f"{us / base:.1f}", f"{load:.0f}"])
    return rows


def import_seconds(statement: str, repeat: int) -> float:
    command = [sys.executable, "-c", statement]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:1] + sys.path[2:])}
    return best_seconds(lambda: subprocess.run(command, check=True, env=environment), repeat)


def first_unknown_ms(table: Any) -> float:
    """料金表にない名前を初めて聞かれたときの、近い名前を探す時間も入れたミリ秒。"""
    fresh = iter([import_module(OURS).CostCalculator(replace(table)) for _ in range(5)])

    def ask() -> None:
        with suppress(LookupError):
            next(fresh).calculate("gpt-4o-minii", 1200, 300)

    return best_seconds(ask, 5) * 1000


def processor_us(traces: int) -> dict[str, float]:
    """呼び出しが 1 つのトレースで、それぞれにかかるマイクロ秒(中央値)。"""
    import mlflow
    from mlflow.tracing.config import get_config

    costs = import_module("chapter8_samples.cost_tracking").setup_cost_tracking()
    process = get_config().span_processors[-1]
    usage = {"input_tokens": 1200, "output_tokens": 300, "total_tokens": 1500}
    names = ("(参考)呼び出しの開始と属性", "呼び出しのコストの記録", "トレースの合計の記録")
    taken: list[tuple[float, ...]] = []
    for _ in range(traces):
        root = mlflow.start_span_no_context("root")
        began = perf_counter()
        span = mlflow.start_span_no_context("call", "CHAT_MODEL", parent_span=root)
        span.set_attributes({"mlflow.llm.model": "gpt-4o", "mlflow.chat.tokenUsage": usage})
        opened = perf_counter()
        process(span)
        priced = perf_counter()
        process(root)
        taken.append((opened - began, priced - opened, perf_counter() - priced))
    if costs.priced != traces or costs.failed:
        raise RuntimeError(f"priced {costs.priced} of {traces}, failed {costs.failed}")
    costs.uninstall()
    columns = zip(*taken, strict=True)
    return {name: median(column) * 1e6 for name, column in zip(names, columns, strict=True)}


def headline(quick: bool) -> list[Headline]:
    """料金計算 1 回の時間。"""
    calls, imports, spans = (50, 1, 20) if quick else (20_000, 3, 2_000)
    rows = engine_rows(calls, imports)
    show(rows, spans)
    ours, *rest = [row for row in rows if row[1] != "not installed"]
    others = [row for row in rest if not row[0].startswith("CostCalculator")]
    return [
        Headline(
            "料金計算 1 回(キャッシュのある入力)",
            "、".join(f"{label} {us} us" for label, us, *_ in [ours, *others]),
            "、".join(f"{label} は {ratio} 倍" for label, _, ratio, _ in others),
        )
    ]


def show(rows: list[list[str]], spans: int) -> None:
    """料金計算の表と、スパンの処理を測った表を出す。"""
    columns = ("計算(入力 1200、うちキャッシュ 1024、出力 300)", "us/回", "比", "import ms")
    print_table("料金計算", columns, rows)
    book = import_module("chapter8_samples.cost_tracking").PriceTable.default()
    unknown = [
        ["本書の表", f"{first_unknown_ms(book):.1f}"],
        ["4,000 行", f"{first_unknown_ms(large_table()):.1f}"],
    ]
    print_table("表にない名前の 1 回目", ("表", "ms"), unknown)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        values = [[name, f"{us:.1f}"] for name, us in processor_us(spans).items()]
    print_table("スパンの処理", ("処理", "us"), values)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--spans", type=int, default=2_000)
    parser.add_argument("--imports", type=int, default=3)
    options = parser.parse_args()
    show(engine_rows(options.calls, options.imports), options.spans)
    os._exit(0)  # 終わらせていない測定用のスパンを、終了時に保存しない


if __name__ == "__main__":
    main()
