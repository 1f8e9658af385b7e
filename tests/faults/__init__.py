"""Fault trials: load, one fault at a random moment, an account of every acknowledged message.

``python -m tests.faults --lab NAME`` works on a lab that umbra.mail.site has set up, and
``make faults`` does all of it. docs/faults.md says what is tried and what must hold.
"""
