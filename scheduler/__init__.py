"""The scheduler service: assigns requests to workers, keeps tenants fair, and detects dead workers.

`core.Scheduler` makes all decisions and is pure: it is given the time and messages. `service` and `session` connect it
to the queue. The service never reads weights or text.
"""
