"""The commands for fleets of the same user on this machine."""
