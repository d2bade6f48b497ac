"""The queue: the only code that talks to Redis."""

from protocol.runtime.imports import without

with without("opentelemetry"):  # redis-py's own metrics, never enabled here: a tenth of a service's imports
    import redis as redis
