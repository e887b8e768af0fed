"""シナリオのアクセス: 大勢のユーザーが、本番のアプリへ質問を送る。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle, islice

import mlflow

from chapter8_samples.production_tracing import RequestContext, request_scope

from .documents import Question, load_questions
from .support_bot import SupportBot

WORKERS, USERS, TURNS_PER_SESSION = 4, 8, 3
ARRIVALS_PER_SECOND = 10


@dataclass(frozen=True)
class Visit:
    """1 回の質問と、返した答え。失敗した問い合わせは ``answer`` が ``None``。"""

    trace_id: str
    user_id: str
    question: Question
    answer: str | None

    @property
    def helpful(self) -> bool:
        """ユーザーが 👍 を押すか。知りたかった一文が答えに入っているかで決める。"""
        return self.answer is not None and self.question.expected_answer in self.answer


class Traffic:
    """同じ順番で質問を送り続ける。同じ実行なら、誰が何を尋ねるかも同じになる。"""

    def __init__(self, bot: SupportBot, *, environment: str, service_version: str) -> None:
        self.bot = bot
        self.environment, self.service_version = environment, service_version
        self.last_at = datetime.now(timezone.utc)
        """最後の答えを返し終えた時刻。"""
        self._questions: Iterator[tuple[int, Question]] = enumerate(cycle(load_questions()))

    def send(self, count: int) -> list[Visit]:
        """``count`` 件を一定の間隔で送り、全部の答えを待つ。"""
        pending: list[Future[Visit]] = []
        with ThreadPoolExecutor(WORKERS) as pool:
            for numbered in islice(self._questions, count):
                pending.append(pool.submit(self._visit, numbered))
                time.sleep(1 / ARRIVALS_PER_SECOND)
        self.last_at = datetime.now(timezone.utc)
        return [visit.result() for visit in pending]

    def _visit(self, numbered: tuple[int, Question]) -> Visit:
        number, question = numbered
        user_id = f"user-{number % USERS:02}"
        context = self._context(user_id, conversation=number // (USERS * TURNS_PER_SESSION))
        with request_scope(context):
            try:
                answer = self.bot.answer(question.question)
            except Exception:  # 失敗したトレースとして残る。アクセスは続く
                answer = None
        trace_id = mlflow.get_last_active_trace_id(thread_local=True) or ""
        return Visit(trace_id, user_id, question, answer)

    def _context(self, user_id: str, conversation: int) -> RequestContext:
        return RequestContext(
            user_id=user_id,
            session_id=f"{user_id}-{conversation}",
            environment=self.environment,
            service_version=self.service_version,
        )
