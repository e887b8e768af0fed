"""8.2.3 今の料金の取り込み: genai-prices と litellm の同梱データから(本書にリストなし)。

どちらも料金表を同梱している。そのファイルだけを読み、``PriceTable.from_file`` の形に直す。
パッケージは import しない(litellm では 3 秒かかる)。表せない単価(音声、画像、検索、時間帯)は
運ばずに数え、モデルの単価がそれだけなら ``not_carried`` に残す。聞かれたら料金未定になる。
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from .model import AMOUNTS, LEAST
from .table import PriceTable

Entry = dict[str, Any]
_FILES = {
    "genai-prices": ("genai_prices", "data.py"),
    "litellm": ("litellm", "model_prices_and_context_window_backup.json"),
}
_KINDS = ("audio", "image", "video", "search", "reasoning")
_NEITHER = "neither the prices of genai-prices nor of litellm"
NO_TOKENS, FEE = "it has no price per token", "it has a fee per request"
TIME = "its price depends on the time of day"


@dataclass
class Imported:
    """取り込んだ料金。``left_out`` は、運べなかった単価の種類と、そのモデル。"""

    name: str
    as_of: date
    models: dict[str, list[Entry]] = field(default_factory=dict[str, list[Entry]])
    not_carried: dict[str, str] = field(default_factory=dict[str, str])
    left_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, name: str, rows: list[Entry], prices: Iterable[str]) -> None:
        """行を足す。``prices`` は、元のデータにある単価の名前。"""
        self.models[name] = rows
        for kind in _KINDS:
            if any(kind in price for price in prices):
                self.left_out.setdefault(f"{kind} prices", []).append(name)
        if "claude" in name:
            return
        for row in rows:  # 1 時間の単価がない提供元では、書き込みの単価は 1 つである
            for level in (row, *row["tiers"]):
                for rates in (level, *level["service_tiers"].values()):
                    if "cache_write" in rates:
                        rates.setdefault("cache_write_1h", rates["cache_write"])

    def leave_out(self, name: str, why: str) -> None:
        """運べないモデルを、理由と一緒に残す。"""
        self.not_carried[name] = why
        self.left_out.setdefault(f"all prices: {why}", []).append(name)

    def write(self, path: str | Path) -> None:
        """``CostCalculator(pricing_file=...)`` で読めるファイルを書く。"""
        about = {"name": self.name, "as_of": str(self.as_of), "not_carried": self.not_carried}
        text = json.dumps({**about, "models": self.models}, indent=1, default=float)
        PriceTable.from_mapping(json.loads(text))  # 読めないファイルは書かない
        temporary = Path(f"{path}.tmp")  # 途中で止まっても、前のファイルを壊さない
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)


def import_prices(source: str) -> Imported:
    """``"genai-prices"``、``"litellm"``、または、どちらかの JSON のパスから取り込む。

    Raises:
        LookupError: そのパッケージかファイルがない。
        ValueError: どちらの形でもない。
    """
    path, name = Path(source), Path(source).name
    if source in _FILES:
        package, file = _FILES[source]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise LookupError(f"{source} is not installed; run `python -m pip install {source}`")
        path, name = Path(spec.submodule_search_locations[0], file), f"{source} {version(source)}"
    if not path.is_file():
        raise LookupError(f"{path}: no such file; give genai-prices, litellm or a path")
    changed = date.fromtimestamp(path.stat().st_mtime)
    found = Imported(name, changed if changed.year > 1980 else date.today())  # 1980 は zip の既定
    try:
        data = _read(path)
        (_from_genai if isinstance(data, list) else _from_litellm)(cast(Any, data), found)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {_NEITHER} ({type(error).__name__}: {error})") from error
    if not found.models:
        raise ValueError(f"{path}: {_NEITHER}")
    return found


def _read(path: Path) -> object:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".py":
        return json.loads(text, parse_float=Decimal)
    body = ast.parse(text).body
    return next((_literal(one.value) for one in body if isinstance(one, ast.AnnAssign)), None)


def _literal(node: ast.AST | None) -> Any:
    """genai-prices の data.py の式を、同じ内容の JSON の形に直す。中のコードは実行しない。"""
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return dict(zip(map(_literal, node.keys), map(_literal, node.values), strict=True))
    if not isinstance(node, ast.Call):
        return getattr(node, "value", None)
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    values = [_literal(item) for item in node.args]
    if name in ("Decimal", "date"):
        return Decimal(values[0]) if name == "Decimal" else str(date(*values))
    return {str(item.arg).rstrip("_"): _literal(item.value) for item in node.keywords}


_GENAI = dict(zip(AMOUNTS, ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok",
                            "cache_write_1h_mtok"), strict=True))  # fmt: skip


def _from_genai(providers: list[Any], found: Imported) -> None:
    for provider in providers:
        taken = {model["id"].lower() for model in provider["models"]}
        for model in provider["models"]:
            name = f"{provider['id']}/{model['id']}".lower()
            steps = model["prices"]
            if name.endswith(":free"):  # genai-prices は、無料のモデルに単価を書かない
                steps = {"input_mtok": 0, "output_mtok": 0}
            if not isinstance(steps, list):
                steps = [{"prices": steps}]
            prices = {key for step in steps for key in step["prices"]}
            if why := _genai_problem(steps, prices):
                found.leave_out(name, why)
                continue
            found.add(name, _genai_rows(steps, model.get("price_variants") or []), prices)
            names = [alias for alias in dict.fromkeys(_genai_names(model)) if alias not in taken]
            found.models[name][-1]["aliases"] = [f"{provider['id']}/{alias}" for alias in names]
            taken.update(names)


def _genai_problem(steps: list[Entry], prices: set[str]) -> str:
    if any("start_time" in (step.get("constraint") or ()) for step in steps):
        return TIME
    if "requests_kcount" in prices:
        return FEE
    outputs = {price for price in prices if price.startswith("output_")}
    whole = all("input_mtok" in step["prices"] for step in steps)
    return "" if whole and (not outputs or "output_mtok" in outputs) else NO_TOKENS


def _genai_names(model: Entry) -> Iterator[str]:
    """照合の規則にある名前。前方一致の規則は、日付と ``latest`` の付いた名前(``-*``)に直す。"""
    clauses = [model["match"]]
    for rule, text in (pair for clause in clauses for pair in clause.items()):
        if rule in ("or", "and"):
            clauses += text
        elif rule in ("equals", "starts_with", "contains"):
            base = re.sub(r"(-20\d\d|[-@:])$", "", text.lower())
            yield from (base,) if rule == "equals" else (base, f"{base}-*")
    if (base := model["id"].lower()).startswith("regional."):  # AWS の地域別の料金
        regions = ("us", "eu", "apac", "jp", "au", "ca", "in", "us-gov")
        yield from (base.replace("regional", region, 1) for region in regions)


def _genai_rows(steps: list[Entry], variants: list[Entry]) -> list[Entry]:
    """料金の変わった日ごとの行。サービスティアの単価は、その始まった日からの行だけが持つ。"""
    rows: list[Entry] = []
    days = sorted({_start(item) for item in (*steps, *variants)})
    for day, until in zip(days, [*days[1:], ""], strict=True):
        prices: Entry = [step["prices"] for step in steps if _start(step) <= day][-1]
        services = {"": prices}
        for item in variants:
            ((condition, value),) = item["when"].items()
            named = condition in ("processing", "service_tier", "speed") and value != "default"
            if named and _start(item) <= day:
                services.setdefault(value, {**prices, **item["prices"]})
        row = _genai_level(services, -1)
        row["tiers"] = [
            {"above_input_tokens": start, **_genai_level(services, start)}
            for start in _genai_starts(services)
        ]
        rows.append({**row, "effective_from": day or None, "effective_to": until or None})
    return rows


def _genai_starts(services: Mapping[str, Entry]) -> list[int]:
    """長い入力の段の始まり。"""
    starts: set[int] = set()
    for prices in services.values():
        for price in prices.values():
            if isinstance(price, dict):
                starts.update(tier["start"] for tier in price["tiers"])
    return sorted(starts)


def _start(item: Entry) -> str:
    return str((item.get("constraint") or {}).get("start_date") or "")


def _genai_level(services: Mapping[str, Entry], above: int) -> Entry:
    levels: dict[str, Entry] = {}
    for name, prices in services.items():
        levels[name] = {"output": 0}
        for key, theirs in _GENAI.items():
            if isinstance(price := prices.get(theirs), dict):
                reached = [tier["price"] for tier in price["tiers"] if tier["start"] <= above]
                price = [price["base"], *reached][-1]
            if price is not None:
                levels[name][key] = price
    return {**levels.pop(""), "service_tiers": levels}


_LITELLM = dict(zip(AMOUNTS, (
    "input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost",
    "cache_creation_input_token_cost", "cache_creation_input_token_cost_above_1hr",
), strict=True))  # fmt: skip


def _from_litellm(data: dict[str, Entry], found: Imported) -> None:
    for key, row in data.items():
        if "alias_of" in row or key == "sample_spec":
            continue
        if why := _litellm_problem(row):
            found.leave_out(key.lower(), why)
        else:
            found.add(key.lower(), [_litellm_row(row)], [name for name in row if "cost" in name])
    for key, row in data.items():
        if rows := found.models.get(str(row.get("alias_of")).lower()):
            rows[-1].setdefault("aliases", []).append(key.lower())


def _litellm_problem(row: Entry) -> str:
    mode, prices = row.get("mode"), _present((row.get("tiered_pricing") or [row])[0])
    if mode not in ("chat", "completion", "responses", "embedding", None):
        return f"its price is for {mode}"
    if "off_peak_pricing" in row:
        return TIME
    if "input_cost_per_request" in row:
        return FEE
    if "input" not in prices or ("output" not in prices and mode != "embedding"):
        return NO_TOKENS
    if any(0 < prices.get(key, 0) < least for key, least in LEAST.items()):
        return "its price is too low to be one"
    return "" if any(prices.values()) else "its price is 0 in litellm, which can mean unknown"


def _litellm_row(row: Entry) -> Entry:
    tiered = row.get("tiered_pricing") or [{"range": [0]}]
    base, *rest = sorted(tiered, key=lambda tier: tier["range"][0])
    longer: list[Entry] = [
        {**_litellm_level({**row, **tier}, "", {}), "above_input_tokens": int(tier["range"][0])}
        for tier in rest
    ]
    first = _litellm_level({**row, **base}, "", {})
    counts = re.findall(r"\binput_cost_per_token_above_(\d+)k_tokens\b", " ".join(row))
    inclusive = row["litellm_provider"] == "xai"  # xAI だけは、その数ちょうどから上の段になる
    for count in sorted(map(int, counts)):
        level = _litellm_level(row, f"_above_{count}k_tokens", (longer or [first])[-1])
        longer.append({**level, "above_input_tokens": count * 1000 - inclusive})
    return {**first, "tiers": longer}


def _litellm_level(row: Entry, above: str, shorter: Entry) -> Entry:
    """長い入力のサービスティアは、その長さの単価があるときだけ運ぶ。短い入力の単価では計算しない。"""
    own, services = _present(row, above), dict[str, Entry]()
    standard = {"output": 0, **shorter, **own, "service_tiers": services}
    for suffix in re.findall(rf"\binput_cost_per_token{above}_([a-z]+)\b", " ".join(row)):
        name = "batch" if suffix == "batches" else suffix
        before = shorter.get("service_tiers", {}).get(name, standard)
        rates = {**before, **own, **_present(row, above, f"_{suffix}")}
        services[name] = {key: rates[key] for key in AMOUNTS if key in rates}
    return standard


def _present(row: Entry, above: str = "", suffix: str = "") -> Entry:
    found = {key: row.get(f"{theirs}{above}{suffix}") for key, theirs in _LITELLM.items()}
    return {key: Decimal(str(price)) * 10**6 for key, price in found.items() if price is not None}
