"""The process that fetches adapters from the stores and packs them, and its client in the worker."""
