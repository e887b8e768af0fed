"""スタブ LLM が受け取る本文の検査。本物の API と同じく、誤ったリクエストは 400 で返す。"""

from __future__ import annotations

import json
from typing import Any, Literal, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["ChatBody", "EmbeddingsBody", "InvalidRequestError", "read_body"]


class InvalidRequestError(ValueError):
    """OpenAI の API なら 400 になるリクエスト。文面は ``error.message`` に入れる。"""


class _Body(BaseModel):
    # 知らない項目は無視する。"1" を 1 に直すような読み替えはしない
    model_config = ConfigDict(strict=True)


class Message(_Body):
    """会話の 1 通。"""

    role: str
    content: str | list[dict[str, Any]] | None = None


class JsonSchema(_Body):
    """``response_format.json_schema``。"""

    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Body):
    """答えの形。"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Body):
    """呼び出せる関数。"""

    name: str


class Tool(_Body):
    """道具。"""

    type: Literal["function"]
    function: Function


class ChatBody(_Body):
    """``/v1/chat/completions`` の本文のうち、スタブが読む項目。"""

    model: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None


class EmbeddingsBody(_Body):
    """``/v1/embeddings`` の本文のうち、スタブが読む項目。"""

    model: str = Field(min_length=1)
    input: str | list[str] = Field(min_length=1)


async def read_body(request: Request, kind: type[BaseModel]) -> dict[str, Any]:
    """本文を ``kind`` の形と照らし合わせ、届いたままの辞書で返す。

    Raises:
        InvalidRequestError: JSON でない、項目が足りない、型が違う。
    """
    try:
        body: Any = json.loads(await request.body())
        json.dumps(body, ensure_ascii=False).encode()  # 片割れのサロゲートは返事に書けない
        kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise InvalidRequestError(f"Invalid value for {place!r}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from error
    return cast(dict[str, Any], body)
