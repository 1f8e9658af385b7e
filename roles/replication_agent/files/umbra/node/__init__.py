"""Effects on this host that need root, done by a small helper process."""
