"""What crosses Redis, and what every service must understand the same way: messages, keys, scripts, errors,
settings, metrics, tokens as text, and adapters as PEFT writes them. Imports neither torch nor an HTTP framework."""
