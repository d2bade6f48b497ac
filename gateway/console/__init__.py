"""The console: pages in a browser for operators, which ask nothing but the gateway's own routes."""
