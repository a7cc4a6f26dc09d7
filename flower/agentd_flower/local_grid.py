"""A Grid in this process: messages go straight to a ClientApp, one after the other. For tests, and for a look at many
boards without Ray; what travels is the same."""

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """`nodes` are the ids of all boards; `alive`, asked anew whenever someone asks who is there, those that are."""

    def __init__(self, app: ClientApp, nodes: Sequence[int], alive: Callable[[], Iterable[int]] | None = None) -> None:
        self._app, self._alive = app, alive or (lambda: nodes)
        self.sent = 0  # messages
        # Messages say which run and task they are of, which Flower's runtimes tell the process.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self._alive())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            self.sent += 1
            node = message.metadata.dst_node_id
            context = Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={})
            replies.append(self._app(message, context))
        return replies

    # --- what a strategy does not ask for

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError
