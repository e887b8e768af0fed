"""設定の診断: ``python -m chapter8_samples doctor``。

版、接続先、エクスペリメント、鍵、OTLP、食い違う設定を調べ、1 件ずつ OK / 注意 / NG と直し方を示す。
NG がなければ終了ステータス 0、あれば 1(CI で使う)。鍵やパスワードは、どこにも表示しない。

接続の確認では、OTLP の送信先に 1 スパンを送り、エクスペリメントにタグを 1 つ書いて消す。
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from urllib.parse import quote, unquote

from ..console import color, pad, width
from . import checks
from .finding import Finding
from .setup_problems import Problem, explain

MARKS = {"ok": ("OK", "32"), "warning": ("注意", "33"), "error": ("NG", "31")}
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|PASSW|PASSPHRASE|SECRET|HEADERS|WEBHOOK|CREDENTIAL|AUTH", re.IGNORECASE
)
_ADDRESS_NAME = re.compile(r"UR[IL]|ENDPOINT|PROXY|HOST", re.IGNORECASE)
# 短い値や true / false を伏せると、直し方の文まで読めなくなる(TOKENIZERS_PARALLELISM=false など)
_SHORTEST_SECRET = 4
_NO_SECRETS = ("true", "false")


Check = Callable[[], Iterable[Finding]]


def run(*, experiment: str | None = None, as_json: bool = False) -> int:
    """診断して表示し、NG がなければ 0 を返す。"""
    findings = diagnose(dict(os.environ), experiment)
    print(to_json(findings) if as_json else to_text(findings))
    return int(any(finding.level == "error" for finding in findings))


def diagnose(environment: Mapping[str, str], experiment: str | None = None) -> list[Finding]:
    """すべての診断の結果。1 つの診断が失敗しても、残りは続ける。"""
    plan: list[tuple[str, Check]] = [
        ("版", checks.versions),
        ("料金表", checks.prices),
        ("手元のデータ", lambda: checks.lab_folder(environment)),
        ("接続先", lambda: checks.backend(environment, experiment)),
        ("ジャッジ", lambda: _services().judge(environment)),
        ("OTLP", lambda: _services().otlp(environment)),
        ("設定", lambda: _settings().conflicts(environment)),
    ]
    hidden = sorted(secrets(environment), key=len, reverse=True)
    return [
        _without_secrets(finding, hidden) for name, check in plan for finding in _safe(name, check)
    ]


def _services() -> ModuleType:
    from . import services

    return services


def _settings() -> ModuleType:
    from . import settings  # pydantic がなくても、ほかの診断は続ける

    return settings


def _safe(name: str, check: Check) -> list[Finding]:
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:  # 診断そのものの失敗も、1 件の結果として見せる
        problem = explain(error) or Problem(
            f"診断の途中で失敗しました({type(error).__name__})。",
            "この環境の設定を 1 つずつ外して、もう一度診断してください。",
        )
        found.append(Finding(name, "error", problem.what, problem.fix))
    return found


def secrets(environment: Mapping[str, str]) -> set[str]:
    """環境変数の中の、表示してはいけない文字列。"""
    found: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name):
            found |= {value, *_header_values(value)}
        if "://" in value or _ADDRESS_NAME.search(name):
            found |= set(_parts_of_url(value))
    spelled = {form for value in found for form in (value, unquote(value), quote(value, safe=""))}
    return {
        value
        for value in spelled
        if len(value) >= _SHORTEST_SECRET and value.lower() not in _NO_SECRETS
    }


def _header_values(text: str) -> Iterator[str]:
    """``k=v,k2=Basic v2`` の値。"""
    for item in text.split(","):
        value = unquote(item.partition("=")[2].strip())
        yield value
        yield from value.split(" ")[1:]


def _parts_of_url(url: str) -> Iterator[str]:
    """利用者とパスワード、クエリの値。"://" は、符号化していないパスワードの中にもありうる。"""
    before, found, after = url.rpartition("@")
    if found:
        for owner in (before, before.partition("://")[2]):
            yield owner
            yield owner.partition(":")[2]
    for item in re.split(r"[?#&]", after)[1:]:
        yield item
        yield item.partition("=")[2]


def _without_secrets(finding: Finding, hidden: Iterable[str]) -> Finding:
    detail, fix = finding.detail, finding.fix
    for secret in hidden:
        detail, fix = detail.replace(secret, "***"), fix.replace(secret, "***")
    return replace(finding, detail=detail, fix=fix)


def to_text(findings: Iterable[Finding]) -> str:
    """1 件 1 行。注意と NG には、次の行に直し方。"""
    findings = list(findings)
    size = max((width(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        mark, code = MARKS[finding.level]
        lines.append(f"{color(pad(mark, 4), code)} {pad(finding.name, size)}  {finding.detail}")
        if finding.fix:
            lines.append(f"     -> {finding.fix}")
    counts = [sum(finding.level == level for finding in findings) for level in MARKS]
    lines.append(f"\nOK {counts[0]} 件、注意 {counts[1]} 件、NG {counts[2]} 件")
    return "\n".join(lines)


def to_json(findings: Iterable[Finding]) -> str:
    """``{"ok": true, "findings": [{"name", "level", "detail", "fix"}]}``。"""
    items = [vars(finding) for finding in findings]
    ok = all(item["level"] != "error" for item in items)
    return json.dumps({"ok": ok, "findings": items}, ensure_ascii=True, indent=2)
