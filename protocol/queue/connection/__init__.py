"""How scripts and commands reach the server: clients, the line that all share, a server that changes."""
