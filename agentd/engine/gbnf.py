"""llama.cpp's grammars (GBNF) in the form that llguidance takes (Lark), with the same language. Pure.

Every character becomes a lexeme of its own. llguidance's lexer takes the longest lexeme that it can: with longer ones,
as its own converter makes them, `[a-z]+ "x"` could never end, and `("a" | "aab") "ac"` would refuse `aac`.
"""

from dataclasses import dataclass

from agentd.errors import InvalidRequest

DEPTH = 40  # of nested groups; llguidance takes 49
_LONGEST = 1 << 16  # characters of a grammar
_MOST = 10_000  # repetitions that may be asked for
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_NEVER = ("{0}", "{0,0}")  # which llguidance has not
_HEX = {"x": 2, "u": 4, "U": 8}


def to_lark(text: str, n_vocab: int) -> str:
    """The grammar of rule `root` over a vocabulary of `n_vocab` tokens. Raises InvalidRequest saying what is wrong and
    on which line."""
    if len(text) > _LONGEST:
        raise InvalidRequest(f"a grammar may have {_LONGEST} characters, and this one has {len(text)}", param="grammar")
    parser = _Parser(text, n_vocab)
    rules = parser.rules()
    if "root" not in rules:
        raise InvalidRequest("the grammar is not valid GBNF: it has no rule `root`", param="grammar")
    numbers = {name: f"r{i}" for i, name in enumerate(rules)}
    for name, place in parser.references.items():
        if name not in rules:
            raise parser.wrong(f"there is no rule `{name}`", place)
    lines = [f"start: {numbers['root']}"]
    for name, rule in rules.items():
        lines.append(
            f"{numbers[name]}: " + "".join(numbers[part.name] if isinstance(part, _Rule) else part for part in rule)
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Rule:
    """A rule's name in the body of another one."""

    name: str


_Body = list["str | _Rule"]


class _Parser:
    """Recursive descent, as in llama.cpp's llama-grammar.cpp."""

    def __init__(self, text: str, n_vocab: int) -> None:
        self._text, self._at, self._n_vocab = text, 0, n_vocab
        self.references: dict[str, int] = {}

    def rules(self) -> dict[str, _Body]:
        """The body of every rule; parts of it are Lark, or names of rules."""
        rules: dict[str, _Body] = {}
        self._space(newlines=True)
        while self._at < len(self._text):
            place = self._at
            name = self._name()
            self._space()
            if not self._text.startswith("::=", self._at):
                raise self.wrong("`::=` is expected")
            self._at += 3
            self._space(newlines=True)
            if name in rules:
                raise self.wrong(f"rule `{name}` is there twice", place)
            rules[name] = self._alternatives(0)
            if self._peek() not in "\r\n":
                raise self.wrong(f"{self._peek()!r} is not expected")
            self._space(newlines=True)
        return rules

    def wrong(self, what: str, place: int | None = None) -> InvalidRequest:
        place = self._at if place is None else place
        line = self._text.count("\n", 0, place) + 1
        column = place - (self._text.rfind("\n", 0, place) + 1) + 1
        return InvalidRequest(f"the grammar is not valid GBNF: line {line}, column {column}: {what}", param="grammar")

    def _alternatives(self, depth: int) -> _Body:
        body = self._sequence(depth)
        while self._peek() == "|":
            self._at += 1
            self._space(newlines=True)
            body += [" | ", *self._sequence(depth)]
        return body

    def _sequence(self, depth: int) -> _Body:
        body: _Body = []
        while (head := self._peek()) and head not in "|)\r\n":
            body += [" ", *self._repeated(self._element(head, depth), depth)]
            self._space(newlines=depth > 0)
        return body or ['""']

    def _element(self, head: str, depth: int) -> _Body:
        if head == '"':
            return ["(", *self._literal(), ")"]
        if head == "[":
            return [self._class()]
        if head == ".":
            self._at += 1
            return [r"/[\x{0}-\x{10FFFF}]/"]
        if head in "<!":
            return [self._token()]
        if head == "(":
            if depth == DEPTH:
                raise self.wrong(f"groups are nested more than {DEPTH} deep")
            self._at += 1
            self._space(newlines=True)
            inner = self._alternatives(depth + 1)
            if self._peek() != ")":
                raise self.wrong("`)` is expected")
            self._at += 1
            return ["(", *inner, ")"]
        place = self._at
        name = self._name()
        self.references.setdefault(name, place)
        return [_Rule(name)]

    def _literal(self) -> _Body:
        self._at += 1
        body: _Body = []
        while (head := self._peek()) != '"':
            if not head:
                raise self.wrong("a text is not closed")
            body.append(f"/{_regex(self._character())}/ ")
        self._at += 1
        return body or ['""']

    def _class(self) -> str:
        place = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges = ""
        while (head := self._peek()) != "]":
            if not head:
                raise self.wrong("a class of characters is not closed")
            first = last = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._character()
                if last < first:
                    raise self.wrong(f"the range {first!r} to {last!r} is empty", place)
            ranges += f"{_regex(first)}-{_regex(last)}"
        self._at += 1
        if not ranges:
            if negated:
                return r"/[\x{0}-\x{10FFFF}]/"
            raise self.wrong("a class of no characters can never be met", place)
        return f"/[{'^' if negated else ''}{ranges}]/"

    def _token(self) -> str:
        """<[NUMBER]>: a token itself. By name or negated is what llguidance cannot take here."""
        place = self._at
        end = self._text.find("]>", place)
        number = self._text[place + 2 : end]
        if not self._text.startswith("<[", place) or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise self.wrong("only `<[number]>` names a token here, not its text and not what it must not be", place)
        if int(number) >= self._n_vocab:
            raise self.wrong(f"there is no token {int(number)}; the vocabulary has {self._n_vocab}", place)
        self._at = end + 2
        return f"<[{int(number)}]>"

    def _repeated(self, body: _Body, depth: int) -> _Body:
        place, repeated = self._at, False
        self._space(newlines=depth > 0)
        while (head := self._peek()) and head in "*+?{":
            self._at += 1
            if repeated:  # a+* is an operator on what another one made
                body = ["(", *body, ")"]
            bounds = head if head != "{" else self._bounds(place)
            body, repeated = ['""'] if bounds in _NEVER else [*body, bounds], True
            place = self._at
            self._space(newlines=depth > 0)
        return body

    def _bounds(self, place: int) -> str:
        end = self._text.find("}", self._at)
        low, comma, high = (part.strip() for part in self._text[self._at : max(end, self._at)].partition(","))
        if end < 0 or any(not (n.isascii() and n.isdigit() and len(n) < 10) for n in (low, high or low)):
            raise self.wrong("repetition is `{2}`, `{2,}` or `{2,5}`", place)
        if max(int(low), int(high or low)) > _MOST:
            raise self.wrong(f"more than {_MOST} repetitions", place)
        if high and int(high) < int(low):
            raise self.wrong(f"at least {int(low)} and at most {int(high)} repetitions cannot both hold", place)
        self._at = end + 1
        return f"{{{int(low)}{',' if comma else ''}{int(high) if high else ''}}}"

    def _character(self) -> str:
        """One character of a text or class, at which the place stands."""
        place, head = self._at, self._peek()
        self._at += 1
        if head != "\\":
            return head
        kind = self._peek()
        self._at += 1
        if kind in _HEX:
            digits = self._text[self._at : self._at + _HEX[kind]]
            self._at += len(digits)
            try:
                return chr(int(digits, 16)).encode().decode()
            except (ValueError, OverflowError):
                raise self.wrong(f"`\\{kind}{digits}` is no character", place) from None
        if kind not in _ESCAPES or not kind:
            raise self.wrong(f"`\\{kind}` is no escape", place)
        return _ESCAPES[kind]

    def _name(self) -> str:
        start = self._at
        while (head := self._peek()) and ((head.isascii() and head.isalnum()) or head in "-_"):
            self._at += 1
        if self._at == start:
            raise self.wrong("the name of a rule is expected")
        return self._text[start : self._at]

    def _space(self, *, newlines: bool = False) -> None:
        while head := self._peek():
            if head == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif head in " \t" or (newlines and head in "\r\n"):
                self._at += 1
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]


def _regex(character: str) -> str:
    return f"\\x{{{ord(character):X}}}"
