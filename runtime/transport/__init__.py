"""Communication of the roles: connections, counted messages between the parties, dealer streams."""
