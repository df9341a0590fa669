"""The client SDK: text and token ids from a router, as they come, over gRPC.

    >>> from hma_serve.client import Client
    >>> with Client("localhost:50051") as client:
    ...     for delta in client.generate("It was a dark and", max_tokens=32):
    ...         print(delta.text, end="", flush=True)

`Client` is for threads, `AsyncClient` for asyncio; they are the same otherwise. They need grpcio and protobuf only,
which is why they share no code with the services beyond values and errors. Modules that start with an underscore may
change at any time.
"""

from hma_serve.client._aio import AsyncClient, AsyncStream
from hma_serve.client._channels import Tls
from hma_serve.client._completion import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    TokenAlternative,
    TokenLogprobs,
    Usage,
)
from hma_serve.client._models import Model
from hma_serve.client._options import Message, Options
from hma_serve.client._retry import RetryPolicy
from hma_serve.client._sync import Client, Stream
from hma_serve.core.errors import (
    AlreadyExists,
    Cancelled,
    ContextLengthExceeded,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    HmaError,
    Internal,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from hma_serve.core.request import Slo, Structure, StructureKind

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "ContextLengthExceeded",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FinishReason",
    "HmaError",
    "Internal",
    "InvalidArgument",
    "Message",
    "Model",
    "NotFound",
    "Options",
    "PayloadTooLarge",
    "PermissionDenied",
    "ResourceExhausted",
    "RetryPolicy",
    "Slo",
    "Stream",
    "Structure",
    "StructureKind",
    "Tls",
    "TokenAlternative",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
