"""gRPC as the services use it: channels, servers, deadlines, and the one mapping of errors to statuses."""

from hma_serve.core.error_detail import error_detail, from_error_detail
from hma_serve.rpc.allocator import tune_allocator
from hma_serve.rpc.channels import MAX_MESSAGE_BYTES, ChannelCache, open_channel
from hma_serve.rpc.deadlines import remaining
from hma_serve.rpc.errors import from_rpc_error, is_transport_failure, to_status
from hma_serve.rpc.servers import GrpcServer
from hma_serve.rpc.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, SERVICE_NAME, TlsConfig

__all__ = [
    "CA_FILE",
    "CERTIFICATE_FILE",
    "KEY_FILE",
    "MAX_MESSAGE_BYTES",
    "SERVICE_NAME",
    "ChannelCache",
    "GrpcServer",
    "TlsConfig",
    "error_detail",
    "from_error_detail",
    "from_rpc_error",
    "is_transport_failure",
    "open_channel",
    "remaining",
    "to_status",
    "tune_allocator",
]
