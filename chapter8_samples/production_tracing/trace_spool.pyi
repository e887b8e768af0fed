"""8.1.4 サーバー停止中のトレースを失わない(いったんディスクに置いて後で送る)。"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from mlflow.entities import Trace
logger = logging.getLogger(__name__)
Deliver = Callable[[Sequence[Trace]], None]

@dataclass(frozen=True)
class SpoolStats:
    """``TraceSpool`` の件数。"""
    written: int = 0
    'ディスクに書いた件数。'
    delivered: int = 0
    pending: int = 0
    'まだ送れていない件数。'
    dead: int = 0
    '読めない、またはサーバーに拒否されて ``dead/`` に移した件数。'
    dropped: int = 0
    'ディスクに書けず(満杯など)、その場で送ることもできずに失った件数。'
    write_errors: int = 0

def deliver(traces: Sequence[Trace]) -> None:
    """トレースを同じ ID のまま保存する。同じものを 2 回送っても 1 件のままになる。"""

class TraceSpool:
    """完成したトレースを、送る前にディスクへ書く。

    添付ファイルと、プロンプトの版とのリンクは送らない。
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_traces: int=10000, batch_size: int=50, cooldown_seconds: float=5.0, fsync: bool=False, deliver: Deliver=deliver, clock: Callable[[], float]=time.monotonic) -> None:
        """設定だけを行う。MLflow につなぎ、前回の残りを送り始めるのは ``install()``。

        Args:
            directory: 置き場(トレースの中身が入るため、他の利用者は読めない権限で作る)。
            max_traces: 置ける上限。超えた分は書かずにその場で送る。
            cooldown_seconds: 送信に失敗した後、次に試すまでの時間。
            fsync: 停電でも失わないよう、書くたびにディスクへ確定する(およそ 0.4 ms)。
        """
        self.directory = Path(directory)
        self._max = max_traces
        self._batch = batch_size
        self._cooldown = cooldown_seconds
        self._fsync = fsync
        self._deliver = deliver
        self._clock = clock
        self._originals: tuple[Any, Any] | None = None
        self._totals = SpoolStats()

    def install(self) -> TraceSpool:
        """MLflow の送信をこの置き場に切り替える。前回の残りも送り始める。

        Raises:
            RuntimeError: 別の置き場が有効、トレースを OTLP だけに送る設定、または MLflow の内部が
                変わった。
        """

    def uninstall(self) -> None:
        """MLflow の送信に戻す。残ったファイルはそのまま置いておく。"""

    def accept(self, trace: Trace) -> None:
        """トレースを書いて、送信を頼む(MLflow の背後のスレッドから呼ばれる)。"""

    def drain(self, timeout_seconds: float=10.0) -> int:
        """送り終えるまで最大 ``timeout_seconds`` 秒待ち、ディスクに残った件数を返す。"""

    def stats(self) -> SpoolStats:
        """いままでの件数。"""

    def _renew_after_fork(self) -> None:
        """fork した子には送るスレッドがない。残りは親が送るので、子は空から始める。"""

    def _start_sender(self, pending: Iterable[str]) -> None:
        ...

    def _allow_sending(self) -> None:
        """ここまでは送らない(作っただけでは、接続先がまだ決まっていないことがある)。"""

    def _remove_old_drafts(self) -> None:
        """書きかけで強制終了されたプロセスの残りを消す(新しいものは、誰かが書いている途中)。"""

    def _on_disk(self) -> list[str]:
        ...

    def _path(self, trace_id: str) -> Path:
        ...

    def _reserve(self) -> bool:
        """上限までなら 1 件分の場所を取る(書き手は複数いる)。"""

    def _enqueue(self, trace: Trace) -> None:
        ...

    def _write(self, trace: Trace) -> bool:
        ...

    def _add(self, **counts: int) -> None:
        ...

    def _send_forever(self) -> None:
        ...

    def _next_batch(self) -> list[str]:
        """送る番のトレース ID。取り外されたら空。"""

    def _send(self, batch: list[str]) -> None:
        ...

    def _send_one_by_one(self, traces: Iterable[Trace]) -> list[Trace]:
        """まとめて拒否されたときに、原因のトレースだけを取り分ける。"""

    def _load(self, trace_id: str) -> Trace | None:
        ...

    def _set_aside(self, trace_id: str, reason: str) -> None:
        ...

    def _forget(self, batch: list[str], delivered: int) -> None:
        ...

def replay(directory: str | os.PathLike[str], timeout_seconds: float=60.0) -> SpoolStats:
    """残ったファイルをいまのトラッキング URI に送る。何度呼んでも重複しない。

    Raises:
        FileNotFoundError: そのディレクトリーがない。
    """

def main() -> None:
    """サーバーが止まっている間に 20 件を記録し、復旧してから送り直す。"""
