"""The fleet's books: what tenants have used, and who did what."""
