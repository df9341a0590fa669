"""An Inference service over real gRPC that behaves as a router does, without one: for the SDK and what uses it.

Word i of an answer is token i. A prompt of several words is continued with `max_tokens` numbered words; a conversation
is answered with its length and its last message. Some words in the last text change that:

- `endless`: words until the call is cancelled;
- `silent`: accepted, then nothing until the call is cancelled;
- `broken`: two words, then the connection's end as a router would report it;
- `empty`: no words at all;
- `unfinished`: two words, then a proper end of the stream without `Finished`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_status import rpc_status

from hma_serve.core.errors import HmaError, Unavailable
from hma_serve.rpc.errors import to_status
from hma_serve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

DEFAULT_TOKENS = 16
PAUSE_SECONDS = 0.005


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """The service; records what it was asked.

    Attributes:
        failures: Each fails one call at its start, in order.
        requests: Every Generate request that was received, failed ones included.
        metadata: The headers of the last call.
        running: Generate calls that have not ended.
        cancelled: Generate calls whose client went away before the end.
        started: Set when a Generate call has sent something.
    """

    def __init__(self) -> None:
        self.failures: deque[HmaError] = deque()
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: dict[str, str | bytes] = {}
        self.running = 0
        self.cancelled = 0
        self.started = threading.Event()
        self._lock = threading.Lock()

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        with self._lock:
            self.requests.append(request)
            self.running += 1
        gone = threading.Event()
        if not context.add_callback(gone.set):
            gone.set()
        try:
            self._fail_if_told(context)
            for response in answer(request, gone):
                yield response
                self.started.set()
            if "broken" in last_text(request):
                abort(context, Unavailable("the decode worker is gone and no other took over"))
        finally:
            with self._lock:
                self.running -= 1
                self.cancelled += gone.is_set()

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        self._fail_if_told(context)
        model = inference_pb2.Model(
            id="demo", fingerprint="f00d", max_model_len=4096, created_unix_seconds=1_700_000_000
        )
        return inference_pb2.ListModelsResponse(models=[model])

    def _fail_if_told(self, context: grpc.ServicerContext) -> None:
        self.metadata = dict(context.invocation_metadata())
        if self.failures:
            abort(context, self.failures.popleft())


def abort(context: grpc.ServicerContext, error: HmaError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


def last_text(request: inference_pb2.GenerateRequest) -> str:
    if request.WhichOneof("prompt") == "chat":
        return request.chat.messages[-1].content
    return request.text


def words_of_answer(request: inference_pb2.GenerateRequest) -> Iterator[str]:
    text = last_text(request)
    limit = request.stop.max_tokens if request.stop.HasField("max_tokens") else DEFAULT_TOKENS
    if "empty" in text:
        return
    if "endless" in text:
        limit = 2**31
    if "broken" in text or "unfinished" in text:
        limit = 2
    if request.WhichOneof("prompt") == "chat" and "endless" not in text:
        words = f"{len(request.chat.messages)}: {text}".split()
        yield from (word if index == 0 else f" {word}" for index, word in enumerate(words[:limit]))
        return
    for index in range(limit):
        yield f" word{index}"


def answer(request: inference_pb2.GenerateRequest, gone: threading.Event) -> Iterator[inference_pb2.GenerateResponse]:
    """The events of one call, until it is done or the client has gone."""
    text = last_text(request)
    prompt_tokens = len(request.token_ids.ids) or len(text.split())
    started = inference_pb2.GenerateResponse.Started(
        request_id="req-1", model=request.model or "demo", prompt_tokens=prompt_tokens
    )
    yield inference_pb2.GenerateResponse(started=started)
    if "silent" in text:
        gone.wait(60)
        return
    counts = [0] * max(1, request.n)
    for index in range(len(counts)):
        for token, word in enumerate(words_of_answer(request)):
            if "endless" in text and gone.wait(PAUSE_SECONDS):
                return
            counts[index] += 1
            yield inference_pb2.GenerateResponse(delta=delta(index, word, token, request))
        if "unfinished" in text:
            return
        if "broken" not in text:
            yield inference_pb2.GenerateResponse(finished=finished(index, request, prompt_tokens, counts[index]))


def delta(
    index: int, word: str, token: int, request: inference_pb2.GenerateRequest
) -> inference_pb2.GenerateResponse.TextDelta:
    message = inference_pb2.GenerateResponse.TextDelta(index=index, text=word, token_ids=[token])
    if request.sampling.HasField("logprobs"):
        chosen = common_pb2.TokenLogprob(token_id=token, logprob=-0.5)
        message.logprobs.add(chosen=chosen, top=[chosen] * request.sampling.logprobs)
    return message


def finished(
    index: int, request: inference_pb2.GenerateRequest, prompt_tokens: int, count: int
) -> inference_pb2.GenerateResponse.Finished:
    length = request.stop.HasField("max_tokens") and count == request.stop.max_tokens
    return inference_pb2.GenerateResponse.Finished(
        index=index,
        reason=common_pb2.FINISH_REASON_LENGTH if length else common_pb2.FINISH_REASON_STOP,
        usage=common_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=count),
    )


class FakeRouter:
    """The service, listening on a free port; a context manager."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.service = FakeInference()
        options: list[tuple[str, Any]] = [("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)]
        self._threads = ThreadPoolExecutor(16)
        self._server = grpc.server(self._threads, options=options)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> FakeRouter:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(0).wait()
        self._threads.shutdown()


def eventually(condition: Callable[[], bool], within: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
