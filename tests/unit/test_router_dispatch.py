"""What happens to a request when its workers refuse, fail, stall or die: real gRPC, fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import grpc
import grpc.aio
import pytest
from aiohttp import ClientResponse, ClientSession
from google.protobuf.duration_pb2 import Duration

from hma_serve.core.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    HmaError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.core.request import SamplingParams, Slo, StopConditions
from hma_serve.router import attempt
from hma_serve.router.admission import Held, Shed
from hma_serve.router.completion import CompletionRequest, Started
from hma_serve.router.grpc_api import SERVICE, InferenceServicer
from hma_serve.router.http.app import build_app
from hma_serve.router.http.limits import HttpLimits
from hma_serve.router.pipeline import Pipeline
from hma_serve.router.placement import Placement
from hma_serve.rpc import ChannelCache, GrpcServer
from hma_serve.telemetry.http import serve_app
from hma_serve.text import TokenizingPool
from hma_serve.v1 import inference_pb2, inference_pb2_grpc
from support.fake_fleet import LONG, SHORT, TOKENS, request, running_fleet, token_ids, tokens
from support.fake_workers import FakeDecode, running_pipeline, until
from support.metrics import counted


async def test_without_trouble_one_attempt_is_made() -> None:
    async with running_fleet() as (fleet, pipeline):
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls() == [1, 0, 1, 0]


@pytest.mark.parametrize(("waited", "most"), [(0, 600), (400, 200), (1000, 0)])
async def test_workers_are_told_what_is_left_of_the_time_to_the_first_token(waited: int, most: int) -> None:
    """Otherwise those that waited here would seem less urgent there than those that have just come."""
    now = asyncio.get_running_loop().time()
    job = attempt.Job(
        request_id="r",
        model="m",
        prompt=LONG,
        max_tokens=TOKENS,
        sampling=SamplingParams(),
        stop=StopConditions(),
        arrived=now - waited,
        deadline=now + 60,
        slo=Slo(ttft=600, tpot=0.5),
    )
    held = cast(Held, SimpleNamespace(placement=None))
    told = attempt.Attempt(job, held, 1, ChannelCache())._context().slo
    assert max(0, most - 100) <= told.ttft_seconds <= most
    assert told.tpot_seconds == 0.5
    without = attempt.Attempt(replace(job, slo=Slo()), held, 1, ChannelCache())._context().slo
    assert not without.HasField("ttft_seconds")


async def test_a_decode_that_fails_before_its_ticket_is_replaced() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].refusals = [FailedPrecondition("a profile that does not fit")]
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        first, second = fleet.decodes[0].calls[0], fleet.decodes[1].calls[0]
        assert (first.context.epoch, second.context.epoch) == (1, 2)
        assert first.context.request_id == second.context.request_id


async def test_a_decode_that_is_full_is_replaced_at_once() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].refusals = [ResourceExhausted("no pages")]
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls()[2:] == [1, 1]


async def test_when_the_only_decode_is_full_the_request_waits_for_its_next_report() -> None:
    decode = FakeDecode()
    decode.refusals = [ResourceExhausted("no pages") for _ in range(5)]
    async with running_pipeline(decode) as (pipeline, _):
        task = asyncio.create_task(tokens(pipeline, request(SHORT)))
        for refused in range(1, 6):
            await until(pipeline, lambda fleet: fleet.decodes[0].refused)
            assert len(decode.calls) == refused
            decode.report()
            await until(pipeline, lambda fleet: not fleet.decodes[0].refused)
            await until(pipeline, lambda fleet: fleet.decodes[0].placed > refused)  # noqa: B023
        assert await task == [1, 2, 3, 1, 2]
        assert len(decode.calls) == 6


@pytest.mark.parametrize("refusal", ["refusals", "failures"])
async def test_a_prefill_that_fails_is_replaced_and_its_decode_leg_cancelled(refusal: str) -> None:
    async with running_fleet() as (fleet, pipeline):
        setattr(fleet.prefills[0], refusal, [DataLoss("the accelerator is on fire")])
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        await fleet.until_idle()
        assert fleet.calls()[:2] == [1, 1]
        assert sum(decode.cancelled for decode in fleet.decodes) == 1


async def test_a_prefill_that_dies_in_mid_transfer_is_replaced() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].stalled = True
        task = asyncio.create_task(tokens(pipeline, request()))
        await fleet.prefills[0].until_active()
        await fleet.prefills[0].stop()
        assert await task == list(LONG[:TOKENS])
        [survivor] = [view for view in pipeline.keeper.fleet.prefills if view.open]
        assert survivor.info.instance == fleet.prefills[1].info.instance


async def test_a_prefill_that_fails_when_decode_has_the_prompt_does_no_harm() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].late_failures = [Internal("after the commit")]
        fleet.decodes[0].gate.clear()
        seen: list[int] = []
        prepared = await pipeline.completions.prepare(request())
        async for event in pipeline.completions.run(prepared):
            if isinstance(event, Started):
                fleet.prefills[0].late_gate.set()
                await until(pipeline, lambda view: not any(prefill.ours.requests for prefill in view.prefills))
                fleet.decodes[0].gate.set()
            seen += token_ids(event)
        assert seen == list(LONG[:TOKENS])
        assert fleet.calls() == [1, 0, 1, 0]


async def test_a_decode_that_dies_before_the_first_token_is_replaced() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].stall_after = 0
        task = asyncio.create_task(tokens(pipeline, request()))
        await fleet.decodes[0].until_active()
        await fleet.decodes[0].stop()
        assert await task == list(LONG[:TOKENS])
        away = [view.info.instance for view in pipeline.keeper.fleet.decodes if not view.open]
        assert away == [fleet.decodes[0].info.instance]


@pytest.mark.parametrize("error", [InvalidArgument("bad", field="seed"), Internal("a bug")])
async def test_what_no_other_pair_would_do_better_is_told(error: HmaError) -> None:
    async with running_fleet() as (fleet, pipeline):
        for decode in fleet.decodes:
            decode.refusals = [type(error)(error.message, field=error.field) for _ in range(9)]
        with pytest.raises(type(error), match=error.message) as raised:
            await tokens(pipeline, request())
        assert raised.value.field == error.field
        assert sum(fleet.calls()[2:]) == (1 if isinstance(error, InvalidArgument) else 3)


async def test_attempts_are_bounded() -> None:
    async with running_fleet() as (fleet, pipeline):
        for prefill in fleet.prefills:
            prefill.refusals = [FailedPrecondition("no") for _ in range(9)]
        with pytest.raises(Unavailable, match="prefill worker failed: no"):
            await tokens(pipeline, request())
        assert sum(fleet.calls()[:2]) == 3


async def test_a_broken_connection_puts_the_worker_away_until_it_was_checked() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].broken = 1
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls()[2:] == [1, 1]
        await until(pipeline, lambda view: all(decode.open for decode in view.decodes))
        assert [decode.described for decode in fleet.decodes] == [2, 1]


async def test_one_failed_completion_of_several_ends_the_others() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].refusals = [InvalidArgument("no")]
        fleet.decodes[0].stall_after = fleet.decodes[1].stall_after = 1
        wanted = CompletionRequest((LONG, SHORT), stop=StopConditions(max_tokens=TOKENS))
        prepared = await pipeline.completions.prepare(wanted)
        with pytest.raises(InvalidArgument):
            async for _ in pipeline.completions.run(prepared):
                pass
        assert sum(fleet.calls()[2:]) == 2


async def test_a_worker_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_ANSWER_TIMEOUT", 0.05)
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].silent = True
        assert await tokens(pipeline, request(SHORT)) == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("prompt", [SHORT, LONG])
async def test_the_deadline_ends_both_legs(prompt: tuple[int, ...]) -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].stalled = True
        fleet.decodes[0].stall_after = 0
        with pytest.raises(DeadlineExceeded):
            await tokens(pipeline, request(prompt, timeout=0.1))
        await fleet.until_idle()
        assert fleet.calls() == [int(prompt is LONG), 0, 1, 0]


async def test_a_bug_of_ours_is_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Placement:
        raise ZeroDivisionError

    async with running_fleet() as (_, pipeline):
        monkeypatch.setattr(pipeline.admission, "_policy", broken)
        with pytest.raises(ZeroDivisionError):
            await tokens(pipeline, request())
        assert counted(pipeline.metrics.requests) == {("internal",): 1}
        assert counted(pipeline.metrics.slo) == objectives("missed", 1)


def objectives(outcome: str, completions: int) -> dict[tuple[str, ...], float]:
    """What is counted of completions of which the router's default objectives are asked."""
    return {(objective, outcome): completions for objective in ("ttft", "tpot", "all")}


@pytest.mark.parametrize(
    ("failure", "missed"),
    [
        (DataLoss("a page was lost"), objectives("missed", 2)),
        (InvalidArgument("no such schema"), {}),
    ],
)
async def test_what_fails_but_by_the_clients_fault_has_missed_its_objectives(
    failure: HmaError, missed: dict[tuple[str, ...], float]
) -> None:
    decode = FakeDecode()
    decode.fail_after, decode.failure = 1, failure
    async with running_pipeline(decode) as (pipeline, _):
        with pytest.raises(HmaError):
            await tokens(pipeline, replace(request(), n=2))
        assert counted(pipeline.metrics.slo) == missed


async def test_what_is_shed_has_missed_its_objectives() -> None:
    decode = FakeDecode()
    decode.load.running = decode.info.limits.max_running
    async with running_pipeline(decode, max_wait=0.05) as (pipeline, _):
        with pytest.raises(Shed):
            await tokens(pipeline, replace(request(), n=2))
        assert counted(pipeline.metrics.shed) == {("waited_too_long",): 1}
        assert counted(pipeline.metrics.slo) == objectives("missed", 2)


async def test_texts_that_find_no_room_to_wait_are_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(pool: TokenizingPool, text: str) -> list[int]:
        raise ResourceExhausted("too many long prompts wait to be tokenized", retry_after=3)

    monkeypatch.setattr(TokenizingPool, "encode", refuse)
    async with running_pipeline(FakeDecode()) as (pipeline, _):
        with pytest.raises(Shed) as raised:
            await pipeline.completions.prepare(replace(request(), prompts=("x", "y"), n=2))
        assert raised.value.retry_after == 3
        assert counted(pipeline.metrics.shed) == {("tokenizing",): 1}
        assert counted(pipeline.metrics.slo) == objectives("missed", 4)
        assert counted(pipeline.metrics.requests) == {("resource_exhausted",): 1}


async def test_what_a_drain_cuts_off_has_missed_its_objectives_and_what_had_ended_has_not() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        await tokens(pipeline, request())
        decode.stall_after = 1
        task = asyncio.create_task(tokens(pipeline, request()))
        await decode.until_active()
        await pipeline.completions.drain(0.05)
        with pytest.raises(Unavailable):
            await task
        assert counted(pipeline.metrics.requests) == {("ok",): 1, ("unavailable",): 1}
        assert counted(pipeline.metrics.slo) == objectives("attained", 1) | objectives("missed", 1)


async def test_leaving_early_cancels_both_legs() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].stalled = True
        task = asyncio.create_task(tokens(pipeline, request()))
        await fleet.prefills[0].until_active()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fleet.until_idle()
        assert fleet.prefills[0].cancelled == fleet.decodes[0].cancelled == 1
        assert counted(pipeline.metrics.requests) == {("cancelled",): 1}
        assert counted(pipeline.metrics.slo) == {}


async def test_prompt_tokens_that_decode_holds_need_no_prefill() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.decodes[0].present_tokens = 96
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert fleet.calls() == [0, 0, 1, 0]


async def test_without_prefill_workers_decode_computes_the_whole_prompt() -> None:
    decode = FakeDecode()
    async with running_pipeline(decode) as (pipeline, _):
        assert await tokens(pipeline, request()) == list(LONG[:TOKENS])
        assert decode.calls[0].packed_tokens == 0


async def test_the_lease_of_a_waiting_ticket_is_renewed() -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].stalled = True
        fleet.decodes[0].lease = Duration(nanos=20_000_000)
        task = asyncio.create_task(tokens(pipeline, request()))
        await fleet.decodes[0].until_renewed(3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("stage", ["prefill", "tokens"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_http_client_that_disconnects_frees_both_workers(stage: str, stream: bool) -> None:
    async with running_fleet() as (fleet, pipeline):
        fleet.prefills[0].stalled = stage == "prefill"
        fleet.decodes[0].stall_after = 1
        runner, address = await serve_app(
            build_app(pipeline.completions, pipeline.not_ready, HttpLimits()), "127.0.0.1:0"
        )
        body = {"prompt": LONG, "max_tokens": 50, "stream": stream}
        async with ClientSession() as client:
            call = asyncio.create_task(client.post(f"http://{address}/v1/completions", json=body))
            await fleet.decodes[0].until_active()
            if stage == "prefill":
                await fleet.prefills[0].until_active()
            elif stream:
                response = await call
                await response.content.readline()
                # A response that is only dropped warns when it is collected, in whichever test that is.
                response.close()
            call.cancel()
            (answer,) = await asyncio.gather(call, return_exceptions=True)
            if isinstance(answer, ClientResponse):
                answer.close()
        await fleet.until_idle()
        assert fleet.decodes[0].cancelled == 1
        await runner.cleanup()


async def test_a_failure_in_mid_stream_is_told_inside_the_stream() -> None:
    async with running_fleet() as (fleet, pipeline):
        for decode in fleet.decodes:
            decode.fail_after, decode.failure = 1, DataLoss("a page was lost")
        runner, address = await serve_app(
            build_app(pipeline.completions, pipeline.not_ready, HttpLimits()), "127.0.0.1:0"
        )
        async with ClientSession() as client:
            body = {"prompt": LONG, "stream": True}
            response = await client.post(f"http://{address}/v1/completions", json=body)
            assert response.status == 200
            chunks = (await response.text()).split("\n\n")
        assert len(chunks) == 4
        assert '"code":"unavailable"' in chunks[1]
        assert chunks[2:] == ["data: [DONE]", ""]
        await runner.cleanup()


@asynccontextmanager
async def inference(pipeline: Pipeline) -> AsyncIterator[inference_pb2_grpc.InferenceAsyncStub]:
    server = GrpcServer("router", "127.0.0.1:0", [SERVICE])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(pipeline.completions), server.server)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await server.stop(0)


def grpc_request(prompt: tuple[int, ...] = LONG, **fields: object) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
    message.token_ids.ids.extend(prompt)
    message.stop.max_tokens = TOKENS
    return message


async def test_grpc_streams_started_deltas_and_finished() -> None:
    async with running_fleet() as (fleet, pipeline), inference(pipeline) as stub:
        fleet.decodes[0].per_message = 2
        events = [event async for event in stub.Generate(grpc_request(n=1, return_prompt_token_ids=True))]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["started", "delta", "delta", "delta", "finished"]
        assert list(events[0].started.prompt_token_ids) == list(LONG)
        assert [token for event in events for token in event.delta.token_ids] == list(LONG[:TOKENS])
        usage = events[-1].finished.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(LONG), TOKENS)


async def test_grpc_text_prompts_and_the_whole_window() -> None:
    async with running_fleet() as (_, pipeline), inference(pipeline) as stub:
        message = inference_pb2.GenerateRequest(text="abc", model="fake")
        events = [event async for event in stub.Generate(message)]
        text = "".join(event.delta.text for event in events)
        assert len(text) == pipeline.completions.window - 3
        assert text.startswith("abcabc")


BAD = [
    (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    (inference_pb2.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT),
    (inference_pb2.GenerateRequest(text="a", model="other"), grpc.StatusCode.NOT_FOUND),
    (inference_pb2.GenerateRequest(text="a" * 600), grpc.StatusCode.INVALID_ARGUMENT),
    (inference_pb2.GenerateRequest(text="a", n=33), grpc.StatusCode.INVALID_ARGUMENT),
    (inference_pb2.GenerateRequest(text="a", client_request_id="x" * 300), grpc.StatusCode.INVALID_ARGUMENT),
    (grpc_request((257,)), grpc.StatusCode.INVALID_ARGUMENT),
]


async def test_grpc_refuses_what_http_refuses() -> None:
    async with running_fleet() as (fleet, pipeline), inference(pipeline) as stub:
        for message, status in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                [event async for event in stub.Generate(message)]
            assert raised.value.code() is status, raised.value
        assert fleet.calls() == [0, 0, 0, 0]
        assert sum(counted(pipeline.metrics.requests).values()) == len(BAD)
        assert len([event async for event in stub.Generate(grpc_request())]) == TOKENS + 2


async def test_grpc_cancellation_and_deadline_free_both_workers() -> None:
    async with running_fleet() as (fleet, pipeline), inference(pipeline) as stub:
        fleet.prefills[0].stalled = True
        call = stub.Generate(grpc_request())
        read = asyncio.ensure_future(call.read())
        await fleet.prefills[0].until_active()
        call.cancel()
        await asyncio.gather(read, return_exceptions=True)
        await fleet.until_idle()
        assert fleet.decodes[0].cancelled == 1
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            fleet.prefills[1].stalled = True
            [event async for event in stub.Generate(grpc_request(), timeout=0.2)]
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await fleet.until_idle()
        assert counted(pipeline.metrics.requests) == {("cancelled",): 1, ("deadline_exceeded",): 1}
        assert counted(pipeline.metrics.slo) == objectives("missed", 1)


async def test_grpc_lists_the_models() -> None:
    async with running_fleet() as (_, pipeline), inference(pipeline) as stub:
        [model] = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.id, model.max_model_len) == ("fake", pipeline.completions.window)
