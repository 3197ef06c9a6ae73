"""What is labeled in conversations by each chat template that TRL ships.

`python -m helpers.template_table FILE` writes the table again; read the difference before you believe it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import trl

from helpers.tiny_models import tiny_tokenizer
from onelayer.compiler.conversations.chat import Chat
from onelayer.compiler.conversations.turns import Turns
from onelayer.compiler.data.rows import example_from_row
from onelayer.compiler.errors import InputError

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
SUM = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": SUM}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 7}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ASKED = [user("name a city"), assistant("rome"), user("another")]
RESULT = {"role": "tool", "name": "add", "content": "9"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "two turns": {"messages": [*ASKED, assistant("paris")]},
    "system": {"messages": [{"role": "system", "content": "be brief"}, user("name a city"), assistant("rome")]},
    "assistant first": {"messages": [assistant("hello"), user("name a city"), assistant("rome")]},
    "reasoning": {
        "messages": [
            user("name a city"),
            assistant("<think>\nold\n</think>\n\nrome"),
            user("another"),
            assistant("<think>\neasy\n</think>\n\nparis"),
        ]
    },
    "blanks": {"messages": [user(" name a city "), assistant(" rome\n"), user("rome"), assistant("rome ")]},
    "completion": {"prompt": ASKED, "completion": [assistant("paris")]},
    "tools": {"messages": [user("sum"), assistant("", tool_calls=[CALL]), RESULT, assistant("nine")], "tools": TOOLS},
    "text and tools": {
        "messages": [
            *[user("sum"), assistant("hm", tool_calls=[CALL]), RESULT, assistant("nine")],
            *[user("more"), assistant("ten")],
        ],
        "tools": TOOLS,
    },
}


def labeled(template: str, conversation: str) -> list[str] | str:
    """The labeled pieces of a rendered conversation, or why the template is refused."""
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "t", (FOLDER / f"{template}.jinja").read_text("utf-8")
    example = example_from_row(CONVERSATIONS[conversation], "row")
    messages = example.messages or [*(example.prompt or ()), *(example.completion or ())]
    try:
        chat = Chat("row", messages, tokenizer, example.tools).checked()
        turns = Turns(chat)
        if example.messages is None:
            return [chat.text[turns.start(len(ASKED)) :]]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return [chat.text[slice(*turns.span(index))] for index in answers]
    except InputError as fault:
        return str(fault).removeprefix("row: the chat template of t ").partition(";")[0]


def table() -> dict[str, dict[str, list[str] | str]]:
    return {template: {name: labeled(template, name) for name in CONVERSATIONS} for template in TEMPLATES}


def write(file: Path) -> None:
    """One line per template and conversation."""
    blocks = []
    for template, row in table().items():
        lines = (
            f" {json.dumps(name)}: {json.dumps(pieces, ensure_ascii=False)}" for name, pieces in sorted(row.items())
        )
        blocks.append(f"{json.dumps(template)}: {{\n" + ",\n".join(lines) + "\n}")
    file.write_text("{\n" + ",\n".join(blocks) + "\n}\n", "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
