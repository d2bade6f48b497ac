"""The `lorafleet` command: starts fleets on one machine, operates them, and measures servers."""
