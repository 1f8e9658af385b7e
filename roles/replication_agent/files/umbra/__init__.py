"""The replication agent of umbra.mail: shadow before 250, mirror before OK."""

__version__ = "0.1.0"
