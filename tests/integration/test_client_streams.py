"""Both clients over real gRPC against a service that behaves as a router does: one suite, two drivers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from hma_serve.client import (
    AsyncClient,
    AsyncStream,
    Cancelled,
    Client,
    Completion,
    ContextLengthExceeded,
    DeadlineExceeded,
    Delta,
    FailedPrecondition,
    HmaError,
    Internal,
    Model,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    Stream,
    Unavailable,
)
from hma_serve.core.errors import ERRORS
from support.cluster import environment
from support.fake_inference import FakeRouter, eventually

SWIFT = RetryPolicy(rounds=3, initial_backoff=0.01, max_backoff=0.02)


class SyncDriver:
    """The blocking client, each blocking step in a thread."""

    def __init__(self, address: Any, **arguments: Any) -> None:
        self.client = Client(address, **arguments)

    def generate(self, prompt: Any, **options: Any) -> Stream:
        return self.client.generate(prompt, **options)

    def chat(self, messages: Any, **options: Any) -> Stream:
        return self.client.chat(messages, **options)

    async def models(self) -> tuple[Model, ...]:
        return await asyncio.to_thread(self.client.models)

    async def read(self, stream: Any, stop_after: int | None = None) -> list[Delta]:
        def take() -> list[Delta]:
            deltas = []
            for delta in stream:
                deltas.append(delta)
                if len(deltas) == stop_after:
                    break
            return deltas

        return await asyncio.to_thread(take)

    async def result(self, stream: Any) -> Completion:
        whole: Completion = await asyncio.to_thread(stream.result)
        return whole

    async def leave(self, stream: Any, after: int) -> None:
        """Opens the stream in a `with`, takes some and raises."""

        def work() -> None:
            with stream:
                reader = iter(stream)
                for _ in range(after):
                    next(reader)
                raise LookupError

        await asyncio.to_thread(work)

    async def close(self) -> None:
        await asyncio.to_thread(self.client.close)


class AsyncDriver:
    """The asyncio client."""

    def __init__(self, address: Any, **arguments: Any) -> None:
        self.client = AsyncClient(address, **arguments)

    def generate(self, prompt: Any, **options: Any) -> AsyncStream:
        return self.client.generate(prompt, **options)

    def chat(self, messages: Any, **options: Any) -> AsyncStream:
        return self.client.chat(messages, **options)

    async def models(self) -> tuple[Model, ...]:
        return await self.client.models()

    async def read(self, stream: Any, stop_after: int | None = None) -> list[Delta]:
        deltas = []
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == stop_after:
                break
        return deltas

    async def result(self, stream: Any) -> Completion:
        whole: Completion = await stream.result()
        return whole

    async def leave(self, stream: Any, after: int) -> None:
        async with stream:
            reader = aiter(stream)
            for _ in range(after):
                await anext(reader)
            raise LookupError

    async def close(self) -> None:
        await self.client.close()


Driver = SyncDriver | AsyncDriver


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as router:
        yield router


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "async"])
def driver_type(request: pytest.FixtureRequest) -> type[Driver]:
    kind: type[Driver] = request.param
    return kind


@pytest.fixture
async def driver(driver_type: type[Driver], router: FakeRouter) -> AsyncIterator[Driver]:
    driver = driver_type(router.address, timeout=30.0, retry=SWIFT)
    yield driver
    await driver.close()


async def freed(router: FakeRouter, cancelled: int = 1) -> bool:
    """Whether the server has noticed that its caller went away."""
    service = router.service
    return await asyncio.to_thread(
        eventually, lambda: service.running == 0 and service.cancelled == cancelled, within=5.0
    )


async def test_text_and_tokens_come_piece_by_piece(driver: Driver) -> None:
    stream = driver.generate("It was a dark", max_tokens=3)
    assert (stream.request_id, stream.finish_reason, stream.usage) == ("", None, None)
    deltas = await driver.read(stream)
    assert [(delta.text, delta.token_ids, delta.index) for delta in deltas] == [
        (" word0", (0,), 0),
        (" word1", (1,), 0),
        (" word2", (2,), 0),
    ]
    assert stream.text == " word0 word1 word2"
    assert stream.token_ids == (0, 1, 2)
    assert (stream.finish_reason, stream.request_id, stream.model) == ("length", "req-1", "demo")
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.total_tokens) == (4, 3, 7)


async def test_a_result_is_the_whole_answer_before_and_after_reading(driver: Driver) -> None:
    whole = await driver.result(driver.generate([5, 6, 7], max_tokens=2, logprobs=1))
    assert (whole.text, whole.token_ids, whole.finish_reason) == (" word0 word1", (0, 1), "length")
    assert whole.usage.prompt_tokens == 3
    assert [entry.chosen.logprob for entry in whole.choices[0].logprobs] == [-0.5, -0.5]
    stream = driver.generate("again", max_tokens=2)
    await driver.read(stream)
    assert (await driver.result(stream)).text == " word0 word1"


async def test_several_completions_keep_apart(driver: Driver) -> None:
    whole = await driver.result(driver.generate("two", max_tokens=2, n=2))
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, " word0 word1"), (1, " word0 word1")]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (1, 4)


async def test_an_answer_without_words_is_an_answer(driver: Driver) -> None:
    whole = await driver.result(driver.generate("empty"))
    assert (whole.text, whole.finish_reason) == ("", "stop")


async def test_a_conversation_is_answered(driver: Driver, router: FakeRouter) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    whole = await driver.result(driver.chat(messages, template_kwargs={"enable_thinking": False}, temperature=0))
    assert whole.text == "2: Hello there"
    sent = router.service.requests[-1]
    assert sent.chat.template_kwargs["enable_thinking"] is False
    assert sent.sampling.temperature == 0


async def test_the_models_are_listed(driver: Driver) -> None:
    (model,) = await driver.models()
    assert (model.id, model.fingerprint, model.max_model_len, model.created.year) == ("demo", "f00d", 4096, 2023)


async def test_headers_go_along(driver_type: type[Driver], router: FakeRouter) -> None:
    driver = driver_type(router.address, metadata={"authorization": "Bearer x"})
    await driver.models()
    assert router.service.metadata["authorization"] == "Bearer x"
    await driver.close()


@pytest.mark.parametrize("kind", [kind for kind in ERRORS.values() if kind is not Unavailable], ids=lambda k: k.code)
async def test_every_error_arrives_typed_with_its_field(
    kind: type[HmaError], driver: Driver, router: FakeRouter
) -> None:
    router.service.failures.append(kind("do this instead", field="max_tokens"))
    with pytest.raises(HmaError) as caught:
        await driver.result(driver.generate("hello"))
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.field) == ("do this instead", "max_tokens")
    assert len(router.service.requests) == 1  # none of these is worth a second try


async def test_breaking_the_loop_cancels(driver: Driver, router: FakeRouter) -> None:
    stream = driver.generate("endless")
    assert len(await driver.read(stream, stop_after=3)) == 3
    assert await freed(router)
    with pytest.raises(Cancelled):
        await driver.result(stream)


@pytest.mark.parametrize("after", [0, 2])
async def test_leaving_the_with_block_cancels(after: int, driver: Driver, router: FakeRouter) -> None:
    with pytest.raises(LookupError):
        await driver.leave(driver.generate("endless"), after)
    assert await freed(router, cancelled=1 if after else 0)


@pytest.mark.parametrize("prompt", ["silent", "endless"])
async def test_cancel_ends_a_reader_at_once_before_and_after_the_first_token(
    prompt: str, driver: Driver, router: FakeRouter
) -> None:
    stream = driver.generate(prompt)
    reading = asyncio.create_task(driver.read(stream))
    assert await asyncio.to_thread(eventually, router.service.started.is_set)
    stream.cancel()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(reading, 5)
    assert await freed(router)


async def test_cancel_before_reading_sends_nothing_that_lasts(driver: Driver, router: FakeRouter) -> None:
    stream = driver.generate("endless")
    stream.cancel()
    with pytest.raises(Cancelled):
        await driver.read(stream)
    assert await asyncio.to_thread(eventually, lambda: router.service.running == 0)


async def test_cancel_ends_the_pause_before_a_retry(driver_type: type[Driver], router: FakeRouter) -> None:
    driver = driver_type(router.address)
    router.service.failures.append(ResourceExhausted("full", retry_after=9.0))
    stream = driver.generate("hello")
    reading = asyncio.create_task(driver.read(stream))
    assert await asyncio.to_thread(eventually, lambda: not router.service.failures)
    stream.cancel()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(reading, 5)
    await driver.close()


async def test_closing_the_client_ends_its_streams(driver: Driver, router: FakeRouter) -> None:
    reading = asyncio.create_task(driver.read(driver.generate("endless")))
    assert await asyncio.to_thread(eventually, router.service.started.is_set)
    await driver.close()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(reading, 5)
    assert await freed(router)
    with pytest.raises(FailedPrecondition, match="closed"):
        await driver.result(driver.generate("hello"))
    with pytest.raises(FailedPrecondition, match="closed"):
        await driver.models()


async def test_a_stream_is_read_once(driver: Driver) -> None:
    stream = driver.generate("hello", max_tokens=1)
    await driver.read(stream)
    with pytest.raises(FailedPrecondition, match="read once"):
        await driver.read(stream)


async def test_the_deadline_ends_a_stream_and_names_the_timeout(driver: Driver, router: FakeRouter) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within the timeout of 0\.3 seconds") as caught:
        await driver.result(driver.generate("silent", timeout=0.3))
    assert caught.value.field == "timeout"
    assert await freed(router)


async def test_a_failure_in_mid_stream_is_raised_not_retried(driver: Driver, router: FakeRouter) -> None:
    stream = driver.generate("broken")
    with pytest.raises(Unavailable, match="no other took over"):
        await driver.read(stream)
    assert stream.text == " word0 word1"
    assert len(router.service.requests) == 1


async def test_a_stream_that_just_stops_is_no_answer(driver: Driver) -> None:
    with pytest.raises(Internal, match="before the completion had ended"):
        await driver.result(driver.generate("unfinished"))


async def test_unavailable_and_full_servers_are_asked_again(driver: Driver, router: FakeRouter) -> None:
    router.service.failures += [Unavailable("starting"), ResourceExhausted("full", retry_after=0.01)]
    assert (await driver.result(driver.generate("hello", max_tokens=1))).text == " word0"
    assert len(router.service.requests) == 3
    router.service.failures += [Unavailable("starting")]
    assert await driver.models()


async def test_retries_end(driver: Driver, router: FakeRouter) -> None:
    router.service.failures += [Unavailable("starting")] * SWIFT.rounds
    with pytest.raises(Unavailable, match="starting"):
        await driver.result(driver.generate("hello"))
    assert len(router.service.requests) == SWIFT.rounds


async def test_a_full_server_without_a_time_is_final(driver: Driver, router: FakeRouter) -> None:
    router.service.failures.append(ResourceExhausted("over quota"))
    with pytest.raises(ResourceExhausted, match="over quota"):
        await driver.result(driver.generate("hello"))
    assert len(router.service.requests) == 1


async def test_another_address_takes_over_and_is_remembered(driver_type: type[Driver], router: FakeRouter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    driver = driver_type([nobody, router.address], retry=RetryPolicy(rounds=1))
    assert (await driver.result(driver.generate("hello", max_tokens=1))).text == " word0"
    assert await driver.models()
    await driver.close()


async def test_a_router_that_goes_away_hands_over_to_the_other(driver_type: type[Driver]) -> None:
    with FakeRouter() as second:
        with FakeRouter() as first:
            driver = driver_type(f"{first.address},{second.address}", retry=SWIFT)
            await driver.result(driver.generate("hello", max_tokens=1))
            assert len(first.service.requests) == 1
        await driver.result(driver.generate("hello", max_tokens=1))
        assert len(second.service.requests) == 1
        await driver.close()


async def test_nobody_there_names_the_address(driver_type: type[Driver]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    driver = driver_type(nobody, retry=SWIFT)
    with pytest.raises(Unavailable, match=nobody) as caught:
        await driver.result(driver.generate("hello"))
    assert caught.value.field == "address"
    await driver.close()


async def test_an_error_of_a_more_special_kind_is_caught_as_the_general_one(driver: Driver, router: FakeRouter) -> None:
    router.service.failures += [ContextLengthExceeded("too long"), NotFound("no such model", field="model")]
    with pytest.raises(ERRORS["invalid_argument"]):
        await driver.result(driver.generate("hello"))
    with pytest.raises(NotFound):
        await driver.result(driver.generate("hello", model="nope"))


async def test_a_cancelled_task_is_cancelled_in_asyncios_way(router: FakeRouter) -> None:
    async with AsyncClient(router.address) as client:
        task = asyncio.create_task(client.generate("endless").result())
        assert await asyncio.to_thread(eventually, router.service.started.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await freed(router)


async def test_a_hundred_streams_at_once(router: FakeRouter) -> None:
    async with AsyncClient(router.address) as client:
        answers = await asyncio.gather(*(client.generate("hello", max_tokens=4).result() for _ in range(100)))
    assert {answer.text for answer in answers} == {" word0 word1 word2 word3"}


def test_threads_share_a_client(router: FakeRouter) -> None:
    texts: list[str] = []
    with Client(router.address) as client:
        threads = [
            threading.Thread(target=lambda: texts.append(client.generate("hello", max_tokens=4).result().text))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert texts == [" word0 word1 word2 word3"] * 8


def test_a_dropped_stream_does_not_run_on(router: FakeRouter) -> None:
    with Client(router.address) as client:
        for _ in client.generate("endless"):
            break
        assert eventually(lambda: router.service.running == 0 and router.service.cancelled == 1)


INTERRUPTED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, threading
from hma_serve.client import Client

random.seed(1)
client = Client(sys.argv[1])
for _ in range(40):
    try:
        for delta in client.generate("endless"):
            if delta.token_ids == (0,):
                threading.Timer(random.random() * 0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    except KeyboardInterrupt:
        assert client.generate("hello", max_tokens=1).result().text == " word0"
print("unharmed")
"""


def test_ctrl_c_at_any_moment_leaves_the_client_unharmed(router: FakeRouter) -> None:
    command = [sys.executable, "-c", INTERRUPTED_AGAIN_AND_AGAIN, router.address]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "unharmed\n", "")
    assert eventually(lambda: router.service.running == 0 and router.service.cancelled == 40)


def test_abandoned_streams_and_closed_clients_leave_nothing_behind(router: FakeRouter) -> None:
    def abandon() -> None:
        with Client(router.address) as client:
            for _ in client.generate("endless"):
                break

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    abandon()
    assert eventually(lambda: router.service.running == 0)
    before = descriptors()
    for _ in range(30):
        abandon()
    assert eventually(lambda: router.service.running == 0 and descriptors() <= before + 4)
    assert eventually(lambda: not [one for one in threading.enumerate() if one.name == "hma-serve-stream"])


async def test_a_server_that_vanishes_is_noticed(driver_type: type[Driver]) -> None:
    """The stream fails instead of waiting for its deadline when the connection breaks in the middle."""
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(FakeRouter())
        driver = driver_type(router.address, retry=RetryPolicy(rounds=1))
        reading = asyncio.create_task(driver.read(driver.generate("endless")))
        assert await asyncio.to_thread(eventually, router.service.started.is_set)
        await asyncio.to_thread(stack.close)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(reading, 10)
        await driver.close()
