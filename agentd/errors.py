"""One class per failure; each builds its own message from the facts it is given.

`status`, `type` and `code` are what an HTTP client sees of it: `{"error": {"message", "type", "code"}}`.
"""

from collections.abc import Sequence


class AgentdError(Exception):
    """Base of every error agentd raises on purpose."""

    status = 500
    type = "server_error"
    code = "internal_error"
    exit_status = 1  # of the daemon, when this keeps it from starting; sysexits.h where that has a number


class InvalidRequest(AgentdError):
    """The request itself is wrong; sending it again unchanged will fail again."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotSupported(InvalidRequest):
    """A field of the OpenAI API that this daemon knows and does not implement."""

    status = 501
    type = "not_supported_error"
    code = "not_supported"


class FieldNotSupported(NotSupported):
    """It would change the answer, so it is not passed over."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    def __init__(self, n_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {n_tokens} tokens, and the model's context here holds {limit} including the answer; "
            f"shorten the prompt or raise model.context",
            param="messages",
        )


class ConstraintTooComplex(InvalidRequest):
    """A schema or grammar that would take more time or memory than one request may."""

    code = "constraint_too_complex"

    def __init__(self, reason: str) -> None:
        super().__init__(f"this schema or grammar is too complex: {reason}", param="response_format")


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"

    def __init__(self, limit: int, key: str) -> None:
        super().__init__(f"the request body is larger than {limit} bytes ({key}); send less at a time, or raise {key}")


class BodyTooSlow(InvalidRequest):
    status = 408
    code = "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing more of the request body came for {seconds:g} s; send it again")


class FromWebPage(InvalidRequest):
    """A browser sends `Origin` with every POST of a page: without a check, any web site could teach the model."""

    status = 403
    code = "forbidden_origin"

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"requests of web pages are not served (Origin: {origin[:200]}), but for those of serve.origins over TCP",
            param="Origin",
        )


class HostNotServed(InvalidRequest):
    """Without keys, whoever is asked for by another name than this machine's own may be a page's idea of it."""

    status = 421
    code = "host_not_served"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"without an API key this port is for localhost, for addresses and for the hosts of serve.origins, not for "
            f"{host[:200]!r}",
            param="Host",
        )


class CredentialsMissing(InvalidRequest):
    status = 401
    type = "authentication_error"
    code = "missing_api_key"

    def __init__(self, scope: str) -> None:
        super().__init__(
            f"this needs an API key of scope {scope}: send Authorization: Bearer KEY (`agentctl key add` makes one)"
        )


class WrongCredentials(InvalidRequest):
    """The message must not repeat what was sent: it may be a key with a slip."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("this API key is not known here, or was revoked (`agentctl key list`)")


class TooManyRequests(InvalidRequest):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; wait a minute")


class OutOfScope(InvalidRequest):
    status = 403
    type = "permission_error"
    code = "insufficient_scope"

    def __init__(self, needed: str, scopes: Sequence[str]) -> None:
        super().__init__(f"this needs the scope {needed}; you have {', '.join(scopes) or 'none'}")


class NoSession(InvalidRequest):
    """A browser that was not let in, or was too long ago."""

    status = 401
    type = "authentication_error"
    code = "no_session"


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"

    def __init__(self, noun: str, identifier: object) -> None:
        super().__init__(f"there is no {noun} {str(identifier)!r}")


class UnknownModel(NotFound):
    code = "model_not_found"

    def __init__(self, name: str, known: str) -> None:
        super().__init__("model", name)
        self.args = (f"there is no model {name!r} here; send {known!r} (GET /v1/models), or leave it out",)
        self.param = "model"


class NotALanguageModel(InvalidRequest):
    code = "not_a_language_model"

    def __init__(self, name: str, instead: str = "it answers POST /v1/classify") -> None:
        super().__init__(f"the model {name!r} is a classifier, no language model; {instead}")


class NotAClassifier(InvalidRequest):
    code = "not_a_classifier"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the model {name!r} is a language model; POST /v1/classify needs a classifier (engine: int8). "
            f"To have text classified, send a chat completion with choices"
        )


class Conflict(InvalidRequest):
    status = 409
    type = "conflict_error"
    code = "conflict"


class OtherBase(Conflict):
    """What a fleet learns means nothing on this board's model."""

    code = "other_base"


class NoConsent(InvalidRequest):
    """A fleet asks for what the owner has not agreed to; asking again changes nothing."""

    status = 403
    type = "permission_error"
    code = "no_consent"


class NotNow(AgentdError):
    """Something may be asked for again later: the owner, the device or other work has the say at the moment."""

    status = 503
    type = "unavailable_error"
    code = "not_now"

    def __init__(self, reason: str) -> None:
        super().__init__(f"not now: {reason}")


class InvalidLine(InvalidRequest):
    """One line of a JSONL body cannot be used; nothing of the body was stored."""

    code = "invalid_line"

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}; nothing of this file was stored", param=f"line {number}")
        self.number = number


class TooMuchFeedback(InvalidRequest):
    status = 429
    type = "rate_limit_error"
    code = "too_much_feedback"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} pieces of feedback of this source wait in quarantine (feedback.max_quarantined); "
            f"release or forget some, and send less a minute"
        )


class LabelNotInChoices(InvalidRequest):
    code = "label_not_in_choices"

    def __init__(self, label: str, task: str, choices: Sequence[str]) -> None:
        listed = ", ".join(repr(choice) for choice in choices)
        super().__init__(f"label {label!r} is not one of the choices of task {task!r}: {listed}", param="value")


class Overloaded(AgentdError):
    status = 503
    type = "unavailable_error"
    code = "overloaded"

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already (serve.queue); try again shortly")


class EngineUnavailable(AgentdError):
    """The engine process is starting, restarting, stopping, or could not load the model."""

    status = 503
    type = "unavailable_error"
    code = "engine_unavailable"


class EngineDied(EngineUnavailable):
    """The engine process ended while it worked on a request that had begun to answer."""

    code = "engine_died"

    def __init__(self, detail: str = "") -> None:
        super().__init__(f"the engine stopped while it worked on this request{detail and ': ' + detail}; send it again")


class EndsTheEngine(AgentdError):
    """Not worth sending again: clients repeat requests that got a 5xx."""

    status = 422
    type = "invalid_request_error"
    code = "request_ends_engine"

    def __init__(self, deaths: int) -> None:
        super().__init__(
            f"the engine died {deaths} times while it served this request, so it is not tried again for some minutes; "
            "change the request, and please report it"
        )


class StorageFull(AgentdError):
    status = 507
    exit_status = 73
    type = "storage_error"
    code = "storage_full"

    def __init__(self, detail: str) -> None:
        super().__init__(f"nothing was stored: {detail}; free some space under state.dir and send it again")


class StorageFailed(AgentdError):
    """The database or a file of the state cannot be read or written, for another reason than a full disk."""

    type = "storage_error"
    code = "storage_failed"
    exit_status = 74

    def __init__(self, detail: str) -> None:
        super().__init__(f"the state cannot be read or written: {detail}")


class ModelUnusable(AgentdError):
    """The model file is missing, is no GGUF, is cut short, or needs more than this build knows."""

    code = "model_unusable"
    exit_status = 66

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"cannot use the model {path}: {reason}")


class CannotRequantise(AgentdError):
    """A model cannot be written in another quantisation, or there is no place for it."""

    code = "cannot_requantise"

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"cannot requantise {path}: {reason}")


class InvalidConfig(AgentdError):
    """Every mistake of a configuration, reported at once."""

    exit_status = 78

    def __init__(self, source: object, problems: Sequence[str]) -> None:
        super().__init__("\n".join([f"{len(problems)} problem(s) in {source}:", *(f"  {line}" for line in problems)]))
        self.problems = list(problems)


class StateDirLocked(AgentdError):
    exit_status = 75

    def __init__(self, path: object, pid: str) -> None:
        super().__init__(
            f"another agentd (pid {pid}) already uses the state directory {path}; stop it, or set another state.dir"
        )


class CannotListen(AgentdError):
    exit_status = 69

    def __init__(self, address: object, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")


class StateTooNew(AgentdError):
    exit_status = 65

    def __init__(self, path: object, unknown: Sequence[str]) -> None:
        super().__init__(
            f"{path} was written by a newer agentd (it has {', '.join(unknown)}); it was not touched. "
            f"Install that version, or point state.dir elsewhere"
        )


class StateTooOld(AgentdError):
    exit_status = 65

    def __init__(self, path: object, applied: Sequence[str]) -> None:
        super().__init__(
            f"{path} was written by an agentd from before the first release (its schema is {applied[-1]}), whose state "
            f"this version does not read; it was not touched. Move the state directory away to start afresh, point "
            f"state.dir elsewhere, or install the version that wrote it"
        )


class PassRefused(AgentdError):
    """A pass that did not start, because something it needs is not there. `shortfall` is in bytes, 0 if not memory."""

    status = 409
    type = "conflict_error"
    code = "pass_refused"

    def __init__(self, reason: str, shortfall: int = 0) -> None:
        super().__init__(reason)
        self.shortfall = shortfall


class PassFailed(AgentdError):
    code = "pass_failed"


class RevisionCorrupt(AgentdError):
    code = "revision_corrupt"

    def __init__(self, revision: int | str, reason: str) -> None:
        super().__init__(f"revision {revision} cannot be used: {reason}")


class CrashLoop(RevisionCorrupt):
    """A revision whose files are intact, and under which the engine died on a canary prompt, too."""

    def __init__(self, revision: int, times: int, what: str) -> None:
        super().__init__(
            revision, f"the {what} died {times} times in a row while it served, and the engine on a canary prompt, too"
        )


class ServiceNotInstalled(AgentdError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the service is not installed: {reason}")


class BackupUnusable(AgentdError):
    code = "backup_unusable"
    exit_status = 65

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"cannot restore {path}: {reason}")


class TrainerFailed(PassFailed):
    code = "trainer_failed"


class TrainerKilled(TrainerFailed):
    """The trainer was ended with SIGKILL. Where memory is short it is the first that the kernel chooses."""

    def __init__(self, message: str = "the trainer was killed, which the kernel does when memory is short") -> None:
        super().__init__(message)


class TrainerOverLimit(TrainerKilled):
    """The kernel ended the trainer: at the limit of its control group, or of one above, where it is the first to go."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the kernel ended the trainer: it needed more than the {limit / 1e6:.0f} MB it was allowed, or others "
            f"took the memory"
        )
