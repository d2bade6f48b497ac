"""Decides which worker runs which request: fairness, placement, liveness of workers. Never sees weights or text.

`core.Scheduler` is pure, given the time and fed with messages; `service` connects it to the queue.
"""
