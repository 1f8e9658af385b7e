"""The authenticated link between the agents of a redundancy group."""
