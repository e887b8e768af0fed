"""8.4.5 ロールバックを拒否する理由。"""


class RollbackError(RuntimeError):
    """ロールバックまわりの失敗の親。"""


class UnknownVersionError(RollbackError):
    """そのバージョンがない、または使える状態でない。"""


class SameVersionError(RollbackError):
    """エイリアスはすでにそのバージョンを指している。"""


class NoHistoryError(RollbackError):
    """戻る先、または取り消す対象の記録がない。"""


class CooldownError(RollbackError):
    """前のロールバックから間がない。"""


class KnownBadVersionError(RollbackError):
    """一度ロールバックで退けたバージョンに切り替えようとした。"""


class ConcurrentChangeError(RollbackError):
    """ほかの誰かが同時に変更している、または変更した。"""


class GateRefusedError(RollbackError):
    """昇格前の検査が、いまのバージョンより悪くないと認めなかった。"""


class VerificationError(RollbackError):
    """確認に失敗した。``restored`` は、エイリアスが元のバージョンを指しているか。"""

    def __init__(self, message: str, *, restored: bool) -> None:
        super().__init__(message)
        self.restored = restored
