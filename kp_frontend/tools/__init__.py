"""Tools around the node: demo, benchmark, soak test, machine report."""
