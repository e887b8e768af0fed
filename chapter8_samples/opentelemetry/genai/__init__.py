"""GenAI セマンティック規約: 属性の名前の検査と、標準メトリクス。"""

from .metrics import GenAIMetrics, setup_genai_metrics
from .semconv import (
    GENAI_SEMANTIC_CONVENTIONS,
    find_semconv_gaps,
    print_semantic_conventions,
)

__all__ = [
    "GENAI_SEMANTIC_CONVENTIONS",
    "GenAIMetrics",
    "find_semconv_gaps",
    "print_semantic_conventions",
    "setup_genai_metrics",
]
