"""The launcher behind `lorafleet up`: services and queue as child processes on one machine."""
