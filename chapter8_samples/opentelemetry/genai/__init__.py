"""GenAI セマンティック規約: 属性の名前の検査、標準メトリクス、評価のイベント。"""

from .conventions import GENAI_SEMANTIC_CONVENTIONS, RENAMED, SEMCONV_VERSION
from .evaluation import EvaluationEvents, evaluation_attributes, setup_evaluation_events
from .metrics import GenAIMetrics, setup_genai_metrics
from .semconv import find_semconv_gaps, print_semantic_conventions

__all__ = [
    "GENAI_SEMANTIC_CONVENTIONS",
    "RENAMED",
    "SEMCONV_VERSION",
    "EvaluationEvents",
    "GenAIMetrics",
    "evaluation_attributes",
    "find_semconv_gaps",
    "print_semantic_conventions",
    "setup_evaluation_events",
    "setup_genai_metrics",
]
