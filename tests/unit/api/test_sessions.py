import pytest
from starlette.datastructures import Headers

from agentd.api.sessions import TOKEN_SECONDS, Sessions, cookie_name
from agentd.errors import FromWebPage, NoSession

HOST = "127.0.0.1:8000"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(clock)


def headers(cookie: str = "", origin: str | None = None, host: str = HOST, **more: str) -> Headers:
    named = {"host": host, **more} | ({"cookie": f"{cookie_name({'host': host})}={cookie}"} if cookie else {})
    return Headers(named | ({} if origin is None else {"origin": origin}))


def test_a_token_is_good_once(sessions: Sessions) -> None:
    token = sessions.offer("uid:7")
    cookie = sessions.begin(token)
    session = sessions.of("GET", headers(cookie))
    assert session is not None
    assert session.author == "uid:7"
    with pytest.raises(NoSession):
        sessions.begin(token)


@pytest.mark.parametrize("token", ["", "x", "é" * 40, "\udc00"])
def test_what_was_never_offered_begins_nothing(sessions: Sessions, token: str) -> None:
    sessions.offer(None)
    with pytest.raises(NoSession):
        sessions.begin(token)


def test_a_token_that_lay_about_begins_nothing(sessions: Sessions, clock: Clock) -> None:
    token = sessions.offer(None)
    clock.now += TOKEN_SECONDS
    with pytest.raises(NoSession):
        sessions.begin(token)


def test_a_session_ends_after_a_while_and_when_it_is_told_to(sessions: Sessions, clock: Clock) -> None:
    cookie = sessions.begin(sessions.offer(None))
    for _ in range(30):  # it is used, so it goes on; but not for ever
        clock.now += 8 * 3600
        if sessions.of("GET", headers(cookie)) is None:
            break
    else:
        pytest.fail("it never ended")
    idle = sessions.begin(sessions.offer(None))
    clock.now += 13 * 3600
    assert sessions.of("GET", headers(idle)) is None
    other = sessions.begin(sessions.offer(None))
    sessions.end(headers(other))
    assert sessions.of("GET", headers(other)) is None


@pytest.mark.parametrize(
    ("origin", "more"),
    [
        (None, {}),
        ("", {}),
        ("null", {}),
        ("http://evil.example", {}),
        ("http://127.0.0.1:8001", {}),
        ("http://127.0.0.1", {}),
        ("http://127.0.0.1:8000@evil.example", {}),
        (f"http://{HOST}", {"sec-fetch-site": "cross-site"}),
        (f"http://{HOST}", {"sec-fetch-site": "same-site"}),
    ],
)
def test_other_pages_change_nothing(sessions: Sessions, origin: str | None, more: dict[str, str]) -> None:
    cookie = sessions.begin(sessions.offer(None))
    with pytest.raises(FromWebPage):
        sessions.of("POST", headers(cookie, origin, **more))
    assert sessions.of("POST", headers(cookie, f"http://{HOST}")) is not None
    assert sessions.of("POST", headers(cookie, f"https://{HOST}", **{"sec-fetch-site": "same-origin"})) is not None


def test_a_cookie_of_another_port_or_with_a_slip_is_none(sessions: Sessions) -> None:
    cookie = sessions.begin(sessions.offer(None))
    assert sessions.of("GET", headers(cookie[:-1])) is None
    assert sessions.of("GET", Headers({"host": "127.0.0.1:9", "cookie": f"agentd-8000={cookie}"})) is None
    for strange in ("\x00", "a=b; =;", "agentd-8000", 'agentd-8000="'):
        assert sessions.of("GET", Headers({"host": HOST, "cookie": strange})) is None


def test_secrets_are_not_kept(sessions: Sessions) -> None:
    token = sessions.offer(None)
    assert token not in repr(vars(sessions))
    cookie = sessions.begin(token)
    assert cookie not in repr(vars(sessions))


def test_what_is_kept_is_bounded(sessions: Sessions) -> None:
    first = sessions.offer(None)
    tokens = [sessions.offer(None) for _ in range(200)]
    with pytest.raises(NoSession):
        sessions.begin(first)
    cookies = [sessions.begin(sessions.offer(None)) for _ in range(200)]
    assert sessions.of("GET", headers(cookies[0])) is None
    assert sessions.of("GET", headers(cookies[-1])) is not None
    assert sum(len(known) for known in vars(sessions).values() if isinstance(known, dict)) < 200
    assert tokens
