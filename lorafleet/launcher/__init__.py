"""The launcher behind `lorafleet up`: services and queue as child processes of one machine."""
