"""The text of one row while it grows: pieces that are certain, and stop strings.

A piece is given out as soon as no later token can change or cut it. Held back are the end of a text that is
no whole UTF-8 yet, which tokenizers show as U+FFFD, and an end with which a stop string could begin.
"""


class Pieces:
    """New ids of one row; `add` gives what became certain of their text, where there is a tokenizer."""

    def __init__(self, ends: set[int], tokenizer=None, stop: tuple[str, ...] = ()):
        self.ends, self.tokenizer, self.stop = ends, tokenizer, stop
        self.ids, self.done = [], False
        self.text, self.sent = "", 0  # characters given out

    def add(self, token: int) -> str:
        if token in self.ends:
            return self.end()
        self.ids.append(token)
        if self.tokenizer is None:
            return ""
        self.text = self.tokenizer.decode(self.ids)
        found = [at for at in (self.text.find(stop, self.sent) for stop in self.stop) if at >= 0]
        if found:
            self.ids = cut(self.tokenizer, self.ids, min(found))
            self.text = self.text[: min(found)]
            return self.end()
        whole = self.text.rstrip("\ufffd")
        return self._send(len(whole) - begun(whole, self.stop))

    def end(self) -> str:
        """No token follows."""
        self.done = True
        return self._send(len(self.text))

    def _send(self, until: int) -> str:
        piece = self.text[self.sent : until]
        self.sent = max(self.sent, until)
        return piece


def begun(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)


def cut(tokenizer, ids: list[int], at: int) -> list[int]:
    """Ids of the first `at` characters of a text.

    A token that reaches further is replaced by others for its first part; where the tokenizer has none that
    give the same text, it is left out.
    """
    text, whole = tokenizer.decode(ids)[:at], len(ids)
    while not text.startswith(tokenizer.decode(ids[:whole])):
        whole -= 1
    rest = text[len(tokenizer.decode(ids[:whole])) :]
    spelled = ids[:whole] + (tokenizer.encode(rest) if rest else [])
    return spelled if tokenizer.decode(spelled) == text else ids[:whole]
