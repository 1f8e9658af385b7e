"""Debian hosts in systemd-nspawn on network namespaces: the lab of umbra.mail."""
