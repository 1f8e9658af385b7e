"""The outside half of the failover test: sends mail, changes mailboxes, reads what is there."""
