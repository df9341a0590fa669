"""The asyncio client.

A client belongs to one event loop and must be closed there. As with the blocking one a stream's call never outlives its
reading; here that takes an explicit `cancel` in `finally`, because grpcio does not cancel a call that was abandoned
(grpc#43462), and connections are closed only after their calls have ended (grpc#42125).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from hma_serve.client._channels import CHANNEL_OPTIONS, Tls
from hma_serve.client._completion import Completion, Delta, Transcript, carries_answer
from hma_serve.client._failures import typed_error
from hma_serve.client._models import Model, read_models
from hma_serve.client._options import Message, Options, conversation, text_or_tokens
from hma_serve.client._progress import StreamProgress
from hma_serve.client._retry import Attempts, RetryPolicy
from hma_serve.client._settings import Settings
from hma_serve.core.errors import Cancelled, FailedPrecondition
from hma_serve.v1 import inference_pb2, inference_pb2_grpc

_GenerateCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class AsyncClient:
    """Asks routers for text, from an event loop.

    Example:
        >>> async with AsyncClient("localhost:50051") as client:
        ...     async for delta in client.generate("It was a dark and", max_tokens=32):
        ...         print(delta.text, end="", flush=True)

    Args:
        address: `host:port` of a router, or of several (a sequence, or separated by commas): a request that cannot
            reach one goes to the next.
        tls: Which certificates to use; None: an unencrypted connection.
        timeout: Seconds that a request may take unless it says otherwise; None: no limit.
        retry: How persistent to be before the first token.
        metadata: More headers for every call, for example `{"authorization": "Bearer ..."}`; names in lower case.

    Raises:
        InvalidArgument: An argument cannot be right. Nothing is connected yet; the first request does that.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "localhost:50051",
        *,
        tls: Tls | None = None,
        timeout: float | None = 600.0,
        retry: RetryPolicy | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = Settings.checked(address, timeout, retry, metadata)
        self._routers = _Routers(self._settings.addresses, tls)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncStream:
        """Continues a prompt; the request is sent when the stream is first read.

        Example:
            >>> completion = await client.generate("Once upon a time", max_tokens=64).result()

        Args:
            prompt: A text, or the model's token ids.
            **options: See `Options`.

        Raises:
            InvalidArgument: The prompt or an option is of another kind or out of its range.
            PayloadTooLarge: The prompt is too long to be sent.
        """
        timeout = options.pop("timeout", None)
        return self._stream(text_or_tokens(prompt, options), timeout)

    def chat(
        self,
        messages: Iterable[Message],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Answers a conversation, with the chat template that the model brings.

        Example:
            >>> completion = await client.chat([{"role": "user", "content": "Hello!"}]).result()

        Args:
            messages: The conversation, oldest turn first.
            template_kwargs: More variables for the template, for example `{"enable_thinking": False}`.
            **options: See `Options`.

        Raises:
            InvalidArgument: A message or an option is wrong.
            PayloadTooLarge: The conversation is too long to be sent.
        """
        timeout = options.pop("timeout", None)
        return self._stream(conversation(messages, template_kwargs, options), timeout)

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that can be asked for.

        Args:
            timeout: Seconds that this may take; None: the client's.

        Raises:
            HmaError: Whatever went wrong, by type.
        """
        timeout = self._settings.timeout_or(timeout)
        attempts = self._settings.attempts(timeout, first=self._routers.preferred)
        request = inference_pb2.ListModelsRequest()
        while True:
            address, stub = self._routers.at(attempts.address)
            call = stub.ListModels(request, timeout=attempts.deadline.remaining(), metadata=self._settings.metadata)
            try:
                with self._routers.running(call):
                    return read_models(await call)
            except grpc.RpcError as failure:
                error = typed_error(failure, address=address, timeout=timeout)
                wait = attempts.after(error)
                if wait is None:
                    raise error from failure
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Cancels what runs, waits for its end and closes the connections; may be called twice."""
        await self._routers.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> AsyncStream:
        return AsyncStream(request, self._routers, self._settings, self._settings.timeout_or(timeout))


class AsyncStream(StreamProgress):
    """One answer, piece by piece: iterate over it once, or take the whole with `result`."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        routers: _Routers,
        settings: Settings,
        timeout: float | None,
    ) -> None:
        super().__init__(Transcript(request.n))
        self._request = request
        self._routers = routers
        self._settings = settings
        self._timeout = timeout
        self._cancelled = asyncio.Event()
        self._call: _GenerateCall | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Sends the request and yields the answer as it arrives.

        Raises:
            HmaError: Whatever went wrong, by type; `Cancelled` after `cancel` (a cancelled *task* gets asyncio's own
                `CancelledError`, as everywhere).
            FailedPrecondition: The stream was read before.
        """
        self._claim()
        return self._read()

    async def result(self) -> Completion:
        """Reads to the end, unless that was done, and returns the whole answer; raises as reading does."""
        if not self._claimed:
            async for _ in self:
                pass
        return self._whole()

    def cancel(self) -> None:
        """Stops the answer and frees what it took on the server; any number of times."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    async def _read(self) -> AsyncIterator[Delta]:
        attempts = self._settings.attempts(self._timeout, first=self._routers.preferred)
        answered = False
        while True:
            if self._cancelled.is_set():
                raise Cancelled("the stream was cancelled")
            address, stub = self._routers.at(attempts.address)
            call = self._call = stub.Generate(
                self._request, timeout=attempts.deadline.remaining(), metadata=self._settings.metadata
            )
            try:
                with self._routers.running(call):
                    async for response in call:
                        answered = answered or carries_answer(response)
                        delta = self._transcript.receive(response)
                        if delta is not None:
                            yield delta
                self._transcript.end()
                self._routers.preferred = attempts.address
                return
            except grpc.RpcError as failure:
                await self._retry_or_raise(failure, address, None if answered else attempts)

    async def _retry_or_raise(self, failure: grpc.RpcError, address: str, attempts: Attempts | None) -> None:
        """Returns when the next attempt is due; without `attempts` none is."""
        if self._cancelled.is_set():
            raise Cancelled("the stream was cancelled") from failure
        error = typed_error(failure, address=address, timeout=self._timeout)
        wait = None if attempts is None else attempts.after(error)
        if wait is None:
            raise error from failure
        try:
            async with asyncio.timeout(wait):
                await self._cancelled.wait()
        except TimeoutError:
            return
        raise Cancelled("the stream was cancelled") from failure


class _Routers:
    """One connection per address, made when it is first needed; confined to one event loop.

    Attributes:
        addresses: Where routers listen.
        preferred: Index of the one that answered last.
    """

    def __init__(self, addresses: tuple[str, ...], tls: Tls | None) -> None:
        self.addresses = addresses
        self.preferred = 0
        self._calls: set[grpc.aio.Call] = set()
        self._credentials = None if tls is None else tls.credentials()
        self._closed = False
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: dict[int, inference_pb2_grpc.InferenceAsyncStub] = {}

    def at(self, index: int) -> tuple[str, inference_pb2_grpc.InferenceAsyncStub]:
        """The address and a stub for it; raises FailedPrecondition once closed."""
        if self._closed:
            raise FailedPrecondition("the client is closed")
        address = self.addresses[index]
        stub = self._stubs.get(index)
        if stub is None:
            channel = self._open(address)
            self._channels.append(channel)
            stub = self._stubs[index] = inference_pb2_grpc.InferenceStub(channel)
        return address, stub

    @contextlib.contextmanager
    def running(self, call: grpc.aio.Call) -> Iterator[None]:
        """While the call is read; it does not outlive the context.

        grpc.aio reports a call that was cancelled here just like a task that somebody cancelled. Only the second is
        asyncio's business; the first becomes `Cancelled`.
        """
        self._calls.add(call)
        try:
            yield
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the call was cancelled") from exc
        finally:
            call.cancel()
            self._calls.discard(call)

    async def close(self) -> None:
        """Cancels all calls, waits until they have ended, then closes the connections."""
        self._closed = True
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*(call.code() for call in calls))
        while self._channels:
            await self._channels.pop().close()

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
