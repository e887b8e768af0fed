"""``01_production_tracing/tail_sampling.py`` の別名(自動生成)。"""

from chapter8_samples import _sections

_sections.become_real(__name__)
