"""飛ばされたテストを調べる。理由の無いもの、CI でそろえたはずの道具が無いものは失敗。"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

ACCEPTED = ("only on Windows", "only on macOS")


def main(paths: list[str]) -> int:
    """飛ばされたテストを並べ、受け入れられないものがあれば 1 を返す。"""
    bad = 0
    for case in (case for path in paths for case in ET.parse(path).iter("testcase")):
        skipped = case.find("skipped")
        if skipped is None or skipped.get("type") == "pytest.xfail":
            continue
        reason = (skipped.get("message") or "").strip()
        accepted = reason.startswith(ACCEPTED)
        bad += not accepted
        print(f"skipped{'' if accepted else ' (not accepted)'}: {case.get('name')}: {reason}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
