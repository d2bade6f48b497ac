"""The console: web pages for operators, which use only the gateway's public routes."""
