"""8.2.3 トレースから、LLM の呼び出しを二重に数えずに取り出す(本書にリストなし)。

使用量は、親のスパンにも子のスパンにも書かれていることがある(LangChain と OpenAI を両方計装した
ときなど)。単純に足すと 2 倍になり、ストリームの設定漏れは 0 に見える。数え方をここに 1 つだけ置く。
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mlflow.entities import Span

from .._internals import stored_attributes
from .calls import COUNTS, OTEL_TOTAL, LlmCall, TokenUsage, is_cache_hit, read_call

UNATTRIBUTED = "(unattributed)"  # 親の合計にあり、どの呼び出しにもないトークン


def llm_calls(spans: Sequence[Span], known: Mapping[str, LlmCall] | None = None) -> list[LlmCall]:
    """LLM の呼び出しを、二重に数えずに取り出す。

    使用量を持つ子孫のないスパンだけを数える。子の合計より多い親のトークンは、キャッシュの内訳なら
    子に移し、ほかは ``UNATTRIBUTED`` の呼び出しにする。使用量のない LLM スパンは、子孫にも先祖にも
    ないときだけ「報告なし」として残す。失敗した呼び出しは課金されないので数えない。
    ``known`` は、もう読んだスパンの呼び出し。
    """
    by_id = {span.span_id: span for span in spans}
    read: dict[str, LlmCall] = {}
    for key, span in by_id.items():
        call = (known or {}).get(key) or read_call(span)
        if call:
            read[key] = call
    for key in _langchain_hits(by_id, read):
        read[key] = read[key].changed(cache_hit=True)
    above = {key: list(_ancestors(by_id, key)) for key in read}
    used = {key for key, call in read.items() if call.usage}
    parents = {parent for key in used for parent in above[key]}
    silent = {key for key in read.keys() - used - parents if used.isdisjoint(above[key])}
    silent -= {parent for key in silent for parent in above[key]}
    counted = silent | (used - parents)
    calls = {key: call for key, call in read.items() if key in counted}
    for key in sorted(parents & used, key=lambda parent: -len(above[parent])):  # 内側から
        below = {leaf: call for leaf, call in calls.items() if call.usage and key in above[leaf]}
        running = by_id[key].get_attribute(OTEL_TOTAL) is not None
        calls |= _compare(read[key], below, running)
    return list(calls.values())


def _ancestors(spans: Mapping[str, Span], span_id: str) -> Iterator[str]:
    parent = spans[span_id].parent_id
    while parent is not None and parent in spans:
        yield parent
        parent = spans[parent].parent_id


def _compare(parent: LlmCall, below: dict[str, LlmCall], running: bool) -> dict[str, LlmCall]:
    """親の合計が子の合計より多いとき、その分を持つ呼び出し。"""
    rest = parent.usage or TokenUsage()
    for call in below.values():
        rest -= call.usage or TokenUsage()
    if rest.cached > 0 and not rest.output_tokens:
        if len(below) == 1 and rest.input_tokens in (0, rest.cached):
            return {key: call.changed(usage=parent.usage) for key, call in below.items()}
        if len({call.model for call in below.values()}) == 1 and not rest.input_tokens:
            return _share_cache(below, rest)
    missing = {name: n for name in COUNTS if (n := getattr(rest, name)) > 0}
    if running or not missing:
        return {}
    reason = f"{missing} of span {parent.name!r} are in no call below it"
    usage = TokenUsage(**missing)
    return {parent.span_id: parent.changed(model=UNATTRIBUTED, usage=usage, reason=reason)}


def _share_cache(below: dict[str, LlmCall], rest: TokenUsage) -> dict[str, LlmCall]:
    """親だけにあるキャッシュの内訳を、同じモデルの子に順に割り当てる(どう分けても金額は同じ)。"""
    found: dict[str, LlmCall] = {}
    for key, call in below.items():
        usage = call.usage or TokenUsage()
        fresh = usage.input_tokens - usage.cached
        read = min(fresh, rest.cache_read_tokens)
        write = min(fresh - read, rest.cache_write_tokens)
        more = TokenUsage(
            cache_read_tokens=read,
            cache_write_tokens=write,
            cache_write_1h_tokens=min(write, rest.cache_write_1h_tokens),
        )
        found[key] = call.changed(usage=usage + more)
        rest -= more
    return found


def _langchain_hits(spans: Mapping[str, Span], calls: Iterable[str]) -> list[str]:
    """チェーンの印で分かるキャッシュの答え。

    MLflow はモデルのスパンから LangChain の印を捨てるが、チェーンの出力(最後の呼び出しの答え)には
    残す。チェーンの外の呼び出しは見分けられない。自分で ``cost.status`` を ``cache_hit`` にする。
    """
    last: dict[str, str] = {}  # チェーンのスパン -> 最後に始まった呼び出し
    for key in calls:
        parent = spans[key].parent_id
        made_by = spans[key].get_attribute("mlflow.message.format")
        if parent and parent in spans and made_by == "langchain":
            last[parent] = key
    return [
        call
        for chain, call in last.items()
        if is_cache_hit(stored_attributes(spans[chain]), spans[chain].outputs)
    ]
