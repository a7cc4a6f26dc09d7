"""The ledger of the zeroth-order part of an int8 run: 10 bytes a step, enough to make its weights again bit for bit.

A step is (seed, sign, bits); the noise (r_max, density) and the cutoff are the run's. Layers above the cutoff learn by
BP and are stored as weights, not here. The file has the format of every ledger (learn/ledger.py).
"""

from dataclasses import astuple, dataclass, field

from agentd.int8.elastic import ElasticInt8
from agentd.int8.network import Int8Network
from agentd.int8.noise import Noise
from agentd.learn.ledger import LedgerFormat, check_seed

_FORMAT = LedgerFormat(b"AGENTDI8", run="HHI", record="Qbb")  # r_max, density, bp_layers; seed, sign, bits


@dataclass(frozen=True)
class SignStep:
    """One update: W <- clip(W - sign z(seed) cut to `bits`)."""

    seed: int
    sign: int
    bits: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.sign not in (-1, 0, 1):
            raise ValueError(f"the sign of the step with seed {self.seed} is {self.sign}")
        if not -128 <= self.bits <= 127:
            raise ValueError(f"the step with seed {self.seed} has {self.bits} bits")


@dataclass
class SignLedger:
    """The steps of a run in the order they were applied, on top of revision `parent`."""

    parent: int
    noise: Noise
    bp_layers: int
    steps: list[SignStep] = field(default_factory=list)


def replay(ledger: SignLedger, network: Int8Network) -> None:
    """Applies every update to `network`, in place: the parent's weights become the run's, below the cutoff."""
    run = ElasticInt8(network, ledger.bp_layers, ledger.noise)
    for step in ledger.steps:
        run.update_zo(step.seed, step.sign, step.bits)


def encode(ledger: SignLedger) -> bytes:
    """The ledger in its file format. Equal ledgers give equal bytes."""
    run = ledger.noise.r_max, ledger.noise.density, ledger.bp_layers
    return _FORMAT.encode(ledger.parent, run, [astuple(step) for step in ledger.steps])


def decode(data: bytes) -> SignLedger:
    """The ledger in `data`. Raises ValueError saying what is wrong with it."""
    parent, (r_max, density, bp_layers), records = _FORMAT.decode(data)
    return SignLedger(parent, Noise(r_max, density), bp_layers, [SignStep(*record) for record in records])
