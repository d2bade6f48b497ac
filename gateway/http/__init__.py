"""HTTP: the application, its server, routes, errors and event streams."""
