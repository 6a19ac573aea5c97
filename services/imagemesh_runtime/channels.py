"""Options that both ends of every channel set."""


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options that both ends of every channel set.

    gRPC would refuse messages over 4 MiB, and punish a client that pings an idle connection.
    """
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # A peer that was away for long is found again within a second; gRPC's own limit is minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        # A peer that stopped answering without closing (a frozen process, a cut cable) counts as gone after 30 seconds.
        ("grpc.keepalive_time_ms", 10000),
        ("grpc.keepalive_timeout_ms", 20000),
        ("grpc.http2.max_pings_without_data", 0),
        # Triton's clients may ping every 200 ms, which gRPC would take for an attack.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
    ]
