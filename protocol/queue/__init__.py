"""The queue: the only code that talks to Redis."""

from protocol.runtime.imports import without

with without("opentelemetry"):  # redis-py's own metrics, which nobody turns on: a tenth of what a service imports
    import redis as redis
