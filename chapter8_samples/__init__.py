"""第8章「監視と運用 - LLMアプリケーションの健全性管理」サンプルコード。

``from chapter8_samples.production_tracing import setup_production_tracing`` のように、
番号の付かない名前で使う。本書のファイルは番号付きフォルダーに、それを支える部品は
番号の付かないフォルダーにある。
"""
