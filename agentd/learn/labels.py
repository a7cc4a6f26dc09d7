"""What a label is made of: what is seen of it."""

import re
import unicodedata

INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]"
    "|[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
    "|^[\u200c\u200d]+|[\u200c\u200d]+$"
)
"""Control characters that are no blanks, and what Unicode calls default ignorable: soft hyphen, zero-width space,
marks, embeddings and isolates of direction, word joiner, invisible operators, fillers, byte order mark; joiners where
they join nothing. Variation selectors and tags stay: emoji are made of them."""


def normal_label(label: str) -> str:
    """A label as it is stored: NFC, without invisible characters and blanks around it; its case is kept."""
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", label)).split())
