"""8.2.3 モデルの名前の綴り(本書にリストなし)。

同じモデルの名前が、提供元と経路ごとに違う。前方一致では探さず、書かれたままの名前から
1 つずつ接頭辞などを外し、いちばん詳しい名前の行を使う。
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAKERS = (  # 自社のモデルを売る提供元と、Bedrock の aws。再販の行と単価が違えば、こちらの行を使う
    "openai", "anthropic", "google", "gemini", "mistral", "cohere", "deepseek", "xai", "x-ai",
    "meta", "moonshot", "moonshotai", "minimax", "zai", "zhipuai", "perplexity", "voyage",
    "voyageai", "databricks", "aws",
)  # fmt: skip
RESELLERS = (  # ほかの会社のモデルを、自分の単価で売る。接頭辞のない名前には使わない
    "azure/", "azure_ai/", "bedrock/", "bedrock_mantle/", "vertex_ai/", "openrouter/",
    "vercel_ai_gateway/", "github_copilot/", "github-copilot/", "litellm_proxy/",
)  # fmt: skip
_PREFIX = re.compile(  # bedrock/us-east-1/ のような AWS のリージョンと、MLflow の openai:/ も
    r"^(?:bedrock/[a-z]{2}(?:-[a-z]+)+-\d|azure|azure_ai|bedrock|converse|models|vertex_ai"
    rf"|litellm_proxy|openrouter|{'|'.join(MAKERS)}):?/"
)
_RESOURCE = ("arn:", "projects/", "publishers/")  # AWS の ARN、Vertex AI のリソース名
_REGION = re.compile(r"^(?:us-gov|us|eu|apac|jp|au|ca|in|global)\.(?=[a-z0-9]+\.)")
_VENDOR = re.compile(r"^(?:anthropic|meta|amazon|mistral|cohere|openai|deepseek|moonshotai|zai)\.")
_THROUGHPUT = re.compile(r"(?<=-v\d)(?::\d+\w*)+$")
_BEDROCK_VERSION = re.compile(r"-v\d+(?::\d+)*$")
_VERTEX_DATE = re.compile(r"(?:-v\d)?@(\d{8})$")
_DATED = re.compile(r"-(?:20\d{6}|20\d\d-\d\d-\d\d|latest)$")


def spellings(model: str) -> list[str]:
    """書かれたままの名前から、料金表の綴りまで。詳しい順。

    >>> spellings("bedrock/us.anthropic.claude-3-haiku-20240307-v1:0")[::3]
    ['bedrock/us.anthropic.claude-3-haiku-20240307-v1:0', 'us.anthropic.claude-3-haiku-20240307', \
'anthropic.claude-3-haiku-20240307']
    """
    return list(dict.fromkeys(_steps(model.strip().lower())))


def undated(name: str) -> str:
    """日付か ``latest`` を ``*`` に直した名前。``*`` の付いた別名は、それらに合う。

    >>> undated("claude-haiku-4-5-20251001")
    'claude-haiku-4-5-*'
    """
    return _DATED.sub("-*", name)


def _steps(name: str) -> Iterator[str]:
    yield name
    while name != (shorter := _PREFIX.sub("", name)):
        yield (name := shorter)
    if name.startswith(_RESOURCE):
        yield (name := name.rsplit("/", 1)[-1])
    yield _VERTEX_DATE.sub(r"-\1", name)
    base = _REGION.sub("", name)
    for bedrock in (name, base):
        if base != name or _VENDOR.match(base):
            yield from (bedrock, _THROUGHPUT.sub("", bedrock), _BEDROCK_VERSION.sub("", bedrock))
    if _VENDOR.match(base):
        yield _VENDOR.sub("", _BEDROCK_VERSION.sub("", base))


def family(name: str) -> tuple[str, ...]:
    """数字を含む語。世代や版の違うモデルは、これが違う。

    >>> family("gpt-4o-mini"), family("claude-3-5-sonnet")
    (('4o',), ('3', '5'))
    """
    return tuple(re.findall(r"[a-z]*\d[a-z0-9]*", name))
