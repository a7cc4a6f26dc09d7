"""When an answer opens a call, seen in the bytes of its tokens. Pure."""

from collections.abc import Sequence

from agentd.engine.calls.format import Around


class TriggerWatch:
    """`triggers` open a call; with `anchored` only where the answer begins. What is within the reasoning does not
    count; `thinking`: the answer begins there."""

    def __init__(self, triggers: Sequence[str], anchored: bool, reasoning: Around | None, thinking: bool) -> None:
        self._triggers = [trigger.encode() for trigger in triggers]
        self._anchored, self._thinking, self._started = anchored, thinking, False
        self._opening = reasoning.opening.encode() if reasoning else b""
        self._closing = reasoning.closing.encode() if reasoning else b""
        self._seen = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """(the trigger, what came behind it) once there is one."""
        self._seen += data
        if self._thinking and not self._over():
            return None
        head = self._seen.lstrip()
        if not self._started and self._opening:
            if head.startswith(self._opening):
                self._seen, self._thinking = head[len(self._opening) :], True
                return self.feed(b"")
            if head.startswith(self._closing):
                self._seen = head[len(self._closing) :]
                return self.feed(b"")
        places = [(at, trigger) for trigger in self._triggers if (at := self._place(trigger)) >= 0]
        if places:
            at, trigger = min(places, key=lambda place: (place[0], -len(place[1])))
            return trigger, self._seen[at + len(trigger) :]
        if head and not any(text.startswith(head) for text in (*self._triggers, self._opening, self._closing)):
            self._started = True
        if self._started:
            longest = max(map(len, self._triggers), default=1)
            self._seen = b"" if self._anchored else self._seen[max(0, len(self._seen) - longest + 1) :]
        return None

    def _over(self) -> bool:
        at = self._seen.find(self._closing)
        if at < 0:
            self._seen = self._seen[max(0, len(self._seen) - len(self._closing) + 1) :]
            return False
        self._seen, self._thinking = self._seen[at + len(self._closing) :], False
        return True

    def _place(self, trigger: bytes) -> int:
        at = self._seen.find(trigger)
        if self._anchored and at >= 0 and (self._started or self._seen[:at].strip()):
            return -1
        return at
