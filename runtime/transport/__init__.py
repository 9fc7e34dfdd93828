"""How the parties talk: joining, counted messages between two parties, and the dealer's stream."""
