"""Dialogues as the chat template of an imported model writes them: ids, and which of them are answers.

The template is rendered with the dialogue up to each answer and behind it; where these are beginnings of the whole,
they say where the answer stands. The whole is tokenised in one piece, as transformers does.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import takewhile

from chatglm_tokenizer.chat_template import TRAINING_DAY, render
from chatglm_tokenizer.hf_tokenizer import HFTokenizer
from chatglm_tokenizer.messages import Message, split_turns


class Written:
    """Renders and tokenises parts of one dialogue. The names of control tokens in its texts stay text."""

    def __init__(self, messages: Sequence[Message], tokenizer: HFTokenizer, day: datetime | None = None):
        """ValueError for roles that do not alternate."""
        split_turns(messages)
        texts, self.mark = tokenizer.broken([message["content"] for message in messages])
        self.messages = [{**m, "content": text} for m, text in zip(messages, texts, strict=True)]
        self.tokenizer, self.day = tokenizer, day
        self.names = tokenizer.template_names

    def render(self, messages: Sequence[Message], answer_follows: bool) -> str:
        return render(self.tokenizer.chat_template, messages, self.names, answer_follows, self.day)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_marked([text], self.mark)[0]


def encode_by_template(
    messages: Sequence[Message], tokenizer: HFTokenizer, max_len: int
) -> tuple[list[int], list[bool]]:
    """Ids of a dialogue without the oldest turns that do not fit into max_len, and whether each bears loss.

    ValueError where answers cannot be told from the rest, because the template writes them otherwise later on.
    """
    written = Written(messages, tokenizer, TRAINING_DAY)
    ids = encode_newest(written, lambda: written.encode(written.render(written.messages, False)), max_len)
    return ids, find_answers(written, ids)


def find_answers(written: Written, ids: list[int]) -> list[bool]:
    """Which ids of a whole dialogue are answers with the token that ends them."""
    whole, stop = written.render(written.messages, False), set(written.tokenizer.stop_ids)
    bears_loss = [False] * len(ids)
    for number, message in enumerate(written.messages):
        if message["role"] != "assistant":
            continue
        earlier = written.render(written.messages[:number], False)
        # What an answer is asked for with may be more than what stands before a given one (a `<think>` to begin with).
        before = written.render(written.messages[:number], True)
        until = written.render(written.messages[: number + 1], False)
        in_turn = whole.startswith(until) and whole.startswith(earlier) and before.startswith(earlier)
        if not (in_turn and len(earlier) < len(until)):
            raise ValueError("the chat template does not write this dialogue turn after turn")
        start = in_common(written.encode(before), ids)
        end = len(ids) if until == whole else in_common(written.encode(until), ids)
        # What the template writes behind the token that ends the answer is never generated.
        end = next((i + 1 for i in reversed(range(start, end)) if ids[i] in stop), end)
        bears_loss[start:end] = [True] * (end - start)
    return bears_loss


def in_common(beginning: list[int], ids: list[int]) -> int:
    """How many ids both begin with: where a token reaches over the end of the beginning, it is not counted."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(beginning, ids, strict=False)))


def encode_newest(written: Written, encode: Callable[[], list[int]], max_len: int) -> list[int]:
    """Leave out as few of the oldest turns as make the ids fit into max_len, or all but the last; returns the ids.

    Found by bisection: every try renders and tokenises the whole dialogue, which a client may have made very long.
    """
    whole = written.messages
    first = int(whole[0]["role"] == "system")
    too_few, enough = -1, (len(whole) - first - 1) // 2  # turns left out
    while enough - too_few > 1:
        left_out = (too_few + enough) // 2
        written.messages = whole[:first] + whole[first + 2 * left_out :]
        too_few, enough = (too_few, left_out) if len(encode()) <= max_len else (left_out, enough)
    written.messages = whole[:first] + whole[first + 2 * enough :]
    return encode()


def prompt_by_template(messages: Sequence[Message], tokenizer: HFTokenizer, max_len: int) -> list[int]:
    """Ids that the model is to continue with its answer.

    Too long: the oldest turns go first, then the beginning of the last question; the system text stays.
    """
    written = Written(messages, tokenizer)

    def encode() -> list[int]:
        follows = written.messages[-1]["role"] == "user"
        return written.encode(written.render(written.messages, follows))

    ids = encode_newest(written, encode, max_len)
    last = written.messages[-1]
    if len(ids) <= max_len or last["role"] != "user":
        return ids[-max_len:]
    question, fits, too_many = last["content"], 0, len(last["content"]) + 1
    while too_many - fits > 1:  # characters of the question's end
        half = (fits + too_many) // 2
        last["content"] = question[len(question) - half :]
        fits, too_many = (half, too_many) if len(encode()) <= max_len else (fits, half)
    last["content"] = question[len(question) - fits :]
    return encode()[-max_len:]
