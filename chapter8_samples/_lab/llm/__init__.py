"""API キーなしで話せる、OpenAI 互換の LLM スタブ。"""
