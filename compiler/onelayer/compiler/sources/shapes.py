"""Rows in the shapes of other tools and published data sets in, rows with this project's columns out."""

import json
from collections.abc import Mapping
from typing import Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.sources.media_folders import with_named_file

Row = Mapping[str, Any]

MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # every shape may have these columns too
OWN = ("text", "messages", "prompt", "completion", "chosen")  # a row with one of these is no foreign one
COLUMNS = (
    *("text", "label", "prompt", "completion", "chosen", "rejected", "choices", "answer", "messages", "tools"),
    *("image", "images", "audio", "audios"),
    *("instruction", "input", "context", "output", "response", "system", "history", "conversations", "data"),
)
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard", "ai", "bot"), "assistant"),
    "system": "system",
    "function_call": "function_call",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


def renamed(row: object, columns: Mapping[str, str], source: str) -> object:
    """Return a row under the names that the user gave its columns, without its others. Nothing renames nothing."""
    if not columns or not isinstance(row, Mapping):
        return row
    for name, theirs in columns.items():
        if theirs not in row:
            present = ", ".join(f"'{column}'" for column in row) or "no columns"
            raise InputError(f"{source}: has {present}, and no '{theirs}'; correct the column of {name}")
    return {name: row[theirs] for name, theirs in columns.items()}


def own_row(row: object, source: str) -> tuple[object, str | None]:
    """Return a row with this project's columns, and the name of the shape that it had; None if that was our own.

    Raises `InputError` if a row of a known shape lacks something.
    """
    if not isinstance(row, Mapping):
        return row, None
    row = with_named_file(row)
    own, shape = _converted(row, source)
    if shape is None:
        return row, None
    return {**{name: row[name] for name in MEDIA if row.get(name) is not None}, **own}, shape


def _converted(row: Row, source: str) -> tuple[Row, str | None]:
    """Convert the texts of a row."""
    given = {name: value for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= given.keys():
        return _preference(given, source)
    if any(name in given for name in OWN):
        if _repeats_prompt(given):
            return {name: value for name, value in row.items() if name != "prompt"}, "UltraChat"
        return row, None
    if "instruction" in given and ("output" in given or "response" in given):
        return _alpaca(given, source), "Alpaca" if "output" in given else "Dolly"
    if isinstance(given.get("conversations"), list):
        return _share_gpt(given, source), "ShareGPT"
    turns = given.get("data")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant")
        return {"messages": [_said(roles[index % 2], turn) for index, turn in enumerate(turns)]}, "UltraChat"
    return row, None


def _said(role: str, text: object, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def _repeats_prompt(row: Row) -> bool:
    """Return whether the prompt of a row is only the first question of its messages, as in UltraChat's."""
    messages = row.get("messages")
    if not isinstance(messages, list) or "completion" in row or "text" in row:
        return False
    asked = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return isinstance(row.get("prompt"), str) and row["prompt"] in asked[:2]


def _preference(row: dict[str, Any], source: str) -> tuple[dict[str, Any], str | None]:
    """Convert the preferences of LLaMA-Factory, whose answers are outside the conversation, and of UltraFeedback."""
    answers = ("chosen", "rejected")
    if "instruction" in row:
        converted = [_alpaca({**row, "output": row[name]}, source) for name in answers]
        shape = "Alpaca"
    elif isinstance(row.get("conversations"), list):
        converted = [
            _share_gpt({**row, "conversations": [*row["conversations"], row[name]]}, source) for name in answers
        ]
        shape = "ShareGPT"
    elif row.get("messages") == row["chosen"]:
        return {name: value for name, value in row.items() if name != "messages"}, "UltraFeedback"
    else:
        return row, None
    tools = {"tools": converted[0]["tools"]} if "tools" in converted[0] else {}
    return {**tools, **{name: part["messages"] for name, part in zip(answers, converted, strict=True)}}, shape


def _alpaca(row: Row, source: str) -> dict[str, Any]:
    """Convert Alpaca's instruction, input and output (with LLaMA-Factory's system and history), or Dolly's columns."""
    answer = "output" if "output" in row else "response"
    for name in ("instruction", "input", "context", answer, "system"):
        if not isinstance(row.get(name, ""), str):
            raise InputError(f"{source}: field '{name}' must be a string; correct the row")
    for name in ("instruction", answer):
        if not row[name].strip():
            raise InputError(f"{source}: field '{name}' is empty; remove the row or fill it in")
    given = [row[name] for name in ("instruction", "input", "context") if row.get(name, "").strip()]
    messages = [_said("system", row["system"])] if row.get("system", "").strip() else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"{source}: field 'history' must be a list of pairs of a question and an answer; correct it")
    for asked, answered in history:
        messages += [_said("user", asked), _said("assistant", answered)]
    messages += [_said("user", "\n\n".join(given)), _said("assistant", row[answer])]
    return {"messages": messages}


def _share_gpt(row: Row, source: str) -> dict[str, Any]:
    """Convert ShareGPT's list of `from` and `value`, with LLaMA-Factory's system, calls and tools."""
    messages = [_said("system", row["system"])] if isinstance(row.get("system"), str) and row["system"].strip() else []
    for index, turn in enumerate(row["conversations"]):
        where = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or not ("from" in turn or "role" in turn):
            raise InputError(f"{source}: field '{where}' must be an object with 'from' and 'value'")
        if "from" not in turn:
            messages.append(dict(turn))
            continue
        role = SPEAKERS.get(str(turn["from"]).lower())
        if role is None:
            raise InputError(
                f"{source}: field '{where}.from' is '{turn['from']}'; write one of {', '.join(sorted(SPEAKERS))}"
            )
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        if role == "function_call":
            calls = _calls(turn.get("value"), source, f"{where}.value")
            messages.append(_said("assistant", "", tool_calls=calls, **weight))
        else:
            messages.append(_said(role, turn.get("value"), **weight))
    tools = row.get("tools")
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _calls(value: object, source: str, field: str) -> list[Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise InputError(f"{source}: field '{field}' must be JSON with 'name' and 'arguments'; correct it") from None
    return call if isinstance(call, list) else [call]
