"""8.3.5 採点の権利: 2 つの実行が同じスコアラーを同時に採点して、ジャッジに二重に払わないように。

エクスペリメントのタグに「誰が、どのスコアラーを、いつまで」と書き、ほかに誰もいなければ始める。書いて
から読むので、2 つの実行がどちらも「自分だけ」と見ることはない。SQLite、PostgreSQL、サーバーで同じ。
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ValidationError

from .judges import ScoringError

_TAG = "scoring.lease."
_LEASE_SECONDS = 120.0  # 止まった実行の権利は、別のマシンからは、この時間だけ残って見える
RENEW_SECONDS = 30.0
_WITHDRAW_SECONDS = 3.0  # 同時に始めた相手が譲るのを待つ
_held: set[str] = set()  # このプロセスが持っている権利
T = TypeVar("T")


class Claim(BaseModel):
    """タグに書く、採点の権利 1 つ。"""

    token: str
    host: str
    pid: int
    names: list[str]
    until: float


class ScoringBusyError(ScoringError):
    """同じスコアラーを、ほかの実行が採点している。"""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.names = {name for claim in claims for name in claim.names}
        holders = {f"process {claim.pid} on {claim.host}" for claim in claims}
        busy = ", ".join(sorted(self.names))
        super().__init__(f"{busy}: being scored by {', '.join(sorted(holders))}; wait for its end")


class Lease:
    """スコアラー ``names`` を採点する権利。``with`` の間だけ持つ。

    Raises:
        ScoringBusyError: ほかの実行が採点している。
        ScoringError: ``renew()`` で、権利を失っていた。
    """

    def __init__(self, experiment_id: str, names: Sequence[str]) -> None:
        self._experiment_id = experiment_id
        self._names = list(names)
        self._token = uuid.uuid4().hex
        self._renew_at = math.inf

    def __enter__(self) -> Lease:
        _held.add(self._token)
        try:
            self._write()
            deadline = time.monotonic() + _WITHDRAW_SECONDS
            while rivals := [c for c in self._claims() if c.token != self._token]:
                smallest = min(claim.token for claim in rivals)
                if smallest < self._token or time.monotonic() > deadline:
                    raise ScoringBusyError(rivals)
                time.sleep(0.05)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._delete(self._token)  # 消せなくても、期限が過ぎれば無効になる
        _held.discard(self._token)

    def renew(self) -> None:
        """採点している間、ときどき呼ぶ(権利を取っていなければ、何もしない)。"""
        if time.monotonic() >= self._renew_at:
            claims = self._claims()
            if self._token not in {claim.token for claim in claims}:
                raise ScoringError(f"the lease of this run expired; now claimed by {claims}")
            self._write()

    def _write(self) -> None:
        self._renew_at = time.monotonic() + RENEW_SECONDS
        until = time.time() + _LEASE_SECONDS
        host, pid = socket.gethostname(), os.getpid()
        claim = Claim(token=self._token, host=host, pid=pid, names=self._names, until=until)
        tag = self._experiment_id, _TAG + self._token, claim.model_dump_json()
        patiently(lambda: MlflowClient().set_experiment_tag(*tag))

    def _claims(self) -> list[Claim]:
        """同じスコアラーを採点する、生きている権利。死んだものと、読めないものは消す。"""
        tags = patiently(lambda: MlflowClient().get_experiment(self._experiment_id).tags)
        claims: list[Claim] = []
        for key in (key for key in tags if key.startswith(_TAG)):
            claim = _read(tags[key])
            if claim is None or _is_dead(claim):
                self._delete(key.removeprefix(_TAG))
            elif {*claim.names} & {*self._names}:
                claims.append(claim)
        return claims

    def _delete(self, token: str) -> None:
        with suppress(MlflowException):
            MlflowClient().delete_experiment_tag(self._experiment_id, _TAG + token)


def _read(text: str) -> Claim | None:
    """読めなければ ``None``(人や別の版が書いたものに、いつまでも止められない)。"""
    try:
        return Claim.model_validate_json(text)
    except ValidationError:
        return None


def _is_dead(claim: Claim) -> bool:
    """期限が過ぎたか、持ち主のプロセスがもうない。"""
    now = time.time()
    if not now <= claim.until < now + 3600:  # 先すぎる期限は、進んだ時計で書かれた
        return True
    if claim.host != socket.gethostname() or sys.platform == "win32":
        return False
    if claim.pid == os.getpid():
        return claim.token not in _held
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # ほかの利用者のプロセス
        pass
    return False


def patiently(call: Callable[[], T], *, seconds: float = 60.0) -> T:
    """データベースがロックされていたら、``seconds`` 秒までやり直す。"""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except MlflowException as error:
            if error.error_code != "TEMPORARILY_UNAVAILABLE" or time.monotonic() > deadline:
                raise
            time.sleep(1)
