"""The text of ids as they come: never half a character, never the beginning of a stop string."""

from collections.abc import Sequence

from chatglm_tokenizer.base import Tokenizer


class TextStream:
    """Text of ids that come one by one; what it has given out so far is the beginning of `decode` of all of them.

    It decodes the last few ids only: those behind the last whole text and those that it was made of, so that spaces
    at borders are what they are in the whole. before: ids that the text continues (a prompt).
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.window = list(before)
        self.shown = len(self.decode())  # characters of the window's text that have been given out
        self.fresh: list[int] = []  # ids of the window behind those characters

    def decode(self) -> str:
        return self.tokenizer.decode(self.window) if self.window else ""

    def push(self, token: int) -> str:
        """The text that is certain after one more id.

        U+FFFD at the end is held back: it may be half a character, and some decoders give it for a whole run of bytes
        whose last character is not whole.
        """
        self.window.append(token)
        self.fresh.append(token)
        text = self.decode()
        whole = len(text.rstrip("\ufffd"))
        certain = text[self.shown : whole]
        self.shown += len(certain)
        if certain and self.shown == len(text):
            self.window, self.fresh = self.fresh, []
            self.shown = len(self.decode())
        return certain

    def finish(self) -> str:
        """What was held back."""
        rest = self.decode()[self.shown :]
        self.shown += len(rest)
        return rest


class StopStrings:
    """Text that passes until it meets a stop string; what may be the beginning of one waits."""

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown after some more; once a stop string is found, nothing any more."""
        self.held += text
        if self.found or not self.stop:
            return "" if self.found else self.release(len(self.held))
        places = [place for s in self.stop if (place := self.held.find(s)) >= 0]
        if places:
            self.found = True
            return self.release(min(places))
        return self.release(len(self.held) - max(overlap(self.held, s) for s in self.stop))

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        return "" if self.found else self.release(len(self.held))

    def release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string that is not whole."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
