"""The ClientApp: what Flower asks of a board, asked of the board's daemon over its admin socket and of nothing else.

`flower-supernode --node-config "admin-socket='/run/agentd/admin.sock' superlink='fleet.example:9092'"` says where that
is, and who the fleet's server is, which `agentctl fleet` then shows to the owner.
"""

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from agentd_flower import rounds
from agentd_flower.board import JSON, Board, default_socket
from agentd_flower.rounds import CLOCK, Clock, Daemon, Outcome

ORDER, ANSWER = "order", "answer"  # records of messages to boards, and of their replies
_NAMES = ("fleet", "run", "number", "base_sha256", "engine", "dtype")
_WISHES = ("kinds", "first_seed", "seeds")


def socket_of(context: Context) -> Daemon:
    return Board(Path(str(context.node_config.get("admin-socket") or default_socket())))


def client_app(daemon: Callable[[Context], Daemon] = socket_of, clock: Clock = CLOCK) -> ClientApp:
    """A ClientApp whose board is reached as `daemon` says."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _reply(message, rounds.query(daemon(context), str(_order(message)["fleet"])))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = _order(message)
        wish = {**_asked(order, context), **{name: order[name] for name in _WISHES}, "state": order["state"] or None}
        return _reply(message, rounds.train(daemon(context), wish, order["data"], order["patience"], clock))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        order = _order(message)
        return _reply(
            message, rounds.take(daemon(context), _asked(order, context), order["data"], order["patience"], clock)
        )

    return app


def _order(message: Message) -> JSON:
    return dict(message.content.config_records[ORDER])


def _asked(order: JSON, context: Context) -> JSON:
    peer = str(context.node_config.get("superlink") or "")
    return {name: order[name] for name in _NAMES} | ({"peer": peer[:200]} if peer else {})


def _reply(message: Message, outcome: Outcome) -> Message:
    """Facts that are null are left out: records have no null."""
    facts = {name: value for name, value in (outcome.facts or {}).items() if value is not None}
    answer = ConfigRecord({"status": outcome.status, "message": outcome.message, "data": outcome.data, **facts})
    return Message(RecordDict({ANSWER: answer}), reply_to=message)


app = client_app()
