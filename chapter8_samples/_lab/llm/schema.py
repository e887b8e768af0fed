"""判定を、頼まれた JSON Schema の形に詰める。キーの名前も入れ子の形も相手しだい。"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .rules import Verdict
from .wire import InvalidRequestError

__all__ = ["fill"]

Schema = Mapping[str, Any]

MAX_DEPTH = 8
# 項目がない、型が違う、参照が輪になっている
_BROKEN = (AttributeError, LookupError, RecursionError, TypeError, ValueError)

_VERDICT_KEY = re.compile(
    r"result|verdict|label|rating|value|score|grade|assessment|decision|判定|結果|評価",
    re.IGNORECASE,
)
_REASON_KEY = re.compile(r"reason|rational|explan|justif|comment|理由|根拠|説明", re.IGNORECASE)
_GOOD = re.compile(
    r"yes|true|pass(ed)?|ok|good|excellent|safe|correct|grounded|supported|relevant|polite|"
    r"satisfied|none|positive|high|はい|良い|合格|適切|安全|あり|高い?",
    re.IGNORECASE,
)
_BAD = re.compile(
    r"no|false|fail(ed)?|ng|bad|poor|unsafe|incorrect|ungrounded|unsupported|irrelevant|rude|"
    r"unsatisfied|unresolved|negative|low|いいえ|悪い|不合格|不適切|危険|なし|低い?",
    re.IGNORECASE,
)
_RANGE = re.compile(r"(\d+)\s*(?:から|-|~|〜|～|to|through)\s*(\d+)")


def fill(schema: Schema, verdict: Verdict, criteria: str = "") -> Any:
    """`schema` に合う値を作る。

    enum は判定に合う方を選ぶ。数値は minimum から maximum に点数を割り付ける(書かれていなければ
    `criteria` の「1から5」、それもなければ整数は 1 から 5、小数は 0 から 1)。

    Raises:
        InvalidRequestError: `schema` が JSON Schema として壊れている。
    """
    try:
        return _Filler(schema, verdict, criteria).value(schema, "", 0)
    except _BROKEN as error:
        raise InvalidRequestError(f"Invalid schema for response_format: {error!r}") from error


class _Filler:
    def __init__(self, root: Schema, verdict: Verdict, criteria: str) -> None:
        self._root = root
        self._verdict = verdict
        self._criteria = criteria

    def value(self, schema: Schema, name: str, depth: int) -> Any:
        schema = self._resolve(schema, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._choice(schema["enum"])
        makers = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: self._array(schema, name, depth),
            "boolean": lambda: self._verdict.passed,
            "integer": lambda: self._number(schema, 1, 5, whole=True),
            "number": lambda: self._number(schema, 0, 1, whole=False),
            "string": lambda: self._string(schema, name),
        }
        return makers.get(_type(schema), lambda: None)()

    def _resolve(self, schema: Schema, depth: int) -> Schema:
        if "$ref" in schema:
            return self._resolve(self._referenced(str(schema["$ref"])), depth)
        parts = list(schema.get("allOf") or [])
        if options := schema.get("anyOf") or schema.get("oneOf"):
            # 深い入れ子では null を選んで、再帰する型を終わらせる
            parts += sorted(options, key=lambda o: (o.get("type") == "null") ^ (depth > 4))[:1]
        return _merged(schema, [self._resolve(part, depth) for part in parts])

    def _referenced(self, pointer: str) -> Schema:
        found: Any = self._root
        for part in pointer.removeprefix("#").strip("/").split("/"):
            found = found[part.replace("~1", "/").replace("~0", "~")] if part else found
        return found

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties: Mapping[str, Schema] = schema.get("properties", {})
        if depth > MAX_DEPTH:
            properties = {k: v for k, v in properties.items() if k in schema.get("required", [])}
        return {name: self.value(part, name, depth + 1) for name, part in properties.items()}

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        items = self._resolve(schema.get("items") or {"type": "string"}, depth)
        least, most = schema.get("minItems", 0), schema.get("maxItems", 20)
        if _type(items) == "string" and not items.keys() & {"enum", "const"}:
            found: list[Any] = list(self._verdict.evidence)
        else:
            found = [self.value(items, name, depth + 1)] if depth < MAX_DEPTH else []
        while len(found) < least:
            found.append(self.value(items, name, depth + 1))
        return found[:most]

    def _choice(self, options: list[Any]) -> Any:
        offered = [o for o in options if o is not None] or options
        if self._verdict.label in offered:
            return self._verdict.label
        if all(isinstance(o, (int, float)) for o in offered):  # True は 1、False は 0 として並ぶ
            return sorted(offered)[round(self._verdict.score * (len(offered) - 1))]
        wanted = _GOOD if self._verdict.passed else _BAD
        known = [o for o in offered if wanted.fullmatch(str(o))]
        return known[0] if known else offered[0 if self._verdict.passed else -1]

    def _number(self, schema: Schema, low: float, high: float, *, whole: bool) -> float:
        stated = _RANGE.search(self._criteria)
        if stated:
            low, high = (float(text) for text in stated.groups())
        step = 1 if whole else 0.001
        most = _bound(schema, "maximum", "exclusiveMaximum", math.inf, -step)
        low = _bound(schema, "minimum", "exclusiveMinimum", min(low, most), step)
        high = max(low, most if most < math.inf else high)
        scaled = low + (high - low) * self._verdict.score
        return round(scaled) if whole else round(scaled, 3)

    def _string(self, schema: Schema, name: str) -> str:
        text = self._verdict.reason
        if _VERDICT_KEY.search(name) and not _REASON_KEY.search(name):
            text = self._verdict.label or ("yes" if self._verdict.passed else "no")
        return text[: schema.get("maxLength", len(text))]


def _merged(schema: Schema, parts: list[Schema]) -> Schema:
    """``schema`` に、選んだ部分を重ねたもの。キー(properties)は、すべての部分のものを合わせる。"""
    if not parts:
        return schema
    merged = {k: v for k, v in schema.items() if k not in ("allOf", "anyOf", "oneOf")}
    for part in parts:
        together = {**merged.get("properties", {}), **part.get("properties", {})}
        required = [*merged.get("required", []), *part.get("required", [])]
        merged |= {**part, "properties": together, "required": required} if together else part
    return merged


def _type(schema: Schema) -> str:
    kind: Any = schema.get("type") or ("object" if "properties" in schema else "string")
    kinds: list[str] = [kind] if isinstance(kind, str) else list(kind)
    return next((k for k in kinds if k != "null"), "null")


def _bound(schema: Schema, inclusive: str, exclusive: str, default: float, step: float) -> float:
    if inclusive in schema:
        return float(schema[inclusive])
    return float(schema[exclusive]) + step if exclusive in schema else default
