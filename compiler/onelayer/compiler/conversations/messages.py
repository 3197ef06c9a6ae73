"""Messages of a row in, checked messages out: known roles, texts, parts and calls."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from onelayer.compiler.conversations.fields import checked_string, kind_name, parsed
from onelayer.compiler.conversations.parts import Message, checked_parts
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import Folder

REFUSED_KEYS = ("function_call", "tools")
ROLES = ("system", "developer", "user", "assistant", "tool")
WRONG_ROLES = {
    **dict.fromkeys(("human", "person", "prompter", "instruction"), "user"),
    **dict.fromkeys(("ai", "bot", "chatgpt", "gpt", "model", "response"), "assistant"),
}


def checked_messages(value: object, source: str, field: str, folder: Folder | None = None) -> list[Message]:
    """Check a non-empty list of messages, each with a role and a content; other keys stay for the chat template."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{source}: field '{field}' must be a non-empty list of messages, not {kind_name(value)}")
    messages: list[Message] = []
    for index, message in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(
                f"{source}: field '{where}' must be an object with 'role' and 'content', not {kind_name(message)}"
            )
        for key in REFUSED_KEYS:
            if message.get(key):
                raise InputError(f"{source}: field '{where}.{key}' is not supported; write the call into 'tool_calls'")
        messages.append(_message(message, source, where, folder))
    return messages


def _message(message: Mapping[str, Any], source: str, where: str, folder: Folder | None) -> Message:
    """Check one message: a known role, a text, parts or calls, and a weight of 0 or 1."""
    role = checked_string(message.get("role"), source, f"{where}.role")
    meant = WRONG_ROLES.get(role.lower()) or next(iter(get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)), role)
    if meant != role:  # other roles are left to the chat template
        raise InputError(f"{source}: field '{where}.role' is '{role}'; write '{meant}'")
    if message.get("weight") not in (None, 0, 1):
        raise InputError(f"{source}: field '{where}.weight' is {message['weight']!r}; write 0 or 1, or remove it")
    calls = _calls(message.get("tool_calls"), source, f"{where}.tool_calls")
    content = checked_parts(message.get("content"), source, f"{where}.content", folder)
    if calls and content is None:
        content = ""
    elif isinstance(content, list):  # parts, which are checked
        if role == "assistant":
            raise InputError(
                f"{source}: field '{where}.content': an assistant writes text only; remove the other parts"
            )
    elif not (content == "" and (calls or role == "system")):  # published data sets often have an empty system message
        content = checked_string(content, source, f"{where}.content")
    # Arrow fills missing keys of rows with null; a chat template would treat them as present.
    others = {key: item for key, item in message.items() if item is not None and key != "tool_calls"}
    return {**others, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _calls(value: object, source: str, field: str) -> list[dict[str, Any]]:
    """Check the calls of a message, and bring each into one form: a `function` with a name and an arguments object."""
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else []):
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        name, arguments = function.get("name"), parsed(function.get("arguments") or {})
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InputError(
                f"{source}: field '{field}[{index}]' must be an object whose 'function' has a 'name' and 'arguments'"
            )
        others = {key: item for key, item in call.items() if item is not None and key not in ("name", "arguments")}
        calls.append({"type": "function", **others, "function": {"name": name, "arguments": dict(arguments)}})
    return calls


def checked_tools(present: Mapping[str, Any], source: str) -> list[Any] | None:
    """Return the tools of a row: a list of JSON schemas, or its JSON text; None if there are none."""
    tools = parsed(present.get("tools") or None)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"{source}: field 'tools' must be a list of JSON schemas of functions, not {kind_name(tools)}")
    return tools or None
