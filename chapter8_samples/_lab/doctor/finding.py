"""診断の 1 件の形。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """診断の 1 件。``level`` は ok、warning(注意)、error(NG)。"""

    name: str
    level: Level
    detail: str
    fix: str = ""
