"""Frameworks in which a model acts by itself: openai-agents, pydantic-ai, langchain."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from tests.system.clients.support import MODEL, QUESTION, SHORT, Colour, Place, warmth

# openai-agents takes no answer over responses that was cut off; these fields of agentd's own let a random model end.
CHOICES = {"choices": ["warm", "cold"]}
END_SOON = {"logit_bias": {"2": 100}}  # the end of turn, as soon as calls are complete


class Agents:
    """openai-agents, over responses (its default) or chat completions."""

    def __init__(self, responses: bool) -> None:
        self._responses = responses

    def plain(self, place: Place) -> None:
        self._run(place, lambda runner, agent: runner.run(agent, QUESTION), extra_body=CHOICES)

    def stream(self, place: Place) -> None:
        async def run(runner: Any, agent: Any) -> Any:
            result = runner.run_streamed(agent, QUESTION)
            kinds = {event.data.type async for event in result.stream_events() if event.type == "raw_response_event"}
            assert "response.output_text.delta" in kinds
            return result

        self._run(place, run, extra_body=CHOICES)

    def tools(self, place: Place) -> None:
        from agents import function_tool

        self._run(
            place,
            lambda runner, agent: runner.run(agent, QUESTION),
            tools=[function_tool(warmth)],
            tool_choice="required",
            parallel_tool_calls=False,
            extra_body=END_SOON,
        )
        place.looped()

    def structured(self, place: Place) -> None:
        result = self._run(place, lambda runner, agent: runner.run(agent, QUESTION), output_type=Colour)
        assert isinstance(result.final_output, Colour)

    def turns(self, place: Place) -> None:
        async def run(runner: Any, agent: Any) -> Any:
            first = await runner.run(agent, QUESTION)
            return await runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And then?"}])

        self._run(place, run, extra_body=CHOICES)
        roles = [message["role"] for message in place.seen()["input"]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]

    def _run(
        self,
        place: Place,
        work: Callable[[Any, Any], Coroutine[Any, Any, Any]],
        *,
        tools: Any = (),
        output_type: Any = None,
        **settings: Any,
    ) -> Any:
        from agents import (
            Agent,
            ModelSettings,
            OpenAIChatCompletionsModel,
            OpenAIResponsesModel,
            Runner,
            set_tracing_disabled,
        )

        set_tracing_disabled(True)

        async def run() -> Any:
            async with place.asynchronous() as client:
                kind: Any = OpenAIResponsesModel if self._responses else OpenAIChatCompletionsModel
                agent = Agent(
                    name="a",
                    instructions="Be brief.",
                    model=kind(MODEL, client),
                    tools=list(tools),
                    output_type=output_type,
                    model_settings=ModelSettings(temperature=0, **settings),
                )
                return await work(Runner, agent)

        return asyncio.run(run())


class PydanticAI:
    def plain(self, place: Place) -> None:
        self._run(place, lambda agent: agent.run(QUESTION))

    def stream(self, place: Place) -> None:
        async def run(agent: Any) -> str:
            async with agent.run_stream(QUESTION) as result:
                return "".join([part async for part in result.stream_text(delta=True)])

        assert self._run(place, run)

    def tools(self, place: Place) -> None:
        def settings(context: Any) -> Any:
            choice = "required" if context.run_step < 2 else "none"
            return {"temperature": 0, "max_tokens": 200, "tool_choice": choice, "parallel_tool_calls": False}

        self._run(place, lambda agent: agent.run(QUESTION), tools=[warmth], model_settings=settings)
        place.looped()

    def structured(self, place: Place) -> None:
        """By a tool whose arguments are the output (the default), and by the schema of the answer."""
        from pydantic_ai import NativeOutput

        for kind in (Colour, NativeOutput(Colour)):
            settings = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}
            result = self._run(place, lambda agent: agent.run(QUESTION), output_type=kind, model_settings=settings)
            assert isinstance(result.output, Colour)

    def turns(self, place: Place) -> None:
        async def run(agent: Any) -> Any:
            first = await agent.run(QUESTION)
            return await agent.run("And then?", message_history=first.all_messages())

        self._run(place, run)
        assert [message["role"] for message in place.seen()["input"]["messages"]] == ["user", "assistant", "user"]

    def _run(self, place: Place, work: Callable[[Any], Coroutine[Any, Any, Any]], **options: Any) -> Any:
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        async def run() -> Any:
            async with place.asynchronous() as client:
                model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
                return await work(Agent(model, **{"model_settings": SHORT, **options}))

        return asyncio.run(run())


class LangChain:
    def plain(self, place: Place) -> None:
        answer = self._model(place).invoke(QUESTION)
        assert answer.usage_metadata["output_tokens"]

    def stream(self, place: Place) -> None:
        assert "".join(chunk.text for chunk in self._model(place).stream(QUESTION))

    def tools(self, place: Place) -> None:
        """bind_tools, and an agent."""
        from langchain.agents import create_agent
        from langchain.agents.middleware import wrap_model_call

        model = self._model(place, max_tokens=200)
        bound = model.bind_tools([warmth], tool_choice="required", parallel_tool_calls=False)
        (call,) = bound.invoke(QUESTION).tool_calls
        assert call["args"]["room"] in ("bath", "kitchen")

        def first_calls(request: Any, handler: Any) -> Any:
            choice = "required" if request.messages[-1].type == "human" else "none"
            return handler(request.override(tool_choice=choice, model_settings={"parallel_tool_calls": False}))

        middleware = [wrap_model_call(first_calls)]
        agent = create_agent(model, tools=[warmth], middleware=middleware)
        agent.invoke({"messages": [("user", QUESTION)]})
        place.looped()

    def structured(self, place: Place) -> None:
        for method in ("json_schema", "function_calling"):
            model = self._model(place, max_tokens=200).with_structured_output(Colour, method=method)
            assert isinstance(model.invoke(QUESTION), Colour)

    def turns(self, place: Place) -> None:
        first = self._model(place).invoke(QUESTION)
        self._model(place).invoke([("user", QUESTION), first, ("user", "And then?")])
        assert [message["role"] for message in place.seen()["input"]["messages"]] == ["user", "assistant", "user"]

    def _model(self, place: Place, **options: Any) -> Any:
        from langchain_openai import ChatOpenAI

        settings: Any = {**SHORT, **options, "http_client": place.http(), "max_retries": 0}
        return ChatOpenAI(model=MODEL, base_url=place.url, api_key="unused", use_responses_api=False, **settings)


class LLM:
    """llm's models in its own Python API; the client that they make is given the socket where that is asked for."""

    def plain(self, place: Place) -> None:
        assert self._model(place).prompt(QUESTION, stream=False, **SHORT).usage().output

    def stream(self, place: Place) -> None:
        assert "".join(self._model(place).prompt(QUESTION, stream=True, **SHORT))

    def tools(self, place: Place) -> None:
        import llm

        tool = llm.Tool.function(warmth)
        chain = self._model(place, calls_first=True).chain(QUESTION, tools=[tool], stream=False)
        chain.text()
        place.looped()

    def structured(self, place: Place) -> None:
        answer = self._model(place).prompt(QUESTION, schema=Colour, stream=False, temperature=0, max_tokens=200)
        Colour.model_validate(json.loads(answer.text()))

    def turns(self, place: Place) -> None:
        conversation = self._model(place).conversation()
        for _ in range(3):
            conversation.prompt("And then?", stream=False, **SHORT).text()
        assert len(place.seen()["input"]["messages"]) == 5

    def _model(self, place: Place, calls_first: bool = False) -> Any:
        from llm.default_plugins.openai_models import Chat

        chat = Chat(
            MODEL, model_name=MODEL, api_base=place.url, supports_schema=True, supports_tools=True, can_stream=True
        )
        chat.needs_key = None
        chat.get_client = lambda key, async_=False: place.client()
        build = chat.build_kwargs

        def build_kwargs(prompt: Any, stream: bool) -> Any:
            """llm has no option for tool_choice, and a random model calls nothing by itself."""
            choice = "none" if prompt.tool_results else "required"
            more = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200, "temperature": 0}
            return {**build(prompt, stream), **more}

        if calls_first:
            chat.build_kwargs = build_kwargs
        return chat
