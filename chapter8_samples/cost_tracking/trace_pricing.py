"""``02_cost_tracking/trace_pricing.py`` の別名(自動生成)。"""

from chapter8_samples import _sections

_sections.become_real(__name__)
