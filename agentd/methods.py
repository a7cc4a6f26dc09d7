"""The learning methods by name, which engine has which, and what sets them apart; and what they raise."""

from typing import Literal, get_args

Method = Literal[
    "auto",
    "mezo",
    "sparse-mezo",
    "mezo-lora",
    "adazeta",
    "suffix-bp",
    "elasticzo",
    "loho",
    "blockwise-bp",
    "bp",
    "lora",
]
Objective = Literal["likelihood", "metric"]
"""What a pass raises, of right answers: how likely they are, or their share."""
NAMES: tuple[str, ...] = get_args(Method)
OF_ENGINE: dict[str, tuple[str, ...]] = {
    "llamacpp": ("mezo", "suffix-bp", "elasticzo", "blockwise-bp"),
    "transformers": ("mezo", "sparse-mezo", "mezo-lora", "adazeta", "elasticzo", "loho", "bp", "lora"),
    "int8": ("mezo", "suffix-bp", "elasticzo"),
}
"""`auto` leaves the choice among them to the planner."""

BLOCKWISE = "blockwise-bp"
FORWARD_ONLY = ("mezo", "sparse-mezo", "mezo-lora", "adazeta")
CHANGES = ("mezo-lora", "adazeta", "lora")
"""Those that move low-rank changes beside the weights of engine transformers instead of these."""
