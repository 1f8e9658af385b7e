"""Makes a host a voter of a cluster that runs already."""
