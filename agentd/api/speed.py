"""POST /admin/speed: how many tokens a second the model reads and writes, measured on the engine that serves."""

import contextlib
import random
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.lenient import Body
from agentd.api.requests import parse
from agentd.api.services import Services, services
from agentd.engine.protocol import Generate, Sampling
from agentd.errors import Conflict, NotALanguageModel
from agentd.formats.gguf_header import Header
from agentd.ids import uuid7

_WORDS = (8, 32, 128, 512)  # of prompts; the next larger one is read while one takes less than
_SECONDS = 1.0
_TOKENS, _LONGEST = 64, 3.0  # of an answer, and seconds after which it is not waited for


async def speed(request: Request) -> Response:
    """Takes some seconds, in which nothing else should be served: others' requests would be measured, too."""
    await parse(request, Body, 1024)
    s = services(request)
    if s.model.classifier:
        raise NotALanguageModel(s.model_name)
    if s.activity.active:
        raise Conflict(f"{s.activity.active} requests are being served; measure when none is")
    prefill, tokens = await _prefill(s)
    return JSONResponse(
        {
            "prefill_tokens_per_second": prefill,
            "prompt_tokens": tokens,
            "decode_tokens_per_second": await _decode(s),
            "threads": s.config.model_threads,
            "quantisation": s.model.header.quantisation if isinstance(s.model.header, Header) else None,
        }
    )


async def _prefill(s: Services) -> tuple[float, int]:
    """Tokens a second, and the tokens of the longest prompt that was read."""
    room = s.supervisor.info.n_ctx if s.supervisor.info else 0
    rate, tokens = 0.0, 0
    for words in _WORDS:
        begin = time.monotonic()
        async for piece in s.supervisor.generate(_request(words, 1)):
            if piece.finish is not None:
                tokens = piece.prompt_tokens - piece.cached_tokens
        seconds = time.monotonic() - begin
        rate = tokens / seconds
        if seconds > _SECONDS or 5 * tokens > room:  # four times as many, with some to spare
            break
    return round(rate, 1), tokens


async def _decode(s: Services) -> float | None:
    """Tokens a second, from the first to the last; None where the answer had no two."""
    times: list[float] = []
    begin = time.monotonic()
    async with contextlib.aclosing(s.supervisor.generate(_request(_WORDS[0], _TOKENS))) as pieces:
        async for piece in pieces:
            times += [time.monotonic()] * len(piece.logprobs)
            if time.monotonic() - begin > _LONGEST and len(times) > 1:
                break
    between = len(times) - times.count(times[0]) if times else 0
    return round(between / (times[-1] - times[0]), 1) if between else None


def _request(words: int, tokens: int) -> Generate:
    """A prompt that no one sent before: nothing of it is there already."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompt = " ".join("".join(random.choices(letters, k=4)) for _ in range(words))
    return Generate("speed-" + uuid7(), {"prompt": prompt}, Sampling(), max_tokens=tokens, logprobs=0, private=True)
