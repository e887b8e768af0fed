"""8.3.5 何を採点済みとみなすか: スコアラーの定義の中身と、評価に残す目印。

採点済みかどうかは「名前と、定義の中身」で見分ける。登録の版は、削除して登録し直すと 1 に戻り、
MLflow の版は上がるので、どちらも目印にしない。コードのスコアラーが外から使う関数と変数は、中身に
入らない(外側の関数から受け取った数と文字列は入る)。変えたら、名前も変える。``Scorer`` を継承した
クラスが採点の間に書き換えるもの(キャッシュなど)は、中身に入らない ``PrivateAttr`` に置く。
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from mlflow.entities import Assessment
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer
from mlflow.tracing.client import TracingClient

from .._internals import enclosed_constants

_NAME, _VERSION = "mlflow.assessment.scorerName", "mlflow.assessment.scorerVersion"
_DEFINITION = "scoring.definition"
_PARTS = "scoring.parts"  # スコアラーが一度に返した評価の数
# 判定を変えないもの、MLflow の版やプロセスごとに変わるもの
_VARYING = {
    "mlflow_version",
    "serialization_version",
    "required_columns",
    "aggregations",
    "timeout",
}


def definition(scorer: Scorer) -> str:
    """スコアラーの定義の中身のハッシュ。MLflow の版、登録の有無、プロセスによらず同じになる。"""
    written = json.dumps(_named(_fields(scorer)), default=_plain)
    content = json.loads(written, object_hook=_without_empty)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _fields(scorer: Scorer) -> dict[str, Any]:
    if scorer.kind.value != "class":
        fields = scorer.model_dump()
        built_in = fields.get("builtin_scorer_pydantic_data") or {}
        # 組み込みのジャッジの指示文と説明は、利用者の書いたものではなく、MLflow の版ごとに変わる
        ours = {key: v for key, v in built_in.items() if key not in ("instructions", "description")}
        ours |= enclosed_constants(scorer)
        return {**fields, "builtin_scorer_pydantic_data": ours, "description": None}
    # Scorer を継承したクラスは、MLflow では登録(model_dump)できないが、手元では採点できる
    try:
        return {**vars(scorer), "source": inspect.getsource(type(scorer))}
    except OSError:  # 対話環境で定義した
        return {**vars(scorer), "source": type(scorer).__qualname__}


def _named(value: Any) -> Any:
    """辞書のキーを文字列にする(JSON にできないキーの辞書を持つスコアラーもある)。"""
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {str(key): _named(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_named(item) for item in cast("list[Any]", value)]
    return value


def _plain(value: object) -> object:
    """集合は並べる。ほかのオブジェクトは、プロセスごとに変わる文字列になるので、型だけを見る。"""
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in cast("set[object]", value))
    return str(type(value))


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    """空の項目を除く(新しい版の MLflow が増やした項目は、使わなければ空である)。"""
    empty = (None, "", [], {})
    return {key: v for key, v in fields.items() if key not in _VARYING and v not in empty}


def is_error(assessment: Assessment) -> bool:
    """採点に失敗したという記録か。"""
    return assessment.feedback is not None and assessment.feedback.error is not None


@dataclass(frozen=True)
class Identity:
    """評価に残す、スコアラーの身元。"""

    name: str
    definition: str
    version: int | None
    registered_at_ms: int

    def stamp(self, parts: int) -> dict[str, str]:
        """一度に返した ``parts`` 件の評価に付ける、メタデータ。"""
        found = {_NAME: self.name, _DEFINITION: self.definition, _PARTS: str(parts)}
        if self.version is not None:
            found[_VERSION] = str(self.version)
        return found

    def has_scored(self, assessments: Sequence[Assessment]) -> bool:
        """採点済みか(人が訂正したものも含む)。評価が一部しか残っていなければ偽。"""
        verdicts = [a for a in assessments if self._wrote(a) and not is_error(a)]
        parts = [int((a.metadata or {}).get(_PARTS, 1)) for a in verdicts]
        return len(verdicts) >= max(parts, default=1)

    def is_stale(self, assessment: Assessment) -> bool:
        """採点し直す前に消すものか: 前のエラー(前の定義のものも)と、途中までの評価。"""
        metadata = assessment.metadata or {}
        if is_error(assessment):
            return metadata.get(_NAME) == self.name
        return _PARTS in metadata and self._wrote(assessment)

    def failed_at_ms(self, assessments: Sequence[Assessment]) -> int:
        """最後に失敗した時刻。失敗していなければ 0。"""
        errors = [a for a in assessments if self._wrote(a) and is_error(a)]
        return max((a.create_time_ms or 0 for a in errors), default=0)

    def _wrote(self, assessment: Assessment) -> bool:
        metadata = assessment.metadata or {}
        if metadata.get(_NAME) != self.name:
            return False
        if _DEFINITION in metadata:
            return metadata[_DEFINITION] == self.definition
        # MLflow サーバーが書いたもの。登録より古ければ、削除した同じ名前のスコアラーのもの
        same_version = self.version is not None and metadata.get(_VERSION) == str(self.version)
        return same_version and (assessment.create_time_ms or 0) >= self.registered_at_ms


def identity_of(scorer: Scorer, experiment_id: str) -> Identity:
    """スコアラーの身元。登録してあれば、版と登録した時刻も調べる。"""
    version, registered_at = scorer.scorer_version, 0
    if version is not None:
        store: Any = TracingClient().store
        with suppress(MlflowException, AttributeError):  # ほかの場所の登録、Databricks
            found = store.get_scorer(experiment_id, scorer.name, version)
            registered_at = found.creation_time or 0
    return Identity(scorer.name, definition(scorer), version, registered_at)
