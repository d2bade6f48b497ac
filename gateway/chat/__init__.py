"""Messages of a chat, and the templates that make a prompt of them."""
