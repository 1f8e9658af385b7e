"""Model-based test of the mirror: what an OK promises is read on the shadow's own disk.

``make model`` runs it in a lab of its own; docs/mirrored.md says what it proves.
"""
