"""Constants both ends of a stream must agree on, and the gRPC options that carry them."""

from typing import Final

PROTOCOL_VERSION: Final = 2  # of the sessions; a peer link's is in its PeerHello

SESSION_BEAT_S: Final = 0.25
PEER_BEAT_S: Final = 0.5
MISSED_BEATS: Final = 4  # silent beats after which the other side counts as lost (S3)

MAX_FRAME_BYTES: Final = 256 << 10  # of a session (S5); longer ones travel in pieces
MAX_MESSAGE_BYTES: Final = 32 << 20  # one request or event, put together from its pieces
MAX_BACKLOG_BYTES: Final = 64 << 20  # gathered while a write is blocked; beyond: lost
MAX_BACKLOG_ITEMS: Final = 200_000

# A peer link's largest message is a grant: 12 bytes a block. gRPC's default of 4 MiB would kill
# the whole stream, with all its transfers.
RECEIVE_LIMIT_BYTES: Final = 64 << 20

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.max_send_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.enable_http_proxy", 0),  # workers are never behind the user's web proxy
    # A connection of its own: no flow-control window and no reconnection back-off is shared.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.max_send_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a share of its connections
    # Loss is detected by our beats (S3). This frees the connection of a peer that froze, which a
    # stop of the server would otherwise wait for. Beats flow, so a healthy stream needs no pings.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
)
