"""A discrete-event simulation of a group: nodes, network, coordinator, faults and invariants."""
