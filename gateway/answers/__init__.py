"""Answers on their way to clients: kept alive until they begin, then sent whole or as a stream."""
