"""8.5 送り先の URL の検査(標準ライブラリーだけ)。

書き間違いを、送るたびの失敗ではなく、設定のときの例外にする。
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

_SIGNAL_PATH = re.compile(r"/v1/(?:traces|metrics|logs)/*$")
_NOT_IN_A_URL = re.compile(r"[^A-Za-z0-9._~:/\[\]%+,;=&()!*-]")


def split_endpoint(endpoint: Any) -> SplitResult:
    """前後の空白を除いて分ける。

    >>> split_endpoint(" http://otel-collector:4317 ").netloc
    'otel-collector:4317'

    Raises:
        ValueError: http(s) の URL ではない。文面に、値と直し方がある(鍵かもしれない値は出さない)。
    """
    text = endpoint.strip() if isinstance(endpoint, str) else ""
    if not text:
        raise ValueError(f"endpoint {endpoint!r} is not a URL; write http://HOST:PORT")
    if any(mark in text for mark in "@?#"):
        raise ValueError("endpoint has a user name or a query; pass credentials as headers")
    if strange := _NOT_IN_A_URL.search(text):
        raise ValueError(
            f"endpoint {text!r} is not an http(s) URL: remove {strange[0]!r} "
            "(plain ASCII, no quotes, no spaces, variables expanded)"
        )
    if "://" not in text:
        host = re.sub("^https?:?/*", "", text)
        raise ValueError(
            f"endpoint {text!r} has no scheme; write http://{host} (plain) or https://{host} (TLS)"
        )
    return _checked(text)


def _checked(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"endpoint {text!r}: {error}; write http://HOST:4317") from error
    if parts.scheme not in ("http", "https") or not _is_host(parts.hostname or ""):
        raise ValueError(f"endpoint {text!r} is not an http(s) URL with a host")
    if parts.netloc.endswith(":") or port == 0:
        raise ValueError(f"endpoint {text!r} has no port after ':'; write http://HOST:4317")
    if "://" in parts.path or len(re.findall("/v1/traces", parts.path)) > 1:
        raise ValueError(f"endpoint {text!r} says the same part twice; write it once")
    return parts


def _is_host(name: str) -> bool:
    """ホスト名として引けるか。点の間が空、64 文字以上のものは、送るたびに例外になる。"""
    return all(0 < len(part) < 64 for part in name.removesuffix(".").split("."))


def signal_url(parts: SplitResult, signal: str) -> str:
    """OTLP/HTTP の送り先。``signal`` は ``traces`` ``metrics`` ``logs``。"""
    path = _SIGNAL_PATH.sub("", re.sub("/{2,}", "/", parts.path)).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}/v1/{signal}"
