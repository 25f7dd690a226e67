"""Dialogues as lists of messages."""

from collections.abc import Sequence

Message = dict[str, str]  # {"role": …, "content": …}


def split_turns(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str | None]]]:
    """The system text and the (user, assistant) pairs; a last question without an answer has None for it.

    Raises ValueError when the roles do not alternate user, assistant.
    """
    messages = list(messages)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    expected = ["user", "assistant"] * (len(messages) // 2 + 1)
    roles = [m["role"] for m in messages]
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(f"roles must alternate user, assistant; got {roles}")
    contents = [m["content"] for m in messages] + ([None] if len(messages) % 2 else [])
    return system, list(zip(contents[::2], contents[1::2], strict=True))
