"""8.2.3 今の料金の取り込み: genai-prices と litellm の同梱データから(本書にリストなし)。

料金は毎月変わる。どちらのパッケージも料金表を同梱しているので、そのファイルだけを読んで、
``PriceTable.from_file`` の形に直す。パッケージは import しない(litellm の import は 3 秒かかる)。

この表で表せない単価(音声、画像、検索、時間帯)は運ばない。モデルの単価がそれだけなら、理由を
``not_carried`` に残す。聞かれたら 0 円でも別の行の単価でもなく、料金未定になる。
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .model import AMOUNTS
from .table import PriceTable

Entry = dict[str, Any]
PACKAGES = {
    "genai-prices": ("genai_prices", "data.py"),
    "litellm": ("litellm", "model_prices_and_context_window_backup.json"),
}


@dataclass
class Imported:
    """取り込んだ料金。``extras`` は、トークンの単価は運べたモデルの、運べなかった単価。"""

    name: str
    as_of: date
    models: dict[str, list[Entry]] = field(default_factory=dict[str, list[Entry]])
    not_carried: dict[str, str] = field(default_factory=dict[str, str])
    extras: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, name: str, rows: list[Entry]) -> None:
        """行を足す。Claude のほかは、1 時間の単価がなければ、書き込みの単価は 1 つである。"""
        levels = [level for row in rows for level in (row, *row["tiers"])]
        for rates in (one for level in levels for one in (level, *level["service_tiers"].values())):
            if "cache_write" in rates and "claude" not in name:
                rates.setdefault("cache_write_1h", rates["cache_write"])
        self.models[name] = rows

    def write(self, path: str | Path) -> None:
        """``CostCalculator(pricing_file=...)`` で読めるファイルを書く。"""
        data = {"name": self.name, "as_of": str(self.as_of), "_left_out": self.left_out(),
                "not_carried": self.not_carried, "models": self.models}  # fmt: skip
        plain = json.loads(json.dumps(data, default=float))
        PriceTable.from_mapping(plain)  # 読めないファイルは書かない
        text = json.dumps(plain, ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def left_out(self) -> dict[str, list[str]]:
        """運べなかった単価の種類と、そのモデル。"""
        groups: dict[str, list[str]] = {}
        for name, why in self.not_carried.items():
            groups.setdefault(f"all prices: {why.partition(' (')[0]}", []).append(name)
        for name, keys in self.extras.items():
            for kind in ("audio", "image", "video", "search", "reasoning", "request"):
                if any(kind in key for key in keys):
                    groups.setdefault(f"{kind} prices", []).append(name)
        return groups


def import_prices(source: str) -> Imported:
    """``"genai-prices"``、``"litellm"``、または、どちらかの JSON のパスから取り込む。

    Raises:
        LookupError: そのパッケージが入っていない。
        ValueError: どちらの形でもない。
    """
    path, name = Path(source), Path(source).name
    if source in PACKAGES:
        package, file = PACKAGES[source]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise LookupError(f"{source} is not installed; run `python -m pip install {source}`")
        path, name = Path(spec.submodule_search_locations[0], file), f"{source} {version(source)}"
    if not path.is_file():
        raise LookupError(f"{source}: no such file; give genai-prices, litellm or a path")
    text = path.read_text(encoding="utf-8")
    data = _literals(text) if path.suffix == ".py" else json.loads(text, parse_float=Decimal)
    changed = date.fromtimestamp(path.stat().st_mtime)
    found = Imported(name, changed if changed.year > 1980 else date.today())  # 1980 は zip の既定
    if isinstance(data, list):
        _from_genai(data, found)
    elif isinstance(data, dict) and any("litellm_provider" in row for row in data.values()):
        _from_litellm(data, found)
    else:
        raise ValueError(f"{source}: neither the prices of genai-prices nor of litellm")
    return found


# ---- genai-prices: 提供元ごとのモデルの一覧。data.py は JSON と同じ内容の Python の式

_GENAI = dict(zip(AMOUNTS, ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok",
                            "cache_write_1h_mtok"), strict=True))  # fmt: skip
_REGIONS = ("us", "eu", "apac", "jp", "au", "ca", "in", "us-gov")


def _literals(text: str) -> Any:
    body = ast.parse(text).body
    return next(_literal(node.value) for node in body if isinstance(node, ast.AnnAssign))


def _literal(node: ast.AST | None) -> Any:
    """式の木を、JSON と同じ辞書と配列に直す。中のコードは実行しない。"""
    match node:
        case ast.List(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return dict(zip(map(_literal, keys), map(_literal, values), strict=True))
        case ast.Call(func=ast.Name(id="Decimal"), args=[ast.Constant(value=number)]):
            return Decimal(str(number))
        case ast.Call(func=ast.Attribute(attr="date"), args=parts):
            return date(*map(_literal, parts)).isoformat()
        case ast.Call(keywords=keywords):
            return {str(item.arg).rstrip("_"): _literal(item.value) for item in keywords}
        case ast.Constant(value=value):
            return value
        case _:
            return None


def _from_genai(providers: list[Any], found: Imported) -> None:
    for provider in providers:
        taken: set[str] = set()
        for model in provider["models"]:
            name = f"{provider['id']}/{model['id']}".lower()
            steps = model["prices"]
            steps = steps if isinstance(steps, list) else [{"prices": steps}]
            variants = model.get("price_variants") or []
            if name.endswith(":free"):  # genai-prices は、無料のモデルに単価を書かない
                steps = [{"prices": {"input_mtok": 0, "output_mtok": 0}}]
            if reason := _genai_reason(steps):
                found.not_carried[name] = reason
                continue
            found.add(name, _genai_rows(steps, variants))
            found.extras[name] = sorted(
                {key for step in steps for key in step["prices"] if key not in _GENAI.values()}
                | {str(item["when"]) for item in variants if _service(item["when"]) is None}
            )
            names = dict.fromkeys(f"{provider['id']}/{alias}" for alias in _genai_names(model))
            found.models[name][-1]["aliases"] = [alias for alias in names if alias not in taken]
            taken.update(names)


def _genai_reason(steps: list[Any]) -> str:
    keys = {key for step in steps for key in step["prices"]}
    if any("start_time" in (step.get("constraint") or ()) for step in steps):
        return "its price depends on the time of day"
    if "requests_kcount" in keys:
        return "it has a fee per request"
    if not all("input_mtok" in step["prices"] for step in steps):
        return f"it has no price per input token ({', '.join(sorted(keys)) or 'no price at all'})"
    outputs = {key for key in keys if key.startswith("output_")}
    return "" if "output_mtok" in outputs or not outputs else f"it has only {', '.join(outputs)}"


def _genai_names(model: Entry) -> Iterator[str]:
    """照合の規則にある名前。前方一致の規則は、日付と ``latest`` の付いた名前(``-*``)に直す。"""
    clauses = [model["match"]]
    for clause in clauses:
        for rule, text in clause.items():
            if rule in ("or", "and"):
                clauses += text
            elif rule in ("equals", "starts_with", "contains"):
                base = re.sub(r"(-20\d\d|[-@:])$", "", text.lower())
                yield from (base,) if rule == "equals" else (base, f"{base}-*")
    if (base := model["id"].lower()).startswith("regional."):
        yield from (base.replace("regional", region, 1) for region in _REGIONS)


def _genai_rows(steps: list[Any], variants: list[Any]) -> list[Entry]:
    """料金の変わった日ごとの行。処理の段の単価は、段の始まった日からの行だけが持つ。"""
    rows: list[Entry] = []
    days = sorted({_start(item) for item in (*steps, *variants)})
    for day, until in zip(days, [*days[1:], ""], strict=True):
        prices: Entry = [step["prices"] for step in steps if _start(step) <= day][-1]
        services: dict[str, Entry] = {}
        for item in variants:
            if (name := _service(item["when"])) and _start(item) <= day:
                services.setdefault(name, {**prices, **item["prices"]})
        tiered = [value for level in (prices, *services.values()) for value in level.values()]
        starts = {tier["start"] for value in tiered if isinstance(value, dict)
                  for tier in value["tiers"]}  # fmt: skip
        row = _genai_level(prices, services, -1)
        row["tiers"] = [
            {"above_input_tokens": start, **_genai_level(prices, services, start)}
            for start in sorted(starts)
        ]
        period = {"effective_from": day, "effective_to": until}
        rows.append({**row, **{key: value for key, value in period.items() if value}})
    return rows


def _start(item: Entry) -> str:
    return str((item.get("constraint") or {}).get("start_date") or "")


def _service(when: Mapping[str, str]) -> str | None:
    """処理の段の名前。``""`` は標準、``None`` は処理の段でない条件(経路など)。"""
    ((key, value),) = when.items()
    if key not in ("processing", "service_tier", "speed"):
        return None
    return "" if value == "default" else value


def _genai_level(prices: Entry, services: Mapping[str, Entry], above: int) -> Entry:
    tiers = {name: _genai_amounts(level, above) for name, level in services.items()}
    return {**_genai_amounts(prices, above), "service_tiers": tiers}


def _genai_amounts(prices: Entry, above: int) -> Entry:
    amounts: Entry = {"output": 0}
    for key, theirs in _GENAI.items():
        price = prices.get(theirs)
        if isinstance(price, dict):
            reached = [tier["price"] for tier in price["tiers"] if tier["start"] <= above]
            price = reached[-1] if reached else price["base"]
        if price is not None:
            amounts[key] = price
    return amounts


# ---- litellm: モデル名から、USD / 1 トークンの単価への対応

_LITELLM = dict(zip(AMOUNTS, (
    "input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost",
    "cache_creation_input_token_cost", "cache_creation_input_token_cost_above_1hr",
), strict=True))  # fmt: skip
_MODES = ("chat", "completion", "responses", "embedding", None)


def _from_litellm(data: dict[str, Entry], found: Imported) -> None:
    del data["sample_spec"]
    for key, row in data.items():
        if "alias_of" in row:
            continue
        if reason := _litellm_reason(row):
            found.not_carried[key.lower()] = reason
            continue
        found.add(key.lower(), [_litellm_row(row)])
        found.extras[key.lower()] = sorted(
            name for name, value in row.items()
            if value and "cost" in name and not name.startswith(tuple(_LITELLM.values()))
        )  # fmt: skip
    for key, row in data.items():
        if rows := found.models.get(str(row.get("alias_of")).lower()):
            rows[-1].setdefault("aliases", []).append(key.lower())


def _litellm_reason(row: Entry) -> str:
    if row.get("mode") not in _MODES:
        return f"its price is for {row['mode']}"
    if "off_peak_pricing" in row:
        return "its price depends on the time of day"
    if "input_cost_per_request" in row:
        return "it has a fee per request"
    if "tiered_pricing" in row:
        return ""
    prices = _present(row)
    if "input" not in prices or ("output" not in prices and row["mode"] != "embedding"):
        return "it has no price per token"
    return "" if any(prices.values()) else "its price is 0 in litellm, which can mean unknown"


def _litellm_row(row: Entry) -> Entry:
    if tiered := row.get("tiered_pricing"):
        tiered = sorted(tiered, key=lambda tier: tier["range"][0])
        levels = {int(tier["range"][0]): {**_present(row), **_present(tier)} for tier in tiered}
        first, *longer = [
            {"above_input_tokens": above, "service_tiers": {}, **level}
            for above, level in levels.items()
        ]
    else:
        first, longer = _litellm_level(row, "", {}), list[Entry]()
        counts = re.findall(r"\binput_cost_per_token_above_(\d+)k_tokens\b", " ".join(row))
        inclusive = row["litellm_provider"] == "xai"  # xAI だけは、その数ちょうどから上の段になる
        for count in sorted(map(int, counts)):
            level = _litellm_level(row, f"_above_{count}k_tokens", (longer or [first])[-1])
            longer.append({**level, "above_input_tokens": count * 1000 - inclusive})
    first.pop("above_input_tokens", None)
    return {"output": 0, **first, "tiers": [{"output": 0, **tier} for tier in longer]}


def _litellm_level(row: Entry, above: str, before: Entry) -> Entry:
    """長い入力の処理の段は、その長さの単価があるときだけ運ぶ。短い入力の単価では計算しない。"""
    own, services = _present(row, above), dict[str, Entry]()
    standard = {**before, **own}
    for suffix in re.findall(rf"\binput_cost_per_token{above}_([a-z]+)\b", " ".join(row)):
        name = "batch" if suffix == "batches" else suffix
        shorter = before.get("service_tiers", {}).get(name, standard)
        services[name] = {"output": 0, **shorter, **own, **_present(row, above, f"_{suffix}")}
        services[name] = {key: services[name][key] for key in AMOUNTS if key in services[name]}
    return {**standard, "service_tiers": services}


def _present(row: Entry, above: str = "", suffix: str = "") -> Entry:
    found = {key: row.get(f"{theirs}{above}{suffix}") for key, theirs in _LITELLM.items()}
    return {key: Decimal(str(price)) * 10**6 for key, price in found.items() if price is not None}
