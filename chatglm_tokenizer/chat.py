"""The chat format, in one place: training, evaluation and serving all take it from here.

    [system] prompt <bos> answer <eos> prompt <bos> answer <eos> …

Only the answers and their `<eos>` bear loss. Roles: system (first message only), user, assistant. An imported model
that has a chat template of its own keeps to that; one that has none gets this format as a template (templated.py).
"""

from collections.abc import Iterable, Sequence

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE  # the same format as Jinja
from chatglm_tokenizer.messages import Message as Message  # part of what this module offers
from chatglm_tokenizer.messages import split_turns
from chatglm_tokenizer.templated import encode_by_template, prompt_by_template

UNLIMITED = 1 << 62  # a max_len that every dialogue fits into


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, max_len: int
) -> tuple[list[int], list[bool]] | None:
    """Ids of a dialogue and, for each id, whether it bears loss; None if no answer token would be left.

    Too long: the oldest turns go first (never the system text); of a single turn the end of the answer is
    cut, and its `<eos>` with it, so that the model does not learn to stop in mid-sentence. ValueError for roles that
    do not alternate, and for a dialogue whose answers a chat template changes afterwards.
    """
    if tokenizer.chat_template:
        ids, bears_loss = encode_by_template(messages, tokenizer, max_len)
    else:
        head, turns = encode_turns(messages, tokenizer, max_len)
        ids, bears_loss = list(head), [False] * len(head)
        for prompt, answer in turns:
            ids += prompt + answer
            bears_loss += [False] * len(prompt) + [True] * len(answer)
    ids, bears_loss = ids[:max_len], bears_loss[:max_len]
    return (ids, bears_loss) if any(bears_loss) else None


def encode_chats(
    dialogues: Sequence[Sequence[Message]], tokenizer: Tokenizer, max_len: int
) -> list[tuple[list[int], list[bool]] | ValueError | None]:
    """`encode_chat` of many dialogues, whose texts the tokenizer encodes together, with all cores.

    A dialogue that cannot be encoded gives the error that `encode_chat` raises.
    """
    known = tokenizer
    if not tokenizer.chat_template:  # which writes texts and control tokens as one string
        known = KnownTexts(tokenizer, {m["content"] for messages in dialogues for m in messages})
    found: list[tuple[list[int], list[bool]] | ValueError | None] = []
    for messages in dialogues:
        try:
            found.append(encode_chat(messages, known, max_len))
        except ValueError as error:
            found.append(error)
    return found


class KnownTexts:
    """A tokenizer that has encoded some texts beforehand."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]):
        self.tokenizer, texts = tokenizer, list(texts)
        try:
            self.known = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
        except ValueError:  # one of them is no text: its own turn shows which
            self.known = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **options: object) -> list[int]:
        """As the tokenizer's."""
        ids = None if options else self.known.get(text)
        return self.tokenizer.encode(text, **options) if ids is None else ids


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, max_len: int) -> list[int]:
    """Ids that the model is to continue with its answer: everything up to and including the last `<bos>`.

    Too long: the oldest turns go first, then the beginning of the last question; the system text stays.
    """
    if tokenizer.chat_template:
        return prompt_by_template(messages, tokenizer, max_len)
    head, turns = encode_turns(messages, tokenizer, max_len)
    rest = [i for prompt, answer in turns for i in prompt + answer]
    return head + rest[-max(1, max_len - len(head)) :]


def encode_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, max_len: int
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Ids of the system text and of the last turns, (prompt <bos>, answer <eos>) each, that fit into max_len.

    The last turn is there even if it alone does not fit; an answer still to come is an empty list.
    """
    bos, eos = tokenizer.special_tokens["<bos>"], tokenizer.special_tokens["<eos>"]
    system, turns = split_turns(messages)
    head = tokenizer.encode(system.strip())  # no spaces at its end: see CHAT_TEMPLATE
    encoded = [
        (tokenizer.encode(user) + [bos], [] if answer is None else tokenizer.encode(answer) + [eos])
        for user, answer in turns
    ]
    length, left_out = len(head) + sum(len(p) + len(a) for p, a in encoded), 0
    while left_out < len(encoded) - 1 and length > max_len:
        length -= sum(map(len, encoded[left_out]))
        left_out += 1
    return head, encoded[left_out:]
