"""Training data in three forms."""

from typing import Any

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "what is the sum", "of two and three", "it is five", "rome"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in TEXTS],
    "pairs": [{"prompt": text, "completion": " it is eight"} for text in TEXTS],
    "messages": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "blue"}]} for text in TEXTS
    ],
}
