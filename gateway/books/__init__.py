"""The fleet's books: what tenants have used."""
