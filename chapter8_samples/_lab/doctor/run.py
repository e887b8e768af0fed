"""設定の診断: ``python -m chapter8_samples doctor``。

版、料金表、接続先、鍵、食い違う設定を調べ、1 件ずつ OK / 注意 / NG と直し方を示す。NG がなければ
終了ステータス 0、あれば 1(CI で使う)。鍵やパスワードは表示しない(URL は必ず ``shown`` を通す)。
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable

from ..console import color, pad, width
from . import checks
from .settings import Environment, conflicts
from .setup_problems import Finding, Problem, explain

MARKS = {"ok": ("OK", "32"), "warning": ("注意", "33"), "error": ("NG", "31")}


def run(*, as_json: bool = False) -> int:
    """診断して表示し、NG がなければ 0 を返す。"""
    findings = diagnose(dict(os.environ))
    print(to_json(findings) if as_json else to_text(findings))
    return int(any(finding.level == "error" for finding in findings))


def diagnose(environment: Environment) -> list[Finding]:
    """すべての診断の結果。1 つの診断が失敗しても、残りは続ける。"""
    return [
        *_safe("版", checks.versions),
        *_safe("料金表", checks.prices),
        *_safe("接続先", lambda: checks.backend(environment)),
        *_safe("ジャッジ", lambda: checks.judge(environment)),
        *_safe("OTLP", lambda: checks.otlp(environment)),
        *_safe("設定", lambda: conflicts(environment)),
    ]


def _safe(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # 診断そのものの失敗も、1 件の結果として見せる
        problem = explain(error) or Problem(
            f"診断の途中で失敗しました({type(error).__name__})。",
            "この環境の設定を 1 つずつ外して、もう一度診断してください。",
        )
        return [Finding(name, "error", problem.what, problem.fix)]


def to_text(findings: Iterable[Finding]) -> str:
    """1 件 1 行。注意と NG には、次の行に直し方。"""
    findings = list(findings)
    size = max(width(finding.name) for finding in findings)
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
