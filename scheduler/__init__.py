"""The scheduler service: which worker runs which request, fairness between tenants, liveness of workers.

`core.Scheduler` makes all decisions and is pure: it is given the time and messages. `service` and `session` connect it
to the queue. The service never sees weights or text.
"""
