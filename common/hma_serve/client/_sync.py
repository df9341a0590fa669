"""The blocking client.

A client may be shared by threads; a stream belongs to the thread that reads it, except for `cancel`. A stream's call
never outlives its reading: the end of the loop, a `break`, an exception and the end of the `with` block all cancel it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from hma_serve.client._channels import CHANNEL_OPTIONS, Tls
from hma_serve.client._completion import Completion, Delta, Transcript, carries_answer
from hma_serve.client._failures import typed_error
from hma_serve.client._models import Model, read_models
from hma_serve.client._options import Message, Options, conversation, text_or_tokens
from hma_serve.client._progress import StreamProgress
from hma_serve.client._pump import Pump
from hma_serve.client._retry import Attempts, RetryPolicy
from hma_serve.client._settings import Settings
from hma_serve.core.errors import Cancelled, FailedPrecondition
from hma_serve.v1 import inference_pb2, inference_pb2_grpc


class Client:
    """Asks routers for text, from ordinary threads.

    Example:
        >>> with Client("localhost:50051") as client:
        ...     print(client.generate("It was a dark and", max_tokens=32).result().text)

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

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Stream:
        """Continues a prompt.

        The request is sent when the stream is first read.

        Example:
            >>> with client.generate("Once upon a time", max_tokens=64, temperature=0.7, seed=1) as stream:
            ...     for delta in stream:
            ...         print(delta.text, end="", flush=True)
            >>> stream.finish_reason, stream.usage.completion_tokens

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
    ) -> Stream:
        """Answers a conversation, with the chat template that the model brings.

        Example:
            >>> stream = client.chat([{"role": "user", "content": "Why is the sky blue?"}], max_tokens=200)
            >>> print(stream.result().text)

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

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
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
            try:
                reply = stub.ListModels(
                    request, timeout=attempts.deadline.remaining(), metadata=self._settings.metadata
                )
                return read_models(reply)
            except grpc.RpcError as failure:
                error = typed_error(failure, address=address, timeout=timeout)
                wait = attempts.after(error)
                if wait is None:
                    raise error from failure
            self._routers.closed.wait(wait)

    def close(self) -> None:
        """Cancels what runs and closes the connections; may be called twice."""
        self._routers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Stream:
        return Stream(request, self._routers, self._settings, self._settings.timeout_or(timeout))


class Stream(StreamProgress):
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
        self._cancelled = threading.Event()
        self._call: grpc.Call | None = None

    def __iter__(self) -> Iterator[Delta]:
        """Sends the request and yields the answer as it arrives.

        Raises:
            HmaError: Whatever went wrong, by type; `Cancelled` after `cancel`.
            FailedPrecondition: The stream was read before.
        """
        self._claim()
        return self._read()

    def result(self) -> Completion:
        """Reads to the end, unless that was done, and returns the whole answer; raises as reading does."""
        if not self._claimed:
            for _ in self:
                pass
        return self._whole()

    def cancel(self) -> None:
        """Stops the answer and frees what it took on the server; from any thread, any number of times."""
        self._cancelled.set()
        call = self._call
        if call is not None:
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def _read(self) -> Iterator[Delta]:
        try:
            for response in Pump(self._responses()).run():
                delta = self._transcript.receive(response)
                if delta is not None:
                    yield delta
            self._transcript.end()
        finally:
            self.cancel()

    def _responses(self) -> Generator[inference_pb2.GenerateResponse, None, None]:
        """Asks until somebody answers, and yields the answer's events; runs on the pump's thread."""
        attempts = self._settings.attempts(self._timeout, first=self._routers.preferred)
        answered = False
        while True:
            address, stub = self._routers.at(attempts.address)
            try:
                for response in self._start(stub, attempts):
                    answered = answered or carries_answer(response)
                    yield response
                self._routers.preferred = attempts.address
                return
            except grpc.RpcError as failure:
                self._retry_or_raise(failure, address, None if answered else attempts)

    def _start(
        self, stub: inference_pb2_grpc.InferenceStub, attempts: Attempts
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Calls; the order (publish the call, then look at the flag) leaves `cancel` no gap to fall into."""
        call = stub.Generate(self._request, timeout=attempts.deadline.remaining(), metadata=self._settings.metadata)
        self._call = call
        if self._cancelled.is_set():
            call.cancel()
        return iter(call)

    def _retry_or_raise(self, failure: grpc.RpcError, address: str, attempts: Attempts | None) -> None:
        """Returns when the next attempt is due; without `attempts` none is."""
        if self._cancelled.is_set():
            raise Cancelled("the stream was cancelled") from failure
        error = typed_error(failure, address=address, timeout=self._timeout)
        wait = None if attempts is None else attempts.after(error)
        if wait is None:
            raise error from failure
        if self._cancelled.wait(wait):
            raise Cancelled("the stream was cancelled") from failure


class _Routers:
    """One connection per address, made when it is first needed; shared by threads.

    Attributes:
        addresses: Where routers listen.
        preferred: Index of the one that answered last.
        closed: Set at the end.
    """

    def __init__(self, addresses: tuple[str, ...], tls: Tls | None) -> None:
        self.addresses = addresses
        self.preferred = 0
        self.closed = threading.Event()
        self._credentials = None if tls is None else tls.credentials()
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._stubs: dict[int, inference_pb2_grpc.InferenceStub] = {}

    def at(self, index: int) -> tuple[str, inference_pb2_grpc.InferenceStub]:
        """The address and a stub for it; raises FailedPrecondition once closed."""
        address = self.addresses[index]
        with self._lock:
            if self.closed.is_set():
                raise FailedPrecondition("the client is closed")
            stub = self._stubs.get(index)
            if stub is None:
                channel = self._open(address)
                self._channels.append(channel)
                stub = self._stubs[index] = inference_pb2_grpc.InferenceStub(channel)
        return address, stub

    def close(self) -> None:
        """Cancels all calls and closes the connections."""
        with self._lock:
            self.closed.set()
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()

    def _open(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)
