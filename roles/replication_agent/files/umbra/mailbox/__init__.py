"""The mailbox half of the contract.

A change that a client is told succeeded is in the shadow's mailbox first.
"""
