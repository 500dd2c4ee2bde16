"""How fast this machine runs the networks, and how fast it could: limits, cases, and what held each back."""
